"""Compiled decoder layers: one graph for all layers and batches, the plain gradients, and plain layers if it fails.

The compiler traces forward and backward; its code generator, which takes a minute, is left out. Packed attention is the
kernel's of a GPU, emulated by one operator, into which the compiler cannot look any more than into torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from poolwise.model import packing
from poolwise.model.hooks import decoder_layers
from poolwise.model.lora import _layer_states, _small_batch, compiled_layers, fused_lora
from poolwise.model.packing import Segments
from poolwise.study.design import Design
from poolwise.study.recipe import Lora
from test_lora import DESIGNS, embeddings, encoder_of, recipe
from test_packing import COLUMNS, apart, features, loss_and_gradient
from tiny import tiny_folder

CLOSE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama", num_hidden_layers=3))


def attention(query: Tensor, key: Tensor, ends: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention weights (H, N, N) of texts laid end to end, and the keys (N, H, E), repeated for each query head."""
    text = torch.repeat_interleave(ends.diff().long())
    seen = text[:, None] == text
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = torch.einsum("nhe,mhe->hnm", query, key) * scale
    return logits.masked_fill(~(seen.tril() if causal else seen), -torch.inf).softmax(-1), key


@torch.library.custom_op("poolwise_tests::varlen_forward", mutates_args=())
def forward(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, causal: bool
) -> Tensor:
    assert int(ends.diff().max()) == longest
    weights, _ = attention(query, key, ends, scale, causal)
    return torch.einsum(
        "hnm,mhe->nhe", weights, value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    ).contiguous()


@torch.library.custom_op("poolwise_tests::varlen_backward", mutates_args=())
def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weights, keys = attention(query, key, ends, scale, causal)
    shared = query.shape[1] // key.shape[1]
    of_weights = torch.einsum("nhe,mhe->hnm", gradient, value.repeat_interleave(shared, 1))
    logits = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    of_keys, of_values = torch.einsum("hnm,nhe->mhe", logits, query), torch.einsum("hnm,nhe->mhe", weights, gradient)
    of_keys, of_values = (part.unflatten(1, (-1, shared)).sum(2).contiguous() for part in (of_keys, of_values))
    return torch.einsum("hnm,mhe->nhe", logits, keys).contiguous(), of_keys, of_values


@forward.register_fake
def _(query: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key, value))


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.poolwise_tests.varlen_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return (*found, None, None, None, None)


forward.register_autograd(gradients, setup_context=keep_inputs)


def kernel(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, also: Tensor, longest: int, again: int, *,
    scale: float, window_size: tuple[int, int], **rest: Any,
) -> Tensor:  # fmt: skip
    return torch.ops.poolwise_tests.varlen_forward(query, key, value, ends, longest, scale, window_size == (-1, 0))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed attention by the kernel above instead of a loop over runs of equal length."""
    plain = Segments.__init__

    def init(self: Segments, *args: Any) -> None:
        plain(self, *args)
        self.kernel = True

    monkeypatch.setattr(Segments, "__init__", init)
    monkeypatch.setattr(packing, "VARLEN", kernel)
    monkeypatch.setattr(packing, "_takes_varlen", lambda query, dropout: True)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """torch.compile without its code generator, which takes a minute; the graphs that were traced, in operations."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m1", "m5"])
def test_all_layers_and_batches_share_one_graph(name: str, base: str, traced: list[int], as_on_a_gpu: None) -> None:
    given = recipe(base, lora=Lora(rank=4, dropout=0.0))
    encoder = encoder_of(given, DESIGNS[name])
    batches = [features(encoder, columns) for columns in (COLUMNS, [column[:3] for column in COLUMNS[:2]])]
    plain = [loss_and_gradient(encoder, given, "packed", batch) for batch in batches]
    before = torch.get_rng_state()
    with encoder[0].in_layout("packed"), fused_lora(encoder[0]), compiled_layers(encoder[0]) as reason:
        assert reason is None
        assert torch.equal(torch.get_rng_state(), before)
        found = [loss_and_gradient(encoder, given, "packed", batch) for batch in batches]
    assert len(traced) == 1
    for one, other in zip(found, plain, strict=True):
        assert apart(one, other) < CLOSE
    assert not any("forward" in vars(layer) for layer in decoder_layers(encoder[0].model))


