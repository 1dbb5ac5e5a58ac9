"""The poolings, the plain and the trainable ones, and the table that names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poolwise.errors import ModelError, StudyError, suggest
from poolwise.pooling.cost import default_latents
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
from poolwise.study.catalogue import AUTO, POOLING_ARGS
from poolwise.study.design import find_own as find


class FirstToken(Pooling):
    """The first pooled token. Under causal attention it has seen nothing but itself: the broken arm of every study."""

    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        counted = attended(states, mask)
        return weighted_mean(states, counted * (counted.cumsum(dim=1) == 1))


class LastToken(Pooling):
    """The last token: the state at the last index where the mask is 1 (the EOS token where the recipe appends one)."""

    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        return last_token(states, mask)


class Mean(Pooling):
    """The mean over attended tokens: sum_t m_t h_t / sum_t m_t."""

    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        return weighted_mean(states, attended(states, mask))


class WeightedMean(Pooling):
    """The position-weighted mean of SGPT (arXiv 2202.08904): sum_i i·h_i / sum_i i over attended tokens i = 1 … n.

    Positions are counted from the mask, so padding and excluded prompt tokens take no number.
    """

    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        counted = attended(states, mask).bool()
        return weighted_mean(states, counted.cumsum(dim=1) * counted)


class Max(Pooling):
    """The largest value of each number over attended tokens: max_t h_t; zeros for a text without tokens."""

    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        keep = attended(states, mask).bool()
        largest = states.float().masked_fill(~keep[..., None], -torch.inf).amax(dim=1)
        return torch.where(keep.any(dim=1, keepdim=True), largest, 0.0)


class LastTokens(Pooling):
    """The mean of the last k tokens ("last-k" of 2503.02656), or of all where there are fewer; k is `count`.

    Counted from the mask, so whatever the padding side; with k = 1 it is the last token.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, count: int = 8):
        super().__init__()
        self.count = count

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        counted = attended(states, mask).bool()
        from_the_end = counted.flip(1).cumsum(dim=1).flip(1)
        return weighted_mean(states, counted * (from_the_end <= self.count))


class Concat(Pooling):
    """Several plain poolings side by side, as they come: [p_1; p_2; …], so D grows to as many times D.

    `parts` joins their names: `last_token+mean`. A part whose numbers are larger counts for more in the cosine.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, parts: str = "last_token+mean"):
        super().__init__()
        self.parts = nn.ModuleList(POOLINGS[name](hidden_size, n_layers) for name in parts.split("+"))
        self.dimension = len(self.parts) * hidden_size

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.cat([part(states, mask) for part in self.parts], dim=-1)


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

    W_2 comes after the mean, exactly. Norms, residuals and first weights are those of `heads.py`: with `identity`
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


SLOPE = (1 / 8 + 1 / 3) / 2  # of RReLU outside training


class LayerPooling(Pooling):
    """What the poolings over layers share: vectors (B, L, D), of length 1 if `normalize` says so."""

    reads = "layers"

    def __init__(self, *, tokens: str, normalize: bool = False):
        super().__init__()
        self.tokens, self.normalize = tokens, normalize

    def vectors(self, vectors: Tensor) -> Tensor:
        """(B, L, D) in fp32; a vector of zeros stays one."""
        return F.normalize(vectors.float(), dim=-1) if self.normalize else vectors.float()


class SingleLayer(LayerPooling):
    """One layer l, from 1 to L: out = h_l. Inner layers often serve better than the last (2502.02013).

    Cost: none beside the base, which still runs to its end. Layers above l are not trained.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, layer: int, tokens: str = "last"):
        super().__init__(tokens=tokens)
        if layer > n_layers:
            raise ModelError(f"pooling_args.layer = {layer}: the base model has {n_layers} layers")
        self.layer = layer

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, D) fp32."""
        return self.vectors(states)[:, self.layer - 1]


class LastLayers(LayerPooling):
    """The mean of the last k layers (2502.02013): out = sum_{l > L-k} h_l / k. Without parameters.

    Of all layers it is the capacity control of `scalar_mix`, which starts there.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, layers: int, tokens: str = "last", normalize: bool = True):
        super().__init__(tokens=tokens, normalize=normalize)
        if layers > n_layers:
            raise ModelError(f"pooling_args.layers = {layers}: the base model has {n_layers} layers")
        self.layers = layers

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, D) fp32."""
        return self.vectors(states)[:, -self.layers :].mean(dim=1)


class ScalarMix(LayerPooling):
    """ELMo's learned mix of layers (1802.05365): out = sum_l softmax(w)_l h_l.

    ELMo's factor in front is left out: embeddings have length 1, so it would never have a gradient. Starts as the mean
    of all layers. Cost: L parameters, no matrix product.
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
    """Layer-wise attention pooling (2209.05972): every layer asks all layers, and joins the last one.

        x_l = norm(h_l)                  q, k, v = r(X W_q), r(X W_k), r(X W_v)         r: leaky ReLU, slope 0.23
        p   = mean over the asking layers i of  sum_l softmax_l(q_i·k_l / L) v_l
        out = tanh([x_L; p] W + b)

    As in the published code; but asking and asked layers are one vector each (there the [CLS] token asks and the mean
    over tokens is asked, and a causal model has no [CLS]), norm is a LayerNorm without weights (layers of a decoder
    differ in size, and tanh would saturate), and the ReLU is not random in training. Starts near the mean of x_L and p:
    W_v is nearly the identity, and so is twice each half of W. Cost: 5·D² + D parameters; 6·L·D² + 4·L²·D + 4·D² FLOPs
    a text. Its capacity control is `layer_mean_ffn`.
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
        """Normalised vectors (B, L, D) -> what all layers gathered (B, D)."""
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


POOLINGS: dict[str, type[Pooling]] = {
    "first_token": FirstToken,
    "last_token": LastToken,
    "mean": Mean,
    "weighted_mean": WeightedMean,
    "max": Max,
    "last_tokens": LastTokens,
    "concat": Concat,
    "attention": Attention,
    "mean_gain": MeanGain,
    "latent_attention": LatentAttention,
    "last_token_ffn": LastTokenFFN,
    "mean_ffn": MeanFFN,
    "cross_attention": CrossAttention,
    "single_layer": SingleLayer,
    "last_layers": LastLayers,
    "scalar_mix": ScalarMix,
    "layer_attention": LayerAttention,
    "layer_mean_ffn": LayerMeanFFN,
    "layer_cross_attention": LayerCrossAttention,
}
"""Name in a study file -> module."""


def module_class(pooling: str) -> type[Pooling]:
    """The module of this name, one of ours or a registered one of the user's own."""
    return POOLINGS.get(pooling) or find(pooling)


