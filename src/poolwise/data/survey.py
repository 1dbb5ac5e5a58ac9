"""What a folder holds: evaluation tasks and training pairs, recognised by their files and columns; and one data set
opened to compare models on it, whose documents are streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.data.own_tasks import Folder, Reader, TaskData, kind_of, read_folder, search_notes
from poolwise.data.pairs import SPLIT_WORDS, choose, find_columns
from poolwise.data.reading import PAGE, file_format, read_records, stem_of
from poolwise.data.tasks import document_text
from poolwise.errors import Mistakes, PoolwiseError, TaskError, enumerate_words

if TYPE_CHECKING:
    import numpy as np

FOLDS = 5
"""Of cross-validation, for labelled texts that have no training file."""
TASK_FILES = {"corpus", "queries", "sets", "task", "qrels"}
"""Names that only evaluation folders have; a `test` file is recognised by its columns."""


@dataclass(frozen=True)
class Found:
    """An evaluation folder or a file of training pairs. `what`: its kind and size in words; `pairs`: rows of training
    pairs, 0 for an evaluation folder."""

    path: Path
    what: str
    pairs: int = 0
    notes: tuple[str, ...] = ()


def survey(folder: Path) -> tuple[list[Found], list[str]]:
    """What can be used of a folder and its direct subfolders, and the names of the files that are not read.

    Raises TaskError: there is no such folder, nothing to use in it, or a mistake in what there is (all are reported).
    """
    if not folder.is_dir():
        raise TaskError(f"{folder}: no such folder; give one with your files. {_layouts()}")
    found: list[Found] = []
    unread: list[str] = []
    problems: list[str] = []
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and p.name != "qrels" and not p.name.startswith("."))
    for place in [folder, *inside]:
        used: set[Path] = set()
        if _is_task(place):
            try:
                read = read_folder(place)
            except PoolwiseError as error:
                problems.append(str(error))
                continue
            used = _files_of(place, read)
            found.append(Found(place, _size(read), notes=read.notes))
        for file in sorted(p for p in place.iterdir() if p.is_file() and p not in used):
            if not _is_pairs(file):
                unread.append(str(file.relative_to(folder)))
                continue
            try:
                found.append(_pairs(file))
            except PoolwiseError as error:
                problems.append(str(error))
    if problems:
        raise TaskError("\n".join(problems))
    if not found:
        names = enumerate_words(unread[:10], max(0, len(unread) - 10)) if unread else "no file"
        raise TaskError(f"{folder}: neither an evaluation task nor training pairs in it (found: {names}). {_layouts()}")
    return found, unread


def _layouts() -> str:
    return f"{PAGE} shows every layout that is read"


def _columns(file: Path) -> Sequence[str]:
    """The columns of a file's first record; none if it cannot be read."""
    if file_format(file) is None:
        return ()
    return next((tuple(record) for _, record in read_records(file, Mistakes(file.name), lambda names: names)), ())


def _fits_pairs(columns: Sequence[str]) -> bool:
    try:
        return bool(find_columns(tuple(columns)))
    except ValueError:
        return False


def _is_task(place: Path) -> bool:
    stems = {stem_of(path): path for path in place.iterdir()}
    if TASK_FILES & stems.keys():
        return True
    test = stems.get("test")
    if test is None or file_format(test) is None:
        return False
    columns = _columns(test)
    return kind_of(columns) is not None or not _fits_pairs(columns)


def _is_pairs(file: Path) -> bool:
    """Training pairs by their columns, unless the file's name is that of another split."""
    word = stem_of(file).replace("_", "-").split("-")[0].lower()
    return (word == "train" or word not in SPLIT_WORDS) and _fits_pairs(_columns(file))


