"""A whole study, five designs × three seeds: training, scoring, saving; fp32, dropout 0, so that scores compare.

Base: Qwen2-shaped, 12 layers, width 512, random weights; texts of lognormal length (mean 40 tokens, median 24).
`study`: against loops like those of the paper's code: three padded forwards a step, texts encoded in the order in which
they come, 64 at a time. `study_st`: against sentence-transformers' own padded training and its `encode`, sorted by
length. Same process, one after the other, seed by seed; CPU seconds. `study_heads`: the built-in base and tasks, the
four designs with a head, nothing else tuned (`lora = false`): the states of the frozen base kept from step to step and
from trial to trial, against the same code without keeping them.
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
from poolwise import train
from poolwise.encoding import Counts, FastEncoder
from poolwise.running import trial
from poolwise.running.trial import prepare, run_trial
from poolwise.study import Study

ROUNDS = 3
WHOLE_STEPS, WHOLE_BATCH, DOCUMENTS, QUERIES = 1, 6, 28, 8
HEAD_STEPS, HEAD_BATCH = 12, 16
HEAD_TASKS = ["demo/early-retrieval", "demo/late-sts", "demo/negation-classification", "demo/topic-clustering"]
COMMON: dict[str, Any] = {"references": [], "controls": False}
PRESETS = ("m1", "m2", "m3", "m4", "m5")


class _Plain(FastEncoder):
    """Each text by sentence-transformers' own `encode`, whenever it is asked for."""

    batch, unsorted = 32, False

    def __init__(self, encoder: Any, **_: Any) -> None:
        self.encoder, self.counts = encoder.eval(), Counts()

    def encode(self, texts: Any, prompt: str = "", **_: Any) -> np.ndarray:
        order = (
            patch.object(type(self.encoder), "_input_length", lambda *_: 0)
            if self.unsorted
            else contextlib.nullcontext()
        )
        with order:
            return self.encoder.encode(list(texts), prompt=prompt, batch_size=self.batch)


class _Unsorted(_Plain):
    batch, unsorted = 64, True


class _ThreeForwards(MultipleNegativesRankingLoss):
    """Query, positive and negative each in a forward of its own."""

    def forward(self, sentence_features: Any, labels: Any) -> Any:
        columns = [self.model(dict(column))["sentence_embedding"] for column in sentence_features]
        return self.compute_loss_from_embeddings(columns, labels)


@contextlib.contextmanager
def _loops(encoder: type[FastEncoder]) -> Iterator[None]:
    """Padded training and this way of encoding instead of ours."""
    padded = patch.object(train, "choose", lambda *_: ("padded", "benchmark"))
    loss = _ThreeForwards if encoder is _Unsorted else MultipleNegativesRankingLoss
    with padded, patch.object(train, "MultipleNegativesRankingLoss", loss), patch.object(trial, "FastEncoder", encoder):
        yield


def run() -> list[dict[str, Any]]:
    whole = {"ours": contextlib.nullcontext, "reference": lambda: _loops(_Unsorted), "st": lambda: _loops(_Plain)}
    heads = {"ours": contextlib.nullcontext, "forgetful": lambda: patch.object(trial, "_freeze", lambda *_: None)}
    recipe = {"base_model": "nano", "steps": HEAD_STEPS, "batch_size": HEAD_BATCH, "warmup_steps": 0, "lora": False}
    only_heads = {
        **COMMON,
        "name": "heads",
        "baseline": "m2",
        "seeds": ROUNDS + 1,
        "tasks": HEAD_TASKS,
        "evaluate_at": [0.5, 1.0],
        "recipe": {**recipe, "head_learning_rate": 1e-3},
        "designs": [{"preset": name} for name in PRESETS[1:]],
    }
    with tempfile.TemporaryDirectory() as folder:
        long = _long_texts(Path(folder))
        figures = _figures(
            Study.parse(long, Path(folder)), whole, {"study": ("reference", 2.0), "study_st": ("st", None)}, 0
        )
    return [*figures, *_figures(Study.parse(only_heads), heads, {"study_heads": ("forgetful", None)}, 1)]


def _long_texts(folder: Path) -> dict[str, Any]:
    """A study on generated texts of the usual lengths: its content, with base, pairs and task in `folder`."""
    corpus = Corpus(folder / "base", "float32", "cpu")
    corpus.tokenizer.save_pretrained(folder / "base")
    lengths = iter(corpus.lengths(3 * WHOLE_STEPS * WHOLE_BATCH * 8 + DOCUMENTS + QUERIES).tolist())
    names = ("query", "positive", "negative")
    rows = [{name: corpus.text(next(lengths)) for name in names} for _ in range(WHOLE_STEPS * WHOLE_BATCH * 8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = folder / "search"
    (task / "qrels").mkdir(parents=True)
    for name, count in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        texts = [{"_id": f"{name[0]}{i}", "text": corpus.text(next(lengths))} for i in range(count)]
        (task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    judged = "".join(f"q{i}\tc{i * 3 % DOCUMENTS}\t1\n" for i in range(QUERIES))
    (task / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return {
        **COMMON,
        "name": "whole",
        "seeds": ROUNDS,
        "tasks": ["./search"],
        "evaluate_at": [1.0],
        "recipe": {
            "base_model": "./base", "dataset": "./pairs.jsonl", "steps": WHOLE_STEPS, "batch_size": WHOLE_BATCH,
            "learning_rate": 1e-3, "warmup_steps": 0, "dtype": "float32", "max_length": 512, "lora": {"dropout": 0.0},
        },
        "designs": [{"preset": name} for name in PRESETS],
    }  # fmt: skip


def _figures(
    study: Study,
    variants: dict[str, Callable[[], Any]],
    against: dict[str, tuple[str, float | None]],
    warmup: int,
) -> list[dict[str, Any]]:
    """Each seed's trials in every variant, one variant after the other; the first `warmup` seeds are not counted."""
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

        times = interleave({name: lambda name=name: one(name) for name in variants}, ROUNDS, warmup=warmup)
        scores = {name: _scores(Path(folder) / name / "trials") for name in variants}
    facts = {
        "designs": len(study.designs),
        "seeds": ROUNDS,
        "tasks": len(study.tasks),
        "steps": study.recipe.steps,
        "agreement_of": "largest score difference",
    }
    return [
        ratio_record(
            name, times[slow], times["ours"], goal,
            agreement=float(np.abs(scores["ours"] - scores[slow]).max()), **facts,
        )
        for name, (slow, goal) in against.items()
    ]  # fmt: skip


def _scores(folder: Path) -> np.ndarray:
    """Main scores of all trials, steps and tasks, in a fixed order."""
    frames = [pl.read_parquet(path) for path in sorted(folder.glob("*/scores/*/*.parquet"))]
    return pl.concat(frames, how="diagonal_relaxed").filter(pl.col("item_id").is_null())["score"].to_numpy()
