"""The search of `[tuning]` and its second arm, run: one small study for each setting, in `FOLDER/search` and `tuned`.

    FOLDER/search/SETTING/   every design with that setting, one seed, on the development tasks
    FOLDER/tuned/SETTING/    the designs whose best setting it is, on the study's seeds and tasks

Each is a study like any other: only what is missing runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.errors import StudyError
from poolwise.running import runner
from poolwise.running.engines import Event
from poolwise.running.study_costs import costs_of
from poolwise.settings.tuning import Setting, Tuning, Winner, own_setting, settings
from poolwise.study import Study
from poolwise.verdicts.long_table import main_scores

if TYPE_CHECKING:
    import polars as pl

    from poolwise.study import Design
    from poolwise.tasks import Task


def searches(study: Study) -> list[tuple[str, Setting, Study]]:
    """(base model, setting, study) of every point of the search."""
    tuning = _tuning(study)
    headless = _headless(study)
    found = []
    for base in study.bases:
        own = study.on_base(base)
        bare = settings(tuning, own.recipe, has_head=False)
        for setting in settings(tuning, own.recipe):
            designs = tuple(d for d in study.designs if setting in bare or (base, d.name) not in headless)
            if designs:
                changes = {"tasks": tuning.tasks, "seeds": (tuning.seed,), "controls": False, "references": ()}
                found.append((base, setting, _part(study, base, setting, "search", designs, **changes)))
    return found


def winners(study: Study) -> list[Winner] | None:
    """The best setting of each design on each base model; None while a run of the search is missing."""
    scores: dict[tuple[str, str], list[tuple[float, Setting]]] = {}
    for base, setting, part in searches(study):
        if not _complete(part):
            return None
        frame = main_scores(runner.results(part))
        for design in part.designs:
            by_task = frame.filter(frame["design"] == design.name).group_by("task").agg(_mean())
            scores.setdefault((base, design.name), []).append((float(by_task["score"].mean()), setting))  # type: ignore[arg-type]
    found = []
    for (base, name), tried in scores.items():
        score, setting = max(tried, key=lambda pair: pair[0])  # of equals the first
        found.append(Winner(name, base, setting, score, len(tried)))
    return found


def tuned(study: Study, chosen: list[Winner]) -> list[Study]:
    """The studies of the second arm; a design whose best setting is the recipe's own has been run already."""
    groups: dict[tuple[str, Setting], list[Design]] = {}
    for winner in chosen:
        if winner.setting != own_setting(study.recipe):
            groups.setdefault((winner.base, winner.setting), []).append(study.design(winner.design))
    return [
        _part(study, base, setting, "tuned", tuple(designs), controls=False, references=(), evaluate_at=(1.0,))
        for (base, setting), designs in groups.items()
    ]


def run_search(
    study: Study, *, workers: int, shard: tuple[int, int], on_event: Callable[[Event], None]
) -> dict[str, str]:
    """Run what is missing of the search, then of the second arm. Returns the reasons of what failed, by name."""
    check_tuning(study)
    failed: dict[str, str] = {}

    def finish(parts: list[Study]) -> None:
        for part in parts:
            if not _complete(part):
                failed.update(runner.run(part, workers=workers, shard=shard, on_event=on_event))

    finish([part for _, _, part in searches(study)])
    chosen = winners(study)
    if chosen is not None:
        finish(tuned(study, chosen))
    return failed


def is_done(study: Study) -> bool:
    """Whether nothing of the search and the second arm is missing."""
    chosen = winners(study)
    return chosen is not None and all(_complete(part) for part in tuned(study, chosen))


def tuned_results(study: Study) -> tuple[pl.DataFrame, list[Winner]] | None:
    """The long table of the second arm at its last steps, with the recipe's number there; None while runs are missing.

    What was run already, as its setting is the recipe's own, is taken from the first arm.
    """
    import polars as pl

    chosen = winners(study)
    if chosen is None or not is_done(study):
        return None
    frames = []
    for winner in chosen:
        if winner.setting == own_setting(study.recipe):
            same = runner.results(study).filter(pl.col("step") == study.recipe.steps, pl.col("seed").is_in(study.seeds))
            mine = (pl.col("design") == winner.design) & (pl.col("base") == winner.base) & (pl.col("role") == "design")
            frames.append(same.filter(mine))
    for part in tuned(study, chosen):
        rows = runner.results(part).filter(pl.col("step") == part.recipe.steps)
        frames.append(rows.with_columns(pl.lit(study.recipe.steps, dtype=rows["step"].dtype).alias("step")))
    return pl.concat(frames, how="diagonal_relaxed"), chosen


def _part(study: Study, base: str, setting: Setting, arm: str, designs: tuple[Design, ...], **changes: Any) -> Study:
    """The study of some designs with one setting on one base model, in a folder of its own."""
    name = setting.name
    if len(study.bases) > 1:
        name += f"-base-{study.bases.index(base)}"
    folder = Path(study.folder).resolve() / arm / name
    own = study.on_base(base)
    baseline = study.baseline if any(d.name == study.baseline for d in designs) else designs[0].name
    plain: dict[str, Any] = {"grid": {}, "tuning": None, "extend_to": None, "type_weights": None, "evaluate_at": (1.0,)}
    return own.model_copy(
        update={
            **plain,
            "name": f"{study.name}-{arm}-{name}",
            "output": str(folder),
            "designs": designs,
            "baseline": baseline,
            "recipe": setting.of(own.recipe),
            **changes,
        }
    )


def check_tuning(study: Study) -> list[Task]:
    """The development tasks. Raises StudyError for one that is a task of the study under another name."""
    from poolwise.tasks import resolve_tasks

    reported = {task.identity: task.name for task in resolve_tasks(study.tasks, study.base_dir)}
    names = set(reported.values())
    development = resolve_tasks(_tuning(study).tasks, study.base_dir)
    if both := [task.name for task in development if task.identity in reported or task.name in names]:
        raise StudyError(
            [f"tuning.tasks: {', '.join(both)} would be reported too; tune on tasks that are not among tasks"]
        )
    return development


def _headless(study: Study) -> set[tuple[str, str]]:
    """(base model, design) without a trainable pooling."""
    return {(row["base"], row["design"]) for row in costs_of(study) if not row["head_parameters"]}


def _complete(part: Study) -> bool:
    return (part.folder / "trials.json").exists() and runner.all_done(part)


def _tuning(study: Study) -> Tuning:
    assert study.tuning is not None
    return study.tuning


def _mean() -> Any:
    import polars as pl

    return pl.col("score").mean()
