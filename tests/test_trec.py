"""TREC runs and judgements: what is read, how it is ranked, what is refused and what is reported."""

from __future__ import annotations

import gzip
import math
import re
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from poolwise.api import compare_runs
from poolwise.cli import app
from poolwise.errors import DataError
from poolwise.verdicts.trec import read_trec


def trec(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "q.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td3\t1\nq2\td1\t2\nq3\td1\t0\n")
    (tmp_path / "a.run").write_text("q1 Q0 d1 1 3.0 a\nq1 Q0 d2 2 2.0 a\nq1 Q0 d3 3 1.0 a\n")
    (tmp_path / "b.seed2.run").write_text("q1 Q0 d2 1 3.0 b\nq1 Q0 d3 2 2.0 b\nq2 Q0 d1 1 9.0 b\n")
    return tmp_path / "a.run", tmp_path / "b.seed2.run"


def test_trec_runs_are_scored_per_query_and_a_missing_query_scores_zero(tmp_path):
    frame = read_trec(trec(tmp_path), tmp_path / "q.tsv").frame
    items = {(d, q): s for d, q, s in frame.drop_nulls("item_id").select("design", "item_id", "score").iter_rows()}
    third = 1 / math.log2(3)
    by_hand = (third + 1 / math.log2(4)) / (1 + third)  # relevant at ranks 2 and 3 of an ideal 1 and 2
    assert items == {
        ("a", "q1"): pytest.approx(by_hand, abs=1e-9), ("a", "q2"): 0.0, ("b", "q1"): 1.0, ("b", "q2"): 1.0,
        ("a", "q3"): 0.0, ("b", "q3"): 0.0,
    }  # fmt: skip
    means = frame.filter(pl.col("item_id").is_null()).select("design", "seed", "score").rows()
    assert means == [("a", 0, pytest.approx(by_hand / 3)), ("b", 2, pytest.approx(2 / 3))]


def test_trec_mistakes_name_file_and_line(tmp_path):
    run, _ = trec(tmp_path)
    with pytest.raises(DataError, match=r"metric 'ndgc_at_10' is unknown.*did you mean 'ndcg_at_10'"):
        read_trec([run], tmp_path / "q.tsv", "ndgc_at_10")
    (tmp_path / "bad.run").write_text("q1 Q0 d1 1 3.0 a\nq1 Q0 d2\n")
    with pytest.raises(DataError, match=r"bad\.run, line 2: 'q1 Q0 d2' is not"):
        read_trec([tmp_path / "bad.run"], tmp_path / "q.tsv")
    (tmp_path / "bad.tsv").write_text("q1 0 d1 yes\n")
    with pytest.raises(DataError, match=r"bad\.tsv, line 1: 'q1 0 d1 yes' is not"):
        read_trec([run], tmp_path / "bad.tsv")
    with pytest.raises(DataError, match="more than once"):
        read_trec([run, run], tmp_path / "q.tsv")


@pytest.mark.parametrize("grade", ["0.5", "nan", "inf", "1e9"])
def test_a_grade_that_is_no_whole_number_is_refused(grade, tmp_path):
    run, _ = trec(tmp_path)
    (tmp_path / "bad.tsv").write_text(f"q1 0 d1 1\n\nq2 0 d1 {grade}\n")
    with pytest.raises(DataError, match=rf"bad\.tsv, line 3: grade '{grade}' is not a whole number from .* scale the"):
        read_trec([run], tmp_path / "bad.tsv")


