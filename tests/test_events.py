"""What a run tells while it runs: events with what happens inside a trial, as a grid and as lines of JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from poolwise import cli
from poolwise.runs.engine import Event, event_record
from poolwise.runs.layout import find_log
from poolwise.screen import Grid
from poolwise.study.study import Study
from small_study import M1, of, run, write

TRAINING = {"step": 120, "steps": 240, "loss": 1.23456, "seconds_left": 95.0}


def poolwise(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["poolwise", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(str(stopped.value.code))


def test_records_of_events() -> None:
    assert event_record(("notes", ["a"])) == {"event": "notes", "notes": ["a"]}
    assert event_record(("progress", ("m1-s0", "train", 0.5, TRAINING))) == {
        "event": "progress", "trial": "m1-s0", "stage": "train", "share": 0.5, **TRAINING,
    }  # fmt: skip
    assert event_record(("failed", ("m1-s0", "why"))) == {"event": "failed", "trial": "m1-s0", "reason": "why"}
    assert event_record(("done", "m1-s0")) == {"event": "done", "trial": "m1-s0"}
    assert event_record(("end", None)) == {"event": "end"}


def test_the_grid_shows_what_happens_inside_trials() -> None:
    grid = Grid()
    grid.follow(("trials", [{"name": name, "label": name, "base": None} for name in ("a", "b", "c")]))
    grid.follow(("progress", ("a", "train", 0.5, TRAINING)))
    grid.follow(("progress", ("b", "train", 0.1, {**TRAINING, "step": 24, "seconds_left": None})))
    grid.follow(("progress", ("c", "score", 0.5, {"task": "pairs"})))
    assert grid.inside() == [
        "a: step 120 of 240, loss 1.235, 1:35 of training left",
        "b: step 24 of 240, loss 1.235",
        "c: scoring pairs",
    ]
    grid.follow(("done", "a"))
    grid.follow(("failed", ("b", "why")))
    assert grid.inside() == ["c: scoring pairs"]
    assert [str(part) for part in grid.__rich__().renderables][-1] == "c: scoring pairs"


def test_events_of_a_training_have_step_and_loss(place: Path) -> None:
    details: list[dict[str, Any]] = []

    def follow(event: Event) -> None:
        if event[0] == "progress" and event[1][0].startswith("m1-"):
            details.append({"stage": event[1][1], **event[1][3]})

    assert run(write(place, "details", designs=M1), workers=1, on_event=follow) == {}
    steps = [row for row in details if row["stage"] == "train"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    losses = json.loads((of(place / "details", "m1") / "train.json").read_text())["losses"]
    assert [row["loss"] for row in steps] == list(losses.values())
    assert steps[0]["seconds_left"] is None
    assert all(row["seconds_left"] > 0 for row in steps[1:-1])
    assert steps[-1]["seconds_left"] == 0
    assert [row["task"] for row in details if row["stage"] == "score"] == ["pairs", "facts"] * 2


def test_run_json_prints_lines_of_json_alone(
    copy: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(place, copy.name, ('"./facts"', '"./facts", "./more"'))
    assert poolwise(monkeypatch, "run", str(path), "--workers", "1", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["event"] for record in records if record["event"] not in ("progress", "notes")] == [
        "trials", "places", "done", "done", "done", "end", "report",
    ]  # fmt: skip
    assert {record["task"] for record in records if record["event"] == "progress"} == {"more"}
    assert all(Path(path).exists() for path in records[-1]["paths"])


def test_status_warns_of_an_edited_study(
    copy: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(place, copy.name)
    assert poolwise(monkeypatch, "status", str(path)) == 0
    assert "warning" not in capsys.readouterr().err
    write(place, copy.name, ("steps = 6", "steps = 8"))
    assert poolwise(monkeypatch, "status", str(path), "--json") == 0
    found = capsys.readouterr()
    assert "warning: the study changed under the run" in found.err
    assert "recipe.steps was 6 and is now 8" in found.err
    assert {row["state"] for row in json.loads(found.out)} == {"done"}
    for command in ("compare", "report"):  # they would state a recipe that nothing ran with
        assert poolwise(monkeypatch, command, str(path)) == 2
        assert "recipe.steps was 6 and is now 8" in capsys.readouterr().err


def test_the_log_of_a_failed_trial_is_named(
    copy: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place_of_scores = of(copy, "layers") / "scores" / "step-6"
    shutil.rmtree(place_of_scores)
    place_of_scores.touch()  # a file where a folder has to be
    path = write(place, copy.name, ('"./facts"', '"./facts", "./more"'))
    assert poolwise(monkeypatch, "run", str(path), "--workers", "1") == 1
    log = find_log(Study.load(path).folder, of(copy, "layers").name)
    assert log == of(copy, "layers") / "log.txt"
    assert f"(log: {log})" in " ".join(capsys.readouterr().err.split())
    search = copy / "search" / "lr-1" / "trials" / "x"
    search.mkdir(parents=True)
    assert find_log(copy, "x") is None
    (search / "log.txt").touch()
    assert find_log(copy, "x") == search / "log.txt"
