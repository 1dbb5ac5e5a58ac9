"""The models that the paper's authors released: an adapter of the base, and beside it the weights of a head.

A release is a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), as PEFT writes them, and
for m2 to m5 `attn_pool.pt`, as the published trainers write it: in the folder, or beside it with the folder's name in
front. Neither says which design it is, so it must be named; shapes tell only some of them apart.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from poolwise.errors import CheckpointError, suggest
from poolwise.files import read_any_json
from poolwise.model.backbone import Backbone
from poolwise.model.checkpoint import load_adapter
from poolwise.model.encoder import PoolingHead, build
from poolwise.pooling.heads import CrossAttentionHead
from poolwise.pooling.paper import ADAPTER, HEAD, head_file, load_paper_head, read_weights
from poolwise.study.catalogue import PRESETS
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe
from poolwise.study.starters import paper_study

RELEASED = {"m1": "m1", "m2": "m2-paper", "m3": "m3-paper", "m4": "m4-paper", "m5": "m5-paper"}
"""A released design -> our preset of it."""
PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}
"""What makes an adapter plain LoRA, the only kind that is read."""


def load_release(
    folder: str | Path, base: str, design: str, *, heads: int = 32, dtype: str = "auto", device: str | None = None
) -> SentenceTransformer:
    """The encoder in a folder that the paper's authors released. Its recipe is the paper's, also for an evaluation.

    Args:
        folder: with the adapter, and the head of m2 to m5.
        base: the base model it was trained on: a folder or a Hub name.
        design: `m1` to `m5`.
        heads: attention heads of the head, which its weights do not tell.
        dtype: of the base, as in a recipe.

    Raises CheckpointError if the folder is no such release, or its shapes contradict the design or the base: m2 and m4
    have a head without layer weights, m3 and m5 one with them, m1 none. (m2 and m4 differ in attention alone, as m3 and
    m5 do, which no file of a release records.) ModelError if the base cannot be loaded.
    """
    folder = Path(folder)
    if design not in RELEASED:
        hint = suggest(design, RELEASED)
        raise CheckpointError(f"release {design!r} is unknown; allowed: {', '.join(RELEASED)}{hint}")
    if not (folder / ADAPTER).is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER} in it; give the folder of a release that is on this machine")
    pooling = _pooling(folder, design, heads)
    recipe = _recipe(folder, base, dtype)
    preset = PRESETS[RELEASED[design]]
    sizes = _sizes(pooling) if pooling else {}
    whole = {**preset, "name": RELEASED[design], "pooling_args": {**preset["pooling_args"], **sizes}}
    encoder = build(recipe, Design.model_validate(whole), 0, device=device)
    backbone, head = cast(Backbone, encoder[0]), cast(PoolingHead, encoder[1])
    if pooling:
        if pooling.latents.shape[1] != head.hidden_size:
            raise CheckpointError(
                f"{folder}: a head for states of width {pooling.latents.shape[1]}, but {base} has {head.hidden_size}; "
                "name the base model it was trained on"
            )
        head.head.load_state_dict(pooling.state_dict())
    load_adapter(backbone.model, _adapter(folder), folder)
    return encoder.eval().requires_grad_(False)


def _pooling(folder: Path, design: str, heads: int) -> CrossAttentionHead | None:
    """The released head, checked against the design; None for m1."""
    path = head_file(folder)
    if design == "m1":
        if path:
            raise CheckpointError(f"{path} is the head of m2, m3, m4 or m5; m1 has none: name the right design")
        return None
    if path is None:
        raise CheckpointError(f"{folder}: no {HEAD}, which {design} needs; only m1 has no head")
    pooling = load_paper_head(path, heads).pooling
    over_layers = pooling.layer_weights is not None
    if over_layers != (design in ("m3", "m5")):
        fits = ("m2", "m4") if design in ("m3", "m5") else ("m3", "m5")
        has = "has" if over_layers else "has no"
        raise CheckpointError(f"{path} {has} layer weights: it is a head of {' or '.join(fits)}, not of {design}")
    return pooling


def _sizes(pooling: CrossAttentionHead) -> dict[str, Any]:
    """The pooling arguments that a head's shapes give."""
    latents, width = pooling.latents.shape
    sizes = {
        "latents": latents,
        "heads": pooling.heads,
        "head_dim": pooling.to_q.out_features // pooling.heads,
        "ffn": pooling.ffn_out.in_features // width,
    }
    return sizes if pooling.layer_weights is None else {**sizes, "layer_weights": len(pooling.layer_weights)}


def _recipe(folder: Path, base: str, dtype: str) -> Recipe:
    """The paper's recipe with the base and the adapter's sizes."""
    try:
        config = read_any_json(folder / ADAPTER)
        lora = Lora(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=float(config.get("lora_dropout", 0.0)),
            target=config["target_modules"]
            if isinstance(config["target_modules"], str)
            else tuple(sorted(config["target_modules"])),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / ADAPTER} is not the configuration of a LoRA adapter ({error})") from None
    other = [name for name, value in PLAIN.items() if config.get(name, value) not in (value, None)]
    if other:
        raise CheckpointError(f"{folder / ADAPTER}: {other[0]} = {config[other[0]]!r}; only plain LoRA can be read")
    raw = tomllib.loads(paper_study("paper-mistral-7b"))["recipe"]
    recipe = Recipe.model_validate({**raw, "base_model": base, "dtype": dtype, "lora": lora, "max_length": 512})
    return recipe.model_copy(update={"gradient_checkpointing": False})


def _adapter(folder: Path) -> dict[str, Tensor]:
    """The adapter's weights."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return dict(read_weights(folder / "adapter_model.bin"))
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
