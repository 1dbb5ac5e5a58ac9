"""Is one *design* better than another, over other runs and other tasks of the same kind? Scores (seeds, tasks).

Runs and tasks are both random and crossed: every run of a design is evaluated on every task. `crossed` tests the
difference of two designs against its own null distribution (see `variance`). Simulated false-alarm rates are in
`results/type1.md` (`benchmarks/type1.py`); a Wilcoxon test over tasks reaches .88 there. The claim is about tasks like
these and runs like these. More tasks or items cannot replace runs: p is never below that of a t test on the means of
the runs alone. Whatever the seeds do not vary is not in the interval.

A single run per design supports no such verdict; `one_seed` computes how large a run effect would have to be to
explain the difference away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit

from poolwise.errors import StatisticsError, suggest
from poolwise.stats.exact import Array, check_level, finite_array
from poolwise.stats.variance import (
    AGREE,
    AGREED,
    MEASURED_DF,
    POOLED,
    Guard,
    MeanSquares,
    Null,
    TaskTypes,
    contrast_mean_squares,
    null_distribution,
)

POWER = 0.8
"""The probability with which a detectable difference is detected."""
MOST_SEEDS = 50
"""The largest number of seeds that `seeds_to_settle` recommends."""


@dataclass(frozen=True)
class Crossed:
    """A difference between designs, b - a, with its interval at `level` and its variance components.

    The interval is difference ± critical * se; where few runs decide, `critical` comes from a t test on their means
    (`variance.Null`). `run_sd`: sd of the effect of ONE run on a design's mean over tasks, with its own interval at
    `level`; `noise_sd`: sd of a single score around its run and task; `task_sd`: sd over tasks of the true difference.
    `scope`: where the run variance comes from; `note`: why it does not come from the whole study, if designs to pool
    were given. `designs`: the number of designs whose runs take part.
    """

    difference: float
    p_value: float
    ci_low: float
    ci_high: float
    level: float
    se: float
    critical: float
    run_sd: float
    run_sd_low: float
    run_sd_high: float
    noise_sd: float
    task_sd: float
    scope: str
    note: str
    tasks: int
    designs: int
    mean_squares: MeanSquares = field(repr=False)
    null: Null | None = field(repr=False, compare=False)


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: `p_value` is the larger of the two; the interval (level 1 - 2 alpha) lies inside ±margin
    exactly when `equivalent`."""

    equivalent: bool
    p_value: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class OneSeed:
    """A difference of two single runs, given the run effect from another study.

    `tipping_run_sd`: the largest run sd at which the difference would still be significant; 0 if it never is.
    """

    difference: float
    p_value: float
    ci_low: float
    ci_high: float
    tipping_run_sd: float
    tasks: int


def crossed(
    a: ArrayLike,
    b: ArrayLike,
    pool: Sequence[ArrayLike] = (),
    level: float = 0.95,
    elsewhere: ArrayLike | None = None,
    cautious: bool = False,
) -> Crossed:
    """Difference b - a of two designs over random runs and random tasks.

    Args:
        a, b: (seeds, tasks) scores of the baseline and of the design; the same tasks, two or more seeds each; the
            numbers of seeds may differ.
        pool: further designs of the study, (seeds, tasks) each. If all have the same number of seeds, they lend their
            run variance (`variance.contrast_mean_squares` says how much of it). Leave out arms that are broken on
            purpose, that repeat the baseline under other seeds, or that have a single run.
        level: of the intervals.
        elsewhere: (groups, designs) `variance.run_mean_square` of a, b and the pool, in this order, in other groups of
            tasks: evidence on whose runs are unstable.
        cautious: for many pairs at once. Where the compared designs' own few runs decide, the runs of the whole study
            must agree at the same level, not only at `variance.AGREE` times it.

    Raises:
        StatisticsError: one seed, one task, different tasks, missing scores.
    """
    arms, others = _pair(a, b, pool)
    types = TaskTypes.one(arms[0].shape[1])
    return _contrast(arms, (-1.0, 1.0), others, types, level, elsewhere, 1.0 if cautious else AGREE)


def crossed_overall(
    a: ArrayLike,
    b: ArrayLike,
    types: Sequence[str],
    weights: Mapping[str, float],
    pool: Sequence[ArrayLike] = (),
    level: float = 0.95,
    elsewhere: ArrayLike | None = None,
) -> Crossed:
    """Difference b - a of the weighted mean over task types: types are fixed, tasks within a type are random.

    Args:
        types: (tasks,) the type of each task; two or more tasks of each type that has weight.
        weights: weight of each type in the overall mean, above 0 and declared before the runs; scaled to sum 1.
            Types without tasks are ignored.
        a, b, pool, level, elsewhere: as in `crossed`.

    Raises:
        StatisticsError: as `crossed`; a type without weight or with one not above 0, a type with a single task.
    """
    arms, others = _pair(a, b, pool)
    if len(types) != arms[0].shape[1]:
        raise StatisticsError(
            f"crossed_overall: {len(types)} types for {arms[0].shape[1]} tasks; give one for each task"
        )
    return _contrast(arms, (-1.0, 1.0), others, _weighted_types(types, weights), level, elsewhere)


