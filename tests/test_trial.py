"""One trial: what a full disk, a wild loss or a loss at chance leaves behind, and how its training goes on."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from poolwise.errors import TrainingError
from poolwise.model import checkpoint
from poolwise.runs import layout, prepare, trial
from poolwise.runs.train import CHANCE_WINDOW, _Watch
from poolwise.runs.trial import run_trial
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from small_study import weights, write


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

    def full(path: Path) -> None:
        path.write_bytes(b"PAR1 half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("poolwise.runs.layout.seal", full)
        with pytest.raises(TrainingError, match="the disk is full"):
            run_trial(reference, prepared, tmp_path / "tfidf")
    assert not [path for path in (tmp_path / "tfidf" / "scores").rglob("*") if path.is_file()]
    run_trial(reference, prepared, tmp_path / "tfidf")
    assert (tmp_path / "tfidf" / "done").exists()
    files = layout.score_files(tmp_path / "tfidf")
    assert {layout.read_scores(file)["step"][0].as_py() for file in files} == {0}  # type: ignore[index]
    assert len(files) == 2


def test_a_disk_with_less_than_a_mebibyte_is_full(tmp_path: Path, monkeypatch: Any) -> None:
    """torch says only that it could not write."""
    for free, full in ((2**20 - 1, True), (2**20, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        reason = trial.reason_of(RuntimeError("PytorchStreamWriter failed"), tmp_path / "not" / "there")
        assert reason.startswith("the disk is full") is full


def test_what_a_full_gpu_memory_looks_like() -> None:
    """torch has its own error for it; libraries wrap it, and cuBLAS has another."""
    for error in (
        torch.OutOfMemoryError("full"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ):
        assert trial.ended_by_memory(error)
        wrapped = ValueError("a task failed")
        wrapped.__cause__ = error
        assert trial.ended_by_memory(wrapped)
        assert "set recipe.mini_batch_size, a smaller recipe.batch_size" in trial.reason_of(wrapped, Path())
    assert not trial.ended_by_memory(RuntimeError("CUDA error: device-side assert"))


def test_a_loss_that_is_not_finite_stops_the_trial(place: Path, tmp_path: Path) -> None:
    wild = ("learning_rate = 1e-3\nhead", "learning_rate = 1e30\nhead")
    prepared = prepare.prepare(Study.load(write(place, "wild", wild)))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d; lower recipe.learning_rate"):
        run_trial(prepared.trials[0], prepared, tmp_path / "wild")
    assert "the loss is" in json.loads((tmp_path / "wild" / "failed.json").read_text())["reason"]
    assert not list(tmp_path.rglob("train.json")) + list(tmp_path.rglob("*.parquet"))


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
