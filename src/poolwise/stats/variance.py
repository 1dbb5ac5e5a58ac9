"""Variance components of a contrast between designs, and the null distribution of its test statistic.

The score of design k, run (seed) s and task t is modelled as

    score = task_t + design_k + run_ks + (design x task)_kt + noise_kst

with random runs and random tasks. A contrast between designs is uncertain for two reasons: other runs would have come
out differently (`runs`), and other tasks might have preferred another design (`tasks`). Both mean squares contain the
noise once, hence the variance unit * (runs + tasks - error). `MeanSquares` estimates the three; `Null` is the
distribution of the standardised contrast at those estimates, on a fixed grid of chi-square quantiles: a parametric
bootstrap without random numbers.

The bootstrap takes the estimates as true, and few runs that happen to lie close together then pass for stable ones. So
p is never below that of Student's t test on the means of the runs. That test is exact for these tasks and runs like
these, and a claim about other tasks as well cannot be better supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import fdtrc, fdtri, gammaincinv, ndtr, stdtr

from poolwise.stats.exact import Array

POOLED = "pooled over the study"
AGREED = "the compared designs, and the study agrees"
SHARED = "the compared designs, with a share of the study"
TWO_ARMS = "two arms"
OWN_ARMS = "the compared designs"
NOISIER = "the runs of a compared design vary more than those of the study's other designs"
UNSTABLE_LENDERS = "the runs of every other design vary more than those of the compared ones"
OTHER_SEEDS = "the designs of the study have different numbers of seeds"
NO_RUN_VARIANCE = "no design of the study varies between its runs"

# Degrees of freedom of a design's own runs, over all groups of tasks, from which the F test below can be relied on.
# Three runs in one group have two: a design that varies three times as much as the others passes as one of them in a
# third of studies, so that its own runs must decide.
MEASURED_DF = 4

# Levels of the F test that sets aside a design whose runs vary more than the others'. For a compared design the test is
# lenient: pooling it wrongly makes p too small. For a lender it is strict: leaving out the largest of several equal
# variances makes p too small, keeping an unstable lender only costs power.
ARM_LEVEL, LENDER_LEVEL = 0.05, 0.02

# Where the compared designs' own few runs decide, a verdict at level alpha needs the pooled runs of the study to agree
# at this many times alpha: runs that happen to lie close together are weak evidence on their own (results/type1.md).
# `Null` bounds p by the runs' own t test besides; that one is about the far tail, where this factor is too generous.
AGREE = 3.0

# Grid points of the null distribution by the number of run components: (runs …, tasks, error).
GRIDS = {1: (48, 48, 8), 2: (20, 20, 20, 4)}


@dataclass(frozen=True)
class TaskTypes:
    """Fixed groups of tasks, each with its weight; a design's mean is the weighted mean of its group means.

    A single group gives the plain mean over tasks. `columns` are the task indices of each group, `weights` sum to 1.
    """

    columns: tuple[NDArray[np.intp], ...]
    weights: tuple[float, ...]

    @classmethod
    def one(cls, tasks: int) -> TaskTypes:
        return cls((np.arange(tasks),), (1.0,))

    @cached_property
    def task_weights(self) -> Array:
        """(tasks,): the weight of each task in the mean of a design."""
        weights = np.zeros(sum(len(c) for c in self.columns))
        for columns, weight in zip(self.columns, self.weights, strict=True):
            weights[columns] = weight / len(columns)
        return weights

    @cached_property
    def squared(self) -> float:
        """Sum of the squared task weights: 1 / tasks where all weigh the same."""
        return float(sum(w**2 / len(c) for w, c in zip(self.weights, self.columns, strict=True)))

    def combine(self, mean_squares: Sequence[float], dfs: Sequence[float]) -> tuple[float, float]:
        """Mean square of the weighted mean from those of the groups, with Satterthwaite's degrees of freedom."""
        parts = [
            w**2 / len(c) / self.squared * ms for w, c, ms in zip(self.weights, self.columns, mean_squares, strict=True)
        ]
        return satterthwaite(parts, dfs)


