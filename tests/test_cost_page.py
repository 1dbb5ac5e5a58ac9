"""The documentation's tables of costs, poolings, controls and arguments are what their script computes.

The paper's heads come out as they were counted by hand.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from poolwise.study.catalogue import POOLINGS, PRESETS

ROOT = Path(__file__).parents[1]


def load_script() -> ModuleType:
    """benchmarks/cost_table.py."""
    spec = importlib.util.spec_from_file_location("cost_table", ROOT / "benchmarks" / "cost_table.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_page_is_what_the_script_writes() -> None:
    script = load_script()
    text = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    assert text == script.page(), "run `python benchmarks/cost_table.py`"
    for preset in PRESETS:
        assert text.count(f"| `{preset}` |") == 2
    # last-layer heads, worked out in the notes on the paper's code
    lines = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert "| 245,216,384 | 96.5% |" in lines["m2-paper"]  # the second table's
    assert text.count("| 1,278,275,584 | 96.8% |") == 2
    assert "LoRA 41,943,040;" in text
    assert "LoRA 8,798,208;" in text


@pytest.mark.parametrize("page", ["design-space.md", "study-file.md"])
def test_tables_are_what_the_script_writes(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text == load_script().inserted(page), "run `python benchmarks/cost_table.py`"


def test_every_pooling_has_its_row() -> None:
    text = (ROOT / "docs" / "design-space.md").read_text(encoding="utf-8")
    for spec in POOLINGS.values():
        assert f"| `{spec.name}` | {spec.formula} | {spec.source}" in text
