"""Quality and cost: contrasts of designs at equal cost, and the front of mean score over encode cost.

Costs arrive as rows, one for each design (made by `poolwise.pooling.cost.base_costs`): `encode_flops`, the forward pass
of base and head over a text of `PRICED_TOKENS` tokens, and `training_flops`, the FLOPs of one whole training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from poolwise import stats
from poolwise.verdicts.arms import arms
from poolwise.verdicts.comparison import Comparison

if TYPE_CHECKING:
    import polars as pl

PRICED_TOKENS = 128
"""Length in tokens of the text at which encoding and training are priced."""
TOLERANCE = 0.05
"""Encode costs that differ by less than this share of the smaller one count as equal."""
SAME_TRAINING = 0.005
"""Training costs that differ by less than this share count as equal, so that the main contrast is at equal FLOPs."""
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
    """All contrasts at equal cost; `notes` are sentences on the designs that need none or allow none."""

    rows: tuple[Budget, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One design: encode cost of one text, mean score 0–1 with the 95 % interval of its runs (None with a single run),
    and whether it is on the front: no other design scores at least as high at no more cost."""

    design: str
    cost: float
    mean: float
    low: float | None
    high: float | None
    front: bool


def encode_flops(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Design -> FLOPs to encode one text, for the cost rows that have them."""
    return {row["design"]: float(row["encode_flops"]) for row in rows if row.get("encode_flops")}


def equal_budgets(comparison: Comparison, history: pl.DataFrame, rows: Sequence[Mapping[str, Any]]) -> Budgets | None:
    """The contrasts at equal cost; None without costs, while runs are missing, or if tasks were left out.

    Args:
        history: the long table with the scores at every evaluated step.
        rows: cost rows.
    """
    known = [row for row in rows if row["design"] in comparison.designs]
    if comparison.interim or comparison.excluded or len(known) < 2:
        return None
    notes: list[str] = []
    training = {row["design"]: float(row["training_flops"]) for row in known if row.get("training_flops")}
    contrasts = [
        *_at_equal_training(comparison, history, training, notes),
        *_at_equal_encoding(comparison, encode_flops(known), notes),
    ]
    adjusted = stats.bh([row.p_value for row in contrasts]).tolist()
    return Budgets(tuple(replace(row, p_bh=p) for row, p in zip(contrasts, adjusted, strict=True)), tuple(notes))


def _at_equal_training(
    comparison: Comparison, history: pl.DataFrame, prices: Mapping[str, float], notes: list[str]
) -> Iterator[Budget]:
    """Each design against the baseline, the more expensive of the two stopped where it has spent as much."""
    base = comparison.baseline
    if base not in prices:
        return
    equal, unreached = [], []
    for design in (name for name in comparison.designs[1:] if name in prices):
        price, base_price = prices[design], prices[base]
        share = min(price, base_price) / max(price, base_price)
        if share > 1 - SAME_TRAINING:
            equal.append(design)
            continue
        stopped = design if price > base_price else base
        partial = _stopped(comparison, history, stopped, share)
        if partial is None:
            unreached.append(f"{design} ({100 * share:.0f} % of the steps of {stopped})")
        for group, scores in (partial or {}).items():
            arm = comparison.arm(group, base if stopped == design else design)
            pair = (arm.by_source, scores) if stopped == design else (scores, arm.by_source)
            if row := _contrast(comparison, group, TRAINING, design, base, pair):
                yield replace(row, stopped=stopped, at=share)
    if equal:
        notes.append(f"Training costs the same FLOPs as {base} within {100 * SAME_TRAINING:.1f} %: {', '.join(equal)}.")
    if unreached:
        notes.append(
            f"The step of equal training FLOPs lies before the first evaluated one for {', '.join(unreached)}."
        )


def _stopped(
    comparison: Comparison, history: pl.DataFrame, design: str, share: float
) -> dict[str, NDArray[np.float64]] | None:
    """Group -> (seeds, sources) scores of a design at a share of its steps, interpolated linearly between evaluated
    checkpoints; None if the first of them comes later."""
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
    scores = {}
    for group in comparison.groups:
        arm = comparison.arm(group, design)
        parts = [end.get(group, {}).get(design) for end in ends]
        if any(part is None or part.seeds != arm.seeds or not set(arm.tasks) <= set(part.tasks) for part in parts):
            continue
        low, high = (part.on(arm.tasks).array for part in parts if part)
        between = (1 - weight) * low + weight * high
        scores[group] = replace(arm, scores=tuple(map(tuple, between.tolist()))).by_source
    return scores


def _at_equal_encoding(comparison: Comparison, prices: Mapping[str, float], notes: list[str]) -> Iterator[Budget]:
    """Pairs of designs, neither of them the baseline, that cost the same to encode."""
    base = comparison.baseline
    if base not in prices:
        return
    priced = [name for name in comparison.designs if name in prices]

    def apart(a: str, b: str) -> float:
        return max(prices[a], prices[b]) / min(prices[a], prices[b]) - 1

    near = [name for name in priced if name != base and apart(name, base) <= TOLERANCE]
    if near:
        notes.append(
            f"To encode a text takes as many FLOPs as with {base}, within {100 * TOLERANCE:.0f} %: {', '.join(near)}. "
            f"The differences to {base} above are therefore differences at equal cost."
        )
    far = [name for name in priced if name != base and name not in near]
    alone = []
    for name in far:
        others = [other for other in priced if other not in (name, base) and apart(name, other) <= TOLERANCE]
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
    """`pair` is (seeds, sources) of `against` and of `design`; None with one run on either side or one source."""
    if min(len(pair[0]), len(pair[1]), pair[0].shape[1]) < 2:
        return None
    result = stats.crossed(*pair, level=1 - comparison.alpha)
    return Budget(
        group, kind, design, against, None, None, None, len(pair[1]), pair[1].shape[1],
        result.difference, result.ci_low, result.ci_high, result.p_value,
    )  # fmt: skip


def fronts(comparison: Comparison, costs: Mapping[str, float]) -> dict[str, tuple[Point, ...]]:
    """The designs of each group, cheapest first; empty if fewer than two have a cost.

    The interval is Student's t for a mean over runs, with the run variance pooled over the designs; the tasks are
    taken as given.
    """
    designs = [design for design in comparison.designs if design in costs]
    if len(designs) < 2:
        return {}
    points = {}
    for group in comparison.groups:
        arms = {design: comparison.arm(group, design) for design in designs}
        squares = sum(float(((arm.run_means - arm.mean) ** 2).sum()) for arm in arms.values())
        df = sum(len(arm.seeds) - 1 for arm in arms.values())
        half = float(stdtrit(df, 0.975)) * np.sqrt(squares / df) if df else 0.0
        rows: list[Point] = []
        for design in sorted(designs, key=lambda design: (costs[design], -arms[design].mean)):
            arm = arms[design]
            reach = float(half / np.sqrt(len(arm.seeds))) if len(arm.seeds) > 1 else None
            low, high = (None, None) if reach is None else (arm.mean - reach, arm.mean + reach)
            front = all(arm.mean > other.mean for other in rows)
            rows.append(Point(design, costs[design], arm.mean, low, high, front))
        points[group] = tuple(rows)
    return points


def mean_costs(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One row per design, averaged over the base models, with `relative_cost`: its encode cost over the baseline's."""
    by_design: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_design.setdefault(row["design"], []).append(row)
    means = []
    for mine in by_design.values():
        numbers = [key for key, value in mine[0].items() if type(value) is int]
        mean = {key: sum(row[key] for row in mine) / len(mine) for key in numbers} if len(mine) > 1 else {}
        means.append({**mine[0], **mean})
    base = next((row["encode_flops"] for row in means if row["design"] == baseline), None)
    return [{**row, "relative_cost": row["encode_flops"] / base} for row in means if base]
