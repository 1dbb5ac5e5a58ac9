"""Files as records with their places: JSONL, CSV, TSV, Parquet, gzip or not; every mistake with its line."""

from __future__ import annotations

import ast
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from poolwise.errors import DataError, suggest
from poolwise.files import cached_if_unreachable

_PlacedText = tuple[str, Any]
"""Where a text stands ("line 3"), for messages, and what stands there."""


def read_texts(path: str | Path, field: str = "text") -> Iterator[str]:
    """The texts of a file in its order, as they stand there: the lines of a `.txt`, or the column `field` of a
    `.jsonl`, `.csv`, `.tsv` or `.parquet`.

    Raises DataError with the place of the first thing that is no text: a blank line, an empty cell, a number. Nothing
    is left out in silence, because the n-th vector belongs to the n-th text.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in READERS:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; allowed: {', '.join(READERS)}")
    try:
        for place, text in READERS[kind](path, field):
            if problem := _problem(text):
                raise DataError(
                    f"{path}, {place}: {problem}; each row of the vectors belongs to one text: mend or drop it"
                )
            yield text
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _problem(text: Any) -> str:
    """Why this cannot be encoded as a text, or nothing."""
    if not isinstance(text, str):
        return f"{text!r:.60}, which is no text"
    if not text.strip():
        return "nothing but white space"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half a character (a lone surrogate)"
    return ""


def _text_lines(path: Path) -> Iterator[str]:
    """Lines with their ends; only a line feed ends one."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 text ({error.reason} at byte {error.start})"
                raise DataError(f"{path}, line {number}: {reason}") from None


def _txt(path: Path, field: str) -> Iterator[_PlacedText]:
    for number, line in enumerate(_text_lines(path), 1):
        yield f"line {number}", line.rstrip("\r\n")


