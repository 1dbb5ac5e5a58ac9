"""All pairs and the leaderboard: Holm over every pair, rank intervals, groups of designs that are not told apart."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from poolwise import stats
from poolwise.api import compare, compare_pairs
from poolwise.cli import app
from poolwise.errors import PoolwiseError, StatisticsError
from poolwise.verdicts.leaderboard import all_pairs, tied_groups, word_of
from poolwise.verdicts.mteb_files import Choice
from test_comparison import study
from test_mteb_folders import model, result, write

TASKS = (
    "STS12",
    "STS22",
    "SICK-R",
    "BIOSSES",
    "STS17",
    "JSICK",
    "KorSTS",
    "SICK-R-PL",
    "STSES",
    "IndicCrosslingualSTS",
)


def board(tmp_path, shifts):
    """Published results of models that lie a given number of points above the tasks' levels."""
    for name, gains in shifts.items():
        model(tmp_path, name, {task: 0.4 + 0.03 * i + gains(i) / 100 for i, task in enumerate(TASKS)})
    return tmp_path


def test_groups_are_stretches_of_neighbours_that_are_not_told_apart():
    order = ["a", "b", "c", "d", "e"]
    above = {("a", "c"), ("a", "d"), ("a", "e"), ("b", "d"), ("b", "e"), ("c", "e"), ("d", "e")}
    assert tied_groups(order, above) == {"a": ("a", "b"), "b": ("b", "c"), "c": ("c", "d"), "d": ("e",)}
    assert tied_groups(order, set()) == {"a": tuple(order)}
    assert list(tied_groups([str(i) for i in range(30)], {(str(i), str(j)) for i in range(30) for j in range(i)}))[
        25:28
    ] == ["z", "a1", "b1"]


def test_every_pair_of_designs_is_in_one_family():
    frame = study({"a": 0, "b": 0.02, "c": 0.021, "d": 0.05}, types={"STS": 6, "R": 8})
    pairs = all_pairs(frame)
    assert pairs.family == 12
    assert pairs.scope == "designs"
    p = [row.verdict.p_value for row in pairs.rows]
    assert [row.verdict.p_holm for row in pairs.rows] == pytest.approx(stats.holm(p).tolist())
    places = {place.design: place for place in pairs.places if place.group == "R"}
    assert [place.design for place in pairs.places if place.group == "R"] == ["d", "b", "c", "a"]
    assert (places["d"].rank_low, places["d"].rank_high) == (1, 1)
    assert {(places[name].rank_low, places[name].rank_high) for name in "bc"} == {(2, 3)}
    assert (places["a"].rank_low, places["a"].rank_high) == (4, 4)
    assert [places[name].tied for name in "dbca"] == ["a", "b", "b", "c"]


def test_equal_designs_share_all_ranks():
    pairs = all_pairs(study({"a": 0, "b": 0, "c": 0}, types={"R": 8}, run_sd=0.004))
    assert {(place.rank_low, place.rank_high, place.tied) for place in pairs.places} == {(1, 3, "a")}


def test_a_withheld_pair_is_not_told_apart():
    pairs = all_pairs(study({"a": 0, "b": 0.05}, types={"R": 4}))
    assert [word_of(row, pairs.alpha) for row in pairs.rows] == ["withheld"]
    assert {(place.rank_low, place.rank_high) for place in pairs.places} == {(1, 2)}


def test_a_pair_needs_the_runs_of_the_whole_study_to_agree():
    """Three runs in a single group: of the pair's own runs and the pooled ones, the result with the larger p counts."""
    frame = study({"a": 0, "b": 0.003, "c": 0.001, "d": 0.002}, types={"R": 10}, run_sd=0.003, seed=1)
    alone, pairs = compare_rows(frame), {(r.baseline, r.design): r.verdict.p_value for r in all_pairs(frame).rows}
    assert all(pairs[key] >= p for key, p in alone.items())
    assert any(pairs[key] > p for key, p in alone.items())


def compare_rows(frame):
    from poolwise.verdicts.comparison import compare as compare_frame

    return {(row.baseline, row.design): row.verdict.p_value for row in compare_frame(frame, "a").rows}


def test_a_leaderboard_of_published_models(tmp_path):
    """far is 5 points above all on every task; near and same take turns, so that their order is open."""
    folder = board(
        tmp_path,
        {"org/far": lambda i: 5 + 0.01 * i, "org/near": lambda i: 1 if i % 2 else -1.2, "org/same": lambda i: 0.01 * i},
    )
    pairs = compare_pairs(folder)
    assert pairs.scope == "checkpoints"
    assert [(p.design, p.rank_low, p.rank_high, p.tied) for p in pairs.places] == [
        ("org/far", 1, 1, "a"), ("org/same", 2, 3, "b"), ("org/near", 2, 3, "b"),
    ]  # fmt: skip
    shown = CliRunner().invoke(app, ["compare", str(folder), "--leaderboard"], catch_exceptions=False).stdout
    assert "STS · 10 tasks from 8 sources; 2 of 3 pairs told apart; smallest reachable p .008" in shown
    assert "Holm over all 3 pairs, about these checkpoints." in " ".join(shown.split())


def test_the_json_has_pairs_places_and_notes(tmp_path):
    folder = board(tmp_path, {"org/a": lambda i: 0, "org/b": lambda i: 2 + 0.01 * i})
    write(folder / "org__b" / "external", "STSBenchmark", {"test": [result(0.7)]})
    out = json.loads(CliRunner().invoke(app, ["compare", str(folder), "--all-pairs", "--json"]).stdout)
    (pair,) = out["pairs"]
    (row,) = compare(folder, baseline="org/a").rows
    assert (pair["design"], pair["baseline"], pair["p_holm"]) == ("org/b", "org/a", row.p_holm)
    assert pair["difference"] == pytest.approx(row.difference)
    assert {place["design"] for place in out["leaderboard"]} == {"org/a", "org/b"}
    assert any("1 of 11 tasks (STSBenchmark)" in note for note in out["notes"])


def test_a_difference_of_zero_stays_zero_in_the_json():
    pairs = all_pairs(study({"a": 0.1, "b": 0.1}, types={"R": 8}))
    (pair,) = pairs.to_json()["pairs"]
    assert pair["difference"] == pairs.rows[0].verdict.difference


def test_pairs_have_no_baseline_and_take_two_designs(tmp_path):
    study({"a": 0, "b": 0.01}).write_csv(tmp_path / "t.csv")
    with pytest.raises(PoolwiseError, match="have no baseline"):
        CliRunner().invoke(app, ["compare", str(tmp_path / "t.csv"), "--leaderboard", "--baseline", "a"],
                           catch_exceptions=False)  # fmt: skip
    with pytest.raises(StatisticsError, match="pairs take two designs; the scores contain a"):
        all_pairs(study({"a": 0}))
    with pytest.raises(PoolwiseError, match="--split needs a column 'split'"):
        compare_pairs(tmp_path / "t.csv", choice=Choice(splits=("test",)))
