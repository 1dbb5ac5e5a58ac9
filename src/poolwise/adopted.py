"""A sentence-transformers model that poolwise did not build, as an encoder of poolwise around the same weights.

What `export` writes for plain poolings, and most decoders on the Hub: Transformer, Pooling, perhaps Normalize. Weights,
tokenizer, preprocessing, prompts, similarity and length limit stay the model's own; only forward and pooling run in
poolwise's modules. Nothing is believed here either: attention is measured, and a model is adopted only where the
embeddings of a few texts are those of its own `encode`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers import PreTrainedModel

from poolwise.attention import get_attention, verify
from poolwise.decoder.backbone import TEXT, Backbone
from poolwise.encoder import PoolingHead
from poolwise.errors import ModelError

STANDARD = {"last_token": "lasttoken", "mean": "mean", "weighted_mean": "weightedmean", "max": "max"}
"""Our pooling -> the mode of sentence-transformers' own."""
AGREEMENT = {
    torch.float32: (1e-5, 1e-8),
    torch.float64: (1e-5, 1e-8),
    torch.bfloat16: (2e-2, 1e-3),
    torch.float16: (5e-3, 2e-5),
}
"""How far rounding may move a number of a unit-length embedding, and the whole of it by 1 - cosine. What shortcuts and
batches of other shapes moved the built-in base by, at most: 2e-7 and 3e-14 in fp32, 5e-3 and 4e-5 in bf16, 5e-4 and
5e-7 in fp16; deeper and wider bases round more."""
PROBE_TEXTS = [
    "A short text.",
    "The second text is longer than the first, so that a batch of the two has padding in it.",
    "Ünïcode, numbers 0123456789 and (brackets)",
    "a",
]
PROBE_PROMPT = "Instruct: find an answer.\nQuery: "


def adopted(model: SentenceTransformer) -> SentenceTransformer:
    """`model` with a `Backbone` and a `PoolingHead` in place of its own modules; the weights are shared, nothing of
    `model` is changed. Raises ModelError for a model that has something else, AttentionError where its attention is
    neither causal nor declared and measured as bidirectional."""
    if unlike := _unlike(model):
        raise ModelError(unlike)
    transformer, pooling, *rest = cast("list[Any]", list(model))
    config = transformer.model.config.get_text_config()
    attention = get_attention(transformer.model)
    verify(transformer.model, attention)
    ours = next(name for name, mode in STANDARD.items() if mode == pooling.pooling_mode)
    head = PoolingHead(ours, {}, pooling.embedding_dimension, config.num_hidden_layers)
    found = copy.copy(model)
    modules = (Backbone.of(transformer, attention), head, *rest)
    found._modules = dict(zip(model._modules, modules, strict=True))
    return found


def _unlike(model: SentenceTransformer) -> str:
    """What `model` has that our modules have not; empty where there is nothing."""
    kinds = [type(module) for module in model]
    plain = [Transformer, Pooling]
    if type(model) is not SentenceTransformer or kinds not in (plain, [*plain, Normalize]):
        return f"{type(model).__name__} of {', '.join(kind.__name__ for kind in kinds)}"
    for module in model:
        if replaced := [name for name in vars(module) if callable(getattr(type(module), name, None))]:
            return f"{type(module).__name__}.{replaced[0]} was replaced"
    transformer, pooling, *rest = cast("list[Any]", list(model))
    for part, name, expected in (
        (model, "truncate_dim", None),
        (transformer, "backend", "torch"),
        (transformer, "transformer_task", "feature-extraction"),
        (transformer, "modality_config", TEXT),
        (transformer, "module_output_name", "token_embeddings"),
        (transformer, "query_length", None),
        (transformer, "document_length", None),
        (transformer, "query_expansion", None),
        (transformer.model, "hf_quantizer", None),
        (transformer.model, "hf_device_map", None),
        (pooling, "include_prompt", True),
        *((module, "module_input_name", "sentence_embedding") for module in rest),
        *((module, "module_output_name", "sentence_embedding") for module in rest),
    ):
        if (found := getattr(part, name, expected)) != expected:
            return f"{type(part).__name__}.{name} = {found!r}"
    if pooling.pooling_mode not in STANDARD.values():
        return f"Pooling.pooling_mode = {pooling.pooling_mode!r}"
    decoder = transformer.model
    if not isinstance(decoder, PreTrainedModel) or "task" in inspect.signature(decoder.forward).parameters:
        return f"{type(decoder).__name__} is no plain model of transformers"
    declared = getattr(decoder.config.get_text_config(), "is_causal", None)
    if get_attention(decoder) == "bidirectional" and declared is not False:
        return f"{type(decoder).__name__} is bidirectional by itself, not by config.is_causal"
    return ""


def check(model: SentenceTransformer, encode: Callable[[Sequence[str], str], np.ndarray]) -> None:
    """Raise ModelError unless `encode(texts, prompt)` gives the embeddings of the model's own `encode`."""
    for prompt in ("", PROBE_PROMPT):
        own = torch.from_numpy(own_vectors(model, PROBE_TEXTS, None, prompt, len(PROBE_TEXTS)))
        found = torch.from_numpy(encode(PROBE_TEXTS, prompt))
        if apart := disagreement(found, own, model.dtype or torch.float32):
            raise ModelError(f"its embeddings would move {apart} (prompt {prompt!r})")


def own_vectors(model: Any, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> np.ndarray:
    """(N, D) fp32 embeddings by a sentence-transformers model's own `encode`."""
    by_side = {"query": model.encode_query, "document": model.encode_document}
    encode = by_side.get(side or "", model.encode)  # a Router sends the sides through different modules
    vectors = encode(texts, prompt=prompt, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
    return np.asarray(vectors, dtype=np.float32)


def disagreement(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """How far the embeddings (N, D) of a model of this dtype lie from what is expected, in words; empty where rounding
    explains it: neither a number nor an angle has moved further than `AGREEMENT` lets it."""
    number, angle = moved(found, expected), turned(found, expected)
    most, widest = AGREEMENT.get(dtype, (1e-2, 1e-3))
    return "" if number <= most and angle <= widest else f"by {number:.1e} (1 - cosine {angle:.1e})"


def turned(found: Tensor, expected: Tensor) -> float:
    """1 - cosine of the embeddings (N, D) to what is expected, the largest; as half the squared distance at unit
    length, which is precise also where they are nearly equal, and 0 between zeros."""
    ways = [torch.nn.functional.normalize(vectors.double(), dim=1) for vectors in (found, expected)]
    return float((ways[0] - ways[1]).square().sum(1).max()) / 2


def moved(found: Tensor, expected: Tensor) -> float:
    """How far a number of the embeddings (N, D) lies from what is expected, this taken to unit length; the largest."""
    found, expected = found.float(), expected.float()
    return float(((found - expected) / expected.norm(dim=1, keepdim=True).clamp(min=1e-9)).abs().max())
