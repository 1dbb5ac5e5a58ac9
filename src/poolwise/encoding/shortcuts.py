"""Work that encoding can leave out: prompts computed once, unused states of the last layer, texts encoded before.

Each shortcut is verified by `FastEncoder` on the first texts that use it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from poolwise.encoding.rows import features
from poolwise.errors import ModelError
from poolwise.model.attention import get_attention, verify
from poolwise.model.backbone import TEXT, Backbone
from poolwise.model.encoder import STANDARD, PoolingHead
from poolwise.model.hooks import decoder_layers, last_index
from poolwise.model.packing import Ragged

BY_LENGTH = {"dynamic", "longrope"}
"""Rotary embeddings whose angles depend on the length of the text, and so the keys of a prompt do too."""


def can_reuse(backbone: Backbone) -> bool:
    """Whether the keys and values of a prompt are the same for every text that follows it."""
    config = backbone.model.config.get_text_config()
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {one.get("rope_type") or one.get("type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    return backbone.attention == "causal" and not kinds & BY_LENGTH


def shared_prefix(*parts: Ragged) -> np.ndarray:
    """The token ids (P,) that all texts begin with, less each text's last token, so that none is left empty."""
    shortest = max(0, min(int(rows.lengths.min()) for rows in parts) - 1)
    heads = np.concatenate([rows.ids[rows.starts[:, None] + np.arange(shortest)] for rows in parts])
    same = (heads == heads[0]).all(0)
    return heads[0][: shortest if same.all() else int(same.argmin())]


@dataclass
class Prefix:
    """The first P tokens of all texts, and what a decoder computes for them.

    ids (P,), on the CPU; keys and values (1, K, P, E) of each layer; states (1, P, D) of the last layer; totals
    (1, L, D): sums of each layer's states over the `pooled` tokens, for designs that pool layers by their mean.
    """

    ids: np.ndarray
    cache: list[tuple[Tensor, Tensor]]
    states: Tensor
    totals: Tensor | None
    pooled: int

    @property
    def length(self) -> int:
        """P."""
        return len(self.ids)

    def serves(self, backbone: Backbone, rows: Ragged) -> bool:
        """Whether all these texts begin with the prefix and are longer than it.

        If layers are pooled by their mean, the pooled tokens of the prefix must also be those in `totals`: of a text
        without content all tokens are pooled, those of its prompt too.
        """
        if rows.lengths.min() <= self.length:
            return False
        if not (rows.ids[rows.starts[:, None] + np.arange(self.length)] == self.ids).all():
            return False
        if self.totals is None:
            return True
        pooled = backbone.pooling_mask(features(rows, "cpu"))[:, : self.length]
        return bool((pooled.bool().sum(1) == self.pooled).all())

    @classmethod
    def of(cls, backbone: Backbone, ids: np.ndarray, row: Ragged) -> Prefix | None:
        """The prefix `ids` (P,) of the one text in `row`, run through the decoder.

        None if the decoder does not return keys and values of all P tokens in every layer.
        """
        device = backbone.model.device
        whole = features(row, device)
        mask = whole["attention_mask"]
        pooled = backbone.pooling_mask(whole)[:, : len(ids)].bool()
        cache = DynamicCache(config=backbone.model.config.get_text_config())
        inputs = {
            "input_ids": whole["input_ids"][:, : len(ids)],
            "attention_mask": mask[:, : len(ids)],
            "position_ids": torch.arange(len(ids), device=device)[None],
        }
        totals = None
        if backbone.collector is None:
            output = backbone.model(**inputs, past_key_values=cache, use_cache=True)
        else:
            with backbone.collector.collect(mask[:, : len(ids)], pooled):
                output = backbone.model(**inputs, past_key_values=cache, use_cache=True)
                totals = backbone.collector.vectors(output.last_hidden_state) * pooled.sum()
        kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
        whole_keys = [(keys, values) for keys, values in kept if keys is not None and values is not None]
        if len(whole_keys) < len(kept) or any(keys.shape[2] != len(ids) for keys, _ in whole_keys):
            return None  # a sliding window shorter than the prefix, or layers of another kind
        return cls(ids, whole_keys, output.last_hidden_state, totals, int(pooled.sum()))

    def forward(self, backbone: Backbone, given: dict[str, Any]) -> dict[str, Any]:
        """The features (B, T) of texts that begin with the prefix, padded on the right, with what `backbone` adds."""
        texts, start, mask = len(given["input_ids"]), self.length, given["attention_mask"]
        pooled = backbone.pooling_mask(given)
        cache = DynamicCache(config=backbone.model.config.get_text_config())
        for number, (keys, values) in enumerate(self.cache):
            cache.update(keys.expand(texts, -1, -1, -1), values.expand(texts, -1, -1, -1), number)
        width = mask.shape[1] - start
        inputs = {
            "input_ids": given["input_ids"][:, start:],
            "attention_mask": mask,
            "position_ids": torch.arange(start, start + width, device=mask.device).expand(texts, -1),
            "past_key_values": cache,
            "use_cache": True,
        }
        if backbone.collector is None:
            states = backbone.model(**inputs).last_hidden_state
        else:
            rest = pooled[:, start:]
            with backbone.collector.collect(mask[:, start:], rest):
                states = backbone.model(**inputs).last_hidden_state
                vectors = backbone.collector.vectors(states)
            if backbone.collect == "mean":
                assert self.totals is not None
                own = rest.bool().sum(1)[:, None, None]
                vectors = (vectors * own + self.totals) / (own + self.pooled)
            given["layer_embeddings"] = vectors
        given["token_embeddings"] = torch.cat([self.states.expand(texts, -1, -1), states], 1)
        given["pooling_mask"] = pooled
        return given


