"""Factors of a study: planted effects come out exactly, nothing is found in nothing, what is confounded is said."""

from __future__ import annotations

import json
import re
import tomllib

import numpy as np
import polars as pl
import pytest

from poolwise import stats
from poolwise.reports import analyses, pages, secondary
from poolwise.study.design import Design
from poolwise.study.starters import TEMPLATES
from poolwise.study.study import Study
from poolwise.verdicts import costs as priced
from poolwise.verdicts.factors import argument_references
from poolwise.verdicts.table import table
from test_comparison import found as compare
from test_comparison import rows
from test_report import Page

FACTORIAL = Study.parse(tomllib.loads(TEMPLATES["factorial"])).designs
FIVE = Study.parse(tomllib.loads(TEMPLATES["demo"])).designs


def planted(designs, effect, *, seeds=3, tasks=8, seed=0, twins=True, kind="STS") -> pl.DataFrame:
    """Scores in which `effect(design)` is added to a level, a run effect and noise.

    With `twins`, the two attention modes of a pooling share run effects and noise, so that attention's planted effect
    is exact and so is the absence of an interaction.
    """
    rng = np.random.default_rng(seed)
    level, drawn = rng.uniform(0.3, 0.7, tasks), {}
    scores = {}
    for design in designs:
        key = (design.pooling, str(design.pooling_args)) if twins else design.name
        if key not in drawn:
            drawn[key] = rng.normal(0, 0.001, (seeds, 1)) + rng.normal(0, 0.002, (seeds, tasks))
        scores[design.name] = (level + effect(design) + drawn[key]).tolist()
    return table(rows(scores, kind))


def found(effects, kind, level, reference):
    return next(e for e in effects if (e.kind, e.levels[-1], e.references[-1]) == (kind, level, reference))


def test_a_planted_effect_of_attention_is_found_and_no_interaction():
    frame = planted(FACTORIAL, lambda d: 0.02 * (d.attention == "bidirectional"))
    factors = compare(frame, "last-ca", treatments=FACTORIAL).factorial
    attention = found(factors.effects, "main", "bidirectional", "causal")
    assert attention.difference == pytest.approx(0.02, abs=1e-12)
    assert attention.ci_low < 0.02 < attention.ci_high
    assert attention.verdict == "above"
    assert len(attention.at) == 6  # every pooling has both modes
    assert dict(attention.coefficients)["mean-bi"] == pytest.approx(1 / 6)
    interactions = [e for e in factors.effects if e.kind == "interaction"]
    assert len(interactions) == 5
    assert all(abs(e.difference) < 1e-12 and e.verdict == "inconclusive" for e in interactions)
    assert factors.confounded == ()
    text = analyses.factor_sentences(factors)
    assert text[0].startswith("On STS, averaged over 6 poolings, bidirectional scores 2.0 points above causal (95 %")
    assert any("5 interactions of attention and pooling are inconclusive" in line for line in text)


def test_pooling_helps_only_beyond_its_capacity_control():
    """Every trained head gains .02, the attention in it nothing: the gain is the parameters'."""
    heads = {"last_token_ffn", "mean_ffn", "cross_attention", "layer_cross_attention"}
    frame = planted(FACTORIAL, lambda d: 0.02 * (d.pooling in heads))
    effects = compare(frame, "last-ca", treatments=FACTORIAL).factorial.effects
    assert found(effects, "main", "cross_attention", "last_token").verdict == "above"
    controls = {(e.levels[0], e.references[0]): e for e in effects if e.kind == "control"}
    assert set(controls) == {
        ("cross_attention", "mean_ffn"),
        ("cross_attention", "last_token_ffn"),
        ("layer_cross_attention", "mean_ffn"),  # it pools the means of the layers' tokens
    }
    assert all(e.verdict == "inconclusive" for e in controls.values())
    real = planted(FACTORIAL, lambda d: 0.02 * (d.pooling == "cross_attention"))
    factors = compare(real, "last-ca", treatments=FACTORIAL).factorial
    assert found(factors.effects, "control", "cross_attention", "mean_ffn").verdict == "above"
    words = " ".join(analyses.factor_sentences(factors))
    assert re.search(
        r"cross_attention scores (1\.[89]|2\.[012]) points above mean_ffn, its head without the attention \(95", words
    )


