"""Systems compared on one data set, item by item.

The test follows from the task type (docs/compare.md): a permutation test or McNemar's if a score is a mean over items,
a bootstrap of the statistic if a score belongs to all pairs together. No rank test over items is offered: per-item
differences are skewed and mostly zero, so its false-alarm rate at a mean difference of 0 reaches .99.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from poolwise import stats
from poolwise.errors import StatisticsError, suggest
from poolwise.stats.exact import midranks
from poolwise.stats.resample import average_precision_function, average_precision_parts, correlation, spearman_parts
from poolwise.verdicts.table import (
    LISTED,
    MEASURED,
    NOT_IN_RUN,
    OUTPUT,
    first_few,
    item_metric,
    items_of,
    last_steps,
)

if TYPE_CHECKING:
    import polars as pl


Array = NDArray[np.float64]
NOUNS = {
    "Retrieval": "queries", "Reranking": "queries", "Classification": "examples", "Clustering": "sets",
    "STS": "pairs", "PairClassification": "pairs",
}  # fmt: skip
COPIED_ITEMS = 10  # items on which two runs must agree, all of them, for one to be taken for a copy of the other


@dataclass(frozen=True)
class DataSet:
    """Items of one task × split × subset: `runs` of each design, (runs, items), in the order of `names`.

    A score is nan where a run lacks the item; `pair` leaves those out. `gold` (items,) if the scores are outputs to be
    scored against it. `copies` are sentences on runs left out because they repeat another. `lacking` names the items
    that were left out; `with_zeros` is each design's mean with a score of 0 for those.
    """

    task: str
    task_type: str
    metric: str
    names: tuple[str, ...]
    runs: dict[str, Array]
    seeds: dict[str, tuple[int, ...]]
    gold: Array | None
    copies: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    with_zeros: Mapping[str, float] = field(default_factory=dict)

    def per_item(self, design: str) -> Array:
        """(runs, items) whose mean over items is each run's score: the scores, or pseudo-values of the statistic."""
        if self.gold is None:
            return self.runs[design]
        parts = spearman_parts if self.task_type == "STS" else average_precision_parts
        return np.stack([parts(run, self.gold) for run in self.runs[design]])

    @property
    def noun(self) -> str:
        """The plural name of the items."""
        return NOUNS.get(self.task_type, "items")

    def pair(self, base: str, other: str) -> DataSet:
        """The items that every run of two designs has; further designs stay if their runs have all of these.

        Raises:
            StatisticsError: there is no such item.
        """
        both = np.concatenate([self.runs[base], self.runs[other]])
        shared = ~np.isnan(both).any(axis=0)
        if not shared.any():
            parts = [f"{design} seed {seed} has {first_few(self._items(run))}"
                     for design in (base, other)
                     for seed, run in zip(self.seeds[design], self.runs[design], strict=True)]  # fmt: skip
            raise StatisticsError(f"{self.task}: no {self.noun} that all runs have; {'; '.join(parts[:LISTED])}")
        runs = {name: array[:, shared] for name, array in self.runs.items()}
        complete = {name: array for name, array in runs.items() if not np.isnan(array).any()}
        zeros = {name: float(np.nan_to_num(self.runs[name]).mean()) for name in (base, other)}
        lacking = tuple(name for name, present in zip(self.names, shared, strict=True) if not present)
        gold = None if self.gold is None else self.gold[shared]
        names = tuple(name for name, present in zip(self.names, shared, strict=True) if present)
        return replace(self, names=names, runs=complete, gold=gold, lacking=lacking, with_zeros=zeros)

    def _items(self, run: Array) -> list[str]:
        return [name for name, score in zip(self.names, run, strict=True) if score == score]


def data_sets(rows: pl.DataFrame, task: str, metric: str, missing: str) -> list[DataSet]:
    """The items of one task, as one data set for each split and subset."""
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
    """`expected`: (design, seed) of every run that must have the items."""
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
    gaps = np.isnan(table).any(axis=0)
    if gaps.any() and missing == "error":
        lacking = [name for name, gap in zip(names, gaps, strict=True) if gap]
        raise StatisticsError(
            f"{label}: {len(lacking)} of {len(names)} {noun} lack a score in some run: {first_few(lacking)}. Score "
            'them, or leave them out of every run (missing="drop" in Python, --missing drop on the command line)'
        )
    if gold is not None:
        known = np.nanmax(gold, axis=0)
        if (different := np.flatnonzero(known != np.nanmin(gold, axis=0))).size:
            raise StatisticsError(
                f"{label}: gold of {names[different[0]]!r} differs between runs: they were scored on other data"
            )
        gold = known
    designs = dict.fromkeys(design for design, _ in expected)
    places = {name: [i for i, (design, _) in enumerate(expected) if design == name] for name in designs}
    known = part.select("design", "seed", "model_identity").iter_rows() if "model_identity" in part.columns else ()
    models = {(design, seed): model for design, seed, model in known}
    copies = []
    for name, runs in places.items():
        first: dict[tuple[bytes, Any], int] = {}
        for i in runs:
            first.setdefault((table[i].tobytes(), models.get(expected[i])), i)
        if len(first) < len(runs) and len(names) >= COPIED_ITEMS:
            copies.append(f"{len(runs) - len(first)} of {len(runs)} runs of {name} repeat another one exactly")
            places[name] = list(first.values())
    return DataSet(
        label, kind, MEASURED[kind] if metric == OUTPUT else metric, tuple(names),
        {name: table[runs] for name, runs in places.items()},
        {name: tuple(expected[i][1] for i in runs) for name, runs in places.items()},
        gold, tuple(copies),
    )  # fmt: skip


