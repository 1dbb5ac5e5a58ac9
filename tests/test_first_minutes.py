"""What people meet in their first ten minutes: names that are no models, files that are empty, usage lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.special import entr
from scipy.stats import ttest_1samp
from sklearn.metrics import v_measure_score
from typer.testing import CliRunner

from poolwise.api import compare_runs
from poolwise.cli import app
from poolwise.data.rows import clustering_sets, untestable
from poolwise.errors import DataError, ModelError, TaskError
from poolwise.model.checkpoint import load_any
from poolwise.reports import layers as layer_report
from poolwise.reports.pages import layers_page, page
from poolwise.runs.ab import ab
from poolwise.runs.check import check
from poolwise.study.design import Design
from poolwise.study.study import Study
from poolwise.verdicts.trec import read_trec


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a retrieval task, `data/faq`, and an STS task, `data/similar`."""
    monkeypatch.chdir(tmp_path)
    words = [f"{a} {b}" for a in ("red", "blue", "green", "old", "new") for b in ("boat", "lamp", "tent", "road")]
    faq = tmp_path / "data" / "faq"
    (faq / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [json.dumps({"_id": f"{name[0]}{i}", "text": text}) for i, text in enumerate(words)]
        (faq / f"{name}.jsonl").write_text("\n".join(rows))
    judged = "".join(f"q{i},c{i},1\n" for i in range(len(words)))
    (faq / "qrels" / "test.csv").write_text(f"query-id,corpus-id,score\n{judged}")
    (tmp_path / "data" / "similar").mkdir()
    pairs = "".join(f"{a},{b},{len(set(a) & set(b))}\n" for a, b in zip(words, reversed(words), strict=True))
    (tmp_path / "data" / "similar" / "test.csv").write_text(f"sentence1,sentence2,score\n{pairs}")
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("poolwise.model.checkpoint.SentenceTransformer", asked)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nano", "built-in base model: a decoder to train.*poolwise init demo.*poolwise export demo.toml m1 --to"),
        ("./nofolder", r"model './nofolder': there is no such folder \(allowed: tfidf"),
        ("data/fqa", "model 'data/fqa': there is no such folder .*did you mean 'faq'"),
        ("~/no-such-model", "no-such-model': there is no such folder"),
        ("study.toml", "study.toml is a study, not a model; .*poolwise export study.toml DESIGN --to FOLDER"),
        ("data/similar/test.csv", "test.csv is a file; give the folder of a sentence-transformers model"),
    ],
)
def test_a_name_that_is_no_model_is_explained_without_asking_the_hub(
    name: str, words: str, here: Path, no_hub: None
) -> None:
    with pytest.raises(ModelError, match=words):
        load_any(name)
    with pytest.raises(ModelError, match=words):
        ab(here / "data" / "faq", [name, "tfidf"])


def test_a_base_without_a_pooling_is_noted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from poolwise import evaluate
    from poolwise.demo import nano_path

    notes: list[str] = []
    evaluate(nano_path(), ["./data/similar"], note=notes.append)
    assert any("has no modules.json, so it does not say how it pools" in note for note in notes)


def test_a_folder_of_tasks_names_them_and_the_command_for_one(here: Path) -> None:
    with pytest.raises(TaskError, match=r"holds the tasks faq and similar; .*: poolwise ab data/faq tfidf bm25$"):
        ab("data", ["tfidf", "bm25"])
    result = CliRunner().invoke(app, ["evaluate", "tfidf", "--tasks", "./data"])
    assert "holds the tasks faq and similar; name one of them, such as" in str(result.exception)


def test_a_model_given_twice_is_said_first(here: Path) -> None:
    said: list[str] = []
    result = ab("data/faq", ["tfidf", "tfidf"], say=said.append)
    assert said[0] == "note: tfidf #2: the same model as tfidf, given twice: the two can only score alike"
    assert "given twice" in result["models"][1]["notes"][0]


def test_an_empty_file_of_judgements_is_called_empty(here: Path) -> None:
    (here / "data" / "faq" / "qrels" / "test.csv").write_text("")
    with pytest.raises(TaskError, match=r"qrels/test.csv: the file is empty; expected a header and a row below it"):
        ab("data/faq", ["tfidf", "bm25"])


