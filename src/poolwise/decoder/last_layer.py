"""The last decoder layer for last-token pooling: what it makes of any other token is read by nobody."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from poolwise.decoder.backbone import Backbone
from poolwise.decoder.layers import decoder_layers, last_index


def can_prune(backbone: Backbone) -> bool:
    """Whether the last decoder layer has the parts that `pruned` replaces."""
    layer = decoder_layers(backbone.model)[-1]
    return hasattr(layer, "mlp") and hasattr(getattr(layer, "self_attn", None), "o_proj")


@contextlib.contextmanager
def pruned(backbone: Backbone, features: dict[str, Any], prune: bool) -> Iterator[None]:
    """Inside, the last layer's output projection and feed-forward are computed for the last pooled token only, with
    zeros elsewhere: nothing else of that layer is read by last-token pooling. So it is in the thread that opens it;
    another one, in the `encode` of a model that shares the layer, finds it whole."""
    if not prune:
        yield
        return
    layer = cast(Any, decoder_layers(backbone.model)[-1])
    last = last_index(backbone._pooling_mask(features))
    texts = torch.arange(len(last), device=last.device)
    parts = (layer.mlp, layer.self_attn.o_proj)
    for part in parts:
        part.forward = _Only(part.forward, texts, last)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


class _Only:
    """A module's forward at one token of each text, in this thread: (B, T, D) -> (B, T, D'), zero at all others."""

    def __init__(self, forward: Any, texts: Tensor, tokens: Tensor) -> None:
        self.forward, self.texts, self.tokens = forward, texts, tokens
        self.thread = threading.get_ident()

    def __call__(self, states: Tensor) -> Tensor:
        if threading.get_ident() != self.thread:
            return self.forward(states)
        wanted = self.forward(states[self.texts, self.tokens])
        out = wanted.new_zeros(*states.shape[:2], wanted.shape[-1])
        out[self.texts, self.tokens] = wanted
        return out