CROSSED = "crossed"
FEW = 20  # items below which a percentile interval is noticeably too narrow


@dataclass(frozen=True)
class Paired:
    """One system against the baseline on one data set: design − baseline, in scores 0–1, with its 95 % interval.

    `n` items were compared. `p_holm`: corrected over all lines of the same scope. `scope`: what the claim is about;
    `note`: what else must be known to read it. `score` and `baseline_score` are the scores of the two on these items.
    `gaps`: items left out because one of the two lacks them; `difference_with_zeros`: what it would be with a score of
    0 for those (None without gaps, and for scores that are no mean over items). `inner_low/high`: the 90 % interval,
    which decides on equivalence. `run_se`: the part of the standard error that comes from runs and that more items
    would not reduce.
    """

    task: str
    metric: str
    design: str
    baseline: str
    n: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    p_holm: float
    test: str
    scope: str
    note: str
    score: float
    baseline_score: float
    gaps: int = 0
    difference_with_zeros: float | None = None
    inner_low: float = math.nan
    inner_high: float = math.nan
    run_se: float = 0.0


class Estimate(NamedTuple):
    """The result of one test: the difference, its intervals and p, the test's name, and notes on reading it."""

    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    test: str
    notes: tuple[str, ...]
    inner: tuple[float, float]
    run_se: float = 0.0


def compare_items(
    frame: pl.DataFrame,
    task: str,
    *,
    design: str | None = None,
    baseline: str | None = None,
    metric: str | None = None,
    missing: str = "error",
    controls: Iterable[str] = (),
    seed: int = 0,
) -> tuple[Paired, ...]:
    """Compare designs with a baseline on the items of one task; each split and subset is a separate data set.

    Args:
        frame: the long table with per-item rows; earlier steps are ignored.
        design: the one to compare; by default all but the baseline and the controls.
        baseline: by default the first design of the table.
        metric: by default the task's main one.
        missing: `error` refuses items that a run lacks; `drop` compares each pair of designs on the items that both
            have, and notes it.
        controls: designs that are not compared unless named.
        seed: of the resampling; the same seed gives the same numbers.

    Raises:
        StatisticsError: unknown task, design, baseline or metric; no items; gaps; different gold values; runs of
            one design that stopped at different steps.
    """
    import polars as pl

    if missing not in ("error", "drop"):
        hint = suggest(missing, ["error", "drop"])
        raise StatisticsError(f"missing={missing!r} is unknown; allowed: error, drop{hint}")
    rows = items_of(frame, task)
    present = rows["design"].unique(maintain_order=True).to_list()
    baseline = baseline or present[0]
    for role, name in (("baseline", baseline), ("design", design)):
        if name is not None and name not in present:
            hint = suggest(name, present)
            raise StatisticsError(
                f"{role} {name!r} has no items of {task!r}; designs with some: {', '.join(present)}{hint}"
            )
    outside = set(controls) | {baseline}
    others = [design] if design else [name for name in present if name not in outside]
    if not others or others == [baseline]:
        raise StatisticsError(f"a comparison needs two designs; {task!r} has items of {', '.join(present)} only")
    rows = rows.filter(pl.col("design").is_in([baseline, *others]))
    steps = last_steps(rows)
    sets = data_sets(rows, task, item_metric(frame, rows, task, metric), missing)
    lines = [
        line
        for data in sets
        for other in others
        for line in _contrast(data.pair(baseline, other), baseline, other, steps, seed)
    ]
    adjusted = dict.fromkeys(range(len(lines)), math.nan)
    for at_designs in (False, True):
        chosen = [i for i, line in enumerate(lines) if (line.test == CROSSED) == at_designs]
        if chosen:
            adjusted.update(zip(chosen, stats.holm([lines[i].p_value for i in chosen]).tolist(), strict=True))
    return tuple(replace(line, p_holm=adjusted[i]) for i, line in enumerate(lines))


