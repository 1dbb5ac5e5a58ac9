"""CPU seconds (user + system) of `poolwise check` on a base of SmolLM2-135M's shape, in a process of its own.

`check_135m`: a study of the paper's five designs on the built-in training pairs, without tasks. Torch and the other
libraries are loaded, the base is read and probed under causal and bidirectional attention and for packed batches. The
figure is seconds, in a process with as many threads as the machine has cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.imports import children
from benchmarks.measure import record
from benchmarks.step import SMOLLM2_135M, llama_base

GOAL, REPEATS = 15.0, 3
STUDY = """
name = "check"
baseline = "m1"
seeds = [0, 1]
tasks = []
references = []
controls = false

[recipe]
base_model = "./base"
dataset = "demo"
steps = 10
"""
PROGRAM = "import sys; from poolwise.cli import main; sys.argv = ['poolwise', 'check', 'study.toml']; main()"


def run() -> list[dict[str, Any]]:
    """The median of three, and their range."""
    with tempfile.TemporaryDirectory() as folder:
        llama_base(Path(folder, "base"), SMOLLM2_135M)
        designs = "".join(f'\n[[designs]]\npreset = "m{number}"\n' for number in range(1, 6))
        Path(folder, "study.toml").write_text(STUDY + designs, encoding="utf-8")
        seconds = sorted(_seconds(folder) for _ in range(REPEATS))
    low, high = seconds[0], seconds[-1]
    middle = statistics.median(seconds)
    return [record("check_135m", middle, low, high, GOAL, lower_is_better=True, unit="CPU seconds")]


def _seconds(folder: str) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    before = children()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return children() - before
