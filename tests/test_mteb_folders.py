"""Published results of mteb, in the layouts in which they lie about: which scores count, and what is reported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from poolwise.api import compare
from poolwise.cli import app
from poolwise.errors import DataError, StatisticsError
from poolwise.verdicts.mteb_files import Choice
from poolwise.verdicts.readers import read
from poolwise.verdicts.table import Note

STS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICK-R", "BIOSSES")
HASHES = {"old": "1" * 40, "new": "2" * 40}


def result(
    score: float | None, metric: str = "cosine_spearman", subset: str = "default", **more: Any
) -> dict[str, Any]:
    """One entry of a split: the metrics of a subset."""
    return {"hf_subset": subset, "languages": ["eng-Latn"], "main_score": score, metric: score, **more}


def write(
    folder: Path, task: str, splits: Mapping[str, list[dict[str, Any]]], name: str = "", data: str = "d1",
    version: str = "2.26.0",
) -> Path:  # fmt: skip
    """A result file of the current format."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "dataset_revision": data, "task_name": name or task, "mteb_version": version, "scores": splits,
        "evaluation_time": 3.0, "kg_co2_emissions": None,
    }  # fmt: skip
    path = folder / f"{task}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def model(
    root: Path, name: str, scores: Mapping[str, float], revision: str = HASHES["new"], date: str | None = None,
    metric: str = "cosine_spearman", data: str = "d1",
) -> Path:  # fmt: skip
    """A revision of a model with a test score for each task."""
    folder = root / name.replace("/", "__") / revision
    folder.mkdir(parents=True, exist_ok=True)
    for task, score in scores.items():
        write(folder, task, {"test": [result(score, metric)]}, data=data)
    meta = {"name": name, "revision": revision} | ({"release_date": date} if date else {})
    (folder / "model_meta.json").write_text(json.dumps(meta))
    return folder


def scores(start: float, step: float = 0.01) -> dict[str, float]:
    return {task: round(start + step * i, 4) for i, task in enumerate(STS)}


def note(notes: Any, words: str) -> Note:
    """The one note that contains some words."""
    (found,) = [note for note in notes if words in note]
    return found  # type: ignore[no-any-return]


def main(frame: pl.DataFrame) -> dict[tuple[str, str], float]:
    return {(d, t): s for d, t, s in frame.select("design", "task", "score").iter_rows()}


def test_a_folder_gives_designs_types_metrics_and_main_scores(tmp_path):
    folder = tmp_path / "results" / "org__model" / HASHES["new"]
    both = [{"main_score": 0.5, "accuracy": 0.5, "hf_subset": "en"}]
    write(folder, "AmazonCounterfactualClassification", {"test": both, "train": both})
    write(folder, "STS12", {"test": [result(0.72369)]})
    write(folder, "my-faq", {"test": [{"main_score": 0.4, "ndcg_at_10": 0.4, "hf_subset": "default"}]})
    (folder / "model_meta.json").write_text('{"name": "org/model"}')
    frame = read(tmp_path).frame
    columns = ("design", "seed", "task", "task_type", "metric", "split", "subset", "score")
    assert frame.sort("task").select(columns).rows() == [
        ("org/model", 0, "AmazonCounterfactualClassification", "Classification", "accuracy", "test", "en", 0.5),
        ("org/model", 0, "STS12", "STS", "cosine_spearman", "test", "default", 0.72369),
        ("org/model", 0, "my-faq", "Retrieval", "ndcg_at_10", "test", "default", 0.4),
    ]
    assert set(frame["revision"]) == {HASHES["new"]}


def test_results_of_model_cards_are_used_task_by_task_and_counted(tmp_path):
    """A whole task type of one model lies in `external` alone; its own result of STS12 is kept."""
    model(tmp_path, "org/a", scores(0.5) | {"ArguAna": 0.4, "SciFact": 0.5})
    model(tmp_path, "org/b", {"STS12": 0.6})
    for task, score in {**scores(0.55), "ArguAna": 0.45, "SciFact": 0.55}.items():
        write(tmp_path / "org__b" / "external", task, {"test": [result(score)]})
    found = read(tmp_path)
    assert main(found.frame)["org/b", "STS12"] == 0.6
    assert main(found.frame)["org/b", "STS13"] == 0.56
    said = note(found.notes, "model cards")
    assert "9 tasks" in said
    assert "org/b: ArguAna" in said.cases
    assert compare(tmp_path).groups == ("Retrieval", "STS")