def test_an_interaction_is_the_difference_of_differences_of_the_crossed_test():
    frame = planted(FACTORIAL, lambda d: 0.02 * (d.attention == "bidirectional" and d.pooling == "mean"), twins=False)
    c = compare(frame, "last-ca", treatments=FACTORIAL)
    effect = found(c.factorial.effects, "interaction", "mean", "last_token")
    y = np.stack([c.arm("STS", d.name).array for d in FACTORIAL])
    signs = {"mean-bi": 1, "mean-ca": -1, "last-bi": -1, "last-ca": 1}
    expected = stats.contrast(y, [signs.get(d.name, 0) for d in FACTORIAL])
    assert (effect.difference, effect.ci_low, effect.p_value) == pytest.approx(
        (expected.difference, expected.ci_low, expected.p_value)
    )
    assert effect.difference == pytest.approx(0.02, abs=0.005)
    assert effect.verdict == "above"
    words = " ".join(analyses.factor_sentences(c.factorial))
    assert "bidirectional over causal gains" in words
    assert "points more under mean than under last_token" in words


def test_an_argument_is_compared_with_its_default_if_a_design_has_that():
    rows = [{"count of last_tokens": value} for value in ("4", "8", None)]
    names = {"count of last_tokens", "size of my_code:Pooling"}
    assert argument_references(rows, names) == {"count of last_tokens": "8"}
    assert argument_references(rows[:1], names) == {}


def test_nothing_is_found_in_nothing():
    """BH at .05 over 6 effects: with no effect at all, few studies show one."""
    designs = [d for d in FACTORIAL if d.pooling in ("last_token", "mean_ffn", "cross_attention")]
    alarms = 0
    for seed in range(20):
        effects = compare(planted(designs, lambda d: 0.0, seed=seed, twins=False), "last-ca", treatments=designs)
        assert len(effects.factorial.effects) == 6
        alarms += any(e.verdict != "inconclusive" for e in effects.factorial.effects)
    assert alarms <= 4  # binomial(20, .05) exceeds 4 with probability .003


def test_the_papers_designs_confound_attention_and_pooling():
    factors = compare(planted(FIVE, lambda d: 0.0, twins=False), "m1", treatments=FIVE).factorial
    said = " ".join(factors.confounded)
    assert "layer_cross_attention (tokens mean) against last_token, is confounded with attention: m5" in said
    assert "interaction of attention and pooling cannot be estimated" in said
    assert "Tokens of layer_cross_attention, mean against last, is confounded with attention" in said
    assert {(e.kind, e.levels, e.at) for e in factors.effects} == {
        ("main", ("bidirectional",), ("cross_attention",)),  # m4 − m2, and nothing else, is clean
        ("main", ("cross_attention",), ("causal",)),
        ("main", ("layer_cross_attention",), ("causal",)),
    }
    assert "No capacity control (mean_ffn, last_token_ffn) was run for cross_attention" in factors.notes[0]


def test_arguments_of_a_pooling_are_factors_too():
    designs = [
        Design(name=f"{m[0]}{n}", attention=m, pooling="cross_attention", pooling_args={"latents": n})
        for m in ("causal", "bidirectional")
        for n in (4, 16)
    ]
    frame = planted(designs, lambda d: 0.01 * (d.pooling_args["latents"] == 16))
    effects = compare(frame, "c4", treatments=designs).factorial.effects
    latents = next(e for e in effects if e.factors == ("latents of cross_attention",))
    assert (latents.levels, latents.references) == (("16",), ("4",))
    assert latents.difference == pytest.approx(0.01, abs=0.003)


def test_sources_are_averaged_first_and_few_of_them_withhold_the_word():
    frame = planted(FACTORIAL, lambda d: 0.02 * (d.attention == "bidirectional"))
    four = frame.with_columns(
        ("source " + pl.col("task").str.slice(-1).cast(pl.Int64).mod(4).cast(pl.String)).alias("source")
    )
    effects = compare(four, "last-ca", treatments=FACTORIAL).factorial.effects
    assert {(e.tasks, e.sources) for e in effects} == {(8, 4)}
    assert {e.verdict for e in effects} == {"inconclusive"}


