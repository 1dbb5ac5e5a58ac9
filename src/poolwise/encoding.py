"""Fast encoding: the same embeddings as `SentenceTransformer.encode`, with less work. mteb is given it too.

- texts are sorted by their tokens and laid into batches of so many tokens, packed without padding on CUDA;
- each text is encoded once (`keep`: also from call to call), results come in the order of the input;
- tokenisation runs ahead of the model in a thread; a stream of any length is held one window at a time;
- the keys and values of an instruction are computed once where attention is causal: no token of it sees what follows.
  Under bidirectional attention the instruction reads the text, so nothing can be reused;
- where only the last token is pooled, the last layer's output projection and feed-forward run for that token alone;
- LoRA is merged into fp32 weights (in half precision that would round them, so there it stays beside them), and beside
  a base in half precision the head multiplies in that precision too;
- on CUDA long jobs compile the decoder layers (one compilation serves all layers).

None of it is believed: the first texts that take a shortcut are also encoded without it, and a shortcut that moves an
embedding is switched off for good, with a line in `notes`.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from torch import Tensor

from poolwise.adopted import AGREEMENT, adopted, check, moved, own_vectors
from poolwise.decoder.backbone import DIFFERENT, Backbone
from poolwise.decoder.last_layer import can_prune, pruned
from poolwise.decoder.layers import decoder_layers
from poolwise.decoder.layouts import refusal
from poolwise.decoder.packing import sent
from poolwise.decoder.prefix import Prefix, shared_prefix
from poolwise.encoder import PoolingHead

WINDOW = 8192
"""Texts that are tokenised, sorted and encoded together; the memory of a stream."""
FIRST = (1024, 2048, 4096)
"""The first windows where batches are packed, so need no sorting: a GPU does not wait for the whole first one."""
CHUNK = 256
"""Texts of one call of the tokenizer, of similar length."""
BUDGET = {"cpu": 512, "cuda": 32768}
"""Tokens of a batch, padding included. Small on a CPU, so that a layer's states stay in its cache."""
CHECKED = 4
"""Texts on which each shortcut is checked."""
COMPILE_AFTER = 120.0
"""Seconds a job on CUDA has still to run for the decoder layers to be compiled."""

KEPT_BYTES = 1 << 30
"""Embeddings kept while a model is evaluated, at most."""

