"""The paper's head, written down a second time: plain loops over heads and latents in float64, for the tests only.

Follows the published description of the trainable pooling (arXiv 2409.02727) and the layout of its released weights;
it shares no code with the package and is far too slow for anything but tiny shapes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_weights(
    width: int = 8, latents: int = 3, heads: int = 2, head_dim: int = 5, rows: int | None = 4, seed: int = 0
) -> dict[str, Tensor]:
    """A state dict in the released layout. Weights are large, so that attention is sharp and no term is negligible."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return offset + scale * torch.randn(*shape, generator=generator)

    inner = heads * head_dim
    weights = {
        "latents": draw(latents, width),
        "cross_attend_blocks.0.norm.weight": draw(width, scale=0.3, offset=1.0),
        "cross_attend_blocks.0.norm.bias": draw(width, scale=0.3),
        "cross_attend_blocks.0.norm_context.weight": draw(width, scale=0.3, offset=1.0),
        "cross_attend_blocks.0.norm_context.bias": draw(width, scale=0.3),
        "cross_attend_blocks.0.fn.to_q.weight": draw(inner, width, scale=2 / math.sqrt(width)),
        "cross_attend_blocks.0.fn.to_kv.weight": draw(2 * inner, width, scale=2 / math.sqrt(width)),
        "cross_attend_blocks.0.fn.to_out.weight": draw(width, inner, scale=2 / math.sqrt(inner)),
        "cross_attend_blocks.1.norm.weight": draw(width, scale=0.3, offset=1.0),
        "cross_attend_blocks.1.norm.bias": draw(width, scale=0.3),
        "cross_attend_blocks.1.fn.net.0.weight": draw(8 * width, width, scale=1 / math.sqrt(width)),
        "cross_attend_blocks.1.fn.net.0.bias": draw(8 * width, scale=0.3),
        "cross_attend_blocks.1.fn.net.2.weight": draw(width, 4 * width, scale=1 / math.sqrt(4 * width)),
        "cross_attend_blocks.1.fn.net.2.bias": draw(width, scale=0.3),
    }
    if rows is not None:
        weights["pos_emb.weight"] = draw(rows, width)
    return weights


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One vector (D,): subtract its mean, divide by its standard deviation (biased, + 1e-5 inside), scale, shift."""
    centred = x - x.sum() / len(x)
    variance = (centred * centred).sum() / len(x)
    return centred / math.sqrt(float(variance) + 1e-5) * weight + bias


def paper_head(weights: dict[str, Tensor], vectors: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """vectors (B, N, D), mask (B, N) of 0 and 1 -> (B, D) float64, each of length 1."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    return torch.stack(
        [
            _one_text(w, text.double(), heads, [True] * len(text) if mask is None else [bool(m) for m in mask[b]])
            for b, text in enumerate(vectors)
        ]
    )


def _one_text(w: dict[str, Tensor], vectors: Tensor, heads: int, attended: list[bool]) -> Tensor:
    attention = "cross_attend_blocks.0."
    feed = "cross_attend_blocks.1."
    inner = w[attention + "fn.to_q.weight"].shape[0]
    width = inner // heads
    w_keys, w_values = w[attention + "fn.to_kv.weight"][:inner], w[attention + "fn.to_kv.weight"][inner:]

    keys, values = [], []
    for n, vector in enumerate(vectors):
        if not attended[n]:
            continue
        if "pos_emb.weight" in w:
            vector = vector + w["pos_emb.weight"][n]
        normed = layer_norm(vector, w[attention + "norm.weight"], w[attention + "norm.bias"])
        keys.append(w_keys @ normed)
        values.append(w_values @ normed)

    total = torch.zeros(vectors.shape[1], dtype=torch.float64)
    for latent in w["latents"]:
        normed = layer_norm(latent, w[attention + "norm_context.weight"], w[attention + "norm_context.bias"])
        query = w[attention + "fn.to_q.weight"] @ normed
        gathered = torch.zeros(inner, dtype=torch.float64)
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            logits = [float(query[columns] @ key[columns]) / math.sqrt(width) for key in keys]
            largest = max(logits)
            exponentials = [math.exp(logit - largest) for logit in logits]
            for exponential, value in zip(exponentials, values, strict=True):
                gathered[columns] += exponential / sum(exponentials) * value[columns]
        x = latent + w[attention + "fn.to_out.weight"] @ gathered
        hidden = layer_norm(x, w[feed + "norm.weight"], w[feed + "norm.bias"])
        hidden = w[feed + "fn.net.0.weight"] @ hidden + w[feed + "fn.net.0.bias"]
        half = len(hidden) // 2
        gated = torch.stack(
            [a * g * 0.5 * (1 + math.erf(g / math.sqrt(2))) for a, g in zip(hidden[:half], hidden[half:], strict=True)]
        )
        total += x + w[feed + "fn.net.2.weight"] @ gated + w[feed + "fn.net.2.bias"]
    mean = total / len(w["latents"])
    return mean / math.sqrt(float(mean @ mean))
