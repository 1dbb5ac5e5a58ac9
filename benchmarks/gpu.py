"""On CUDA: whole encodes of a Qwen2-0.5B shape against sentence-transformers, and what the GPU allows (its roofline).

Random weights, bf16, last token; texts of lognormal length (mean 40 tokens, median 24, at most 512) of words that are
one token each; wall clock with synchronisation, interleaved. A baseline runs at its fastest of several batch sizes.

- `gpu_encode`: against sentence-transformers with the flash-attn package, which encodes without padding; where that is
  not installed there is no such figure, but `gpu_encode_varlen`, the same unpadding of sentence-transformers with its
  attention by torch's FlashAttention, and `gpu_encode_sdpa`, padded batches. Ours is compiled, the compiler's seconds
  apart; `…_plain` are not compiled.
- `gpu_mfu`: FLOPs of the base model (`pooling.cost`) a second in our whole encode, over the data sheet's dense bf16
  peak, and `gpu_mfu_matmul` over the best matrix product of this run; `gpu_model_…`: tokens given ready, by the tokens
  of a batch; `gpu_tokeniser`: the tokenizer's own seconds, which run beside the model's.
- `gpu_matmul`, `gpu_copy`, `gpu_launch`: what the device gives; `gpu_layer_bound`: the MFU if only the matrix products
  of the decoder layers took time; `gpu_varlen`: torch's FlashAttention against SDPA over runs of equal length.
- `gpu_train_…`, `gpu_head_…`, `gpu_queries_…`, `gpu_collect_memory…`: the other benchmarks, on this device.

A figure that is no ratio has a `unit`. A part that fails is a record with `failed`, and the others go on.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening, Qwen2Config
from transformers.utils import is_flash_attn_2_available

from benchmarks import head, memory, queries, train
from benchmarks.corpus import Corpus, one_by_one
from benchmarks.measure import angle, interleave, ratio_record, record, wall
from benchmarks.roofline import PEAKS, kernel, limits, seconds_of
from poolwise.encoding.fast import WINDOW, FastEncoder
from poolwise.model import packing
from poolwise.model.packing import refusal
from poolwise.pooling import cost

Figures = Iterator[dict[str, Any]]
UNPADDED = "benchmark_varlen"
"""The attention below, as transformers knows it."""
NAMES = {"flash-attn": "gpu_encode", "varlen": "gpu_encode_varlen", "sdpa": "gpu_encode_sdpa"}
GOALS = {"flash-attn": 1.2, "varlen": 1.2, "sdpa": None}
GOAL_MFU = 0.45


QWEN2 = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936,
}  # fmt: skip
"""Qwen2-0.5B's."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: the base model's sizes, how many texts, in which batches; squares multiplied, bytes copied."""

    base: dict[str, int] = field(default_factory=lambda: QWEN2)
    documents: int = 16_384
    rounds: int = 5
    batches: tuple[int, ...] = (32, 128, 512)
    budgets: tuple[int, ...] = (8192, 32768, 131072)
    squares: tuple[int, ...] = (1024, 2048, 4096, 8192)
    copied: int = 1 << 30
    tokens: int = 32768
    triples: int = 64


class Job:
    """What the parts share: the texts, our encoder, the baselines; made when first asked for."""

    def __init__(self, folder: Path, sizes: Sizes, device: str):
        self.folder, self.sizes, self.device = folder, sizes, device
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        self.device_name = name
        self.sheet = next((numbers for part, numbers in PEAKS.items() if part in name), None)
        self.matmul = 0.0  # TFLOP/s, from `limits`
        self.best: dict[str, int] = {}  # baseline -> its batch size

    @functools.cached_property
    def corpus(self) -> Corpus:
        corpus = Corpus(self.folder, "bfloat16", self.device, sizes=self.sizes.base)
        corpus.words = [
            word[1:]
            for word in (corpus.tokenizer.decode([number]) for number in range(len(corpus.tokenizer)))
            if word[:1] == " " and word[1:].isalpha() and len(corpus.tokenizer(word)["input_ids"]) == corpus.special + 1
        ]
        return corpus

    @functools.cached_property
    def texts(self) -> list[str]:
        """No text twice: ours would encode it once."""
        texts: dict[str, None] = {}
        for length in self.corpus.lengths(self.sizes.documents):
            before = len(texts)
            while len(texts) == before:
                texts[self.corpus.text(int(length))] = None
        return list(texts)

    @functools.cached_property
    def rows(self) -> list[dict[str, Tensor]]:
        return self.plain._tokenise(self.texts, "")

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(row["input_ids"]) for row in self.rows])

    @functools.cached_property
    def flops(self) -> float:
        """Of the base model on all texts; those of a text are a·t + b·t², so two lengths tell a and b."""
        one, two = (cost.base_flops(Qwen2Config(**self.sizes.base), tokens) for tokens in (1, 2))
        square = (two - 2 * one) / 2
        return float((one - square) * self.lengths.sum() + square * (self.lengths.astype(float) ** 2).sum())

    @functools.cached_property
    def plain(self) -> FastEncoder:
        return self._fast()

    @functools.cached_property
    def compiled(self) -> FastEncoder:
        return self._fast()

    def _fast(self) -> FastEncoder:
        """Ours, with weights of its own: compiling one must not compile the others."""
        fast = FastEncoder(copy.deepcopy(self.corpus.encoder), compiled=False)
        if fast.layout != "packed":
            why = refusal(fast.backbone.model, "causal", 512) if self.device == "cuda" else "no CUDA"
            print(f"  not packed: {why}", file=sys.stderr, flush=True)
        return fast

    @functools.cached_property
    def peers(self) -> dict[str, SentenceTransformer]:
        """Baseline -> sentence-transformers with the same weights."""
        peers = {"sdpa": copy.deepcopy(self.corpus.peer()), "varlen": unpadding(copy.deepcopy(self.corpus.peer()))}
        if self.device == "cuda" and is_flash_attn_2_available():
            flash = copy.deepcopy(self.corpus.peer())
            flash[0].model.set_attn_implementation("flash_attention_2")
            flash[0].unpad_inputs = True
            assert flash[0].can_flatten_inputs, "flash-attn is there, but sentence-transformers does not unpad"
            peers["flash-attn"] = flash
        return peers

    @functools.cached_property
    def alone(self) -> Tensor:
        return one_by_one(self.corpus.encoder, self.some(self.texts))

    def some(self, of: Any) -> Any:
        return of[:: max(1, len(self.texts) // 40)]

    def their_calls(self) -> dict[str, Callable[[], Any]]:
        return {
            name: functools.partial(peer.encode, self.texts, batch_size=self.best.get(name, self.sizes.batches[0]))
            for name, peer in self.peers.items()
        }

    def given(self, fast: FastEncoder) -> None:
        """Everything encoded from tokens given ready."""
        for start in range(0, len(self.rows), WINDOW):
            fast._window(self.rows[start : start + WINDOW], "", None, 0.0, 0)

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

    def mfu(self, name: str, times: list[float], goal: float | None, **facts: Any) -> Figures:
        """The share of both peaks, with the range over rounds."""
        rates = [self.flops / seconds / 1e12 for seconds in (statistics.median(times), max(times), min(times))]
        facts = {"interval": "range over rounds", **self.rates(statistics.median(times)), **facts}
        if self.sheet:
            yield record(name, *(rate / self.sheet[0] for rate in rates), goal, peak_tflops=self.sheet[0], **facts)
        if self.matmul:
            yield record(f"{name}_matmul", *(r / self.matmul for r in rates), goal, peak_tflops=self.matmul, **facts)


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


# --- the parts --------------------------------------------------------------------------------------------------------


def encode(job: Job) -> Figures:
    """Not compiled: against each baseline at its best batch size; the tokenizer; the share of the peaks."""
    some = job.texts[::4]
    for name, peer in job.peers.items():
        peer.encode(some[:64])
        calls = {size: functools.partial(peer.encode, some, batch_size=size) for size in job.sizes.batches}
        tried = {size: seconds_of(call) for size, call in calls.items()}
        job.best[name] = min(tried, key=lambda size: tried[size])
        print(f"  {name}: seconds by batch size {tried}", file=sys.stderr, flush=True)
    yield from _against(job, job.plain, "_plain", 2)
    tokenise = [seconds_of(lambda: job.plain._tokenise(job.texts, "")) for _ in range(3)]
    whole = [seconds_of(lambda: job.plain.encode(job.texts)) for _ in range(3)]
    yield ratio_record(
        "gpu_tokeniser", tokenise, whole, None, lower_is_better=False, unit="its seconds / the whole encode's",
        texts_per_second=round(len(job.texts) / statistics.median(tokenise)), cores=os.cpu_count(),
    )  # fmt: skip


def compiled(job: Job) -> Figures:
    """The decoder layers compiled before the clock starts."""
    fast = job.compiled
    fast.compile()
    first = seconds_of(lambda: fast.encode(job.texts))
    yield from _against(job, fast, "", job.sizes.rounds, first)


def _against(job: Job, fast: FastEncoder, end: str, rounds: int, first: float | None = None) -> Figures:
    """Ours against all baselines in the same rounds."""
    calls = {"ours": lambda: fast.encode(job.texts), **job.their_calls()}
    agreement = {name: angle(torch.from_numpy(job.some(call())), job.alone) for name, call in calls.items()}
    if first is not None:  # plain has run too
        calls["plain"] = lambda: job.plain.encode(job.texts)
    times = interleave(calls, rounds, warmup=0, clock=wall)  # each has run once
    medians = {name: statistics.median(values) for name, values in times.items()}
    facts: dict[str, Any] = {"agreement_of": "1 - cosine to batches of one", "notes": fast.notes, **job.facts()}
    if first is not None:
        facts["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        saved = (medians["plain"] - medians["ours"]) / len(job.texts)
        facts["compile_seconds"] = round(first - medians["ours"], 1)
        facts["break_even_documents"] = round((first - medians["ours"]) / saved) if saved > 0 else None
    for name in job.peers:
        yield ratio_record(
            NAMES[name] + end, times[name], times["ours"], GOALS[name], agreement=agreement["ours"],
            baseline=name, baseline_batch=job.best.get(name), baseline_agreement=agreement[name],
            fastest_baseline=min(job.peers, key=lambda peer: medians[peer]), **job.rates(medians["ours"]), **facts,
        )  # fmt: skip
    yield from job.mfu(f"gpu_mfu{end}", times["ours"], GOAL_MFU, **facts)


def budgets(job: Job) -> Figures:
    """Tokens given ready, by the tokens of a batch, compiled and not."""
    for name, fast in {"": job.plain, "_compiled": job.compiled}.items():
        if name and not fast._is_compiled:
            continue  # that part failed
        usual = fast.budget
        for fast.budget in job.sizes.budgets:
            job.given(fast)
            times = [seconds_of(lambda fast=fast: job.given(fast)) for _ in range(min(3, job.sizes.rounds))]
            yield from job.mfu(f"gpu_model_{fast.budget}{name}", times, None, budget=fast.budget)
        fast.budget = usual


def step(job: Job) -> Figures:
    """A LoRA step: packed, by sentence-transformers' loss, as three padded forwards."""
    figures = train._figures(job.corpus.base, job.corpus.vocabulary, "bfloat16", job.device, job.sizes.triples)
    yield from ({**figure, "name": f"gpu_{figure['name']}"} for figure in figures)


