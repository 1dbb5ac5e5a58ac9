"""Contrasts: golden values by hand, laws by random tables, and words that never claim more than was tested."""

from __future__ import annotations

import json
import re

import numpy as np
import polars as pl
import pytest

from poolwise import stats
from poolwise.errors import StatisticsError
from poolwise.reports.words import answer, contender, number, points, probability, sentences, summary
from poolwise.verdicts.comparison import Comparison, compare
from poolwise.verdicts.contrasts import run_squares
from poolwise.verdicts.findings import JSON_FIELDS, Findings
from poolwise.verdicts.table import table

TYPES = {"STS": 6, "Retrieval": 10, "Reranking": 1}


def rows(scores: dict[str, list[list[float]]], task_type: str = "Retrieval", **extra) -> list[dict]:
    """Rows of designs with scores (seeds, tasks)."""
    return [
        {
            "design": d,
            "seed": s,
            "task": f"{task_type}{t:02d}",
            "task_type": task_type,
            "metric": "m",
            "score": x,
            **extra,
        }
        for d, runs in scores.items()
        for s, run in enumerate(runs)
        for t, x in enumerate(run)
    ]


def study(designs: dict[str, float], seeds: int = 3, run_sd: float = 0.001, seed: int = 0, types=None) -> pl.DataFrame:
    """A table of designs that lie a given difference above their tasks' levels, with run effects and noise."""
    rng = np.random.default_rng(seed)
    found = []
    for kind, n in (types or TYPES).items():
        level = np.random.default_rng(n).uniform(0.3, 0.7, n)  # the same whatever the seed
        for name, shift in designs.items():
            x = level + shift + rng.normal(0, run_sd, (seeds, 1)) + rng.normal(0, 0.002, (seeds, n))
            found += rows({name: x.tolist()}, kind)
    return table(found)


def found(frame: pl.DataFrame, *arguments, costs=(), treatments=(), **options) -> Findings:
    """The findings of a comparison; `costs`: encode FLOPs by design."""
    rows = tuple({"design": name, "encode_flops": cost} for name, cost in dict(costs).items())
    return Findings.of(compare(frame, *arguments, **options), costs=rows, treatments=tuple(treatments))


def test_checkpoint_contrast_by_hand():
    base = [0.50, 0.50, 0.50, 0.50, 0.50, 0.50]
    better = [0.51, 0.52, 0.53, 0.54, 0.55, 0.49]  # differences 1..5 and −1 points: ranks 1.5, 3, 4, 5, 6 and −1.5
    c = compare(table(rows({"m1": [base], "m2": [better], "m3": [base]})), "m1")
    row = c.row("Retrieval", "m2")
    # 2^6 sign patterns; W− = 1.5; a sum of at most 1.5 from {1.5, 1.5, 3, 4, 5, 6}: none, or either 1.5: 3 patterns
    assert row.p_value == pytest.approx(2 * 3 / 64)
    assert row.p_holm == pytest.approx(2 * 2 * 3 / 64)
    assert row.effect_size == pytest.approx((19.5 - 1.5) / 21)
    assert (row.wins, row.ties, row.losses, row.n) == (5, 0, 1, 6)
    assert row.min_reachable_p == 2 / 64
    d = (1, 2, 3, 4, 5, -1)
    walsh = [(a + b) / 2 for i, a in enumerate(d) for b in d[i:]]
    assert row.difference == pytest.approx(np.median(walsh) / 100)
    same = c.row("Retrieval", "m3")
    assert (same.p_value, same.effect_size, same.difference, same.ties) == (1.0, 0.0, 0.0, 6)
    assert c.scope == "checkpoints"


def test_json_has_exactly_the_published_fields_and_no_nan():
    c = found(study({"m1": 0, "m2": 0.01}), "m1")
    out = json.loads(json.dumps(c.to_json(), allow_nan=False))
    assert all(tuple(row) == JSON_FIELDS for row in out["comparisons"])
    assert [row["group"] for row in out["comparisons"]] == ["Reranking", "Retrieval", "STS"]
    one = out["comparisons"][0]
    assert one["n"] == 1
    assert [one[name] for name in ("ci_low", "ci_high", "p_value", "p_holm", "effect_size")] == [None] * 5
    assert {v["group"] for v in out["verdicts"]} == {"Retrieval", "STS"}
    assert any("Reranking: there is one task" in note for note in out["notes"])