@pytest.mark.slow
def test_padded_batches_and_masks(base: str, traced: list[int]) -> None:
    """Also where hooks give layers masks of their own."""
    given = recipe(base)
    encoder = encoder_of(given, Design(name="d", attention="bidirectional_last_2", pooling="mean"))
    batch = features(encoder)
    plain = loss_and_gradient(encoder, given, "grouped", batch)
    with encoder[0].in_layout("grouped"), fused_lora(encoder[0]), compiled_layers(encoder[0]) as reason:
        assert reason is None
        assert apart(loss_and_gradient(encoder, given, "grouped", batch), plain) < CLOSE
    assert len(traced) <= 4  # causal layers and others, with a mask and without


@pytest.mark.slow
def test_dropout_is_drawn_from_torchs_generator(base: str, traced: list[int], as_on_a_gpu: None) -> None:
    given = recipe(base, lora=Lora(rank=4, dropout=0.3))
    encoder = encoder_of(given, DESIGNS["m1"])
    batch = features(encoder)
    with encoder[0].in_layout("packed"), fused_lora(encoder[0]), compiled_layers(encoder[0]) as reason:
        assert reason is None
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(loss_and_gradient(encoder, given, "packed", batch))
    assert len(traced) == 1
    assert torch.equal(losses[0][1], losses[1][1])
    assert apart(losses[0], losses[2]) > 1e-2


def test_layers_that_cannot_be_compiled_run_as_they_are(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no C++ compiler found")

        return call

    encoder = encoder_of(recipe(base), DESIGNS["m1"])
    before = embeddings(encoder)
    monkeypatch.setattr(torch, "compile", broken)
    with compiled_layers(encoder[0]) as reason:
        assert reason == "decoder layers are not compiled: RuntimeError: no C++ compiler found"
        assert torch.equal(embeddings(encoder), before)
    assert not any("forward" in vars(layer) for layer in decoder_layers(encoder[0].model))


@pytest.mark.parametrize(("share", "accepted"), [(0.04, True), (0.2, False)])
def test_a_compiled_layer_may_differ_by_rounding_alone(
    share: float, accepted: bool, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inexact(function: Any, **options: Any) -> Any:
        def call(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return states + (1 + share) * (function(states, *args, **kwargs) - states)

        return call

    encoder = encoder_of(recipe(base, dtype="bfloat16"), DESIGNS["m5"])
    monkeypatch.setattr(torch, "compile", inexact)
    with compiled_layers(encoder[0]) as reason:
        pass
    assert (reason is None) == accepted
    if reason:
        assert reason.startswith("decoder layers are not compiled: what layer 0 adds differs by 2.")


def test_layers_are_compared_on_equal_inputs(base: str) -> None:
    """From layer to layer differences may grow without anything being wrong: a base that was trained under causal
    attention and is bidirectional now does that in bfloat16."""
    backbone = encoder_of(recipe(base), DESIGNS["m5"])[0]
    batch = _small_batch(backbone)
    plain = _layer_states(backbone, batch)
    moved = [(states + number + 1, output) for number, (states, output) in enumerate(plain)]
    for (given, output), (wanted, before) in zip(_layer_states(backbone, batch, moved), moved, strict=True):
        assert torch.allclose(given, wanted, atol=1e-5)
        assert not torch.allclose(output, before, atol=0.1)


def test_a_compiled_layer_without_finite_gradients_is_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * torch.nan

    encoder = encoder_of(recipe(base), DESIGNS["m1"])
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x, *a, **k: Broken.apply(function(x, *a, **k)))
    with compiled_layers(encoder[0]) as reason:
        assert reason == "decoder layers are not compiled: ModelError: gradients are not finite"
