"""Scores of single queries, examples and sets, from the predictions that mteb writes down.

Wherever items have scores of the main metric, their mean is checked against mteb's main score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from poolwise.errors import TaskError
from poolwise.tasks import Task

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
"""(metric, item id, score) or (metric, item id, model's output, gold value, note)."""


class Item(NamedTuple):
    """One item's row; `gold` is set where `score` is no score but the model's output, to be resampled with it."""

    split: str
    subset: str
    metric: str
    score: float
    item_id: str
    gold: float | None = None
    note: str | None = None


def item_scores(task: Task, predictions: Mapping[str, Any], scores: Mapping[str, Any], prefix: str = "") -> list[Item]:
    """Items of every split and subset of one task whose data are loaded.

    Args:
        predictions: mteb's prediction file, [subset][split].
        scores: `TaskResult.scores`, {split: [one dictionary a subset]}.
        prefix: put before item ids (the part's name in an aggregate task).

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
    """trec_eval's main metric of each query, by pytrec_eval."""
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
    """Share of mteb's experiments that label an example rightly. Cross-validation predicts in fold order: no items."""
    if task.mteb.is_cross_validation:
        return []
    gold = np.array(task.split_data(split, subset)[task.mteb.label_column_name])
    right = (np.array(runs) == gold).mean(axis=0)
    items = [("accuracy", str(number), float(share)) for number, share in enumerate(right)]
    _check_mean(task, "accuracy", items, scores["accuracy"])
    return items


def _sets(task: Task, split: str, subset: str, predicted: Any, scores: Mapping[str, Any]) -> Rows:
    """V-measure of each set; in mteb's fast form of each run at each level of labels."""
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
    """Cosine and gold value of each pair; a rank correlation or an average precision is no mean over pairs."""
    data = task.split_data(split, subset)
    gold = data["score" if task.task_type == "STS" else task.mteb.label_column_name]
    if task.task_type == "PairClassification" and len(data) == 1:  # mteb's old layout: lists in one row
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
