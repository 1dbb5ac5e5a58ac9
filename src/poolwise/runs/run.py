"""A study from its file to its results: run what is missing, gather the scores, tune every design equally.

The files are described in `runs.layout`. A study with `[tuning]` runs in three parts: the study itself under its one
recipe, a search (each design with each setting, on development tasks), and the second arm (each design with its best
setting, on the study's tasks). Every point of the search is a study of its own, in a folder of its own.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.errors import CheckpointError, PoolwiseError, StudyError, printable
from poolwise.files import whole_number, write_json
from poolwise.runs import layout, looks
from poolwise.runs.engine import Event, run_local
from poolwise.study import records
from poolwise.study.recipe import Setting, Tuning, own_setting, settings
from poolwise.study.study import Study
from poolwise.verdicts.robustness import Winner
from poolwise.verdicts.table import main_scores, validate

if TYPE_CHECKING:
    import polars as pl

    from poolwise.study.design import Design


PACKAGES = ("poolwise", "torch", "transformers", "sentence-transformers", "peft", "mteb")
"""The packages whose versions are recorded: scores may depend on them."""


def run(
    study: Study,
    *,
    workers: int = 0,
    per_gpu: int = 0,
    shard: tuple[int, int] = (1, 1),
    extend: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, str]:
    """Train and score what is missing of a study, its search included. Returns why trials failed, by name.

    workers: trials at a time; 0: by GPUs, else one per core. per_gpu: trials at a time on each GPU; 0: as many as fit,
    by the memory that the first trainings need. shard: (i, n) runs every n-th trial from the i-th. extend: after the
    first look, train up to the declared `extend_to` seeds; later runs then do so without asking.

    Raises StudyError where the study changed under a half-done run, CheckpointError for an extension before the first
    look, PoolwiseError where another process runs the study.
    """
    if extend:
        looks.check_extension(study, unfinished(study))
    run_one = _Run(workers, per_gpu, shard, on_event)
    failed = run_one(looks.running(study, extend), lambda: looks.begin(study, extend))
    if study.tuning and not failed:
        failed = _run_search(looks.running(study, extend), run_one)
    if looks.due(study):
        looks.take(study, results(study), trials(study))
    return failed


class _Run:
    """Runs one study after another with the same workers, each without its search."""

    def __init__(self, workers: int, per_gpu: int, shard: tuple[int, int], on_event: Callable[[Event], None]) -> None:
        self.workers, self.per_gpu, self.shard, self.on_event = workers, per_gpu, shard, on_event

    def __call__(self, study: Study, begin: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Run what is missing. `begin` is called once the study is known to be sound. Returns the failures."""
        folder = study.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"output = {str(folder)!r}: no folder can be made there ({error.strerror})"
            raise StudyError([f"{reason}; name one that is free and can be written"]) from error
        failed: dict[str, str] = {}

        def follow(event: Event) -> None:
            kind, content = event
            if kind == "trials":  # preparation succeeded: only now does the study bind later runs
                write_json(folder / layout.STUDY, study.model_dump(mode="json"))
                write_json(folder / layout.TRIALS, {"trials": content})
                _record_versions(folder)
                begin()
            if kind == "failed":
                failed[content[0]] = content[1]
            self.on_event(event)

        with _only_one(folder, self.shard):
            layout.guard(study)
            try:
                run_local(study, workers=self.workers, per_gpu=self.per_gpu, shard=self.shard, on_event=follow)
            finally:
                if records.find(folder / layout.TRIALS, records.Trials):
                    gather(folder)
        return failed


def trials(study: Study) -> list[dict[str, Any]]:
    """The trials of a study that has been started, as its folder shows them.

    Rows: name, label, role, seed, base, id, state (`waiting`, `started`, `done`, `failed`), `reason` of a failure,
    `scores` (files), `device` (a GPU's product name or "cpu"; None before it began) and `peak_memory` (bytes of tensors
    on a GPU; None elsewhere).
    """
    if not started(study):
        raise CheckpointError(f"nothing has run in {study.folder} yet; start with `poolwise run`")
    return [{**row, **_state(layout.trial(study.folder, row["name"]))} for row in _rows(study.folder)]


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's `trials.json`. Raises CheckpointError if it is damaged."""
    found = records.read(folder / layout.TRIALS, records.Trials, "`poolwise run` writes it again")
    return [row.model_dump() for row in found.trials]


