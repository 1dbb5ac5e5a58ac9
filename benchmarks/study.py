"""A whole study, five designs × three seeds: training, scoring, saving; fp32, dropout 0, so that scores compare.

Base: Qwen2-shaped, 12 layers, width 512, random weights; texts of lognormal length (mean 40 tokens, median 24).
`study`: against loops like those of the paper's code: three padded forwards a step, texts encoded in the order in which
they come, 64 at a time. Same process, one after the other, seed by seed; CPU seconds. Few steps and texts, so that it
ends within minutes: what every trial costs apart from them (loading, probes, saving) weighs more than in a real study.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from benchmarks.corpus import Corpus
from benchmarks.measure import interleave, ratio_record
from poolwise.encoding.fast import Counts, FastEncoder
from poolwise.runs import train, trial
from poolwise.runs.prepare import prepare
from poolwise.runs.trial import run_trial
from poolwise.study.study import Study

SEEDS, STEPS, BATCH, DOCUMENTS, QUERIES = 3, 2, 8, 24, 8
PRESETS = ("m1", "m2", "m3", "m4", "m5")


class _Unsorted(FastEncoder):
    """Each text by sentence-transformers' own `encode`, whenever it is asked for, in the order in which they come."""

    def __init__(self, encoder: Any, **_: Any) -> None:
        self.encoder, self.counts = encoder.eval(), Counts()

    def encode(self, texts: Any, prompt: str = "", **_: Any) -> np.ndarray:
        with patch.object(type(self.encoder), "_input_length", lambda *_: 0):  # by which it would sort them
            return self.encoder.encode(list(texts), prompt=prompt, batch_size=64)


class _ThreeForwards(MultipleNegativesRankingLoss):
    """Query, positive and negative each in a forward of its own."""

    def forward(self, sentence_features: Any, labels: Any) -> Any:
        columns = [self.model(dict(column))["sentence_embedding"] for column in sentence_features]
        return self.compute_loss_from_embeddings(columns, labels)


@contextlib.contextmanager
def paper_loops() -> Iterator[None]:
    """Training and encoding like that of the paper's code instead of ours."""
    padded = patch.object(train, "choose", lambda *_: ("padded", "benchmark"))
    loss = patch.object(train, "MultipleNegativesRankingLoss", _ThreeForwards)
    with padded, loss, patch.object(trial, "FastEncoder", _Unsorted):
        yield


def run() -> list[dict[str, Any]]:
    variants = {"ours": contextlib.nullcontext, "paper": paper_loops}
    with tempfile.TemporaryDirectory() as folder:
        study = Study.parse(long_texts(Path(folder), STEPS, 8 * STEPS * BATCH, DOCUMENTS), Path(folder))
        times, scores = measured(study, variants)
    apart = float(np.abs(scores["ours"] - scores["paper"]).max())
    return [ratio_record("study", times["paper"], times["ours"], 2.0, agreement=apart, **facts(study))]


def facts(study: Study) -> dict[str, Any]:
    """What is told beside a figure."""
    return {
        "designs": len(study.designs), "seeds": len(study.seeds), "steps": study.recipe.steps,
        "batch_size": study.recipe.batch_size, "documents": DOCUMENTS, "queries": QUERIES,
        "agreement_of": "largest score difference",
    }  # fmt: skip


def long_texts(folder: Path, steps: int, pairs: int, documents: int, **recipe: Any) -> dict[str, Any]:
    """A study on generated texts of the usual lengths: its content, with base, pairs and task in `folder`."""
    corpus = Corpus(folder / "base", "float32", "cpu")
    corpus.tokenizer.save_pretrained(folder / "base")
    lengths = iter(corpus.lengths(3 * pairs + documents + QUERIES).tolist())
    names = ("query", "positive", "negative")
    rows = [{name: corpus.text(next(lengths)) for name in names} for _ in range(pairs)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = folder / "search"
    (task / "qrels").mkdir(parents=True)
    for name, count in (("corpus", documents), ("queries", QUERIES)):
        texts = [{"_id": f"{name[0]}{i}", "text": corpus.text(next(lengths))} for i in range(count)]
        (task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    judged = "".join(f"q{i}\tc{i * 3 % documents}\t1\n" for i in range(QUERIES))
    (task / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return {
        "name": "whole",
        "references": [],
        "controls": False,
        "seeds": SEEDS,
        "tasks": ["./search"],
        "evaluate_at": [1.0],
        "recipe": {
            "base_model": "./base", "dataset": "./pairs.jsonl", "steps": steps, "batch_size": BATCH, "warmup_steps": 0,
            "learning_rate": 1e-3, "dtype": "float32", "max_length": 512, "lora": {"dropout": 0.0}, **recipe,
        },
        "designs": [{"preset": name} for name in PRESETS],
    }  # fmt: skip


def measured(
    study: Study, variants: dict[str, Callable[[], Any]]
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Each seed's trials in every variant, one variant after the other: seconds by seed, and all main scores."""
    prepared = prepare(study)
    with tempfile.TemporaryDirectory() as folder:
        turn = dict.fromkeys(variants, 0)

        def one(name: str) -> None:
            seed = study.seeds[turn[name]]
            turn[name] += 1
            with variants[name]():
                for each in prepared.trials:
                    if each.seed == seed:
                        run_trial(each, prepared, Path(folder) / name / "trials" / each.name)

        times = interleave({name: lambda name=name: one(name) for name in variants}, len(study.seeds), warmup=0)
        return times, {name: _scores(Path(folder) / name / "trials") for name in variants}


def _scores(folder: Path) -> np.ndarray:
    """Main scores of all trials, steps and tasks, in a fixed order."""
    frames = [pl.read_parquet(path) for path in sorted(folder.glob("*/scores/*/*.parquet"))]
    return pl.concat(frames, how="diagonal_relaxed").filter(pl.col("item_id").is_null())["score"].to_numpy()
