"""`crossed`: equal to an independent transcription, its invariances, its interval, and what it refuses."""

import importlib.util
from collections import Counter
from dataclasses import FrozenInstanceError
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, norm, ttest_ind
from scipy.stats import t as student

from poolwise.errors import StatisticsError
from poolwise.stats import crossed
from poolwise.stats.crossed import crossed_overall, equivalence, minimum_detectable_effect, one_seed
from poolwise.stats.variance import TaskTypes, contrast_mean_squares, null_distribution

PROTOTYPE = Path(__file__).parents[2] / "shared" / "notes" / "prototypes" / "crossed.py"
FIELDS = ("difference", "p_value", "ci_low", "ci_high", "se", "run_sd")


def scores(rng, designs=4, seeds=3, tasks=8, run_sd=0.002, het=0.003, noise=0.004):
    """Scores of several designs with no true difference, between 0 and 1: a list of (seeds, tasks)."""
    level = rng.uniform(0.3, 0.8, tasks)
    seeds = [seeds] * designs if isinstance(seeds, int) else seeds
    return [
        level + rng.normal(0, run_sd, (s, 1)) + rng.normal(0, het, tasks) + rng.normal(0, noise, (s, tasks))
        for s in seeds
    ]


studies = st.builds(
    lambda seed, designs, seeds, tasks, run, het: scores(np.random.default_rng(seed), designs, seeds, tasks, run, het),
    st.integers(0, 10**6),
    st.integers(2, 5),
    st.integers(2, 5),
    st.integers(2, 12),
    st.sampled_from([0.0, 0.002, 0.01]),
    st.sampled_from([0.0, 0.005]),
)


def runs_alone(a, b, lenders=()):
    """p and half-width at .95 of the t test on the means of the runs: the bound on those of `crossed`.

    Student's for as many runs in both arms, else Welch's; with lenders that of a contrast in a table of designs x runs.
    """
    means = [x.mean(axis=1) for x in (a, b, *lenders)]
    if not lenders:
        found = ttest_ind(means[1], means[0], equal_var=len(a) == len(b))
        low, high = found.confidence_interval(0.95)
        return found.pvalue, (high - low) / 2
    table = np.stack(means)
    residual = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    df = (len(table) - 1) * (len(a) - 1)
    se = np.sqrt((residual**2).sum() / df * 2 / len(a))
    return 2 * student.sf(abs(means[1].mean() - means[0].mean()) / se, df), student.ppf(0.975, df) * se


def plain_two_arms(a, b):
    """The two-arm test spelled out with loops over the definition; p by summing over the grid point by point, but
    never below that of the runs alone."""
    (sa, n), (sb, _) = a.shape, b.shape
    error = 0.0
    for arm in (a, b):
        for s in range(len(arm)):
            for t in range(n):
                error += (arm[s, t] - arm[:, t].mean() - arm[s].mean() + arm.mean()) ** 2
    run_df, task_df = sa + sb - 2, n - 1
    error_df = run_df * task_df
    error /= error_df
    inverse = 1 / sa + 1 / sb
    parts = [n * np.var(arm.mean(axis=1), ddof=1) * (1 / len(arm)) / inverse for arm in (a, b)]
    tasks = np.var(b.mean(axis=0) - a.mean(axis=0), ddof=1) / inverse
    runs = sum(parts)
    se = np.sqrt(inverse / n * max(runs, tasks, runs + tasks - error))
    low = runs < error
    if low:
        error = (run_df * runs + error_df * error) / (run_df + error_df)
    if tasks < error:
        tasks = error = (task_df * tasks + error_df * error) / (task_df + error_df)
    if low:
        parts = [error / len(arm) / inverse for arm in (a, b)]
    true = sum(parts) + tasks - error
    quantiles = [
        [value * chi2.ppf((i + 0.5) / points, df) / df for i in range(points)]
        for value, df, points in [
            (parts[0], sa - 1, 20),
            (parts[1], sb - 1, 20),
            (tasks, task_df, 20),
            (error, error_df, 4),
        ]
    ]
    t = abs(b.mean() - a.mean()) / se
    tail = 0.0
    for x in quantiles[0]:
        for y in quantiles[1]:
            both = np.array([[max(x + y, z, x + y + z - e) for e in quantiles[3]] for z in quantiles[2]])
            tail += float((2 * norm.cdf(-t * np.sqrt(both / true))).sum())
    return b.mean() - a.mean(), se, max(tail / (20 * 20 * 20 * 4), runs_alone(a, b)[0])


