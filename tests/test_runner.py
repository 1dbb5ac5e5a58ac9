"""Law 6 and the runner: killed at any moment and run again, a study ends with the same weights and the same scores.

`POOLWISE_KILLS=10 pytest tests/test_runner.py -k law_6` kills ten times, in a study of six trainings.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest

from poolwise import cli
from poolwise.errors import PoolwiseError, StudyError, TrainingError
from poolwise.model import checkpoint
from poolwise.runs import engine as engines
from poolwise.runs import layout, prepare, trial
from poolwise.runs import run as runner
from poolwise.runs.train import CHANCE_WINDOW, _Watch
from poolwise.runs.trial import run_trial
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from tiny import tiny_folder

POOLWISE = (sys.executable, "-c", "from poolwise.cli import main; main()")
KILLS = int(os.environ.get("POOLWISE_KILLS", "3"))
WORDS = ("cat", "dog", "river", "book", "water", "morning", "people", "home")
WORDS += ("mat", "walk", "heron", "ferry", "island", "fish", "rate", "choice")
M1 = '[[designs]]\npreset = "m1"\n'
LAYERS = (
    '[[designs]]\nname = "layers"\nattention = "bidirectional"\npooling = "layer_cross_attention"\n'
    'pooling_args = { tokens = "mean", latents = 4 }\n'
)
MEAN = '[[designs]]\nattention = "bidirectional"\npooling = "mean"\n'
STUDY = """\
name = "tiny"
baseline = "m1"
seeds = [0]
tasks = ["./pairs", "./facts"]
references = ["tfidf"]
controls = false
evaluate_at = [0.5, 1.0]
output = "OUTPUT"

[recipe]
base_model = "./llama"
dataset = "./train.jsonl"
steps = 6
save_steps = 2
batch_size = 8
warmup_steps = 0
max_length = 32
learning_rate = 1e-3
head_learning_rate = 1e-3

