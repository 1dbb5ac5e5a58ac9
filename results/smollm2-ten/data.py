"""What the study reads besides the public sets: its training pairs and clustering texts without ready-made sets.

python results/smollm2-ten/data.py ../shared/data runs

The pairs are those of results/smollm2-h200. The folders of the clustering sets hold ten sets drawn from the same texts,
which are no independent observations; from the texts alone poolwise makes sets that share none.
"""

from __future__ import annotations

import gzip
import runpy
import sys
from pathlib import Path

PAIRS = Path(__file__).parents[1] / "smollm2-h200" / "sample.py"
CLUSTERING = ("GoogleNewsT", "StackOverflowTitles", "SearchSnippets", "TwentyNewsgroups")


def main(source: str, target: str) -> None:
    for name in CLUSTERING:
        folder = Path(target) / "smollm2-clustering" / name
        folder.mkdir(parents=True, exist_ok=True)
        with gzip.open(Path(source) / "clustering" / name / "test.jsonl.gz", "rb") as file:
            (folder / "test.jsonl").write_bytes(file.read())
        (folder / "task.toml").write_text('kind = "clustering"\n', encoding="utf-8")
    sample = runpy.run_path(str(PAIRS))
    sample["main"](str(Path(source) / "train"), str(Path(target) / "smollm2-h200-pairs"))


if __name__ == "__main__":
    main(*sys.argv[1:])
