"""Give the files of a run folder made before 2026-11-27 their checksums: python scripts/seal_run.py FOLDER

Only for a folder that you made and trust: what it holds is taken as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from poolwise.files import is_sealed, write_json
from poolwise.runs import layout

OF_STUDY = (layout.STUDY, layout.TRIALS, layout.LOOKS, layout.COSTS, layout.VERSIONS)
OF_TRIAL = (layout.SPEC, layout.DTYPE, layout.TRAINED, layout.LADDER, layout.LAYERS, layout.WORK, layout.FAILED)
WRAPPED = {layout.TRIALS: "trials", layout.COSTS: "designs", layout.VERSIONS: "packages"}
"""Files whose content was a bare list or table -> the field that holds it now."""


def seal_json(path: Path) -> bool:
    """Rewrite a JSON file with its checksum. Returns whether that was needed."""
    if not path.exists() or is_sealed(path.read_bytes()):
        return False
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    name = WRAPPED.get(path.name)
    write_json(path, {name: content} if name and not (isinstance(content, dict) and name in content) else content)
    return True


def seal_parquet(path: Path) -> bool:
    """Rewrite a Parquet file with its checksum. Returns whether that was needed."""
    if is_sealed(path.read_bytes()):
        return False
    table = pq.read_table(path)
    numbers = [name for name in ("score", "gold", "seconds") if name in table.column_names]
    layout.write_table(
        path, table.replace_schema_metadata(), compression_level=19, write_page_checksum=True,
        use_dictionary=[name for name in table.column_names if name not in numbers],
        column_encoding=dict.fromkeys(numbers, "BYTE_STREAM_SPLIT"),
    )  # fmt: skip
    return True


def main(folder: Path) -> None:
    files = [folder / name for name in OF_STUDY]
    files += [path for name in OF_TRIAL for path in layout.in_trials(folder, name)]
    done = sum(map(seal_json, files))
    tables = [folder / layout.RESULTS, *(folder / "trials").glob("*/scores/*/*.parquet")]
    done += sum(seal_parquet(path) for path in tables if path.exists())
    print(f"{folder}: {done} files sealed")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
