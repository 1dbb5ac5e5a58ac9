"""A study's runs: only what is missing, only what is whole, never two at once, and the same whatever the order."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from poolwise import cli
from poolwise.errors import PoolwiseError, StudyError
from poolwise.runs import layout
from poolwise.runs import run as runner
from poolwise.study.study import Study
from small_study import LAYERS, M1, MEAN, of, run, scores, snapshot, state, weights, write


def test_a_finished_study_is_left_alone(copy: Path, place: Path) -> None:
    before = snapshot(copy / "trials")
    assert run(write(place, copy.name), workers=2) == {}
    assert snapshot(copy / "trials") == before
    assert scores(copy).equals(scores(place / "whole"))
    assert {state(copy, label)["state"] for label in ("m1", "layers", "tfidf")} == {"done"}


def test_a_new_task_and_a_new_design(copy: Path, place: Path) -> None:
    """Old designs are scored on the new task and no more; the new design is trained and scored on all."""
    before = snapshot(copy / "trials")
    path = write(place, copy.name, ('"./facts"', '"./facts", "./more"'), designs=M1 + LAYERS + MEAN)
    assert run(path, workers=2) == {}
    after = snapshot(copy / "trials")
    touched = {name for name, when in after.items() if before.get(name) != when}
    old = {name for name in touched if not name.startswith("mean-")}
    assert {name for name in old if "/scores/" in name and "/more-" not in name} == set()
    assert not any("training" in name or "train.json" in name for name in old)
    assert sum("/more-" in name for name in old) == 2 * 2 + 1  # two designs at two steps, tfidf
    new = {name.split("/", 1)[1] for name in touched if name.startswith("mean-")}
    assert {name.rpartition("-")[0] for name in new if name.startswith("scores")} == {
        f"scores/step-{step}/{task}" for step in (3, 6) for task in ("pairs", "facts", "more")
    }
    assert "train.json" in new
    assert (
        scores(copy)
        .filter(pl.col("design").ne("mean-bidirectional"), pl.col("task").ne("more"))
        .equals(scores(place / "whole"))
    )


@pytest.mark.parametrize(
    "changes", [(("steps = 6", "steps = 8"),), (("learning_rate = 1e-3\nhead", "learning_rate = 2e-3\nhead"),)]
)
def test_a_changed_recipe_is_refused(
    changes: tuple[tuple[str, str], ...], copy: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = snapshot(copy)
    path = write(place, copy.name, *changes)
    monkeypatch.setattr(sys, "argv", ["poolwise", "run", str(path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    words = capsys.readouterr().err
    expected = (
        "recipe.steps was 6 and is now 8"
        if "steps" in changes[0][0]
        else "recipe.learning_rate was 0.001 and is now 0.002"
    )
    assert expected in words
    assert "Traceback" not in words
    assert snapshot(copy) == before


def test_other_changes_are_refused_and_trackers_are_free(copy: Path, place: Path) -> None:
    other = LAYERS.replace("latents = 4", "latents = 8")
    with pytest.raises(StudyError, match="design 'layers' has changed; give the new one another name"):
        layout.guard(Study.load(write(place, copy.name, designs=M1 + other)))
    with pytest.raises(StudyError, match=r"evaluate_at was \[0.5, 1.0\] and is now \[1.0\]"):
        layout.guard(Study.load(write(place, copy.name, ("[0.5, 1.0]", "[1.0]"))))
    layout.guard(Study.load(write(place, copy.name, ("save_steps = 2", "save_steps = 3"))))
    layout.guard(Study.load(write(place, copy.name, ("seeds = [0]", "seeds = [0, 1]"), designs=M1)))


def test_a_study_that_could_not_begin_may_be_mended(place: Path) -> None:
    """What was refused before the first trial binds nobody."""
    with pytest.raises(PoolwiseError, match="no such model folder"):
        run(write(place, "mended", ("./llama", "./lama"), ('"./pairs", "./facts"', '"./pairs"')))
    layout.guard(Study.load(write(place, "mended")))
    assert not (place / "mended" / "trials").exists()


def test_scores_of_tasks_that_were_edited_or_dropped_are_no_results(copy: Path) -> None:
    """Only what is scored on the study's tasks as they are now is gathered."""
    before = scores(copy)
    file = sorted(of(copy, "m1").glob("scores/*/*.parquet"))[0]
    shutil.copy(file, file.with_name(file.name.replace(".parquet", "0.parquet")))  # as of the task before an edit
    runner.gather(copy)
    assert scores(copy).equals(before)


