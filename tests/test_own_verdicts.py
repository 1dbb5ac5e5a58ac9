"""Tasks read from folders get a verdict each, over runs × items, and a recommendation that follows from it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score

from poolwise import api, stats
from poolwise.reports.secondary import advice
from poolwise.reports.words import interval, sentences, summary
from poolwise.runs.run import run
from poolwise.stats.resample import average_precision_parts
from poolwise.stats.variance import TaskTypes, run_mean_square
from poolwise.study.study import Study
from poolwise.verdicts import table
from poolwise.verdicts.findings import Findings
from test_comparison import found as compared
from test_comparison import study as of_tasks

PRODUCTS = ("kettle", "lamp", "drill", "tent", "heater", "camera", "printer", "blender", "scale", "radio", "router")
PRODUCTS += ("fan", "clock", "toaster", "vacuum")
TOPICS = {"warranty": ("covered", "guarantee"), "battery": ("charge", "power"), "cleaning": ("wipe", "cloth")}
TAILS = ("ask in the shop", "keep this leaflet", "see the back page")


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A help desk that was run: 45 documents and 30 queries, labelled texts; m1 against mean pooling, two seeds.

    Every document ends in one of three tails, so that a last token under causal attention knows little of the rest.
    """
    place, draw = tmp_path_factory.mktemp("desk"), random.Random(3)
    texts = [f"{p} {t} {w[0]} {w[1]}, {draw.choice(TAILS)}" for p in PRODUCTS for t, w in TOPICS.items()]
    chosen = draw.sample(range(len(texts)), 30)
    write(place / "faq/corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    queries = [{"_id": f"q{i}", "text": " ".join(texts[i].split()[:2]) + " help"} for i in chosen]
    write(place / "faq/queries.jsonl", queries)
    write(place / "faq/qrels/test.jsonl", [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in chosen])
    for name, size in (("train", 15), ("test", 20)):
        rows = [
            {"text": f"{draw.choice(PRODUCTS)} {t} {draw.choice(w)}, {draw.choice(TAILS)}", "label": t}
            for t, w in TOPICS.items()
            for _ in range(size)
        ]
        write(place / f"intents/{name}.jsonl", rows)
    write(
        place / "pairs.jsonl", [{"query": f"{t.split()[0]} {i}", "positive": f"{t} {i}"} for i, t in enumerate(texts)]
    )
    declared = {
        "name": "desk", "baseline": "m1", "seeds": 2, "tasks": ["./faq", "./intents"], "references": [],
        "controls": False, "evaluate_at": [1.0], "output": "desk",
        "designs": [{"preset": "m1"}, {"attention": "bidirectional", "pooling": "mean"}],
        "recipe": {
            "base_model": "nano", "dataset": "./pairs.jsonl", "steps": 2, "batch_size": 8,
            "warmup_steps": 0, "max_length": 64, "negatives": 0,
        },
    }  # fmt: skip
    study = Study.parse(declared, place)
    assert run(study, workers=1) == {}
    return study


@pytest.fixture(scope="module")
def found(desk: Study) -> Findings:
    return api.compare(desk)


def test_the_better_design_is_recommended_for_each_own_task(found: Findings) -> None:
    assert found.groups == ("faq", "intents")
    for row, choice in zip(found.rows, found.recommendations, strict=True):
        assert row.verdict.verdict == "better"
        assert 0 < row.verdict.ci_low < row.verdict.difference < row.verdict.ci_high
        assert (choice.design, choice.basis, choice.judged) == ("mean-bidirectional", "better", True)
        assert advice(found, choice).startswith("Recommended: mean-bidirectional, which scores above m1.")
    text = " ".join([summary(found), *sentences(found)])
    assert "othing can be tested" not in text
    assert "30 queries, 2 seeds" in text
    assert "60 examples, 2 seeds" in text


def test_every_report_shows_the_verdict_with_its_interval_first(desk: Study, found: Findings, tmp_path: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in api.report(desk, out=tmp_path)]
    row = found.row("faq", "mean-bidirectional").verdict
    cell = interval(row.ci_low, row.ci_high)
    html = pages[1]
    first, second = [part.partition("</table>")[0] for part in html.split("<table")[1:3]]
    for part in ("faq", "intents", cell, ">mean-bidirectional<"):
        assert part in first
    for part in ("faq · 30 queries, 2 seeds", "intents · 60 examples, 2 seeds", cell, ">better<"):
        assert part in second
    assert cell in pages[0]
    assert all("othing can be tested" not in page for page in pages)
    assert {row["group"] for row in found.to_json()["verdicts"]} == {"faq", "intents"}


def test_the_mean_over_items_is_the_score_of_the_task(desk: Study, found: Findings) -> None:
    main = api.results(desk).filter(pl.col("item_id").is_null())
    for design, task, score in main.group_by("design", "task").agg(pl.col("score").mean()).iter_rows():
        assert found.arm(task, design).mean == pytest.approx(score, abs=1e-5)


def test_the_verdict_agrees_with_the_comparison_of_one_task_in_full(desk: Study, found: Findings) -> None:
    over_runs = next(line for line in api.compare_items(desk, "faq") if line.test == "crossed")
    verdict = found.row("faq", "mean-bidirectional").verdict
    assert (verdict.difference, verdict.p_value) == pytest.approx((over_runs.difference, over_runs.p_value))


def items(
    shift: float, seeds: int = 3, task: str = "faq", kind: str = "Retrieval", designs: str = "ab", **more: object
) -> list[dict]:
    """Main scores and 40 queries of designs a and b (and others, equal to a), b higher by `shift`."""
    rng, rows = np.random.default_rng(0), []
    base = rng.uniform(0.2, 0.8, 40)
    for design in designs:
        for seed in range(seeds):
            scores = (base + rng.normal(0, 0.05, 40) + shift * (design == "b")).clip(0, 1)
            row = {"design": design, "seed": seed, "task": task, "task_type": kind, "metric": "ndcg_at_10", **more}
            rows.append({**row, "score": float(scores.mean()), "item_id": None})
            rows += [{**row, "score": float(s), "item_id": f"q{i}"} for i, s in enumerate(scores)]
    return rows


def test_single_runs_are_compared_over_items_as_checkpoints() -> None:
    c = compared(table.table(items(0.1, seeds=1)), "a")
    (row,) = c.rows
    assert row.verdict is None
    assert (row.n, row.effect_size) == (40, None)
    assert row.p_value < 0.001
    assert 0 < row.ci_low < row.difference < row.ci_high
    assert summary(c).startswith("Checkpoints only: Above a: b on faq.")
    assert "(mean, 95 % interval" in sentences(c)[0]
    choice = c.recommendations[0]
    assert (choice.design, choice.basis, choice.judged) == (None, "none", False)
    worse = compared(table.table(items(-0.1, seeds=1)), "a")
    assert worse.recommendations[0].design is None
    assert advice(worse, worse.recommendations[0]) == (
        "No choice from this: its designs were run once; if you deploy these very checkpoints, a scored above b."
    )


def test_findings_as_a_frame_as_html_and_in_a_line() -> None:
    rows = items(0.1, task="faq <1>")
    c = compared(table.table(rows), "a")
    frame = c.to_frame()
    (row,) = frame.iter_rows(named=True)
    verdict = c.rows[0].verdict
    assert (row["difference"], row["ci_low"], row["p_holm"]) == (verdict.difference, verdict.ci_low, verdict.p_holm)
    assert (row["group"], row["verdict"], row["scope"], row["unit"], row["n"]) == (
        "faq <1>", "better", "designs", "query", 40,
    )  # fmt: skip
    assert row["score"] - row["baseline_score"] == pytest.approx(verdict.difference)
    assert repr(c) == "<Findings: b against a on faq <1>: 1 better>"
    html = c._repr_html_()
    assert "<td>faq &lt;1&gt;</td>" in html
    assert f"<td>{100 * row['score']:.2f}</td><td>{100 * row['baseline_score']:.2f}</td>" in html
    assert f"<td>{100 * verdict.ci_low:.2f} to {100 * verdict.ci_high:.2f}</td>" in html
    single = compared(of_tasks({"a": 0, "b": 0.0}, types={"R": 1}, seeds=1), "a")
    assert single.to_frame()["verdict"].to_list() == ["untested"]
    assert "One run only" in single._repr_html_()


def test_a_task_named_like_a_task_type_stays_by_itself() -> None:
    rows = items(0.1, task="STS", task_identity="sha256:1")
    several = of_tasks({"a": 0, "b": 0.0}, types={"STS": 6})
    c = compared(pl.concat([table.table(rows), several], how="diagonal_relaxed"), "a")
    assert c.groups == ("STS", "STS (single task)")
    assert c.row("STS (single task)", "b").verdict.verdict == "better"
    assert c.row("STS", "b").verdict.tasks == 6


def test_what_runs_do_on_other_tasks_says_nothing_about_an_own_task() -> None:
    several = of_tasks({"a": 0, "b": 0.0, "c": 0.0}, types={"STS": 6, "R": 8})
    own = table.table(items(0.02, designs="abc", task_identity="sha256:1"))
    c = compared(pl.concat([own, several], how="diagonal_relaxed"), "a")
    a, b, lent = (c.arm("faq", name).by_source for name in "abc")
    found = c.row("faq", "b").verdict
    assert found.p_value == stats.crossed(a, b, pool=[lent]).p_value
    known = [[run_mean_square(c.arm(kind, name).by_source, TaskTypes.one(n)) for name in "abc"]
             for kind, n in (("STS", 6), ("R", 8))]  # fmt: skip
    assert found.p_value != stats.crossed(a, b, pool=[lent], elsewhere=known).p_value


def test_five_own_tasks_of_a_type_are_compared_over_tasks_as_well() -> None:
    rows = [row for i in range(5) for row in items(0.1, task=f"index{i}", task_identity=f"sha256:{i}")]
    c = compared(table.table(rows), "a")
    assert c.groups == ("Retrieval", *(f"index{i}" for i in range(5)))
    assert c.family == 6
    assert c.row("Retrieval", "b").verdict.sources == 5
    assert len(c.tasks) == 5


def test_official_tasks_are_compared_over_tasks() -> None:
    c = compared(table.table(items(0.1, task_identity="mteb/scifact@1")), "a")
    assert (c.groups, c.rows[0].verdict) == (("Retrieval",), None)


def test_gaps_among_the_items_leave_the_task_to_its_main_score() -> None:
    rows = [row for row in items(0.1) if row["item_id"] is None or (row["design"], row["seed"]) != ("b", 2)]
    assert compared(table.table(rows), "a").groups == ("Retrieval",)


@pytest.mark.parametrize("decimals", [1, 6])
def test_average_precision_parts(decimals: int) -> None:
    """Their mean is the average precision, ties included; each is its jackknife pseudo-value up to a second order."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 500)
    scores = np.round(labels + rng.normal(size=500), decimals)
    parts = average_precision_parts(scores, labels)
    whole = average_precision_score(labels, scores)
    assert parts.mean() == pytest.approx(whole)
    without = [average_precision_score(np.delete(labels, i), np.delete(scores, i)) for i in range(500)]
    jackknife = 500 * whole - 499 * np.array(without)
    assert np.corrcoef(parts, jackknife)[0, 1] > 0.999
    assert parts.std() == pytest.approx(jackknife.std(), rel=0.02)
