"""Trainable heads at inference: whatever does not depend on the text is multiplied out once. Exact, and never saved.

D width, R latents, H heads of width E, T attended vectors, F feed-forward width; z is a state after its norm, without
the norm's scale g and shift s. The formulas of `heads` then read:

- Queries are constant: logits are z_t A_hᵀ with A_h = norm(Z) W_q,h W_k,hᵀ diag(g) / √E of shape R×D. s adds the same
  number to all logits of a row, and subtracting the mean state from all z_t does too: softmax sees neither. The latter
  keeps logits small, and so precise, where all states share a massive activation.
- W_o commutes with the weighted sum: X = Z + Σ_h s W_v,h W_o,h + Σ_ht P_ht z_t M_h, M_h = diag(g) W_v,h W_o,h of shape
  D×D. Weights sum to 1, so s leaves a constant; where no token is attended to, the whole result is one.
- The scale and shift of the second norm go into W_1 and b_1, its centring into the columns of W_1.
- A head over one vector attends to it with weight 1, whatever the queries: H = 1, E the whole inner width, no A.
- W_2 follows the mean over latents, as in `heads`.

`Shape` says by multiply-adds what is multiplied out and in which order. Products are formed in fp64 and used in the
dtype of the weights (or of autocast); norms, softmax, residual and mean are fp32. Texts go in chunks, so that the
largest intermediate stays near `CHUNK` numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from poolwise.pooling.heads import Head


CHUNK = {"cpu": 2**23}
"""Numbers in the largest intermediate by device: what a cache holds a part of …"""
CHUNK_ELSEWHERE = 2**27
"""… and on a GPU what keeps it busy."""
LOW_RANK_WIDTH = 512
"""Below this width, passes over the (R, 2F) products cost more than a smaller W_1 saves."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a head, and what follows from them; `single`: it attends to one vector (then heads = 1)."""

    width: int
    latents: int
    heads: int
    head_dim: int
    hidden: int
    single: bool = False

    @property
    def folds_queries(self) -> bool:
        """A_h pays instead of cached queries and W_k: R·D < E·(R + D), fewer numbers and fewer multiply-adds."""
        return self.latents * self.width < self.head_dim * (self.latents + self.width)

    @property
    def merges_values(self) -> bool:
        """M_h pays instead of the pair W_v, W_o: D² < 2·D·E."""
        return self.width < 2 * self.head_dim

    def value_costs(self, vectors: int) -> dict[str, int]:
        """Multiply-adds from z to X by order, for T vectors.

        `states`: project each state, then sum; `latents`: sum states, then project; `between` (where M_h does not pay):
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
        """W_1 pays before the weighted sum (rank H·T instead of R): it at least halves the work of a wide W_1."""
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


def foldable(head: Head) -> bool:
    """Whether this call may use folded weights: evaluation, no gradients, weights whose changes can be seen."""
    return not (head.training or torch.is_grad_enabled()) and not any(
        parameter.is_inference() or parameter.is_meta for parameter in head.parameters()
    )


def _stamp(head: Head) -> tuple[Any, ...]:
    """Changes when a weight does, in place (optimisers, `load_state_dict`) or by replacement, and with autocast.

    What autograd cannot see either is seen only when the head is trained or run with gradients in between: writing
    through `weight.data[...]`, and the steps of fused optimisers.
    """
    where = head.latents.device.type
    dtype = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else head.to_v.weight.dtype
    return dtype, *((parameter.data_ptr(), parameter._version) for parameter in head.parameters())


class Folded:
    """A head's folded weights: a function of states (B, T, D) fp32 and mask (B, T) bool, giving vectors (B, D) fp32."""

    def __init__(self, head: Head):
        self.stamp = _stamp(head)
        self.storages = [parameter.untyped_storage() for parameter in head.parameters()]  # no address is used again
        self.dtype: torch.dtype = self.stamp[0]
        self.single = head.single
        self.kind = head.norm_states.kind
        heads: int = 1 if self.single else head.heads  # type: ignore[assignment]
        self.shape = Shape(
            width=head.latents.shape[1],
            latents=len(head.latents),
            heads=heads,
            head_dim=len(head.to_v.weight) // heads,
            hidden=head.ffn_out.in_features,
            single=self.single,
        )
        with torch.no_grad(), torch.autocast(head.latents.device.type, enabled=False):
            self._fold(head, torch.float32 if head.latents.device.type == "mps" else torch.float64)
            self.nothing = self._feed_forward(head.latents.float()[None], None)[0]

    def fits(self, head: Head) -> bool:
        """Whether the head's weights are still those that were folded."""
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
        """W_1's product with what does not depend on the text (R, 2F), for `low_rank` heads."""
        return F.linear(self.start.to(self.dtype), self.w_1)

    def _pairs(self, head: Any, wide: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """W_v (E, D) and W_o (D, E) of each head, one at a time: in fp64 all of them would be large."""
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
        else:
            if self.kind == "layer_norm":
                spread = (x.var(dim=-1, correction=0, keepdim=True) + 1e-5).rsqrt()
            else:
                spread = (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
            wide = torch.addcmul(self.b_1, wide, spread.to(self.dtype))
        value, gate = wide.chunk(2, dim=-1)
        gated = (F.gelu(gate) * value).mean(dim=1, dtype=torch.float32)
        return x.mean(dim=1) + F.linear(gated.to(self.dtype), self.w_2, self.b_2).float()
