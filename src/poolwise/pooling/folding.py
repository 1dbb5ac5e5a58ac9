"""Trainable heads at inference: everything that does not depend on the text is multiplied out once; never saved.

The result is the same up to rounding. D width, R latents, H heads of width E, T attended vectors, F feed-forward width;
z is a state after its norm, without the norm's scale g and shift s. The formulas of `heads` become:

- Queries are constant: logits are z_t A_hᵀ with A_h = norm(Z) W_q,h W_k,hᵀ diag(g) / √E of shape R×D. The shift s adds
  one number to all logits of a row, and so does subtracting the mean state from all z_t; softmax ignores both. The
  subtraction keeps logits small, hence precise, if all states share a massive activation.
- W_o commutes with the weighted sum: X = Z + Σ_h s W_v,h W_o,h + Σ_ht P_ht z_t M_h, M_h = diag(g) W_v,h W_o,h of shape
  D×D. Weights sum to 1, so the term in s is constant; if no token is attended to, the whole result is constant.
- The scale and shift of the second norm are merged into W_1 and b_1, its centring into the columns of W_1.
- A head over one vector attends to it with weight 1, whatever the queries: H = 1, E the whole inner width, no A.
- W_2 follows the mean over latents, as in `heads`.

`Shape` decides by multiply-adds what is multiplied out and in which order. Products are computed in fp64 and used in
the dtype of the weights (or of autocast); norms, softmax, residual and mean are fp32. Texts are processed in chunks
that keep the largest intermediate near `CHUNK` numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = {"cpu": 2**23}
"""Numbers in the largest intermediate by device: on a CPU few enough for its cache …"""
CHUNK_ELSEWHERE = 2**27
"""… on a GPU enough to occupy it."""
LOW_RANK_WIDTH = 512
"""Below this width, passes over the (R, 2F) products cost more than the smaller product with W_1 saves."""


class Weights(Protocol):
    """The parts of a head (`heads.Head`) that are folded. With `single` = False it also has `heads`, `norm_latents`
    and the projections `to_q` and `to_k`."""

    training: bool
    single: bool  # it attends to one vector, so it needs no queries
    latents: nn.Parameter  # (R, D)
    norm_states: Any  # norms have a `kind`, a `weight` and perhaps a `bias`
    norm_ffn: Any
    to_v: Any  # linear layers
    to_out: Any
    ffn_in: Any
    ffn_out: Any

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a head, and the cheapest way to compute it; `single`: it attends to one vector (then heads = 1)."""

    width: int
    latents: int
    heads: int
    head_dim: int
    hidden: int
    single: bool = False

    @classmethod
    def of(cls, head: Any) -> Shape:
        """The shape of a head (`Weights`), which may be on the meta device."""
        heads = 1 if head.single else head.heads
        return cls(
            width=head.latents.shape[1],
            latents=len(head.latents),
            heads=heads,
            head_dim=len(head.to_v.weight) // heads,
            hidden=head.ffn_out.in_features,
            single=head.single,
        )

    @property
    def folds_queries(self) -> bool:
        """Whether A_h is cheaper than cached queries and W_k: R·D < E·(R + D), in memory and in multiply-adds."""
        return self.latents * self.width < self.head_dim * (self.latents + self.width)

    @property
    def merges_values(self) -> bool:
        """Whether M_h is cheaper than the pair W_v, W_o: D² < 2·D·E."""
        return self.width < 2 * self.head_dim

    def value_costs(self, vectors: int) -> dict[str, int]:
        """Multiply-adds from z to X by order, for T vectors.

        `states`: project each state, then sum; `latents`: sum states, then project; `between` (if M_h is not cheaper):
        W_v, sum, W_o, the usual order.
        """
        pair = self.width * min(self.width, 2 * self.head_dim)
        if self.single:
            return {"states": pair}
        summed = self.latents * self.heads * vectors * self.width
        costs = {
            "states": self.heads * vectors * pair + summed,
            "latents": self.heads * self.latents * pair + summed,
        }
        if not self.merges_values:
            inner = self.heads * self.head_dim
            both = (vectors + self.latents) * self.width * inner
            costs["between"] = both + self.latents * vectors * inner
        return costs

    def order(self, vectors: int) -> str:
        """The cheapest order of the values for T vectors."""
        costs = self.value_costs(vectors)
        return min(costs, key=lambda name: costs[name])

    def low_rank(self, vectors: int) -> bool:
        """Whether W_1 comes before the weighted sum (rank H·T instead of R): if that halves the work of a wide W_1."""
        rank = self.heads * (1 if self.single else vectors)
        fewer = 2 * rank * (self.latents + self.width) < self.latents * self.width
        return fewer and self.width >= LOW_RANK_WIDTH and self.order(vectors) == "states"

    def flops(self, vectors: int) -> int:
        """FLOPs of the folded head for one text of T attended vectors: 2 × multiply-adds of all products."""
        inner = self.heads * self.head_dim
        logits = (
            vectors * self.heads * self.latents * self.width
            if self.folds_queries
            else vectors * inner * (self.width + self.latents)
        )
        rank = self.heads * (1 if self.single else vectors)
        if self.low_rank(vectors):
            gated = 2 * self.hidden * rank * (self.width if self.single else self.width + self.latents)
        else:
            gated = 2 * self.hidden * self.latents * self.width
        values = min(self.value_costs(vectors).values())
        return 2 * ((0 if self.single else logits) + values + gated + self.hidden * self.width)