def test_a_judgement_may_repeat_but_not_differ(tmp_path):
    run, _ = trec(tmp_path)
    judged = tmp_path / "twice.tsv"
    judged.write_text("q1 0 d2 1\nq1 0 d1 -1\nq1 0 d2 1.0\n")  # d2 at rank 2, where one relevant document counts once
    frame = read_trec([run], judged).frame
    assert frame.drop_nulls("item_id")["score"].to_list() == [pytest.approx(1 / math.log2(3))]
    judged.write_text("q1 0 d2 1\nq2 0 d2 0\nq1 0 d2 0\n")
    expected = (
        r"twice\.tsv, line 3: grade 0 for query 'q1' and document 'd2' differs from 1 in an earlier line; .* keep one"
    )
    with pytest.raises(DataError, match=expected):
        read_trec([run], judged)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("q1 Q0 d2 2 nan a", "score 'nan' is not a finite number"),
        ("q1 Q0 d2 2 -inf a", "score '-inf' is not a finite number"),
        ("q1 Q0 d1 2 3.0 a", "document 'd1' is already ranked for query 'q1', with score 3; .* keep one"),
    ],
)
def test_a_run_without_a_clear_ranking_is_refused(line, expected, tmp_path):
    trec(tmp_path)
    bad = tmp_path / "bad.run"
    bad.write_text(f"q1 Q0 d1 1 3.0 a\nq2 Q0 d1 1 3.0 a\n{line}\n")
    with pytest.raises(DataError, match=rf"bad\.run, line 3: {expected}"):
        read_trec([bad], tmp_path / "q.tsv")


