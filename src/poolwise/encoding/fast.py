"""Encoding by batches of similar length, with every shortcut checked before it is used."""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from poolwise.encoding.rows import Row, batches, longest_first, padded, rows_of, spread
from poolwise.encoding.shortcuts import (
    Prefix,
    VectorCache,
    adopted,
    can_prune,
    can_reuse,
    check,
    disagreement,
    lighter,
    own_vectors,
    pruned,
    shared_prefix,
)
from poolwise.model.backbone import DIFFERENT, Backbone
from poolwise.model.encoder import PoolingHead
from poolwise.model.hooks import base_model, decoder_layers, lock_of
from poolwise.model.packing import refusal, sent
from poolwise.study.catalogue import spec_of

WINDOW = 8192
"""Texts that are tokenised, sorted and encoded together; the memory of a stream."""
FIRST = (1024, 2048, 4096)
"""The first windows where batches are packed, so need no sorting: a GPU does not wait for the whole first one."""
BUDGET = {"cpu": 512, "cuda": 32768}
"""Tokens of a batch, padding included. Small on a CPU, so that a layer's states stay in its cache."""
CHECKED = 4
"""Texts on which each shortcut is checked."""
PREFIXES = 8
"""Instructions whose keys and values are held: those used last."""
COMPILE_AFTER = 120.0
"""Seconds a job on CUDA has still to run for the decoder layers to be compiled."""
KEPT_BYTES = 1 << 30
"""Embeddings kept while a model is evaluated, at most."""
UNSHORTENED = "encoded without shortcuts, by the model's own `encode`"


@dataclass
class Counts:
    """What was asked and what was done: texts and tokens; `computed` is `tokens` with padding, less what was reused."""

    asked: int = 0
    encoded: int = 0
    tokens: int = 0
    computed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


