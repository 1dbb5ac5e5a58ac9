"""States of a frozen base: computed once, the same embeddings, losses and scores, shared between trials by files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from poolwise import train as training
from poolwise.decoder.frozen import FrozenStates
from poolwise.encoder import build
from poolwise.encoding import FastEncoder
from poolwise.running.preparation import prepare
from poolwise.running.runner import shared_work
from poolwise.running.trial import run_trial
from poolwise.scoring import score_files
from poolwise.study import Design, Recipe, Study
from tiny import SENTENCES, tiny_folder

DESIGNS = ("m2", "m3", "m4", "m5")
TEXTS = [*SENTENCES, "a short one", SENTENCES[0]]
WORDS = ["heron", "water", "ferry", "island", "river", "token", "layer", "mask", "model", "rate", "calm", "boat"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama"))


def encoder(base: str, preset: str, frozen: FrozenStates | None, **changes: Any) -> SentenceTransformer:
    given = {"max_length": 48, "lora": False, "warmup_steps": 0, **changes}
    made = build(Recipe(base_model=base, **given), Design(preset=preset), 0, device="cpu").eval()
    made[0].frozen = frozen
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
    kept.leave()
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


def test_no_room_and_damaged_files_only_cost_time(base: str, tmp_path: Path) -> None:
    expected = encoder(base, "m4", None).encode(TEXTS)
    full = FrozenStates(tmp_path, capacity=0)
    model = encoder(base, "m4", full)
    for _ in range(2):
        assert np.abs(model.encode(TEXTS) - expected).max() < 1e-5
    assert full.computed == 14
    full.leave()
    assert not list(tmp_path.iterdir())
    kept = FrozenStates(tmp_path)
    encoder(base, "m4", kept).encode(TEXTS)
    kept.leave()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    again = FrozenStates(tmp_path)
    assert np.abs(encoder(base, "m4", again).encode(TEXTS) - expected).max() < 1e-5
    assert again.computed == 7


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


def test_trials_share_the_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path, "llama")
    rows = [{"query": f"the {WORDS[i % 12]} {i}", "positive": f"a {i}", "negative": f"no {i}"} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"one {WORDS[i % 12]},two {WORDS[i * 5 % 12]} {i},{i * 7 % 11}" for i in range(20)]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "test.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]) + "\n")
    (tmp_path / "study.toml").write_text(STUDY)
    study = Study.load(tmp_path / "study.toml")
    prepared = prepare(study)
    work = []
    place = study.folder / "frozen" / "of-a-killed-run"
    place.mkdir(parents=True)
    for name, hours in ((".old.tmp", 7), (".new.tmp", 0)):
        (place / name).touch()
        os.utime(place / name, times=(time.time() - 3600 * hours,) * 2)
    for trial in prepared.trials:
        folder = study.folder / "trials" / trial.name
        run_trial(trial, prepared, folder)
        work.append(json.loads((folder / score_files.WORK).read_text()))
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
