"""Designs as values: attention modes, templates, presets and the arguments each pooling takes. No code paths, no torch.

A design is an attention mode, a pooling with its arguments, and a template. The presets `m1` to `m5` are the five
designs of "Pooling and Attention: What are Effective Designs for LLM-Based Embedding Models?" (arXiv 2409.02727), each
trainable one twice: `m2` … `m5` as the paper describes them (padding masked, all tokens where the name says so, a head
about as wide as the model) and `m2-paper` … `m5-paper` as its released code computes them:

- `m2-paper` pools one token, so its attention is constant and its queries and keys never get a gradient;
- `m4-paper` attends to padding;
- `m5-paper` takes for padding whatever has the padding token's id;
- all four have 768 latents and 32 heads of width 2048, whatever the model's width, and start from its random weights.

The other presets are the pooling, attention and template of known models (see `REFERENCES`). What else makes those
models, their instructions, data and training, is the recipe's matter, and equal for all designs of a study.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
"""The default of an argument whose value follows from the base model; see `poolwise.pooling.resolve_args`."""

ATTENTIONS = ("causal", "bidirectional", "bidirectional_last_N", "prefix", "causal_prefix")
"""Attention modes; `poolwise.model.attention` says what each means. N: a number of layers, from 1."""
TEMPLATES: dict[str, tuple[int, int]] = {"plain": (1, 0), "prompteol": (1, 11), "echo": (2, 10)}
"""What a text is written into before the model reads it (see `decoder.inputs`) -> how often it is read then, and about
how many tokens are added."""


def bidirectional_layers(attention: str) -> int | None:
    """The N of `bidirectional_last_N`; None for another mode."""
    found = re.fullmatch(r"bidirectional_last_([1-9]\d*)", attention)
    return int(found[1]) if found else None


def is_attention(word: object) -> bool:
    """Whether this is an attention mode."""
    return isinstance(word, str) and (
        word in set(ATTENTIONS) - {"bidirectional_last_N"} or bool(bidirectional_layers(word))
    )


def read_tokens(template: str, tokens: int) -> int:
    """How many tokens the model reads of a text of `tokens` tokens, about."""
    copies, more = TEMPLATES[template]
    return copies * tokens + more


@dataclass(frozen=True)
class Arg:
    """One argument of a pooling: its type, its default (`AUTO`: from the base model) and what else it may be."""

    type: type
    default: int | float | bool | str
    help: str
    allowed: tuple[str, ...] | None = None  # for words
    minimum: int | None = None  # for numbers


_WIDTHS: dict[str, Arg] = {
    "heads": Arg(int, AUTO, "attention heads; auto: as many as the base model has", minimum=1),
    "head_dim": Arg(int, AUTO, "width of a head; auto: hidden size / heads", minimum=1),
    "ffn": Arg(int, 4, "feed-forward width as a multiple of the hidden size", minimum=1),
    "norm": Arg(str, "layer_norm", "normalisation before attention and feed-forward", ("layer_norm", "rms_norm")),
    "init": Arg(
        str, "identity", "first weights: identity passes the states through, paper is random", ("identity", "paper")
    ),
}
_SIZES: dict[str, Arg] = {
    "latents": Arg(int, AUTO, "learned latents; auto: 4 to 64, head below 5 % of the base's FLOPs", minimum=1),
    **_WIDTHS,
}
_LAYER_TOKENS = {
    "tokens": Arg(str, "last", "what stands for a layer: its last token, or the mean of its tokens", ("last", "mean"))
}
_NORMALIZE = {
    "normalize": Arg(bool, True, "every layer's vector has length 1 before they are mixed; false: as it comes")
}
CONCATENATIONS = ("last_token+mean", "mean+max", "last_token+max", "first_token+last_token", "last_token+mean+max")

POOLING_ARGS: dict[str, dict[str, Arg]] = {
    "first_token": {},
    "last_token": {},
    "mean": {},
    "weighted_mean": {},
    "max": {},
    "last_tokens": {"count": Arg(int, 8, "tokens that are averaged, counted from the last one", minimum=1)},
    "concat": {"parts": Arg(str, "last_token+mean", "poolings whose vectors are joined", CONCATENATIONS)},
    "attention": {"heads": Arg(int, 1, "queries, each over its own part of the state; divides its size", minimum=1)},
    "mean_gain": {},
    "latent_attention": {"latents": Arg(int, 512, "learned keys and values", minimum=1), **_WIDTHS},
    "last_token_ffn": dict(_SIZES),
    "mean_ffn": dict(_SIZES),
    "cross_attention": {
        **_SIZES,
        "tokens": Arg(str, "all", "the tokens that the latents attend to", ("all", "last")),
        "masked": Arg(bool, True, "false: padding is attended to as well, as in the paper's code"),
    },
    "single_layer": {
        "layer": Arg(int, AUTO, "the layer, counted from 1; auto: the middle one", minimum=1),
        **_LAYER_TOKENS,
    },
    "last_layers": {
        "layers": Arg(int, AUTO, "layers that are averaged; auto: 4, or all where there are fewer", minimum=1),
        **_LAYER_TOKENS,
        **_NORMALIZE,
    },
    "scalar_mix": {**_LAYER_TOKENS, **_NORMALIZE},
    "layer_attention": dict(_LAYER_TOKENS),
    "layer_mean_ffn": dict(_LAYER_TOKENS),
    "layer_cross_attention": {
        **_SIZES,
        **_LAYER_TOKENS,
        "layer_weights": Arg(int, AUTO, "rows of the learned layer weights; auto: one per layer; 0: none", minimum=0),
        "pad_by_id": Arg(bool, False, "true: the padding token's id decides what is padding, as in the paper's code"),
    },
}
"""Pooling -> argument -> what it may be."""

LAYER_POOLINGS = (
    "single_layer",
    "last_layers",
    "scalar_mix",
    "layer_attention",
    "layer_mean_ffn",
    "layer_cross_attention",
)
POOLINGS_READ: dict[str, str] = {name: "layers" if name in LAYER_POOLINGS else "tokens" for name in POOLING_ARGS}
"""Pooling -> `tokens` (B, T, D) of the last layer or `layers` (B, L, D), one vector per layer."""

CONTROLS: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("cross_attention", "all"): ("mean_ffn", "last_token_ffn"),
    ("cross_attention", "last"): ("last_token_ffn",),
    ("layer_cross_attention", "last"): ("last_token_ffn",),
    ("layer_cross_attention", "mean"): ("mean_ffn",),
    ("latent_attention", None): ("mean_ffn",),
    ("attention", None): ("mean_gain",),
    ("layer_attention", "last"): ("layer_mean_ffn",),
    ("layer_attention", "mean"): ("layer_mean_ffn",),
    ("scalar_mix", "last"): ("last_layers",),
    ("scalar_mix", "mean"): ("last_layers",),
}
"""Trainable pooling and its `tokens` -> its capacity controls: as many weights, in the same places, without attention.

