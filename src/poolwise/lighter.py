"""An encoder as it is used only to encode: the same vectors, up to rounding, by fewer or cheaper products."""

from __future__ import annotations

import copy
import itertools
from typing import Any, cast

import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer

from poolwise.decoder.backbone import Backbone


def lighter(encoder: SentenceTransformer) -> SentenceTransformer:
    """The encoder with LoRA merged into a copy of an fp32 base; beside a base in half precision the head's matrices in
    that precision too (norms and sums stay fp32). Itself where neither applies."""
    backbone, head = cast(Backbone, encoder[0]), encoder[1]
    dtype = next(backbone.model.parameters()).dtype
    if dtype in (torch.float32, torch.float64):
        if not isinstance(backbone.model, PeftModel):
            return encoder
        with backbone.lock:
            merged = copy.deepcopy(encoder)
        own = cast(Backbone, merged[0])
        own.model = cast(Any, own.model).merge_and_unload()
        return merged.eval()
    if not any(True for _ in head.parameters()):
        return encoder
    half = copy.copy(encoder)
    half._modules = {
        **encoder._modules,
        next(itertools.islice(encoder._modules, 1, None)): copy.deepcopy(head).to(dtype),
    }
    return half
