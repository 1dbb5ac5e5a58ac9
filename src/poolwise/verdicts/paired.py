"""Systems on ONE data set, compared item by item: the rows of the long table that have an `item_id`.

| task type | item | test of the difference | interval |
|---|---|---|---|
| Retrieval, Reranking | query | paired permutation of the mean | paired bootstrap |
| Classification | example | exact McNemar where items are 0 or 1, else paired permutation | paired bootstrap |
| Clustering | set | paired permutation of the mean over sets | paired bootstrap |
| STS | pair: cosine and gold | bootstrap of the difference in Spearman's correlation | the same; Zou's as a check |
| PairClassification | pair: cosine and gold | bootstrap of the difference in average precision | the same |

These speak about the checkpoints that were run, on items like these; runs of one design are averaged. Where both sides
have two runs or more and the score is a mean over items, a second line speaks about the designs: `stats.crossed`, with
items in place of tasks. Holm's correction covers each of the two kinds of line by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from poolwise import stats
from poolwise.errors import StatisticsError, suggest
from poolwise.stats.exact import midranks
from poolwise.stats.weighted import correlation
from poolwise.verdicts.item_sets import Array, DataSet, data_sets, item_metric, items_of, last_steps, listed

if TYPE_CHECKING:
    import polars as pl

CROSSED = "crossed"
RANK_TESTS = ("wilcoxon", "signed_rank", "sign")
FEW = 20  # items below which a percentile interval is noticeably too narrow


@dataclass(frozen=True)
class Paired:
    """One system against the baseline on one data set: design − baseline, in scores 0–1, with its 95 % interval.

    `n` items were compared. `p_holm`: corrected over all lines of the same scope. `scope` says for what the line
    speaks; `note` what else must be known to read it.
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


class Found(NamedTuple):
    """What a test found: the difference, its interval and p, its own name and what to know about it."""

    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    test: str
    notes: tuple[str, ...]


def compare_items(
    frame: pl.DataFrame,
    task: str,
    *,
    design: str | None = None,
    baseline: str | None = None,
    metric: str | None = None,
    missing: str = "error",
    controls: Iterable[str] = (),
    test: str | None = None,
    seed: int = 0,
) -> tuple[Paired, ...]:
    """Compare designs with a baseline on the items of one task; each split and subset is a data set of its own.

    Args:
        frame: the long table with per-item rows; earlier steps are ignored.
        design: the one to compare; by default all but the baseline and the controls.
        baseline: by default the first design of the table.
        metric: by default the task's main one.
        missing: `error` refuses items that a run lacks; `drop` leaves them out of every run and says so in the note.
        test: None, the one for the task's type; rank tests over items are refused with the reason.
        seed: of the resampling; the same seed gives the same numbers.

    Raises:
        StatisticsError: unknown task, design, baseline, metric or test; no items; gaps; different gold values; runs of
            one design that stopped at different steps.
    """
    _check_words(test, missing)
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
    import polars as pl

    rows = rows.filter(pl.col("design").is_in([baseline, *others]))
    steps = last_steps(rows)
    sets = data_sets(rows, task, item_metric(frame, rows, task, metric), missing)
    lines = [line for data in sets for other in others for line in _contrast(data, baseline, other, steps, seed)]
    adjusted = dict.fromkeys(range(len(lines)), math.nan)
    for at_designs in (False, True):
        chosen = [i for i, line in enumerate(lines) if (line.test == CROSSED) == at_designs]
        if chosen:
            adjusted.update(zip(chosen, stats.holm([lines[i].p_value for i in chosen]).tolist(), strict=True))
    return tuple(replace(line, p_holm=adjusted[i]) for i, line in enumerate(lines))


def to_json(lines: Sequence[Paired]) -> dict[str, Any]:
    """What `poolwise compare --json` prints of item-level comparisons."""
    return {"comparisons": [asdict(line) for line in lines]}


def _check_words(test: str | None, missing: str) -> None:
    if test in RANK_TESTS:
        raise StatisticsError(stats.PER_QUERY_RANK_TESTS_REFUSED)
    if test is not None:
        raise StatisticsError(f"test={test!r}: leave it out; the task's type chooses the test on items")
    if missing not in ("error", "drop"):
        hint = suggest(missing, ["error", "drop"])
        raise StatisticsError(f"missing={missing!r} is unknown; allowed: error, drop{hint}")


