"""Exact tests of paired differences: equal to full enumeration, to scipy and statsmodels, and checkable by hand."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from poolwise.errors import StatisticsError
from poolwise.stats.exact import (
    average_sources,
    hodges_lehmann,
    largest_rejected_sum,
    mcnemar,
    midranks,
    min_reachable_p,
    rank_biserial,
    signed_rank,
    wins_ties_losses,
)

# Small whole numbers make every pattern of ties and zeros likely; tenths make float ties that need rounding.
tied_differences = st.lists(st.integers(-4, 4), min_size=1, max_size=12)
untied_differences = st.lists(
    st.integers(-2000, 2000).filter(bool), min_size=1, max_size=12, unique_by=lambda value: abs(value)
)


def enumerated(differences):
    """Two-sided p from all 2^n signs: the textbook definition, with scipy's ranks."""
    d = np.asarray(differences, dtype=float)
    d = d[d != 0]
    used, signs = scipy.stats.rankdata(np.abs(d)), np.sign(d)
    if not len(used):
        return 1.0
    patterns = (np.arange(2 ** len(used))[:, None] >> np.arange(len(used))) & 1
    sums = patterns @ used
    seen = used[signs > 0].sum()
    return min(1.0, 2 * min((sums <= seen + 1e-9).mean(), (sums >= seen - 1e-9).mean()))


@settings(max_examples=400, deadline=None)
@given(tied_differences)
def test_signed_rank_equals_full_enumeration(differences):
    assert signed_rank(differences) == pytest.approx(enumerated(differences), abs=1e-15)


@settings(max_examples=100, deadline=None)
@given(tied_differences)
def test_signed_rank_sees_ties_between_floats(differences):
    base = np.linspace(0.1, 0.9, len(differences))
    as_floats = (base + np.array(differences) / 10) - base  # .30000000000000004 and its like
    assert signed_rank(as_floats) == signed_rank(differences)


@settings(max_examples=100, deadline=None)
@given(untied_differences)
def test_signed_rank_equals_scipy_without_ties(differences):
    expected = scipy.stats.wilcoxon(differences, method="exact").pvalue
    assert signed_rank(differences) == pytest.approx(expected, abs=1e-12)


def test_signed_rank_golden_by_hand():
    # Ranks 1 2 3 4, the 2 negative: W- = 2. Sign patterns with a sum of at most 2: {}, {1}, {2}. p = 2 * 3 / 16.
    assert signed_rank([0.1, -0.2, 0.3, 0.4]) == 0.375


def test_zeros_are_dropped_before_ranking():
    # 0 -1 -2 3: ranks 1 2 3, both sums 3: p = 1.
    assert signed_rank([0, -1, -2, 3]) == 1.0
    # 0 0 -1 -2 3 4 5, negatives 1 2: subsets with a sum of at most 3: {} 1 2 3 12, p = 2 * 5 / 32.
    assert signed_rank([0, 0, -1, -2, 3, 4, 5]) == 10 / 32


def test_all_zero_differences_give_one():
    assert signed_rank([0.0, 0.0, 1e-9]) == 1.0
    assert rank_biserial([0.0, 0.0]) == 0.0


@pytest.mark.parametrize("n", [56, 63, 64, 300])
def test_signed_rank_stays_exact_for_many_tasks(n):
    rng = np.random.default_rng(n)
    differences = rng.permutation(np.arange(1, n + 1)) * rng.choice([-1, 1], n, p=[0.42, 0.58])
    expected = scipy.stats.wilcoxon(differences, method="exact").pvalue
    assert signed_rank(differences) == pytest.approx(expected, rel=1e-10)
    assert signed_rank(np.abs(differences)) == pytest.approx(2.0 ** (1 - n), rel=1e-15)


def test_published_critical_values():
    # Largest W with p <= .05, two-sided: 0 at n = 6, 3 at 8, 8 at 10, 25 at 15 (any table of the test).
    for n, largest in {6: 0, 8: 3, 10: 8, 15: 25}.items():
        for w, significant in ((largest, True), (largest + 1, False)):
            negative, left = [], w
            for rank in range(n, 0, -1):
                if rank <= left:
                    negative.append(rank)
                    left -= rank
            differences = [-rank if rank in negative else rank for rank in range(1, n + 1)]
            assert (signed_rank(differences) <= 0.05) is significant


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40))
def test_min_reachable_p_is_reached_by_a_clean_sweep(n):
    reached = signed_rank(np.arange(1, n + 1)) if n else 1.0
    assert min_reachable_p(n) == reached == min(1.0, 2 / 2**n)


@settings(max_examples=100, deadline=None)
@given(tied_differences)
def test_swapping_the_models_changes_signs_only(differences):
    flipped = [-value for value in differences]
    assert signed_rank(flipped) == signed_rank(differences)
    assert rank_biserial(flipped) == -rank_biserial(differences)
    one, other = hodges_lehmann(differences), hodges_lehmann(flipped)
    assert one.estimate == -other.estimate
    assert (one.ci_low is None) == (other.ci_high is None)
    if one.ci_low is not None:
        assert (one.ci_low, one.ci_high) == (-other.ci_high, -other.ci_low)


