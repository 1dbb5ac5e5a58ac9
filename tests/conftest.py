"""What every test shares: the folder of real data beside the repository, and one thread."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # another order of summation gives other last digits
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository; the test is skipped where there is none."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the evaluation sets in a folder `shared` beside the repository")
    return SHARED


@pytest.fixture(scope="module")
def quick_engine() -> Iterator[None]:
    """Engine processes come from a server that has imported the libraries once, which saves 8 s a run."""
    get_context = multiprocessing.get_context
    server = get_context("forkserver")
    server.set_forkserver_preload(["poolwise.runs.trial"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            multiprocessing, "get_context", lambda kind=None: server if kind == "spawn" else get_context(kind)
        )
        yield
