"""Designs at equal cost: what a dearer design is worth when it may spend no more than the one that it is held against.

- Equal training FLOPs: the dearer of a design and the baseline is taken at the step at which it has spent what the
  cheaper one spends in all, its scores interpolated between the evaluated checkpoints. Its schedule was not finished
  there, which speaks against it: a run planned for that budget could be better.
- Equal encode cost: a contrast with the baseline is one already where both cost the same within `TOLERANCE`. A design
  outside of that is held against every other design within `TOLERANCE` of its own cost; nothing is interpolated, as no
  mixture of two designs could be used.

Exploratory: two runs or more a side, over random runs and random tasks by the two designs' own runs, Benjamini–Hochberg
over all these contrasts, no stars.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from poolwise import stats
from poolwise.verdicts.arms import arms

if TYPE_CHECKING:
    import polars as pl

    from poolwise.verdicts.comparison import Comparison

TOLERANCE = 0.05  # encode costs that count as equal, relative to the smaller one
SAME = 0.005  # training costs so close that the primary contrast is the one at equal FLOPs
TRAINING_TOKENS = 128
TRAINING, ENCODING = "training FLOPs", "encode cost"


@dataclass(frozen=True)
class Budget:
    """Design − `against` (0–1) at equal cost of one `kind`, in one group.

    `stopped` is the design taken before its end (training only), at the share `at` of its steps; `apart`: relative
    difference of the encode costs. `ci_low`, `ci_high` at 1 − alpha; `p_bh` spans all contrasts at equal cost.
    """

    group: str
    kind: str
    design: str
    against: str
    stopped: str | None
    at: float | None
    apart: float | None
    seeds: int
    sources: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    p_bh: float = 1.0


@dataclass(frozen=True)
class Budgets:
    """All contrasts at equal cost, and in sentences what needs none or allows none."""

    rows: tuple[Budget, ...]
    notes: tuple[str, ...]


def training_flops(cost: Mapping[str, Any]) -> float | None:
    """FLOPs of one training text of `TRAINING_TOKENS` tokens from a cost row; None where it does not say.

    Forward 1, gradients of the activations 1, gradients of the weights 1: all three for a head and for a base that is
    tuned whole, two for a base under LoRA, one for a base that stays as it is.
    """
    base, head = (cost.get(f"{part}_flops_{TRAINING_TOKENS}") for part in ("base", "head"))
    tuned, size = cost.get("tuned_base_parameters"), cost.get("base_parameters")
    if None in (base, head, tuned, size):
        return None
    passes = 3 if tuned == size else 2 if tuned else 1
    return float(passes * base + 3 * head)  # type: ignore[operator]


def equal_budgets(comparison: Comparison, history: pl.DataFrame, costs: Sequence[Mapping[str, Any]]) -> Budgets | None:
    """The contrasts at equal cost that `costs` allow; None without costs, before the end or where tasks were left out.

    Args:
        history: the long table with the scores at every evaluated step.
        costs: cost rows with `encode_flops` and what `training_flops` reads.
    """
    known = [row for row in costs if row.get("design") in comparison.designs]
    if comparison.interim or comparison.excluded or len(known) < 2:
        return None
    notes: list[str] = []
    rows = [
        *_training(comparison, history, {row["design"]: training_flops(row) for row in known}, notes),
        *_encoding(comparison, {row["design"]: row.get("encode_flops") for row in known}, notes),
    ]
    adjusted = stats.bh([row.p_value for row in rows]).tolist() if rows else []
    return Budgets(tuple(replace(row, p_bh=p) for row, p in zip(rows, adjusted, strict=True)), tuple(notes))


def _training(
    comparison: Comparison, history: pl.DataFrame, prices: Mapping[str, float | None], notes: list[str]
) -> Iterator[Budget]:
    base = comparison.baseline
    base_price = prices.get(base)
    if not base_price:
        return
    equal, unreached = [], []
    for design in comparison.designs[1:]:
        price = prices.get(design)
        if not price:
            continue
        share = min(price, base_price) / max(price, base_price)
        if share > 1 - SAME:
            equal.append(design)
            continue
        stopped = design if price > base_price else base
        found = _stopped(comparison, history, stopped, share)
        if found is None:
            unreached.append(f"{design} ({100 * share:.0f} % of the steps of {stopped})")
        for group, scores in (found or {}).items():
            arm = comparison.arm(group, base if stopped == design else design)
            pair = (arm.by_source, scores) if stopped == design else (scores, arm.by_source)
            if row := _contrast(comparison, group, TRAINING, design, base, pair):
                yield replace(row, stopped=stopped, at=share)
    if equal:
        notes.append(f"Training costs the same FLOPs as {base} within {100 * SAME:.1f} %: {', '.join(equal)}.")
    if unreached:
        notes.append(f"Equal training FLOPs lie before the first evaluated step: {', '.join(unreached)}.")


def _stopped(
    comparison: Comparison, history: pl.DataFrame, design: str, share: float
) -> dict[str, NDArray[np.float64]] | None:
    """Group -> (seeds, sources) scores of a design at a share of its steps, linear between evaluated checkpoints; None
    where the first of them comes later."""
    import polars as pl

    mine = history.filter(pl.col("design") == design)
    steps = sorted(mine["step"].drop_nulls().unique().to_list())
    wanted = share * steps[-1] if steps else 0.0
    before = max((step for step in steps if step <= wanted), default=None)
    if before is None:
        return None
    after = min(step for step in steps if step >= wanted)
    weight = (wanted - before) / (after - before) if after > before else 0.0
    ends = [
        arms(mine.filter(pl.col("step") == step), [design], [], comparison.by, "drop")[0] for step in (before, after)
    ]
    found = {}
    for group in comparison.groups:
        arm = comparison.arm(group, design)
        parts = [end.get(group, {}).get(design) for end in ends]
        if any(part is None or part.seeds != arm.seeds or not set(arm.tasks) <= set(part.tasks) for part in parts):
            continue
        low, high = (part.on(arm.tasks).array for part in parts if part)
        between = (1 - weight) * low + weight * high
        found[group] = replace(arm, scores=tuple(map(tuple, between.tolist()))).by_source
    return found


def _encoding(comparison: Comparison, prices: Mapping[str, Any], notes: list[str]) -> Iterator[Budget]:
    base = comparison.baseline
    priced = [(name, float(prices[name])) for name in comparison.designs if prices.get(name)]
    known = dict(priced)
    if base not in known:
        return

    def apart(a: str, b: str) -> float:
        return max(known[a], known[b]) / min(known[a], known[b]) - 1

    near = [name for name, _ in priced if name != base and apart(name, base) <= TOLERANCE]
    if near:
        notes.append(
            f"Encoding costs the same FLOPs as {base} within {100 * TOLERANCE:.0f} %, so that the contrast with it is "
            f"one at equal encode cost: {', '.join(near)}."
        )
    far = [name for name, _ in priced if name != base and name not in near]
    alone = []
    for name in far:
        others = [other for other, _ in priced if other not in (name, base) and apart(name, other) <= TOLERANCE]
        if not others:
            alone.append(name)
        for other in others:
            if other in far and far.index(other) > far.index(name):
                continue  # each pair once, the later design against the earlier one
            for group in comparison.groups:
                pair = comparison.arm(group, other).by_source, comparison.arm(group, name).by_source
                if row := _contrast(comparison, group, ENCODING, name, other, pair):
                    yield replace(row, apart=apart(name, other))
    if alone:
        notes.append(f"No other design costs the same to encode within {100 * TOLERANCE:.0f} %: {', '.join(alone)}.")


def _contrast(
    comparison: Comparison, group: str, kind: str, design: str, against: str,
    pair: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> Budget | None:  # fmt: skip
    """`pair` is (seeds, sources) of `against` and of `design`; None with one run a side or one source."""
    if min(len(pair[0]), len(pair[1]), pair[0].shape[1]) < 2:
        return None
    result = stats.crossed(*pair, level=1 - comparison.alpha)
    return Budget(
        group, kind, design, against, None, None, None, len(pair[1]), pair[1].shape[1],
        result.difference, result.ci_low, result.ci_high, result.p_value,
    )  # fmt: skip
