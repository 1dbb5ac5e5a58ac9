"""A few inputs for each reader, as `make fuzz` runs them for longer, and what the fuzzer itself would notice."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from pathlib import Path

import pytest

from fuzz.run import FOUND, READ, REFUSED, _hang, attempt, input_of
from fuzz.targets import TARGETS, Target
from poolwise.errors import DataError

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
    for number in range(INPUTS):
        outcome, why = attempt(target, tmp_path, input_of(target, 7, number))
        assert outcome != FOUND, f"input {number}: {why}"


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
