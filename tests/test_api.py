"""Reading a study: nothing is written, no model library is loaded, its table is validated, failures are named."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import polars as pl
import pytest

from poolwise import api
from poolwise.errors import CheckpointError, DataError
from poolwise.files import write_json
from poolwise.runs import layout, looks, run
from test_looks import declared, scored


def test_comparing_and_reporting_write_nothing_but_the_report(tmp_path):
    """The folder of a study whose first look is complete may be read-only: only `poolwise run` records the look."""
    study = declared(tmp_path, extend_to=5)
    scored(study, 3)
    looks.begin(study)
    before = {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}
    for path in [study.folder, *study.folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert "Look 1 of 2" in api.compare(study).plan
    written = api.report(study, out=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written}
    for path in [study.folder, *study.folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()} == before


def test_unknown_costs_are_noted_with_the_reason(tmp_path):
    study = declared(tmp_path)
    scored(study, 3)
    found = api.compare(study)
    assert found.costs == ()
    (note,) = [note for note in found.notes if "Costs are unknown" in note]
    assert str(study.folder / layout.COSTS) in note
    assert "`poolwise run` writes it" in note


def test_a_report_needs_no_installed_package(tmp_path, monkeypatch):
    """On a machine where poolwise lies on PYTHONPATH, a finished study ended in a traceback of importlib."""
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: real("poolwise-is-not-here" if name == "poolwise" else name))
    versions = api.study_info(declared(tmp_path))["versions"]
    assert versions["poolwise"] == "not installed"
    assert versions["torch"] == real("torch")


def test_a_report_states_the_versions_of_the_run_not_those_of_the_reader(tmp_path, monkeypatch):
    study = declared(tmp_path)
    scored(study, 3)
    for torch in ("2.11.0", "2.12.0", "2.12.0"):  # continued once with another version
        monkeypatch.setattr(importlib.metadata, "version", lambda name, torch=torch: torch if name == "torch" else "1")
        run._record_versions(study.folder)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "of the reader")
    assert api.study_info(study)["versions"]["torch"] == "2.11.0, 2.12.0"
    assert api.study_info(study)["versions"]["mteb"] == "1"
    (study.folder / layout.VERSIONS).unlink()
    assert api.study_info(study)["versions"]["torch"] == "of the reader"


def test_comparing_and_reporting_a_study_load_no_model_library(tmp_path):
    study = declared(tmp_path)
    scored(study, 3)
    (tmp_path / "study.json").write_text(study.model_dump_json())
    program = (
        "import json, sys; from pathlib import Path; from poolwise import api; from poolwise.study.study import Study;"
        "study = Study.parse(json.loads(Path('study.json').read_text()), base_dir=Path.cwd());"
        "api.compare(study); api.report(study, out='out');"
        "print(sorted({'torch', 'mteb', 'transformers', 'sentence_transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "out" / "report.html").exists()


def test_the_table_of_a_study_passes_the_same_validation_as_a_csv(tmp_path):
    study = declared(tmp_path)
    scored(study, 3)
    path = study.folder / layout.RESULTS
    frame = pl.read_parquet(path)
    wrong = pl.when(pl.int_range(pl.len()) == 4).then(83.0).otherwise("score").alias("score")
    layout.write_table(path, frame.with_columns(wrong).to_arrow())
    with pytest.raises(DataError, match=r"results\.parquet.*\n.*score must lie between 0 and 1.*: row 5 \(83\.0\)"):
        api.compare(study)
    layout.write_table(path, pl.concat([frame, frame[:1]]).to_arrow())
    with pytest.raises(DataError, match="are listed more than once"):
        api.report(study, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_says_why_a_design_failed_and_where_its_log_is(tmp_path):
    study = declared(tmp_path)
    scored(study, 3, without=("m2", 0))
    folder = layout.trial(study.folder, "m2-s0")
    with pytest.raises(CheckpointError, match="m2 with seed 0 is not trained yet; `poolwise run` continues the study"):
        api.export_design(study, "m2", tmp_path / "model")
    write_json(folder / layout.FAILED, {"reason": "the loss is NaN at step 7"})
    with pytest.raises(CheckpointError) as caught:
        api.export_design(study, "m2", tmp_path / "model")
    assert "m2 with seed 0 failed: the loss is NaN at step 7." in str(caught.value)
    assert str(folder / layout.LOG) in str(caught.value)
    assert not (tmp_path / "model").exists()
