"""Files of records, each record with its place: JSONL, CSV, TSV, Parquet and plain text, gzip or not.

This is the only reader of such files: training pairs, evaluation folders and texts to encode all come through it, so
delimiters, byte order marks, quoting, damaged gzip and encodings are handled, and reported, in one way. Files are read
in pieces of bounded size: a small file must not be able to fill the memory.
"""

from __future__ import annotations

import ast
import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from poolwise.errors import DataError, Mistakes, enumerate_words, short, suggest
from poolwise.files import MOST_BYTES, parse_json

Record = dict[str, Any]
Placed = tuple[str, Record]
"""A place for messages ("line 3") and the record found there."""
Choose = Callable[[Sequence[str]], Sequence[str]]
"""Names of a file's columns -> those that are read. Raises ValueError if a needed one is missing or ambiguous."""

PAGE = "docs/own-data.md"
"""Where every layout that is read has an example."""
FORMATS = ("jsonl", "csv", "tsv", "parquet")
SYNONYMS = {"ndjson": "jsonl", "pq": "parquet"}
DELIMITERS = {"csv": ",;\t", "tsv": "\t,;"}
"""Separators that are tried, in this order, until the header has the needed columns."""
DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
MOST_COLUMNS = 10_000
EXPANSION = 200
"""Bytes that a Parquet file may hold for each byte of its size; texts compress 3 to 20 times, repeated ones more."""
ALWAYS_ALLOWED = 256 << 20
"""Bytes that it may hold whatever its size."""
BATCH_ROWS = 1000
MOST_NAMED = 50
"""Columns that a note lists by name."""
MANY_HIGH_BYTES = 0.3
"""Share of bytes above 127 beyond which a line is in no Western European encoding."""


class UnreadableError(Exception):
    """What ends the reading of a file: the place and the reason."""

    def __init__(self, place: str, reason: str):
        super().__init__(reason)
        self.place = place


