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
import hashlib
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import mteb
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

from poolwise.encoding import KEPT_BYTES, FastEncoder
from poolwise.errors import PoolwiseError, TaskError
from poolwise.scoring.adapters import adapt
from poolwise.scoring.items import Item, item_scores
from poolwise.tasks import Task

SEED = 42
CONSTANT = "constant embedding"
UNTOLD = ("_name_or_path", "transformers_version")
"""What a model's configuration holds that does not change its embeddings."""

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
        model: a `SentenceTransformer`, a `FastEncoder` around one (to keep embeddings from call to call), a reference
            of `scoring.references`, or anything whose `encode` turns a list of texts into (B, D) vectors.
        identity: what the model is, e.g. the hash of its trial or `model_identity(model)`; stored in every row.
        items: also per-item rows.
        prompts: text put before inputs, by "TASK-query", "TASK-document", "TASK", then the same with the task type,
            then "query" or "document" (mteb's order; texts of symmetric tasks have no side). None: the model's own.

    A model with `task_types` (BM25) is evaluated on these alone. Scores depend neither on the order of the tasks nor on
    the state of the random generators, which are left as they were found.

    Raises:
        TaskError, ModelError: a task failed; the message names it. ModelError also for embeddings that are not finite.
    """
    with _training_mode_of(model):
        if isinstance(model, SentenceTransformer):
            model = FastEncoder(model, keep=KEPT_BYTES)
        return _evaluate_all(model, tasks, identity, batch_size, items, prompts, progress)


def _evaluate_all(
    model: Any,
    tasks: Sequence[Task],
    identity: str,
    batch_size: int,
    items: bool,
    prompts: Mapping[str, str] | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
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
    """Content hash of a sentence-transformers model: weights, modules and settings, tokenizer, prompts, limit, width.

    Models of one identity give equal embeddings; a renamed or moved folder keeps its own. References state theirs.
    """
    if hasattr(model, "identity"):
        return str(model.identity)
    settings: list[Any] = [model.prompts, model.max_seq_length, model.similarity_fn_name]
    if model.truncate_dim is not None:
        settings.append(["truncate_dim", model.truncate_dim])
    for module in model:
        keys = [key for key in getattr(module, "config_keys", ()) if hasattr(module, key)]
        settings.append([type(module).__name__, {key: getattr(module, key) for key in keys}])
        for part in module.modules():
            if isinstance(part, PreTrainedModel):
                content = part.config.to_dict()
                settings.append({key: content[key] for key in content if key not in UNTOLD})
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", None)
    settings.append(tokenizer.to_str() if tokenizer is not None else model.tokenizer.get_vocab())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
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
    results: list[Any] = []
    found: list[Item] = []
    used: dict[str, str] = {}
    constant = True
    for part in task.parts():
        part.load()
        if hasattr(model, "prepare"):
            model.prepare(part.texts())
        adapter = adapt(model, part, identity, batch_size, prompts)
        with tempfile.TemporaryDirectory() as folder:
            _reseed(part.mteb)
            result = mteb.evaluate(
                cast(Any, adapter),
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
    main = [_main_row(task, split, scores, constant) for split in combined.scores for scores in combined.scores[split]]
    return [{**common, **row} for row in [*main, *(_item_row(item, constant) for item in found)]]


def _main_row(task: Task, split: str, scores: Mapping[str, Any], constant: bool) -> dict[str, Any]:
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


def _dtype(model: Any) -> str | None:
    """The type most of a model's numbers have: the base's, whatever the adapters and the head are kept in."""
    counts: dict[str, int] = {}
    while not isinstance(model, torch.nn.Module) and hasattr(model, "encoder"):
        model = model.encoder
    for parameter in model.parameters() if isinstance(model, torch.nn.Module) else ():
        name = str(parameter.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=lambda name: counts[name]) if counts else None


def _reseed(task: Any) -> None:
    """mteb's fast clustering draws from a generator that lives as long as the task: wind it back."""
    task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Seeded inside; outside, the generators are as if nothing had happened."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _training_mode_of(model: Any) -> Iterator[None]:
    """A module leaves in the mode in which it came."""
    training = getattr(model, "training", False)
    try:
        yield
    finally:
        if training:
            model.train()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets` and what mteb and scikit-learn say about newer versions of tasks, models
    without a name and labels that are not in a sample."""
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logger = logging.getLogger("mteb")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
