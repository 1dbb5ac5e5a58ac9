"""Encoding many texts: batches of texts of similar length, tokenised ahead, each shortcut checked before it is used."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from poolwise.encoding.rows import Tokeniser, Vectors, Window, batches, features, pooled_tokens, spread
from poolwise.encoding.shortcuts import (
    Prefix,
    VectorCache,
    adopt,
    can_prune,
    can_reuse,
    check,
    disagreement,
    encode_by_model,
    lighten,
    pruned,
    shared_prefix,
)
from poolwise.model.backbone import DIFFERENT, Backbone
from poolwise.model.checkpoint import default_pooling
from poolwise.model.encoder import PoolingHead
from poolwise.model.hooks import PackedReduction, base_model, decoder_layers, lock_of
from poolwise.model.packing import Ragged, Segments, flat_index, packed_attention_on, pinned, refusal, run_pack, sent
from poolwise.study.catalogue import spec_of

WINDOW = 8192
"""Texts that are tokenised, sorted and encoded together; the memory of a stream."""
FIRST = (256, 1024, 2048, 4096)
"""The first windows of packs, which need no sorting: a GPU does not wait until a whole window is tokenised."""
BUDGET = 512
"""Tokens of a batch on a CPU, padding included: small, so that a layer's states stay in the cache."""
PACK = (4096, 65536)
"""Fewest and most tokens of a pack on CUDA: it must keep the GPU busy for longer than its kernels take to launch."""
SHARE = 0.25
"""Share of the GPU's free memory that a pack's states may take."""
CHECKED = 4
"""Texts on which each shortcut is checked."""
PREFIXES = 8
"""Prompts whose keys and values are held: those used last."""
COMPILE_AFTER = 20.0
"""Seconds a job on CUDA must still take for its layers to be compiled. On an H200 compiling 24 layers took 4.6 s and
made encoding 1.45 times as fast, so that it repays itself after 15 s."""
TOKENISERS = 8
"""Threads that tokenise for a GPU, at most; a CPU needs its cores for the model."""
KEPT_BYTES = 1 << 30
"""Embeddings kept while a model is evaluated, at most."""
MASKED = "padding is masked; the paper's evaluation attends to it (masked = false, recipe.evaluation_padding)"
UNSHORTENED = "encoded without shortcuts, by the model's own `encode`"


@dataclass
class Counts:
    """Texts asked for and encoded, their tokens, and the tokens computed: with padding, without what was reused."""

    asked: int = 0
    encoded: int = 0
    tokens: int = 0
    computed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