def test_design_verdict_is_the_crossed_test_of_the_pooled_study_and_holm_spans_the_family():
    c = compare(study({"m1": 0, "m2": 0.02, "m3": 0.0}), "m1")
    arms = {d: c.arm("STS", d).array for d in c.designs}
    others = run_squares({g: {d: c.arm(g, d) for d in c.designs} for g in ("Reranking", "Retrieval")}, c.designs)
    elsewhere = [[others[g][d] for d in ("m1", "m2", "m3")] for g in ("Reranking", "Retrieval")]
    expected = stats.crossed(arms["m1"], arms["m2"], pool=[arms["m3"]], elsewhere=elsewhere)
    assert expected.scope == "pooled over the study"
    v = c.row("STS", "m2").verdict
    assert v is not None
    assert (v.difference, v.p_value, v.ci_low, v.run_sd) == (
        expected.difference, expected.p_value, expected.ci_low, expected.run_sd,
    )  # fmt: skip
    family = [r.verdict.p_value if r.verdict else float("nan") for r in c.rows]
    assert len(family) == 6
    holm = stats.holm(family)
    assert [r.verdict.p_holm for r in c.rows if r.verdict] == pytest.approx([p for p in holm if p == p])
    assert v.verdict == "better"
    assert v.detectable > 0


def test_words_of_verdicts():
    c = compare(study({"m1": 0, "up": 0.02, "down": -0.02, "same": 0.0}, types={"R": 12}, run_sd=0.0003), "m1")
    assert {r.design: r.verdict.verdict for r in c.rows} == {"up": "better", "down": "worse", "same": "equivalent"}
    loose = compare(study({"m1": 0, "same": 0.0}, types={"R": 12}, run_sd=0.02), "m1")
    assert loose.rows[0].verdict.verdict == "inconclusive"


def contrasts(c: Comparison) -> dict:
    return {(r.group, r.design): r for r in c.rows}


def test_swapping_baseline_and_design_negates():
    frame = study({"a": 0, "b": 0.004})
    one, other = compare(frame, "a").row("STS", "b"), compare(frame, "b").row("STS", "a")
    assert one.difference == pytest.approx(-other.difference, abs=1e-15)
    assert (one.ci_low, one.p_value, one.wins) == (pytest.approx(-other.ci_high), other.p_value, other.losses)
    assert one.effect_size == -other.effect_size
    v, w = one.verdict, other.verdict
    assert (v.difference, v.ci_low) == (pytest.approx(-w.difference, abs=1e-15), pytest.approx(-w.ci_high))
    assert v.p_value == pytest.approx(w.p_value)


def test_row_order_and_relabelled_seeds_change_nothing():
    frame = study({"a": 0, "b": 0.004, "c": 0.001})
    reference = compare(frame, "a")
    assert compare(frame.sample(fraction=1, shuffle=True, seed=3), "a") == reference
    turned = compare(frame.with_columns((pl.col("seed") + 1) % 3), "a")
    for key, row in contrasts(turned).items():
        expected = contrasts(reference)[key]
        assert row.difference == pytest.approx(expected.difference, abs=1e-15)
        if expected.verdict:
            assert row.verdict.p_value == pytest.approx(expected.verdict.p_value, abs=1e-12)


