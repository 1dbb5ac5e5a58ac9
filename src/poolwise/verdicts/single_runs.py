"""What single runs allow beyond pairs with the baseline: ranks of checkpoints over tasks, and posteriors.

Everything here speaks about the trained checkpoints over tasks like these, never about designs.

- Friedman's test over all checkpoints (F form of Iman & Davenport), mean ranks, and which checkpoints no pairwise exact
  Wilcoxon test tells apart after Holm over all pairs of a group. Not Nemenyi's test on mean ranks: its answer for two
  designs depends on the others in the pool (Benavoli, Corani & Mangili 2016).
- Bayesian signed-rank test against the baseline with the study's margin as region of practical equivalence (Benavoli
  et al. 2014, 2017).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from poolwise import stats

if TYPE_CHECKING:
    from poolwise.verdicts.comparison import Comparison


DRAWS = 20_000


@dataclass(frozen=True)
class Posterior:
    """Probability that a task like these puts the design's checkpoint below, within ±margin of, above the baseline's:
    the share of posterior draws in which that is the likeliest."""

    design: str
    worse: float
    equivalent: float
    better: float


@dataclass(frozen=True)
class SingleRuns:
    """One group of tasks: `ranks` (design, mean rank; best, 1, first), Friedman's test, `alike`: the largest sets of
    designs of which no pair differs after Holm over all `pairs`; `posteriors` against the baseline."""

    group: str
    tasks: int
    ranks: tuple[tuple[str, float], ...]
    chi2: float
    f: float | None
    p_value: float
    pairs: tuple[tuple[str, str, float], ...]
    alike: tuple[tuple[str, ...], ...]
    margin: float
    posteriors: tuple[Posterior, ...]


def single_runs(comparison: Comparison) -> tuple[SingleRuns, ...]:
    """Ranks and posteriors of each group with two tasks or more; none where items stand for tasks."""
    return tuple(
        _group(comparison, group)
        for group in comparison.groups
        if len(comparison.arm(group, comparison.baseline).tasks) > 1 and not comparison.of_items(group)
    )


def _group(comparison: Comparison, group: str) -> SingleRuns:
    names = comparison.designs
    table = np.stack([comparison.arm(group, name).task_means for name in names], axis=1)  # (tasks, designs)
    found = stats.friedman(-table)  # rank 1 for the highest score
    ranks = sorted(zip(names, found.mean_ranks, strict=True), key=lambda pair: pair[1])
    couples = list(itertools.combinations(range(len(names)), 2))
    p = stats.holm([stats.signed_rank(table[:, j] - table[:, i]).p_value for i, j in couples]).tolist()
    apart = {frozenset((names[i], names[j])) for (i, j), q in zip(couples, p, strict=True) if q <= comparison.alpha}
    posteriors = []
    for place, name in enumerate(names[1:], 1):
        rng = np.random.default_rng([place, comparison.groups.index(group)])
        d = table[:, place] - table[:, 0]
        chances = stats.bayesian_signed_rank(d, comparison.margin, rng, DRAWS)
        posteriors.append(Posterior(name, chances.worse, chances.equivalent, chances.better))
    return SingleRuns(
        group, len(table), tuple(ranks), found.chi2, found.f if np.isfinite(found.f) else None, found.p_value,
        tuple((names[i], names[j], q) for (i, j), q in zip(couples, p, strict=True)),
        alike([name for name, _ in ranks], apart), comparison.margin, tuple(posteriors),
    )  # fmt: skip


def alike(names: list[str], apart: Collection[frozenset[str]]) -> tuple[tuple[str, ...], ...]:
    """The largest sets of two names or more of which no pair is in `apart`, in the order of `names`.

    They are the maximal cliques of the graph of pairs that are not told apart (Bron & Kerbosch 1973).
    """
    near = {a: {b for b in names if b != a and frozenset((a, b)) not in apart} for a in names}
    found: list[tuple[str, ...]] = []

    def grow(chosen: list[str], open_: set[str], closed: set[str]) -> None:
        if not open_ and not closed and len(chosen) > 1:
            found.append(tuple(sorted(chosen, key=names.index)))
        pivot = max(open_ | closed, key=lambda name: len(near[name] & open_), default=None)
        for name in sorted(open_ - (near[pivot] if pivot else set()), key=names.index):
            grow([*chosen, name], open_ & near[name], closed & near[name])
            open_ = open_ - {name}
            closed = closed | {name}

    grow([], set(names), set())
    return tuple(sorted(found, key=lambda members: [names.index(name) for name in members]))
