"""States of a frozen base: computed once, the same embeddings, losses and scores, shared between trials by files."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from poolwise.encoding.fast import FastEncoder
from poolwise.errors import TrainingError
from poolwise.files import write_json
from poolwise.model import backbone
from poolwise.model import encoder as building
from poolwise.model.backbone import FrozenStates
from poolwise.model.base import torch_dtype
from poolwise.model.encoder import build
from poolwise.runs import layout
from poolwise.runs import train as training
from poolwise.runs import trial as trials
from poolwise.runs.prepare import Prepared, prepare
from poolwise.runs.run import shared_work
from poolwise.runs.trial import run_trial
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from tiny import SENTENCES, tiny_folder

DESIGNS = ("m2", "m3", "m4", "m5")
TEXTS = [*SENTENCES, "a short one", SENTENCES[0]]
WORDS = ["heron", "water", "ferry", "island", "river", "token", "layer", "mask", "model", "rate", "calm", "boat"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama"))


def encoder(base: str, preset: str, kept: FrozenStates | None, **changes: Any) -> SentenceTransformer:
    given = {"max_length": 48, "lora": False, "warmup_steps": 0, **changes}
    made = build(Recipe(base_model=base, **given), Design(preset=preset), 0, device="cpu").eval()
    made[0].frozen = kept
    return made


@pytest.mark.parametrize("preset", DESIGNS)
def test_same_embeddings_and_one_forward_a_text(base: str, preset: str, tmp_path: Path) -> None:
    expected = encoder(base, preset, None).encode(TEXTS)
    kept = FrozenStates(tmp_path)
    model = encoder(base, preset, kept)
    assert np.abs(model.encode(TEXTS) - expected).max() < 1e-5
    assert (kept.asked, kept.computed) == (8, 7)
    assert np.abs(FastEncoder(model).encode(TEXTS) - expected).max() < 1e-5  # other batches, other padding
    assert kept.computed == 7
    kept.share()
    later = FrozenStates(tmp_path)
    assert np.abs(encoder(base, preset, later).encode(TEXTS) - expected).max() < 1e-5
    assert later.computed == 0


def test_what_is_pooled_is_part_of_the_key(base: str) -> None:
    prompt, kept = "query: ", FrozenStates()
    for include in (True, False):
        model = encoder(base, "m5", kept, include_prompt=include)
        plain = encoder(base, "m5", None, include_prompt=include)
        assert np.abs(model.encode(TEXTS, prompt=prompt) - plain.encode(TEXTS, prompt=prompt)).max() < 1e-5
    assert kept.computed == 14


def text_states(tokens: int, value: float) -> torch.Tensor:
    return torch.full((tokens, 16), value)


def ask(kept: FrozenStates, *numbers: int) -> list[float]:
    """Asks for texts of 4 tokens whose states are their number, 256 bytes each; what came back."""
    found = kept.states([bytes([n]) * 32 for n in numbers], lambda rows: [text_states(4, numbers[r]) for r in rows])
    return [float(states.unique()) for states in found]


def test_no_room_only_costs_time(base: str, tmp_path: Path) -> None:
    expected = encoder(base, "m4", None).encode(TEXTS)
    full = FrozenStates(tmp_path, capacity=0)
    model = encoder(base, "m4", full)
    for _ in range(2):
        assert np.abs(model.encode(TEXTS) - expected).max() < 1e-5
    assert full.computed == 14
    full.share()
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_read_and_grows_no_more(tmp_path: Path) -> None:
    """Room for five texts of 256 bytes: five are found by all later trials, and nothing is written beside them."""
    computed, sizes = [], []
    for _ in range(4):
        kept = FrozenStates(tmp_path, capacity=5 * 256)
        assert ask(kept, *range(8)) == list(range(8))
        kept.share()
        computed.append(kept.computed)
        sizes.append([path.stat().st_size for path in tmp_path.iterdir()])
    assert computed == [8, 3, 3, 3]
    assert len(sizes[0]) == 1
    assert sizes == [sizes[0]] * 4
    (file,) = tmp_path.iterdir()
    file.write_bytes(bytes(5 * 256))  # nor beside a full folder that cannot be read
    kept = FrozenStates(tmp_path, capacity=5 * 256)
    ask(kept, 1)
    kept.share()
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_does_not_fit_does_not_hide_those_that_do(tmp_path: Path) -> None:
    for names in (range(6), range(10, 12)):
        kept = FrozenStates(tmp_path)
        ask(kept, *names)
        kept.share()
    large, small = sorted(tmp_path.iterdir(), key=lambda path: -path.stat().st_size)
    large.rename(tmp_path / "a.safetensors")
    small.rename(tmp_path / "b.safetensors")
    kept = FrozenStates(tmp_path, capacity=3 * 256)
    ask(kept, 10, 11, 0)
    assert kept.computed == 1


def test_states_are_written_in_pieces_and_not_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials side by side, each with room for three texts in memory of its own."""
    monkeypatch.setattr(backbone, "PIECE", 3 * 256)
    one, other = FrozenStates(tmp_path), FrozenStates(tmp_path)
    for texts in (range(2), range(2, 4), range(4, 5)):
        for kept in (one, other):
            assert ask(kept, *texts) == list(texts)
            assert len(kept.new) < 3
    assert len(list(tmp_path.iterdir())) == 1
    for kept in (one, other):
        kept.share()
        assert kept.size == 5 * 256
        assert not kept.new
    assert len(list(tmp_path.iterdir())) == 2
    later = FrozenStates(tmp_path)
    assert ask(later, *range(5)) == list(range(5))
    assert (later.computed, later.size) == (0, 5 * 256)


