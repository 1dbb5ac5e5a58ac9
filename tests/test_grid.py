"""A grid as a study sees it: counted and priced before anything runs, and taken apart into factors afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from poolwise.runs.check import check
from poolwise.study.study import Study
from poolwise.verdicts.table import table
from test_comparison import found as compare
from tiny import tiny_folder

AXES = {"attention": ["causal", "bidirectional"], "pooling": ["mean", "cross_attention"], "latents": [2, 8]}
RECIPE = {"base_model": "./llama", "dataset": "demo", "steps": 10, "batch_size": 8, "max_length": 32}


def study(folder: Path, **changes: object) -> Study:
    raw = {"name": "g", "baseline": "mean-causal", "grid": AXES, "recipe": RECIPE, **changes}
    return Study.parse(raw, base_dir=folder)


def test_check_counts_and_prices_a_grid(tmp_path: Path) -> None:
    tiny_folder(tmp_path, "llama")
    found = check(study(tmp_path))
    assert found["trials"] == {"trained": 6 * 3 + 6, "of which controls": 6, "untuned": 6, "references": 2}
    assert found["grid"] == []
    # 10 steps × 8 rows × 3 texts; LoRA takes two forward passes of the base, the head three; controls cost what the
    # baseline costs
    text = [2 * row["base_flops_128"] + 3 * row["head_flops_128"] for row in found["designs"]]
    assert found["training_flops"] == 3 * 10 * 8 * 3 * (sum(text) + 2 * text[0])
    again = check(study(tmp_path, recipe={**RECIPE, "gradient_checkpointing": True, "mini_batch_size": 4}))
    more = [2 * row["base_flops_128"] + row["head_flops_128"] for row in found["designs"]]
    assert again["training_flops"] - found["training_flops"] == 3 * 10 * 8 * 3 * (sum(more) + 2 * more[0])


def test_factors_of_a_grid(tmp_path: Path) -> None:
    """Planted: bidirectional +.03, cross_attention +.02, and +.01 more from 2 to 8 latents; all three come out."""
    designs = study(tmp_path).designs
    draw = np.random.default_rng(3)
    tasks = draw.uniform(0.3, 0.6, 8)
    rows = []
    for design in designs:
        effect = 0.03 * (design.attention == "bidirectional") + 0.02 * (design.pooling == "cross_attention")
        effect += 0.01 * (design.pooling_args.get("latents") == 8)
        for seed in range(3):
            for number, level in enumerate(tasks):
                rows.append(
                    {"design": design.name, "seed": seed, "task": f"t{number}", "task_type": "STS", "step": 10,
                     "metric": "cosine_spearman", "score": level + effect + draw.normal(0, 0.001)}
                )  # fmt: skip
    factors = compare(table(rows), "mean-causal", treatments=designs).factorial
    assert factors
    found = {(effect.factors, effect.levels): effect.difference for effect in factors.effects if effect.kind == "main"}
    assert found[("attention",), ("bidirectional",)] == pytest.approx(0.03, abs=0.002)
    assert found[("pooling",), ("cross_attention (latents 2)",)] == pytest.approx(0.02, abs=0.002)
    sizes = [value for (names, _), value in found.items() if names == ("latents of cross_attention",)]
    assert [abs(value) for value in sizes] == [pytest.approx(0.01, abs=0.002)]