@pytest.mark.parametrize(
    ("seeds", "run_sd", "het"),
    [((3, 3), 0.01, 0.0), ((2, 5), 0.0, 0.004), ((4, 3), 0.0, 0.0), ((2, 2), 0.002, 0.0), ((2, 2), 0.0, 0.01)],
)
def test_equals_a_plain_transcription(seeds, run_sd, het):
    a, b = scores(np.random.default_rng(7), 2, seeds, run_sd=run_sd, het=het)
    difference, se, p = plain_two_arms(a, b)
    result = crossed(a, b)
    assert (result.difference, result.se, result.p_value) == pytest.approx((difference, se, p), abs=1e-12)


@pytest.mark.shared
@pytest.mark.skipif(not PROTOTYPE.exists(), reason="needs the measured prototype in ../shared/notes/prototypes")
def test_equals_the_prototype_that_was_measured():
    spec = importlib.util.spec_from_file_location("prototype", PROTOTYPE)
    prototype = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prototype)
    rng = np.random.default_rng(3)
    scopes = Counter()
    for _ in range(120):
        seeds = int(rng.integers(2, 9)) if rng.random() < 0.7 else tuple(rng.integers(2, 6, 4).tolist())
        study = scores(rng, 4, seeds, int(rng.integers(2, 30)), rng.choice([0, 0.002, 0.01]), rng.choice([0, 0.005]))
        if rng.random() < 0.3:
            study[1] = study[1] + rng.normal(0, 0.05, (len(study[1]), 1))  # a noisier arm
        pool = study[2 : 2 + int(rng.integers(0, 3))]
        ours, theirs = crossed(study[0], study[1], pool), prototype.crossed(study[0], study[1], pool)
        # The guard differs: few runs are no longer pooled, unstable lenders are left out.
        whole = ours.scope == "two arms" or ours.designs == 2 + len(pool)
        if ours.scope == theirs["scope"] and whole:
            # The prototype is older than the bound by the runs alone, which is added to it here.
            p, half = runs_alone(study[0], study[1], pool if ours.scope == "pooled over the study" else ())
            scopes[ours.scope, bool(p > theirs["p_value"])] += 1
            theirs["p_value"] = max(theirs["p_value"], p)
            theirs["ci_low"] = min(theirs["ci_low"], theirs["difference"] - half)
            theirs["ci_high"] = max(theirs["ci_high"], theirs["difference"] + half)
            assert [getattr(ours, name) for name in FIELDS] == pytest.approx(
                [theirs[name] for name in FIELDS], abs=1e-12
            )
        d, sd, df = study[1][0] - study[0][0], abs(rng.normal(0, 0.01)), rng.choice([4, np.inf])
        one, other = one_seed(d, sd, df), prototype.one_seed(d, sd, df)
        for name in ("difference", "p_value", "ci_low", "ci_high", "tipping_run_sd"):
            assert getattr(one, name) == pytest.approx(other[name], abs=1e-12)
    assert scopes.keys() == set(product(("two arms", "pooled over the study"), (False, True)))
    assert min(scopes.values()) > 5


def test_mean_squares_by_hand():
    # Runs of a average 2 and 3 (variance .5), of b 6 and 9 (4.5); no interaction at all; difference 5 on either task.
    result = crossed([[1, 3], [2, 4]], [[5, 7], [8, 10]])
    assert result.difference == 5.0
    assert result.mean_squares.runs == pytest.approx((0.5, 4.5))  # 2 tasks x variance x share 1/2
    assert (result.mean_squares.tasks, result.mean_squares.error) == (0.0, 0.0)
    assert result.se == pytest.approx(np.sqrt((0.5 + 4.5) / 2))  # variances of two means of two runs
    assert result.run_sd == pytest.approx(np.sqrt((0.5 + 4.5) / 2))
    assert (result.tasks, result.designs, result.scope) == (2, 2, "two arms")


