"""From the long table to arrays: one `Arm`, (seeds, tasks), for each group of tasks and each design.

All contrasts of a table use the same tasks, so a gap anywhere is a gap everywhere: it is refused, or the task is left
out of every design and named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from poolwise import stats
from poolwise.errors import StatisticsError, suggest
from poolwise.verdicts.mechanisms import by_mechanism, whole_task
from poolwise.verdicts.table import main_scores

if TYPE_CHECKING:
    import polars as pl


CELL = ("task", "split", "subset")
LISTED = 8  # gaps that a message spells out
FEW_SOURCES = 5  # simulated: at 3 sources a nominal .0005 is reached in up to 1 % of equal designs, at 5 in .08 %


@dataclass(frozen=True)
class Arm:
    """Scores of one design in one group of tasks, 0–1: `scores` (seeds, tasks), splits and subsets averaged.

    `sources` (tasks,) names the data set behind each task; a task without one is its own source. `unit` is `item` where
    the columns are items of a mechanism's tasks (`mechanism_items`): then its forms count the same in every mean.
    """

    group: str
    design: str
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    sources: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    unit: str = "task"

    @cached_property
    def array(self) -> NDArray[np.float64]:
        """(seeds, tasks)."""
        return np.array(self.scores)

    @cached_property
    def weighted(self) -> NDArray[np.float64]:
        """(seeds, tasks) whose plain mean is the arm's: items weigh so much that each form of a mechanism counts the
        same; tasks are as they are."""
        if self.unit == "task":
            return self.array
        _, form, counts = np.unique([whole_task(task) for task in self.tasks], return_inverse=True, return_counts=True)
        return self.array * (len(form) / (len(counts) * counts[form]))

    @property
    def mean(self) -> float:
        """Mean over seeds and tasks."""
        return float(self.weighted.mean())

    @property
    def run_means(self) -> NDArray[np.float64]:
        """(seeds,) mean over tasks of each run."""
        return self.weighted.mean(axis=1)

    @property
    def task_means(self) -> NDArray[np.float64]:
        """(tasks,) mean over seeds of each task."""
        return self.array.mean(axis=0)

    @cached_property
    def by_source(self) -> NDArray[np.float64]:
        """(seeds, sources), the tasks of each source averaged, sources in order of first appearance."""
        return self.weighted if self.unit == "item" else stats.average_sources(self.array, self.sources)[0]

    def on(self, tasks: Sequence[str]) -> Arm:
        """The same arm on some of its tasks, in the order given."""
        index = [self.tasks.index(task) for task in tasks]
        return Arm(
            self.group, self.design, self.seeds, tuple(tasks), tuple(self.sources[i] for i in index),
            tuple(tuple(run[i] for i in index) for run in self.scores), self.unit,
        )  # fmt: skip

    def whole(self) -> Arm:
        """The arm with a column for each task: items averaged within theirs."""
        if self.unit == "task":
            return self
        array, tasks = stats.average_sources(self.array, [whole_task(task) for task in self.tasks])
        scores = tuple(map(tuple, array.tolist()))
        return Arm(self.group, self.design, self.seeds, tuple(tasks), (self.group,) * len(tasks), scores)


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key under which `m2` comes before `m10`."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts)


def arms(
    frame: pl.DataFrame, family: Sequence[str], others: Sequence[str], by: str, missing: str
) -> tuple[dict[str, dict[str, Arm]], list[str]]:
    """Arms of each group and design, and the list of what was left out, a sentence each.

    `family` must be complete on the same cells (task × split × subset); a design of `others` may lack whole tasks.

    Raises:
        StatisticsError: unknown column `by`, a task in two groups or with two metrics, runs that stopped at different
            steps, gaps with `missing="error"`, nothing left.
    """
    import polars as pl

    main = main_scores(frame).filter(pl.col("design").is_in([*family, *others]))
    scores = _grouped(by_mechanism(frame, main), by)
    items = set(scores.filter("is_item")["group"].unique())
    ours = scores.filter(pl.col("design").is_in(list(family)))
    _check_metrics(scores)
    _check_steps(ours)
    cells, excluded = _complete_cells(ours, missing)
    runs = scores.group_by("design").agg(pl.col("seed").n_unique().alias("_runs"))
    scores = scores.join(cells, on=CELL, nulls_equal=True).join(runs, on="design")
    scores = scores.filter(pl.len().over("design", "task") == pl.col("_cells") * pl.col("_runs"))
    means = scores.group_by("group", "design", "seed", "task", pl.col("source").fill_null(pl.col("task"))).agg(
        pl.col("score").mean()
    )
    grouped: dict[str, dict[str, Arm]] = {}
    for (group, design), part in sorted(means.partition_by("group", "design", as_dict=True).items()):
        seeds = sorted(part["seed"].unique())
        wide = part.pivot(on="seed", index=["task", "source"], values="score").sort("task")
        array = wide.select([str(seed) for seed in seeds]).to_numpy().T
        tasks, sources = tuple(wide["task"]), tuple(wide["source"])
        unit = "item" if group in items else "task"
        arm = Arm(group, design, tuple(seeds), tasks, sources, tuple(map(tuple, array.tolist())), unit)
        grouped.setdefault(group, {})[design] = arm
    return grouped, excluded


def _grouped(scores: pl.DataFrame, by: str) -> pl.DataFrame:
    """Adds the column `group`; a task lies in exactly one, a built-in task in that of its mechanism."""
    import polars as pl

    if by == "all":
        return scores.with_columns(pl.col("mechanism").fill_null("all").alias("group"))
    if by not in scores.columns:
        left = ("design", "seed", "score", "step", "item_id", "is_item")
        known = [name for name in scores.columns if name not in left]
        raise StatisticsError(f"by={by!r}: no such column; allowed: {', '.join(known)} or all{suggest(by, known)}")
    scores = scores.with_columns(pl.coalesce("mechanism", pl.col(by).cast(pl.String)).alias("group"))
    split = scores.group_by("task").agg(pl.col("group").unique().sort()).filter(
        (pl.col("group").list.len() > 1) | pl.col("group").list.contains(None)
    )  # fmt: skip
    if not split.is_empty():
        task, groups = split.sort("task").row(0)
        raise StatisticsError(f"by={by!r} cannot group tasks: {task!r} has the values {groups}, but needs exactly one")
    return scores


def _check_metrics(scores: pl.DataFrame) -> None:
    import polars as pl

    metrics = scores.group_by("task").agg(pl.col("metric").unique().sort())
    several = metrics.filter(pl.col("metric").list.len() > 1).sort("task")
    if not several.is_empty():
        lines = [f"\n  - {task}: {', '.join(found)}" for task, found in several.head(LISTED).iter_rows()]
        raise StatisticsError(
            f"{len(several)} tasks have more than one metric; keep the main one of each:{''.join(lines)}"
        )


def _check_steps(scores: pl.DataFrame) -> None:
    import polars as pl

    last = scores.group_by("design", "seed").agg(pl.col("step").max()).drop_nulls("step").sort("step", "design", "seed")
    if last["step"].n_unique() > 1:
        top = max(last["step"].to_list())
        behind = [f"{d} seed {s} (step {step})" for d, s, step in last.filter(pl.col("step") < top).iter_rows()]
        raise StatisticsError(
            f"runs that stopped early cannot be compared with runs of {top} steps: {_listed(behind)}; "
            "finish them with `poolwise run`, or leave the design out"
        )


def _complete_cells(scores: pl.DataFrame, missing: str) -> tuple[pl.DataFrame, list[str]]:
    """Cells that every run has, with `_cells`, their number in each task; and what was left out."""
    import polars as pl

    if missing not in ("error", "drop"):
        hint = suggest(missing, ["error", "drop"])
        raise StatisticsError(f"missing={missing!r} is unknown; allowed: error, drop{hint}")
    runs, cells = scores.select("design", "seed").unique(), scores.select(CELL).unique()
    gaps = runs.join(cells, how="cross").join(scores, on=["design", "seed", *CELL], how="anti", nulls_equal=True)
    excluded = []
    if not gaps.is_empty():
        gaps = gaps.sort("task", "split", "subset", "design", "seed")
        names = [f"{design} seed {seed} on {_cell(*cell)}" for design, seed, *cell in gaps.iter_rows()]
        if missing == "error":
            raise StatisticsError(
                f"{len(names)} scores are missing: {_listed(names)}. Add them, leave the design out, or compare on the "
                'tasks that all runs share (missing="drop" in Python, --missing drop on the command line)'
            )
        for cell, part in gaps.partition_by(*CELL, as_dict=True, maintain_order=True).items():
            who = _listed([f"{design} seed {seed}" for design, seed in part.select("design", "seed").iter_rows()])
            excluded.append(f"{_cell(*cell)} is left out of every design: no score of {who}.")
    kept = cells.join(gaps, on=CELL, how="anti", nulls_equal=True)
    if kept.is_empty():
        raise StatisticsError("no task has a score in every run; leave out the designs that lack most of them")
    return kept.with_columns(pl.len().over("task").alias("_cells")), excluded


def _cell(task: str, split: str | None, subset: str | None) -> str:
    detail = ", ".join(part for part in (split, subset) if part and part != "default")
    return f"{task} ({detail})" if detail else task


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
