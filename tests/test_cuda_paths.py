"""What runs on CUDA alone, looked at without a GPU.

The kernel: packed attention hands its texts to torch's `varlen_attn`, emulated here by plain loops behind the true
signature. No waiting: on the device "meta", which has shapes and no numbers, whatever would look at a number of the
GPU's raises. One compilation: the decoder layers are compiled once for all batches.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from poolwise.encoding import fast as encoding
from poolwise.encoding.fast import FastEncoder
from poolwise.model import packing
from poolwise.model.encoder import build
from poolwise.model.hooks import decoder_layers
from poolwise.model.packing import Segments, packed_attention, refusal
from poolwise.study.catalogue import PRESETS
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe
from test_packing import apart, encoder_of, features, loss_and_gradient, recipe
from tiny import SENTENCES, tiny_folder

LENGTHS = [7, 5, 5, 2, 1]
SMALL = {"latents": 4, "heads": 2, "head_dim": 8}  # the paper's head is 65,536 wide whatever the base
DESIGNS = {
    **{name: {"preset": name} for name in ("m1", "m2", "m3", "m4", "m5")},
    "m2-paper": {**PRESETS["m2-paper"], "pooling_args": {**PRESETS["m2-paper"]["pooling_args"], **SMALL}},
    "mean": {"attention": "bidirectional", "pooling": "mean"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "qwen2", num_hidden_layers=4))


class Kernel:
    """`varlen_attn` by loops, called as the signature of this torch's own allows; `without`: parameters that an older
    one lacks."""

    def __init__(self, without: tuple[str, ...] = ()) -> None:
        from torch.nn.attention.varlen import varlen_attn

        full = inspect.signature(varlen_attn)
        kept = [parameter for name, parameter in full.parameters.items() if name not in without]
        self.__signature__ = full.replace(parameters=kept)
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **given: Any) -> Tensor:
        bound = self.__signature__.bind(*args, **given)
        bound.apply_defaults()
        call = bound.arguments
        self.calls.append(call)
        query, key, value = (call[name] for name in ("query", "key", "value"))
        assert query.ndim == 3
        assert query.shape[1] == key.shape[1] or call.get("enable_gqa", True)
        for side in "qk":
            ends = call[f"cu_seq_{side}"]
            assert ends.dtype == torch.int32
            assert call[f"max_{side}"] == int(ends.diff().max())
            assert ends[-1] == len(query) == len(key)
        left, right = call["window_size"]
        scale = call["scale"] if call["scale"] is not None else query.shape[-1] ** -0.5
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        texts = []
        for start, end in itertools.pairwise(call["cu_seq_q"].tolist()):
            places = torch.arange(end - start)
            seen = places[:, None] - places  # query's place - key's
            hidden = ((left >= 0) & (seen > left)) | ((right >= 0) & (-seen > right))
            logits = torch.einsum("qhe,khe->hqk", query[start:end], key[start:end]) * scale
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            texts.append(torch.einsum("hqk,khe->qhe", weights, value[start:end]))
        return torch.cat(texts)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return installed(monkeypatch)


def installed(monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...] = ()) -> Kernel:
    """The emulation in place of torch's kernel, the CPU taken for a GPU that has it, and fp32 for bf16."""
    kernel = Kernel(without)
    monkeypatch.setattr(packing, "VARLEN", kernel)
    monkeypatch.setattr(packing, "TAKES_GQA", "enable_gqa" not in without)
    with_kernel(monkeypatch)
    return kernel


def with_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Segments.__init__

    def init(self: Segments, *args: Any) -> None:
        plain(self, *args)
        self.kernel = True

    monkeypatch.setattr(Segments, "__init__", init)
    monkeypatch.setattr(packing, "_takes_varlen", lambda query, dropout: True)


@torch.library.custom_op("poolwise_tests::varlen", mutates_args=())
def opaque(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, right: int) -> Tensor:
    """The emulation as one operator, which torch's own is to the compiler."""
    bounds = (ends, ends, longest, longest)
    return Kernel()(query, key, value, *bounds, scale=scale, window_size=(-1, right), enable_gqa=True)