SWITCH, STAY, SAME, OPEN = "switch", "stay", "no difference", "not enough"
POWER_Z = 0.8416  # the normal quantile of 80 % power
FEWEST = 10
"""With fewer items there is no answer: a percentile bootstrap is far too narrow, and over one item it has no width."""


@dataclass(frozen=True)
class Answer:
    """What one line says to someone who has `line.baseline` and could switch to `line.design`.

    `answer`: `switch` (better after Holm), `stay` (worse after Holm, or the 95 % interval rules out a gain of the
    margin), `no difference` (the 90 % interval lies within ± the margin, or all scores are equal), `not enough`
    (always with fewer than `FEWEST` items).
    `more`: about how many more items would detect a difference of the margin with 80 % power, if it is `not enough`
    (those up to `FEWEST` with fewer); None if no number would, because the runs alone vary too much.
    """

    answer: str
    line: Paired
    more: int | None = None


def answers(lines: Sequence[Paired], margin: float) -> tuple[Answer, ...]:
    """An answer for each line. `margin`: the smallest difference that matters, 0–1, fixed before looking."""
    family = {scope: sum(line.scope == scope for line in lines) for scope in {line.scope for line in lines}}
    return tuple(_answer(line, margin, family[line.scope]) for line in lines)


def _answer(line: Paired, margin: float, family: int) -> Answer:
    if line.n < FEWEST:
        return Answer(OPEN, line, FEWEST - line.n)
    if line.difference == 0 and line.ci_low == line.ci_high == 0:
        return Answer(SAME, line)
    if line.p_holm <= 0.05:
        return Answer(SWITCH if line.difference > 0 else STAY, line)
    if -margin < line.inner_low and line.inner_high < margin:
        return Answer(SAME, line)
    if line.ci_high < margin:
        return Answer(STAY, line)
    reach = float(ndtri(1 - 0.025 / family)) + POWER_Z
    error = max((line.ci_high - line.ci_low) / (2 * float(ndtri(0.975))), line.run_se)
    left = (margin / reach) ** 2 - line.run_se**2
    more = math.ceil(line.n * (error**2 - line.run_se**2) / left) - line.n if left > 0 else None
    return Answer(OPEN, line, None if more is None else max(1, more))


def decision(found: Sequence[Answer]) -> Answer:
    """The answer over all challengers: switch to the best that is better, else the least settled of their answers."""
    better = [each for each in found if each.answer == SWITCH]
    if better:
        return max(better, key=lambda each: each.line.difference)
    order = (OPEN, SAME, STAY)
    return min(found, key=lambda each: (order.index(each.answer), -each.line.difference))


def to_json(lines: Sequence[Paired]) -> dict[str, Any]:
    """The content of `poolwise compare --json` for comparisons of items."""
    inner = ("inner_low", "inner_high", "run_se")
    return {"comparisons": [{k: v for k, v in asdict(line).items() if k not in inner} for line in lines]}


def _contrast(data: DataSet, base: str, name: str, steps: Mapping[str, int | None], seed: int) -> list[Paired]:
    """The line about the checkpoints, and the one about the designs if the runs allow it."""
    a, b = data.runs[base], data.runs[name]
    n, rng = a.shape[1], np.random.default_rng(seed)
    estimate = _by_mean(data, a, b, rng) if data.gold is None else _by_gold(data, a, b, data.gold, rng)
    notes, zeros = list(data.copies), None
    if data.lacking:
        share = f"{len(data.lacking)} of {n + len(data.lacking)} {data.noun}"
        notes.append(f"left out because one of the two lacks them: {share} ({first_few(data.lacking)})")
        if data.gold is None:
            zeros = data.with_zeros[name] - data.with_zeros[base]
            notes.append(
                f"with a score of 0 for those {name} has {100 * data.with_zeros[name]:.2f}, {base} "
                f"{100 * data.with_zeros[base]:.2f}, a difference of {100 * zeros:+.2f} points".replace("-", "−")
            )
    if steps[base] != steps[name]:
        notes.append(f"trained for different numbers of steps: {name} {steps[name]}, {base} {steps[base]}")
    runs = "these two checkpoints"
    if len(a) + len(b) > 2:
        runs = f"these checkpoints (runs averaged: {len(b)} of {name}, {len(a)} of {base})"
    lines = [(estimate, runs)]
    scores = (score(data, b), score(data, a))
    if min(len(a), len(b)) > 1 and n > 1:
        lines.append((_over_runs(data, base, name), "these two designs, runs like these"))
    return [
        Paired(
            data.task, data.metric, name, base, n, test.difference, test.ci_low, test.ci_high, test.p_value, math.nan,
            test.test, f"{scope}, {data.noun} like these", "; ".join([*test.notes, *notes]),
            *scores, len(data.lacking), zeros, *test.inner, test.run_se,
        )
        for test, scope in lines
    ]  # fmt: skip


