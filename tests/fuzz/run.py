"""The fuzzer: `python tests/fuzz/run.py --seconds 60`. Prints what each reader did; exits with 1 if anything was found.

Each input belongs to a target (`targets.py`) and is made from `--seed`, the target's name and a number, so that a
finding can be repeated: `--targets "run.json" --first NUMBER --inputs 1`. A finding is

- an exception that is not a PoolwiseError: the command line would end with a traceback,
- more than 2 seconds of processor time, or 60 seconds without an end, as in a wait for what never comes,
- more than 1 GiB of memory,
- the end of the process: libraries written in C and Rust read some of the files.

Targets take turns of a quarter of a second. `--each` is the most inputs of one target: without it the fast readers get
almost all of them.

Engines: `bytes` alters bytes and JSON values at random; `hypothesis` draws values of every type and shrinks what it
finds; `atheris`, if it is installed, is guided by the coverage of the code.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os

if __name__ == "__main__":  # before the libraries that read them are imported; the tests keep their own environment
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # its threads would not survive the fork, and are no gain
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name is looked up in the cache alone
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

with contextlib.ExitStack() as stack:
    if "atheris" in sys.argv:  # it follows the coverage of modules that are imported inside
        import atheris

        stack.enter_context(atheris.instrument_imports(include=["poolwise"]))
    from fuzz.inputs import make, sealed_again
    from fuzz.targets import TARGETS, Target
    from poolwise.errors import PoolwiseError

SECONDS, GROWTH = 2.0, 1 << 30
STUCK = 60.0
"""Seconds without an end after which an input counts as a hang, though it takes no processor time."""
NOTICED = 64 << 20
"""Bytes of growth after which the peak of the memory is measured afresh."""
SLICE = 0.25
"""Seconds that a target gets at a time, so that slow readers do not take all of them."""
READ, REFUSED, FOUND = range(3)


class Hang(BaseException):
    """Too much processor time; no Exception, so that no reader catches it."""


def _hang(*_: object) -> None:
    raise Hang(f"more than {SECONDS:g} s of processor time")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Let the peak begin at the present size, where the system can: otherwise the next input seems to need nothing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> int:
    """Bytes of memory in use now; the peak where the system does not tell."""
    if sys.platform != "linux":
        return peak()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def attempt(target: Target, folder: Path, data: bytes) -> tuple[int, str]:
    """What a reader did with one input: `READ`, `REFUSED` or `FOUND` and why."""
    before = resident()
    try:
        with limited():
            target.run(folder, data)
        outcome, why = READ, ""
    except PoolwiseError:
        outcome, why = REFUSED, ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "poolwise" in frame.filename] or frames
        last = ours[-1]
        text = next(iter(str(error).splitlines()), "")[:120]
        return FOUND, f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"
    grown = peak() - before
    if grown > NOTICED:
        forget_peak()
    if grown > GROWTH:
        return FOUND, f"the memory grew by {grown >> 20:,} MiB"
    return outcome, why


class Board:
    """What is shared with the child that runs the inputs, which may die: counts, findings, and the current input."""

    def __init__(self, targets: Sequence[Target], place: Path) -> None:
        self.targets, self.place = targets, place
        self.counts = multiprocessing.Array("q", 3 * len(targets), lock=False)
        self.next = multiprocessing.Array("q", len(targets), lock=False)
        self.current = multiprocessing.Array("q", [-1, -1], lock=False)
        self.findings: Any = multiprocessing.SimpleQueue()
        self.kinds: dict[tuple[str, str], tuple[int, int]] = {}

    def collect(self) -> None:
        while not self.findings.empty():
            self.note(*self.findings.get())

    def note(self, name: str, why: str, number: int) -> None:
        first, times = self.kinds.get((name, why), (number, 0))
        self.kinds[name, why] = first, times + 1

    @property
    def done(self) -> int:
        return sum(self.counts)

    def done_by(self, index: int) -> int:
        return sum(self.counts[3 * index : 3 * index + 3])


def keep_on(board: Board, seed: int, end: float, most: int, each: int) -> None:
    """Run inputs until the time or the number of inputs is over."""
    signal.signal(signal.SIGPROF, _hang)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics of Rust print themselves
    size = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + 4 * GROWTH,) * 2)
    left = set(range(len(board.targets)))
    while left and time.monotonic() < end and board.done < most:
        for index in sorted(left):
            target, folder = board.targets[index], board.place / str(index)
            folder.mkdir(exist_ok=True)
            stop = time.process_time() + SLICE
            while time.process_time() < stop and time.monotonic() < end and board.done < most:
                if board.done_by(index) >= each:
                    left.discard(index)
                    break
                number = board.next[index]
                board.current[:] = [index, number]
                board.next[index] += 1
                data = input_of(target, seed, number)
                outcome, why = attempt(target, folder, data)
                board.counts[3 * index + outcome] += 1
                if outcome == FOUND:
                    board.findings.put((target.name, why, number))


def input_of(target: Target, seed: int, number: int) -> bytes:
    return make(target.seeds, target.form, random.Random(f"{seed} {target.name} {number}"))


def fuzz(targets: Sequence[Target], seed: int, seconds: float, inputs: int, first: int = 0, each: int = 10**9) -> Board:
    """Run inputs in a child process, and another one whenever it dies or is stuck."""
    place = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    board = Board(targets, place)
    board.next[:] = [first] * len(targets)
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("fork")
    try:
        exitcode: int | None = -1
        while exitcode and time.monotonic() < end and board.done < inputs:
            child = context.Process(target=keep_on, args=(board, seed, end, inputs, each))
            child.start()
            at, since = board.current[:], time.monotonic()
            while child.is_alive():
                child.join(0.2)
                board.collect()
                if at != board.current[:]:
                    at, since = board.current[:], time.monotonic()
                elif time.monotonic() - since > STUCK:
                    child.kill()
            board.collect()
            exitcode = child.exitcode
            if exitcode:
                index, number = board.current
                board.counts[3 * index + FOUND] += 1
                stuck = time.monotonic() - since > STUCK
                why = f"no end within {STUCK:g} s" if stuck else f"the process ended with {exitcode}"
                board.note(targets[index].name, why, number)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return board


def by_hypothesis(targets: Sequence[Target], seed: int, examples: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Documents of every shape, and bytes, drawn and shrunk by hypothesis: `examples` for each target."""
    import json

    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
    )

    def examine(target: Target, folder: Path) -> None:
        @seeded(seed)
        @settings(
            max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
        )  # fmt: skip
        @given(st.data())
        def run(drawn: Any) -> None:
            data = drawn.draw(st.sampled_from(target.seeds))
            if target.form in ("json", "sealed"):
                content = json.loads(data)
                holder, key = drawn.draw(st.sampled_from(places_in(content)))
                holder[key] = drawn.draw(values)
                data = json.dumps(content).encode()
                data = sealed_again(data) if target.form == "sealed" else data
            else:
                at = drawn.draw(st.integers(0, len(data)))
                to = drawn.draw(st.integers(at, min(len(data), at + 8)))
                text = st.text(max_size=12).map(lambda text: text.encode("utf-8", "ignore"))
                data = data[:at] + drawn.draw(st.binary(max_size=12) | text) + data[to:]
            outcome, why = attempt(target, folder, data)
            if outcome == FOUND:
                raise AssertionError(f"{why}\n{data!r}")

        run()

    found: dict[tuple[str, str], tuple[int, int]] = {}
    signal.signal(signal.SIGPROF, _hang)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            try:
                examine(target, Path(folder))
            except AssertionError as error:
                why, shrunk = str(error).splitlines()[:2]
                found[target.name, f"{why}: {shrunk[:200]}"] = (0, 1)
    return found


