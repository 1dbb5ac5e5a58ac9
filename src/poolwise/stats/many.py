"""Many comparisons at once: correction within a declared family, and one test over many designs.

p-values come and go in input order. A nan stands for a declared comparison that could not be tested: it stays nan but
keeps its place in the family, so that a failed trial never makes the others easier to pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import fdtrc

from poolwise.errors import StatisticsError
from poolwise.stats.exact import DIGITS, midranks

TWO_LOOK_ALPHA = 0.03
"""Level of each of two looks, at 3 and at 5 seeds: a false alarm in .03 to .07 (results/type1.md, runs alike)."""


@dataclass(frozen=True)
class Friedman:
    """Friedman's test over designs: `f` and `p_value` by Iman–Davenport, `mean_ranks` with 1 for the lowest scores."""

    chi2: float
    f: float
    p_value: float
    mean_ranks: tuple[float, ...]
    tasks: int
    designs: int
    scope: str = "checkpoints"


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p-values adjusted so that the chance of any false alarm in the family stays at the level (Holm 1979).

    Args:
        p: (comparisons,) raw p-values of the whole declared family; nan for one that could not be tested.

    Returns:
        (comparisons,) adjusted p-values, nan where nan came in.
    """
    raw, order = _family(p, "holm")
    size = len(raw)
    steps = raw[order] * (size - np.arange(size))
    return _restored(np.maximum.accumulate(steps), order, raw)


def bh(p: ArrayLike) -> NDArray[np.float64]:
    """p-values adjusted for the expected share of false alarms among the rejections (Benjamini & Hochberg 1995).

    Args:
        p: (comparisons,) raw p-values; nan for one that could not be tested.

    Returns:
        (comparisons,) adjusted p-values, nan where nan came in.
    """
    raw, order = _family(p, "bh")
    size = len(raw)
    steps = raw[order] * size / (np.arange(size) + 1)
    steps[np.isnan(steps)] = np.inf
    return _restored(np.minimum.accumulate(steps[::-1])[::-1], order, raw)


def friedman(table: ArrayLike) -> Friedman:
    """Do k checkpoints differ at all over n tasks? Friedman's rank test, F form of Iman & Davenport (1980).

    Args:
        table: (tasks, designs) scores, rounded to six decimals before ranking; two or more of each.

    All scores tied gives p = 1; the same strict order on every task gives f = inf, p = 0.

    Raises:
        StatisticsError: fewer than two tasks or designs, or a missing score.
    """
    scores = np.asarray(table, dtype=float)
    if scores.ndim != 2 or min(scores.shape) < 2:
        raise StatisticsError(f"friedman: a table of shape {scores.shape}; give (tasks, designs), two or more of each")
    missing = np.argwhere(~np.isfinite(scores))
    if len(missing):
        raise StatisticsError(
            f"friedman: {len(missing)} scores are missing or infinite, the first at task index {missing[0][0]}, design "
            f"index {missing[0][1]}; leave out the tasks that a design did not finish"
        )
    n, k = scores.shape
    ranks = np.array([midranks(row) for row in np.round(scores, DIGITS)])
    between = n * ((ranks.mean(axis=0) - (k + 1) / 2) ** 2).sum()
    within = ((ranks - (k + 1) / 2) ** 2).sum() / (n * (k - 1))  # smaller where scores are tied
    chi2 = float(between / within) if within > 0 else 0.0
    room = n * (k - 1) - chi2
    f = float((n - 1) * chi2 / room) if room > 1e-9 * n * k else np.inf
    p = float(fdtrc(k - 1, (k - 1) * (n - 1), f))
    return Friedman(chi2, f, p, tuple(ranks.mean(axis=0).tolist()), n, k)


def _family(p: ArrayLike, who: str) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    raw = np.asarray(p, dtype=float)
    if raw.ndim != 1:
        raise StatisticsError(f"{who}: p-values of shape {raw.shape}; give one flat list, the whole family")
    wrong = np.flatnonzero((raw < 0) | (raw > 1))
    if len(wrong):
        raise StatisticsError(f"{who}: p[{wrong[0]}] = {raw[wrong[0]]!r} is not between 0 and 1")
    return raw, np.argsort(raw, kind="stable")  # nan last


def _restored(adjusted: NDArray[np.float64], order: NDArray[np.intp], raw: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.empty_like(raw)
    result[order] = np.minimum(adjusted, 1.0)
    result[np.isnan(raw)] = np.nan
    return result
