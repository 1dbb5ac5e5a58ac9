"""A study from its file to its results: only what is missing runs, and what is there is never lost.

FOLDER/study.json        the study as it was started
FOLDER/trials.json       its trials
FOLDER/trials/NAME/      one folder a trial, see `running.trial`
FOLDER/results.parquet   the long table of all scores, made anew after each run
FOLDER/search, tuned     of a study that tunes: see `running.search`
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.errors import CheckpointError, PoolwiseError, StudyError
from poolwise.runs import layout, looks
from poolwise.runs.check import costs_of
from poolwise.runs.engine import Event, run_local
from poolwise.runs.prepare import check_tuning
from poolwise.study.recipe import Setting, Tuning, own_setting, settings
from poolwise.study.study import Study
from poolwise.verdicts.robustness import Winner
from poolwise.verdicts.table import main_scores

if TYPE_CHECKING:
    import polars as pl

    from poolwise.study.design import Design


GROWS = ("designs", "base_models", "seeds", "tasks", "references", "controls")
"""What may be added to under a study that has begun; all else would change what is being compared."""


def run(
    study: Study,
    *,
    workers: int = 0,
    shard: tuple[int, int] = (1, 1),
    extend: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, str]:
    """Train and score what is missing of a study. Returns the reasons of the trials that failed, by name.

    extend: after the first look, train up to the declared `extend_to` seeds; from then on every run does.

    Raises StudyError where the study changed under a half-done run, PoolwiseError where another process runs it.
    """
    folder = study.folder
    if extend:
        looks.check_extension(study, unfinished(study))
    declared, study = study, looks.running(study, extend)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"output = {str(folder)!r}: no folder can be made there ({error.strerror})"
        raise StudyError([f"{reason}; name one that is free and can be written"]) from error
    failed: dict[str, str] = {}

    def follow(event: Event) -> None:
        kind, content = event
        if kind == "trials":  # the study could be prepared: from now on it may only grow
            _write(folder / "study.json", study.model_dump(mode="json"))
            _write(folder / "trials.json", content)
            looks.begin(declared, extend)
        if kind == "failed":
            failed[content[0]] = content[1]
        on_event(event)

    with _only_one(folder, shard):
        guard(study)
        try:
            run_local(study, workers=workers, shard=shard, on_event=follow)
        finally:
            if (folder / "trials.json").exists():
                gather(folder)
    if study.tuning and not failed:
        failed = run_search(study, workers=workers, shard=shard, on_event=on_event)
    return failed


def guard(study: Study) -> None:
    """Refuse a study that is no longer the one whose results lie in its folder; designs, seeds, tasks may be added."""
    path = study.folder / "study.json"
    if not path.exists():
        return
    written = json.loads(path.read_text(encoding="utf-8"))
    before_study = Study.parse(written, study.base_dir)  # what has been added to the file's form since has its default
    old = before_study.model_dump(mode="json")
    new = study.model_dump(mode="json")
    problems = []
    for key in dict.fromkeys([*old, *new]):
        if key in GROWS or key in {"name", "output", "grid"} or (key == "tuning" and old.get(key) is None):
            continue
        before: Any = old.get(key)
        after: Any = new.get(key)
        if key == "recipe":
            fields = [f for f in {**before, **after} if f not in {"base_model", "report_to", "save_steps"}]
            changed = [(f"recipe.{f}", before.get(f), after.get(f)) for f in fields if before.get(f) != after.get(f)]
        else:
            changed = [(key, before, after)] if before != after else []
        problems += [f"{name} was {b!r} and is now {a!r}" for name, b, a in changed]
    if gone := [name for name in before_study.bases if name not in study.bases]:
        problems.append(f"the base model was {', '.join(gone)} and is now {', '.join(study.bases)}")
    now = {design["name"]: design for design in new["designs"]}
    for design in old["designs"]:
        name = design["name"]
        if name in now and now[name] != design:
            problems.append(f"design {name!r} is no longer what it was; give the new one another name")
    if problems:
        problems.append(f"restore this, or choose another name or output, or delete {study.folder} to start anew")
        raise StudyError(problems, f"the study changed under the run in {study.folder}")


def trials(study: Study) -> list[dict[str, Any]]:
    """The trials of a study that has been started: name, label, role, seed, id, state, and reason where it failed."""
    folder = study.folder
    if not (folder / "trials.json").exists():
        raise CheckpointError(f"nothing has run in {folder} yet; start with `poolwise run`")
    rows = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    for row in rows:
        row.update(_state(folder / "trials" / row["name"]))
    return rows  # type: ignore[no-any-return]


def all_done(study: Study) -> bool:
    """Whether nothing is missing: False after one shard of several."""
    if study.tuning and not is_done(study):
        return False
    return all(trial["state"] == "done" for trial in trials(study))


def unfinished(study: Study) -> list[str]:
    """The trials of the study's designs at its own seeds that are not done, by name; failed ones count."""
    wanted = {(design.name, seed) for design in study.designs for seed in study.seeds}
    rows = [row for row in trials(study) if row["role"] == "design" and (row["label"], row["seed"]) in wanted]
    started = {(row["label"], row["seed"]) for row in rows}
    absent = [f"{design}-s{seed}" for design, seed in sorted(wanted - started)]
    return absent + [row["name"] for row in rows if row["state"] != "done"]


