"""Evaluation tasks: official mteb names, benchmarks, own folders and the demo become one kind of task."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from poolwise.data.own_tasks import MTEB_TYPES, TaskData, content_identity, read_folder
from poolwise.errors import PoolwiseError, TaskError, suggest
from poolwise.files import cached_if_unreachable, user_path
from poolwise.study.catalogue import origin


def mteb_task(name: str, data: TaskData, identity: str) -> Any:
    """An mteb task object around `data`; the datasets are built when mteb asks for them."""
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
            name=name.replace("/", "--"),  # mteb uses it as a file name
            description=f"{data.kind} task, built in or the user's own",
            dataset={"path": name, "revision": identity},
            type=cast(Any, task_type),
            category="t2c" if data.kind in ("classification", "clustering") else "t2t",
            eval_splits=[data.split],
            eval_langs=["eng-Latn"],
            main_score=main_score,
        ),
        "load_data": _loader(data),
    }
    if data.kind == "retrieval":
        attributes["ignore_identical_ids"] = data.ignore_identical_ids
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
    """Rows unchanged but for labels, numbered 0, 1, … in the order of their values (numerically if all are numbers)."""
    from datasets import Dataset, DatasetDict

    column = {"classification": "label", "clustering": "labels"}.get(data.kind)
    if column is None:
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in data.records.items()})
    labels = {str(label) for rows in data.records.values() for row in rows for label in _listed(row[column])}
    numeric = all(re.fullmatch(r"-?[0-9]{1,40}", label) for label in labels)
    ordered = sorted(labels, key=lambda label: (int(label) if numeric else 0, label))
    number = {label: i for i, label in enumerate(ordered)}

    def coded(row: dict[str, Any]) -> dict[str, Any]:
        value = row[column]
        code = [number[str(label)] for label in value] if isinstance(value, list) else number[str(value)]
        return {**row, column: code}

    return DatasetDict({split: Dataset.from_list([coded(row) for row in rows]) for split, rows in data.records.items()})


def _retrieval(data: TaskData) -> Any:
    """Queries without a relevant document have no score and are left out, as mteb and BEIR do. A grade below 0 means
    judged, not relevant, for which trec_eval has 0."""
    from datasets import Dataset

    relevant: dict[str, dict[str, int]] = {}
    for row in data.records["qrels"]:
        query, document, score = str(row["query-id"]), str(row["corpus-id"]), max(0, int(row["score"]))
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
    """Each query ranks its own candidates. trec_eval breaks ties by descending identifier, so negatives get the higher
    ones: a model that scores all candidates alike gains nothing from their order in the file."""
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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


PINNING_BENCHMARKS = ("MTEB(eng, v1)", "MTEB(eng, v2)")

# The task lists of the paper's published evaluation script (commit 57791d5): CQADupstack is not among them, and nine of
# the clustering tasks are the faster ".v2" ones. Splits and subsets are those of "MTEB(eng, v1)" if it has the task.
PAPER_TASKS: dict[str, tuple[str, ...]] = {
    "STS": ("BIOSSES", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark"),
    "Classification": (
        "AmazonPolarityClassification",
        "Banking77Classification",
        "EmotionClassification",
        "ImdbClassification",
        "ToxicConversationsClassification",
        "TweetSentimentExtractionClassification",
    ),
    "Clustering": (
        "ArxivClusteringP2P",
        "ArxivClusteringS2S",
        "BiorxivClusteringP2P.v2",
        "BiorxivClusteringS2S.v2",
        "MedrxivClusteringP2P.v2",
        "MedrxivClusteringS2S.v2",
        "RedditClustering.v2",
        "RedditClusteringP2P.v2",
        "StackExchangeClustering.v2",
        "StackExchangeClusteringP2P.v2",
        "TwentyNewsgroupsClustering.v2",
    ),
    "Retrieval": (
        "ArguAna",
        "ClimateFEVER",
        "DBPedia",
        "FEVER",
        "FiQA2018",
        "HotpotQA",
        "MSMARCO",
        "NFCorpus",
        "NQ",
        "QuoraRetrieval",
        "SCIDOCS",
        "SciFact",
        "TRECCOVID",
        "Touche2020",
    ),
    "Reranking": ("AskUbuntuDupQuestions", "MindSmallReranking", "SciDocsRR", "StackOverflowDupQuestions"),
    "PairClassification": ("SprintDuplicateQuestions", "TwitterSemEval2015", "TwitterURLCorpus"),
    "Summarization": ("SummEval",),
}

SEARCH_TYPES = ("Retrieval", "Reranking")
"""Task types with queries and a corpus."""
DEMO_EXPERIMENTS = 4
"""Classifiers trained for a built-in classification task. Another number would change the demo's scores."""


