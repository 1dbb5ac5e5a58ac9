"""What tests share: the folder of real data beside the repository, one thread, and a small study that has run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # another order of summation gives other last digits
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
pytest.register_assert_rewrite("cli_study")
SHARED = Path(__file__).parents[2] / "shared"
UNMEASURED = tuple(
    f"test_{name}"
    for name in (
        "cuda_paths", "demo", "docs", "encode", "encoding", "evidence", "export", "files", "gpu_benchmark", "killed",
        "layout", "processes", "published", "report", "results", "runner", "schedule", "secrets", "serving",
        "shortcuts", "stats_type1", "step_benchmark", "workers",
    )
)  # fmt: skip
"""Files of tests of runs, reports, encoding and serving, whose lines are not counted."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests go first: two workers take a file at a time, and one that begins last ends alone.

    Where coverage is measured, slow tests and those of other packages run unmeasured: the rest reaches the same lines,
    and the tracer, which also follows torch's Python, makes tests a fifth longer.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    if config.pluginmanager.hasplugin("_cov"):
        for item in [*slow, *(item for item in items if item.path.stem.startswith(UNMEASURED))]:
            item.add_marker("no_cover")
    first = {item.path for item in slow}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository; the test is skipped where there is none."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the evaluation sets in a folder `shared` beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a small study needs; see small_study.py."""
    from small_study import furnish

    return furnish(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def finished(place: Path) -> Path:
    """The folder of an uninterrupted run of the small study, one trial at a time."""
    from small_study import run, write

    assert run(write(place, "whole"), workers=1) == {}
    return place / "whole"


@pytest.fixture
def copy(finished: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the finished run, times of the files included."""
    return Path(shutil.copytree(finished, finished.with_name(request.node.name)))