def started(study: Study) -> bool:
    """Whether the study has been prepared once, so that its trials are known."""
    return (study.folder / layout.TRIALS).exists()


def all_done(study: Study) -> bool:
    """Whether nothing is missing: False after one shard of several."""
    if study.tuning and not search_is_done(study):
        return False
    return all(trial["state"] == "done" for trial in trials(study))


def unfinished(study: Study) -> list[str]:
    """Names of the trials of the study's designs and seeds that are not done; failed ones count."""
    wanted = {(design.name, seed) for design in study.designs for seed in study.seeds}
    rows = [row for row in trials(study) if row["role"] == "design" and (row["label"], row["seed"]) in wanted]
    started = {(row["label"], row["seed"]) for row in rows}
    absent = [f"{design}-s{seed}" for design, seed in sorted(wanted - started)]
    return absent + [row["name"] for row in rows if row["state"] != "done"]


def _state(folder: Path) -> dict[str, Any]:
    """State, reason, number of score files, device and peak memory of a trial, as far as its folder tells."""
    computed, work = (
        records.find(folder / layout.DTYPE, records.Computed),
        records.find(folder / layout.WORK, records.Work),
    )
    found = {
        "scores": len(layout.score_files(folder, layout.scored_at("*"))),
        "device": printable(computed.device) if computed else None,
        "peak_memory": work.peak_memory if work else None,
    }
    if (path := folder / layout.FAILED).exists():
        failed = records.find(path, records.Failed)
        reason = printable(failed.reason, keep="\n") if failed else f"unknown, because {path} is damaged"
        return {"state": "failed", "reason": reason, **found, "scores": 0}
    if (folder / layout.DONE).exists():
        return {"state": "done", **found}
    return {"state": "started" if (folder / layout.SPEC).exists() else "waiting", **found}


def versions(study: Study) -> dict[str, str]:
    """Package -> version of the libraries that the study ran with (several if it was continued with others), as its
    folder records them; without a record, those of this process."""
    recorded = records.find(study.folder / layout.VERSIONS, records.Versions)
    return {name: ", ".join(found) for name, found in (recorded.packages if recorded else _add_versions({})).items()}


def _record_versions(folder: Path) -> None:
    """Add the versions of this process to those with which the study has run before."""
    before = records.find(folder / layout.VERSIONS, records.Versions)
    write_json(folder / layout.VERSIONS, {"packages": _add_versions(before.packages if before else {})})


def _add_versions(before: dict[str, Any]) -> dict[str, list[str]]:
    return {name: list(dict.fromkeys([*before.get(name, []), _version(name)])) for name in PACKAGES}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:  # the package runs from a folder on PYTHONPATH
        return "not installed"


def shared_work(study: Study) -> str | None:
    """How much work trials shared, in a sentence; None where nothing was counted."""
    files = (records.find(path, records.Work) for path in layout.in_trials(study.folder, layout.WORK))
    found = [work.model_dump(exclude={"peak_memory"}) for work in files if work]
    total = {name: sum(row[name] for row in found) for row in found for name in row}
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
    """The long table (polars) of a study's scores so far, validated like any other table of scores."""
    import polars as pl

    path = study.folder / layout.RESULTS
    if not study.tasks:
        raise CheckpointError(
            f"the study {study.name!r} has no tasks, so there are no scores; add some and run it again"
        )
    if not path.exists():
        raise CheckpointError(f"no scores in {study.folder} yet; run the study first")
    return validate(pl.DataFrame(pl.from_arrow(layout.read_table(path, "`poolwise run` writes it again"))), str(path))


