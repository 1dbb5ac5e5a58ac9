"""Texts as rows of tokens: what an encoder's own preprocessing makes of each, without padding, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from poolwise.model.packing import sent

CHUNK = 256
"""Texts of one call of the tokenizer, of similar length."""

Row = dict[str, Tensor]
"""One text's features, each (T,) without padding, or a number for the whole text."""


def rows_of(encoder: SentenceTransformer, texts: Sequence[str], prompt: str) -> list[Row]:
    """Each text's row, texts of similar length tokenised together."""
    rows: list[Row] = [{}] * len(texts)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for start in range(0, len(order), CHUNK):
        part = order[start : start + CHUNK]
        features = encoder.preprocess([texts[number] for number in part], prompt=prompt or None)
        mask = features["attention_mask"].bool()
        given = {name: _by_text(value, mask) for name, value in features.items() if name != "modality"}
        for place, number in enumerate(part):
            rows[number] = {name: values[place] for name, values in given.items()}
    return rows


def _by_text(value: Any, mask: Tensor) -> Sequence[Tensor]:
    """What each text has of a feature: its tokens without padding, its number, or what all texts share."""
    value = torch.as_tensor(value)
    if value.shape == mask.shape:
        return value[mask].split(mask.sum(1).tolist())
    flat = value.reshape(-1)
    return (flat if len(flat) == len(mask) else flat[:1].expand(len(mask))).unbind()


def padded(rows: Sequence[Row], device: torch.device | str) -> dict[str, Any]:
    """One batch of features (B, T), padded on the right."""
    features = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        whole = torch.nn.utils.rnn.pad_sequence(values, batch_first=True) if first.ndim else torch.stack(values)
        features[name] = sent(whole, torch.device(device))
    return features


def longest_first(rows: Sequence[Row]) -> list[int]:
    """The order in which rows are encoded, so that a batch too large for memory fails early."""
    return sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))


def spread(rows: Sequence[Row], order: Sequence[int], count: int) -> list[Row]:
    """At most `count` of the rows, from the longest to the shortest; rows without tokens are left out."""
    some = [row for row in order if len(rows[row]["input_ids"])]
    places = dict.fromkeys(place * (len(some) - 1) // (count - 1) for place in range(count)) if some else {}
    return [rows[some[place]] for place in places]


def batches(order: Sequence[int], rows: Sequence[Row], skipped: int, budget: int) -> Iterator[list[int]]:
    """Rows in `order` (the longest first) cut into batches of at most `budget` tokens, padding included, less the first
    `skipped` of each; a text without tokens is never a batch of its own, which no model takes."""
    batch: list[int] = []
    for row in order:
        longest = len(rows[batch[0] if batch else row]["input_ids"]) - skipped
        if batch and len(rows[row]["input_ids"]) and (len(batch) + 1) * longest > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