def score(data: DataSet, runs: Array) -> float:
    """The score of a design on the items: their mean, or the mean over runs of what is measured against gold."""
    if data.gold is None:
        return float(runs.mean())
    gold, one = data.gold, np.ones((1, runs.shape[1]))
    if data.task_type == "STS":
        return float(np.mean([_spearman(run, gold) for run in runs]))
    return float(np.mean([average_precision_function(run, gold)(one)[0] for run in runs]))


def _by_mean(data: DataSet, a: Array, b: Array, rng: np.random.Generator) -> Estimate:
    """A score that is a mean over items: permutation or McNemar test, with a bootstrap interval."""
    x, y = a.mean(axis=0), b.mean(axis=0)
    interval = stats.paired_bootstrap(x, y, rng)
    moved, notes = int((x != y).sum()), _size_notes(data, len(x))
    if data.task_type == "Clustering":
        notes.append("sets that mteb draws repeatedly from one data set overlap: then p and the interval are too small")
    if data.task_type == "Classification" and np.isin([x, y], (0, 1)).all():
        test, p = "exact McNemar", stats.mcnemar(int((x > y).sum()), int((x < y).sum()))
    else:
        test, p = "paired permutation", stats.paired_permutation(x, y, rng)
        if data.task_type == "Classification":
            notes.append("the score of an example is a mean over experiments, so McNemar's test does not apply")
    if moved == 0:
        notes.append(f"the scores are equal on all {data.noun}")
    elif 2 / 2**moved > 0.05:
        notes.append(f"only {moved} of {len(x)} {data.noun} differ, so p cannot fall below {2 / 2**moved:g}")
    inner = interval.inner_low, interval.inner_high
    return Estimate(interval.difference, interval.ci_low, interval.ci_high, p, test, tuple(notes), inner)


def _by_gold(data: DataSet, a: Array, b: Array, gold: Array, rng: np.random.Generator) -> Estimate:
    """A score of all pairs together: the bootstrap resamples pairs."""
    notes = _size_notes(data, len(gold))
    if data.task_type == "STS":
        result, test = stats.spearman_bootstrap(a, b, gold, rng), "bootstrap of Spearman's correlation"
        rho_a, rho_b, rho_ab = _spearman(a[0], gold), _spearman(b[0], gold), _spearman(a[0], b[0])
        if len(a) == len(b) == 1 and len(gold) > 3 and max(abs(rho_a), abs(rho_b)) < 1:
            low, high = stats.zou_interval(rho_a, rho_b, rho_ab, len(gold))
            notes.append(f"for comparison, Zou's interval: {low:.4f} to {high:.4f}")
    else:
        result, test = stats.ap_bootstrap(a, b, gold, rng), "bootstrap of average precision"
    inner = result.inner_low, result.inner_high
    return Estimate(result.difference, result.ci_low, result.ci_high, result.p_value, test, tuple(notes), inner)


def _over_runs(data: DataSet, base: str, name: str) -> Estimate:
    """Random runs × random items; other designs with the same seeds lend their run variance."""
    seeds = data.seeds[base]
    lent = [
        data.per_item(other) for other in data.runs if other not in (base, name) and data.seeds[other] == seeds
    ] if data.seeds[name] == seeds else []  # fmt: skip
    result = stats.crossed(data.per_item(base), data.per_item(name), pool=lent)
    effect = f"run effect sd {100 * result.run_sd:.2f} points"
    note = f"{len(data.seeds[name])} and {len(seeds)} runs, {effect} ({result.scope})"
    inner = stats.equivalence(result, 1.0)  # its 90 % interval does not depend on the margin
    run_se = result.run_sd * math.sqrt(1 / len(seeds) + 1 / len(data.seeds[name]))
    return Estimate(
        result.difference, result.ci_low, result.ci_high, result.p_value, CROSSED, (note, *filter(None, [result.note])),
        (inner.ci_low, inner.ci_high), run_se,
    )  # fmt: skip


def _size_notes(data: DataSet, n: int) -> list[str]:
    return [f"few {data.noun}: the bootstrap's interval is too narrow"] if n < FEW else []


def _spearman(x: Array, y: Array) -> float:
    return float(correlation(midranks(x)[None], midranks(y)[None], np.ones((1, len(x))))[0])
