"""mteb evaluates; this wraps it: identities that never mix, prompts, items, provenance -> rows of the long table.

`evaluate` takes anything with `encode`. One main row for each task × split × subset carries mteb's main score under
mteb's name for it; per-item rows carry an `item_id`:

| task type | item | metric and score |
|---|---|---|
| Retrieval, Reranking | query | the main metric of that query; the mean over queries is the main score |
| Classification | example | `accuracy`: share of mteb's experiments (10) that label it rightly |
| Clustering | set, or level/run of mteb's fast form | `v_measure` |
| STS, PairClassification | pair | `cosine` with the gold value in column `gold`: no score, `note` says so |
| Summarization, aggregates of other scores, cross-validated classification | none | |

A task whose embeddings are all equal scores 0 (and so do its items), with "constant embedding" in `note`.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import scipy.sparse as sparse
import torch
from mteb.models import ModelMeta
from sentence_transformers import SentenceTransformer

from poolwise.errors import ModelError, PoolwiseError, TaskError
from poolwise.items import Item, item_scores
from poolwise.tasks import Task, document_text

SEARCH_TYPES = ("Retrieval", "Reranking")
SPARSE_TYPES = ("STS", "Classification", "Clustering")
"""Task types whose mteb evaluators take scipy's sparse rows as they are."""
SIDES = {"query": "query", "document": "document", None: "text"}
CONSTANT = "constant embedding"

Progress = Callable[[str, int, int], None]
"""Called before each task with its name, its number from 0 and the number of tasks; with ("", n, n) at the end."""