def heads(job: Job) -> Figures:
    """The folded head; shares of FLOPs are the same everywhere."""
    figures = (figure for figure in head.run() if not figure["name"].startswith("head_share"))
    yield from ({**figure, "name": f"gpu_{figure['name']}"} for figure in figures)


def others(module: Any) -> Callable[[Job], Figures]:
    """Another benchmark's figures, as that finds them on this device."""
    return lambda job: ({**figure, "name": f"gpu_{figure['name']}"} for figure in module.run())


PARTS: dict[str, Callable[[Job], Figures]] = {
    "limits": limits, "kernel": kernel, "encode": encode, "compiled": compiled, "budgets": budgets,
    "step": step, "heads": heads, "queries": others(queries), "memory": others(memory),
}  # fmt: skip


def run(sizes: Sizes | None = None, device: str = "cuda") -> list[dict[str, Any]]:
    """All figures; each is also a JSON line on stderr as soon as it is known."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # for ours and for the baselines
    figures: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(Path(folder), sizes or Sizes(), device)
            for name, part in PARTS.items():
                start = time.perf_counter()
                try:
                    for figure in part(job):
                        figures.append(figure)
                        print(json.dumps(figure), file=sys.stderr, flush=True)
                except Exception as error:
                    traceback.print_exc()
                    figures.append({"name": f"gpu_{name}", "failed": f"{type(error).__name__}: {error}"})
                print(f"  {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM") if before is None else os.environ.update(TOKENIZERS_PARALLELISM=before)
    return figures
