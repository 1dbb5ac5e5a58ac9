"""Folded heads give the same vectors as unfolded ones, at the FLOPs that are declared.

They are compared with a transcription in float64 below; weights are drawn large, so that attention is sharp.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, Qwen2Config

from poolwise.errors import ModelError
from poolwise.pooling import cost, folding
from poolwise.pooling.cost import resolve_args
from poolwise.pooling.folding import Shape
from poolwise.pooling.heads import CrossAttentionHead, Head
from poolwise.pooling.poolings import module_class
from poolwise.study.catalogue import PRESETS

ATTENDING = ["cross_attention", "layer_cross_attention"]
CONTROLS = ["last_token_ffn", "mean_ffn"]
# width, latents, heads, head_dim, vectors: what it folds
SHAPES = {
    (16, 4, 2, 8, 7): "queries, latents",
    (32, 24, 2, 24, 9): "queries, values, states",
    (32, 3, 2, 25, 40): "queries, values, latents",
    (32, 24, 2, 8, 3): "states",
    (32, 24, 8, 4, 20): "between",
    (64, 48, 2, 8, 3): "states, low rank",
    (64, 40, 1, 40, 4): "queries, values, states, low rank",
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low rank on small heads too."""
    monkeypatch.setattr(folding, "LOW_RANK_WIDTH", 64)


def folds(shape: Shape, vectors: int) -> str:
    parts = {
        "queries": shape.folds_queries,
        "values": shape.merges_values,
        shape.order(vectors): True,
        "low rank": shape.low_rank(vectors),
    }
    return ", ".join(name for name, value in parts.items() if value)


def make(name: str, size: tuple[int, ...] = (16, 4, 2, 8, 7), sharp: float = 1.0, seed: int = 0, **args: Any) -> Head:
    """A head with every weight random; `sharp` multiplies W_q, W_k and W_o."""
    width, latents, number, head_dim, vectors = size
    head: Any = module_class(name)(width, vectors, latents=latents, heads=number, head_dim=head_dim, **args)
    assert isinstance(head, Head)
    generator = torch.Generator().manual_seed(seed)
    head.reset_parameters(generator)
    with torch.no_grad():
        for key, parameter in head.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.startswith("norm_"):
                parameter.add_(0.3 * noise)
            else:
                scale = sharp if key.split(".")[0] in ("to_q", "to_k", "to_out") else 1.0
                parameter.add_(scale * parameter.shape[-1] ** -0.5 * noise if parameter.ndim == 2 else 0.3 * noise)
    return head.eval()


def states_of(size: tuple[int, ...], batch: int = 5, outliers: bool = False, seed: int = 0) -> Tensor:
    """Random states (B, T, D); outliers: one dimension massive everywhere, another in the first vector only."""
    states = 2 * torch.randn(batch, size[-1], size[0], generator=torch.Generator().manual_seed(seed))
    if outliers:
        states[..., 3] += 1000
        states[:, 0, 5] -= 300
    return states


