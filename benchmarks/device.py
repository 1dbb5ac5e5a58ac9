"""What the GPU benchmarks share: data sheets, clocks, sizes, and one job with texts, our encoder and its baselines."""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorWithFlattening,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)
from transformers.utils import is_flash_attn_2_available

from benchmarks.corpus import Corpus, made_on, one_by_one, write_base
from benchmarks.measure import record, wall
from poolwise.encoding.fast import WINDOW, FastEncoder, Window
from poolwise.model import packing
from poolwise.model.packing import refusal
from poolwise.pooling import cost

Figures = Iterator[dict[str, Any]]
PEAKS = {"H200": (989.4, 4.8), "H100 PCIe": (756.0, 2.0), "H100": (989.4, 3.35), "A100": (312.0, 2.0)}
"""Part of a device's name -> its data sheet's dense bf16 TFLOP/s and memory TB/s; the first that fits."""
QWEN2 = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936,
}  # fmt: skip
"""Qwen2-0.5B's."""
MISTRAL = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
"""Mistral-7B-v0.1's."""
UNPADDED = "benchmark_varlen"
"""The attention below, as transformers knows it."""


def seconds_of(call: Callable[[], Any]) -> float:
    start = wall()
    call()
    return wall() - start


def fastest(call: Callable[[], Any], count: int = 20, tries: int = 3) -> float:
    """Seconds of one of `count` calls in a row, at best."""
    call()
    return min(seconds_of(lambda: [call() for _ in range(count)]) for _ in range(tries)) / count


@dataclass(frozen=True)
class Sizes:
    """What is measured: the base models' sizes, how many texts, in which batches; squares multiplied, bytes copied;
    pairs of a training step and steps; texts and pairs for the large model."""

    base: dict[str, int] = field(default_factory=lambda: QWEN2)
    large: dict[str, int] = field(default_factory=lambda: MISTRAL)
    documents: int = 8192
    rounds: int = 5
    batches: tuple[int, ...] = (128, 512)
    budgets: tuple[int, ...] = (8192, 16384, 32768, 65536)
    squares: tuple[int, ...] = (1024, 2048, 4096, 8192)
    copied: int = 1 << 30
    tokens: int = 32768
    pairs: int = 64
    steps: int = 16
    large_documents: int = 2048
    large_pairs: int = 128
    large_mini_batch: int = 64
    large_steps: int = 4


