"""Trainable poolings over the tokens of the last layer beside the paper's: a learned query, and latent attention.

States H in R^{T×D}, of one text; sums, norms and softmax in fp32. The mask decides which tokens there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poolwise.errors import ModelError
from poolwise.poolings.heads import Head, Norm, Pooling, Projection, attended, weighted_mean


class Attention(Pooling):
    """Attention with a learned query ("query probe" of 2503.02656; Yang et al. 2016 for documents):

        out = sum_t a_t h_t,  a = softmax_t(q·h_t / √D)

    With several `heads` each query weighs its own D/heads numbers of the states. Starts as the mean, for q starts at
    zero. Cost: D parameters; 4·T·D FLOPs a text. Its capacity control is `mean_gain`, with as many parameters.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, heads: int = 1):
        super().__init__()
        if hidden_size % heads:
            raise ModelError(f"pooling_args.heads = {heads}: does not divide the hidden size {hidden_size}")
        self.query = nn.Parameter(torch.zeros(heads, hidden_size // heads))

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.zeros(shape)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """States (B, T, D), mask (B, T) or None -> (B, D) fp32; a row whose mask is all zero gives zeros."""
        keep = attended(states, mask).bool()[..., None]
        query = self.query.float()
        parts = torch.where(keep, states.float(), 0.0).unflatten(-1, query.shape)  # (B, T, H, E)
        logits = (parts * query).sum(-1) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~keep, torch.finfo(torch.float32).min).softmax(dim=1) * keep
        return (weights[..., None] * parts).sum(dim=1).flatten(1)


class MeanGain(Pooling):
    """Capacity control of `attention`: as many parameters, no attention.

        out = g * mean_t h_t

    The gain g scales each number of the mean and starts at 1. Cost: D parameters, no matrix product.
    """

    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(hidden_size))

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.ones(shape)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """States (B, T, D), mask (B, T) or None -> (B, D) fp32."""
        return self.gain.float() * weighted_mean(states, attended(states, mask))


class LatentAttention(Head):
    """Latent attention of NV-Embed (2405.17428): tokens are the queries, R learned latents Z are keys and values.

        X   = H + [softmax(Q_h K_hᵀ / √E) V_h]_h W_o      Q = norm(H) W_q,  K, V = norm(Z) W_k, norm(Z) W_v
        Y   = X + (A * gelu(G)) W_2 + b_2                 A, G = norm(X) W_1 + b_1
        out = sum_t m_t y_t / sum_t m_t

    W_2 comes after the mean, exactly. Norms, residuals and first weights are those of `poolings.heads`: with `identity`
    an untrained head is nearly the mean, moved by the latents' mean, which is small for many of them. NV-Embed has 512
    latents and 8 heads. Cost: R·D + 4·D·I + 3·F·D + 2·F + D parameters and three norms, heads · head_dim = I; FLOPs of
    a text: 4·T·D·I + 4·R·D·I + 4·T·R·I + 6·T·F·D, for every token has a feed-forward. Its capacity control is
    `mean_ffn` with as many latents.
    """

    def __init__(
        self,
        hidden_size: int,
        n_layers: int,
        *,
        latents: int = 512,
        heads: int,
        head_dim: int,
        ffn: int = 4,
        norm: str = "layer_norm",
        init: str = "identity",
    ):
        width = heads * head_dim
        super().__init__(hidden_size, latents=latents, value_width=width, ffn=ffn, norm=norm, init=init)
        self.heads = heads
        self.norm_latents = Norm(hidden_size, norm)
        self.to_q = Projection(hidden_size, width, bias=False)
        self.to_k = Projection(hidden_size, width, bias=False)
        self.reset_parameters()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """States (B, T, D), mask (B, T) or None -> (B, D) fp32, not normalised."""
        counted = attended(states, mask)
        states = torch.where(counted[..., None] > 0, states.float(), 0.0)
        latents = self.norm_latents(self.latents)
        query = self._split(self.to_q(self.norm_states(states)))  # (B, H, T, E)
        key, value = self._split(self.to_k(latents)), self._split(self.to_v(latents))  # (H, R, E), once for all texts
        with torch.autocast(states.device.type, enabled=False):
            weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
            gathered = (weights @ value).transpose(1, 2).flatten(2)
        x = states + self.to_out(gathered)
        inner, gate = self.ffn_in(self.norm_ffn(x)).chunk(2, dim=-1)
        pooled = weighted_mean(x, counted) + self.ffn_out(weighted_mean(inner * F.gelu(gate), counted))
        return pooled * counted.any(dim=1, keepdim=True)

    def _split(self, x: Tensor) -> Tensor:
        """(…, N, heads · head_dim) -> (…, heads, N, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