def contrast(
    study: Sequence[ArrayLike] | Array,
    coefficients: ArrayLike,
    types: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
) -> Crossed:
    """Weighted sum of the designs of one study, tested as by `crossed` with every design in the pool.

    Args:
        study: (seeds, tasks) of each design, the same tasks; if the numbers of seeds differ, only the runs of the
            compared designs count.
        coefficients: (designs,) summing to 0; a design with coefficient 0 only lends its run variance.
        types, weights: as in `crossed_overall`, for the weighted mean over task types; without them tasks are of one.

    Raises:
        StatisticsError: one seed, one task, different tasks, missing scores, coefficients that are no contrast.
    """
    y = [finite_array(scores, f"contrast: design {i}", "seed", "task", least=2) for i, scores in enumerate(study)]
    c = np.asarray(coefficients, dtype=float)
    if c.shape != (len(y),):
        raise StatisticsError(f"contrast: {c.shape} coefficients for {len(y)} designs; give one for each design")
    if not c.any() or abs(c.sum()) > 1e-9 * np.abs(c).sum():
        raise StatisticsError(f"contrast: coefficients {c.tolist()} must sum to 0 and not all be 0")
    arms, others = ([scores for scores, k in zip(y, c, strict=True) if bool(k) is asked] for asked in (True, False))
    fixed = _weighted_types(types, weights or {}) if types else TaskTypes.one(arms[0].shape[1])
    return _contrast(arms, tuple(c[c != 0].tolist()), others, fixed, 0.95)


def minimum_detectable_effect(result: Crossed) -> float:
    """The true difference that a study with these variances, runs and tasks detects with probability `POWER`.

    result: of `crossed`; its variances are taken as true, its `critical` value decides. Where the runs happen to differ
    by less than noise alone would make them differ, another study's runs will not: its critical value is larger.
    """
    if result.null is None:
        return 0.0
    squares = result.mean_squares
    if sum(squares.runs) >= squares.error:
        return result.null.detectable(result.critical, POWER)
    expected = null_distribution(squares.truncated())
    return expected.detectable(max(result.critical, expected.critical(result.level)), POWER)


def equivalence(result: Crossed, margin: float, alpha: float = 0.05) -> Equivalence:
    """Is the difference inside ±margin? Two one-sided tests (Schuirmann 1987) of the `crossed` statistic.

    Args:
        margin: in score units, above 0, fixed before the runs; never the measured noise.
        alpha: of each one-sided test.
    """
    if not margin > 0:
        raise StatisticsError(f"equivalence: margin={margin!r}; it is a difference above 0, in the unit of the scores")
    check_level(1 - 2 * alpha, "equivalence")
    room = margin - abs(result.difference)
    if result.null is None:
        half, p = 0.0, float(room <= 0)
    else:
        half, p = result.null.critical(1 - 2 * alpha) * result.se, result.null.p_value(room / result.se) / 2
    low, high = result.difference - half, result.difference + half
    return Equivalence(bool(-margin < low and high < margin), p, low, high)


@dataclass(frozen=True)
class NewTask:
    """The difference to expect on one further task: its interval, and the `chance` that it exceeds a margin."""

    low: float
    high: float
    chance: float


def one_new_task(result: Crossed, margin: float) -> NewTask:
    """Prediction of the true difference on a single further task like these, for runs like these.

    It varies around the mean difference by `task_sd`, and the mean is uncertain itself: the half-widths of the two, the
    former by Student's t with tasks − 1 degrees of freedom, are combined as the sides of a right angle (a prediction
    interval of random-effects meta-analysis; Higgins, Thompson & Spiegelhalter 2009).

    Args:
        result: of `crossed`, with the level of the interval.
        margin: in score units; the chance is that of a difference above it.
    """
    df = result.tasks - 1
    quantile = float(stdtrit(df, 0.5 + result.level / 2))
    half = math.hypot(result.critical * result.se, quantile * result.task_sd)
    if half == 0:
        return NewTask(result.difference, result.difference, float(result.difference > margin))
    chance = float(stdtr(df, (result.difference - margin) * quantile / half))
    return NewTask(result.difference - half, result.difference + half, chance)


