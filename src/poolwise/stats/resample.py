"""Two models on ONE data set: resampling its items (queries, pairs, examples, sets).

The claim is about these two models on items like these; nothing here sees the training run. All randomness comes from
the generator that is passed in, so one seed gives one answer. Differences are b - a.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from poolwise.errors import StatisticsError
from poolwise.stats.exact import check_level

PER_QUERY_RANK_TESTS_REFUSED = (
    "Wilcoxon and sign tests over queries are refused: per-query differences are skewed and mostly zero, so these "
    "tests answer another question than 'is the mean higher?'. At a true mean difference of 0 they called "
    ".20 / .67 / .99 (Wilcoxon) and .55 / 1 / 1 (sign) of comparisons significant with 50 / 300 / 1,000 queries, "
    "instead of .05. Use the paired permutation test on the mean."
)
_CELLS = 4_000_000  # items x resamples held at once: 32 MB


@dataclass(frozen=True)
class Permutation:
    """Paired permutation test of a mean difference, two-sided."""

    difference: float
    p_value: float
    items: int
    flips: int
    scope: str = "two models on one data set"


@dataclass(frozen=True)
class Bootstrap:
    """A difference with its percentile bootstrap interval at `level`.

    `p_value` inverts the interval: twice the smaller share of resamples on either side of 0, one added to both counts.
    """

    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    level: float
    items: int
    resamples: int
    scope: str = "two models on one data set"


@dataclass(frozen=True)
class CorrelationDifference:
    """A difference of two correlations with one gold standard, and Zou's interval at `level`."""

    difference: float
    ci_low: float
    ci_high: float
    level: float
    items: int


@dataclass(frozen=True)
class SignedRankPosterior:
    """Posterior chances that b is practically worse, equivalent and better than a; they sum to 1."""

    worse: float
    equivalent: float
    better: float
    margin: float
    draws: int
    scope: str = "checkpoints"


