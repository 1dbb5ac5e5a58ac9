"""Families of comparisons and factor studies: equal to statsmodels and scipy, and checkable by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from poolwise.errors import StatisticsError
from poolwise.stats import crossed
from poolwise.stats.crossed import contrast, crossed_overall
from poolwise.stats.many import bh, factor_effects, holm

p_values = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.01, 0.5, 1.0])), min_size=1, max_size=20)


@pytest.mark.parametrize("seed", range(12))
def test_holm_and_bh_equal_statsmodels_in_input_order(seed):
    rng = np.random.default_rng(seed)
    p = np.round(rng.beta(0.3, 1, rng.integers(1, 30)), rng.choice([2, 12]))
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-12)
    assert bh(p) == pytest.approx(multipletests(p, method="fdr_bh")[1], abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(p_values)
def test_holm_and_bh_reject_what_their_procedures_reject(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    for alpha in (0.01, 0.05, 0.3):
        step_down = next((i for i, k in enumerate(order) if p[k] * (len(p) - i) > alpha), len(p))
        assert sorted(np.flatnonzero(holm(p) <= alpha)) == sorted(order[:step_down])
        step_up = max((i + 1 for i, k in enumerate(order) if p[k] * len(p) / (i + 1) <= alpha), default=0)
        assert sorted(np.flatnonzero(bh(p) <= alpha)) == sorted(order[:step_up])


def test_holm_and_bh_by_hand():
    p = [0.04, 0.01, 0.03]
    assert holm(p) == pytest.approx([0.06, 0.03, 0.06])  # .01 x 3, .03 x 2, then .04 x 1 raised to .06
    assert bh(p) == pytest.approx([0.04, 0.03, 0.04])  # .04 x 3/3; .03 x 3/2 = .045 lowered to .04; .01 x 3/1
    assert len(holm([])) == len(bh([])) == 0


@settings(max_examples=100, deadline=None)
@given(p_values, st.integers(0, 19), st.sampled_from([holm, bh]))
def test_an_untestable_comparison_keeps_its_place_in_the_family(p, place, adjust):
    place = min(place, len(p))
    with_gap = [*p[:place], np.nan, *p[place:]]
    as_one = adjust([*p[:place], 1.0, *p[place:]])
    adjusted = adjust(with_gap)
    assert np.isnan(adjusted[place])
    assert np.delete(adjusted, place) == pytest.approx(np.delete(as_one, place))


def test_wrong_p_values_are_named():
    with pytest.raises(StatisticsError, match=r"holm: p\[1\] = .*1\.2"):
        holm([0.1, 1.2])
    with pytest.raises(StatisticsError, match="one flat list"):
        bh([[0.1]])


def factorial(rng, attention=0.0, pooling=0.0, both=0.0, tasks=8, seeds=3):
    """Scores (designs, seeds, tasks) of a 2 x 2 factorial with known effects, and its table of levels."""
    designs = [{"attention": a, "pooling": p} for a in ("causal", "bidirectional") for p in ("last_token", "mean")]
    effects = np.array([0, pooling, attention, attention + pooling + both])
    noise = rng.normal(0, 0.1, (4, seeds, 1)) + rng.normal(0, 0.2, (4, seeds, tasks))
    return effects[:, None, None] + rng.normal(0, 5, tasks) + noise, designs


def test_main_effects_and_interaction_are_the_marginal_differences():
    y, designs = factorial(np.random.default_rng(0), attention=2, pooling=-1, both=3)
    study = factor_effects(y, designs)
    means = y.mean(axis=(1, 2)).reshape(2, 2)  # attention x pooling
    found = {effect.factors: effect.result.difference for effect in study.effects}
    assert found == {
        ("attention",): pytest.approx((means[1] - means[0]).mean()),
        ("pooling",): pytest.approx((means[:, 1] - means[:, 0]).mean()),
        ("attention", "pooling"): pytest.approx(means[1, 1] - means[0, 1] - means[1, 0] + means[0, 0]),
    }
    assert study.confounded == ()
    assert [sum(c > 0 for c in effect.coefficients) for effect in study.effects] == [2, 2, 2]
    assert all(effect.result.p_value < 0.01 for effect in study.effects)
    assert all(effect.result.ci_low < effect.result.difference < effect.result.ci_high for effect in study.effects)


def test_a_main_effect_rests_on_twice_the_runs_of_one_pair():
    y, designs = factorial(np.random.default_rng(1))
    effect = factor_effects(y, designs).effects[0]
    pair = crossed(y[0], y[2], [y[1], y[3]])
    assert effect.coefficients == (-0.5, -0.5, 0.5, 0.5)
    assert effect.result.mean_squares.unit == pytest.approx(pair.mean_squares.unit / 2)


def test_factors_that_never_change_alone_are_reported_as_confounded():
    rng = np.random.default_rng(2)
    designs = [
        {"attention": "causal", "pooling": "last_token"},
        {"attention": "causal", "pooling": "cross_attention"},
        {"attention": "bidirectional", "pooling": "cross_attention"},
        {"attention": "bidirectional", "pooling": "mean"},
    ]
    study = factor_effects(rng.normal(size=(4, 3, 6)), designs)
    assert study.confounded == ("pooling: mean vs last_token",)
    assert [(effect.factors, effect.levels, effect.coefficients) for effect in study.effects] == [
        (("attention",), ("bidirectional",), (0, -1, 1, 0)),
        (("pooling",), ("cross_attention",), (-1, 1, 0, 0)),
    ]
    against_head = factor_effects(rng.normal(size=(4, 3, 6)), designs, references={"pooling": "cross_attention"})
    assert against_head.confounded == ()


def test_a_factor_that_does_not_apply_is_never_compared():
    designs = [
        {"pooling": "mean", "layers": None},
        {"pooling": "head", "layers": "last"},
        {"pooling": "head", "layers": "all"},
    ]
    study = factor_effects(np.random.default_rng(3).normal(size=(3, 3, 6)), designs)
    assert [effect.factors for effect in study.effects] == [("layers",)]
    assert study.confounded == ("pooling: head vs mean",)


def test_factor_effects_keep_their_level():
    """300 null studies: main effects and interaction each reject about 5 % (sd of a rate 1.3 %)."""
    rng = np.random.default_rng(4)
    p = [[e.result.p_value for e in factor_effects(*factorial(rng)).effects] for _ in range(300)]
    rates = (np.array(p) < 0.05).mean(axis=0)
    assert (rates > 0.01).all()
    assert (rates < 0.085).all()


def test_a_noisier_design_makes_each_use_its_own_runs():
    y, designs = factorial(np.random.default_rng(8), seeds=5)
    y[2] += np.linspace(-2, 2, 5)[:, None]
    effect = factor_effects(y, designs).effects[0]
    assert effect.result.scope == "the compared designs"
    assert "vary more" in effect.result.note
    runs = y.mean(axis=2).var(axis=1, ddof=1)
    assert effect.result.se == pytest.approx(np.sqrt((runs / 4).sum() / 5), rel=0.05)  # tasks hardly matter here
    assert effect.result.mean_squares.run_dfs[0] < 5  # one loud design of four: little more than its own 4


def test_a_contrast_of_two_designs_is_crossed():
    y = np.random.default_rng(5).normal(size=(4, 3, 7))
    assert contrast(y, [0, -1, 0, 1]).p_value == pytest.approx(crossed(y[1], y[3], [y[0], y[2]]).p_value, abs=1e-14)


def test_a_contrast_of_fixed_types_is_crossed_overall():
    y = np.random.default_rng(7).normal(size=(4, 3, 6))
    types, weights = ["STS"] * 4 + ["Retrieval"] * 2, {"STS": 1.0, "Retrieval": 3.0}
    found = contrast(y, [-1, 0, 1, 0], types, weights)
    expected = crossed_overall(y[0], y[2], types, weights, [y[1], y[3]])
    assert found.difference == pytest.approx(0.25 * (y[2] - y[0])[:, :4].mean() + 0.75 * (y[2] - y[0])[:, 4:].mean())
    assert (found.p_value, found.se) == pytest.approx((expected.p_value, expected.se), abs=1e-14)


def test_an_interaction_of_cells_with_other_numbers_of_runs_rests_on_their_own_runs():
    """Without noise or items that differ, the standard error is that of four means of runs."""
    rng = np.random.default_rng(8)
    cells = [np.repeat(rng.normal(size=(runs, 1)), 5, axis=1) for runs in (3, 3, 4, 2)]
    found = contrast(cells, [1, -1, -1, 1])
    means = [cell.mean() for cell in cells]
    assert found.difference == pytest.approx(means[0] - means[1] - means[2] + means[3])
    assert found.se == pytest.approx(np.sqrt(sum(cell[:, 0].var(ddof=1) / len(cell) for cell in cells)))
    assert found.note == "the designs of the study have different numbers of seeds"


def test_wrong_factor_tables_teach():
    y = np.random.default_rng(6).normal(size=(2, 3, 4))
    two = [{"pooling": "mean"}, {"pooling": "last_token"}]
    with pytest.raises(StatisticsError, match="3 rows of levels"):
        factor_effects(y, [*two, {"pooling": "x"}])
    with pytest.raises(StatisticsError, match="different factors"):
        factor_effects(y, [{"pooling": "mean"}, {"attention": "causal"}])
    with pytest.raises(StatisticsError, match="same levels"):
        factor_effects(y, [two[0], two[0]])
    with pytest.raises(StatisticsError, match="reference 'maen'"):
        factor_effects(y, two, references={"pooling": "maen"})
    with pytest.raises(StatisticsError, match="sum to 0"):
        contrast(y, [1, 1])
