"""Windows of texts on their way to the model and back: token ids, batches, embeddings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers.tokenization_utils_base import LARGE_INTEGER, TruncationStrategy
from transformers.utils import PaddingStrategy

from poolwise.model.backbone import Backbone
from poolwise.model.base import special_frame, template_parts
from poolwise.model.hooks import lock_of
from poolwise.model.packing import Ragged, flat_index, sent

CHUNK = 256
"""Texts of one call of a tokenizer: few enough for its memory to be used again, which is faster than fresh memory."""
COMPARED = 4
"""Texts of a window, from its longest to its shortest, whose ids are compared with those of `preprocess`."""
ODD = (
    "",
    " ",
    "a",
    " a ",
    "Upper And lower",
    "two\nlines\tand a tab",
    "Ünïcode é e\u0301 ﬁ",
    "<s> </s> <eos>",
    "7 + 7",
)
"""Texts with what a preprocessing may strip, normalise or read as a special token; compared for each prompt."""
REMEMBERED = 64
"""Prompts whose comparison is remembered."""
LONG = 32
"""Characters for each token of the limit beyond which a text is cut before it is tokenised; English has about 4."""
MARGIN = 32
"""Tokens beyond the limit that a cut text must have: a cut changes no more than the last few tokens before it."""


class Tokeniser:
    """Texts to the token ids that an encoder's `preprocess` gives, without padding and without a tensor for each text.

    Texts go to the Rust tokenizer unpadded, in `threads` threads. Its ids are compared with those of `preprocess` on
    `ODD` and on the first texts of each prompt, and again when texts are truncated for the first time. If they differ,
    or the tokenizer has no Rust part, `preprocess` is used, and a line in `notes` says why.
    """

    def __init__(self, encoder: SentenceTransformer, notes: list[str], threads: int = 1) -> None:
        self.encoder, self.notes, self.threads = encoder, notes, threads
        self.backbone = cast(Backbone, encoder[0])
        self.direct = hasattr(getattr(self.backbone.words, "backend_tokenizer", None), "encode_batch_fast")
        self.prompts: dict[tuple[str, bool], int] = {}  # (prompt, whether texts are cut) -> tokens of the prompt

    def __call__(self, texts: Sequence[str], prompt: str) -> Ragged:
        """The texts after `prompt`, in their order."""
        texts = cut(texts, self.backbone.words, self._limit)
        if self.direct and all(isinstance(text, str) for text in texts):
            rows = self._direct(texts, prompt)
            kind = (prompt, bool(rows.lengths.max(initial=0) >= self._limit))
            length = self.prompts.get(kind)
            if length is None:
                some = [*ODD, *(texts[number] for number in spread(rows.lengths, COMPARED))]
                expected, found = self.by_preprocess(some, prompt), self._direct(some, prompt)
                for old in [*self.prompts][: 1 - REMEMBERED]:
                    self.prompts.pop(old, None)  # another thread may have removed it
                length = self.prompts[kind] = expected.prompt
                if not (_equal(found.lengths, expected.lengths) and _equal(found.ids, expected.ids)):
                    self.direct = False
                    self.notes.append("texts are tokenised by the model's own `preprocess`, whose ids differ")
            if self.direct:
                rows.prompt = length
                return rows
        return self.by_preprocess(texts, prompt)

    @property
    def _limit(self) -> int:
        """Tokens to which a text is cut."""
        if self.backbone.template == "plain":
            return int(self.backbone.words.model_max_length)
        return int(self.backbone.max_seq_length or self.backbone.words.model_max_length)

    def _direct(self, texts: Sequence[str], prompt: str) -> Ragged:
        template, words = self.backbone.template, self.backbone.words
        with lock_of(words):
            if template == "plain":
                return self._encoded([prompt + text for text in texts] if prompt else texts, self._limit)
            before, between, after, room, space = template_parts(template, prompt, words, self._limit)
            rows = self._encoded([space + text for text in texts], None)
        copy = np.minimum(rows.lengths, room)
        fixed = [np.array(part or (), dtype=np.int64) for part in (before, between, after)]
        sizes = [len(part) for part in fixed]
        # each text is up to five runs of one array: before, copy, between, second copy, after
        starts, lengths = np.zeros((2, len(rows), 5), dtype=np.int64)
        starts[:, [0, 2, 4]] = np.cumsum([0, *sizes[:2]])
        starts[:, [1, 3]] = (rows.starts + sum(sizes))[:, None]
        lengths[:, [0, 2, 4]] = sizes
        lengths[:, 1] = copy
        lengths[:, 3] = 0 if between is None else copy
        pool = np.concatenate([*fixed, rows.ids])
        return Ragged(pool[flat_index(starts.ravel(), lengths.ravel())], lengths.sum(1))

    def _encoded(self, texts: Sequence[str], limit: int | None) -> Ragged:
        """Ids by the Rust tokenizer, which releases the GIL; `limit`: cut to it, with special tokens; None: neither."""
        words = cast(Any, self.backbone.words)
        cut = limit is not None and limit <= LARGE_INTEGER
        strategy = TruncationStrategy.LONGEST_FIRST if cut else TruncationStrategy.DO_NOT_TRUNCATE
        words.set_truncation_and_padding(PaddingStrategy.DO_NOT_PAD, strategy, limit, 0, None, None)
        backend, special = words.backend_tokenizer, limit is not None
        backend.encode_special_tokens = words.split_special_tokens

        def encode(part: Sequence[str]) -> list[list[int]]:
            return [encoding.ids for encoding in backend.encode_batch_fast(part, add_special_tokens=special)]

        size = min(CHUNK, -(-len(texts) // self.threads))
        parts = [texts[start : start + size] for start in range(0, len(texts), size)] if texts else []
        if self.threads > 1 and len(parts) > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                ids = [*chain.from_iterable(pool.map(encode, parts))]
        else:
            ids = [*chain.from_iterable(map(encode, parts))]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return Ragged(np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths)

    def of_ids(self, texts: Sequence[Sequence[int]], prompt: str) -> Ragged:
        """Texts that are token ids already, after `prompt`, in their order.

        What the tokenizer puts around a text (BOS, EOS) is added where it is missing, and long texts are cut as
        `__call__` cuts them. The prompt is tokenised alone: it does not merge with a text's first word.
        """
        template, words = self.backbone.template, self.backbone.words
        with lock_of(words):
            leading, trailing = special_frame(words)
            if template == "plain":
                ids = words(prompt, add_special_tokens=False)["input_ids"] if prompt else []
                before, between, after = [*leading, *ids], None, trailing
                room = max(0, self._limit - len(before) - len(after))
            else:
                before, between, after, room, _ = template_parts(template, prompt, words, self._limit)
        rows = []
        for text in texts:
            bare = [*text]
            if leading and bare[: len(leading)] == leading:
                bare = bare[len(leading) :]
            if trailing and bare[-len(trailing) :] == trailing:
                bare = bare[: -len(trailing)]
            bare = bare[:room]
            rows.append([*before, *bare, *([] if between is None else [*between, *bare]), *after])
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
        return Ragged(ids, lengths, prompt=self(["a"], prompt).prompt)

    def by_preprocess(self, texts: Sequence[str], prompt: str) -> Ragged:
        """The same by the encoder's own `preprocess`, in padded batches of texts of similar length."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        ids, lengths, length = [], [], 0
        for start in range(0, len(order), CHUNK):
            features = self.encoder.preprocess([texts[n] for n in order[start : start + CHUNK]], prompt=prompt or None)
            mask = features["attention_mask"].bool()
            ids.append(features["input_ids"][mask].numpy())
            lengths.append(mask.sum(1).numpy())
            length = int(torch.as_tensor(features.get("prompt_length", 0)).reshape(-1)[0])
        return Ragged(np.concatenate(ids), np.concatenate(lengths), prompt=length).take(np.argsort(order))


