"""From a recipe, a design and a seed to a plain `SentenceTransformer`: backbone -> pooling -> normalise.

sentence-transformers trains it, mteb evaluates it, PEFT adapts its backbone. Shapes: (B, T, D) tokens of the last
layer, (B, L, D) one vector per layer, (B, D) embeddings.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Normalize, Transformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poolwise.attention import check_window, position_ids, set_attention, takes_position_ids, verify
from poolwise.base import base_identity, base_path, cannot_load, check_positions, ensure_eos, torch_dtype
from poolwise.designs import POOLINGS_READ
from poolwise.errors import ModelError
from poolwise.hub import cached_if_unreachable
from poolwise.layers import LayerCollector
from poolwise.pooling import POOLINGS, resolve_args
from poolwise.study import Design, Lora, Recipe

TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class Backbone(Transformer):
    """A decoder whose attention is declared, probed and stored: token states, and one vector per layer if asked.

    `attention`: `causal` or `bidirectional`. `collect`: None, `last` or `mean`; what stands for each layer's tokens.
    `include_prompt`: False leaves the prompt's tokens out of pooling, `skip_start` so many tokens at the start (BOS).
    `pad_by_id`: the padding token's id decides what is pooled, as in the paper's code, instead of the mask. Position
    ids always come from the mask, so the side of the padding does not matter.
    """

    config_keys = [  # noqa: RUF012 (as in the parent)
        *Transformer.config_keys,
        "attention",
        "collect",
        "include_prompt",
        "pad_by_id",
        "skip_start",
    ]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        attention: str = "causal",
        collect: str | None = None,
        include_prompt: bool = True,
        pad_by_id: bool = False,
        skip_start: int = 0,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("modality_config", TEXT)
        kwargs.setdefault("module_output_name", "token_embeddings")
        kwargs["unpad_inputs"] = False
        super().__init__(model_name_or_path, **kwargs)
        self.attention = attention
        self.collect = collect
        self.include_prompt = include_prompt
        self.pad_by_id = pad_by_id
        self.skip_start = skip_start
        self.model.config.use_cache = False
        self.takes_position_ids = takes_position_ids(self.model)
        set_attention(self.model, attention)
        self.collector = LayerCollector(self.model, reduce=collect) if collect else None

    @property
    def words(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which every text model has."""
        return cast(PreTrainedTokenizerBase, self.tokenizer)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `token_embeddings` (B, T, D), `pooling_mask` (B, T) and, if collected, `layer_embeddings` (B, L, D)."""
        mask = features["attention_mask"]
        pooled = self._pooling_mask(features)
        inputs = {
            "input_ids": features["input_ids"],
            "attention_mask": mask,
            "return_dict": True,
        }
        if self.takes_position_ids:
            inputs["position_ids"] = position_ids(mask)
        if self.collector is None:
            states = self.model(**inputs).last_hidden_state
        else:
            with self.collector.collect(mask, pooled):
                states = self.model(**inputs).last_hidden_state
                features["layer_embeddings"] = self.collector.vectors(states)
        features["token_embeddings"] = states
        features["pooling_mask"] = pooled
        return features

    def _pooling_mask(self, features: dict[str, Any]) -> torch.Tensor:
        """Which tokens are pooled (B, T): the attended ones, less the prompt's where the recipe excludes it."""
        mask = features["attention_mask"]
        if self.pad_by_id:  # the paper's code: whatever has the padding token's id counts as padding
            mask = (features["input_ids"] != self.words.pad_token_id).to(mask.dtype)
        length = None if self.include_prompt else features.get("prompt_length")
        length = int(length.reshape(-1)[0]) if isinstance(length, torch.Tensor) else int(length or 0)
        length = max(length, self.skip_start)
        if not length:
            return mask
        content = mask * (mask.cumsum(1) > length)
        # a text that the prompt fills to the limit keeps its last token: an embedding of nothing helps nobody
        return torch.where(content.any(1, keepdim=True), content, mask)

    def _get_prompt_length(self, prompt: str, **kwargs: Any) -> int | None:
        """Tokens that belong to the prompt whatever follows it (a trailing space may merge with the next word)."""
        if prompt not in self._prompt_length_mapping:
            ids = [self.words(prompt + text)["input_ids"] for text in ("a", "The", "zebra", "7", '"', "(")]
            shared = 0
            while all(len(row) > shared and row[shared] == ids[0][shared] for row in ids):
                shared += 1
            self._prompt_length_mapping[prompt] = shared
        return self._prompt_length_mapping[prompt]


class PoolingHead(Module):
    """One of `poolwise.pooling.POOLINGS` as a sentence-transformers module: features in, `sentence_embedding` out."""

    config_keys = ["pooling", "arguments", "hidden_size", "n_layers"]  # noqa: RUF012

    def __init__(self, pooling: str, arguments: dict[str, Any], hidden_size: int, n_layers: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.arguments = arguments
        self.hidden_size = hidden_size
        self.n_layers = n_layers
        self.head = POOLINGS[pooling](hidden_size, n_layers, **arguments)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, D) in fp32."""
        if POOLINGS_READ[self.pooling] == "layers":
            features["sentence_embedding"] = self.head(features["layer_embeddings"], None)
        else:
            features["sentence_embedding"] = self.head(features["token_embeddings"], features["pooling_mask"])
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the embeddings."""
        return self.hidden_size

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
    reads_layers = POOLINGS_READ[design.pooling] == "layers"
    factors = design.factors()
    full = recipe.lora == "full"
    try:
        with cached_if_unreachable(path):
            backbone = Backbone(
                path,
                attention=design.attention,
                collect=factors["tokens"] if reads_layers else None,
                include_prompt=recipe.include_prompt,
                pad_by_id=bool(factors.get("pad_by_id", False)),
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
    if design.pooling == "first_token":  # a BOS is the same in every text
        backbone.skip_start = len([i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id])
    _adapt(backbone, recipe, seed)
    arguments = resolve_args(design.pooling, design.pooling_args, config)
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
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(recipe, "init", seed))
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"recipe.lora.target = {target!r}: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    backbone.model = cast(PreTrainedModel, adapted)
