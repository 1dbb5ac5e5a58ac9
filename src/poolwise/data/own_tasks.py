"""Users' own evaluation folders: files -> `TaskData`, every mistake with its file and line."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolwise.data.reading import (
    FORMATS,
    PAGE,
    Placed,
    file_format,
    is_delimited,
    is_list,
    read_records,
    stem_of,
    task_folders,
    text_problem,
)
from poolwise.errors import Mistakes, TaskError, enumerate_words, name_problem, short, suggest
from poolwise.files import LONGEST_NAME, MOST_TOML_BYTES, parse_json, parse_toml, read_bytes, too_long
from poolwise.study.catalogue import origin

MTEB_TYPES = {
    "retrieval": ("Retrieval", "ndcg_at_10"),
    "reranking": ("Reranking", "map_at_1000"),
    "sts": ("STS", "cosine_spearman"),
    "pair_classification": ("PairClassification", "cosine_ap"),
    "classification": ("Classification", "accuracy"),
    "clustering": ("Clustering", "v_measure"),
}
"""Kind -> mteb's task type and the main score: mteb's own, but for pair classification, where mteb has `max_ap`, the
largest of four similarities' average precisions. Each pair's cosine is what can be compared and what is deployed."""
KINDS = tuple(MTEB_TYPES)
HIGHEST_GRADE = 1000
"""The highest relevance grade: trec_eval allocates memory for every grade up to it and crashes on very high ones."""
TOML_KEYS = ("kind", "name", "source", "split", "ignore_identical_ids")


@dataclass(frozen=True)
class TaskData:
    """A task in memory. `records` by kind (`split` is "test" by default):

    sts              {split: [{"sentence1", "sentence2", "score"}]}
    pair_classification {split: [{"sentence1", "sentence2", "labels"}]}
    classification   {"train": [{"text", "label"}], split: [...]}
    clustering       {split: [{"sentences": [...], "labels": [...]}]}, one record a set
    reranking        {split: [{"query", "positive": [...], "negative": [...]}]}
    retrieval        {"corpus": [{"_id", "title", "text"}], "queries": [{"_id", "text"}],
                      "qrels": [{"query-id", "corpus-id", "score"}]}

    ignore_identical_ids: a document with the id of the query is not among its results (retrieval)
    """

    kind: str
    records: Mapping[str, list[dict[str, Any]]]
    split: str = "test"
    ignore_identical_ids: bool = False


@dataclass(frozen=True)
class Folder:
    """The content of a folder: its data, the task's name, the origin it shares with related tasks, and what the user
    should know of how it was read."""

    data: TaskData
    name: str
    source: str
    notes: tuple[str, ...] = ()


def content_identity(data: TaskData) -> str:
    """Hash of all that scores depend on (kind, split, texts, labels), whatever files they came from."""
    content = json.dumps([data.kind, data.split, data.records], sort_keys=True, ensure_ascii=False)
    content += " ignore_identical_ids" * data.ignore_identical_ids
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()[:24]}"


def read_folder(path: Path) -> Folder:
    """Read and check a user's folder.

    Raises TaskError with every mistake found: file, line, column, value and what is allowed.
    """
    from poolwise.data.rows import clustering_sets, untestable  # with numpy and pyarrow, which most names do not need

    reader = Reader(path)
    settings = reader.settings()
    split = str(settings.get("split", "test"))
    kind = reader.kind(settings.get("kind"), split)
    if not kind:
        reader.mistakes.check()
    placed = reader.records(kind, split)
    reader.mistakes.check()
    reader.compare_rows(kind, placed, split)
    reader.mistakes.check()
    records = {part: [row for _, row in rows] for part, rows in placed.items()}
    if kind == "clustering" and "text" in records[split][0]:
        records[split] = clustering_sets(records[split])
    name = str(settings.get("name", path.resolve().name))
    if problem := name_problem(name):
        reader.mistakes.add("", f"the folder's name {problem}, or give the task a name in task.toml")
        reader.mistakes.check()
    if too_long(name):
        reader.mistakes.add("", f"the name {short(name)} is longer than {LONGEST_NAME} bytes; set name in task.toml")
        reader.mistakes.check()
    data = TaskData(kind, records, split, settings.get("ignore_identical_ids") is True)
    notes = [*reader.mistakes.notes, *(search_notes(data) if kind == "retrieval" else [])]
    if kind == "clustering":
        notes += filter(None, [untestable(records[split])])
    source, known = settings.get("source"), origin(name)
    if source is None and known:
        notes.append(f"by its name, its source is {known!r}, as for mteb's task; `source` in task.toml overrides it")
    return Folder(data, name, str(source or known or name), tuple(f"{name}: {note}" for note in notes))


def search_notes(data: TaskData) -> list[str]:
    """What people trip over in retrieval data, counted."""
    from poolwise.data.rows import normalise  # with numpy, which is not needed to resolve other tasks

    def same_text(query: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
        titled = f"{document['title']} {document['text']}"
        return normalise(query["text"]) in (normalise(document["text"]), normalise(titled))

    corpus, queries = ({row["_id"]: row for row in data.records[part]} for part in ("corpus", "queries"))
    qrels = data.records["qrels"]
    notes = []

    def note(names: Iterable[str], noun: str, rest: str) -> None:
        if found := list(dict.fromkeys(names)):
            nouns = noun if len(found) == 1 else "queries" if noun == "query" else f"{noun}s"
            shown = enumerate_words(map(repr, found[:3]), max(0, len(found) - 3))
            notes.append(f"{len(found):,} {nouns}{rest} ({shown})")

    missing = (row["corpus-id"] for row in qrels if row["corpus-id"] not in corpus)
    note(missing, "judged document", " missing from the corpus, so never found")
    note((name for name, row in corpus.items() if not row["text"] and not row["title"]), "empty document", "")
    negative = (row["corpus-id"] for row in qrels if row["score"] < 0)
    note(negative, "document", " graded below 0, which means judged and not relevant")
    judged = {row["query-id"] for row in qrels if row["score"] > 0}
    note((name for name in queries if name not in judged), "query", " without a relevant document, left out")
    same = {name: row for name, row in queries.items() if name in corpus and same_text(row, corpus[name])}
    if data.ignore_identical_ids:
        note(same, "query", " identical to the document of the same id, which is left out of the results")
        others = (name for name in queries if name in corpus and name not in same)
        note(others, "query", " with the id of a document of another text, left out of the results; rename one of them")
    else:
        advice = "write ignore_identical_ids = true in task.toml to leave it out, as mteb and BEIR do for such data"
        note(same, "query", f" identical to the document of the same id, which is found first; {advice}")
    return notes


# Values: what a column may hold. Each function returns the value or raises ValueError with what was expected.


def _text(value: object) -> str:
    if value is None:
        raise ValueError("expected a text")
    problem = text_problem(value)
    if "surrogate" in problem:
        raise ValueError("expected valid Unicode, without unpaired surrogates")
    if problem:
        raise ValueError("expected a text that is not empty")
    return str(value)


def _text_or_empty(value: object) -> str:
    return "" if isinstance(value, str) and not value.strip() else _text(value)


def _title(value: object) -> str:
    return "" if value is None else _text_or_empty(value)


def _name(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or text_problem(str(value)):
        raise ValueError("expected a text or a whole number")
    return str(value).strip()


def _number(value: object) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("expected a number")
    return number


def _grade(value: object) -> int:
    number = _number(value)
    if number != int(number) or abs(number) > HIGHEST_GRADE:
        raise ValueError(f"expected a whole number from -{HIGHEST_GRADE} to {HIGHEST_GRADE} (above 0: relevant)")
    return int(number)


def _binary(value: object) -> int:
    if _number(value) not in (0, 1):
        raise ValueError("expected 1 (positive) or 0 (negative)")
    return int(_number(value))


def _list_of(parse: Callable[[object], str]) -> Callable[[object], list[str]]:
    def parse_list(value: object) -> list[str]:
        if isinstance(value, str):
            try:
                value = parse_json(value, finite=False, unicode=False)
            except ValueError:
                raise ValueError('expected a list (in CSV or TSV a JSON array, ["a", "b"])') from None
        if not isinstance(value, list) or not value:
            raise ValueError("expected a list that is not empty")
        return [parse(entry) for entry in value]

    return parse_list


Columns = dict[str, Callable[[object], Any]]
COLUMNS: dict[str, Columns] = {
    "sts": {"sentence1": _text, "sentence2": _text, "score": _number},
    "pair_classification": {"sentence1": _text, "sentence2": _text, "labels": _binary},
    "classification": {"text": _text, "label": _name},
    "reranking": {"query": _text, "positive": _list_of(_text), "negative": _list_of(_text)},
    "clustering": {"sentences": _list_of(_text), "labels": _list_of(_name)},
    "corpus": {"_id": _name, "title": _title, "text": _text_or_empty},
    "queries": {"_id": _name, "text": _text},
    "qrels": {"query-id": _name, "corpus-id": _name, "score": _grade},
}
OPTIONAL = {"title"}


def chooser(part: str) -> Callable[[Sequence[str]], Sequence[str]]:
    """Picks the columns of a part of a task (a key of `COLUMNS`) from a file's; see `reading.Choose`."""
    columns = COLUMNS[part]

    def choose(names: Sequence[str]) -> Sequence[str]:
        if twice := [name for name in columns if list(names).count(name) > 1]:
            raise ValueError(f"column(s) {', '.join(map(repr, twice))} more than once in the header; keep one of each")
        if missing := [name for name in columns if name not in names and name not in OPTIONAL]:
            raise ValueError(f"missing column(s) {', '.join(missing)}; found {', '.join(names) or 'none'}")
        return [name for name in columns if name in names]

    return choose


