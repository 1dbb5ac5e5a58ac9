"""The long table: what is read, what is refused and how it is said."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from poolwise.errors import DataError, StatisticsError
from poolwise.files import write_atomic
from poolwise.verdicts import readers
from poolwise.verdicts.table import items_of, main_scores, table

HEADER = "design,seed,task,task_type,metric,score\n"


def csv(tmp_path: Path, body: str, header: str = HEADER) -> Path:
    path = tmp_path / "scores.csv"
    path.write_text(header + body, encoding="utf-8")
    return path


def read(path: Path) -> pl.DataFrame:
    return readers.read(path).frame


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        readers.read(path)
    return str(caught.value)


def test_reads_a_csv_with_the_required_columns_only(tmp_path):
    frame = read(csv(tmp_path, 'm1,0,STS12,STS,cosine_spearman,0.5\n"m,2",1,STS12,STS,cosine_spearman,-0.1\n'))
    assert frame["design"].to_list() == ["m1", "m,2"]
    assert frame["seed"].to_list() == [0, 1]
    assert frame["score"].to_list() == [0.5, -0.1]  # a correlation may be negative
    assert frame["item_id"].to_list() == frame["step"].to_list() == [None, None]


def test_blank_lines_spaces_and_a_byte_order_mark_do_not_matter(tmp_path):
    frame = read(csv(tmp_path, "\n m1 ,0,A,STS,ap,0.5\n\n", header="\ufeff" + HEADER.replace(",seed", ", seed")))
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
    assert "they look like percentages" in refused(csv(tmp_path, "m1,0,A,STS,ap,100\nm2,0,A,STS,ap,100\n"))
    for score in ("101", "0.5\nm2,0,A,STS,ap,3\nm3,0,A,STS,ap,0.4"):
        assert "they look like percentages" not in refused(csv(tmp_path, f"m1,0,A,STS,ap,{score}\n"))


def test_hidden_characters_and_tasks_without_items_are_named(tmp_path):
    message = refused(csv(tmp_path, "m1,0,A\x1b[2J,STS,ap,0.5\n"))
    assert "task contains a hidden character" in message
    rows = "".join(f"m1,0,T{i:02},STS,ap,0.5\n" for i in range(21))
    frame = read(csv(tmp_path, rows))
    with pytest.raises(StatisticsError, match="the scores contain no items"):
        items_of(frame, "T00")
    items = pl.concat([frame, frame.with_columns(pl.lit("q1").alias("item_id"))], how="diagonal_relaxed")
    assert items_of(items, "T03")["task"].to_list() == ["T03"]
    with pytest.raises(StatisticsError, match=r"'U' is not in the scores; tasks with items: T00, .*, T19 …"):
        items_of(items, "U")
    with pytest.raises(StatisticsError, match=r"'T20' has no per-item scores; tasks with items: T00, .*, T19(;|$)"):
        items_of(items.filter(pl.col("item_id").is_null() | (pl.col("task") != "T20")), "T20")


def test_negative_accuracy_is_refused_negative_correlation_is_not(tmp_path):
    assert "line 2 ('-0.1')" in refused(csv(tmp_path, "m1,0,A,Classification,accuracy,-0.1\n"))
    assert read(csv(tmp_path, "m1,0,A,STS,pearson,-0.1\n")).height == 1


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
        ("scores.csv", HEADER.replace(",", " ").encode(), "is the file comma-separated?"),
        ("scores.csv", HEADER.encode("utf-16"), "not UTF-8 text; it looks like UTF-16"),
        ("scores.csv.gz", b"no", "cannot be read"),
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


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ";"), ("t.csv", "\t"), ("t.tsv", ","), ("t.csv.gz", ",")])
def test_tables_of_other_separators_and_compressed_ones_are_read(tmp_path, name, separator):
    text = (HEADER + "m1,0,A,STS,ap,0.5\n").replace(",", separator).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert read(tmp_path / name).select("design", "seed", "score").rows() == [("m1", 0, 0.5)]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv"])
def test_a_written_table_is_read_unchanged(tmp_path, name):
    frame = table([{"design": "m1", "seed": 0, "task": "A", "task_type": "STS", "metric": "ap", "score": 0.1 + 0.2}])
    separator = {"separator": "\t"} if name.endswith("tsv") else {}
    getattr(frame, "write_parquet" if name.endswith("parquet") else "write_csv")(tmp_path / name, **separator)
    assert read(tmp_path / name).equals(frame)


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


def test_importing_results_and_comparison_needs_no_heavy_library():
    heavy = (
        "{'torch', 'mteb', 'transformers', 'sentence_transformers', 'polars', 'matplotlib', 'pandas', 'pytrec_eval'}"
    )
    code = f"import sys, poolwise.verdicts.readers, poolwise.reports.words; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_design_task_and_score_are_enough(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("design,task,score\nm1,A,.5\nm1,B,.6\nm2,A,.55\nm2,B,.61\n")
    found = readers.read(path)
    assert found.frame.select("design", "seed", "task", "task_type", "metric").rows()[3] == (
        "m2",
        0,
        "B",
        "all",
        "score",
    )
    assert any("no column seed, task_type, metric: every design was run once" in note for note in found.notes)


def test_a_table_with_a_column_for_each_design_is_read(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_text("task;task_type;m1;m2\nA;STS;.5;.55\nB;STS;.6;.61\n")
    found = readers.read(path)
    rows = found.frame.select("design", "task", "task_type", "score").sort("design", "task").rows()
    assert rows == [
        ("m1", "A", "STS", 0.5),
        ("m1", "B", "STS", 0.6),
        ("m2", "A", "STS", 0.55),
        ("m2", "B", "STS", 0.61),
    ]
    assert any("one column for each design: m1, m2" in note for note in found.notes)
