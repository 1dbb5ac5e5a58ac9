"""Recommendations: better only after Holm, else the cheapest not worse, never below TF-IDF; folds checked by hand."""

from __future__ import annotations

import json
import tomllib

import polars as pl
import pytest

from poolwise import api, stats
from poolwise.reports.secondary import advice
from poolwise.runs import layout
from poolwise.runs.prepare import store_costs
from poolwise.stats.variance import TaskTypes, run_mean_square
from poolwise.study.starters import TEMPLATES
from poolwise.study.study import Study
from poolwise.verdicts.table import table
from test_comparison import found as compared
from test_comparison import rows, study

KINDS = {"STS": 8}
FOLDED = 2
"""A seed of scores on which Holm and the pool each decide a fold."""


def test_the_best_of_what_is_better_after_holm_is_recommended():
    c = compared(
        study({"m1": 0, "m2": 0.02, "m3": 0.01, "m4": 0.0}, types=KINDS),
        "m1",
        costs={"m1": 1, "m2": 3, "m3": 2, "m4": 0.5},
    )
    (found,) = c.recommendations
    assert (found.group, found.design, found.basis, found.judged) == ("STS", "m2", "better", True)
    assert (found.cost, found.relative_cost) == (3, 3)
    assert (found.folds, found.stays) == (8, 1.0)
    assert advice(c, found).startswith(
        "Recommended: m2, the best of the designs that score above m1 after Holm. It encodes at 3.00 × the cost of m1. "
        "Leaving out one source at a time gives the same choice in 8 of 8 folds; expected regret "
    )


def test_else_the_cheapest_that_is_not_worse():
    frame = study({"m1": 0, "m2": 0.0, "m3": -0.02}, types=KINDS)
    found = compared(frame, "m1", costs={"m1": 2.0, "m2": 1.0, "m3": 0.5}).recommendations[0]
    assert (found.design, found.basis) == ("m2", "cheapest")  # m3 is cheaper, and worse


def test_equal_costs_choose_nothing():
    frame = study({"m1": 0, "m2": 0.0, "m3": -0.02}, types=KINDS)
    tie = compared(frame, "m1", costs={"m1": 1.0, "m2": 1.001, "m3": 0.5})
    assert (tie.recommendations[0].design, tie.recommendations[0].basis) == (None, "none")
    assert advice(tie, tie.recommendations[0]).startswith(
        "No choice from this: no design is shown to score above m1, and none costs less to encode."
    )
    unknown = compared(frame, "m1")
    assert (unknown.recommendations[0].design, unknown.recommendations[0].basis) == (None, "none")
    assert "costs are unknown" in advice(unknown, unknown.recommendations[0])


def test_two_designs_that_are_the_cheapest_are_both_named_and_none_is_chosen():
    frame = study({"m1": 0, "m2": 0.0, "m3": 0.0}, types=KINDS)
    c = compared(frame, "m1", costs={"m1": 2.0, "m2": 1.0, "m3": 1.0})
    assert (c.recommendations[0].design, c.recommendations[0].as_cheap) == (None, ("m2", "m3"))
    assert "m2 and m3 cost the same to encode, the others more" in advice(c, c.recommendations[0])


def test_the_baseline_is_recommended_where_all_others_are_worse():
    c = compared(study({"m1": 0, "m2": -0.03, "m3": -0.02}, types=KINDS), "m1")
    assert (c.recommendations[0].design, c.recommendations[0].basis) == ("m1", "baseline")
    assert advice(c, c.recommendations[0]).startswith("Recommended: m1, as m2 and m3 are shown to score below it.")


def test_that_a_default_stays_the_default_is_no_evidence():
    frame = study({"m1": 0, "m2": 0.0}, types=KINDS)
    c = compared(frame, "m1", costs={"m1": 1.0, "m2": 2.0})
    found = c.recommendations[0]
    assert (found.design, found.basis, found.folds, found.stays, found.expected_regret) == (
        "m1", "cheapest", 0, None, None,
    )  # fmt: skip
    assert "folds" not in advice(c, found)


