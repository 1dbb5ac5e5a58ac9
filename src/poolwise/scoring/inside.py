"""What a trained multi-layers pooling looks at: the attention of its latents over the layers, and its layer weights.

Nothing here is used in training or encoding; it reads an encoder that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor

from poolwise.encoder import PoolingHead
from poolwise.errors import ModelError
from poolwise.poolings.heads import LayerCrossAttention


def layer_attention(encoder: SentenceTransformer, texts: Sequence[str], batch_size: int = 8) -> NDArray[np.float64]:
    """(L,) share of the attention that goes to each layer, lowest first, sum 1: mean over texts, heads and latents.

    The weights are those of the head's forward, softmax(Q_h K_hᵀ / √E) over the L layer vectors of a text.

    Args:
        encoder: of a `layer_cross_attention` design.
        texts: encoded as documents; at least one.

    Raises:
        ModelError: another pooling, or no text.
    """
    head = _head(encoder)
    if not texts:
        raise ModelError("layer_attention: no texts to look at; give at least one")
    total: list[Tensor] = []

    def look(module: Any, inputs: tuple[Any, ...]) -> None:
        total.append(_attention(head, inputs[0]).mean(dim=(1, 2)).double().sum(dim=0).cpu())  # (L,) over the batch

    handle = head.register_forward_pre_hook(look)
    try:
        with torch.inference_mode():
            encoder.encode(list(texts), batch_size=batch_size, prompt_name=_document(encoder), show_progress_bar=False)
    finally:
        handle.remove()
    return (torch.stack(total).sum(dim=0) / len(texts)).numpy()


def attends_to_layers(encoder: SentenceTransformer) -> bool:
    """Whether `layer_attention` has an answer for this encoder."""
    return any(isinstance(getattr(module, "head", None), LayerCrossAttention) for module in encoder)


def layer_weights(encoder: SentenceTransformer) -> NDArray[np.float64] | None:
    """(L, D): the learned vector that the head adds to each layer's, or None where it has none.

    Raises:
        ModelError: another pooling.
    """
    weights = _head(encoder).layer_weights
    return None if weights is None else weights.detach().double().cpu().numpy()


def _head(encoder: SentenceTransformer) -> LayerCrossAttention:
    found = next((module for module in encoder if isinstance(module, PoolingHead)), None)
    head = None if found is None else cast(Any, found.head)
    if not isinstance(head, LayerCrossAttention):
        what = found.pooling if found else "no pooling of poolwise"
        raise ModelError(f"{what}: only layer_cross_attention attends to layers; give an encoder of such a design")
    return head


def _document(encoder: SentenceTransformer) -> str | None:
    return "document" if encoder.prompts.get("document") else None


def _attention(head: LayerCrossAttention, states: Tensor) -> Tensor:
    """Layer vectors (B, L, D) -> attention weights (B, heads, latents, L) fp32."""
    states, _ = head.prepare(states, None)
    query = head._split(head.to_q(head.norm_latents(head.latents)))  # (H, R, E)
    key = head._split(head.to_k(head.norm_states(states)))  # (B, H, L, E)
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
