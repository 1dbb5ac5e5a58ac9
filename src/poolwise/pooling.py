"""From hidden states to one vector: the plain poolings, the table of all poolings, and the paper's released heads.

Every pooling is a `torch.nn.Module`, built as `Cls(hidden_size, n_layers, **args)` and called with states (B, N, D)
and a mask (B, N) or None; it gives (B, D) in fp32, not normalised; where it gives more numbers, `dimension` says how
many. `reads` says what it is called with: "tokens" of the last layer, or "layers", one vector for each. The mask alone
decides what is padding (never a token's id), so an embedding does not depend on the side, the amount or the content of
padding; what is left out of pooling, the prompt or special tokens, is left out of the mask. The trainable poolings live
in `heads.py`, `controls.py`, `latent.py` and `layer_poolings.py`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poolwise.cost import default_latents
from poolwise.designs import AUTO, POOLING_ARGS
from poolwise.errors import CheckpointError, StudyError, suggest
from poolwise.poolings.controls import LastTokenFFN, MeanFFN
from poolwise.poolings.heads import (
    CrossAttention,
    CrossAttentionHead,
    LayerCrossAttention,
    Pooling,
    attended,
    last_token,
    weighted_mean,
)
from poolwise.poolings.latent import Attention, LatentAttention, MeanGain
from poolwise.poolings.layer_poolings import LastLayers, LayerAttention, LayerMeanFFN, ScalarMix, SingleLayer
from poolwise.settings.own import find


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
    - latents: see `poolwise.cost.default_latents`; a capacity control has as many as cross_attention would have;
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


class PaperHead(nn.Module):
    """A head as the paper released them: vectors (B, N, D), mask (B, N) or None -> (B, D) of length 1."""

    def __init__(self, pooling: CrossAttentionHead):
        super().__init__()
        self.pooling = pooling

    def forward(self, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.normalize(self.pooling(vectors, mask), dim=-1)


_RELEASED = {  # released name -> our name; to_kv holds keys first, then values
    "latents": "latents",
    "pos_emb.weight": "layer_weights",
    "cross_attend_blocks.0.norm.weight": "norm_states.weight",
    "cross_attend_blocks.0.norm.bias": "norm_states.bias",
    "cross_attend_blocks.0.norm_context.weight": "norm_latents.weight",
    "cross_attend_blocks.0.norm_context.bias": "norm_latents.bias",
    "cross_attend_blocks.0.fn.to_q.weight": "to_q.weight",
    "cross_attend_blocks.0.fn.to_kv.weight": "to_k.weight, to_v.weight",
    "cross_attend_blocks.0.fn.to_out.weight": "to_out.weight",
    "cross_attend_blocks.1.norm.weight": "norm_ffn.weight",
    "cross_attend_blocks.1.norm.bias": "norm_ffn.bias",
    "cross_attend_blocks.1.fn.net.0.weight": "ffn_in.weight",
    "cross_attend_blocks.1.fn.net.0.bias": "ffn_in.bias",
    "cross_attend_blocks.1.fn.net.2.weight": "ffn_out.weight",
    "cross_attend_blocks.1.fn.net.2.bias": "ffn_out.bias",
}


def load_paper_head(state_dict: Mapping[str, Tensor] | str | Path, heads: int = 32) -> PaperHead:
    """A trained head from the paper's released layout: a state dict, or the path of an `attn_pool.pt`.

    Sizes are read from the shapes; only the number of `heads` is not written in them. Weights become fp32. With
    `pos_emb.weight` it is a multi-layers head (its first N rows are added to N vectors), without it a last-layer head.
    A prefix `module.` is dropped.

    Raises `CheckpointError` naming missing and unexpected keys, shapes that do not fit together, a file that is not a
    state dict, or heads that do not divide the inner width.
    """
    where = "state dict"
    if isinstance(state_dict, (str, Path)):
        where, state_dict = str(state_dict), _read(Path(state_dict))
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    missing = [name for name in _RELEASED if name not in weights and name != "pos_emb.weight"]
    unexpected = [name for name in weights if name not in _RELEASED]
    if missing or unexpected:
        parts = [
            f"{kind} {', '.join(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise CheckpointError(f"{where} is not a head in the layout of attn_pool.pt: {'; '.join(parts)}")

    latents, hidden_size = _shape(weights, "latents", where)
    width = _shape(weights, "cross_attend_blocks.0.fn.to_q.weight", where)[0]
    inner = _shape(weights, "cross_attend_blocks.1.fn.net.2.weight", where)[1]
    if width % heads:
        raise CheckpointError(f"{where}: heads = {heads} does not divide the inner width {width} of to_q.weight")
    with torch.device("meta"):
        pooling = CrossAttentionHead(
            hidden_size,
            latents=latents,
            heads=heads,
            head_dim=width // heads,
            ffn=max(1, inner // hidden_size),
            layer_weights=len(weights.get("pos_emb.weight", ())),
        )
    ours = {}
    for released, name in _RELEASED.items():
        if released in weights:
            names = name.split(", ")
            for part, tensor in zip(names, weights[released].float().chunk(len(names)), strict=False):
                ours[part] = tensor
    expected = pooling.state_dict()
    wrong = [
        f"{name} {tuple(ours[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if ours[name].shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{where}: shapes that do not fit latents of width {hidden_size}: {'; '.join(wrong)}")
    pooling.load_state_dict({name: tensor.clone() for name, tensor in ours.items()}, assign=True)
    return PaperHead(pooling)


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a file of weights that torch can load safely ({error})") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no state dict (names and tensors)")
    return content


def _shape(weights: Mapping[str, Tensor], name: str, where: str) -> torch.Size:
    shape = weights[name].shape
    if len(shape) != 2:
        raise CheckpointError(f"{where}: {name} has shape {tuple(shape)}, a matrix was expected")
    return shape