Row = dict[str, Tensor]
"""One text's features, each (T,) without padding, or a number for the whole text."""


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

    Args:
        budget: tokens of a batch; None: by device.
        keep: bytes of embeddings to keep, so that a text asked for again is not encoded again.
        compiled: compile the decoder layers; None: on CUDA, where the job is long enough to repay it. (With batches as
            small as a CPU likes them it gained nothing.)
    """

    def __init__(
        self, encoder: SentenceTransformer, *, budget: int | None = None, keep: int = 0, compiled: bool | None = None
    ) -> None:
        self.ours, self.notes, own = True, list[str](), encoder
        if not isinstance(own[0], Backbone):
            try:
                encoder = adopted(own)
                check(own, FastEncoder(encoder).encode)
            except Exception as error:  # whatever a model that poolwise has never seen may raise
                self.ours, encoder, reason = False, own, str(error).split("\n")[0].split(". Fix")[0]
                self.notes = [f"encoded without shortcuts, by the model's own `encode`: {reason or type(error)}"]
        self.encoder = _lighter(encoder.eval()) if self.ours else encoder
        self.budget = budget or BUDGET.get(encoder.device.type, BUDGET["cpu"])
        self.keep, self.compiled = keep, compiled
        self.kept: dict[tuple[str | None, str, str], np.ndarray] = {}
        self.counts = Counts()
        self.layout = "padded"
        if self.ours:
            backbone = self.backbone
            if encoder.device.type == "cuda" and refusal(backbone.model, backbone.attention, self._limit()) is None:
                self.layout = "packed"
            known = backbone.frozen is not None  # then nothing is left to save
            self.prunes = (
                not known and self.head.pooling == "last_token" and self.layout == "padded" and can_prune(backbone)
            )
            self.reuses = not known and backbone.attention == "causal"
            self._trusted: set[str] = set()
            self._after_prompt: dict[str, list[Row]] = {}
            self._prefixes: dict[str, Prefix | None] = {}
            self._is_compiled = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["encoder"], name)

    @property
    def backbone(self) -> Backbone:
        """The decoder."""
        return cast(Backbone, self.encoder[0])

    @property
    def head(self) -> PoolingHead:
        """The pooling."""
        return cast(PoolingHead, self.encoder[1])

    def encode(
        self, texts: Sequence[str], prompt: str = "", *, side: str | None = None, batch_size: int = 32
    ) -> np.ndarray:
        """(N, D) fp32 embeddings in the order of `texts`. `side` (`query` or `document`) and `batch_size` are for
        models with an `encode` of their own, which may tell sides apart by more than the prompt."""
        self.counts.asked += len(texts)
        side = None if self.ours else side
        new = [text for text in dict.fromkeys(texts) if (side, prompt, text) not in self.kept]
        fresh: dict[str, np.ndarray] = {}
        if new:
            if self.ours:
                vectors = np.concatenate([*self.stream(new, prompt)])
            else:
                vectors = own_vectors(self.encoder, new, side, prompt, batch_size)
                self.counts.encoded += len(new)
            fresh = dict(zip(new, vectors, strict=True))
        answer = [fresh[text] if text in fresh else self.kept[side, prompt, text] for text in texts]
        if new and (len(self.kept) + len(new)) * fresh[new[0]].nbytes <= self.keep:
            self.kept.update({(side, prompt, text): vector for text, vector in fresh.items()})
        width = self.encoder.get_embedding_dimension() or 0
        return np.stack(answer) if answer else np.zeros((0, width), np.float32)

    def stream(self, texts: Iterable[str], prompt: str = "", total: int | None = None) -> Iterator[np.ndarray]:
        """Embeddings of any number of texts, a window (n, D) at a time, in order; the next is tokenised meanwhile.
        `total`: how many there are, where `texts` cannot tell; a long job is compiled."""
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

    def _window(self, rows: list[Row], prompt: str, left: int | None, started: float, done: int) -> np.ndarray:
        """(n, D) embeddings of one window, the longest texts first so that a batch too large for memory fails early."""
        self.counts.encoded += len(rows)
        prefix = self._prefix(prompt, rows)
        skipped = prefix.length if prefix else 0
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
        found: list[Tensor] = []  # fetched at the end: a GPU that is asked for a batch has nothing to do after it
        before = done
        with torch.inference_mode():
            for batch in _batches(order, rows, skipped, self.budget):
                found.append(self._batch([rows[row] for row in batch], prefix).float())
                done += len(batch)
                if left is not None and not self._is_compiled:
                    seconds = (time.perf_counter() - started) / done * (left - (done - before))
                    self._compile_if_worthwhile(seconds)
            together = torch.cat(found).cpu().numpy()
        vectors = np.empty_like(together)
        vectors[order] = together
        return vectors

    def _batch(self, rows: list[Row], prefix: Prefix | None) -> Tensor:
        """(B, D) embeddings of one batch."""
        prefix = prefix if prefix and all(prefix.starts(row["input_ids"]) for row in rows) else None
        if prefix and not self._trusts("prefix", rows, prefix):
            prefix = None
        prune = self.prunes and prefix is None and self._trusts("last layer", rows, None)
        return self._forward(rows, prefix, prune)

    def _forward(self, rows: list[Row], prefix: Prefix | None, prune: bool) -> Tensor:
        packed = self.layout == "packed" and prefix is None
        aside = packed and self.backbone.frozen is None  # a pack is laid out on the CPU
        features = self._padded(rows, "cpu" if aside else self.encoder.device)
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

    def _trusts(self, name: str, rows: list[Row], prefix: Prefix | None) -> bool:
        """Whether a shortcut may be used: the first time a few texts are encoded with it and without it, and where they
        differ it is switched off."""
        if name not in self._trusted:
            self._trusted.add(name)
            rows, counts = rows[-CHECKED:], copy.copy(self.counts)
            short = self._forward(rows, prefix, prefix is None)
            plain = self.encoder(self._padded(rows, self.encoder.device))["sentence_embedding"]
            self.counts = counts
            apart = moved(short, plain)
            if not apart <= AGREEMENT.get(next(self.backbone.model.parameters()).dtype, 1e-2):
                self.notes.append(f"the shortcut {name!r} moved embeddings by {apart:.1e} and is not used")
                if prefix is not None:
                    self.reuses = False
                else:
                    self.prunes = False
        return self.prunes if prefix is None else self.reuses

    def _padded(self, rows: list[Row], device: torch.device | str) -> dict[str, Any]:
        """One batch of features (B, T), padded on the right."""
        features = {}
        for name, first in rows[0].items():
            values = [row[name] for row in rows]
            whole = torch.nn.utils.rnn.pad_sequence(values, batch_first=True) if first.ndim else torch.stack(values)
            features[name] = sent(whole, torch.device(device))
        return features

    def _tokenise(self, texts: list[str], prompt: str) -> list[Row]:
        """Each text's features without padding. Of a new prompt also what texts that differ from their first token on
        look like after it; here and not in `_prefix`, since a tokenizer serves one thread at a time."""
        if prompt and self.reuses and prompt not in self._after_prompt:
            self._after_prompt[prompt] = self._rows(list(DIFFERENT), prompt)
        return self._rows(texts, prompt)

    def _rows(self, texts: list[str], prompt: str) -> list[Row]:
        """The same from the encoder's own preprocessing, texts of similar length together."""
        rows: list[Row] = [{}] * len(texts)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            features = self.encoder.preprocess([texts[number] for number in part], prompt=prompt or None)
            mask = features["attention_mask"].bool()
            given = {name: _by_text(value, mask) for name, value in features.items() if name != "modality"}
            for place, number in enumerate(part):
                rows[number] = {name: values[place] for name, values in given.items()}
        return rows

    def _prefix(self, prompt: str, rows: list[Row]) -> Prefix | None:
        """The states of the instruction's tokens, if there is one and they can be reused."""
        if not prompt or not self.reuses:
            return None
        if prompt not in self._prefixes:
            rows = [*self._after_prompt[prompt], *rows]  # of the texts too: a prompt's last space may merge with them
            ids = shared_prefix([row["input_ids"] for row in rows])
            with torch.inference_mode():
                self._prefixes[prompt] = Prefix.of(self.backbone, ids, rows[0]) if len(ids) else None
        return self._prefixes[prompt]

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

    def _limit(self) -> int:
        return int(self.backbone.max_seq_length or 0)