MASSIVE = "MassiveIntentClassification"


def multilingual(root: Path) -> None:
    """b is 3.5 points above a in the English test, and far more in other languages and in validation."""
    for name, gains in (("org/a", (0.0, 0.0, 0.0)), ("org/b", (0.035, 0.30, 0.25))):
        folder = model(root, name, {})
        rows = [
            {"main_score": 0.5 + g, "accuracy": 0.5 + g, "hf_subset": s}
            for s, g in zip(("en", "de", "sw"), gains, strict=True)
        ]
        write(folder, MASSIVE, {"test": rows, "validation": rows[1:]})
        write(folder, "Banking77Classification", {"test": [result(0.6 + gains[0], "accuracy")]})


def test_a_benchmark_decides_on_splits_and_subsets(tmp_path):
    multilingual(tmp_path)
    c = compare(tmp_path, baseline="org/a", choice=Choice(benchmark="MTEB(eng, v2)"))
    assert c.row("Classification", "org/b").difference == pytest.approx(0.035)
    said = note(c.notes, "Kept")
    assert said.startswith("Kept: the tasks of MTEB(eng, v2) in its splits and subsets, 2 of 41; no result of ")
    assert len(said.cases) == 39
    with pytest.raises(
        DataError, match=r"benchmark 'MTEB\(eng, v3\)' is unknown to mteb.*did you mean 'MTEB\(eng, v[12]\)'"
    ):
        read(tmp_path, Choice(benchmark="MTEB(eng, v3)"))


def test_a_subset_and_a_split_are_chosen(tmp_path):
    multilingual(tmp_path)
    frame = read(tmp_path, Choice(subsets=("en",))).frame
    assert frame.filter(pl.col("task") == MASSIVE)["subset"].unique().to_list() == ["en"]
    assert "Banking77Classification" in frame["task"]  # it has no languages, so it is kept whole
    other = read(tmp_path, Choice(splits=("validation",)))
    assert other.frame["task"].unique().to_list() == [MASSIVE]
    assert note(other.notes, "Kept: split validation (1 tasks")


def test_without_a_choice_the_test_split_counts_and_means_over_languages_are_reported(tmp_path):
    multilingual(tmp_path)
    found = read(tmp_path)
    assert found.frame.filter(pl.col("task") == MASSIVE)["split"].unique().to_list() == ["test"]
    assert note(found.notes, "several evaluation splits").cases == (f"{MASSIVE}: test, not validation",)
    assert note(found.notes, "Means over several subsets").cases == (f"{MASSIVE}: de, en, sw",)


def test_a_task_that_a_model_has_in_one_language_is_compared_on_that_and_reported(tmp_path):
    for name, subsets in (("org/a", ("en", "de", "ru")), ("org/b", ("ru",))):
        folder = model(tmp_path, name, scores(0.5))
        write(folder, "STS22", {"test": [result(0.6, subset=subset) for subset in subsets]})
    c = compare(tmp_path)
    assert note(c.excluded, "Compared on the splits and subsets that every run has: STS22 (1 of 3: test ru)")


def test_results_under_other_arguments_are_left_out_and_reported(tmp_path):
    for name, start in (("org/alpha", 0.6), ("org/beta", 0.62)):
        folder = model(tmp_path, name, scores(start))
        for task in STS:
            write(folder / "experiments" / "truncate_dim_64", task, {"test": [result(start - 0.1)]})
        (folder / "experiments" / "truncate_dim_64" / "model_meta.json").write_text("{}")
    c = compare(tmp_path)
    assert c.designs == ("org/alpha", "org/beta")
    assert c.rows[0].difference == pytest.approx(0.02)
    assert "org/alpha (truncate_dim_64), org/beta (truncate_dim_64)" in note(c.notes, "experiments")


