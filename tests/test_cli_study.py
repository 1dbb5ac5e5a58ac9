"""The command line over the life of a study, from `init` to `export`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import poolwise
from cli_study import STUDY, Invoke, program, refused, snapshot, write_data, write_study

pytest_plugins = ("cli_study",)

# --- a study from its first line to its export -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, bases: Path) -> SimpleNamespace:
    """A study begun with `init`, edited, and run: its folder, its file and what the run printed."""
    folder = tmp_path_factory.mktemp("finished")
    write_data(folder)
    for base in ("llama", "gpt_neo"):
        (folder / base).symlink_to(bases / base)
    began = program("init", "demo", "--to", "study.toml", cwd=folder)
    assert began.stdout == "wrote study.toml; next: poolwise check study.toml\n"
    (folder / "study.toml").write_text(STUDY)
    return SimpleNamespace(folder=folder, study=folder / "study.toml", run=program("run", "study.toml", cwd=folder))


@pytest.fixture
def study(finished: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished study's file, seen from its folder."""
    monkeypatch.chdir(finished.folder)
    return finished.study


def test_run_tells_and_compares(finished: SimpleNamespace) -> None:
    out, err = finished.run.stdout, finished.run.stderr
    assert finished.run.returncode == 0, err
    assert "5 of 5 trials" in err
    assert "24 training rows (pairs.jsonl 24)" in err
    assert "Mean scores" in out
    assert "Mean scores" not in err
    assert "trials" not in out
    assert "runs/tiny/report.html" in out
    assert "m4" in (finished.folder / "runs/tiny/report.md").read_text()


def test_check_as_table_and_json(study: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("check", study)
    assert code == 0
    assert "2 factors: attention, pooling" in out
    assert "4 trainings (0 of them controls)" in out
    assert "data: 24 training rows (pairs.jsonl 24)" in out
    assert "…" not in out
    code, out, _ = invoke("check", study, "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["differs_in"] for row in found["designs"]] == [[], ["attention", "pooling"]]
    assert found["effective_negatives"] == 7  # 3 other positives and 4 hard negatives
    assert {group["task_type"]: group["min_reachable_p"] for group in found["tasks"]} == {
        "Classification": 1,
        "STS": 0.5,
    }


def test_status_as_table_and_json(study: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("status", study)
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["m1", "done", "done"],
        ["m4", "done", "done"],
        ["tfidf", "done"],
    ]
    code, out, _ = invoke("status", study, "--json")
    trials = json.loads(out)
    assert {(t["label"], t["seed"], t["state"]) for t in trials if t["role"] == "design"} == {
        (name, seed, "done") for name in ("m1", "m4") for seed in (0, 1)
    }


def test_compare_and_report_a_study(study: Path, invoke: Invoke, tmp_path: Path) -> None:
    code, out, _ = invoke("compare", study, "--json")
    assert code == 0
    assert {(row["group"], row["design"], row["n"]) for row in json.loads(out)["comparisons"]} == {
        ("sts", "m4", 10), ("sts-2", "m4", 10), ("topics", "m4", 18),
    }  # fmt: skip
    code, out, _ = invoke("report", study, "--to", tmp_path)
    assert code == 0
    assert (tmp_path / "report.html").read_text().count("<td") > 10
    assert "m9" in refused(invoke, study.parent, "compare", study, "--baseline", "m9")


def test_running_again_does_nothing(study: Path, finished: SimpleNamespace) -> None:
    trained = {k: v for k, v in snapshot(study.parent / "runs").items() if "/trials/" in k}
    again = program("run", "study.toml", cwd=study.parent)
    assert again.returncode == 0
    assert again.stdout == finished.run.stdout
    assert {k: v for k, v in snapshot(study.parent / "runs").items() if "/trials/" in k} == trained


def test_export_and_load(study: Path, invoke: Invoke, tmp_path: Path) -> None:
    code, out, _ = invoke("export", study, "m4", "--seed", 1, "--to", tmp_path / "m4")
    assert code == 0
    assert out.strip() == str(tmp_path / "m4")
    exported = poolwise.load(tmp_path / "m4")
    (run,) = (study.parent / "runs/tiny/trials").glob("m4-s1-*")
    texts = ["the cat walks", "a river"]
    expected = poolwise.load(run / "training" / "step-2").encode(texts)
    assert np.abs(exported.encode(texts) - expected).max() < 1e-5
    assert "exists and is not empty" in refused(invoke, tmp_path, "export", study, "m4", "--to", tmp_path / "m4")


def test_bad_exports(study: Path, invoke: Invoke, tmp_path: Path) -> None:
    for arguments, words in (
        (("m5",), "design 'm5' is not in this study; it has m1, m4"),
        (("m4", "--seed", 7), "--seed 7 is not in this study; allowed: 0, 1"),
        (("tfidf",), "design 'tfidf' is not in this study"),
    ):
        assert words in refused(invoke, study.parent, "export", study, *arguments, "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_study_that_has_not_run(here: Path, invoke: Invoke) -> None:
    study = write_study(here)
    assert f"no scores in {here}/runs/tiny yet; run the study first" in refused(invoke, here, "compare", study)
    assert f"no scores in {here}/runs/tiny yet" in refused(invoke, here, "report", study)
    assert "start with `poolwise run`" in refused(invoke, here, "status", study)
    assert "nothing has run" in refused(invoke, here, "export", study, "m1", "--to", "out")


def test_no_tasks_and_one_design(here: Path, invoke: Invoke) -> None:
    """Both are legal: the design is trained, and there is nothing to compare."""
    no_tasks = ('tasks = ["./sts", "./sts-2", "./topics"]', "tasks = []")
    study = write_study(here, no_tasks, ("seeds = [0, 1]", "seeds = [0]"), ('[[designs]]\npreset = "m4"', ""))
    code, out, _ = invoke("check", study)
    assert code == 0
    assert "No tasks: the designs are trained but not scored." in out
    assert "One seed: " in out
    done = program("run", study, cwd=here)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "nothing to compare: no tasks" in done.stderr
    assert "One seed: " in done.stderr
    assert invoke("export", study, "m1", "--to", "out")[0] == 0
    assert poolwise.load(here / "out").encode(["a"]).shape == (1, 32)
    assert "has no tasks" in refused(invoke, here, "compare", study)
