"""Which design to use for each group of tasks: the rule, and how often it gives the same answer without one source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from poolwise import stats
from poolwise.stats.crossed import Crossed
from poolwise.verdicts.arms import FEW_SOURCES, Arm
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Row

LEXICAL_FLOOR = ("tfidf", "tfidf_chars")
LEXICAL = (*LEXICAL_FLOOR, "bm25")
BETTER, CHEAPEST, BASELINE, BELOW = "better", "cheapest", "baseline", "below_reference"


@dataclass(frozen=True)
class Recommendation:
    """The design to use for one group of tasks.

    `basis`: `better` (than the baseline after Holm, and the best of those), `cheapest` (none is better: the least
    costly of those not shown to be worse), `baseline` (none is better, costs unknown), `below_reference` (every design
    scores below `reference`; `design` is None). `judged`: the group carries verdicts on designs; if it is False (or
    the verdicts are exploratory), nothing could have been shown to be better, and `stays` (the share of `folds` with
    the same choice) and `expected_regret` (0–1) are None. `cost` is the encode cost in FLOPs, `relative_cost` that
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


def recommend(comparison: Comparison, costs: Mapping[str, float]) -> tuple[Recommendation, ...]:
    """One recommendation for each group, in the order of `comparison.groups`; none for built-in mechanisms.

    costs: what each design costs to encode, in one unit; empty if unknown.
    """
    return tuple(_recommend(comparison, costs, group) for group in comparison.groups if not comparison.of_items(group))


def _recommend(comparison: Comparison, costs: Mapping[str, float], group: str) -> Recommendation:
    rows = [row for row in comparison.rows if row.group == group]
    sources = comparison.arm(group, comparison.baseline).sources
    judged = not comparison.exploratory and all(row.verdict for row in rows) and len(set(sources)) >= FEW_SOURCES
    if below := _below_reference(comparison, group):
        name, floor, best = below
        return Recommendation(group, None, BELOW, judged, reference=name, reference_score=floor, best_score=best)
    words = {row.design: _word(row, comparison.alpha) for row in rows}
    if not judged:  # checkpoints may rule a design out, but they recommend none
        words = {design: "inconclusive" if word == "better" else word for design, word in words.items()}
    shifts = {row.design: row.verdict.difference if row.verdict else row.difference for row in rows}
    design, basis = _choose(comparison, costs, words, shifts)
    cost, base_cost = costs.get(design), costs.get(comparison.baseline)
    folds, stays, regret = _leave_one_source_out(comparison, costs, group, design) if judged else (0, None, None)
    return Recommendation(
        group, design, basis, judged,
        difference=shifts.get(design), cost=cost, relative_cost=cost / base_cost if cost and base_cost else None,
        folds=folds, stays=stays, expected_regret=regret,
    )  # fmt: skip


def _word(row: Row, alpha: float) -> str:
    """The verdict of a row after Holm; without a verdict on designs, the result for its checkpoints."""
    if row.verdict:
        return row.verdict.verdict
    if row.p_holm is None or row.p_holm > alpha:
        return "inconclusive"
    return "better" if row.difference > 0 else "worse"


def _choose(
    comparison: Comparison, costs: Mapping[str, float], words: Mapping[str, str], shifts: Mapping[str, float]
) -> tuple[str, str]:
    """(design, basis) from the word and the difference of each contrast; ties go to the baseline, then to the order."""
    allowed = [design for design in _candidates(comparison) if words.get(design) != "worse"]
    better = [design for design in allowed if words.get(design) == "better"]
    if better:
        return max(better, key=lambda design: shifts[design]), BETTER
    if not all(costs.get(design) for design in allowed):
        return comparison.baseline, BASELINE
    return min(allowed, key=lambda design: costs[design]), CHEAPEST


def _candidates(comparison: Comparison) -> list[str]:
    """The designs to choose from, the baseline first; without the lexical references of a table without roles."""
    return [design for design in comparison.designs if design == comparison.baseline or design not in LEXICAL]


def _below_reference(comparison: Comparison, group: str) -> tuple[str, float, float] | None:
    """(reference, its mean, the best design's mean) if TF-IDF beats every design on the tasks that both have."""
    arms = {arm.design: arm for arm in comparison.arms if arm.group == group}
    designs = [arms[name] for name in _candidates(comparison)]
    for name in LEXICAL_FLOOR:
        floor = arms.get(name)
        shared = [task for task in designs[0].tasks if floor and task in floor.tasks]
        if floor and shared:
            best = max(arm.on(shared).mean for arm in designs)
            if best < floor.on(shared).mean:
                return name, floor.on(shared).mean, best
    return None


def _leave_one_source_out(
    comparison: Comparison, costs: Mapping[str, float], group: str, chosen: str
) -> tuple[int, float, float]:
    """(folds, share of folds that choose `chosen`, expected regret): the rule repeated without each source in turn.

    The contrasts of the other groups keep their p-values, so that Holm spans the same family in every fold.
    """
    arms = {design: comparison.arm(group, design) for design in comparison.designs}
    scores = {design: arm.by_source for design, arm in arms.items()}
    candidates = _candidates(comparison)
    means = np.array([scores[design].mean(axis=0) for design in candidates])
    elsewhere = [row.verdict.p_value if row.verdict else float("nan") for row in comparison.rows if row.group != group]
    elsewhere += [contrast.verdict.p_value for contrast in comparison.overall]
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
        choice, _ = _choose(comparison, costs, words, shifts)
        same += choice == chosen
        regrets.append(float(means[:, fold].max() - means[candidates.index(choice), fold]))
    return means.shape[1], same / means.shape[1], float(np.mean(regrets))


def _crossed(comparison: Comparison, arms: Mapping[str, Arm], kept: Mapping[str, np.ndarray], design: str) -> Crossed:
    """The contrast of one fold; designs with the same seeds lend their runs, as in the full comparison."""
    base = comparison.baseline
    pool: Sequence[str] = ()
    if arms[base].seeds == arms[design].seeds:
        pool = [
            name for name in comparison.designs if name not in (base, design) and arms[name].seeds == arms[base].seeds
        ]
    return stats.crossed(kept[base], kept[design], pool=[kept[name] for name in pool])
