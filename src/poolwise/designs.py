"""Designs as values: the presets of the study and the arguments each pooling takes. No code paths, no torch.

A design is an attention mode, a pooling and the pooling's arguments. The presets are the five designs of "Pooling and
Attention: What are Effective Designs for LLM-Based Embedding Models?" (arXiv 2409.02727), each trainable one twice:
`m2` … `m5` as the paper describes them (padding masked, all tokens where the name says so, a head about as wide as the
model) and `m2-paper` … `m5-paper` as its released code computes them:

- `m2-paper` pools one token, so its attention is constant and its queries and keys never get a gradient;
- `m4-paper` attends to padding;
- `m5-paper` takes for padding whatever has the padding token's id;
- all four have 768 latents and 32 heads of width 2048, whatever the model's width, and start from its random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

AUTO = "auto"
"""The default of an argument whose value follows from the base model; see `poolwise.pooling.resolve_args`."""


@dataclass(frozen=True)
class Arg:
    """One argument of a pooling: its type, its default (`AUTO`: from the base model) and what else it may be."""

    type: type
    default: int | bool | str
    help: str
    allowed: tuple[str, ...] | None = None  # for words
    minimum: int | None = None  # for numbers


_SIZES: dict[str, Arg] = {
    "latents": Arg(int, AUTO, "learned latents; auto: 4 to 64, head below 5 % of the base's FLOPs", minimum=1),
    "heads": Arg(int, AUTO, "attention heads; auto: as many as the base model has", minimum=1),
    "head_dim": Arg(int, AUTO, "width of a head; auto: hidden size / heads", minimum=1),
    "ffn": Arg(int, 4, "feed-forward width as a multiple of the hidden size", minimum=1),
    "norm": Arg(str, "layer_norm", "normalisation before attention and feed-forward", ("layer_norm", "rms_norm")),
    "init": Arg(
        str, "identity", "first weights: identity passes the states through, paper is random", ("identity", "paper")
    ),
}

POOLING_ARGS: dict[str, dict[str, Arg]] = {
    "first_token": {},
    "last_token": {},
    "mean": {},
    "weighted_mean": {},
    "last_token_ffn": dict(_SIZES),
    "mean_ffn": dict(_SIZES),
    "cross_attention": {
        **_SIZES,
        "tokens": Arg(str, "all", "the tokens that the latents attend to", ("all", "last")),
        "masked": Arg(bool, True, "false: padding is attended to as well, as in the paper's code"),
    },
    "layer_cross_attention": {
        **_SIZES,
        "tokens": Arg(
            str, "last", "what stands for a layer: its last token, or the mean of its tokens", ("last", "mean")
        ),
        "layer_weights": Arg(int, AUTO, "rows of the learned layer weights; auto: one per layer; 0: none", minimum=0),
        "pad_by_id": Arg(bool, False, "true: the padding token's id decides what is padding, as in the paper's code"),
    },
}
"""Pooling -> argument -> what it may be."""

POOLINGS_READ: dict[str, str] = {
    "first_token": "tokens",
    "last_token": "tokens",
    "mean": "tokens",
    "weighted_mean": "tokens",
    "last_token_ffn": "tokens",
    "mean_ffn": "tokens",
    "cross_attention": "tokens",
    "layer_cross_attention": "layers",
}
"""Pooling -> `tokens` (B, T, D) of the last layer or `layers` (B, L, D), one vector per layer."""

_PAPER_HEAD: dict[str, Any] = {
    "latents": 768,
    "heads": 32,
    "head_dim": 2048,
    "ffn": 4,
    "norm": "layer_norm",
    "init": "paper",
}


def _preset(attention: str, pooling: str, **pooling_args: Any) -> dict[str, Any]:
    return {"attention": attention, "pooling": pooling, "pooling_args": pooling_args}


PRESETS: dict[str, dict[str, Any]] = {
    "m1": _preset("causal", "last_token"),
    "m2": _preset("causal", "cross_attention"),
    "m3": _preset("causal", "layer_cross_attention", tokens="last"),
    "m4": _preset("bidirectional", "cross_attention"),
    "m5": _preset("bidirectional", "layer_cross_attention", tokens="mean"),
    "m2-paper": _preset("causal", "cross_attention", **_PAPER_HEAD, tokens="last"),
    "m3-paper": _preset("causal", "layer_cross_attention", **_PAPER_HEAD, tokens="last", layer_weights=32),
    "m4-paper": _preset("bidirectional", "cross_attention", **_PAPER_HEAD, masked=False),
    "m5-paper": _preset(
        "bidirectional", "layer_cross_attention", **_PAPER_HEAD, tokens="mean", layer_weights=32, pad_by_id=True
    ),
}
"""Preset -> attention, pooling and the arguments that differ from the pooling's defaults."""

ALIASES: dict[str, str] = {
    "eos-causal": "m1",
    "last-layer-causal": "m2",
    "layers-causal": "m3",
    "last-layer-bidirectional": "m4",
    "layers-bidirectional": "m5",
}
"""The paper's long names of the presets."""
