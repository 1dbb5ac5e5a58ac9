"""Sizes and costs of a design from shapes alone: a pooling's arguments, parameters and FLOPs on a base model.

Nothing is loaded: the base is built from its config on the meta device. Conventions, the usual ones of scaling-law
papers:

- one multiply-add is 2 FLOPs; matrix products only, no norms, softmax, activations or look-ups (embeddings);
- per text of `tokens` tokens, forward; attention scores and their sum count all tokens × tokens pairs under every
  attention mode, without savings by causal masks or sliding windows;
- the base is the decoder without a language-model head, which an embedder never runs;
- `head_flops` counts a head as its formula is written, each text on its own, `folded_flops` as it runs at inference.

Throughout, `args` are a pooling's complete arguments, as `resolve_args` returns them.
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

from poolwise.errors import ModelError, StudyError
from poolwise.pooling.folding import Shape
from poolwise.pooling.heads import CrossAttentionHead, FeedForwardHead
from poolwise.pooling.poolings import module_class
from poolwise.study.catalogue import indivisible, read_tokens, spec_of
from poolwise.study.pooling_spec import AUTO, Cost
from poolwise.study.recipe import Lora, Recipe
from poolwise.study.study import Study
from poolwise.verdicts.costs import PRICED_TOKENS

SHARE = 0.05
"""A head with automatic latents takes less than this share of the base's FLOPs …"""
SHARE_TOKENS = 32
"""… on texts of this many tokens."""
LATENTS = (4, 8, 16, 32, 64)
"""The automatic numbers of latents."""
LENGTHS = (32, PRICED_TOKENS, 512)
"""Text lengths in tokens at which FLOPs are given."""


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


def head_parameters(pooling: str, args: Mapping[str, Any], config: Any) -> int:
    """Trainable parameters of a pooling; 0 for poolings without weights."""
    return head_cost(pooling, args, config, 0).parameters


def head_flops(pooling: str, args: Mapping[str, Any], config: Any, tokens: int) -> int:
    """FLOPs of a pooling for one text; 0 for poolings without weights."""
    return head_cost(pooling, args, config, tokens).flops


def head_cost(pooling: str, args: Mapping[str, Any], config: Any, tokens: int) -> Cost:
    """Parameters and FLOPs as declared; those of a user's pooling are counted while it runs on the meta device."""
    spec, config = spec_of(pooling), config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    if spec.cost:
        return spec.cost(args, width, layers, tokens)
    head = _on_meta(pooling, args, config)
    vectors = layers if spec.reads == "layers" else tokens
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        if vectors:
            head(torch.empty(1, vectors, width), torch.ones(1, vectors, dtype=torch.long))
    return Cost(sum(parameter.numel() for parameter in head.parameters()), counter.get_total_flops())


def training_flops(base: int, head: int, recipe: Recipe, depth: float) -> int:
    """FLOPs of training on one text, from the FLOPs of its forward pass through `base` and `head`.

    A backward pass costs about two forward passes (Kaplan et al. 2020, arXiv 2001.08361): one for the gradients of the
    activations, one for those of the weights. The head takes 3 forward passes in total, a base that is tuned whole
    likewise, a base under LoRA 2 (the adapters themselves are small), and a frozen base 1, as nothing below the head
    needs gradients. Recomputation is added: one forward pass of a trained base for gradient checkpointing, one of base
    and head for `mini_batch_size` (GradCache embeds each batch once without gradients).

    depth: the share of the base's layers that is trained; gradients stop at the layer that the pooling reads. States of
    a frozen base that were stored by another trial still count here.
    """
    backward = 0 if recipe.lora is False else 1 + (recipe.lora == "full") + recipe.gradient_checkpointing
    again = recipe.mini_batch_size > 0
    return round(base * (1 + again + depth * backward)) + head * (3 + again)


def folded_flops(pooling: str, args: Mapping[str, Any], config: Any, tokens: int) -> int:
    """FLOPs of a pooling for one text at inference, when it may run with folded weights; see `pooling.folding`."""
    config = config.get_text_config()
    head = _on_meta(pooling, args, config)
    if not isinstance(head, CrossAttentionHead | FeedForwardHead):
        return head_flops(pooling, args, config, tokens)
    return Shape.of(head).flops(config.num_hidden_layers if head.reads == "layers" else tokens)


def _on_meta(pooling: str, args: Mapping[str, Any], config: Any) -> Any:
    """The pooling's module on the meta device."""
    with torch.device("meta"):
        return module_class(pooling)(config.hidden_size, config.num_hidden_layers, **args)


