"""What a design costs: parameters and forward FLOPs of the base model, of a head and of LoRA, from shapes alone.

Nothing is loaded: the base is built from its config on the meta device and its shapes are read. Conventions, the usual
ones of scaling-law papers:

- one multiply-add is 2 FLOPs; matrix products only, no norms, softmax, activations or look-ups (embeddings);
- per text of `tokens` tokens, forward; attention scores and their sum count all tokens × tokens pairs under every
  attention mode, without savings by causal masks or sliding windows;
- the base is the decoder without a language-model head, which an embedder never runs;
- `head_flops` counts a head as its formula is written, each text on its own, `folded_flops` as it runs at inference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from poolwise.errors import ModelError
from poolwise.pooling.folding import Shape
from poolwise.study.catalogue import POOLINGS_READ
from poolwise.study.design import OWN

SHARE = 0.05
"""A default head takes less than this share of the base's FLOPs …"""
SHARE_TOKENS = 32
"""… on texts of this many tokens."""

CONTROLS = ("last_token_ffn", "mean_ffn")
TRAINABLE = (*CONTROLS, "cross_attention", "layer_cross_attention")
"""Those with latents that attend, and their controls; `_others` knows the rest."""


def skeleton(config: Any) -> PreTrainedModel:
    """The decoder that `config` describes, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return AutoModel.from_config(config.get_text_config())


def base_parameters(config: Any) -> int:
    """Parameters of the decoder as an embedder uses it: with embeddings, without the language-model head."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def base_flops(config: Any, tokens: int) -> int:
    """FLOPs of one forward of the base over a text of `tokens` tokens.

    2 × weights × tokens for every matrix but the embeddings (of a mixture of experts only those that a token visits),
    and 4 × tokens² × heads × head width for the scores and sums of each layer. Raises `ModelError` for a base without
    attention heads (Mamba).
    """
    config = config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        raise ModelError(f"{type(config).__name__} has no attention heads: give a decoder with attention as base model")
    model = skeleton(config)
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = 0
    for parameter in model.parameters():
        if id(parameter) in looked_up or parameter.ndim < 2:
            continue
        if parameter.ndim == 3:  # experts, outputs, inputs
            weights += parameter[0].numel() * getattr(config, "num_experts_per_tok", len(parameter))
        else:
            weights += parameter.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 4 * tokens**2 * config.num_attention_heads * head_dim * config.num_hidden_layers
    return 2 * weights * tokens + scores


def head_flops(pooling: str, args: Mapping[str, Any], config: Any, tokens: int) -> int:
    """FLOPs of a pooling for one text; `args` complete, as `resolve_args` returns them; 0 for poolings without weights.

    With N attended vectors (tokens, layers, or 1), R latents, inner width I, hidden size D and feed-forward width F:
    queries 2RDI, keys and values 4NDI, scores and sums 4RNI, output 2RID, feed-forward 6RFD. A capacity control has
    value and output matrices of width 2I, applied to one vector: 8DI, and the feed-forward.
    """
    config = config.get_text_config()
    if pooling not in TRAINABLE:
        return _others(pooling, args, config, tokens)[1]
    width, latents, inner = config.hidden_size, args["latents"], args["heads"] * args["head_dim"]
    feed_forward = 6 * latents * args["ffn"] * width * width
    if pooling in CONTROLS:
        return 8 * width * inner + feed_forward
    vectors = _vectors(pooling, args, config, tokens)
    return 4 * latents * width * inner + 4 * vectors * width * inner + 4 * latents * vectors * inner + feed_forward


def folded_flops(pooling: str, args: Mapping[str, Any], config: Any, tokens: int) -> int:
    """FLOPs of a pooling for one text as it runs at inference: see `poolings.folding`; arguments as in `head_flops`."""
    if pooling not in TRAINABLE:
        return head_flops(pooling, args, config, tokens)
    config = config.get_text_config()
    vectors = _vectors(pooling, args, config, tokens)
    single = pooling in CONTROLS or (pooling == "cross_attention" and args.get("tokens") == "last")
    inner = args["heads"] * args["head_dim"] * (2 if pooling in CONTROLS else 1)
    return Shape(
        width=config.hidden_size,
        latents=args["latents"],
        heads=1 if single else args["heads"],
        head_dim=inner if single else args["head_dim"],
        hidden=args["ffn"] * config.hidden_size,
        single=single,
    ).flops(vectors)