def foldable(head: Weights) -> bool:
    """Whether this call may use folded weights: evaluation, no gradients, weights whose changes are detectable."""
    return not (head.training or torch.is_grad_enabled()) and not any(
        parameter.is_inference() or parameter.is_meta for parameter in head.parameters()
    )


def _stamp(head: Weights) -> tuple[Any, ...]:
    """A value that changes with the weights, in place (optimisers, `load_state_dict`) or replaced, and with autocast.

    Changes that autograd does not count, writes through `weight.data[...]` and the steps of fused optimisers, are
    detected only if the head is trained or run with gradients in between.
    """
    where = head.latents.device.type
    dtype = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else head.to_v.weight.dtype
    return dtype, *((parameter.data_ptr(), parameter._version) for parameter in head.parameters())


class Folded:
    """A head's folded weights: a function from states (B, T, D) fp32 and mask (B, T) bool to vectors (B, D) fp32."""

    def __init__(self, head: Weights):
        self.stamp = _stamp(head)
        # held, so that no new weight can get the address of one that the stamp has seen
        self.storages = [parameter.untyped_storage() for parameter in head.parameters()]
        self.dtype: torch.dtype = self.stamp[0]
        self.single = head.single
        self.kind = head.norm_states.kind
        self.shape = Shape.of(head)
        with torch.no_grad(), torch.autocast(head.latents.device.type, enabled=False):
            self._fold(head, torch.float32 if head.latents.device.type == "mps" else torch.float64)
            self.nothing = self._feed_forward(head.latents.float()[None], None)[0]  # of a text that is all padding

    def fits(self, head: Weights) -> bool:
        """Whether the head still has the weights that were folded."""
        return self.stamp == _stamp(head)

    def __call__(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """States with layer weights added and padding set to 0; see `heads.CrossAttentionHead.prepare`."""
        shape, vectors = self.shape, states.shape[1]
        numbers = max(2 * shape.latents * shape.hidden, vectors * shape.heads * max(shape.latents, shape.width))
        step = max(1, CHUNK.get(states.device.type, CHUNK_ELSEWHERE) // numbers)
        with torch.autocast(states.device.type, enabled=False):
            out = torch.cat(
                [
                    self._texts(states[start : start + step], None if mask is None else mask[start : start + step])
                    for start in range(0, max(len(states), 1), step)
                ]
            )
        return out if mask is None else torch.where(mask.any(dim=1, keepdim=True), out, self.nothing)

    def _fold(self, head: Any, wide: torch.dtype) -> None:
        """Multiply out in the `wide` dtype: rounding would otherwise add up over the chained products."""
        shape = self.shape
        scale = head.norm_states.weight.to(wide)
        norm = head.norm_ffn.weight.to(wide)
        w_1 = head.ffn_in.weight.to(wide)
        b_1 = head.ffn_in.bias.to(wide)
        shift = torch.zeros_like(scale)
        if self.kind == "layer_norm":
            for value, out in self._pairs(head, wide):
                shift += out @ (value @ head.norm_states.bias.to(wide))
            b_1 = b_1 + w_1 @ head.norm_ffn.bias.to(wide)
        w_1 = w_1 * norm
        if self.kind == "layer_norm":
            w_1 -= w_1.mean(dim=1, keepdim=True)
        self.start = (head.latents.to(wide) + shift).float()
        self.w_1, self.b_1 = w_1.to(self.dtype), b_1.to(self.dtype)
        self.w_2, self.b_2 = head.ffn_out.weight.to(self.dtype), head.ffn_out.bias.to(self.dtype)

        if shape.merges_values:
            self.to_x = torch.stack([(out @ value * scale).to(self.dtype) for value, out in self._pairs(head, wide)])
        else:
            self.to_v = torch.stack([(value * scale).to(self.dtype) for value, _ in self._pairs(head, wide)])
            self.to_out = torch.stack([out.to(self.dtype) for _, out in self._pairs(head, wide)])

        if self.single:
            return
        latents = head.latents.to(wide)
        if self.kind == "layer_norm":
            latents = F.layer_norm(latents, (shape.width,), None, None, 1e-5)
            latents = latents * head.norm_latents.weight.to(wide) + head.norm_latents.bias.to(wide)
        else:
            latents = F.rms_norm(latents, (shape.width,), None, 1e-6) * head.norm_latents.weight.to(wide)
        folded = []
        for query, key in zip(head.to_q.weight.chunk(shape.heads), head.to_k.weight.chunk(shape.heads), strict=True):
            queries = latents @ query.to(wide).T * shape.head_dim**-0.5  # (R, E)
            folded.append((queries @ (key.to(wide) * scale)).to(self.dtype) if shape.folds_queries else queries.float())
        self.queries = torch.stack(folded)  # (H, R, D), or (H, R, E) where A does not pay
        self.to_k = None if shape.folds_queries else (head.to_k.weight.to(wide) * scale).to(self.dtype)

    @functools.cached_property
    def start_w_1(self) -> Tensor:
        """The constant part of X times W_1 (R, 2F), for `low_rank` heads."""
        return F.linear(self.start.to(self.dtype), self.w_1)

    def _pairs(self, head: Any, wide: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """W_v (E, D) and W_o (D, E) of each head, one at a time to save memory in fp64."""
        for value, out in zip(
            head.to_v.weight.chunk(self.shape.heads), head.to_out.weight.chunk(self.shape.heads, dim=1), strict=True
        ):
            yield value.to(wide), out.to(wide)

    def _texts(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, D), one chunk of texts."""
        z = self._standardise(states)
        low = self.shape.low_rank(states.shape[1])
        if self.single:
            value = self._project(z.to(self.dtype))[:, :, 0]  # (B, 1, D)
            return self._feed_forward(self.start + value, F.linear(value, self.w_1) + self.start_w_1 if low else None)
        weights = self._weights(z, mask)  # (B, R, H, T)
        z = z.to(self.dtype)
        order = self.shape.order(states.shape[1])
        if order == "states":
            weights = weights.to(self.dtype).flatten(2)
            values = self._project(z).transpose(1, 2).flatten(1, 2)  # (B, H·T, D)
            x = self.start + (weights @ values).float()
            wide = torch.baddbmm(self.start_w_1, weights, F.linear(values, self.w_1)) if low else None
            return self._feed_forward(x, wide)
        if order == "latents":
            summed = weights.to(self.dtype).flatten(1, 2) @ z  # (B, R·H, D)
            summed = summed.unflatten(1, weights.shape[1:3])
            if self.shape.merges_values:
                out = F.linear(summed.flatten(2), self.to_x.transpose(0, 1).flatten(1))
                return self._feed_forward(self.start + out.float(), None)
            inner = torch.einsum("brhd,hed->brhe", summed, self.to_v)
        else:
            values = F.linear(z, self.to_v.flatten(0, 1)).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)
            inner = (weights.to(self.dtype).transpose(1, 2) @ values).transpose(1, 2)  # (B, R, H, E)
        out = F.linear(inner.flatten(2), self.to_out.transpose(0, 1).flatten(1))
        return self._feed_forward(self.start + out.float(), None)

    def _standardise(self, states: Tensor) -> Tensor:
        if self.kind == "layer_norm":
            return F.layer_norm(states, (self.shape.width,), None, None, 1e-5)
        return F.rms_norm(states, (self.shape.width,), None, 1e-6)

    def _weights(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """Attention's weights in fp32, (B, R, H, T); 0 where the mask is."""
        count = z.shape[1] if mask is None else mask.sum(dim=1).clamp(min=1)[:, None, None]
        z = (z - z.sum(dim=1, keepdim=True) / count).to(self.dtype)  # padding is 0 and takes no part in the sum
        if self.to_k is None:
            logits = F.linear(z, self.queries.flatten(0, 1)).unflatten(-1, self.queries.shape[:2]).permute(0, 3, 2, 1)
        else:
            keys = F.linear(z, self.to_k).float().unflatten(-1, (self.shape.heads, -1))
            logits = (self.queries @ keys.permute(0, 2, 3, 1)).transpose(1, 2)
        if mask is None:
            return logits.softmax(dim=-1, dtype=torch.float32)
        keep = mask[:, None, None, :]
        return logits.float().masked_fill(~keep, torch.finfo(torch.float32).min).softmax(dim=-1) * keep

    def _project(self, z: Tensor) -> Tensor:
        """States through W_v W_o of each head: (B, T, D) -> (B, T, H, D)."""
        if self.shape.merges_values:
            return F.linear(z, self.to_x.flatten(0, 1)).unflatten(-1, (self.shape.heads, -1))
        values = F.linear(z, self.to_v.flatten(0, 1)).flatten(0, 1).unflatten(-1, (self.shape.heads, -1))
        projected = values.transpose(0, 1) @ self.to_out.transpose(1, 2)  # (H, B·T, D)
        return projected.transpose(0, 1).unflatten(0, z.shape[:2])

    def _feed_forward(self, x: Tensor, wide: Tensor | None) -> Tensor:
        """Latents after attention (B, R, D) fp32, and their product with W_1 if it is known, -> (B, D) fp32."""
        if wide is None:
            wide = F.linear(self._standardise(x).to(self.dtype), self.w_1, self.b_1)
        else:  # W_1 came before the norm; its columns are centred, so the norm's scale is all that is left to apply
            if self.kind == "layer_norm":
                spread = (x.var(dim=-1, correction=0, keepdim=True) + 1e-5).rsqrt()
            else:
                spread = (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
            wide = torch.addcmul(self.b_1, wide, spread.to(self.dtype))
        value, gate = wide.chunk(2, dim=-1)
        gated = (F.gelu(gate) * value).mean(dim=1, dtype=torch.float32)
        return x.mean(dim=1) + F.linear(gated.to(self.dtype), self.w_2, self.b_2).float()