def can_prune(backbone: Backbone) -> bool:
    """Whether the last decoder layer has the parts that `pruned` replaces."""
    layer = decoder_layers(backbone.model)[-1]
    return hasattr(layer, "mlp") and hasattr(getattr(layer, "self_attn", None), "o_proj")


@contextlib.contextmanager
def pruned(backbone: Backbone, given: dict[str, Any], prune: bool) -> Iterator[None]:
    """Inside, the last layer's output projection and feed-forward are computed for the last pooled token alone.

    Last-token pooling reads nothing else of that layer; the other states are zero. Only the thread that opens the block
    is affected: other threads, in the `encode` of a model that shares the layer, compute all tokens.
    """
    if not prune:
        yield
        return
    layer = cast(Any, decoder_layers(backbone.model)[-1])
    last = last_index(backbone.pooling_mask(given))
    texts = torch.arange(len(last), device=last.device)
    parts = (layer.mlp, layer.self_attn.o_proj)
    for part in parts:
        part.forward = _Only(part.forward, texts, last)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


class _Only:
    """A module's forward at one token of each text, in this thread: (B, T, D) -> (B, T, D'), zero at all others."""

    def __init__(self, forward: Any, texts: Tensor, tokens: Tensor) -> None:
        self.forward, self.texts, self.tokens = forward, texts, tokens
        self.thread = threading.get_ident()

    def __call__(self, states: Tensor) -> Tensor:
        if threading.get_ident() != self.thread:
            return self.forward(states)
        wanted = self.forward(states[self.texts, self.tokens])
        out = wanted.new_zeros(*states.shape[:2], wanted.shape[-1])
        out[self.texts, self.tokens] = wanted
        return out


def lighten(encoder: SentenceTransformer) -> SentenceTransformer:
    """An encoder that computes the same with less work.

    On an fp32 base, a copy with LoRA merged. On a base in half precision LoRA stays apart, because merging would round
    it, and the head's matrices are converted to half precision (norms and sums stay fp32). `encoder` itself if neither
    applies.
    """
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


class VectorCache:
    """Vectors of texts by side, prompt and text, up to `limit` bytes. whole: whether everything so far is in it."""

    def __init__(self, limit: float) -> None:
        self.limit, self.bytes, self.whole = limit, 0, True
        self.known: dict[tuple[str | None, str, str], np.ndarray] = {}

    def rows(
        self, texts: Sequence[str], side: str | None, prompt: str, compute: Callable[[list[str]], np.ndarray]
    ) -> np.ndarray | list[np.ndarray]:
        """One array per text. `compute` maps the texts that are not known, each once, to (N, …)."""
        new = [text for text in dict.fromkeys(texts) if (side, prompt, text) not in self.known]
        if not new:
            return [self.known[side, prompt, text] for text in texts]
        made = compute(new)
        fresh = dict(zip(new, made, strict=True)) if self.limit or len(new) < len(texts) else {}
        if self.bytes + made.nbytes <= self.limit:
            self.known.update({(side, prompt, text): row for text, row in fresh.items()})
            self.bytes += made.nbytes
        else:
            self.whole = False
        if len(new) == len(texts):
            return made
        return [fresh[text] if text in fresh else self.known[side, prompt, text] for text in texts]

    def get(
        self, texts: Sequence[str], side: str | None, prompt: str, compute: Callable[[list[str]], np.ndarray]
    ) -> np.ndarray:
        """`rows` as one array (N, …) that shares no memory with the cache."""
        found = self.rows(texts, side, prompt, compute)
        if isinstance(found, np.ndarray):
            return found.copy() if self.limit else found
        return np.stack(found)


