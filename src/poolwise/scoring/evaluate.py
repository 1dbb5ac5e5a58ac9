"""Scores of a model on tasks by mteb: main scores, and those of single queries, examples, sets and pairs.

The latter come from mteb's prediction files. Where items have scores of the main metric, their mean is checked against
mteb's main score.
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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import mteb
import numpy as np
import threadpoolctl
import torch
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

from poolwise.data.rows import untestable
from poolwise.data.tasks import Task
from poolwise.encoding.fast import KEPT_BYTES, FastEncoder
from poolwise.errors import PoolwiseError, TaskError
from poolwise.scoring.adapters import adapt

RESAMPLED = "resampled, no per-item score"
_MEASURES = {
    "ndcg_at": "ndcg_cut",
    "map_at": "map_cut",
    "recall_at": "recall",
    "precision_at": "P",
    "hit_rate_at": "success",
}
_SUBQUERIES = "max_over_subqueries_"


Rows = Iterable[tuple[Any, ...]]
"""(metric, item id, score) or (metric, item id, output of the model, gold value, note)."""


class Item(NamedTuple):
    """One item's row. If `gold` is set, `score` is the model's output, and the two are resampled together."""

    split: str
    subset: str
    metric: str
    score: float
    item_id: str
    gold: float | None = None
    note: str | None = None


def item_scores(task: Task, predictions: Mapping[str, Any], scores: Mapping[str, Any], prefix: str = "") -> list[Item]:
    """Items of all splits and subsets of one task. Its data must be loaded.

    Args:
        predictions: mteb's prediction file, [subset][split].
        scores: `TaskResult.scores`, {split: [one dictionary a subset]}.
        prefix: put before item ids (the name of the part in an aggregate task).

    Raises TaskError if a mean over items is not mteb's score.
    """
    read: dict[str, Callable[..., Rows]] = {
        "Retrieval": _queries,
        "Reranking": _queries,
        "Classification": _examples,
        "Clustering": _sets,
        "STS": _pairs,
        "PairClassification": _pairs,
    }
    if task.task_type not in read:
        return []
    found: list[Item] = []
    for split, by_subset in scores.items():
        for subset_scores in by_subset:
            subset = subset_scores["hf_subset"]
            predicted = predictions[subset][split]
            for metric, item_id, *values in read[task.task_type](task, split, subset, predicted, subset_scores):
                found.append(Item(split, subset, metric, values[0], prefix + item_id, *values[1:]))
    return found


def _queries(task: Task, split: str, subset: str, run: dict[str, dict[str, float]], scores: Mapping[str, Any]) -> Rows:
    """The main metric of each query as trec_eval computes it."""
    import pytrec_eval

    metric = task.mteb.metadata.main_score
    merged = metric.startswith(_SUBQUERIES)
    family, _, depth = metric.removeprefix(_SUBQUERIES).rpartition("_")
    if family not in _MEASURES:
        return []
    relevant = task.split_data(split, subset)["relevant_docs"]
    if task.mteb.ignore_identical_ids:
        run = {query: {name: score for name, score in found.items() if name != query} for query, found in run.items()}
    if task.mteb.skip_first_result:
        run = {query: dict(sorted(found.items(), key=lambda pair: -pair[1])[1:]) for query, found in run.items()}
    if merged:
        run, relevant = _merge_subqueries(run, relevant)
    measured = pytrec_eval.RelevanceEvaluator(relevant, {f"{_MEASURES[family]}.{depth}"}).evaluate(run)
    items = [(metric, query, values[f"{_MEASURES[family]}_{depth}"]) for query, values in measured.items()]
    _check_mean(task, metric, items, scores["main_score"])
    return items


def _merge_subqueries(run: Mapping[str, Mapping[str, float]], relevant: Mapping[str, Any]) -> tuple[Any, Any]:
    """Queries "a_0", "a_1", … become one, "a": a document's score is its largest, as in MindSmallReranking."""
    merged: dict[str, dict[str, float]] = defaultdict(dict)
    grades = {}
    for query in relevant:
        base = query.rpartition("_")[0]
        grades[base] = relevant[query]
        for name, score in run[query].items():
            merged[base][name] = max(score, merged[base].get(name, score))
    return dict(merged), grades


def _examples(task: Task, split: str, subset: str, runs: list[list[Any]], scores: Mapping[str, Any]) -> Rows:
    """Share of mteb's experiments that label an example correctly. No items under cross-validation, whose predictions
    are in the order of the folds."""
    if task.mteb.is_cross_validation:
        return []
    gold = np.array(task.split_data(split, subset)[task.mteb.label_column_name])
    right = (np.array(runs) == gold).mean(axis=0)
    items = [("accuracy", str(number), float(share)) for number, share in enumerate(right)]
    _check_mean(task, "accuracy", items, scores["accuracy"])
    return items


def _sets(task: Task, split: str, subset: str, predicted: Any, scores: Mapping[str, Any]) -> Rows:
    """V-measure of each set; in mteb's fast clustering, of each run at each level of labels. No items of a folder's
    sets that overlap, which a test would take for independent observations."""
    if task.from_folder and untestable(task.split_data(split, subset)):
        return []
    measures = scores["v_measures"]
    named = measures.items() if isinstance(measures, Mapping) else [("", measures)]
    items = [
        ("v_measure", f"{level}/{number}".lstrip("/"), float(value))
        for level, values in named
        for number, value in enumerate(values)
    ]
    _check_mean(task, "v_measure", items, scores["v_measure"])
    return items


