"""A few inputs for each reader, as `make fuzz` runs them for longer, and what the fuzzer itself would notice."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from pathlib import Path

import pytest

from fuzz.inputs import sealed_again
from fuzz.run import FOUND, READ, REFUSED, Board, _hang, attempt, fuzz, input_of
from fuzz.targets import MTEB, RUN, SCORES, TARGETS, TOML, Target, plain, sealed, torch_saved
from poolwise.data.own_tasks import read_folder
from poolwise.data.pairs import open_source
from poolwise.data.tasks import resolve_tasks
from poolwise.errors import DataError, Mistakes, PoolwiseError
from poolwise.files import user_path
from poolwise.runs import layout
from poolwise.study.design import Design
from poolwise.verdicts import readers, trec
from poolwise.verdicts.table import table

INPUTS = 12


@pytest.fixture(autouse=True)
def _watched():
    before = signal.signal(signal.SIGPROF, _hang)
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_reader_reads_or_refuses(target: Target, tmp_path: Path) -> None:
    attempt(target, tmp_path, input_of(target, 7, 0))  # the libraries that it loads are memory, too
    for number in range(INPUTS):
        outcome, why = attempt(target, tmp_path, input_of(target, 7, number))
        assert outcome != FOUND, f"input {number}: {why}"


LONG = "x" * 5000
RESULT = MTEB["scores"]["test"][0]
FINDINGS = [
    ("study file", TOML.replace('"s"', f'"{LONG}"', 1).encode()),
    ("names of files", LONG.encode()),
    ("names of files", b"~no-such-user/x"),
    ("names of files", b"~a\0b"),
    ("names of files", b"a/b\0c/d"),
    ("run.json", sealed_again(sealed({**RUN, "base": {"path": LONG, "local": True, "identity": "x"}}))),
    ("mteb result", plain({**MTEB, "dataset_revision": "\ud800"})),
    ("mteb result", plain({**MTEB, "scores": {"test": [{**RESULT, "hf_subset": "\udfff"}]}})),
    ("mteb result", plain({**MTEB, "mteb_version": "9" * 5000})),
    ("mteb model_meta", b"[" * 5000),
    ("comparison", SCORES.replace("m2", "m" + "9" * 5000).encode()),
    ("TREC judgements", b"q1 0 d1 1\nq2 0 d2 -2\n"),
    ("weights, torch", torch_saved(False).replace(b"latents", b"\xff" * 7)),
]


@pytest.mark.parametrize(("name", "data"), FINDINGS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(FINDINGS)])
def test_what_the_fuzzer_found_is_read_or_refused(name: str, data: bytes, tmp_path: Path) -> None:
    target = next(target for target in TARGETS if target.name == name)
    outcome, why = attempt(target, tmp_path, data)
    assert outcome != FOUND, why


def test_a_path_that_cannot_exist_is_refused_and_others_are_expanded(tmp_path: Path) -> None:
    assert user_path("a/b", tmp_path) == tmp_path / "a" / "b"
    assert user_path("~/a", tmp_path) == Path.home() / "a"
    assert user_path("~no-such-user/a", tmp_path) == tmp_path / "~no-such-user" / "a"
    for name in (LONG, "a\0b"):
        with pytest.raises(DataError, match="cannot be the name of a file or folder"):
            user_path(name)


def test_rows_that_no_table_can_hold_are_refused() -> None:
    row = {"design": "a", "seed": 0, "task": "t", "task_type": "x", "metric": "ap", "score": 0.5}
    assert table([row]).height == 1
    for change in ({"score": 10**400}, {"design": "\ud800"}, {"design": object()}, {"score": [1]}, {1: 2}):
        with pytest.raises(DataError, match=r"rows are no table|holds values of type"):
            table([{**row, **change}])


def test_a_name_that_makes_too_long_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than 200 bytes"):
        Design(name="中" * 100, attention="causal", pooling="mean")
    (tmp_path / "test.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,2\n")
    (tmp_path / "task.toml").write_text(f'name = "{"n" * 201}"\n')
    with pytest.raises(PoolwiseError, match=r"longer than 200 bytes; set name in task\.toml"):
        read_folder(tmp_path)


def test_labels_and_columns_of_thousands_of_digits(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "t{i}", "label": "{"12"[i % 2] * 5000}"}}\n' for i in range(8))
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(rows)
    (task,) = resolve_tasks([str(tmp_path)], tmp_path)
    task.mteb.load_data()
    assert sorted(set(task.mteb.dataset["test"]["label"])) == [0, 1]
    (tmp_path / "a.jsonl").write_text(f'{{"query": "q", "positive": "p", "negative_{"9" * 5000}": "n"}}\n')
    (source,) = open_source(str(tmp_path / "a.jsonl"), "train", tmp_path)
    mistakes = Mistakes("a")
    assert list(source.records(mistakes)) == []
    with pytest.raises(DataError, match=r"negative_9+"):
        mistakes.check()
    with pytest.raises(ValueError, match="attention"):
        Design(name="d", attention="bidirectional_last_" + "9" * 5000, pooling="mean")


def test_a_surrogate_in_an_mteb_result_is_reported_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m" / "org__model" / "rev" / "STS12.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(plain({**MTEB, "dataset_revision": "\ud800"}))
    with pytest.raises(DataError, match=r"STS12\.json .*unpaired surrogate"):
        readers.read(tmp_path / "m")


def test_negative_grades_are_not_relevant(tmp_path: Path) -> None:
    """trec_eval wrote beyond its memory for a query that has negative grades alone."""
    (tmp_path / "a.run").write_text("q1 Q0 d1 1 0.9 x\nq1 Q0 d3 2 0.8 x\nq2 Q0 d2 1 0.7 x\n")
    scores = []
    for grade in (0, -1, -2, -1000):
        (tmp_path / "qrels.txt").write_text(f"q1 0 d1 {grade}\nq1 0 d3 2\nq2 0 d2 {grade}\n")
        scores.append(trec.read_trec([tmp_path / "a.run"], tmp_path / "qrels.txt").frame["score"].to_list())
    assert scores == scores[:1] * 4
    assert scores[0][0] == pytest.approx(0.6309 / 2, abs=1e-4)


def test_a_copy_of_a_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-2.bak", "checkpoint-²"):
        (tmp_path / name).mkdir()
    assert layout.checkpoints(tmp_path) == {2: tmp_path / "checkpoint-2"}


def _misbehave(folder: Path, data: bytes) -> None:
    if data == b"refuse":
        raise DataError("no")
    if data == b"crash":
        raise KeyError("x")
    while data == b"hang":
        time.process_time()


@pytest.mark.parametrize(("data", "outcome"), [(b"", READ), (b"refuse", REFUSED), (b"crash", FOUND), (b"hang", FOUND)])
def test_the_fuzzer_tells_a_refusal_from_a_crash_and_a_hang(data: bytes, outcome: int, tmp_path: Path) -> None:
    assert attempt(Target("bad", "text", (b"",), _misbehave), tmp_path, data)[0] == outcome


def test_the_fuzzer_notices_memory_that_one_input_took_and_gave_back(tmp_path: Path) -> None:
    def take(folder: Path, data: bytes) -> None:
        assert len(bytearray(int(data) << 20)) >= 0

    target = Target("greedy", "text", (b"",), take)
    attempt(target, tmp_path, b"900")  # must not hide what the next one takes
    for size, outcome in (("1200", FOUND), ("10", READ), ("1200", FOUND)):
        assert attempt(target, tmp_path, size.encode())[0] == outcome


def test_the_fuzzer_ends_an_input_that_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.run.STUCK", 1.0)

    def wait_once(folder: Path, data: bytes) -> None:
        if not (tmp_path / "waited").exists():
            (tmp_path / "waited").touch()
            time.sleep(3600)

    board: Board = fuzz([Target("patient", "text", (b"a",), wait_once)], 0, 60, 10**9, each=5)
    assert board.done == 5
    assert list(board.kinds) == [("patient", "no end within 1 s")]