def paired_permutation(a: ArrayLike, b: ArrayLike, rng: np.random.Generator, n: int = 10_000) -> Permutation:
    """Is the mean of b - a zero? Signs of the differences are flipped at random (Smucker et al. 2007).

    Args:
        a, b: (items,) scores of two models on the same items, for example NDCG@10 of each query.
        n: number of random flips. p = (flips at least as extreme + 1) / (n + 1), so it is never 0.
    """
    d = _paired(a, b, "paired_permutation")
    _check_count(n, "paired_permutation")
    moved = d[d != 0]
    bar = abs(moved.sum()) - 1e-12 * np.abs(moved).sum()  # a flip that gives the same sum counts as extreme
    extreme = 0
    for size in _chunks(len(moved), n):
        keep = np.unpackbits(rng.integers(0, 256, (size, -(-len(moved) // 8)), dtype=np.uint8), axis=1)[:, : len(moved)]
        extreme += int((np.abs(2 * (keep @ moved) - moved.sum()) >= bar).sum())
    return Permutation(float(d.mean()), (extreme + 1) / (n + 1), len(d), n)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, rng: np.random.Generator, n: int = 10_000, level: float = 0.95
) -> Bootstrap:
    """Mean of b - a with a percentile interval: items are drawn with replacement, the two scores of one together.

    Args:
        a, b: (items,) scores of two models on the same items; 0 and 1 for an accuracy.
    """
    d = _paired(a, b, "paired_bootstrap")
    return _bootstrap(lambda counts: counts @ d / len(d), [np.arange(len(d))], rng, n, level, "paired_bootstrap")


def spearman_bootstrap(
    a: ArrayLike, b: ArrayLike, gold: ArrayLike, rng: np.random.Generator, n: int = 2_000, level: float = 0.95
) -> Bootstrap:
    """Difference of two Spearman correlations with the gold scores of one STS set; pairs are resampled.

    Args:
        a, b: (pairs,) similarities by two models; or (runs, pairs), whose correlations are averaged over runs.
        gold: (pairs,) human scores.
    """
    runs_a, runs_b, truth = _by_run(a, b, "gold", gold, "spearman_bootstrap")
    ranks_a, ranks_b = ([midrank_function(x) for x in runs] for runs in (runs_a, runs_b))
    rank_gold = midrank_function(truth)

    def difference(counts: Array) -> Array:
        gold_ranks = rank_gold(counts)
        mean_a, mean_b = (
            np.mean([correlation(ranks(counts), gold_ranks, counts) for ranks in runs], axis=0)
            for runs in (ranks_a, ranks_b)
        )
        return np.asarray(mean_b - mean_a)

    return _bootstrap(difference, [np.arange(len(truth))], rng, n, level, "spearman_bootstrap")


def ap_bootstrap(
    a: ArrayLike, b: ArrayLike, labels: ArrayLike, rng: np.random.Generator, n: int = 2_000, level: float = 0.95
) -> Bootstrap:
    """Difference of two average precisions on one pair-classification set.

    Positive and negative pairs are resampled apart: their shares were chosen by whoever made the set.

    Args:
        a, b: (pairs,) similarities by two models, higher for "same"; or (runs, pairs), averaged like correlations.
        labels: (pairs,) 1 for a positive pair, 0 for a negative one; both must occur.
    """
    runs_a, runs_b, truth = _by_run(a, b, "labels", labels, "ap_bootstrap")
    if set(np.unique(truth)) != {0.0, 1.0}:
        raise StatisticsError(f"ap_bootstrap: labels {np.unique(truth)[:5].tolist()}; they are 0 and 1, and both occur")
    aps_a, aps_b = ([average_precision_function(x, truth) for x in runs] for runs in (runs_a, runs_b))

    def difference(counts: Array) -> Array:
        mean_a, mean_b = (np.mean([ap(counts) for ap in aps], axis=0) for aps in (aps_a, aps_b))
        return np.asarray(mean_b - mean_a)

    by_label = [np.flatnonzero(truth == label) for label in (0, 1)]
    return _bootstrap(difference, by_label, rng, n, level, "ap_bootstrap")


def zou_interval(r_a: float, r_b: float, r_ab: float, items: int, level: float = 0.95) -> CorrelationDifference:
    """Interval for r_b - r_a, two correlations that share the gold scores (Zou 2007, overlapping case).

    Args:
        r_a, r_b: correlation of either model with the gold scores.
        r_ab: correlation of the two models with each other.
        items: number of pairs, 4 or more.

    Made for Pearson's r; an approximation, and a check on the bootstrap, for Spearman's.
    """
    check_level(level, "zou_interval")
    correlations = np.array([r_a, r_b, r_ab], dtype=float)
    if items < 4 or not (np.abs(correlations[:2]) < 1).all() or not abs(r_ab) <= 1:
        raise StatisticsError(
            f"zou_interval: correlations {correlations.tolist()} of {items} pairs; needs |r| < 1 and 4 pairs"
        )
    half = ndtri(0.5 + level / 2) / np.sqrt(items - 3)
    low, high = np.tanh(np.arctanh(correlations[:2]) - half), np.tanh(np.arctanh(correlations[:2]) + half)
    free_a, free_b = 1 - r_a**2, 1 - r_b**2
    shared = ((r_ab - r_a * r_b / 2) * (1 - r_a**2 - r_b**2 - r_ab**2) + r_ab**3) / (free_a * free_b)
    difference = r_b - r_a

    def reach(toward_b: float, toward_a: float) -> float:
        return float(np.sqrt(max(toward_b**2 + toward_a**2 - 2 * shared * toward_b * toward_a, 0.0)))

    below, above = reach(r_b - low[1], high[0] - r_a), reach(high[1] - r_b, r_a - low[0])
    return CorrelationDifference(difference, difference - below, difference + above, level, items)


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean: the mean without the lowest and the highest quarter (rounded down) of all scores.

    Args:
        scores: any shape; rliable's aggregate over (runs, tasks), Agarwal et al. 2021.
    """
    flat = np.sort(np.asarray(scores, dtype=float), axis=None)
    if not len(flat) or not np.isfinite(flat).all():
        raise StatisticsError(f"iqm: {len(flat)} scores, all of which must be finite")
    cut = len(flat) // 4
    return float(flat[cut : len(flat) - cut].mean())


def iqm_interval(
    scores: ArrayLike, rng: np.random.Generator, n: int = 2_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of `iqm` over other runs and tasks: whole rows and whole columns are redrawn (Owen 2007).

    Args:
        scores: (runs, tasks). A picture, not a test: with 3 runs it is too narrow, from 5 it is fair.
    """
    y = np.asarray(scores, dtype=float)
    _check_count(n, "iqm_interval")
    check_level(level, "iqm_interval")
    if y.ndim != 2 or not y.size or not np.isfinite(y).all():
        raise StatisticsError(f"iqm_interval: scores of shape {y.shape}; give (runs, tasks), all finite")
    runs, tasks = y.shape
    rows, columns = rng.integers(0, runs, (n, runs)), rng.integers(0, tasks, (n, tasks))
    cut = y.size // 4
    redrawn = np.sort(y[rows[:, :, None], columns[:, None, :]].reshape(n, -1), axis=1)[:, cut : y.size - cut].mean(
        axis=1
    )
    low, high = np.quantile(redrawn, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def bayesian_signed_rank(
    differences: ArrayLike, margin: float, rng: np.random.Generator, n: int = 50_000
) -> SignedRankPosterior:
    """Which is most likely: worse, within ±margin, or better? (Benavoli et al. 2014, 2017; Dirichlet process, s = .5)

    Args:
        differences: (tasks,) b - a.
        margin: half-width of the region of practical equivalence, in score units, 0 or more.
        n: draws of the posterior.
    """
    d = _paired(np.zeros_like(np.asarray(differences, dtype=float)), differences, "bayesian_signed_rank")
    _check_count(n, "bayesian_signed_rank")
    if not margin >= 0:
        raise StatisticsError(f"bayesian_signed_rank: margin={margin!r}; it is 0 or more")
    z = np.append(d, 0.0)  # the prior: half an observation at zero
    pairs = z[:, None] + z[None, :]
    better, worse = (pairs > 2 * margin).astype(float), (pairs < -2 * margin).astype(float)
    wins = np.zeros(3)
    for size in _chunks(len(z), n):
        weights = rng.dirichlet([*np.ones(len(d)), 0.5], size)
        up, down = ((weights @ better) * weights).sum(axis=1), ((weights @ worse) * weights).sum(axis=1)
        chances = np.stack([down, 1 - up - down, up], axis=1)
        best = chances >= chances.max(axis=1, keepdims=True) - 1e-12
        wins += (best / best.sum(axis=1, keepdims=True)).sum(axis=0)
    down_share, same_share, up_share = (wins / n).tolist()
    return SignedRankPosterior(down_share, same_share, up_share, margin, n)


def _bootstrap(
    statistic: Callable[[Array], Array],
    groups: list[NDArray[np.intp]],
    rng: np.random.Generator,
    n: int,
    level: float,
    who: str,
) -> Bootstrap:
    """Percentile bootstrap of a statistic of item counts, (resamples, items) -> (resamples,)."""
    _check_count(n, who)
    check_level(level, who)
    items = sum(len(members) for members in groups)
    values = [statistic(draw_counts(groups, size, items, rng)) for size in _chunks(items, n)]
    drawn = np.concatenate(values)
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    p = min(1.0, 2 * (int(min((drawn <= 0).sum(), (drawn >= 0).sum())) + 1) / (n + 1))
    return Bootstrap(float(statistic(np.ones((1, items)))[0]), float(low), float(high), p, level, items, n)


def _chunks(items: int, n: int) -> Iterator[int]:
    """Sizes that add up to n, each small enough to hold `items` numbers for every one of its resamples."""
    size = max(1, _CELLS // max(items, 1))
    for start in range(0, n, size):
        yield min(size, n - start)


def _paired(a: ArrayLike, b: ArrayLike, who: str) -> Array:
    x, y = _aligned({"a": a, "b": b}, who)
    return y - x


def _by_run(
    a: ArrayLike, b: ArrayLike, name: str, truth: ArrayLike, who: str
) -> tuple[list[Array], list[Array], Array]:
    """The runs of both models and the truth that they share, checked."""
    sides = {side: np.asarray(values, dtype=float) for side, values in (("a", a), ("b", b))}
    rows = {
        side if x.ndim < 2 else f"{side}[{i}]": run
        for side, x in sides.items()
        for i, run in enumerate(x[None] if x.ndim < 2 else x)
    }
    *runs, checked = _aligned({**rows, name: truth}, who)
    count = 1 if sides["a"].ndim < 2 else len(sides["a"])
    return runs[:count], runs[count:], checked


def _aligned(arrays: Mapping[str, ArrayLike], who: str) -> list[Array]:
    """The arrays as float vectors of one length, nothing missing."""
    vectors = {name: np.asarray(values, dtype=float) for name, values in arrays.items()}
    shapes = {name: x.shape for name, x in vectors.items()}
    if len(set(shapes.values())) > 1 or any(x.ndim != 1 or not len(x) for x in vectors.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise StatisticsError(f"{who}: {listed}; give one number per item, the same items in the same order")
    for name, x in vectors.items():
        missing = np.flatnonzero(~np.isfinite(x))
        if len(missing):
            raise StatisticsError(
                f"{who}: {len(missing)} of {len(x)} numbers of {name} are missing or infinite, the first at index "
                f"{missing[0]}; leave those items out of all arrays"
            )
    return list(vectors.values())


def _check_count(n: int, who: str) -> None:
    if n < 1:
        raise StatisticsError(f"{who}: n={n!r} resamples; 1 or more, 10,000 for a p-value to be quoted")


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
