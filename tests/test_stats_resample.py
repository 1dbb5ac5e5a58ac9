"""Resampling items of one data set: equal to slow direct computation, seeded, and checkable by hand."""

import itertools

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import average_precision_score

from poolwise.errors import StatisticsError
from poolwise.stats.resample import (
    _chunks,
    ap_bootstrap,
    average_precision_function,
    average_precision_parts,
    correlation,
    draw_counts,
    midrank_function,
    paired_bootstrap,
    paired_permutation,
    spearman_bootstrap,
    spearman_parts,
    zou_interval,
)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def pairs():
    generator = rng(1)
    gold = generator.integers(0, 6, 120) / 5
    a = gold + generator.normal(0, 0.6, 120)
    b = np.round(gold + generator.normal(0, 0.5, 120), 1)  # with ties
    return a, b, gold


def test_everything_random_gives_one_answer_for_one_seed(pairs):
    a, b, gold = pairs
    calls = [
        lambda generator: paired_permutation(a, b, generator),
        lambda generator: paired_bootstrap(a, b, generator),
        lambda generator: spearman_bootstrap(a, b, gold, generator, n=200),
        lambda generator: ap_bootstrap(a, b, gold > 0.5, generator, n=200),
    ]
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    for call in calls:
        assert call(rng(5)) == call(rng(5))
        assert call(rng(5)) != call(rng(6))
    assert (np.random.get_state()[1] == before).all(), "the global generator was touched"


def test_permutation_golden_by_hand():
    # Differences 1 2 3 -1: |sum| = 5. Of the 16 flips, sums of at least 5 in size: +-7, +-5 (two ways each): 6 of 16.
    assert paired_permutation([0, 0, 0, 1], [1, 2, 3, 0], rng()) == pytest.approx(6 / 16, abs=0.015)


def test_permutation_equals_full_enumeration():
    d = rng(3).normal(0.3, 1, 11)
    d[:2] = 0
    sums = np.array([np.dot(signs, d) for signs in itertools.product([-1, 1], repeat=11)])
    exact = (np.abs(sums) >= abs(d.sum()) - 1e-9).mean()
    assert paired_permutation(np.zeros(11), d, rng(), n=50_000) == pytest.approx(exact, abs=0.01)


def test_permutation_p_is_never_zero_and_symmetric():
    a, b = np.zeros(200), np.ones(200)
    assert paired_permutation(a, b, rng()) == 1 / 10_001
    assert paired_permutation(a, a, rng()) == 1.0
    x, y = rng(4).normal(size=(2, 50))
    assert paired_permutation(x, y, rng()) == paired_permutation(y, x, rng())


def test_permutation_in_chunks_counts_all_flips():
    d = rng(5).normal(0, 1, 5000)  # 10,000 flips of 5,000 items come in 13 chunks
    z = abs(d.sum()) / np.sqrt((d**2).sum())
    assert paired_permutation(np.zeros(5000), d, rng()) == pytest.approx(2 * scipy.stats.norm.sf(z), abs=0.02)


def test_chunks_are_as_many_resamples_as_were_asked_for():
    assert list(_chunks(1_500_000, 5)) == [2, 2, 1]
    assert list(_chunks(0, 5)) == [5]
    assert list(_chunks(10**8, 2)) == [1, 1]


@pytest.mark.parametrize(
    ("parts", "weighted", "labels"),
    [
        (spearman_parts, lambda ranks, truth, w: correlation(ranks[None], truth[None], w[None])[0], False),
        (average_precision_parts, lambda x, y, w: average_precision_function(x, y)(2 * w[None])[0], True),
    ],
    ids=["spearman", "average precision"],
)
def test_parts_are_the_statistic_and_its_derivative_by_the_weight_of_each_item(parts, weighted, labels):
    """The infinitesimal jackknife by definition; the derivatives are taken numerically."""
    scores = np.array([0.9, 0.1, 0.5, 0.5, 0.3, 0.8, 0.2, 0.5])
    truth = np.array([1.0, 0, 1, 0, 0, 1, 1, 0]) if labels else np.array([5.0, 1, 4, 2, 2, 3, 3, 4])
    x, y = (scores, truth) if labels else map(scipy.stats.rankdata, (scores, truth))
    whole = weighted(x, y, np.ones(8))
    step = 1e-6 * np.eye(8)
    slopes = [(weighted(x, y, 1 + h) - weighted(x, y, 1 - h)) / 2e-6 for h in step]
    assert parts(scores, truth) == pytest.approx(whole + 8 * np.array(slopes), abs=1e-6)
    assert parts(scores, truth).mean() == pytest.approx(whole)


def test_parts_of_constant_scores_and_of_one_label():
    assert spearman_parts(np.ones(4), [1, 2, 3, 4]).tolist() == [0] * 4
    assert spearman_parts([1, 2, 3, 4], np.ones(4)).tolist() == [0] * 4
    with pytest.raises(StatisticsError, match=r"labels \[1.0\]; both 0 and 1 must occur"):
        average_precision_parts([1, 2], [1, 1])


def test_paired_bootstrap_equals_normal_theory_and_scipy():
    a, b = rng(6).normal(0, 1, (2, 400))
    result = paired_bootstrap(a, b, rng())
    half = 1.96 * (b - a).std(ddof=1) / 20
    assert result.difference == pytest.approx((b - a).mean())
    assert (result.ci_low, result.ci_high) == pytest.approx(
        (result.difference - half, result.difference + half), abs=0.01
    )
    reference = scipy.stats.bootstrap(((b - a),), np.mean, method="percentile", n_resamples=5000, rng=rng(1))
    low, high = reference.confidence_interval
    assert (result.ci_low, result.ci_high) == pytest.approx((low, high), abs=0.01)


