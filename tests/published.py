"""The forward that the paper's authors published, written down in float64 from its formulas, for the tests only.

Decoders of the Llama family (Mistral: no biases; Qwen2: biases on queries, keys and values), batches padded on the
left, attention as FlashAttention leaves it: nothing attends to padding, and the output is zero at padding, so that
states there are what the residual and the feed-forward make of the padding token. Then the five designs:

- m1: the last position of the last layer.
- m2: the head over that one vector. m3: the head over the last position of each layer.
- m4: the head over all positions of the last layer, padding included.
- m5: the head over the mean of each layer, over positions whose id is not the padding token's.

Only plain tensor arithmetic: it shares no code with the package or with transformers, and it takes nothing from them
but weights and token ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from paper_head import paper_head

CAUSAL = {"m1": True, "m2": True, "m3": True, "m4": False, "m5": False}
MULTIPLE = 8


def left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T), padded on the left to a multiple of 8."""
    width = math.ceil(max(map(len, rows)) / MULTIPLE) * MULTIPLE
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + epsilon).sqrt() * weight


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of one head (T, E): component i and i + E/2 turn by position / theta^(2i/E)."""
    half = x.shape[1] // 2
    turned = torch.empty_like(x)
    for position in range(len(x)):
        for i in range(half):
            angle = position / theta ** (2 * i / x.shape[1])
            a, b = x[position, i], x[position, i + half]
            turned[position, i] = a * math.cos(angle) - b * math.sin(angle)
            turned[position, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def states(weights: dict[str, Tensor], config: Any, ids: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """One text (T,) of a batch -> (L, T, D): the output of each layer, that of the last one after the final norm."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    x = w["embed_tokens.weight"][ids]
    real = [position for position in range(len(ids)) if mask[position]]
    found = []
    for number in range(config.num_hidden_layers):
        at = f"layers.{number}."
        normed = rms_norm(x, w[at + "input_layernorm.weight"], config.rms_norm_eps)
        parts = {}
        for name in ("q", "k", "v"):
            parts[name] = normed @ w[f"{at}self_attn.{name}_proj.weight"].T
            if f"{at}self_attn.{name}_proj.bias" in w:
                parts[name] = parts[name] + w[f"{at}self_attn.{name}_proj.bias"]
        size = parts["q"].shape[1] // heads
        attended = torch.zeros(len(ids), heads * size, dtype=torch.float64)
        for head in range(heads):
            theirs = slice(head // groups * size, (head // groups + 1) * size)
            own = slice(head * size, (head + 1) * size)
            theta = config.rope_parameters["rope_theta"]
            q, k = rotated(parts["q"][:, own], theta), rotated(parts["k"][:, theirs], theta)
            for i in real:
                seen = [j for j in real if j <= i or not causal]
                logits = torch.stack([q[i] @ k[j] / math.sqrt(size) for j in seen])
                share = torch.exp(logits - logits.max())
                attended[i, own] = (share / share.sum()) @ parts["v"][seen][:, theirs]
        x = x + attended @ w[at + "self_attn.o_proj.weight"].T
        normed = rms_norm(x, w[at + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ w[at + "mlp.gate_proj.weight"].T
        x = (
            x
            + (gate / (1 + torch.exp(-gate)) * (normed @ w[at + "mlp.up_proj.weight"].T))
            @ w[at + "mlp.down_proj.weight"].T
        )
        found.append(x)
    found[-1] = rms_norm(x, w["norm.weight"], config.rms_norm_eps)
    return torch.stack(found)


def embeddings(
    name: str,
    weights: dict[str, Tensor],
    config: Any,
    head: dict[str, Tensor],
    rows: list[list[int]],
    pad: int,
    heads: int = 2,
) -> Tensor:
    """(B, D) float64 of length 1: design `name` (m1 to m5) over one batch of token ids.

    weights: the decoder's, under the names of its checkpoint; head: in the released layout (none for m1).
    """
    ids, mask = left_padded(rows, pad)
    vectors = []
    for text, real in zip(ids, mask, strict=True):
        layers = states(weights, config, text, real, CAUSAL[name])
        if name == "m1":
            last = layers[-1, -1]
            vectors.append(last / last.norm())
            continue
        kept = text != pad
        read = {"m2": layers[-1, -1:], "m3": layers[:, -1], "m4": layers[-1], "m5": layers[:, kept].mean(1)}[name]
        vectors.append(paper_head(head, read[None], heads)[0])
    return torch.stack(vectors)
