"""Every single layer as an embedding: the same vectors as by hand, one forward a text, tables and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from poolwise.api import layers
from poolwise.cli import app
from poolwise.data.tasks import resolve_tasks
from poolwise.errors import CheckpointError
from poolwise.model.encoder import build
from poolwise.reports.layers import mean, tables
from poolwise.reports.pages import layers_page
from poolwise.runs.run import run, trials
from poolwise.scoring.evaluate import evaluate
from poolwise.scoring.layers import EveryLayer, OneLayer, probe_layers
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from tiny import SENTENCES, tiny_folder

LAYERS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of three layers and a task of twenty pairs."""
    folder = tmp_path_factory.mktemp("layers")
    tiny_folder(folder, "llama", num_hidden_layers=LAYERS)
    (folder / "pairs").mkdir()
    lines = [f"the heron {i},a fish {i * 7 % 5},{i * 5 % 11}" for i in range(20)]
    (folder / "pairs" / "test.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]))
    return folder


def encoder(place: Path, attention: str, pooling: str, **arguments: Any) -> Any:
    recipe = Recipe(base_model=str(place / "llama"), max_length=48)
    return build(recipe, Design(name="d", attention=attention, pooling=pooling, pooling_args=arguments), 0).eval()


@pytest.mark.parametrize(
    ("attention", "pooling", "arguments", "reduce"),
    [
        ("causal", "last_token", {}, "last"),
        ("bidirectional", "mean", {}, "mean"),
        ("causal", "layer_cross_attention", {"tokens": "last", "latents": 2}, "mean"),  # collects otherwise itself
    ],
)
def test_vectors_are_the_reduced_hidden_states(
    place: Path, tmp_path: Path, attention: str, pooling: str, arguments: dict[str, Any], reduce: str
) -> None:
    model = encoder(place, attention, pooling, **arguments)
    before = model.encode(list(SENTENCES))
    layers = EveryLayer(model, reduce, tmp_path)
    passes = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: passes.append(len(output["input_ids"])))
    found = [OneLayer(layers, layer).kept_vectors(SENTENCES, None, "", 4) for layer in range(LAYERS)]
    again = layers.vectors(1, SENTENCES[::-1], None, "", 4)
    handle.remove()
    layers.close()
    assert sum(passes) == len(SENTENCES)  # the backbone saw each text once
    np.testing.assert_array_equal(again, found[1][::-1])
    for row, text in enumerate(SENTENCES):
        features = model.preprocess([text])
        with torch.no_grad():
            states = model[0].model(
                **{k: features[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True
            )
        for layer, hidden in enumerate(states.hidden_states[1:]):
            expected = hidden[0, -1] if reduce == "last" else hidden[0].mean(0)
            expected = torch.nn.functional.normalize(expected, dim=-1)
            np.testing.assert_allclose(found[layer][row], expected, atol=1e-5)
    np.testing.assert_array_equal(model.encode(list(SENTENCES)), before)  # left as it was


def test_the_last_layer_of_a_plain_pooling_is_the_design(place: Path) -> None:
    """Mean pooling is the mean of the last layer: the probe of that layer scores as the design does."""
    tasks = resolve_tasks((str(place / "pairs"),), place)
    model = encoder(place, "bidirectional", "mean")
    rows = probe_layers(model, tasks, identity="x", reduce="mean", prompts={})
    assert [row["layer"] for row in rows] == [1, 2, 3]
    own = evaluate(model, tasks, identity="own", items=False, prompts={})
    assert rows[-1]["score"] == pytest.approx(own[0]["score"], abs=1e-6)
    assert rows[0]["score"] != pytest.approx(own[0]["score"], abs=1e-3)


def test_the_last_layer_of_m1_classifies_as_m1_does(place: Path) -> None:
    """Logistic regression is not blind to the length of vectors, as cosines are: layers must be normalised as well."""
    folder = place / "classes"
    folder.mkdir()
    for split, numbers in (("train", range(40)), ("test", range(40, 80))):
        lines = [f"{'the heron stands' if n % 2 else 'a fish waits'} {n * 7 % 13},{n * n % 3}" for n in numbers]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    tasks = resolve_tasks((str(folder),), place)
    model = encoder(place, "causal", "last_token")
    rows = probe_layers(model, tasks, identity="x", reduce="last", prompts={})
    design = evaluate(model, tasks, identity="own", items=False, prompts={})
    assert rows[-1]["score"] == pytest.approx(design[0]["score"], abs=1e-6)
    assert {row["task_type"] for row in rows} == {"Classification"}


@pytest.fixture(scope="module")
def study(place: Path) -> Study:
    content = {
        "name": "inside", "baseline": "mean-causal", "seeds": [0, 1], "tasks": ["./pairs"], "references": [],
        "controls": False, "evaluate_at": [1.0], "output": "runs",
        "recipe": {"base_model": "./llama", "dataset": "demo", "steps": 2, "batch_size": 4, "max_length": 48},
        "designs": [
            {"attention": "causal", "pooling": "mean"},
            {"name": "layers", "attention": "causal", "pooling": "layer_cross_attention",
             "pooling_args": {"latents": 2}},
        ],
    }  # fmt: skip
    made = Study.parse(content, base_dir=place)
    assert run(made, workers=2) == {}
    return made


@pytest.mark.slow
def test_a_look_at_a_study(study: Study, tmp_path: Path) -> None:
    found = layers(study)
    assert [(row["design"], row["seed"], row["reduce"]) for row in found["runs"]] == [
        ("mean-causal", 0, "mean"), ("layers", 0, "last"), ("mean-causal", 1, "mean"), ("layers", 1, "last"),
    ]  # fmt: skip
    plain, layered = found["runs"][:2]
    assert plain["attention"] is None
    assert sum(layered["attention"]) == pytest.approx(1)
    assert len(layered["weights"]) == LAYERS
    assert plain["scores"][-1]["score"] == pytest.approx(plain["own"][0]["score"], abs=1e-6)
    first, second = tables(found)
    assert first.columns == ("Layer", "STS")
    assert second.columns == ("Layer", "STS", "Attention, %", "Norm of weights")
    assert [row[0] for row in second.rows] == ["1", "2", "3", "the design"]
    assert "±" in second.rows[0][1]
    text = layers_page(found)
    assert text.count("<svg") == 2
    assert "://" not in text.replace("http://www.w3.org", "")
    # by its trial's folder, on the command line
    name = next(row["name"] for row in trials(study) if row["label"] == "layers" and row["seed"] == 1)
    trial = study.folder / "trials" / name
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study.base_dir)
        done = CliRunner().invoke(app, ["layers", str(trial), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runs"] == [found["runs"][3]]


@pytest.mark.slow
def test_what_is_not_trained_cannot_be_looked_at(study: Study, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trained design of label m9"):
        layers(study, design="m9")
    with pytest.raises(CheckpointError, match="neither a study file nor"):
        layers(tmp_path)


def test_means_by_task_then_type() -> None:
    rows = [{"task": t, "task_type": "STS", "score": s} for t, s in (("a", 0.2), ("a", 0.4), ("b", 0.9))]
    assert mean(rows, "STS") == pytest.approx(0.6)
