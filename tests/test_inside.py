"""What a head looks at: the attention of its own forward, averaged; left behind by a trial and shown as a heat map."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from poolwise.errors import ModelError
from poolwise.files import write_json
from poolwise.model.encoder import build
from poolwise.reports import layers as layers_report
from poolwise.runs import layout, trial
from poolwise.scoring.layers import attends_to_layers, layer_attention, layer_weights
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from tiny import SENTENCES, tiny_folder

LAYERS = Design(
    name="layers", attention="causal", pooling="layer_cross_attention", pooling_args={"latents": 4, "init": "paper"}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def encoder(folder):
    return build(Recipe(base_model=str(folder), max_length=32), LAYERS, 0, device="cpu").eval()


def test_the_weights_are_those_of_the_forward(encoder):
    """weights · values, through W_o and the feed-forward, is the head's own output."""
    head = encoder[1].head
    states = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(0))
    weights = head.attention_weights(states)
    assert weights.shape == (5, 4, 4, 3)
    value = head._split(head.to_v(head.norm_states(states + head.layer_weights)))
    attended = (weights @ value).transpose(1, 2).flatten(2)
    again = head.feed_forward(head.latents + head.to_out(attended))
    torch.testing.assert_close(again, head(states, None), rtol=1e-5, atol=1e-5)


def test_shares_sum_to_one_whatever_the_batch(encoder):
    one, all_ = (layer_attention(encoder, SENTENCES, batch_size=size) for size in (1, 8))
    assert one.shape == (3,)
    assert one.sum() == pytest.approx(1)
    assert one == pytest.approx(all_, abs=1e-6)
    assert np.ptp(one) > 0.01  # a random paper head does not look evenly
    two = [layer_attention(encoder, [text]) for text in SENTENCES]
    assert np.mean(two, axis=0) == pytest.approx(one, abs=1e-6)


def test_a_head_without_queries_looks_evenly(folder):
    even = build(Recipe(base_model=str(folder), max_length=32), LAYERS, 0, device="cpu").eval()
    with torch.no_grad():
        even[1].head.to_q.weight.zero_()
    assert layer_attention(even, SENTENCES) == pytest.approx([1 / 3] * 3)
    assert not even[1].head._forward_pre_hooks


def test_layer_weights(encoder):
    found = layer_weights(encoder)
    assert found.shape == (3, 32)
    assert found == pytest.approx(encoder[1].head.layer_weights.detach().numpy())


def test_other_poolings_are_refused(folder):
    mean = build(
        Recipe(base_model=str(folder), max_length=32), Design(name="mean", attention="causal", pooling="mean"), 0
    )
    assert not attends_to_layers(mean)
    with pytest.raises(ModelError, match="mean: only layer_cross_attention attends to layers"):
        layer_attention(mean, SENTENCES)
    with pytest.raises(ModelError, match="only layer_cross_attention"):
        layer_weights(mean)


def test_no_text_is_refused(encoder):
    with pytest.raises(ModelError, match="no texts"):
        layer_attention(encoder, [])


def test_a_trial_leaves_it_behind_and_a_report_finds_it(encoder, tmp_path):
    tasks = [SimpleNamespace(texts=lambda: iter(SENTENCES)), SimpleNamespace(texts=lambda: iter(SENTENCES[:2]))]
    raw = {"name": "s", "baseline": "layers", "output": "runs", "designs": [LAYERS.model_dump(exclude={"preset"})]}
    study = Study.parse(raw, base_dir=tmp_path)
    common = {"label": "layers", "role": "design", "base": "b", "id": "x"}
    rows = [{"name": f"layers-s{s}", "seed": s, **common} for s in (0, 1)]
    for row in rows:
        place = study.folder / "trials" / row["name"]
        place.mkdir(parents=True)
        trial._look_at_layers(encoder, SimpleNamespace(tasks=tasks), place)
    write_json(study.folder / "trials.json", {"trials": rows})
    found = layout.layer_attention(study, rows)
    assert found["texts"] == 8
    assert list(found["runs"]) == ["layers"]
    expected = layer_attention(encoder, [*SENTENCES, *SENTENCES[:2]])
    assert found["runs"]["layers"][1] == pytest.approx(expected.tolist(), abs=1e-9)
    table = layers_report.attention_table(found["runs"], found["texts"])
    assert [row[0] for row in table.rows] == ["1", "2", "3"]
    assert sum(float(row[1].split(" ")[0]) for row in table.rows) == pytest.approx(100, abs=0.2)
    (panel,) = layers_report.attention_panel(found["runs"])
    assert "layers · 1 most on layer" in panel.alt
    assert layers_report.attention_table({}, 0) is None
    assert layers_report.attention_panel({}) == []