def _pairs(file: Path) -> Found:
    """Counts the rows. Raises DataError for rows that cannot be read."""
    mistakes = Mistakes(str(file), page=PAGE)
    columns = find_columns(tuple(_columns(file)))
    rows = sum(1 for _ in read_records(file, mistakes, choose))
    mistakes.check()
    negatives = f"negatives in {enumerate_words(map(repr, columns.negatives))}" if columns.negatives else "no negatives"
    what = f"training pairs: {rows:,} rows of {columns.query!r} and {columns.positive!r}, {negatives}"
    return Found(file, what, rows, tuple(mistakes.notes))


def _files_of(place: Path, read: Folder) -> set[Path]:
    parts = {"retrieval": {"corpus", "queries"}, "classification": {"train", read.data.split}}
    stems = parts.get(read.data.kind, {"sets", read.data.split}) | {"task"}
    return {path for path in place.iterdir() if stem_of(path) in stems}


def _size(read: Folder) -> str:
    data = read.data
    rows = data.records.get(data.split, [])
    if data.kind == "retrieval":
        corpus, queries, qrels = (len(data.records[part]) for part in ("corpus", "queries", "qrels"))
        size = f"{corpus:,} documents, {queries:,} queries, {qrels:,} judgements"
    elif data.kind == "reranking":
        candidates = sum(len(row["positive"]) + len(row["negative"]) for row in rows)
        size = f"{len(rows):,} queries with {candidates / len(rows):.1f} candidates each"
    elif data.kind == "classification":
        labels = {row["label"] for row in data.records["train"]}
        size = f"{len(data.records['train']):,} training and {len(rows):,} test texts, {len(labels):,} labels"
    elif data.kind == "clustering":
        sets = "1 set" if len(rows) == 1 else f"{len(rows):,} sets, the first"
        size = f"{sets} of {len(rows[0]['sentences']):,} texts"
    else:
        size = f"{len(rows):,} pairs"
    return f"{data.kind} task {read.name!r}: {size}"


class SearchData:
    """A retrieval folder: ids and queries in memory, documents read from the file whenever they are needed."""

    kind, noun = "retrieval", "queries"

    def __init__(self, folder: Path) -> None:
        self.reader = Reader(folder)
        settings = self.reader.settings()
        split = str(settings.get("split", "test"))
        self.name = str(settings.get("name", folder.resolve().name))
        self.without_itself = settings.get("ignore_identical_ids") is True
        queries, qrels = self.reader.read("queries", "queries"), self.reader.read(f"qrels/{split}", "qrels")
        corpus = self.reader.find("corpus")
        if corpus is None:
            self.reader.read("corpus", "corpus")  # which reports that there is none
        self.reader.mistakes.check()
        self.file = corpus or folder
        self.reader.compare_grades(qrels)
        asked = {row["_id"]: row["text"] for _, row in queries}
        wanted = {row["corpus-id"] for _, row in qrels} | asked.keys()
        digest, self.ids, kept = hashlib.sha256(), list[str](), list[dict[str, Any]]()
        for _, row in self.reader.rows(self.file, "corpus"):
            self.ids.append(row["_id"])
            text = document_text(row)
            digest.update(f"{len(text)} {text}".encode())
            if row["_id"] in wanted or not text:
                kept.append(row)
        ids = {"corpus": self.ids, "queries": [row["_id"] for _, row in queries]}
        self.reader.compare_ids(ids, qrels)
        self.reader.mistakes.check()
        self.content = digest.hexdigest()
        self.judged = {row["_id"]: document_text(row) for row in kept}
        grades: dict[str, dict[str, int]] = {}
        for _, row in qrels:
            grades.setdefault(row["query-id"], {})[row["corpus-id"]] = max(0, row["score"])
        self.relevant = {query: each for query, each in grades.items() if max(each.values()) > 0}
        self.queries = {name: text for name, text in asked.items() if name in self.relevant}
        records = {"corpus": kept, "queries": [r for _, r in queries], "qrels": [r for _, r in qrels]}
        notes = search_notes(TaskData("retrieval", records, split, self.without_itself))
        self.notes = [*self.reader.mistakes.notes, *notes]

    def documents(self) -> Iterator[str]:
        """The texts of all documents, in the order of the file."""
        for _, row in self.reader.rows(self.file, "corpus"):
            yield document_text(row)

    @cached_property
    def rank(self) -> np.ndarray:
        """(N,) the order of equal scores: trec_eval puts the document with the highest identifier first."""
        import numpy as np

        order = sorted(range(len(self.ids)), key=self.ids.__getitem__, reverse=True)
        found = np.empty(len(order), np.int64)
        found[order] = np.arange(len(order))
        return found

    def answers(self, query: str) -> list[str]:
        """The texts that are relevant to a query."""
        return [self.judged[name] for name, grade in self.relevant[query].items() if grade and name in self.judged]


