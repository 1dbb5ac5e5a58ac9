"""The attention mode: declared, measured, and refused where a model does not follow (law 2 of the design)."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Gemma3TextConfig, RobertaConfig, T5Config

from poolwise.errors import AttentionError
from poolwise.model import attention
from poolwise.model.attention import (
    MODES,
    PADDINGS,
    check_window,
    get_attention,
    influence,
    partial_layers,
    position_ids,
    set_attention,
    sliding_window,
    verdict,
    verify,
)
from tiny import FAMILIES, VOCAB, tiny_model

T = 8
SEES = {"causal": torch.ones(T, T).tril() > 0, "bidirectional": torch.ones(T, T) > 0}
# (i, j) reachable through 2 layers, each of which looks 3 back (causal) or 4 to each side (bidirectional)
DISTANCE = torch.arange(T)[:, None] - torch.arange(T)
WINDOWED = {"causal": (DISTANCE >= 0) & (DISTANCE <= 6), "bidirectional": DISTANCE.abs() <= 8}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_follow_both_modes(family, backend):
    model = tiny_model(family, attn=backend)
    for mode in (*MODES, "causal"):
        set_attention(model, mode)
        assert get_attention(model) == mode
        verify(model, mode)
        expected = (WINDOWED if family == "mistral_window" else SEES)[mode]
        for padding in PADDINGS:
            seen = influence(model, padding) > 1e-6
            assert torch.equal(seen, expected), f"{mode}, {padding}:\n{seen.int()}"
        other = next(m for m in MODES if m != mode)
        with pytest.raises(AttentionError, match=f"is not {other}"):
            verify(model, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_follow_in_bf16(family):
    model = tiny_model(family, scale=3.0).bfloat16()
    for mode in MODES:
        set_attention(model, mode)
        verify(model, mode)
    with pytest.raises(AttentionError, match="is not causal"):
        verify(model, "causal")


@pytest.mark.parametrize(
    ("family", "backend", "mode", "case"),
    [
        ("gpt_neo", None, "bidirectional", "an unpadded"),
        ("mamba", None, "bidirectional", "an unpadded"),
        ("stablelm", "sdpa", "bidirectional", "an unpadded"),
        ("bert", "sdpa", "causal", "a left-padded"),
        ("bert", "eager", "causal", "an unpadded"),
    ],
)
def test_models_that_ignore_the_mode_are_refused_by_name(family, backend, mode, case):
    model = tiny_model(family, attn=backend)
    set_attention(model, mode)
    with pytest.raises(AttentionError) as error:
        verify(model, mode)
    text = str(error.value)
    other = next(m for m in MODES if m != mode)
    assert f"{type(model).__name__} on attention backend {attention.backend(model)!r}" in text
    assert f"not {mode} in {case} batch" in text
    assert "4 of 4 positions" in text
    assert f"config.is_causal = {mode == 'causal'}" in text
    assert f"attention = {other!r}" in text
    set_attention(model, other)
    verify(model, other)


def test_stablelm_follows_when_padded_or_eager():
    """The trap behind three padding cases: under SDPA it follows the mode in padded batches only."""
    model = tiny_model("stablelm", attn="sdpa")
    set_attention(model, "bidirectional")
    follows = {padding: bool((influence(model, padding) > 1e-6).all()) for padding in PADDINGS}
    assert follows == {"none": False, "left": True, "right": True}
    eager = tiny_model("stablelm", attn="eager")
    set_attention(eager, "bidirectional")
    verify(eager, "bidirectional")


class Patched(nn.Module):
    """A tiny backbone whose forward is spoiled by `change(inputs) -> inputs` or `after(states, inputs) -> states`."""

    def __init__(self, model, change=lambda inputs: inputs, after=lambda states, inputs: states):
        super().__init__()
        self.model, self.change, self.after = model, change, after
        self.config = model.config

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        inputs = self.change({"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids})
        return (self.after(self.model(**inputs)[0], inputs),)


@pytest.mark.parametrize(
    ("spoil", "mode", "message"),
    [
        ({"change": lambda x: {**x, "attention_mask": None}}, "causal", "left-padded.*content of the padding"),
        ({"change": lambda x: {**x, "attention_mask": None}}, "bidirectional", "left-padded.*content of the padding"),
        ({"change": lambda x: {**x, "position_ids": None}}, "causal", "left-padded.*against an unpadded batch"),
        ({"after": lambda s, x: s + x["input_ids"].flip(1)[..., None]}, "causal", "of 4 positions change with a later"),
        ({"after": lambda s, x: s * torch.nan}, "causal", "not finite"),
        ({"after": lambda s, x: s + torch.rand_like(s)}, "causal", "do not change with any earlier token"),
        ({"after": lambda s, x: x["input_ids"][..., None].float()}, "causal", "4 of 4 positions do not .* any earlier"),
        ({"after": lambda s, x: s.index_fill(1, torch.tensor(0), 1)}, "bidirectional", "1 of 4 .* any later token"),
    ],
    ids=["mask dropped", "mask dropped, bi", "positions dropped", "leak", "nan", "noise", "no attention", "one blind"],
)
def test_spoiled_forwards_are_seen(spoil, mode, message):
    # GPT-2 counts positions from the first column unless told otherwise
    model = Patched(tiny_model("gpt2"), **spoil)
    set_attention(model, mode)
    with pytest.raises(AttentionError, match=message):
        verify(model, mode)
    set_attention(model, mode)
    verify(Patched(model.model), mode)


def test_positions_with_an_offset_are_seen():
    """RoBERTa's own positions begin at padding_idx + 1, so explicit ones from 0 would silently be wrong."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModel.from_config(RobertaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes))
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    with pytest.raises(AttentionError, match="positions counted from 0"):
        verify(model, "bidirectional")


