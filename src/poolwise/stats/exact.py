"""Exact tests and estimates for paired differences between two *checkpoints* over tasks.

They ask whether these two checkpoints differ on tasks like these; they cannot say that one design is better than the
other, because a lucky run is better on every task at once (`crossed` answers that). Nothing here is random or
approximate: p-values come from counting sign patterns with integers, for any number of ties and zeros.

A difference is one number per task, `b - a`, in any unit. Differences are rounded to `DIGITS` decimals before they are
compared or ranked, so that `0.3 - 0.2` and `0.2 - 0.1` are the tie they were meant to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poolwise.errors import StatisticsError, suggest

DIGITS = 6
ZERO_RULES = ("wilcox", "pratt")


@dataclass(frozen=True)
class SignedRank:
    """Wilcoxon's signed-rank test: rank sums of the positive and the negative differences, two-sided exact p."""

    p_value: float
    w_plus: float
    w_minus: float
    n: int
    zeros: int
    scope: str = "checkpoints"


@dataclass(frozen=True)
class RankBiserial:
    """Matched-pairs rank-biserial correlation, -1 (every difference negative) to 1 (every one positive)."""

    value: float
    n: int
    zeros: int


@dataclass(frozen=True)
class HodgesLehmann:
    """Median of the pairwise means, with its exact interval; `None` for an end that the sample cannot bound."""

    estimate: float
    ci_low: float | None
    ci_high: float | None
    level: float
    n: int


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test; `b` and `c` are the two kinds of discordant items."""

    p_value: float
    b: int
    c: int


@dataclass(frozen=True)
class WinsTiesLosses:
    """Number of tasks on which the difference is above, at and below zero."""

    wins: int
    ties: int
    losses: int


def signed_rank(differences: ArrayLike, zeros: Literal["wilcox", "pratt"] = "wilcox") -> SignedRank:
    """Wilcoxon signed-rank test, two-sided, by enumeration of all sign patterns (Wilcoxon 1945; Pratt 1959).

    Args:
        differences: (tasks,) one difference per task.
        zeros: "wilcox" drops zero differences before ranking, "pratt" after it.

    All differences zero gives p = 1. Several hundred tasks are possible: the count runs over rank sums, not patterns.

    Raises:
        StatisticsError: no differences, a nan among them, or an unknown rule for zeros.
    """
    if zeros not in ZERO_RULES:
        allowed = ", ".join(ZERO_RULES)
        raise StatisticsError(f"signed_rank: zeros={zeros!r} is not one of {allowed}{suggest(zeros, ZERO_RULES)}")
    rounded = _rounded(differences, "signed_rank")
    ranked = rounded if zeros == "pratt" else rounded[rounded != 0]
    ranks = _doubled_midranks(np.abs(ranked))
    w_plus, w_minus = int(ranks[ranked > 0].sum()), int(ranks[ranked < 0].sum())
    used = ranks[ranked != 0]
    count = _subsets_up_to(used, min(w_plus, w_minus))
    return SignedRank(
        p_value=min(1.0, 2 * count / 2 ** len(used)),
        w_plus=w_plus / 2,
        w_minus=w_minus / 2,
        n=len(rounded),
        zeros=int((rounded == 0).sum()),
    )


def min_reachable_p(n: int) -> float:
    """Smallest two-sided p that `signed_rank` can give on `n` non-zero differences: 2 of the 2^n sign patterns."""
    if n < 0:
        raise StatisticsError(f"min_reachable_p: n={n}; a number of tasks is 0 or more")
    return min(1.0, math.ldexp(2.0, -n))


def rank_biserial(differences: ArrayLike) -> RankBiserial:
    """Matched-pairs rank-biserial correlation, (W+ - W-) / (W+ + W-), zeros dropped (Kerby 2014); all zero gives 0.

    Args:
        differences: (tasks,) one difference per task.
    """
    rounded = _rounded(differences, "rank_biserial")
    nonzero = rounded[rounded != 0]
    ranks = _doubled_midranks(np.abs(nonzero))
    value = float((np.sign(nonzero) * ranks).sum() / ranks.sum()) if len(nonzero) else 0.0
    return RankBiserial(value=value, n=len(rounded), zeros=len(rounded) - len(nonzero))


def hodges_lehmann(differences: ArrayLike, level: float = 0.95) -> HodgesLehmann:
    """Median of all Walsh averages (d_i + d_j) / 2, i <= j, zeros kept, with the exact distribution-free interval.

    Without ties the interval holds exactly those shifts that `signed_rank` does not reject (Hollander & Wolfe 1999,
    section 3.3). When not even the outermost averages reach `level` (five or fewer tasks at .95), both ends are `None`.

    Args:
        differences: (tasks,) one difference per task; not rounded here.
        level: probability that the interval covers, at least.
    """
    d = _checked(differences, "hodges_lehmann")
    check_level(level, "hodges_lehmann")
    n = len(d)
    rows, columns = np.triu_indices(n)
    walsh = np.sort((d[rows] + d[columns]) / 2)
    outside = largest_rejected_sum(n, 1 - level)
    low, high = (None, None) if outside < 0 else (float(walsh[outside]), float(walsh[-1 - outside]))
    return HodgesLehmann(estimate=float(np.median(walsh)), ci_low=low, ci_high=high, level=level, n=n)


def mcnemar(b: int, c: int) -> McNemar:
    """Exact two-sided McNemar test: a fair coin over the b + c items that exactly one of two models got right.

    Args:
        b, c: number of items that only the first and only the second model got right. None at all gives p = 1.
    """
    for name, value in (("b", b), ("c", c)):
        if value != int(value) or value < 0:
            raise StatisticsError(f"mcnemar: {name}={value!r}; give a count, 0 or more")
    n, heads = int(b) + int(c), 1
    count = 1  # patterns of n coins with at most min(b, c) heads
    for k in range(int(min(b, c))):
        heads = heads * (n - k) // (k + 1)
        count += heads
    return McNemar(p_value=min(1.0, 2 * count / 2**n), b=int(b), c=int(c))


def wins_ties_losses(differences: ArrayLike) -> WinsTiesLosses:
    """Counts of positive, zero and negative differences, after rounding to six decimals.

    Args:
        differences: (tasks,) one difference per task.
    """
    signs = np.sign(_rounded(differences, "wins_ties_losses"))
    return WinsTiesLosses(wins=int((signs > 0).sum()), ties=int((signs == 0).sum()), losses=int((signs < 0).sum()))


@lru_cache(maxsize=512)
def largest_rejected_sum(n: int, alpha: float) -> int:
    """Largest rank sum w with 2 P(W <= w) <= alpha for n untied differences; -1 when there is none."""
    counts = _subset_counts(range(1, n + 1), n * (n + 1) // 4)
    total, half = 0, 2 ** (n - 1)
    for w, count in enumerate(counts.tolist()):
        total += count
        if total / half > alpha * (1 + 1e-12):  # 1 - .95 is a little more or less than .05
            return w - 1
    return len(counts) - 1


def midranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks 1..n of a vector, ties sharing the mean of their ranks."""
    return _doubled_midranks(values) / 2


