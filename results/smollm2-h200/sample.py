"""The training pairs of the study: from each public set a random part, always the same.

python results/smollm2-h200/sample.py ../shared/data/train runs/smollm2-h200-pairs
"""

from __future__ import annotations

import gzip
import random
import sys
from pathlib import Path

ROWS = {
    "quora-duplicates": 15_000, "flickr30k-captions": 12_000, "parasci": 10_000, "acl-title-abstract": 6_000,
    "medquad": 3_000, "wordnet-definitions": 6_000, "reuters-title-body": 5_000, "policyqa": 3_000, "scitldr": 3_000,
    "asset-simplification": 4_000,
}  # fmt: skip
LEFT_OUT = {"wordnet-definitions": (781, 5986)}
"""Rows of a part that are phrases of SST-2, which the run was to score as well: decontamination removed them."""


def main(source: str, target: str) -> None:
    for name, rows in ROWS.items():
        with gzip.open(Path(source) / name / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
        random.Random(0).shuffle(lines)
        kept = [line for place, line in enumerate(lines[:rows]) if place not in LEFT_OUT.get(name, ())]
        folder = Path(target) / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