def test_position_ids():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    expected = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 1, 2, 2]])
    assert torch.equal(position_ids(mask), expected)
    assert torch.equal(position_ids(mask.bool()), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_is_irrelevant_bit_for_bit(family, mode):
    """With explicit positions, states of real tokens are equal whether the padding stands left or right."""
    model = tiny_model(family)
    set_attention(model, mode)
    ids = torch.arange(3, 3 + 12).view(2, 6)
    none = torch.ones_like(ids)

    def states(left, right):
        pads = [torch.full((2, n), 7) for n in (left, right)]
        mask = torch.cat([torch.zeros_like(pads[0]), none, torch.zeros_like(pads[1])], 1)
        out = model(torch.cat([pads[0], ids, pads[1]], 1), attention_mask=mask, position_ids=position_ids(mask))
        return out.last_hidden_state[:, left : left + 6].detach()

    assert torch.equal(states(4, 0), states(0, 4))
    assert torch.equal(states(4, 0), states(1, 3))
    torch.testing.assert_close(states(0, 0), states(4, 0), atol=1e-5, rtol=0)


def test_set_attention_names_what_is_wrong():
    model = tiny_model("llama")
    with pytest.raises(
        AttentionError, match=r"'bidirectonal'.*'causal', 'bidirectional'.*did you mean 'bidirectional'"
    ):
        set_attention(model, "bidirectonal")
    with pytest.raises(AttentionError, match="'both'"):
        verify(model, "both")
    with pytest.raises(AttentionError, match=r"'middle'.*'none', 'left', 'right'"):
        influence(model, "middle")
    t5 = AutoModel.from_config(T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(AttentionError, match="T5Model is an encoder-decoder"):
        set_attention(t5, "causal")


def test_get_attention_without_a_declaration():
    assert get_attention(tiny_model("llama")) == "causal"
    assert get_attention(tiny_model("mamba")) == "causal"
    assert get_attention(tiny_model("bert")) == "bidirectional"
    gemma = tiny_model("gemma3", use_bidirectional_attention=True)
    assert isinstance(gemma.config, Gemma3TextConfig)
    assert get_attention(gemma) == "bidirectional"
    verify(gemma, "bidirectional")


def test_peft_and_causal_lm_wrappers_follow():
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    peft = get_peft_model(tiny_model("qwen2"), lora)
    set_attention(peft, "bidirectional")
    assert get_attention(peft) == get_attention(peft.get_base_model()) == "bidirectional"
    verify(peft, "bidirectional")
    with pytest.raises(AttentionError, match="Qwen2Model on attention backend 'sdpa' is not causal"):
        verify(peft, "causal")
    lm = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    for parameter in lm.parameters():
        parameter.data.mul_(4)
    set_attention(lm, "bidirectional")
    verify(lm, "bidirectional")


def test_mode_survives_a_full_save(tmp_path):
    model = tiny_model("qwen3")
    set_attention(model, "bidirectional")
    model.save_pretrained(tmp_path)
    verify(AutoModel.from_pretrained(tmp_path), "bidirectional")


def test_tuple_outputs():
    model = tiny_model("llama")
    model.config.return_dict = False
    assert isinstance(model(torch.tensor([[5, 6]])), tuple)
    verify(model, "causal")


@pytest.mark.parametrize("probe", [lambda m: verify(m, "causal"), influence, verdict])
def test_the_probe_leaves_no_trace(probe):
    model = tiny_model("opt", dropout=0.5, layerdrop=0.5)
    model.train()
    model.decoder.layers[1].eval()
    model.decoder.layers[0].fc1.weight.requires_grad_(False)
    model(torch.tensor([[5, 6, 7]])).last_hidden_state.sum().backward()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    config, random = model.config.to_dict(), torch.get_rng_state()
    probe(model)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad == (name != "decoder.layers.0.fc1.weight")
        assert (p.grad is None and grads[name] is None) or torch.equal(p.grad, grads[name])
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)


def test_modes_are_restored_when_the_forward_fails():
    model = Patched(tiny_model("llama"), change=lambda inputs: 1 / 0).train()
    with pytest.raises(ZeroDivisionError):
        verify(model, "causal")
    assert all(module.training for module in model.modules())


def test_hooks_are_removed_when_the_forward_fails(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=3)
    set_attention(model, "bidirectional_last_1")
    monkeypatch.setattr(model.layers[2].mlp, "forward", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify(model, "bidirectional_last_1")
    assert not any(layer._forward_hooks for layer in model.layers)


def test_the_probe_touches_no_accelerator(monkeypatch):
    """A process that has initialised CUDA, or asked for it, cannot fork trials that use it."""

    def touched(*args, **kwargs):
        raise AssertionError("the probe asked for an accelerator")

    places = [
        (torch.cuda, ("_lazy_init", "is_available", "device_count", "current_device")),
        (torch._C, ("_cuda_init", "_cuda_getDeviceCount", "_accelerator_getAccelerator")),
        (torch.accelerator, ("current_accelerator", "is_available", "device_count")),
    ]
    for module, names in places:
        for name in names:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, touched)
    for mode in ("causal", "prefix", "bidirectional_last_1"):
        model = tiny_model("opt", dropout=0.5)
        set_attention(model, mode)
        verify(model, mode)
    verdict(model)


def test_the_probe_runs_on_one_thread(monkeypatch):
    inside = []
    model = Patched(tiny_model("llama"), after=lambda s, x: inside.append(torch.get_num_threads()) or s)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        verify(model, "causal")
        assert set(inside) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("vocab", [7, 20, 320])
def test_the_probe_uses_no_special_id(vocab):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 4]}
    model = tiny_model("llama", vocab_size=vocab, **special)
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    verify(model, "causal")
    ids = torch.cat([x.flatten() for x in seen])
    assert [x.shape for x in seen] == [(8, 5), (16, 8), (1, 5)]  # unpadded, both paddings, the model's own positions
    assert not set(ids.tolist()) & {0, 1, 2, 4}
    assert 0 <= int(ids.min()) <= int(ids.max()) < vocab