def one_seed(differences: ArrayLike, run_sd: float, df_run: float = np.inf, level: float = 0.95) -> OneSeed:
    """Difference of two single runs, given the run effect from another study (Welch–Satterthwaite t).

    Args:
        differences: (tasks,) b - a, two or more tasks.
        run_sd: sd of the effect of one run on a mean over such tasks, in the same unit; 0 or more.
        df_run: degrees of freedom behind `run_sd`; infinite if it is known exactly.
        level: of the interval.
    """
    d = finite_array(differences, "one_seed", "task", least=2)
    if not (np.isfinite(run_sd) and run_sd >= 0 and df_run > 0):
        raise StatisticsError(f"one_seed: run_sd={run_sd!r}, df_run={df_run!r}; an sd is 0 or more, its df above 0")
    check_level(level, "one_seed")
    mean, task_variance = float(d.mean()), float(d.var(ddof=1)) / len(d)

    def variance_and_df(sd: float) -> tuple[float, float]:
        runs = 2 * sd**2
        variance = task_variance + runs
        spread = task_variance**2 / (len(d) - 1) + runs**2 / df_run
        return variance, variance**2 / spread if spread > 0 else np.inf

    def p_value(sd: float) -> float:
        variance, df = variance_and_df(sd)
        return float(2 * stdtr(df, -abs(mean) / np.sqrt(variance))) if variance > 0 else float(mean == 0)

    tipping = 0.0
    if p_value(0) < 1 - level:
        tipping = float(brentq(lambda sd: p_value(sd) - (1 - level), 0, 100 * abs(mean) + 1e-9))
    variance, df = variance_and_df(run_sd)
    half = float(stdtrit(df, 0.5 + level / 2) * np.sqrt(variance))
    return OneSeed(mean, p_value(run_sd), mean - half, mean + half, tipping, len(d))


def _contrast(
    arms: list[Array], coefficients: tuple[float, ...], others: list[Array], types: TaskTypes, level: float,
    elsewhere: ArrayLike | None = None, agree: float = AGREE,
) -> Crossed:  # fmt: skip
    check_level(level, "crossed")
    tasks = sorted({arm.shape[1] for arm in [*arms, *others]})
    if len(tasks) > 1:
        raise StatisticsError(f"crossed: designs with {tasks} tasks; every design needs the same tasks")
    known = None if elsewhere is None else finite_array(elsewhere, "crossed: elsewhere", "group", "design", least=0)
    mean_squares, scope, note, designs = contrast_mean_squares(arms, coefficients, others, types, known)
    by_task = sum((c * arm.mean(axis=0) for c, arm in zip(coefficients, arms, strict=True)), start=np.zeros(tasks))
    difference = float(by_task @ types.task_weights)
    se = float(np.sqrt(mean_squares.variance()))
    if se <= 1e-12 * max(1.0, *(float(np.abs(arm).max()) for arm in arms)):
        # Nothing varies, so there is no null distribution; any difference at all is certain.
        null, critical, se, p = None, 0.0, 0.0, float(abs(difference) <= 1e-12)
    else:
        null = null_distribution(mean_squares)
        if scope == AGREED:
            study, *_ = contrast_mean_squares(arms, coefficients, others, types, known, pooled=True)
            if study.variance() > 0:
                scale = se / float(np.sqrt(study.variance()))
                null = replace(null, guard=Guard(null_distribution(study), scale, agree))
        critical, p = null.critical(level), null.p_value(abs(difference) / se)
    cut = mean_squares.truncated()
    run_low, run_high = mean_squares.run_variance_interval(level)
    return Crossed(
        difference=difference,
        p_value=p,
        ci_low=difference - critical * se,
        ci_high=difference + critical * se,
        level=level,
        se=se,
        critical=critical,
        run_sd=float(np.sqrt(mean_squares.run_variance * types.squared)),
        run_sd_low=float(np.sqrt(run_low * types.squared)),
        run_sd_high=float(np.sqrt(run_high * types.squared)),
        noise_sd=float(np.sqrt(cut.error)),
        task_sd=float(np.sqrt(max(cut.tasks - cut.error, 0.0) * cut.unit / types.squared)),
        scope=scope,
        note=note,
        tasks=tasks[0],
        designs=designs,
        mean_squares=mean_squares,
        null=null,
    )