def test_controls_stand_outside_family_and_pool():
    frame = study({"a": 0, "b": 0.004, "c": 0.001})
    noisy = study({"broken": -0.1}, run_sd=0.03, seed=9)
    reference = rows({"tfidf": [[0.4] * 6]}, "STS")
    both = pl.concat([frame, noisy, table(reference)], how="diagonal_relaxed")
    without, with_controls = compare(frame, "a"), compare(both, "a", controls=["broken", "tfidf", "bm25"])
    assert with_controls.rows == without.rows
    assert {(r.group, r.design) for r in with_controls.control_rows} == {
        ("Reranking", "broken"), ("Retrieval", "broken"), ("STS", "broken"), ("STS", "tfidf"),
    }  # fmt: skip
    assert all(r.p_holm is None for r in with_controls.control_rows)
    assert with_controls.row("STS", "tfidf").verdict is None
    assert "Controls without scores: bm25." in with_controls.notes
    inside = compare(both.filter(pl.col("design") != "tfidf"), "a")
    assert inside.row("STS", "b").verdict.run_sd > without.row("STS", "b").verdict.run_sd


@pytest.mark.parametrize("seeds", [1, 3])
def test_tasks_of_one_source_are_averaged_at_both_scopes(seeds):
    """One rule for one run and for three: SemEval's three tasks are one of four sources."""
    frame = study({"a": 0, "b": 0.01}, seeds, types={"STS": 6}).with_columns(
        pl.when(pl.col("task") < "STS03").then(pl.lit("SemEval")).alias("source")
    )
    c = compare(frame, "a")
    row = c.rows[0]
    assert (row.n, row.tasks, row.wins + row.ties + row.losses) == (4, 6, 4)
    d = c.arm("STS", "b").task_means - c.arm("STS", "a").task_means
    by_source = np.array([d[:3].mean(), *d[3:]])
    assert row.p_value == stats.signed_rank(by_source) == 0.125
    assert row.difference == pytest.approx(stats.hodges_lehmann(by_source).estimate)
    if seeds > 1:
        assert (row.verdict.tasks, row.verdict.sources) == (6, 4)
        assert row.verdict.difference == pytest.approx(by_source.mean())
    one_source = compare(frame.with_columns(pl.lit("SemEval").alias("source")), "a")
    assert (one_source.rows[0].verdict, one_source.rows[0].p_value, one_source.rows[0].n) == (None, None, 1)
    assert any("all tasks come from one source" in note for note in one_source.notes)


def test_few_sources_are_said():
    notes = compare(study({"a": 0, "b": 0.01}, types={"R": 3, "S": 5}), "a").notes
    assert [note for note in notes if "few sources" in note and note.startswith("R (3):")]
    assert not [note for note in notes if "S (" in note]


def test_one_run_has_no_verdict_but_a_banner_and_a_tipping_point():
    c = found(study({"a": 0, "b": 0.02}, seeds=1, types={"R": 10}), "a")
    row = c.rows[0]
    assert row.verdict is None
    assert "One run only" in c.banner
    d = c.arm("R", "b").task_means - c.arm("R", "a").task_means
    assert stats.one_seed(d, row.tipping_run_sd).p_value == pytest.approx(0.05, abs=1e-6)
    text = sentences(c)[0]
    assert (
        f"It would hold up to a run effect of {points(row.tipping_run_sd)} points; runs of one design are known to "
        "vary by .1 to 4 points (1.4 on STS for SmolLM2-135M)."
    ) in text
    assert "checkpoints, not designs" in text
    assert summary(c) == "Checkpoints only: Above a: b on R."
    assert compare(study({"a": 0, "b": 0.02}, seeds=2), "a").banner == ""


def test_gaps_are_refused_or_listed():
    frame = study({"a": 0, "b": 0.01}).filter(
        ~((pl.col("design") == "b") & (pl.col("seed") == 1) & (pl.col("task") == "STS03"))
    )
    with pytest.raises(StatisticsError, match=r"1 scores are missing: b seed 1 on STS03"):
        compare(frame, "a")
    c = found(frame, "a", missing="drop")
    line = "Left out of every design, as a run has no score: 1 of 17 tasks (STS03)."
    assert c.excluded == (line,)
    assert c.row("STS", "b").n == 5
    out = c.to_json()
    assert out["notes"][-1] == line
    assert out["cases"] == {line: ["STS03: no score of b seed 1"]}


