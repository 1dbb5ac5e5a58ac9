"""Users' own evaluation folders: files -> `TaskData`, every mistake with its file and line."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import tomllib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poolwise.errors import TaskError, suggest

HIGHEST_GRADE = 1000
"""The highest relevance grade allowed: trec_eval allocates memory for every grade up to it and crashes on high ones."""
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


EXTENSIONS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
TOML_KEYS = ("kind", "name", "source", "split")
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Folder:
    """What a folder holds: its data and how it wants to be called."""

    data: TaskData
    name: str
    source: str


class _MalformedError(ValueError):
    """One value that is not what its column holds; the message continues "file, line n: column 'c': "."""


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _MalformedError(f"expected a text that is not empty, got {_short(value)}")
    return value


def _text_or_empty(value: object) -> str:
    return "" if value is None or (isinstance(value, str) and not value.strip()) else _text(value)


def _name(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise _MalformedError(f"expected a text or a whole number, got {_short(value)}")
    return str(value).strip()


def _number(value: object) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _MalformedError(f"expected a number, got {_short(value)}")
    return number


def _whole(value: object) -> int:
    number = _number(value)
    if number != int(number) or not 0 <= number <= HIGHEST_GRADE:
        raise _MalformedError(f"expected a whole number from 0 to {HIGHEST_GRADE}, got {_short(value)}")
    return int(number)


def _binary(value: object) -> int:
    if _number(value) not in (0, 1):
        raise _MalformedError(f"expected 1 (positive) or 0 (negative), got {_short(value)}")
    return int(_number(value))


def _list_of(parse: Callable[[object], str]) -> Callable[[object], list[str]]:
    def parse_list(value: object) -> list[str]:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                form = 'expected a list (in CSV or TSV a JSON array, ["a", "b"])'
                raise _MalformedError(f"{form}, got {_short(value)}") from None
        if not isinstance(value, list) or not value:
            raise _MalformedError(f"expected a list that is not empty, got {_short(value)}")
        return [parse(entry) for entry in value]

    return parse_list


Columns = dict[str, Callable[[object], Any]]
COLUMNS: dict[str, Columns] = {
    "sts": {"sentence1": _text, "sentence2": _text, "score": _number},
    "pair_classification": {"sentence1": _text, "sentence2": _text, "labels": _binary},
    "classification": {"text": _text, "label": _name},
    "reranking": {"query": _text, "positive": _list_of(_text), "negative": _list_of(_text)},
    "clustering": {"sentences": _list_of(_text), "labels": _list_of(_name)},
    "corpus": {"_id": _name, "title": _text_or_empty, "text": _text_or_empty},
    "queries": {"_id": _name, "text": _text},
    "qrels": {"query-id": _name, "corpus-id": _name, "score": _whole},
}
OPTIONAL = {"title"}
READ = {name for columns in COLUMNS.values() for name in columns}


def read_folder(path: Path) -> Folder:
    """Read and check one user folder.

    Raises `TaskError` with every problem found (the first 20 written out): file, line, column, what is allowed.
    """
    reader = _Reader(path)
    settings = reader.settings()
    split = str(settings.get("split", "test"))
    kind = reader.kind(settings.get("kind"), split)
    records = reader.records(kind, split) if kind else {}
    if kind:
        reader.check(kind, records, split)
    reader.raise_problems()
    assert kind is not None
    name = str(settings.get("name", path.resolve().name))
    return Folder(TaskData(kind, records, split), name, str(settings.get("source", name)))


@dataclass
class _Reader:
    folder: Path
    problems: list[str] = field(default_factory=list)

    def problem(self, where: str, what: str) -> None:
        self.problems.append(f"{where}: {what}")

    def raise_problems(self) -> None:
        if self.problems:
            more = len(self.problems) - SHOWN_PROBLEMS
            lines = [f"  - {line}" for line in self.problems[:SHOWN_PROBLEMS]]
            lines += [f"  … and {more} more"] if more > 0 else []
            raise TaskError("\n".join([f"evaluation folder {self.folder}: {len(self.problems)} problem(s)", *lines]))

    def settings(self) -> dict[str, Any]:
        path = self.folder / "task.toml"
        if not path.exists():
            return {}
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            self.problem("task.toml", f"cannot be read: {error.strerror}; write a file of that name, or remove it")
            return {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self.problem("task.toml", f"not valid TOML: {error}")
            return {}
        for key, value in settings.items():
            if key not in TOML_KEYS:
                allowed = f"(allowed: {', '.join(TOML_KEYS)}){suggest(key, TOML_KEYS)}"
                self.problem("task.toml", f"unknown key {key!r} {allowed}")
            elif not isinstance(value, str) or not value.strip():
                self.problem("task.toml", f"{key} = {value!r}: expected a text that is not empty")
        return settings

    def find(self, stem: str) -> Path | None:
        found = [path for ending in EXTENSIONS if (path := self.folder / f"{stem}{ending}").is_file()]
        if len(found) > 1:
            self.problem(stem, f"several files hold it ({', '.join(p.name for p in found)}); keep one")
        return found[0] if found else None

    def columns(self, stem: str) -> set[str]:
        path = self.find(stem)
        return next((set(row) for _, row in _rows(path) if isinstance(row, dict)), set()) if path else set()

    def kind(self, declared: object, split: str) -> str | None:
        if declared is not None:
            if declared in KINDS:
                return str(declared)
            self.problem("task.toml", f"kind = {declared!r} (allowed: {', '.join(KINDS)}){suggest(declared, KINDS)}")
            return None
        if self.find("corpus") or self.find("queries") or (self.folder / "qrels").is_dir():
            return "retrieval"
        if self.find("sets"):
            return "clustering"
        path = self.find(split)
        if path is None:
            files = ", ".join(sorted(p.name for p in self.folder.iterdir() if p.is_file())) or "nothing"
            self.problem(
                str(self.folder),
                f"holds {files}; expected {split}.jsonl (or csv, tsv, gz), sets.*, or corpus.*, queries.* and qrels/. "
                'Another split is named by `split = "…"` in task.toml',
            )
            return None
        columns = self.columns(split)
        if not columns:
            reasons = [f"line {line}: {reason}" for line, reason in _rows(path)]
            self.problem(path.name, reasons[0] if reasons else "holds no row")
            return None
        for kind in ("reranking", "pair_classification", "sts", "clustering"):
            if set(COLUMNS[kind]) <= columns:
                return kind
        if {"text", "label"} <= columns:
            return "classification" if self.find("train") else "clustering"
        forms = "; ".join(f"{kind}: {', '.join(COLUMNS[kind])}" for kind in KINDS if kind in COLUMNS)
        self.problem(path.name, f"columns {sorted(columns)} fit no kind of task ({forms})")
        return None

    def records(self, kind: str, split: str) -> dict[str, list[dict[str, Any]]]:
        if kind == "retrieval":
            parts = {"corpus": "corpus", "queries": "queries", "qrels": f"qrels/{split}"}
            return {part: self.read(stem, COLUMNS[part]) for part, stem in parts.items()}
        if kind == "classification":
            return {part: self.read(part, COLUMNS[kind]) for part in ("train", split)}
        if kind == "clustering":
            stem = "sets" if self.find("sets") else split
            if "text" in self.columns(stem):
                return {split: draw_sets(self.read(stem, COLUMNS["classification"]))}
            return {split: self.read(stem, COLUMNS[kind])}
        return {split: self.read(split, COLUMNS[kind])}

    def read(self, stem: str, columns: Columns) -> list[dict[str, Any]]:
        """All rows of one file, reduced to `columns`; malformed rows become problems."""
        path = self.find(stem)
        if path is None:
            self.problem(stem, f"no such file; expected {stem} with one of {', '.join(EXTENSIONS)}")
            return []
        where = str(path.relative_to(self.folder))
        rows, grades = [], dict[tuple[str, str], int]()
        for line, row in _rows(path):
            place = f"{where}, line {line}"
            if not isinstance(row, dict):
                self.problem(place, row)
                continue
            missing = [name for name in columns if name not in row and name not in OPTIONAL]
            if missing:
                self.problem(place, f"missing column(s) {', '.join(missing)}; found {', '.join(map(str, row))}")
                continue
            clean = {}
            for name, parse in columns.items():
                try:
                    clean[name] = parse(row.get(name))
                except _MalformedError as error:
                    self.problem(place, f"column {name!r}: {error}")
            if len(clean) == len(columns):
                rows.append(clean)
                if "corpus-id" in clean:
                    query, document, score = clean.values()
                    known = grades.setdefault((query, document), score)
                    if known != score:
                        said = f"score {score} for query {query!r} and document {document!r}"
                        self.problem(place, f"{said}, but an earlier line says {known}; keep one of the lines")
        if not rows and not self.problems:
            self.problem(where, "holds no row")
        return rows

    def check(self, kind: str, records: dict[str, list[dict[str, Any]]], split: str) -> None:
        """What no single row can show: one label only, unknown identifiers, lists of unequal length."""
        if self.problems:
            return
        rows = records.get(split, [])
        if kind == "sts" and len({row["score"] for row in rows}) < 2:
            self.problem(split, "all scores are equal; a rank correlation needs at least two different ones")
        if kind == "pair_classification" and len({row["labels"] for row in rows}) < 2:
            self.problem(split, "all labels are equal; average precision needs pairs of both labels")
        if kind == "classification" and len({row["label"] for row in records["train"]}) < 2:
            self.problem("train", "only one label; classification needs at least two")
        for number, row in enumerate(rows if kind == "clustering" else [], 1):
            if len(row["sentences"]) != len(row["labels"]):
                self.problem(f"set {number}", f"{len(row['sentences'])} sentences but {len(row['labels'])} labels")
            elif len(set(row["labels"])) < 2:
                self.problem(f"set {number}", "only one label; clustering needs at least two")
        if kind == "retrieval":
            self.check_retrieval(records)

    def check_retrieval(self, records: dict[str, list[dict[str, Any]]]) -> None:
        known = {}
        for part in ("corpus", "queries"):
            known[part] = {row["_id"] for row in records[part]}
            twice = [name for name, count in Counter(row["_id"] for row in records[part]).items() if count > 1]
            if twice:
                self.problem(part, f"_id given to more than one row: {', '.join(twice[:5])}")
        for column, part in (("corpus-id", "corpus"), ("query-id", "queries")):
            unknown = sorted({row[column] for row in records["qrels"]} - known[part])
            if unknown:
                self.problem("qrels", f"{len(unknown)} {column}(s) not in {part}, e.g. {', '.join(unknown[:5])}")
        if not any(row["score"] > 0 for row in records["qrels"]):
            self.problem("qrels", "no document is relevant to any query (no score above 0)")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, row) of one file; a line that cannot be read comes as the reason, a text, instead of a row."""
    opener: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            if ".jsonl" in path.name:
                yield from _json_rows(stream)
            else:
                yield from _table_rows(stream, tab=".tsv" in path.name)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error, csv.Error) as error:
        yield 0, f"cannot be read further: {error}; make the file anew"


def _json_rows(stream: Iterable[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not valid JSON: {error.msg} at column {error.colno}"
            continue
        yield number, row if isinstance(row, dict) else f"expected a JSON object, got {_short(row)}"


def _table_rows(stream: Iterable[str], tab: bool) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(stream, strict=True)
    header = next(rows, None)
    twice = [name for name, count in Counter(header).items() if name in READ and count > 1]
    if twice:
        yield rows.line_num, f"column(s) {', '.join(map(repr, twice))} more than once in the header; keep one of each"
        return
    for values in rows:
        if not values:
            continue
        if header is None or len(values) != len(header):
            yield rows.line_num, f"{len(values)} cells, but the header has {len(header or [])}"
        else:
            yield rows.line_num, dict(zip(header, values, strict=True))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
