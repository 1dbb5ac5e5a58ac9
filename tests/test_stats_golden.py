"""Golden numbers of `stats`: small inputs with results that were computed apart from the package.

The mean squares, differences and variances are sums of squares by their definitions, computed in exact fractions.
Everything that needs a distribution is transcribed here with `scipy.stats` (the package calls `scipy.special`).
Nothing here needs ../shared. How much the designs of a study lend each other is tested in `test_stats_guard.py`.
"""

from itertools import product
from math import hypot, sqrt

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import chi2, f, norm
from scipy.stats import t as student

from poolwise.errors import StatisticsError
from poolwise.stats import crossed
from poolwise.stats.crossed import (
    contrast,
    crossed_overall,
    equivalence,
    minimum_detectable_effect,
    one_new_task,
    one_seed,
    planned_detectable_effect,
    seeds_to_settle,
)

A = np.array([[12, 12, 10, 11], [10, 10, 8, 7], [8, 7, 5, 5]])
B = np.array([[17, 12, 11, 11], [23, 18, 17, 17], [20, 15, 14, 14]])
"""Three runs, four tasks. Mean squares: runs 25/2 and 18 (each arm has half of the variance), tasks 19/3, noise 1/6."""
C = np.array([[1, 2, 6], [3, 2, 7], [2, 5, 7]])
D = np.array([[4, 3, 9], [8, 5, 8], [6, 10, 10]])
"""The tasks vary less (19/18) than the noise alone explains (107/36); the runs 19/18 and 25/6."""


def null(runs, tasks, error, run_dfs, task_df, error_df, points):
    """(weights of the standard error's square) on the grid of chi-square quantiles, over its true value."""
    axes = [
        [value * chi2.ppf((i + 0.5) / count, df) / df for i in range(count)]
        for value, df, count in zip((*runs, tasks, error), (*run_dfs, task_df, error_df), points, strict=True)
    ]
    true = sum(runs) + tasks - error
    drawn = np.array([(sum(point[:-2]), *point[-2:]) for point in product(*axes)])
    run, task, noise = drawn.T
    return np.maximum(np.maximum(run, task), run + task - noise) / true


def tail(t, squares, scale, df):
    """p of the statistic t, two-sided: on the grid, or, if larger, Student's of the runs alone, of t * scale."""
    return max(2 * norm.sf(t * np.sqrt(squares)).mean(), 2 * student.sf(t * scale, df))


def critical_value(alpha, *null):
    return brentq(lambda t: tail(t, *null) - alpha, 0.1, 100)


def detectable(se, squares, scale, df, level):
    """The effect whose statistic exceeds the critical value, on either side, with probability .8."""
    critical = critical_value(1 - level, squares, scale, df) * np.sqrt(squares)
    return brentq(lambda e: (norm.sf(critical - e / se) + norm.cdf(-critical - e / se)).mean() - 0.8, 0, 1000 * se)


@pytest.fixture(scope="module")
def two_arms():
    """The null distribution of A and B. Their run means 11 1/4, 8 3/4, 6 1/4 and 12 3/4, 18 3/4, 15 3/4 have variances
    25/4 and 9, so that the runs alone have the squared error 61/12 instead of 55/9, with four degrees of freedom."""
    squares = null((12.5, 18), 19 / 3, 1 / 6, (2, 2), 3, 12, (20, 20, 20, 4))
    return squares, sqrt(55 / 9 / (61 / 12)), 4


def test_variances_of_two_arms():
    result = crossed(A, B)
    assert result.difference == 7
    assert result.mean_squares.runs == pytest.approx((12.5, 18))
    assert (result.mean_squares.tasks, result.mean_squares.error) == pytest.approx((19 / 3, 1 / 6))
    assert result.se == pytest.approx(sqrt(55 / 9))
    assert result.noise_sd == pytest.approx(sqrt(1 / 6))
    assert result.task_sd == pytest.approx(sqrt(37 / 9))  # 2/3 of 19/3 - 1/6, two means of three runs each
    assert result.run_sd == pytest.approx(sqrt(91 / 12))  # a quarter of 61/2 - 1/6, four tasks