def cut(texts: Sequence[str], words: Any, limit: int) -> Sequence[str]:
    """`texts`, long ones without characters that truncation to `limit` tokens would drop anyway.

    A tokenizer reads all of a text before it truncates, which takes seconds for a million characters. Of a text with
    more than `LONG` characters for each token of the limit, an eighth of that is tokenised, then twice as much, until
    it has `MARGIN` tokens more than the limit, or as many characters as that many of the vocabulary's longest tokens.
    """
    if limit > LARGE_INTEGER or not hasattr(getattr(words, "backend_tokenizer", None), "encode_batch_fast"):
        return texts
    wanted = limit + MARGIN
    open_ = [number for number, text in enumerate(texts) if isinstance(text, str) and len(text) > LONG * wanted]
    if not open_:
        return texts
    shorter, size = list(texts), LONG * wanted // 8
    most = wanted * _longest_token(words)
    with lock_of(words):
        words.set_truncation_and_padding(
            PaddingStrategy.DO_NOT_PAD, TruncationStrategy.DO_NOT_TRUNCATE, 0, 0, None, None
        )
        words.backend_tokenizer.encode_special_tokens = words.split_special_tokens
        while open_ and size < most:
            parts = [texts[number][:size] for number in open_]
            counts = [
                len(each.ids) for each in words.backend_tokenizer.encode_batch_fast(parts, add_special_tokens=False)
            ]
            for number, part, count in zip(open_, parts, counts, strict=True):
                shorter[number] = part if count >= wanted else texts[number][:most]
            open_ = [n for n, count in zip(open_, counts, strict=True) if count < wanted and len(texts[n]) > size]
            size *= 2
    return shorter


