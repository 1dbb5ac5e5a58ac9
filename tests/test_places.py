"""Where results lie and what is overwritten: beside the study file, never by accident, found out before any work."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import poolwise
from poolwise import api
from poolwise.cli import main
from poolwise.errors import CheckpointError, StudyError, TaskError
from poolwise.runs import layout
from poolwise.study.study import Study

TEXT = 'name = "s"\nbaseline = "m1"\n[[designs]]\npreset = "m1"\n'


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["poolwise", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_results_lie_beside_the_study_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/s.toml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    study = Study.load("studies/s.toml")
    assert study.folder == tmp_path / "studies/runs/s"
    assert study.place == f"results in {tmp_path}/studies/runs/s"


def test_a_run_at_the_old_place_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/s.toml").write_text(TEXT)
    (tmp_path / "runs/s").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    study = Study.load("studies/s.toml")
    assert study.folder == tmp_path / "runs/s"
    assert study.place.startswith(f"results in {tmp_path}/runs/s (found in the working directory; ")
    (tmp_path / "studies/runs/s").mkdir(parents=True)  # a run beside the file comes first
    assert study.folder == tmp_path / "studies/runs/s"


def test_the_place_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.toml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert f"results in {tmp_path}/runs/s\n" in refused(monkeypatch, capsys, "status", "s.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds = 0\n", "seeds = 0: give the number of seeds, 1 or more, or a list such as [0, 1, 2]"),
        ("seeds = [0\ntasks = []\n", "is not valid TOML: "),
    ],
)
def test_mistakes_in_the_file_read_as_a_person_would_say_them(tmp_path: Path, change: str, message: str) -> None:
    (tmp_path / "s.toml").write_text(change + TEXT)
    with pytest.raises(StudyError) as caught:
        Study.load(tmp_path / "s.toml")
    assert message in str(caught.value)
    assert str(tmp_path / "s.toml") in str(caught.value)
    assert "input should be" not in str(caught.value)


def test_a_toml_error_shows_its_line(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('name = "s"\nbaseline m1\n')
    with pytest.raises(StudyError, match=r"at line 2, column 10\)\n +baseline m1"):
        Study.load(tmp_path / "s.toml")


def test_messages_name_the_study_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.toml").write_text(TEXT)
    err = refused(monkeypatch, capsys, "export", tmp_path / "s.toml", "m2", "--to", tmp_path / "out")
    assert err.startswith(f"error: {tmp_path}/s.toml: ")
    assert "design 'm2' is not in this study; it has m1" in err


def test_a_bad_to_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not exist either, and is not looked for."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "texts.txt").write_text("one\n")
    below = tmp_path / "file" / "vectors.npy"
    err = refused(monkeypatch, capsys, "encode", "absent-model", tmp_path / "texts.txt", "--to", below)
    assert err == f"error: --to {below}: {tmp_path}/file cannot be written to; name another path\n"
    (tmp_path / "vectors.npy").write_bytes(b"kept")
    taken = tmp_path / "vectors.npy"
    err = refused(monkeypatch, capsys, "encode", "absent-model", tmp_path / "texts.txt", "--to", taken)
    assert err == f"error: --to {taken} exists; give another name, or --force to replace it\n"
    assert taken.read_bytes() == b"kept"


def test_force_replaces_an_export_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    study = Study.load(finished.with_suffix(".toml"))
    to = tmp_path / "out"
    api.export_design(study, "m1", to)
    before = poolwise.load(to).encode(["a cat"])
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        api.export_design(study, "layers", to)
    api.export_design(study, "layers", to, force=True)
    assert not np.allclose(poolwise.load(to).encode(["a cat"]), before)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        api.export_design(study, "m1", tmp_path / "mine", force=True)


def test_evaluate_takes_a_trials_folder_or_the_folder_of_a_run(finished: Path) -> None:
    (one,) = finished.glob("trials/m1-s0-*")
    scores = api.evaluate(one, ["./facts"], base_dir=finished.parent)
    stored = [
        row for row in layout.read_scores(next(one.glob("scores/step-6/facts-*"))).to_pylist() if not row["item_id"]
    ]
    assert scores[0]["score"] == pytest.approx(stored[0]["score"])
    with pytest.raises(CheckpointError, match="a study with 2 trained designs; give one of them:") as caught:
        api.evaluate(finished, ["./facts"], base_dir=finished.parent)
    assert str(one) in str(caught.value)


def test_bm25_says_where_it_has_no_score(finished: Path) -> None:
    place, notes = finished.parent, list[str]()
    with pytest.raises(TaskError, match=r"bm25 only ranks documents for queries, so it has no score on pairs \(STS\)"):
        api.evaluate("bm25", ["./pairs"], base_dir=place)
    assert len(api.evaluate("bm25", ["./pairs", "./facts"], base_dir=place, note=notes.append)) == 1
    assert notes[-1] == "bm25 only ranks documents for queries, so it has no score on pairs (STS)"