def test_a_component_below_the_noise_is_pooled_with_it():
    result = crossed(C, D)
    assert result.difference == pytest.approx(28 / 9)
    assert result.se == pytest.approx(sqrt(94 / 81))  # of the runs alone: 2/9 of 47/9
    assert result.noise_sd == pytest.approx(sqrt(233 / 90))  # (2 x 19/18 + 8 x 107/36) / 10
    assert result.task_sd == 0
    assert result.run_sd == pytest.approx(sqrt((47 / 9 - 233 / 90) / 3))
    # The other way round: the runs of D as those of C, so that they vary less than the noise.
    quiet = crossed(C, C + np.array([[1, 4, 9], [1, 3, 10], [1, 4, 9]]) - np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    m = quiet.mean_squares
    assert sum(m.runs) < m.error < m.tasks
    pooled = (4 * sum(m.runs) + 8 * m.error) / 12
    assert (quiet.run_sd, quiet.noise_sd) == pytest.approx((0, sqrt(pooled)))
    assert m.truncated().runs == pytest.approx((pooled / 2, pooled / 2))


def test_the_interval_of_the_run_effect():
    """Williams (1962): 4 degrees of freedom of the runs, 12 of the noise, four tasks."""
    result = crossed(A, B)
    low, high = (
        sqrt((30.5 - f.ppf(p, 4, 12) / 6) * 4 / chi2.ppf(p, 4) / 4) for p in (0.975, 0.025)
    )  # the quantiles of the other tail would swap the ends
    assert (result.run_sd_low, result.run_sd_high) == pytest.approx((low, high))
    assert (low, high) == pytest.approx((1.63567549, 7.93238708))
    wider = crossed(A, B, level=0.99)
    assert wider.run_sd_low < low < high < wider.run_sd_high
    assert crossed(C, D).run_sd_low == 0
    assert crossed(C, D).run_sd_high == pytest.approx(3.66916949)


def test_p_value_interval_and_power(two_arms):
    result = crossed(A, B)
    assert result.p_value == pytest.approx(tail(7 / sqrt(55 / 9), *two_arms), abs=1e-12)
    assert result.p_value == pytest.approx(2 * student.sf(7 / sqrt(61 / 12), 4), abs=1e-12)  # the runs alone decide
    critical = critical_value(0.05, *two_arms)
    assert result.critical == pytest.approx(critical)
    assert (result.ci_low, result.ci_high) == pytest.approx((7 - critical * sqrt(55 / 9), 7 + critical * sqrt(55 / 9)))
    assert minimum_detectable_effect(result) == pytest.approx(detectable(sqrt(55 / 9), *two_arms, 0.95))
    for effect in (0.5, 3.0):  # a small effect is often found with the wrong sign
        shift, bound = effect / sqrt(55 / 9), critical * np.sqrt(two_arms[0])
        expected = norm.sf(bound - shift).mean() + norm.cdf(-bound - shift).mean()
        assert result.null.power(effect, critical) == pytest.approx(expected, abs=1e-12)


def test_equivalence_is_schuirmanns_at_its_own_level(two_arms):
    result = crossed(A, B)
    critical = critical_value(0.1, *two_arms)  # twice .05
    for margin in (5, 9, 40):
        found = equivalence(result, margin)
        assert found.p_value == pytest.approx(tail((margin - 7) / sqrt(55 / 9), *two_arms) / 2, abs=1e-12)
        assert (found.ci_low, found.ci_high) == pytest.approx(
            (7 - critical * sqrt(55 / 9), 7 + critical * sqrt(55 / 9))
        )
        assert found.equivalent == (margin == 40)
    assert not equivalence(crossed(B, A), 9).equivalent


def test_one_new_task(two_arms):
    """Half-widths as the sides of a right angle: of the mean, and t with 3 df times the sd over tasks."""
    result = crossed(A, B)
    critical = critical_value(0.05, *two_arms)
    quantile = student.ppf(0.975, 3)
    half = hypot(critical * sqrt(55 / 9), quantile * sqrt(37 / 9))
    new = one_new_task(result, 2.0)
    assert (new.low, new.high) == pytest.approx((7 - half, 7 + half))
    assert new.chance == pytest.approx(student.cdf(5 * quantile / half, 3))
    same = one_new_task(crossed([[1, 2], [1, 2]], [[3, 4], [3, 4]]), 1.0)
    assert (same.low, same.high, same.chance) == (2, 2, 1)
    certain = crossed(np.zeros((2, 2)), np.full((2, 2), 0.25))  # without any variance the chance is 0 or 1
    assert [one_new_task(certain, margin).chance for margin in (0.2, 0.25)] == [1, 0]


def test_the_tipping_point_has_the_unit_of_the_scores():
    d = np.array([10, 5.5, 6.5, 6])
    one = one_seed(d, 0.0).tipping_run_sd
    assert one > 0.1
    for unit in (1e-3, 100):
        assert one_seed(unit * d, 0.0).tipping_run_sd == pytest.approx(unit * one)


@pytest.mark.parametrize("df", [4, np.inf])
def test_one_seed_with_a_run_effect_that_is_itself_uncertain(df):
    """Welch-Satterthwaite: four differences of mean 7 and variance 25/6, and twice the run effect's variance of 9/4."""
    d = np.array([10, 5.5, 6.5, 6])
    alone, runs = 25 / 24, 9 / 2
    total = alone + runs
    freedom = total**2 / (alone**2 / 3 + runs**2 / df)
    found = one_seed(d, 1.5, df, level=0.9)
    assert found.p_value == pytest.approx(2 * student.sf(7 / sqrt(total), freedom), abs=1e-12)
    half = student.ppf(0.95, freedom) * sqrt(total)
    assert (found.ci_low, found.ci_high, found.tasks) == (pytest.approx(7 - half), pytest.approx(7 + half), 4)
    assert one_seed(d, found.tipping_run_sd, df, level=0.9).p_value == pytest.approx(0.1)


TYPES = ["sts", "sts", "retrieval", "retrieval", "retrieval"]
FIRST = np.array([[1, 2, 6, 3, 4], [3, 2, 7, 5, 5], [2, 5, 7, 4, 8]])
SECOND = np.array([[4, 3, 9, 6, 9], [8, 5, 8, 9, 7], [6, 10, 10, 5, 8]])


def test_the_weighted_overall():
    """Types weigh 1/4 and 3/4, tasks within a type alike; the mean squares of the types add up by their weights."""
    result = crossed_overall(FIRST, SECOND, TYPES, {"sts": 1, "retrieval": 3, "unused": 9})
    w = np.array([1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4])
    squared = 2 / 64 + 3 / 16  # 7/32, as of 4.57 tasks
    arms = FIRST, SECOND
    d = (SECOND - FIRST).mean(axis=0)
    assert result.difference == pytest.approx(d @ w)
    runs = [(x @ w).var(ddof=1) / squared / 2 for x in arms]
    assert result.mean_squares.runs == pytest.approx(runs)
    parts = (2 / 64) / squared, (3 / 16) / squared  # 1/7 and 6/7
    tasks = parts[0] * d[:2].var(ddof=1) * 3 / 2 + parts[1] * d[2:].var(ddof=1) * 3 / 2
    assert result.mean_squares.tasks == pytest.approx(tasks)
    noise = []
    for columns, df in ((slice(0, 2), 4), (slice(2, 5), 8)):
        total = 0.0
        for x in (arm[:, columns] for arm in arms):
            total += ((x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()) ** 2).sum()
        noise.append(total / df)
    error = parts[0] * noise[0] + parts[1] * noise[1]
    assert result.mean_squares.error == pytest.approx(error)
    # Satterthwaite: the degrees of freedom of a sum of mean squares
    assert result.mean_squares.error_df == pytest.approx(
        error**2 / ((parts[0] * noise[0]) ** 2 / 4 + (parts[1] * noise[1]) ** 2 / 8)
    )
    first, second = parts[0] * d[:2].var(ddof=1) * 3 / 2, parts[1] * d[2:].var(ddof=1) * 3 / 2
    assert result.mean_squares.task_df == pytest.approx(tasks**2 / (first**2 / 1 + second**2 / 2))
    assert result.se == pytest.approx(sqrt(2 / 3 * squared * max(sum(runs), tasks, sum(runs) + tasks - error)))
    assert result.run_sd == pytest.approx(sqrt(max(sum(runs) - result.noise_sd**2, 0) * squared))


def test_a_contrast_of_three_designs_has_one_run_variance_of_its_own():
    """Different seeds' worth of weight: half of two designs against the third, each from its own runs."""
    third = np.array([[2, 1, 3, 2], [9, 7, 8, 9], [1, 2, 1, 1]])
    study = np.stack([A, B, third])
    found = contrast(study, [-0.5, -0.5, 1.0]).mean_squares
    scale = (0.25 + 0.25 + 1) / 3
    assert found.unit == pytest.approx(scale / 4)
    d = third.mean(axis=0) - (A.mean(axis=0) + B.mean(axis=0)) / 2
    assert found.tasks == pytest.approx(d.var(ddof=1) / scale)


def test_a_contrast_has_the_designs_without_a_coefficient_as_its_pool():
    study = np.random.default_rng(3).normal(size=(4, 5, 6))
    found, expected = contrast(study, [-1, 0, 1, 0]), crossed(study[0], study[2], [study[1], study[3]])
    assert (found.p_value, found.scope, found.designs) == (expected.p_value, expected.scope, expected.designs)
    assert (found.scope, found.designs) == ("pooled over the study", 4)
    rounded = contrast(study, [-1e6, 0, 1e6 + 1e-4, 0])  # their sum is 0 but for rounding
    assert rounded.p_value == pytest.approx(expected.p_value, abs=1e-6)


# Planning


@pytest.mark.parametrize(("designs", "seeds", "measured"), [(2, 3, False), (5, 3, False), (5, 3, True), (5, 5, False)])
def test_the_planned_detectable_effect(designs, seeds, measured):
    """Ten tasks; run sd .4, noise sd .3, task sd .2. Two runs or three decide for themselves, as two arms."""
    error = 0.3**2
    run, task = error + 10 * 0.4**2, error + seeds / 2 * 0.2**2
    pooled = designs > 2 and (measured or seeds == 5)
    df = (designs - 1) * (seeds - 1) if pooled else 2 * (seeds - 1)
    if pooled:
        squares = null((run,), task, error, (df,), 9, 9 * df, (48, 48, 8))
    else:
        squares = null((run / 2, run / 2), task, error, (seeds - 1, seeds - 1), 9, 9 * df, (20, 20, 20, 4))
    se = sqrt(2 / (10 * seeds) * (run + task - error))
    scale = sqrt((run + task - error) / run)  # over the standard error of the runs alone
    found = planned_detectable_effect(seeds, 10, 0.4, 0.3, 0.2, designs, measured=measured)
    assert found == pytest.approx(detectable(se, squares, scale, df, 0.95))


def test_a_plan_takes_two_tasks_and_allows_for_variances_of_zero():
    for run_sd, noise_sd, task_sd in ((0, 0.1, 0.1), (0.1, 0, 0.1), (0.1, 0.1, 0)):
        assert 0 < planned_detectable_effect(3, 5, run_sd, noise_sd, task_sd) < 1
    for seeds, tasks, designs in ((1, 5, 2), (3, 1, 2), (3, 5, 1)):
        with pytest.raises(StatisticsError, match="give two or more of each"):
            planned_detectable_effect(seeds, tasks, 0.1, 0.1, 0.1, designs)
    with pytest.raises(StatisticsError, match="values of 0 or more"):
        planned_detectable_effect(3, 5, -0.1, 0.3, 0.1)


def test_seeds_to_settle_are_the_fewest():
    result = crossed(A, B)

    def planned(seeds, run_sd):
        return planned_detectable_effect(seeds, 4, run_sd, result.noise_sd, result.task_sd)

    for effect in (4.6, 20.0):
        for found, run_sd in zip(seeds_to_settle(result, effect), (result.run_sd_low, result.run_sd_high), strict=True):
            if found is None:
                assert planned(50, run_sd) > effect
            else:
                assert planned(found, run_sd) <= effect < (planned(found - 1, run_sd) if found > 2 else np.inf)
    exact = planned(50, result.run_sd_high)
    assert seeds_to_settle(result, exact)[1] == 50
    assert seeds_to_settle(result, exact * 0.999)[1] is None
    assert seeds_to_settle(result, 1e6) == (2, 2)
    nothing = crossed([[1, 2], [1, 2]], [[3, 4], [3, 4]])
    assert seeds_to_settle(nothing, 0.1) == (2, 2)