def exact(head: Any, states: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formulas at the top of `heads`, written down in float64: (B, T, D) -> (B, D)."""
    w = {name: tensor.detach().double() for name, tensor in head.state_dict().items()}
    states = states.double()
    batch, vectors, _ = states.shape
    keep = torch.ones(batch, vectors, dtype=torch.bool) if mask is None or head.single else mask.bool()
    if head.single:
        mask = torch.ones(batch, vectors) if mask is None else mask
        if type(head).__name__ == "MeanFFN":
            one = [states[b][mask[b].bool()].sum(0) / max(int(mask[b].sum()), 1) for b in range(batch)]
        else:
            zero = torch.zeros(states.shape[2], dtype=torch.float64)
            one = [states[b][mask[b].bool()][-1] if mask[b].any() else zero for b in range(batch)]
        states, keep = torch.stack(one)[:, None], torch.ones(batch, 1, dtype=torch.bool)
    if "layer_weights" in w:
        states = states + w["layer_weights"][: states.shape[1]]

    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.bias" in w:
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    normed = norm(states, "norm_states")
    out = []
    for text, kept in zip(normed, keep, strict=True):
        x = w["latents"]
        text = text[kept]
        if isinstance(head, CrossAttentionHead):
            gathered = []
            for q, k, v in zip(*(w[f"to_{n}.weight"].chunk(head.heads) for n in "qkv"), strict=True):
                logits = norm(w["latents"], "norm_latents") @ q.T @ (text @ k.T).T / len(q) ** 0.5
                gathered.append(logits.softmax(-1) @ (text @ v.T))
            x = x + torch.cat(gathered, -1) @ w["to_out.weight"].T
        else:
            x = x + (text @ w["to_v.weight"].T) @ w["to_out.weight"].T
        value, gate = (norm(x, "norm_ffn") @ w["ffn_in.weight"].T + w["ffn_in.bias"]).chunk(2, -1)
        gelu = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
        out.append((x + (value * gelu) @ w["ffn_out.weight"].T + w["ffn_out.bias"]).mean(0))
    return torch.stack(out)


def deviation(result: Tensor, expected: Tensor) -> float:
    result, expected = result.detach().double(), expected.detach().double()
    return float(((result - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def masks(size: tuple[int, ...]) -> Tensor:
    """Five masks: padding left, right, in the middle, nothing attended to, everything."""
    mask = torch.ones(5, size[-1], dtype=torch.long)
    mask[0, :2], mask[1, -1], mask[3] = 0, 0, 0
    mask[2, size[-1] // 2] = 0
    return mask


def folded(head: Head, *inputs: Tensor | None) -> Tensor:
    with torch.no_grad():
        result = head(*inputs)
    assert head._folded is not None
    return result


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: "-".join(map(str, size)))
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("cross_attention", {}),
        ("cross_attention", {"tokens": "last"}),
        ("layer_cross_attention", {}),
        ("last_token_ffn", {}),
        ("mean_ffn", {}),
    ],
)
def test_equal_to_one_in_a_million(name, args, size, norm):
    """Default and sharp attention, ordinary and massive states, all kinds of mask."""
    for sharp in (1.0, 3.0):
        head = make(name, size, sharp, norm=norm, **args)
        for outliers in (False, True):
            states = states_of(size, outliers=outliers)
            for mask in [None] if head.reads == "layers" else [None, masks(size)]:
                expected = exact(head, states, mask)
                theirs = deviation(head(states, mask), expected)  # sharp attention: fp32 itself is no better
                ours = deviation(folded(head, states, mask), expected)
                assert ours < max(1e-6, 2 * theirs), (sharp, outliers, ours, theirs)
                assert theirs < 1e-5


def test_the_shapes_above_take_every_way():
    for size, expected in SHAPES.items():
        width, latents, number, head_dim, vectors = size
        assert folds(Shape(width, latents, number, head_dim, 4 * width), vectors) == expected, size
        head = make("cross_attention", size)
        folded(head, states_of(size))
        assert folds(head._folded.shape, vectors) == expected


@settings(max_examples=40, deadline=None)
@given(
    st.integers(8, 40),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_equal_for_any_shape(width, latents, number, head_dim, vectors, seed):
    size = (width, latents, number, head_dim, vectors)
    for name in (*ATTENDING, *CONTROLS):
        head, states = make(name, size, seed=seed), states_of(size, batch=2, seed=seed)
        assert deviation(folded(head, states), exact(head, states)) < 1e-5  # a vector may be small by chance


def test_the_comparison_can_fail():
    """Each folded factor, changed a little, moves the vectors by far more than the tolerance."""
    for size in ((16, 4, 2, 8, 7), (32, 24, 2, 24, 9)):
        head, states = make("cross_attention", size), states_of(size)
        expected = folded(head, states)
        for name in ("start", "w_1", "b_1", "w_2", "b_2", "queries", "to_x", "to_v", "to_out"):
            if hasattr(head._folded, name):
                changed = copy.copy(head._folded)
                setattr(changed, name, getattr(changed, name) * 1.001)
                assert deviation(changed(*head.prepare(states, None)), expected) > 1e-5, name


@pytest.mark.parametrize("name", ATTENDING)
def test_padding_is_never_read_and_chunks_do_not_matter(name, monkeypatch):
    size = (16, 4, 2, 8, 7)
    head, states = make(name, size), states_of(size, batch=11)
    whole = folded(head, states, None)
    monkeypatch.setattr(folding, "CHUNK", {"cpu": 1000})  # three texts at a time
    assert deviation(folded(head, states, None), whole) < 1e-6
    assert folded(head, states[:0], None).shape == (0, 16)
    if name == "cross_attention":
        for content in (0.0, 1e4, float("nan"), float("inf")):
            padded = torch.full((11, 12, 16), content)
            padded[:, 2:9] = states
            mask = torch.zeros(11, 12, dtype=torch.bool)
            mask[:, 2:9] = True
            assert deviation(folded(head, padded, mask), whole) < 1e-6
    else:
        with pytest.raises(ModelError, match="9 vectors for a head of 7 layer weights"):
            folded(head, states_of((16, 9)), None)


@pytest.mark.parametrize("name", [*ATTENDING, *CONTROLS])
def test_bf16_weights_and_autocast(name):
    size = (64, 48, 2, 48, 200)
    head, states = make(name, size), states_of(size)
    expected = exact(head, states)
    low = copy.deepcopy(head).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cast = head(states)
        assert head._folded.dtype == torch.bfloat16
        by_hand = copy.deepcopy(head).train()(states)
    for result in (folded(low, states), cast):
        assert result.dtype == torch.float32
        assert F.cosine_similarity(result.double(), expected).min() > 0.9999
        assert deviation(result, expected) < max(0.01, 2 * deviation(by_hand, expected))
    assert folded(head, states).dtype == torch.float32  # autocast is over: folded again, in fp32
    assert head._folded.dtype == torch.float32


def test_what_all_vectors_of_a_text_share_costs_no_precision():
    """It moves all logits alike. Taken out before states are rounded; padding, nine tenths here, has no part in it."""
    size = (64, 48, 2, 48, 200)
    head = make("cross_attention", size, sharp=3.0).bfloat16()
    generator = torch.Generator().manual_seed(5)
    states = 5 * torch.randn(64, generator=generator) + torch.randn(2, 200, 64, generator=generator)
    mask = torch.zeros(2, 200, dtype=torch.bool)
    mask[:, :20] = True
    z = torch.where(mask[..., None], F.layer_norm(states, (64,)), 0.0)
    with torch.no_grad():
        low, high = folding.Folded(head), folding.Folded(head)
        high.dtype, high.queries = torch.float32, high.queries.float()
        weights, expected = (way._weights(z, mask) for way in (low, high))
    assert low.to_k is None
    assert expected.max() > 0.5
    assert (weights - expected).abs().max() < 0.01  # .005; without it .03


def test_law_9_a_long_mean_in_bf16():
    """3,000 equal logits: weights and sums that were rounded as they go would miss the mean."""
    head = make("cross_attention")
    with torch.no_grad():
        head.to_q.weight.zero_()
    states = states_of((16, 3000), batch=2) + 1
    result = folded(copy.deepcopy(head).bfloat16(), states, None)
    assert F.cosine_similarity(result.double(), exact(head, states)).min() > 0.9999


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SHAPES, ids=lambda size: "-".join(map(str, size)))
def test_flops_are_those_that_torch_counts(size):
    for name in (*ATTENDING, *CONTROLS):
        head, states = make(name, size), states_of(size, batch=1)
        folded(head, states)  # a low-rank head multiplies one more product when it first needs it
        with FlopCounterMode(display=False) as counter:
            folded(head, states)
        assert counter.get_total_flops() == head._folded.shape.flops(size[-1]), name


@pytest.mark.parametrize("pooling", [*ATTENDING, *CONTROLS])
@pytest.mark.parametrize("args", [{}, {"heads": 3, "head_dim": 7, "latents": 5, "ffn": 2}])
def test_folded_flops_of_a_design_are_those_of_its_head(pooling, args):
    config = Qwen2Config(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96, vocab_size=50
    )
    options = [{"tokens": "last"}, {"tokens": "all"}] if pooling == "cross_attention" else [{}]
    for more in options:
        complete = resolve_args(pooling, {**args, **more}, config)
        head: Any = module_class(pooling)(64, 6, **complete).eval()
        vectors = 6 if pooling == "layer_cross_attention" else 9
        folded(head, torch.randn(1, vectors, 64))
        assert cost.folded_flops(pooling, complete, config, 9) == head._folded.shape.flops(vectors)
    assert cost.folded_flops("mean", {}, config, 9) == 0


def test_published_sizes_by_hand():
    """GFLOP of a text, multi-layers pooling at the published sizes."""
    args = {**PRESETS["m3-paper"]["pooling_args"]}
    qwen = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14)
    # logits and M_h z: 2 × 24·32·896·(768 + 896); sums 2·768·32·24·896; W_1 2·768·896·7168; W_2 2·3584·896
    by_hand = 2 * (24 * 32 * 896 * (768 + 896) + 768 * 32 * 24 * 896 + 768 * 896 * 7168 + 3584 * 896)
    assert cost.folded_flops("layer_cross_attention", args, qwen, 32) == by_hand
    assert by_hand / 1e9 == pytest.approx(13.2, abs=0.1)
    assert cost.head_flops("layer_cross_attention", args, qwen, 32) / by_hand > 15
    mistral = MistralConfig()
    assert cost.folded_flops("layer_cross_attention", args, mistral, 32) / 1e9 == pytest.approx(253.5, abs=0.5)
