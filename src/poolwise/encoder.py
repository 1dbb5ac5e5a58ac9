"""From a recipe, a design and a seed to a plain `SentenceTransformer`: backbone -> pooling -> normalise.

sentence-transformers trains it, mteb evaluates it, PEFT adapts its backbone. Shapes: (B, T, D) tokens of the last
layer, (B, L, D) one vector per layer, (B, D) embeddings.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
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
from poolwise.inputs import pooled_from, write
from poolwise.layers import LayerCollector, decoder_layers
from poolwise.layouts import has_dropout
from poolwise.masks import attending
from poolwise.packing import Rows, forward_grouped, forward_packed, packed_attention_on
from poolwise.pooling import module_class, resolve_args
from poolwise.study import Design, Lora, Recipe

TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class Backbone(Transformer):
    """A decoder whose attention is declared, probed and stored: token states, and one vector per layer if asked.

    `attention`: a mode of `poolwise.designs.ATTENTIONS`. `collect`: None, `last` or `mean`; what stands for each
    layer's tokens. `include_prompt`: False leaves the prompt out of pooling, `special_tokens`: False leaves out
    BOS, EOS and the like, `skip_start` so many tokens at the start (BOS). `pad_by_id`: the padding token's id decides
    what is pooled, as in the paper's code, instead of the mask. `template`: what texts are written into, see `inputs`.
    Position ids always come from the mask, so the side of the padding does not matter.
    """

    config_keys = [  # noqa: RUF012 (as in the parent)
        *Transformer.config_keys,
        "attention",
        "collect",
        "include_prompt",
        "pad_by_id",
        "skip_start",
        "special_tokens",
        "template",
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
        special_tokens: bool = True,
        template: str = "plain",
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
        self.special_tokens = special_tokens
        self.template = template
        self.model.config.use_cache = False
        self.takes_position_ids = takes_position_ids(self.model)
        self.layout, self.once = "padded", False  # see `in_layout`
        set_attention(self.model, attention)
        self.collector = LayerCollector(self.model, reduce=collect) if collect else None

    @property
    def words(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which every text model has."""
        return cast(PreTrainedTokenizerBase, self.tokenizer)

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Texts to `input_ids` and `attention_mask` (B, T), written into the template after their prompt."""
        if self.template == "plain":
            return super().preprocess(inputs, prompt=prompt, **kwargs)
        limit = int(self.max_seq_length or self.words.model_max_length)
        rows, before = write(self.template, [str(text) for text in inputs], prompt or "", self.words, limit)
        batch = self.words.pad({"input_ids": rows}, return_tensors="pt")
        return {**batch, "modality": "text", "prompt_length": before}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `token_embeddings` (B, T, D), `pooling_mask` (B, T) and, if collected, `layer_embeddings` (B, L, D)."""
        mask = features["attention_mask"]
        pooled = self._pooling_mask(features)
        prefix = self._prompt_tokens(features).expand(len(mask), 1)
        if self.layout == "packed":
            rows = Rows(features["input_ids"], mask, pooled)
            states, vectors = forward_packed(self.model, self.collector, rows, once=self.once)
        elif self.layout == "grouped":
            rows = Rows(features["input_ids"], mask, pooled)
            states, vectors = forward_grouped(self._forward_padded, rows, prefix)
        else:
            states, vectors = self._forward_padded(features["input_ids"], mask, pooled, prefix)
        if vectors is not None:
            features["layer_embeddings"] = vectors
        features["token_embeddings"] = states
        features["pooling_mask"] = pooled
        return features

    def _forward_padded(
        self, ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor, prefix: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States (B, T, D) and, if collected, vectors (B, L, D) of one padded batch.

        ids, mask, pooled: (B, T). prefix (B, 1): how many tokens of each text are its prompt.
        """
        inputs = {"input_ids": ids, "attention_mask": mask, "return_dict": True}
        if self.takes_position_ids:
            inputs["position_ids"] = position_ids(mask)
        if self.layout == "right" and (self.attention == "causal" or bool(mask.all())):
            inputs["attention_mask"] = None  # what stands on the right is seen by no real token
            if self.takes_position_ids:  # gaps in them would be taken for several texts in a row
                inputs["position_ids"] = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        if self.collector is None:
            with attending(self.model, mask, prefix):
                return self.model(**inputs).last_hidden_state, None
        with attending(self.model, mask, prefix), self.collector.collect(mask, pooled):
            states = self.model(**inputs).last_hidden_state
            return states, self.collector.vectors(states)

    @contextlib.contextmanager
    def in_layout(self, layout: str) -> Iterator[None]:
        """Inside, forwards run in one of the layouts of `poolwise.packing`; or in layout `right`, for batches that come
        padded on the right and need no mask where attention is causal."""
        with packed_attention_on(self.model) if layout == "packed" else contextlib.nullcontext():
            self.layout, self.once = layout, not has_dropout(self.model)
            try:
                yield
            finally:
                self.layout = "padded"

    def _pooling_mask(self, features: dict[str, Any]) -> torch.Tensor:
        """Which tokens are pooled (B, T): the attended ones, less the prompt's where the recipe excludes it, less what
        template and design leave out."""
        mask = features["attention_mask"]
        if self.pad_by_id:  # the paper's code: whatever has the padding token's id counts as padding
            mask = (features["input_ids"] != self.words.pad_token_id).to(mask.dtype)
        before = self._prompt_tokens(features)
        start = (before * (not self.include_prompt)).clamp(min=self.skip_start)
        if self.template != "plain":
            start = start.maximum(pooled_from(self.template, mask.sum(1, keepdim=True), before, self.words))
        if self.special_tokens and not start.any():
            return mask
        content = mask * (mask.cumsum(1) > start)
        if not self.special_tokens:
            special = torch.tensor(self.words.all_special_ids, device=mask.device)
            content = content * ~torch.isin(features["input_ids"], special)
        # a text that the prompt fills to the limit keeps its last token: an embedding of nothing helps nobody
        return torch.where(content.any(1, keepdim=True), content, mask)

    def _prompt_tokens(self, features: dict[str, Any]) -> torch.Tensor:
        """How many tokens stand before the text: (1, 1), or (B, 1) where texts of several prompts come together."""
        length = features.get("prompt_length")
        if length is None:
            length = 0 if self.template == "plain" else write(self.template, (), "", self.words, 10**6)[1]
        return torch.as_tensor(length, device=features["attention_mask"].device).reshape(-1, 1)

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
        self.head = module_class(pooling)(hidden_size, n_layers, **arguments)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, D) in fp32."""
        if POOLINGS_READ[self.pooling] == "layers":
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
    reads_layers = POOLINGS_READ[design.pooling] == "layers"
    factors = design.factors()
    full = recipe.lora == "full"
    try:
        with cached_if_unreachable(path):
            backbone = Backbone(
                path,
                attention=design.attention,
                collect=factors.get("tokens", "last") if reads_layers else None,
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
    if design.pooling == "first_token":  # a BOS is the same in every text
        backbone.skip_start = len([i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id])
    _adapt(backbone, recipe, seed)
    arguments = resolve_args(design.pooling, design.pooling_args, config)
    if design.pooling == "single_layer":  # nothing above it is read, so nothing above it can learn
        decoder_layers(backbone.model)[arguments["layer"] :].requires_grad_(False)
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