def evaluate(
    model: Any,
    tasks: Sequence[Task],
    *,
    identity: str,
    batch_size: int = 32,
    items: bool = True,
    prompts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Rows of the long table for `model` on `tasks` (all but design, seed and step, which the caller knows).

    Args:
        model: a `SentenceTransformer`, a reference of `poolwise.references`, or anything whose `encode` turns a list of
            texts into (B, D) vectors.
        identity: what the model is, e.g. the hash of its trial or `model_identity(model)`; stored in every row.
        items: also per-item rows.
        prompts: text put before inputs, by "TASK-query", "TASK-document", "TASK", then the same with the task type, then
            "query" or "document" (mteb's order; texts of symmetric tasks have no side). None: the model's own.

    A model with `task_types` (BM25) is evaluated on these alone. Scores depend neither on the order of the tasks nor on
    the state of the random generators, which are left as they were found.

    Raises:
        TaskError, ModelError: a task failed; the message names it. ModelError also for embeddings that are not finite.
    """
    wanted = [task for task in tasks if task.task_type in getattr(model, "task_types", (task.task_type,))]
    rows: list[dict[str, Any]] = []
    for number, task in enumerate(wanted):
        if progress:
            progress(task.name, number, len(wanted))
        rows += _evaluate_task(model, task, identity, batch_size, items, prompts)
    if progress:
        progress("", len(wanted), len(wanted))
    return rows


def model_identity(model: Any) -> str:
    """Content hash of a model: every weight, every module's class, prompts and length limit. A reference states its own.

    Two models of one identity give equal embeddings; a renamed or moved folder keeps its identity.
    """
    import hashlib

    if hasattr(model, "identity"):
        return str(model.identity)
    digest = hashlib.sha256()
    settings = [getattr(model, "prompts", None), getattr(model, "max_seq_length", None), [type(m).__name__ for m in model]]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:24]}"


def _evaluate_task(
    model: Any, task: Task, identity: str, batch_size: int, items: bool, prompts: Mapping[str, str] | None
) -> list[dict[str, Any]]:
    try:
        with _quiet(), _own_randomness():
            return _rows(model, task, identity, batch_size, items, prompts)
    except PoolwiseError as error:
        raise type(error)(str(error) if task.name in str(error) else f"task {task.name!r}: {error}") from error
    except Exception as error:
        raise TaskError(f"task {task.name!r} failed: {type(error).__name__}: {error}") from error


def _rows(
    model: Any, task: Task, identity: str, batch_size: int, items: bool, prompts: Mapping[str, str] | None
) -> list[dict[str, Any]]:
    started = time.perf_counter()
    results, found, used = [], [], {}
    constant = True
    for part in task.parts():
        part.load()
        if hasattr(model, "prepare"):
            model.prepare(part.texts())
        adapter = (_Ranker if hasattr(model, "rank") and part.task_type in SEARCH_TYPES else _Encoder)(
            model, part, identity, batch_size, prompts
        )
        with tempfile.TemporaryDirectory() as folder:
            _reseed(part.mteb)
            result = mteb.evaluate(
                adapter,
                part.mteb,
                co2_tracker=False,
                cache=None,  # a cache hands one model another's scores where two share a name
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
                prediction_folder=folder if items else None,
                show_progress_bar=False,
            ).task_results[0]
            if items:
                predictions = json.loads((Path(folder) / part.mteb.prediction_file_name).read_text(encoding="utf-8"))
                prefix = "" if part is task else f"{part.name}/"
                found += item_scores(part, predictions, result.scores, prefix)
        results.append(result)
        constant &= adapter.constant
        used |= adapter.used_prompts
        part.mteb.unload_data()
    combined = task.mteb.combine_task_results(results) if task.mteb.is_aggregate else results[0]
    common = {
        "task": task.name,
        "task_type": task.task_type,
        "source": task.source,
        "task_identity": task.identity,
        "model_identity": identity,
        "mteb_version": mteb.__version__,
        "dtype": _dtype(model),
        "max_length": getattr(model, "max_seq_length", None),
        "prompts": json.dumps(used, sort_keys=True, ensure_ascii=False),
        "batch_size": batch_size,
        "seconds": round(time.perf_counter() - started, 3),
    }
    rows = [
        {**common, **_main(task, split, scores, constant)} for split, by_subset in combined.scores.items() for scores in by_subset
    ]
    return rows + [{**common, **_item_row(item, constant)} for item in found]


def _main(task: Task, split: str, scores: Mapping[str, Any], constant: bool) -> dict[str, Any]:
    metric = task.mteb.metadata.main_score
    score = 0.0 if constant else float(scores["main_score"])
    if not np.isfinite(score):
        raise TaskError(f"task {task.name!r}: {metric} on {split} is {score}, though the embeddings differ")
    return {
        "split": split,
        "subset": scores["hf_subset"],
        "metric": metric,
        "score": score,
        "item_id": None,
        "gold": None,
        "note": CONSTANT if constant else None,
    }


def _item_row(item: Item, constant: bool) -> dict[str, Any]:
    row = item._asdict()
    if constant and item.gold is None:
        row |= {"score": 0.0, "note": CONSTANT}
    return row


class _Adapter:
    """What mteb asks of a model: who it is, and `constant`: whether all texts got the same vector."""

    def __init__(self, model: Any, task: Task, identity: str, batch_size: int, prompts: Mapping[str, str] | None):
        self.model, self.task, self.batch_size, self.prompts = model, task, batch_size, prompts
        self.used_prompts: dict[str, str] = {}
        self.constant = False
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "poolwise/model", "revision": identity})


class _Ranker(_Adapter):
    """mteb's search protocol for a model that ranks documents by itself (`rank`: (Q, N) sparse scores)."""

    def index(self, corpus: Any, **_: Any) -> None:
        self.ids, self.documents = list(corpus["id"]), [document_text(document) for document in corpus]

    def search(self, queries: Any, *, top_k: int, top_ranked: Any = None, **_: Any) -> dict[str, dict[str, float]]:
        scores = self.model.rank(list(queries["text"]), self.documents)
        place = {name: i for i, name in enumerate(self.ids)}
        results = {}
        for row, query in enumerate(queries["id"]):
            values = scores[[row]].toarray().ravel()
            if top_ranked is None:
                chosen = np.argsort(-values, kind="stable")[:top_k]
            else:
                chosen = np.array([place[name] for name in top_ranked[query]])
            results[query] = {self.ids[i]: float(values[i]) for i in chosen}
        return results


class _Encoder(_Adapter):
    """mteb's encoder protocol around `encode(texts)`; embeddings are fp32, and so is every similarity."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._constant_calls: list[bool] = []

    @property
    def constant(self) -> bool:  # type: ignore[override]
        return bool(self._constant_calls) and all(self._constant_calls)

    @constant.setter
    def constant(self, value: bool) -> None:
        pass

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Any:
        """(N, D) fp32, or sparse rows from a lexical reference where mteb's evaluator takes them."""
        texts = [text for batch in inputs for text in batch["text"]]
        side = prompt_type.value if prompt_type is not None else None
        vectors = self._vectors(texts, side)
        self._check(texts, vectors)
        return vectors
