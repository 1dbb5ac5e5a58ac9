"""The controls of a study: A/A noise band, broken arm, predictions, dilution ladder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from poolwise import stats
from poolwise.stats.crossed import Crossed
from poolwise.verdicts.arms import FEW_SOURCES, Arm

if TYPE_CHECKING:
    import polars as pl

    from poolwise.verdicts.comparison import Comparison


AA_ALPHA = 0.01
"""Level, after Holm over the groups, at which the A/A arm makes a study exploratory."""
AA_RUNS = 3
"""Runs a side below which it never does: two tell so little of the run effect that one study in ten would be."""


@dataclass(frozen=True)
class Band:
    """The noise band: the group in which the A/A arm differs most from the baseline (scores 0–1), with its interval
    (None with one run a side), Holm's p of every group that could be tested, and the runs of the side with fewer."""

    design: str
    group: str
    difference: float
    ci_low: float | None
    ci_high: float | None
    p_holm: tuple[tuple[str, float], ...]
    runs: int

    @property
    def differs(self) -> tuple[str, ...]:
        """The groups in which the same design is called different from itself; none below `AA_RUNS` runs."""
        return tuple(group for group, p in self.p_holm if p < AA_ALPHA and self.runs >= AA_RUNS)


@dataclass(frozen=True)
class Prediction:
    """A prediction against what came out: favoured − over (0–1) in one group, with its 95 % interval, uncorrected.

    `outcome`: right or wrong where the interval leaves out 0, else undecided. `sign`: whether it is above 0.
    """

    group: str
    favoured: str
    over: str
    difference: float
    ci_low: float | None
    ci_high: float | None
    sign: bool
    outcome: str


def roles_of(frame: pl.DataFrame) -> tuple[tuple[str, str], ...]:
    """(design, role) of every control, where the table has a column `role`."""
    import polars as pl

    if "role" not in frame.columns:
        return ()
    known = frame.select("design", "role").unique().drop_nulls().filter(pl.col("role") != "design")
    return tuple(known.sort("design", "role").iter_rows())


def noise_bands(comparison: Comparison, designs: Sequence[str] | None = None) -> tuple[Band, ...]:
    """The band of each A/A arm (`designs`; by default those whose role says so).

    With as many runs as the designs an arm is tested as one of them, the others lending their runs: its own three runs
    alone tell so little of the run effect that p far below .05 come out too small (`results/aa.md`).
    """
    found = []
    for design in [name for name, role in comparison.roles if role == "aa"] if designs is None else designs:
        arms = [arm for arm in comparison.arms if arm.design == design]
        tested = [(arm, _as_design(comparison, arm)) for arm in arms]
        shown = [
            (arm.group, test.difference, test.ci_low, test.ci_high)
            if test
            else (arm.group, arm.mean - comparison.arm(arm.group, comparison.baseline).on(arm.tasks).mean, None, None)
            for arm, test in tested
        ]
        groups = [(arm.group, test.p_value) for arm, test in tested if test]
        p = stats.holm([value for _, value in groups]).tolist() if groups else []
        if shown:
            group, difference, low, high = max(shown, key=lambda row: abs(row[1]))
            holm = tuple((name, q) for (name, _), q in zip(groups, p, strict=True))
            runs = min(len(arms[0].seeds), len(comparison.arm(group, comparison.baseline).seeds))
            found.append(Band(design, group, difference, low, high, holm, runs))
    return tuple(found)


def _as_design(comparison: Comparison, arm: Arm) -> Crossed | None:
    """The arm against the baseline as if it were a design of the study; None with one run, or one source of tasks."""
    base = comparison.arm(arm.group, comparison.baseline).on(arm.tasks)
    if comparison.interim or min(len(base.seeds), len(arm.seeds)) < 2 or base.by_source.shape[1] < 2:
        return None
    others = [comparison.arm(arm.group, name) for name in comparison.lenders if name != comparison.baseline]
    lent = [x.on(arm.tasks).by_source for x in others if len(x.seeds) == len(base.seeds) == len(arm.seeds)]
    return stats.crossed(base.by_source, arm.by_source, pool=lent)


def unsound(comparison: Comparison) -> str:
    """Why the A/A arm makes all verdicts exploratory; empty where it does not."""
    bad = [(band.design, band.differs) for band in noise_bands(comparison) if band.differs]
    if not bad:
        return ""
    named = "; ".join(f"{design} on {', '.join(groups)}" for design, groups in bad)
    return (
        f"Exploratory: the A/A arm, {comparison.baseline} under other seeds, differs from {comparison.baseline} at "
        f"p < .01 after Holm ({named})."
    )


