"""From a recipe, a design and a seed to a plain `SentenceTransformer`: backbone -> pooling -> normalise.

sentence-transformers trains it, mteb evaluates it, PEFT adapts its backbone. Shapes: (B, T, D) tokens of the last
layer, (B, L, D) one vector per layer, (B, D) embeddings.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Normalize
from transformers import PreTrainedModel

from poolwise.errors import ModelError
from poolwise.files import cached_if_unreachable
from poolwise.model.attention import check_window, verify
from poolwise.model.backbone import Backbone
from poolwise.model.base import base_identity, base_path, cannot_load, check_positions, ensure_eos, torch_dtype
from poolwise.model.hooks import decoder_layers
from poolwise.pooling.cost import resolve_args
from poolwise.pooling.poolings import module_class
from poolwise.study.catalogue import POOLINGS, spec_of
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe

STANDARD = {name: spec.standard for name, spec in POOLINGS.items() if spec.standard}
"""Our pooling -> the mode of sentence-transformers' `Pooling` that computes the same."""


class PoolingHead(Module):
    """One of `poolwise.pooling.POOLINGS` as a sentence-transformers module: features in, `sentence_embedding` out."""

    config_keys = ["pooling", "arguments", "hidden_size", "n_layers"]  # noqa: RUF012

    def __init__(self, pooling: str, arguments: dict[str, Any], hidden_size: int, n_layers: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.arguments = arguments
        self.hidden_size = hidden_size
        self.n_layers = n_layers
        self.head = module_class(pooling)(hidden_size, n_layers, **arguments)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, D) in fp32."""
        if spec_of(self.pooling).reads == "layers":
            features["sentence_embedding"] = self.head(features["layer_embeddings"], None)
        else:
            features["sentence_embedding"] = self.head(features["token_embeddings"], features["pooling_mask"])
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the embeddings."""
        return int(getattr(self.head, "dimension", self.hidden_size))

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the configuration and the weights (none for poolings without parameters)."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> PoolingHead:  # type: ignore[override]
        """Read a folder written by `save`."""
        hub = {k: v for k, v in kwargs.items() if k in ("subfolder", "token", "cache_folder", "revision")}
        head = cls(**cls.load_config(model_name_or_path, **hub))
        return cls.load_torch_weights(model_name_or_path, model=head, **hub)


def derived_seed(recipe: Recipe, part: str, seed: int) -> int:
    """The seed of one source of variation; 0's where the recipe says that this part does not vary."""
    varied = seed if part in recipe.seed_varies else 0
    return int.from_bytes(hashlib.sha256(f"{part}:{varied}".encode()).digest()[:4], "big") & 0x7FFFFFFF


def build(
    recipe: Recipe, design: Design, seed: int, *, base_dir: Path | None = None, device: str | None = None
) -> SentenceTransformer:
    """The untrained encoder of one trial.

    Two designs built with one seed start from the same base, the same LoRA matrices and, where their shapes agree, the
    same head. LoRA and head are fp32 whatever the base's dtype. The attention mode is probed before anything is
    returned.

    Raises ModelError for a base that cannot be loaded or used, AttentionError where it ignores the attention mode.
    """
    path = base_path(recipe.base_model, base_dir)
    spec = design.spec
    factors = design.factors()
    full = recipe.lora == "full"
    try:
        with cached_if_unreachable(path):
            backbone = Backbone(
                path,
                attention=design.attention,
                collect=spec.tokens_read(factors) if spec.reads == "layers" else None,
                include_prompt=recipe.include_prompt,
                pad_by_id=bool(factors.get("pad_by_id", False)),
                special_tokens=design.special_tokens,
                template=design.template,
                max_seq_length=recipe.max_length,
                model_kwargs={
                    "dtype": torch.float32 if full else torch_dtype(recipe.dtype),
                    "attn_implementation": recipe.attn_implementation,
                },
            )
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("recipe.base_model", recipe.base_model, error) from error
    model, tokenizer = backbone.model, backbone.words
    config = model.config.get_text_config()
    check_positions(recipe, config)
    check_window(model, design.attention, recipe.max_length)
    if tokenizer.pad_token_id is None:  # any id will do: the mask decides what is padding
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if recipe.append_eos:
        ensure_eos(tokenizer)
    if spec.tokens_read(factors) == "first":  # a BOS is the same in every text
        backbone.skip_start = len([i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id])
    _adapt(backbone, recipe, seed)
    arguments = resolve_args(design.pooling, design.pooling_args, config)
    highest = spec.layers_read(arguments, config.num_hidden_layers)
    if highest < config.num_hidden_layers:  # nothing above it is read, so nothing above it can learn
        decoder_layers(backbone.model)[highest:].requires_grad_(False)
    head = PoolingHead(design.pooling, arguments, config.hidden_size, config.num_hidden_layers)
    cast(Any, head.head).reset_parameters(torch.Generator().manual_seed(derived_seed(recipe, "init", seed)))
    encoder = SentenceTransformer(modules=[backbone, head, Normalize()], device=device, similarity_fn_name="cosine")
    head.float()  # SentenceTransformer casts every module to the first one's dtype
    encoder.prompts = {"query": recipe.query_prompt, "document": recipe.document_prompt, **recipe.prompts}
    verify(backbone.model, design.attention)
    resolved = {**design.model_dump(mode="json", exclude={"preset"}), "pooling_args": arguments}
    local = Path(path).is_dir()
    encoder.poolwise = {  # type: ignore[assignment]
        "recipe": recipe.model_dump(mode="json"),
        "design": resolved,
        "seed": seed,
        "base": {
            "path": "nano" if recipe.base_model == "nano" else path,
            "local": local,
            "identity": base_identity(path, getattr(config, "_commit_hash", None)),
        },
    }
    return encoder


def _adapt(backbone: Backbone, recipe: Recipe, seed: int) -> None:
    """LoRA on the backbone alone, fp32, drawn from the recipe's init seed; or all weights, or none."""
    model: PreTrainedModel = backbone.model
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.lora == "full":
        model.requires_grad_(True)
        return
    model.requires_grad_(False)
    if not isinstance(recipe.lora, Lora):
        return
    from peft import LoraConfig, TaskType, get_peft_model

    target = recipe.lora.target
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        task_type=TaskType.FEATURE_EXTRACTION,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(derived_seed(recipe, "init", seed))
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # of PEFT's making
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"recipe.lora.target = {target!r}: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    backbone.model = cast(PreTrainedModel, adapted)