AGREEMENT = {
    torch.float32: (1e-5, 1e-8),
    torch.float64: (1e-5, 1e-8),
    torch.bfloat16: (2e-2, 1e-3),
    torch.float16: (5e-3, 2e-5),
}
"""How far rounding may move a number of a unit-length embedding, and the whole embedding as 1 - cosine. Measured on the
built-in base with shortcuts and batches of other shapes, at most 2e-7 and 3e-14 in fp32, 5e-3 and 4e-5 in bf16, 5e-4
and 5e-7 in fp16; deeper and wider bases round more."""
PROBE_TEXTS = [
    "A short text.",
    "The second text is longer than the first, so that a batch of the two has padding in it.",
    "Ünïcode, numbers 0123456789 and (brackets)",
    "a",
]
PROBE_PROMPT = "Instruct: find an answer.\nQuery: "


def adopt(model: SentenceTransformer) -> SentenceTransformer:
    """`model` with a `Backbone` and a `PoolingHead` in place of its own modules.

    The weights are shared; `model` is not changed. Raises ModelError for a model with other modules or settings, and
    AttentionError if its attention is neither causal nor declared and measured as bidirectional.
    """
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
    """The first module or setting of `model` that our modules do not have; empty if there is none."""
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
        return f"{type(decoder).__name__} is not a plain model of transformers"
    declared = getattr(decoder.config.get_text_config(), "is_causal", None)
    if get_attention(decoder) == "bidirectional" and declared is not False:
        return f"{type(decoder).__name__} is bidirectional by design, not by config.is_causal"
    return ""


def check(model: SentenceTransformer, encode: Callable[[Sequence[str], str], np.ndarray]) -> None:
    """Raise ModelError unless `encode(texts, prompt)` returns the embeddings of the model's own `encode`."""
    for prompt in ("", PROBE_PROMPT):
        own = torch.from_numpy(encode_by_model(model, PROBE_TEXTS, None, prompt, len(PROBE_TEXTS)))
        found = torch.from_numpy(encode(PROBE_TEXTS, prompt))
        if apart := disagreement(found, own, model.dtype or torch.float32):
            raise ModelError(f"its embeddings would move {apart} (prompt {prompt!r})")


def encode_by_model(model: Any, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> np.ndarray:
    """(N, D) fp32 embeddings by the `encode` of a sentence-transformers model."""
    by_side = {"query": model.encode_query, "document": model.encode_document}
    encode = by_side.get(side or "", model.encode)  # a Router has different modules for queries and documents
    vectors = encode(texts, prompt=prompt, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
    return np.asarray(vectors, dtype=np.float32)


def disagreement(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """How far embeddings (N, D) of a model of this dtype are from those expected, in words.

    Empty if rounding explains the difference: no number and no angle has moved further than `AGREEMENT` allows.
    """
    number, angle = number_change(found, expected), angle_change(found, expected)
    most, widest = AGREEMENT.get(dtype, (1e-2, 1e-3))
    return "" if number <= most and angle <= widest else f"by {number:.1e} (1 - cosine {angle:.1e})"


def angle_change(found: Tensor, expected: Tensor) -> float:
    """The largest 1 - cosine between embeddings (N, D) and those expected.

    Computed as half the squared distance at unit length, which is precise for nearly equal vectors; 0 between zeros.
    """
    ways = [torch.nn.functional.normalize(vectors.double(), dim=1) for vectors in (found, expected)]
    return float((ways[0] - ways[1]).square().sum(1).max()) / 2


def number_change(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a number of embeddings (N, D) from those expected, relative to their lengths."""
    found, expected = found.float(), expected.float()
    return float(((found - expected) / expected.norm(dim=1, keepdim=True).clamp(min=1e-9)).abs().max())