def test_judgements_may_have_the_layout_of_an_evaluation_folder(here: Path) -> None:
    (here / "a.run").write_text("q1 Q0 d1 1 3.0 a\nq2 Q0 d2 1 3.0 a\n")
    (here / "b.run").write_text("q1 Q0 d3 1 3.0 b\nq2 Q0 d2 1 3.0 b\n")
    (here / "bare.qrels").write_text("q1 0 d1 1\nq2 0 d2 1\n")
    expected = compare_runs(["a.run", "b.run"], "bare.qrels", task="t")
    rows = (("q1", "d1"), ("q2", "d2"))
    (here / "q.csv").write_text("query-id,corpus-id,score\n" + "".join(f"{q},{d},1\n" for q, d in rows))
    (here / "q2.csv").write_text("score;corpus-id;query-id\n" + "".join(f"1;{d};{q}\n" for q, d in rows))
    (here / "q.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t1\n" for q, d in rows))
    (here / "q.jsonl").write_text(
        "".join(json.dumps({"query-id": q, "corpus-id": d, "score": 1}) + "\n" for q, d in rows)
    )
    for name in ("q.csv", "q2.csv", "q.tsv", "q.jsonl"):
        found = compare_runs(["a.run", "b.run"], name, task="t")
        assert [line.difference for line in found] == [line.difference for line in expected] == [-0.5]
    (here / "bad.csv").write_text("query-id,corpus-id,score\nq1,d1,high\n")
    with pytest.raises(DataError, match=r"bad.csv, line 2: column 'score': expected a number, got 'high'"):
        read_trec(["a.run"], "bad.csv")
    (here / "bare.csv").write_text("q1,d1,1\n")
    with pytest.raises(DataError, match=r"bare.csv: missing column\(s\) query-id, corpus-id, score; found q1, d1, 1"):
        read_trec(["a.run"], "bare.csv")


@pytest.mark.parametrize(
    ("preset", "hint"),
    [
        ("m55", "did you mean 'm5'"),
        ("M5", "did you mean 'm5'"),
        ("nvembed", "did you mean 'nv-embed'"),
        ("m8", "the designs of the paper are m1 to m5"),
        ("meen", 'mean is a pooling: write attention = "causal" and pooling = "mean" instead of a preset'),
    ],
)
def test_a_mistyped_preset_gets_a_guess(preset: str, hint: str) -> None:
    with pytest.raises(ValueError, match="is unknown") as caught:
        Design(preset=preset)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("ab", "poolwise ab DATA MODEL_A MODEL_B [MODEL...] [OPTIONS]"),
        ("compare", "poolwise compare SOURCE [RUN...] [OPTIONS]"),
        ("evaluate", "poolwise evaluate MODEL --tasks TASK [OPTIONS]"),
        ("init", "poolwise init TEMPLATE [FOLDER] [OPTIONS]"),
        ("encode", "poolwise encode MODEL TEXTS --to FILE [OPTIONS]"),
    ],
)
def test_a_usage_line_can_be_copied(command: str, usage: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], prog_name="poolwise").output
    assert shown.strip().splitlines()[0] == f"Usage: {usage}"


def test_no_usage_line_has_braces() -> None:
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert "{" not in CliRunner().invoke(app, [name, "--help"], prog_name="poolwise").output.splitlines()[0]


STUDY = """
name = "one"
tasks = [{tasks}]
seeds = {seeds}
baseline = "m1"
[recipe]
base_model = "nano"
dataset = "demo"
steps = 2
[[designs]]
preset = "m1"
[[designs]]
preset = "m5"
"""


def checked(here: Path, tasks: str, seeds: str = "[0, 1]") -> tuple[dict, str]:
    path = here / "one.toml"
    path.write_text(STUDY.format(tasks=tasks, seeds=seeds))
    return check(Study.load(path)), CliRunner().invoke(app, ["check", str(path)]).output


def test_check_speaks_of_items_where_items_will_be_tested(here: Path) -> None:
    found, shown = checked(here, '"./data/faq"')
    (row,) = found["folders"]
    assert (row["task"], row["items"], row["unit"], found["contrasts"]) == ("faq", 20, "query", 1)
    assert "2 seeds × 20 queries" in shown
    assert "Wilcoxon" not in shown
    more = checked(here, '"./data/faq"', "[0, 1, 2, 3]")[0]["folders"][0]["detectable"]
    assert 0.02 < more < row["detectable"] < 1


def test_check_counts_over_tasks_only_what_is_tested_over_tasks(here: Path) -> None:
    found, shown = checked(here, '"STS12", "STS13", "./data/similar"')
    (group,) = found["tasks"]
    assert (group["tasks"], group["tested_over"], found["contrasts"]) == (2, "tasks", 2)
    assert [row["task"] for row in found["folders"]] == ["similar"]
    assert "Wilcoxon test over tasks cannot reach .05 after Holm on any task type" in " ".join(shown.split())


def test_one_seed_says_that_the_test_is_about_checkpoints(here: Path) -> None:
    assert "about these checkpoints, not the designs" in " ".join(checked(here, '"./data/faq"', "[0]")[1].split())


def v_measure(labels: np.ndarray, found: np.ndarray) -> float:
    """As scikit-learn's, for four labels, in a tiny part of its time: 2 I(labels, found) / (H(labels) + H(found))."""
    joint = np.bincount(4 * labels + found, minlength=16) / len(labels)
    whole, mine, theirs = (entr(p).sum() for p in (joint, joint.reshape(4, 4).sum(0), joint.reshape(4, 4).sum(1)))
    return float(2 * (mine + theirs - whole) / (mine + theirs))


