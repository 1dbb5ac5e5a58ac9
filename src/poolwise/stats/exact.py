"""Exact tests and estimates for the paired differences of two *checkpoints* over tasks.

They answer whether these two checkpoints differ on tasks like these. They cannot show that one design is better than
the other, because a lucky training run is better on every task at once; `crossed` answers that question. Nothing here
is random or approximate: p-values come from counting sign patterns in integers, with any number of ties and zeros.

A difference is one number per task, `b - a`, in any unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poolwise.errors import StatisticsError

Array = NDArray[np.float64]

# Differences are rounded to this many decimals before they are ranked: 0.3 - 0.2 and 0.2 - 0.1 are a tie on paper,
# but not in binary floating point.
DIGITS = 6


@dataclass(frozen=True)
class HodgesLehmann:
    """Median of the pairwise means with its exact interval; an end is `None` if the sample is too small to bound it."""

    estimate: float
    ci_low: float | None
    ci_high: float | None


class WinsTiesLosses(NamedTuple):
    """Number of tasks on which the difference is above, at and below zero."""

    wins: int
    ties: int
    losses: int


def finite_array(values: ArrayLike, name: str, *axes: str, least: int = 1) -> Array:
    """The values as an array of floats with the named axes, each of length `least` or more, and nothing missing.

    Args:
        name: what the values are, as errors name it: "crossed: a".
        axes: singular names of the axes, outermost first: "seed", "task".

    Raises:
        StatisticsError: another number of axes, too few entries along one of them, missing or infinite values.
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != len(axes) or min(array.shape) < least:
        expected = ", ".join(f"{axis}s" for axis in axes)
        raise StatisticsError(f"{name} has shape {array.shape}; expected ({expected}), {least} or more of each")
    missing = np.argwhere(~np.isfinite(array))
    if len(missing):
        first = ", ".join(f"{axis} index {place}" for axis, place in zip(axes, missing[0], strict=True))
        raise StatisticsError(
            f"{name}: {len(missing)} of {array.size} values are missing or infinite, the first at {first}; run what is "
            f"missing, or leave that {axes[-1]} out of every design"
        )
    return array


def average_sources(scores: ArrayLike, sources: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """Mean over the tasks of each source: tasks made from one source are not independent (STS12 to STS16).

    Args:
        scores: (..., tasks).
        sources: (tasks,) the source of each task.

    Returns:
        (..., sources) and the names of the sources, in order of first appearance.
    """
    y = np.asarray(scores, dtype=float)
    if y.shape[-1] != len(sources):
        raise StatisticsError(
            f"average_sources: {len(sources)} sources for {y.shape[-1]} tasks; give one for each task"
        )
    names = tuple(dict.fromkeys(sources))
    labels = np.asarray(sources)
    return np.stack([y[..., labels == name].mean(axis=-1) for name in names], axis=-1), names


def signed_rank(differences: ArrayLike) -> float:
    """Two-sided exact p of Wilcoxon's signed-rank test, by enumeration of all sign patterns (Wilcoxon 1945).

    Args:
        differences: (tasks,) one difference per task. Zeros are dropped before ranking; if all are zero, p is 1.

    The count runs over rank sums rather than patterns, so several hundred tasks are possible.

    Raises:
        StatisticsError: no differences, or one that is missing or infinite.
    """
    rounded = _rounded(differences, "signed_rank")
    nonzero = rounded[rounded != 0]
    ranks = _doubled_midranks(np.abs(nonzero))
    smaller = min(int(ranks[nonzero > 0].sum()), int(ranks[nonzero < 0].sum()))
    count = sum(_subset_counts(ranks, smaller).tolist())
    return min(1.0, 2 * count / 2 ** len(ranks))


def min_reachable_p(n: int) -> float:
    """Smallest two-sided p that `signed_rank` can reach on `n` non-zero differences: 2 of the 2^n sign patterns."""
    return min(1.0, math.ldexp(2.0, -n))


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-), from -1 to 1 (Kerby 2014).

    Args:
        differences: (tasks,) one difference per task. Zeros are dropped; if all are zero, the result is 0.
    """
    rounded = _rounded(differences, "rank_biserial")
    nonzero = rounded[rounded != 0]
    ranks = _doubled_midranks(np.abs(nonzero))
    return float((np.sign(nonzero) * ranks).sum() / ranks.sum()) if len(nonzero) else 0.0


def hodges_lehmann(differences: ArrayLike, level: float = 0.95) -> HodgesLehmann:
    """Median of all Walsh averages (d_i + d_j) / 2, i <= j, zeros kept, with the exact distribution-free interval.

    Without ties the interval contains exactly those shifts that `signed_rank` does not reject (Hollander & Wolfe 1999,
    section 3.3). If not even the outermost averages reach `level` (five or fewer tasks at .95), both ends are `None`.

    Args:
        differences: (tasks,) one difference per task; not rounded here.
        level: probability that the interval covers, at least.
    """
    d = finite_array(differences, "hodges_lehmann", "task")
    check_level(level, "hodges_lehmann")
    rows, columns = np.triu_indices(len(d))
    walsh = np.sort((d[rows] + d[columns]) / 2)
    outside = largest_rejected_sum(len(d), 1 - level)
    low, high = (None, None) if outside < 0 else (float(walsh[outside]), float(walsh[-1 - outside]))
    return HodgesLehmann(float(np.median(walsh)), low, high)


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact p of McNemar's test: a fair coin for each of the b + c items that exactly one model got right.

    Args:
        b, c: number of items that only the first and only the second model got right. Without any, p is 1.
    """
    for name, value in (("b", b), ("c", c)):
        if value != int(value) or value < 0:
            raise StatisticsError(f"mcnemar: {name}={value!r}; give a count, 0 or more")
    n, heads = int(b) + int(c), 1
    count = 1  # patterns of n coins with at most min(b, c) heads
    for k in range(int(min(b, c))):
        heads = heads * (n - k) // (k + 1)
        count += heads
    return min(1.0, 2 * count / 2**n)


