"""Retrieval in own folders: what people trip over is scored as mteb and BEIR score it, and counted in a note."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import poolwise
from poolwise.cli import main
from poolwise.data.tasks import Task, resolve_tasks
from poolwise.errors import TaskError
from poolwise.runs.check import check
from poolwise.runs.prepare import prepare
from poolwise.scoring.evaluate import evaluate
from poolwise.scoring.references import reference
from poolwise.study.study import Study

SUBJECTS = ["harbour cranes", "winter barley", "copper roofs", "night trains", "salt marshes", "violin varnish"]
DOCUMENTS = [
    {"_id": f"d{i}", "title": "", "text": f"a note on {words} and their care"} for i, words in enumerate(SUBJECTS)
]
QUERIES = [{"_id": f"q{i}", "text": words} for i, words in enumerate(SUBJECTS)]
QRELS = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(len(SUBJECTS))]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def task(folder: Path, corpus: list[dict], qrels: list[dict], queries: list[dict] = QUERIES, toml: str = "") -> Task:
    write(folder / "corpus.jsonl", corpus)
    write(folder / "queries.jsonl", queries)
    write(folder / "qrels" / "test.jsonl", qrels)
    (folder / "task.toml").write_text(f'name = "notes"\n{toml}', encoding="utf-8")
    (found,) = resolve_tasks([str(folder)], folder)
    return found


def scores(found: Task) -> dict[str | None, float]:
    """BM25's NDCG@10 of each query; None: their mean."""
    return {row["item_id"]: row["score"] for row in evaluate(reference("bm25"), [found], identity="bm25")}


def test_a_plain_folder_has_no_notes(tmp_path: Path) -> None:
    found = task(tmp_path, DOCUMENTS, QRELS)
    assert found.notes == ()
    assert scores(found)[None] == 1.0


def test_judged_documents_that_are_not_in_the_corpus_count_as_not_found(tmp_path: Path) -> None:
    qrels = [*QRELS, *({"query-id": f"q{i}", "corpus-id": f"lost-{i}", "score": 1} for i in (0, 1))]
    found = task(tmp_path, DOCUMENTS, qrels)
    assert found.notes == ("notes: 2 judged documents missing from the corpus, so never found ('lost-0' and 'lost-1')",)
    half_found = 1 / (1 + 1 / math.log2(3))
    measured = scores(found)
    assert measured["q0"] == pytest.approx(half_found)
    assert measured[None] == pytest.approx((4 + 2 * half_found) / 6, abs=1e-5)


def test_a_corpus_without_any_judged_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"6 corpus-id\(s\) not in corpus, e\.g\. d0"):
        task(tmp_path, [{**row, "_id": f"{row['_id']}.0"} for row in DOCUMENTS], QRELS)


def test_a_grade_below_zero_means_not_relevant(tmp_path: Path) -> None:
    found = task(tmp_path, DOCUMENTS, [*QRELS, {"query-id": "q0", "corpus-id": "d1", "score": -1}])
    assert found.notes == ("notes: 1 document graded below 0, which means judged and not relevant ('d1')",)
    found.load()
    assert found.split_data("test", "default")["relevant_docs"]["q0"] == {"d0": 1, "d1": 0}
    assert set(scores(found).values()) == {1.0}


def test_empty_documents_and_queries_without_a_relevant_document_are_counted(tmp_path: Path) -> None:
    queries = [*QUERIES, *({"_id": f"x{i}", "text": "what is left"} for i in range(5))]
    found = task(tmp_path, [*DOCUMENTS, {"_id": "blank", "title": "", "text": " "}], QRELS, queries)
    assert found.notes == (
        "notes: 1 empty document ('blank')",
        "notes: 5 queries without a relevant document, left out ('x0', 'x1', 'x2' and 2 more)",
    )
    assert scores(found)[None] == 1.0


def test_queries_that_are_documents(tmp_path: Path) -> None:
    """Off by default, with a note; left out of their own results where the folder asks for it."""
    corpus = [*DOCUMENTS, *({**row, "title": ""} for row in QUERIES)]
    found = task(tmp_path, corpus, QRELS)
    (note,) = found.notes
    assert note.startswith("notes: 6 queries identical to the document of the same id, which is found first; ")
    assert "write ignore_identical_ids = true in task.toml" in note
    assert scores(found)[None] == pytest.approx(1 / math.log2(3), abs=1e-5)  # each finds itself first
    without = task(tmp_path, corpus, QRELS, toml="ignore_identical_ids = true")
    assert without.notes == (
        "notes: 6 queries identical to the document of the same id, which is left out of the results "
        "('q0', 'q1', 'q2' and 3 more)",
    )
    assert scores(without)[None] == 1.0
    assert without.identity != found.identity  # scores of one are not scores of the other


def test_equal_ids_of_different_texts_are_no_reason_to_leave_documents_out(tmp_path: Path) -> None:
    corpus = [{**row, "_id": str(i)} for i, row in enumerate(DOCUMENTS)]
    queries = [{**row, "_id": str(i)} for i, row in enumerate(QUERIES)]
    qrels = [{"query-id": str(i), "corpus-id": str(i), "score": 1} for i in range(6)]
    assert task(tmp_path, corpus, qrels, queries).notes == ()
    (note,) = task(tmp_path, corpus, qrels, queries, "ignore_identical_ids = true").notes
    assert "6 queries with the id of a document of another text, left out of the results; rename one of them" in note


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("ignore_identical_ids = 1", "task.toml: ignore_identical_ids = 1: expected true or false"),
        ('kind = "sts"\nignore_identical_ids = true', "ignore_identical_ids is for retrieval, and kind = 'sts'"),
    ],
)
def test_wrong_retrieval_settings(tmp_path: Path, toml: str, expected: str) -> None:
    with pytest.raises(TaskError, match=expected):
        task(tmp_path, DOCUMENTS, QRELS, toml=toml)


def test_notes_are_printed_by_check_run_and_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    note = task(tmp_path / "mine", [*DOCUMENTS, {"_id": "blank", "text": ""}], QRELS).notes[0]
    raw: dict[str, Any] = {"name": "s", "baseline": "m1", "tasks": ["./mine"], "designs": [{"preset": "m1"}]}
    study = Study.parse({**raw, "recipe": {"steps": 1, "batch_size": 4, "max_length": 64}}, tmp_path)
    assert note in check(study)["data"]
    assert note in prepare(study).notes
    told: list[str] = []
    poolwise.evaluate("bm25", ["./mine"], base_dir=tmp_path, note=told.append)
    assert told == [note]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["poolwise", "evaluate", "bm25", "--tasks", "./mine", "--json"])
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["score"] == 1.0
    assert f"note: {note}" in err