def test_files_are_mapped_not_copied(tmp_path: Path) -> None:
    kept = FrozenStates(tmp_path)
    ask(kept, 1)
    kept.share()
    (file,) = tmp_path.iterdir()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    assert str(file) in maps.read_text()
    assert ask(kept, 1) == [1.0]  # also the process that wrote it lets its own copy go
    start, end = next(line.split()[0].split("-") for line in maps.read_text().splitlines() if str(file) in line)
    assert int(start, 16) <= kept.known[b"\1" * 32].data_ptr() < int(end, 16)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def zeroed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-600:-400] = bytes(200)
    path.write_bytes(content)


def without(missing: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = {name: part for name, part in load_file(path).items() if name != missing}
        save_file(content, path, {"sha256": "0"})

    return change


def other_lengths(path: Path) -> None:
    content = load_file(path)
    content["lengths"] = content["lengths"] + 1
    save_file(content, path, {"sha256": backbone._digest(**content)})


def unsigned(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [cut, zeroed, without("keys"), without("states"), other_lengths, unsigned])
def test_damaged_files_only_cost_time(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    kept = FrozenStates(tmp_path)
    ask(kept, *range(1, 6))
    kept.share()
    (file,) = tmp_path.iterdir()
    damage(file)
    again = FrozenStates(tmp_path)
    assert ask(again, *range(1, 6)) == list(range(1, 6))
    assert again.computed == 5
    again.share()
    assert FrozenStates(tmp_path).size == 5 * 256


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_states_that_cannot_be_written_are_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(content: Any, name: str, *rest: Any) -> None:
        Path(name).write_bytes(b"half")
        raise error

    kept = FrozenStates(tmp_path)
    ask(kept, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "save_file", full)
        kept.share()
    assert not list(tmp_path.iterdir())
    assert ask(kept, 1, 2, 3) == [1, 2, 3]
    assert kept.computed == 3
    assert len(kept.known) == 2  # and what can never be written does not fill the memory


@pytest.mark.parametrize("preset", DESIGNS)
def test_training_is_the_same(base: str, preset: str, tmp_path: Path) -> None:
    rows = [
        {"query": f"{WORDS[i]} {i}", "positive": f"the {WORDS[i]}", "negative_1": f"no {WORDS[i - 1]}"}
        for i in range(12)
    ]
    found = {}
    for name, kept in (("plain", None), ("kept", FrozenStates())):
        model = encoder(base, preset, kept, steps=6, batch_size=4, head_learning_rate=1e-2)
        recipe = Recipe(
            base_model=base, max_length=48, lora=False, warmup_steps=0, steps=6, batch_size=4, head_learning_rate=1e-2
        )
        done = training.train(model, recipe, Dataset.from_list([*rows, *rows]), tmp_path / name, seed=0)
        found[name] = list(done["losses"].values()), model.encode(TEXTS)
        if kept is not None:
            assert (kept.asked, kept.computed) == (2 * 36 + 8, 36 + 7)  # the second epoch ran on what the first left
    assert found["kept"][0] == pytest.approx(found["plain"][0], rel=1e-4)
    assert np.abs(found["kept"][1] - found["plain"][1]).max() < 1e-4
    assert abs(found["plain"][0][0] - found["plain"][0][-1]) > 1e-3  # something was learned


STUDY = """
name = "heads"
baseline = "m5"
seeds = [0, 1]
tasks = ["./pairs"]
references = []
controls = false
evaluate_at = [0.5, 1.0]

[recipe]
base_model = "./llama"
dataset = "./train.jsonl"
steps = 2
batch_size = 8
warmup_steps = 0
max_length = 32
lora = false
seed_varies = ["init", "order"]

[[designs]]
preset = "m5"
"""


def make(folder: Path, lora: str = "false") -> Prepared:
    """The study, made ready in `folder`."""
    tiny_folder(folder, "llama")
    rows = [{"query": f"the {WORDS[i % 12]} {i}", "positive": f"a {i}", "negative": f"no {i}"} for i in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"one {WORDS[i % 12]},two {WORDS[i * 5 % 12]} {i},{i * 7 % 11}" for i in range(20)]
    (folder / "pairs").mkdir()
    (folder / "pairs" / "test.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]) + "\n")
    (folder / "study.toml").write_text(STUDY.replace("lora = false", f"lora = {lora}"))
    return prepare(Study.load(folder / "study.toml"))


def go(prepared: Prepared, number: int) -> Path:
    """Runs one trial of a study; its folder."""
    trial = prepared.trials[number]
    folder = prepared.study.folder / "trials" / trial.name
    run_trial(trial, prepared, folder)
    return folder


def of_a_gpu(name: str) -> torch.dtype:
    """What `torch_dtype` says where a GPU computes in bfloat16."""
    return torch.bfloat16 if name == "auto" else torch_dtype(name)


def test_padding_that_is_pooled_is_computed_and_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = make(tmp_path)
    design = Design(attention="bidirectional", pooling="cross_attention", pooling_args={"masked": False})
    trial = replace(prepared.trials[0], design=design)
    model = trials._encoder(trial, prepared)
    trials._freeze(model, trial, tmp_path / "trials" / "one")
    texts = ["a", "a text that is longer than the other one"]
    masked = model.encode(texts)
    assert model[0].frozen.asked == 2
    with model[0].pooling_padding():
        padded = model.encode(texts)
    assert model[0].frozen.asked == 2
    assert abs(padded - masked).max() > 1e-3


def test_a_full_disk_for_the_states_fails_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: Any, name: str, *rest: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    prepared = make(tmp_path)
    monkeypatch.setattr(backbone, "save_file", full)
    folder = go(prepared, 0)
    assert (folder / "done").exists()
    assert not (folder / "failed.json").exists()
    assert not [path for path in (prepared.study.folder / "frozen").rglob("*") if path.is_file()]


def test_states_of_another_dtype_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = make(tmp_path)
    trial, computed = prepared.trials[0], []
    for machine in (torch_dtype, torch_dtype, of_a_gpu):
        monkeypatch.setattr(building, "torch_dtype", machine)
        model = trials._encoder(trial, prepared)
        trials._freeze(model, trial, prepared.study.folder / "trials" / trial.name)
        model.encode(TEXTS)
        computed.append(model[0].frozen.computed)
        model[0].frozen.share()
    assert computed == [7, 0, 7]


@pytest.mark.parametrize("lora", ["false", '"full"'])
def test_trials_of_two_dtypes_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str) -> None:
    """The names of the trials are the same on both machines: they follow from the study file."""
    monkeypatch.chdir(tmp_path)
    prepared = make(tmp_path, lora)
    first = go(prepared, 0)
    assert json.loads((first / "dtype.json").read_text())["dtype"] == "float32"
    with monkeypatch.context() as gpu:
        for module in (building, trials):
            gpu.setattr(module, "torch_dtype", of_a_gpu)
        again = prepare(prepared.study)
        assert [trial.name for trial in again.trials] == [trial.name for trial in prepared.trials]
        words = f"'auto' is bfloat16 on this machine, but the trial {first.name} was computed in float32.* or delete .*"
        with pytest.raises(TrainingError, match=words):
            go(again, 1)
        go(again, 0)  # it is done: nothing is made
        (first / "done").unlink()
        next(first.glob("scores/*/*.parquet")).unlink()
        with pytest.raises(TrainingError, match=words):  # nor are the scores of one trial
            go(again, 0)
    assert json.loads((first / "dtype.json").read_text())["dtype"] == "float32"
    assert (go(prepared, 0) / "done").exists()
    second = go(prepared, 1)
    assert (second / "done").exists()


def test_only_what_is_kept_on_this_base_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a trial that left nothing, nor one of another base, nor one of an earlier version, nor a damaged record."""
    monkeypatch.chdir(tmp_path)
    prepared = make(tmp_path)
    trial, place = prepared.trials[0], prepared.study.folder / "trials"
    record = {"base": trial.spec["base"], "dtype": "bfloat16", "device": "cpu"}
    for name, content in (("nothing", record), ("base", {**record, "base": "x"}), ("old", None), ("odd", {"dtype": 1})):
        (place / name).mkdir(parents=True)
        if name != "nothing":
            (place / name / "training" / "step-2").mkdir(parents=True)
        if content is not None:
            write_json(place / name / "dtype.json", content)
    model = trials._encoder(trial, prepared)
    (place / trial.name).mkdir()
    trials._record_dtype(model, trial, place / trial.name)
    (place / "nothing" / "training" / "step-2").mkdir(parents=True)
    with pytest.raises(TrainingError, match="the trial nothing was computed in bfloat16"):
        trials._record_dtype(model, trial, place / trial.name)
    explicit = replace(trial, spec={**trial.spec, "recipe": {**trial.spec["recipe"], "dtype": "float32"}})
    trials._record_dtype(model, explicit, place / trial.name)


def test_trials_share_the_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = make(tmp_path)
    study = prepared.study
    work = []
    place = study.folder / "frozen" / "of-a-killed-run"
    place.mkdir(parents=True)
    for name, hours in ((".old.tmp", 7), (".new.tmp", 0)):
        (place / name).touch()
        os.utime(place / name, times=(time.time() - 3600 * hours,) * 2)
    for number in range(2):
        work.append(json.loads((go(prepared, number) / layout.WORK).read_text()))
    assert 32 < work[0]["frozen_computed"] <= 48 + 32  # training texts, and evaluation texts at the first of two steps
    assert work[0]["frozen_asked"] >= 48 + 2 * 32  # and those that show where the head looks
    assert work[1]["frozen_computed"] == 0  # the second run differs in its first weights and the order
    assert work[1]["frozen_asked"] == work[0]["frozen_asked"]
    assert [path.name for path in place.iterdir()] == [".new.tmp"]
    assert work[0]["asked"] == 2 * 40
    assert work[0]["encoded"] == 2 * 32
    words = shared_work(study)
    assert words is not None
    assert f"ran on {work[0]['frozen_computed']} of the {2 * work[0]['frozen_asked']}" in words
    assert torch.is_grad_enabled()
