"""`--dtype`: weights converted when a model is opened, `auto` by what the device computes in, and what `check` says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import poolwise
from poolwise import api
from poolwise.cli import main
from poolwise.encoding import encode as bulk
from poolwise.encoding.encode import encode_file, open_encoder, open_model
from poolwise.errors import ModelError, PoolwiseError
from poolwise.model import base as base_file
from poolwise.model import checkpoint
from poolwise.runs import check as check_file
from poolwise.runs.check import check
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from tiny import SENTENCES, tiny_folder

TEXTS = [*SENTENCES, "a"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A trial with LoRA beside its base, the same exported, and a model that poolwise did not make."""
    root = tmp_path_factory.mktemp("models")
    base = tiny_folder(root)
    recipe = Recipe(base_model=str(base), max_length=48, dtype="float32")
    design = Design.model_validate({"preset": "m5"})
    encoder = poolwise.build(recipe, design, seed=0, device="cpu")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    checkpoint.save(encoder, root / "trial" / "training" / "step-2", step=2)
    poolwise.export(encoder, root / "own")
    SentenceTransformer(modules=[Transformer(str(base)), Pooling(32, "mean")]).save(str(root / "plain"))
    return {name: str(root / name) for name in ("trial", "own", "plain")}


def dtypes(encoder: SentenceTransformer) -> set[torch.dtype]:
    return {parameter.dtype for parameter in encoder[0].model.parameters()}


@pytest.mark.parametrize("name", ["trial", "own", "plain"])
def test_weights_are_converted(name: str, models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    whole = np.load(encode_file(models[name], tmp_path / "texts.txt", tmp_path / "whole.npy"))
    half = np.load(encode_file(models[name], tmp_path / "texts.txt", tmp_path / "half.npy", dtype="bfloat16"))
    cosines = (whole * half).sum(1) / np.linalg.norm(whole, axis=1) / np.linalg.norm(half, axis=1)
    assert cosines.min() > 0.999
    assert np.abs(whole - half).max() > 0  # it was computed in other numbers
    fast = open_model(models[name], "bfloat16")
    assert dtypes(fast.encoder) == {torch.bfloat16}
    assert fast.ours
    assert dtypes(open_encoder(models[name], "float32")) == {torch.float32}


def test_lora_is_merged_before_it_is_rounded(models: dict[str, str]) -> None:
    exported = open_encoder(models["own"], "bfloat16")  # merged in fp32 when it was written
    trial = open_encoder(models["trial"], "bfloat16")
    pairs = zip(trial[0].model.parameters(), exported[0].model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(("gain", "expected"), [(1.0, torch.float32), (3.0, torch.bfloat16)])
def test_auto_is_what_the_cpu_computes_in(
    gain: float, expected: torch.dtype, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bulk, "cpu_bfloat16_gain", lambda: gain)
    assert dtypes(open_encoder(models["plain"], "auto")) == {expected}
    assert dtypes(open_encoder(models["plain"])) == {torch.float32}


def test_a_cpu_without_the_instructions_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_file, "CPU_BFLOAT16", {"no_such_flag"})
    base_file.cpu_bfloat16_gain.cache_clear()
    assert base_file.cpu_bfloat16_gain() == 1.0
    flags = Path("/proc/cpuinfo")
    if flags.exists():  # any flag that is there: then a product is timed
        monkeypatch.setattr(base_file, "CPU_BFLOAT16", {flags.read_text(encoding="utf-8").split()[0]})
        base_file.cpu_bfloat16_gain.cache_clear()
        assert base_file.cpu_bfloat16_gain() > 0
    base_file.cpu_bfloat16_gain.cache_clear()


def test_mistakes_are_named(models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    with pytest.raises(PoolwiseError, match=r"dtype 'bfloat15': allowed are auto, float32.*did you mean 'bfloat16'"):
        open_encoder(models["own"], "bfloat15")
    with pytest.raises(ModelError, match="knows only the texts of a task"):
        api.evaluate("bm25", ["demo"], dtype="bfloat16")
    monkeypatch.setattr(sys, "argv", ["poolwise", "serve", models["own"], "--port", "0", "--dtype", "half"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "dtype 'half': allowed are" in capfd.readouterr().err


def test_evaluate_opens_in_the_dtype(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SentenceTransformer] = []
    monkeypatch.setattr("poolwise.scoring.evaluate.evaluate", lambda model, *_, **__: seen.append(model) or [])
    api.evaluate(models["trial"], ["demo"], dtype="bfloat16")
    api.evaluate(models["trial"], ["demo"])
    assert dtypes(seen[0]) == {torch.bfloat16}
    assert torch.float32 in dtypes(seen[1])


def test_check_says_what_bfloat16_would_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"name": "s", "designs": [{"preset": "m1"}], "recipe": {"base_model": str(tiny_folder(tmp_path))}}
    raw["recipe"]["max_length"] = 48  # type: ignore[index]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check_file, "cpu_bfloat16_gain", lambda: 3.14)
    assert check(Study.parse(raw))["bfloat16_gain"] == 3.1
    chosen = {**raw, "recipe": {**raw["recipe"], "dtype": "float32"}}  # type: ignore[dict-item]
    assert check(Study.parse(chosen))["bfloat16_gain"] is None
    monkeypatch.setattr(check_file, "cpu_bfloat16_gain", lambda: 1.0)
    assert check(Study.parse(raw))["bfloat16_gain"] is None
