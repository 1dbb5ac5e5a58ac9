"""Poolings over layers: one layer, the mean of the last ones, a learned mix, attention between layers.

They are called with one vector for each of the L layers, (B, L, D) fp32 (see `decoder.layers`): the state of the
layer's last token, or the mean of its tokens, as `tokens` says; the backbone that collects them reads `tokens`. A
linear mix of layers and that reduction may change places, so no token states of inner layers are ever kept. The vector
of the last layer comes after the model's final norm, those before it straight from the layers, which are larger the
deeper they lie: `normalize` gives each length 1 first.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poolwise.errors import ModelError
from poolwise.poolings.heads import Pooling, Projection

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
