"""The controls of a study: A/A noise band, broken arm, predictions, dilution ladder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poolwise import stats
from poolwise.stats.crossed import Crossed
from poolwise.stats.variance import TaskTypes, run_mean_square
from poolwise.verdicts.arms import FEW_SOURCES, Arm
from poolwise.verdicts.comparison import Comparison

AA_ALPHA = 0.01
"""Level, after Holm over the groups, at which the A/A arm makes a study exploratory."""
AA_RUNS = 3
"""Runs a side below which it never does: two runs measure the run effect so badly that one study in ten would be."""
RUNGS: Mapping[str, float] = {"ladder-0.5": 0.005, "ladder-1": 0.01, "ladder-2": 0.02}
"""Label of each rung and the loss on development items that it is calibrated to, in scores 0–1."""


@dataclass(frozen=True)
class Band:
    """The noise band: the group in which the A/A arm differs most from the baseline (scores 0–1), with its interval
    (None with a single run on either side), Holm's p of every group that could be tested, and the smaller number of
    runs of the two sides."""

    design: str
    group: str
    difference: float
    ci_low: float | None
    ci_high: float | None
    p_holm: tuple[tuple[str, float], ...]
    runs: int

    @property
    def differs(self) -> tuple[str, ...]:
        """The groups in which the design is shown to differ from itself; none below `AA_RUNS` runs."""
        return tuple(group for group, p in self.p_holm if p < AA_ALPHA and self.runs >= AA_RUNS)


@dataclass(frozen=True)
class BrokenArm:
    """The broken arm against the baseline: how many `groups` were compared and how many of them `tested`, and its
    `losses` (0–1, smallest first) that are significant after Holm over the groups."""

    design: str
    groups: int
    tested: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """A prediction and its outcome: favoured − over (0–1) in one group, with its 95 % interval, uncorrected.

    `outcome`: right or wrong if the interval excludes 0, otherwise undecided. `sign`: whether the difference is
    above 0.
    """

    group: str
    favoured: str
    over: str
    difference: float
    ci_low: float | None
    ci_high: float | None
    sign: bool
    outcome: str


@dataclass(frozen=True)
class Rung:
    """One rung of the dilution ladder in one group: rung − baseline (scores 0–1) with its 95 % interval.

    `p_adjusted`: p × contrasts of the family, at most 1. `seen`: the study's own test detects the loss. Without
    verdicts on designs (one seed, tasks of one source) the interval and p are None and nothing is detected.
    """

    group: str
    design: str
    target: float
    difference: float
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    seen: bool = False


def noise_bands(comparison: Comparison) -> tuple[Band, ...]:
    """The band of each A/A arm; none if the arm repeats another design than the one that all are compared with.

    With as many runs as the designs an arm is tested as one of them, with the others lending their runs: three runs of
    its own measure the run effect so badly that p far below .05 comes out too small (`results/aa.md`). See `_as_design`
    for what its other seeds change.
    """
    bands = []
    for design in (name for name, role in comparison.roles if role == "aa"):
        arms = [arm for arm in comparison.arms if arm.design == design]
        repeated = design.removesuffix("-aa")
        if not arms or (repeated in comparison.designs and repeated != comparison.baseline):
            continue
        bases = {arm.group: comparison.arm(arm.group, comparison.baseline).on(arm.tasks) for arm in arms}
        tests = {arm.group: _as_design(comparison, arm, bases[arm.group]) for arm in arms}
        differences = {
            arm.group: test.difference if (test := tests[arm.group]) else arm.mean - bases[arm.group].mean
            for arm in arms
        }
        tested = {group: test.p_value for group, test in tests.items() if test}
        p = stats.holm(list(tested.values())).tolist()
        group = max(differences, key=lambda name: abs(differences[name]))
        widest = tests[group]
        low, high = (widest.ci_low, widest.ci_high) if widest else (None, None)
        runs = min(len(arms[0].seeds), len(bases[group].seeds))
        holm = tuple(zip(tested, p, strict=True))
        bands.append(Band(design, group, differences[group], low, high, holm, runs))
    return tuple(bands)


def _as_design(comparison: Comparison, arm: Arm, base: Arm) -> Crossed | None:
    """The arm tested against the baseline like a design of the study; None with one run or one source of tasks.

    The designs of a study share their seeds, so that what a seed does to all of them cancels in their contrasts and in
    the run variance that they lend. The arm has seeds of its own: nothing cancels in its difference. So it is tested
    both with that variance and with the runs of the two arms alone, and the larger p counts.
    """
    if comparison.interim or min(len(base.seeds), len(arm.seeds)) < 2 or base.by_source.shape[1] < 2:
        return None
    others = [comparison.arm(arm.group, name) for name in comparison.designs[1:]]
    lenders = [x for x in others if len(x.seeds) == len(base.seeds) == len(arm.seeds)]
    known = _elsewhere(comparison, arm.group, [base.design, arm.design, *(x.design for x in lenders)])
    pool = [x.on(arm.tasks).by_source for x in lenders]
    lent = stats.crossed(base.by_source, arm.by_source, pool=pool, elsewhere=known)
    if base.seeds == arm.seeds:
        return lent
    return max(lent, stats.crossed(base.by_source, arm.by_source), key=lambda found: found.p_value)


def _elsewhere(comparison: Comparison, group: str, designs: Sequence[str]) -> NDArray[np.float64] | None:
    """(groups, designs) how much the runs of some designs vary in the other groups, for `stats.crossed`; None if none
    of these groups has all of them, on the same tasks and with as many runs."""
    squares = []
    for other in comparison.groups:
        arms = [arm for name in designs for arm in comparison.arms if (arm.group, arm.design) == (other, name)]
        alike = len({(arm.tasks, len(arm.seeds)) for arm in arms}) == 1
        own = comparison.of_own_task(group) or comparison.of_own_task(other)
        if other != group and len(arms) == len(designs) and alike and not own:
            types = TaskTypes.one(arms[0].by_source.shape[1])
            squares.append([run_mean_square(arm.by_source, types) for arm in arms])
    return np.array([row for row in squares if any(row)]) if any(map(any, squares)) else None


def unsound(baseline: str, bands: Sequence[Band]) -> str:
    """Why the A/A arm makes all verdicts exploratory; empty if it does not."""
    bad = [(band.design, band.differs) for band in bands if band.differs]
    if not bad:
        return ""
    named = "; ".join(f"{design} on {', '.join(groups)}" for design, groups in bad)
    return (
        f"Exploratory: the A/A arm, {baseline} under other seeds, differs from {baseline} at p < .01 after Holm "
        f"({named})."
    )


def broken_arms(comparison: Comparison) -> tuple[BrokenArm, ...]:
    """Each broken arm that was scored, by its contrasts outside the family (design scope where there is one)."""
    broken = []
    for design in (name for name, role in comparison.roles if role == "broken"):
        shown = [row.verdict or row for row in comparison.control_rows if row.design == design]
        if not shown:
            continue
        # An untested contrast counts as p = 1, so that it never makes the others easier to pass.
        p = stats.holm([1.0 if row.p_value is None else row.p_value for row in shown]).tolist()
        significant = [row for row, q in zip(shown, p, strict=True) if q <= comparison.alpha]
        losses = sorted(-row.difference for row in significant if row.difference < 0)
        tested = sum(row.p_value is not None for row in shown)
        broken.append(BrokenArm(design, len(shown), tested, tuple(losses)))
    return tuple(broken)


def scored(comparison: Comparison, predictions: Mapping[str, Mapping[str, Any]]) -> tuple[Prediction, ...]:
    """The outcome of each prediction (group -> `favoured` and `over`, names of designs) for which the comparison has
    the group and both designs."""
    outcomes = []
    for group, prediction in predictions.items():
        arms = {arm.design: arm for arm in comparison.arms if arm.group == group and arm.design in comparison.designs}
        if prediction["favoured"] not in arms or prediction["over"] not in arms:
            continue
        favoured, over = arms[prediction["favoured"]], arms[prediction["over"]]
        low = high = None
        if min(len(favoured.seeds), len(over.seeds)) > 1 and over.by_source.shape[1] > 1 and not comparison.interim:
            pool = [arms[name] for name in comparison.designs if name not in (favoured.design, over.design)]
            lenders = [arm for arm in pool if arm.seeds == favoured.seeds == over.seeds]
            known = _elsewhere(comparison, group, [over.design, favoured.design, *(x.design for x in lenders)])
            lent = [arm.by_source for arm in lenders]
            test = stats.crossed(over.by_source, favoured.by_source, pool=lent, elsewhere=known)
            low, high = test.ci_low, test.ci_high
        outcome = "undecided"
        if low is not None and high is not None and not low <= 0 <= high:
            outcome = "right" if low > 0 else "wrong"
        difference = favoured.mean - over.mean
        outcomes.append(Prediction(group, favoured.design, over.design, difference, low, high, difference > 0, outcome))
    return tuple(outcomes)


def rungs(comparison: Comparison) -> tuple[Rung, ...]:
    """Every rung of every group, smallest loss first; empty if no ladder was scored."""
    results = []
    for group in comparison.groups:
        arms = {arm.design: arm for arm in comparison.arms if arm.group == group}
        for label, target in RUNGS.items():
            if label not in comparison.control_designs or label not in arms:
                continue
            arm = arms[label]
            base = arms[comparison.baseline].on([task for task in arms[comparison.baseline].tasks if task in arm.tasks])
            if len(base.seeds) < 2 or base.by_source.shape[1] < 2 or base.seeds != arm.seeds:
                results.append(Rung(group, label, target, arm.mean - base.mean))
                continue
            others = [arms[name] for name in comparison.designs[1:]]
            lenders = [x for x in others if x.seeds == base.seeds]
            lent = [x.on(base.tasks).by_source for x in lenders]
            known = _elsewhere(comparison, group, [base.design, label, *(x.design for x in lenders)])
            # A rung is scored on the baseline's own runs. Rolling its seeds by one pairs every run with another one,
            # as two designs would be, so that the pooled run variance does not count one design twice.
            test = stats.crossed(base.by_source, np.roll(arm.by_source, 1, axis=0), pool=lent, elsewhere=known)
            p = min(1.0, test.p_value * len(comparison.rows))
            seen = p <= comparison.alpha and test.difference < 0 and base.by_source.shape[1] >= FEW_SOURCES
            results.append(
                Rung(group, label, target, test.difference, test.ci_low, test.ci_high, test.p_value, p, seen)
            )
    return tuple(results)


def smallest_seen(rungs: Sequence[Rung], group: str) -> Rung | None:
    """The first rung of a group from which on every rung is detected; None if the last one is not."""
    smallest = None
    for rung in reversed([rung for rung in rungs if rung.group == group]):
        if not rung.seen:
            break
        smallest = rung
    return smallest