def sentence_vectors(model: Any, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> np.ndarray:
    """(N, D) fp32 embeddings by a `FastEncoder`, or by a sentence-transformers model's own `encode`."""
    if isinstance(model, FastEncoder):
        return model.encode(texts, prompt, side=side, batch_size=batch_size)
    return own_vectors(model, texts, side, prompt, batch_size)


def _lighter(encoder: SentenceTransformer) -> SentenceTransformer:
    """The encoder as it is used only to encode: LoRA merged into a copy of an fp32 base; beside a base in half
    precision the head's matrices in that precision too (norms and sums stay fp32). Itself where neither applies."""
    backbone, head = cast(Backbone, encoder[0]), encoder[1]
    dtype = next(backbone.model.parameters()).dtype
    if dtype in (torch.float32, torch.float64):
        if not isinstance(backbone.model, PeftModel):
            return encoder
        merged = copy.deepcopy(encoder)
        own = cast(Backbone, merged[0])
        own.model = cast(Any, own.model).merge_and_unload()
        return merged.eval()
    if not any(True for _ in head.parameters()):
        return encoder
    half = copy.copy(encoder)
    half._modules = {
        **encoder._modules,
        next(itertools.islice(encoder._modules, 1, None)): copy.deepcopy(head).to(dtype),
    }
    return half


def _batches(order: list[int], rows: list[Row], skipped: int, budget: int) -> Iterator[list[int]]:
    """Rows in `order` (the longest first) cut into batches of at most `budget` tokens, padding included; a text without
    tokens is never a batch of its own, which no model takes."""
    batch: list[int] = []
    for row in order:
        longest = len(rows[batch[0] if batch else row]["input_ids"]) - skipped
        if batch and len(rows[row]["input_ids"]) and (len(batch) + 1) * longest > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _by_text(value: Any, mask: Tensor) -> Sequence[Tensor]:
    """What each text has of a feature: its tokens without padding, its number, or what all texts share."""
    value = torch.as_tensor(value)
    if value.shape == mask.shape:
        return value[mask].split(mask.sum(1).tolist())
    flat = value.reshape(-1)
    return (flat if len(flat) == len(mask) else flat[:1].expand(len(mask))).unbind()
