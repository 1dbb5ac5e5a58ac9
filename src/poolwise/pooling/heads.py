"""The trainable poolings: learned latents attend to states, then a gated feed-forward, then the mean over latents.

Source: last-layer and multi-layers trainable pooling of "Pooling and Attention: What are Effective Designs for
LLM-Based Embedding Models?" (arXiv 2409.02727). For states H in R^{N×D} (the tokens of the last layer, or one vector
per layer), layer weights W in R^{N×D} (layers only), latents Z in R^{R×D}, heads of width E:

    K, V  = norm(H + W) W_k, norm(H + W) W_v          Q = norm(Z) W_q
    X     = Z + [softmax(Q_h K_hᵀ / √E) V_h]_h W_o
    Y     = X + (A * gelu(G)) W_2 + b_2               A, G = norm(X) W_1 + b_1
    out   = mean over the R latents of Y

Two steps are reordered, which changes no result: the queries are computed once for all texts, and W_2 comes after the
mean. In evaluation mode without gradients, everything that does not depend on the text is computed once: see `folding`.

Norms, softmax, residuals and sums are computed in fp32, projections in the dtype of their weights (or of autocast).

`init` sets the initial weights:

- `identity`: W_v is a random matrix with orthonormal columns (rows, if the heads together are narrower than the model),
  W_o its transpose, W_2 and W are zero, the queries small. An untrained head then returns nearly the mean of the
  normalised states, so that training starts from a pooling that works, which matters at the learning rates of LoRA.
  The zeros and the shared rotation constrain nothing: every weight has a gradient of its own by the second step.
- `paper`: as in the published code. Latents and W from N(0, 1), W_q, W_k, W_v, W_o, W_1, W_2 and biases uniform in
  ±1/√(inputs).
"""

from __future__ import annotations

import zlib
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poolwise.errors import ModelError
from poolwise.pooling.folding import Folded, foldable

LATENT_STD = 0.02  # of `identity`: small beside the attended states, whose entries are about 1 after their norm
QUERY_SCALE = 0.1  # of `identity`: attention logits start with a standard deviation of about 0.1, nearly uniform


class Pooling(nn.Module):
    """The base of all poolings: built as `Cls(hidden_size, n_layers, **arguments)`.

    `reads`: "tokens" for states (B, T, D), "layers" for vectors (B, L, D). `forward(states, mask)` returns (B, D) fp32;
    another width is set as `self.dimension`. A pooling with parameters defines `initial`.
    """

    __module__ = "poolwise"  # its public name, which users' classes are checked against
    reads: ClassVar[str] = "tokens"

    def __init__(self, hidden_size: int = 0, n_layers: int = 0):
        super().__init__()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set all initial weights from one number drawn from `generator` (the global one if None).

        Each tensor has its own generator, seeded by that number and the tensor's name, so that tensors of equal name
        and shape start equal in every pooling, whatever other tensors there are.
        """
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not parameter.is_meta:
                    own = torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**62)
                    parameter.copy_(self.initial(name, parameter.shape, own))

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The initial value of one parameter; random numbers come from `generator` alone."""
        raise NotImplementedError(f"{type(self).__name__}.initial does not set {name}")


def last_index(mask: Tensor) -> Tensor:
    """Index (B,) of the last 1 in each row of `mask` (B, N), whatever the padding side; 0 for a row without one."""
    return (mask.bool() * torch.arange(mask.shape[1], device=mask.device)).amax(dim=1)


def last_token(states: Tensor, mask: Tensor | None) -> Tensor:
    """States at the last index where the mask is 1: (B, N, D), (B, N) -> (B, D) fp32; zeros for a row without one."""
    if mask is None:
        return states[:, -1].float()
    last = states[torch.arange(states.shape[0], device=states.device), last_index(mask)].float()
    return torch.where(mask.bool().any(dim=1, keepdim=True), last, 0.0)


