"""A file of texts to be encoded -> its texts, one after another, however long the file is."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from poolwise.errors import DataError, suggest

Placed = tuple[str, Any]
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


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends; only a line feed ends one."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 text ({error.reason} at byte {error.start})"
                raise DataError(f"{path}, line {number}: {reason}") from None


def _txt(path: Path, field: str) -> Iterator[Placed]:
    for number, line in enumerate(_lines(path), 1):
        yield f"line {number}", line.rstrip("\r\n")


def _jsonl(path: Path, field: str) -> Iterator[Placed]:
    for number, line in enumerate(_lines(path), 1):
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


def _delimited(delimiter: str) -> Callable[[Path, str], Iterator[Placed]]:
    def read(path: Path, field: str) -> Iterator[Placed]:
        csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters refuses long documents
        rows = csv.reader(_lines(path), delimiter=delimiter, strict=True)
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


def _parquet(path: Path, field: str) -> Iterator[Placed]:
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


READERS: dict[str, Callable[[Path, str], Iterator[Placed]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}
"""Ending of a file's name -> how its texts are read."""
