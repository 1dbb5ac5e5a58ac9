"""docs/cost.md is what its script computes, and the paper's heads come out as they were counted by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from poolwise.study.catalogue import PRESETS

ROOT = Path(__file__).parents[1]


def test_page_is_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("cost_table", ROOT / "benchmarks" / "cost_table.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
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