@opaque.register_fake
def _(query: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(query)


def as_the_compiler_sees_it(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, also: Tensor, longest: int, again: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    return opaque(query, key, value, ends, longest, scale, window_size[1])


@pytest.mark.parametrize("scaling", [None, 0.37])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_is_asked_for_what_sdpa_computes(
    causal: bool, heads: tuple[int, int], scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    total, module = sum(LENGTHS), nn.Module()
    states = [3 * torch.randn(1, count, total, 8) for count in (heads[0], heads[1], heads[1])]
    for tensor in states:
        tensor.requires_grad_()
    weight = torch.randn(1, total, heads[0], 8)

    def both() -> list[Tensor]:
        segments = Segments(LENGTHS, torch.device("cpu"))
        out, _ = packed_attention(module, *states, None, scaling, is_causal=causal, segments=segments)
        assert segments.calls == 1
        return [out, *torch.autograd.grad((out * weight).sum(), states)]

    expected = both()
    assert packing.VARLEN is not None
    for without in ((), ("enable_gqa",)):  # torch 2.11 takes fewer heads of keys without a word
        kernel = installed(monkeypatch, without)
        for ours, theirs in zip(both(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        (call,) = kernel.calls
        assert call["window_size"] == ((-1, 0) if causal else (-1, -1))
        assert call["scale"] == scaling
        monkeypatch.undo()


@pytest.mark.parametrize("name", DESIGNS)
def test_loss_and_gradient_by_the_kernel_are_those_of_the_padded_batch(name: str, base: str, kernel: Kernel) -> None:
    encoder = encoder_of(base, Design.model_validate({"name": "d", **DESIGNS[name]}))
    padded = loss_and_gradient(encoder, recipe(base), "padded", features(encoder))
    assert not kernel.calls
    assert apart(loss_and_gradient(encoder, recipe(base), "packed", features(encoder)), padded) < 1e-5
    assert len(kernel.calls) == len(decoder_layers(encoder[0].model))


def test_a_kernel_that_lets_texts_see_each_other_is_noticed(base: str, kernel: Kernel, monkeypatch: Any) -> None:
    encoder = encoder_of(base, Design.model_validate({"name": "d", **DESIGNS["mean"]}))
    assert refusal(encoder[0].model, "bidirectional", 64) is None
    right = Kernel.__call__

    def leaking(self: Kernel, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *rest: Any, **given: Any) -> Any:
        whole = torch.tensor([0, len(query)], dtype=torch.int32)
        return right(self, query, key, value, whole, whole, len(query), len(query), **given)

    monkeypatch.setattr(Kernel, "__call__", leaking)
    assert "with its neighbours in the pack" in str(refusal(encoder[0].model, "bidirectional", 64))


def test_which_kernel_is_taken() -> None:
    half = torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16)
    assert not Segments([3], torch.device("cpu")).kernel
    assert packing._takes_varlen(half, 0.0)
    assert not packing._takes_varlen(half, 0.1)
    assert not packing._takes_varlen(half.float(), 0.0)
    assert not packing._takes_varlen(half[..., :20], 0.0)  # no multiple of 8
    assert not packing._takes_varlen(half.repeat(1, 1, 1, 5), 0.0)


def packing_encoder(base: str, design: dict[str, Any], **given: Any) -> FastEncoder:
    """A `FastEncoder` as it is on CUDA, where it packs; on whatever device."""
    encoder = build(
        Recipe(base_model=base, max_length=48, **given),  # type: ignore[arg-type]
        Design.model_validate({"name": "d", **design}),
        0,
        device="cpu",
    )
    fast = FastEncoder(encoder, budget=60, compiled=False)
    fast.layout, fast.prunes = "packed", False
    return fast


def some_texts(count: int = 40) -> list[str]:
    random = np.random.default_rng(3)
    words = " ".join(SENTENCES).split()
    return [" ".join(random.choice(words, int(n))) for n in random.integers(1, 9, count)]


def one_by_one(encoder: SentenceTransformer, texts: list[str], prompt: str = "") -> np.ndarray:
    return np.stack([encoder.encode(text, prompt=prompt) for text in texts])


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("name", DESIGNS)
def test_packed_encoding_equals_one_text_at_a_time(
    name: str, include_prompt: bool, base: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "FIRST", (1, 2))
    monkeypatch.setattr(encoding, "WINDOW", 5)
    fast = packing_encoder(base, DESIGNS[name], dtype="float32", include_prompt=include_prompt)
    for prompt in ("", "query: find the island. "):
        expected = one_by_one(fast.encoder, some_texts(12), prompt)
        assert np.abs(fast.encode(some_texts(12), prompt) - expected).max() < 1e-5
    assert len(kernel.calls) % len(decoder_layers(fast.backbone.model)) == 0
    assert kernel.calls
    assert fast.counts.computed <= fast.counts.tokens  # no padding; less where the prompt's states are reused


@pytest.mark.parametrize("name", DESIGNS)
def test_nothing_of_a_batch_waits_for_the_device(name: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a number from "meta" raises, and so does a tensor of the CPU among its own."""
    fast = packing_encoder(base, DESIGNS[name], dtype="bfloat16", lora=Lora(rank=4))
    window = fast._prepare(some_texts(12), "")
    with_kernel(monkeypatch)  # torch's own, which knows its shapes
    monkeypatch.setattr(torch, "autocast", lambda *args, **given: contextlib.nullcontext())  # knows no "meta"
    fast.encoder.to("meta")
    vectors = fast._window(window, "", 60)
    assert vectors.host.device.type == "meta"
    assert vectors.shape == (12, 32)
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        vectors.into(np.empty(vectors.shape, np.float32))


@pytest.mark.parametrize(("layout", "name"), [("packed", "m1"), ("packed", "m5"), ("padded", "m1")])
def test_layers_are_compiled_once_for_all_batches(
    layout: str, name: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many texts, tokens and layers: a layer compiled again for each would soon run uncompiled. Layers whose
    vectors are collected too."""
    fast = packing_encoder(base, DESIGNS[name], dtype="float32", lora=False)
    fast.layout, fast.prunes = layout, layout == "padded"
    expected = one_by_one(fast.encoder, some_texts())
    with_kernel(monkeypatch)
    monkeypatch.setattr(packing, "VARLEN", as_the_compiler_sees_it)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    by_default = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **given: by_default(forward, backend=backend, **given))
    fast.budget = 150  # one text alone has as many tokens as its longest: that would be a graph of its own
    torch._dynamo.reset()
    fast.compile()
    assert np.abs(fast.encode(some_texts()) - expected).max() < 1e-5
    torch._dynamo.reset()
    assert fast.prunes == (layout == "padded")
    assert len(graphs) <= (1 if layout == "packed" else 3)  # padded: with a mask, without one, a text alone


def test_a_compiler_that_fails_is_done_without(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = packing_encoder(base, DESIGNS["m1"], dtype="float32", lora=False)
    expected = fast.encode(some_texts())

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("no compiler here\nand more lines")

    by_default = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **given: by_default(forward, backend=backend, **given))
    torch._dynamo.reset()
    fast.compile()
    assert (fast.encode(some_texts()) == expected).all()
    (note,) = fast.notes
    assert "the decoder layers are not compiled: BackendCompilerFailed" in note
    assert not any("forward" in vars(layer) for layer in decoder_layers(fast.backbone.model))


def test_long_jobs_are_compiled_and_short_ones_are_not(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pace of the later windows: the first ones are slow, however long the job is."""
    clock, compiled = [0.0], []
    fast = packing_encoder(base, DESIGNS["m1"], dtype="float32", lora=False)
    fast.compiled, fast.layout = None, "padded"

    def window(self: FastEncoder, window: encoding.Window, *_: Any) -> encoding.Vectors:
        clock[0] += pace if clock[0] else 100.0
        return encoding.Vectors([torch.zeros(len(window.order), 32)], window.order, None)

    def compile(self: FastEncoder) -> None:
        compiled.append(clock[0])
        self._is_compiled = True

    monkeypatch.setattr(encoding, "WINDOW", 4)
    monkeypatch.setattr(encoding.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(FastEncoder, "_window", window)
    monkeypatch.setattr(FastEncoder, "compile", compile)
    monkeypatch.setattr(type(fast.encoder), "device", property(lambda self: torch.device("cuda")))
    for pace, expected in ((0.5, []), (20.0, [140.0])):  # noqa: B007 (read in `window`)
        clock[0] = 0.0
        fast.encode([f"text {number}" for number in range(40)])
        assert compiled == expected
