"""Every pooling as a module: states and mask in, one vector per text out. `study.catalogue` declares them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poolwise.pooling.heads import (
    CrossAttention,
    Head,
    LastTokenFFN,
    LayerCrossAttention,
    MeanFFN,
    Norm,
    Pooling,
    Projection,
    attended,
    last_token,
    weighted_mean,
)
from poolwise.study.catalogue import spec_of
from poolwise.study.pooling_spec import find_own, is_own

__all__ = ["CrossAttention", "LastTokenFFN", "LayerCrossAttention", "MeanFFN", "module_class"]


def module_class(pooling: str) -> type[Pooling]:
    """The class of a pooling: of ours the one in this file with its name (`mean_gain`: `MeanGain`), or the user's.

    Raises `StudyError` for an unknown name, and for a user's class that may not be imported.
    """
    if is_own(pooling):
        return find_own(pooling)
    name = spec_of(pooling).name.replace("_", "")
    return next(value for key, value in globals().items() if key.lower() == name)


class FirstToken(Pooling):
    """The first pooled token. Under causal attention it has seen nothing but itself, hence every study's broken arm."""

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        keep = attended(states, mask)
        return weighted_mean(states, keep & (keep.cumsum(dim=1) == 1))


class LastToken(Pooling):
    """The last token: the state at the last index where the mask is 1, the EOS token if the recipe appends one."""

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        return last_token(states, mask)


class Mean(Pooling):
    """The mean over attended tokens: sum_t m_t h_t / sum_t m_t."""

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        return weighted_mean(states, attended(states, mask))


class WeightedMean(Pooling):
    """The position-weighted mean of SGPT (arXiv 2202.08904): sum_i i·h_i / sum_i i over attended tokens i = 1 … n.

    Positions are counted from the mask, so padding and excluded prompt tokens take no number.
    """

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        keep = attended(states, mask)
        return weighted_mean(states, keep.cumsum(dim=1) * keep)


class Max(Pooling):
    """The largest value of each component over attended tokens: max_t h_t; zeros for a text without tokens."""

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        keep = attended(states, mask)
        largest = states.float().masked_fill(~keep[..., None], -torch.inf).amax(dim=1)
        return torch.where(keep.any(dim=1, keepdim=True), largest, 0.0)


class LastTokens(Pooling):
    """The mean of the last k tokens ("last-k" of arXiv 2503.02656), or of all if there are fewer; k is `count`.

    Tokens are counted by the mask, whatever the padding side; with k = 1 it is the last token.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, count: int = 8):
        super().__init__()
        self.count = count

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        keep = attended(states, mask)
        from_the_end = keep.flip(1).cumsum(dim=1).flip(1)
        return weighted_mean(states, keep & (from_the_end <= self.count))


class Concat(Pooling):
    """Several plain poolings concatenated, not rescaled: [p_1; p_2; …], so that the width is a multiple of D.

    `parts` joins their names: `last_token+mean`. A part with a larger norm has more weight in the cosine.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, parts: str = "last_token+mean"):
        super().__init__()
        self.parts = nn.ModuleList(module_class(name)(hidden_size, n_layers) for name in parts.split("+"))
        self.dimension = len(self.parts) * hidden_size

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.cat([part(states, mask) for part in self.parts], dim=-1)


