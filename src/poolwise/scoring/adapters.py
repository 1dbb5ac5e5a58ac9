"""Models with the interface that mteb expects: prompts by task and side, checked fp32 embeddings, unique identities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import scipy.sparse as sparse
import torch
from datasets import Dataset
from mteb.models import ModelMeta
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from torch.utils.data import SequentialSampler

from poolwise.data.tasks import Task, document_text
from poolwise.encoding.fast import Counts, FastEncoder
from poolwise.errors import ModelError
from poolwise.model.backbone import Backbone
from poolwise.model.encoder import DEFAULT_PROMPT
from poolwise.study.recipe import INSTRUCTION

SEARCH_TYPES = ("Retrieval", "Reranking")
SPARSE_TYPES = ("STS", "Classification", "Clustering")
"""Task types whose mteb evaluators accept scipy's sparse rows."""
CONSTANT_TOLERANCE = 1e-5
"""Vectors are equal if no number differs by more than this share of the largest one."""


def _texts(inputs: Any) -> list[str]:
    """The texts of a data loader, in order, from its data set at once where possible: reading row by row is slow."""
    data = getattr(inputs, "dataset", None)
    if isinstance(data, Dataset) and isinstance(inputs.sampler, SequentialSampler) and "text" in data.column_names:
        return list(data["text"])
    return [text for batch in inputs for text in batch["text"]]


def adapt(model: Any, task: Task, identity: str, batch_size: int, prompts: Mapping[str, str] | None) -> Adapter:
    """`model` with the interface by which mteb evaluates it on `task`."""
    kind = Ranker if hasattr(model, "rank") and task.task_type in SEARCH_TYPES else Encoder
    return kind(model, task, identity, batch_size, prompts)


class Adapter:
    """A model's identity and what was observed of it: `used_prompts` by side, `constant` if all vectors were equal."""

    def __init__(
        self, model: Any, task: Task, identity: str, batch_size: int, prompts: Mapping[str, str] | None
    ) -> None:
        self.model, self.task, self.batch_size, self.prompts = model, task, batch_size, prompts
        self.used_prompts: dict[str, str] = {}
        self.calls_constant: list[bool] = []
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "poolwise/model", "revision": identity})

    @property
    def constant(self) -> bool:
        """Whether in every call with two or more different texts (at least one call) all vectors were equal."""
        return bool(self.calls_constant) and all(self.calls_constant)


class Ranker(Adapter):
    """mteb's search protocol for a model with `rank(queries, documents)` -> (Q, N) sparse scores."""

    def index(self, corpus: Any, **_: Any) -> None:
        """Keep the documents."""
        self.ids = list(corpus["id"])
        self.documents = [document_text(document) for document in corpus]

    def search(self, queries: Any, *, top_k: int, top_ranked: Any = None, **_: Any) -> dict[str, dict[str, float]]:
        """The `top_k` best documents of each query, or its candidates, with their scores.

        Documents of score 0 are included, so that a query that matches nothing counts as 0 and is not left out.
        """
        scores = self.model.rank(list(queries["text"]), self.documents)
        place = {name: number for number, name in enumerate(self.ids)}
        found = {}
        for row, query in enumerate(queries["id"]):
            values = scores[[row]].toarray().ravel()
            if top_ranked is None:
                chosen = np.argsort(-values, kind="stable")[:top_k].tolist()
            else:
                chosen = [place[name] for name in top_ranked[query]]
            found[query] = {self.ids[number]: float(values[number]) for number in chosen}
        return found


