"""Evaluation data in memory -> an mteb task object, without `load_dataset`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from poolwise.errors import TaskError

MTEB_TYPES = {
    "retrieval": ("Retrieval", "ndcg_at_10"),
    "reranking": ("Reranking", "map_at_1000"),
    "sts": ("STS", "cosine_spearman"),
    "pair_classification": ("PairClassification", "max_ap"),
    "classification": ("Classification", "accuracy"),
    "clustering": ("Clustering", "v_measure"),
}
"""Kind -> mteb's task type and its main score."""
KINDS = tuple(MTEB_TYPES)


@dataclass(frozen=True)
class TaskData:
    """A task in memory. `records` by kind (`split` is "test" unless said otherwise):

    sts              {split: [{"sentence1", "sentence2", "score"}]}
    pair_classification {split: [{"sentence1", "sentence2", "labels"}]}
    classification   {"train": [{"text", "label"}], split: [...]}
    clustering       {split: [{"sentences": [...], "labels": [...]}]}, one record a set
    reranking        {split: [{"query", "positive": [...], "negative": [...]}]}
    retrieval        {"corpus": [{"_id", "title", "text"}], "queries": [{"_id", "text"}],
                      "qrels": [{"query-id", "corpus-id", "score"}]}
    """

    kind: str
    records: Mapping[str, list[dict[str, Any]]]
    split: str = "test"


def draw_sets(rows: list[dict[str, Any]], sets: int = 10, size: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Clustering sets from labelled texts: `sets` seeded random subsets without replacement, of `size` texts or, where
    there are fewer than 2 × `size`, of half of the texts, so that the sets differ."""
    import numpy as np

    generator = np.random.default_rng(seed)
    count = min(size, math.ceil(len(rows) / 2))
    drawn = []
    for _ in range(sets if rows else 0):
        chosen = [rows[i] for i in generator.permutation(len(rows))[:count]]
        drawn.append({"sentences": [row["text"] for row in chosen], "labels": [row["label"] for row in chosen]})
    return drawn


def content_identity(data: TaskData) -> str:
    """Hash of kind, split, texts and labels, whatever files they came from."""
    content = json.dumps([data.kind, data.split, data.records], sort_keys=True, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()[:24]}"


def mteb_task(name: str, data: TaskData, identity: str) -> Any:
    """An mteb task object of `data`; its data are built when mteb asks for them."""
    from mteb import TaskMetadata, abstasks

    bases = {
        "sts": abstasks.AbsTaskSTS,
        "pair_classification": abstasks.AbsTaskPairClassification,
        "classification": abstasks.AbsTaskClassification,
        "clustering": abstasks.AbsTaskClusteringLegacy,
    }
    task_type, main_score = MTEB_TYPES[data.kind]
    attributes: dict[str, Any] = {
        "metadata": TaskMetadata(
            name=name.replace("/", "--"),  # mteb names a file after it
            description=f"{data.kind} task of poolwise or its user",
            dataset={"path": name, "revision": identity},
            type=cast(Any, task_type),
            category="t2c" if data.kind in ("classification", "clustering") else "t2t",
            eval_splits=[data.split],
            eval_langs=["eng-Latn"],
            main_score=main_score,
        ),
        "load_data": _loader(data),
    }
    if data.kind == "sts":
        scores = [row["score"] for row in data.records[data.split]]
        attributes |= {"min_score": min(scores), "max_score": max(scores)}
    return type("InMemoryTask", (bases.get(data.kind, abstasks.AbsTaskRetrieval),), attributes)()


def _loader(data: TaskData) -> Callable[..., None]:
    def load_data(self: Any, **_: Any) -> None:
        if not self.data_loaded:
            build = {"retrieval": _retrieval, "reranking": _reranking}.get(data.kind, _splits)
            self.dataset = build(data)
            self.data_loaded = True

    return load_data


def _splits(data: TaskData) -> Any:
    """Rows as they are, labels as 0, 1, … in the order of their values (numbers as numbers)."""
    from datasets import Dataset, DatasetDict

    column = {"classification": "label", "clustering": "labels"}.get(data.kind)
    if column is None:
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in data.records.items()})
    labels = {str(label) for rows in data.records.values() for row in rows for label in _listed(row[column])}
    numeric = all(re.fullmatch(r"-?[0-9]+", label) for label in labels)
    ordered = sorted(labels, key=lambda label: (int(label) if numeric else 0, label))
    number = {label: i for i, label in enumerate(ordered)}

    def coded(row: dict[str, Any]) -> dict[str, Any]:
        value = row[column]
        code = [number[str(label)] for label in value] if isinstance(value, list) else number[str(value)]
        return {**row, column: code}

    return DatasetDict({split: Dataset.from_list([coded(row) for row in rows]) for split, rows in data.records.items()})


def _retrieval(data: TaskData) -> Any:
    """Queries without a relevant document have no score and are left out, as in mteb and BEIR."""
    from datasets import Dataset

    relevant: dict[str, dict[str, int]] = {}
    for row in data.records["qrels"]:
        query, document, score = str(row["query-id"]), str(row["corpus-id"]), int(row["score"])
        if relevant.setdefault(query, {}).setdefault(document, score) != score:
            raise TaskError(f"qrels grade document {document!r} for query {query!r} twice, differently; keep one grade")
    relevant = {query: grades for query, grades in relevant.items() if max(grades.values()) > 0}
    corpus = [
        {"id": str(row["_id"]), "title": row.get("title") or "", "text": row["text"]} for row in data.records["corpus"]
    ]
    queries = [{"id": str(row["_id"]), "text": row["text"]} for row in data.records["queries"]]
    queries = [row for row in queries if row["id"] in relevant]
    return _search_data(data.split, Dataset.from_list(corpus), Dataset.from_list(queries), relevant, None)


def _reranking(data: TaskData) -> Any:
    """Each query ranks its own candidates. Identifiers sort so that on ties negatives stand first (trec_eval breaks
    ties by descending identifier): a model that tells nothing apart earns nothing by the order of the file."""
    from datasets import Dataset

    corpus, queries = [], []
    relevant: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for number, row in enumerate(data.records[data.split]):
        query = str(number)
        texts = [(f"a{query}-{i}", text, 1) for i, text in enumerate(row["positive"])]
        texts += [(f"b{query}-{i}", text, 0) for i, text in enumerate(row["negative"])]
        queries.append({"id": query, "text": row["query"]})
        corpus += [{"id": name, "title": "", "text": text} for name, text, _ in texts]
        relevant[query] = {name: grade for name, _, grade in texts}
        candidates[query] = [name for name, _, _ in texts]
    return _search_data(data.split, Dataset.from_list(corpus), Dataset.from_list(queries), relevant, candidates)


def _search_data(split: str, corpus: Any, queries: Any, relevant: Any, candidates: Any) -> Any:
    data = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": candidates}
    return {"default": {split: data}}


def read_columns_whole(data: Any) -> None:
    """Make every dataset inside `data` (nested dictionaries by subset and split) give a column as a list, at once.

    mteb's classification asks a lazy column for each label of each experiment and metric anew, which takes longer than
    everything else together (AmazonCounterfactual: 20 s, with whole columns 1 s). The values are the same.
    """
    from datasets import Dataset

    class WholeColumns(Dataset):
        def __getitem__(self, key: Any) -> Any:
            value = super().__getitem__(key)
            return value[:] if isinstance(key, str) else value

    for part in data.values():
        if isinstance(part, Dataset):
            part.__class__ = WholeColumns
        else:
            read_columns_whole(part)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