def losses(study: Study) -> dict[str, dict[int, list[float]]]:
    """Training losses by step: design (on its base, if there are several) -> seed -> losses."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in trials(study) if started(study) else ():
        trained = records.find(layout.trial(study.folder, row["name"]) / layout.TRAINED, records.Trained)
        if row["role"] == "design" and trained:
            name = f"{row['label']} on {row['base']}" if len(study.bases) > 1 else row["label"]
            by_step = {n: loss for step, loss in trained.losses.items() if (n := whole_number(step)) is not None}
            found.setdefault(name, {})[row["seed"]] = [by_step[step] for step in sorted(by_step)]
    return found


def gather(folder: Path) -> None:
    """Collect the scores of a study's trials in `results.parquet`, those on its present tasks.

    Scores on a task as it was before an edit, or on one that the study no longer has, stay out: `trials.json` lists the
    score files that count.
    """
    import polars as pl

    files = []
    for row in _rows(folder):
        found = layout.score_files(layout.trial(folder, row["name"]))
        files += [path for path in found if path.name in row["scores"]]
    tables = [table for path in files if (table := layout.read_scores(path)) is not None and table.num_rows]
    if not tables:
        return
    frames = [pl.DataFrame(pl.from_arrow(table)) for table in tables]
    layout.write_table(folder / layout.RESULTS, pl.concat(frames, how="diagonal_relaxed").to_arrow())


@contextmanager
def _only_one(folder: Path, shard: tuple[int, int]) -> Iterator[None]:
    """Lock a study's folder: a whole run excludes every other, a shard only whole runs and itself."""
    number, of = shard
    locks = {layout.lock(folder): fcntl.LOCK_EX if of == 1 else fcntl.LOCK_SH}
    if of > 1:
        locks[layout.lock(folder, number)] = fcntl.LOCK_EX
    with ExitStack() as stack:
        for path, kind in locks.items():
            lock = stack.enter_context(path.open("a"))
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except OSError:
                raise PoolwiseError(
                    f"another process is running the study in {folder}; wait for it or stop it"
                ) from None
        yield


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
    """The best setting of each design on each base model, by mean development score; None while runs are missing."""
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
        score, setting = max(tried, key=lambda pair: pair[0])  # the first of those that tie
        found.append(Winner(name, base, setting, score, len(tried)))
    return found


def tuned(study: Study, chosen: list[Winner]) -> list[Study]:
    """The studies of the second arm. Designs whose best setting is the recipe's own have been run already."""
    groups: dict[tuple[str, Setting], list[Design]] = {}
    for winner in chosen:
        if winner.setting != own_setting(study.recipe):
            groups.setdefault((winner.base, winner.setting), []).append(study.design(winner.design))
    return [
        _part(study, base, setting, "tuned", tuple(designs), controls=False, references=(), evaluate_at=(1.0,))
        for (base, setting), designs in groups.items()
    ]


def _run_search(study: Study, run_one: _Run) -> dict[str, str]:
    """Run what is missing of the search, then of the second arm. Returns why trials failed, by name."""
    from poolwise.runs.prepare import check_tuning  # it loads torch, which reading a study does not need

    check_tuning(study)
    failed: dict[str, str] = {}

    def finish(parts: list[Study]) -> None:
        for part in parts:
            if not _complete(part):
                failed.update(run_one(part))

    finish([part for _, _, part in searches(study)])
    chosen = winners(study)
    if chosen is not None:
        finish(tuned(study, chosen))
    return failed


def search_is_done(study: Study) -> bool:
    """Whether the search and the second arm are complete."""
    chosen = winners(study)
    return chosen is not None and all(_complete(part) for part in tuned(study, chosen))


def tuned_results(study: Study) -> tuple[pl.DataFrame, list[Winner]] | None:
    """The long table of the second arm at its last steps, and the winners; None while runs are missing.

    Rows carry the recipe's number of steps, whatever each setting trained, so that they compare with the first arm's.
    Designs whose best setting is the recipe's own are taken from the first arm.
    """
    import polars as pl

    chosen = winners(study)
    if chosen is None or not search_is_done(study):
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
    """The study of some designs with one setting on one base model; `arm`: "search" or "tuned"."""
    name = setting.name
    if len(study.bases) > 1:
        name += f"-base-{study.bases.index(base)}"
    folder = layout.arm(study.folder, arm, name)
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
    from poolwise.runs.prepare import compute_costs

    rows = layout.stored_costs(study) or compute_costs(study)
    return {(row["base"], row["design"]) for row in rows if not row["head_parameters"]}


def _complete(part: Study) -> bool:
    return records.find(part.folder / layout.TRIALS, records.Trials) is not None and all_done(part)


def _tuning(study: Study) -> Tuning:
    assert study.tuning is not None
    return study.tuning


def _mean() -> Any:
    import polars as pl

    return pl.col("score").mean()
