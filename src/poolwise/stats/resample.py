"""Two models on ONE data set: resampling its items (queries, pairs, examples, sets).

The claim is about these two models on items like these; nothing here sees the training run. All randomness comes from
the generator that is passed in, so one seed gives one answer. Differences are b - a, intervals are at 95 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from poolwise.errors import StatisticsError
from poolwise.stats.exact import Array, finite_array, midranks

# Items x resamples whose counts are held in memory at once: 32 MB.
_CELLS = 4_000_000


@dataclass(frozen=True)
class Bootstrap:
    """A difference with its percentile bootstrap intervals: `ci` at 95 %, `inner` at 90 %.

    `p_value` inverts the interval: twice the smaller share of resamples on either side of 0, with one added to both
    counts so that it is never 0.
    """

    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    inner_low: float
    inner_high: float


def paired_permutation(a: ArrayLike, b: ArrayLike, rng: np.random.Generator, n: int = 10_000) -> float:
    """Two-sided p of a zero mean of b - a: signs of the differences are flipped at random (Smucker et al. 2007).

    Args:
        a, b: (items,) scores of two models on the same items, for example NDCG@10 of each query.
        n: number of random flips. p = (flips at least as extreme + 1) / (n + 1), so it is never 0.
    """
    d = _paired(a, b, "paired_permutation")
    moved = d[d != 0]
    # A flip that gives the same sum counts as extreme, whatever the rounding of the sum.
    bar = abs(moved.sum()) - 1e-12 * np.abs(moved).sum()
    extreme = 0
    for size in _chunks(len(moved), n):
        keep = np.unpackbits(rng.integers(0, 256, (size, -(-len(moved) // 8)), dtype=np.uint8), axis=1)[:, : len(moved)]
        extreme += int((np.abs(2 * (keep @ moved) - moved.sum()) >= bar).sum())
    return (extreme + 1) / (n + 1)


def paired_bootstrap(a: ArrayLike, b: ArrayLike, rng: np.random.Generator, n: int = 10_000) -> Bootstrap:
    """Mean of b - a with a percentile interval: items are drawn with replacement, both scores of an item together.

    Args:
        a, b: (items,) scores of two models on the same items; 0 and 1 for an accuracy.
        n: number of resamples.
    """
    d = _paired(a, b, "paired_bootstrap")
    return _bootstrap(lambda counts: counts @ d / len(d), [np.arange(len(d))], rng, n)


def spearman_bootstrap(
    a: ArrayLike, b: ArrayLike, gold: ArrayLike, rng: np.random.Generator, n: int = 2_000
) -> Bootstrap:
    """Difference of two Spearman correlations with the gold scores of one STS set; pairs are resampled.

    Args:
        a, b: (pairs,) similarities by two models; or (runs, pairs), whose correlations are averaged over runs.
        gold: (pairs,) human scores.
        n: number of resamples.
    """
    runs_a, runs_b, truth = _by_run(a, b, gold, "spearman_bootstrap")
    ranks_a, ranks_b = ([midrank_function(x) for x in runs] for runs in (runs_a, runs_b))
    rank_gold = midrank_function(truth)

    def difference(counts: Array) -> Array:
        gold_ranks = rank_gold(counts)
        mean_a, mean_b = (
            np.mean([correlation(ranks(counts), gold_ranks, counts) for ranks in runs], axis=0)
            for runs in (ranks_a, ranks_b)
        )
        return np.asarray(mean_b - mean_a)

    return _bootstrap(difference, [np.arange(len(truth))], rng, n)


def ap_bootstrap(a: ArrayLike, b: ArrayLike, labels: ArrayLike, rng: np.random.Generator, n: int = 2_000) -> Bootstrap:
    """Difference of two average precisions on one pair-classification set.

    Positive and negative pairs are resampled separately, since whoever made the set chose their shares.

    Args:
        a, b: (pairs,) similarities by two models, higher for "same"; or (runs, pairs), averaged over runs.
        labels: (pairs,) 1 for a positive pair, 0 for a negative one; both must occur.
        n: number of resamples.
    """
    runs_a, runs_b, truth = _by_run(a, b, labels, "ap_bootstrap")
    if set(np.unique(truth)) != {0.0, 1.0}:
        raise StatisticsError(f"ap_bootstrap: labels {np.unique(truth)[:5].tolist()}; both 0 and 1 must occur")
    aps_a, aps_b = ([average_precision_function(x, truth) for x in runs] for runs in (runs_a, runs_b))

    def difference(counts: Array) -> Array:
        mean_a, mean_b = (np.mean([ap(counts) for ap in aps], axis=0) for aps in (aps_a, aps_b))
        return np.asarray(mean_b - mean_a)

    by_label = [np.flatnonzero(truth == label) for label in (0, 1)]
    return _bootstrap(difference, by_label, rng, n)


def zou_interval(r_a: float, r_b: float, r_ab: float, items: int) -> tuple[float, float]:
    """95 % interval for r_b - r_a, two correlations that share the gold scores (Zou 2007, overlapping case).

    Args:
        r_a, r_b: correlation of either model with the gold scores.
        r_ab: correlation of the two models with each other.
        items: number of pairs, 4 or more.

    Derived for Pearson's r. For Spearman's it is an approximation, used here as a check on the bootstrap.
    """
    correlations = np.array([r_a, r_b, r_ab], dtype=float)
    if items < 4 or not (np.abs(correlations[:2]) < 1).all() or not abs(r_ab) <= 1:
        raise StatisticsError(
            f"zou_interval: correlations {correlations.tolist()} of {items} pairs; needs |r| < 1 and 4 pairs"
        )
    half = ndtri(0.975) / np.sqrt(items - 3)
    low, high = np.tanh(np.arctanh(correlations[:2]) - half), np.tanh(np.arctanh(correlations[:2]) + half)
    free_a, free_b = 1 - r_a**2, 1 - r_b**2
    shared = ((r_ab - r_a * r_b / 2) * (1 - r_a**2 - r_b**2 - r_ab**2) + r_ab**3) / (free_a * free_b)

    def reach(toward_b: float, toward_a: float) -> float:
        return float(np.sqrt(max(toward_b**2 + toward_a**2 - 2 * shared * toward_b * toward_a, 0.0)))

    difference = r_b - r_a
    return difference - reach(r_b - low[1], high[0] - r_a), difference + reach(high[1] - r_b, r_a - low[0])


def _bootstrap(
    statistic: Callable[[Array], Array], groups: list[NDArray[np.intp]], rng: np.random.Generator, n: int
) -> Bootstrap:
    """Percentile bootstrap of a statistic of item counts, (resamples, items) -> (resamples,)."""
    items = sum(len(members) for members in groups)
    drawn = np.concatenate([statistic(draw_counts(groups, size, items, rng)) for size in _chunks(items, n)])
    low, inner_low, inner_high, high = np.quantile(drawn, [0.025, 0.05, 0.95, 0.975]).tolist()
    p = min(1.0, 2 * (int(min((drawn <= 0).sum(), (drawn >= 0).sum())) + 1) / (n + 1))
    return Bootstrap(float(statistic(np.ones((1, items)))[0]), low, high, p, inner_low, inner_high)


def _chunks(items: int, n: int) -> Iterator[int]:
    """Sizes that add up to n, each small enough to hold `items` numbers for every one of its resamples."""
    if n < 1:
        raise StatisticsError(f"n={n!r} resamples; give 1 or more, 10,000 for a p-value to be quoted")
    size = max(1, _CELLS // max(items, 1))
    for start in range(0, n, size):
        yield min(size, n - start)


def _paired(a: ArrayLike, b: ArrayLike, who: str) -> Array:
    x, y = (finite_array(values, f"{who}: {name}", "item") for name, values in (("a", a), ("b", b)))
    _check_same_items(who, a=x, b=y)
    return y - x


def _by_run(a: ArrayLike, b: ArrayLike, truth: ArrayLike, who: str) -> tuple[Array, Array, Array]:
    """(runs, items) of both models and the (items,) truth that they share."""
    x, y = (finite_array(np.atleast_2d(v), f"{who}: {name}", "run", "item") for name, v in (("a", a), ("b", b)))
    gold = finite_array(truth, f"{who}: gold or labels", "item")
    _check_same_items(who, a=x[0], b=y[0], gold=gold)
    return x, y, gold


def _check_same_items(who: str, **vectors: Array) -> None:
    if len({len(x) for x in vectors.values()}) > 1:
        sizes = ", ".join(f"{name} {len(x)}" for name, x in vectors.items())
        raise StatisticsError(f"{who}: numbers of items differ ({sizes}); give the same items in the same order")


def draw_counts(groups: list[NDArray[np.intp]], size: int, items: int, rng: np.random.Generator) -> Array:
    """(size, items): how often each item is drawn when each group is resampled separately, with replacement."""
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
        positives_so_far = np.cumsum(hits, axis=1)
        seen = np.cumsum(np.add.reduceat(drawn, starts, axis=1), axis=1)
        precision = positives_so_far / np.maximum(seen, 1)
        return (hits * precision).sum(axis=1) / positives_so_far[:, -1]

    return average_precision


def spearman_parts(scores: ArrayLike, gold: ArrayLike) -> Array:
    """(items,) numbers whose mean is Spearman's correlation and whose spread gives its standard error for many items.

    With z and w the standardised midranks: rho + z w − rho (z² + w²) / 2, the influence function of Pearson's
    correlation on ranks (infinitesimal jackknife; Devlin, Gnanadesikan & Kettenring 1975) plus rho. All 0 if the scores
    are equal.
    """
    z, w = (midranks(finite_array(values, "spearman_parts", "item")) for values in (scores, gold))
    if z.std() == 0 or w.std() == 0:
        return np.zeros(len(z))
    z, w = ((ranks - ranks.mean()) / ranks.std() for ranks in (z, w))
    rho = (z * w).mean()
    return np.asarray(rho + z * w - rho * (z**2 + w**2) / 2)


def average_precision_parts(scores: ArrayLike, labels: ArrayLike) -> Array:
    """(items,) numbers whose mean is the average precision and whose spread gives its standard error.

    They are the average precision plus the influence of each item: n times the derivative with respect to the item's
    weight (infinitesimal jackknife; Jaeckel 1972). Items with equal scores share one threshold.

    Args:
        scores: (items,), higher for "same".
        labels: (items,) 1 for a positive pair, 0 for a negative one; both must occur.
    """
    x, y = finite_array(scores, "average_precision_parts: scores", "item"), np.asarray(labels, dtype=float)
    if set(np.unique(y)) != {0.0, 1.0}:
        raise StatisticsError(f"average_precision_parts: labels {np.unique(y)[:5].tolist()}; both 0 and 1 must occur")
    _, place = np.unique(-x, return_inverse=True)  # 0 for the highest score
    size, hits = np.bincount(place), np.bincount(place, y)
    seen, found = np.cumsum(size), np.cumsum(hits)
    precision, positives = found / seen, y.sum()
    whole = float((hits * precision).sum() / positives)
    # A weight counts at its own threshold and at every lower one.
    gained = np.cumsum((hits / seen)[::-1])[::-1][place]
    diluted = np.cumsum((hits * found / seen**2)[::-1])[::-1][place]
    slope = (y * (precision[place] + gained) - diluted - y * whole) / positives
    return np.asarray(whole + len(x) * slope)
