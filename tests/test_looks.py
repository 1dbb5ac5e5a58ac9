"""Two declared looks, interim pictures without p, seeds that nobody declared; overall verdicts by declared weights."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from poolwise import api, stats
from poolwise.errors import CheckpointError, StatisticsError, StudyError
from poolwise.files import write_json
from poolwise.reports import pages, tables
from poolwise.reports.secondary import overall_sentence
from poolwise.reports.words import sentences, summary
from poolwise.runs import layout, looks
from poolwise.runs.run import results, run, trials, unfinished
from poolwise.stats.many import TWO_LOOK_ALPHA
from poolwise.stats.variance import TaskTypes, run_mean_square
from poolwise.study.study import Study
from poolwise.verdicts import readers
from test_comparison import found as compare
from test_comparison import study as table_of

DESIGNS = [{"preset": "m1"}, {"preset": "m2"}, {"preset": "m5"}]
SHIFTS = {"m1": 0.0, "m2": 0.02, "m5": 0.0005}
TYPES = {"STS": 6, "Retrieval": 8}


def declared(folder: Path, **fields) -> Study:
    raw = {"name": "looks", "tasks": ["x"], "recipe": {"steps": 10}, "designs": DESIGNS, "output": "runs"}
    return Study.parse({**raw, "controls": False, "references": [], **fields}, base_dir=folder)


def scored(study: Study, seeds: int, without: tuple[str, int] | None = None) -> None:
    """What a study's folder holds when `seeds` runs of each design are done, but for one."""
    frame = table_of(SHIFTS, seeds=5, types=TYPES).with_columns(role=pl.lit("design"), step=pl.lit(10))
    frame = frame.filter(pl.col("seed") < seeds)
    rows = []
    for design in SHIFTS:
        for seed in range(seeds):
            done = (design, seed) != without
            name = f"{design}-s{seed}"
            rows.append({"name": name, "label": design, "role": "design", "seed": seed, "base": "nano", "id": name})
            folder = study.folder / "trials" / rows[-1]["name"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "done").touch() if done else (folder / "done").unlink(missing_ok=True)
            if not done:
                frame = frame.filter((pl.col("design") != design) | (pl.col("seed") != seed))
    write_json(study.folder / "trials.json", {"trials": rows})
    layout.write_table(study.folder / "results.parquet", frame.to_arrow())


def take(study: Study) -> None:
    """What `poolwise run` does at its end."""
    looks.take(study, results(study), trials(study))


def test_the_field(tmp_path):
    assert declared(tmp_path, seeds=3, extend_to=5).all_seeds == (0, 1, 2, 3, 4)
    assert declared(tmp_path, seeds=[2, 7], extend_to=4).extended().seeds == (2, 7, 8, 9)
    plain = declared(tmp_path)
    assert plain.all_seeds == plain.seeds
    assert plain.fingerprint != declared(tmp_path, extend_to=5).fingerprint
    assert plain.fingerprint != declared(tmp_path, type_weights={"STS": 1.0}).fingerprint
    for wrong in (3, 0, "5"):
        with pytest.raises(StudyError, match="extend_to"):
            declared(tmp_path, extend_to=wrong)
    with pytest.raises(StudyError, match="no extension is declared"):
        plain.extended()
    with pytest.raises(StudyError, match="did you mean 'Retrieval'"):
        declared(tmp_path, type_weights={"Retrieva": 1.0})
    with pytest.raises(StudyError, match=r"type_weights\.STS"):
        declared(tmp_path, type_weights={"STS": 0.0})


def test_the_first_look_is_at_three_percent_and_recorded_once(tmp_path):
    study = declared(tmp_path, extend_to=5)
    scored(study, 3)
    looks.begin(study)
    take(study)
    found = api.compare(study)
    assert (found.alpha, found.percent) == (TWO_LOOK_ALPHA, 97)
    verdict = found.row("Retrieval", "m2").verdict
    base, arm, other = (found.arm("Retrieval", name).by_source for name in ("m1", "m2", "m5"))
    elsewhere = [[run_mean_square(found.arm("STS", d).by_source, TaskTypes.one(6)) for d in ("m1", "m2", "m5")]]
    straight = stats.crossed(base, arm, pool=[other], level=0.97, elsewhere=elsewhere)
    assert (verdict.ci_low, verdict.ci_high) == (straight.ci_low, straight.ci_high)
    same = stats.equivalence(straight, 0.005, alpha=0.03)
    assert (verdict.equivalence_low, verdict.equivalence_high) == (same.ci_low, same.ci_high)
    assert "97 % interval" in sentences(found)[0]
    assert "Look 1 of 2 (seeds 0 to 2), each tested at .03." in found.plan
    first = json.loads((study.folder / layout.LOOKS).read_text())
    assert [look["look"] for look in first["looks"]] == [1]
    assert len(first["looks"][0]["verdicts"]) == 4
    take(study)
    assert json.loads((study.folder / layout.LOOKS).read_text()) == first