def test_a_vocabulary_too_small_to_probe():
    model = tiny_model("llama", vocab_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(AttentionError, match="LlamaModel: a vocabulary of 4 ids"):
        verify(model, "causal")


def test_verdict_tries_both_modes_and_restores_the_declared_one():
    model = tiny_model("stablelm", attn="sdpa")
    answer = verdict(model)
    assert not hasattr(model.config, "is_causal")
    assert {k: answer[k] for k in ("model", "backend", "dtype", "declared")} == {
        "model": "StableLmModel",
        "backend": "sdpa",
        "dtype": "float32",
        "declared": "causal",
    }
    causal, bidirectional = answer["modes"]["causal"], answer["modes"]["bidirectional"]
    assert causal["ok"]
    assert causal["reason"] is None
    assert not bidirectional["ok"]
    assert "not bidirectional in an unpadded batch" in bidirectional["reason"]
    assert set(bidirectional["influence"]) == set(PADDINGS)
    matrix = torch.tensor(json.loads(json.dumps(answer))["modes"]["bidirectional"]["influence"]["none"])
    assert torch.equal(matrix > 1e-6, SEES["causal"])
    for mode in ("bidirectional", "bidirectional_last_1", "prefix"):
        model = tiny_model("llama")
        set_attention(model, mode)
        assert verdict(model)["declared"] == mode
        assert get_attention(model) == mode
        verify(model, mode)


def test_flash_attention_with_a_bidirectional_window():
    model = tiny_model("mistral_window")
    assert sliding_window(model) == 4
    check_window(model, "bidirectional", 64)  # sdpa: any length
    model.config._attn_implementation = "flash_attention_2"
    check_window(model, "causal", 64)
    check_window(model, "bidirectional", 4)
    with pytest.raises(AttentionError, match=r"MistralModel has a sliding window of 4 tokens.*max_length = 5.*'sdpa'"):
        check_window(model, "bidirectional", 5)
    assert sliding_window(tiny_model("gemma3")) == 4
    assert sliding_window(tiny_model("gemma3", layer_types=["full_attention"] * 2)) is None
    assert sliding_window(tiny_model("qwen2", sliding_window=4)) is None  # use_sliding_window is False
    assert sliding_window(tiny_model("gpt2")) is None


CONVOLUTION = {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}


def test_layers_that_do_not_attend_to_all_tokens_are_named():
    assert partial_layers(tiny_model("llama")) is None
    assert partial_layers(tiny_model("gemma3")) == (
        "Of 2 layers 1 attend to all tokens; 1 to 4 tokens at most (bidirectional: to either side)."
    )
    chunked = tiny_model("gemma3")
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    assert "1 to some tokens at most" in str(partial_layers(chunked))
    chunked.config.attention_chunk_size = 8
    assert "1 attend to all tokens; 1 to 8 tokens at most (bidirectional: within their chunk)" in str(
        partial_layers(chunked)
    )
    assert partial_layers(chunked, 8) is None
    assert "2 to 4 tokens at most" in str(partial_layers(tiny_model("mistral_window")))
    assert partial_layers(tiny_model("lfm2", **CONVOLUTION)) == (
        "Of 2 layers 1 attend to all tokens; 1 (conv) read earlier tokens only, whatever the mode."
    )
    assert verdict(tiny_model("gemma3"))["layers"].startswith("Of 2 layers")


def test_a_base_with_convolutions_is_bidirectional_through_its_attention_alone():
    hybrid = tiny_model("lfm2", **CONVOLUTION)
    set_attention(hybrid, "bidirectional")
    verify(hybrid, "bidirectional")
    alone = tiny_model("lfm2", layer_types=["conv", "conv"], full_attn_idxs=[])
    set_attention(alone, "bidirectional")
    with pytest.raises(AttentionError, match="not bidirectional"):
        verify(alone, "bidirectional")