@functools.lru_cache(maxsize=4)
def _longest_token(words: Any) -> int:
    """Characters of the longest token of a tokenizer's vocabulary."""
    return max(map(len, words.get_vocab()))


@dataclass
class Window:
    """Texts encoded together, the longest first, so that a batch too large for memory fails early.

    order (n,): their places among the texts as they came. tokens (2, N): ids and positions for packs, in pinned memory
    if they go to a GPU; None if the texts are padded.
    """

    rows: Ragged
    order: np.ndarray
    tokens: Tensor | None


class Vectors:
    """The embeddings (n, D) fp32 of a window on their way to the CPU: the copy starts here, `into` waits for it."""

    def __init__(self, found: list[Tensor], order: np.ndarray, width: int | None) -> None:
        together = torch.cat(found)[:, :width]
        self.order, self.shape, self.arrived = order, tuple(together.shape), None
        self.host = together
        if together.is_cuda:
            self.host = torch.empty(together.shape, pin_memory=True)
            self.host.copy_(together, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def into(self, out: np.ndarray) -> np.ndarray:
        """Fill `out` (n, D) in the order in which the texts came."""
        if self.arrived is not None:
            self.arrived.synchronize()
        out[self.order] = self.host.numpy()
        return out


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a, b))


def pooled_tokens(backbone: Backbone, rows: Ragged) -> np.ndarray | None:
    """(N,) bool, the tokens that are pooled, by the backbone's own rule; None if it leaves none out."""
    whole = backbone.special_tokens and not backbone.skip_start and not backbone.pad_by_id
    if whole and backbone.template == "plain" and (backbone.include_prompt or not rows.prompt):
        return None
    parts = []
    for start in range(0, len(rows), CHUNK):
        given = features(rows.between(start, min(start + CHUNK, len(rows))), "cpu")
        parts.append(backbone.pooling_mask(given)[given["attention_mask"].bool()].bool().numpy())
    return np.concatenate(parts)


def features(rows: Ragged, device: torch.device | str) -> dict[str, Any]:
    """What `Backbone` reads: ids and mask (B, T), padded on the right, and the number of tokens of the prompt."""
    ids, mask, _ = rows.padded()
    device = torch.device(device)
    return {
        "input_ids": sent(ids, device),
        "attention_mask": sent(mask.long(), device),
        "prompt_length": rows.prompt,
    }


def spread(lengths: np.ndarray, count: int) -> np.ndarray:
    """The numbers of at most `count` texts, from the longest to the shortest; texts without tokens are left out."""
    some = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    places = dict.fromkeys(place * (len(some) - 1) // (count - 1) for place in range(count)) if len(some) else {}
    return some[list(places)]


def batches(lengths: np.ndarray, budget: int, *, skipped: int = 0, padded: bool = True) -> Iterator[tuple[int, int]]:
    """(first, last) of each batch of texts of these lengths, the longest first: as many as fit into `budget` tokens, at
    least one.

    padded: padding counts, and the first `skipped` tokens of each text do not. A text without tokens is never a batch
    of its own, which no model takes.
    """
    first, end, ends = 0, int((lengths > 0).sum()) or len(lengths), lengths.cumsum()
    while first < end:
        if padded:
            longest = int(lengths[first]) - skipped
            last = first + max(1, budget // longest) if longest > 0 else end
        else:
            before = int(ends[first] - lengths[first])
            last = max(first + 1, int(np.searchsorted(ends, before + budget, side="right")))
        last = min(last, end)
        yield first, len(lengths) if last == end else last
        first = last