def test_golden_value_of_the_study_form():
    rng = np.random.default_rng(2026)
    a, b, *pool = scores(rng, designs=5, seeds=5, run_sd=0.003)
    result = crossed(a, b, pool)
    assert result.scope == "pooled over the study"
    y = np.stack([a, b, *pool])
    means = y.mean(axis=2)
    residual = means - means.mean(axis=0) - means.mean(axis=1, keepdims=True) + means.mean()
    assert sum(result.mean_squares.runs) == pytest.approx(8 * (residual**2).sum() / 16)  # 8 tasks, (5-1)(5-1) df
    assert result.mean_squares.run_df == 16
    assert result.p_value == pytest.approx(monte_carlo(result, rng), abs=0.005)


def monte_carlo(result, rng, redraws=200_000):
    """The p-value of a contrast by redrawing its mean squares instead of the grid."""
    m = result.mean_squares.truncated()
    *runs, tasks, error = [
        ms * rng.chisquare(df, redraws) / df
        for ms, df in zip((*m.runs, m.tasks, m.error), (*m.run_dfs, m.task_df, m.error_df), strict=True)
    ]
    spread = np.maximum(np.maximum(sum(runs), tasks), sum(runs) + tasks - error)
    z = rng.normal(0, np.sqrt(sum(m.runs) + m.tasks - m.error), redraws)
    return (np.abs(z) / np.sqrt(spread) >= abs(result.difference) / result.se).mean()


def test_three_runs_decide_for_themselves_if_the_study_agrees():
    """The larger of the p of the two arms and a third of the p with all runs pooled; the interval is the wider one."""
    rng = np.random.default_rng(2026)
    decisive = {"own": 0, "pooled": 0}
    for _ in range(40):
        a, b, *pool = scores(rng, designs=5, run_sd=0.003)
        result, own = crossed(a, b, pool), crossed(a, b)
        assert (result.scope, result.note) == ("the compared designs, and the study agrees", "")
        assert (result.se, result.run_sd, result.designs) == (own.se, own.run_sd, 5)
        squares, *_ = contrast_mean_squares([a, b], (-1.0, 1.0), pool, TaskTypes.one(8), pooled=True)
        se, null = np.sqrt(squares.variance()), null_distribution(squares)
        pooled = null.p_value(abs(own.difference) / se)
        assert result.p_value == pytest.approx(max(own.p_value, pooled / 3), rel=1e-12)
        wide = own.difference + null.critical(0.85) * se  # alpha .15: three times .05
        assert result.ci_high == pytest.approx(max(own.ci_high, wide), abs=1e-9)
        careful = crossed(a, b, pool, cautious=True)
        assert careful.p_value == pytest.approx(max(own.p_value, pooled), rel=1e-12)
        decisive["own" if result.p_value == pytest.approx(own.p_value) else "pooled"] += 1
    assert min(decisive.values()) > 1


def test_other_groups_of_tasks_show_which_runs_are_unstable():
    """Runs that vary alike in four other groups are pooled even if there are three; others keep their own variance."""
    a, b, *pool = scores(np.random.default_rng(5), designs=5, run_sd=0.004)
    alike = np.tile(np.full(5, 1e-4), (4, 1))
    pooled = crossed(a, b, pool, elsewhere=alike)
    assert (pooled.scope, pooled.note, pooled.designs) == ("pooled over the study", "", 5)
    noisy_arm, noisy_lender = alike.copy(), alike.copy()
    noisy_arm[:, 1] *= 30
    noisy_lender[:, 3] *= 30
    arm, lender = (crossed(a, b, pool, elsewhere=known) for known in (noisy_arm, noisy_lender))
    assert "vary more" in arm.note
    assert arm.mean_squares.runs[1] > 5 * arm.mean_squares.runs[0]
    assert (lender.scope, lender.designs) == ("pooled over the study", 4)
    assert lender.p_value == crossed(a, b, [pool[0], pool[2]], elsewhere=np.delete(alike, 3, axis=1)).p_value


