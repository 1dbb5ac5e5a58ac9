"""benchmarks/step.py and benchmarks/check.py at tiny sizes on the CPU: there is little time on a GPU to fix them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SIZES = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not (ROOT / "benchmarks" / "step.py").is_file():
        pytest.skip("needs benchmarks/ of the repository")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import check, step

    monkeypatch.setattr(step, "PAIRS", {"cpu": 3})
    monkeypatch.setattr(step, "STEPS", {"cpu": 2})
    monkeypatch.setattr(check, "SMOLLM2_135M", SIZES)
    monkeypatch.setattr(check, "REPEATS", 1)
    return step, check


def test_step_compares_the_variants(benchmarks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    step, _ = benchmarks
    (figure,) = step.run(SIZES, "cpu")
    assert figure["name"] == "step_cpu"
    assert figure["used"] == "fused"
    assert figure["agreement"] < 1e-5
    assert figure["variants"]["fused"]["kernels"] < figure["variants"]["peft"]["kernels"]
    assert figure["rounds"] == 4
    assert "fused: ms" in capsys.readouterr().err


def test_a_variant_that_fails_does_not_stop_the_others(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = benchmarks
    monkeypatch.setattr(step, "ROUNDS", {"cpu": 1})
    monkeypatch.setattr(step, "fused_lora", lambda backbone: 1 / 0)
    monkeypatch.setattr(step, "_agreement", lambda *args: None)
    (figure,) = step.run(SIZES, "cpu")
    assert figure == {"name": "step_fused", "failed": "ZeroDivisionError: division by zero"}


@pytest.mark.slow
def test_check_runs_the_command(benchmarks: Any) -> None:
    _, check = benchmarks
    (figure,) = check.run()
    assert figure["name"] == "check_135m"
    assert 0.5 < figure["ratio"] < 120