def scored(comparison: Comparison, predictions: Mapping[str, Mapping[str, Any]]) -> tuple[Prediction, ...]:
    """Predictions (group -> favoured and over, names of designs) of which the comparison has group and both designs."""
    found = []
    for group, said in predictions.items():
        arms = {arm.design: arm for arm in comparison.arms if arm.group == group and arm.design in comparison.designs}
        if said["favoured"] not in arms or said["over"] not in arms:
            continue
        favoured, over = arms[said["favoured"]], arms[said["over"]]
        difference = favoured.mean - over.mean
        low = high = None
        if min(len(favoured.seeds), len(over.seeds)) > 1 and over.by_source.shape[1] > 1 and not comparison.interim:
            pool = [arms[name] for name in comparison.lenders if name not in (favoured.design, over.design)]
            lent = [arm.by_source for arm in pool if arm.seeds == favoured.seeds == over.seeds]
            test = stats.crossed(over.by_source, favoured.by_source, pool=lent)
            low, high = test.ci_low, test.ci_high
        outcome = "undecided"
        if low is not None and high is not None and not low <= 0 <= high:
            outcome = "right" if low > 0 else "wrong"
        found.append(Prediction(group, favoured.design, over.design, difference, low, high, difference > 0, outcome))
    return tuple(found)


def controls_to_json(comparison: Comparison) -> dict[str, Any]:
    """`noise_bands` of A/A arms with the groups in which they differ, and the dilution `ladder` (null without one)."""
    bands = noise_bands(comparison)
    return {
        "noise_bands": [{**asdict(band), "p_holm": dict(band.p_holm), "differs": list(band.differs)} for band in bands],
        "ladder": rungs_to_json(comparison),
    }


RUNGS: Mapping[str, float] = {"ladder-0.5": 0.005, "ladder-1": 0.01, "ladder-2": 0.02}
"""Label of each rung and what it is calibrated to lose on development items, in scores 0–1."""


@dataclass(frozen=True)
class Rung:
    """One rung in one group: rung − baseline (scores 0–1) with its 95 % interval.

    `p_adjusted`: p × contrasts of the family, at most 1. `seen`: the study's test calls the loss one. Without verdicts
    on designs (one seed, tasks of one source) interval and p are None and nothing is seen.
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


def rungs(comparison: Comparison) -> tuple[Rung, ...]:
    """Every rung of every group, smallest loss first; empty where no ladder was scored.

    A rung's runs are the baseline's own, so its seeds are shifted by one against them before the test: two designs have
    runs of their own, and the run variance that is pooled over the study must not count one design twice.
    """
    found = []
    for group in comparison.groups:
        arms = {arm.design: arm for arm in comparison.arms if arm.group == group}
        for label, target in RUNGS.items():
            if label not in comparison.control_designs or label not in arms:
                continue
            arm = arms[label]
            base = arms[comparison.baseline].on([task for task in arms[comparison.baseline].tasks if task in arm.tasks])
            difference = arm.mean - base.mean
            if len(base.seeds) < 2 or base.by_source.shape[1] < 2 or base.seeds != arm.seeds:
                found.append(Rung(group, label, target, difference))
                continue
            others = [arms[name] for name in comparison.lenders if name != comparison.baseline]
            lent = [x.on(base.tasks).by_source for x in others if x.seeds == base.seeds]
            test = stats.crossed(base.by_source, np.roll(arm.by_source, 1, axis=0), pool=lent)
            p = min(1.0, test.p_value * len(comparison.rows))
            seen = p <= comparison.alpha and test.difference < 0 and base.by_source.shape[1] >= FEW_SOURCES
            found.append(
                Rung(group, label, target, test.difference, test.ci_low, test.ci_high, test.p_value, p, bool(seen))
            )
    return tuple(found)


def smallest_seen(found: tuple[Rung, ...], group: str) -> Rung | None:
    """The first rung of a group from which on every rung is called worse; None where the last one is not."""
    smallest = None
    for rung in reversed([rung for rung in found if rung.group == group]):
        if not rung.seen:
            break
        smallest = rung
    return smallest


def rungs_to_json(comparison: Comparison) -> dict[str, Any] | None:
    """`rungs` and, for each group, `smallest_seen`: the loss of the first rung that was seen, or null."""
    found = rungs(comparison)
    if not found:
        return None
    seen = {group: smallest_seen(found, group) for group in comparison.groups}
    return {
        "rungs": [asdict(rung) for rung in found],
        "smallest_seen": {group: -rung.difference if rung else None for group, rung in seen.items()},
    }
