"""A trained encoder as a folder of its own: LoRA merged into the base, the attention mode written down, reloaded and
compared before it is called done.

Designs whose pooling sentence-transformers has (last token, mean, weighted mean; no prompt excluded) become a plain
sentence-transformers folder that anything can load. The others keep their own modules: `poolwise.load(folder)` reads
them.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from poolwise.adopted import STANDARD
from poolwise.attention import MODES, verify
from poolwise.decoder.backbone import TEXT, Backbone
from poolwise.encoder import PoolingHead
from poolwise.errors import CheckpointError, StudyError

PROBE_TEXTS = [
    "A short text.",
    "The second text is longer than the first, so that a batch of the two has padding in it.",
    "Whether attention looks back or both ways shows at the end of a sentence.",
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def export(encoder: SentenceTransformer, folder: str | Path) -> Path:
    """Write `encoder` to `folder`, merged; the folder appears only after it was reloaded and gave the same embeddings.

    Raises CheckpointError where the folder exists and is not empty, or where the reloaded embeddings differ.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists and is not empty; give another folder or delete it")
    expected = encoder.encode(PROBE_TEXTS)
    backbone, head = cast(Backbone, encoder[0]), cast(PoolingHead, encoder[1])
    dtype = next(backbone.model.parameters()).dtype
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        merged = _merged(encoder)
        if _is_standard(backbone, head):
            _save_standard(merged, temporary)
        else:
            merged.save(str(temporary), create_model_card=False)
        found = load_exported(temporary, device=str(encoder.device)).encode(PROBE_TEXTS)
        difference = float(np.abs(expected - found).max())
        if not difference <= TOLERANCE.get(dtype, 1e-3):
            raise CheckpointError(f"the exported model's embeddings differ by {difference:.2g}; nothing was written")
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_exported(folder: Path, device: str | None = None) -> SentenceTransformer:
    """The encoder in an exported folder; its attention mode is probed."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from None
    if modules[0]["type"] != f"{Backbone.__module__}.{Backbone.__qualname__}":
        return SentenceTransformer(str(folder), device=device)
    backbone = Backbone.load(str(folder))
    try:
        head = PoolingHead.load(str(folder), subfolder=modules[1]["path"])
    except StudyError as error:  # a pooling of the user's own
        raise CheckpointError(f"{folder}: {'; '.join(error.problems)}") from None
    encoder = SentenceTransformer(
        modules=[backbone, head, Normalize()],
        device=device,
        prompts=settings.get("prompts"),
        similarity_fn_name="cosine",
    )
    head.float()
    verify(backbone.model, backbone.attention)
    return encoder.eval()


def _is_standard(backbone: Backbone, head: PoolingHead) -> bool:
    """Whether sentence-transformers' own modules compute the same."""
    plain = backbone.attention in MODES and backbone.template == "plain" and backbone.special_tokens
    return plain and head.pooling in STANDARD and backbone.include_prompt and not backbone.pad_by_id


def _merged(encoder: SentenceTransformer) -> SentenceTransformer:
    """A copy of the encoder with LoRA merged into the base's weights."""
    encoder = copy.deepcopy(encoder)
    backbone = cast(Backbone, encoder[0])
    if isinstance(backbone.model, PeftModel):
        backbone.model = cast(Any, backbone.model).merge_and_unload()
    backbone.words.padding_side = "right"  # models without rotary positions count them from the left
    return encoder


def _save_standard(encoder: SentenceTransformer, folder: Path) -> None:
    backbone, head = cast(Backbone, encoder[0]), cast(PoolingHead, encoder[1])
    with tempfile.TemporaryDirectory() as scratch:
        backbone.model.save_pretrained(scratch)
        backbone.words.save_pretrained(scratch)
        plain = Transformer(
            scratch,
            max_seq_length=backbone.max_seq_length,
            modality_config=TEXT,
            module_output_name="token_embeddings",
        )
        pooling = Pooling(head.hidden_size, pooling_mode=STANDARD[head.pooling])
        standard = SentenceTransformer(
            modules=[plain, pooling, Normalize()],
            prompts=cast(dict[str, str], encoder.prompts),
            similarity_fn_name="cosine",
        )
        standard.save(str(folder), create_model_card=False)
