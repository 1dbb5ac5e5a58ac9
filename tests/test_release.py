"""Releases of the paper's authors, made at tiny size: read by `load_release`, scored, refused by name and by shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

import poolwise
import published
from paper_head import random_weights
from poolwise.encoding.fast import FastEncoder
from poolwise.errors import CheckpointError, PoolwiseError
from poolwise.model import checkpoint
from poolwise.model.checkpoint import load_any
from poolwise.scoring.adapters import PublishedBatches
from small_study import furnish
from tiny import EOS, PAD, tiny_folder

TEXTS = ["the ferry takes", "a small model learns slowly when", "7", "heron"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADS = 32
DESIGNS = ("m1", "m2", "m3", "m4", "m5")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "mistral", scale=3.0, max_position_embeddings=512)


def released(base: Path, design: str, folder: Path, *, beside: bool = False, **head: Any) -> dict[str, torch.Tensor]:
    """Write a release as its authors' trainers do; returns the head's weights."""
    generator = torch.Generator().manual_seed(3)
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    if design == "m1":
        return {}
    rows = 32 if design in ("m3", "m5") else None
    weights = random_weights(**{"width": 32, "latents": 3, "heads": HEADS, "head_dim": 1, "rows": rows, **head})
    torch.save(weights, folder.with_name(f"{folder.name}attn_pool.pt") if beside else folder / "attn_pool.pt")
    return weights


def merged(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The base's weights with the adapter added by hand: W + (alpha / r) B A."""
    from safetensors.torch import load_file

    weights, adapter = AutoModel.from_pretrained(base).state_dict(), load_file(folder / "adapter_model.safetensors")
    for name in weights:
        a = adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            b = adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            weights[name] = weights[name].double() + 8 / 4 * (b.double() @ a.double())
    return weights


@pytest.mark.parametrize("design", DESIGNS)
def test_a_release_computes_what_its_authors_computed(design: str, base: Path, tmp_path: Path) -> None:
    head = released(base, design, tmp_path / "release", beside=design == "m3")
    encoder = poolwise.load_release(tmp_path / "release", str(base), design, dtype="float32")
    fast = FastEncoder(encoder)
    ours = PublishedBatches(fast, "STS").kept_vectors(TEXTS, None, "", 32) if design == "m4" else fast.encode(TEXTS)
    rows = [encoder.tokenizer(text)["input_ids"] for text in TEXTS]
    assert all(row[-1] == EOS for row in rows)
    weights, config = merged(base, tmp_path / "release"), AutoModel.from_pretrained(base).config
    expected = published.embeddings(design, weights, config, head, rows, PAD, HEADS).numpy()
    assert np.abs(ours - expected).max() < 1e-5
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_release_is_scored_only_under_its_name(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path))
    released(base, "m5", tmp_path / "release")
    with pytest.raises(CheckpointError, match=r"release is a release of the paper's authors.*--release m5 --base NAME"):
        poolwise.evaluate(tmp_path / "release", ["./pairs"])
    rows = poolwise.evaluate(tmp_path / "release", ["./pairs", "./facts"], release="m5", base=str(base))
    assert [row["task_type"] for row in rows] == ["STS", "Retrieval"]
    with pytest.raises(PoolwiseError, match="give both release and base"):
        poolwise.evaluate(tmp_path / "release", ["./pairs"], release="m5")


def test_no_bare_adapter_is_scored_in_silence(base: Path, tmp_path: Path) -> None:
    released(base, "m1", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"an adapter without modules.json, which does not say how it pools"):
        load_any(tmp_path / "adapter")


def test_a_bare_adapter_of_the_hub_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sentence-transformers would load it and pool by the mean; here from the cache of a Hub."""
    released(base, "m5", tmp_path / "snapshot")
    monkeypatch.setattr(checkpoint, "SentenceTransformer", lambda name: None)
    monkeypatch.setattr(checkpoint, "try_to_load_from_cache", lambda name, file: str(tmp_path / "snapshot" / file))
    with pytest.raises(CheckpointError, match="snapshot is a release of the paper's authors"):
        checkpoint.load_named("some/release")


@pytest.mark.parametrize(
    ("released_as", "named", "message"),
    [
        ("m5", "m4", "has layer weights: it is a head of m3 or m5, not of m4"),
        ("m2", "m3", "has no layer weights: it is a head of m2 or m4, not of m3"),
        ("m4", "m1", "m1 has none: name the right design"),
        ("m1", "m2", "no attn_pool.pt, which m2 needs"),
        ("m1", "m6", "release 'm6' is unknown; allowed: m1, m2, m3, m4, m5"),
    ],
)
def test_the_wrong_design_is_refused(released_as: str, named: str, message: str, base: Path, tmp_path: Path) -> None:
    released(base, released_as, tmp_path / "release")
    with pytest.raises(CheckpointError, match=message):
        poolwise.load_release(tmp_path / "release", str(base), named)


def test_the_wrong_base_is_refused(base: Path, tmp_path: Path) -> None:
    released(base, "m2", tmp_path / "release", width=16)
    with pytest.raises(CheckpointError, match=r"a head for states of width 16, but .* has 32"):
        poolwise.load_release(tmp_path / "release", str(base), "m2")
    other = tiny_folder(tmp_path, "qwen2", num_hidden_layers=3, max_position_embeddings=512)
    released(base, "m1", tmp_path / "two")
    with pytest.raises(CheckpointError, match="holds 28 tensors, the recipe makes 42"):
        poolwise.load_release(tmp_path / "two", str(other), "m1")


def test_what_is_no_release_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config.json in it"):
        poolwise.load_release(base, str(base), "m1")
    released(base, "m1", tmp_path / "release")
    path = tmp_path / "release" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora = True; only plain LoRA can be read"):
        poolwise.load_release(tmp_path / "release", str(base), "m1")
    del config["r"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not the configuration of a LoRA adapter"):
        poolwise.load_release(tmp_path / "release", str(base), "m1")