"""


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def _sts(rows: int, factor: int) -> list[dict[str, Any]]:
    return [
        {
            "sentence1": f"the {WORDS[i % 16]} {factor}",
            "sentence2": f"one {WORDS[i * factor % 16]}",
            "score": i * 7 % 11,
        }
        for i in range(rows)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, 60 training rows and three tasks: `pairs` and `more` (STS), `facts` (retrieval)."""
    folder = tmp_path_factory.mktemp("study")
    tiny_folder(folder, "llama")
    with (folder / "train.jsonl").open("w") as file:
        for i in range(60):
            row = {
                "query": f"where is the {WORDS[i % 16]} {i}",
                "positive": f"the {WORDS[i % 16]} and the {WORDS[(i * 5 + 1) % 16]} are at number {i}",
                "negative": f"no {WORDS[(i + 3) % 16]} at {i}",
            }
            file.write(json.dumps(row) + "\n")
    _table(folder / "pairs" / "test.csv", _sts(20, 3))
    _table(folder / "more" / "test.csv", _sts(12, 5))
    documents = [{"_id": f"d{i}", "title": "", "text": f"a {WORDS[i]} by the {WORDS[i + 3]}"} for i in range(10)]
    queries = [{"_id": f"q{i}", "text": f"who saw the {WORDS[i]}"} for i in range(5)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / "facts").mkdir(exist_ok=True)
        (folder / "facts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qrels = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(5)]
    _table(folder / "facts" / "qrels" / "test.tsv", qrels)
    return folder


@pytest.fixture(scope="module", autouse=True)
def fast_engine() -> Iterator[None]:
    """Engine processes come from a server that has imported the libraries once, which saves 8 s a run."""
    get_context = multiprocessing.get_context
    server = get_context("forkserver")
    server.set_forkserver_preload(["poolwise.runs.trial"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            multiprocessing, "get_context", lambda kind=None: server if kind == "spawn" else get_context(kind)
        )
        yield


def write(place: Path, output: str, *changes: tuple[str, str], designs: str = M1 + LAYERS) -> Path:
    """A study file whose runs go to `place/output`; `changes` are (old, new) pieces of its text."""
    text = STUDY.replace("OUTPUT", output) + designs
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = place / f"{output}.toml"
    path.write_text(text)
    return path


def run(path: Path, **options: Any) -> dict[str, str]:
    return runner.run(Study.load(path), **options)


@pytest.fixture(scope="module")
def finished(place: Path, fast_engine: None) -> Path:
    """The folder of an uninterrupted run, one trial at a time."""
    assert run(write(place, "whole"), workers=1) == {}
    return place / "whole"


@pytest.fixture
def copy(finished: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the finished run, times of the files included."""
    return Path(shutil.copytree(finished, finished.with_name(request.node.name)))


def scores(folder: Path) -> pl.DataFrame:
    """All rows of the long table but their seconds, in an order of their own."""
    frame = pl.read_parquet(folder / "results.parquet")
    timed = [name for name in frame.columns if "seconds" in name]
    assert timed
    return frame.drop(timed).sort("design", "seed", "step", "task", "item_id", "metric")


def weights(folder: Path) -> dict[str, bytes]:
    """The tensors of all milestones, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("trials/*/training/step-*/**/*.safetensors"))
    }


def snapshot(folder: Path) -> dict[str, int]:
    """When each file was written."""
    found = {}
    for name, _, files in os.walk(folder):  # not rglob, which fails on a folder that the watched run has just removed
        for path in (Path(name) / file for file in files):
            with contextlib.suppress(FileNotFoundError):
                found[str(path.relative_to(folder))] = path.stat().st_mtime_ns
    return found


def of(folder: Path, label: str) -> Path:
    """The folder of a design's only trial."""
    (path,) = folder.glob(f"trials/{label}-s0-*")
    return path


def state(folder: Path, label: str) -> dict[str, Any]:
    rows = runner.trials(SimpleNamespace(folder=folder))  # type: ignore[arg-type]
    return next(row for row in rows if row["label"] == label)


# ---------------------------------------------------------------- law 6: kill and go on

STAGES = {
    "save": r"training/(checkpoint-\d+|\.step-\d+.*tmp)/",
    "step": r"spec\.json$",
    "evaluate": r"train\.json$|/scores/",
}
PAUSE = {"save": 0.005, "step": 1.0, "evaluate": 0.5, "load": 10.0}
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
        running = Killed(study, folder)
        where = "step" if stage == "ctrl-c" else stage
        pause = chance.uniform(0, PAUSE[where])
        assert running.until(where, pause), (
            f"the run came to its end before kill {number}: {running.process.communicate()}"
        )
        if stage == "ctrl-c":
            words = running.stop(signal.SIGINT, everyone=True)
            assert running.process.returncode == 130
            assert "run the same command to go on" in words
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


# ---------------------------------------------------------------- only what is missing


def test_a_finished_study_is_left_alone(copy: Path, place: Path) -> None:
    before = snapshot(copy / "trials")
    assert run(write(place, copy.name), workers=2) == {}
    assert snapshot(copy / "trials") == before
    assert scores(copy).equals(scores(place / "whole"))
    assert {state(copy, label)["state"] for label in ("m1", "layers", "tfidf")} == {"done"}


def test_a_new_task_and_a_new_design(copy: Path, place: Path) -> None:
    """Old designs are scored on the new task and no more; the new design is trained and scored on all."""
    before = snapshot(copy / "trials")
    path = write(place, copy.name, ('"./facts"', '"./facts", "./more"'), designs=M1 + LAYERS + MEAN)
    assert run(path, workers=2) == {}
    after = snapshot(copy / "trials")
    touched = {name for name, when in after.items() if before.get(name) != when}
    old = {name for name in touched if not name.startswith("mean-")}
    assert {name for name in old if "/scores/" in name and "/more-" not in name} == set()
    assert not any("training" in name or "train.json" in name for name in old)
    assert sum("/more-" in name for name in old) == 2 * 2 + 1  # two designs at two steps, tfidf
    new = {name.split("/", 1)[1] for name in touched if name.startswith("mean-")}
    assert {name.rpartition("-")[0] for name in new if name.startswith("scores")} == {
        f"scores/step-{step}/{task}" for step in (3, 6) for task in ("pairs", "facts", "more")
    }
    assert "train.json" in new
    assert (
        scores(copy)
        .filter(pl.col("design").ne("mean-bidirectional"), pl.col("task").ne("more"))
        .equals(scores(place / "whole"))
    )


@pytest.mark.parametrize(
    "changes", [(("steps = 6", "steps = 8"),), (("learning_rate = 1e-3\nhead", "learning_rate = 2e-3\nhead"),)]
)
def test_a_changed_recipe_is_refused(
    changes: tuple[tuple[str, str], ...], copy: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = snapshot(copy)
    path = write(place, copy.name, *changes)
    monkeypatch.setattr(sys, "argv", ["poolwise", "run", str(path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    words = capsys.readouterr().err
    expected = (
        "recipe.steps was 6 and is now 8"
        if "steps" in changes[0][0]
        else "recipe.learning_rate was 0.001 and is now 0.002"
    )
    assert expected in words
    assert "Traceback" not in words
    assert snapshot(copy) == before


def test_other_changes_are_refused_and_trackers_are_free(copy: Path, place: Path) -> None:
    other = LAYERS.replace("latents = 4", "latents = 8")
    with pytest.raises(StudyError, match="design 'layers' has changed; give the new one another name"):
        runner.guard(Study.load(write(place, copy.name, designs=M1 + other)))
    with pytest.raises(StudyError, match=r"evaluate_at was \[0.5, 1.0\] and is now \[1.0\]"):
        runner.guard(Study.load(write(place, copy.name, ("[0.5, 1.0]", "[1.0]"))))
    runner.guard(Study.load(write(place, copy.name, ("save_steps = 2", "save_steps = 3"))))
    runner.guard(Study.load(write(place, copy.name, ("seeds = [0]", "seeds = [0, 1]"), designs=M1)))


def test_a_study_that_could_not_begin_may_be_mended(place: Path) -> None:
    """What was refused before the first trial binds nobody."""
    with pytest.raises(PoolwiseError, match="no such model folder"):
        run(write(place, "mended", ("./llama", "./lama"), ('"./pairs", "./facts"', '"./pairs"')))
    runner.guard(Study.load(write(place, "mended")))
    assert not (place / "mended" / "trials").exists()


def test_scores_of_tasks_that_were_edited_or_dropped_are_no_results(copy: Path) -> None:
    """Only what is scored on the study's tasks as they are now is gathered."""
    before = scores(copy)
    file = sorted(of(copy, "m1").glob("scores/*/*.parquet"))[0]
    shutil.copy(file, file.with_name(file.name.replace(".parquet", "0.parquet")))  # as of the task before an edit
    runner.gather(copy)
    assert scores(copy).equals(before)


# ---------------------------------------------------------------- damage and failure


def test_damaged_files_are_never_results(copy: Path, place: Path) -> None:
    """Truncated, emptied and altered score files are made anew; half a checkpoint is not gone on from."""
    first = of(copy, "m1")
    files = sorted(first.glob("scores/*/*.parquet"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    files[1].write_bytes(b"")
    content = bytearray(files[2].read_bytes())
    content[200] ^= 0xFF
    files[2].write_bytes(content)
    assert [layout.read_scores(file) is None for file in files] == [True, True, True, False]
    runner.gather(copy)  # an interrupted run gathers what is there
    assert (
        scores(copy).filter(pl.col("design") == "m1").height
        < scores(place / "whole").filter(pl.col("design") == "m1").height
    )

    remains = first / "training" / "checkpoint-6"  # killed while the checkpoints of a whole training were removed
    remains.mkdir()
    (remains / "complete").write_text("6")

    second = of(copy, "layers")
    shutil.rmtree(second / "training")
    (second / "train.json").unlink()
    half = second / "training" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "pooling.safetensors").write_bytes(b"half")
    (half / "trainer_state.json").write_text("{")
    (second / "training" / ".step-3.1.tmp").mkdir()

    assert run(write(place, copy.name), workers=2) == {}
    assert scores(copy).equals(scores(place / "whole"))
    assert weights(copy) == weights(place / "whole")
    assert not list(copy.rglob("checkpoint-*")) + list(copy.rglob("*.tmp"))


def test_a_failed_trial_is_told_and_stops_nobody(
    copy: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Weights that were altered are refused by name; after the advice is followed the trial is trained anew."""
    broken = of(copy, "layers")
    damaged = broken / "training" / "step-6" / "pooling.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    path = write(place, copy.name, ('"./facts"', '"./facts", "./more"'))
    monkeypatch.setattr(sys, "argv", ["poolwise", "run", str(path), "--workers", "1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"failed: {broken.name}: " in told
    assert "pooling.safetensors is damaged" in told
    assert f"done {of(copy, 'm1').name}" in told
    assert f"done {of(copy, 'tfidf').name}" in told
    assert set(scores(copy).filter(pl.col("task") == "more")["design"]) == {"m1", "layers", "tfidf"}
    failed = scores(copy).filter(pl.col("task") == "more", pl.col("design") == "layers")
    assert set(failed["step"]) == {3}

    monkeypatch.setattr(sys, "argv", ["poolwise", "status", str(path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "layers failed" in told
    assert "m1 done" in told
    assert "is damaged" in told

    shutil.rmtree(damaged.parent)
    assert run(path, workers=1) == {}
    assert weights(copy) == weights(place / "whole")
    assert state(copy, "layers")["state"] == "done"


def test_a_process_that_dies_is_a_failed_trial(place: Path) -> None:
    """As when the kernel ends it for its memory."""
    me = psutil.Process()

    def kill_the_first(event: engines.Event) -> None:
        if event[0] == "progress" and event[1][0].startswith("m1-") and event[1][2] < 0.5:
            for process in me.children(recursive=True):
                parent = process.parent()
                if parent not in (None, me) and parent.parent() != me:  # pytest > server > engine > trial
                    process.kill()

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


@pytest.fixture(scope="module")
def prepared(place: Path) -> prepare.Prepared:
    return prepare.prepare(Study.load(write(place, "direct")))


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_disk_full(at: int, prepared: prepare.Prepared, finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The n-th saving (checkpoint 2, milestone 3, checkpoint 4, milestone 6, checkpoint 6) finds no space."""
    save, calls = checkpoint.save_weights, []

    def full(encoder: Any, folder: Path) -> None:
        calls.append(folder)
        save(encoder, folder)
        if len(calls) == at:
            (folder / "pooling.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_weights", full)
    first = prepared.trials[1]
    assert first.label == "layers"
    folder = tmp_path / first.name
    with pytest.raises(TrainingError, match=r"the disk is full .* free some space and run the study again"):
        run_trial(first, prepared, folder)
    assert "disk is full" in json.loads((folder / "failed.json").read_text())["reason"]
    assert not list(folder.rglob("*.tmp"))
    milestones = {path.name for path in (folder / "training").glob("step-*")}
    assert milestones == [set(), set(), {"step-3"}, {"step-3"}, {"step-3", "step-6"}][at - 1]
    run_trial(first, prepared, folder)
    resumed = json.loads((folder / "train.json").read_text())["resumed_from"]
    assert resumed == [0, 2, 2, 4, 4][at - 1]
    assert not (folder / "failed.json").exists()
    expected = {n: w for n, w in weights(finished).items() if "/layers-" in n}
    assert expected
    found = {f"trials/{p.relative_to(tmp_path)}": p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}
    assert found == expected


def test_checkpoints_go_only_after_the_training_is_said_to_be_done(
    prepared: prepare.Prepared, tmp_path: Path, monkeypatch: Any
) -> None:
    """Killed while it removes them, a trial must not go on from what is left of the last one."""
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if Path(path) in set(tmp_path.rglob("checkpoint-6")):
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_trial(prepared.trials[0], prepared, tmp_path / "m1")
    written = (tmp_path / "m1" / "train.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "m1" / "training" / "checkpoint-6" / "adapter")
    run_trial(prepared.trials[0], prepared, tmp_path / "m1")
    assert (tmp_path / "m1" / "train.json").stat().st_mtime_ns == written
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_disk_full_while_scoring(prepared: prepare.Prepared, tmp_path: Path, monkeypatch: Any) -> None:
    reference = prepared.trials[2]

    def full(table: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"PAR1 half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.write_table", full)
        with pytest.raises(TrainingError, match="the disk is full"):
            run_trial(reference, prepared, tmp_path / "tfidf")
    assert not [path for path in (tmp_path / "tfidf" / "scores").rglob("*") if path.is_file()]
    run_trial(reference, prepared, tmp_path / "tfidf")
    assert (tmp_path / "tfidf" / "done").exists()


def test_a_loss_that_is_not_finite_stops_the_trial(place: Path, tmp_path: Path) -> None:
    wild = ("learning_rate = 1e-3\nhead", "learning_rate = 1e30\nhead")
    prepared = prepare.prepare(Study.load(write(place, "wild", wild)))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d; lower recipe.learning_rate"):
        run_trial(prepared.trials[0], prepared, tmp_path / "wild")
    assert "the loss is" in json.loads((tmp_path / "wild" / "failed.json").read_text())["reason"]
    assert not list(tmp_path.rglob("train.json")) + list(tmp_path.rglob("*.parquet"))


# ---------------------------------------------------------------- a loss at chance


def watch(tmp_path: Path, losses: list[float], stop: bool = True, **recipe: Any) -> _Watch:
    """Follows `losses` as those of steps 1, 2, …"""
    found = _Watch(None, Recipe(batch_size=8, **recipe), tmp_path, set(), None, stop)  # type: ignore[arg-type]
    for step, loss in enumerate(losses, 1):
        found.on_log(None, SimpleNamespace(global_step=step), None, {"loss": loss})
    return found


def test_a_loss_at_chance_stops_the_trial(tmp_path: Path) -> None:
    chance = math.log(8 * 2)  # eight positives and as many hard negatives to choose from
    noise = np.random.default_rng(0).normal(0, 0.2, 300)
    at_chance = list(chance + noise)
    with pytest.raises(TrainingError, match=r"guessing \(2.773\) at step 2\d\d: nothing is learned"):
        watch(tmp_path, at_chance)
    watch(tmp_path, at_chance[: CHANCE_WINDOW - 1])  # too early to say
    watch(tmp_path, at_chance, stop=False)  # a control arm may learn nothing
    watch(tmp_path, list(chance * 0.97 + noise))
    watch(tmp_path, list(np.linspace(2 * chance, 0.1, 400)))  # on its way down, the mean of 200 passes chance
    with pytest.raises(TrainingError, match=r"guessing \(3.178\)"):
        watch(tmp_path, [math.log(24)] * 200, negatives=2)


def test_only_designs_are_stopped_at_chance(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The control arms are exempt: the broken one is meant to learn nothing."""
    prepared = prepare.prepare(Study.load(write(place, "arms", ("controls = false", "controls = true"))))
    stops: dict[str, set[bool]] = {}

    def train(*args: Any, stop_at_chance: bool, **options: Any) -> Any:
        stops.setdefault(role, set()).add(stop_at_chance)
        raise TrainingError("enough")

    monkeypatch.setattr(trial, "train", train)
    for one in prepared.trials:
        role = one.role
        if role != "reference":
            with pytest.raises(TrainingError, match="enough"):
                run_trial(one, prepared, tmp_path / one.name)
    assert stops.pop("design") == {True}
    assert {"aa", "broken"} <= stops.keys()
    assert set().union(*stops.values()) == {False}


# ---------------------------------------------------------------- several processes


def test_the_order_of_trials_does_not_matter(finished: Path, place: Path) -> None:
    assert run(write(place, "reversed", designs=LAYERS + M1), workers=2) == {}
    ours, theirs = scores(place / "reversed"), scores(finished)
    assert ours.drop("score").equals(theirs.drop("score"))
    difference = np.abs(ours["score"].to_numpy() - theirs["score"].to_numpy())
    assert np.nanmax(difference) < 1e-6


def test_shards_make_the_whole(finished: Path, place: Path, monkeypatch: Any, capsys: Any) -> None:
    path, folder = write(place, "shards"), place / "shards"
    for shard, words in (("1/2", "this shard is done"), ("2/2", "")):
        monkeypatch.setattr(sys, "argv", ["poolwise", "run", str(path), "--shard", shard, "--workers", "1"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        assert words in capsys.readouterr().err
        states = {label: state(folder, label)["state"] for label in ("m1", "layers", "tfidf")}
        if shard == "1/2":
            assert states == {"m1": "done", "layers": "waiting", "tfidf": "done"}
            assert not (folder / "report.md").exists()
    assert set(states.values()) == {"done"}
    assert (folder / "report.md").exists()
    assert weights(folder) == weights(finished)
    assert scores(folder).equals(scores(finished))


def test_two_runs_at_once_are_refused(place: Path) -> None:
    folder, path = place / "twice", write(place, "twice")
    folder.mkdir()
    with runner._only_one(folder, (1, 1)):
        for shard in ((1, 1), (1, 2)):
            with pytest.raises(PoolwiseError, match="another process is running the study"):
                run(path, shard=shard)
    with runner._only_one(folder, (1, 2)):
        for shard in ((1, 1), (1, 2)):
            with pytest.raises(PoolwiseError, match="another process is running the study"):
                run(path, shard=shard)
        with runner._only_one(folder, (2, 2)):  # the shards of one run go side by side
            pass
    assert {path.name for path in folder.iterdir()} <= {".lock", ".lock-1", ".lock-2"}


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
