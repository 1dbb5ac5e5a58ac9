"""Two systems on one data set: golden values by hand, laws, false alarms of equal systems, and the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from poolwise import stats
from poolwise.api import compare_items as compare_source
from poolwise.api import compare_runs
from poolwise.cli import app
from poolwise.errors import DataError, PoolwiseError, StatisticsError
from poolwise.verdicts.items import CROSSED, Paired, compare_items, to_json
from poolwise.verdicts.table import table

METRICS = {"Retrieval": "ndcg_at_10", "Classification": "accuracy", "Clustering": "v_measure"}


def frame(
    scores: Mapping[str, Sequence[Sequence[float]]], kind: str = "Retrieval", gold: Sequence[float] = (), **extra
) -> pl.DataFrame:
    """Item rows of task T for designs with scores (seeds, items), as `evaluate` writes them."""
    metric = METRICS.get(kind, "cosine")
    common = {"task": "T", "task_type": kind, "split": "test", "subset": "default", "metric": metric, **extra}
    return table(
        {"design": d, "seed": s, **common, "score": x, "item_id": f"i{n}", **({"gold": gold[n]} if len(gold) else {})}
        for d, runs in scores.items()
        for s, run in enumerate(runs)
        for n, x in enumerate(run)
    )


def only(lines: Sequence[Paired]) -> Paired:
    assert len(lines) == 1
    return lines[0]


def test_retrieval_by_hand():
    # Differences .1 .2 .3 −.1: |sum| = .5. Of the 16 flips, ±.7 and ±.5 (two ways each) are as extreme: 6 of 16.
    line = only(compare_items(frame({"a": [[0, 0, 0, 0.1]], "b": [[0.1, 0.2, 0.3, 0]]}), "T"))
    assert (line.design, line.baseline, line.metric, line.n) == ("b", "a", "ndcg_at_10", 4)
    assert line.difference == pytest.approx(0.125)
    assert line.p_value == line.p_holm == pytest.approx(6 / 16, abs=0.015)
    assert line.ci_low == pytest.approx(-0.025, abs=0.026)
    assert line.ci_high == pytest.approx(0.25, abs=0.026)
    assert (line.test, line.scope) == ("paired permutation", "these two checkpoints, queries like these")
    assert "only 4 of 4 queries differ, so p cannot fall below 0.125" in line.note


def test_mcnemar_by_hand():
    a, b = [1, 0, 0, 0, 0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    line = only(compare_items(frame({"a": [a], "b": [b]}, "Classification"), "T"))
    assert line.test == "exact McNemar"
    assert line.difference == pytest.approx(0.5)
    assert line.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # at most 1 of the 7 discordant examples


def test_shares_of_experiments_are_no_mcnemar():
    line = only(compare_items(frame({"a": [[0.1, 0.2, 1.0]], "b": [[0.3, 0.2, 0.0]]}, "Classification"), "T"))
    assert line.test == "paired permutation"
    assert "a mean over experiments" in line.note


def test_spearman_by_hand():
    gold, a, b = [1, 2, 3, 4, 5], [0.2, 0.1, 0.3, 0.4, 0.5], [0.1, 0.3, 0.2, 0.5, 0.4]
    line = only(compare_items(frame({"a": [a], "b": [b]}, "STS", gold), "T"))
    # 1 − 6 Σd² / (n³ − n): Σd² is 2, 4, and 8 between the models: correlations .9, .8, .6
    assert (line.metric, line.n) == ("cosine_spearman", 5)
    assert line.difference == pytest.approx(-0.1)
    low, high = stats.zou_interval(0.9, 0.8, 0.6, 5)
    assert f"Zou's interval: {low:.4f} to {high:.4f}" in line.note
    assert line.scope == "these two checkpoints, pairs like these"


def test_runs_of_a_correlation_are_averaged():
    gold = [1, 2, 3, 4, 5]
    a = [[0.2, 0.1, 0.3, 0.4, 0.5], [0.1, 0.3, 0.2, 0.5, 0.4]]  # correlations .9 and .8
    line = only(compare_items(frame({"a": a, "b": [[0.1, 0.2, 0.3, 0.4, 0.5]]}, "STS", gold), "T"))
    assert line.difference == pytest.approx(1 - 0.85)
    assert "Zou" not in line.note
    assert line.scope.startswith("these checkpoints (runs averaged: 1 of b, 2 of a)")


def test_average_precision_by_hand():
    # a ranks + − + −: (1 + 2/3) / 2; b ranks + + − −: 1
    scores = {"a": [[0.9, 0.8, 0.7, 0.6]], "b": [[0.9, 0.6, 0.8, 0.7]]}
    line = only(compare_items(frame(scores, "PairClassification", [1, 0, 1, 0]), "T"))
    assert line.metric == "cosine_ap"
    assert line.difference == pytest.approx(1 - 5 / 6)
    with pytest.raises(StatisticsError, match="labels"):
        compare_items(frame(scores, "PairClassification", [1, 1, 1, 1]), "T")


def test_clustering_is_paired_over_its_sets_and_says_how_few():
    line = only(compare_items(frame({"a": [[0.3, 0.4, 0.5]], "b": [[0.4, 0.5, 0.6]]}, "Clustering"), "T"))
    assert line.n == 3
    assert line.difference == pytest.approx(0.1)
    assert line.p_value == pytest.approx(2 / 8, abs=0.015)
    assert "sets that mteb draws repeatedly" in line.note
    assert "few sets" in line.note


def test_two_runs_a_side_add_the_line_for_designs():
    rng = np.random.default_rng(3)
    a = rng.uniform(0.2, 0.8, 30) + rng.normal(0, 0.02, (3, 30))
    b = a.mean(axis=0) + 0.05 + rng.normal(0, 0.02, (3, 30))
    checkpoints, designs = compare_items(frame({"a": a.tolist(), "b": b.tolist()}), "T")
    assert (checkpoints.test, designs.test) == ("paired permutation", CROSSED)
    expected = stats.crossed(a[:, order(30)], b[:, order(30)])
    assert designs.difference == pytest.approx(checkpoints.difference)
    assert (designs.p_value, designs.ci_low) == pytest.approx((expected.p_value, expected.ci_low))
    assert designs.scope == "these two designs, runs like these, queries like these"
    assert designs.n == 30
    assert designs.p_holm == designs.p_value, "Holm counts each kind of line by itself"


def order(n: int) -> list[int]:
    """Items as they are sorted by name."""
    return sorted(range(n), key=lambda i: f"i{i}")


def random_scores(kind: str) -> pl.DataFrame:
    rng = np.random.default_rng(5)
    gold = rng.integers(0, 2, 40).tolist() if kind == "PairClassification" else rng.normal(size=40).tolist()
    runs = {name: rng.uniform(0, 1, (1, 40)) for name in ("a", "b")}
    if kind == "Classification":
        runs = {name: x.round() for name, x in runs.items()}
    return frame({name: x.tolist() for name, x in runs.items()}, kind, [] if kind in METRICS else gold)


@pytest.mark.parametrize("kind", ["Retrieval", "Classification", "Clustering", "STS", "PairClassification"])
def test_swapping_negates_and_the_order_of_rows_does_not_matter(kind):
    scores = random_scores(kind)
    line = only(compare_items(scores, "T", baseline="a"))
    back = only(compare_items(scores, "T", baseline="b"))
    assert back.difference == pytest.approx(-line.difference)
    assert (back.ci_low, back.ci_high) == pytest.approx((-line.ci_high, -line.ci_low))
    assert back.p_value == pytest.approx(line.p_value)
    assert only(compare_items(scores.sample(fraction=1, shuffle=True, seed=1), "T", baseline="a")) == line
    assert only(compare_items(scores, "T", baseline="a", seed=1)) != line, "the seed is used"


@pytest.mark.parametrize("kind", ["Retrieval", "Classification", "Clustering", "STS", "PairClassification"])
def test_a_system_does_not_differ_from_itself(kind):
    scores = random_scores(kind).filter(pl.col("design") == "a")
    twice = pl.concat([scores, scores.with_columns(design=pl.lit("b"))])
    line = only(compare_items(twice, "T"))
    assert (line.difference, line.ci_low, line.ci_high, line.p_value, line.p_holm) == (0, 0, 0, 1, 1)


def test_runs_that_repeat_one_another_are_one_run():
    rng = np.random.default_rng(8)
    a, b = rng.uniform(0, 1, 20).tolist(), rng.uniform(0, 1, 20).tolist()
    line = only(compare_items(frame({"a": [a, a, a], "b": [b, b, b]}), "T"))
    assert line == replace(only(compare_items(frame({"a": [a], "b": [b]}), "T")), note=line.note)
    assert "2 of 3 runs of a repeat another one exactly" in line.note


def test_holm_runs_over_all_designs():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 0.5, 60)
    scores = {"a": [base.tolist()]}
    scores |= {f"d{k}": [(base + rng.normal(0.01 * k, 0.05, 60)).clip(0, 1).tolist()] for k in range(3)}
    lines = compare_items(frame(scores), "T")
    assert [line.design for line in lines] == ["d0", "d1", "d2"]
    assert [line.p_holm for line in lines] == pytest.approx(stats.holm([line.p_value for line in lines]).tolist())
    assert only(compare_items(frame(scores), "T", design="d2")).p_holm == lines[2].p_value
    assert {line.design for line in compare_items(frame(scores), "T", controls=["d0"])} == {"d1", "d2"}


def test_subsets_are_data_sets_of_their_own():
    parts = [frame({"a": [[0.1, 0.2]], "b": [[0.3, 0.3]]}, subset=name) for name in ("de", "en")]
    lines = compare_items(pl.concat(parts), "T")
    assert [line.task for line in lines] == ["T (test, de)", "T (test, en)"]
    assert {line.n for line in lines} == {2}


def test_earlier_steps_are_ignored():
    early = frame({"a": [[0.9, 0.9]], "b": [[0.1, 0.1]]}, step=5)
    late = frame({"a": [[0.1, 0.2]], "b": [[0.2, 0.3]]}, step=10)
    assert only(compare_items(pl.concat([early, late]), "T")).difference == pytest.approx(0.1)
    short = pl.concat([early.filter(pl.col("design") == "a"), late.filter(pl.col("design") == "b")])
    assert "different numbers of steps: b 10, a 5" in only(compare_items(short, "T")).note
    again = early.filter(pl.col("design") == "a").with_columns(seed=pl.lit(1, pl.Int64))
    with pytest.raises(StatisticsError, match=r"runs of 'a' stopped at different steps \(10, and 5 with seed 1\)"):
        compare_items(pl.concat([late, again]), "T")


def test_mistakes_name_what_is_wrong_and_what_is_there():
    scores = frame({"alpha": [[0.1, 0.2, 0.3]], "beta": [[0.3, 0.3, 0.3]]})
    main = table([{"design": "alpha", "seed": 0, "task": "U", "task_type": "STS", "metric": "m", "score": 0.5}])
    for arguments, message in [
        ({"task": "t"}, "task 't' is not in the scores; tasks with items: T"),
        ({"task": "T", "baseline": "alpa"}, "did you mean 'alpha'"),
        ({"task": "T", "design": "bta"}, "did you mean 'beta'"),
        ({"task": "T", "design": "alpha"}, "needs two designs"),
        ({"task": "T", "metric": "ndcg_at_1"}, "allowed: ndcg_at_10; did you mean 'ndcg_at_10'"),
        ({"task": "T", "missing": "dorp"}, "did you mean 'drop'"),
    ]:
        with pytest.raises(StatisticsError, match=re.escape(message)):
            compare_items(scores, **arguments)
    both = pl.concat([scores, main], how="diagonal_relaxed")
    with pytest.raises(StatisticsError, match=r"'U' has no per-item scores"):
        compare_items(both, "U")
    with pytest.raises(StatisticsError, match="contain no items"):
        compare_items(main, "U")
    with pytest.raises(StatisticsError, match="column 'gold'"):
        compare_items(frame({"a": [[0.1]], "b": [[0.2]]}, "STS"), "T")


def test_pairs_with_other_gold_values_are_other_data():
    one, two = frame({"a": [[0.1, 0.2]]}, "STS", [1, 2]), frame({"b": [[0.1, 0.2]]}, "STS", [1, 3])
    with pytest.raises(StatisticsError, match=r"gold of 'i1' differs between runs"):
        compare_items(pl.concat([one, two]), "T")


def test_gaps_are_refused_or_left_out_and_named():
    scores = frame({"a": [[0.1, 0.2, 0.3]], "b": [[0.2, 0.4]]})
    with pytest.raises(StatisticsError, match=r"1 of 3 queries lack a score in some run: i2"):
        compare_items(scores, "T")
    line = only(compare_items(scores, "T", missing="drop"))
    assert (line.n, line.difference) == (2, pytest.approx(0.15))
    assert "left out because one of the two lacks them: 1 of 3 queries (i2)" in line.note
    assert "with a score of 0 for those b has 20.00, a 20.00, a difference of +0.00 points" in line.note
    assert (line.score, line.baseline_score, line.gaps) == (pytest.approx(0.3), pytest.approx(0.15), 1)
    assert line.difference_with_zeros == pytest.approx(0)
    apart = pl.concat([frame({"a": [[0.1]]}), frame({"b": [[0.1]]}).with_columns(item_id=pl.lit("z"))])
    with pytest.raises(StatisticsError, match=r"no queries that all runs have; a seed 0 has i0; b seed 0 has z"):
        compare_items(apart, "T", missing="drop")


def test_equal_retrievers_are_seldom_called_different():
    """Skewed per-query differences, mostly zero, true mean 0: the test that replaces Wilcoxon keeps its level."""
    rng, alarms = np.random.default_rng(11), 0
    for seed in range(200):
        base, gain = np.full(60, 0.5), rng.exponential(0.1, 60) - 0.1
        other = (base + np.where(rng.random(60) < 0.5, gain, 0)).clip(0, 1)
        p = only(compare_items(frame({"a": [base.tolist()], "b": [other.tolist()]}), "T", seed=seed)).p_value
        alarms += p <= 0.05
    assert 2 <= alarms <= 20  # expected 10 (its sd is 3.1)


def test_equal_sts_models_are_seldom_called_different():
    rng, alarms = np.random.default_rng(12), 0
    for seed in range(100):
        gold = rng.normal(size=80)
        a, b = (np.tanh(0.3 * (gold + rng.normal(0, 0.7, 80))).tolist() for _ in "ab")
        line = only(compare_items(frame({"a": [a], "b": [b]}, "STS", gold.tolist()), "T", seed=seed))
        assert (line.p_value <= 0.05) == (not line.ci_low <= 0 <= line.ci_high) or line.p_value == pytest.approx(
            0.05, abs=0.003
        )
        alarms += line.p_value <= 0.05
    assert alarms <= 12  # expected 5 (its sd is 2.2)


def runs(folder: Path) -> list[str]:
    """Four queries. a: first, second, first, none. b: first, first, second, first. c: like a, and nothing for q1."""
    (folder / "q.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(1, 5)))
    ranks = {"a": {1: 1, 2: 2, 3: 1}, "b": {1: 1, 2: 1, 3: 2, 4: 1}, "c": {2: 2, 3: 1}}
    for name, found in ranks.items():
        lines = []
        for query, rank in found.items():
            documents = ["x"] * (rank - 1) + [f"d{query}"]
            lines += [f"q{query} Q0 {d} {r} {10 - r} {name}\n" for r, d in enumerate(documents, 1)]
        (folder / f"{name}.run").write_text("".join(lines))
    return [str(folder / f"{name}.run") for name in ranks]


def test_runs_are_compared_on_the_queries_that_both_have(tmp_path):
    a, b, c = runs(tmp_path)
    line = only(compare_runs([a, b], tmp_path / "q.tsv"))
    assert (line.n, line.difference, line.p_value) == (3, pytest.approx(0), 1)  # + and − (1 − 1/log2 3), and 0
    assert "1 of 4 queries (q4)" in line.note
    assert "a difference of +25.00 points" in line.note
    lines = compare_runs([a, b, c], tmp_path / "q.tsv", metric="recall_at_1")
    assert [(x.design, x.n, x.difference) for x in lines] == [("b", 3, 0.0), ("c", 2, 0.0)]
    assert only(compare_runs([a, b], tmp_path / "q.tsv", baseline="b")).baseline == "b"


def test_runs_that_share_no_query_are_refused(tmp_path):
    a, *_ = runs(tmp_path)
    (tmp_path / "z.run").write_text("q4 Q0 d4 1 1 z\n")
    with pytest.raises(
        StatisticsError, match="no queries that all runs have; a seed 0 has q1, q2, q3; z seed 0 has q4"
    ):
        compare_runs([a, tmp_path / "z.run"], tmp_path / "q.tsv")
    with pytest.raises(StatisticsError, match="needs two designs"):
        compare_runs([a], tmp_path / "q.tsv")
    with pytest.raises(DataError, match="more than once"):
        compare_runs([a, a], tmp_path / "q.tsv")


def test_command_line_compares_runs(tmp_path):
    a, b, c = runs(tmp_path)
    arguments = ["compare", a, b, c, "--qrels", str(tmp_path / "q.tsv"), "--metric", "ndcg_at_10"]
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found == to_json(compare_runs([a, b, c], tmp_path / "q.tsv"))
    assert list(found["comparisons"][0]) == [
        "task", "metric", "design", "baseline", "n", "difference", "ci_low", "ci_high", "p_value", "p_holm", "test",
        "scope", "note", "score", "baseline_score", "gaps", "difference_with_zeros",
    ]  # fmt: skip
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "paired permutation" in shown
    assert "these two checkpoints, queries like these" in " ".join(shown.split())


def test_command_line_compares_the_items_of_one_task(tmp_path):
    path = tmp_path / "scores.parquet"
    frame({"a": [[0.1, 0.2]], "b": [[0.3, 0.5]]}).write_parquet(path)
    arguments = ["compare", str(path), "--task", "T", "--design", "a", "--baseline", "b", "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert json.loads(done.stdout) == to_json(compare_source(path, "T", design="a", baseline="b"))
    for wrong, message in [
        (["compare", str(path), "--metric", "ndcg_at_10"], "--task"),
        (["compare", str(path), str(path)], "--qrels"),
    ]:
        with pytest.raises(PoolwiseError, match=message):
            CliRunner().invoke(app, wrong, catch_exceptions=False)
