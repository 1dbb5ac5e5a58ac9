"""Looks at a study: the comparison that it declares, on the runs that a look may use, and how often that may happen.

Testing again whenever a few seeds were added finds differences between equal designs (at 3, 5, 7 and 10 seeds: .15
instead of .05). A study is therefore tested when its planned seeds are complete, and once more at `extend_to` seeds if
that was declared before the first run, at .03 each (`stats.many.TWO_LOOK_ALPHA`). In between, differences are shown and
nothing is tested. Seeds that were never declared make every verdict exploratory.

`looks.json` in the study's folder holds the plan as of the first run, whether the study was extended, and the result of
each look, which `poolwise run` records when the seeds of that look are complete.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from poolwise.errors import CheckpointError
from poolwise.files import write_json
from poolwise.runs import layout
from poolwise.stats.many import TWO_LOOK_ALPHA
from poolwise.study import records
from poolwise.verdicts import robustness
from poolwise.verdicts.comparison import Comparison, compare
from poolwise.verdicts.table import controls_of, first_few

if TYPE_CHECKING:
    import polars as pl

    from poolwise.study.study import Study


ALPHA = 0.05
RECORDED = ("difference", "ci_low", "ci_high", "p_value", "p_holm", "verdict")
"""The fields of a verdict that are kept in `looks.json`."""


@dataclass(frozen=True)
class Plan:
    """`planned` seeds, `extend_to` as declared, `extended`: the extension has begun; `looks` in the order taken."""

    planned: tuple[int, ...]
    extend_to: int | None
    extended: bool = False
    looks: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class State:
    """The `seeds` to compare, each test at `alpha`, and why that is `interim` or `exploratory` (empty if it is not).

    `look`: 1 or 2 if the seeds of that look are complete, otherwise 0; `note`: a sentence on the looks.
    """

    seeds: tuple[int, ...]
    alpha: float
    interim: str = ""
    exploratory: str = ""
    look: int = 0
    note: str = ""


def plan(study: Study) -> Plan:
    """The plan of a study as of its first run; before that, as the study file declares it.

    Raises:
        CheckpointError: `looks.json` is damaged.
    """
    path = study.folder / layout.LOOKS
    if not path.exists():
        return Plan(tuple(study.seeds), study.extend_to)
    raw = records.read(
        path,
        records.Declared,
        "restore it, as it records which seeds were planned; without it the plan is what the study file says now",
    )
    return Plan(tuple(raw.planned), raw.extend_to, raw.extended, tuple(look.model_dump() for look in raw.looks))


def running(study: Study, extend: bool = False) -> Study:
    """The study with the seeds that are to run now: once extended, it stays extended.

    Raises:
        StudyError: an extension that was not declared.
    """
    return study.extended() if extend or plan(study).extended else study


def begin(study: Study, extend: bool = False) -> None:
    """Store the plan at the first run of the study, and later that it was extended."""
    current = plan(study)
    if (extend and not current.extended) or not (study.folder / layout.LOOKS).exists():
        _write(study, replace(current, extended=extend or current.extended))


def check_extension(study: Study, unfinished: Sequence[str]) -> None:
    """Refuse an extension before the planned seeds are complete; `unfinished` names the missing trials.

    Raises:
        StudyError: no extension was declared.
        CheckpointError: the first look has not taken place yet.
    """
    study.extended()
    if unfinished and not plan(study).extended:
        raise CheckpointError(
            f"--extend comes after the first look, which still needs these runs: {first_few(unfinished)}; run the "
            "study without --extend first"
        )


def state(study: Study, done: Collection[tuple[str, int]]) -> State:
    """The comparison that the runs in `done` (design, seed) allow."""
    current = plan(study)
    alpha = TWO_LOOK_ALPHA if study.extend_to else ALPHA
    wanted = study.all_seeds if current.extended else study.seeds

    def missing(seeds: Collection[int]) -> list[str]:
        runs = ((design.name, seed) for seed in seeds for design in study.designs)
        return [f"{design} seed {seed}" for design, seed in runs if (design, seed) not in done]

    absent = missing(wanted)
    interim = ""
    if absent:
        interim = f"Interim: runs are missing ({first_few(absent)}). Differences are shown, but nothing is tested yet."
    if set(current.planned) != set(study.seeds):
        why = (
            f"Exploratory: the study was planned with {_seed_words(current.planned)} and now has "
            f"{_seed_words(study.seeds)}. Seeds chosen after a look find differences that do not exist; a verdict "
            "needs seeds that were declared beforehand."
        )
        return State(tuple(wanted), alpha, interim=interim, exploratory=why)
    at = f"{alpha:.2f}".removeprefix("0")
    if not absent:
        note = ""
        if study.extend_to:
            note = f"Look {1 + current.extended} of 2 ({_seed_words(wanted)}), each tested at {at}."
            if not current.extended:
                note += f" Declared: up to {study.extend_to} seeds, by poolwise run --extend."
        return State(tuple(wanted), alpha, look=1 + current.extended, note=note)
    if current.extended and not missing(study.seeds):
        note = f"Look 1 of 2 ({_seed_words(study.seeds)}), at {at}; the extension is still running and is not shown."
        return State(tuple(study.seeds), alpha, look=1, note=note)
    return State(tuple(wanted), alpha, interim=interim)


def finished(study: Study, frame: pl.DataFrame, trials: Sequence[Mapping[str, Any]]) -> set[tuple[str, int]]:
    """The (design, seed) that are done: not failed, and scored in as many cells as any other.

    Args:
        frame: the long table of the study, with all its steps.
        trials: its trials with their `state`; empty if the table came without a run folder.
    """
    last = last_step(study, frame)
    cells = last.filter((last["role"] == "design") & last["item_id"].is_null()).group_by("design", "seed").len()
    most = cells["len"].max()
    done = {(design, seed) for design, seed, size in cells.iter_rows() if size == most}
    return done - {(row["label"], row["seed"]) for row in trials if row["role"] == "design" and row["state"] != "done"}


def last_step(study: Study, frame: pl.DataFrame) -> pl.DataFrame:
    """The scores at the end of the training, and those of untrained models at step 0."""
    import polars as pl

    return frame.filter((pl.col("step") == study.recipe.steps) | pl.col("role").is_in(["untuned", "reference"]))


def visible(frame: pl.DataFrame, at: State) -> pl.DataFrame:
    """The scores that a look may use: of the designs only its seeds, of the controls all."""
    import polars as pl

    return frame.filter((pl.col("role") != "design") | pl.col("seed").is_in(list(at.seeds)))


def compared(
    study: Study,
    frame: pl.DataFrame,
    at: State,
    baseline: str | None = None,
    by: str = "task_type",
    missing: str = "error",
    exploratory: str = "",
    run_sd: float | None = None,
    run_df: float = float("inf"),
) -> Comparison:
    """The comparison of a study's scores at their last step, as the study declares it.

    Args:
        frame: the long table of the study, averaged over base models if there are several.
        at: the look, which decides the seeds and the level of the tests.
        baseline, by, missing, run_sd, run_df: as in `verdicts.comparison.compare`; by default as declared.
        exploratory: why a comparison other than the declared one is not confirmatory.
    """
    last = visible(last_step(study, frame), at)
    return compare(
        last,
        baseline or study.baseline,
        by,
        controls=controls_of(last),
        margin=study.margin,
        alpha=at.alpha,
        missing="drop" if at.interim else missing,  # an interim picture shows the tasks that all designs have so far
        order=[design.name for design in study.designs],
        type_weights=study.type_weights,
        run_sd=run_sd,
        run_df=run_df,
        interim=at.interim,
        exploratory=at.exploratory or exploratory,
    )


def due(study: Study) -> bool:
    """Whether a look of this study may have to be recorded: it declares two, and has something to compare."""
    return bool(study.extend_to and study.tasks and len(study.designs) > 1 and (study.folder / layout.RESULTS).exists())


def take(study: Study, frame: pl.DataFrame, trials: Sequence[Mapping[str, Any]]) -> None:
    """Record a declared look, the first time that its seeds are complete."""
    at = state(study, finished(study, frame, trials))
    if not at.look or any(look["look"] == at.look for look in plan(study).looks):
        return
    names = robustness.bases(frame)
    comparison = compared(study, robustness.pooled(frame, names) if len(names) > 1 else frame, at)
    rows = [
        {"group": row.group, "design": row.design, **{name: getattr(row.verdict, name) for name in RECORDED}}
        for row in comparison.rows
        if row.verdict
    ]
    record(study, at, rows)


def record(study: Study, at: State, rows: Sequence[Mapping[str, Any]]) -> None:
    """Store the verdicts of a look: rows with `group`, `design` and the fields of `RECORDED`."""
    taken = datetime.now(UTC).isoformat(timespec="seconds")
    look = {"look": at.look, "seeds": list(at.seeds), "alpha": at.alpha, "taken": taken, "verdicts": list(rows)}
    current = plan(study)
    _write(study, replace(current, looks=(*current.looks, look)))


def earlier(looks: Collection[Mapping[str, Any]], at: State) -> str:
    """At the second look, the result of the first one in a sentence; empty otherwise."""
    first = next((look for look in looks if look["look"] == 1), None)
    if at.look != 2 or first is None:
        return ""
    designs: dict[tuple[str, str], list[str]] = {}
    for row in first["verdicts"]:
        designs.setdefault((row["group"], row["verdict"]), []).append(row["design"])
    parts = [f"{group}: {', '.join(names)} {word}" for (group, word), names in designs.items()]
    return f"Result of the first look ({_seed_words(first['seeds'])}, {first['taken'][:10]}): {'; '.join(parts)}."


def _seed_words(seeds: Collection[int]) -> str:
    ordered = sorted(seeds)
    if len(ordered) > 2 and ordered[-1] - ordered[0] + 1 == len(ordered) == len(set(ordered)):
        return f"seeds {ordered[0]} to {ordered[-1]}"
    return f"seed{'s' * (len(ordered) > 1)} {', '.join(map(str, ordered))}"


def _write(study: Study, content: Plan) -> None:
    write_json(study.folder / layout.LOOKS, asdict(content))
