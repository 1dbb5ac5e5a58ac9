"""A finished study's report and main scores into `results/`.

python scripts/publish_results.py RUN_FOLDER REPORT.md results/NAME "the command that made it, and the machine"
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from poolwise.verdicts.table import csv_safe

COLUMNS = "design role seed step task task_type source split subset metric score".split()  # noqa: SIM905


def main(run_folder: str, report: str, target: str, made_by: str) -> None:
    frame = pl.read_parquet(Path(run_folder) / "results.parquet").filter(pl.col("item_id").is_null())
    frame = frame.select(COLUMNS).sort(COLUMNS[:-1]).with_columns(pl.col("score").round(6))
    csv_safe(frame).write_csv(f"{target}.csv")
    title, _, rest = Path(report).read_text(encoding="utf-8").partition("\n")
    note = f"Made by {made_by}. Every score: `{Path(target).name}.csv`."
    Path(f"{target}.md").write_text(f"{title}\n\n{note}\n\n{rest.lstrip()}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
