"""A small study for the tests of runs: a tiny base model, 60 training rows, three tasks; its file, its run, its files.

The fixtures around it (`place`, `finished`, `copy`) are in conftest.py.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl

from poolwise.runs import run as runner
from poolwise.study.study import Study
from tiny import tiny_folder

WORDS = ("cat", "dog", "river", "book", "water", "morning", "people", "home")
WORDS += ("mat", "walk", "heron", "ferry", "island", "fish", "rate", "choice")
M1 = '[[designs]]\npreset = "m1"\n'
LAYERS = (
    '[[designs]]\nname = "layers"\nattention = "bidirectional"\npooling = "layer_cross_attention"\n'
    'pooling_args = { tokens = "mean", latents = 4 }\n'
)
MEAN = '[[designs]]\nattention = "bidirectional"\npooling = "mean"\n'
STUDY = """\
name = "tiny"
baseline = "m1"
seeds = [0]
tasks = ["./pairs", "./facts"]
references = ["tfidf"]
controls = false
evaluate_at = [0.5, 1.0]
output = "OUTPUT"

[recipe]
base_model = "./llama"
dataset = "./train.jsonl"
steps = 6
save_steps = 2
batch_size = 8
warmup_steps = 0
max_length = 32
learning_rate = 1e-3
head_learning_rate = 1e-3

"""


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def _sts(rows: int, factor: int) -> list[dict[str, Any]]:
    return [
        {
            "sentence1": f"the {WORDS[i % 16]} {factor}",
            "sentence2": f"one {WORDS[i * factor % 16]}",
            "score": i * 7 % 11,
        }
        for i in range(rows)
    ]


def furnish(folder: Path) -> Path:
    """A base model, 60 training rows and three tasks in `folder`: `pairs` and `more` (STS), `facts` (retrieval)."""
    tiny_folder(folder, "llama")
    with (folder / "train.jsonl").open("w") as file:
        for i in range(60):
            row = {
                "query": f"where is the {WORDS[i % 16]} {i}",
                "positive": f"the {WORDS[i % 16]} and the {WORDS[(i * 5 + 1) % 16]} are at number {i}",
                "negative": f"no {WORDS[(i + 3) % 16]} at {i}",
            }
            file.write(json.dumps(row) + "\n")
    _table(folder / "pairs" / "test.csv", _sts(20, 3))
    _table(folder / "more" / "test.csv", _sts(12, 5))
    documents = [{"_id": f"d{i}", "title": "", "text": f"a {WORDS[i]} by the {WORDS[i + 3]}"} for i in range(10)]
    queries = [{"_id": f"q{i}", "text": f"who saw the {WORDS[i]}"} for i in range(5)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / "facts").mkdir(exist_ok=True)
        (folder / "facts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qrels = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(5)]
    _table(folder / "facts" / "qrels" / "test.tsv", qrels)
    return folder


def write(place: Path, output: str, *changes: tuple[str, str], designs: str = M1 + LAYERS) -> Path:
    """A study file whose runs go to `place/output`; `changes` are (old, new) pieces of its text."""
    text = STUDY.replace("OUTPUT", output) + designs
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = place / f"{output}.toml"
    path.write_text(text)
    return path


def run(path: Path, **options: Any) -> dict[str, str]:
    return runner.run(Study.load(path), **options)


def scores(folder: Path) -> pl.DataFrame:
    """All rows of the long table but their seconds, in an order of their own."""
    frame = pl.read_parquet(folder / "results.parquet")
    timed = [name for name in frame.columns if "seconds" in name]
    assert timed
    return frame.drop(timed).sort("design", "seed", "step", "task", "item_id", "metric")


def weights(folder: Path) -> dict[str, bytes]:
    """The tensors of all milestones, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("trials/*/training/step-*/**/*.safetensors"))
    }


def snapshot(folder: Path) -> dict[str, int]:
    """When each file was written."""
    found = {}
    for name, _, files in os.walk(folder):  # not rglob, which fails on a folder that the watched run has just removed
        for path in (Path(name) / file for file in files):
            with contextlib.suppress(FileNotFoundError):
                found[str(path.relative_to(folder))] = path.stat().st_mtime_ns
    return found


def of(folder: Path, label: str) -> Path:
    """The folder of a design's only trial."""
    (path,) = folder.glob(f"trials/{label}-s0-*")
    return path


def state(folder: Path, label: str) -> dict[str, Any]:
    rows = runner.trials(SimpleNamespace(folder=folder))  # type: ignore[arg-type]
    return next(row for row in rows if row["label"] == label)
