"""Fused LoRA: gradients and files as PEFT's, a mask for each layer, exact resume, and PEFT's forward where it must."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file
from transformers import AutoModel

from poolwise.model import checkpoint, lora
from poolwise.model.encoder import build
from poolwise.model.hooks import decoder_layers
from poolwise.model.lora import fast_training, fused_lora, kept
from poolwise.runs import train as training
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe
from test_packing import apart, features, loss_and_gradient
from tiny import tiny_folder

CLOSE = 1e-5
DESIGNS = {name: Design.model_validate({"preset": name}) for name in ("m1", "m3", "m5")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: str(tiny_folder(folder, family)) for family in ("llama", "qwen2", "gpt2", "gemma3")}


def recipe(base: str, **changes: Any) -> Recipe:
    return Recipe(
        **{"base_model": base, "max_length": 64, "lora": Lora(rank=4, dropout=0.0), "warmup_steps": 0, **changes}
    )


def encoder_of(given: Recipe, design: Design) -> Any:
    """An encoder whose B is not zero, so that A has a gradient."""
    encoder = build(given, design, 0, device="cpu").train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


def both(given: Recipe, design: Design, layout: str = "packed") -> tuple[Any, Any]:
    """Loss and gradient with PEFT's forward, and with the fused one."""
    encoder = encoder_of(given, design)
    batch = features(encoder)
    with encoder[0].in_layout(layout):
        plain = loss_and_gradient(encoder, given, layout, batch)
        with fused_lora(encoder[0]) as (how, note):
            assert (how, note) == ("fused", None)
            return plain, loss_and_gradient(encoder, given, layout, batch)


@pytest.mark.parametrize("layout", ["packed", "grouped", "padded"])
@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_loss_and_gradient_are_those_of_peft(family: str, name: str, layout: str, bases: dict[str, str]) -> None:
    plain, fused = both(recipe(bases[family]), DESIGNS[name], layout)
    assert plain[1].norm() > 1e-2
    assert apart(fused, plain) < CLOSE


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"mini_batch_size": 2}], ids=["checkpointing", "cached loss"]
)
def test_recomputed_forwards(changes: dict[str, Any], bases: dict[str, str]) -> None:
    plain, fused = both(recipe(bases["llama"], **changes), DESIGNS["m5"])
    assert apart(fused, plain) < CLOSE