def test_three_percent_decides():
    frames = (table_of({"a": 0, "b": 0.0025}, types={"R": 10}, run_sd=0.0015, seed=seed) for seed in range(99))
    frame = next(each for each in frames if 0.03 < compare(each, "a").rows[0].verdict.p_value < 0.05)
    assert compare(frame, "a").rows[0].verdict.verdict == "better"
    assert compare(frame, "a", alpha=TWO_LOOK_ALPHA).rows[0].verdict.verdict != "better"


def test_while_runs_are_missing_differences_have_no_p(tmp_path):
    study = declared(tmp_path)
    scored(study, 3, without=("m2", 1))
    looks.begin(study)
    found = api.compare(study)
    assert found.interim.startswith("Interim: runs are missing (m2 seed 1).")
    out = found.to_json()
    assert out["status"] == "interim"
    assert all(row["p_value"] is None and row["p_holm"] is None for row in out["comparisons"])
    assert all(row["ci_low"] is None and row["effect_size"] is None for row in out["comparisons"])
    assert (out["verdicts"], out["recommendations"], out["factors"]) == ([], [], None)
    assert found.row("STS", "m2").difference == pytest.approx(0.02, abs=0.01)
    assert summary(found) == ""
    assert sentences(found)[0].endswith("Runs are missing, so nothing is tested.")
    pages.render({}, readers.read(study.folder / "results.parquet").frame, found, tmp_path / "out")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "Interim: runs are missing" in text
        assert not re.search(r"<th[^>]*>p( Holm)?</th>|\| p \||Wilcoxon p|Recommended", text)
        assert not re.search(r"(above|below) m1\.|% interval", text)


def test_the_extension_is_looked_at_when_it_is_complete(tmp_path):
    study = declared(tmp_path, extend_to=5)
    scored(study, 3)
    looks.begin(study)
    take(study)
    first = api.compare(study)
    looks.begin(study, extend=True)
    scored(study, 5, without=("m5", 4))
    under_way = api.compare(study)
    assert {len(arm.seeds) for arm in under_way.arms} == {3}
    assert asdict(under_way.rows[0]) == asdict(first.rows[0])
    assert "the extension is still running" in under_way.plan
    scored(study, 5)
    take(study)
    second = api.compare(study)
    assert {len(arm.seeds) for arm in second.arms} == {5}
    assert "Look 2 of 2 (seeds 0 to 4)" in second.plan
    assert re.search(r"Result of the first look \(seeds 0 to 2, \d{4}-\d\d-\d\d\): .*m2 better", second.plan)
    assert [look["look"] for look in second.to_json()["looks"]] == [1, 2]


def test_an_extension_comes_after_the_first_look_and_stays(tmp_path):
    study = declared(tmp_path, extend_to=5)
    scored(study, 3, without=("m1", 2))
    looks.begin(study)
    assert unfinished(study) == ["m1-s2"]
    with pytest.raises(CheckpointError, match=r"after the first look.*m1-s2"):
        run(study, extend=True)
    with pytest.raises(StudyError, match="no extension is declared"):
        run(declared(tmp_path), extend=True)
    scored(study, 3)
    looks.check_extension(study, unfinished(study))
    looks.begin(study, extend=True)
    assert looks.running(study).seeds == (0, 1, 2, 3, 4)
    assert looks.plan(study).planned == (0, 1, 2)


def test_seeds_that_were_not_planned_make_verdicts_exploratory(tmp_path):
    study = declared(tmp_path)
    scored(study, 3)
    looks.begin(study)
    assert not api.compare(study).exploratory
    more = declared(tmp_path, seeds=5)
    scored(more, 5)
    found = api.compare(more)
    assert "planned with seeds 0 to 2 and now has seeds 0 to 4" in found.exploratory
    assert summary(found).startswith("Exploratory: ")
    assert not [cell for row in tables.means(found).rows for cell in row if cell[0] in "▲▼≈"]
    assert {choice.basis for choice in found.recommendations} == {"none"}
    assert found.to_json()["status"] == "exploratory"


def test_another_baseline_than_the_declared_one_is_exploratory(tmp_path):
    study = declared(tmp_path)
    scored(study, 3)
    assert api.compare(study).exploratory == ""
    assert api.compare(study, baseline="m2").exploratory
    assert api.compare(study, by="all").exploratory


