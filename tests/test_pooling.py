"""Poolings: the plain formulas, and laws 1, 4, 5, 9 and 10.

Weights are drawn large (`sharpen`): initially attention is nearly uniform and the feed-forward adds nothing, so that
tests of them could not fail.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, layer_norm

from paper_head import random_weights
from poolwise.pooling.paper import load_paper_head
from poolwise.pooling.poolings import module_class
from poolwise.study.catalogue import POOLINGS, PRESETS, spec_of

WIDTH, LAYERS, TOKENS = 16, 3, 7
SIZES = {"latents": 4, "heads": 2, "head_dim": 8, "layer": 2, "layers": 2}
ALL = sorted(POOLINGS)
TRAINABLE = [name for name in ALL if "latents" in POOLINGS[name].args]
WEIGHTED = [*TRAINABLE, "attention", "mean_gain", "scalar_mix", "layer_attention", "layer_mean_ffn"]
READS_TOKENS = [name for name in ALL if POOLINGS[name].reads == "tokens"]


def make(name: str, seed: int = 0, width: int = WIDTH, **args) -> torch.nn.Module:
    """A pooling with its initial weights."""
    sizes = {key: value for key, value in SIZES.items() if key in spec_of(name).args}
    pooling: Any = module_class(name)(width, LAYERS, **{**sizes, **args})
    pooling.reset_parameters(torch.Generator().manual_seed(seed))
    return pooling


def make_preset(name: str) -> torch.nn.Module:
    """A preset's pooling in tiny: the arguments as they are, the sizes small."""
    design = PRESETS[name]
    small = {**SIZES, "layer_weights": 5} if name.endswith("-paper") else SIZES
    args = {
        **design["pooling_args"],
        **{key: value for key, value in small.items() if key in spec_of(design["pooling"]).args},
    }
    return make(design["pooling"], **args)