@dataclass(frozen=True)
class MeanSquares:
    """Mean squares behind one contrast, in squared score units; its variance is unit * (sum(runs) + tasks - error).

    `runs` has one entry when runs are pooled, else one for each arm, already multiplied by `run_shares` (which sum
    to 1) so that they add up.
    """

    runs: tuple[float, ...]
    run_shares: tuple[float, ...]
    run_dfs: tuple[float, ...]
    run_df: float
    tasks: float
    task_df: float
    error: float
    error_df: float
    unit: float

    def variance(self) -> float:
        """Estimated variance of the contrast, never below that of either source alone."""
        runs = sum(self.runs)
        return self.unit * max(runs, self.tasks, runs + self.tasks - self.error)

    @property
    def student_df(self) -> float:
        """Degrees of freedom of the t test on the means of the runs alone, whose squared error is unit * sum(runs).

        With equally many runs of two arms that test is Student's, and exact if their variances are equal. Otherwise it
        is Welch's, with Satterthwaite's degrees of freedom, because the variances of the arms have different weights.
        """
        equal = len(self.run_dfs) > 1 and len(set(self.run_dfs)) == 1
        return self.run_df if equal else satterthwaite(self.runs, self.run_dfs)[1]

    @property
    def run_variance(self) -> float:
        """Variance of one run's effect, times the effective number of tasks (1 / `TaskTypes.squared`)."""
        cut = self.truncated()
        return 0.0 if sum(self.runs) < self.error else max(0.0, sum(cut.runs) - cut.error)

    def run_variance_interval(self, level: float) -> tuple[float, float]:
        """Williams' interval (1962) for `run_variance`; the compared arms are taken to share it."""
        ends = []
        for tail in (0.5 + level / 2, 0.5 - level / 2):
            excess = sum(self.runs) - self.error * fdtri(self.run_df, self.error_df, tail)
            ends.append(max(float(excess), 0.0) * self.run_df / float(2 * gammaincinv(self.run_df / 2, tail)))
        return ends[0], ends[1]

    def truncated(self) -> MeanSquares:
        """The same, with each mean square that fell below the error pooled with it, so that no variance is negative."""
        runs, tasks, error, parts = sum(self.runs), self.tasks, self.error, self.runs
        low = runs < error
        if low:
            error = (self.run_df * runs + self.error_df * error) / (self.run_df + self.error_df)
        if tasks < error:
            error = tasks = (self.task_df * tasks + self.error_df * error) / (self.task_df + self.error_df)
        if low:
            parts = tuple(share * error for share in self.run_shares)
        return replace(self, runs=parts, tasks=tasks, error=error)


@dataclass(frozen=True)
class Guard:
    """A second test that must agree: `null` at its own standard error, which is the first one's / `scale`.

    Its p counts 1 / `times`: 3 lets it object only where its p is above three times the level.
    """

    null: Null
    scale: float
    times: float


@dataclass(frozen=True)
class Null:
    """Distribution of |difference| / (estimated standard error) when there is no difference.

    `se` is the standard error at the variances taken as true; `ratios` (points,) are equally likely values of
    (estimated / true) standard error. With a `guard`, p value and critical value are the larger of both tests.

    p is never below that of the t test on the means of the runs, with `run_df` degrees of freedom; its standard error
    is the estimated one / `run_scale`. Without it p below .0002 would occur thirty times too often with two runs and
    six times with three, whose variance is easily estimated far too small (results/type1.md).
    """

    se: float
    ratios: Array = field(repr=False, compare=False)
    run_scale: float = np.inf
    run_df: float = np.inf
    guard: Guard | None = field(default=None, repr=False, compare=False)

    def p_value(self, t: float) -> float:
        """Two-sided p: twice the upper tail at `t`, so above 1 for t < 0, as one-sided tests need it."""
        p = float(2 * ndtr(-t * self.ratios).mean())
        if np.isfinite(self.run_scale):
            p = max(p, float(2 * stdtr(self.run_df, -t * self.run_scale)))
        if self.guard is None:
            return p
        return max(p, self.guard.null.p_value(t * self.guard.scale) / self.guard.times)

    def critical(self, level: float) -> float:
        """The statistic that is exceeded with probability 1 - level, and by which the guard, if any, agrees."""
        top = 2.0
        while top < 1e4 and self.p_value(top) > 1 - level:  # most lie below 4, and each p takes a while
            top *= 2
        return float(brentq(lambda t: self.p_value(t) - 1 + level, top / 2 if top > 2 else 0, top))

    def power(self, effect: float, critical: float) -> float:
        """Chance of a statistic beyond `critical` when the true difference is `effect`.

        `critical` is kept fixed, although the share of the runs in it would come out differently in another study.
        """
        shift = effect / self.se
        return float((ndtr(shift - critical * self.ratios) + ndtr(-shift - critical * self.ratios)).mean())

    def detectable(self, critical: float, power: float) -> float:
        """The true difference that is detected with probability `power`."""
        top = self.se
        while self.power(top, critical) < power:
            top *= 2
        return float(brentq(lambda effect: self.power(effect, critical) - power, 0, top))


