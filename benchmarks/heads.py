"""Head-only studies (`lora = false`): the states of the frozen base are computed once for all steps, seeds and designs.

The base and texts of `benchmarks.study`; the four designs with a head, three seeds over the same pairs, scored twice.
`study_heads`: against the same without keeping states; `study_heads_paper`: against loops like the paper's, three
padded forwards a step and texts in the order in which they come. The first seed computes what the others find, so the
seconds of the whole study are divided, and the interval is the range over the seeds.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.measure import record
from benchmarks.study import BATCH, PRESETS, facts, long_texts, measured, paper_loops
from poolwise.runs import trial
from poolwise.study.study import Study

STEPS, DOCUMENTS = 3, 16


def run() -> list[dict[str, Any]]:
    variants = {"ours": contextlib.nullcontext, "forgetful": _forgetful, "paper": _paper}
    with tempfile.TemporaryDirectory() as folder:
        content = long_texts(Path(folder), STEPS, STEPS * BATCH, DOCUMENTS, lora=False, head_learning_rate=1e-3)
        designs = [{"preset": name} for name in PRESETS[1:]]
        content |= {"name": "heads", "baseline": "m2", "designs": designs, "evaluate_at": [0.5, 1.0]}
        study = Study.parse(content, Path(folder))
        times, scores = measured(study, variants)
    figures = []
    for name, slow in (("study_heads", "forgetful"), ("study_heads_paper", "paper")):
        ratios = [theirs / ours for theirs, ours in zip(times[slow], times["ours"], strict=True)]
        whole = sum(times[slow]) / sum(times["ours"])
        apart = float(np.abs(scores["ours"] - scores[slow]).max())
        figures.append(
            record(
                name, whole, min(ratios), max(ratios), None, agreement=apart, by_seed=ratios,
                seconds=sum(times["ours"]), **{**facts(study), "documents": DOCUMENTS},
            )
        )  # fmt: skip
    return figures


def _forgetful() -> Any:
    """Without keeping states."""
    return patch.object(trial, "_freeze", lambda *_: None)


@contextlib.contextmanager
def _paper() -> Iterator[None]:
    with _forgetful(), paper_loops():
        yield
