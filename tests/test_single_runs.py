"""Tables as people bring them, read as a careful statistician would: single runs, shared sources, copies, gaps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from poolwise import stats
from poolwise.api import compare
from poolwise.cli import app
from poolwise.reports.secondary import advice
from poolwise.reports.words import outcome, sentences
from poolwise.verdicts.findings import Findings
from poolwise.verdicts.table import table
from test_comparison import found, study

KNOWN = "runs of one design are known to vary by .1 to 4 points (1.4 on STS for SmolLM2-135M)."


def one_run(gains: dict[str, float], kind: str = "STS", **sources: str) -> pl.DataFrame:
    """One run of a and b, b above a by `gains` (task -> difference)."""
    return table(
        {"design": design, "seed": 0, "task": task, "task_type": kind, "metric": "m", "score": 0.5 + gain,
         "source": sources.get(task)}
        for task, difference in gains.items()
        for design, gain in (("a", 0.0), ("b", difference))
    )  # fmt: skip


def shown(path: Path, *options: str) -> str:
    """What the command prints, in one line."""
    printed = CliRunner().invoke(app, ["compare", str(path), *options], catch_exceptions=False).stdout
    return " ".join(printed.split())


SEMEVAL = {"STS12": 0.01, "STS13": 0.012, "STS14": 0.008, "STS15": 0.011, "STS16": 0.009, "STSBenchmark": 0.01}


def test_six_tasks_of_one_source_are_one_of_three_and_the_row_does_not_stand():
    """Over eight tasks p would be .02 and the tipping point .25; over three sources p is .50 and there is none."""
    c = found(one_run({**SEMEVAL, "BIOSSES": 0.002, "SICK-R": -0.001}), "a")
    row = c.rows[0]
    assert (row.n, row.tasks, row.p_value, row.tipping_run_sd) == (3, 8, 0.5, None)
    assert "8 tasks from 3 sources, 1 seed" in sentences(c)[0]
    known = found(one_run({**SEMEVAL, "BIOSSES": 0.002, "SICK-R": -0.001}), "a", run_sd=0.0001, run_df=100)
    assert known.rows[0].given.p_value == pytest.approx(0.38, abs=0.005)
    assert known.rows[0].given.verdict == "inconclusive"


def test_the_tipping_point_is_that_of_the_rows_own_step_of_holm():
    gains = {f"t{i}": 0.02 + 0.001 * i for i in range(9)}
    frame = pl.concat([one_run(gains, "R"), one_run({f"u{i}": 0.01 + 0.003 * i for i in range(9)}, "S")])
    c = found(frame, "a")
    first, second = c.rows
    assert first.p_holm == second.p_holm == 2 * 2 / 2**9
    for row, level in ((first, 1 - 0.05 / 2), (second, 0.95)):
        d = (c.arm(row.group, "b").array - c.arm(row.group, "a").array)[0]
        assert row.tipping_run_sd == stats.one_seed(d, 0, level=level).tipping_run_sd
        tipping = stats.one_seed(d, row.tipping_run_sd, level=level)
        assert min(abs(tipping.ci_low), abs(tipping.ci_high)) == pytest.approx(0, abs=1e-9)
    assert sentences(c)[0].endswith(KNOWN)


def test_a_row_that_does_not_stand_has_no_tipping_point():
    c = found(one_run({"t0": 0.02, "t1": 0.021}, "Retrieval"), "a")
    assert (c.rows[0].p_value, c.rows[0].tipping_run_sd) == (0.5, None)
    assert "hold up to" not in sentences(c)[0]


def test_wilcoxon_without_the_means_is_worded_as_such():
    """Ten small gains and one large loss: the ranks differ after Holm, the means do not even without a run effect."""
    c = found(one_run({f"t{i}": 0.001 + 0.0001 * i for i in range(10)} | {"t10": -0.0005}, "R"), "a")
    assert c.rows[0].p_holm <= 0.05
    heavy = found(one_run({f"t{i}": 0.001 + 0.0001 * i for i in range(16)} | {"t16": -0.05}, "R"), "a")
    assert heavy.rows[0].p_holm <= 0.05
    assert heavy.rows[0].tipping_run_sd == 0
    assert sentences(heavy)[0].endswith("The difference of the means would not hold even without a run effect.")


def test_what_holm_takes_back_is_inconclusive_everywhere(tmp_path):
    """Two groups of six tasks that all improve: p .031, after Holm .062."""
    gains = [0.02 + 0.001 * i for i in range(6)]
    frame = pl.concat([one_run({f"{k}{i}": g for i, g in enumerate(gains)}, k) for k in ("Retrieval", "Reranking")])
    frame.write_csv(tmp_path / "told.csv")
    text = shown(tmp_path / "told.csv")
    assert "both contrasts are inconclusive" in text
    assert "No choice from this: its designs were run once." in text
    assert not any(mark in text for mark in (" ▲ 5", "told apart", "Above a", "Recommended"))
    c = compare(tmp_path / "told.csv")
    assert [row.p_holm for row in c.rows] == [0.0625, 0.0625]
    assert all("excludes 0, but not after Holm over 2 contrasts (p .062)" in text for text in sentences(c))
    ranks = CliRunner().invoke(app, ["compare", str(tmp_path / "told.csv"), "--leaderboard"]).stdout
    assert ranks.count("0 of 1 pair told apart") == 2


def test_one_contrast_is_never_explained_by_a_correction():
    for seed in range(30):
        c = found(study({"a": 0, "b": 0.003}, seeds=3, types={"R": 8}, run_sd=0.002, seed=seed), "a")
        assert c.family == 1
        assert "Holm over" not in sentences(c)[0]


def test_a_source_on_some_rows_belongs_to_the_task():
    """b is 1 point above a on each of four tasks; the source of T0 to T2 is named on different rows of a and b."""
    rows = [
        {"design": d, "seed": s, "task": f"T{t}", "task_type": "STS", "metric": "m",
         "score": 0.3 + 0.1 * t + (0.01 if d == "b" else 0) + 0.0001 * s,
         "source": "X" if (d, t) in {("a", 0), ("a", 1), ("b", 1), ("b", 2)} else None}
        for d in "ab" for s in range(3) for t in range(4)
    ]  # fmt: skip
    c = found(table(rows), "a")
    assert c.arm("STS", "a").by_source.shape[1] == 2
    assert c.rows[0].verdict.difference == pytest.approx(0.01)


def test_a_verdict_that_lacks_sources_is_withheld_and_says_what_to_add():
    frame = study({"a": 0, "b": 0.06}, types={"Retrieval": 8}).with_columns(
        (pl.col("task").str.slice(-2).cast(pl.Int64) % 4).cast(pl.String).alias("source")
    )
    c = found(frame, "a")
    verdict = c.rows[0].verdict
    assert (verdict.verdict, verdict.missing_sources, outcome(c, c.rows[0])) == ("withheld", 1, "withheld")
    assert (
        "Holm p <.001, withheld: 4 sources, a verdict takes 5; add tasks of this kind from one more source."
        in sentences(c)[0]
    )
    assert c.to_json()["verdicts"][0]["verdict"] == "withheld"
    open_one = found(study({"a": 0, "b": 0.0}, types={"Retrieval": 4}, run_sd=0.02, seed=1), "a")
    assert open_one.rows[0].verdict.verdict == "inconclusive"  # there is nothing to withhold


def test_a_claim_under_a_foreign_run_effect_is_withheld_too():
    c = found(one_run({f"t{i}": 0.05 + 0.0001 * i for i in range(4)}, "R"), "a", run_sd=0.001, run_df=50)
    given = c.rows[0].given
    assert (given.verdict, given.missing_sources) == ("withheld", 1)
    assert "withheld: 4 sources, a verdict takes 5" in sentences(c)[0]
    two = found(one_run({"t0": 0.05, "t1": 0.04}, "R"), "a", run_sd=0.001, run_df=50).rows[0].given
    assert (two.sources, two.verdict) == (2, "inconclusive")
    lower = found(one_run({f"t{i}": -0.05 - 0.0001 * i for i in range(6)}, "R"), "a", run_sd=0.001, run_df=50)
    assert lower.rows[0].given.verdict == "worse"


def test_one_further_task_varies_more_than_the_mean():
    """Differences of 0 and 4 points in turn, no run effect: the mean is known better than the next task."""
    frame = study({"a": 0, "b": 0.0}, types={"R": 12}, run_sd=0.0001).with_columns(
        pl.when((pl.col("design") == "b") & (pl.col("task").str.slice(-1).cast(pl.Int64) % 2 == 0))
        .then(pl.col("score") + 0.04).otherwise("score").alias("score")
    )  # fmt: skip
    c = found(frame, "a")
    v = c.rows[0].verdict
    assert v.difference == pytest.approx(0.02, abs=0.001)
    assert v.new_task_high - v.new_task_low > 3 * (v.ci_high - v.ci_low)
    assert v.new_task_low < -0.02 < 0.06 < v.new_task_high
    assert v.better_on_new == pytest.approx(0.75, abs=0.04)  # 1.5 points above the margin, sd over tasks 2.1
    assert "On one further task like these, expect −" in sentences(c)[0]


def test_a_new_task_falls_into_its_interval_as_often_as_stated():
    """95 % of further tasks, over 300 studies of 8 tasks; the interval of the mean holds far fewer."""
    rng = np.random.default_rng(4)
    inside = narrow = 0
    for _ in range(300):
        effect, further = rng.normal(0.01, 0.01, 8), rng.normal(0.01, 0.01)
        a, b = (0.5 + shift + rng.normal(0, 0.002, (3, 1)) + rng.normal(0, 0.003, (3, 8)) for shift in (0, effect))
        result = stats.crossed(a, b)
        new = stats.one_new_task(result, 0.005)
        inside += new.low <= further <= new.high
        narrow += result.ci_low <= further <= result.ci_high
    assert 0.92 <= inside / 300 <= 0.98
    assert narrow / 300 < 0.75


def test_tasks_scored_early_alone_are_named(tmp_path):
    frame = pl.concat([study({"a": 0, "b": 0.05}, types={"STS": 6}).with_columns(step=pl.lit(n)) for n in (100, 200)])
    early = frame.filter(pl.col("step") == 100).filter(pl.col("task") == "STS00")
    both = pl.concat([frame, early.with_columns(task=pl.lit("OnlyEarly"))])
    both.write_csv(tmp_path / "early.csv")
    c = compare(tmp_path / "early.csv")
    assert c.excluded == ("Left out, not scored at the last step (200): OnlyEarly.",)
    assert "OnlyEarly" not in c.tasks


def cases(shared: Path, name: str) -> Findings:
    return compare(shared / "cases" / "20-scores-tables" / f"{name}.csv")


@pytest.mark.shared
def test_published_tables_are_read_with_care(shared):
    mixed, right = cases(shared, "mix"), cases(shared, "mix_ok")
    assert mixed.rows == right.rows
    assert mixed.rows[0].verdict.difference == pytest.approx(0.0103, abs=5e-5)
    assert mixed.recommendations[0].design is None
    copied = cases(shared, "copies")
    assert set(copied.seeds.values()) == {1}
    assert copied.scope == "checkpoints"
    assert [note for note in copied.notes if "copies and count as one run: 4 left out" in note]
    paper = cases(shared, "paper")
    assert [row.difference for row in copied.rows] == [row.difference for row in paper.rows]
    for baseline in paper.designs:
        turned = compare(shared / "cases" / "20-scores-tables" / "paper.csv", baseline=baseline)
        assert turned.scope == "checkpoints"
        assert {choice.design for choice in turned.recommendations} == {None}
        assert all(advice(turned, choice).startswith("No choice") for choice in turned.recommendations)
        assert [(row.tipping_run_sd is None) for row in turned.rows] == [row.p_holm > 0.05 for row in turned.rows]
    told, tip, given, early, two = (cases(shared, name) for name in ("told", "tip", "given2", "early", "f2"))
    assert [outcome(told, row) for row in told.rows] == ["inconclusive"] * 2
    assert (tip.rows[0].n, tip.rows[0].tipping_run_sd) == (3, None)
    assert (given.rows[0].p_value, given.rows[0].tipping_run_sd) == (0.5, None)
    assert "OnlyEarly" in early.excluded[0]
    assert json.dumps(two.to_json()).count('"p_value": 0.5') == 1