def places_in(content: Any) -> list[tuple[Any, Any]]:
    """Every value of a JSON document but its checksum, as (what holds it, its key)."""
    found: list[tuple[Any, Any]] = []
    left = [content]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        found += [(holder, key) for key in keys if key != "checksum"]
        left += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found


def by_atheris(targets: Sequence[Target], seconds: float) -> None:
    """Coverage-guided: the first byte chooses the target. Ends the process; libFuzzer prints what it finds."""
    signal.signal(signal.SIGPROF, _hang)
    logging.disable(logging.CRITICAL)
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def one(data: bytes) -> None:
        if not data:
            return
        target = targets[data[0] % len(targets)]
        folder = place / target.name.replace("/", "-")
        folder.mkdir(exist_ok=True)
        content = sealed_again(data[1:]) if target.form == "sealed" else data[1:]
        outcome, why = attempt(target, folder, content)
        if outcome == FOUND:
            raise RuntimeError(f"{target.name}: {why}")

    corpus = place / "corpus"
    corpus.mkdir()
    for index, target in enumerate(targets):
        for number, seed in enumerate(target.seeds):
            (corpus / f"{index}-{number}").write_bytes(bytes([index]) + seed)
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={int(seconds)}", "-rss_limit_mb=4096", "-max_len=4096", str(corpus)], one
    )
    atheris.Fuzz()


def table(board: Board) -> str:
    lines = ["| reader | inputs | read | refused | found |", "|---|--:|--:|--:|--:|"]
    counts = [board.counts[3 * i : 3 * i + 3] for i in range(len(board.targets))]
    for target, (read, refused, found) in zip(board.targets, counts, strict=True):
        lines.append(f"| {target.name} | {read + refused + found:,} | {read:,} | {refused:,} | {found:,} |")
    sums = [sum(column) for column in zip(*counts, strict=True)]
    lines.append(f"| all | {sum(sums):,} | {sums[0]:,} | {sums[1]:,} | {sums[2]:,} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--inputs", type=int, default=10**9, help="stop after as many inputs")
    parser.add_argument("--each", type=int, default=10**9, help="stop a target after as many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    parser.add_argument("--targets", default="", help="names, separated by semicolons; all by default")
    parser.add_argument("--engine", choices=["bytes", "hypothesis", "atheris"], default="bytes")
    parser.add_argument("--save", type=Path, help="write the first input of each kind of finding into this folder")
    options = parser.parse_args()
    wanted = [name.strip() for name in options.targets.split(";") if name.strip()]
    targets = [target for target in TARGETS if not wanted or target.name in wanted]
    if options.engine == "atheris":
        by_atheris(targets, options.seconds)
        return 0
    if options.engine == "hypothesis":
        examples = options.inputs if options.inputs < 10**9 else 1000
        kinds = by_hypothesis(targets, options.seed, examples)
        print(f"{len(targets)} readers, {examples:,} examples each, {len(kinds)} of them with a finding")
    else:
        board = fuzz(targets, options.seed, options.seconds, options.inputs, options.first, options.each)
        kinds = board.kinds
        print(table(board))
    for (name, why), (number, times) in sorted(kinds.items()):
        print(f"found {times} times: {name}, first in input {number}: {why}")
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            target = next(target for target in targets if target.name == name)
            (options.save / f"{name.replace('/', '-')}-{number}").write_bytes(input_of(target, options.seed, number))
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
