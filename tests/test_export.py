"""Exported folders hold the settings that other servers and older libraries look for, and still load as they are."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import poolwise
from poolwise.model.encoder import BOOLEANS, STANDARD, build, trained_widths
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from tiny import SENTENCES, tiny_folder

THETA = 123456.0


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    more: dict[str, dict[str, Any]] = {"qwen2": rope, "mistral_window": {}, "gemma3": {}}
    return {family: str(tiny_folder(root, family, **given)) for family, given in more.items()}


def exported(base: str, to: Path, design: dict[str, Any], **recipe: Any) -> tuple[Path, SentenceTransformer]:
    given = Recipe(base_model=base, max_length=48, dtype="float32", query_prompt="query: ", **recipe)
    encoder = build(given, Design(name="d", **design), 0, device="cpu").eval()
    return poolwise.export(encoder, to), encoder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("pooling", STANDARD)
def test_standard_poolings_are_written_in_the_old_form_and_the_new(pooling: str, bases, tmp_path: Path) -> None:
    folder, encoder = exported(bases["qwen2"], tmp_path / "out", {"attention": "causal", "pooling": pooling})
    settings = read(folder / "1_Pooling" / "config.json")
    assert settings["pooling_mode"] == STANDARD[pooling]
    # what vLLM does: the first setting that is true names the pooling
    assert next(key for key, value in settings.items() if value is True) == BOOLEANS[STANDARD[pooling]]
    # what Text Embeddings Inference requires
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= settings.keys()
    assert sum(value is True for key, value in settings.items() if key.startswith("pooling_mode_")) == 1
    assert "embedding_dimension" not in settings  # sentence-transformers before 5.4 refuses unknown names
    assert read(folder / "sentence_bert_config.json") == {"max_seq_length": 48, "do_lower_case": False}
    kinds = ["Transformer", "Pooling", "Normalize"]
    assert [each["type"] for each in read(folder / "modules.json")] == [
        f"sentence_transformers.models.{k}" for k in kinds
    ]
    plain = SentenceTransformer(str(folder), device="cpu")
    assert plain.max_seq_length == 48
    assert np.abs(plain.encode([*SENTENCES]) - encoder.encode([*SENTENCES])).max() < 1e-6


@pytest.mark.parametrize("pooling", ["mean", "cross_attention"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", ["qwen2", "mistral_window"])
def test_attention_is_declared_under_both_names(
    family: str, attention: str, pooling: str, bases, tmp_path: Path
) -> None:
    folder, encoder = exported(bases[family], tmp_path / "out", {"attention": attention, "pooling": pooling})
    config = read(folder / "config.json")
    assert (config["is_causal"], config["use_bidirectional_attention"]) == (
        attention == "causal",
        attention != "causal",
    )
    plain = SentenceTransformer(str(folder), device="cpu", trust_remote_code=pooling != "mean")
    assert np.abs(plain.encode([*SENTENCES]) - encoder.encode([*SENTENCES])).max() < 1e-6
    again = poolwise.load(folder, device="cpu")
    assert np.abs(again.encode([*SENTENCES]) - encoder.encode([*SENTENCES])).max() < 1e-6


def test_a_flag_that_would_narrow_the_windows_of_gemma3_is_not_written(bases, tmp_path: Path) -> None:
    folder, encoder = exported(bases["gemma3"], tmp_path / "out", {"attention": "bidirectional", "pooling": "mean"})
    config = read(folder / "config.json")
    assert (config["is_causal"], config["use_bidirectional_attention"], config["sliding_window"]) == (False, False, 4)
    assert np.abs(poolwise.load(folder).encode([*SENTENCES]) - encoder.encode([*SENTENCES])).max() < 1e-6


def test_settings_that_transformers_5_renamed_keep_their_old_names(bases, tmp_path: Path) -> None:
    """Transformers 4 would take 10000 for a missing `rope_theta`, and does not know the tokenizer's new class."""
    folder, _ = exported(bases["qwen2"], tmp_path / "out", {"attention": "causal", "pooling": "mean"})
    config = read(folder / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    assert "TokenizersBackend" not in (folder / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("pooling", ["mean", "cross_attention"])
def test_trained_widths_are_kept(pooling: str, bases, tmp_path: Path) -> None:
    design = {"attention": "causal", "pooling": pooling}
    folder, encoder = exported(bases["qwen2"], tmp_path / "out", design, matryoshka=(16, 8))
    assert trained_widths(encoder) == trained_widths(poolwise.load(folder)) == (8, 16)
    other, _ = exported(bases["qwen2"], tmp_path / "other", design)
    assert trained_widths(poolwise.load(other)) == ()


def test_loading_an_export_warns_of_nothing(bases, tmp_path: Path) -> None:
    folder, _ = exported(bases["qwen2"], tmp_path / "out", {"attention": "causal", "pooling": "mean"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        poolwise.load(folder)