def test_designs_may_have_different_numbers_of_seeds():
    frame = study({"a": 0, "b": 0.01}).filter(~((pl.col("design") == "b") & (pl.col("seed") == 2)))
    c = found(frame, "a")
    assert (c.row("STS", "b").verdict.seeds, c.row("STS", "b").verdict.baseline_seeds) == (2, 3)
    assert "2 and 3 seeds" in " ".join(sentences(c))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f, {"baseline": "aa"}), r"baseline 'aa' has no scores; the designs are a, b.*did you mean 'a'\?"),
        (lambda f: (f, {"baseline": "b", "controls": ["b"]}), "a comparison needs two designs"),
        (lambda f: (f, {"by": "task_typ"}), r"by='task_typ': no such column.*did you mean 'task_type'\?"),
        (lambda f: (f, {"by": "design"}), "cannot group tasks"),
        (lambda f: (f, {"missing": "skip"}), "allowed: error, drop"),
        (
            lambda f: (
                f.with_columns(pl.when(pl.col("seed") == 1).then(pl.lit("x")).otherwise("metric").alias("metric")),
                {},
            ),
            r"tasks have more than one metric",
        ),
        (
            lambda f: (f.with_columns(pl.when(pl.col("seed") == 1).then(500).otherwise(1000).alias("step")), {}),
            r"runs that stopped early cannot be compared with runs of 1000 steps: a seed 1 \(step 500\)",
        ),
    ],
)
def test_mistakes_teach(change, words):
    frame, options = change(study({"a": 0, "b": 0.01}))
    with pytest.raises(StatisticsError, match=words):
        compare(frame, **{"baseline": "a", **options})


def test_splits_and_subsets_are_averaged_within_a_task():
    common = {"seed": 0, "task": "A", "task_type": "R", "metric": "m", "split": "test"}
    cells = [("a", "en", 0.2), ("a", "de", 0.4), ("b", "en", 0.6), ("b", "de", 0.4)]
    frame = table([{**common, "design": d, "subset": s, "score": x} for d, s, x in cells])
    c = compare(frame, "a")
    assert [c.arm("R", d).mean for d in "ab"] == pytest.approx([0.3, 0.5])


def test_default_baseline_is_the_first_and_said_and_by_all_makes_one_group():
    frame = study({"z": 0, "a": 0.01})
    c = compare(frame, by="all")
    assert (c.baseline, c.groups, c.rows[0].n) == ("z", ("all",), 17)
    assert "No baseline was named, so z" in c.notes[0]
    assert compare(study({"m1": 0, "m10": 0, "m2": 0}), "m1").designs == ("m1", "m2", "m10")
    assert compare(study({"m1": 0, "m10": 0, "m2": 0}), "m1", order=["m10"]).designs == ("m1", "m10", "m2")


NEW_TASK = (
    r"( On one further task like these, expect −?\d*\.\d+ to −?\d*\.\d+ points; better by more than \.5 with a chance "
    r"of (\d+|<1|>99) %\.)"
)
GRAMMAR = {
    "better": r"On [\w ]+, \S+ scores \d*\.\d+ points above m1 \(95 % interval −?\d*\.\d+ to −?\d*\.\d+; \d+ tasks?"
    r"( from \d+ sources?)?, \d+ seeds; run effect \d*\.\d+; base B\)\.",
    "worse": r"On [\w ]+, \S+ scores \d*\.\d+ points below m1 \(95 % interval −\d*\.\d+ to −\d*\.\d+; .*\)\.",
    "equivalent": r"On [\w ]+, \S+ and m1 are equivalent within ±\.5 points \(90 % interval .*\)\.",
    "inconclusive": r"On [\w ]+, \S+ against m1 is inconclusive( after Holm’s correction)?: "
    r"differences from \S+ to \S+ points are compatible "
    r"\(.*\)\."
    r"( The interval excludes 0, but not after Holm over \d+ contrasts \(p \.\d+\)\.)?"
    r" A true difference of \d*\.\d+ points would be detected with 80 % power; one of "
    r"(\.5 points|\d*\.\d+ points, as large as the one found,) would need "
    r"(\d+( to \d+)? seeds( or more)?|more than 50 seeds(, or more tasks)?)\.",
}