def test_paired_bootstrap_by_hand():
    # Differences 0 and 1: means of two draws are 0, .5, .5, 1, so a 95 % interval is 0 to 1.
    wide = paired_bootstrap([0, 0], [0, 1], rng())
    assert (wide.difference, wide.ci_low, wide.ci_high) == (0.5, 0.0, 1.0)
    # 40 differences, one of them 1: by the binomial distribution 98.2 % of the resamples hold it three times at most,
    # 92.1 % twice at most, so the upper end is 3 / 40.
    rare = paired_bootstrap(np.zeros(40), np.eye(40)[0], rng())
    assert (rare.ci_low, rare.ci_high) == (0.0, 3 / 40)


def test_weighted_kernels_equal_the_statistics_of_repeated_items(pairs):
    _, b, gold = pairs
    counts = draw_counts([np.arange(120)], 20, 120, rng(2))
    assert (counts.sum(axis=1) == 120).all()
    labels = (gold > 0.5).astype(float)
    rank_b, rank_gold, ap = midrank_function(b), midrank_function(gold), average_precision_function(b, labels)
    spearman = correlation(rank_b(counts), rank_gold(counts), counts)
    for row, count in enumerate(counts.astype(int)):
        drawn = np.repeat(np.arange(120), count)
        assert spearman[row] == pytest.approx(scipy.stats.spearmanr(b[drawn], gold[drawn]).statistic, abs=1e-12)
        assert ap(counts)[row] == pytest.approx(average_precision_score(labels[drawn], b[drawn]), abs=1e-12)


def test_spearman_bootstrap_brackets_its_estimate_and_agrees_with_zou(pairs):
    a, b, gold = pairs
    result = spearman_bootstrap(a, b, gold, rng())
    r_a, r_b, r_ab = (scipy.stats.spearmanr(x, y).statistic for x, y in ((a, gold), (b, gold), (a, b)))
    assert result.difference == pytest.approx(r_b - r_a, abs=1e-12)
    assert (result.ci_low, result.ci_high) == pytest.approx(zou_interval(r_a, r_b, r_ab, 120), abs=0.03)


def test_zou_equals_the_example_of_its_paper_and_a_transcription():
    # Zou (2007): r12 = .396, r13 = .179, r23 = .088, n = 66 gives -.093 to .517.
    low, high = zou_interval(0.179, 0.396, 0.088, 66)
    assert (round(low, 3), round(high, 3)) == (-0.093, 0.517)
    for r1, r2, r12, n in [(0.7, 0.75, 0.9, 500), (-0.2, 0.3, 0.1, 40), (0.9, 0.2, 0.0, 10)]:
        (l1, u1), (l2, u2) = (
            np.tanh(np.arctanh(r) + np.array([-1, 1]) * scipy.stats.norm.ppf(0.975) / np.sqrt(n - 3)) for r in (r1, r2)
        )
        c = ((r12 - r1 * r2 / 2) * (1 - r1**2 - r2**2 - r12**2) + r12**3) / ((1 - r1**2) * (1 - r2**2))
        low = r1 - r2 - np.sqrt((r1 - l1) ** 2 + (u2 - r2) ** 2 - 2 * c * (r1 - l1) * (u2 - r2))
        high = r1 - r2 + np.sqrt((u1 - r1) ** 2 + (r2 - l2) ** 2 - 2 * c * (u1 - r1) * (r2 - l2))
        assert zou_interval(r2, r1, r12, n) == pytest.approx((low, high), abs=1e-12)


def test_ap_bootstrap_keeps_the_share_of_positives(pairs):
    a, b, gold = pairs
    labels = (gold > 0.5).astype(int)
    result = ap_bootstrap(a, b, labels, rng())
    assert result.difference == pytest.approx(average_precision_score(labels, b) - average_precision_score(labels, a))
    assert result.ci_low < result.difference < result.ci_high
    groups = [np.flatnonzero(labels == value) for value in (0, 1)]
    assert (draw_counts(groups, 50, 120, rng())[:, groups[1]].sum(axis=1) == labels.sum()).all()
    one_positive = ap_bootstrap([0.1, 0.9, 0.2], [0.9, 0.1, 0.2], [1, 0, 0], rng(), n=50)
    assert one_positive.difference == pytest.approx(1 - 1 / 3)
    # it is in every resample, below both negatives for a and above them for b
    assert (one_positive.ci_low, one_positive.ci_high) == pytest.approx((2 / 3, 2 / 3))
    with pytest.raises(StatisticsError, match="both 0 and 1 must occur"):
        ap_bootstrap(a, b, np.ones(120), rng())


def test_wrong_input_teaches():
    with pytest.raises(StatisticsError, match=r"numbers of items differ \(a 2, b 3\); give the same items"):
        paired_permutation([1, 2], [1, 2, 3], rng())
    with pytest.raises(StatisticsError, match="b: 1 of 2 values are missing or infinite, the first at item index 1"):
        paired_bootstrap([1, 2], [1, np.nan], rng())
    with pytest.raises(StatisticsError, match="n=0"):
        paired_permutation([1, 2], [1, 3], rng(), n=0)
    with pytest.raises(StatisticsError, match=r"\|r\| < 1"):
        zou_interval(1.0, 0.5, 0.5, 20)