def sharpen(pooling: torch.nn.Module, scale: float = 2.0) -> torch.nn.Module:
    """All weights random, matrices large: attention sharp but not one-hot, feed-forward and biases that count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in pooling.parameters():
            std = scale * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return pooling


def random_states(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(states: torch.Tensor, left: int, right: int, content: float = float("nan")):
    """One text (T, D) -> states and mask of a batch of one, with padding of the given content on both sides."""
    tokens, width = states.shape
    out = torch.full((1, left + tokens + right, width), content)
    mask = torch.zeros(1, left + tokens + right, dtype=torch.long)
    out[0, left : left + tokens], mask[0, left : left + tokens] = states, 1
    return out, mask


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_plain_poolings_by_hand():
    states = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [99.0, -99.0]]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert make("last_token")(states, mask).tolist() == [[4.0, 40.0]]
    assert make("first_token")(states, torch.tensor([[0, 1, 1, 0]])).tolist() == [[2.0, 20.0]]
    assert make("mean")(states, mask)[0] == pytest.approx([7 / 3, 70 / 3])
    assert make("weighted_mean")(states, mask)[0] == pytest.approx([(1 + 4 + 12) / 6, (10 + 40 + 120) / 6])
    assert make("weighted_mean")(states, torch.tensor([[0, 1, 0, 1]]))[0] == pytest.approx(
        [(2 + 198) / 3, (20 - 198) / 3]
    )
    assert make("last_token")(states).tolist() == [[99.0, -99.0]]
    assert make("mean")(states)[0] == pytest.approx([106 / 4, -29 / 4])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_plain_poolings_equal_loops(rows):
    states, mask = random_states(len(rows), 5, 3), torch.tensor(rows)
    for b, row in enumerate(rows):
        kept = [states[b, t] for t, keep in enumerate(row) if keep]
        zero = torch.zeros(3)
        first, last = (kept[0], kept[-1]) if kept else (zero, zero)
        mean = sum(kept, zero) / max(len(kept), 1)
        places = range(1, len(kept) + 1)
        weighted = sum((i * h for i, h in zip(places, kept, strict=True)), zero) / max(sum(places), 1)
        for name, expected in (
            ("first_token", first),
            ("last_token", last),
            ("mean", mean),
            ("weighted_mean", weighted),
        ):
            torch.testing.assert_close(make(name)(states, mask)[b], expected, rtol=1e-5, atol=1e-5)


# --- law 1 and law 10: padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READS_TOKENS)
def test_law_1_side_amount_and_content_of_padding(name):
    pooling, text = sharpen(make(name)), random_states(TOKENS, WIDTH)
    alone = pooling(text[None])
    for left, right in ((0, 0), (3, 0), (0, 5), (2, 9)):
        for content in (0.0, 1e4, float("nan"), float("inf")):
            result = pooling(*padded(text, left, right, content))
            torch.testing.assert_close(result, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_law_1_batch_mates(name):
    pooling = sharpen(make(name))
    states = random_states(6, TOKENS if pooling.reads == "tokens" else LAYERS, WIDTH)
    together = pooling(states)
    for b in range(6):
        torch.testing.assert_close(pooling(states[b : b + 1])[0], together[b], rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1  # and it does tell texts apart


@pytest.mark.parametrize("name", ["m2", "m4", "m2-paper"])
def test_law_1_presets_over_tokens(name):
    pooling, text = sharpen(make_preset(name)), random_states(TOKENS, WIDTH)
    torch.testing.assert_close(pooling(*padded(text, 4, 3)), pooling(text[None]), rtol=1e-5, atol=1e-5)


def test_law_1_m4_paper_attends_to_padding_with_a_mask_of_ones_alone():
    pooling, text = sharpen(make_preset("m4-paper")), random_states(TOKENS, WIDTH)
    alone = pooling(text[None])
    states, mask = padded(text, 5, 0)
    states[0, :5] = random_states(WIDTH, seed=8)
    assert cosine_similarity(pooling(states, torch.ones_like(mask)), alone).item() < 0.98
    assert cosine_similarity(pooling(states, mask), alone) > 0.9999


@pytest.mark.parametrize(
    ("name", "args"), [*((name, {}) for name in READS_TOKENS), ("cross_attention", {"tokens": "last"})]
)
def test_an_all_zero_mask_gives_numbers_and_gradients(name, args):
    pooling = sharpen(make(name, **args))
    states = random_states(2, TOKENS, WIDTH)
    states.requires_grad_()
    mask = torch.tensor([[0] * TOKENS, [1] * TOKENS])
    result = pooling(states, mask)
    result.square().sum().backward()
    assert result.isfinite().all()
    assert states.grad.isfinite().all()
    assert states.grad[0].count_nonzero() == 0
    assert all(parameter.grad.isfinite().all() for parameter in pooling.parameters())
    torch.testing.assert_close(result[1], pooling(states[1:])[0], rtol=1e-5, atol=1e-5)
    if name == "cross_attention" and not args:  # nothing is attended to, not even a bias
        assert pooling.attend(states, mask)[0].count_nonzero() == 0
    elif name not in TRAINABLE or name == "latent_attention":
        assert result[0].count_nonzero() == 0


@pytest.mark.parametrize("name", READS_TOKENS)
def test_law_1_padding_leaves_no_trace_in_gradients(name):
    text = random_states(TOKENS, WIDTH)
    pooling = sharpen(make(name))
    found = []
    for states, mask in (padded(text, 0, 0), padded(text, 2, 3, float("nan"))):
        states.requires_grad_()
        pooling.zero_grad()
        pooling(states, mask).square().sum().backward()
        found.append([states.grad[mask == 1], *(parameter.grad.clone() for parameter in pooling.parameters())])
    for alone, beside in zip(*found, strict=True):
        torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", READS_TOKENS)
def test_law_10_masked_positions_have_no_weight_at_all(name):
    """Also in the middle of a text; and the last token is the last index with mask 1, not the number of ones."""
    pooling = sharpen(make(name))
    states = random_states(1, TOKENS, WIDTH).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0]])
    pooling(states, mask).sum().backward()
    touched = states.grad[0].abs().sum(dim=1) > 0
    only = {"first_token": 1, "last_token": 5, "last_token_ffn": 5}
    expected = [index == only[name] for index in range(TOKENS)] if name in only else mask[0].bool().tolist()
    assert touched.tolist() == expected
    for kind in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        assert torch.equal(pooling(states, mask.to(kind)), pooling(states, mask))


# --- law 4: initial weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["identity", "paper"])
def test_law_4_equal_names_and_shapes_start_equal_in_all_poolings(init):
    weights = {name: make(name, seed=3, init=init).state_dict() for name in TRAINABLE}
    reference = weights["cross_attention"]
    for name in TRAINABLE:
        shared = [key for key in weights[name] if key in reference and weights[name][key].shape == reference[key].shape]
        assert {"latents", "ffn_in.weight", "ffn_out.weight"} <= set(shared)
        assert all(torch.equal(weights[name][key], reference[key]) for key in shared), name
    assert set(weights["layer_cross_attention"]) - set(reference) == {"layer_weights"}
    other = make("cross_attention", seed=4, init=init).state_dict()
    assert not torch.equal(other["latents"], reference["latents"])


@pytest.mark.parametrize("name", ALL)
def test_initial_weights_come_from_the_generator_alone(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pooling = make(name)
    torch.manual_seed(0)
    pooling.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    first = copy.deepcopy(pooling.state_dict())
    sharpen(pooling).reset_parameters(torch.Generator().manual_seed(5))
    assert all(torch.equal(first[key], value) for key, value in pooling.state_dict().items())
    torch.manual_seed(7)
    pooling.reset_parameters()
    drawn = copy.deepcopy(pooling.state_dict())
    torch.manual_seed(7)
    pooling.reset_parameters()
    assert all(torch.equal(drawn[key], value) for key, value in pooling.state_dict().items())


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 8), (4, 8), (1, 16)])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_an_untrained_head_is_nearly_the_mean_of_the_normalised_states(heads, head_dim, norm):
    states = random_states(5, LAYERS, 16) + 3 * torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(9))
    normed = layer_norm(states, (16,)) if norm == "layer_norm" else torch.nn.functional.rms_norm(states, (16,))
    for name, target in (
        ("cross_attention", normed.mean(dim=1)),
        ("layer_cross_attention", normed.mean(dim=1)),
        ("last_token_ffn", normed[:, -1]),
    ):
        result = make(name, heads=heads, head_dim=head_dim, norm=norm)(states)
        assert cosine_similarity(result, target).min() > 0.99, name
    paper = make("cross_attention", heads=heads, head_dim=head_dim, norm=norm, init="paper")(states)
    assert cosine_similarity(paper, normed.mean(dim=1)).max() < 0.9  # the published initial weights are noise


@pytest.mark.parametrize("name", ["cross_attention", "latent_attention"])
def test_initial_attention_logits_have_a_standard_deviation_of_a_tenth(name):
    """Nearly uniform, but not so flat that queries and keys have no gradient."""
    head = make(name, width=64, latents=8, heads=2, head_dim=32)
    latents, states = head.norm_latents(head.latents), head.norm_states(random_states(50, 64))
    asks, asked = (latents, states) if name == "cross_attention" else (states, latents)
    for query, key in zip(head.to_q.weight.chunk(2), head.to_k.weight.chunk(2), strict=True):
        logits = (asks @ query.T) @ (asked @ key.T).T / 32**0.5
        assert 0.05 < logits.std() < 0.2


def test_layer_attention_starts_with_values_near_the_identity():
    """And with queries and keys that are not, or every layer would attend to itself alone."""
    head = make("layer_attention", width=64)
    eye = torch.eye(64)
    assert (head.value.weight - eye).abs().max() < 0.1
    for matrix in (head.query.weight, head.key.weight):
        assert (matrix - eye).diagonal().mean() < -0.8
        assert matrix.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert torch.equal(head.merge.weight, torch.cat([eye, eye], dim=1) / 2)


def test_a_narrow_head_starts_as_a_projection():
    """Heads together narrower than the model keep angles as a random projection does: not exactly, but clearly."""
    states = random_states(30, 1, 64)
    pooling = make("cross_attention", width=64, heads=4, head_dim=8)
    result = pooling(states) - pooling.latents.mean(dim=0)
    projected = layer_norm(states[:, 0], (64,)) @ pooling.to_v.weight.T @ pooling.to_v.weight
    torch.testing.assert_close(result, projected, rtol=1e-4, atol=1e-4)


def test_a_control_starts_as_the_head_it_controls():
    """One token: attention is constant, so control and head must give the same vector, latents and all."""
    states, mask = random_states(3, TOKENS, WIDTH), torch.tensor([[1] * TOKENS, [1] * 4 + [0] * 3, [0] * 3 + [1] * 4])
    head = make("cross_attention", tokens="last")
    torch.testing.assert_close(make("last_token_ffn")(states, mask), head(states, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_control_lacks_the_norm_of_the_queries_and_nothing_else(norm):
    def count(name: str) -> int:
        return sum(p.numel() for p in make(name, norm=norm).parameters())

    missing = 2 * WIDTH if norm == "layer_norm" else WIDTH
    for control in ("last_token_ffn", "mean_ffn"):
        assert count("cross_attention") - count(control) == missing
        assert count("layer_cross_attention") - count(control) == missing + LAYERS * WIDTH


# --- law 5: gradients -------------------------------------------------------------------------------------------------


def gradients_seen(pooling: torch.nn.Module, steps: int = 2) -> dict[str, bool]:
    """Which parameters had a gradient that is not zero in `steps` steps of a contrastive loss."""
    optimizer = torch.optim.AdamW(pooling.parameters(), lr=1e-3, weight_decay=0.0)
    tokens = TOKENS if pooling.reads == "tokens" else LAYERS
    mask = torch.ones(8, tokens, dtype=torch.long)
    mask[::2, :2] = 0
    seen = dict.fromkeys((name for name, _ in pooling.named_parameters()), False)
    for step in range(steps):
        queries, documents = (
            torch.nn.functional.normalize(pooling(random_states(8, tokens, WIDTH, seed=seed), mask), dim=-1)
            for seed in (2 * step, 2 * step + 1)
        )
        loss = torch.nn.functional.cross_entropy(queries @ documents.T / 0.05, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in pooling.named_parameters():
            seen[name] |= parameter.grad is not None and bool(parameter.grad.count_nonzero())
        optimizer.step()
    return seen


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_law_5_every_tensor_gets_a_gradient_within_two_steps(name, norm):
    seen = gradients_seen(make(name, **({"norm": norm} if "norm" in spec_of(name).args else {})))
    assert seen
    assert all(seen.values()), [key for key, value in seen.items() if not value]


@pytest.mark.parametrize("name", ["m2", "m3", "m4", "m5", "m3-paper", "m4-paper", "m5-paper"])
def test_law_5_presets(name):
    assert all(gradients_seen(make_preset(name)).values())


def test_law_5_m2_paper_leaves_queries_and_keys_without_a_gradient():
    for pooling in (make_preset("m2-paper"), sharpen(make_preset("m2-paper"))):
        seen = gradients_seen(pooling, steps=3)
        dead = {"to_q.weight", "to_k.weight", "norm_latents.weight", "norm_latents.bias"}
        assert {name for name, value in seen.items() if not value} == dead
    weights = random_weights(heads=2, head_dim=5, rows=None)
    head = load_paper_head(weights, heads=2)
    head(random_states(3, 1, 8))[:, 0].sum().backward()
    assert head.pooling.to_q.weight.grad.count_nonzero() == head.pooling.to_k.weight.grad.count_nonzero() == 0
    assert head.pooling.to_v.weight.grad.count_nonzero() > 0


# --- law 9: precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_law_9_states_of_any_dtype_are_pooled_in_fp32(name, dtype):
    pooling = sharpen(make(name))
    length = 3000 if pooling.reads == "tokens" else LAYERS
    states = (random_states(2, length, WIDTH) + 1).to(dtype)
    result = pooling(states)
    assert result.dtype == torch.float32
    assert torch.equal(result, pooling(states.float()))
    if name == "mean":  # the sum of 3,000 numbers in bf16 would be off by far more
        torch.testing.assert_close(result.double(), states.double().mean(dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WEIGHTED)
def test_law_9_weights_or_autocast_in_bf16_change_the_products_only(name):
    pooling = sharpen(make(name), scale=1.0)
    states = random_states(4, 600 if pooling.reads == "tokens" else LAYERS, WIDTH)
    exact = pooling(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = pooling(states)
    low = copy.deepcopy(pooling).bfloat16()(states)
    for result in (cast, low):
        assert result.dtype == torch.float32
        assert cosine_similarity(result, exact).min() > 0.999


def test_law_9_attention_sums_in_fp32_under_autocast():
    """Weights of 1/N over N = 3,000 equal logits: softmax and sum in bf16 would miss the mean."""
    pooling = make("cross_attention")
    with torch.no_grad():
        pooling.to_q.weight.zero_()
    states = random_states(1, 3000, WIDTH) + 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = pooling.to_v(pooling.norm_states(states))
        gathered = pooling.attend(states, None)
    torch.testing.assert_close(gathered[:, 0], values.mean(dim=1), rtol=1e-4, atol=1e-5)
