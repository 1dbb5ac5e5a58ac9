"""Folded weights are used only where nothing is trained, follow every change of the weights, and are never saved."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from poolwise.model.encoder import build
from poolwise.pooling import heads
from poolwise.pooling.folding import Folded
from poolwise.pooling.heads import CrossAttentionHead
from poolwise.study.catalogue import PRESETS, spec_of
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from test_folding import ATTENDING, CONTROLS, deviation, exact, folded, make, states_of
from tiny import tiny_folder


def test_only_where_nothing_is_trained(monkeypatch):
    head, states = make("cross_attention"), states_of((16, 7))
    head(states)
    head.train()
    with torch.no_grad():
        head(states)
    assert head._folded is None
    head.eval()
    expected = folded(head, states)
    first = head._folded
    folded(head, states)
    assert head._folded is first  # made once
    monkeypatch.setattr(CrossAttentionHead, "attend", None)
    with torch.inference_mode():
        assert torch.equal(head(states), expected)
    head.train()
    assert head._folded is None


@pytest.mark.parametrize(
    "change",
    [
        "adamw",
        "fused",
        "foreach",
        "sgd",
        "load",
        "assign",
        "data",
        "replaced",
        "in place",
        "inference mode",
        "reset",
        "bf16",
    ],
)
def test_a_changed_weight_is_seen(change):
    """Without `train()` in between: that alone would drop what was folded."""
    head, states = make("layer_cross_attention"), states_of((16, 7))
    before = folded(head, states)
    others = make("layer_cross_attention", seed=1).state_dict()
    if change in ("adamw", "fused", "foreach", "sgd"):
        options = {change: True} if change in ("fused", "foreach") else {}
        kind = torch.optim.SGD if change == "sgd" else torch.optim.AdamW
        optimizer = kind(head.parameters(), lr=0.1, **options)
        head(states).square().sum().backward()
        assert not head.training
        optimizer.step()
    elif change == "load":
        head.load_state_dict(others)
    elif change == "assign":
        for state in (others, make("layer_cross_attention", seed=2).state_dict(), others):
            head.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    elif change == "data":
        head.to_out.weight.data = 2 * head.to_out.weight.data
    elif change == "replaced":
        head.to_out.weight = torch.nn.Parameter(2 * head.to_out.weight.detach())
    elif change == "in place":
        with torch.no_grad():
            head.ffn_in.bias[3] += 1
    elif change == "inference mode":
        with torch.inference_mode():
            head.latents.mul_(2)
    elif change == "reset":
        head.reset_parameters(torch.Generator().manual_seed(5))
    else:
        head.bfloat16()
        assert head._folded is None
    after = folded(head, states)
    assert deviation(after, exact(head, states)) < (0.02 if change == "bf16" else 1e-6)
    assert not torch.equal(after, before)


def test_the_memory_of_a_folded_weight_is_not_used_again_while_it_is_folded():
    """A replaced weight is told by its address, so a new one must not get the address of the old."""
    head = make("cross_attention")
    folded(head, states_of((16, 7)), None)
    memory = StorageWeakRef(head.to_v.weight.untyped_storage())
    head.to_v.weight = torch.nn.Parameter(torch.zeros_like(head.to_v.weight))
    assert not memory.expired()
    folded(head, states_of((16, 7)), None)
    assert memory.expired()


def test_weights_made_in_inference_mode_are_not_folded():
    """Their changes could not be seen."""
    with torch.inference_mode():
        head = make("cross_attention")
        states = states_of((16, 7))
        assert deviation(head(states), exact(head, states)) < 1e-6
    assert head._folded is None


@pytest.mark.parametrize("name", [*ATTENDING, *CONTROLS])
def test_never_saved_nor_copied(name):
    head, states = make(name), states_of((16, 7))
    names = list(head.state_dict())
    size = len(pickle.dumps(head))
    expected = folded(head, states)
    assert list(head.state_dict()) == names == [key for key, _ in head.named_parameters()]
    assert not list(head.buffers())
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(head),
        copy.copy(head),
        pickle.loads(pickle.dumps(head)),
        torch.load(file, weights_only=False),
    ):
        assert twin._folded is None
        assert torch.equal(folded(twin, states), expected)
    assert len(pickle.dumps(head)) == size
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin.latents.mul_(2)
    assert not torch.equal(folded(twin, states), expected)
    assert torch.equal(folded(head, states), expected)


@pytest.mark.parametrize("name", [*ATTENDING, *CONTROLS])
def test_training_is_the_same_bit_for_bit(name):
    """Three steps with evaluations between them, and three without."""
    ends = []
    for evaluates in (False, True):
        head, seen = make(name).train(), []
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for step in range(3):
            if evaluates:
                folded(head.eval(), states_of((16, 7), seed=9))
                head.train()
            queries, documents = (head(states_of((16, 7), seed=2 * step + i)) for i in (0, 1))
            loss = F.cross_entropy(F.normalize(queries) @ F.normalize(documents).T / 0.05, torch.arange(5))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += [loss.detach(), *(p.grad.clone() for p in head.parameters() if p.grad is not None)]
        ends.append([*seen, *head.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# --- in an encoder ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama"))


TEXTS = ["the cat sat on the mat", "a dog", "some people walk to the river every morning", "water"] * 3


@pytest.mark.parametrize("preset", [*(name for name in PRESETS if PRESETS[name]["pooling"] in ATTENDING), *CONTROLS])
def test_encoding_uses_it_and_changes_nothing(preset, base, monkeypatch):
    design = PRESETS.get(preset, {"attention": "causal", "pooling": preset, "pooling_args": {}})
    small = {"latents": 4, "heads": 2, "head_dim": 8}
    args = {**design["pooling_args"], **{k: v for k, v in small.items() if k in spec_of(design["pooling"]).args}}
    recipe = Recipe(base_model=base, max_length=64)
    encoder = build(recipe, Design.model_validate({"name": "d", **design, "pooling_args": args}), 0)
    keys = list(encoder.state_dict())
    with_it = encoder.encode(TEXTS, batch_size=5, convert_to_tensor=True)
    assert isinstance(encoder[1].head._folded, Folded)
    assert list(encoder.state_dict()) == keys
    monkeypatch.setattr(heads, "foldable", lambda head: False)
    without = encoder.encode(TEXTS, batch_size=5, convert_to_tensor=True)
    assert (with_it - without).abs().max() < 1e-5
    assert (with_it[0] - with_it[1]).abs().max() > 1e-3
    encoder.train()
    assert encoder[1].head._folded is None