def wins_ties_losses(differences: ArrayLike) -> WinsTiesLosses:
    """Counts of positive, zero and negative differences, after rounding to six decimals.

    Args:
        differences: (tasks,) one difference per task.
    """
    signs = np.sign(_rounded(differences, "wins_ties_losses"))
    return WinsTiesLosses(int((signs > 0).sum()), int((signs == 0).sum()), int((signs < 0).sum()))


@lru_cache(maxsize=512)
def largest_rejected_sum(n: int, alpha: float) -> int:
    """Largest rank sum w with 2 P(W <= w) <= alpha for n untied differences; -1 if there is none."""
    counts = _subset_counts(range(1, n + 1), n * (n + 1) // 4)
    total, half = 0, 2 ** (n - 1)
    for w, count in enumerate(counts.tolist()):
        total += count
        if total / half > alpha * (1 + 1e-12):  # 1 - .95 is not exactly .05 in floating point
            return w - 1
    return len(counts) - 1


def midranks(values: NDArray[Any]) -> Array:
    """Ranks 1..n of a vector; tied values share the mean of their ranks."""
    return _doubled_midranks(values) / 2


def check_level(level: float, who: str) -> None:
    """Raise StatisticsError unless `level` can be the level of an interval."""
    if not 0 < level < 1:
        raise StatisticsError(f"{who}: level={level!r}; an interval's level lies between 0 and 1, for example .95")


def _rounded(differences: ArrayLike, who: str) -> Array:
    return np.round(finite_array(differences, who, "task"), DIGITS)


def _doubled_midranks(values: NDArray[Any]) -> NDArray[np.int64]:
    """Twice the mid-rank of each value, which is an integer whatever the ties."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (2 * np.cumsum(count) - count + 1)[place]


def _subset_counts(ranks: Sequence[int] | NDArray[np.int64], limit: int) -> NDArray[Any]:
    """Entry s: the number of subsets of `ranks` with sum s * gcd(ranks), for sums up to `limit`. Exact integers."""
    values = np.sort(np.asarray(ranks, dtype=np.int64))
    # Without ties every doubled rank is even: dividing by the common divisor halves the table.
    unit = int(np.gcd.reduce(values)) if len(values) else 1
    top = limit // unit
    counts = np.zeros(top + 1, dtype=np.int64 if len(values) < 63 else object)  # 2^62 patterns still fit 64 bits
    counts[0] = 1
    reach = 0  # the largest sum so far; every count beyond it is still zero
    for value in (values // unit).tolist():
        if value > top:
            break
        reach = min(top, reach + value)
        counts[value : reach + 1] = counts[value : reach + 1] + counts[: reach + 1 - value]
    return counts