def test_reentrant_checkpoints(bases: dict[str, str]) -> None:
    encoder = encoder_of(recipe(bases["llama"]), DESIGNS["m1"])
    batch, model = features(encoder), encoder[0].model
    plain = loss_and_gradient(encoder, recipe(bases["llama"]), "padded", batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with fused_lora(encoder[0]):
        assert apart(loss_and_gradient(encoder, recipe(bases["llama"]), "padded", batch), plain) < CLOSE


def test_layers_that_share_an_input_are_one_group(bases: dict[str, str]) -> None:
    encoder = encoder_of(recipe(bases["llama"]), DESIGNS["m1"])
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    layer = decoder_layers(encoder[0].model)[0]
    with fused_lora(encoder[0]):
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_proj.group is attention.k_proj.group is attention.v_proj.group
        assert mlp.gate_proj.group is mlp.up_proj.group
        assert len({attention.q_proj.group, attention.o_proj.group, mlp.gate_proj.group, mlp.down_proj.group}) == 4
        base = attention.k_proj.base_layer.weight  # nothing is held twice
        assert base.data_ptr() - attention.q_proj.base_layer.weight.data_ptr() == 32 * 32 * base.element_size()
        assert dict(encoder.named_parameters()).keys() == before.keys()
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert {type(part) for part in encoder.modules() if isinstance(part, LoraLinear)} == {LoraLinear}
    assert not hasattr(layer.self_attn.q_proj, "group")


def reference(x: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor, *adapters: torch.Tensor) -> torch.Tensor:
    """The formula of the module's docstring for layers of two, one and one outputs, with scaling 2 and given masks."""
    parts = weight.split([2, 1, 1])
    a, b = adapters[:3], adapters[3:]
    dropped = [x * keep[i].view_as(x) / 0.75 for i in range(3)]
    return torch.cat([x @ parts[i].T + 2.0 * dropped[i] @ a[i].T @ b[i].T for i in range(3)], -1)


def test_dropout_by_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and all gradients under known masks, one for each layer."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    keep = (torch.rand(3, 10, 6, generator=generator) > 0.25).float()
    monkeypatch.setattr(lora, "kept", lambda shape, dropout, like: keep.view(shape))
    inputs = [draw(2, 5, 6).requires_grad_(), *(draw(3, 6).requires_grad_() for _ in range(3))]
    inputs += [draw(n, 3).requires_grad_() for n in (2, 1, 1)]
    weight, direction = draw(4, 6), draw(2, 5, 4)
    x, *adapters = inputs
    expected = reference(x, weight, keep, *adapters)
    found = lora._GroupFunction.apply(x, weight, None, [2, 1, 1], 2.0 / 0.75, 0.25, *adapters)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    ours = torch.autograd.grad((found * direction).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_drawn_for_each_layer_from_torchs_generator(dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    torch.manual_seed(3)
    masks = kept((3, 400, 251), 0.1, like)  # no multiple of four
    assert masks.dtype == dtype
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    share = masks.double().mean(dim=(1, 2))
    assert ((share - 0.9).abs() < 5 * (0.09 / 100_400) ** 0.5).all()
    assert abs(float(masks.double().mean(dim=(0, 1)).std()) / (0.09 / 1200) ** 0.5 - 1) < 0.2  # columns are independent
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((masks[one] * masks[other]).double().mean()) - 0.81) < 0.005
    assert not torch.equal(masks, kept((3, 400, 251), 0.1, like))
    torch.manual_seed(3)
    assert torch.equal(masks, kept((3, 400, 251), 0.1, like))


def test_bf16_is_no_less_precise_than_peft(bases: dict[str, str]) -> None:
    """Against the gradient of the same weights in fp32."""
    plain, fused = {}, {}
    for dtype in ("float32", "bfloat16"):
        plain[dtype], fused[dtype] = both(recipe(bases["llama"], dtype=dtype), DESIGNS["m5"])
    exact = plain["float32"][1]

    def off(found: tuple[float, torch.Tensor]) -> float:
        return 1 - float(torch.nn.functional.cosine_similarity(found[1], exact, dim=0))

    assert 0 < off(fused["bfloat16"]) < 2 * off(plain["bfloat16"])


def rows(steps: int) -> Any:
    words = ["cat", "dog", "river", "book", "water", "morning", "people", "home", "mat", "walk"]
    return training.Dataset.from_dict(
        {
            "query": [f"the {words[i % 10]} {words[i % 7]} {i}" for i in range(4 * steps)],
            "positive": [f"a {words[i % 10]} and {words[i % 7]} {i}" for i in range(4 * steps)],
        }
    )


class KilledError(Exception):
    """Stops a run in the middle."""


def test_a_killed_run_goes_on_to_the_same_weights(bases: dict[str, str], tmp_path: Path) -> None:
    """Law 6 with dropout: the masks after the resume are those of the run that was not interrupted."""
    given = recipe(
        bases["llama"], steps=6, batch_size=4, save_steps=2, lora=Lora(rank=4, dropout=0.3), learning_rate=1e-2
    )

    def kill(step: int, *_: float) -> None:
        if step == 3:
            raise KilledError

    def run(folder: Path, progress: Any = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        encoder = build(given, DESIGNS["m5"], 0, device="cpu")
        result = training.train(encoder, given, rows(6), folder, seed=0, progress=progress)
        return result, {name: p.detach().clone() for name, p in encoder.named_parameters() if p.requires_grad}

    whole, expected = run(tmp_path / "whole")
    assert whole["kernels"] == {"lora": "fused", "compiled": False, "notes": []}
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill)
    resumed, found = run(tmp_path / "killed")
    assert resumed["resumed_from"] == 2
    assert resumed["losses"] == whole["losses"]
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_what_is_saved_is_peft_s(bases: dict[str, str], tmp_path: Path) -> None:
    """Saved while the layers are fused, loaded by PEFT alone: the same states; merged: the same embeddings."""
    encoder = encoder_of(recipe(bases["llama"]), DESIGNS["m1"]).eval()
    (tmp_path / "plain").mkdir()
    (tmp_path / "fused").mkdir()
    checkpoint.save_weights(encoder, tmp_path / "plain")
    with fused_lora(encoder[0]):
        checkpoint.save_weights(encoder, tmp_path / "fused")
    plain, fused = (load_file(tmp_path / kind / "adapter/adapter_model.safetensors") for kind in ("plain", "fused"))
    assert plain.keys() == fused.keys()
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(bases["llama"]), str(tmp_path / "fused" / "adapter"))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = encoder[0].model(ids).last_hidden_state
        torch.testing.assert_close(by_peft(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    before = encoder.encode(["the cat", "a dog"])
    exported = checkpoint.export(encoder, tmp_path / "export")
    assert np.abs(checkpoint.load(exported).encode(["the cat", "a dog"]) - before).max() < 1e-5


def test_evaluation_inside_is_peft_s(bases: dict[str, str]) -> None:
    encoder = encoder_of(recipe(bases["llama"], lora=Lora(rank=4, dropout=0.5)), DESIGNS["m5"]).eval()
    texts = ["the cat sat on the mat", "water"]
    before = encoder.encode(texts)
    with fused_lora(encoder[0]):
        assert np.abs(encoder.encode(texts) - before).max() < 1e-5
        with encoder[0].model.disable_adapter():
            bare = encoder.encode(texts)
    with encoder[0].model.disable_adapter():
        assert np.abs(encoder.encode(texts) - bare).max() < 1e-6


def wrapped(base: str, **config: Any) -> Any:
    """An encoder with another kind of adapter than the recipe makes."""
    encoder = build(recipe(base, lora=False), DESIGNS["m1"], 0, device="cpu").train()
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION", "init_lora_weights": False}
    encoder[0].model = get_peft_model(encoder[0].model, LoraConfig(**{**settings, **config}))
    return encoder


def embeddings(encoder: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return encoder(encoder.preprocess(["the cat sat", "water"]))["sentence_embedding"]


@pytest.mark.parametrize(
    ("family", "config", "left"),
    [
        ("llama", {"use_dora": True}, "14 of 14"),
        ("llama", {"lora_bias": True}, "14 of 14"),
        ("qwen2", {"bias": "all"}, "6 of 14"),  # queries, keys and values have biases, which are trained then
        ("gpt2", {}, "8 of 8"),  # Conv1D
    ],
    ids=["dora", "lora bias", "trained bias", "conv1d"],
)
def test_what_it_does_not_know_runs_as_peft_has_it(
    family: str, config: dict[str, Any], left: str, bases: dict[str, str]
) -> None:
    encoder = wrapped(bases[family], **config)
    before = embeddings(encoder)
    with fused_lora(encoder[0]) as (how, note):
        assert how == "fused"
        assert note == f"{left} LoRA layers run as PEFT has them"
        torch.testing.assert_close(embeddings(encoder), before, rtol=1e-5, atol=1e-5)


def test_rank_stabilised_scaling_and_two_ranks(bases: dict[str, str]) -> None:
    encoder = wrapped(bases["llama"], use_rslora=True, rank_pattern={"v_proj": 2})
    before = embeddings(encoder)
    with fused_lora(encoder[0]) as (_, note):
        attention = decoder_layers(encoder[0].model)[0].self_attn
        assert note is None
        assert attention.q_proj.group is attention.k_proj.group is not attention.v_proj.group
        torch.testing.assert_close(embeddings(encoder), before, rtol=1e-5, atol=1e-5)


group_forward = lora._GroupFunction.forward


def wrong_forward(ctx: Any, *args: Any) -> torch.Tensor:
    return group_forward(ctx, *args) * 1.01


def failing_forward(ctx: Any, *args: Any) -> torch.Tensor:
    raise RuntimeError("no such kernel\nand more lines")


@pytest.mark.parametrize(
    ("forward", "reason"),
    [(wrong_forward, r"its states differ by \S+ of their size"), (failing_forward, "no such kernel")],
)
def test_layers_that_disagree_are_not_used(
    forward: Any, reason: str, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(recipe(bases["llama"]), DESIGNS["m1"])
    before = embeddings(encoder)
    monkeypatch.setattr(lora._GroupFunction, "forward", staticmethod(forward))
    with fused_lora(encoder[0]) as (how, note):
        assert how == "peft"
        assert re.fullmatch(f"LoRA runs as PEFT has it: {reason}", note)
        assert torch.equal(embeddings(encoder), before)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "fused"), ({"lora": False}, None), ({"lora": "full"}, None)],
    ids=["lora", "frozen", "full"],
)
def test_what_a_training_uses_on_a_cpu(changes: dict[str, Any], expected: str | None, bases: dict[str, str]) -> None:
    given = recipe(bases["llama"], **changes)
    encoder = build(given, DESIGNS["m1"], 0, device="cpu")
    with fast_training(encoder[0], given) as used:
        assert used == {"lora": expected, "compiled": False, "notes": []}