def run_file(path: Path, ranking: dict[str, list[tuple[str, float]]], gap: str = " ", tag: str = "t") -> Path:
    """A run with a line for each document, its rank by the order of the list."""
    lines = [
        gap.join([query, "Q0", document, str(rank), repr(score), tag])
        for query, documents in ranking.items()
        for rank, (document, score) in enumerate(documents, 1)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def qrels(path: Path, judged: dict[str, str]) -> Path:
    path.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t1\n" for q, d in judged.items()))
    return path


def mean(path: Path, judged: Path, metric: str = "ndcg_at_10") -> float:
    frame = read_trec([path], judged, metric).frame
    return frame.filter(pl.col("item_id").is_null())["score"].item()


def test_judgements_in_a_file_without_an_ending_may_have_a_header(tmp_path):
    judged = qrels(tmp_path / "qrels", {"q1": "d1", "q2": "d2"})
    found = run_file(tmp_path / "a.run", {"q1": [("d1", 2.0)], "q2": [("d1", 2.0), ("d2", 1.0)]})
    assert mean(found, judged) == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_ids_with_blanks_are_read_from_tab_separated_files(tmp_path):
    """Titles as ids: a finds each at rank 1, b at rank 2, which is 1 / log2(3); with blanks alone they are refused."""
    documents = [(f"Old Harbour {i}", f"Old Harbour {i + 1}") for i in range(6)]
    judged = qrels(tmp_path / "q.tsv", {f"set {i}": right for i, (right, _) in enumerate(documents)})
    ranked = {f"set {i}": [(right, 9.0), (wrong, 8.0)] for i, (right, wrong) in enumerate(documents)}
    turned = {query: [(first, 8.0), (second, 9.0)][::-1] for query, [(first, _), (second, _)] in ranked.items()}
    a, b = run_file(tmp_path / "a.run", ranked, "\t"), run_file(tmp_path / "b.run", turned, "\t")
    assert (mean(a, judged), mean(b, judged)) == (1.0, pytest.approx(1 / math.log2(3)))
    (line,) = compare_runs([b, a], judged)
    assert (line.n, line.score, line.baseline_score) == (6, 1.0, pytest.approx(1 / math.log2(3)))
    assert line.difference == pytest.approx(1 - 1 / math.log2(3))
    with pytest.raises(DataError, match=r"c\.run, line 1: .* ids that contain blanks need tabs between the cells"):
        read_trec([run_file(tmp_path / "c.run", ranked)], judged)
    plain = tmp_path / "blanks.tsv"
    plain.write_text("q0 Old Harbour 1\n")
    with pytest.raises(DataError, match=r"blanks\.tsv, line 1: .* need tabs"):
        read_trec([a], plain)


def test_scores_that_differ_beyond_32_bits_are_not_tied(tmp_path):
    """trec_eval would see a tie and prefer the larger id: an MRR of .5 that the system did not make."""
    judged = qrels(tmp_path / "q.tsv", {f"n{i}": f"a{i}" for i in range(10)})
    close = {f"n{i}": [(f"a{i}", 0.5123456789012346), (f"b{i}", 0.5123456789012340)] for i in range(10)}
    wide = {query: [(first, 2.0), (second, 1.0)] for query, [(first, _), (second, _)] in close.items()}
    (line,) = compare_runs(
        [run_file(tmp_path / "w.run", wide), run_file(tmp_path / "t.run", close)], judged, metric="mrr"
    )
    assert (line.score, line.baseline_score, line.difference, line.p_value) == (1.0, 1.0, 0.0, 1.0)
    assert "tied" not in line.note


def test_ties_follow_trec_eval_and_are_counted(tmp_path):
    """Equal scores are ranked by id, descending, whatever the ranks of the file say; both are counted."""
    judged = qrels(tmp_path / "q.tsv", {f"t{i}": f"aa{i}" for i in range(8)})
    tied = {f"t{i}": [(f"aa{i}", 1.0), (f"zz{i}", 1.0)] for i in range(8)}
    plain = {f"t{i}": [(f"zz{i}", 2.0), (f"aa{i}", 1.0)] for i in range(8)}
    (line,) = compare_runs([run_file(tmp_path / "base.run", plain), run_file(tmp_path / "tied.run", tied)], judged)
    assert line.score == line.baseline_score == pytest.approx(1 / math.log2(3))
    assert (
        "tied.run: tied scores in 8 of 8 queries (t0, t1, t2, …), ranked by document id as trec_eval does" in line.note
    )
    assert "tied.run: the ranks of the file contradict its scores in 8 of 8 queries" in line.note
    assert "base.run" not in line.note


def test_a_query_without_relevant_documents_counts_as_in_trec_eval(tmp_path):
    judged = qrels(tmp_path / "q.tsv", {f"q{i}": f"d{i}" for i in range(30)})
    judged.write_text(judged.read_text() + "bare\td0\t0\n")
    ranking = {f"q{i}": [(f"d{i}", 2.0), ("x", 1.0)] for i in range(30)} | {"bare": [("d0", 1.0)]}
    a, b = run_file(tmp_path / "a.run", ranking), run_file(tmp_path / "b.run", ranking)
    (line,) = compare_runs([a, b], judged)
    assert (line.n, line.score) == (31, pytest.approx(30 / 31))
    assert "without any relevant document, so 0 in every run: 1 of 31 judged queries (bare)" in line.note


def test_a_pair_is_compared_on_its_own_queries(tmp_path):
    """What a third run lacks changes neither n nor p of the first two."""
    judged = qrels(tmp_path / "q.tsv", {f"q{i}": f"d{i}" for i in range(20)})
    first = {f"q{i}": [(f"d{i}", 2.0), ("x", 1.0)] for i in range(20)}
    second = {q: [("x", 2.0), (found[0][0], 1.0)] if i % 3 else found for i, (q, found) in enumerate(first.items())}
    third = dict(list(first.items())[:12])
    a, b, c = (run_file(tmp_path / f"{n}.run", r) for n, r in (("a", first), ("b", second), ("c", third)))
    alone, beside = compare_runs([a, b], judged)[0], compare_runs([a, b, c], judged)
    assert [(line.design, line.n, line.gaps) for line in beside] == [("b", 20, 0), ("c", 12, 8)]
    assert beside[0].p_value == alone.p_value
    assert beside[1].difference_with_zeros == pytest.approx(-8 / 20)
    assert "left out because one of the two lacks them: 8 of 20 queries" in beside[1].note
    assert "c has 60.00, a 100.00, a difference of −40.00 points" in beside[1].note


def test_systems_keep_their_full_names(tmp_path):
    judged = qrels(tmp_path / "q.tsv", {f"q{i}": f"d{i}" for i in range(3)})
    ranking = {f"q{i}": [(f"d{i}", 1.0)] for i in range(3)}
    paths = [run_file(tmp_path / name, ranking) for name in ("x.test", "x.trunc", "bm25.v2.run", "m.seed1.run")]
    (tmp_path / "other").mkdir()
    paths.append(run_file(tmp_path / "other" / "x.test", ranking))
    found = read_trec(paths, judged).frame.filter(pl.col("item_id").is_null())
    names = [f"{tmp_path.name}/x.test", "x.trunc", "bm25.v2", "m", "other/x.test"]
    assert found["design"].to_list() == names
    assert found["seed"].to_list() == [0, 0, 0, 1, 0]


def test_a_query_among_its_own_results_is_reported(tmp_path):
    judged = qrels(tmp_path / "q.tsv", {f"q{i}": f"d{i}" for i in range(4)})
    without = {f"q{i}": [(f"d{i}", 1.0)] for i in range(4)}
    own = {query: [(query, 2.0), *found] for query, found in without.items()}
    (line,) = compare_runs([run_file(tmp_path / "a.run", without), run_file(tmp_path / "b.run", own)], judged)
    assert "b.run: 4 of 4 queries are among their own results (q0, q1, q2, …)" in line.note


@pytest.mark.shared
@pytest.mark.parametrize(
    ("first", "second", "judged", "metric", "expected"),
    [
        ("01-tied-scores/base.run", "01-tied-scores/tied.run", "01-tied-scores/q.qrels", "ndcg_at_10", 0.0),
        ("04-tiny-score-gaps/wide.run", "04-tiny-score-gaps/tiny.run", "04-tiny-score-gaps/q.qrels", "mrr", 0.0),
        ("05-ids-with-blanks/b.run", "05-ids-with-blanks/a.run", "05-ids-with-blanks/q.tsv", "ndcg_at_10", 0.36907),
        ("05-ids-with-blanks/b_.run", "05-ids-with-blanks/a_.run", "05-ids-with-blanks/q_.tsv", "ndcg_at_10", 0.36907),
        (
            "02-query-is-a-document/noself.run",
            "02-query-is-a-document/withself.run",
            "02-query-is-a-document/q.tsv",
            "ndcg_at_10",
            -0.36907,
        ),
    ],
)
def test_the_cases_of_others(first, second, judged, metric, expected, shared):
    cases = shared / "cases"
    (line,) = compare_runs([cases / first, cases / second], cases / judged, metric=metric)
    assert line.difference == pytest.approx(expected, abs=1e-5)
    assert ("tied scores in 8 of 8" in line.note) == first.startswith("01")
    assert ("withself.run: 12 of 12 queries are among their own results" in line.note) == first.startswith("02")


def test_compressed_runs_and_other_encodings(tmp_path):
    run, _ = trec(tmp_path)
    packed = tmp_path / "packed.run.gz"
    packed.write_bytes(gzip.compress(run.read_bytes()))
    frame = read_trec([run, packed], tmp_path / "q.tsv").frame.filter(pl.col("item_id").is_null())
    assert frame["design"].to_list() == ["a", "packed"]
    assert frame["score"].n_unique() == 1
    run.write_bytes("q1 Q0 Café 1 2.0 x\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.run, line 1: not UTF-8 text; it looks like Windows-1252"):
        read_trec([run], tmp_path / "q.tsv")


def test_the_command_shows_both_means_in_points(tmp_path):
    judged = qrels(tmp_path / "q.tsv", {f"q{i}": f"d{i}" for i in range(4)})
    a = run_file(tmp_path / "a.run", {f"q{i}": [("x", 2.0), (f"d{i}", 1.0)] for i in range(4)})
    b = run_file(tmp_path / "b.run", {f"q{i}": [(f"d{i}", 2.0)] for i in range(3)})
    shown = CliRunner().invoke(app, ["compare", str(a), str(b), "--qrels", str(judged)], catch_exceptions=False).stdout
    assert re.search(r"q +ndcg_at_10 +b +a +100\.00 +63\.09 +\+36\.91", shown)
    assert "b has 75.00, a 63.09, a difference of +11.91 points" in " ".join(shown.split())
