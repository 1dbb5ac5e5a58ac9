"""What the controls say of a study: the A/A arm's noise band, the broken arm, predictions that were written before.

The A/A arm is the baseline trained again under other seeds. Its largest difference is a picture of the noise; it speaks
against the study only at p < .01 after Holm over the groups, since one arm in twenty would at .05.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from poolwise import stats
from poolwise.verdicts import rungs
from poolwise.verdicts.arms import Arm

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


def _as_design(comparison: Comparison, arm: Arm) -> stats.Crossed | None:
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


def to_json(comparison: Comparison) -> dict[str, Any]:
    """`noise_bands` of A/A arms with the groups in which they differ, and the dilution `ladder` (null without one)."""
    bands = noise_bands(comparison)
    return {
        "noise_bands": [{**asdict(band), "p_holm": dict(band.p_holm), "differs": list(band.differs)} for band in bands],
        "ladder": rungs.to_json(comparison),
    }