def test_a_first_format_file_without_main_score_uses_map_and_says_so(tmp_path):
    for name, start in (("org__old", 0.6), ("org__new", 0.61)):
        for task, values in {
            "STS12": {"cos_sim": {"spearman": start, "pearson": 0.7}},
            "AskUbuntuDupQuestions": {"map": start, "mrr": 0.9},
        }.items():
            folder = tmp_path / name / HASHES["old"]
            folder.mkdir(parents=True, exist_ok=True)
            content = {"mteb_dataset_name": task, "mteb_version": "1.0.2", "dataset_revision": "x"}
            (folder / f"{task}.json").write_text(json.dumps({**content, "test": {"evaluation_time": 9.0, **values}}))
    found = read(tmp_path)
    assert main(found.frame)["org/old", "AskUbuntuDupQuestions"] == 0.6
    assert main(found.frame)["org/new", "STS12"] == 0.61
    cases = note(found.notes, "another metric taken").cases
    assert f"org__old/{HASHES['old']}/AskUbuntuDupQuestions.json: map for map_at_1000" in cases


def test_map_stands_in_for_reranking_alone(tmp_path):
    folder = model(tmp_path, "org/a", dict.fromkeys(STS[:2], 0.5))
    without = {"hf_subset": "default", "main_score": None, "map": 0.6}
    write(folder, "STS12", {"test": [without]})
    found = read(tmp_path)
    assert ("org/a", "STS12") not in main(found.frame)
    assert any("no main score" in case for each in found.notes for case in getattr(each, "cases", ()))


def test_a_subset_that_is_there_twice_is_named(tmp_path):
    folder = model(tmp_path, "org/a", dict.fromkeys(STS[:2], 0.5))
    write(folder, "STS12", {"test": [result(0.5, subset="en-de"), *[result(0.6, subset="fr-en")] * 2]})
    assert any("fr-en" in case for each in read(tmp_path).notes for case in getattr(each, "cases", ()))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "the main score is nan"),
        (None, "no main score"),
        ("high", "the main score is 'high', not a number"),
        (72.3, "the main score 72.3 is not between -1 and 1"),
    ],
)
def test_a_score_that_cannot_be_used_is_named_with_file_model_and_task_and_the_rest_compared(tmp_path, value, words):
    model(tmp_path, "org/a", scores(0.5))
    folder = model(tmp_path, "org/b", scores(0.51))
    write(folder, "STS14", {"test": [{"hf_subset": "default", "main_score": value}]})
    c = compare(tmp_path)
    assert note(c.notes, "without a usable main score").cases == (
        f"org__b/{HASHES['new']}/STS14.json (org/b, STS14, test, default): {words}",
    )
    assert note(c.excluded, "Left out of every design").cases == ("STS14 (test): no score of org/b seed 0",)
    assert "STS14" not in c.tasks
    assert len(c.tasks) == 7


def test_nan_outside_the_evaluation_split_does_not_matter(tmp_path):
    """AFQMC is evaluated on validation; its test labels are hidden, so that its score there is NaN."""
    for name in ("org/a", "org/b"):
        folder = model(tmp_path, name, scores(0.5 if name == "org/a" else 0.51))
        write(folder, "AFQMC", {"test": [result(float("nan"))], "validation": [result(0.33)]})
    found = read(tmp_path)
    assert found.frame.filter(pl.col("task") == "AFQMC")["split"].to_list() == ["validation"] * 2
    assert not [text for text in found.notes if "usable" in text]


@pytest.mark.parametrize(
    "content",
    ['{"task_name": "STS12", "scores"', '{"task_name": "STS12", "scores": [1]}', '["main_score"]', '{"main_score": 1}'],
)
def test_a_damaged_file_is_named_and_the_rest_compared(tmp_path, content):
    model(tmp_path, "org/a", scores(0.5))
    folder = model(tmp_path, "org/b", scores(0.51))
    (folder / "STS12.json").write_text(content)
    c = compare(tmp_path)
    assert f"org__b/{HASHES['new']}/STS12.json (org/b, STS12)" in note(c.notes, "not readable results").cases[0]
    assert len(c.tasks) == 7


