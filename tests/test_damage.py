"""Damaged files are named and made again: checkpoints, milestones, exports, kept states, records, scores."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from poolwise.errors import CheckpointError, PoolwiseError
from poolwise.files import hashes, is_sealed, read_json, write_json
from poolwise.model import backbone, checkpoint
from poolwise.model.encoder import build
from poolwise.runs import layout, prepare
from poolwise.runs import run as runner
from poolwise.runs.train import COMPLETE, latest_checkpoint
from poolwise.runs.trial import run_trial
from poolwise.study import records
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from small_study import of, run, scores, weights, write
from tiny import tiny_folder


def flip(path: Path, at: int = -1, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def every_flip(path: Path, step: int = 1) -> Any:
    """The file with each of its bits flipped, one after the other; whole again at the end."""
    whole = path.read_bytes()
    for at in range(0, len(whole), step):
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            yield at, bit
    path.write_bytes(whole)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama"))


@pytest.fixture(scope="module")
def encoder(base: str) -> Any:
    recipe = Recipe(base_model=base, max_length=32, dtype="float32", steps=2, warmup_steps=0)
    return build(recipe, Design(name="x", attention="bidirectional", pooling="mean"), 0).eval()


def saved(folder: Path, step: int) -> Path:
    """A checkpoint of the trainer, as far as its files and its marker go."""
    path = layout.checkpoint(folder, step)
    path.mkdir(parents=True)
    (path / "adapter.safetensors").write_bytes(bytes(range(100)))
    write_json(path / COMPLETE, {"seconds": 1.0, "files": hashes(path)})
    return path


def test_a_flipped_checkpoint_is_named_and_an_earlier_one_is_used(tmp_path: Path, caplog: Any) -> None:
    first, second = saved(tmp_path, 2), saved(tmp_path, 4)
    assert latest_checkpoint(tmp_path) == second
    flip(second / "adapter.safetensors")
    with caplog.at_level(logging.WARNING, "poolwise"):
        assert latest_checkpoint(tmp_path) == first
    assert f"{second / 'adapter.safetensors'} is damaged" in caplog.text
    flip(first / COMPLETE, at=20)
    assert latest_checkpoint(tmp_path) is None


def test_a_training_goes_on_from_before_a_damaged_milestone(tmp_path: Path, encoder: Any, caplog: Any) -> None:
    first, second = saved(tmp_path, 2), saved(tmp_path, 4)
    checkpoint.save(encoder, layout.at_step(tmp_path, 3), step=3)
    assert latest_checkpoint(tmp_path, (3, 6)) == second
    flip(layout.at_step(tmp_path, 3) / "pooling.safetensors")
    with caplog.at_level(logging.WARNING, "poolwise"):
        assert latest_checkpoint(tmp_path, (3, 6)) == first
    assert "step-3/pooling.safetensors is damaged" in caplog.text
    assert not layout.at_step(tmp_path, 3).exists()
    assert not second.exists()
    checkpoint.save(encoder, layout.at_step(tmp_path, 2), step=2)
    flip(layout.at_step(tmp_path, 2) / "pooling.safetensors")
    assert latest_checkpoint(tmp_path, (2,)) is None
    assert not first.exists()  # it is that of the very step


def test_a_checkpoint_that_somebody_else_removes_is_no_failure(tmp_path: Path, monkeypatch: Any) -> None:
    first, gone = saved(tmp_path, 2), layout.checkpoint(tmp_path, 4)
    monkeypatch.setattr(layout, "checkpoints", lambda folder: {2: first, 4: gone})
    assert latest_checkpoint(tmp_path) == first


def test_every_flip_in_run_json_is_noticed(tmp_path: Path, encoder: Any) -> None:
    folder = checkpoint.save(encoder, tmp_path / "run", step=1)
    for _ in every_flip(folder / "run.json", step=7):
        with pytest.raises(CheckpointError, match=r"run\.json"):
            checkpoint.read_run(folder)
    assert checkpoint.read_run(folder)["step"] == 1


def test_every_flip_in_a_score_file_is_noticed(tmp_path: Path) -> None:
    """Its footer included, which the checksums of Parquet's pages leave out."""
    path = tmp_path / "t.parquet"
    layout.write_scores(path, [{"task": "t", "score": 0.5}, {"task": "t", "score": 0.25}])
    assert layout.read_scores(path).num_rows == 2  # type: ignore[union-attr]
    for at, bit in every_flip(path):
        assert not is_sealed(path.read_bytes()), (at, bit)
        if bit == 0 and at % 20 == 0:
            assert layout.read_scores(path) is None
    path.write_bytes(path.read_bytes()[:-9])
    assert layout.read_scores(path) is None