def null_distribution(estimates: MeanSquares) -> Null:
    """The null distribution at truncated mean squares: each follows its scaled chi-square, on a grid of quantiles."""
    m = estimates.truncated()
    components = (*m.runs, m.tasks, m.error)
    dfs = (*m.run_dfs, m.task_df, m.error_df)
    points = GRIDS[len(m.runs)]
    draws = [ms * chi_square_over_df(df, count) for ms, df, count in zip(components, dfs, points, strict=True)]
    *each, tasks, error = np.meshgrid(*draws, indexing="ij", sparse=True)
    run = sum(each[1:], start=each[0])
    redrawn = np.maximum(np.maximum(run, tasks), run + tasks - error)
    true = sum(components[:-1]) - components[-1]
    runs = m.unit * sum(estimates.runs)
    scale = float(np.sqrt(estimates.variance() / runs)) if runs > 0 else np.inf
    return Null(float(np.sqrt(m.unit * true)), np.sqrt(redrawn / true).ravel(), scale, estimates.student_df)


def contrast_mean_squares(
    arms: Sequence[Array],
    coefficients: Sequence[float],
    others: Sequence[Array],
    types: TaskTypes,
    elsewhere: Array | None = None,
    pooled: bool = False,
) -> tuple[MeanSquares, str, str, int]:
    """Mean squares of a contrast, with as much of the study's run variance as is sound.

    Two designs with few runs (less than `MEASURED_DF` degrees of freedom each) keep their own run variance. With more,
    the stable designs of the study are pooled; those whose runs vary more than the rest (`unstable`) lend nothing, and
    a compared one keeps its own run variance.

    Args:
        arms: one (seeds_k, tasks) array per compared design.
        coefficients: one per arm; the contrast is their weighted sum of design means.
        others: the study's further designs, (seeds_k, tasks) each.
        elsewhere: (groups, designs) `run_mean_square` of the same designs, arms first, in other groups of tasks.
        pooled: pool the stable designs however few their runs are.

    Returns:
        The mean squares, their scope (`POOLED`, `SHARED`, `TWO_ARMS`, `OWN_ARMS`, or `AGREED`: own runs, and the pooled
        ones must agree), why the other designs were not pooled, and the number of designs whose runs take part.
    """
    own = own_mean_squares(arms, coefficients, types), TWO_ARMS if len(arms) == 2 else OWN_ARMS
    designs = [*arms, *others]
    if len(designs) < 3:
        return *own, "", len(arms)
    if len({len(x) for x in designs}) > 1:
        return *own, OTHER_SEEDS, len(arms)
    runs = np.array([[run_mean_square(x, types) for x in designs]])
    if not runs.any():
        return *own, NO_RUN_VARIANCE, len(arms)
    if elsewhere is not None and len(elsewhere):
        runs = np.vstack([runs, elsewhere])
    seeds = len(arms[0])
    if not pooled and len(arms) == 2 and len(runs) * (seeds - 1) < MEASURED_DF:
        return own[0], AGREED, "", len(designs)
    noisy, ratios = unstable(runs, seeds, len(arms))
    lenders = [x for x, out in zip(others, noisy[len(arms) :], strict=True) if not out]
    note = NOISIER if noisy[: len(arms)].any() else ""
    if (others and not lenders) or (note and len(arms) > 2):
        return *own, note or UNSTABLE_LENDERS, len(arms)
    if not note:
        study = np.stack([*arms, *lenders])
        return study_mean_squares(study, [*coefficients, *[0.0] * len(lenders)], types), POOLED, "", len(study)
    if noisy[: len(arms)].all() and len(runs) == 1:
        return *own, note, len(arms)
    known = ratios[: len(arms)] if len(runs) > 1 else None
    squares = shared_mean_squares(arms, coefficients, lenders, noisy[: len(arms)], types, known, len(runs))
    return squares, SHARED, note, 2 + len(lenders)


