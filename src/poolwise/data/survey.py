"""What a folder holds: evaluation tasks and training pairs, recognised by their files and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from poolwise.data.own_tasks import Folder, kind_of, read_folder, stem_of
from poolwise.data.pairs import SPLIT_WORDS, choose, find_columns
from poolwise.data.reading import PAGE, file_format, read_records
from poolwise.errors import Mistakes, PoolwiseError, TaskError, enumerate_words

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
        size = f"{len(rows):,} sets, the first of {len(rows[0]['sentences']):,} texts"
    else:
        size = f"{len(rows):,} pairs"
    return f"{data.kind} task {read.name!r}: {size}"