def weighted_mean(states: Tensor, weights: Tensor) -> Tensor:
    """Mean of the states by weights >= 0, summed in fp32: (B, N, D), (B, N) -> (B, D). A bool mask is a plain mean.

    A state of weight 0 is never read, so it may be NaN; a row without weight gives a zero vector.
    """
    kept = states.masked_fill((weights <= 0)[..., None], 0.0)  # not multiplied by 0: that would leave NaN
    if weights.dtype != torch.bool:  # a plain mean needs no copy of the states in fp32
        kept = kept.float() * weights.float()[..., None]
    total = weights.sum(dim=1, keepdim=True, dtype=torch.float32)
    return kept.sum(dim=1, dtype=torch.float32) / total.clamp(min=1e-9)


def attended(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as booleans (B, N); without one every state counts."""
    return states.new_ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


class Norm(nn.Module):
    """LayerNorm (eps 1e-5) or RMSNorm (eps 1e-6) over the last dimension, always computed in fp32."""

    def __init__(self, hidden_size: int, kind: str):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(hidden_size))
        if kind == "layer_norm":
            self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x, weight = x.float(), self.weight.float()
        if self.kind == "layer_norm":
            return F.layer_norm(x, weight.shape, weight, self.bias.float(), 1e-5)
        return F.rms_norm(x, weight.shape, weight, 1e-6)


class Projection(nn.Linear):
    """A linear layer computed in the dtype of its weights (or of autocast); its output is fp32."""

    def reset_parameters(self) -> None:
        """Nothing: the head that owns the layer sets its initial weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).float()


class Head(Pooling):
    """Latents, value path, norms and feed-forward: common to the trainable poolings and their controls.

    `hidden_size` D, `latents` R, `value_width` the inner width of W_v and W_o, `ffn` the feed-forward's width as a
    multiple of D, `norm` "layer_norm" or "rms_norm", `init` "identity" or "paper". `single`: it attends to one vector.
    """

    single = False
    _folded: Folded | None = None

    def __init__(self, hidden_size: int, *, latents: int, value_width: int, ffn: int, norm: str, init: str):
        super().__init__()
        self.init = init
        self.latents = nn.Parameter(torch.empty(latents, hidden_size))
        self.norm_states = Norm(hidden_size, norm)
        self.to_v = Projection(hidden_size, value_width, bias=False)
        self.to_out = Projection(value_width, hidden_size, bias=False)
        self.norm_ffn = Norm(hidden_size, norm)
        self.ffn_in = Projection(hidden_size, 2 * ffn * hidden_size)
        self.ffn_out = Projection(ffn * hidden_size, hidden_size)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if self.init == "identity":
            with torch.no_grad():
                self.to_out.weight.copy_(self.to_v.weight.T)

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if name.startswith("norm_"):
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        if self.init == "paper":
            if name in ("latents", "layer_weights"):
                return torch.randn(shape, generator=generator)
            layer = self.get_submodule(name.rpartition(".")[0])
            assert isinstance(layer, Projection)
            bound = layer.in_features**-0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        if name == "latents":
            return LATENT_STD * torch.randn(shape, generator=generator)
        if name == "to_v.weight":
            return _orthonormal(shape, generator)
        if name in ("to_q.weight", "to_k.weight", "ffn_in.weight"):
            scale = QUERY_SCALE if name == "to_q.weight" else 1.0
            return scale * shape[1] ** -0.5 * torch.randn(shape, generator=generator)
        return torch.zeros(shape)  # layer weights, W_2, biases; W_o becomes the transpose of W_v

    def folded(self) -> Folded | None:
        """The weights folded for inference, computed at first use and after changes; None while training."""
        if not foldable(self):
            self._folded = None  # weights may change next, and a fused optimiser's step cannot be detected
            return None
        if self._folded is None or not self._folded.fits(self):
            self._folded = Folded(self)
        return self._folded

    def train(self, mode: bool = True) -> Head:
        if mode:
            self._folded = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> Head:
        self._folded = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        """A copy or pickle has no folded weights: it computes its own."""
        return {**self.__dict__, "_folded": None}

    def feed_forward(self, x: Tensor) -> Tensor:
        """Latents after attention (B, R, D) -> feed-forward, residual and mean over the latents (B, D)."""
        value, gate = self.ffn_in(self.norm_ffn(x)).chunk(2, dim=-1)
        return x.mean(dim=1) + self.ffn_out((value * F.gelu(gate)).mean(dim=1))


