"""The vocabulary of studies: attention modes, templates, task types, poolings and presets. Data only, no torch.

A pooling is declared once, in `POOLINGS`; what it computes is the class of the same name in `poolwise.pooling`
(`mean_gain` -> `MeanGain`). Validation, cost, laws, factor analysis and documentation read the declaration.

A design is an attention mode, a pooling with its arguments, and a template. The presets `m1` to `m5` are the five
designs of "Pooling and Attention: What are Effective Designs for LLM-Based Embedding Models?" (arXiv 2409.02727), each
trainable one twice: `m2` … `m5` as the paper describes them (padding masked, all tokens of the last layer, a head
about as wide as the model) and `m2-paper` … `m5-paper` as its released code computes them:

- `m2-paper` pools one token, so its attention is constant and its queries and keys never get a gradient;
- `m4-paper` attends to padding when it is evaluated (`recipe.evaluation_padding`), and not in training, which runs one
  text at a time;
- `m5-paper` counts every token with the padding token's id as padding;
- all four have 768 latents and 32 heads of width 2048, whatever the model's width, and start from random weights.

The other presets are the attention, pooling and template of known models (see `REFERENCES`). The rest of those models,
their instructions, data and training, belongs to the recipe, which is equal for all designs of a study.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from poolwise.errors import StudyError, suggest
from poolwise.study.pooling_spec import AUTO, OWN, Arg, Cost, PoolingSpec

ATTENTIONS = ("causal", "bidirectional", "bidirectional_last_N", "prefix", "causal_prefix")
"""Attention modes; `poolwise.model.attention` implements them. N: a number of layers, from 1."""
LEXICAL = ("tfidf", "tfidf_chars", "bm25")
"""Reference rows that count words and characters instead of encoding texts."""
TEMPLATES: dict[str, tuple[int, int]] = {"plain": (1, 0), "prompteol": (1, 11), "echo": (2, 10)}
"""Template that a text is written into -> how often the model reads the text, and about how many tokens are added."""


def bidirectional_layers(attention: str) -> int | None:
    """The N of `bidirectional_last_N`; None for another mode."""
    found = re.fullmatch(r"bidirectional_last_([1-9]\d{0,8})", attention)
    return int(found[1]) if found else None


def is_attention(word: object) -> bool:
    """Whether `word` is an attention mode."""
    return isinstance(word, str) and (
        word in set(ATTENTIONS) - {"bidirectional_last_N"} or bool(bidirectional_layers(word))
    )


def read_tokens(template: str, tokens: int) -> int:
    """About how many tokens the model reads of a text of `tokens` tokens in this template."""
    copies, added = TEMPLATES[template]
    return copies * tokens + added


def indivisible(name: str, value: int, width: int, fix: str = "") -> str:
    """What is wrong with a size that does not divide the hidden size, and the nearest that does; empty if it does."""
    if width % value == 0:
        return ""
    near = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - value))
    return f"does not divide the hidden size {width}; {fix or 'give '}{name} = {near}"


def _above(value: int, width: int, layers: int) -> str:
    return f"the base model has {layers} layers" if value > layers else ""


def _too_few(value: int, width: int, layers: int) -> str:
    fix = f'give that many rows or more, 0 for none, or "{AUTO}"'
    return f"the base model has {layers} layers; {fix}" if 0 < value < layers else ""


_HEAD: dict[str, Arg] = {
    "heads": Arg(int, AUTO, "attention heads; auto: as many as the base model has", minimum=1),
    "head_dim": Arg(int, AUTO, "width of a head; auto: hidden size / heads", minimum=1),
    "ffn": Arg(int, 4, "feed-forward width as a multiple of the hidden size", minimum=1),
    "norm": Arg(str, "layer_norm", "normalisation before attention and feed-forward", ("layer_norm", "rms_norm")),
    "init": Arg(
        str, "identity", "initial weights: identity passes the states through, paper is random", ("identity", "paper")
    ),
}
_LATENTS = "learned latents; auto: 4 to 64, the largest power of two that keeps the head below 5 % of the base's FLOPs"
_LATENT_HEAD = {"latents": Arg(int, AUTO, _LATENTS, minimum=1), **_HEAD}
_LAYER_TOKENS = {
    "tokens": Arg(str, "last", "the vector of a layer: its last token, or the mean of its tokens", ("last", "mean"))
}
_NORMALIZE = {"normalize": Arg(bool, True, "scale each layer's vector to length 1 before they are mixed")}
CONCATENATIONS = ("last_token+mean", "mean+max", "last_token+max", "first_token+last_token", "last_token+mean+max")


def _network(args: Mapping[str, Any], width: int, *, norms: int = 3, rows: int = 0) -> int:
    """Parameters of a head with latents: R·D + 4·D·I + 3·F·D + 2·F + D, its norms, and `rows` layer weights of size D.

    R latents, inner width I = heads · head_dim (a control's value path is 2·I wide instead), feed-forward F = ffn · D.
    """
    inner, hidden = args["heads"] * args["head_dim"], args["ffn"] * width
    norm = width if args["norm"] == "rms_norm" else 2 * width
    return (args["latents"] + rows) * width + 4 * width * inner + 3 * width * hidden + 2 * hidden + width + norms * norm


def _attending(args: Mapping[str, Any], width: int, vectors: int, outputs: int, rows: int = 0) -> Cost:
    """R latents and N vectors attend, one to the other: 4·(R + N)·D·I for projections, 4·R·N·I for scores and sums.

    Every output of the attention goes through the feed-forward: 6·F·D.
    """
    latents, inner = args["latents"], args["heads"] * args["head_dim"]
    attention = 4 * (latents + vectors) * width * inner + 4 * latents * vectors * inner
    return Cost(_network(args, width, rows=rows), attention + 6 * outputs * args["ffn"] * width**2)


def _cross_attention(args: Mapping[str, Any], width: int, layers: int, tokens: int) -> Cost:
    return _attending(args, width, 1 if args["tokens"] == "last" else tokens, args["latents"])


def _layer_cross_attention(args: Mapping[str, Any], width: int, layers: int, tokens: int) -> Cost:
    return _attending(args, width, layers, args["latents"], args["layer_weights"])


def _latent_attention(args: Mapping[str, Any], width: int, layers: int, tokens: int) -> Cost:
    return _attending(args, width, tokens, tokens)


def _feed_forward(args: Mapping[str, Any], width: int, layers: int, tokens: int) -> Cost:
    value_path = 8 * width * args["heads"] * args["head_dim"]  # one vector through two matrices, D × 2·I and 2·I × D
    return Cost(_network(args, width, norms=2), value_path + 6 * args["latents"] * args["ffn"] * width**2)


def _layer_mean_ffn(args: Mapping[str, Any], width: int, layers: int, tokens: int) -> Cost:
    return Cost(5 * width**2 + width, 6 * layers * width**2 + 4 * width**2)


def _layer_attention(args: Mapping[str, Any], width: int, layers: int, tokens: int) -> Cost:
    control = _layer_mean_ffn(args, width, layers, tokens)
    return control._replace(flops=control.flops + 4 * layers**2 * width)


POOLINGS: dict[str, PoolingSpec] = {
    spec.name: spec
    for spec in (
        PoolingSpec("first_token", "h_1, the first token after BOS", tokens="first"),
        PoolingSpec(
            "last_token", "h_T, the end token if the recipe appends one", "E5-Mistral, Qwen3-Embedding",
            tokens="last", standard="lasttoken",
        ),
        PoolingSpec("mean", "mean of h_t", "LLM2Vec, GritLM", standard="mean"),
        PoolingSpec("weighted_mean", "sum t·h_t / sum t", "SGPT, 2202.08904", standard="weightedmean"),
        PoolingSpec("max", "the largest value of each component", standard="max"),
        PoolingSpec(
            "last_tokens", "mean of the last `count` tokens", "2503.02656",
            {"count": Arg(int, 8, "tokens to average, counted back from the last one", minimum=1)},
        ),
        PoolingSpec(
            "concat", "several poolings concatenated: 2·D or 3·D components", "",
            {"parts": Arg(str, "last_token+mean", "poolings whose vectors are concatenated", CONCATENATIONS)},
        ),
        PoolingSpec(
            "attention", "sum a_t h_t, a = softmax(q·h_t / √D)", "2503.02656",
            {
                "heads": Arg(
                    int, 1, "queries, each over its own part of the state; must divide the hidden size", minimum=1,
                    misfit=lambda value, width, layers: indivisible("heads", value, width),
                )
            },
            cost=lambda args, width, layers, tokens: Cost(width, 4 * tokens * width),
            controls=("mean_gain",),
        ),
        PoolingSpec(
            "mean_gain", "g * mean of h_t, with a learned g for each component",
            cost=lambda args, width, layers, tokens: Cost(width, 0),
        ),
        PoolingSpec(
            "latent_attention", "tokens attend to learned latents; feed-forward; mean over tokens",
            "NV-Embed, 2405.17428",
            {"latents": Arg(int, 512, "learned keys and values", minimum=1), **_HEAD},
            cost=_latent_attention, controls=("mean_ffn",),
        ),
        PoolingSpec(
            "last_token_ffn", "h_T through a value path; feed-forward; mean over R latents", "",
            _LATENT_HEAD, tokens="last", cost=_feed_forward, sized_as="cross_attention",
        ),
        PoolingSpec(
            "mean_ffn", "mean of h_t through a value path; feed-forward; mean over R latents", "",
            _LATENT_HEAD, cost=_feed_forward, sized_as="cross_attention",
        ),
        PoolingSpec(
            "cross_attention", "R latents attend to tokens; feed-forward; mean over latents",
            "2409.02727, last-layer trainable pooling",
            {
                **_LATENT_HEAD,
                "tokens": Arg(str, "all", "the tokens that the latents attend to", ("all", "last")),
                "masked": Arg(bool, True, "false: padding is attended to if recipe.evaluation_padding is set"),
            },
            cost=_cross_attention,
            controls={"all": ("mean_ffn", "last_token_ffn"), "last": ("last_token_ffn",)},
        ),
        PoolingSpec(
            "single_layer", "h_l", "2502.02013",
            {
                "layer": Arg(
                    int, AUTO, "the layer, counted from 1; auto: the middle one", minimum=1,
                    auto=lambda width, layers: (layers + 1) // 2, misfit=_above,
                ),
                **_LAYER_TOKENS,
            },
            reads="layers", highest_layer="layer",
        ),
        PoolingSpec(
            "last_layers", "mean of the last `layers` layers", "2502.02013",
            {
                "layers": Arg(
                    int, AUTO, "layers to average, counted back from the last one; auto: 4, or all if there are fewer",
                    minimum=1, auto=lambda width, layers: min(4, layers), misfit=_above,
                ),
                **_LAYER_TOKENS,
                **_NORMALIZE,
            },
            reads="layers",
        ),
        PoolingSpec(
            "scalar_mix", "sum softmax(w)_l h_l", "ELMo, 1802.05365", {**_LAYER_TOKENS, **_NORMALIZE}, reads="layers",
            cost=lambda args, width, layers, tokens: Cost(layers, 0), controls=("last_layers",),
        ),
        PoolingSpec(
            "layer_attention", "each layer attends to all layers; the mean joins the last layer; tanh", "2209.05972",
            _LAYER_TOKENS, reads="layers", cost=_layer_attention, controls=("layer_mean_ffn",),
        ),
        PoolingSpec(
            "layer_mean_ffn", "mean over layers of a deeper value path joins the last layer; tanh", "",
            _LAYER_TOKENS, reads="layers", cost=_layer_mean_ffn,
        ),
        PoolingSpec(
            "layer_cross_attention", "R latents attend to layers; feed-forward; mean over latents",
            "2409.02727, multi-layers trainable pooling",
            {
                **_LATENT_HEAD,
                **_LAYER_TOKENS,
                "layer_weights": Arg(
                    int, AUTO, "rows of the learned layer weights; auto: one per layer; 0: none", minimum=0,
                    auto=lambda width, layers: layers, misfit=_too_few,
                ),
                "pad_by_id": Arg(
                    bool, False, "true: whatever has the padding token's id counts as padding, as in the paper's code"
                ),
            },
            reads="layers", attends_to_layers=True, cost=_layer_cross_attention,
            controls={"last": ("last_token_ffn",), "mean": ("mean_ffn",)},
        ),
    )
}  # fmt: skip
"""Name -> declaration of our poolings."""


def spec_of(pooling: str) -> PoolingSpec:
    """The declaration of one of our poolings, or of a user's that is imported. Raises `StudyError` for another name."""
    if pooling in OWN:
        return OWN[pooling]
    if pooling not in POOLINGS:
        allowed = ", ".join(POOLINGS)
        raise StudyError([f"pooling {pooling!r} is unknown; allowed: {allowed}{suggest(pooling, POOLINGS)}"])
    return POOLINGS[pooling]


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

REFERENCES: dict[str, tuple[str, str]] = {
    "e5-mistral": ("2401.00368", "`append_eos`, an instruction before queries only"),
    "nv-embed": ("2405.17428", "an instruction before queries, `include_prompt = false`"),
    "llm2vec": ("2404.05961", "an instruction, `include_prompt = false`, no end token"),
    "gritlm": ("2402.09906", "an instruction, `include_prompt = false`; the design is LLM2Vec's"),
    "echo": ("2402.15449", "an instruction before the first copy"),
    "qwen3-embedding": ("2506.05176", "`append_eos`, an instruction before queries only; the design is E5-Mistral's"),
    "sgpt": ("2202.08904", "brackets around queries and documents; a prompt can only add the left one"),
    "bellm": ("2311.05296", "a prompt that asks for a representative word; the template asks for one word"),
    "prompteol": ("2307.16645", "no prompt, no end token"),
}
"""Preset of a known model -> its paper (arXiv), and the model's recipe as far as it concerns prompts and end tokens."""

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