def check_level(level: float, who: str) -> None:
    """Raise unless `level` is a probability an interval can have."""
    if not 0 < level < 1:
        raise StatisticsError(f"{who}: level={level!r}; an interval's level lies between 0 and 1, for example .95")


def _checked(differences: ArrayLike, who: str) -> NDArray[np.float64]:
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or not len(d):
        raise StatisticsError(f"{who}: differences of shape {d.shape}; give one difference per task, at least one")
    missing = np.flatnonzero(~np.isfinite(d))
    if len(missing):
        raise StatisticsError(
            f"{who}: {len(missing)} of {len(d)} differences are missing or infinite, the first at index {missing[0]}; "
            "leave out the tasks that one of the two did not finish"
        )
    return d


def _rounded(differences: ArrayLike, who: str) -> NDArray[np.float64]:
    return np.round(_checked(differences, who), DIGITS)


def _doubled_midranks(values: NDArray[Any]) -> NDArray[np.int64]:
    """Twice the mid-rank of each value: an integer whatever the ties."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (2 * np.cumsum(count) - count + 1)[place]


def _subsets_up_to(ranks: NDArray[np.int64], limit: int) -> int:
    """Number of subsets of `ranks` whose sum is at most `limit`."""
    return int(sum(_subset_counts(ranks, limit).tolist()))


def _subset_counts(ranks: Sequence[int] | NDArray[np.int64], limit: int) -> NDArray[Any]:
    """Entry s: number of subsets of `ranks` with sum s * gcd(ranks), for sums up to `limit`. Exact integers."""
    values = np.sort(np.asarray(ranks, dtype=np.int64))
    unit = int(np.gcd.reduce(values)) if len(values) else 1
    top = limit // unit
    counts = np.zeros(top + 1, dtype=np.int64 if len(values) < 63 else object)  # 2^62 patterns still fit 64 bits
    counts[0] = 1
    reach = 0  # largest sum so far: beyond it every count is still zero
    for value in (values // unit).tolist():
        if value > top:
            break
        reach = min(top, reach + value)
        counts[value : reach + 1] = counts[value : reach + 1] + counts[: reach + 1 - value]
    return counts
