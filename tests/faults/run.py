"""Faults in real studies: `python tests/faults/run.py --faults 200`. Exits with 1 if one study differs at the end.

The study is that of `small_study.py`: two trained designs and a reference, a few seconds. Each fault is drawn from
`--seed` and its number: something happens to a process, a file, the disk, the clock or the Hub, in a finished folder or
in the middle of a run. Then the study is run again without a fault. If that is refused, the message must name the
file that was damaged; the file is deleted, as the message says, and the study is run once more. At the end its scores
and its weights must be those of the undisturbed study, byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import http.server
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

from poolwise import cli
from poolwise.errors import PoolwiseError
from poolwise.runs import layout, prepare, trial
from poolwise.runs import run as runner
from poolwise.runs.engine import Event
from poolwise.study.study import Study
from small_study import furnish, scores, weights, write

PROGRAM = (sys.executable, "-c", "from poolwise.cli import main; main()")
LONGEST = 600.0
"""Seconds after which a run counts as hung."""


class Interrupted(BaseException):
    """Stands for Ctrl-C, but cannot be confused with that of whoever runs this program."""


class Field:
    """Where the faults happen: the data, the undisturbed study, and the study of the present fault."""

    def __init__(self, place: Path) -> None:
        self.place = furnish(place)
        self.study = write(place, "whole")
        assert runner.run(Study.load(self.study), workers=1) == {}
        self.whole = place / "whole"
        self.scores, self.weights = scores(self.whole), weights(self.whole)
        self.prepared = prepare.prepare(Study.load(self.study))

    def begin(self, number: int, finished: bool) -> tuple[Path, Path]:
        """The study file and the run folder of a fault, empty or finished."""
        name = f"fault-{number}"
        path = write(self.place, name)
        if finished:
            shutil.copytree(self.whole, self.place / name)
        return path, self.place / name

    def end(self, path: Path, damaged: list[Path], heard: list[str]) -> str:
        """Run the study again; what is wrong at the end, or an empty string."""
        folder = self.place / path.stem
        for _ in range(2 + len(damaged)):
            try:
                failed = runner.run(Study.load(path), workers=1, on_event=lambda event: warn(event, heard))
            except PoolwiseError as error:
                named = [file for file in damaged if str(file) in str(error)]
                if not named:
                    return f"refused, and no damaged file is named: {error}"
                heard.append(str(error))
                for file in named:
                    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
                continue
            if failed:
                return f"failed: {failed}"
            break
        else:
            return "refused again and again"
        if not scores(folder).equals(self.scores):
            return "other scores"
        return "" if weights(folder) == self.weights else "other weights"


def warn(event: Event, heard: list[str]) -> None:
    if event[0] == "warning":
        heard.append(event[1][1])


def files_in(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return sorted(path for path in found if path.name != layout.LOG)


def at_random_moment(rng: random.Random, act: Callable[[], None]) -> Callable[[Event], None]:
    """Calls `act` at one of the first events of a run."""
    left = rng.randrange(2, 22)

    def follow(event: Event) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            act()

    return follow


def disturbed(path: Path, follow: Callable[[Event], None]) -> None:
    """A run that something happens to; it may fail in any way but one: a hang."""
    with contextlib.suppress(PoolwiseError, Interrupted, EOFError, OSError):
        runner.run(Study.load(path), workers=1, on_event=follow)


def children() -> list[psutil.Process]:
    """The workers of this process, which its server started."""
    return [child for server in psutil.Process().children() for child in server.children()]


def send(number: signal.Signals) -> None:
    for child in children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def raise_interrupt() -> None:
    raise Interrupted


def stop_and_continue() -> None:
    send(signal.SIGSTOP)
    time.sleep(0.5)
    send(signal.SIGCONT)


def kill_server() -> None:
    for server in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            server.kill()


# Each fault gets the field, its number and its random numbers; it returns the study file and the files it damaged.
Fault = Callable[[Field, int, random.Random], tuple[Path, list[Path]]]


def process_fault(act: Callable[[], None]) -> Fault:
    def fault(field: Field, number: int, rng: random.Random) -> tuple[Path, list[Path]]:
        path, _ = field.begin(number, finished=False)
        disturbed(path, at_random_moment(rng, act))
        return path, []

    return fault


def preparation_killed(field: Field, number: int, rng: random.Random) -> tuple[Path, list[Path]]:
    path, _ = field.begin(number, finished=False)
    over = threading.Event()

    def kill() -> None:
        time.sleep(rng.uniform(0, 2))
        if not over.is_set():
            send(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    disturbed(path, lambda event: over.set() if event[0] == "trials" else None)
    killer.join()
    return path, []


def command_line(path: Path) -> None:
    """`poolwise run` in a process forked from this one, with libraries loaded; its workers come from our server."""
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.setsid()
    sys.argv = ["poolwise", "run", str(path), "--workers", "1"]
    cli.main()


def parent_signal(*numbers: signal.Signals) -> Fault:
    """The program gets a signal at a moment of its run; one in four is a new program, which takes long to start."""

    def fault(field: Field, index: int, rng: random.Random) -> tuple[Path, list[Path]]:
        path, folder = field.begin(index, finished=False)
        if new := rng.random() < 0.25:
            program = subprocess.Popen(
                [*PROGRAM, "run", str(path), "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            pid = program.pid
        else:
            forkserver._forkserver.ensure_running()  # type: ignore[attr-defined]
            child = multiprocessing.get_context("fork").Process(target=command_line, args=(path,))
            child.start()
            pid = child.pid

        def runs() -> bool:
            return program.poll() is None if new else child.is_alive()

        wanted = rng.choice(["study.json", "checkpoint-2", "step-3", "train.json", "scores"])
        while runs() and not any(folder.rglob(wanted)):
            time.sleep(0.01)
        for number in numbers:
            time.sleep(rng.uniform(0, 0.5))
            if runs():
                os.kill(pid, number)
        program.wait(LONGEST) if new else child.join(LONGEST)
        if runs():
            os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"{path}: the run did not end within {LONGEST:g} s of {numbers}")
        return path, []

    return fault


def file_fault(alter: Callable[[Path, random.Random], None], running: bool) -> Fault:
    """One or two files of a finished folder, or of one that was interrupted, are altered."""

    def fault(field: Field, number: int, rng: random.Random) -> tuple[Path, list[Path]]:
        path, folder = field.begin(number, finished=not running)
        if running:
            disturbed(path, at_random_moment(rng, raise_interrupt))
        found = files_in(folder)
        kinds = sorted({file.name for file in found})  # otherwise most would be score files
        chosen = [rng.choice([f for f in found if f.name == name]) for name in rng.sample(kinds, min(len(kinds), 2))]
        for file in chosen[: rng.choice((1, 2))]:
            alter(file, rng)
        return path, chosen

    return fault


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)


def truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size + 1))


def remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def other_time(file: Path, rng: random.Random) -> None:
    years = rng.choice((-30, -1, 1, 30)) * 365 * 86400
    os.utime(file, (time.time() + years,) * 2)


def write_fault(number_of_error: int) -> Fault:
    """Forcing a file onto the disk fails, from the n-th time on, while one trial runs."""

    def fault(field: Field, number: int, rng: random.Random) -> tuple[Path, list[Path]]:
        path, folder = field.begin(number, finished=False)
        one = rng.choice(field.prepared.trials)
        left, flush = rng.randrange(60), os.fsync

        def fail(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(number_of_error, os.strerror(number_of_error))
            flush(descriptor)

        with mock.patch("os.fsync", fail), contextlib.suppress(PoolwiseError, OSError):
            trial.run_trial(one, field.prepared, layout.trial(folder, one.name))
        return path, []

    return fault


def small_disk(field: Field, number: int, rng: random.Random) -> tuple[Path, list[Path]]:
    """The study runs in a file system that is too small for it, and which is then enlarged. Needs root."""
    path, folder = field.begin(number, finished=False)
    folder.mkdir()
    whole = sum(file.stat().st_size for file in files_in(field.whole))
    size = f"size={rng.randrange(16 << 10, whole)}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], capture_output=True).returncode:
        return write_fault(errno.ENOSPC)(field, number, rng)
    disturbed(path, lambda event: None)
    subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
    return path, []


def clock_jump(field: Field, number: int, rng: random.Random) -> tuple[Path, list[Path]]:
    """The clocks jump by years, there and back, while one trial runs."""
    path, folder = field.begin(number, finished=False)
    one = rng.choice(field.prepared.trials)
    now, count = time.time, time.perf_counter
    jumps = [rng.choice((0, 0, 0, -1e9, 1e9, 3600, -3600)) for _ in range(1000)]
    with (
        mock.patch("time.time", side_effect=lambda: now() + rng.choice(jumps)),
        mock.patch("time.perf_counter", side_effect=lambda: count() + rng.choice(jumps)),
    ):
        trial.run_trial(one, field.prepared, layout.trial(folder, one.name))
    return path, []


class _Hub(http.server.BaseHTTPRequestHandler):
    """A Hub that answers 503, or never."""

    hangs = False

    def do_GET(self) -> None:
        if self.hangs:
            time.sleep(30)
        self.send_error(503)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def broken_hub(hangs: bool) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"hangs": hangs}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with mock.patch.dict(os.environ, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}):
            yield
    finally:
        server.shutdown()


def hub_fault(hangs: bool) -> Fault:
    """A study whose files are all here, run while the Hub is broken, and interrupted."""

    def fault(field: Field, number: int, rng: random.Random) -> tuple[Path, list[Path]]:
        path, _ = field.begin(number, finished=False)
        with broken_hub(hangs):
            disturbed(path, at_random_moment(rng, raise_interrupt))
        return path, []

    return fault


FAULTS: dict[str, Fault] = {
    "worker killed": process_fault(lambda: send(signal.SIGKILL)),
    "worker terminated": process_fault(lambda: send(signal.SIGTERM)),
    "worker stopped and continued": process_fault(stop_and_continue),
    "server of the workers killed": process_fault(kill_server),
    "preparation killed": preparation_killed,
    "run interrupted": process_fault(raise_interrupt),
    "run killed": parent_signal(signal.SIGKILL),
    "run terminated": parent_signal(signal.SIGTERM),
    "run stopped and continued": parent_signal(signal.SIGSTOP, signal.SIGCONT),
    "bit flipped": file_fault(flip, running=False),
    "bit flipped after an interrupt": file_fault(flip, running=True),
    "file truncated": file_fault(truncate, running=False),
    "file truncated after an interrupt": file_fault(truncate, running=True),
    "file removed": file_fault(remove, running=False),
    "file of another time": file_fault(other_time, running=False),
    "disk full": write_fault(errno.ENOSPC),
    "disk too small": small_disk,
    "folder read-only": write_fault(errno.EROFS),
    "clocks jump": clock_jump,
    "Hub answers 503": hub_fault(hangs=False),
    "Hub hangs": hub_fault(hangs=True),
}


def one_fault(field: Field, seed: int, number: int) -> tuple[str, str, str]:
    """(kind, what is wrong at the end or an empty string, what was altered)."""
    rng = random.Random(f"{seed} {number}")
    kind = list(FAULTS)[number % len(FAULTS)]
    path, damaged = FAULTS[kind](field, number, rng)
    folder = field.place / path.stem
    wrong = field.end(path, damaged, [])
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)
    shutil.rmtree(folder, ignore_errors=True)
    return kind, wrong, ", ".join(str(file.relative_to(folder)) for file in damaged)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no fault after as many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault")
    options = parser.parse_args()
    started = time.monotonic()
    counts: dict[str, list[int]] = {kind: [0, 0] for kind in FAULTS}
    wrong = []
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        field = Field(Path(place))
        for number in range(options.first, options.first + options.faults):
            if time.monotonic() - started > options.seconds:
                break
            kind, difference, what = one_fault(field, options.seed, number)
            counts[kind][0] += 1
            counts[kind][1] += not difference
            print(
                f"{number}: {kind}{': ' + what if what else ''}: {difference or 'equal'}", file=sys.stderr, flush=True
            )
            wrong += [f"{number} ({kind}: {what}): {difference}"] if difference else []
    with contextlib.suppress(Exception):
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
    print("| fault | studies | equal at the end |\n|---|--:|--:|")
    for kind, (times, equal) in counts.items():
        print(f"| {kind} | {times} | {equal} |")
    print(f"| all | {sum(times for times, _ in counts.values())} | {sum(equal for _, equal in counts.values())} |")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
