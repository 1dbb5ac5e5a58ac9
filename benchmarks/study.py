"""A whole study, five designs × three seeds on the built-in base: training, scoring, saving; dropout 0, so that the
scores can be compared.

`study`: against loops like those of the paper's code: three padded forwards a step, texts encoded in the order in which
they come, 64 at a time, each as often as a task asks for it. `study_st`: against sentence-transformers' own padded
training and its `encode`, sorted by length. Same process, one after the other, seed by seed; CPU seconds.
`study_heads`: the four designs with a head, nothing else tuned (`lora = false`), the states of the frozen base
kept from step to step and from trial to trial, against the same code without keeping them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl

from benchmarks.measure import interleave, ratio_record
from poolwise import train
from poolwise.encoding import Counts, FastEncoder
from poolwise.running import trial
from poolwise.running.trial import prepare, run_trial
from poolwise.study import Study

STEPS, BATCH, ROUNDS = 6, 24, 3
TASKS = ["demo/early-retrieval", "demo/late-sts", "demo/negation-classification", "demo/topic-clustering"]
STUDY = {
    "name": "bench",
    "seeds": ROUNDS + 1,
    "tasks": TASKS,
    "references": [],
    "controls": False,
    "evaluate_at": [0.5, 1.0],
    "recipe": {
        "base_model": "nano",
        "steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": 1e-3,
        "lora": {"dropout": 0.0},
    },
    "designs": [{"preset": name} for name in ("m1", "m2", "m3", "m4", "m5")],
}


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


@contextlib.contextmanager
def _loops(encoder: type[FastEncoder]) -> Iterator[None]:
    """Padded training and this way of encoding instead of ours."""
    padded = patch.object(train, "choose", lambda *_: ("padded", "benchmark"))
    with padded, patch.object(trial, "FastEncoder", encoder):
        yield


def run() -> list[dict[str, Any]]:
    whole = {"ours": contextlib.nullcontext, "reference": lambda: _loops(_Unsorted), "st": lambda: _loops(_Plain)}
    heads = {"ours": contextlib.nullcontext, "forgetful": lambda: patch.object(trial, "_freeze", lambda *_: None)}
    only_heads = {
        "recipe": {**STUDY["recipe"], "lora": False, "steps": 3 * STEPS, "head_learning_rate": 1e-3},
        "designs": STUDY["designs"][1:],
    }
    return [
        *_figures(STUDY, whole, {"study": ("reference", 2.0), "study_st": ("st", None)}),
        *_figures({**STUDY, **only_heads}, heads, {"study_heads": ("forgetful", None)}),
    ]


def _figures(
    content: dict[str, Any],
    variants: dict[str, Callable[[], Any]],
    against: dict[str, tuple[str, float | None]],
) -> list[dict[str, Any]]:
    """Each seed's trials in every variant, one variant after the other; the first seed is not counted."""
    study = Study.parse(content)
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

        times = interleave({name: lambda name=name: one(name) for name in variants}, ROUNDS, warmup=1)
        scores = {name: _scores(Path(folder) / name / "trials") for name in variants}
    facts = {
        "designs": len(study.designs),
        "seeds": ROUNDS,
        "tasks": len(TASKS),
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
