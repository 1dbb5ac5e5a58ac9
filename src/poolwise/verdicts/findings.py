"""What a comparison leads to: a recommendation, contrasts at equal cost, what single runs allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from poolwise import stats
from poolwise.stats.crossed import Crossed
from poolwise.verdicts.arms import FEW_SOURCES, Arm, arms

if TYPE_CHECKING:
    import polars as pl

    from poolwise.verdicts.comparison import Comparison
    from poolwise.verdicts.contrasts import Row


LEXICAL_FLOOR = ("tfidf", "tfidf_chars")
LEXICAL = (*LEXICAL_FLOOR, "bm25")
BETTER, CHEAPEST, BASELINE, BELOW = "better", "cheapest", "baseline", "below_reference"


@dataclass(frozen=True)
class Recommendation:
    """The design to use for one group of tasks.

    `basis`: `better` (than the baseline after Holm, and the best of those), `cheapest` (none is better: the least
    costly of those not shown worse), `baseline` (none is better, costs unknown), `below_reference` (every design stays
    below `reference`; `design` is None). `judged`: the group carries verdicts on
    designs; where it is False (or they are exploratory), nothing could have been shown better, and `stays` (share of
    `folds`) and `expected_regret` (0–1) are None. `cost` is the encode cost in the unit given, `relative_cost` that
    over the baseline's.
    """

    group: str
    design: str | None
    basis: str
    judged: bool
    difference: float | None = None
    cost: float | None = None
    relative_cost: float | None = None
    folds: int = 0
    stays: float | None = None
    expected_regret: float | None = None
    reference: str | None = None
    reference_score: float | None = None
    best_score: float | None = None


def recommend(comparison: Comparison) -> tuple[Recommendation, ...]:
    """One recommendation for each group, in the order of `comparison.groups`; none for planted mechanisms."""
    return tuple(_group(comparison, group) for group in comparison.groups if not comparison.of_items(group))


def _group(comparison: Comparison, group: str) -> Recommendation:
    rows = [row for row in comparison.rows if row.group == group]
    judged = not comparison.exploratory and all(row.verdict for row in rows)
    judged = judged and len(set(_base(comparison, group).sources)) >= FEW_SOURCES
    below = _below_reference(comparison, group)
    if below:
        name, floor, best = below
        return Recommendation(group, None, BELOW, judged, reference=name, reference_score=floor, best_score=best)
    words = {row.design: _word(row, comparison.alpha) for row in rows}
    shifts = {row.design: row.verdict.difference if row.verdict else row.difference for row in rows}
    design, basis = _choose(comparison, words if judged else _without_better(words), shifts)
    costs = dict(comparison.costs)
    cost, base_cost = costs.get(design), costs.get(comparison.baseline)
    folds, stays, regret = _leave_one_source_out(comparison, group, design) if judged else (0, None, None)
    return Recommendation(
        group, design, basis, judged,
        difference=shifts.get(design), cost=cost, relative_cost=cost / base_cost if cost and base_cost else None,
        folds=folds, stays=stays, expected_regret=regret,
    )  # fmt: skip


def _word(row: Row, alpha: float) -> str:
    """What the row shows after Holm; without a verdict on designs, what it shows of checkpoints."""
    if row.verdict:
        return row.verdict.verdict
    if row.p_holm is None or row.p_holm > alpha:
        return "inconclusive"
    return "better" if row.difference > 0 else "worse"


def _without_better(words: Mapping[str, str]) -> dict[str, str]:
    """Checkpoints may rule a design out; they recommend none."""
    return {design: "inconclusive" if word == "better" else word for design, word in words.items()}


def _choose(comparison: Comparison, words: Mapping[str, str], shifts: Mapping[str, float]) -> tuple[str, str]:
    """(design, basis) from the word and the difference of each contrast; ties go to the baseline, then to the order."""
    allowed = [design for design in _candidates(comparison) if words.get(design) != "worse"]
    better = [design for design in allowed if words.get(design) == "better"]
    if better:
        return max(better, key=lambda design: shifts[design]), BETTER
    costs = dict(comparison.costs)
    if not all(costs.get(design) for design in allowed):
        return comparison.baseline, BASELINE
    return min(allowed, key=lambda design: costs[design]), CHEAPEST


def _candidates(comparison: Comparison) -> list[str]:
    """The designs to choose from, the baseline first; lexical rows of a bare table are none."""
    return [design for design in comparison.designs if design == comparison.baseline or design not in LEXICAL]


def _base(comparison: Comparison, group: str) -> Arm:
    return comparison.arm(group, comparison.baseline)


def _below_reference(comparison: Comparison, group: str) -> tuple[str, float, float] | None:
    """(reference, its mean, the best design's mean) where a TF-IDF row beats every design on the tasks both have."""
    found = {arm.design: arm for arm in comparison.arms if arm.group == group}
    designs = [found[name] for name in _candidates(comparison)]
    for name in LEXICAL_FLOOR:
        floor = found.get(name)
        shared = [task for task in designs[0].tasks if floor and task in floor.tasks]
        if floor and shared:
            best = max(arm.on(shared).mean for arm in designs)
            if best < floor.on(shared).mean:
                return name, floor.on(shared).mean, best
    return None


def _leave_one_source_out(comparison: Comparison, group: str, chosen: str) -> tuple[int, float, float]:
    """(folds, share of folds that choose `chosen`, expected regret): the rule again without each source in turn.

    The contrasts of the other groups keep their p-values, so that Holm spans the same family in every fold.
    """
    arms = {design: comparison.arm(group, design) for design in comparison.designs}
    scores = {design: arm.by_source for design, arm in arms.items()}
    candidates = _candidates(comparison)
    means = np.array([scores[design].mean(axis=0) for design in candidates])
    elsewhere = [row.verdict.p_value if row.verdict else float("nan") for row in comparison.rows if row.group != group]
    elsewhere += [found.verdict.p_value for found in comparison.overall]
    designs = comparison.designs[1:]
    same, regrets = 0, []
    for fold in range(means.shape[1]):
        kept = {design: np.delete(array, fold, axis=1) for design, array in scores.items()}
        results = [_crossed(comparison, arms, kept, design) for design in designs]
        p = stats.holm([*(result.p_value for result in results), *elsewhere])[: len(designs)].tolist()
        shifts = {design: result.difference for design, result in zip(designs, results, strict=True)}
        words = {
            design: "inconclusive" if q > comparison.alpha else "better" if shifts[design] > 0 else "worse"
            for design, q in zip(designs, p, strict=True)
        }
        choice, _ = _choose(comparison, words, shifts)
        same += choice == chosen
        regrets.append(float(means[:, fold].max() - means[candidates.index(choice), fold]))
    return means.shape[1], same / means.shape[1], float(np.mean(regrets))


def _crossed(comparison: Comparison, arms: Mapping[str, Arm], kept: Mapping[str, np.ndarray], design: str) -> Crossed:
    base = comparison.baseline
    pool: Sequence[str] = ()
    if arms[base].seeds == arms[design].seeds:
        pool = [
            name for name in comparison.lenders if name not in (base, design) and arms[name].seeds == arms[base].seeds
        ]
    return stats.crossed(kept[base], kept[design], pool=[kept[name] for name in pool])


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