def _vectors(pooling: str, args: Mapping[str, Any], config: Any, tokens: int) -> int:
    """How many vectors a head attends to in a text of `tokens` tokens."""
    if pooling == "layer_cross_attention":
        return config.num_hidden_layers
    return 1 if pooling in CONTROLS or args.get("tokens") == "last" else tokens


def head_parameters(pooling: str, args: Mapping[str, Any], config: Any) -> int:
    """Trainable parameters of a pooling; `args` complete, as `resolve_args` returns them."""
    config = config.get_text_config()
    if pooling not in TRAINABLE:
        return _others(pooling, args, config, 0)[0]
    width, inner, hidden = config.hidden_size, args["heads"] * args["head_dim"], args["ffn"] * config.hidden_size
    norm = width if args.get("norm") == "rms_norm" else 2 * width
    norms = 2 if pooling in CONTROLS else 3
    feed_forward = 3 * width * hidden + 2 * hidden + width
    rows = args["layer_weights"] if pooling == "layer_cross_attention" else 0
    return (args["latents"] + rows) * width + 4 * width * inner + feed_forward + norms * norm


def _others(pooling: str, args: Mapping[str, Any], config: Any, tokens: int) -> tuple[int, int]:
    """(parameters, FLOPs of a text) of the other poolings, as their docstrings give them; (0, 0) without weights."""
    width, layers = config.hidden_size, config.num_hidden_layers
    if pooling in OWN:
        return _own(pooling, args, width, layers, tokens)
    if pooling == "latent_attention":
        latents, inner, hidden = args["latents"], args["heads"] * args["head_dim"], args["ffn"] * width
        norms = 3 * (width if args["norm"] == "rms_norm" else 2 * width)
        parameters = latents * width + 4 * width * inner + 3 * width * hidden + 2 * hidden + width + norms
        projections = 4 * (tokens + latents) * width * inner
        return parameters, projections + 4 * tokens * latents * inner + 6 * tokens * hidden * width
    matrices = 6 * layers * width**2 + 4 * width**2
    known = {
        "attention": (width, 4 * tokens * width),
        "mean_gain": (width, 0),
        "scalar_mix": (layers, 0),
        "layer_attention": (5 * width**2 + width, matrices + 4 * layers**2 * width),
        "layer_mean_ffn": (5 * width**2 + width, matrices),
    }
    return known.get(pooling, (0, 0))


def _own(pooling: str, args: Mapping[str, Any], width: int, layers: int, tokens: int) -> tuple[int, int]:
    """(parameters, FLOPs of a text) of a user's own pooling, as torch counts them while it runs on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        head: Any = OWN[pooling](width, layers, **args)
        vectors = layers if POOLINGS_READ[pooling] == "layers" else tokens
        if vectors:
            head(torch.empty(1, vectors, width), torch.ones(1, vectors, dtype=torch.long))
    return sum(parameter.numel() for parameter in head.parameters()), counter.get_total_flops()


def default_latents(pooling: str, args: Mapping[str, Any], config: Any) -> tuple[int, bool]:
    """The largest power of two from 4 to 64 that keeps the head under 5 % of the base's FLOPs at 32 tokens.

    `args` complete but for the latents. Returns the number and whether it keeps the promise: on a base so small that
    not even 4 fit, it is (4, False). Capacity controls have as many latents as the cross_attention that they control.
    """
    budget = SHARE * base_flops(config, SHARE_TOKENS)
    priced = "layer_cross_attention" if pooling == "layer_cross_attention" else "cross_attention"
    sizes = {name: args[name] for name in ("heads", "head_dim", "ffn")}
    fitting = [
        latents
        for latents in (4, 8, 16, 32, 64)
        if head_flops(priced, {**sizes, "latents": latents}, config, SHARE_TOKENS) < budget
    ]
    return (max(fitting), True) if fitting else (4, False)


def lora_parameters(config: Any, rank: int, target: str | Sequence[str]) -> int:
    """Parameters of LoRA on the base: rank × (inputs + outputs) for every adapted linear layer.

    `target` as in PEFT: "all-linear", a list of module names, or a regular expression of the whole module name.
    """

    def adapted(name: str) -> bool:
        if target == "all-linear":
            return True
        if isinstance(target, str):
            return re.fullmatch(target, name) is not None
        return any(name == wanted or name.endswith(f".{wanted}") for wanted in target)

    linear = (
        (name, module) for name, module in skeleton(config).named_modules() if isinstance(module, nn.Linear | Conv1D)
    )
    return sum(rank * sum(module.weight.shape) for name, module in linear if adapted(name))
