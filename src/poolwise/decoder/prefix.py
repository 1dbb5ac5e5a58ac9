"""An instruction's keys, values and states, computed once for all texts that begin with it. Exact under causal
attention alone, where no token of the instruction sees what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from poolwise.decoder.backbone import Backbone
from poolwise.decoder.tokens import Row, padded

BY_LENGTH = {"dynamic", "longrope"}
"""Rotary positions whose angles change with the length of the text, and with them the keys of an instruction."""


def can_reuse(backbone: Backbone) -> bool:
    """Whether an instruction's keys and values are the same before every text."""
    config = backbone.model.config.get_text_config()
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {one.get("rope_type") or one.get("type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    return backbone.attention == "causal" and not kinds & BY_LENGTH


def shared_prefix(rows: Sequence[Tensor]) -> Tensor:
    """The token ids (P,) that all rows begin with, less each row's last token, so that none is left empty."""
    shortest = min(rows, key=len)
    first = rows[0][: len(shortest) - 1]
    same = len(first)
    for row in rows:
        differ = (row[:same] != first[:same]).nonzero()
        same = int(differ[0]) if len(differ) else same
    return first[:same]


@dataclass
class Prefix:
    """P tokens and what a decoder makes of them.

    ids (P,); keys and values (1, K, P, E) of each layer; states (1, P, D) of the last layer; totals (1, L, D): sums of
    each layer's states over the `pooled` tokens, for designs that pool layers by their mean.
    """

    ids: Tensor
    cache: list[tuple[Tensor, Tensor]]
    states: Tensor
    totals: Tensor | None
    pooled: int

    @property
    def length(self) -> int:
        """P."""
        return len(self.ids)

    def serves(self, backbone: Backbone, rows: Sequence[Row]) -> bool:
        """Whether all these texts begin with it and go on after it; where layers are pooled by their mean, also whether
        of its tokens those are pooled that were summed up: of a text without content, it may be all of them."""
        ids = [row["input_ids"][: self.length] for row in rows if len(row["input_ids"]) > self.length]
        if len(ids) < len(rows) or not (torch.stack(ids) == self.ids).all():
            return False
        if self.totals is None:
            return True
        pooled = backbone._pooling_mask(padded(rows, "cpu"))[:, : self.length]
        return bool((pooled.bool().sum(1) == self.pooled).all())

    @classmethod
    def of(cls, backbone: Backbone, ids: Tensor, row: Row) -> Prefix | None:
        """Run the prefix `ids` (P,) of `row` through the decoder; None where it gives no keys and values to reuse."""
        device = backbone.model.device
        mask = torch.ones(1, len(row["input_ids"]), dtype=torch.long, device=device)
        whole = {**{name: value[None].to(device) for name, value in row.items()}, "attention_mask": mask}
        pooled = backbone._pooling_mask(whole)[:, : len(ids)].bool()
        cache = DynamicCache(config=backbone.model.config.get_text_config())
        inputs = {
            "input_ids": ids[None].to(device),
            "attention_mask": mask[:, : len(ids)],
            "position_ids": torch.arange(len(ids), device=device)[None],
        }
        totals = None
        if backbone.collector is None:
            output = backbone.model(**inputs, past_key_values=cache, use_cache=True)
        else:
            with backbone.collector.collect(mask[:, : len(ids)], pooled):
                output = backbone.model(**inputs, past_key_values=cache, use_cache=True)
                totals = backbone.collector.vectors(output.last_hidden_state) * pooled.sum()
        kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
        whole_keys = [(keys, values) for keys, values in kept if keys is not None and values is not None]
        if len(whole_keys) < len(kept) or any(keys.shape[2] != len(ids) for keys, _ in whole_keys):
            return None  # a sliding window shorter than the prefix, or layers of another kind
        return cls(ids, whole_keys, output.last_hidden_state, totals, int(pooled.sum()))

    def forward(self, backbone: Backbone, features: dict[str, Any]) -> dict[str, Any]:
        """What `backbone` adds to the features (B, T) of texts that begin with the prefix, padded on the right."""
        texts, start, mask = len(features["input_ids"]), self.length, features["attention_mask"]
        pooled = backbone._pooling_mask(features)
        cache = DynamicCache(config=backbone.model.config.get_text_config())
        for number, (keys, values) in enumerate(self.cache):
            cache.update(keys.expand(texts, -1, -1, -1), values.expand(texts, -1, -1, -1), number)
        width = mask.shape[1] - start
        inputs = {
            "input_ids": features["input_ids"][:, start:],
            "attention_mask": mask,
            "position_ids": torch.arange(start, start + width, device=mask.device).expand(texts, -1),
            "past_key_values": cache,
            "use_cache": True,
        }
        if backbone.collector is None:
            states = backbone.model(**inputs).last_hidden_state
        else:
            rest = pooled[:, start:]
            with backbone.collector.collect(mask[:, start:], rest):
                states = backbone.model(**inputs).last_hidden_state
                vectors = backbone.collector.vectors(states)
            if backbone.collect == "mean":
                assert self.totals is not None
                own = rest.bool().sum(1)[:, None, None]
                vectors = (vectors * own + self.totals) / (own + self.pooled)
            features["layer_embeddings"] = vectors
        features["token_embeddings"] = torch.cat([self.states.expand(texts, -1, -1), states], 1)
        features["pooling_mask"] = pooled
        return features
