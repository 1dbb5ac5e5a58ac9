"""Around `crossed`: equivalence, detectable effects, how many seeds would settle it, and single runs."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student

from poolwise.errors import StatisticsError
from poolwise.stats import crossed
from poolwise.stats.crossed import (
    equivalence,
    minimum_detectable_effect,
    one_seed,
    planned_detectable_effect,
    seeds_to_settle,
)


def scores(rng, designs=5, seeds=3, tasks=10, run_sd=0.004, het=0.0, noise=0.004):
    """Scores of equally good designs, between 0 and 1: a list of (seeds, tasks)."""
    level = rng.uniform(0.3, 0.8, tasks)
    return [
        level + rng.normal(0, run_sd, (seeds, 1)) + rng.normal(0, het, tasks) + rng.normal(0, noise, (seeds, tasks))
        for _ in range(designs)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_equivalence_is_the_interval_inside_the_margin(seed):
    a, b, *pool = scores(np.random.default_rng(seed), designs=2 + seed % 4, het=0.003 * (seed % 2))
    result = crossed(a, b, pool)
    for margin in (0.001, 0.005, 0.05):
        found = equivalence(result, margin)
        assert found.equivalent == (found.p_value < 0.05)
        assert found.equivalent == (-margin < found.ci_low and found.ci_high < margin)
        assert 0 <= found.p_value <= 1
    inner = crossed(a, b, pool, level=0.9)
    assert (found.ci_low, found.ci_high) == pytest.approx((inner.ci_low, inner.ci_high), abs=1e-12)
    with pytest.raises(StatisticsError, match="above 0"):
        equivalence(result, 0)


def test_minimum_detectable_effect_is_found_at_its_power():
    """Studies simulated at the variances and the effect it names are significant 80 % of the time (sd 1.6 %)."""
    rng = np.random.default_rng(11)
    for seeds in (3, 5):
        effect = planned_detectable_effect(seeds, 10, run_sd=0.004, noise_sd=0.004, task_sd=0.0, designs=5)
        hits = 0
        for _ in range(600):
            a, b, *pool = scores(rng, seeds=seeds)
            hits += crossed(a, b + effect, pool).p_value <= 0.05
        assert 0.74 < hits / 600 < 0.86
    result = crossed(a, b, pool)
    strict = replace(result, level=0.99, critical=result.null.critical(0.99))
    assert minimum_detectable_effect(strict) > minimum_detectable_effect(result)


def test_more_seeds_settle_it_unless_the_tasks_do_not():
    rng = np.random.default_rng(12)
    a, b, *pool = scores(rng)
    result = crossed(a, b, pool)
    fewest, most = seeds_to_settle(result, 0.006)
    assert 2 <= fewest < (most or 99)
    plan = (result.noise_sd, result.task_sd, result.designs)
    reached = planned_detectable_effect(fewest, 10, result.run_sd_low, *plan)
    before = planned_detectable_effect(fewest - 1, 10, result.run_sd_low, *plan) if fewest > 2 else np.inf
    assert reached <= 0.006 < before
    assert result.designs == 5  # with five seeds their runs will be pooled, so fewer suffice than for two alone
    assert seeds_to_settle(result, 0.004)[0] < seeds_to_settle(replace(result, designs=2), 0.004)[0]
    assert seeds_to_settle(result, 0.00001) == (None, None)
    with pytest.raises(StatisticsError, match="effect=0"):
        seeds_to_settle(result, 0)
    with pytest.raises(StatisticsError, match="give two or more"):
        planned_detectable_effect(1, 10, 0.1, 0.1, 0.1)
    with pytest.raises(StatisticsError, match="not all 0"):
        planned_detectable_effect(3, 10, 0.0, 0.0, 0.0)


def test_one_seed_by_hand_and_its_tipping_point():
    d = np.array([1.0, 2.0, 3.0, 2.0])  # mean 2, variance 2/3, so the squared standard error is 1/6
    alone = one_seed(d, 0.0)
    assert alone.p_value == pytest.approx(2 * student.sf(2 / np.sqrt(1 / 6), 3), abs=1e-15)
    known = one_seed(d, 0.5)
    variance = 1 / 6 + 2 * 0.25
    df = variance**2 / ((1 / 6) ** 2 / 3)
    assert known.p_value == pytest.approx(2 * student.sf(2 / np.sqrt(variance), df), abs=1e-15)
    assert known.ci_low == pytest.approx(2 - student.ppf(0.975, df) * np.sqrt(variance))
    assert one_seed(d, alone.tipping_run_sd).p_value == pytest.approx(0.05, abs=1e-9)
    assert one_seed([1.0, -1.0, 0.5], 0.1).tipping_run_sd == 0.0


def test_one_seed_edges():
    flat = one_seed([0.0, 0.0], 0.0)
    assert (flat.p_value, flat.ci_low, flat.ci_high, flat.tipping_run_sd) == (1.0, 0.0, 0.0, 0.0)
    assert one_seed([1.0, 1.0], 0.0).p_value == 0.0
    for arguments, message in [
        (([1.0], 0.1), "2 or more of each"),
        (([1.0, 2.0], -0.1), "0 or more"),
        (([1, np.nan], 0), "missing or infinite"),
    ]:
        with pytest.raises(StatisticsError, match=message):
            one_seed(*arguments)


def test_two_designs_have_no_study_to_pool():
    """However many seeds, and whatever other groups of tasks show."""
    sizes = (8, 0.2, 0.3, 0.3)
    for seeds in (3, 12):
        alone = planned_detectable_effect(seeds, *sizes, designs=2)
        assert planned_detectable_effect(seeds, *sizes, designs=2, measured=True) == alone
        assert planned_detectable_effect(seeds, *sizes, designs=8, measured=True) < alone


def test_runs_that_happen_to_agree_do_not_make_small_differences_detectable():
    """The next study's runs will differ by noise at least, so it takes what a plan without a run effect takes."""
    rng = np.random.default_rng(5)
    arms = [rng.normal(0, 0.02, (2, 400)) for _ in range(2)]
    lucky = [arm - arm.mean(axis=1, keepdims=True) + np.array([[0.0], [1e-5]]) for arm in arms]
    result = crossed(*lucky)
    planned = planned_detectable_effect(2, 400, 0, result.noise_sd, result.task_sd)
    assert minimum_detectable_effect(result) == pytest.approx(planned, rel=0.02)
    assert result.null.detectable(result.critical, 0.8) < 0.8 * planned


def test_the_seeds_of_a_pooled_contrast_are_planned_with_the_study_from_the_first_seed_on():
    rng = np.random.default_rng(2)
    arms = scores(rng, 5, 6, 12)
    result = crossed(arms[0], arms[1], pool=arms[2:])
    assert (result.scope, result.designs) == ("pooled over the study", 5)
    sizes = (result.tasks, result.run_sd_high, result.noise_sd, result.task_sd)
    effect = 1.001 * planned_detectable_effect(3, *sizes, designs=5, measured=True)
    assert planned_detectable_effect(3, *sizes, designs=5) > effect
    assert seeds_to_settle(result, effect)[1] == 3


def test_a_foreign_run_effect_may_have_one_degree_of_freedom():
    assert one_seed([0.01, 0.02, 0.03], 0.005, df_run=1).ci_high > one_seed([0.01, 0.02, 0.03], 0.005).ci_high
