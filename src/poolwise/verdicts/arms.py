"""From the long table to arrays: one `Arm`, (seeds, tasks), for each group of tasks and each design.

All contrasts of a table use the same tasks, so one missing score affects them all: it is refused, or the task is left
out of every design and listed.

Two kinds of tasks are compared over seeds and items, their items taking the place of tasks:

- Built-in tasks, by mechanism: ten tasks generated from one grammar are not ten independent tasks. Tasks named
  `demo/<mechanism>-<form>` are grouped by mechanism, whatever a comparison groups by.
- Single tasks, one group each: whoever has one index asks about that index, and its queries are the sample. These are
  the tasks whose data were read from a folder. With `FEW_SOURCES` sources of one type there is a contrast
  over tasks of that type as well; a task of which the table does not say where its data came from is compared over
  items only if its type has fewer.

| form | item | score |
|---|---|---|
| retrieval, reranking | query (of built-in tasks: meaning, its wordings averaged) | the main metric |
| classification | example | share of classifiers that predict it correctly |
| clustering | set | V-measure |
| STS | pair | its pseudo-value of Spearman's correlation (`stats.resample.spearman_parts`) |
| pair classification | pair | its pseudo-value of average precision (`stats.resample.average_precision_parts`) |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from poolwise import stats
from poolwise.demo import PREFIX
from poolwise.errors import StatisticsError, suggest
from poolwise.files import whole_number
from poolwise.stats.resample import average_precision_parts, spearman_parts
from poolwise.verdicts.table import LISTED, Note, first_few, main_scores

if TYPE_CHECKING:
    import polars as pl


CELL = ("task", "split", "subset")
RUN = ("design", "seed", "task")
ITEM = " · "  # between the name of a task and that of its item
ITEM_UNITS = {
    "Retrieval": "query", "Reranking": "query", "Classification": "example", "Clustering": "set", "STS": "pair",
    "PairClassification": "pair",
}  # fmt: skip
"""Task type -> what an item of a single task is called; a task of any other type is not compared over items."""
WORDINGS = 2  # queries with the same meaning in a built-in retrieval task; they are numbered consecutively

# With fewer sources of tasks than this there is no verdict. In simulations of equal designs, p < .0005 occurs in up to
# 1 % of studies with 3 sources, and in .08 % with 5.
FEW_SOURCES = 5


@dataclass(frozen=True)
class Arm:
    """Scores of one design in one group of tasks, 0–1: `scores` (seeds, tasks), splits and subsets averaged.

    `sources` (tasks,) names the data set behind each task; a task without one is its own source. `unit` is `item` if
    the columns are items of a mechanism's tasks; each form of the mechanism then has the same weight in every mean. It
    is `query`, `example`, `set` or `pair` if they are items of a single task.
    """

    group: str
    design: str
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    sources: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    unit: str = "task"

    @property
    def of_own_task(self) -> bool:
        """Whether the group is a single task. It stands for itself, as in `compare --task`: what the runs
        of the designs do elsewhere is not used."""
        return self.unit not in ("task", "item")

    @cached_property
    def array(self) -> NDArray[np.float64]:
        """(seeds, tasks)."""
        return np.array(self.scores)

    @cached_property
    def weighted(self) -> NDArray[np.float64]:
        """(seeds, tasks) whose plain mean is the arm's mean: items are scaled so that each form of a mechanism has the
        same weight; tasks are unchanged."""
        if self.unit != "item":
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
        return self.weighted if self.unit != "task" else stats.average_sources(self.array, self.sources)[0]

    def on(self, tasks: Sequence[str]) -> Arm:
        """The same arm on some of its tasks, in the given order."""
        places = {task: place for place, task in enumerate(self.tasks)}
        index = [places[task] for task in tasks]
        return Arm(
            self.group, self.design, self.seeds, tuple(tasks), tuple(self.sources[i] for i in index),
            tuple(tuple(run[i] for i in index) for run in self.scores), self.unit,
        )  # fmt: skip

    def whole(self) -> Arm:
        """The arm with a column for each task: items are averaged within their task."""
        if self.unit == "task":
            return self
        array, tasks = stats.average_sources(self.array, [whole_task(task) for task in self.tasks])
        scores = tuple(map(tuple, array.tolist()))
        return Arm(self.group, self.design, self.seeds, tuple(tasks), (self.group,) * len(tasks), scores)


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key under which `m2` comes before `m10`."""
    parts = [(whole_number(part), part) for part in re.findall(r"\d+|\D+", name)]
    return tuple((number is not None, number or 0, part) for number, part in parts)


