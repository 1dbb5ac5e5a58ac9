"""The layers of a trained design: which of them its pooling attends to, and how well each one scores by itself."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import rankdata
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from torch import Tensor, nn

from poolwise.data.tasks import Task
from poolwise.encoding.fast import sentence_vectors
from poolwise.encoding.shortcuts import VectorCache
from poolwise.errors import ModelError
from poolwise.model.backbone import Backbone
from poolwise.model.encoder import PoolingHead, build, evaluation_prompts
from poolwise.model.hooks import LayerCollector
from poolwise.pooling.heads import LayerCrossAttention
from poolwise.scoring.evaluate import evaluate
from poolwise.study.catalogue import POOLINGS, spec_of
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe

SAMPLED_TEXTS = 64
"""Evaluation texts over which attention is averaged, about."""

Array = NDArray[np.float32]
CHUNK = 1024
"""Texts encoded at a time; their vectors of all layers are in memory at once."""


def layer_attention(encoder: SentenceTransformer, texts: Sequence[str], batch_size: int = 8) -> NDArray[np.float64]:
    """(L,) share of the attention that each layer gets, lowest first, summing to 1: mean over texts, heads and latents.

    The weights are those of the head's forward, softmax(Q_h K_hᵀ / √E) over the L layer vectors of a text.

    Args:
        encoder: of a `layer_cross_attention` design.
        texts: encoded as documents; at least one.

    Raises:
        ModelError: another pooling, or no text.
    """
    head = _head(encoder)
    if not texts:
        raise ModelError("layer_attention: no texts to look at; give at least one")
    sums: list[Tensor] = []

    def add(module: Any, inputs: tuple[Any, ...]) -> None:
        weights = head.attention_weights(inputs[0])  # (B, heads, latents, L)
        sums.append(weights.mean(dim=(1, 2)).double().sum(dim=0).cpu())

    handle = head.register_forward_pre_hook(add)
    try:
        with torch.inference_mode():
            encoder.encode(list(texts), batch_size=batch_size, prompt_name=_document(encoder), show_progress_bar=False)
    finally:
        handle.remove()
    return (torch.stack(sums).sum(dim=0) / len(texts)).numpy()


def attends_to_layers(encoder: SentenceTransformer) -> bool:
    """Whether `layer_attention` has an answer for this encoder."""
    return any(isinstance(module, PoolingHead) and spec_of(module.pooling).attends_to_layers for module in encoder)


def layer_weights(encoder: SentenceTransformer) -> NDArray[np.float64] | None:
    """(L, D): the learned vector that the head adds to each layer's, or None if it was built without.

    Raises:
        ModelError: another pooling.
    """
    weights = _head(encoder).layer_weights
    return None if weights is None else weights.detach().double().cpu().numpy()


def _head(encoder: SentenceTransformer) -> LayerCrossAttention:
    found = next((module for module in encoder if isinstance(module, PoolingHead)), None)
    if found is None or not spec_of(found.pooling).attends_to_layers:
        what = found.pooling if found else "no pooling of poolwise"
        able = " and ".join(name for name, spec in POOLINGS.items() if spec.attends_to_layers)
        raise ModelError(f"{what}: only {able} attends to layers; give an encoder of such a design")
    return cast(LayerCrossAttention, found.head)


def _document(encoder: SentenceTransformer) -> str | None:
    return "document" if encoder.prompts.get("document") else None


def probe_layers(
    encoder: SentenceTransformer,
    tasks: Sequence[Task],
    *,
    identity: str,
    reduce: str,
    prompts: Mapping[str, str] | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Main rows of `scoring.evaluate` for each layer, with `layer` (1 the lowest, L the last, after the final norm).

    The vectors are normalised, as the embeddings of every design are: the last row of a `last_token` or `mean` design
    is the design's own score. reduce: `last` or `mean`, how a layer's tokens become its vector. The head is not used.
    """
    with tempfile.TemporaryDirectory(prefix="poolwise-layers-") as folder:
        layers = EveryLayer(encoder, reduce, Path(folder))
        try:
            rows = []
            for task in tasks:  # all layers of a task before the next one, while its data are loaded
                for layer in range(layers.count):
                    view = OneLayer(layers, layer)
                    name = f"{identity}-layer-{layer + 1}"
                    main = evaluate(view, [task], identity=name, batch_size=batch_size, items=False, prompts=prompts)
                    rows += [{**row, "layer": layer + 1} for row in main]
            return rows
        finally:
            layers.close()


