"""Tokens and passwords of the environment in none of the files that poolwise writes, whatever ends the process."""

from __future__ import annotations

import errno
import html
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from poolwise.errors import StudyError, redact, redact_stream
from poolwise.files import read_json, write_any_json, write_atomic, write_json
from poolwise.runs.worker import output_to
from poolwise.study.study import Study
from test_trust import RAW

KILLED = """
import os, signal
from pathlib import Path
from poolwise.runs.worker import output_to
with output_to(Path("log.txt")):
    os.write(1, b"key s3cret-s3cret\\nprogress 50 %\\r")
    os.write(2, b"last words: s3cret-")
    os.write(2, b"s3cret")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_log_of_a_killed_process_is_whole_and_without_secrets(tmp_path: Path) -> None:
    environment = {**os.environ, "SERVICE_SECRET": "s3cret-s3cret"}
    ended = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    expected = "key [secret]\nprogress 50 %\rlast words: [secret]"
    limit = time.monotonic() + 60
    while (text := (tmp_path / "log.txt").read_bytes().decode()) != expected and time.monotonic() < limit:
        assert "s3cret" not in text
        time.sleep(0.05)
    assert text == expected


def test_a_log_is_written_while_its_process_runs(tmp_path: Path) -> None:
    with output_to(tmp_path / "log.txt"):
        os.write(1, b"first\n")
        limit = time.monotonic() + 60
        while (tmp_path / "log.txt").read_text() != "first\n":
            assert time.monotonic() < limit
            time.sleep(0.02)


def test_a_secret_is_not_cut_in_two_by_a_line_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_PASSWORD", "s3cret-s3cret")
    written = io.BytesIO()
    redact_stream(io.BytesIO(b"x" * 131_060 + b"s3cret-s3cret" * 20_000), written)
    assert written.getvalue() == b"x" * 131_060 + b"[secret]" * 20_000


def test_a_full_disk_does_not_stop_those_who_print() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "full")

    source = io.BytesIO(b"line\n" * 50_000)
    redact_stream(source, Full())
    assert source.read() == b""


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("MY_TOKEN", "abcdefgh", False), ("DB_PASSWORD", "12345678", False), ("AWS_ACCESS_KEY", "w/K7bPxR", False),
        ("SIGNING_KEY", "ab12-cd34", False), ("SORT_KEY", "embeddings", True), ("CACHE_KEY", "12345678", True),
        ("SSL_KEY", "/etc/ssl/key1.pem", True), ("A_TOKEN", "short", True), ("TOKENIZERS_PARALLELISM", "ffalsee", True),
    ],
)  # fmt: skip
def test_secrets_are_known_by_the_names_of_their_variables(
    name: str, value: str, kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, value)
    write_json(tmp_path / "run.json", {"base": f"x{value}y"})
    write_any_json(tmp_path / "config.json", {value: 1})
    write_atomic(tmp_path / "card.md", f"<b>{value}</b>")
    assert read_json(tmp_path / "run.json") == {"base": f"x{value if kept else '[secret]'}y"}
    assert all((value in path.read_text()) == kept for path in tmp_path.iterdir())


def test_secrets_are_found_as_files_and_addresses_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    value = 'a"é<&/9\nsecond-line-of-it'
    monkeypatch.setenv("PRIVATE_KEY", value)
    for text in (json.dumps({"a": value}), html.escape(value), quote(value, ""), "prefix second-line-of-it"):
        assert "second" not in redact(text)


def test_a_study_that_contains_a_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Study.parse({**RAW, "output": "runs/s3cret-s3cret"})
    monkeypatch.setenv("HUB_TOKEN", "s3cret-s3cret")
    with pytest.raises(StudyError, match="value of the environment variable HUB_TOKEN; remove it there"):
        Study.parse({**RAW, "output": "runs/s3cret-s3cret"})