def resolve_args(pooling: str, args: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """All arguments of a pooling as plain JSON values, the automatic ones for the base model of `config`:

    - heads: as many as the base has, or the next smaller number that divides the hidden size;
    - head_dim: hidden size / heads, so that heads × head_dim is the hidden size;
    - latents: see `default_latents`;
    - the others as declared in the catalogue.

    Raises `StudyError` for an unknown pooling or argument and for values that do not fit the base model.
    """
    spec, config = spec_of(pooling), config.get_text_config()
    if problems := spec.problems(args):
        raise StudyError(problems)
    resolved = spec.complete(args)
    if spec.code:
        return resolved
    width, layers = config.hidden_size, config.num_hidden_layers
    for name, arg in spec.args.items():
        if resolved[name] == AUTO and arg.auto:
            resolved[name] = arg.auto(width, layers)
        if arg.misfit and (misfit := arg.misfit(resolved[name], width, layers)):
            problems.append(f"pooling_args.{name} = {resolved[name]}: {misfit}")
    if problems:
        raise StudyError(problems)
    if "head_dim" in resolved:
        resolved["heads"], resolved["head_dim"] = _head_sizes(resolved["heads"], resolved["head_dim"], config)
    if resolved.get("latents") == AUTO:
        resolved["latents"] = default_latents(pooling, resolved, config)
    return resolved


def default_latents(pooling: str, args: Mapping[str, Any], config: Any) -> int:
    """The largest of `LATENTS` that keeps the head under 5 % of the base's FLOPs at 32 tokens; 4 if even that does not.

    `args` complete but for the latents. A capacity control has as many as the pooling that it is declared to control.
    """
    budget = SHARE * base_flops(config, SHARE_TOKENS)
    priced = spec_of(pooling).sized_as or pooling
    # over all tokens, so that `tokens` changes what latents attend to and not how many there are
    sizes = {**args, "tokens": "all"}
    fitting = [
        latents
        for latents in LATENTS
        if head_flops(priced, {**sizes, "latents": latents}, config, SHARE_TOKENS) < budget
    ]
    return max(fitting, default=LATENTS[0])


def _head_sizes(heads: int | str, head_dim: int | str, config: Any) -> tuple[int, int]:
    """`heads` and `head_dim`; automatic ones such that their product is the hidden size."""
    width = config.hidden_size
    if heads == AUTO and head_dim == AUTO:
        heads = max(n for n in range(1, config.num_attention_heads + 1) if width % n == 0)
    if isinstance(heads, int) and isinstance(head_dim, int):
        return heads, head_dim
    name, other, given = ("heads", "head_dim", heads) if isinstance(heads, int) else ("head_dim", "heads", head_dim)
    assert isinstance(given, int)
    if misfit := indivisible(name, given, width, f"give {other} too, or "):
        raise StudyError([f"pooling_args.{name} = {given}: {misfit}"])
    return (given, width // given) if name == "heads" else (width // given, given)


def base_costs(study: Study, config: Any) -> list[dict[str, Any]]:
    """One row per design on one base model, whose transformers configuration is `config`.

    A row holds the parameters of base and head (`base_parameters`, `head_parameters`) and those that are trained
    (`tuned_base_parameters`, `trainable_parameters`), the forward FLOPs of one text at each of `LENGTHS`
    (`base_flops_32`, `head_flops_32`, …; a multiply-add counts as two), and the two prices by which designs are
    compared: `encode_flops` of one text and `training_flops` of one whole training, both at `PRICED_TOKENS` tokens per
    text.
    """
    recipe, layers = study.recipe, config.get_text_config().num_hidden_layers
    base = base_parameters(config)
    tuned = base if recipe.lora == "full" else 0
    if isinstance(recipe.lora, Lora):
        tuned = lora_parameters(config, recipe.lora.rank, recipe.lora.target)
    texts = recipe.steps * recipe.batch_size * (2 + recipe.negatives)
    rows = []
    for design in study.designs:
        arguments = resolve_args(design.pooling, design.pooling_args, config)
        read = design.spec.layers_read(arguments, layers)  # the layers above are not trained
        row: dict[str, Any] = {
            "design": design.name,
            "base": recipe.base_model,
            "attention": design.attention,
            "pooling": design.pooling,
            "pooling_args": arguments,
            "base_parameters": base,
            "tuned_base_parameters": tuned * read // layers,
            "head_parameters": head_parameters(design.pooling, arguments, config),
        }
        row["trainable_parameters"] = row["tuned_base_parameters"] + row["head_parameters"]
        for tokens in LENGTHS:
            row[f"base_flops_{tokens}"] = base_flops(config, read_tokens(design.template, tokens))
            row[f"head_flops_{tokens}"] = head_flops(design.pooling, arguments, config, tokens)
        forward = row[f"base_flops_{PRICED_TOKENS}"], row[f"head_flops_{PRICED_TOKENS}"]
        row["encode_flops"] = sum(forward)
        row["training_flops"] = texts * training_flops(*forward, recipe, read / layers)
        rows.append(row)
    return rows