def test_equal_copies_of_a_model_are_one_run(tmp_path):
    for name, start in (("org/a", 0.6), ("org/b", 0.61)):
        model(tmp_path, name, scores(start))
        model(tmp_path, name, scores(start), revision="no_revision_available")
    c = compare(tmp_path)
    assert c.seeds == {"org/a": 1, "org/b": 1}
    assert note(c.notes, "one checkpoint and one run")
    asked = compare(tmp_path, choice=Choice(revisions="runs"))
    assert asked.seeds == {"org/a": 1, "org/b": 1}
    assert "copies and count as one run: 2 left out" in note(asked.notes, "copies")
    assert asked.scope == "checkpoints"


def test_revisions_are_runs_only_if_asked_and_else_the_newest_counts(tmp_path):
    for name, start in (("org/a", 0.6), ("org/b", 0.62)):
        model(tmp_path, name, scores(start), HASHES["old"], "2024-01-05")
        model(tmp_path, name, scores(start + 0.004), HASHES["new"], "2024-09-30")
    found = read(tmp_path)
    assert set(found.frame["revision"]) == {HASHES["new"]}
    assert f"org/a: {HASHES['new']}, not {HASHES['old']}" in note(found.notes, "the newest counts").cases
    assert compare(tmp_path, choice=Choice(revisions="runs")).seeds == {"org/a": 2, "org/b": 2}
    with pytest.raises(DataError, match="revisions='run' is unknown; allowed: newest, runs; did you mean 'runs'"):
        read(tmp_path, Choice(revisions="run"))


def test_revisions_of_unknown_age_with_different_scores_are_refused_with_the_list(tmp_path):
    model(tmp_path, "org/a", scores(0.6))
    model(tmp_path, "org/b", {"STS12": 0.61}, HASHES["old"])
    model(tmp_path, "org/b", scores(0.62), HASHES["new"], "2024-09-30")
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    text = str(caught.value)
    assert "org/b: its revisions have different scores of STS12" in text
    assert f"{HASHES['old']} (no release_date), {HASHES['new']} (2024-09-30)" in text
    assert "--revisions runs" in text


def test_a_named_revision_counts_before_an_unnamed_one(tmp_path):
    model(tmp_path, "org/a", scores(0.6))
    model(tmp_path, "org/a", scores(0.5) | {"STS22": 0.4}, "no_revision_available")
    frame = read(tmp_path).frame
    assert main(frame)["org/a", "STS12"] == 0.6
    assert main(frame)["org/a", "STS22"] == 0.4


def test_revisions_without_a_common_task_are_parts_of_one_run(tmp_path):
    for revision, task in (("aaa", "STS12"), ("bbb", "STS13"), ("ccc", "STS12")):
        write(tmp_path / "m" / revision, task, {"test": [result(0.5)]})
    frame = read(tmp_path, Choice(revisions="runs")).frame
    assert sorted(frame.select("revision", "seed").rows()) == [("aaa", 0), ("bbb", 0), ("ccc", 1)]


def test_one_task_under_two_spellings_is_one_task_and_both_files_are_named(tmp_path):
    model(tmp_path, "org/a", scores(0.5) | {"EightTagsClustering": 0.4}, metric="v_measure")
    folder = model(tmp_path, "org/b", scores(0.5) | {"EightTagsClustering": 0.45}, metric="v_measure")
    write(folder, "8TagsClustering", {"test": [result(0.2, "v_measure")]}, version="1.2.0")
    write(folder, "stsbenchmark", {"test": [result(0.55)]})
    found = read(tmp_path)
    assert main(found.frame)["org/b", "EightTagsClustering"] == 0.45
    assert found.frame.filter(pl.col("task").str.to_lowercase() == "stsbenchmark")["task"].unique().to_list() == [
        "STSBenchmark"
    ]
    said = note(found.notes, "two spellings").cases
    assert (
        f"EightTagsClustering: org__b/{HASHES['new']}/EightTagsClustering.json, not "
        f"org__b/{HASHES['new']}/8TagsClustering.json (different scores)"
    ) in said
    assert any(case.startswith("STSBenchmark: ") and "(equal)" in case for case in said)


def test_the_layout_before_revisions_is_read(tmp_path):
    for name, start in (("org__a", 0.6), ("plain-model", 0.62)):
        for task, score in scores(start).items():
            write(tmp_path / "results" / name, task, {"test": [result(score)]})
    for root in (tmp_path, tmp_path / "results"):
        c = compare(root, baseline="org/a")
        assert c.designs == ("org/a", "plain-model")
        assert (len(c.tasks), c.rows[0].difference) == (8, pytest.approx(0.02))