def _jsonl(path: Path, field: str) -> Iterator[_PlacedText]:
    for number, line in enumerate(_text_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {number}: a JSON {type(row).__name__}; write one {{"text": …}} a line')
        _check(path, f"line {number}", field, list(row))
        yield f"line {number}", row[field]


def _delimited(delimiter: str) -> Callable[[Path, str], Iterator[_PlacedText]]:
    def read(path: Path, field: str) -> Iterator[_PlacedText]:
        csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters refuses long documents
        rows = csv.reader(_text_lines(path), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            _check(path, "header", field, header)
            column, end = header.index(field), rows.line_num
            for cells in rows:
                place, end = f"line {end + 1}", rows.line_num  # a cell may run over several lines: its first is told
                if not cells:
                    continue
                if len(cells) != len(header):
                    problem = f"{len(cells)} cells, but the header has {len(header)}"
                    raise DataError(f"{path}, {place}: {problem}; quote cells that hold {delimiter!r}")
                yield place, cells[column]
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: badly quoted ({error})") from None

    return read


def _parquet(path: Path, field: str) -> Iterator[_PlacedText]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as stream:
            _check(path, "schema", field, stream.schema_arrow.names)
            number = 0
            for batch in stream.iter_batches(1000, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", text
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from None


def _check(path: Path, place: str, field: str, names: list[str]) -> None:
    if field not in names:
        has = ", ".join(map(repr, names)) or "nothing"
        raise DataError(
            f"{path}, {place}: no field {field!r}, it has {has}{suggest(field, names)}; name it: --field NAME"
        )


READERS: dict[str, Callable[[Path, str], Iterator[_PlacedText]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}
"""Ending of a file's name -> how its texts are read."""


DEMO = "demo"
ROLES = {
    "query": ("query", "anchor", "question"),
    "positive": ("positive", "postive", "pos", "document", "passage", "answer"),
}
"""Spellings of a column, the first preferred. `postive` is how the paper's README writes it."""
NEGATIVE = re.compile(r"(?:negatives?|neg)(?:_?(\d+))?")
UNREAD_NEGATIVE = re.compile(r"(hard_?)?neg(ative)?s?(_?(texts?|passages?|docs?|documents?|ctxs?|contexts?|list|\d+))?")
"""Names under which others keep negatives; a column that is left out in silence would be replaced by random ones."""
READABLE = ("jsonl", "csv", "tsv", "parquet")
SPLIT_WORDS = {"train", "dev", "valid", "validation", "test", "eval"}
MOST_MISTAKES = 20

Record = dict[str, Any]
Placed = tuple[str, Record]


class Mistakes:
    """The mistakes of one source, told together; at most `MOST_MISTAKES`, then reading stops."""

    def __init__(self, label: str):
        self.label = label
        self.lines: list[str] = []

    def add(self, place: str, message: str) -> None:
        self.lines.append(f"{place}: {message}")
        if len(self.lines) == MOST_MISTAKES:
            self.check()

    def check(self) -> None:
        """Raises DataError if there was any."""
        if self.lines:
            count = len(self.lines)
            more = f" (stopped after {count}; there may be more)" if count == MOST_MISTAKES else ""
            head = f"{self.label}: {count} mistake{'s' if count > 1 else ''}{more}"
            raise DataError("\n".join([head, *(f"  - {line}" for line in self.lines)]))


class Columns(NamedTuple):
    """Which column plays which role; several columns may hold negatives."""

    query: str
    positive: str
    negatives: tuple[str, ...]

    def record(self, row: Record) -> Record:
        return {
            "query": row[self.query],
            "positive": row[self.positive],
            "negatives": [row[name] for name in self.negatives],
        }


@dataclass(frozen=True)
class Opened:
    """One source, ready to be read. `mendable`: the user can correct the rows (a file, not a Hub data set)."""

    label: str
    records: Callable[[Mistakes], Iterator[Placed]]
    mendable: bool = True
    blank_is_none: bool = False


def find_columns(names: Iterable[str]) -> Columns:
    """The columns of the three roles, in any letter case. Raises ValueError naming what was found and what is taken."""
    by_word: dict[str, str] = {}
    for name in names:
        word = name.strip().lower() if isinstance(name, str) else ""
        read = NEGATIVE.fullmatch(word) or any(word in spellings for spellings in ROLES.values())
        if read and word in by_word:
            twice = f"{by_word[word]!r} and {name!r}" if by_word[word] != name else f"two columns {name!r}"
            raise ValueError(f"{twice}: one role, and only one can be read; drop or rename the wrong one")
        if not read and UNREAD_NEGATIVE.fullmatch(word):
            raise ValueError(
                f"the column {name!r} is not read; if it holds negatives, name it 'negative', 'negatives', 'neg' or, "
                "one a column, 'negative_1', 'negative_2'; if not, rename or drop it"
            )
        if word:
            by_word[word] = name
    found = ", ".join(repr(name) for name in by_word.values()) or "none"
    chosen = {}
    for role, spellings in ROLES.items():
        present = [by_word[word] for word in spellings if word in by_word]
        if not present:
            guess = suggest(role, by_word)
            raise ValueError(f"no column {role!r} (found: {found}{guess}); name it {_either(spellings)}")
        if len(present) > 1 and spellings[0] not in by_word:
            both = " and ".join(repr(name) for name in present)
            raise ValueError(f"{both} could each be the column {role!r}; rename the right one to {role!r}")
        chosen[role] = present[0]
    numbered = []
    for word, name in by_word.items():
        if match := NEGATIVE.fullmatch(word):
            numbered.append((int(match[1] or -1), name))
    return Columns(chosen["query"], chosen["positive"], tuple(name for _, name in sorted(numbered)))


def open_source(path: str, split: str, base_dir: Path) -> list[Opened]:
    """One `Opened` for each file behind `path`: "demo", a file or folder (relative to `base_dir`), or a Hub name.

    Raises DataError: no such file, no file of that split, a format that is not read, a name unknown to the Hub.
    """
    if path == DEMO:
        return [Opened("the demo's training pairs", _demo_records)]
    local = Path(base_dir, Path(path).expanduser())
    if local.is_file():
        return [_open_file(local, path)]
    if local.is_dir():
        return [_open_file(file, f"{path.rstrip('/')}/{file.name}") for file in _files_of_split(local, path, split)]
    if not is_hub_name(path):
        near = suggest(local.name, [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else [])
        raise DataError(f"training data {path!r}: no such file or folder, seen from {str(base_dir)!r}{near}")
    return [_open_hub(path, split, base_dir)]


def is_hub_name(path: str) -> bool:
    """Whether a name that is neither "demo" nor there as a file or folder is to be looked for on the Hub."""
    return not (_format(Path(path)) or re.match(r"[.~/]|.*\\", path) or path.count("/") > 1)


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower().lstrip(".") for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == "gz":
        suffixes.pop()
    last = {"ndjson": "jsonl", "pq": "parquet"}.get(suffixes[-1], suffixes[-1]) if suffixes else None
    return last if last in READABLE else None


def _files_of_split(folder: Path, path: str, split: str) -> list[Path]:
    """`train.jsonl.gz`, `train-00000-of-00002.parquet`; all files where no name speaks of a split."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and _format(file))
    words = {file: re.split(r"[._-]", file.name)[0].lower() for file in files}
    chosen = [file for file in files if words[file] == split.lower()]
    if not chosen and not SPLIT_WORDS & set(words.values()):
        chosen = files
    if not chosen:
        found = ", ".join(file.name for file in files) or f"no {', '.join(READABLE)} file"
        raise DataError(
            f"training data {path!r}: no file of the split {split!r} (found: {found}); "
            f"name a file {split}.jsonl or give `split` in [[recipe.sources]]"
        )
    return chosen


def _open_file(file: Path, label: str) -> Opened:
    kind = _format(file)
    if kind is None:
        raise DataError(f"training data {label!r}: cannot read {file.name!r}; allowed: {', '.join(READABLE)}, or .gz")
    if kind == "parquet":
        return Opened(label, lambda mistakes: _parquet_records(file, mistakes))
    if kind == "jsonl":
        return Opened(label, lambda mistakes: _jsonl_records(file, mistakes))
    delimiter = "\t" if kind == "tsv" else ","
    return Opened(label, lambda mistakes: _delimited_records(file, delimiter, mistakes), blank_is_none=True)


def _lines(file: Path, label: str) -> Iterator[bytes]:
    """The lines of a file, unzipped if it is gzip. Raises DataError where it is cut short or not gzip at all."""
    number = 0
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            for line in stream:
                number += 1
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{label}: cannot be read after line {number}: {error}") from error


def _jsonl_records(file: Path, mistakes: Mistakes) -> Iterator[Placed]:
    known: dict[tuple[str, ...], Columns] = {}
    for number, line in enumerate(_lines(file, mistakes.label), 1):
        place = f"line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            mistakes.add(place, f"not UTF-8 text ({error.reason} at byte {error.start})")
            continue
        except (json.JSONDecodeError, RecursionError) as error:
            mistakes.add(place, f"not valid JSON ({error})" + '; write one {"query": …, "positive": …} a line')
            continue
        if not isinstance(row, dict):
            mistakes.add(place, f'a JSON {type(row).__name__}; write one {{"query": …, "positive": …}} a line')
            continue
        names = tuple(row)
        try:
            columns = known.get(names) or known.setdefault(names, find_columns(names))
        except ValueError as error:
            mistakes.add(place, str(error))
            continue
        yield place, columns.record(row)


def _delimited_records(file: Path, delimiter: str, mistakes: Mistakes) -> Iterator[Placed]:
    """CSV or TSV with a header, quoted as RFC 4180 says; a badly quoted cell is an error, never a guess."""
    lines = _lines(file, mistakes.label)
    texts = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(lines))
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters refuses long documents
    rows = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        columns = find_columns(header)
        end = rows.line_num
        for cells in rows:
            place, end = f"line {end + 1}", rows.line_num  # a cell may run over several lines: its first is told
            if not cells:
                continue
            if len(cells) != len(header):
                mistakes.add(place, f"{len(cells)} cells, but the header has {len(header)}; quote cells that hold one")
                continue
            record = columns.record(dict(zip(header, cells, strict=True)))
            lists = [name for name, cell in _read_cells(columns, record) if _is_list(cell)]
            if lists:
                named = ", ".join(map(repr, lists))
                fix = "write JSONL, or one text a cell (columns negative_1, negative_2; one row for each positive)"
                mistakes.add(place, f"column {named}: a list in a cell would be read as one text; {fix}")
                continue
            yield place, record
    except csv.Error as error:
        mistakes.add(f"line {rows.line_num}", f'badly quoted ({error}); write a quotation mark inside a cell as ""')
        mistakes.check()
    except UnicodeDecodeError as error:
        mistakes.add(f"line {rows.line_num + 1}", f"not UTF-8 text ({error.reason} at byte {error.start})")
        mistakes.check()
    except ValueError as error:
        _refuse(mistakes.label, error)


def _read_cells(columns: Columns, record: Record) -> Iterator[tuple[str, str]]:
    names = (columns.query, columns.positive, *columns.negatives)
    return zip(names, (record["query"], record["positive"], *record["negatives"]), strict=True)


def _is_list(cell: str) -> bool:
    """Whether a cell is a list as JSON or, from pandas, as Python writes it."""
    text = cell.strip()
    for parse in (json.loads, ast.literal_eval) if text[:1] == "[" and text[-1:] == "]" else ():
        try:
            return isinstance(parse(text), list)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return False


def _parquet_records(file: Path, mistakes: Mistakes) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as stream:
            columns = find_columns(stream.schema_arrow.names)
            wanted = [columns.query, columns.positive, *columns.negatives]
            rows = (row for batch in stream.iter_batches(1000, columns=wanted) for row in batch.to_pylist())
            yield from _numbered(rows, columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{mistakes.label}: cannot be read as Parquet: {error}") from error
    except ValueError as error:
        _refuse(mistakes.label, error)


def _demo_records(mistakes: Mistakes) -> Iterator[Placed]:
    from poolwise import demo

    yield from _numbered(demo.training_pairs(), Columns("query", "positive", ("negatives",)))


def _open_hub(name: str, split: str, base_dir: Path) -> Opened:
    import datasets

    try:
        with cached_if_unreachable(name):
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the hub's client raises is about this name, this split or the connection
        near = suggest(name, [DEMO, *(path.name for path in islice(base_dir.iterdir(), 1000))])
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"training data {name!r}: neither a file or folder seen from {str(base_dir)!r}{near} nor usable as a "
            f"Hub data set with the split {split!r}: {reason}. "
            f"Check the name and the connection (HF_ENDPOINT, HF_HUB_OFFLINE), or give a file"
        ) from error
    try:
        columns = find_columns(rows.column_names)
    except ValueError as error:
        _refuse(name, error)
    wanted = rows.select_columns([columns.query, columns.positive, *columns.negatives])
    batches = (
        dict(zip(batch, cells, strict=True))
        for batch in wanted.iter(1000)
        for cells in zip(*batch.values(), strict=True)
    )
    return Opened(name, lambda mistakes: _numbered(batches, columns), mendable=False)


def _numbered(rows: Iterable[Record], columns: Columns) -> Iterator[Placed]:
    for number, row in enumerate(rows, 1):
        yield f"row {number}", columns.record(row)


def _refuse(label: str, error: ValueError) -> NoReturn:
    raise DataError(f"{label}: {error}") from error


def _either(words: Sequence[str]) -> str:
    return ", ".join(repr(word) for word in words[:-1]) + f" or {words[-1]!r}"
