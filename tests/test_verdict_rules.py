"""The rules between a test and its word: which p, at which level, over which family, from whose runs."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from scipy.stats import kendalltau, norm

from poolwise import stats
from poolwise.stats import holm
from poolwise.stats.crossed import seeds_to_settle
from poolwise.verdicts.comparison import compare
from poolwise.verdicts.contrasts import run_squares
from poolwise.verdicts.findings import Findings, recommend
from poolwise.verdicts.items import Answer, answers, decision
from poolwise.verdicts.robustness import DRAWS, robustness
from poolwise.verdicts.table import table
from test_comparison import found, rows, study


def test_power_and_seeds_are_those_of_the_strictest_step_of_holm():
    """Two contrasts: a p between .025 and .05 is not settled, though the plain test is significant."""
    for gain in np.arange(0.0035, 0.01, 0.0002):
        c = compare(study({"a": 0, "b": gain, "c": 0.0}, types={"R": 8}, run_sd=0.002), "a", margin=0.003)
        v = c.row("R", "b").verdict
        if v.p_value < 0.045:
            break
    assert v.p_value > 0.03
    arms = [c.arm("R", name).by_source for name in "abc"]
    result = stats.crossed(arms[0], arms[1], pool=arms[2:])
    assert result.p_value == v.p_value
    strict = replace(result, level=0.975, critical=result.null.critical(0.975))
    assert v.detectable == stats.minimum_detectable_effect(strict) > stats.minimum_detectable_effect(result)
    assert v.settle_for == v.difference > 0.003  # only the correction stands between it and a verdict
    assert (v.settle_low, v.settle_high) == seeds_to_settle(strict, v.difference) != (None, None)
    alone = compare(study({"a": 0, "b": gain}, types={"R": 8}, run_sd=0.002), "a").rows[0].verdict
    assert (alone.p_value < 0.05, alone.settle_low, alone.settle_high) == (True, None, None)
    equal = compare(study({"a": 0, "b": 0.0}, types={"R": 8}, run_sd=0.0002), "a").rows[0].verdict
    assert (equal.p_equivalence < 0.05 < equal.p_value, equal.settle_low, equal.settle_high) == (True, None, None)
    open_ = compare(study({"a": 0, "b": 0.001}, types={"R": 8}, run_sd=0.004), "a", margin=0.003).rows[0].verdict
    assert (open_.ci_low < 0 < open_.ci_high, open_.settle_for) == (True, 0.003)


def test_overall_contrasts_count_in_the_family():
    """Two designs against the baseline in two groups, and overall: six contrasts."""
    frame = study({"a": 0, "b": 0.01, "c": 0.0}, types={"R": 5, "S": 6})
    for weights, family in (({"R": 1.0, "S": 1.0}, 6), (None, 4)):
        c = compare(frame, "a", type_weights=weights)
        arms = [c.arm("R", name).by_source for name in "abc"]
        squares = run_squares({"S": {d: c.arm("S", d) for d in "abc"}}, "abc")["S"]
        result = stats.crossed(arms[0], arms[1], pool=arms[2:], elsewhere=[[squares[d] for d in "abc"]])
        strict = replace(result, level=1 - 0.05 / family, critical=result.null.critical(1 - 0.05 / family))
        assert c.row("R", "b").verdict.detectable == stats.minimum_detectable_effect(strict)


def test_designs_lend_their_runs_only_under_the_same_seeds():
    """Three runs each, but those of c have seeds of their own: nothing that a seed does to all cancels in them."""
    frame = study({"a": 0, "b": 0.004, "c": 0.0}, types={"R": 8})
    moved = frame.with_columns(pl.when(pl.col("design") == "c").then(pl.col("seed") + 3).otherwise("seed"))
    lent, alone = (compare(x, "a").row("R", "b").verdict for x in (frame, moved))
    assert lent.scope == "the compared designs, and the study agrees"
    arms = [compare(frame, "a").arm("R", name).by_source for name in "ab"]
    assert (alone.scope, alone.p_value) == ("two arms", stats.crossed(*arms).p_value)


def one_run(gains: list[float], kind: str) -> pl.DataFrame:
    """One run of a and b, b above a by `gains`, in one group of tasks."""
    return table(rows({"a": [[0.5] * len(gains)], "b": [[0.5 + gain for gain in gains]]}, kind))


def test_claims_under_a_foreign_run_effect_are_corrected_over_the_family():
    gains = [0.01 + 0.004 * (i % 3 - 1) for i in range(6)]
    alone = found(one_run(gains, "R"), "a", run_sd=0.0032, run_df=50).rows[0].given
    assert 0.025 < alone.p_value < 0.05
    assert (alone.p_holm, alone.verdict) == (alone.p_value, "better")
    both = found(pl.concat([one_run(gains, "R"), one_run(gains, "S")]), "a", run_sd=0.0032, run_df=50)
    for row in both.rows:
        assert row.given.p_holm == pytest.approx(2 * alone.p_value)
        assert (row.given.verdict, row.given.missing_sources) == ("inconclusive", 0)


def test_a_p_value_of_alpha_is_significant():
    """Five sources: all signs alike have p = 2/32."""
    frame = one_run([0.01, 0.02, 0.03, 0.04, 0.05], "R")
    for alpha, tips in ((2 / 32, True), (0.0624, False)):
        row = compare(frame, "a", alpha=alpha).rows[0]
        assert (row.p_holm, row.tipping_run_sd is not None) == (2 / 32, tips)


@pytest.mark.parametrize(("sources", "enough"), [((3, 3), True), ((2, 4), True), ((2, 3), False), ((1, 9), False)])
def test_an_overall_verdict_takes_four_degrees_of_freedom_within_the_types(sources, enough):
    frame = study({"a": 0, "b": 0.01}, types=dict(zip(("R", "S"), sources, strict=True)))
    c = compare(frame, "a", type_weights={"R": 1.0, "S": 1.0})
    assert len(c.overall) == enough
    assert any("too few sources within the weighted types" in note for note in c.notes) != enough


def test_the_folds_correct_for_the_whole_family(monkeypatch):
    """Contrasts of the other groups and the overall ones keep their p-values in every fold."""
    frame = study({"a": 0, "b": 0.02, "c": 0.0}, types={"R": 5, "S": 6})
    c = compare(frame, "a", type_weights={"R": 1.0, "S": 1.0})
    families = []
    monkeypatch.setattr(stats, "holm", lambda p: families.append(list(p)) or holm(p))
    first, second = recommend(c, {})
    assert (first.folds, second.folds, len(families)) == (5, 6, 11)
    fixed = {row.group: [x.verdict.p_value for x in c.rows if x.group != row.group] for row in c.rows}
    overall = [x.verdict.p_value for x in c.overall]
    assert len(overall) == 2
    assert all(family[2:] == [*fixed["R"], *overall] for family in families[:5])
    assert all(family[2:] == [*fixed["S"], *overall] for family in families[5:])


def test_what_few_sources_few_tasks_and_single_runs_limit_is_noted_by_group():
    frame = study({"a": 0, "b": 0.01}, types={"Five": 5, "One": 1, "Same": 3, "Three": 3, "Two": 2}, seeds=3)
    same = frame.with_columns(
        pl.when(pl.col("task_type") == "Same").then(pl.lit("one origin")).otherwise("task").alias("source")
    )
    c = compare(same, "a")
    first, *notes = c.notes
    assert "needs weights of the task types" in first
    assert {row.group for row in c.rows if row.verdict} == {"Five", "Three", "Two"}
    assert [note.partition(":")[0] for note in notes] == ["Same", "Three (3), Two (2)", "One"]
    assert ["come from one source" in notes[0], "so few sources" in notes[1], "one task" in notes[2]] == [True] * 3
    single = compare(same.filter(pl.col("seed") == 0), "a", type_weights={"Five": 1.0, "Three": 1.0})
    assert single.overall == ()
    assert not any("so few sources" in note or "overall" in note for note in single.notes)
    two = compare(same.filter(pl.col("seed") < 2), "a")
    squares = run_squares({"Five": {d: two.arm("Five", d) for d in "ab"}}, "ab")
    assert squares.keys() == {"Five"}  # two runs are some evidence
    assert sum("Two seeds measure the run effect badly" in note for note in two.notes) == 1


def with_reference(score: list[float]) -> Findings:
    """Two designs of .50 and .52 on eight tasks, the better one at .90 on two more, and TF-IDF on the first eight."""
    designs = {"m1": [[0.5] * 8 + [0.5] * 2] * 2, "m2": [[0.52] * 8 + [0.9] * 2] * 2}
    frame = pl.concat([table(rows(designs, "STS")), table(rows({"tfidf": [score]}, "STS"))], how="diagonal_relaxed")
    return found(frame, "m1", controls=["tfidf"])


def test_a_reference_is_compared_on_the_tasks_that_it_shares_and_beyond_the_margin():
    assert with_reference([0.53] * 8).recommendations[0].basis == "below_reference"
    assert with_reference([0.53] * 8).recommendations[0].best_score == pytest.approx(0.52)
    assert with_reference([0.524] * 8).recommendations[0].basis != "below_reference"
    partial = with_reference([0.53] * 8)
    assert (partial.whole_arm("STS", "tfidf"), partial.whole_arm("STS", "m3")) == (None, None)
    assert partial.whole_arm("STS", "m2") == partial.arm("STS", "m2")
    half = compare(table(rows({"a": [[0.25] * 6] * 2, "b": [[0.5] * 6] * 2})), "a", margin=0.25)
    reference = table(rows({"tfidf": [[0.75] * 6]}))
    tie = compare(
        pl.concat([table(rows({"a": [[0.25] * 6] * 2, "b": [[0.5] * 6] * 2})), reference], how="diagonal_relaxed"),
        "a", margin=0.25, controls=["tfidf"],
    )  # fmt: skip
    assert half.arm("Retrieval", "b").mean + 0.25 == 0.75
    assert recommend(tie, {})[0].basis != "below_reference"


def line(**changes) -> SimpleNamespace:
    """A line of two models on 100 items that leaves everything open."""
    open_ = {"difference": 0.01, "ci_low": -0.03, "ci_high": 0.05, "inner_low": -0.02, "inner_high": 0.0499}
    return SimpleNamespace(**{"scope": "checkpoints", "p_holm": 0.4, "run_se": 0.0, "n": 100, **open_, **changes})


@pytest.mark.parametrize(("family", "run_se"), [(1, 0.0), (3, 0.0), (1, 0.005)])
def test_how_many_more_items_would_detect_the_margin(family, run_se):
    """80 % power at Holm's first step; the runs' part of the standard error stays."""
    found = answers([line(run_se=run_se)] * family, 0.02)[0]
    error, wanted = 0.08 / (2 * norm.ppf(0.975)), 0.02 / (norm.ppf(1 - 0.025 / family) + norm.ppf(0.8))
    needed = 100 * (error**2 - run_se**2) / (wanted**2 - run_se**2)
    assert (found.answer, found.more) == ("not enough", int(np.ceil(needed)) - 100)
    assert found.more > 500
    assert answers([line(run_se=0.01)], 0.02)[0].more is None  # the runs alone vary too much
    assert answers([line(ci_low=0.0)], 0.0495)[0].more == 1  # there seem to be enough: never less than one


def test_of_several_challengers_the_best_of_the_least_settled_answers():
    stay = Answer("stay", line(difference=-0.05))
    low, high = (Answer("not enough", line(difference=x)) for x in (0.01, 0.02))
    assert decision([stay, low, high]) is high
    assert decision([stay, Answer("no difference", line(difference=0.0))]).answer == "no difference"
    better = [Answer("switch", line(difference=x)) for x in (0.02, 0.03)]
    assert decision([high, *better]) is better[1]


def test_single_runs_on_two_bases_are_shown_as_checkpoints():
    designs = {"a": 0, "b": 0.02}
    by_base = [(name, compare(study(designs, seeds=1, seed=i, types={"R": 6}), "a")) for i, name in enumerate("xy")]
    (across,) = robustness(by_base).designs
    assert [x.difference for x in across.on] == [c.rows[0].difference for _, c in by_base]
    assert ({x.verdict for x in across.on}, across.agreement, across.same_sign) == ({"none"}, "open", True)


def test_the_agreement_of_rankings_resamples_the_runs_of_each_base_and_their_common_sources():
    designs = {"a": 0, "b": 0.002, "c": 0.004, "d": 0.001}
    by_base = [(name, compare(study(designs, seeds=3, seed=i, types={"R": 6}), "a")) for i, name in enumerate("xy")]
    (found,) = robustness(by_base).rankings
    scores = [np.stack([c.arm("R", d).by_source for d in designs]) for _, c in by_base]
    rng, drawn = np.random.default_rng(0), []
    for _ in range(DRAWS):
        sources = rng.integers(0, 6, 6)
        means = [x[:, rng.integers(0, 3, 3)][:, :, sources].mean(axis=(1, 2)) for x in scores]
        drawn.append(kendalltau(*means).statistic)
    assert (found.ci_low, found.ci_high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    assert found.tau == pytest.approx(kendalltau(*(x.mean(axis=(1, 2)) for x in scores)).statistic)