@dataclass(frozen=True, eq=False)
class Task:
    """A task to evaluate on. `task_type` is mteb's name of the type, `source` the origin it shares with related tasks,
    `identity` determines its data: "path@revision" of an official dataset, else a hash of the texts and labels. `mteb`
    is the mteb task object, restricted to `splits` and `subsets`. `notes`: how a folder was read."""

    name: str
    task_type: str
    source: str
    identity: str
    mteb: Any
    splits: tuple[str, ...]
    subsets: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def texts(self) -> Iterator[str]:
        """Every text that this task gives to a model, as the model gets it (without prompts), classification's training
        texts included. Loads the data; raises `TaskError` if that fails."""
        for part, split, subset in self._loaded_splits():
            yield from (text for _, text in part.split_texts(split, subset))

    def texts_by_kind(self) -> Iterator[tuple[str, str]]:
        """(kind of `pairs.KINDS`, text) of every text, to be compared with training data. A document with a title comes
        twice: as a model reads it, and without the title, as other data sets have it."""
        for part, split, subset in self._loaded_splits():
            yield from part.split_texts(split, subset)
            if self.task_type in SEARCH_TYPES:
                corpus = part.split_data(split, subset)["corpus"]
                yield from (("documents", row["text"]) for row in corpus if row.get("title") and row["text"])

    def _loaded_splits(self) -> Iterator[tuple[Task, str, str]]:
        for part in self.parts():
            part.load()
            yield from ((part, split, subset) for split in self.splits for subset in self.subsets)

    def instruction(self, side: str | None) -> str:
        """What mteb tells a model to do with a text of this task, its `side` being query, document or None.

        It is the task's own instruction, else that of its type; empty for a side that has none.
        """
        own = self.mteb.metadata.prompt
        if isinstance(own, dict) and side:
            return str(own.get(side) or "")
        return str((None if isinstance(own, dict) else own) or self.mteb.abstask_prompt)

    @property
    def in_memory(self) -> bool:
        """Whether the data are here already, as those of a folder and of a built-in task; else they are downloaded."""
        return self.identity.startswith("sha256:")

    @property
    def from_folder(self) -> bool:
        """Whether the data were read from a folder of files."""
        return self.in_memory and not self.name.startswith("demo/")

    def parts(self) -> list[Task]:
        """The tasks of an aggregate (CQADupstackRetrieval); any other task is its own only part."""
        if not self.mteb.is_aggregate:
            return [self]
        return [_official(task, self.source) for task in self.mteb.metadata.tasks]

    def load(self) -> None:
        """Load the data, once. Raises `TaskError` with the task, its dataset and the loader's message."""
        if self.mteb.data_loaded:
            return
        try:
            with cached_if_unreachable(self.identity):
                self.mteb.load_data()
        except Exception as error:  # whatever a hub client, a parser or a transform may raise
            raise TaskError(
                f"task {self.name!r}: its data ({self.identity}) cannot be loaded: {type(error).__name__}: {error}. "
                "Check the connection (or HF_ENDPOINT, HF_HUB_OFFLINE and the cache)"
            ) from error

    def split_data(self, split: str, subset: str) -> Any:
        """The loaded data of one split, in the form that mteb's evaluators take."""
        data = self.mteb.dataset
        return data[split] if subset == "default" and subset not in data else data[subset][split]

    def split_texts(self, split: str, subset: str, kind: str = "test texts") -> Iterator[tuple[str, str]]:
        """(kind, text) of one loaded split; `kind` is for texts that are neither queries nor documents."""
        data = self.split_data(split, subset)
        if self.task_type in SEARCH_TYPES:
            yield from (("queries", text) for text in data["queries"]["text"])
            yield from (("documents", document_text(document)) for document in data["corpus"])
            return
        if self.task_type == "Classification" and self.mteb.train_split != split:
            yield from self.split_texts(self.mteb.train_split, subset, "training texts")
        for column in self._text_columns():
            yield from ((kind, text) for text in _flat(data[column]))

    def _text_columns(self) -> Sequence[str]:
        if self.task_type == "STS":
            return self.mteb.column_names
        if self.task_type == "PairClassification":
            return (self.mteb.input1_column_name, self.mteb.input2_column_name)
        if self.task_type == "Summarization":
            return (self.mteb.human_summaries_column_name, self.mteb.machine_summaries_column_name)
        if not hasattr(self.mteb, "input_column_name"):
            raise TaskError(f"task {self.name!r}: tasks of type {self.task_type} cannot be read yet; leave it out")
        return (self.mteb.input_column_name,)


def document_text(document: dict[str, Any]) -> str:
    """A document as a model reads it: title and text, joined as mteb joins them."""
    title = document.get("title") or ""
    return f"{title} {document['text']}".strip()