class FastEncoder:
    """`encode(texts)` -> (N, D) fp32, for encoders of `poolwise.build` and `poolwise.load` and models that `adopt`
    accepts. Other models are encoded by their own `encode`; `notes` says why. Other attributes are the encoder's own.

    Everything derived from the model (merged weights, states of prompts, kept embeddings) is computed once: call
    `refresh` after its weights, length limit or `truncate_dim` have changed. Threads may share a FastEncoder.

    Args:
        budget: tokens of a batch; None: by device, on CUDA by its free memory and the model's width.
        keep: bytes of embeddings to keep, so that a text asked for again is not encoded again.
        compiled: compile the decoder layers; None: on CUDA, if the job is long enough to repay it. (On a CPU it gained
            5 to 8 %.)
    """

    def __init__(
        self, encoder: SentenceTransformer, *, budget: int | None = None, keep: int = 0, compiled: bool | None = None
    ) -> None:
        self.given, self.budget, self.keep, self.compiled = encoder, budget, keep, compiled
        self.counts = Counts()
        self.refresh()

    def refresh(self) -> None:
        """Rebuild everything derived from the encoder's weights and settings, and forget kept embeddings."""
        with lock_of(base_model(getattr(self.given[0], "model", self.given))):  # it is probed and copied
            self._open()

    def _open(self) -> None:
        encoder = self.given
        self.ours, self.notes = True, [MASKED] if reads_padding(encoder) else []
        if not isinstance(encoder[0], Backbone):
            try:
                encoder = adopt(self.given)
                check(self.given, FastEncoder(encoder).encode)
            except Exception as error:  # an unknown model may raise anything
                self.ours, encoder, reason = False, self.given, str(error).split("\n")[0].split(". Fix")[0]
                self.notes = [f"{UNSHORTENED}: {reason or type(error)}"]
            self.notes += filter(None, [default_pooling(self.given)])
        self.encoder = lighten(encoder.eval()) if self.ours else encoder
        self.kept = VectorCache(self.keep)
        self.layout = "padded"
        if self.ours:
            backbone = self.backbone
            on_cuda = encoder.device.type == "cuda"
            if on_cuda and refusal(backbone.model, backbone.attention, int(backbone.max_seq_length or 0)) is None:
                self.layout = "packed"
            self.tokenise = Tokeniser(self.encoder, self.notes, min(TOKENISERS, _cores()) if on_cuda else 1)
            self.last_only = spec_of(self.head.pooling).reads_last_token_alone(self.head.arguments)
            known = backbone.frozen is not None  # its states are looked up, so shortcuts would save nothing
            self.prunes = not known and self.last_only and self.layout == "padded" and can_prune(backbone)
            self.reuses = not known and can_reuse(backbone)
            self._checked: Counter[tuple[str, str]] = Counter()
            self._prefixes: dict[str, Prefix | None] = {}
            self._forwards: list[tuple[Any, Any]] = []  # compiled layers
            self._is_compiled = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not compiled: compiled layers are bound to the weights of the original."""
        return {**self.__dict__, "_forwards": [], "_is_compiled": False}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "encoder" not in self.__dict__:  # while a copy or a pickle is made
            raise AttributeError(name)
        return getattr(self.encoder, name)

    @property
    def backbone(self) -> Backbone:
        """The decoder."""
        return cast(Backbone, self.encoder[0])

    @property
    def head(self) -> PoolingHead:
        """The pooling."""
        return cast(PoolingHead, self.encoder[1])

    @property
    def _lock(self) -> AbstractContextManager[Any]:
        """Held for one batch at a time, so that threads take turns."""
        return self.backbone.lock if self.ours else lock_of(self.given)

    def _begin(self, asked: int) -> None:
        """At the start of every call."""
        with self._lock:
            self.counts.asked += asked
            if self.encoder.training:
                self.encoder.eval()

    def encode(
        self, texts: Sequence[str], prompt: str = "", *, side: str | None = None, batch_size: int = 32
    ) -> np.ndarray:
        """(N, D) fp32 embeddings in the order of `texts`. `side` (`query` or `document`) and `batch_size` are for
        models with an `encode` of their own, which may tell sides apart by more than the prompt."""
        self._begin(len(texts))
        if not texts:
            return np.zeros((0, self.encoder.get_embedding_dimension() or 0), np.float32)
        side = None if self.ours else side

        def compute(new: Sequence[str]) -> np.ndarray:
            if not self.ours:
                return self._own(new, prompt, side, batch_size)
            out, done = np.zeros((0, 0), np.float32), 0
            for vectors in self._windows(new, prompt, None):
                out = out if done else np.empty((len(new), vectors.shape[1]), np.float32)
                vectors.into(out[done : done + vectors.shape[0]])
                done += vectors.shape[0]
            return out

        return self.kept.get(texts, side, prompt, compute)

    def encode_rows(self, rows: Ragged, prompt: str = "") -> np.ndarray:
        """(N, D) fp32 embeddings of `rows`, which `self.tokenise` made for this prompt, in their order; nothing is
        kept. Only if `self.ours`: other models tokenise by themselves."""
        self._begin(len(rows))
        vectors = self._window(self._arranged(rows), prompt, self.budget or self._tokens_of_a_batch())
        return vectors.into(np.empty(vectors.shape, np.float32))

    def stream(self, texts: Iterable[str], prompt: str = "", total: int | None = None) -> Iterator[np.ndarray]:
        """Embeddings of any number of texts, a window (n, D) at a time, in order; the next one is tokenised meanwhile.
        `total`: how many there are, if `texts` has no length; a long job is compiled."""
        self._begin(0)
        if self.ours:
            for vectors in self._windows(texts, prompt, total):
                yield vectors.into(np.empty(vectors.shape, np.float32))
            return
        waiting = iter(texts)
        while window := [*itertools.islice(waiting, WINDOW)]:
            yield self._own(window, prompt, None, 32)

    def _own(self, texts: Sequence[str], prompt: str, side: str | None, batch_size: int) -> np.ndarray:
        """(N, D) by the encoder's own `encode`."""
        with self._lock:
            self.counts.encoded += len(texts)
        return encode_by_model(self.encoder, texts, side, prompt, batch_size)

    def _windows(self, texts: Iterable[str], prompt: str, total: int | None) -> Iterator[Vectors]:
        """One window after the other; those of packs are handed out when the next one has been launched."""
        waiting = iter(texts)
        total = len(texts) if isinstance(texts, Sequence) else total
        packed = self.layout == "packed"
        sizes = itertools.chain(FIRST if packed else (), itertools.repeat(WINDOW))
        budget = self.budget or self._tokens_of_a_batch()
        launched, queued, marks = 0, None, list[tuple[float, int]]()
        if self.compiled and not self._is_compiled:
            self.compile()
        with ThreadPoolExecutor(1) as ahead:

            def next_window() -> Future[Window] | None:
                window = list(itertools.islice(waiting, next(sizes)))
                return ahead.submit(self._prepare, window, prompt) if window else None

            pending = next_window()
            while pending is not None:
                window = pending.result()
                pending = next_window()
                vectors = self._window(window, prompt, budget)
                if queued is not None:
                    yield queued
                if not packed:
                    yield vectors
                queued = vectors if packed else None
                launched += len(window.rows)
                marks.append((time.perf_counter(), launched))
                if total is not None and len(marks) > 2:
                    start, before = marks[1]  # the first windows take longer: libraries start, shortcuts are checked
                    pace = (marks[-1][0] - start) / (launched - before)
                    self._compile_if_worthwhile(pace * (total - launched))
            if queued is not None:
                yield queued

    def _prepare(self, texts: Sequence[str], prompt: str) -> Window:
        """Tokens of the texts in the order in which they are encoded; in a thread of its own, one window ahead."""
        return self._arranged(self.tokenise(texts, prompt))

    def _arranged(self, rows: Ragged) -> Window:
        """The rows in the order in which they are encoded, pinned in memory if they go to a GPU as packs."""
        order = np.argsort(-rows.lengths, kind="stable")
        rows = rows.take(order)
        if self.layout != "packed" or self.backbone.frozen is not None:
            return Window(rows, order, None)
        rows.pooled = pooled_tokens(self.backbone, rows)
        tokens = torch.from_numpy(np.stack([rows.ids, rows.positions]))
        return Window(rows, order, pinned(tokens, self.encoder.device))

    def _window(self, window: Window, prompt: str, budget: int) -> Vectors:
        """The embeddings of one window; on CUDA all of it is queued and nothing waits for the device."""
        rows, found = window.rows, []
        with torch.inference_mode():
            with self._lock:
                self.counts.encoded += len(rows)
                some = rows.take(spread(rows.lengths, CHECKED))
                prefix = self._prefix(prompt, rows, some)
                prune = self.prunes and self._trusts("last layer", "", some, None)
            packed = window.tokens is not None and prefix is None
            whole = packed and (self.last_only or self.backbone.collector is not None)  # no state is padded again
            tokens = sent(window.tokens, self.encoder.device) if packed and window.tokens is not None else None
            skipped = prefix.length if prefix else 0
            for first, last in batches(rows.lengths, budget, skipped=skipped, padded=not whole):
                batch = rows.between(first, last)
                with self._lock:
                    if tokens is not None:
                        start = int(rows.starts[first])
                        run = partial(self._packed, batch, tokens[:, start : start + len(batch.ids)])
                    else:
                        served = prefix if prefix and prefix.serves(self.backbone, batch) else None
                        run = partial(self._padded, batch, served, prune and served is None)
                    found.append(self._compiled(run).float())
            return Vectors(found, window.order, self.encoder.truncate_dim)

    def _packed(self, rows: Ragged, tokens: Tensor) -> Tensor:
        """(B, D) embeddings of one pack; tokens (2, N) on the device."""
        self.counts.tokens += len(rows.ids)
        self.counts.computed += len(rows.ids)
        backbone, device = self.backbone, self.encoder.device
        segments = Segments(rows.lengths, device)
        pooled = torch.from_numpy(np.ones(len(rows.ids), bool) if rows.pooled is None else rows.pooled)
        with packed_attention_on(backbone.model):
            states, vectors = run_pack(backbone.model, backbone.collector, segments, tokens, pooled)
        if vectors is not None:
            return self._embedding({"layer_embeddings": vectors})
        if self.last_only:
            last = PackedReduction("last", segments.ends, pinned(pooled, device))(states[None])
            real = torch.ones(len(rows), 1, dtype=torch.bool, device=device)
            return self._embedding({"token_embeddings": last[:, None], "pooling_mask": real})
        width = segments.longest
        places = sent(torch.from_numpy(flat_index(np.arange(len(rows)) * width, rows.lengths)), device)
        padded = states.new_zeros(len(rows) * width, states.shape[-1]).index_copy(0, places, states)
        mask = sent(rows.padded()[2], device)
        return self._embedding({"token_embeddings": padded.view(len(rows), width, -1), "pooling_mask": mask})

    def _padded(self, rows: Ragged, prefix: Prefix | None, prune: bool) -> Tensor:
        """(B, D) embeddings of one padded batch."""
        given = features(rows, self.encoder.device)
        start = prefix.length if prefix else 0
        self.counts.tokens += len(rows.ids)
        self.counts.computed += len(rows) * (given["attention_mask"].shape[1] - start)
        if prefix is not None:
            return self._embedding(prefix.forward(self.backbone, given))
        layout = "packed" if self.layout == "packed" else "right"
        with self.backbone.in_layout(layout), pruned(self.backbone, given, prune):
            return self._embedding(self.backbone(given))

    def _embedding(self, given: dict[str, Any]) -> Tensor:
        """(B, D): what the modules after the backbone make of its states."""
        for module in list(self.encoder)[1:]:
            given = module(given)
        return given["sentence_embedding"]

    def _trusts(self, name: str, prompt: str, some: Ragged, prefix: Prefix | None) -> bool:
        """Whether a shortcut may be used. Until `CHECKED` texts have agreed, `some` of each window, from its longest to
        its shortest, are encoded with it and without it: the shorter half by itself, and all together, so that they
        need padding. If they differ it is switched off; without any text to check it is not used yet."""
        if len(some) and self._checked[name, prompt] < CHECKED:
            counts = copy.copy(self.counts)
            for rows in (some.between(len(some) // 2, len(some)), some):
                short = self._padded(rows, prefix, prefix is None)
                plain = self.encoder(features(rows, self.encoder.device))["sentence_embedding"]
                if apart := disagreement(short, plain, next(self.backbone.model.parameters()).dtype):
                    self.notes.append(f"the shortcut {name!r} changes embeddings {apart} and is not used")
                    if prefix is not None:
                        self.reuses = False
                    else:
                        self.prunes = False
                    break
            self.counts = counts
            self._checked[name, prompt] += len(some)
        return self._checked[name, prompt] > 0 and (self.prunes if prefix is None else self.reuses)

    def _prefix(self, prompt: str, rows: Ragged, some: Ragged) -> Prefix | None:
        """The states of the prompt's tokens, if there is a prompt and they can be reused for these texts."""
        if not prompt or not self.reuses:
            return None
        if prompt not in self._prefixes:
            different = self.tokenise(DIFFERENT, prompt)  # a prompt's last space may merge with a text
            ids = shared_prefix(different, rows)
            self._prefixes[prompt] = Prefix.of(self.backbone, ids, different.between(0, 1)) if len(ids) else None
            for old in [*self._prefixes][:-PREFIXES]:
                del self._prefixes[old], self._checked["prefix", old]
        prefix = self._prefixes[prompt] = self._prefixes.pop(prompt)  # the dictionary's order is that of their last use
        if prefix is None:
            return None
        served = [n for n in range(len(some)) if prefix.serves(self.backbone, some.between(n, n + 1))]
        return prefix if self._trusts("prefix", prompt, some.take(np.array(served, dtype=int)), prefix) else None

    def _compile_if_worthwhile(self, seconds_left: float) -> None:
        on_cuda = self.encoder.device.type == "cuda"
        if self.compiled is None and not self._is_compiled and on_cuda and seconds_left > COMPILE_AFTER:
            self.compile()

    def compile(self) -> None:
        """Compile the decoder layers now; the first batches after it take as long as the compiler needs.

        Not the last layer if it runs for one token: what replaces its parts is new for each batch, and so would its
        compilation be.
        """
        self._is_compiled = True
        layers = decoder_layers(self.backbone.model)[: -1 if self.prunes else None]
        self._forwards = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers]

    def _compiled(self, run: Callable[[], Tensor]) -> Tensor:
        """`run` with the layers as they are compiled, if they are. Hooks on the layers, which collect their vectors,
        stay outside of what is compiled. If the compiler fails, the encoder goes on without it."""
        if not self._forwards:
            return run()
        try:
            for layer, forward in self._forwards:
                layer.forward = forward
            return run()
        except Exception as error:  # of the compiler, of which there are many kinds; any other is raised again below
            for layer, _ in self._forwards:
                del layer.forward
            self._forwards = []
            reason = str(error).strip().split("\n")[0]
            self.notes.append(f"the decoder layers are not compiled: {type(error).__name__}: {reason}")
            return run()
        finally:
            for layer, _ in self._forwards:
                del layer.forward

    def _tokens_of_a_batch(self) -> int:
        """On CUDA as many as fit: the widest states of a layer are counted, which live side by side while it runs."""
        if self.encoder.device.type != "cuda":
            return BUDGET
        config = self.backbone.model.config.get_text_config()
        width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        size = next(self.backbone.model.parameters()).element_size()
        each = size * (8 * width + 3 * inner) + 8 * width  # queries to residuals, gate, up and product; a norm in fp32
        free, _ = torch.cuda.mem_get_info(self.encoder.device)
        cached = torch.cuda.memory_reserved(self.encoder.device) - torch.cuda.memory_allocated(self.encoder.device)
        return int(min(max(SHARE * (free + cached) / each, PACK[0]), PACK[1]))


def sentence_vectors(model: Any, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> np.ndarray:
    """(N, D) fp32 embeddings by a `FastEncoder`, or by a sentence-transformers model's own `encode`."""
    if isinstance(model, FastEncoder):
        return model.encode(texts, prompt, side=side, batch_size=batch_size)
    return encode_by_model(model, texts, side, prompt, batch_size)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reads_padding(encoder: SentenceTransformer) -> bool:
    """Whether the paper's evaluation attends to padding in this design (`masked = false`). Here it is masked."""
    if not isinstance(encoder[0], Backbone):
        return False
    head = cast(PoolingHead, encoder[1])
    return spec_of(head.pooling).reads_padding(head.arguments)