def test_studies_without_factors_have_none():
    frame = planted(FIVE, lambda d: 0.0)
    assert compare(frame, "m1").factorial is None
    two = frame.filter(pl.col("design").is_in(["m1", "m2"]))
    assert compare(two, "m1", treatments=FIVE[:2]).factorial is None
    single = compare(planted(FACTORIAL, lambda d: 0.0, seeds=1), "last-ca", treatments=FACTORIAL).factorial
    assert single.effects == ()
    assert single.notes == ("STS: factors need two or more seeds, the same for each design, and two or more sources.",)
    assert analyses.factor_table(single, 0.05) is None


def test_factors_are_in_the_json():
    c = compare(planted(FACTORIAL, lambda d: 0.0), "last-ca", treatments=FACTORIAL)
    out = json.loads(json.dumps(c.to_json(), allow_nan=False))["factors"]
    assert len(out["effects"]) == 14
    assert {"factors", "levels", "references", "difference", "ci_low", "ci_high", "p_bh"} <= out["effects"][0].keys()


COSTS = {"m1": 1e9, "m2": 2e9, "m3": 1e9, "m4": 1.5e9}


def test_the_front_is_what_no_other_design_beats_at_its_price():
    scores = {"m1": [[0.5] * 6, [0.52] * 6], "m2": [[0.6] * 6, [0.62] * 6], "m3": [[0.4] * 6, [0.42] * 6],
              "m4": [[0.50] * 6, [0.51] * 6]}  # fmt: skip
    c = compare(table(rows(scores)), "m1")
    front = priced.fronts(c, COSTS)["Retrieval"]
    assert [(p.design, p.front) for p in front] == [("m1", True), ("m3", False), ("m4", False), ("m2", True)]
    # run means 1 point off the mean in three designs, half a point in m4: pooled variance (3·2·1 + 2·.25)/4 points²
    half = 2.7764451051977987 * np.sqrt((3 * 2 * 1 + 2 * 0.25) / 4 / 2) / 100
    assert (front[0].low, front[0].high) == pytest.approx((0.51 - half, 0.51 + half))
    shown = secondary.front_table({"Retrieval": front}, "m1")
    assert shown.rows[0][:4] == ("m1", "1 G", "1.000", "51.00")
    assert [row[-1] for row in shown.rows] == ["on the front", "–", "–", "on the front"]
    svg = secondary.front_panels({"Retrieval": front}, "m1")[0].svg
    assert "m2" in svg
    assert "1.5 G" in svg
    assert priced.fronts(c, {"m1": 1e9}) == {}
    one = compare(table(rows({"m1": [[0.5] * 6], "m2": [[0.6] * 6]})), "m1")
    assert {p.low for p in priced.fronts(one, COSTS)["Retrieval"]} == {None}


def test_the_report_shows_factors_front_and_recommendation(tmp_path):
    frame = planted(FACTORIAL, lambda d: 0.02 * (d.attention == "bidirectional"))
    costs = {design.name: 1e9 + 1e8 * i for i, design in enumerate(FACTORIAL)}
    c = compare(frame, "last-ca", treatments=FACTORIAL, costs=costs)
    pages.render({}, frame, c, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    text = " ".join(page.text)
    assert text.index("Recommended:") < text.index("What each factor does") < text.index("Quality and cost")
    assert "bidirectional − causal" in page.cells
    assert "on the front" in page.cells
    alts = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert any(alt.startswith("Effects with 95 % interval, STS") for alt in alts)
    assert any(alt.startswith("Mean score over FLOPs per text, STS") for alt in alts)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "What each factor does" in markdown
    assert "What each factor does" in (tmp_path / "report.tex").read_text(encoding="utf-8")


def test_labels_do_not_touch():
    heights = secondary._heights([(100.0, 50.0, 5), (100.0, 52.0, 5), (120.0, 53.0, 5), (300.0, 53.0, 5)])
    assert heights[0] == 50  # level with the leftmost point
    assert heights[1] == pytest.approx(50 + secondary.LABEL)
    assert heights[2] == pytest.approx(50 + 2 * secondary.LABEL)
    assert heights[3] == pytest.approx(53 + secondary.LABEL / 2 + 1)  # far from the others
