"""Contrasts at equal cost: by hand where a design is stopped between two checkpoints, and never inside the family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from poolwise import api, stats
from poolwise.pooling.cost import training_flops
from poolwise.reports import secondary
from poolwise.runs import layout
from poolwise.runs.check import check
from poolwise.runs.prepare import store_costs
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from poolwise.verdicts.comparison import compare
from poolwise.verdicts.costs import PRICED_TOKENS, equal_budgets, mean_costs
from poolwise.verdicts.findings import Findings
from poolwise.verdicts.table import table
from test_comparison import rows

TASKS, SEEDS = 6, 3


def costs(**heads: float) -> list[dict]:
    """Cost rows of designs with the given forward FLOPs of the head, on a base of 100 under LoRA."""
    return [
        {"design": name, "encode_flops": 100 + head, "training_flops": 2 * 100 + 3 * head}
        for name, head in heads.items()
    ]


def history(*designs: str) -> pl.DataFrame:
    """Scores at steps 25, 50 and 100 of random designs."""
    rng = np.random.default_rng(1)
    found = []
    for step in (25, 50, 100):
        for name in designs:
            x = np.linspace(0.3, 0.6, TASKS) + step / 1000 + rng.normal(0, 0.004, (SEEDS, TASKS))
            found += rows({name: x.tolist()}, "STS", step=step)
    return table(found)


def compared(frame: pl.DataFrame):
    return compare(frame.filter(pl.col("step") == 100), "m1")


def array(frame: pl.DataFrame, design: str, step: int) -> np.ndarray:
    part = frame.filter((pl.col("design") == design) & (pl.col("step") == step)).sort("seed", "task")
    return part["score"].to_numpy().reshape(SEEDS, TASKS)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, 2 * 100 + 3 * 10),  # LoRA: forward, gradients of the activations; the head has those of its weights too
        ({"lora": "full"}, 3 * 100 + 3 * 10),
        ({"lora": False}, 100 + 3 * 10),  # nothing below the head needs gradients
        ({"gradient_checkpointing": True}, 3 * 100 + 3 * 10),
        ({"lora": False, "gradient_checkpointing": True}, 100 + 3 * 10),  # no backward pass, nothing to recompute
        ({"mini_batch_size": 4}, 3 * 100 + 4 * 10),
    ],
)
def test_training_flops_count_the_passes(recipe, expected):
    assert training_flops(100, 10, Recipe(**recipe), 1.0) == expected


def test_layers_above_the_one_that_is_read_get_no_gradients():
    assert training_flops(100, 0, Recipe(lora="full"), 0.25) == 100 + 2 * 25


def test_check_and_the_equal_cost_table_count_the_same_training_flops(tmp_path: Path):
    """The share at which the more expensive design is stopped is the ratio of the FLOPs that `check` shows."""
    raw = {
        "name": "equal", "baseline": "m1", "tasks": ["demo/late-sts"], "references": [], "controls": False,
        "output": str(tmp_path), "recipe": {"base_model": "nano", "dataset": "demo", "steps": 100, "batch_size": 8},
        "designs": [
            {"preset": "m1"},
            {"name": "m2", "attention": "causal", "pooling": "cross_attention", "pooling_args": {"latents": 64}},
        ],
    }  # fmt: skip
    study = Study.parse(raw)
    frame = history("m1", "m2").with_columns(role=pl.lit("design"))
    layout.write_table(tmp_path / "results.parquet", frame.to_arrow())
    store_costs(study, study.folder)
    flops = {row["design"]: row["training_flops"] for row in check(study)["designs"]}
    (row,) = api.compare(study).budgets.rows
    assert row.stopped == "m2"
    assert row.at == flops["m1"] / flops["m2"]
    priced = {row["design"]: row["training_flops"] for row in api.compare(study).costs}
    assert priced == flops


def test_the_more_expensive_design_is_stopped_where_the_baseline_ends():
    """m2 costs 200 + 3 · 20 = 260 a text against 200: it has spent as much at 76.9 % of its steps."""
    frame = history("m1", "m2")
    found = equal_budgets(compared(frame), frame, costs(m1=0, m2=20))
    (row,) = found.rows
    share = 200 / 260
    weight = (100 * share - 50) / 50
    stopped = (1 - weight) * array(frame, "m2", 50) + weight * array(frame, "m2", 100)
    expected = stats.crossed(array(frame, "m1", 100), stopped)
    assert row.stopped == "m2"
    assert row.at == pytest.approx(share)
    assert row.difference == pytest.approx(expected.difference, abs=1e-12)
    assert row.p_value == pytest.approx(expected.p_value, abs=1e-12)


def test_a_more_expensive_baseline_is_stopped_instead():
    frame = history("m1", "m2")
    (row,) = equal_budgets(compared(frame), frame, costs(m1=20, m2=0)).rows
    assert row.stopped == "m1"
    stopped = (1 - (100 * row.at - 50) / 50) * array(frame, "m1", 50) + (100 * row.at - 50) / 50 * array(
        frame, "m1", 100
    )
    assert row.difference == pytest.approx((array(frame, "m2", 100) - stopped).mean(), abs=1e-12)


def test_a_design_that_has_spent_as_much_at_an_evaluated_step_is_taken_there():
    """m2 costs 200 + 3 · 200/3 = 400 a text against 200: half of its steps, 50."""
    frame = history("m1", "m2")
    prices = costs(m1=0, m2=0)
    prices[1]["training_flops"] = 2 * prices[0]["training_flops"]
    (row,) = (row for row in equal_budgets(compared(frame), frame, prices).rows if row.stopped)
    assert (row.stopped, row.at) == ("m2", 0.5)
    assert row.difference == pytest.approx((array(frame, "m2", 50) - array(frame, "m1", 100)).mean(), abs=1e-12)


def test_costs_of_several_bases_are_averaged_and_held_against_the_baselines():
    """Numbers are averaged, everything else is that of the first base; prices are those of texts of 128 tokens."""
    bases = (("small", 100, 150), ("large", 300, 500))
    rows = [
        {"design": d, "base": base, "encode_flops": flops[i], "share": 0.5 + i}
        for base, *flops in bases
        for i, d in enumerate(("m1", "m2"))
    ]
    assert mean_costs(rows, "m1") == [
        {"design": "m1", "base": "small", "encode_flops": 200, "share": 0.5, "relative_cost": 1.0},
        {"design": "m2", "base": "small", "encode_flops": 325, "share": 1.5, "relative_cost": 1.625},
    ]
    assert mean_costs(rows, "m3") == []
    assert PRICED_TOKENS == 128


def test_what_needs_no_contrast_or_allows_none_is_said():
    frame = history("m1", "m2", "m3")
    found = equal_budgets(compared(frame), frame, costs(m1=0, m2=0.1, m3=700))
    assert found.rows == ()
    assert "Training costs the same FLOPs as m1 within 0.5 %: m2." in found.notes
    assert any(note.endswith("before the first evaluated one for m3 (9 % of the steps of m3).") for note in found.notes)
    assert "No other design costs the same to encode within 5 %: m3." in found.notes
    assert [note for note in found.notes if "as many FLOPs as with m1, within 5 %: m2. The differences" in note]


def test_designs_of_one_encode_cost_are_held_against_each_other():
    frame = history("m1", "m2", "m3").filter(pl.col("step") == 100)
    comparison = compared(frame)
    found = equal_budgets(comparison, frame, costs(m1=0, m2=50, m3=52))
    (row,) = found.rows
    assert (row.kind, row.design, row.against) == ("encode cost", "m3", "m2")
    assert row.apart == pytest.approx(152 / 150 - 1)
    assert row.difference == pytest.approx((array(frame, "m3", 100) - array(frame, "m2", 100)).mean())
    swapped = equal_budgets(comparison, frame, costs(m1=0, m3=52, m2=50)).rows
    assert swapped == found.rows  # by the order of the comparison, not of the cost rows


def test_p_values_are_corrected_together_and_carry_no_star():
    frame = history("m1", "m2", "m3")
    comparison = compared(frame)
    found = equal_budgets(comparison, frame, costs(m1=0, m2=20, m3=21))
    assert len(found.rows) == 3
    assert [row.p_bh for row in found.rows] == stats.bh([row.p_value for row in found.rows]).tolist()
    findings = Findings.of(comparison, budgets=found)
    shown = secondary.equal_cost(findings)
    assert "exploratory" in shown.note
    assert not [cell for cells in shown.rows for cell in cells if cell in ("better", "worse")]
    assert comparison.family == 2
    out = json.loads(json.dumps(findings.to_json(), allow_nan=False))["equal_budget"]
    assert [row["kind"] for row in out["rows"]] == ["training FLOPs", "training FLOPs", "encode cost"]


def test_interim_pictures_and_tables_with_gaps_have_none():
    frame = history("m1", "m2")
    interim = compare(frame.filter(pl.col("step") == 100), "m1", interim="Interim: runs are missing.")
    assert equal_budgets(interim, frame, costs(m1=0, m2=20)) is None
    last = frame.filter((pl.col("step") == 100) & ((pl.col("design") == "m1") | (pl.col("task") != "STS00")))
    assert equal_budgets(compare(last, "m1", missing="drop"), frame, costs(m1=0, m2=20)) is None
    assert equal_budgets(compared(frame), frame, []) is None
