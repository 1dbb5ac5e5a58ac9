"""How few runs are guarded: what the designs of a study lend each other (golden values of the F tests, of the shares
and of the decisions), and the bound on p by the runs alone."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import f, ttest_ind
from scipy.stats import t as student

from poolwise.stats import crossed
from poolwise.stats.crossed import contrast, crossed_overall, equivalence
from poolwise.stats.variance import (
    MeanSquares,
    TaskTypes,
    contrast_mean_squares,
    null_distribution,
    own_mean_squares,
    run_mean_square,
    satterthwaite,
    study_mean_squares,
    unstable,
)

ONE = TaskTypes.one(2)


def arm(*means: float) -> np.ndarray:
    """(runs, 2 tasks) of a design with these means of its runs and no noise."""
    return np.array([[mean - 1.0, mean + 1.0] for mean in means])


def test_run_mean_square():
    assert run_mean_square(arm(1, 2, 3), ONE) == pytest.approx(2)  # variance 1 of a mean over two tasks
    weighted = TaskTypes((np.array([0]), np.array([1, 2])), (0.5, 0.5))  # weights 1/2, 1/4, 1/4: squares add up to 3/8
    scores = np.array([[0.0, 2, 2], [4, 2, 2]])  # means 1 and 3
    assert run_mean_square(scores, weighted) == pytest.approx(2 / 0.375)


@pytest.mark.parametrize(
    ("seeds", "groups", "place", "level"),
    [
        (5, 1, 3, 0.02),  # a lender
        (3, 1, 2, 0.02),
        (5, 1, 1, 0.05),  # a compared design
        (3, 2, 0, 0.05),  # in two groups
    ],
)
def test_the_level_at_which_a_design_is_set_aside(seeds, groups, place, level):
    """Three designs of mean square 1 and one at the critical value of F with their degrees of freedom."""
    df = groups * (seeds - 1)
    limit = f.isf(level, df, 3 * df)
    for factor, expected in ((0.999, False), (1.001, True)):
        runs = np.ones((groups, 4))
        runs[:, place] = factor * limit
        out, ratios = unstable(runs, seeds, compared=2)
        assert out.tolist() == [expected and i == place for i in range(4)]
        # mean squares over the mean of those kept
        kept = 1 if expected else (3 + factor * limit) / 4
        assert ratios[place] == pytest.approx(factor * limit / kept)
        assert ratios[(place + 1) % 4] == pytest.approx(1 / kept)


def test_groups_of_tasks_count_alike_whatever_their_scale():
    runs = np.array([[1.0, 1, 1, 5], [100.0, 100, 100, 500]])
    out, ratios = unstable(runs, 5, compared=2)
    assert out.tolist() == [False, False, False, True]
    assert ratios == pytest.approx([1, 1, 1, 5])
    assert np.isinf(unstable(np.array([[0.0, 0, 0, 9]]), 5, 2)[1]).all()


def test_the_most_conspicuous_goes_first_and_two_always_stay():
    out, ratios = unstable(np.array([[1.0, 30, 1, 900]]), 5, compared=2)
    assert out.tolist() == [False, True, False, True]
    assert ratios == pytest.approx([1, 30, 1, 900])
    out, _ = unstable(np.array([[1.0, 1e3, 1e6, 1e9]]), 5, compared=2)
    assert out.tolist() == [False, False, True, True]


def decide(arms, others, elsewhere=None, pooled=False):
    signs = [-1.0, 1.0] if len(arms) == 2 else [1.0, *[-1.0 / (len(arms) - 1)] * (len(arms) - 1)]
    return contrast_mean_squares(arms, signs, others, ONE, elsewhere, pooled)


ALIKE = [arm(1, 2, 3), arm(2, 1, 3), arm(3, 1, 2), arm(2, 3, 1)]
LOUD = arm(0, 50, 100)
FIVE = [arm(1, 2, 3, 4, 5), arm(2, 1, 3, 5, 4), arm(3, 1, 2, 4, 5), arm(5, 4, 2, 3, 1)]
LOUD_FIVE = arm(0, 50, 100, 20, 30)


def test_what_decides():
    a, b, c, d = ALIKE
    squares, scope, note, designs = decide([a, b], [c, d])  # two degrees of freedom each
    assert (scope, note, designs) == ("the compared designs, and the study agrees", "", 4)
    assert squares == own_mean_squares([a, b], [-1, 1], ONE)
    assert decide([a, b], [c, d], pooled=True)[1:] == ("pooled over the study", "", 4)
    assert decide([a, b], [c, d], np.ones((1, 4)))[1:] == ("pooled over the study", "", 4)  # four, in two groups
    assert decide(FIVE[:2], FIVE[2:])[1:] == ("pooled over the study", "", 4)
    assert decide([x[:4] for x in FIVE[:2]], [x[:4] for x in FIVE[2:]])[1] != "pooled over the study"  # three
    assert decide([a, b], [])[1:] == ("two arms", "", 2)
    assert decide([a, b], [c[:2]])[1:] == ("two arms", "the designs of the study have different numbers of seeds", 2)
    still = arm(2, 2, 2)
    assert decide([still, still], [still])[1:] == ("two arms", "no design of the study varies between its runs", 2)


def test_what_decides_where_some_are_louder():
    a, b, c, d = FIVE
    # both compared designs, and there are no other groups of tasks
    squares, scope, note, designs = decide([LOUD_FIVE, LOUD_FIVE + 1], [a, b, c, d])
    assert (scope, designs) == ("two arms", 2)
    assert "vary more" in note
    assert squares == own_mean_squares([LOUD_FIVE, LOUD_FIVE + 1], [-1, 1], ONE)
    # every lender
    everyone = "the runs of every other design vary more than those of the compared ones"
    assert decide([a, b], [LOUD_FIVE])[1:] == ("two arms", everyone, 2)
    assert decide([a, b], [c, d, LOUD_FIVE])[1:] == ("pooled over the study", "", 4)
    # more than two compared designs: pooled, or each its own
    assert decide([a, b, c], [d])[1:] == ("pooled over the study", "", 4)
    assert decide(ALIKE[:3], [])[1:] == ("pooled over the study", "", 3)
    _, scope, note, designs = decide([a, b, LOUD_FIVE], [c, d])
    assert (scope, designs) == ("the compared designs", 3)
    assert "vary more" in note


def pooled(*designs: np.ndarray) -> float:
    """Run mean square around the runs that all have in common, for two tasks."""
    means = np.stack([x.mean(axis=1) for x in designs])
    residual = means - means.mean(axis=0) - means.mean(axis=1, keepdims=True) + means.mean()
    return 2 * (residual**2).sum() / ((len(designs) - 1) * (means.shape[1] - 1))


def test_a_louder_design_keeps_its_own_variance_and_the_other_is_lent_to():
    a, b, c, d = FIVE
    squares, scope, note, designs = decide([a, LOUD_FIVE], [b, c, d])
    assert (scope, designs) == ("the compared designs, with a share of the study", 5)
    assert "vary more" in note
    own = run_mean_square(LOUD_FIVE, ONE)
    assert squares.runs == pytest.approx((pooled(a, b, c, d) / 2, own / 2))
    assert squares.run_shares == pytest.approx((1 / 2, 1 / 2))
    assert squares.run_dfs == pytest.approx((12, 4))
    parts = np.array(squares.runs)
    assert squares.run_df == pytest.approx(parts.sum() ** 2 / (parts**2 / squares.run_dfs).sum())
    assert squares.unit == pytest.approx(1 / 5)  # 2/5 of the squared weights, which add up to 1/2


@pytest.mark.parametrize("others", [1, 5])
def test_a_louder_design_has_at_least_what_other_groups_of_tasks_show(others):
    """Quiet here by chance, it varies 100 times as much as the others in the other groups."""
    a, b, c, d = ALIKE
    elsewhere = np.ones((others, 4))
    elsewhere[:, 1] = 100
    squares, _, note, designs = decide([a, b], [c, d], elsewhere)
    assert ("vary more" in note, designs) == (True, 4)
    groups = np.vstack([[2.0, 2, 2, 2], elsewhere])
    relative = (groups / groups.mean(axis=1, keepdims=True)).mean(axis=0)
    ratio = relative[1] / relative[[0, 2, 3]].mean()
    typical = pooled(a, c, d)
    assert ratio * typical > 2
    assert squares.runs == pytest.approx((typical / 2, ratio * typical / 2))
    # of all groups and of the typical design
    assert squares.run_dfs == pytest.approx((4, 1 / (1 / (2 * (others + 1)) + 1 / 4)))
    own = decide([a, LOUD], [c, d], elsewhere)[0]  # loud here: its own, as that is more
    assert own.runs[1] == pytest.approx(2 * 2500 / 2)


def test_one_lender_that_is_as_quiet_as_the_compared_design():
    """Two designs around their mean have half of the variance."""
    a, b, *_ = FIVE
    squares, *_ = decide([a, LOUD_FIVE], [b])
    assert squares.runs[0] == pytest.approx(pooled(a, b) / 2)
    assert squares.run_dfs == (4, 4)


def test_the_noise_of_a_whole_study():
    rng = np.random.default_rng(0)
    study = rng.normal(size=(4, 5, 6))
    found = study_mean_squares(study, [-1, 1, 0, 0], TaskTypes.one(6))
    rest = study.copy()
    for axis in (0, 1, 2):  # less all effects of one and of two factors
        rest = rest - rest.mean(axis=axis, keepdims=True)
    assert (found.error, found.error_df) == (pytest.approx((rest**2).sum() / 60), 60)
    assert (found.run_df, found.task_df, found.unit) == (12, 5, pytest.approx(2 / 5 / 6))


def test_one_mean_square_of_three_arms_stays_one_where_it_falls_below_the_noise():
    rng = np.random.default_rng(0)
    arms = [rng.normal(size=(3, 6)) for _ in range(3)]
    arms = [x - x.mean(axis=1, keepdims=True) + 0.01 * rng.normal(size=(3, 1)) for x in arms]
    squares = own_mean_squares(arms, [1, -0.5, -0.5], TaskTypes.one(6))
    assert sum(squares.runs) < squares.error
    cut = squares.truncated()
    assert cut.runs == (cut.error,)
    shares = np.array([2 / 3, 1 / 6, 1 / 6])  # of the squared coefficients
    assert squares.runs == pytest.approx(
        (sum(w * run_mean_square(x, TaskTypes.one(6)) for w, x in zip(shares, arms, strict=True)),)
    )


def test_both_compared_designs_are_louder():
    a, b, c, d = ALIKE
    elsewhere = np.ones((5, 4))
    elsewhere[:, :2] = 40, 60
    squares, scope, _, _ = decide([a, b], [c, d], elsewhere)
    assert scope == "the compared designs, with a share of the study"
    assert len(squares.runs) == 2
    assert squares.runs[1] / squares.runs[0] == pytest.approx(1.5, rel=0.05)
    assert squares.run_dfs == pytest.approx((1 / (1 / 12 + 1 / 2),) * 2)


def test_satterthwaite():
    assert satterthwaite([3.0], [4.0]) == (3, 4)
    assert satterthwaite([1.0, 2.0], [2.0, 4.0]) == (3, pytest.approx(9 / (1 / 2 + 4 / 4)))
    assert satterthwaite([0.0, 0.0], [2.0, 4.0]) == (0, 6)


def test_the_variance_is_never_below_that_of_either_source():
    def squares(runs, tasks, error):
        return MeanSquares((runs,), (1.0,), (4.0,), 4.0, tasks, 3.0, error, 12.0, 0.5).variance()

    assert squares(5, 3, 1) == 3.5
    assert squares(5, 1, 3) == 2.5
    assert squares(1, 5, 3) == 2.5


# The bound on p by the runs alone


def study_of(seed, seeds, spread, designs=2, tasks=40, task_sd=0.1, effect=0.0):
    """Designs whose runs are spread alike, in different orders, and whose items vary by sd 1 in each run.

    The second design is better by `effect`.
    """
    rng = np.random.default_rng(seed)
    arms = []
    for s in [seeds] * designs if isinstance(seeds, int) else seeds:
        run = rng.permutation(np.linspace(-spread, spread, s))[:, None]
        arms.append(run + rng.normal(0, task_sd, tasks) + rng.normal(0, 1, (s, tasks)))
    arms[1] += effect
    return arms


def assert_decides(result, expected):
    """`result` has p and interval of a scipy test on the means of the runs."""
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    low, high = expected.confidence_interval(result.level)
    assert (result.ci_low, result.ci_high) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize(("seeds", "effect"), [(2, 300.0), (2, 1000.0), (3, 30.0), (3, 100.0), (5, 30.0)])
def test_p_is_students_where_the_runs_dominate(seeds, effect):
    """However many items: only their mean in each run counts."""
    for seed in range(3):
        a, b = study_of(seed, seeds, spread=2.0, tasks=400, effect=effect)
        result = crossed(a, b, level=0.999)
        assert_decides(result, ttest_ind(b.mean(axis=1), a.mean(axis=1)))
        assert result.p_value > 1.5 * replace(result.null, run_scale=np.inf).p_value(result.difference / result.se)


def test_p_is_welchs_where_the_designs_have_different_numbers_of_runs():
    a, b = study_of(1, (2, 5), spread=2.0, effect=20.0)
    assert_decides(crossed(a, b), ttest_ind(b.mean(axis=1), a.mean(axis=1), equal_var=False))


def test_the_bound_of_a_weighted_mean_is_that_of_the_weighted_means_of_the_runs():
    a, b = study_of(2, 3, spread=2.0, effect=20.0)
    types = ["sts"] * 10 + ["retrieval"] * 30
    first, second = (x[:, :10].mean(axis=1) / 4 + x[:, 10:].mean(axis=1) * 3 / 4 for x in (a, b))
    assert_decides(crossed_overall(a, b, types, {"sts": 1, "retrieval": 3}), ttest_ind(second, first))


def test_the_bound_of_pooled_runs_has_their_degrees_of_freedom():
    """A contrast in a table of designs x runs: (designs - 1)(runs - 1) degrees of freedom."""
    y = np.stack(study_of(3, 5, spread=2.0, designs=4, effect=8.0))
    result = contrast(y, [-1, 1, 0, 0])
    assert result.scope == "pooled over the study"
    means = y.mean(axis=2)
    se = np.sqrt(pooled(*y) / 2 * 2 / 5)  # `pooled` is twice the mean square
    t = (means[1] - means[0]).mean() / se
    assert result.p_value == pytest.approx(2 * student.sf(t, 12), rel=1e-9)


def test_the_bound_of_a_share_of_the_study_has_satterthwaites_degrees_of_freedom():
    y = study_of(4, 5, spread=0.5, designs=5)
    y[1] = y[1] + np.linspace(-20, 20, 5)[:, None] + 60
    result = crossed(y[0], y[1], y[2:])
    assert result.scope == "the compared designs, with a share of the study"
    parts, dfs = np.array(result.mean_squares.runs) * 2 / 5 / 40, np.array(result.mean_squares.run_dfs)
    df = parts.sum() ** 2 / (parts**2 / dfs).sum()
    assert result.p_value == pytest.approx(2 * student.sf(result.difference / np.sqrt(parts.sum()), df), rel=1e-9)


def test_the_bound_of_three_designs_has_satterthwaites_degrees_of_freedom():
    """One against the mean of two, three runs each: their variances weigh 1, 1/4 and 1/4."""
    y = np.stack(study_of(5, 3, spread=2.0, designs=3, effect=60.0))
    y[2] += np.linspace(-60, 60, 3)[:, None]  # far from the others, so that each keeps its own variance
    own = own_mean_squares(list(y), (-0.5, 1.0, -0.5), TaskTypes.one(40))
    variances = y.mean(axis=2).var(axis=1, ddof=1) * [1 / 4, 1, 1 / 4] / 3
    df = variances.sum() ** 2 / (variances**2 / 2).sum()
    null = null_distribution(own)
    assert (null.run_df, own.run_df) == (pytest.approx(df), 6)
    scale = np.sqrt(own.variance() / variances.sum())
    assert null.run_scale == pytest.approx(scale)
    assert null.p_value(3.0) == pytest.approx(2 * student.sf(3.0 * scale, df), rel=1e-9)


def test_p_is_unchanged_where_the_items_dominate():
    """The designs differ from item to item; the runs show the same difference again and again."""
    for seed in range(5):
        a, b = study_of(seed, 3, spread=0.0, task_sd=20.0, effect=8.0)
        result = crossed(a, b)
        t = abs(result.difference) / result.se
        assert result.p_value == replace(result.null, run_scale=np.inf).p_value(t)
        assert ttest_ind(b.mean(axis=1), a.mean(axis=1)).pvalue < result.p_value / 2


def test_runs_that_do_not_vary_at_all_set_no_bound():
    result = crossed([[1, 2, 3, 2], [2, 1, 3, 2]], [[6, 7, 11, 8], [6, 9, 9, 8]])  # means 2, 2 and 8, 8
    assert result.mean_squares.runs == (0, 0)
    grid_only = replace(result.null, run_scale=np.inf)
    t = result.difference / result.se
    assert result.p_value == grid_only.p_value(t) < 2 * student.sf(t, 2) / 100  # of the other standard error


def test_equivalence_is_that_of_the_runs_where_they_dominate():
    a, b = study_of(6, 3, spread=2.0, effect=1.0)
    result, means = crossed(a, b), (b.mean(axis=1), a.mean(axis=1))
    found, expected = equivalence(result, 40.0), ttest_ind(*means).confidence_interval(0.9)
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(expected), rel=1e-9)
    sides = (
        ttest_ind(means[0] - 40, means[1], alternative="less"),
        ttest_ind(means[0] + 40, means[1], alternative="greater"),
    )
    assert found.p_value == pytest.approx(max(side.pvalue for side in sides), rel=1e-9)


def test_two_runs_of_equal_designs_seldom_have_a_tiny_p():
    """400 items, whose mean has an error of .06: p < .003 in about .003 of studies, without the bound in .04."""
    rng = np.random.default_rng(1)
    types = TaskTypes.one(400)
    found = {"bounded": 0, "bare": 0}
    for _ in range(3000):
        a, b = (rng.normal(0, 0.25, (2, 1)) + rng.normal(0, 1, 400) + rng.normal(0, 1, (2, 400)) for _ in range(2))
        squares = own_mean_squares([a, b], (-1.0, 1.0), types)
        t = abs(b.mean() - a.mean()) / np.sqrt(squares.variance())
        if t > 2:  # p is above .04 otherwise
            null = null_distribution(squares)
            found["bounded"] += null.p_value(t) < 0.003
            found["bare"] += replace(null, run_scale=np.inf).p_value(t) < 0.003
    assert found["bounded"] <= 0.006 * 3000
    assert found["bare"] > 0.02 * 3000