def test_sentences_follow_the_grammar_and_claim_nothing_else():
    seen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        shifts = {"m1": 0.0, **{f"m{i}": float(rng.choice([0, 0, 0.004, 0.02, -0.02])) for i in range(2, 5)}}
        frame = study(shifts, seeds=int(rng.integers(1, 4)), run_sd=float(rng.choice([0.0003, 0.003])), seed=seed)
        c = found(frame, "m1")
        for row, text in zip(c.rows, sentences(c, "B"), strict=True):
            assert not re.search(r"no difference|significan|not different|proves?\b", text)
            assert re.search(r"\d seeds?\b", text)
            assert "base B" in text
            if row.verdict:
                seen.add(row.verdict.verdict)
                assert re.fullmatch(GRAMMAR[row.verdict.verdict] + NEW_TASK, text), text
            assert text.startswith(answer(c, row, "B"))
        assert not re.search(r"no difference|significan", summary(c))
    assert seen == {"better", "worse", "equivalent", "inconclusive"}


def test_sentence_prices_the_design():
    frame = study({"m1": 0, "m2": 0.02}, types={"Retrieval": 10})
    c = found(frame, "m1", costs={"m1": 1.0, "m2": 1.12})
    assert sentences(c)[0].endswith("It costs 12 % more to encode, in FLOPs.")
    assert "to encode" not in sentences(found(frame, "m1", costs={"m1": 1.0}))[0]


def test_an_interval_end_inside_the_margin_does_not_read_as_on_it():
    frame = study({"m1": 0, "m2": 0.0}, types={"R": 12}, run_sd=0.0003)
    v = compare(frame, "m1").rows[0].verdict
    margin = round(max(-v.equivalence_low, v.equivalence_high) + 5e-5, 4)
    tight = found(frame, "m1", margin=margin)
    assert tight.rows[0].verdict.verdict == "equivalent"
    low, high = re.search(r"90 % interval (\S+) to (\S+);", sentences(tight)[0]).groups()
    assert max(abs(float(end.replace("−", "-"))) for end in (low, high)) < 100 * margin


@pytest.mark.parametrize(
    ("value", "text"), [(0.87, ".87"), (-0.4, "−.40"), (1.6, "1.60"), (-0.001, ".00"), (None, "∞"), (10.0, "10.00")]
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("p", "text"), [(0.0004, "<.001"), (0.0312, ".031"), (1.0, "1"), (None, "–"), (0.0498, ".0498"), (0.0502, ".0502")]
)
def test_probabilities(p, text):
    assert probability(p) == text


def test_a_table_that_says_what_each_row_is(tmp_path):
    """Controls and references named by a column `role` stay outside the family, also at another step."""
    from poolwise.api import compare as compare_source

    frame = study({"m1": 0.0, "m2": 0.02}).with_columns(role=pl.lit("design"), step=pl.lit(100))
    lexical = study({"tfidf": 0.3}, seeds=1).with_columns(role=pl.lit("reference"), step=pl.lit(0))
    path = tmp_path / "scores.csv"
    pl.concat([frame, lexical], how="diagonal_relaxed").write_csv(path)
    findings = compare_source(path, baseline="m1")
    assert findings.designs == ("m1", "m2")
    assert findings.control_designs == ("tfidf",)
    assert {row.design for row in findings.rows} == {"m2"}


def test_the_best_of_the_compared_designs_answers_for_its_group():
    """The best design if one is better, else the one furthest up; without power, which the full sentence has."""
    c = found(study({"m1": 0, "up": 0.02, "down": -0.05}, types={"R": 12}, run_sd=0.0003), "m1")
    assert answer(c, contender(c, "R")).startswith("On R, up scores ")
    nothing = found(study({"m1": 0, "m2": -0.05, "m3": 0.03}, types={"R": 4}, run_sd=0.02), "m1", margin=1e-6)
    assert answer(nothing, contender(nothing, "R")).startswith("On R, m3 against m1 is inconclusive: ")
    assert "would be detected" not in answer(nothing, contender(nothing, "R"))