def arms(
    frame: pl.DataFrame, family: Sequence[str], others: Sequence[str], by: str, missing: str
) -> tuple[dict[str, dict[str, Arm]], list[Note]]:
    """Arms of each group and design, and notes on the scores that were left out.

    Args:
        family: designs that must have a score in the same cells (task × split × subset).
        others: designs that may lack whole tasks.
        by: the column that groups tasks, or `all`.
        missing: `error` or `drop`, as in `comparison.compare`.

    Raises:
        StatisticsError: unknown column `by`, a task in two groups or with two metrics, runs that stopped at different
            steps, gaps with `missing="error"`, nothing left.
    """
    import polars as pl

    main = main_scores(frame).filter(pl.col("design").is_in([*family, *others]))
    scores = _grouped(by_items(frame, main, by), by)
    units = dict(scores.drop_nulls("unit").select("group", "unit").unique().iter_rows())
    ours = scores.filter(pl.col("design").is_in(list(family)))
    _check_metrics(scores)
    _check_steps(ours)
    cells, excluded = _complete_cells(ours, missing)
    if lost := sorted(set(ours["group"]) - set(ours.join(cells, on=CELL, how="semi", nulls_equal=True)["group"])):
        excluded.append(Note(f"Nothing is left to compare of: {', '.join(lost)}."))
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
        scored = tuple(map(tuple, array.tolist()))
        arm = Arm(group, design, tuple(seeds), tasks, sources, scored, units.get(group, "task"))
        grouped.setdefault(group, {})[design] = arm
    return grouped, excluded


def _grouped(scores: pl.DataFrame, by: str) -> pl.DataFrame:
    """Add the column `group`: a task is in exactly one, that of its items if it is compared over them."""
    import polars as pl

    if by == "all":
        return scores.with_columns(pl.col("over_items").fill_null("all").alias("group"))
    if by not in scores.columns:
        unusable = ("design", "seed", "score", "step", "item_id", "over_items", "unit")
        known = [name for name in scores.columns if name not in unusable]
        raise StatisticsError(f"by={by!r}: no such column; allowed: {', '.join(known)} or all{suggest(by, known)}")
    scores = scores.with_columns(pl.coalesce("over_items", pl.col(by).cast(pl.String)).alias("group"))
    split = scores.group_by("task").agg(pl.col("group").unique().sort()).filter(
        (pl.col("group").list.len() > 1) | pl.col("group").list.contains(None)
    )  # fmt: skip
    if not split.is_empty():
        task, groups = split.sort("task").row(0)
        raise StatisticsError(f"by={by!r} cannot group tasks: {task!r} has the values {groups}; it needs exactly one")
    return scores


def _check_metrics(scores: pl.DataFrame) -> None:
    """Refuse tasks whose rows have different metrics, which cannot be averaged."""
    import polars as pl

    metrics = scores.group_by("task").agg(pl.col("metric").unique().sort())
    several = metrics.filter(pl.col("metric").list.len() > 1).sort("task")
    if not several.is_empty():
        lines = [f"\n  - {task}: {', '.join(names)}" for task, names in several.head(LISTED).iter_rows()]
        raise StatisticsError(
            f"{len(several)} tasks have more than one metric; keep the main one of each:{''.join(lines)}"
        )


def _check_steps(scores: pl.DataFrame) -> None:
    """Refuse runs that ended at different steps, which would compare lengths of training."""
    import polars as pl

    last = scores.group_by("design", "seed").agg(pl.col("step").max()).drop_nulls("step").sort("step", "design", "seed")
    if last["step"].n_unique() > 1:
        top = max(last["step"].to_list())
        behind = [f"{d} seed {s} (step {step})" for d, s, step in last.filter(pl.col("step") < top).iter_rows()]
        raise StatisticsError(
            f"runs that stopped early cannot be compared with runs of {top} steps: {first_few(behind)}; "
            "finish them with `poolwise run`, or leave the design out"
        )


