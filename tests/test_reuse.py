"""What is reused between trials and runs is found by everything that it depends on: nothing stale is taken for new."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from poolwise.runs import layout
from poolwise.runs.prepare import Prepared, prepare
from poolwise.runs.trial import run_trial
from poolwise.study.study import Study
from tiny import tiny_folder

WORDS = ("heron", "water", "ferry", "island", "river", "token", "layer", "mask", "model", "rate", "calm", "boat")
LAYERS = {"pooling": "layer_cross_attention", "pooling_args": {"latents": 2, "tokens": "last"}}
MEANS = {"pooling": "layer_cross_attention", "pooling_args": {"latents": 2, "tokens": "mean"}}
CROSS = {"pooling": "cross_attention", "pooling_args": {"latents": 2}}


def furnish(folder: Path) -> Path:
    """A base model, sixteen training rows and a task of twenty pairs."""
    tiny_folder(folder, "llama")
    rows = [{"query": f"the {WORDS[i % 12]} {i}", "positive": f"a {i}", "negative": f"no {i}"} for i in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs").mkdir()
    write_task(folder, "one")
    return folder


def write_task(folder: Path, word: str) -> None:
    lines = [f"{word} {WORDS[i % 12]},two {WORDS[i * 5 % 12]} {i},{i * 7 % 11}" for i in range(20)]
    (folder / "pairs" / "test.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("reuse"))


def prepared(place: Path, output: Path, *designs: dict[str, Any]) -> Prepared:
    study = {
        "name": "reuse", "baseline": designs[0]["name"], "designs": list(designs), "seeds": [0], "tasks": ["./pairs"],
        "references": [], "controls": False, "evaluate_at": [1.0], "output": str(output),
        "recipe": {
            "base_model": "./llama", "dataset": "./train.jsonl", "steps": 2, "batch_size": 8, "warmup_steps": 0,
            "max_length": 32, "lora": False, "head_learning_rate": 1e-2,
        },
    }  # fmt: skip
    return prepare(Study.parse(study, base_dir=place))


def go(made: Prepared) -> dict[str, Path]:
    """Runs all trials; their folders by design."""
    folders = {}
    for trial in made.trials:
        folders[trial.label] = layout.trial(made.study.folder, trial.name)
        run_trial(trial, made, folders[trial.label])
    return folders


def score(folder: Path) -> list[float]:
    (file,) = layout.score_files(folder)
    table = layout.read_scores(file)
    assert table is not None
    return [row["score"] for row in table.to_pylist()]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"attention": "causal", **CROSS}, {"attention": "bidirectional", **CROSS}),
        ({"attention": "causal", **LAYERS}, {"attention": "causal", **MEANS}),
        ({"attention": "causal", **CROSS}, {"attention": "causal", **LAYERS}),
    ],
    ids=["attention", "tokens of a layer", "tokens or layers"],
)
def test_designs_that_read_other_states_do_not_share_them(
    place: Path, tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Two designs on an untuned base, in one study and each in its own: the same scores."""
    designs = [{"name": "one", **one}, {"name": "other", **other}]
    together = go(prepared(place, tmp_path / "together", *designs))
    for design in designs:
        (alone,) = go(prepared(place, tmp_path / design["name"], design)).values()
        assert score(together[design["name"]]) == score(alone)
    computed = [json.loads((folder / layout.WORK).read_text())["frozen_computed"] for folder in together.values()]
    assert min(computed) > 0


def test_a_base_with_dropout_has_no_states_kept(place: Path, tmp_path: Path) -> None:
    """Under dropout they differ from call to call."""
    config = AutoConfig.from_pretrained(place / "llama")
    assert config.attention_dropout == 0
    design = {"name": "one", "attention": "causal", **CROSS}
    go(prepared(place, tmp_path / "kept", design))
    assert list((tmp_path / "kept" / "frozen").glob("*/*"))
    dropping = furnish(tmp_path)
    config.attention_dropout = 0.1
    config.save_pretrained(dropping / "llama")
    go(prepared(dropping, tmp_path / "dropped", design))
    assert not (tmp_path / "dropped" / "frozen").exists()


def test_an_edited_task_is_scored_again(tmp_path: Path) -> None:
    place, design = furnish(tmp_path), {"name": "one", "attention": "causal", **CROSS}
    (folder,) = go(prepared(place, tmp_path / "runs", design)).values()
    before, (first,) = score(folder), layout.score_files(folder)
    write_task(place, "uno")
    go(prepared(place, tmp_path / "runs", design))
    assert len(layout.score_files(folder)) == 2
    first.unlink()
    assert score(folder) != before
    written = layout.score_files(folder)[0].stat().st_mtime_ns
    go(prepared(place, tmp_path / "runs", design))  # and once is enough
    assert layout.score_files(folder)[0].stat().st_mtime_ns == written


def test_damaged_scores_and_weights_are_named_and_made_again(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = prepared(place, tmp_path, {"name": "one", "attention": "causal", **CROSS})
    with caplog.at_level(logging.WARNING, "poolwise"):
        (folder,) = go(made).values()
        assert "damaged" not in caplog.text
        before, (file,) = score(folder), layout.score_files(folder)
        file.write_bytes(file.read_bytes()[:-9])
        go(made)
        assert f"{file} is damaged; its task is scored again" in caplog.text
        assert score(folder) == before
        weights = layout.milestone(folder, 2) / "pooling.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        file.unlink()
        go(made)
        assert "pooling.safetensors is damaged (its hash differs); the trial is trained again" in caplog.text
        assert score(folder) == before
