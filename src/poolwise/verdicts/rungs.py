"""The dilution ladder read: which loss of the baseline would the study's own test have called one?

Each rung is the baseline with a little noise in its embeddings (`scoring.ladder`). A rung stands outside the family;
it is tested as if it were one more design of it, at the family's strictest level (Holm's first step), so that what it
says holds for the designs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from poolwise import stats
from poolwise.verdicts.arms import FEW_SOURCES

if TYPE_CHECKING:
    from poolwise.verdicts.comparison import Comparison

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


def to_json(comparison: Comparison) -> dict[str, Any] | None:
    """`rungs` and, for each group, `smallest_seen`: the loss of the first rung that was seen, or null."""
    found = rungs(comparison)
    if not found:
        return None
    seen = {group: smallest_seen(found, group) for group in comparison.groups}
    return {
        "rungs": [asdict(rung) for rung in found],
        "smallest_seen": {group: -rung.difference if rung else None for group, rung in seen.items()},
    }