def test_rank_biserial_by_hand_and_by_pingouin():
    assert rank_biserial([0.1, -0.2, 0.3, 0.4]) == pytest.approx((8 - 2) / 10)
    pingouin = pytest.importorskip("pingouin")
    differences = np.array([3.0, -1.0, 2.0, 2.0, -5.0, 8.0, 1.0, 0.5])
    table = pingouin.wilcoxon(differences, np.zeros(8))
    assert rank_biserial(differences) == pytest.approx(float(table["RBC"].iloc[0]), abs=1e-12)


def test_hodges_lehmann_golden_by_hand():
    # Walsh averages of 1 2 6: 1, 1.5, 3.5, 2, 4, 6; their median is (2 + 3.5) / 2. Three tasks bound nothing at .95,
    # but at .75 (2 * 1/8 rejected outside) the outermost averages do.
    result = hodges_lehmann([1.0, 2.0, 6.0])
    assert (result.estimate, result.ci_low, result.ci_high) == (2.75, None, None)
    bounded = hodges_lehmann([1.0, 2.0, 6.0], level=0.75)
    assert (bounded.ci_low, bounded.ci_high) == (1.0, 6.0)


def test_hodges_lehmann_keeps_zeros():
    assert hodges_lehmann([0.0, 0.0, 3.0]).estimate == 0.75  # averages 0 0 0 1.5 1.5 3


@settings(max_examples=100, deadline=None)
@given(untied_differences, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_the_interval_holds_exactly_the_shifts_that_the_test_accepts(differences, level):
    d = np.array(differences, dtype=float) + np.sqrt(2) * np.arange(len(differences)) / 100  # no tied Walsh averages
    averages = np.unique([(x + y) / 2 for i, x in enumerate(d) for y in d[i:]])
    gaps = np.diff(averages)
    shifts = np.concatenate([[averages[0] - 1], averages[:-1] + gaps / 2, [averages[-1] + 1]])
    shifts = shifts[np.concatenate([[True], gaps > 1e-4, [True]])]  # the test itself rounds to six digits
    result = hodges_lehmann(d, level=level)
    for shift in shifts:
        accepted = signed_rank(d - shift) > 1 - level + 1e-12
        inside = result.ci_low is None or result.ci_low < shift < result.ci_high
        assert inside == accepted


def test_largest_rejected_sum_by_hand():
    # Three differences: rank sums 0, 1, 2 come from one sign pattern of eight each, 3 from two.
    assert [largest_rejected_sum(3, alpha) for alpha in (0.24, 0.25, 0.5, 0.75, 0.8)] == [-1, 0, 1, 2, 2]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_equals_statsmodels(b, c):
    expected = statsmodels_mcnemar([[5, b], [c, 5]], exact=True).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_by_hand():
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)  # C(6,0) + C(6,1) of 2^6
    assert mcnemar(3, 3) == 1.0


def test_wins_ties_losses_round_like_the_test():
    counts = wins_ties_losses([0.3 - 0.1 - 0.2, 0.01, -0.02, 0.4])
    assert (counts.wins, counts.ties, counts.losses) == (2, 1, 1)


@pytest.mark.parametrize("call", [signed_rank, rank_biserial, hodges_lehmann, wins_ties_losses])
def test_missing_empty_and_misshapen_differences_are_refused(call):
    with pytest.raises(StatisticsError, match="1 of 3 values are missing or infinite, the first at task index 1"):
        call([0.1, math.nan, 0.2])
    with pytest.raises(StatisticsError, match="1 or more of each"):
        call([])
    with pytest.raises(StatisticsError, match=r"shape \(2, 2\)"):
        call([[1, 2], [3, 4]])


def test_wrong_arguments_teach():
    with pytest.raises(StatisticsError, match="between 0 and 1"):
        hodges_lehmann([1.0], level=95)
    with pytest.raises(StatisticsError, match="0 or more"):
        mcnemar(-1, 3)


def test_tied_values_share_the_mean_of_their_ranks():
    assert midranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_differences_are_ranked_after_six_decimals():
    """With a tie at .1 three of eight sign patterns are as extreme as the negative one, without it two."""
    assert signed_rank([0.2, 0.1000004, -0.1]) == 0.75
    assert signed_rank([0.2, 0.100002, -0.1]) == 0.5


def test_tasks_of_one_source_are_averaged():
    means, names = average_sources([[1, 2, 30, 5], [3, 4, 50, 7]], ["sts", "sts", "cisi", "sts"])
    assert names == ("sts", "cisi")
    assert means == pytest.approx(np.array([[8 / 3, 30], [14 / 3, 50]]))
    for scores in ([[1, 2]], np.ones((3, 4, 2))):
        with pytest.raises(StatisticsError, match="1 sources for 2 tasks"):
            average_sources(scores, ["x"])


@pytest.mark.parametrize("level", [-0.5, 0.0, 1.0, 1.5])
def test_the_level_of_an_interval_lies_between_0_and_1(level):
    with pytest.raises(StatisticsError, match="lies between 0 and 1"):
        hodges_lehmann([1.0, 2.0, 3.0], level)