def _state(folder: Path) -> dict[str, Any]:
    if (folder / "failed.json").exists():
        reason = json.loads((folder / "failed.json").read_text(encoding="utf-8"))["reason"]
        return {"state": "failed", "reason": reason, "scores": 0}
    scores = len(list(folder.glob("scores/step-*/*.parquet")))
    if (folder / "done").exists():
        return {"state": "done", "scores": scores}
    return {"state": "started" if (folder / "spec.json").exists() else "waiting", "scores": scores}


def shared_work(study: Study) -> str | None:
    """What the trials did not have to do twice, in a sentence; None where nothing was counted."""
    found = []
    for path in (study.folder / "trials").glob(f"*/{layout.WORK}"):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    total = {name: sum(row.get(name, 0) for row in found) for row in found for name in row}
    if not total.get("asked"):
        return None
    words = (
        f"shared: one preparation for all trials (data, order, tasks); of {total['asked']:,} texts asked for in "
        f"evaluation {total['encoded']:,} were encoded, with {total['computed'] / max(total['tokens'], 1):.2f} tokens "
        "computed for each real one"
    )
    if total.get("frozen_asked"):
        words += (
            f"; the frozen base ran on {total['frozen_computed']:,} of the {total['frozen_asked']:,} texts that it was "
            "given"
        )
    return words


def results(study: Study) -> Any:
    """The long table (polars) of a study's scores so far."""
    import polars as pl

    path = study.folder / "results.parquet"
    if not study.tasks:
        raise CheckpointError(
            f"the study {study.name!r} has no tasks, so there are no scores; add some and run it again"
        )
    if not path.exists():
        raise CheckpointError(f"no scores in {study.folder} yet; run the study first")
    return pl.read_parquet(path)


def gather(folder: Path) -> None:
    """Collect the scores of the study's trials in `results.parquet`: those on its tasks as they are now, not as they
    were before an edit, nor on tasks that it no longer has."""
    import polars as pl

    files = []
    for row in json.loads((folder / "trials.json").read_text(encoding="utf-8")):
        found = sorted((folder / "trials" / row["name"]).glob("scores/*/*.parquet"))
        files += [path for path in found if path.name in row.get("scores", [path.name])]
    tables = [table for path in files if (table := layout.read(path)) is not None and table.num_rows]
    if not tables:
        return
    temporary = folder / f".results.parquet.{os.getpid()}.tmp"
    try:
        frames = [pl.DataFrame(pl.from_arrow(table)) for table in tables]
        pl.concat(frames, how="diagonal_relaxed").write_parquet(temporary)
        temporary.replace(folder / "results.parquet")
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _only_one(folder: Path, shard: tuple[int, int]) -> Iterator[None]:
    """A whole run shares its folder with no other, a shard only with the other shards (of the same number)."""
    number, of = shard
    locks = {".lock": fcntl.LOCK_EX} if of == 1 else {".lock": fcntl.LOCK_SH, f".lock-{number}": fcntl.LOCK_EX}
    with ExitStack() as stack:
        for name, kind in locks.items():
            lock = stack.enter_context((folder / name).open("a"))
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except OSError:
                raise PoolwiseError(
                    f"another process is running the study in {folder}; wait for it or stop it"
                ) from None
        yield


def _write(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
        frame = main_scores(results(part))
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
                failed.update(run(part, workers=workers, shard=shard, on_event=on_event))

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
            same = results(study).filter(pl.col("step") == study.recipe.steps, pl.col("seed").is_in(study.seeds))
            mine = (pl.col("design") == winner.design) & (pl.col("base") == winner.base) & (pl.col("role") == "design")
            frames.append(same.filter(mine))
    for part in tuned(study, chosen):
        rows = results(part).filter(pl.col("step") == part.recipe.steps)
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


def _headless(study: Study) -> set[tuple[str, str]]:
    """(base model, design) without a trainable pooling."""
    return {(row["base"], row["design"]) for row in costs_of(study) if not row["head_parameters"]}


def _complete(part: Study) -> bool:
    return (part.folder / "trials.json").exists() and all_done(part)


def _tuning(study: Study) -> Tuning:
    assert study.tuning is not None
    return study.tuning


def _mean() -> Any:
    import polars as pl

    return pl.col("score").mean()