def _pairs(task: Task, split: str, subset: str, predicted: Mapping[str, Any], scores: Mapping[str, Any]) -> Rows:
    """Cosine and gold value of each pair: rank correlation and average precision are not means over pairs."""
    data = task.split_data(split, subset)
    gold = data["score" if task.task_type == "STS" else task.mteb.label_column_name]
    if task.task_type == "PairClassification" and len(data) == 1:  # an old layout of mteb: lists in one row
        gold = gold[0]
    cosines = np.clip(predicted["cosine_scores"], -1.0, 1.0)
    return [
        ("cosine", str(number), float(cosine), float(value), RESAMPLED)
        for number, (cosine, value) in enumerate(zip(cosines, gold, strict=True))
    ]


def _check_mean(task: Task, metric: str, items: list[tuple[str, str, float]], expected: float) -> None:
    mean = float(np.mean([score for _, _, score in items]))
    if abs(mean - expected) > 1e-5:  # mteb rounds retrieval scores to five decimals
        raise TaskError(
            f"task {task.name!r}: the mean of {metric} of {len(items)} items is {mean:.6f}, mteb says {expected:.6f}: "
            "a bug; please report it with the version of mteb"
        )


SEED = 42
CONSTANT = "constant embedding"
IRRELEVANT = ("_name_or_path", "transformers_version")
"""Entries of a model's configuration that do not change its embeddings."""

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
        model: a `SentenceTransformer`, a `FastEncoder` around one (which keeps embeddings between calls; call its
            `refresh` when weights change), a reference of `scoring.references`, or anything whose `encode` turns a list
            of texts into (B, D) vectors.
        identity: of the model, e.g. the hash of its trial or `model_identity(model)`; stored in every row.
        items: also return per-item rows.
        prompts: text put before inputs, by "TASK-query", "TASK-document", "TASK", then the same with the task type,
            then "query" or "document" (mteb's order; texts of symmetric tasks have no side), then "default";
            `{instruction}` in one becomes the instruction of the task. None: the model's own.

    A model with `task_types` (BM25) is evaluated on these types only. Scores depend neither on the order of the tasks
    nor on the state of the random generators, which is restored afterwards.

    Raises:
        TaskError, ModelError: a task failed; the message names it. ModelError also if an embedding is not finite.
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


def unscorable(model: Any, tasks: Sequence[Task]) -> str:
    """Why some tasks get no score of this model (BM25 only ranks); empty if all do. Raises TaskError if none does."""
    able = getattr(model, "task_types", None)
    unable = [task for task in tasks if able and task.task_type not in able]
    names = ", ".join(f"{task.name} ({task.task_type})" for task in unable)
    why = f"{model.name} only ranks documents for queries, so it has no score on {names}" if unable else ""
    if unable and len(unable) == len(tasks):
        raise TaskError(f"{why}; name a task of type {' or '.join(able or ())}, or another model such as tfidf")
    return why


def model_identity(model: Any) -> str:
    """Content hash of a sentence-transformers model: weights, modules, settings, tokenizer, prompts, limits.

    Models with the same identity give equal embeddings, wherever they are stored. References have their own `identity`.
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
                settings.append({key: content[key] for key in content if key not in IRRELEVANT})
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
    # Many small fits, such as 10 classifiers a task: with a thread for each core they are slower by far.
    one_thread = threadpoolctl.threadpool_limits(1, user_api="blas")
    try:
        with _quiet(), _own_randomness(), _whole_columns(), one_thread:
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
                cache=None,  # mteb's cache confuses models that share a name
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
    """The dtype of most of a model's weights: that of the base, even if adapters and head have another."""
    counts: dict[str, int] = {}
    while not isinstance(model, torch.nn.Module) and hasattr(model, "encoder"):
        model = model.encoder
    for parameter in model.parameters() if isinstance(model, torch.nn.Module) else ():
        name = str(parameter.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=lambda name: counts[name]) if counts else None


def _reseed(task: Any) -> None:
    """Reset the generators that mteb's fast clustering keeps in the task, so that each evaluation draws the same."""
    task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Seeds the random generators inside the block and restores them afterwards."""
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
    """Restores training mode after the block."""
    training = getattr(model, "training", False)
    try:
        yield
    finally:
        if training:
            model.train()


@contextlib.contextmanager
def _whole_columns() -> Iterator[None]:
    """Inside, a dataset returns a column as a list, not as a view that reads each value anew: mteb goes through labels
    and texts value by value, in datasets that it derives itself, and that took longer than the evaluation."""
    lazily = datasets.Dataset.__getitem__

    def at_once(self: datasets.Dataset, key: Any) -> Any:
        value = lazily(self, key)
        return value[:] if isinstance(key, str) else value

    datasets.Dataset.__getitem__ = at_once  # type: ignore[method-assign]
    try:
        yield
    finally:
        datasets.Dataset.__getitem__ = lazily  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses progress bars of `datasets`, and warnings of mteb and scikit-learn about newer versions of tasks,
    models without a name and labels missing from a sample."""
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