def _complete_cells(scores: pl.DataFrame, missing: str) -> tuple[pl.DataFrame, list[Note]]:
    """Cells that every run has, with their number in each task (`_cells`), and notes on those that are left out."""
    import polars as pl

    if missing not in ("error", "drop"):
        hint = suggest(missing, ["error", "drop"])
        raise StatisticsError(f"missing={missing!r} is unknown; allowed: error, drop{hint}")
    runs, cells = scores.select("design", "seed").unique(), scores.select(CELL).unique()
    gaps = runs.join(cells, how="cross").join(scores, on=["design", "seed", *CELL], how="anti", nulls_equal=True)
    missed: dict[str, list[str]] = {}
    if not gaps.is_empty():
        gaps = gaps.sort("task", "split", "subset", "design", "seed")
        names = [f"{design} seed {seed} on {_cell(*cell)}" for design, seed, *cell in gaps.iter_rows()]
        if missing == "error":
            raise StatisticsError(
                f"{len(names)} scores are missing: {first_few(names)}. Add them, leave the design out, or compare on "
                'the tasks that all runs share (missing="drop" in Python, --missing drop on the command line)'
            )
        for cell, part in gaps.partition_by(*CELL, as_dict=True, maintain_order=True).items():
            who = first_few([f"{design} seed {seed}" for design, seed in part.select("design", "seed").iter_rows()])
            missed.setdefault(str(cell[0]), []).append(f"{_cell(*cell)}: no score of {who}")
    kept = cells.join(gaps, on=CELL, how="anti", nulls_equal=True)
    if kept.is_empty():
        raise StatisticsError("no task has a score in every run; leave out the designs that lack most of them")
    sizes = dict(cells.group_by("task").len().iter_rows())
    left = dict(
        kept.group_by("task").agg(pl.concat_str("split", "subset", separator=" ", ignore_nulls=True)).iter_rows()
    )
    whole = {task: names for task, names in missed.items() if task not in left}
    reduced = {task: names for task, names in missed.items() if task in left}
    excluded = []
    if whole:
        count = f"{len(whole)} of {len(sizes)} tasks ({first_few([*whole])})"
        text = f"Left out of every design, as a run has no score: {count}."
        excluded.append(Note(text, [case for names in whole.values() for case in names]))
    if reduced:
        named = [f"{task} ({len(left[task])} of {sizes[task]}: {first_few(sorted(left[task]))})" for task in reduced]
        text = f"Compared on the splits and subsets that every run has: {first_few(named)}."
        excluded.append(Note(text, [case for names in reduced.values() for case in names]))
    return kept.with_columns(pl.len().over("task").alias("_cells")), excluded


def _cell(task: str, split: str | None, subset: str | None) -> str:
    detail = ", ".join(part for part in (split, subset) if part and part != "default")
    return f"{task} ({detail})" if detail else task


def whole_task(name: str) -> str:
    """The task that an item belongs to: `demo/roles-sts` for `demo/roles-sts · 12`."""
    return name.partition(ITEM)[0]


def by_items(frame: pl.DataFrame, main: pl.DataFrame, by: str) -> pl.DataFrame:
    """`main` (rows of main scores, one checkpoint per run) with the columns `over_items` and `unit`.

    `over_items` is the group of a task that is compared over items: its mechanism, or the single task if tasks are
    grouped `by` task type or task. The main score of such a task is replaced by rows for its items, each treated as a
    task, if every run has items in `frame` (the long table). `unit` is null in the other rows.
    """
    import polars as pl

    built_in = pl.col("task").str.starts_with(PREFIX)
    mechanism = pl.col("task").str.strip_prefix(PREFIX).str.extract(r"^(.*)-[^-]*$").fill_null(pl.col("task"))
    main = main.with_columns(
        pl.when(built_in).then(mechanism).alias("over_items"), pl.lit(None, pl.String).alias("unit")
    )
    items = frame.filter(pl.col("item_id").is_not_null())
    if items.is_empty():
        return main
    parts, replaced = [], set[str]()
    planted = main.filter(built_in)
    if not planted.is_empty() and "gold" in frame.columns and _all_runs(items, planted):
        parts.append(_item_rows(items, planted, pl.lit("item")))
        replaced |= set(planted["task"])
    groups = {*main["over_items"].drop_nulls(), *main["task_type"]}
    sources = main.group_by("task_type").agg(pl.col("source").fill_null(pl.col("task")).n_unique())
    many = set(sources.filter(pl.col("source") >= FEW_SOURCES)["task_type"]) if by == "task_type" else set[str]()
    for name in _own_tasks(main, many) if by in ("task_type", "task") else ():
        rows, mine = main.filter(pl.col("task") == name), items.filter(pl.col("task") == name)
        kind = rows["task_type"][0]
        if ITEM not in name and _all_runs(mine, rows):
            # A folder may be called like a task type, whose group it must not join.
            group = f"{name} (single task)" if name in groups else name
            parts.append(_item_rows(mine, rows.with_columns(over_items=pl.lit(group)), pl.lit(ITEM_UNITS[kind])))
            replaced |= {name} if kind not in many else set()
    return pl.concat([main.filter(~pl.col("task").is_in(list(replaced))), *parts], how="diagonal_relaxed")