def resolve_args(pooling: str, args: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """All arguments of a pooling as plain JSON values, sizes filled in from the base model's `config`.

    - heads: as many as the base has, or the next smaller number that divides the hidden size;
    - head_dim: hidden size / heads, so that heads × head_dim is the hidden size;
    - latents: see `cost.default_latents`; a capacity control has as many as cross_attention would have;
    - layer_weights: the number of layers; layer: the middle one, rounded up; layers: 4, or all of fewer.

    Raises `StudyError`, all mistakes at once: an unknown pooling or argument, heads that do not divide the hidden size
    when the other number is left to us, layers that the base does not have or a table of layer weights too short.
    """
    if pooling not in POOLING_ARGS:
        raise StudyError(
            [f"pooling = {pooling!r}: must be one of {', '.join(POOLING_ARGS)}{suggest(pooling, POOLING_ARGS)}"]
        )
    allowed = POOLING_ARGS[pooling]
    unknown = [name for name in args if name not in allowed]
    if unknown:
        takes = f"takes {', '.join(allowed)}" if allowed else "takes no arguments"
        raise StudyError([f"pooling_args.{name}: {pooling} {takes}{suggest(name, allowed)}" for name in unknown])
    config = config.get_text_config()
    resolved = {name: args.get(name, arg.default) for name, arg in allowed.items()}
    if resolved.get("layer") == AUTO:
        resolved["layer"] = (config.num_hidden_layers + 1) // 2
    if resolved.get("layers") == AUTO:
        resolved["layers"] = min(4, config.num_hidden_layers)
    for name in ("layer", "layers"):
        if resolved.get(name, 0) > config.num_hidden_layers:
            raise StudyError(
                [f"pooling_args.{name} = {resolved[name]}: the base model has {config.num_hidden_layers} layers"]
            )
    if pooling == "attention" and config.hidden_size % resolved["heads"]:
        raise StudyError([_indivisible("heads", resolved["heads"], config.hidden_size)])
    if "head_dim" in resolved:
        resolved["heads"], resolved["head_dim"] = _head_sizes(resolved["heads"], resolved["head_dim"], config)
    if resolved.get("layer_weights") == AUTO:
        resolved["layer_weights"] = config.num_hidden_layers
    elif 0 < resolved.get("layer_weights", 0) < config.num_hidden_layers:
        raise StudyError(
            [
                f"pooling_args.layer_weights = {resolved['layer_weights']}: the base model has "
                f'{config.num_hidden_layers} layers; give that many rows or more, 0 for none, or "auto"'
            ]
        )
    if resolved.get("latents") == AUTO:
        resolved["latents"] = default_latents(pooling, resolved, config)[0]
    return resolved


def _head_sizes(heads: int | str, head_dim: int | str, config: Any) -> tuple[int, int]:
    """Numbers for heads and head_dim where they are left to us, such that their product is the hidden size."""
    width = config.hidden_size
    if heads == AUTO and head_dim == AUTO:
        heads = max(n for n in range(1, config.num_attention_heads + 1) if width % n == 0)
    if isinstance(heads, int) and isinstance(head_dim, int):
        return heads, head_dim
    name, other, given = ("heads", "head_dim", heads) if isinstance(heads, int) else ("head_dim", "heads", head_dim)
    assert isinstance(given, int)
    if width % given:
        raise StudyError([_indivisible(name, given, width, f"give {other} too, or ")])
    return (given, width // given) if name == "heads" else (width // given, given)


def _indivisible(name: str, given: int, width: int, fix: str = "") -> str:
    near = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - given))
    return f"pooling_args.{name} = {given}: does not divide the hidden size {width}; {fix or 'give '}{name} = {near}"
