"""Costs against numbers worked out by hand, against published ones, and against modules that are really built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MixtralConfig, Qwen2Config

from poolwise.errors import ModelError
from poolwise.pooling import cost
from poolwise.pooling.cost import resolve_args
from poolwise.pooling.poolings import module_class
from poolwise.study.catalogue import POOLINGS, PRESETS
from tiny import FAMILIES, tiny_config, tiny_model

MISTRAL_7B = MistralConfig()  # the defaults are Mistral-7B-v0.1
QWEN2_HALF_B = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)


def preset(name: str, config) -> tuple[str, dict]:
    design = PRESETS[name]
    return design["pooling"], resolve_args(design["pooling"], design["pooling_args"], config)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("m2-paper", MISTRAL_7B, 1_278_275_584),
        ("m4-paper", MISTRAL_7B, 1_278_275_584),
        ("m3-paper", MISTRAL_7B, 1_278_406_656),
        ("m5-paper", MISTRAL_7B, 1_278_406_656),
        ("m2-paper", QWEN2_HALF_B, 245_216_384),
        ("m3-paper", QWEN2_HALF_B, 245_245_056),
        ("m1", MISTRAL_7B, 0),
    ],
)
def test_parameters_of_the_papers_heads(name, config, expected):
    assert cost.head_parameters(*preset(name, config), config) == expected


@pytest.mark.parametrize(
    ("config", "tokens", "base", "m2", "m3", "m4"),
    [  # GFLOP for one text
        (MISTRAL_7B, 32, 447, 1135, 1175, 1175),
        (MISTRAL_7B, 512, 7284, 1135, 1175, 1787),
        (QWEN2_HALF_B, 32, 23.0, 196, 206, 209),
        (QWEN2_HALF_B, 512, 389, 196, 206, 419),
    ],
)
def test_flops_of_the_papers_heads(config, tokens, base, m2, m3, m4):
    assert cost.base_flops(config, tokens) / 1e9 == pytest.approx(base, abs=0.5 if base > 100 else 0.05)
    for name, expected in (("m2-paper", m2), ("m3-paper", m3), ("m4-paper", m4), ("m5-paper", m3)):
        assert cost.head_flops(*preset(name, config), config, tokens) / 1e9 == pytest.approx(expected, abs=0.5)


def test_base_parameters():
    with_lm_head = 32000 * 4096  # an embedder does not run it
    assert cost.base_parameters(MISTRAL_7B) + with_lm_head == 7_241_732_096
    assert cost.base_parameters(QWEN2_HALF_B) == 494_032_768  # tied: no matrix of its own


def test_lora_parameters():
    assert cost.lora_parameters(MISTRAL_7B, 16, "all-linear") == 41_943_040
    assert cost.lora_parameters(QWEN2_HALF_B, 16, "all-linear") == 8_798_208
    # by hand: 32 layers × 8 × (4096 + 4096) for q, and 8 × (4096 + 1024) for v
    assert cost.lora_parameters(MISTRAL_7B, 8, ["q_proj", "v_proj"]) == 32 * 8 * (8192 + 5120)
    assert cost.lora_parameters(MISTRAL_7B, 8, r".*layers\.0\..*(q|v)_proj") == 8 * (8192 + 5120)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("target", ["all-linear", "default"])
def test_lora_parameters_are_those_of_peft(family, target):
    names = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "opt": ["fc1"], "phi3": ["qkv_proj"]}
    modules = target if target == "all-linear" else names[family]
    adapted = get_peft_model(tiny_model(family), LoraConfig(r=3, target_modules=modules))
    expected = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert cost.lora_parameters(tiny_config(family), 3, modules) == expected > 0


def test_base_flops_by_hand():
    # llama in tiny: width 32, 4 heads of 8 on 2 key/value heads, gated feed-forward of 48, 2 layers
    llama = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    # gpt2 in tiny: fused qkv, output, feed-forward of 4 × 32 without a gate
    gpt2 = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    opt = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    scores = 2 * 4 * 10 * 10 * 32
    for family, weights in (("llama", llama), ("gpt2", gpt2), ("opt", opt)):
        assert cost.base_flops(tiny_config(family), 10) == 2 * 10 * weights + scores, family
    # gemma's heads are 8 wide whatever the hidden size is: queries of 6 × 8 = 48 on a width of 32
    gemma = tiny_config("gemma", num_attention_heads=6, num_key_value_heads=2)
    weights = 2 * (32 * 48 + 2 * 32 * 16 + 48 * 32 + 3 * 32 * 48)
    assert cost.base_flops(gemma, 10) == 2 * 10 * weights + 2 * 4 * 10 * 10 * 48


def test_only_the_experts_that_a_token_visits_are_counted():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(
        **sizes, vocab_size=64, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, head_dim=8
    )
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 8 * 32 + 2 * 3 * 32 * 48
    assert cost.base_flops(config, 10) == 2 * 10 * weights + 4 * 100 * 32


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_base_parameters_are_those_of_the_model(family):
    assert cost.base_parameters(tiny_config(family)) == sum(p.numel() for p in tiny_model(family).parameters())


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_head_parameters_are_those_of_the_module(pooling, norm):
    config = tiny_config("llama")
    wanted = {"latents": 5, "heads": 3, "head_dim": 7, "ffn": 2, "norm": norm, "layer_weights": 9}
    wanted["heads"] = 4 if pooling == "attention" else 3  # only its heads must divide the width
    given = {name: value for name, value in wanted.items() if name in POOLINGS[pooling].args}
    for args in (resolve_args(pooling, given, config), resolve_args(pooling, {}, config)):
        with torch.device("meta"):
            module: Any = module_class(pooling)(config.hidden_size, config.num_hidden_layers, **args)
        assert cost.head_parameters(pooling, args, config) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "pooling", [name for name in POOLINGS if "latents" in POOLINGS[name].args and name != "latent_attention"]
)
@pytest.mark.parametrize("config", [MISTRAL_7B, QWEN2_HALF_B], ids=["mistral", "qwen2"])
def test_default_head_is_the_largest_below_five_percent(pooling, config):
    args = resolve_args(pooling, {}, config)
    assert args["latents"] == cost.default_latents(pooling, args, config) == 32
    args = {"tokens": "all", **args}
    priced = "cross_attention" if pooling.endswith("_ffn") else pooling
    budget = 0.05 * cost.base_flops(config, 32)
    assert cost.head_flops(priced, args, config, 32) < budget
    assert cost.head_flops(priced, {**args, "latents": 64}, config, 32) >= budget


@pytest.mark.parametrize(
    ("pooling", "args"),
    [
        ("latent_attention", {"latents": 24, "heads": 4}),
        ("attention", {}),
        ("layer_attention", {}),
        ("layer_mean_ffn", {}),
        ("cross_attention", {"latents": 8}),
        ("mean_ffn", {"latents": 8}),
    ],
)
def test_head_flops_are_those_that_torch_counts(pooling, args):
    """As formulas are written; what runs is less where W_2 follows a mean or queries do not depend on the text."""
    config = tiny_config("llama", num_hidden_layers=3)
    args, tokens, width = resolve_args(pooling, args, config), 11, config.hidden_size
    head: Any = module_class(pooling)(width, 3, **args)
    with FlopCounterMode(display=False) as counter:
        head.train()(torch.randn(1, tokens if head.reads == "tokens" else 3, width))
    saved = 0
    if pooling == "attention":  # sums of products, no matrix product for torch
        saved = 4 * tokens * width
    if "latents" in args:  # W_2 after the mean
        rows = tokens if pooling == "latent_attention" else args["latents"]
        saved = (rows - 1) * 2 * args["ffn"] * width * width
    if pooling in ("layer_attention",):  # weights are averaged before the values are summed: no product
        saved = 2 * 3 * 3 * width
    assert counter.get_total_flops() + saved == cost.head_flops(pooling, args, config, tokens)


def test_default_latents_on_a_base_too_small_for_the_promise():
    config = tiny_config("llama")
    args = resolve_args("cross_attention", {}, config)
    assert args["latents"] == 4
    assert cost.default_latents("cross_attention", args, config) == 4
    assert cost.head_flops("cross_attention", args, config, 32) > 0.05 * cost.base_flops(config, 32)


def test_a_smaller_feed_forward_leaves_room_for_more_latents():
    assert resolve_args("cross_attention", {"ffn": 1}, MISTRAL_7B)["latents"] == 64


def test_control_costs_fewer_flops_but_as_many_parameters():
    full, control = (resolve_args(name, {}, MISTRAL_7B) for name in ("cross_attention", "mean_ffn"))
    width = MISTRAL_7B.hidden_size
    missing = cost.head_parameters("cross_attention", full, MISTRAL_7B) - cost.head_parameters(
        "mean_ffn", control, MISTRAL_7B
    )
    assert missing == 2 * width  # the norm of the queries: 8,192 of 268,627,968
    assert cost.head_flops("mean_ffn", control, MISTRAL_7B, 32) < cost.head_flops(
        "cross_attention", full, MISTRAL_7B, 32
    )


def test_a_base_without_attention_is_refused():
    with pytest.raises(ModelError, match="MambaConfig has no attention heads"):
        cost.base_flops(tiny_config("mamba"), 32)


def test_meta_device_only():
    """A 7-billion-parameter base must cost no memory: every tensor that is built lies on the meta device."""
    assert {p.device.type for p in cost.skeleton(MISTRAL_7B).parameters()} == {"meta"}