class PublishedBatches:
    """An encoder of a design with `masked = false`, whose padding is attended to as in the paper's evaluation.

    There 64 texts are a batch in the order in which they come, padded on the left to a multiple of 8 tokens; a corpus
    is sorted by length first, the longest document first, 50,000 documents at a time. An embedding depends on the
    texts beside it, so none is kept. The work is added to the counts of `fast`.
    """

    TEXTS, MULTIPLE, CHUNK = 64, 8, 50_000

    def __init__(self, fast: FastEncoder, task_type: str) -> None:
        self.fast, self.encoder, self.sorts = fast, fast.given, task_type == "Retrieval"

    @property
    def prompts(self) -> dict[str, Any]:
        """The encoder's prompts."""
        return self.encoder.prompts

    @property
    def max_seq_length(self) -> int | None:
        """The encoder's limit, in tokens."""
        return self.encoder.max_seq_length

    def kept_vectors(self, texts: Sequence[str], side: str | None, prompt: str, batch_size: int) -> np.ndarray:
        """(N, D) fp32 embeddings in the order of `texts`; `batch_size` is the published one."""
        order = list(range(len(texts)))
        if self.sorts and side == "document":
            order.sort(key=lambda number: -len(texts[number]))
        backbone = cast(Backbone, self.encoder[0])
        found = []
        with backbone.lock, backbone.pooling_padding(), torch.inference_mode():
            for start in range(0, len(order), self.CHUNK):
                chunk = order[start : start + self.CHUNK]
                for first in range(0, len(chunk), self.TEXTS):
                    batch = [texts[number] for number in chunk[first : first + self.TEXTS]]
                    found.append(self.encoder(self._features(backbone, batch, prompt))["sentence_embedding"])
        vectors = torch.cat(found).float().cpu().numpy()[:, : self.encoder.truncate_dim]
        self.fast.counts += Counts(len(texts), len(texts), 0, 0)
        return np.asarray(vectors[np.argsort(order)])

    def _features(self, backbone: Backbone, texts: list[str], prompt: str) -> dict[str, Any]:
        """What the encoder reads of one batch, padded on the left."""
        given = self.encoder.preprocess(texts, prompt=prompt or None)
        real = given["attention_mask"].bool()
        lengths = real.sum(1)
        width = -(-int(lengths.max()) // self.MULTIPLE) * self.MULTIPLE
        mask = torch.arange(width) >= width - lengths[:, None]
        ids = torch.full(mask.shape, cast(int, backbone.words.pad_token_id))
        ids[mask] = given["input_ids"][real]
        self.fast.counts += Counts(0, 0, int(lengths.sum()), ids.numel())
        device = self.encoder.device
        return {**given, "input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


class Encoder(Adapter):
    """mteb's encoder protocol around `encode(texts)`."""

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Any:
        """(N, D) fp32 vectors of the texts; sparse rows of a lexical reference if mteb's evaluator accepts them.

        Raises `ModelError` if a vector is not finite.
        """
        texts = _texts(inputs)
        side = None if prompt_type is None else str(prompt_type.value)
        prompt = self._prompt(side)
        if prompt:
            self.used_prompts[side or "text"] = prompt
        vectors = self._vectors(texts, side, prompt)
        self._check(texts, vectors)
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(N, M) fp32: the model's own similarity if it has one, otherwise the cosine."""
        function = getattr(self.model, "similarity", None)
        return function(embeddings1, embeddings2) if callable(function) else cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(N,) fp32: the same, pair by pair."""
        if sparse.issparse(embeddings1):  # rows of a lexical reference, which have unit length
            return np.asarray(embeddings1.multiply(embeddings2).sum(axis=1)).ravel()
        function = getattr(self.model, "similarity_pairwise", None)
        return function(embeddings1, embeddings2) if callable(function) else pairwise_cos_sim(embeddings1, embeddings2)

    def _prompt(self, side: str | None) -> str:
        """The first there is, in mteb's order: task and side, task, type and side, type, side; the model's default.

        `{instruction}` in it becomes the task's instruction; a side without one has no prompt.
        """
        own = getattr(self.model, "prompts", None) or {}
        prompts = own if self.prompts is None else self.prompts
        names: list[str] = []
        for word in (self.task.name, self.task.task_type):
            names += [f"{word}-{side}", word] if side else [word]
        names += [side] if side else []
        names += [DEFAULT_PROMPT] if self.prompts is not None else []
        if self.prompts is None:
            names += ["passage", "corpus"] if side == "document" else []
            default = None if side else getattr(self.model, "default_prompt_name", None)
            names += [default] if default else []
        prompt = next((prompts[name] for name in names if prompts.get(name) is not None), "")
        if self.prompts is None or INSTRUCTION not in prompt:
            return prompt
        instruction = self.task.instruction(side)
        return prompt.replace(INSTRUCTION, instruction) if instruction else ""

    def _vectors(self, texts: Sequence[str], side: str | None, prompt: str) -> Any:
        if hasattr(self.model, "kept_vectors"):  # the dilution ladder
            return self.model.kept_vectors(texts, side, prompt, self.batch_size)
        if isinstance(self.model, FastEncoder):
            return self.model.encode(texts, prompt, side=side, batch_size=self.batch_size)
        if hasattr(self.model, "encode_dense"):
            if self.task.task_type in SPARSE_TYPES:
                return self.model.encode(texts)
            vectors = self.model.encode_dense(texts)
        else:
            vectors = self.model.encode([prompt + text for text in texts])
        return np.asarray(vectors, dtype=np.float32)

    def _check(self, texts: Sequence[str], vectors: Any) -> None:
        values = vectors.data if sparse.issparse(vectors) else vectors
        if not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1)) if vectors is values else [0]
            raise ModelError(
                f"task {self.task.name!r}: {len(bad)} of {len(texts)} embeddings are not finite, the first of the text "
                f"{texts[bad[0]][:60]!r}; the model has diverged or overflows in its dtype (try bfloat16 or float32)"
            )
        if len(set(texts)) > 1:
            spread = (vectors.max(axis=0) - vectors.min(axis=0)).max()
            largest = max(vectors.max(), -vectors.min())
            self.calls_constant.append(bool(spread <= CONSTANT_TOLERANCE * largest))