class Attention(Pooling):
    """Attention with a learned query ("query probe" of arXiv 2503.02656; Yang et al. 2016 for documents):

        out = sum_t a_t h_t,  a = softmax_t(q·h_t / √D)

    With several `heads` each query has its own D/heads components of the states. It starts as the mean, because q
    starts at zero.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, heads: int = 1):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(heads, hidden_size // heads))

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.zeros(shape)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """States (B, T, D), mask (B, T) or None -> (B, D) fp32; zeros for a row whose mask is all zero."""
        keep = attended(states, mask)[..., None]
        query = self.query.float()
        parts = torch.where(keep, states.float(), 0.0).unflatten(-1, query.shape)  # (B, T, H, E)
        logits = (parts * query).sum(-1) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~keep, torch.finfo(torch.float32).min).softmax(dim=1) * keep
        return (weights[..., None] * parts).sum(dim=1).flatten(1)


class MeanGain(Pooling):
    """Capacity control of `attention`: as many parameters, no attention.

        out = g * mean_t h_t

    The gain g scales each component of the mean and starts at 1.
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
    """Latent attention of NV-Embed (arXiv 2405.17428): tokens are the queries, R learned latents Z keys and values.

        X   = H + [softmax(Q_h K_hᵀ / √E) V_h]_h W_o      Q = norm(H) W_q,  K, V = norm(Z) W_k, norm(Z) W_v
        Y   = X + (A * gelu(G)) W_2 + b_2                 A, G = norm(X) W_1 + b_1
        out = sum_t m_t y_t / sum_t m_t

    W_2 comes after the mean, which changes no result. Norms, residuals and initial weights are those of `heads.py`:
    with `identity` an untrained head is nearly the mean plus the mean of the latents, small if there are many.
    NV-Embed has 512 latents and 8 heads.
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
        keep = attended(states, mask)
        states = torch.where(keep[..., None], states.float(), 0.0)
        latents = self.norm_latents(self.latents)
        query = self._split(self.to_q(self.norm_states(states)))  # (B, H, T, E)
        key, value = self._split(self.to_k(latents)), self._split(self.to_v(latents))  # (H, R, E), once for all texts
        with torch.autocast(states.device.type, enabled=False):
            weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
            gathered = (weights @ value).transpose(1, 2).flatten(2)
        x = states + self.to_out(gathered)
        inner, gate = self.ffn_in(self.norm_ffn(x)).chunk(2, dim=-1)
        pooled = weighted_mean(x, keep) + self.ffn_out(weighted_mean(inner * F.gelu(gate), keep))
        return pooled * keep.any(dim=1, keepdim=True)

    def _split(self, x: Tensor) -> Tensor:
        """(…, N, heads · head_dim) -> (…, heads, N, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


SLOPE = (1 / 8 + 1 / 3) / 2  # of RReLU outside training


class LayerPooling(Pooling):
    """The base of the poolings over layers: vectors (B, L, D), scaled to length 1 if `normalize` is set.

    `tokens` is read by the backbone, which collects the vectors.
    """

    reads = "layers"

    def __init__(self, *, tokens: str, normalize: bool = False):
        super().__init__()
        self.tokens, self.normalize = tokens, normalize

    def vectors(self, vectors: Tensor) -> Tensor:
        """(B, L, D) in fp32; a vector of zeros stays zero."""
        return F.normalize(vectors.float(), dim=-1) if self.normalize else vectors.float()


class SingleLayer(LayerPooling):
    """One layer l, from 1 to L: out = h_l. Inner layers often give better embeddings than the last (arXiv 2502.02013).

    The base model still runs to its end; layers above l are not trained.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, layer: int, tokens: str = "last"):
        super().__init__(tokens=tokens)
        self.layer = layer

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, D) fp32."""
        return self.vectors(states)[:, self.layer - 1]


class LastLayers(LayerPooling):
    """The mean of the last k layers (arXiv 2502.02013): out = sum_{l > L-k} h_l / k.

    Over all layers it is the capacity control of `scalar_mix`, and the point where that starts.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, layers: int, tokens: str = "last", normalize: bool = True):
        super().__init__(tokens=tokens, normalize=normalize)
        self.layers = layers

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, D) fp32."""
        return self.vectors(states)[:, -self.layers :].mean(dim=1)


class ScalarMix(LayerPooling):
    """ELMo's learned mix of layers (arXiv 1802.05365): out = sum_l softmax(w)_l h_l.

    Without ELMo's scalar factor, which would never have a gradient: embeddings have length 1. It starts as the mean of
    all layers.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, tokens: str = "last", normalize: bool = True):
        super().__init__(tokens=tokens, normalize=normalize)
        self.mix = nn.Parameter(torch.zeros(n_layers))

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.zeros(shape)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, D) fp32."""
        return (self.mix.float().softmax(0)[:, None] * self.vectors(states)).sum(dim=1)


class LayerAttention(LayerPooling):
    """Layer-wise attention pooling (arXiv 2209.05972): every layer attends to all layers; their mean joins the last.

        x_l = norm(h_l)                  q, k, v = r(X W_q), r(X W_k), r(X W_v)         r: leaky ReLU, slope 0.23
        p   = mean over layers i of  sum_l softmax_l(q_i·k_l / L) v_l
        out = tanh([x_L; p] W + b)

    Three differences from the published code. A layer is one vector (there the [CLS] token is the query and the mean
    over tokens gives key and value; a causal model has no [CLS]). Norm is a LayerNorm without weights, because the
    layers of a decoder differ in size and tanh would saturate. The ReLU is not random in training. It starts near the
    mean of x_L and p: W_v is nearly the identity, each half of W half the identity.
    """

    matrices: ClassVar[tuple[str, ...]] = ("query", "key", "value")

    def __init__(self, hidden_size: int, n_layers: int, *, tokens: str = "last"):
        super().__init__(tokens=tokens)
        for name in self.matrices:
            self.add_module(name, Projection(hidden_size, hidden_size, bias=False))
        self.merge = Projection(2 * hidden_size, hidden_size)
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if name == "merge.bias":
            return torch.zeros(shape)
        if name == "merge.weight":
            return torch.cat([torch.eye(shape[0])] * 2, dim=1) / 2
        noise = shape[1] ** -0.5 * torch.randn(shape, generator=generator)
        return noise if name in ("query.weight", "key.weight") else torch.eye(shape[0]) + 0.1 * noise

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, D) fp32, within -1 and 1."""
        x = F.layer_norm(states.float(), states.shape[-1:])
        return torch.tanh(self.merge(torch.cat([x[:, -1], self.mixed(x)], dim=-1)))

    def mixed(self, x: Tensor) -> Tensor:
        """Normalised vectors (B, L, D) -> the mean p over layers of what each attends to (B, D)."""
        query, key, value = (F.leaky_relu(self.get_submodule(name)(x), SLOPE) for name in self.matrices)
        with torch.autocast(x.device.type, enabled=False):
            weights = (query @ key.transpose(1, 2) / x.shape[1]).softmax(dim=-1)  # (B, L, L)
            return (weights.mean(dim=1)[..., None] * value).sum(dim=1)


class LayerMeanFFN(LayerAttention):
    """Capacity control of `layer_attention`: as many parameters, uniform weights in place of attention.

        p = mean over layers l of  r(r(r(x_l W_v) W_2) W_3)

    The two matrices of the attention become two more layers of the value path.
    """

    matrices = ("value", "second", "third")

    def mixed(self, x: Tensor) -> Tensor:
        """Normalised vectors (B, L, D) -> their mean after the value path (B, D)."""
        for name in self.matrices:
            x = F.leaky_relu(self.get_submodule(name)(x), SLOPE)
        return x.mean(dim=1)