def resolve_tasks(names: Sequence[str], base_dir: Path) -> list[Task]:
    """The tasks behind `names`, each once, in the order given. Folders are relative to `base_dir`.

    Raises `TaskError` with all problems at once: unknown names with the nearest known one, folders that are missing or
    malformed (file and line), two different tasks of one name, and one task with different splits or subsets.
    """
    tasks: dict[str, Task] = {}
    problems: list[str] = []
    for name in names:
        try:
            for task in _resolve(name, base_dir):
                known = tasks.setdefault(task.name, task)
                if known.identity != task.identity:
                    problems.append(
                        f"two tasks are called {task.name!r}; give the folder another `name` in its task.toml"
                    )
                elif (known.splits, known.subsets) != (task.splits, task.subsets):
                    cuts = "; ".join(f"{', '.join(part.splits)} of {_few(part.subsets)}" for part in (known, task))
                    problems.append(
                        f"{name!r} lists task {task.name} again with different splits or subsets ({cuts}); keep one"
                    )
        except PoolwiseError as error:
            problems.append(str(error))
    if problems:
        raise TaskError("\n".join(problems))
    return list(tasks.values())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _resolve(name: str, base_dir: Path) -> list[Task]:
    if name == "demo" or name.startswith("demo/"):
        return _built_in(name)
    if name.startswith((".", "/", "~")):
        path = user_path(name, base_dir)
        if not path.is_dir():
            near = suggest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
            raise TaskError(f"evaluation folder {name!r}: no such folder, seen from {str(base_dir)!r}{near}")
        folder = read_folder(path)
        return [task_from_data(folder.name, folder.data, folder.source, folder.notes)]
    import mteb

    if name == "paper":
        return [_by_name(task) for group in PAPER_TASKS.values() for task in group]
    try:
        return [_official(task) for task in mteb.get_benchmark(name).tasks]
    except KeyError:
        pass
    from mteb.get_tasks import TASK_LIST

    known = {task.metadata.name for task in TASK_LIST if task.metadata.modalities == ["text"]}
    if name in known:
        return [_by_name(name)]
    hint = suggest(name, [*known, *(benchmark.name for benchmark in mteb.get_benchmarks()), "paper", "demo"])
    if user_path(name, base_dir).exists():
        hint = f"; did you mean the folder {'./' + name!r}?"
    raise TaskError(
        f"unknown task {name!r} (allowed: a text task of mteb, a benchmark such as 'MTEB(eng, v2)', 'paper', 'demo', "
        f"'demo/NAME', or a folder written './name'){hint}"
    )


def _by_name(name: str) -> Task:
    """An official task, with the splits and subsets of the English benchmarks if one of them contains it."""
    import mteb

    for benchmark in PINNING_BENCHMARKS:
        for task in mteb.get_benchmark(benchmark).tasks:
            if task.metadata.name == name:
                return _official(task)
    return _official(mteb.get_task(name))


def _official(task: Any, source: str | None = None) -> Task:
    import mteb

    metadata = task.metadata
    if list(metadata.modalities) != ["text"]:
        raise TaskError(
            f"task {metadata.name!r} is for {', '.join(metadata.modalities)}; poolwise compares text encoders"
        )
    parts = metadata.tasks if task.is_aggregate else [task]
    data = ", ".join(f"{part.metadata.dataset['path']}@{part.metadata.dataset['revision']}" for part in parts)
    if task.is_aggregate:
        data = f"{len(parts)} datasets, sha256:{hashlib.sha256(data.encode()).hexdigest()[:24]}"
    if source is None:
        source = origin(metadata.name) or parts[0].metadata.dataset["path"].split("/")[-1].lower()
    return Task(
        name=metadata.name,
        task_type=metadata.type,
        source=source,
        identity=f"{data}, mteb {mteb.__version__}",
        mteb=task,
        splits=tuple(task.eval_splits),
        subsets=tuple(task.hf_subsets),
    )


def _built_in(name: str) -> list[Task]:
    from poolwise import demo

    names = demo.task_names()
    if name == "demo":
        return [task for each in names for task in _built_in(each)]
    if name not in names:
        raise TaskError(f"unknown built-in task {name!r} (allowed: demo, {', '.join(names)}){suggest(name, names)}")
    mechanism = name.removeprefix("demo/").rpartition("-")[0]
    task = task_from_data(name, TaskData(**demo.task_data(name)), source=mechanism or name)
    if task.task_type == "Classification":  # mteb's ten draws from so small a training set would hardly differ
        task.mteb.n_experiments = DEMO_EXPERIMENTS
    if task.task_type == "Retrieval":  # the corpora have 30 to 72 documents
        task.mteb.k_values = (1, 3, 10)
    return [task]


def task_from_data(name: str, data: TaskData, source: str, notes: tuple[str, ...] = ()) -> Task:
    """A task from texts in memory. Its identity is the hash of kind, texts and labels."""
    identity = content_identity(data)
    task = mteb_task(name, data, identity)
    return Task(name, task.metadata.type, source, identity, task, (data.split,), ("default",), notes)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value