def test_an_unstable_lender_is_left_out():
    a, b, *pool = scores(np.random.default_rng(6), designs=5, seeds=5)
    loud = pool[0] + np.linspace(-0.1, 0.1, 5)[:, None]
    with_loud = crossed(a, b, [loud, *pool[1:]])
    assert (with_loud.scope, with_loud.note, with_loud.designs) == ("pooled over the study", "", 4)
    assert with_loud.p_value == crossed(a, b, pool[1:]).p_value


@settings(max_examples=60, deadline=None)
@given(studies, st.integers(0, 10**6))
def test_invariances(study, seed):
    """Law 7: order of tasks, common order of seeds, shifts per task and unit do not matter; b - a = -(a - b)."""
    rng = np.random.default_rng(seed)
    seeds, tasks = study[0].shape
    original = crossed(study[0], study[1], study[2:])

    def of(changed):
        return crossed(changed[0], changed[1], changed[2:])

    order, common, shift = rng.permutation(tasks), rng.permutation(seeds), rng.normal(size=tasks)
    swapped = of([study[1], study[0], *study[2:]])
    scaled = of([100 * y for y in study])
    same = [of([y[:, order] for y in study]), of([y[common] for y in study]), of([y + shift for y in study])]
    for result in same:
        for name in FIELDS:
            assert getattr(result, name) == pytest.approx(getattr(original, name), abs=1e-12, rel=1e-9)
        assert (result.scope, result.note) == (original.scope, original.note)
    assert (swapped.difference, swapped.p_value) == pytest.approx((-original.difference, original.p_value), abs=1e-12)
    assert (swapped.ci_low, swapped.ci_high) == pytest.approx((-original.ci_high, -original.ci_low), abs=1e-12)
    assert scaled.p_value == pytest.approx(original.p_value, abs=1e-10)
    assert scaled.ci_low == pytest.approx(100 * original.ci_low, abs=1e-10)
    assert scaled.run_sd == pytest.approx(100 * original.run_sd, abs=1e-10)
    assert of(study) == original


@settings(max_examples=40, deadline=None)
@given(studies, st.sampled_from([0.9, 0.95, 0.97]))
def test_the_interval_inverts_the_test(study, level):
    a, b, *pool = study
    result = crossed(a, b, pool, level=level)
    for end in (result.ci_low, result.ci_high):
        assert crossed(a, b - end, pool).p_value == pytest.approx(1 - level, abs=1e-9)
    assert result.ci_low <= result.difference <= result.ci_high


def test_the_run_effect_interval_covers():
    """True run sd .004 inside the 95 % interval in about 95 % of 400 studies (sd 1.1 %)."""
    rng = np.random.default_rng(13)
    inside = 0
    for _ in range(400):
        a, b, *pool = scores(rng, run_sd=0.004)
        result = crossed(a, b, pool)
        inside += result.run_sd_low <= 0.004 <= result.run_sd_high
        assert result.run_sd_low <= result.run_sd <= result.run_sd_high or result.run_sd == 0
    assert inside / 400 > 0.92
    # two arms, 3 seeds, no noise: 4 degrees of freedom give .60 to 2.9 times the estimate
    clean = crossed([[1, 2], [2, 3], [3, 4]], [[1, 2], [2, 3], [4, 5]])
    assert (clean.run_sd_low / clean.run_sd, clean.run_sd_high / clean.run_sd) == pytest.approx(
        (0.599, 2.874), abs=1e-3
    )


def test_a_noisier_arm_is_kept_out_of_the_pool_with_a_word():
    a, b, *pool = scores(np.random.default_rng(22), designs=5, seeds=5)
    loud = b + np.linspace(-0.1, 0.1, 5)[:, None]
    result = crossed(a, loud, pool)
    assert (result.scope, result.designs) == ("the compared designs, with a share of the study", 5)
    assert "vary more" in result.note
    quiet, own = result.mean_squares.runs
    assert own == pytest.approx(8 * loud.mean(axis=1).var(ddof=1) / 2)  # its own variance alone, of 8 tasks
    assert quiet < own / 50
    assert crossed(a, b, pool).note == ""