def _contrast(data: DataSet, base: str, name: str, steps: Mapping[str, int | None], seed: int) -> list[Paired]:
    """The line for the checkpoints, and the one for the designs where runs allow it."""
    a, b = data.runs[base], data.runs[name]
    n, rng = a.shape[1], np.random.default_rng(seed)
    found = _by_mean(data, a, b, rng) if data.gold is None else _by_gold(data, a, b, data.gold, rng)
    general = []
    if data.lacking:
        of = f"{len(data.lacking)} of {n + len(data.lacking)} {data.noun}"
        general.append(f"left out, as some run lacks them: {of} ({listed(data.lacking)})")
        if data.gold is None:
            general.append(f"with 0 for those the difference is {data.with_zeros[name] - data.with_zeros[base]:.4f}")
    if steps[base] != steps[name]:
        general.append(f"trained for other numbers of steps: {name} {steps[name]}, {base} {steps[base]}")
    runs = "these two checkpoints"
    if len(a) + len(b) > 2:
        runs = f"these checkpoints (runs averaged: {len(b)} of {name}, {len(a)} of {base})"
    lines = [(found, runs)]
    if data.gold is None and min(len(a), len(b)) > 1 and n > 1:
        lines.append((_over_runs(data, base, name), "these two designs, runs like these"))
    return [
        Paired(
            data.task, data.metric, name, base, n, test.difference, test.ci_low, test.ci_high, test.p_value, math.nan,
            test.test, f"{scope}, {data.noun} like these", "; ".join([*test.notes, *general]),
        )
        for test, scope in lines
    ]  # fmt: skip


def _by_mean(data: DataSet, a: Array, b: Array, rng: np.random.Generator) -> Found:
    """A score that is a mean over items: permutation or McNemar, with the bootstrap's interval."""
    x, y = a.mean(axis=0), b.mean(axis=0)
    interval = stats.paired_bootstrap(x, y, rng)
    moved, notes = int((x != y).sum()), _size_notes(data, len(x))
    if data.task_type == "Clustering":
        notes.append("sets drawn again from one data set overlap, which makes p and the interval too small")
    if data.task_type == "Classification" and np.isin([x, y], (0, 1)).all():
        test, p = "exact McNemar", stats.mcnemar(int((x > y).sum()), int((x < y).sum())).p_value
    else:
        test, p = "paired permutation", stats.paired_permutation(x, y, rng).p_value
        if data.task_type == "Classification":
            notes.append("an example's score is a share of experiments, so McNemar's test does not apply")
    if moved == 0:
        notes.append(f"the scores are the same on all {data.noun}")
    elif 2 / 2**moved > 0.05:
        notes.append(f"only {moved} of {len(x)} {data.noun} differ, so p cannot fall below {2 / 2**moved:g}")
    return Found(interval.difference, interval.ci_low, interval.ci_high, p, test, tuple(notes))


def _by_gold(data: DataSet, a: Array, b: Array, gold: Array, rng: np.random.Generator) -> Found:
    """A score of all pairs together: the bootstrap redraws pairs."""
    notes = _size_notes(data, len(gold))
    if data.task_type == "STS":
        found, test = stats.spearman_bootstrap(a, b, gold, rng), "bootstrap of Spearman's correlation"
        rho_a, rho_b, rho_ab = _spearman(a[0], gold), _spearman(b[0], gold), _spearman(a[0], b[0])
        if len(a) == len(b) == 1 and len(gold) > 3 and max(abs(rho_a), abs(rho_b)) < 1:
            zou = stats.zou_interval(rho_a, rho_b, rho_ab, len(gold))
            notes.append(f"check, Zou's interval: {zou.ci_low:.4f} to {zou.ci_high:.4f}")
    else:
        found, test = stats.ap_bootstrap(a, b, gold, rng), "bootstrap of average precision"
    return Found(found.difference, found.ci_low, found.ci_high, found.p_value, test, tuple(notes))


def _over_runs(data: DataSet, base: str, name: str) -> Found:
    """Random runs × random items; other designs with the same seeds lend their run variance."""
    seeds = data.seeds[base]
    lent = [
        runs for other, runs in data.runs.items() if other not in (base, name) and data.seeds[other] == seeds
    ] if data.seeds[name] == seeds else []  # fmt: skip
    found = stats.crossed(data.runs[base], data.runs[name], pool=lent)
    note = f"{len(data.seeds[name])} and {len(seeds)} runs, run effect sd {found.run_sd:.4f} ({found.scope})"
    return Found(
        found.difference, found.ci_low, found.ci_high, found.p_value, CROSSED, (note, *filter(None, [found.note]))
    )


def _size_notes(data: DataSet, n: int) -> list[str]:
    return [f"few {data.noun}: the bootstrap's interval is too narrow"] if n < FEW else []


def _spearman(x: Array, y: Array) -> float:
    return float(correlation(midranks(x)[None], midranks(y)[None], np.ones((1, len(x))))[0])