def _weighted_types(types: Sequence[str], weights: Mapping[str, float]) -> TaskTypes:
    names = tuple(dict.fromkeys(types))
    for name in names:
        if name not in weights:
            raise StatisticsError(
                f"crossed_overall: task type {name!r} has no weight{suggest(name, weights)}; declare one"
            )
        if not weights[name] > 0:
            raise StatisticsError(f"crossed_overall: weight {weights[name]!r} of {name!r} must be above 0")
    columns = tuple(np.flatnonzero(np.asarray(types) == name) for name in names)
    for name, tasks in zip(names, columns, strict=True):
        if len(tasks) < 2:
            raise StatisticsError(
                f"crossed_overall: type {name!r} has one task, so its spread over tasks is unknown; leave the type out"
            )
    total = sum(weights[name] for name in names)
    return TaskTypes(columns, tuple(weights[name] / total for name in names))


def _pair(a: ArrayLike, b: ArrayLike, pool: Sequence[ArrayLike]) -> tuple[list[Array], list[Array]]:
    """The two compared designs and those of the pool, each checked to be (seeds, tasks) with two or more of each."""
    named = {"a": a, "b": b, **{f"pool[{i}]": scores for i, scores in enumerate(pool)}}
    checked = [finite_array(scores, f"crossed: {name}", "seed", "task", least=2) for name, scores in named.items()]
    return checked[:2], checked[2:]


def planned_detectable_effect(
    seeds: int,
    tasks: float,
    run_sd: float,
    noise_sd: float,
    task_sd: float,
    designs: int = 2,
    level: float = 0.95,
    measured: bool = False,
) -> float:
    """The true difference of two designs that `crossed` detects with probability `POWER`, planned before any run.

    Args:
        seeds: runs of each design, 2 or more.
        tasks: number of tasks, above 1.
        run_sd, noise_sd, task_sd: as in `Crossed`; in the unit of the scores, not all 0.
        designs: number of designs that share one run variance; 2 for the two-arm form.
        level: 1 - alpha of the test, above 1 - `POWER`.
        measured: several groups of tasks show that the designs' runs vary alike, so that few seeds are pooled too.
    """
    check_level(level, "planned_detectable_effect")
    if seeds < 2 or tasks <= 1 or designs < 2:
        raise StatisticsError(
            f"planned_detectable_effect: seeds={seeds}, tasks={tasks}, designs={designs}; give two or more of each"
        )
    if min(run_sd, noise_sd, task_sd) < 0 or not run_sd + noise_sd + task_sd > 0:
        raise StatisticsError(
            f"planned_detectable_effect: run_sd={run_sd}, noise_sd={noise_sd}, task_sd={task_sd}; give "
            "values of 0 or more, not all 0"
        )
    error = noise_sd**2
    run = error + tasks * run_sd**2
    task = error + seeds / 2 * task_sd**2
    # Few runs decide for themselves; that power is close to the one of the two-arm form.
    pooled = designs > 2 and (measured or seeds - 1 >= MEASURED_DF)
    run_df = float((designs - 1) * (seeds - 1)) if pooled else 2.0 * (seeds - 1)
    shares = (1.0,) if pooled else (0.5, 0.5)
    null = null_distribution(
        MeanSquares(
            runs=tuple(share * run for share in shares),
            run_shares=shares,
            run_dfs=(run_df,) if pooled else (seeds - 1.0, seeds - 1.0),
            run_df=run_df,
            tasks=task,
            task_df=tasks - 1,
            error=error,
            error_df=run_df * (tasks - 1),
            unit=2 / (seeds * tasks),
        )
    )
    return null.detectable(null.critical(level), POWER)


def seeds_to_settle(result: Crossed, effect: float) -> tuple[int | None, int | None]:
    """Seeds per design that would detect a true difference of `effect`: (fewest, most), as the run effect is uncertain.

    Args:
        result: of the study so far; the range covers the interval of its run effect, its other variances are kept.
        effect: in score units, above 0: the margin, or the smallest difference that matters.

    Returns:
        Two numbers of seeds; None instead of one above `MOST_SEEDS`, or if the tasks differ so much that no number
        suffices.
    """
    if not effect > 0:
        raise StatisticsError(
            f"seeds_to_settle: effect={effect!r}; it is a difference above 0, in the unit of the scores"
        )
    fewest, most = (_fewest_seeds(result, run_sd, effect) for run_sd in (result.run_sd_low, result.run_sd_high))
    return fewest, most


def _fewest_seeds(result: Crossed, run_sd: float, effect: float) -> int | None:
    if not run_sd + result.noise_sd + result.task_sd > 0:
        return 2

    # A compared design whose runs vary more than the others' keeps its own run variance with more seeds, too.
    designs = 2 if result.note else result.designs

    def enough(seeds: int) -> bool:
        detectable = planned_detectable_effect(
            seeds, result.tasks, run_sd, result.noise_sd, result.task_sd, designs, result.level, result.scope == POOLED
        )
        return detectable <= effect or math.isclose(detectable, effect)

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # bisection: `low` is too few, `high` is enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
