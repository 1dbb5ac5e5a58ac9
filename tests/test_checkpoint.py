"""Saved and exported folders: complete or absent, refused when damaged, readable by others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from poolwise.errors import CheckpointError, ModelError
from poolwise.files import sha256, write_json
from poolwise.model import checkpoint
from poolwise.model.base import base_path
from poolwise.model.checkpoint import export
from poolwise.model.encoder import build
from poolwise.runs.train import COMPLETE, train
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from test_laws import TEXTS, pairs, recipe
from tiny import tiny_folder

M1, M4 = (Design.model_validate({"preset": name}) for name in ("m1", "m4"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama"))


def drop_tensor(folder: Path, file: str) -> None:
    """Remove one tensor from a saved file and correct the file's hash, as another version of the code might write."""
    content = load_file(folder / file)
    content.pop(sorted(content)[0])
    save_file(content, folder / file)
    run = json.loads((folder / "run.json").read_text())
    run["files"][file] = sha256(folder / file)
    write_json(folder / "run.json", run)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pooling.safetensors", r"pooling\.safetensors does not fit the recipe and the design"),
        ("adapter/adapter_model.safetensors", "adapter: holds 27 tensors, the recipe makes 28"),
    ],
)
def test_missing_tensors_are_refused(file: str, message: str, base: str, tmp_path: Path) -> None:
    folder = checkpoint.save(build(recipe(base), M4, 0), tmp_path / "run")
    drop_tensor(folder, file)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def test_a_loaded_encoder_requires_no_gradients_unless_asked(base: str, tmp_path: Path) -> None:
    encoder = build(recipe(base), M4, 0)
    folder = checkpoint.save(encoder, tmp_path / "run")
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert not any(parameter.requires_grad for parameter in checkpoint.load(folder).parameters())
    again = checkpoint.load(folder, trainable=True)
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained


def test_the_old_folder_stays_until_the_new_one_is_complete(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build(recipe(base), M1, 0)
    folder = checkpoint.save(encoder, tmp_path / "run", step=1)

    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if Path(target) == folder and not path.name.endswith(".old.tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    for name, broken, error in (("write_json", full_disk, OSError), ("rename", killed, KeyboardInterrupt)):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint if name == "write_json" else Path, name, broken)
            with pytest.raises(error):
                checkpoint.save(encoder, folder, step=2)
        assert checkpoint.read_run(folder)["step"] == 1
        checkpoint.load(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    checkpoint.save(encoder, folder, step=2)
    assert checkpoint.read_run(folder)["step"] == 2


def test_weights_reach_the_disk_before_the_marker(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino) or fsync(handle))
    train(build(recipe(base), M4, 0), recipe(base), pairs(8), tmp_path, seed=0, milestones=[2])
    folder = tmp_path / "checkpoint-2"
    marker = flushed.index((folder / COMPLETE).stat().st_ino)
    for name in ("adapter/adapter_model.safetensors", "pooling.safetensors", "optimizer.pt"):
        assert (folder / name).stat().st_ino in flushed[:marker], name
    for path in (tmp_path / "step-2").rglob("*"):
        assert path.stat().st_ino in flushed, path


@pytest.mark.parametrize("design", [M1, M4], ids=lambda design: design.name)
def test_an_exported_folder_can_be_read_by_other_users(design: Design, base: str, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        folder = export(build(recipe(base), design, 0).eval(), tmp_path / "made" / "export")
    finally:
        os.umask(mask)
    modes = {path: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    assert any(path.name == "model.safetensors" for path in modes)
    for path, mode in modes.items():
        assert mode == (0o755 if path.is_dir() else 0o644), path


def test_export_to_a_folder_that_cannot_be_made(base: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    encoder = build(recipe(base), M1, 0).eval()
    for target in (tmp_path / "file", tmp_path / "file" / "export"):
        with pytest.raises(CheckpointError, match=r"cannot be written \(Not a directory\); give another folder"):
            export(encoder, target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_exported_folders_name_classes_of_the_public_package(base: str, tmp_path: Path) -> None:
    encoder = build(recipe(base), M4, 0).eval()
    folder = export(encoder, tmp_path / "export")
    types = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    assert types[:2] == ["poolwise.Backbone", "poolwise.PoolingHead"]
    plain = SentenceTransformer(str(folder), trust_remote_code=True)  # as for any class outside sentence-transformers
    assert np.abs(plain.encode(TEXTS) - encoder.encode(TEXTS)).max() < 1e-5


def test_the_recipe_type_is_restored(base: str, tmp_path: Path) -> None:
    given = Recipe(base_model=base, max_length=64, matryoshka=(8, 16), seed_varies=("init",))
    again = checkpoint.load(checkpoint.save(build(given, M1, 0), tmp_path / "run"))
    assert Recipe.model_validate(again.poolwise["recipe"]).matryoshka == (8, 16)


def test_a_recipe_that_is_none_is_named(base: str, tmp_path: Path) -> None:
    folder = checkpoint.save(build(recipe(base), M1, 0), tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    run["recipe"]["steps"] = 0
    write_json(folder / "run.json", run)
    with pytest.raises(CheckpointError, match=r"run\.json: .*steps"):
        checkpoint.load(folder)


@pytest.mark.parametrize("design", [M1, M4], ids=lambda design: design.name)
def test_a_base_in_bfloat16_is_exported_and_loaded_by_its_folder(design: Design, base: str, tmp_path: Path) -> None:
    encoder = build(recipe(base, dtype="bfloat16"), design, 0).eval()
    folder = export(encoder, tmp_path / "out")
    assert not (folder / "README.md").exists()  # the model card is written by whoever exports, with the study's numbers
    again = checkpoint.load_any(folder)
    assert float(np.abs(again.encode(TEXTS) - encoder.encode(TEXTS)).max()) < 1e-2


def test_a_name_with_one_slash_may_be_on_the_hub_and_a_path_may_not(base: str, tmp_path: Path) -> None:
    assert base_path("org/model") == "org/model"
    assert base_path(base) == str(Path(base).resolve())
    for name in ("./org", "/org/model", "~/model", "a/b/c"):
        with pytest.raises(ModelError, match="no such model folder"):
            base_path(name, tmp_path)