def test_damaged_files_are_never_results(copy: Path, place: Path) -> None:
    """Truncated, emptied and altered score files are made anew; half a checkpoint is not gone on from."""
    first = of(copy, "m1")
    files = sorted(first.glob("scores/*/*.parquet"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    files[1].write_bytes(b"")
    content = bytearray(files[2].read_bytes())
    content[200] ^= 0xFF
    files[2].write_bytes(content)
    assert [layout.read_scores(file) is None for file in files] == [True, True, True, False]
    runner.gather(copy)  # an interrupted run gathers what is there
    assert (
        scores(copy).filter(pl.col("design") == "m1").height
        < scores(place / "whole").filter(pl.col("design") == "m1").height
    )

    remains = first / "training" / "checkpoint-6"  # killed while the checkpoints of a whole training were removed
    remains.mkdir()
    (remains / "complete").write_text("6")

    second = of(copy, "layers")
    shutil.rmtree(second / "training")
    (second / "train.json").unlink()
    half = second / "training" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "pooling.safetensors").write_bytes(b"half")
    (half / "trainer_state.json").write_text("{")
    (second / "training" / ".step-3.1.tmp").mkdir()

    assert run(write(place, copy.name), workers=2) == {}
    assert scores(copy).equals(scores(place / "whole"))
    assert weights(copy) == weights(place / "whole")
    assert not list(copy.rglob("checkpoint-*")) + list(copy.rglob("*.tmp"))


def test_a_failed_trial_is_told_and_stops_nobody(
    copy: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A trial that cannot write its scores fails alone, with the reason; once the cause is gone it is completed."""
    broken = of(copy, "layers")
    blocked = broken / "scores" / "step-6"
    shutil.rmtree(blocked)
    blocked.touch()  # a file where a folder has to be
    path = write(place, copy.name, ('"./facts"', '"./facts", "./more"'))
    monkeypatch.setattr(sys, "argv", ["poolwise", "run", str(path), "--workers", "1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"failed: {broken.name}: " in told
    assert "FileExistsError" in told
    assert f"done {of(copy, 'm1').name}" in told
    assert f"done {of(copy, 'tfidf').name}" in told
    assert set(scores(copy).filter(pl.col("task") == "more")["design"]) == {"m1", "layers", "tfidf"}
    failed = scores(copy).filter(pl.col("task") == "more", pl.col("design") == "layers")
    assert set(failed["step"]) == {3}

    monkeypatch.setattr(sys, "argv", ["poolwise", "status", str(path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "layers failed" in told
    assert "m1 done" in told
    assert "FileExistsError" in told

    blocked.unlink()
    assert run(path, workers=1) == {}
    assert weights(copy) == weights(place / "whole")
    assert state(copy, "layers")["state"] == "done"


def test_the_order_of_trials_does_not_matter(finished: Path, place: Path) -> None:
    assert run(write(place, "reversed", designs=LAYERS + M1), workers=2) == {}
    ours, theirs = scores(place / "reversed"), scores(finished)
    assert ours.drop("score").equals(theirs.drop("score"))
    difference = np.abs(ours["score"].to_numpy() - theirs["score"].to_numpy())
    assert np.nanmax(difference) < 1e-6


def test_shards_make_the_whole(finished: Path, place: Path, monkeypatch: Any, capsys: Any) -> None:
    path, folder = write(place, "shards"), place / "shards"
    for shard, words in (("1/2", "this shard is done"), ("2/2", "")):
        monkeypatch.setattr(sys, "argv", ["poolwise", "run", str(path), "--shard", shard, "--workers", "1"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        assert words in capsys.readouterr().err
        states = {label: state(folder, label)["state"] for label in ("m1", "layers", "tfidf")}
        if shard == "1/2":
            assert states == {"m1": "done", "layers": "waiting", "tfidf": "done"}
            assert not (folder / "report.md").exists()
    assert set(states.values()) == {"done"}
    assert (folder / "report.md").exists()
    assert weights(folder) == weights(finished)
    assert scores(folder).equals(scores(finished))


def test_two_runs_at_once_are_refused(place: Path) -> None:
    folder, path = place / "twice", write(place, "twice")
    folder.mkdir()
    with runner._only_one(folder, (1, 1)):
        for shard in ((1, 1), (1, 2)):
            with pytest.raises(PoolwiseError, match="another process is running the study"):
                run(path, shard=shard)
    with runner._only_one(folder, (1, 2)):
        for shard in ((1, 1), (1, 2)):
            with pytest.raises(PoolwiseError, match="another process is running the study"):
                run(path, shard=shard)
        with runner._only_one(folder, (2, 2)):  # the shards of one run go side by side
            pass
    assert {path.name for path in folder.iterdir()} <= {".lock", ".lock-1", ".lock-2"}