def _orthonormal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A random matrix with orthonormal columns, or orthonormal rows if it has fewer rows than columns."""
    tall = torch.randn(max(shape), min(shape), generator=generator)
    basis = torch.linalg.qr(tall).Q
    return basis if shape[0] >= shape[1] else basis.T


class CrossAttentionHead(Head):
    """Latents attend to states by multi-head cross-attention, see the formula at the top of this file.

    `heads` × `head_dim` is the inner width; `layer_weights` the number of rows of W, 0 for none.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        latents: int,
        heads: int,
        head_dim: int,
        ffn: int = 4,
        norm: str = "layer_norm",
        init: str = "identity",
        layer_weights: int = 0,
    ):
        width = heads * head_dim
        super().__init__(hidden_size, latents=latents, value_width=width, ffn=ffn, norm=norm, init=init)
        self.heads = heads
        self.layer_weights = nn.Parameter(torch.empty(layer_weights, hidden_size)) if layer_weights else None
        self.norm_latents = Norm(hidden_size, norm)
        self.to_q = Projection(hidden_size, width, bias=False)
        self.to_k = Projection(hidden_size, width, bias=False)
        self.reset_parameters()

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """States (B, N, D), mask (B, N) or None -> (B, D) fp32, not normalised.

        A state whose mask is 0 has weight 0 and is never read; a row whose mask is all zero attends to nothing.
        Raises `ModelError` for more vectors than there are layer weights.
        """
        if folded := self.folded():
            return folded(*self.prepare(states, mask))
        return self.feed_forward(self.latents.float() + self.to_out(self.attend(states, mask)))

    def prepare(self, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """States in fp32, 0 where the mask is, with layer weights added; and the mask as booleans."""
        states = states.float()
        if mask is not None:
            mask = mask.bool()
            states = torch.where(mask[..., None], states, 0.0)
        if self.layer_weights is not None:
            if states.shape[1] > len(self.layer_weights):
                raise ModelError(f"{states.shape[1]} vectors for a head of {len(self.layer_weights)} layer weights")
            states = states + self.layer_weights[: states.shape[1]].float()
        return states, mask

    def attend(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Attention's output for each latent, heads side by side: (B, N, D) -> (B, R, heads · head_dim) fp32."""
        states, mask = self.prepare(states, mask)
        states = self.norm_states(states)
        weights, value = self._weights(states, mask), self._split(self.to_v(states))  # (B, H, R, N), (B, H, N, E)
        with torch.autocast(states.device.type, enabled=False):
            out = weights @ value
        return out.transpose(1, 2).flatten(2)

    def attention_weights(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """How much each latent attends to each state: (B, N, D) -> (B, heads, R, N) fp32; 0 where the mask is."""
        states, mask = self.prepare(states, mask)
        return self._weights(self.norm_states(states), mask)

    def _weights(self, normed: Tensor, mask: Tensor | None) -> Tensor:
        query = self._split(self.to_q(self.norm_latents(self.latents)))  # (H, R, E), once for all texts
        key = self._split(self.to_k(normed))  # (B, H, N, E)
        with torch.autocast(normed.device.type, enabled=False):
            logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            if mask is None:
                return logits.softmax(dim=-1)
            keep = mask[:, None, None, :]
            # the lowest finite number and the product, so that a row that attends to nothing has zeros and no NaN
            return logits.masked_fill(~keep, torch.finfo(torch.float32).min).softmax(dim=-1) * keep

    def _split(self, x: Tensor) -> Tensor:
        """(…, N, heads · head_dim) -> (…, heads, N, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


class CrossAttention(CrossAttentionHead):
    """Last-layer trainable pooling: the latents attend to the tokens of the last layer.

    `tokens`: "all", or "last" for the last token alone (the published code's causal design: over one token softmax is
    1, so W_q, W_k and the latents' norm never get a gradient). `masked=False` declares the published code's
    bidirectional design, which is evaluated with padding attended to: see `Backbone.pooling_padding`, which gives this
    head a mask of ones.
    """

    def __init__(self, hidden_size: int, n_layers: int, *, tokens: str = "all", masked: bool = True, **sizes):
        super().__init__(hidden_size, **sizes)
        self.tokens = tokens
        self.single = tokens == "last"

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.tokens == "last":
            return super().forward(last_token(states, mask)[:, None])
        return super().forward(states, mask)


class LayerCrossAttention(CrossAttentionHead):
    """Multi-layers trainable pooling: the latents attend to one vector per layer, with learned layer weights added.

    `layer_weights`: rows of W; the first L are used. `tokens` ("last" or "mean") reduces a layer to a vector and
    `pad_by_id` decides what is padding; both are read by the backbone, which collects the vectors.
    """

    reads = "layers"

    def __init__(
        self,
        hidden_size: int,
        n_layers: int,
        *,
        tokens: str = "last",
        pad_by_id: bool = False,
        layer_weights: int | None = None,
        **sizes,
    ):
        super().__init__(hidden_size, layer_weights=n_layers if layer_weights is None else layer_weights, **sizes)
        self.tokens, self.pad_by_id = tokens, pad_by_id


class FeedForwardHead(Head):
    """Capacity control: the trainable head without its attention, around one vector pooled without weights.

        X = Z + norm(p) W_v W_o        Y = X + (A * gelu(G)) W_2 + b_2,  A, G = norm(X) W_1 + b_1        out = mean Y

    Every latent receives the pooled vector p instead of what it would attend to. A trainable pooling that beats its
    control gains from attention; otherwise the gain comes from the weights and the non-linearity alone.

    Matched with `cross_attention` of the same arguments: latents, norms of states and feed-forward, the feed-forward,
    the initial weights of equal name and shape, the scale of the initial output (W_v W_o starts as the identity), and
    the number of parameters: W_v and W_o are twice as wide, exactly as many weights as W_q and W_k would have, so that
    only the norm of the queries is missing (2·D parameters; D with rms_norm). Every weight gets a gradient.
    Not matched: W_v W_o is a product without a non-linearity, so its double width adds parameters but no functions;
    the value path costs fewer FLOPs, because it runs once per text; layer weights W (L·D) have no counterpart.
    """

    single = True

    def __init__(
        self,
        hidden_size: int,
        n_layers: int,
        *,
        latents: int,
        heads: int,
        head_dim: int,
        ffn: int = 4,
        norm: str = "layer_norm",
        init: str = "identity",
    ):
        width = 2 * heads * head_dim
        super().__init__(hidden_size, latents=latents, value_width=width, ffn=ffn, norm=norm, init=init)
        self.reset_parameters()

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """The pooled vector p, without weights: (B, N, D), (B, N) -> (B, D) fp32."""
        raise NotImplementedError

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """States (B, N, D), mask (B, N) or None -> (B, D) fp32, not normalised."""
        pooled = self.pool(states, mask)
        if folded := self.folded():
            return folded(pooled[:, None], None)
        value = self.to_out(self.to_v(self.norm_states(pooled)))
        return self.feed_forward(self.latents.float() + value[:, None])


class LastTokenFFN(FeedForwardHead):
    """The capacity control around the last token; see `FeedForwardHead`."""

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        return last_token(states, mask)


class MeanFFN(FeedForwardHead):
    """The capacity control around the mean over tokens; see `FeedForwardHead`."""

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        return weighted_mean(states, attended(states, mask))