def test_overall_is_the_weighted_contrast_in_the_family(tmp_path):
    frame = table_of(SHIFTS, types=TYPES)
    weights = {"STS": 1.0, "Retrieval": 3.0}
    found = compare(frame, "m1", type_weights=weights)
    (m2, m5) = found.overall
    arrays = {
        name: np.concatenate([found.arm(g, name).by_source for g in ("Retrieval", "STS")], axis=1) for name in SHIFTS
    }
    types = ["Retrieval"] * 8 + ["STS"] * 6
    elsewhere = [
        [run_mean_square(found.arm(group, d).by_source, TaskTypes.one(n)) for d in ("m1", "m2", "m5")]
        for group, n in (("Retrieval", 8), ("STS", 6))
    ]
    straight = stats.crossed_overall(
        arrays["m1"], arrays["m2"], types, weights, pool=[arrays["m5"]], elsewhere=elsewhere
    )
    assert m2.verdict.difference == straight.difference
    assert m2.verdict.p_value == straight.p_value
    assert m2.weights == (("Retrieval", 0.75), ("STS", 0.25))
    assert found.family == 6
    p = [row.verdict.p_value for row in found.rows] + [m2.verdict.p_value, m5.verdict.p_value]
    expected = stats.holm(p)
    assert [row.verdict.p_holm for row in found.rows] + [m2.verdict.p_holm, m5.verdict.p_holm] == expected.tolist()
    assert re.fullmatch(
        r"Overall, by the declared weights \(retrieval \.75, STS \.25\), m2 scores [\d.]+ points above m1 "
        r"\(95 % interval .*; 14 tasks from 14 sources, 3 seeds\)\.",
        overall_sentence(found, m2),
    )
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["overall"][0]["design"] == "m2"


def test_without_weights_there_is_no_overall_verdict_and_it_is_said_once():
    found = compare(table_of(SHIFTS, types=TYPES), "m1")
    assert found.overall == ()
    assert sum("No overall verdict" in note for note in found.notes) == 1
    thin = compare(table_of(SHIFTS, types={"STS": 6, "R": 1}), "m1", type_weights={"STS": 1.0, "R": 1.0})
    assert thin.overall == ()
    assert [note for note in thin.notes if "too few sources" in note and "R 1" in note]
    part = compare(table_of(SHIFTS, types={**TYPES, "R": 1}), "m1", type_weights={"STS": 1.0, "Retrieval": 1.0})
    assert len(part.overall) == 2
    assert "Without weight in the overall verdict: R." in part.notes


def test_single_runs_with_a_run_effect_from_elsewhere():
    frame = table_of(SHIFTS, seeds=1, types={"Retrieval": 8})
    found = compare(frame, "m1", run_sd=0.002, run_df=8)
    row = found.row("Retrieval", "m2")
    d = (found.arm("Retrieval", "m2").by_source - found.arm("Retrieval", "m1").by_source)[0]
    straight = stats.one_seed(d, 0.002, 8)
    assert (row.given.p_value, row.given.ci_low) == (straight.p_value, straight.ci_low)
    assert row.given.verdict == "better"
    assert row.verdict is None
    assert compare(frame, "m1", run_sd=0.03, run_df=8).row("Retrieval", "m2").given.verdict == "inconclusive"
    text = sentences(found)[0]
    assert "Given a run effect of .20 points from another study (8 df), the design m2 scores" in text
    assert "checkpoints, not designs" in text
    assert found.to_json()["given_run_effect"][0]["run_df"] == 8
    with pytest.raises(StatisticsError, match="it is measured here"):
        compare(table_of(SHIFTS), "m1", run_sd=0.002, run_df=8)
    with pytest.raises(StatisticsError, match="give both"):
        api._run_effect(0.2, None)


def test_the_command_line_takes_a_run_effect(tmp_path):
    from typer.testing import CliRunner

    from poolwise.cli import app

    path = tmp_path / "scores.csv"
    table_of(SHIFTS, seeds=1, types={"Retrieval": 8}).write_csv(path)
    told = CliRunner().invoke(app, ["compare", str(path), "--baseline", "m1", "--run-sd", "0.2", "--run-df", "8"])
    assert told.exit_code == 0
    assert "Designs, given a run effect" in told.output
    out = CliRunner().invoke(app, ["compare", str(path), "--json", "--run-sd", "0.2", "--run-df", "8"])
    assert json.loads(out.output)["given_run_effect"][0]["run_sd"] == pytest.approx(0.002)
    assert isinstance(CliRunner().invoke(app, ["compare", str(path), "--run-sd", "0.2"]).exception, StatisticsError)


def test_a_look_is_recorded_only_if_two_are_declared(tmp_path):
    study = declared(tmp_path)
    scored(study, 3)
    assert not looks.due(study)
    extended = declared(tmp_path, extend_to=5)
    assert looks.due(extended)
    scored(extended, 3, without=("m2", 1))
    looks.begin(extended)
    take(extended)
    assert looks.plan(extended).looks == ()