class EveryLayer:
    """The vectors of all layers of an encoder's backbone, of length 1: (N, L, D) in files in `folder`.

    Each text is encoded once. The backbone collects them in place of what it collected before, until `close`.
    """

    def __init__(self, encoder: SentenceTransformer, reduce: str, folder: Path) -> None:
        self.encoder, self.folder = encoder, folder
        self.backbone = cast(Backbone, encoder[0])
        self._previous = self.backbone.collector
        self._collector = LayerCollector(self.backbone.model, reduce=reduce)
        self.backbone.collector = self._collector
        config = self.backbone.model.config.get_text_config()
        self.count, self.width = config.num_hidden_layers, config.hidden_size
        self._flat = SentenceTransformer(modules=[cast(nn.Module, self.backbone), _Flat()], device=str(encoder.device))
        self._flat.prompts = encoder.prompts
        self._cache = VectorCache(float("inf"))  # of rows in memory-mapped files
        self._files = itertools.count()

    def close(self) -> None:
        """Restore the backbone."""
        self._collector.remove()
        self.backbone.collector = self._previous

    def vectors(self, layer: int, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> Array:
        """(N, D) vectors of one layer."""
        rows = self._cache.rows(texts, side, prompt, lambda new: self._encoded(new, side, prompt, batch_size))
        return np.stack([row[layer] for row in rows])

    def _encoded(self, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> Array:
        """(N, L, D) of new texts, in a file."""
        path = self.folder / f"{next(self._files)}.f32"
        kept = np.memmap(path, dtype=np.float32, mode="w+", shape=(len(texts), self.count, self.width))
        for start in range(0, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            flat = sentence_vectors(self._flat, part, side, prompt, batch_size)
            vectors = torch.from_numpy(flat).view(len(part), self.count, self.width)
            kept[start : start + len(part)] = F.normalize(vectors, dim=-1).numpy()
        return kept


class OneLayer:
    """One layer of an encoder as a model that mteb can evaluate."""

    def __init__(self, layers: EveryLayer, layer: int) -> None:
        self.layers, self.layer = layers, layer

    @property
    def encoder(self) -> SentenceTransformer:
        """The encoder whose layer this is."""
        return self.layers.encoder

    @property
    def prompts(self) -> dict[str, Any]:
        """The encoder's prompts."""
        return self.layers.encoder.prompts

    def kept_vectors(self, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> Array:
        """(N, D) vectors of the texts."""
        return self.layers.vectors(self.layer, texts, side, prompt, batch_size)


class _Flat(Module):
    """(B, L, D) layer vectors as one embedding (B, L · D)."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        features["sentence_embedding"] = features["layer_embeddings"].flatten(1)
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """There is nothing to save."""


def inspect(
    encoder: SentenceTransformer, tasks: Sequence[Task], identity: str, recipe: Recipe, batch_size: int = 32
) -> dict[str, Any]:
    """What the layers of one trained encoder hold, JSON-able.

    Returns `reduce` (what represents a layer: its `last` token or the `mean` of its tokens, as the design reads them),
    `attention` (L shares) and `weights` (L norms of the layer weights) where the design attends to layers, else None,
    and `scores`, the rows of `probe_layers`: `layer` from 1, `task`, `task_type`, `metric`, `score`.
    """
    design = cast(dict[str, Any], cast(Any, encoder).poolwise)["design"]
    reads_last = spec_of(design["pooling"]).tokens_read(design["pooling_args"]) == "last"
    reduce = "last" if reads_last else "mean"
    attention = weights = None
    if attends_to_layers(encoder):
        texts = sample_texts(tasks)
        attention = layer_attention(encoder, texts).tolist() if texts else None
        matrix = layer_weights(encoder)
        weights = None if matrix is None else np.linalg.norm(matrix, axis=1).tolist()
    rows = probe_layers(
        encoder, tasks, identity=identity, reduce=reduce, prompts=evaluation_prompts(recipe), batch_size=batch_size
    )
    kept = ("layer", "task", "task_type", "metric", "score")
    scores = [{name: row[name] for name in kept} for row in rows]
    return {"reduce": reduce, "attention": attention, "weights": weights, "scores": scores}


READINGS = {"last token": ("causal", "last_token", "last"), "mean": ("causal", "mean", "mean")}
"""Name -> attention, pooling and reduction by which an untuned base is looked at."""


def untuned(base: str, tasks: Sequence[Task], batch_size: int = 32) -> dict[str, Any]:
    """The layers of a base model before any training, in the form of `api.layers`: the last token and the mean of the
    tokens of each layer as the embedding.

    Each of the `runs` also has `correlation`, (L, L): how alike two layers rank the pairs of the tasks' first texts, by
    Spearman's correlation of their cosines. Raises ModelError for a base that cannot be loaded.
    """
    runs = []
    for name, (attention, pooling, reduce) in READINGS.items():
        recipe = Recipe(base_model=base, lora=False)
        encoder = build(recipe, Design(name=name, attention=attention, pooling=pooling), 0).eval()
        content = inspect(encoder, tasks, f"{base}-{reduce}", recipe, batch_size)
        correlation = layer_correlation(encoder, sample_texts(tasks), reduce, batch_size).tolist()
        runs.append({"design": name, "seed": 0, "base": base, **content, "own": [], "correlation": correlation})
    return {"study": f"{base}, untuned", "runs": runs}


def layer_correlation(
    encoder: SentenceTransformer, texts: Sequence[str], reduce: str, batch_size: int = 32
) -> NDArray[np.float64]:
    """(L, L): Spearman's correlation, over all pairs of `texts`, of their cosines in one layer with those in another.

    Layers that give all pairs one cosine correlate with nothing: 0. Raises ModelError for fewer than three texts.
    """
    texts = list(dict.fromkeys(texts))
    if len(texts) < 3:
        raise ModelError(f"layer_correlation: {len(texts)} different texts have too few pairs; give at least three")
    pairs = np.triu_indices(len(texts), 1)
    ranks = []
    with tempfile.TemporaryDirectory(prefix="poolwise-layers-") as folder:
        layers = EveryLayer(encoder, reduce, Path(folder))
        try:
            for layer in range(layers.count):
                vectors = layers.vectors(layer, texts, None, "", batch_size).astype(np.float64)
                rank = rankdata((vectors @ vectors.T)[pairs])
                spread = np.linalg.norm(rank - rank.mean())
                ranks.append((rank - rank.mean()) / (spread or 1.0))
        finally:
            layers.close()
    return np.array(ranks) @ np.array(ranks).T


def sample_texts(tasks: Sequence[Task]) -> list[str]:
    """The first evaluation texts of each task, about `SAMPLED_TEXTS` in all."""
    share = -(-SAMPLED_TEXTS // max(1, len(tasks)))
    return [text for task in tasks for text in itertools.islice(task.texts(), share)]
