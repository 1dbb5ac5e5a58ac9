"""Rank statistics of resamples, from how often each item was drawn: sorted once, no resample is ever laid out.

`counts` is (resamples, items); every function returned here maps it to one row per resample, and equals the plain
statistic on the repeated items.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def draw_counts(groups: list[NDArray[np.intp]], size: int, items: int, rng: np.random.Generator) -> Array:
    """(size, items): how often each item is drawn when each group is resampled with replacement on its own."""
    counts = np.empty((size, items))
    row = np.arange(size)[:, None]
    for members in groups:
        m = len(members)
        drawn = rng.integers(0, m, (size, m)) + row * m
        counts[:, members] = np.bincount(drawn.ravel(), minlength=size * m).reshape(size, m)
    return counts


def midrank_function(values: Array) -> Callable[[Array], Array]:
    """counts -> (resamples, items): mid-rank of each item among the drawn ones."""
    order = np.argsort(values, kind="stable")
    distinct, place = np.unique(values, return_inverse=True)
    starts = np.searchsorted(values[order], distinct)

    def ranks(counts: Array) -> Array:
        drawn = np.add.reduceat(counts[:, order], starts, axis=1)
        return (np.cumsum(drawn, axis=1) - (drawn - 1) / 2)[:, place]

    return ranks


def correlation(x: Array, y: Array, counts: Array) -> Array:
    """(resamples,) Pearson correlation of two (resamples, items) arrays over the drawn items; 0 if one is constant."""
    total = counts.sum(axis=1, keepdims=True)
    dx = x - (counts * x).sum(axis=1, keepdims=True) / total
    dy = y - (counts * y).sum(axis=1, keepdims=True) / total
    scale = np.sqrt((counts * dx**2).sum(axis=1) * (counts * dy**2).sum(axis=1))
    return np.divide((counts * dx * dy).sum(axis=1), scale, out=np.zeros(len(counts)), where=scale > 0)


def average_precision_function(scores: Array, labels: Array) -> Callable[[Array], Array]:
    """counts -> (resamples,): sum over distinct scores, highest first, of precision times the step in recall."""
    order = np.argsort(-scores, kind="stable")
    starts = np.searchsorted(-scores[order], np.unique(-scores))
    positive = labels[order]

    def average_precision(counts: Array) -> Array:
        drawn = counts[:, order]
        hits = np.add.reduceat(drawn * positive, starts, axis=1)
        found = np.cumsum(hits, axis=1)
        seen = np.cumsum(np.add.reduceat(drawn, starts, axis=1), axis=1)
        return (hits * found / np.maximum(seen, 1)).sum(axis=1) / found[:, -1]

    return average_precision