def test_a_record_is_what_was_written_or_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    row = {"name": "m1-s0", "label": "m1", "role": "design", "seed": 0, "base": None, "id": "x", "scores": []}
    write_json(path, {"trials": [row]})
    assert read_json(path) == {"trials": [row]}
    for _ in every_flip(path):
        assert records.find(path, records.Trials) is None
    path.write_text(json.dumps({"trials": [row]}))
    with pytest.raises(CheckpointError, match=r"trials\.json is damaged \(it has no checksum\); restore it"):
        records.read(path, records.Trials, "restore it")
    for wrong in ({**row, "name": "../../x"}, {**row, "seed": "0"}, {**row, "label": "\x1b[2J"}, {}):
        write_json(path, {"trials": [wrong]})
        with pytest.raises(CheckpointError, match=r"trials\.json is damaged \(trials\.0\."):
            records.read(path, records.Trials, "restore it")


def test_a_damaged_export_is_named(tmp_path: Path, encoder: Any) -> None:
    folder = checkpoint.export(encoder, tmp_path / "model")
    assert set(read_json(folder / "checksums.json")["files"]) >= {"modules.json", "model.safetensors"}
    (folder / "README.md").write_text("mine")
    checkpoint.load(folder)
    flip(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or changed"):
        checkpoint.load(folder)


def test_kept_states_of_another_type_are_not_believed(tmp_path: Path) -> None:
    """The bytes of a file's tensors may be whole while its header calls them something else."""
    states = backbone.FrozenStates(tmp_path)
    states.states([b"k" * 32], lambda rows: [torch.ones(2, 4) for _ in rows])
    states.share()
    (path,) = tmp_path.glob("*.safetensors")
    assert len(backbone.FrozenStates(tmp_path).known) == 1
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    assert not backbone.FrozenStates(tmp_path).known


def test_a_training_resumed_after_damage_ends_with_the_same_weights(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Bits of the adapter of the last checkpoint flip while nothing runs; it was resumed from in silence once."""
    prepared = prepare.prepare(Study.load(write(place, "flipped")))
    save, calls = checkpoint.save_weights, []

    def killed(encoder: Any, folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 4:  # checkpoint 2, milestone 3, checkpoint 4, milestone 6
            raise KeyboardInterrupt
        save(encoder, folder)

    first = prepared.trials[0]
    folder = tmp_path / first.name
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            run_trial(first, prepared, folder)
    adapter = folder / "training" / "checkpoint-4" / "adapter" / "adapter_model.safetensors"
    flip(adapter, at=-100, bit=6)
    with caplog.at_level(logging.WARNING, "poolwise"):
        run_trial(first, prepared, folder)
    assert f"{adapter} is damaged" in caplog.text
    assert json.loads((folder / "train.json").read_text())["resumed_from"] == 2
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("step-*/**/*.safetensors")}
    theirs = of(finished, "m1")
    assert found == {path.relative_to(theirs): path.read_bytes() for path in theirs.rglob("step-*/**/*.safetensors")}


def test_damage_in_a_finished_study_is_named_and_made_again(copy: Path, place: Path) -> None:
    """A milestone, a score file and records: one run names them all, and ends with the same weights and scores."""
    milestone = of(copy, "layers") / "training" / "step-3" / "pooling.safetensors"
    score = sorted(of(copy, "m1").glob("scores/*/*.parquet"))[0]
    layers = of(copy, "layers") / "layers.json"
    for path, at in ((milestone, -1), (score, -20), (layers, 5), (copy / "costs.json", 9), (copy / "trials.json", 9)):
        flip(path, at)
    heard: list[str] = []
    path = write(place, copy.name)
    options = {"workers": 1, "on_event": lambda event: heard.append(event[1][1]) if event[0] == "warning" else None}
    assert run(path, **options) == {}
    assert sorted(line.partition(" is damaged")[0] for line in heard) == sorted(map(str, (milestone, score)))
    assert weights(copy) == weights(place / "whole")
    assert scores(copy).equals(scores(place / "whole"))
    assert layout.stored_costs(Study.load(path))
    assert records.find(layers, records.LayerShares)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000, b"9" * 5000])
def test_half_written_and_foreign_records_are_named(content: bytes, tmp_path: Path) -> None:
    raw = {"name": "s", "baseline": "m1", "output": str(tmp_path), "designs": [{"preset": "m1"}], "tasks": ["demo"]}
    study = Study.parse(raw)
    for name in ("study.json", "trials.json", "costs.json", "looks.json", "results.parquet"):
        (tmp_path / name).write_bytes(content)
    for read in (lambda: layout.guard(study), lambda: runner.trials(study), lambda: runner.results(study)):
        with pytest.raises(PoolwiseError, match=r"(study|trials)\.json is damaged|results\.parquet is damaged"):
            read()
    assert layout.stored_costs(study) == []  # a cache: it is computed again
    trial = tmp_path / "trials" / "m1-s0"
    trial.mkdir(parents=True)
    for name in ("failed.json", "dtype.json", "work.json"):
        (trial / name).write_bytes(content)
    row = {"name": "m1-s0", "label": "m1", "role": "design", "seed": 0, "base": None, "id": "x", "scores": []}
    write_json(tmp_path / "trials.json", {"trials": [row]})
    (state,) = runner.trials(study)
    assert state["reason"] == f"unknown, because {trial / 'failed.json'} is damaged"
    shutil.rmtree(trial)
