"""The long table: what is read, what is refused and how it is said."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from poolwise.errors import DataError
from poolwise.files import write_atomic
from poolwise.verdicts import readers
from poolwise.verdicts.table import main_scores, table

HEADER = "design,seed,task,task_type,metric,score\n"


def csv(tmp_path: Path, body: str, header: str = HEADER) -> Path:
    path = tmp_path / "scores.csv"
    path.write_text(header + body, encoding="utf-8")
    return path


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        readers.read(path)
    return str(caught.value)


def test_reads_a_csv_with_the_required_columns_only(tmp_path):
    frame = readers.read(csv(tmp_path, 'm1,0,STS12,STS,cosine_spearman,0.5\n"m,2",1,STS12,STS,cosine_spearman,-0.1\n'))
    assert frame["design"].to_list() == ["m1", "m,2"]
    assert frame["seed"].to_list() == [0, 1]
    assert frame["score"].to_list() == [0.5, -0.1]  # a correlation may be negative
    assert frame["item_id"].to_list() == frame["step"].to_list() == [None, None]


def test_blank_lines_spaces_and_a_byte_order_mark_do_not_matter(tmp_path):
    frame = readers.read(
        csv(tmp_path, "\n m1 ,0,A,STS,ap,0.5\n\n", header="\ufeff" + HEADER.replace(",seed", ", seed"))
    )
    assert frame.select("design", "seed", "score").rows() == [("m1", 0, 0.5)]


def test_missing_columns_are_named_with_the_nearest_guess(tmp_path):
    message = refused(csv(tmp_path, "m1,0,A,STS,0.5\n", header="designs,seed,task,task_type,score\n"))
    assert "'design' is missing; did you mean 'designs'?" in message
    assert "'metric' is missing" in message


def test_every_mistake_is_told_at_once_with_its_line(tmp_path):
    lines = ["m1,0,A,STS,ap,0.5", ",0,B,STS,ap,0.5", "m1,one,C,STS,ap,0.5"]
    lines += ["m1,0,D,STS,ap,high", "m1,0,E,STS,ap,", "m1,0,F,STS,ap,1.7"]
    message = refused(csv(tmp_path, "\n".join(lines)))
    assert "scores.csv" in message
    assert "design is empty: line 3" in message
    assert "seed must be a whole number: line 4 ('one')" in message
    assert "score is not a number: line 5 ('high')" in message
    assert "score is empty: line 6" in message
    assert "score must lie between 0 and 1 (a correlation: −1 and 1): line 7 ('1.7')" in message


def test_percentages_are_recognised(tmp_path):
    message = refused(csv(tmp_path, "m1,0,A,STS,ap,83.0\nm2,0,A,STS,ap,84.1\n"))
    assert "they look like percentages: divide every score by 100" in message


def test_negative_accuracy_is_refused_negative_correlation_is_not(tmp_path):
    assert "line 2 ('-0.1')" in refused(csv(tmp_path, "m1,0,A,Classification,accuracy,-0.1\n"))
    assert readers.read(csv(tmp_path, "m1,0,A,STS,pearson,-0.1\n")).height == 1


def test_duplicates_and_tasks_of_two_types_are_refused(tmp_path):
    message = refused(csv(tmp_path, "m1,0,A,STS,ap,0.5\nm1,0,A,STS,ap,0.6\nm2,0,A,Retrieval,ap,0.6\n"))
    assert "more than once: line 2 ('A'), line 3 ('A')" in message
    assert "task 'A' has 2 values of task_type: 'Retrieval', 'STS'; keep one" in message


def test_many_mistakes_of_one_kind_are_counted(tmp_path):
    message = refused(csv(tmp_path, "".join(f"m1,0,T{i},STS,ap,x\n" for i in range(20))))
    assert "line 6 ('x') and 15 more" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("scores.csv", b"", "the file is empty"),
        ("scores.csv", HEADER.encode(), "a header, but no scores"),
        ("scores.csv", HEADER.replace(",", ";").encode(), "is the file comma-separated?"),
        ("scores.csv", HEADER.encode() + b"m1,0,A,STS,ap,0.5,extra\n", "not a readable CSV file"),
        ("scores.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("scores.xlsx", b"PK", "unknown file type '.xlsx'; allowed: .csv, .tsv, .parquet"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path / name)


def test_a_file_that_is_not_there_gets_a_guess(tmp_path):
    csv(tmp_path, "m1,0,A,STS,ap,0.5\n")
    assert "did you mean 'scores.csv'?" in refused(tmp_path / "score.csv")


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv"])
def test_a_written_table_is_read_unchanged(tmp_path, name):
    frame = table([{"design": "m1", "seed": 0, "task": "A", "task_type": "STS", "metric": "ap", "score": 0.1 + 0.2}])
    separator = {"separator": "\t"} if name.endswith("tsv") else {}
    getattr(frame, "write_parquet" if name.endswith("parquet") else "write_csv")(tmp_path / name, **separator)
    assert readers.read(tmp_path / name).equals(frame)


def test_parquet_mistakes_name_the_row(tmp_path):
    frame = pl.DataFrame(
        {"design": ["a"], "seed": [0.5], "task": ["A"], "task_type": ["x"], "metric": ["ap"], "score": [0.5]}
    )
    frame.write_parquet(tmp_path / "t.parquet")
    assert "seed must be a whole number: row 1 (0.5)" in refused(tmp_path / "t.parquet")


def test_main_scores_are_those_of_each_runs_last_step(tmp_path):
    common = {"design": "m1", "seed": 0, "task": "A", "task_type": "STS", "metric": "ap"}
    steps = [{**common, "step": step, "score": step / 1000} for step in (250, 500)]
    rows = [*steps, {**common, "step": 500, "score": 0.9, "item_id": "q1"}]
    rows += [{**common, "design": "bm25", "step": None, "score": 0.3}]
    assert sorted(main_scores(table(rows))["score"]) == [0.3, 0.5]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def mteb_file(folder: Path, task: str, scores: dict, **other) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = {split: [{"languages": ["eng-Latn"], **row} for row in found] for split, found in scores.items()}
    content = {
        "task_name": task,
        "dataset_revision": "r",
        "mteb_version": "2.12.7",
        "evaluation_time": 3.0,
        "scores": rows,
    }
    (folder / f"{task}.json").write_text(json.dumps({**content, **other}))


def test_mteb_folders_give_designs_seeds_types_and_main_scores(tmp_path):
    sts = {"main_score": 0.72369, "cosine_spearman": 0.72369, "spearman": 0.723685, "hf_subset": "default"}
    for revision, score in (("aaa", 0.5), ("bbb", 0.6)):
        folder = tmp_path / "results" / "org__model" / revision
        mteb_file(folder, "STS12", {"test": [sts]})
        rows = [{"main_score": score, "accuracy": score, "hf_subset": "en"}]
        mteb_file(folder, "AmazonCounterfactualClassification", {"test": rows, "train": rows})
        mteb_file(folder, "my-faq", {"test": [{"main_score": 0.4, "ndcg_at_10": 0.4, "hf_subset": "default"}]})
        (folder / "model_meta.json").write_text('{"name": "org/model"}')
    external = {"main_score": 0.9, "cosine_spearman": 0.9, "hf_subset": "default"}
    mteb_file(tmp_path / "results" / "org__model" / "external", "STS12", {"test": [external]})
    frame = readers.read(tmp_path)
    assert frame["design"].unique().to_list() == ["org/model"]
    assert frame.sort("task", "seed").select(
        "task", "task_type", "metric", "split", "subset", "seed", "score"
    ).rows() == [
        ("AmazonCounterfactualClassification", "Classification", "accuracy", "test", "en", 0, 0.5),
        ("AmazonCounterfactualClassification", "Classification", "accuracy", "test", "en", 1, 0.6),
        ("STS12", "STS", "cosine_spearman", "test", "default", 0, 0.72369),
        ("STS12", "STS", "cosine_spearman", "test", "default", 1, 0.72369),
        ("my-faq", "Retrieval", "ndcg_at_10", "test", "default", 0, 0.4),
        ("my-faq", "Retrieval", "ndcg_at_10", "test", "default", 1, 0.4),
    ]
    assert set(frame["revision"]) == {"aaa", "bbb"}


def test_revisions_without_a_common_task_are_parts_of_one_run(tmp_path):
    for revision, task in (("aaa", "STS12"), ("bbb", "STS13"), ("ccc", "STS12")):
        row = {"main_score": 0.5, "cosine_spearman": 0.5, "hf_subset": "default"}
        mteb_file(tmp_path / "m" / revision, task, {"test": [row]})
    frame = readers.read(tmp_path)
    assert sorted(frame.select("revision", "seed").rows()) == [("aaa", 0), ("bbb", 0), ("ccc", 1)]


def test_a_part_of_an_aggregate_task_is_not_counted_twice(tmp_path):
    row = {"main_score": 0.5, "ndcg_at_10": 0.5, "hf_subset": "default"}
    for task in ("CQADupstackRetrieval", "CQADupstackTexRetrieval"):
        mteb_file(tmp_path / "m" / "r", task, {"test": [row]})
    assert readers.read(tmp_path)["task"].to_list() == ["CQADupstackRetrieval"]


def test_broken_mteb_files_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="contains no mteb results"):
        readers.read(tmp_path)
    mteb_file(tmp_path / "m" / "r", "STS12", {"test": [{"main_score": "x", "hf_subset": 7}]})
    with pytest.raises(DataError, match=r"STS12\.json: mteb cannot read it"):
        readers.read(tmp_path)


def trec(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "q.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td3\t1\nq2\td1\t2\nq3\td1\t0\n")
    (tmp_path / "a.run").write_text("q1 Q0 d1 1 3.0 a\nq1 Q0 d2 2 2.0 a\nq1 Q0 d3 3 1.0 a\n")
    (tmp_path / "b.seed2.run").write_text("q1 Q0 d2 1 3.0 b\nq1 Q0 d3 2 2.0 b\nq2 Q0 d1 1 9.0 b\n")
    return tmp_path / "a.run", tmp_path / "b.seed2.run"


def test_trec_runs_are_scored_per_query_and_a_missing_query_scores_zero(tmp_path):
    frame = readers.read_trec(trec(tmp_path), tmp_path / "q.tsv")
    items = {(d, q): s for d, q, s in frame.drop_nulls("item_id").select("design", "item_id", "score").iter_rows()}
    third = 1 / math.log2(3)
    by_hand = (third + 1 / math.log2(4)) / (1 + third)  # relevant at ranks 2 and 3 of an ideal 1 and 2
    assert items == {
        ("a", "q1"): pytest.approx(by_hand, abs=1e-9), ("a", "q2"): 0.0, ("b", "q1"): 1.0, ("b", "q2"): 1.0,
    }  # fmt: skip
    means = frame.filter(pl.col("item_id").is_null()).select("design", "seed", "score").rows()
    assert means == [("a", 0, pytest.approx(by_hand / 2)), ("b", 2, 1.0)]


def test_trec_mistakes_name_file_and_line(tmp_path):
    run, _ = trec(tmp_path)
    with pytest.raises(DataError, match=r"metric 'ndgc_at_10' is unknown.*did you mean 'ndcg_at_10'"):
        readers.read_trec([run], tmp_path / "q.tsv", "ndgc_at_10")
    (tmp_path / "bad.run").write_text("q1 Q0 d1 1 3.0 a\nq1 Q0 d2\n")
    with pytest.raises(DataError, match=r"bad\.run, line 2: 'q1 Q0 d2' is not"):
        readers.read_trec([tmp_path / "bad.run"], tmp_path / "q.tsv")
    (tmp_path / "bad.tsv").write_text("q1 0 d1 yes\n")
    with pytest.raises(DataError, match=r"bad\.tsv, line 1: 'q1 0 d1 yes' is not"):
        readers.read_trec([run], tmp_path / "bad.tsv")
    with pytest.raises(DataError, match="more than once"):
        readers.read_trec([run, run], tmp_path / "q.tsv")


@pytest.mark.parametrize("grade", ["0.5", "nan", "inf", "1e9"])
def test_a_grade_that_is_no_whole_number_is_refused(grade, tmp_path):
    run, _ = trec(tmp_path)
    (tmp_path / "bad.tsv").write_text(f"q1 0 d1 1\n\nq2 0 d1 {grade}\n")
    with pytest.raises(DataError, match=rf"bad\.tsv, line 3: grade '{grade}' is not a whole number from .* scale the"):
        readers.read_trec([run], tmp_path / "bad.tsv")


def test_a_judgement_may_repeat_but_not_differ(tmp_path):
    run, _ = trec(tmp_path)
    judged = tmp_path / "twice.tsv"
    judged.write_text("q1 0 d2 1\nq1 0 d1 -1\nq1 0 d2 1.0\n")  # d2 at rank 2, where one relevant document counts once
    frame = readers.read_trec([run], judged)
    assert frame.drop_nulls("item_id")["score"].to_list() == [pytest.approx(1 / math.log2(3))]
    judged.write_text("q1 0 d2 1\nq2 0 d2 0\nq1 0 d2 0\n")
    expected = (
        r"twice\.tsv, line 3: grade 0 for query 'q1' and document 'd2' differs from 1 in an earlier line; .* keep one"
    )
    with pytest.raises(DataError, match=expected):
        readers.read_trec([run], judged)


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
        readers.read_trec([bad], tmp_path / "q.tsv")


def test_importing_results_and_comparison_needs_no_heavy_library():
    heavy = (
        "{'torch', 'mteb', 'transformers', 'sentence_transformers', 'polars', 'matplotlib', 'pandas', 'pytrec_eval'}"
    )
    code = f"import sys, poolwise.verdicts.readers, poolwise.reports.words; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
