"""Attention by layer and by token: exact masks on every padding side, verified, refused where impossible."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

from poolwise.errors import AttentionError
from poolwise.model.attention import MODES, PADDINGS, get_attention, influence, position_ids, set_attention, verify
from poolwise.model.hooks import (
    LayerMasks,
    attending,
    layer_masks,
    output_projections,
    reachable,
    visible,
    zero_at_padding,
)
from tiny import tiny_model

FAMILIES = ["llama", "mistral", "mistral_window", "qwen2", "gemma3", "gpt2", "opt", "phi3"]
OTHER = ["bidirectional_last_1", "bidirectional_last_2", "prefix", "causal_prefix"]
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0] * 4 + [1] * 8, [1] * 9 + [0] * 3])


def states(model, mask: torch.Tensor = MASK, prefix: int = 0, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad(), attending(model, mask, prefix):
        return model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).last_hidden_state


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_every_layer_are_the_bidirectional_model(family, attn):
    """Bit for bit, left- and right-padded rows in one batch, sliding windows shorter than the text among them."""
    model = tiny_model(family, attn=attn)
    set_attention(model, "causal")
    causal = states(model)
    set_attention(model, "bidirectional")
    flag = states(model)
    set_attention(model, f"bidirectional_last_{model.config.num_hidden_layers}")
    real = MASK.bool()
    assert torch.equal(states(model)[real], flag[real])
    assert (flag - causal)[real].abs().max() > 0.01
    set_attention(model, "prefix")
    assert torch.allclose(states(model, prefix=0)[real], causal[real], atol=2e-5)  # no prompt: causal
    set_attention(model, "causal_prefix")
    assert torch.equal(states(model, prefix=0)[real], flag[real])  # no prompt: bidirectional
    set_attention(model, "causal")
    assert torch.equal(states(model), causal)  # the hooks are gone
    assert layer_masks(model) is None


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", OTHER)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_2_modes_are_verified(family, mode, attn):
    model = tiny_model(family, attn=attn, **({} if family == "gemma3" else {"num_hidden_layers": 3}))
    set_attention(model, mode)
    assert get_attention(model) == mode
    verify(model, mode)
    for other in {*OTHER, *MODES} - {mode}:
        if model.config.num_hidden_layers == 2 and {mode, other} == {"bidirectional", "bidirectional_last_2"}:
            continue  # the same thing
        if mode in ("bidirectional_last_1", "bidirectional_last_2") and other == "bidirectional":
            continue  # no last state tells them apart: what the inner layers show does
        with pytest.raises(AttentionError, match=f"is not {other} in an unpadded batch"):
            verify(model, other)


def test_the_inner_layers_decide_which_layers_are_bidirectional():
    model = tiny_model("llama", num_hidden_layers=4)
    set_attention(model, "bidirectional_last_2")
    with pytest.raises(AttentionError, match=r"after layer 3, which must be causal, .* change with a later token"):
        verify(model, "bidirectional_last_1")
    with pytest.raises(AttentionError, match=r"after layer 2, which must be bidirectional, .* do not change"):
        verify(model, "bidirectional_last_3")
    set_attention(model, "bidirectional")
    with pytest.raises(AttentionError, match="after layer 2, which must be causal"):
        verify(model, "bidirectional_last_2")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", OTHER)
def test_influence_is_exactly_what_the_mode_says(mode, padding):
    model = tiny_model("qwen2")
    set_attention(model, mode)
    assert torch.equal(influence(model, padding) > 1e-6, reachable(mode, 8, 3))


def test_reachable_by_hand():
    text = {
        "causal": ["1000", "1100", "1110", "1111"],
        "bidirectional": ["1111"] * 4,
        "bidirectional_last_3": ["1111"] * 4,
        "prefix": ["1100", "1100", "1110", "1111"],
        "causal_prefix": ["1000", "1100", "1111", "1111"],
    }
    for mode, rows in text.items():
        assert [[int(c) for c in row] for row in rows] == reachable(mode, 4, 2).int().tolist(), mode


def test_visible_with_padding_and_a_window_by_hand():
    """Padding on both sides sees itself alone; a window of 2 reaches 1 back, or 2 where both ways are open."""
    real = torch.tensor([[0, 1, 1, 1, 1, 0]]).bool()
    prefix = torch.tensor([[0, 1, 1, 0, 0, 0]]).bool()
    rows = {
        "causal": ["100000", "010000", "011000", "001100", "000110", "000001"],
        "prefix": ["100000", "011000", "011000", "001100", "000110", "000001"],
        "causal_prefix": ["100000", "010000", "011000", "011110", "001110", "000001"],
        "bidirectional_last_1": ["100000", "011100", "011110", "011110", "001110", "000001"],
    }
    for mode, expected in rows.items():
        found = visible(mode, real, prefix, window=2)
        found = found.expand(1, 6, 6)[0].int().tolist()
        assert found == [[int(c) for c in row] for row in expected], mode


def test_prompts_of_different_length_in_one_batch():
    model = tiny_model("llama")
    set_attention(model, "prefix")
    together = states(model, prefix=torch.tensor([2, 5]))
    for row, prefix in enumerate((2, 5)):
        alone = states(model, MASK[row : row + 1], prefix, IDS[row : row + 1])
        real = MASK[row].bool()
        assert torch.allclose(together[row][real], alone[0][real], atol=1e-5)
    assert not torch.allclose(together, states(model, prefix=2), atol=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_a_batchs_masks_end_with_it(fails):
    """Also if its forward fails: another batch of the same shape must not be read with them."""
    model = tiny_model("llama")
    set_attention(model, "prefix")
    with contextlib.suppress(ZeroDivisionError), attending(model, MASK, 2):
        model(input_ids=IDS, attention_mask=MASK)
        if fails:
            raise ZeroDivisionError
    with pytest.raises(AttentionError, match="needs the padding mask of the batch"):
        model(input_ids=IDS, attention_mask=MASK)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_what_attention_gives_at_padding_is_zero_before_its_projection(family):
    model, seen = tiny_model(family), []
    with zero_at_padding(model, MASK):
        look = lambda module, args: seen.append(args[0])  # noqa: E731
        handles = [projection.register_forward_pre_hook(look) for projection in output_projections(model)]
        states(model)
    real = MASK.bool()
    assert len(seen) == 2
    assert all((x[~real] == 0).all() and (x[real] != 0).any(dim=-1).all() for x in seen)
    states(model)
    assert all((x[~real] != 0).any() for x in seen[2:])
    for handle in handles:
        handle.remove()


def test_a_model_that_ignores_its_masks_is_refused(monkeypatch):
    model = tiny_model("llama")
    set_attention(model, "prefix")
    monkeypatch.setattr(LayerMasks, "_give", lambda self, kind, layer, args, kwargs: (args, kwargs))
    layer_masks(model).remove()
    with pytest.raises(AttentionError, match="is not prefix in an unpadded batch"):
        verify(model, "prefix")


def test_refusals():
    model = tiny_model("llama")
    with pytest.raises(AttentionError, match=r"'bidirectional_last_3': LlamaModel has 2 layers"):
        set_attention(model, "bidirectional_last_3")
    with pytest.raises(AttentionError, match=r"'prefixed': allowed are 'causal', .*did you mean 'prefix'"):
        set_attention(model, "prefixed")
    for wrong in ("bidirectional_last_0", "bidirectional_last_", "bidirectional_last_N"):
        with pytest.raises(AttentionError, match="allowed are"):
            set_attention(model, wrong)
    for flash in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation = flash
        with pytest.raises(
            AttentionError, match=r"takes no mask for single tokens\. Fix: attn_implementation = 'sdpa'"
        ):
            set_attention(model, "prefix")
    model.config._attn_implementation = "sdpa"
    set_attention(model, "prefix")
    with pytest.raises(AttentionError, match="needs the padding mask of the batch"):
        model(input_ids=IDS, attention_mask=MASK)
    with pytest.raises(AttentionError, match="take no mask of their own"):
        set_attention(tiny_model("mamba"), "prefix")


def test_flash_attention_is_told_by_its_flag_and_keeps_its_mask():
    """What FlashAttention's layers would get; the kernel itself needs a GPU."""
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    set_attention(model, "bidirectional_last_1")
    hooks = [list(layer._forward_pre_hooks.values()) for layer in model.layers]
    assert [len(found) for found in hooks] == [0, 1]
    _, given = hooks[1][0](model.layers[1], (), {"attention_mask": MASK, "is_causal": True})
    assert given["is_causal"] is False
    assert given["attention_mask"] is MASK


def test_copies_pickles_and_adapters_keep_the_mode():
    model = tiny_model("llama")
    set_attention(model, "prefix")
    expected = states(model, prefix=3)
    before = set(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert get_attention(twin) == "prefix"
        assert layer_masks(twin) is not layer_masks(model)
        assert torch.equal(states(twin, prefix=3), expected)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(states(adapted, prefix=3), expected)
    verify(adapted, "prefix")
    merged = adapted.merge_and_unload()
    assert torch.allclose(states(merged, prefix=3), expected, atol=1e-5)
    assert set(model.state_dict()) == before
    assert type(model).__name__ == "LlamaModel"


@pytest.mark.parametrize("mode", ["bidirectional_last_1", "prefix"])
def test_gradients_are_the_same_with_gradient_checkpointing(mode):
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = tiny_model("llama").train()
        set_attention(model, mode)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with attending(model, MASK, 3):
            out = model(input_ids=IDS, attention_mask=MASK, position_ids=position_ids(MASK), use_cache=False)
        (out.last_hidden_state * MASK[..., None]).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-4)
