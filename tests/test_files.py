"""Files are written whole or not at all, flushed before anything vouches for them, with ordinary permissions."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from datasets import Dataset

from poolwise.errors import DataError
from poolwise.files import atomic_folder, atomic_path, open_atomic, safe_name, write_atomic, write_json
from poolwise.model.encoder import build
from poolwise.runs import train as training
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from tiny import SENTENCES, tiny_folder


def fail(written: int, error: BaseException) -> None:
    assert written
    raise error


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes given to fsync, in order."""
    seen: list[int] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        seen.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    return seen


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "new" / "a.txt", "old")
    for error, raised in ((OSError(28, "No space left"), DataError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(raised), open_atomic(path) as file:
            fail(file.write(b"half"), error)
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert [entry.read_text() for entry in path.parent.iterdir()] == ["old"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/below/a\.txt: cannot be written .*choose another folder"):
        write_atomic(tmp_path / "file" / "below" / "a.txt", "text")


def test_a_folder_takes_the_place_of_the_old_one_only_when_complete(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / content).write_text(content)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "run") as folder:
        fail((folder / "three").write_text("half"), KeyboardInterrupt())
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["run", "run/sub", "run/sub/two"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "one").write_text("one")
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if target == tmp_path / "run" and not self.name.endswith("old.tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(tmp_path / "run") as folder:
        (folder / "two").write_text("two")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["run", "run/one"]


def test_new_files_and_folders_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "private").write_text("")
            (folder / "private").chmod(0o600)  # as safetensors and tempfile create them
        write_atomic(tmp_path / "file", "")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"run": 0o750, "private": 0o640, "file": 0o640}


def test_everything_in_a_folder_is_flushed(tmp_path: Path, flushed: list[int]) -> None:
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("w")
    assert {path.stat().st_ino for path in (tmp_path / "run").rglob("*")} | {tmp_path.stat().st_ino} <= set(flushed)


def test_a_cache_is_not_flushed(tmp_path: Path, flushed: list[int]) -> None:
    with atomic_path(tmp_path / "cache", durable=False) as temporary:
        temporary.write_text("c")
    assert (tmp_path / "cache").read_text() == "c"
    assert flushed == []


def test_a_checkpoint_is_flushed_before_its_marker(tmp_path: Path, flushed: list[int]) -> None:
    recipe = Recipe(
        base_model=str(tiny_folder(tmp_path)), steps=1, batch_size=2, save_steps=1, max_length=16, dtype="float32"
    )
    encoder = build(recipe, Design.model_validate({"preset": "m1"}), 0)
    rows = Dataset.from_dict({"query": SENTENCES[:2], "positive": SENTENCES[2:4], "negative_1": SENTENCES[4:6]})
    training.train(encoder, recipe, rows, tmp_path / "training", seed=0)
    folder = tmp_path / "training" / "checkpoint-1"
    marker = (folder / training.COMPLETE).stat().st_ino
    others = {path.stat().st_ino for path in folder.rglob("*") if path.is_file()} - {marker}
    assert len(others) > 3
    assert others <= set(flushed[: flushed.index(marker)])


def test_names_as_parts_of_a_path() -> None:
    assert safe_name("org/model v1.5_a-b?") == "org-model-v1.5_a-b-"