Arguments that both take must agree. What is not matched: the norm of the queries (2·D parameters) and the layer weights
(L·D) of the two cross-attentions and of latent attention; the L scalars of the mix, whose control is the mean of as
many layers.
"""

_PAPER_HEAD: dict[str, Any] = {
    "latents": 768,
    "heads": 32,
    "head_dim": 2048,
    "ffn": 4,
    "norm": "layer_norm",
    "init": "paper",
}


def _preset(attention: str, pooling: str, template: str | None = None, **pooling_args: Any) -> dict[str, Any]:
    preset = {"attention": attention, "pooling": pooling, "pooling_args": pooling_args}
    return {**preset, "template": template} if template else preset


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
    "e5-mistral": _preset("causal", "last_token"),
    "nv-embed": _preset("bidirectional", "latent_attention", latents=512, heads=8),
    "llm2vec": _preset("bidirectional", "mean"),
    "gritlm": _preset("bidirectional", "mean"),
    "echo": _preset("causal", "mean", "echo"),
    "qwen3-embedding": _preset("causal", "last_token"),
    "sgpt": _preset("causal", "weighted_mean"),
    "bellm": _preset("bidirectional_last_1", "last_token", "prompteol"),
    "prompteol": _preset("causal", "last_token", "prompteol"),
}
"""Preset -> attention, pooling and the arguments that differ from the pooling's defaults; template, if not plain."""

REFERENCES: dict[str, str] = {
    "e5-mistral": "2401.00368; its recipe: append_eos, an instruction before queries only",
    "nv-embed": "2405.17428; its recipe: an instruction before queries, include_prompt = false",
    "llm2vec": "2404.05961; its recipe: an instruction, include_prompt = false, no end token",
    "gritlm": "2402.09906; its recipe: an instruction, include_prompt = false; the design is LLM2Vec's",
    "echo": "2402.15449; its recipe: an instruction before the first copy",
    "qwen3-embedding": "2506.05176; its recipe: append_eos, an instruction before queries only; E5-Mistral's design",
    "sgpt": "2202.08904; its recipe: brackets around queries and documents, as prompts they have a left half only",
    "bellm": "2311.05296; its prompt asks for a representative word, this one for one word",
    "prompteol": "2307.16645; its recipe: no prompt, no end token",
}
"""Preset of a known model -> its paper (arXiv) and what its recipe would have to say."""

ALIASES: dict[str, str] = {
    "eos-causal": "m1",
    "last-layer-causal": "m2",
    "layers-causal": "m3",
    "last-layer-bidirectional": "m4",
    "layers-bidirectional": "m5",
}
"""The paper's long names of the presets."""

TASK_TYPES = (
    "BitextMining", "Classification", "Clustering", "InstructionReranking", "InstructionRetrieval",
    "MultilabelClassification", "PairClassification", "Reranking", "Retrieval", "STS", "Summarization",
)  # fmt: skip
"""mteb's names of the types of text tasks."""

ORIGINS: tuple[tuple[str, str], ...] = (
    (r"STS22", "sts22-news"),
    (r"STS1[2-7]|STSBenchmark", "semeval-sts"),
    (r"SICK-R", "sick"),
    (r"Ar[xX]iv", "arxiv"),
    (r"Biorxiv", "biorxiv"),
    (r"Medrxiv", "medrxiv"),
    (r"Reddit", "reddit"),
    (r"StackExchange|StackOverflow|AskUbuntu|CQADupstack", "stackexchange"),
    (r"Amazon", "amazon-reviews"),
    (r"Massive", "massive"),
    (r"MTOP", "mtop"),
    (r"Twitter|Tweet|Emotion", "twitter"),
    (r"FEVER|ClimateFEVER|HotpotQA|DBPedia|NQ", "wikipedia"),
    (r"Touche2020", "touche"),
    (r"SCIDOCS|SciDocs", "scidocs"),
    (r"TwentyNewsgroups", "twentynewsgroups"),
)
"""(regular expression that matches the start of a task's name, the data source shared by those tasks)."""


def origin(task: str) -> str | None:
    """The data source that an official mteb task shares with others; None if `ORIGINS` does not list the task.

    A pattern must end at the end of a word: `STS12` matches, `STS120` and `NQueens` do not.
    """
    matches = (name for pattern, name in ORIGINS if re.match(rf"(?:{pattern})(?![a-z0-9])", task))
    return next(matches, None)
