"""The trainable poolings: learned latents attend to states, then a gated feed-forward, then the mean over latents.

Source: last-layer and multi-layers trainable pooling of "Pooling and Attention: What are Effective Designs for
LLM-Based Embedding Models?" (arXiv 2409.02727). For states H in R^{N×D} (the tokens of the last layer, or one vector
per layer), layer weights W in R^{N×D} (layers only), latents Z in R^{R×D}, heads of width E:

    K, V  = norm(H + W) W_k, norm(H + W) W_v          Q = norm(Z) W_q
    X     = Z + [softmax(Q_h K_hᵀ / √E) V_h]_h W_o
    Y     = X + (A * gelu(G)) W_2 + b_2               A, G = norm(X) W_1 + b_1
    out   = mean over the R latents of Y

Two steps are reordered, exactly: the queries are computed once and not for each text, and W_2 comes after the mean. In
evaluation mode without gradients, much more is computed once: see `folding`.

Norms, softmax, residuals and sums are taken in fp32; projections run in the dtype of their weights (or of autocast).

`init` says where training starts:

- `identity`: W_v is a random matrix with orthonormal columns (rows, if the heads together are narrower than the model),
  W_o its transpose, W_2 and W are zero, the queries small. An untrained head is then nearly the mean of the normalised
  states: training starts from a pooling that works instead of from noise, which matters at the rates usual for LoRA.
  Zeros and the shared rotation block nothing: every weight has a gradient by the second step and goes its own way.
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
    """What all poolings share: `reads`, a forward from states to one vector, and reproducible first weights."""

    reads: ClassVar[str] = "tokens"

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all first weights from `generator` (the global one if None).

        One number is drawn, and each tensor then has a generator of its own, seeded by that number and the tensor's
        name: tensors of equal name and shape start equal in every pooling, whatever else the pooling holds.
        """
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not parameter.is_meta:
                    own = torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**62)
                    parameter.copy_(self.initial(name, parameter.shape, own))

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The first value of one parameter."""
        raise NotImplementedError(f"{type(self).__name__} does not say how {name} starts")


def last_token(states: Tensor, mask: Tensor | None) -> Tensor:
    """States at the last index where the mask is 1, on either padding side: (B, N, D), (B, N) -> (B, D) fp32.

    A row whose mask is all zero gives a zero vector.
    """
    if mask is None:
        return states[:, -1].float()
    attended = mask.bool()
    index = (attended * torch.arange(states.shape[1], device=states.device)).amax(dim=1)
    last = states[torch.arange(states.shape[0], device=states.device), index].float()
    return torch.where(attended.any(dim=1, keepdim=True), last, 0.0)


def weighted_mean(states: Tensor, weights: Tensor) -> Tensor:
    """Mean of the states by weights >= 0, in fp32: (B, N, D), (B, N) -> (B, D).

    A state of weight 0 is never read, so it may be anything, NaN too; a row without weight gives a zero vector.
    """
    weights = weights.float()
    kept = torch.where(weights[..., None] > 0, states.float(), 0.0)
    return (kept * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)


def attended(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, or ones where there is none: (B, N) fp32."""
    return states.new_ones(states.shape[:2], dtype=torch.float32) if mask is None else mask.float()


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
    """A linear layer computed in the dtype of its weights (or of autocast), given back in fp32."""

    def reset_parameters(self) -> None:
        """Nothing: the head that owns the layer draws its first weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).float()


class Head(Pooling):
    """What the trainable poolings and their controls share: latents, value path, norms and feed-forward.

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
        """The weights folded for inference, made when first needed and when they have changed; None in training."""
        if not foldable(self):
            self._folded = None  # weights may soon change, and a fused optimiser leaves no trace
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
        """Copies and pickles fold for themselves."""
        return {**self.__dict__, "_folded": None}

    def feed_forward(self, x: Tensor) -> Tensor:
        """Latents after attention (B, R, D) -> feed-forward, residual and mean over the latents (B, D)."""
        value, gate = self.ffn_in(self.norm_ffn(x)).chunk(2, dim=-1)
        return x.mean(dim=1) + self.ffn_out((value * F.gelu(gate)).mean(dim=1))


def _orthonormal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A random matrix with orthonormal columns, or rows where there are fewer of them."""
    tall = torch.randn(max(shape), min(shape), generator=generator)
    basis = torch.linalg.qr(tall).Q
    return basis if shape[0] >= shape[1] else basis.T


class CrossAttentionHead(Head):
    """Latents attend to states by multi-head cross-attention; the formula stands at the top of this file.

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
        query = self._split(self.to_q(self.norm_latents(self.latents)))  # (H, R, E), once for all texts
        key, value = self._split(self.to_k(states)), self._split(self.to_v(states))  # (B, H, N, E)
        with torch.autocast(states.device.type, enabled=False):
            logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, H, R, N)
            if mask is not None:
                keep = mask[:, None, None, :]
                weights = logits.masked_fill(~keep, torch.finfo(torch.float32).min).softmax(dim=-1) * keep
            else:
                weights = logits.softmax(dim=-1)
            out = weights @ value
        return out.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        """(…, N, heads · head_dim) -> (…, heads, N, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


class CrossAttention(CrossAttentionHead):
    """Last-layer trainable pooling: the latents attend to the tokens of the last layer.

    `tokens`: "all", or "last" for the last token alone (the published code's causal design: over one token softmax is
    1, so W_q, W_k and the latents' norm never get a gradient). `masked=False`: padding is attended to as well (the
    published code's bidirectional design: a text's vector then depends on how much padding its batch needed).
    """

    def __init__(self, hidden_size: int, n_layers: int, *, tokens: str = "all", masked: bool = True, **sizes):
        super().__init__(hidden_size, **sizes)
        self.tokens, self.masked = tokens, masked
        self.single = tokens == "last"

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.tokens == "last":
            return super().forward(last_token(states, mask)[:, None])
        return super().forward(states, mask if self.masked else None)


class LayerCrossAttention(CrossAttentionHead):
    """Multi-layers trainable pooling: the latents attend to one vector per layer, with learned layer weights added.

    `layer_weights`: rows of W; the first L are used. `tokens` ("last" or "mean") says what stands for a layer and
    `pad_by_id` what counts as padding there; both are read by the backbone that collects the vectors, not here.
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

    Every latent gets the pooled vector p where the trainable pooling gives it what it attended to. What it shows: how
    much of a gain of the trainable pooling comes from more weights and a non-linearity after a plain pooling.

    Matched with `cross_attention` of the same arguments: latents, norms of states and feed-forward, the feed-forward,
    the first weights of equal name and shape, the scale of the first output (W_v W_o is the identity at the start), and
    the number of parameters: W_v and W_o are twice as wide, which makes up for the missing W_q and W_k exactly, so that
    only the norm of the queries is missing (2·D parameters; D with rms_norm). Nothing is left without a gradient.
    Not matched: W_v W_o is a product without a non-linearity, so its double width adds parameters, not functions; the
    value path costs fewer FLOPs, for it runs once for a text; layer weights W (L·D parameters) have no counterpart.
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
        """The vector without weights that the head is put around: (B, N, D), (B, N) -> (B, D) fp32."""
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