def test_unequal_seeds_use_two_arms():
    a, b, c = scores(np.random.default_rng(15), 3, (3, 5, 3))
    result = crossed(a, b, [c])
    assert (result.scope, result.designs) == ("two arms", 2)
    assert "different numbers of seeds" in result.note


def test_nothing_varies():
    same = np.tile([0.5, 0.7], (3, 1))
    equal, apart = crossed(same, same), crossed(same, same + 0.1)
    assert (equal.p_value, equal.difference, equal.ci_low, equal.ci_high) == (1.0, 0.0, 0.0, 0.0)
    assert (apart.p_value, apart.run_sd) == (0.0, pytest.approx(0.0, abs=1e-15))
    assert minimum_detectable_effect(equal) == 0.0
    assert equivalence(equal, 0.01).equivalent
    assert not equivalence(apart, 0.05).equivalent


def test_what_it_refuses_and_why():
    good = np.full((3, 4), 0.5) + np.eye(3, 4)
    missing = good.copy()
    missing[1, 2] = np.nan
    refusals = [
        ((good[:1], good), r"crossed: a has shape \(1, 4\); expected \(seeds, tasks\), 2 or more of each"),
        ((good, good[:, :1]), r"crossed: b has shape \(3, 1\)"),
        ((good, good[:, :3]), r"\[3, 4\] tasks"),
        ((good, missing), "crossed: b: 1 of 12 values are missing.*seed index 1, task index 2"),
        ((good, good, [missing]), r"crossed: pool\[0\]: 1 of 12"),
        ((good[0], good), r"shape \(4,\)"),
        ((good, good, (), 95), "level=95"),
    ]
    for arguments, message in refusals:
        with pytest.raises(StatisticsError, match=message):
            crossed(*arguments)


def test_overall_of_one_type_is_crossed_and_weights_rule():
    a, b, *pool = scores(np.random.default_rng(16), tasks=8)
    one = crossed_overall(a, b, ["sts"] * 8, {"sts": 3.0}, pool)
    assert [getattr(one, name) for name in FIELDS] == pytest.approx(
        [getattr(crossed(a, b, pool), name) for name in FIELDS], abs=1e-14
    )
    types = ["sts"] * 3 + ["retrieval"] * 5
    mixed = crossed_overall(a, b, types, {"sts": 1, "retrieval": 3}, pool)
    d = (b - a).mean(axis=0)
    assert mixed.difference == pytest.approx(d[:3].mean() / 4 + 3 * d[3:].mean() / 4)
    for arguments, message in [
        ((types, {"sts": 1, "retreival": 3}), "'retrieval' has no weight; did you mean 'retreival'"),
        ((types, {"sts": 0, "retrieval": 3}), "must be above 0"),
        ((["sts"] + ["retrieval"] * 7, {"sts": 1, "retrieval": 1}), "'sts' has one task"),
        ((types[:4], {"sts": 1}), "4 types for 8 tasks"),
    ]:
        with pytest.raises(StatisticsError, match=message):
            crossed_overall(a, b, *arguments)


def test_fixed_types_do_not_count_as_noise():
    """A design that shifts whole types by fixed amounts: the overall verdict keeps its level (400 studies)."""
    rng = np.random.default_rng(17)
    types, shift = ["sts"] * 5 + ["retrieval"] * 5, np.repeat([0.02, -0.02], 5)
    p = []
    for _ in range(400):
        a, b, *pool = scores(rng, tasks=10, run_sd=0.003)
        p.append(crossed_overall(a, b + shift, types, {"sts": 1, "retrieval": 1}, pool).p_value)
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.085


def test_results_are_frozen():
    result = crossed(*scores(np.random.default_rng(18), designs=2))
    with pytest.raises(FrozenInstanceError):
        result.p_value = 0.0
