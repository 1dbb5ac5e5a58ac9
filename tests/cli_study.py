"""A tiny study, its data and its base models, and the program called in this process or in one of its own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poolwise.cli import main
from tiny import tiny_folder

Invoke = Callable[..., tuple[int, str, str]]
WORDS = ("cat", "dog", "river", "book", "water", "morning", "people", "home", "mat", "walk")
PROGRAM = [sys.executable, "-c", "from poolwise.cli import main; main()"]
STUDY = """
name = "tiny"
baseline = "m1"
seeds = [0, 1]
tasks = ["./sts", "./sts-2", "./topics"]
references = ["tfidf"]
controls = false
evaluate_at = [1.0]

[recipe]
base_model = "./llama"
dataset = "pairs.jsonl"
steps = 2
batch_size = 4
warmup_steps = 0
max_length = 32
negatives = 1

[[designs]]
preset = "m1"

[[designs]]
preset = "m4"
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pair(i: int) -> dict[str, str]:
    a, b, c = WORDS[i % 10], WORDS[i % 7], WORDS[(i + 3) % 10]
    return {"query": f"the {a} {b} {i}", "positive": f"a {a} and {b} {i}", "negative": f"no {c} {i}"}


def write_data(folder: Path) -> None:
    """24 training pairs, two STS folders of 10 pairs, 18 labelled texts."""
    write_rows(folder / "pairs.jsonl", [pair(i) for i in range(24)])
    for name, shift in (("sts", 0), ("sts-2", 4)):
        rows = [(WORDS[i], WORDS[(i * 3 + shift) % 10], i % 5) for i in range(10)]
        scored = [{"sentence1": f"one {a} {shift}", "sentence2": f"two {b} {shift}", "score": s} for a, b, s in rows]
        write_rows(folder / name / "test.jsonl", scored)
    texts = [{"text": f"{WORDS[i % 2]} {WORDS[i % 9]} number {i}", "label": WORDS[i % 2]} for i in range(36)]
    write_rows(folder / "topics" / "train.jsonl", texts[:18])
    write_rows(folder / "topics" / "test.jsonl", texts[18:])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that takes both modes (64 positions), and one that ignores `bidirectional`."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_folder(folder, "llama")
    tiny_folder(folder, "gpt_neo")
    return folder


@pytest.fixture
def here(tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: data, both bases, no study yet."""
    write_data(tmp_path)
    for base in ("llama", "gpt_neo"):
        (tmp_path / base).symlink_to(bases / base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_study(folder: Path, *changes: tuple[str, str]) -> Path:
    text = STUDY
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Calls the program's entry point in this process; gives exit code, stdout and stderr, caught at descriptors."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["poolwise", *map(str, args)])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def program(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    done = subprocess.run([*PROGRAM, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def snapshot(folder: Path) -> dict[str, str]:
    """Every file (not the locks) with its hash."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(invoke: Invoke, folder: Path, *args: object) -> str:
    """The message of a refusal: code 2, nothing on stdout, nothing on disk changed."""
    before = snapshot(folder)
    code, out, err = invoke(*args)
    assert (code, out) == (2, ""), (code, out, err)
    assert snapshot(folder) == before
    return err
