"""The folder of a study's runs: which file lies where, and the score files in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


LAYERS = "layers.json"
"""Beside the scores: where the head looks, if it attends to layers."""
WORK = "work.json"
"""Beside the scores: how many texts were asked for and how many encoded."""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of the long table; the file appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> pa.Table | None:
    """The rows of a score file; None where it is missing or damaged: what cannot be read is no result."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return None
