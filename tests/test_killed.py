"""Law 6: killed at any moment and run again, a study ends with the same weights and the same scores.

`POOLWISE_KILLS=10 pytest tests/test_killed.py -k law_6` kills ten times, in a study of six trainings.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from poolwise.runs.engine import Event
from small_study import run, scores, snapshot, state, weights, write

POOLWISE = (sys.executable, "-c", "from poolwise.cli import main; main()")
KILLS = int(os.environ.get("POOLWISE_KILLS", "3"))

STAGES = {
    "save": r"training/(checkpoint-\d+|\.step-\d+.*tmp)/",
    "step": r"spec\.json$",
    "evaluate": r"train\.json$|/scores/",
}
PAUSE = {"save": 0.005, "step": 1.0, "evaluate": 0.3, "load": 10.0}
"""Seconds: the kill comes at a random moment of this span after the stage has begun."""


class Killed:
    """`poolwise run` as a process of its own; every process that it starts is watched."""

    def __init__(self, study: Path, folder: Path) -> None:
        self.folder, self.before = folder, snapshot(folder)
        self.process = subprocess.Popen(
            [*POOLWISE, "run", str(study), "--workers", "2"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.family: set[psutil.Process] = set()

    def until(self, stage: str, pause: float) -> bool:
        """Wait for a stage (or for the end of a trial), then a while. False where the run came to its end first."""
        wanted = re.compile(STAGES.get(stage, "") + r"|/done$")
        while stage != "load" and self.process.poll() is None:
            now = snapshot(self.folder)
            if any(wanted.search(name) and self.before.get(name) != when for name, when in now.items()):
                break
            time.sleep(0.005)
        end = time.monotonic() + pause
        while self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        return self.process.poll() is None

    def stop(self, number: signal.Signals, everyone: bool) -> str:
        """Send a signal to the main process alone, or to its whole group; nothing may live on. Returns stderr."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        (os.killpg if everyone else os.kill)(self.process.pid, number)
        _, words = self.process.communicate(timeout=60)
        deadline = time.monotonic() + 10
        while alive := [member for member in family if _alive(member)]:
            assert time.monotonic() < deadline, f"still alive: {alive}"
            time.sleep(0.01)
        return words


def unfinished(folder: Path, pause: float) -> float:
    """Take the scores of a finished run back, so that a run has them to do again. Returns half the pause."""
    assert pause > 0.01, "the run ends before it can be killed"
    for done in folder.glob("trials/*/done"):
        shutil.rmtree(done.parent / "scores")
        done.unlink()
    return pause / 2


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_law_6_killed_and_run_again(place: Path, finished: Path) -> None:
    """SIGKILL while loading, stepping, saving and scoring, Ctrl-C once: same weights, bit for bit, and same scores."""
    many = KILLS > 3
    seeds = ("seeds = [0]", "seeds = [0, 1, 2]" if many else "seeds = [0]")
    if many:
        assert run(write(place, "whole-many", seeds), workers=1) == {}
        finished = place / "whole-many"
    study, folder = write(place, "killed", seeds), place / "killed"
    chance = random.Random(KILLS)
    plan = [("save", "step", "evaluate", "save", "load")[i % 5] for i in range(KILLS)]
    plan.insert(2, "ctrl-c")
    for number, stage in enumerate(plan):
        where = "step" if stage == "ctrl-c" else stage
        pause = chance.uniform(0, PAUSE[where])
        running = Killed(study, folder)
        while not running.until(where, pause):  # a fast machine was done before the pause was over
            assert running.process.wait() == 0, running.process.communicate()
            pause = unfinished(folder, pause)
            running = Killed(study, folder)
        if stage == "ctrl-c":
            words = running.stop(signal.SIGINT, everyone=True)
            assert running.process.returncode == 130
            assert "run the same command to continue" in words
            assert "Traceback" not in words
        else:
            running.stop(signal.SIGKILL, everyone=bool(number % 2))
        files = snapshot(folder)
        halves = [name for name in files if name.endswith(".tmp") or ".tmp/" in name]
        opened = {p for p in folder.glob("trials/*/training/checkpoint-*") if not (p / "complete").exists()}
        print(
            f"kill {number}: {stage} + {pause:.2f} s, {len(files)} files, {len(halves)} of them temporary, "
            f"{len(opened)} half checkpoints, {len(list(folder.glob('trials/*/scores/*/*.parquet')))} score files"
        )
    done = subprocess.run([*POOLWISE, "run", str(study), "--workers", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights(folder) == weights(finished)
    assert len(weights(folder)) > 4
    assert scores(folder).equals(scores(finished))
    left = [name for name in snapshot(folder) if name.endswith(".tmp") or "checkpoint-" in name]
    assert not left
    assert (folder / "report.html").exists()


def test_a_process_that_dies_is_a_failed_trial(place: Path) -> None:
    """As when the kernel ends it for its memory; the other trials run in the worker that takes its place."""
    me = psutil.Process()
    workers = []

    def kill_the_first(event: Event) -> None:
        if event[0] == "progress" and event[1][0].startswith("m1-") and event[1][2] < 0.5 and not workers:
            workers.extend(child for server in me.children() for child in server.children())
            (worker,) = workers  # by then the process that prepared the study has ended
            worker.kill()

    path = write(place, "died", ('["./pairs", "./facts"]', '["./pairs"]'))
    failed = run(path, workers=1, on_event=kill_the_first)
    assert {name[:3]: reason for name, reason in failed.items()} == {
        "m1-": "its process died (exit code -9); out of memory?"
    }
    assert state(place / "died", "m1")["reason"] == next(iter(failed.values()))
    assert state(place / "died", "layers")["state"] == "done"
    assert run(path, workers=1) == {}
    assert {n: w for n, w in weights(place / "died").items() if "m1-" in n} == {
        n: w for n, w in weights(place / "whole").items() if "m1-" in n
    }


def test_a_script_without_a_guard(place: Path, finished: Path, tmp_path: Path) -> None:
    """`poolwise.run(study)` at the top level of a user's script: the engine must not run that script again."""
    script = tmp_path / "mine.py"
    script.write_text(
        f"import poolwise\nprint('once')\nstudy = poolwise.Study.load({str(write(place, str(finished)))!r})\n"
        "print('failed:', poolwise.run(study))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "once\nfailed: {}\n"
