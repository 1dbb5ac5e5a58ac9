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
from poolwise.files import cached_if_unreachable, read_any_json, write_any_json
from poolwise.model.attention import MODES, check_window, verify
from poolwise.model.backbone import Backbone
from poolwise.model.base import (
    base_identity,
    base_path,
    cannot_load,
    check_positions,
    ensure_eos,
    restored_rng,
    torch_dtype,
)
from poolwise.model.hooks import decoder_layers
from poolwise.pooling.cost import resolve_args
from poolwise.pooling.poolings import module_class
from poolwise.study.catalogue import POOLINGS, spec_of
from poolwise.study.design import Design
from poolwise.study.recipe import INSTRUCTION, Lora, Recipe

STANDARD = {name: spec.standard for name, spec in POOLINGS.items() if spec.standard}
"""Our pooling -> the mode of sentence-transformers' `Pooling` that computes the same."""


DEFAULT_PROMPT = "default"
"""Name of the prompt for texts of every task and side that have no other."""


class PoolingHead(Module):
    """A pooling as a sentence-transformers module: reads states or per-layer vectors, adds `sentence_embedding`."""

    __module__ = "poolwise"  # stored in exported folders: must stay importable wherever the class moves
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
    """The seed of one source of variation, such as `init`; that of seed 0 for a part not in `seed_varies`."""
    varied = seed if part in recipe.seed_varies else 0
    return int.from_bytes(hashlib.sha256(f"{part}:{varied}".encode()).digest()[:4], "big") & 0x7FFFFFFF


def prompts_of(recipe: Recipe) -> dict[str, str]:
    """The recipe's prompts by name, as sentence-transformers and mteb take them: `query`, `document`, task names."""
    own = {name: prompt for name, prompt in recipe.prompts.items() if INSTRUCTION not in prompt}
    return {"query": recipe.query_prompt, "document": recipe.document_prompt, **own}


def evaluation_prompts(recipe: Recipe) -> dict[str, str]:
    """The prompts of an evaluation, as `scoring.evaluate` takes them: those of `prompts_of`, or the instruction of each
    task in the recipe's template, except before the documents of a retrieval task; `recipe.prompts` come first."""
    if recipe.evaluation_prompts == "mteb":
        return {**instructions(recipe.evaluation_template), **recipe.prompts}
    return prompts_of(recipe)


def instructions(template: str) -> dict[str, str]:
    """Prompts with each task's instruction in a template, for queries alone in retrieval."""
    return {DEFAULT_PROMPT: template, **{f"{kind}-document": "" for kind in ("Retrieval", "InstructionRetrieval")}}


def build(
    recipe: Recipe, design: Design, seed: int, *, base_dir: Path | None = None, device: str | None = None
) -> SentenceTransformer:
    """The untrained encoder of one trial.

    Two designs built with one seed start from the same base, the same LoRA matrices and, where shapes agree, the same
    head. LoRA and head are fp32 whatever the base's dtype. The attention mode is probed before the encoder is returned.

    Raises ModelError for a base that cannot be loaded or used, AttentionError if it ignores the attention mode.
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
    check_window(model, design.attention, max(recipe.max_length, recipe.scored_length))
    if tokenizer.pad_token_id is None:
        # The mask decides what is padding, so any id serves, except for `pad_by_id`: there EOS as padding would leave
        # every text's end token out of the mean. Hence UNK before EOS, as in the paper's code.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if recipe.append_eos:
        ensure_eos(tokenizer)
    if (
        spec.tokens_read(factors) == "first"
    ):  # a BOS is the same in every text, so it would give all texts one embedding
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
    encoder.prompts = dict(prompts_of(recipe))
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
    """Make the recipe's part of the backbone trainable: LoRA (fp32, drawn from the init seed), all weights, or none."""
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
    with restored_rng(seed=derived_seed(recipe, "init", seed)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT calls it
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"recipe.lora.target = {target!r}: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    backbone.model = cast(PreTrainedModel, adapted)


BOOLEANS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Mode of sentence-transformers' `Pooling` -> the boolean that stood for it before its version 5.4."""


def write_old_forms(folder: Path, mode: str, width: int, length: int) -> None:
    """Rewrite the settings of a standard export in the forms that older readers require and new ones still accept.

    Text Embeddings Inference requires the booleans of the pooling and `max_seq_length`. vLLM before its pull request
    54533 finds the pooling by its old class path, takes the first setting that is true for its mode, and otherwise
    serves the last token without a warning. sentence-transformers before 5.4 knows none of the new names.
    """
    modules = _read_json(folder / "modules.json")
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    write_any_json(folder / "modules.json", modules)
    booleans = {name: key == mode for key, name in BOOLEANS.items()}
    # `include_prompt` comes last: it is true as well, and vLLM would take it for the mode
    pooling = {"word_embedding_dimension": width, **booleans, "pooling_mode": mode, "include_prompt": True}
    write_any_json(folder / modules[1]["path"] / "config.json", pooling)
    write_any_json(folder / modules[2]["path"] / "config.json", {})
    limit = length or _read_json(folder / "tokenizer_config.json").get("model_max_length")
    write_any_json(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})


def write_settings(encoder: SentenceTransformer, folder: Path) -> None:
    """Add to the settings of an export what other readers look for under other names.

    Attention: transformers reads `is_causal`; Text Embeddings Inference reads it for Qwen2 alone and
    `use_bidirectional_attention` for Qwen3, Llama, Mistral and Gemma3. Positions: `rope_theta` before transformers 5.
    Tokenizer: its class has another name since transformers 5. Widths: those trained by `recipe.matryoshka`.
    """
    backbone = cast(Backbone, encoder[0])
    config = _read_json(folder / "config.json")
    if backbone.attention in MODES and _takes_flag(backbone.model.config):
        config["is_causal"] = backbone.attention == "causal"
        config["use_bidirectional_attention"] = backbone.attention == "bidirectional"
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    write_any_json(folder / "config.json", config)
    tokenizer = _read_json(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_any_json(folder / "tokenizer_config.json", tokenizer)
    if widths := trained_widths(encoder):
        path = folder / "config_sentence_transformers.json"
        write_any_json(path, {**_read_json(path), "matryoshka_dims": list(widths)})


def _takes_flag(config: Any) -> bool:
    """Whether `use_bidirectional_attention` changes nothing for transformers beyond what `is_causal` does.

    Where the configuration declares it, it may take words (Gemma 4), and it narrows sliding windows (Gemma 3).
    """
    declared = str(getattr(type(config), "__annotations__", {}).get("use_bidirectional_attention", "bool"))
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    native = hasattr(type(config), "use_bidirectional_attention")
    return "bool" in declared and not (native and windowed)


def trained_widths(encoder: SentenceTransformer) -> tuple[int, ...]:
    """The widths below the full one at which a prefix of an embedding was trained to be usable, ascending."""
    recipe = getattr(encoder, "poolwise", {"recipe": {}})["recipe"]
    return tuple(sorted(recipe.get("matryoshka", ()) or getattr(encoder, "matryoshka_dims", ())))


def _read_json(path: Path) -> Any:
    return read_any_json(path)