def unstable(runs: Array, seeds: int, compared: int) -> tuple[NDArray[np.bool_], Array]:
    """Which designs have runs that vary more than those of the rest, and by how much.

    The most conspicuous design (F test, `ARM_LEVEL` and `LENDER_LEVEL`) is set aside in turn; two are always kept.

    Args:
        runs: (groups, designs) run mean squares; groups of tasks may differ in scale.
        seeds: runs of each design.
        compared: number of compared designs, which come first.

    Returns:
        (designs,) whether a design is set aside, and its mean square over that of the designs that are not, on average
        over the groups.
    """
    scale = runs.mean(axis=1, keepdims=True)
    relative = (runs / np.where(scale > 0, scale, 1.0)).mean(axis=0)
    df = float(len(runs) * (seeds - 1))
    levels = np.full(runs.shape[1], LENDER_LEVEL)
    levels[:compared] = ARM_LEVEL
    kept = np.arange(runs.shape[1])
    while kept.size > 2:
        rest = (relative[kept].sum() - relative[kept]) / (kept.size - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = np.nan_to_num(fdtrc(df, (kept.size - 1) * df, relative[kept] / rest)) / levels[kept]
        if p.min() >= 1:
            break
        kept = np.delete(kept, p.argmin())
    out = np.ones(runs.shape[1], dtype=bool)
    out[kept] = False
    typical = float(relative[kept].mean())
    return out, relative / typical if typical > 0 else np.full_like(relative, np.inf)


def shared_mean_squares(
    arms: Sequence[Array],
    coefficients: Sequence[float],
    lenders: Sequence[Array],
    noisy: NDArray[np.bool_],
    types: TaskTypes,
    ratios: Array | None,
    groups: int,
) -> MeanSquares:
    """Mean squares of two compared designs, one or both of which are unstable.

    A stable design has its deviations from the mean run of the stable designs, seed by seed, as in
    `study_mean_squares`, pooled with those of the lenders. An unstable design has its own variance over runs, or, if
    larger, that of the stable designs times its ratio over all `groups` (`ratios`; None with a single group).
    """
    study = np.stack([*arms, *lenders])
    seeds = study.shape[1]
    stable = np.array([*~noisy, *[True] * len(lenders)])
    count = int(stable.sum())
    deviations = _centred(_centred((study @ types.task_weights)[stable], 0), 1)
    # Deviations of `count` designs from their mean have (count - 1) / count of the variance, and are correlated.
    factor = count / (count - 1) if count > 1 else 1.0
    typical = float((factor * (deviations**2).sum(axis=1) / (seeds - 1) / types.squared).mean())
    total_df = (count - 1.0) * (seeds - 1)
    scale = float(sum(c**2 for c in coefficients)) / seeds
    parts: list[tuple[float, float, float]] = []  # of the run variance: mean square, share, degrees of freedom
    lent = 0.0
    for i, arm in enumerate(arms):
        share = coefficients[i] ** 2 / seeds / scale
        if stable[i]:
            lent += share
        elif ratios is None or count < 2:
            parts.append((run_mean_square(arm, types), share, seeds - 1.0))
        else:
            # A ratio of two mean squares is as uncertain as both together.
            df = 1 / (1 / (groups * (seeds - 1)) + 1 / total_df)
            parts.append((max(run_mean_square(arm, types), float(ratios[i]) * typical), share, df))
    if lent:
        parts.insert(0, (typical, lent, total_df))  # first, so that the compared designs share one grid
    runs, shares, dfs = (tuple(column) for column in zip(*((ms * w, w, df) for ms, w, df in parts), strict=True))
    error, error_df = _interaction(study, types)
    tasks, task_df = _task_mean_square(list(arms), coefficients, types, scale)
    return MeanSquares(
        runs, shares, dfs, satterthwaite(runs, dfs)[1], tasks, task_df, error, error_df, scale * types.squared
    )


def own_mean_squares(arms: Sequence[Array], coefficients: Sequence[float], types: TaskTypes) -> MeanSquares:
    """Mean squares from the compared designs alone, each with its own run variance.

    Args:
        arms: one (seeds_k, tasks) array per compared design.
        coefficients: one per arm; the contrast is their weighted sum of design means.
    """
    parts = [c**2 / len(arm) for c, arm in zip(coefficients, arms, strict=True)]
    scale = sum(parts)
    shares = tuple(part / scale for part in parts)
    runs = tuple(share * run_mean_square(arm, types) for share, arm in zip(shares, arms, strict=True))
    run_dfs = tuple(float(len(arm) - 1) for arm in arms)
    run_df = sum(run_dfs)
    if len(arms) > 2:  # the grid has an axis for each run variance, so more than two would make it too large
        merged, df = satterthwaite(runs, run_dfs)
        runs, shares, run_dfs = (merged,), (1.0,), (df,)
    squares, dfs = [], []
    for columns in types.columns:
        residuals = [_centred(_centred(arm[:, columns], 0), 1) for arm in arms]
        dfs.append(run_df * (len(columns) - 1))
        squares.append(sum(float((r**2).sum()) for r in residuals) / dfs[-1])
    error, error_df = types.combine(squares, dfs)
    tasks, task_df = _task_mean_square(arms, coefficients, types, scale)
    return MeanSquares(runs, shares, run_dfs, run_df, tasks, task_df, error, error_df, scale * types.squared)


def study_mean_squares(study: Array, coefficients: Sequence[float], types: TaskTypes) -> MeanSquares:
    """Mean squares with the run and the error variance pooled over all designs of a study.

    Args:
        study: (designs, seeds, tasks), the same seeds in each design.
        coefficients: (designs,), zero for designs that are not compared.
    """
    designs, seeds, _ = study.shape
    run_df = float((designs - 1) * (seeds - 1))
    scale = float(sum(c**2 for c in coefficients)) / seeds
    means = _centred(_centred(study @ types.task_weights, 0), 1)
    runs = float((means**2).sum()) / types.squared / run_df
    error, error_df = _interaction(study, types)
    tasks, task_df = _task_mean_square(list(study), coefficients, types, scale)
    return MeanSquares((runs,), (1.0,), (run_df,), run_df, tasks, task_df, error, error_df, scale * types.squared)


def run_mean_square(scores: Array, types: TaskTypes) -> float:
    """Mean square of the runs of one design, (seeds, tasks): variance of its run means, per task."""
    return float((scores @ types.task_weights).var(ddof=1)) / types.squared


def satterthwaite(parts: Sequence[float], dfs: Sequence[float]) -> tuple[float, float]:
    """Sum of independent mean squares and its approximate degrees of freedom (Satterthwaite 1946)."""
    total = float(sum(parts))
    spread = sum(part**2 / df for part, df in zip(parts, dfs, strict=True))
    return total, float(sum(dfs)) if len(parts) == 1 or spread == 0 else float(total**2 / spread)


@lru_cache(maxsize=256)
def chi_square_over_df(df: float, points: int) -> Array:
    """Chi-square quantiles / df at the midpoints of `points` slices of equal probability."""
    quantiles = 2 * gammaincinv(df / 2, (np.arange(points) + 0.5) / points) / df
    quantiles.setflags(write=False)  # the cache hands out the same array to every caller
    return quantiles


def _interaction(study: Array, types: TaskTypes) -> tuple[float, float]:
    """Mean square of the noise, (designs, seeds, tasks) less all effects of two factors, and its degrees of freedom."""
    run_df = (study.shape[0] - 1) * (study.shape[1] - 1)
    residuals = _centred(_centred(study, 1), 0)
    squares, dfs = [], []
    for columns in types.columns:
        dfs.append(float(run_df * (len(columns) - 1)))
        squares.append(float((_centred(residuals[:, :, columns], 2) ** 2).sum()) / dfs[-1])
    return types.combine(squares, dfs)


def _task_mean_square(
    arms: Sequence[Array], coefficients: Sequence[float], types: TaskTypes, scale: float
) -> tuple[float, float]:
    differences = sum(c * arm.mean(axis=0) for c, arm in zip(coefficients, arms, strict=True))
    squares = [float(np.var(np.asarray(differences)[columns], ddof=1)) / scale for columns in types.columns]
    return types.combine(squares, [len(columns) - 1 for columns in types.columns])


def _centred(values: Array, axis: int) -> Array:
    return values - values.mean(axis=axis, keepdims=True)