def kind_of(names: Sequence[str]) -> str | None:
    """The kind of task whose columns these are; "labelled" for texts with labels, which two kinds have."""
    for kind in ("reranking", "pair_classification", "sts", "clustering"):
        if set(COLUMNS[kind]) <= set(names):
            return kind
    return "labelled" if {"text", "label"} <= set(names) else None


class Reader:
    """One folder and the mistakes in it; `records` reads a whole task, `rows` one file row by row."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.mistakes = Mistakes(f"evaluation folder {folder}", TaskError, PAGE)

    def settings(self) -> dict[str, Any]:
        path, mistakes = self.folder / "task.toml", self.mistakes.within("task.toml")
        if not path.exists():
            return {}
        try:
            settings = parse_toml(read_bytes(path, MOST_TOML_BYTES))
        except OSError as error:
            mistakes.add("", f"cannot be read: {error.strerror}; write a file of that name, or remove it")
            return {}
        except ValueError as error:
            mistakes.add("", f"not valid TOML: {error}")
            return {}
        for key, value in settings.items():
            if key not in TOML_KEYS:
                allowed = f"(allowed: {', '.join(TOML_KEYS)}){suggest(key, TOML_KEYS)}"
                mistakes.add("", f"unknown key {key!r} {allowed}")
            elif key == "ignore_identical_ids" and not isinstance(value, bool):
                mistakes.add("", f"{key} = {short(value)}: expected true or false")
            elif key != "ignore_identical_ids" and (not isinstance(value, str) or not value.strip()):
                mistakes.add("", f"{key} = {short(value)}: expected a text that is not empty")
            elif isinstance(value, str) and (problem := name_problem(value)):
                mistakes.add("", f"{key} {problem}")
        if "ignore_identical_ids" in settings and settings.get("kind", "retrieval") != "retrieval":
            mistakes.add("", f"ignore_identical_ids is for retrieval, and kind = {settings['kind']!r}")
        return settings

    def find(self, stem: str) -> Path | None:
        """The file of that name in any format; a mistake if there are several."""
        place = (self.folder / stem).parent
        files = sorted(place.iterdir()) if place.is_dir() else []
        found = [f for f in files if f.is_file() and file_format(f) and stem_of(f) == Path(stem).name]
        if len(found) > 1:
            self.mistakes.add("", f"{stem}: several files hold it ({enumerate_words(f.name for f in found)}); keep one")
        return found[0] if found else None

    def kind(self, declared: object, split: str) -> str:
        """The kind of task, by declaration or by the files and their columns ("" if that is a mistake)."""
        if declared is not None:
            if declared not in KINDS:
                allowed = f"(allowed: {', '.join(KINDS)}){suggest(declared, KINDS)}"
                self.mistakes.within("task.toml").add("", f"kind = {short(declared)} {allowed}")
            return str(declared) if isinstance(declared, str) and declared in KINDS else ""
        if self.find("corpus") or self.find("queries") or (self.folder / "qrels").is_dir():
            return "retrieval"
        if self.find("sets"):
            return "clustering"
        path = self.find(split)
        if path is None:
            files = ", ".join(sorted(f.name for f in self.folder.iterdir() if f.is_file())) or "no file"
            if files == "no file" and (inside := task_folders(self.folder)):
                shown = enumerate_words(inside[:5], max(0, len(inside) - 5))
                self.mistakes.add("", f"holds the tasks {shown}; name one of them, such as {self.folder / inside[0]}")
                return ""
            self.mistakes.add(
                "",
                f"holds {files}; expected {split}.jsonl (or csv, tsv, parquet, gz), sets.*, or corpus.*, queries.* and "
                'qrels/. Another split is named by `split = "…"` in task.toml',
            )
            return ""
        kind = self.kind_by_columns(path)
        if kind != "labelled":
            return kind
        if self.find("train"):
            return "classification"
        self.mistakes.within(path.name).add(
            "",
            "has texts and labels, and there is no train file. For classification add train.jsonl (or csv, …) with the "
            'texts to train on; for clustering write kind = "clustering" in task.toml',
        )
        return ""

    def kind_by_columns(self, path: Path) -> str:
        mistakes = self.mistakes.within(path.name)

        def choose(names: Sequence[str]) -> Sequence[str]:
            if names and kind_of(names) is None:
                forms = "; ".join(f"{kind}: {', '.join(COLUMNS[kind])}" for kind in KINDS if kind in COLUMNS)
                raise ValueError(f"columns {sorted(set(names))} fit no kind of task ({forms})")
            return names

        for place, record in read_records(path, mistakes, choose):
            kind = kind_of(tuple(record))
            if kind is None:  # an empty object; other columns are refused by `choose`
                mistakes.add(place, "a record without columns")
            return kind or ""
        if not self.mistakes:
            mistakes.add("", "holds no row")
        return ""

    def records(self, kind: str, split: str) -> dict[str, list[Placed]]:
        if kind == "retrieval":
            parts = {"corpus": "corpus", "queries": "queries", "qrels": f"qrels/{split}"}
            found = {part: self.read(stem, part) for part, stem in parts.items()}
            self.compare_grades(found["qrels"])
            return found
        if kind == "classification":
            return {part: self.read(part, kind) for part in ("train", split)}
        if kind == "clustering":
            if self.find("sets"):
                return {split: self.read("sets", kind)}
            path = self.find(split)
            labelled = path is not None and self.kind_by_columns(path) == "labelled"
            return {split: self.read(split, "classification" if labelled else kind)}
        return {split: self.read(split, kind)}

    def read(self, stem: str, part: str) -> list[Placed]:
        """All rows of one file, reduced to the columns of `part` and checked; malformed ones become mistakes."""
        path = self.find(stem)
        if path is None:
            formats = ", ".join(FORMATS)
            self.mistakes.add("", f"{stem}: no such file; expected {stem} as one of {formats}, or one of them with .gz")
            return []
        return list(self.rows(path, part))

    def rows(self, path: Path, part: str) -> Iterator[Placed]:
        """`read` of the file at `path`, row by row."""
        where, columns, some = str(path.relative_to(self.folder)), COLUMNS[part], False
        mistakes, cells = self.mistakes.within(where), is_delimited(path)
        for place, record in read_records(path, mistakes, chooser(part)):
            clean = {}
            for name, parse in columns.items():
                value = record.get(name)
                try:
                    if cells and parse in (_text, _text_or_empty, _title) and is_list(str(value)):
                        raise ValueError("expected one text, not a list; write one text a row")
                    clean[name] = parse(value)
                except ValueError as error:
                    mistakes.add(place, f"column {name!r}: {error}", value)
            if len(clean) == len(columns):
                some = True
                yield f"{where}, {place}", clean
        if not some and not self.mistakes:
            mistakes.add("", "holds no row")

    def compare_rows(self, kind: str, records: dict[str, list[Placed]], split: str) -> None:
        """Mistakes that no single row shows: one label only, unknown identifiers, lists of unequal length."""
        rows = records.get(split, [])
        if kind == "sts" and len({row["score"] for _, row in rows}) < 2:
            self.mistakes.add(split, "all scores are equal; a rank correlation needs at least two different ones")
        if kind == "pair_classification" and len({row["labels"] for _, row in rows}) < 2:
            self.mistakes.add(split, "all labels are equal; average precision needs pairs of both labels")
        if kind == "classification":
            known = {row["label"] for _, row in records["train"]}
            if len(known) < 2:
                self.mistakes.add("train", "only one label; classification needs at least two")
            for place, row in rows:
                if row["label"] not in known:  # no classifier could ever predict it
                    self.mistakes.add(place, "column 'label': expected a label that the train file has", row["label"])
        for place, row in rows if kind == "clustering" and "sentences" in rows[0][1] else ():
            if len(row["sentences"]) != len(row["labels"]):
                self.mistakes.add(place, f"{len(row['sentences'])} sentences but {len(row['labels'])} labels")
            elif len(set(row["labels"])) < 2:
                self.mistakes.add(place, "only one label; clustering needs at least two")
        if kind == "retrieval":
            ids = {part: [row["_id"] for _, row in records[part]] for part in ("corpus", "queries")}
            self.compare_ids(ids, records["qrels"])

    def compare_grades(self, rows: list[Placed]) -> None:
        grades: dict[tuple[str, str], int] = {}
        for place, row in rows:
            query, document, score = row.values()
            first = grades.setdefault((query, document), score)
            if first != score:
                judgement = f"score {score} for query {query!r} and document {document!r}"
                self.mistakes.add(place, f"{judgement}, but an earlier line says {first}; keep one of the lines")

    def compare_ids(self, ids: Mapping[str, Sequence[str]], qrels: Sequence[Placed]) -> None:
        known = {part: Counter(names) for part, names in ids.items()}
        for part, counts in known.items():
            if twice := [name for name, count in counts.items() if count > 1]:
                self.mistakes.add(part, f"_id given to more than one row: {', '.join(twice[:5])}")
        for column, part in (("corpus-id", "corpus"), ("query-id", "queries")):
            unknown = sorted({row[column] for _, row in qrels} - known[part].keys())
            found = any(row[column] in known[part] for _, row in qrels if row["score"] > 0)
            if unknown and (part == "queries" or not found):  # some documents may be missing, but not all
                self.mistakes.add("qrels", f"{len(unknown)} {column}(s) not in {part}, e.g. {', '.join(unknown[:5])}")
        if not any(row["score"] > 0 for _, row in qrels):
            self.mistakes.add("qrels", "no document is relevant to any query (no score above 0)")