class TextData:
    """Pairs or labelled texts, of a folder or of one file. `rows`: as in `own_tasks.TaskData`; `train`: of labelled
    texts, None if there is no training file."""

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        reader = Reader(folder)
        self.train: list[dict[str, Any]] | None = None
        if path.is_dir():
            settings = reader.settings()
            split = str(settings.get("split", "test"))
            self.kind = reader.kind(settings.get("kind"), split)
            reader.mistakes.check()
            if self.kind not in ("sts", "pair_classification", "classification"):
                raise TaskError(
                    f"{path}: ab compares models on retrieval, STS, pair classification and classification data, and "
                    f"this is {self.kind}; `poolwise evaluate MODEL --tasks ./{path.name}` scores one model on it"
                )
            placed = reader.records(self.kind, split)
            reader.mistakes.check()
            reader.compare_rows(self.kind, placed, split)
            self.name = str(settings.get("name", path.resolve().name))
            self.rows = [row for _, row in placed[split]]
            self.train = [row for _, row in placed["train"]] if self.kind == "classification" else None
        else:
            self.name, self.kind = path.name.partition(".")[0], _kind_of_file(path)
            part = reader.rows(path, self.kind)
            placed = {"test": list(part)}
            reader.mistakes.check()
            if self.kind != "classification":
                reader.compare_rows(self.kind, placed, "test")
            self.rows = [row for _, row in placed["test"]]
            self._check_labels(path)
        reader.mistakes.check()
        self.notes = list(reader.mistakes.notes)
        if self.kind == "classification" and self.train is None:
            self.notes.append(f"accuracy by {FOLDS}-fold cross-validation of a logistic regression on the embeddings")
        self.noun = "examples" if self.kind == "classification" else "pairs"

    def _check_labels(self, path: Path) -> None:
        if self.kind != "classification":
            return
        counts = {label: sum(row["label"] == label for row in self.rows) for label in {r["label"] for r in self.rows}}
        rare = sorted(label for label, count in counts.items() if count < FOLDS)
        if len(counts) < 2 or rare:
            why = f"label {rare[0]!r} has {counts[rare[0]]}" if rare else "there is one label only"
            raise TaskError(
                f"{path}: labelled texts in one file are scored by {FOLDS}-fold cross-validation, which needs two "
                f"labels with {FOLDS} texts each, and {why}; add texts, or give a folder with a train and a test file"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold texts."""
        return ("text",) if self.kind == "classification" else ("sentence1", "sentence2")


def _kind_of_file(path: Path) -> str:
    if file_format(path) is None:
        raise TaskError(
            f"{path}: no such kind of data; give a retrieval folder, or a CSV of pairs or labelled texts ({PAGE})"
        )
    mistakes, columns = Mistakes(str(path), TaskError, PAGE), tuple[str, ...]()
    for _, record in read_records(path, mistakes, lambda names: names):
        columns = tuple(record)
        break
    mistakes.check()
    kind = {"labelled": "classification"}.get(str(kind_of(columns)), kind_of(columns))
    if kind not in ("sts", "pair_classification", "classification"):
        raise TaskError(
            f"{path}: columns {', '.join(columns) or 'none'}; expected sentence1, sentence2 and score (STS) or labels "
            f"(pair classification), or text and label (classification). {PAGE} shows each"
        )
    return kind