class Job:
    """What the parts share: the texts, our encoder, the baselines; made when first asked for."""

    def __init__(self, folder: Path, sizes: Sizes, device: str):
        self.folder, self.sizes, self.device = folder, sizes, device
        self.device_name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        self.sheet = next((numbers for part, numbers in PEAKS.items() if part in self.device_name), None)
        self.matmul = 0.0  # TFLOP/s, from `limits`
        self.best: dict[str, int] = {}  # baseline -> its batch size

    def free(self) -> None:
        """Give back the memory of everything that can be made again."""
        for name in ("plain", "compiled", "peers", "corpus"):
            self.__dict__.pop(name, None)
        torch._dynamo.reset()  # compiled layers are kept alive by their code
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def opened(self, config: PretrainedConfig, name: str, pooling: dict[str, Any] | None = None) -> Corpus:
        """A model of this configuration with random weights on the device, bf16."""
        base = write_base(self.folder / name, config)
        with made_on(self.device):
            return Corpus(base, "bfloat16", self.device, pooling, base=base, many=True)

    @functools.cached_property
    def corpus(self) -> Corpus:
        return self.opened(Qwen2Config(**self.sizes.base), "base")

    @functools.cached_property
    def texts(self) -> list[str]:
        return self.corpus.texts(self.corpus.lengths(self.sizes.documents), different=True)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(documents,) tokens of each text, in their order."""
        return self.plain.tokenise(self.texts, "").lengths

    @functools.cached_property
    def flops(self) -> float:
        return base_flops(Qwen2Config(**self.sizes.base), self.lengths)

    @functools.cached_property
    def plain(self) -> FastEncoder:
        return self._fast()

    @functools.cached_property
    def compiled(self) -> FastEncoder:
        return self._fast()

    def _fast(self) -> FastEncoder:
        """Ours, with weights of its own: compiling one must not compile the others."""
        return checked_layout(FastEncoder(copy.deepcopy(self.corpus.encoder), compiled=False), self.device)

    @functools.cached_property
    def peers(self) -> dict[str, SentenceTransformer]:
        """Baseline -> sentence-transformers with the same weights."""
        with made_on(self.device):
            plain = self.corpus.peer()
        peers = {"sdpa": copy.deepcopy(plain), "varlen": unpadding(copy.deepcopy(plain))}
        if self.device == "cuda" and is_flash_attn_2_available():
            flash = copy.deepcopy(plain)
            flash[0].model.set_attn_implementation("flash_attention_2")
            flash[0].unpad_inputs = True
            assert flash[0].can_flatten_inputs, "flash-attn is there, but sentence-transformers does not unpad"
            peers["flash-attn"] = flash
        return peers

    @functools.cached_property
    def alone(self) -> Tensor:
        """(40, D) embeddings of some of the texts, one at a time."""
        return one_by_one(self.corpus.encoder, self.some(self.texts))

    def some(self, of: Any) -> Any:
        return of[:: max(1, len(self.texts) // 40)]

    def their_calls(self) -> dict[str, Callable[[], Any]]:
        return {
            name: functools.partial(peer.encode, self.texts, batch_size=self.best.get(name, self.sizes.batches[0]))
            for name, peer in self.peers.items()
        }

    def prepared(self, fast: FastEncoder) -> list[Window]:
        """All texts as tokens, ready to be encoded."""
        texts = self.texts
        return [fast._prepare(texts[start : start + WINDOW], "") for start in range(0, len(texts), WINDOW)]

    def facts(self) -> dict[str, Any]:
        return {
            "device": self.device_name, "torch": torch.__version__, "dtype": "bfloat16",
            "documents": len(self.texts), "tokens": int(self.lengths.sum()), "layout": self.plain.layout,
            "kernel": packing.VARLEN is not None,
        }  # fmt: skip

    def rates(self, seconds: float) -> dict[str, Any]:
        return {
            "seconds": seconds, "texts_per_second": round(len(self.texts) / seconds),
            "tokens_per_second": round(self.lengths.sum() / seconds), "tflops": self.flops / seconds / 1e12,
        }  # fmt: skip

    def mfu(self, name: str, times: list[float], flops: float, goal: float | None, **facts: Any) -> Figures:
        """The share of both peaks, with the range over rounds."""
        rates = [flops / seconds / 1e12 for seconds in (statistics.median(times), max(times), min(times))]
        facts = {"interval": "range over rounds", "seconds": statistics.median(times), **facts}
        if self.sheet:
            yield record(name, *(rate / self.sheet[0] for rate in rates), goal, peak_tflops=self.sheet[0], **facts)
        if self.matmul:
            yield record(f"{name}_matmul", *(r / self.matmul for r in rates), None, peak_tflops=self.matmul, **facts)


def base_flops(config: Any, lengths: np.ndarray) -> float:
    """FLOPs of one forward of all texts; those of a text are a·t + b·t², so that two lengths give a and b."""
    one, two = (cost.base_flops(config, tokens) for tokens in (1, 2))
    square = (two - 2 * one) / 2
    return float((one - square) * lengths.sum() + square * (lengths.astype(float) ** 2).sum())


def checked_layout(fast: FastEncoder, device: str) -> FastEncoder:
    """The encoder, asserted to pack on CUDA."""
    if device == "cuda":
        why = refusal(fast.backbone.model, fast.backbone.attention, 512) if fast.layout != "packed" else None
        assert fast.layout == "packed", f"not packed: {why}"
        assert packing.VARLEN is not None, "this torch has no varlen attention"
    return fast


def report(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def unpadding(peer: SentenceTransformer) -> SentenceTransformer:
    """`peer` without padding: the flat batches that sentence-transformers makes for the flash-attn package, attention
    by torch's FlashAttention."""
    transformer = peer[0]
    transformer.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    if transformer.model_forward_params is not None:
        names = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
        transformer.model_forward_params = {*transformer.model_forward_params, *names}
    transformer._flatten_position_offset = 0
    transformer.can_flatten_inputs = True
    transformer.model.set_attn_implementation(UNPADDED)
    return peer


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int = 0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention inside each text of a flat batch: (1, H, N, E) -> (1, N, H, E)."""
    assert cu_seq_lens_q is not None, "not a flat batch"
    if query.is_cuda:
        states = (part[0].transpose(0, 1) for part in (query, key, value))
        bounds, options = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q), packing._fewer_keys(True)
        return packing.VARLEN(*states, *bounds, scale=scaling, window_size=(-1, 0), **options)[None], None
    segments = packing.Segments(cu_seq_lens_q.diff().tolist(), query.device)
    return packing.packed_attention(module, query, key, value, None, scaling, segments=segments)


AttentionInterface.register(UNPADDED, varlen_attention)
AttentionMaskInterface.register(UNPADDED, lambda **kwargs: None)


def mistral(sizes: Sizes) -> MistralConfig:
    return MistralConfig(**sizes.large, sliding_window=None)