def test_the_simulations_v_measure_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, noise = rng.integers(0, 4, (2, 40))
        found = np.where(rng.random(40) < 0.7, labels, noise)
        assert v_measure(labels, found) == pytest.approx(v_measure_score(labels, found), abs=1e-12)


def alarms(draw: Callable[[list[dict[str, str]]], list[list[int]]], studies: int = 400) -> float:
    """How often a t-test over clustering sets has p ≤ .05 for two models that are equally good: each errs on every
    text by itself, and finds the label of 70 %."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(studies):
        labels = rng.integers(0, 4, 400)
        rows = [{"text": str(i), "label": str(label)} for i, label in enumerate(labels)]
        guesses = [np.where(rng.random(400) < 0.7, labels, rng.integers(0, 4, 400)) for _ in range(2)]
        apart = [
            v_measure(labels[part], guesses[1][part]) - v_measure(labels[part], guesses[0][part]) for part in draw(rows)
        ]
        found += ttest_1samp(apart, 0).pvalue <= 0.05
    return found / studies


def test_clustering_sets_of_equal_models_raise_few_alarms() -> None:
    def disjoint(rows: list[dict[str, str]]) -> list[list[int]]:
        return [[int(text) for text in each["sentences"]] for each in clustering_sets(rows)]

    def overlapping(rows: list[dict[str, str]]) -> list[list[int]]:
        rng = np.random.default_rng(0)
        return [rng.permutation(len(rows))[: len(rows) // 2].tolist() for _ in range(10)]

    assert alarms(disjoint) <= 0.07
    assert alarms(overlapping, 100) >= 0.3  # why sets that overlap are not tested


def test_sets_that_overlap_or_a_single_set_are_reported_as_untested() -> None:
    one, other = ({"sentences": [f"{name}{i}" for i in range(20)], "labels": ["x", "y"] * 10} for name in "ab")
    assert untestable([one, other]) == ""
    assert "100% of the texts are in more than one set" in untestable([one, one])
    assert untestable([one]).startswith("one clustering set: designs are scored on it, not tested")
    nearly = {**other, "sentences": [*one["sentences"][:2], *other["sentences"][2:]]}  # a tenth is shared
    assert untestable([one, nearly]) == ""


def test_a_correlation_within_a_range_is_one(here: Path) -> None:
    """The score of a part of the pairs is the statistic of that part, which cannot leave its bounds."""
    result = ab("data/similar", ["tfidf", "tfidf_chars"])
    for rows in result["by_feature"].values():
        for row in rows:
            assert all(score is None or -1 <= score <= 1 for score in row["scores"].values())


def look(attention: list[float] | None) -> dict:
    """What `poolwise layers --json` prints of one design on two task types, whose scores differ thirtyfold."""
    scores = {"STS": (0.30, 0.60, 0.45), "Retrieval": (0.01, 0.012, 0.02)}
    rows = [
        {"task": kind, "task_type": kind, "layer": layer, "score": score, "split": "test", "subset": "default"}
        for kind, values in scores.items()
        for layer, score in enumerate(values, 1)
    ]
    own = [{"task": "STS", "task_type": "STS", "score": 0.63}, {"task": "R", "task_type": "Retrieval", "score": 0.015}]
    run = {"design": "m5", "base": "b", "scores": rows, "own": own, "reduce": "mean"}
    inside = {"attention": attention, "weights": None}
    return {"study": "s", "runs": [{**run, **inside, "seed": 0}, {**run, **inside, "seed": 1}]}


def test_layers_of_task_types_share_one_scale_with_their_names_inside_the_picture() -> None:
    sts, retrieval = layer_report.lines(look(None)["runs"])
    assert [sts.scaled(value) for value in sts.layers] == pytest.approx([0, 1, 0.5])
    assert [retrieval.scaled(value) for value in retrieval.layers] == pytest.approx([0, 0.2, 1])
    assert sts.scaled(sts.design) == pytest.approx(1.1)
    (panel,) = layer_report.panels(look([0.1, 0.2, 0.7]))
    for text in ("STS: layer 2 best, 60.0; design 63.0", "retrieval: layer 3 best, 2.0", "attention, 70 % at most"):
        assert text in panel.svg
    assert "attention" not in layer_report.panels(look(None))[0].svg


def test_the_page_of_layers_has_the_style_of_the_report() -> None:
    text = layers_page(look([0.1, 0.2, 0.7]))
    style = page("style.css.j2", {})
    assert style.strip() in text
    assert "prefers-color-scheme: dark" in style
    assert not re.search(r"#[0-9a-f]{6}", text.replace(style.strip(), ""))  # pictures take the colours of the page
    assert "m5: layer 2 is the best single one on STS (60.0), where the design scores 63.0" in text
    assert "attends most to layer 3 (70\u00a0%)" in text