def file_format(path: Path) -> str | None:
    """One of `FORMATS` by the ending of a file's name, `.gz` aside; None for another kind of file."""
    suffixes = [suffix.lower().lstrip(".") for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == "gz":
        suffixes.pop()
    kind = SYNONYMS.get(suffixes[-1], suffixes[-1]) if suffixes else ""
    return kind if kind in FORMATS else None


def stem_of(path: Path) -> str:
    """A file's name without its format and `.gz`: "test" of test.jsonl.gz."""
    return Path(path.name.removesuffix(".gz")).stem


def task_folders(folder: Path) -> list[str]:
    """The names of the sub-folders that look like evaluation tasks, by the names of their files."""
    places = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    stems = {path.name: {stem_of(file) for file in path.iterdir()} for path in places}
    return [name for name, inside in stems.items() if inside & {"corpus", "queries", "sets", "test", "task"}]


def is_delimited(path: Path) -> bool:
    """Whether the cells of a file are plain texts, without null, numbers and lists."""
    return file_format(path) in DELIMITERS


def read_records(file: Path, mistakes: Mistakes, choose: Choose) -> Iterator[Placed]:
    """The records of a file of one of the `FORMATS`, reduced to the columns that `choose` picks, each with its place.

    A row that cannot be read is added to `mistakes` and left out, and so is whatever ends the reading early: call
    `mistakes.check()` afterwards. Columns that are left unread and an unexpected delimiter are noted.
    """
    kind = file_format(file)
    assert kind is not None, file
    columns = _Columns(choose)
    readers = {"jsonl": _jsonl, "parquet": _parquet}
    try:
        yield from readers[kind](file, mistakes, columns) if kind in readers else _delimited(file, mistakes, columns)
    except UnreadableError as error:
        mistakes.add(error.place, str(error))
    note_unread(list(columns.unread), mistakes)


def note_unread(names: Sequence[str], mistakes: Mistakes) -> None:
    """Note the columns that are ignored, so that none is lost unnoticed."""
    if names:
        shown, more = names[:MOST_NAMED], max(0, len(names) - MOST_NAMED)
        mistakes.note(f"column{'s' * (len(names) > 1)} not read: {enumerate_words(map(repr, shown), more)}")


class _Columns:
    """`choose` with a memory: a JSONL file repeats the same names in every row."""

    def __init__(self, choose: Choose):
        self.choose = choose
        self.unread: dict[str, None] = {}
        self._chosen: dict[tuple[str, ...], Sequence[str]] = {}

    def of(self, names: Sequence[str]) -> Sequence[str]:
        key = tuple(names)
        if len(key) > MOST_COLUMNS:
            raise ValueError(f"{len(key):,} columns; at most {MOST_COLUMNS:,} are read")
        if key not in self._chosen:
            chosen = self._chosen[key] = self.choose(names)
            self.unread |= dict.fromkeys(name for name in names if name not in chosen and name.strip())
        return self._chosen[key]


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """("line 1", text) of each line of a UTF-8 file, gzip or not, its end included; only a line feed ends a line."""
    number = 0
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            while line := stream.readline(MOST_BYTES + 1):
                number += 1
                if len(line) > MOST_BYTES:
                    raise UnreadableError(f"line {number}", f"longer than {MOST_BYTES:,} bytes; split it")
                if number == 1 and b"\0" in line:
                    raise UnreadableError("line 1", _not_utf8(line))
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise UnreadableError(f"line {number}", _not_utf8(line)) from None
                yield f"line {number}", text
    except (OSError, EOFError, zlib.error) as error:
        # a file that is cut short still gives its first lines; the reader must not take them for the whole
        after = f" after line {number}" if number else ""
        raise UnreadableError("", f"cannot be read{after}: {getattr(error, 'strerror', None) or error}") from error


def _not_utf8(line: bytes) -> str:
    """The message for a line that is not UTF-8: the encoding it looks like, and the fix."""
    if b"\0" in line or line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        likely, name = "UTF-16", "UTF-16"
    elif sum(byte > 127 for byte in line) > MANY_HIGH_BYTES * len(line):
        likely, name = "an older encoding of another script (such as Shift JIS, GB 18030, Windows-1251)", "ENCODING"
    else:
        likely, name = "Windows-1252 or Latin-1, as Western European Excel writes it", "WINDOWS-1252"
    return f"not UTF-8 text; it looks like {likely}. Save it as UTF-8 (iconv -f {name} -t UTF-8 FILE)"


def _jsonl(file: Path, mistakes: Mistakes, columns: _Columns) -> Iterator[Placed]:
    for place, line in read_lines(file):
        if not line.strip():
            continue
        try:
            row = parse_json(line, finite=False, unicode=False)  # the column is named later
        except ValueError as error:
            mistakes.add(place, f"not valid JSON ({error}); write one JSON object a line")
            continue
        if not isinstance(row, dict):
            mistakes.add(place, f'a JSON {type(row).__name__}; write one JSON object a line: {{"column": value, …}}')
            continue
        try:
            chosen = columns.of(tuple(row))
        except ValueError as error:
            mistakes.add(place, str(error))
            continue
        yield place, {name: row[name] for name in chosen}


def _delimited(file: Path, mistakes: Mistakes, columns: _Columns) -> Iterator[Placed]:
    """CSV or TSV with a header, quoted as RFC 4180 says; a badly quoted cell is a mistake, never a guess."""
    delimiter, header = _header(file, columns)
    if delimiter != DELIMITERS[file_format(file) or ""][0]:
        mistakes.note(f"cells are separated by {DELIMITER_NAMES[delimiter]}")
    chosen = {name: header.index(name) for name in columns.of(header)}
    rows = _cells(file, delimiter)
    next(rows, None)
    for place, cells in rows:
        if len(cells) != len(header):
            fix = f"quote cells that hold {delimiter!r}"
            mistakes.add(place, f"{len(cells)} cells, but the header has {len(header)}; {fix}")
        elif delimiter == "\t" and any("\n" in cell and "\t" in cell for cell in cells):
            # in files without quoting, a text that begins with a quotation mark swallows the rows after it
            mistakes.add(place, f"a quoted cell runs over several lines and holds tabs; {_DOUBLED}")
        else:
            yield place, {name: cells[at] for name, at in chosen.items()}


_DOUBLED = 'put a cell with a quotation mark in quotes and write the mark twice: """so"" she said"'


def _header(file: Path, columns: _Columns) -> tuple[str, list[str]]:
    """The delimiter under which the header has the needed columns, and the header."""
    refused: list[tuple[int, UnreadableError]] = []
    for delimiter in DELIMITERS[file_format(file) or ""]:
        header: list[str] = []
        try:
            _, header = next(_cells(file, delimiter), ("", []))
            if not header:
                raise UnreadableError("", "the file is empty; expected a header and a row below it")
            columns.of(header)
            return delimiter, header
        except UnreadableError as error:
            refused.append((0, error))
        except ValueError as error:
            refused.append((len(header), UnreadableError("", str(error))))
    raise max(refused, key=lambda pair: pair[0])[1]  # under the delimiter that makes the most columns


def _cells(file: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of a CSV that are not blank, each with the line on which it begins: a cell may hold line feeds."""
    csv.field_size_limit(MOST_BYTES)  # the default of 131,072 characters refuses long documents
    rows = csv.reader((text for _, text in read_lines(file)), delimiter=delimiter, strict=True)
    end = 0
    try:
        for cells in rows:
            place, end = f"line {end + 1}", rows.line_num
            if cells:
                yield place, cells
    except csv.Error as error:
        raise UnreadableError(f"line {end + 1}", f"badly quoted ({error}); {_DOUBLED}") from None


def _parquet(file: Path, mistakes: Mistakes, columns: _Columns) -> Iterator[Placed]:
    try:
        names = _parquet_names(file)
        chosen = columns.of(names)
    except ValueError as error:
        raise UnreadableError("", str(error)) from error
    number = 0
    for batch in _parquet_batches(file, list(chosen)):
        try:
            rows = batch.to_pylist()
        except Exception as error:  # such as a date before year 1, which Python cannot represent
            raise UnreadableError("", f"cannot be read as Parquet after row {number}: {_first_line(error)}") from error
        for row in rows:
            number += 1
            yield f"row {number}", row


def read_table(file: Path) -> Any:
    """A whole Parquet file as a pyarrow table. Raises DataError if it is damaged, or larger than its size allows."""
    import pyarrow

    try:
        names = _parquet_names(file)
        if len(names) > MOST_COLUMNS:
            raise UnreadableError("", f"{len(names):,} columns; at most {MOST_COLUMNS:,} are read")
        batches = list(_parquet_batches(file, names))
        if not batches:
            raise UnreadableError("", "holds no row")
        return pyarrow.Table.from_batches(batches)
    except UnreadableError as error:
        raise DataError(f"{file}: {error}") from error


def _parquet_names(file: Path) -> list[str]:
    """The names of the columns. Raises UnreadableError for a file that is damaged, or too large once decoded."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as stream:
            found = stream.metadata
            declared = sum(found.row_group(number).total_byte_size for number in range(found.num_row_groups))
            allowed = _allowed(file)
            if declared > allowed or found.num_rows > allowed // 100:
                raise UnreadableError("", _too_large(file, allowed))
            return list(stream.schema_arrow.names)
    except UnreadableError:
        raise
    except Exception as error:  # whatever pyarrow raises for a damaged file
        raise UnreadableError("", f"cannot be read as Parquet: {_first_line(error)}") from error


def _parquet_batches(file: Path, names: list[str]) -> Iterator[Any]:
    """The rows of a file, `BATCH_ROWS` at a time, valid and with plain texts. Raises UnreadableError.

    Texts are decoded as dictionaries first: repeated a million times, one text of a megabyte takes no more than that
    until it is known whether all of it is allowed.
    """
    import pyarrow
    import pyarrow.compute as pc
    import pyarrow.parquet

    decoded, allowed = 0, _allowed(file)
    try:
        with pyarrow.parquet.ParquetFile(file) as plain:
            schema = plain.schema_arrow
        texts = [name for name in names if pyarrow.types.is_string(schema.field(name).type)]
        with pyarrow.parquet.ParquetFile(file, read_dictionary=texts, page_checksum_verification=True) as stream:
            for batch in stream.iter_batches(BATCH_ROWS, columns=names):
                batch.validate(full=True)  # texts that are not UTF-8, indices out of range
                arrays = []
                for array in batch.columns:
                    if pyarrow.types.is_dictionary(array.type) and pyarrow.types.is_string(array.type.value_type):
                        lengths = pc.binary_length(array.dictionary).take(array.indices)
                        decoded += pc.sum(lengths).as_py() or 0
                    else:
                        decoded += array.nbytes
                    if decoded > allowed:
                        raise UnreadableError("", _too_large(file, allowed))
                    is_text = pyarrow.types.is_dictionary(array.type) and array.type.value_type == pyarrow.string()
                    arrays.append(array.dictionary_decode() if is_text else array)
                yield pyarrow.RecordBatch.from_arrays(arrays, names=batch.schema.names)
    except UnreadableError:
        raise
    except Exception as error:
        raise UnreadableError("", f"cannot be read as Parquet: {_first_line(error)}") from error


def _allowed(file: Path) -> int:
    return max(ALWAYS_ALLOWED, EXPANSION * file.stat().st_size)


def _too_large(file: Path, allowed: int) -> str:
    return f"its {file.stat().st_size:,} bytes hold more than {allowed:,} bytes or {allowed // 100:,} rows; split it"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_list(cell: str) -> bool:
    """Whether a cell holds a list, as JSON or, from pandas, as Python writes it."""
    text = cell.strip()
    for parse in (parse_json, ast.literal_eval) if text[:1] == "[" and text[-1:] == "]" else ():
        try:
            return isinstance(parse(text), list)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return False


def text_problem(value: object) -> str:
    """Why a value cannot be used as a text ("is empty"), or an empty string if it can."""
    if value is None:
        return "is null"
    if not isinstance(value, str):
        return f"is {short(value)} ({type(value).__name__})"
    if not value.strip():
        return "is empty"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"contains an unpaired surrogate ({value[error.start]!r}), so it is not valid Unicode"
    return ""


def read_texts(path: str | Path, field: str = "text", note: Callable[[str], None] | None = None) -> Iterator[str]:
    """The texts of a file in its order, unchanged: the lines of a `.txt`, or the column `field` of another format.

    `note` gets a line about anything unusual in the way the file was read. Raises DataError, at the end, with the place
    of everything that is not a text (a blank line, an empty cell, a number): no text is skipped unnoticed, because the
    n-th vector belongs to the n-th text.
    """
    path = Path(path)
    mistakes = Mistakes(str(path))
    plain = path.name.lower().removesuffix(".gz").endswith(".txt")
    if not plain and file_format(path) is None:
        allowed = ", ".join(f".{kind}" for kind in ("txt", *FORMATS))
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; allowed: {allowed}, or one of them with .gz")

    def choose(names: Sequence[str]) -> Sequence[str]:
        if names.count(field) == 1:
            return [field]
        if field in names:
            raise ValueError(f"two columns {field!r}; drop or rename one")
        found = ", ".join(map(repr, names)) or "nothing"
        raise ValueError(f"no field {field!r}, it has {found}{suggest(field, names)}; name it: --field NAME")

    records = _plain(path, field, mistakes) if plain else read_records(path, mistakes, choose)
    for place, record in records:
        if problem := text_problem(record[field]):
            mistakes.add(place, f"the text {problem}; each row of the vectors belongs to one text: correct or drop it")
        else:
            yield record[field]
    mistakes.check()
    for line in mistakes.notes if note else ():
        note(line)  # type: ignore[misc]


def _plain(file: Path, field: str, mistakes: Mistakes) -> Iterator[Placed]:
    try:
        for place, line in read_lines(file):
            yield place, {field: line.rstrip("\r\n")}
    except UnreadableError as error:
        mistakes.add(error.place, str(error))