def test_tasks_on_other_revisions_of_their_data_are_counted(tmp_path):
    model(tmp_path, "org/a", scores(0.5))
    folder = model(tmp_path, "org/b", scores(0.51))
    for task in ("STS12", "SICK-R", "STS22"):  # the last one is no shared task
        write(folder, task, {"test": [result(0.5)]}, data="d2")
    said = note(read(tmp_path).notes, "different revisions of their data")
    assert said == "Scored on different revisions of their data: 2 of 8 shared tasks."
    assert said.cases[0] == "SICK-R: d1 (org/a); d2 (org/b)"


def test_parts_of_an_aggregate_task_are_not_counted_twice(tmp_path):
    whole, part = "CQADupstackRetrieval", "CQADupstackTexRetrieval"
    model(tmp_path, "org/a", {whole: 0.5, part: 0.4}, metric="ndcg_at_10")
    model(tmp_path, "org/b", {whole: 0.5, part: 0.4}, metric="ndcg_at_10")
    assert read(tmp_path).frame["task"].unique().to_list() == [whole]
    model(tmp_path, "org/c", {part: 0.4}, metric="ndcg_at_10")  # without the aggregate, so that the part is shared
    assert read(tmp_path).frame["task"].unique().to_list() == [part]


def test_tasks_that_a_model_lacks_are_one_line_and_a_list(tmp_path):
    model(tmp_path, "org/a", scores(0.5))
    model(tmp_path, "org/b", dict.fromkeys(STS[2:], 0.5))
    done = CliRunner().invoke(app, ["compare", str(tmp_path), "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    line = "Left out of every design, as a run has no score: 2 of 8 tasks (STS12, STS13)."
    assert line in found["notes"]
    assert found["cases"][line] == ["STS12 (test): no score of org/b seed 0", "STS13 (test): no score of org/b seed 0"]
    plain = CliRunner().invoke(app, ["compare", str(tmp_path)], catch_exceptions=False).stdout
    assert "--details lists every case" in plain
    assert "no score of org/b seed 0" not in plain
    listed = CliRunner().invoke(app, ["compare", str(tmp_path), "--details"], catch_exceptions=False).stdout
    assert "STS12 (test): no score of org/b seed 0" in listed
    with pytest.raises(StatisticsError, match="2 scores are missing"):
        compare(tmp_path, missing="error")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(DataError, match="contains no mteb results"):
        read(tmp_path)
    write(tmp_path / "m" / "r", "STS12", {"test": [result(None)]})
    with pytest.raises(DataError, match=r"no score in its 1 result files can be used\n  - Left out, files without"):
        read(tmp_path)


def test_a_task_of_unknown_type_is_named_and_the_rest_compared(tmp_path):
    for name in ("org/a", "org/b"):
        folder = model(tmp_path, name, scores(0.5 if name == "org/a" else 0.51))
        write(folder, "our-own", {"test": [{"hf_subset": "default", "main_score": 0.4, "surprise": 0.4}]})
    c = compare(tmp_path)
    assert "our-own" in note(c.notes, "mteb does not know")
    assert len(c.tasks) == 8


@pytest.mark.shared
@pytest.mark.parametrize(
    ("case", "difference", "tasks", "words"),
    [
        ("08-mteb-experiments-folder", 0.02, 7, "experiments"),
        ("09-mteb-no-main-score", 0.01, 3, "another metric taken"),
        ("10-mteb-nan-score", 0.01, 8, "STS17.json"),
        ("11-mteb-two-revisions-of-one-model", 0.009, 6, "one checkpoint and one run"),
    ],
)
def test_the_cases_of_others(case, difference, tasks, words, shared):
    c = compare(shared / "cases" / case / "results")
    assert len(c.designs) == 2
    assert [abs(row.difference) for row in c.rows] == [pytest.approx(difference)] * len(c.rows)
    assert len(c.tasks) == tasks
    assert any(words in text for text in c.notes)
    assert c.scope == "checkpoints"
