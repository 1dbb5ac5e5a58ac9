"""From the item rows of the long table to arrays: a `DataSet` for each task × split × subset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from poolwise.errors import StatisticsError, suggest
from poolwise.verdicts.long_table import NOT_IN_RUN

if TYPE_CHECKING:
    import polars as pl

Array = NDArray[np.float64]
NOUNS = {
    "Retrieval": "queries", "Reranking": "queries", "Classification": "examples", "Clustering": "sets",
    "STS": "pairs", "PairClassification": "pairs",
}  # fmt: skip
OUTPUT = "cosine"  # metric of rows that hold a model's output, to be measured against the column `gold`
MEASURED = {"STS": "cosine_spearman", "PairClassification": "cosine_ap"}
LISTED = 5  # names that a message spells out


@dataclass(frozen=True)
class DataSet:
    """Items of one task × split × subset that every run has: `runs` of each design, (runs, items), sorted by item id.

    `gold` (items,) where the scores are outputs to be measured against it. `lacking` names the items left out because
    a run lacks them; `with_zeros` is each design's mean with a 0 for those.
    """

    task: str
    task_type: str
    metric: str
    runs: dict[str, Array]
    seeds: dict[str, tuple[int, ...]]
    gold: Array | None
    lacking: tuple[str, ...]
    with_zeros: dict[str, float]

    @property
    def noun(self) -> str:
        """What an item is called."""
        return NOUNS.get(self.task_type, "items")


def items_of(frame: pl.DataFrame, task: str) -> pl.DataFrame:
    """The item rows of one task at each run's last step."""
    import polars as pl

    items = frame.filter(pl.col("item_id").is_not_null())
    known = items["task"].unique(maintain_order=True).to_list()
    if not known:
        raise StatisticsError("the scores hold no items (rows with an item_id); only main scores can be compared")
    if task not in known:
        why = "has no per-item scores" if task in frame["task"] else "is not in the scores"
        names = ", ".join(known[:20]) + (" …" if len(known) > 20 else "")
        raise StatisticsError(f"task {task!r} {why}; tasks with items: {names}{suggest(task, known)}")
    last = pl.col("step").max().over("design", "seed")
    return items.filter(pl.col("step").eq_missing(last) & (pl.col("task") == task))


def last_steps(rows: pl.DataFrame) -> dict[str, int | None]:
    """The step of each design's checkpoints; refused where one run of a design stopped earlier than another."""
    steps: dict[str, int | None] = {}
    for design, seed, step in rows.select("design", "seed", "step").unique().sort("design", "seed").iter_rows():
        if steps.setdefault(design, step) != step:
            raise StatisticsError(
                f"runs of {design!r} stopped at different steps ({steps[design]}, and {step} with seed {seed}); finish "
                "them with `poolwise run`, or leave the short ones out"
            )
    return steps


def item_metric(frame: pl.DataFrame, rows: pl.DataFrame, task: str, wanted: str | None) -> str:
    """The metric of the rows to compare: what was asked for, the task's main one, or the only one."""
    import polars as pl

    kind = rows["task_type"][0]
    found = {MEASURED.get(kind, OUTPUT) if name == OUTPUT else name: name for name in sorted(rows["metric"].unique())}
    if wanted is None:
        main = frame.filter((pl.col("task") == task) & pl.col("item_id").is_null())["metric"].unique().to_list()
        wanted = next((name for name in (*main, *found) if name in found and (name in main or len(found) == 1)), None)
        if wanted is None:
            raise StatisticsError(f"{task}: items have several metrics ({', '.join(found)}); choose one")
    if wanted not in {*found, *found.values()}:
        raise StatisticsError(
            f"metric {wanted!r} is not there for the items of {task!r}; allowed: {', '.join(found)}"
            f"{suggest(wanted, found)}"
        )
    return found.get(wanted, wanted)


def data_sets(rows: pl.DataFrame, task: str, metric: str, missing: str) -> list[DataSet]:
    import polars as pl

    rows = rows.filter(pl.col("metric") == metric)
    if "note" in rows.columns:
        rows = rows.with_columns(pl.when(pl.col("note").ne_missing(NOT_IN_RUN)).then("score").alias("score"))
    expected = sorted(rows.select("design", "seed").unique().iter_rows())
    cells = rows.partition_by("split", "subset", as_dict=True, maintain_order=True)
    return [
        _data_set(part, task if len(cells) == 1 else f"{task} ({split}, {subset})", metric, missing, expected)
        for (split, subset), part in cells.items()
    ]


def _data_set(part: pl.DataFrame, label: str, metric: str, missing: str, expected: list[tuple[str, int]]) -> DataSet:
    import polars as pl

    kind = part["task_type"][0]
    noun = NOUNS.get(kind, "items")
    part = part.with_columns((pl.col("item_id").rank("dense") - 1).alias("_item"))
    names = part["item_id"].unique().sort().to_list()
    table = np.full((len(expected), len(names)), np.nan)  # (runs, items)
    gold = np.full_like(table, np.nan) if metric == OUTPUT else None
    if gold is not None and (kind not in MEASURED or "gold" not in part.columns or part["gold"].is_null().any()):
        raise StatisticsError(
            f"{label}: rows of metric {OUTPUT!r} need a number in column 'gold' and the task type STS or "
            f"PairClassification; this one is {kind}"
        )
    for run, scores in part.partition_by("design", "seed", as_dict=True).items():
        place = scores["_item"].to_numpy()
        table[expected.index(run), place] = scores["score"].to_numpy()  # type: ignore[arg-type]
        if gold is not None:
            gold[expected.index(run), place] = scores["gold"].to_numpy()
    shared = ~np.isnan(table).any(axis=0)
    lacking = [name for name, here in zip(names, shared, strict=True) if not here]
    if not shared.any():
        have = [
            f"{design} seed {seed} has {listed([n for n, x in zip(names, row, strict=True) if x == x])}"
            for (design, seed), row in zip(expected, table, strict=True)
        ]
        raise StatisticsError(f"{label}: no {noun} that all runs have; {'; '.join(have[:LISTED])}")
    if lacking and missing == "error":
        raise StatisticsError(
            f"{label}: {len(lacking)} of {len(names)} {noun} lack a score in some run: {listed(lacking)}. Score them, "
            'or leave them out of every run (missing="drop" in Python, --missing drop on the command line)'
        )
    if gold is not None:
        gold = gold[:, shared]
        if (different := np.flatnonzero((gold != gold[0]).any(axis=0))).size:
            wrong = names[np.flatnonzero(shared)[different[0]]]
            raise StatisticsError(f"{label}: gold of {wrong!r} differs between runs: they were scored on other data")
    names_of = list(dict.fromkeys(design for design, _ in expected))
    of = {name: [i for i, (design, _) in enumerate(expected) if design == name] for name in names_of}
    return DataSet(
        label, kind, MEASURED[kind] if metric == OUTPUT else metric,
        {name: table[of[name]][:, shared] for name in names_of},
        {name: tuple(expected[i][1] for i in of[name]) for name in names_of},
        None if gold is None else gold[0], tuple(lacking),
        {name: float(np.nan_to_num(table[of[name]]).mean()) for name in names_of},
    )  # fmt: skip


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