def _own_tasks(main: pl.DataFrame, many: Collection[str]) -> list[str]:
    """Tasks that are tested singly: made from texts in memory and not built in; or of unknown identity, unless there
    are `many` tasks of their type."""
    import polars as pl

    identity = pl.col("task_identity") if "task_identity" in main.columns else pl.lit(None, pl.String)
    unknown = identity.is_null() & ~pl.col("task_type").is_in(list(many))
    own = (identity.str.starts_with("sha256:").fill_null(False) | unknown) & ~pl.col("task").str.starts_with(PREFIX)
    return sorted(main.filter(own & pl.col("task_type").is_in(list(ITEM_UNITS)))["task"].unique())


def _all_runs(items: pl.DataFrame, main: pl.DataFrame) -> bool:
    """Whether every run with a main score of these tasks has items of it too, at the same step and in that metric."""
    import polars as pl

    rows = items.join(main.select(*RUN, "step", metric_main="metric"), on=[*RUN, "step"], nulls_equal=True)
    paired = pl.col("gold").is_not_null() if "gold" in rows.columns else pl.lit(False)
    rows = rows.filter((pl.col("metric") == pl.col("metric_main")) | ((pl.col("metric") == "cosine") & paired))
    return rows.select(RUN).n_unique() == main.select(RUN).n_unique()


def _item_rows(items: pl.DataFrame, main: pl.DataFrame, unit: pl.Expr) -> pl.DataFrame:
    """Rows for the items of the tasks in `main`, shaped like its rows; the item's label is both task and source."""
    import polars as pl

    keys = main.select(*RUN, "step", "over_items", metric_main="metric", score_main="score")
    rows = items.join(keys, on=[*RUN, "step"], nulls_equal=True)
    pairs, others = rows.filter(pl.col("metric") == "cosine"), rows.filter(pl.col("metric") == pl.col("metric_main"))
    queries = pl.col("item_id").str.strip_prefix("q").cast(pl.Int64, strict=False) // WORDINGS
    planted = (pl.col("task_type") == "Retrieval") & pl.col("task").str.starts_with(PREFIX)
    meaning = pl.when(planted).then(pl.format("meaning {}", queries))
    rows = pl.concat(
        [
            _pseudo_values(pairs),
            others.with_columns(meaning.fill_null(pl.col("item_id")).alias("item_id")),
        ],
        how="diagonal_relaxed",
    )
    label = pl.concat_str("task", pl.lit(ITEM), "item_id")
    rows = rows.with_columns(label.alias("task"), label.alias("source"), pl.col("metric_main").alias("metric"))
    known = (*RUN, "step", "task_type", "split", "subset", "over_items")
    rows = rows.group_by(*(name for name in known if name in rows.columns), "metric", "source").agg(
        pl.col("score").mean()
    )
    return rows.with_columns(unit=unit)


def _pseudo_values(pairs: pl.DataFrame) -> pl.DataFrame:
    """Pairs with their pseudo-values as scores; 0 if the task scored 0 because all cosines are equal."""
    import polars as pl

    parts = []
    for run in pairs.partition_by(RUN, maintain_order=True):
        parts_of = average_precision_parts if run["task_type"][0] == "PairClassification" else spearman_parts
        scored = parts_of(run["score"].to_numpy(), run["gold"].to_numpy()) if run["score_main"][0] else 0.0
        parts.append(run.with_columns(score=pl.Series(np.broadcast_to(scored, len(run)).copy())))
    return pl.concat(parts) if parts else pairs