def test_a_design_that_holm_does_not_confirm_is_not_preferred():
    names = [f"d{i}" for i in range(5)]
    for seed in range(40):
        frame = study({"a": 0, **dict.fromkeys(names, 0.0)}, types=KINDS, run_sd=0.002, seed=seed)
        c = compared(frame, "a", costs=dict.fromkeys(["a", *names], 1.0))
        verdicts = [row.verdict for row in c.rows]
        if any(v.p_value < 0.05 and v.difference > 0 for v in verdicts) and all(v.p_holm > 0.05 for v in verdicts):
            assert c.recommendations[0].basis == "none"
            return
    pytest.fail("no such study was drawn")


def test_below_tfidf_nothing_is_recommended():
    frame = study({"m1": 0, "m2": 0.02}, types={"STS": 8, "R": 6})
    high = table(rows({"tfidf": [[0.9] * 8]}, "STS") + rows({"tfidf": [[0.1] * 6]}, "R"))
    both = pl.concat([frame, high], how="diagonal_relaxed")
    c = compared(both, "m1", controls=["tfidf"])
    by_group = {found.group: found for found in c.recommendations}
    assert (by_group["STS"].design, by_group["STS"].basis) == (None, "below_reference")
    assert by_group["STS"].reference_score == pytest.approx(0.9)
    assert by_group["STS"].best_score == pytest.approx(c.arm("STS", "m2").mean)
    assert by_group["R"].design == "m2"
    assert advice(c, by_group["STS"]).startswith("No recommendation: every design scores below tfidf (90.0 against ")


def test_a_reference_within_the_family_is_not_recommended():
    """Nor is a design that it leaves behind; of several references the one furthest above is named."""
    c = compared(study({"m1": 0, "m2": 0.01, "bm25": 0.0}, types=KINDS), "m1")
    assert c.recommendations[0].design == "m2"
    above = compared(study({"m1": 0, "m2": 0.01, "tfidf": 0.03, "bm25": 0.05}, types=KINDS), "m1").recommendations[0]
    assert (above.design, above.reference) == (None, "bm25")


@pytest.mark.parametrize("baseline", ["m1", "m2"])
def test_single_runs_recommend_nothing_whichever_is_the_baseline(baseline):
    one_run = study({"m1": 0, "m2": 0.02}, seeds=1, types={"R": 10})
    c = compared(one_run, baseline, costs={"m1": 1.0, "m2": 2.0})
    found = c.recommendations[0]
    assert (found.design, found.basis, found.judged, found.folds, found.stays, found.expected_regret) == (
        None, "none", False, 0, None, None,
    )  # fmt: skip
    assert advice(c, found) == (
        "No choice from this: its designs were run once; if you deploy these very checkpoints, m2 scored above m1."
    )


def test_folds_leave_out_one_source_and_repeat_the_whole_rule():
    """Each fold by hand: on this study both Holm over the other group and the pooled runs decide some of them."""
    frame = study({"m1": 0, "m2": 0.006, "m3": 0.005}, types={"STS": 6}, seed=FOLDED, run_sd=0.0015)
    other = study({"m1": 0, "m2": 0.0, "m3": 0.0}, types={"R": 7}, seed=FOLDED)
    c = compared(pl.concat([frame, other]), "m1")
    y = {d: c.arm("STS", d).array for d in c.designs}
    squares = {d: run_mean_square(c.arm("R", d).array, TaskTypes.one(7)) for d in c.designs}

    def choices(elsewhere: list[float], pooled: bool) -> list[str]:
        chosen = []
        for fold in range(6):
            x = {d: y[d][:, [t for t in range(6) if t != fold]] for d in y}
            tests = {
                d: stats.crossed(
                    x["m1"], x[d], [x[lent]] if pooled else [],
                    elsewhere=[[squares[name] for name in ("m1", d, lent)]] if pooled else None,
                )
                for d, lent in (("m2", "m3"), ("m3", "m2"))
            }  # fmt: skip
            p = dict(zip(tests, stats.holm([*(t.p_value for t in tests.values()), *elsewhere]), strict=False))
            better = [d for d in tests if p[d] <= 0.05 and tests[d].difference > 0]
            chosen.append(max(better, key=lambda d: tests[d].difference) if better else "m1")
        return chosen

    elsewhere = [row.verdict.p_value for row in c.rows if row.group == "R"]
    chosen = choices(elsewhere, pooled=True)
    assert chosen != choices([], pooled=True)
    assert chosen != choices(elsewhere, pooled=False)
    found = next(r for r in c.recommendations if r.group == "STS")
    assert 0 < chosen.count(found.design) < 6
    regrets = [max(y[d][:, i].mean() for d in y) - y[d_i][:, i].mean() for i, d_i in enumerate(chosen)]
    assert (found.folds, found.stays) == (6, pytest.approx(chosen.count(found.design) / 6))
    assert found.expected_regret == pytest.approx(sum(regrets) / 6)
    assert found.expected_regret > 0


