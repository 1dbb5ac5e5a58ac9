"""Built-in tasks are compared by mechanism over items; A/A arm and predictions are read as they were declared."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from poolwise import demo, stats
from poolwise.demo.mechanisms import item_count, records
from poolwise.reports.analyses import control_sentences as sentences
from poolwise.reports.analyses import predictions_table
from poolwise.reports.pages import designs, opening, render
from poolwise.runs.check import check
from poolwise.screen import show_check, show_end, show_findings
from poolwise.stats.variance import TaskTypes, run_mean_square
from poolwise.study.starters import QUICK, demo_study
from poolwise.verdicts.arms import WORDINGS, by_items, whole_task
from poolwise.verdicts.controls import scored
from poolwise.verdicts.findings import Findings
from test_comparison import found as compare

ROOT = Path(__file__).parents[1]
FORMS = {"sts": ("STS", "cosine_spearman"), "retrieval": ("Retrieval", "ndcg_at_10")}
FORMS |= {"classification": ("Classification", "accuracy"), "clustering": ("Clustering", "v_measure")}
SIZES = {"sts": 30, "retrieval": 20, "classification": 16, "clustering": 3}


def rows(design: str, seed: int, shifts: dict[str, float], role: str = "design") -> list[dict[str, Any]]:
    """The long table of one run on the four forms of each mechanism of `shifts`, better by so much than others."""
    found = []
    for mechanism, shift in shifts.items():
        for form, size in SIZES.items():
            kind, metric = FORMS[form]
            items = np.random.default_rng([len(mechanism), len(form)])
            own = np.random.default_rng([seed, *map(ord, design), len(mechanism), len(form)])
            gold = items.uniform(0, 1, size)
            base = {"design": design, "role": role, "seed": seed, "step": 9, "task": f"demo/{mechanism}-{form}"}
            base |= {"task_type": kind, "source": mechanism, "split": "test", "subset": "default"}
            if form == "sts":
                values = gold + items.normal(0, 0.8, size) + own.normal(0, 0.1, size) + shift * gold * 5
                main = spearmanr(values, gold)[0]
            else:
                values = np.clip(items.uniform(0.2, 0.6, size) + own.normal(0, 0.02, size) + shift, 0, 1)
                main = values.mean()
            found.append({**base, "metric": metric, "score": float(main), "item_id": None, "gold": None})
            for i, value in enumerate(values):
                name = f"q{i}" if form == "retrieval" else str(i)
                target = (
                    {"metric": "cosine", "gold": float(gold[i])} if form == "sts" else {"metric": metric, "gold": None}
                )
                found.append({**base, **target, "score": float(value), "item_id": name})
    return found


NONE = {"roles": 0.0, "topic": 0.0}


def study(*arms: tuple[str, str, dict[str, float]], seeds: int = 3) -> pl.DataFrame:
    found = [row for name, role, shifts in arms for seed in range(seeds) for row in rows(name, seed, shifts, role)]
    return pl.DataFrame(found, infer_schema_length=None)


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return study(
        ("m1", "design", NONE), ("m2", "design", NONE), ("m5", "design", {"roles": 0.15, "topic": 0.0}),
        ("m1-aa", "aa", NONE), ("broken", "broken", {"roles": -0.15, "topic": -0.15}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(frame: pl.DataFrame) -> Findings:
    return compare(frame, "m1", controls=["m1-aa", "broken"])


def test_items_average_to_the_main_scores_of_their_tasks(frame: pl.DataFrame, found: Findings) -> None:
    main = frame.filter(pl.col("item_id").is_null()).group_by("design", "task").agg(pl.col("score").mean())
    expected = {(design, task): score for design, task, score in main.iter_rows()}
    for arm in found.arms:
        whole = arm.whole()
        assert len(whole.tasks) == 4
        for task, score in zip(whole.tasks, whole.task_means, strict=True):
            assert score == pytest.approx(expected[arm.design, task], abs=1e-9)
        assert arm.mean == pytest.approx(np.mean([expected[arm.design, task] for task in whole.tasks]))
        assert arm.by_source.mean() == pytest.approx(arm.mean)
        assert arm.on(arm.tasks[:9]).unit == "item"


def test_pseudo_values_are_the_jackknife_of_spearman() -> None:
    """For large n they agree with n·rho − (n − 1)·rho without the pair, up to what ranks shift."""
    rng = np.random.default_rng(0)
    gold = rng.normal(size=400)
    cosine = gold + rng.normal(size=400)
    base = {"design": "a", "seed": 0, "step": 1, "task": "demo/roles-sts", "task_type": "STS", "split": None}
    base |= {"subset": None, "source": "roles"}
    rho = spearmanr(cosine, gold)[0]
    table = [{**base, "metric": "cosine_spearman", "score": rho, "item_id": None, "gold": None}]
    table += [
        {**base, "metric": "cosine", "score": c, "item_id": str(i), "gold": g}
        for i, (c, g) in enumerate(zip(cosine.tolist(), gold.tolist(), strict=True))
    ]
    frame = pl.DataFrame(table, infer_schema_length=None)
    items = by_items(frame, frame.filter(pl.col("item_id").is_null()), "task_type")
    values = dict(items.select("task", "score").iter_rows())
    mine = np.array([values[f"demo/roles-sts · {i}"] for i in range(400)])
    assert mine.mean() == pytest.approx(rho, abs=1e-12)
    keep = ~np.eye(400, dtype=bool)
    knife = np.array([400 * rho - 399 * spearmanr(cosine[k], gold[k])[0] for k in keep])
    assert np.corrcoef(mine, knife)[0, 1] > 0.9
    assert mine.std() == pytest.approx(knife.std(), rel=0.2)


def test_constant_embeddings_have_items_of_zero() -> None:
    frame = study(("m1", "design", {"roles": 0.0}), seeds=1)
    flat = frame.with_columns(pl.when(pl.col("item_id").is_null()).then(0.0).otherwise("score").alias("score")).filter(
        pl.col("task_type") == "STS"
    )
    items = by_items(flat, flat.filter(pl.col("item_id").is_null()), "task_type")
    assert items["score"].to_list() == [0.0] * 30


def test_wordings_of_one_meaning_are_one_item() -> None:
    assert {len(m.templates.eval_queries) for m in demo.MECHANISMS.values()} == {WORDINGS}
    names = [name for name in demo.task_names() if name.endswith("-retrieval")]
    for name in names:
        records = demo.task_data(name)["records"]
        relevant = {row["query-id"]: set() for row in records["qrels"]}  # type: ignore[var-annotated]
        for row in records["qrels"]:
            relevant[row["query-id"]].add(row["corpus-id"])
        ids = [row["_id"] for row in records["queries"]]
        assert ids == [f"q{i}" for i in range(len(ids))]
        for first, second in zip(ids[::2], ids[1::2], strict=True):
            assert relevant[first] == relevant[second]
    arm = compare(study(("a", "design", NONE), ("b", "design", NONE)), "a").arm("roles", "a")
    assert sum("retrieval" in task for task in arm.tasks) == SIZES["retrieval"] // WORDINGS
    assert whole_task(arm.tasks[0]) in demo.task_names()
    assert whole_task("my#task") == "my#task"


def elsewhere(found: Findings, group: str, *designs: str) -> list[list[float]]:
    """What the other group shows of the runs of some designs."""
    (other,) = set(found.groups) - {group}
    arms = [found.arm(other, name).by_source for name in designs]
    return [[run_mean_square(arm, TaskTypes.one(arm.shape[1])) for arm in arms]]


def test_a_mechanism_is_judged_over_seeds_and_items(found: Findings) -> None:
    assert found.groups == ("roles", "topic")
    row = found.row("roles", "m5")
    arms = {arm.design: arm.by_source for arm in found.arms if arm.group == "roles"}
    known = elsewhere(found, "roles", "m1", "m5", "m2")
    by_hand = stats.crossed(arms["m1"], arms["m5"], pool=[arms["m2"]], elsewhere=known)
    assert row.verdict is not None
    assert (row.verdict.p_value, row.verdict.verdict) == (by_hand.p_value, "better")
    assert row.p_value is None  # no rank test over items
    assert (row.verdict.tasks, row.verdict.sources) == (4, 30 + 10 + 16 + 3)
    assert {found.row("roles", "m2").verdict.verdict, found.row("topic", "m5").verdict.verdict} == {"inconclusive"}  # type: ignore[union-attr]


def test_an_arm_with_some_forms_is_compared_on_these(frame: pl.DataFrame) -> None:
    only = frame.filter((pl.col("design") != "broken") | (pl.col("task_type") == "Retrieval"))
    row = compare(only, "m1", controls=["m1-aa", "broken"]).row("roles", "broken")
    main = frame.filter(pl.col("item_id").is_null() & (pl.col("task") == "demo/roles-retrieval"))
    means = dict(main.group_by("design").agg(pl.col("score").mean()).iter_rows())
    assert row.difference == pytest.approx(means["broken"] - means["m1"])


TYPES = re.compile(r"\b(STS|Classification|Clustering|Retrieval|classification|clustering|retrieval)\b")


@pytest.mark.parametrize("by", ["task_type", "all"])
def test_no_claim_about_task_types_or_overall(
    by: str, frame: pl.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(frame, "m1", by, controls=["m1-aa", "broken"])
    assert found.groups == ("roles", "topic")
    assert not found.recommendations
    assert not found.overall
    show_findings(found)
    assert not TYPES.search(capsys.readouterr().out)
    render({"name": "x", "predictions": demo.predictions()}, frame, found, tmp_path)
    answers = (tmp_path / "report.md").read_text().split("### Scores on each task")[0]
    assert not TYPES.search(answers)
    assert not TYPES.search(json.dumps([found.to_json()[key] for key in ("comparisons", "verdicts", "notes")]))
    assert "8 tasks on 2 mechanisms" in opening({}, compare(frame, "m1", controls=["m1-aa", "broken"]))


def test_other_tasks_keep_their_types(frame: pl.DataFrame) -> None:
    rng = np.random.default_rng(1)
    others = [
        {"design": design, "role": "design", "seed": seed, "step": 9, "task": f"own{i}", "task_type": "STS",
         "source": None, "split": None, "subset": None, "metric": "x", "score": float(rng.uniform(0.4, 0.6)),
         "item_id": None, "gold": None}
        for design in ("m1", "m2", "m5") for seed in range(3) for i in range(6)
    ]  # fmt: skip
    both = pl.concat(
        [frame.filter(pl.col("role") == "design"), pl.DataFrame(others, infer_schema_length=None)],
        how="diagonal_relaxed",
    )
    found = compare(both, "m1")
    assert set(found.groups) == {"roles", "topic", "STS"}
    assert len(found.rows) == 6  # one family
    assert found.row("STS", "m2").p_value is not None
    assert {choice.group for choice in found.recommendations} == {"STS"}


def test_main_scores_alone_are_grouped_by_mechanism_and_carry_no_verdict(frame: pl.DataFrame) -> None:
    found = compare(frame.filter(pl.col("item_id").is_null()), "m1", controls=["m1-aa", "broken"])
    assert found.groups == ("roles", "topic")
    assert not any(row.verdict for row in found.rows)


def test_items_count_only_if_every_run_has_them(frame: pl.DataFrame) -> None:
    """Otherwise a design would be compared on the items of some of its runs."""
    lacking = (pl.col("design") == "m2") & (pl.col("seed") == 0) & pl.col("item_id").is_not_null()
    whole, found = (compare(x, "m1", controls=["m1-aa", "broken"]) for x in (frame, frame.filter(~lacking)))
    assert {arm.unit for arm in whole.arms} == {"item"}
    assert {arm.unit for arm in found.arms} == {"task"}
    assert not any(row.verdict for row in found.rows)


def test_one_run_claims_nothing(frame: pl.DataFrame, tmp_path: Path) -> None:
    one = frame.filter(pl.col("seed") == 0)
    found = compare(one, "m1", controls=["m1-aa", "broken"])
    assert found.banner
    assert not any(row.verdict or row.p_value is not None for row in found.rows)
    render({}, one, found, tmp_path)
    assert "no verdict on designs is possible" in (tmp_path / "report.md").read_text()


# ---------------------------------------------------------------- the A/A arm


def test_the_noise_band_is_the_largest_difference_tested_as_a_design(found: Findings) -> None:
    (band,) = found.bands
    arms = {(arm.group, arm.design): arm.by_source for arm in found.arms}
    by_hand = {
        group: stats.crossed(
            arms[group, "m1"],
            arms[group, "m1-aa"],
            pool=[arms[group, "m2"], arms[group, "m5"]],
            elsewhere=elsewhere(found, group, "m1", "m1-aa", "m2", "m5"),
        )
        for group in found.groups
    }
    largest = max(by_hand, key=lambda group: abs(by_hand[group].difference))
    assert (band.group, band.difference) == (largest, by_hand[largest].difference)
    assert (band.ci_low, band.ci_high) == (by_hand[largest].ci_low, by_hand[largest].ci_high)
    p = stats.holm([by_hand[group].p_value for group in found.groups]).tolist()
    assert [q for _, q in band.p_holm] == p
    assert not band.differs
    assert found.unsound == found.exploratory == ""
    said = " ".join(sentences(found))
    assert "Noise band: m1-aa" in said
    assert "Broken arm: broken is shown to score below m1 in 2 of 2 groups" in said
    assert found.to_json()["controls"]["noise_bands"][0]["differs"] == []


def test_an_a_a_arm_that_differs_takes_the_stars_away(frame: pl.DataFrame, tmp_path: Path) -> None:
    other = study(("m1-aa", "aa", {"roles": 0.0, "topic": 0.15}))
    bad = compare(pl.concat([frame.filter(pl.col("design") != "m1-aa"), other]), "m1", controls=["m1-aa", "broken"])
    assert bad.bands[0].differs == ("topic",)
    assert bad.exploratory.startswith("Exploratory: the A/A arm")
    assert bad.to_json()["status"] == "exploratory"
    render({}, frame, bad, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "treat every claim here as exploratory" in text
    assert "▲" not in text.split("## In full")[0]


def test_between_one_and_five_percent_or_with_two_runs_the_claims_stand(frame: pl.DataFrame, found: Findings) -> None:
    """Holm p of .02 is no alarm, .009 is; with two runs a side nothing is."""
    (band,) = found.bands
    assert band.runs == 3
    assert replace(band, p_holm=(("roles", 0.02), ("topic", 1.0))).differs == ()
    assert replace(band, p_holm=(("roles", 0.009), ("topic", 1.0))).differs == ("roles",)
    assert replace(band, p_holm=(("roles", 0.009), ("topic", 1.0)), runs=2).differs == ()


# ---------------------------------------------------------------- predictions


def test_the_packaged_predictions_are_the_committed_ones() -> None:
    committed = (ROOT / "studies" / "predictions.toml").read_bytes()
    said = demo.predictions()
    assert (ROOT / "src" / "poolwise" / "demo" / "predictions.toml").read_bytes() == committed
    assert said["sha256"] == hashlib.sha256(committed).hexdigest()
    assert said["written"] == "2026-11-22"
    assert said["mechanisms"].keys() == demo.MECHANISMS.keys()


def test_predictions_are_scored_right_wrong_undecided(found: Findings) -> None:
    predictions = {
        "roles": {"favoured": "m5", "over": "m1"},
        "topic": {"favoured": "m2", "over": "m1"},
        "swap": {"favoured": "m4", "over": "m2"},
    }
    right, open_ = scored(found, predictions)  # swap was not run
    assert (right.group, right.outcome, right.sign) == ("roles", "right", True)
    assert (open_.group, open_.outcome) == ("topic", "undecided")
    arms = {arm.design: arm.by_source for arm in found.arms if arm.group == "roles"}
    known = elsewhere(found, "roles", "m1", "m5", "m2")
    by_hand = stats.crossed(arms["m1"], arms["m5"], pool=[arms["m2"]], elsewhere=known)
    assert (right.ci_low, right.ci_high) == (by_hand.ci_low, by_hand.ci_high)
    (wrong,) = scored(found, {"roles": {"favoured": "m1", "over": "m5"}})
    assert (wrong.outcome, wrong.sign) == ("wrong", False)
    table = predictions_table(found, {"sha256": "ab" * 32, "written": "2026-11-22", "mechanisms": predictions})
    assert table is not None
    assert [row[-1] for row in table.rows] == ["right", "undecided"]
    assert "abababababababab" in table.note
    assert "Right 1, wrong 0, undecided 1" in table.note


def test_the_hash_of_the_predictions_stands_in_the_report(frame: pl.DataFrame, found: Findings, tmp_path: Path) -> None:
    render({"name": "demo", "predictions": demo.predictions()}, frame, found, tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert demo.predictions()["sha256"][:16] in text
        assert "Predicted: m5 above m1" in text  # topic


def test_the_demo_ends_with_the_answer(found: Findings, capsys: pytest.CaptureFixture[str]) -> None:
    priced = replace(found, costs=({"design": "m1", "base_parameters": 3_840_000},))
    show_end({"base_model": "nano", "predictions": demo.predictions()}, priced)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Base model nano, 3.84 M parameters; 3 designs, 3 seeds")
    answer = next(line for line in lines if line.startswith("Above m1: m5 on roles."))
    assert "2 predictions written before the runs" not in answer  # m3, favoured for roles, is not in this study
    assert "Of 1 prediction written before the runs" in " ".join(lines)
    assert any(line.startswith("topic") and "m5 over m1" in line for line in lines)
    assert any(line.startswith("Broken arm: broken is shown to score below m1 in 2 of 2 groups") for line in lines)
    assert not any("contrasts of checkpoints" in line or "Run effect" in line for line in lines)
    assert designs(found) == ""  # no study, so nothing is known of them
    assert designs(replace(found, treatments=demo_study(Path("demo"), quick=True).designs)).startswith(
        "m1: causal, last_token; m5: bidirectional, layer_cross_attention"
    )


def test_the_report_says_what_a_mechanism_plants(frame: pl.DataFrame, found: Findings, tmp_path: Path) -> None:
    render({"name": "demo", "predictions": demo.predictions()}, frame, found, tmp_path)
    assert f"<span>{demo.MECHANISMS['topic'].plants}</span>" in (tmp_path / "report.html").read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert "random runs and random items of each mechanism" in markdown
    assert "Wilcoxon" not in markdown.split("### Methods")[1]


# ---------------------------------------------------------------- poolwise check


@pytest.mark.parametrize("name", demo.task_names())
def test_items_are_counted_before_anything_runs(name: str) -> None:
    mechanism, kind = name.removeprefix("demo/").split("-")
    made = records(mechanism, kind)
    units = len(made["queries"]) // 2 if kind == "retrieval" else len(made["test"])
    assert item_count(mechanism, kind) == units


def test_check_speaks_of_mechanisms_and_not_of_task_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = demo_study(tmp_path, quick=True)
    found = check(study)
    assert found["tasks"] == []
    assert {row["mechanism"] for row in found["mechanisms"]} == set(QUICK)
    assert found["contrasts"] == len(QUICK)
    assert not any("Wilcoxon" in warning for warning in found["warnings"])
    show_check(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "compared by mechanism, over 2 seeds × items" in said
    assert "task type" not in said


# ---------------------------------------------------------------- the demo's study


def test_the_quick_demo_has_every_task_type_and_two_designs(tmp_path: Path) -> None:
    quick = demo_study(tmp_path, quick=True)
    assert [design.name for design in quick.designs] == ["m1", "m5"]
    assert quick.seeds == (0, 1)
    assert quick.controls
    assert {name.rsplit("-", 1)[1] for name in quick.tasks} == {"sts", "retrieval", "classification"}
    whole = demo_study(tmp_path)
    assert whole.tasks == ("demo",)
    assert len(whole.designs) == 5