class FastEncoder:
    """`encode(texts)` -> (N, D) fp32, for an encoder of `poolwise.build` or `poolwise.load` and models that `adopted`
    takes; any other attribute is the encoder's own. Further models are encoded by their own `encode`: `notes` says why.

    What it derives from the model (merged weights, states of prompts, embeddings it keeps) is made once: call `refresh`
    after the model's weights, length limit or `truncate_dim` have changed. Threads may share it.

    Args:
        budget: tokens of a batch; None: by device.
        keep: bytes of embeddings to keep, so that a text asked for again is not encoded again.
        compiled: compile the decoder layers; None: on CUDA, where the job is long enough to repay it. (On a CPU it
            gained 5 to 8 %.)
    """

    def __init__(
        self, encoder: SentenceTransformer, *, budget: int | None = None, keep: int = 0, compiled: bool | None = None
    ) -> None:
        self.given, self.budget, self.keep, self.compiled = encoder, budget, keep, compiled
        self.counts = Counts()
        self.refresh()

    def refresh(self) -> None:
        """Rebuild everything derived from the encoder's weights and settings, and forget kept embeddings."""
        with lock_of(base_model(getattr(self.given[0], "model", self.given))):  # it is looked at and copied
            self._open()

    def _open(self) -> None:
        encoder = self.given
        self.ours, self.notes = True, list[str]()
        self.by_batch = _reads_padding(encoder)
        if self.by_batch:
            self.ours = False
            self.notes = [f"{UNSHORTENED}: its head reads padding, so an embedding depends on the texts beside it"]
        elif not isinstance(encoder[0], Backbone):
            try:
                encoder = adopted(self.given)
                check(self.given, FastEncoder(encoder).encode)
            except Exception as error:  # whatever a model that poolwise has never seen may raise
                self.ours, encoder, reason = False, self.given, str(error).split("\n")[0].split(". Fix")[0]
                self.notes = [f"{UNSHORTENED}: {reason or type(error)}"]
        self.encoder = lighter(encoder.eval()) if self.ours else encoder
        self.kept = VectorCache(self.keep)
        self.layout = "padded"
        if self.ours:
            backbone = self.backbone
            if encoder.device.type == "cuda" and refusal(backbone.model, backbone.attention, self._limit()) is None:
                self.layout = "packed"
            known = backbone.frozen is not None  # then nothing is left to save
            last_token_alone = spec_of(self.head.pooling).reads_last_token_alone(self.head.arguments)
            self.prunes = not known and last_token_alone and self.layout == "padded" and can_prune(backbone)
            self.reuses = not known and can_reuse(backbone)
            self._checked: Counter[tuple[str, str]] = Counter()
            self._prefixes: dict[str, Prefix | None] = {}
            self._is_compiled = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "encoder" not in self.__dict__:  # a copy or a pickle that is being made
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
        """Held for one batch, not for a call: threads take turns."""
        return self.backbone.lock if self.ours else lock_of(self.given)

    def _keep_up(self, asked: int) -> None:
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
        self._keep_up(len(texts))
        if not texts:
            return np.zeros((0, self.encoder.get_embedding_dimension() or 0), np.float32)
        if self.by_batch:
            return self._own(texts, prompt, None, batch_size)
        side = None if self.ours else side

        def compute(new: Sequence[str]) -> np.ndarray:
            if not self.ours:
                return self._own(new, prompt, side, batch_size)
            return np.concatenate([*self._stream(new, prompt, None)])

        return self.kept.get(texts, side, prompt, compute)

    def stream(self, texts: Iterable[str], prompt: str = "", total: int | None = None) -> Iterator[np.ndarray]:
        """Embeddings of any number of texts, a window (n, D) at a time, in order; the next is tokenised meanwhile.
        `total`: how many there are, where `texts` cannot tell; a long job is compiled."""
        self._keep_up(0)
        if self.ours:
            yield from self._stream(texts, prompt, total)
            return
        waiting = iter(texts)
        while window := [*itertools.islice(waiting, WINDOW)]:
            yield self._own(window, prompt, None, 32)

    def _own(self, texts: Sequence[str], prompt: str, side: str | None, batch_size: int) -> np.ndarray:
        """(N, D) by the encoder's own `encode`."""
        with self._lock:
            self.counts.encoded += len(texts)
        return own_vectors(self.encoder, texts, side, prompt, batch_size)

    def _stream(self, texts: Iterable[str], prompt: str, total: int | None) -> Iterator[np.ndarray]:
        waiting = iter(texts)
        total = len(texts) if isinstance(texts, Sequence) else total
        done, started = 0, time.perf_counter()
        sizes = itertools.chain(FIRST if self.layout == "packed" else (), itertools.repeat(WINDOW))
        with ThreadPoolExecutor(1) as ahead:

            def next_window() -> Future[list[Row]] | None:
                window = list(itertools.islice(waiting, next(sizes)))
                return ahead.submit(self._tokenise, window, prompt) if window else None

            pending = next_window()
            while pending is not None:
                rows = pending.result()
                pending = next_window()
                left = None if total is None else total - done
                yield self._window(rows, prompt, left, started, done)
                done += len(rows)

    def _tokenise(self, texts: Sequence[str], prompt: str) -> list[Row]:
        """Each text's features without padding."""
        return rows_of(self.encoder, texts, prompt)

    def _window(self, rows: list[Row], prompt: str, left: int | None, started: float, done: int) -> np.ndarray:
        """(n, D) embeddings of one window, the longest texts first so that a batch too large for memory fails early."""
        order = longest_first(rows)
        found: list[Tensor] = []  # fetched at the end: a GPU that is asked for a batch has nothing to do after it
        before = done
        with torch.inference_mode():
            with self._lock:
                self.counts.encoded += len(rows)
                some = spread(rows, order, CHECKED)
                prefix = self._prefix(prompt, rows, some)
                prune = self.prunes and self._trusts("last layer", "", some, None)
            for batch in batches(order, rows, prefix.length if prefix else 0, self.budget or self._budget()):
                with self._lock:
                    found.append(self._batch([rows[row] for row in batch], prefix, prune).float())
                done += len(batch)
                if left is not None and not self._is_compiled:
                    seconds = (time.perf_counter() - started) / done * (left - (done - before))
                    self._compile_if_worthwhile(seconds)
            together = torch.cat(found)[:, : self.encoder.truncate_dim].cpu().numpy()
        vectors = np.empty_like(together)
        vectors[order] = together
        return vectors

    def _batch(self, rows: list[Row], prefix: Prefix | None, prune: bool) -> Tensor:
        """(B, D) embeddings of one batch."""
        prefix = prefix if prefix and prefix.serves(self.backbone, rows) else None
        return self._forward(rows, prefix, prune and prefix is None)

    def _forward(self, rows: list[Row], prefix: Prefix | None, prune: bool) -> Tensor:
        packed = self.layout == "packed" and prefix is None
        aside = packed and self.backbone.frozen is None  # a pack is laid out on the CPU
        features = padded(rows, "cpu" if aside else self.encoder.device)
        tokens = sum(len(row["input_ids"]) for row in rows)
        self.counts.tokens += tokens
        start = prefix.length if prefix else 0
        width = features["attention_mask"].shape[1] - start
        self.counts.computed += tokens if packed else len(rows) * width
        if prefix is not None:
            features = prefix.forward(self.backbone, features)
        elif packed:
            with self.backbone.in_layout("packed"):
                features = self.backbone(features)
            features["pooling_mask"] = sent(features["pooling_mask"], self.encoder.device)
        else:
            with self.backbone.in_layout("right"), pruned(self.backbone, features, prune):
                features = self.backbone(features)
        for module in list(self.encoder)[1:]:
            features = module(features)
        return features["sentence_embedding"]

    def _trusts(self, name: str, prompt: str, some: list[Row], prefix: Prefix | None) -> bool:
        """Whether a shortcut may be used. Until `CHECKED` texts have agreed, `some` of each window, from its longest to
        its shortest, are encoded with it and without it: the shorter half by itself, and all together, so that they
        need padding. Where they differ it is switched off; where there are none to look at, it is not used yet."""
        if some and self._checked[name, prompt] < CHECKED:
            counts = copy.copy(self.counts)
            for rows in (some[len(some) // 2 :], some):
                short = self._forward(rows, prefix, prefix is None)
                plain = self.encoder(padded(rows, self.encoder.device))["sentence_embedding"]
                if apart := disagreement(short, plain, next(self.backbone.model.parameters()).dtype):
                    self.notes.append(f"the shortcut {name!r} moved embeddings {apart} and is not used")
                    if prefix is not None:
                        self.reuses = False
                    else:
                        self.prunes = False
                    break
            self.counts = counts
            self._checked[name, prompt] += len(some)
        return self._checked[name, prompt] > 0 and (self.prunes if prefix is None else self.reuses)

    def _prefix(self, prompt: str, rows: list[Row], some: list[Row]) -> Prefix | None:
        """The states of the instruction's tokens, if there is one and they can be reused for these texts."""
        if not prompt or not self.reuses:
            return None
        if prompt not in self._prefixes:
            rows = [*self._tokenise(DIFFERENT, prompt), *rows]  # a prompt's last space may merge with a text
            ids = shared_prefix([row["input_ids"] for row in rows])
            self._prefixes[prompt] = Prefix.of(self.backbone, ids, rows[0]) if len(ids) else None
            for old in [*self._prefixes][:-PREFIXES]:
                del self._prefixes[old], self._checked["prefix", old]
        prefix = self._prefixes[prompt] = self._prefixes.pop(prompt)  # used last
        if prefix is None:
            return None
        some = [row for row in some if prefix.serves(self.backbone, [row])]
        return prefix if self._trusts("prefix", prompt, some, prefix) else None

    def _compile_if_worthwhile(self, seconds_left: float) -> None:
        on_cuda = self.encoder.device.type == "cuda"
        if self.compiled or (self.compiled is None and on_cuda and seconds_left > COMPILE_AFTER):
            self.compile()

    def compile(self) -> None:
        """Compile the decoder layers now; the first batches after it take as long as the compiler needs.

        Not where each layer's output is collected by a hook: the compiled layer would take the hook along. Nor the last
        one where it runs for one token: what replaces its parts is new for each batch, and so would its compilation be.
        """
        self._is_compiled = True
        if self.backbone.collector is None:
            for layer in decoder_layers(self.backbone.model)[: -1 if self.prunes else None]:
                layer.compile(dynamic=True)

    def _budget(self) -> int:
        return BUDGET.get(self.encoder.device.type, BUDGET["cpu"])

    def _limit(self) -> int:
        return int(self.backbone.max_seq_length or 0)


def sentence_vectors(model: Any, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> np.ndarray:
    """(N, D) fp32 embeddings by a `FastEncoder`, or by a sentence-transformers model's own `encode`."""
    if isinstance(model, FastEncoder):
        return model.encode(texts, prompt, side=side, batch_size=batch_size)
    return own_vectors(model, texts, side, prompt, batch_size)


def _reads_padding(encoder: SentenceTransformer) -> bool:
    """Whether the head attends to padding (`masked = false`, as in the paper's code)."""
    if not isinstance(encoder[0], Backbone):
        return False
    head = cast(PoolingHead, encoder[1])
    return spec_of(head.pooling).reads_padding(head.arguments)