def test_sources_not_tasks_are_left_out():
    frame = study({"m1": 0, "m2": 0.02}, types={"STS": 12})
    grouped = frame.with_columns((pl.col("task").str.slice(-2).cast(pl.Int64) // 2).cast(pl.String).alias("source"))
    assert compared(grouped, "m1").recommendations[0].folds == 6


def test_a_verdict_is_withheld_below_five_sources():
    frame = study({"m1": 0, "m2": 0.05}, types={"STS": 8})
    sources = lambda n: frame.with_columns(  # noqa: E731
        (pl.col("task").str.slice(-2).cast(pl.Int64) % n).cast(pl.String).alias("source")
    )
    few, enough = compared(sources(4), "m1"), compared(sources(5), "m1")
    assert few.rows[0].verdict.p_holm < 0.01  # the p is shown, the word is not
    assert (few.rows[0].verdict.verdict, few.rows[0].verdict.missing_sources) == ("withheld", 1)
    assert (enough.rows[0].verdict.verdict, enough.rows[0].verdict.missing_sources) == ("better", 0)
    assert (few.recommendations[0].design, few.recommendations[0].judged) == (None, False)
    assert "a verdict takes 5 sources of tasks, and here are 4" in advice(few, few.recommendations[0])
    assert enough.recommendations[0].design == "m2"
    equal = study({"m1": 0, "m2": 0.0}, types={"STS": 8}, run_sd=0.0001).with_columns(
        (pl.col("task").str.slice(-2).cast(pl.Int64) % 4).cast(pl.String).alias("source")
    )
    verdict = compared(equal, "m1").rows[0].verdict
    assert verdict.p_equivalence < 0.05
    assert verdict.verdict == "withheld"


def test_recommendations_are_in_the_json_beside_what_was_there():
    c = compared(study({"m1": 0, "m2": 0.02}), "m1", costs={"m1": 1.0, "m2": 2.0})
    out = json.loads(json.dumps(c.to_json(), allow_nan=False))
    assert list(out)[:3] == ["comparisons", "scope", "verdicts"]
    by_group = {r["group"]: r for r in out["recommendations"]}
    assert by_group["STS"]["design"] == "m2"
    assert {"basis", "stays", "folds", "expected_regret", "relative_cost"} <= by_group["STS"].keys()
    assert by_group["Reranking"]["stays"] is None
    assert out["factors"] is None


def test_a_study_brings_its_own_costs_and_factors(tmp_path):
    """m1's head costs nothing and nothing else is better; m5 is cheaper than m4 (a token a layer, few layers)."""
    raw = {**tomllib.loads(TEMPLATES["demo"]), "output": str(tmp_path), "seeds": [0, 1, 2]}
    declared = Study.parse(raw)
    frame = study({design.name: 0.0 for design in declared.designs}, types=KINDS)
    scores = frame.with_columns(pl.lit("design").alias("role"), pl.lit(declared.recipe.steps).alias("step"))
    layout.write_table(tmp_path / "results.parquet", scores.to_arrow())
    store_costs(declared, declared.folder)
    c = api.compare(declared)
    costs = {row["design"]: row["encode_flops"] for row in c.costs}
    assert costs["m1"] == min(costs.values())
    assert costs["m2"] == costs["m4"] > costs["m1"]
    assert (c.recommendations[0].design, c.recommendations[0].basis) == ("m1", "cheapest")
    assert any("m5 differs from m1 in both" in sentence for sentence in c.factorial.confounded)
    html = api.report(declared)[1].read_text(encoding="utf-8")
    assert "Recommended: m1, the cheapest to encode of those not shown to be worse" in html
    assert "What each factor does" in html
    assert "Quality and cost" in html
