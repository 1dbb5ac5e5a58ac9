"""Every `-paper` preset against `published.py`, the published forward written down independently in float64.

Tiny Mistral and Qwen2 bases, batches with padding, tokenizers with a PAD token, with UNK and no PAD as Mistral's, and
with neither. Through the whole encoder: the tokenizer, the decoder, the head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import published
from poolwise.encoding.fast import FastEncoder
from poolwise.model.encoder import build
from poolwise.scoring.adapters import PublishedBatches
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from test_laws import paper
from tiny import EOS, tiny_folder

UNK = 5  # an ordinary byte of the tiny tokenizer, declared as its UNK
BASES = [("mistral", "pad"), ("mistral", "unk"), ("mistral", "neither"), ("qwen2", "pad"), ("qwen2", "neither")]
"""Family and tokenizer. Without a PAD token in its files, a Qwen2 tokenizer has the PAD of its class."""
TEXTS = ["the ferry takes", "a small model learns slowly when", "7", "heron"]
NAMES = ("m1", "m2", "m3", "m4", "m5")
CLOSE = 1e-5


def base_with(folder: Path, family: str, tokenizer: str) -> str:
    """A tiny model folder whose tokenizer has PAD; or UNK and no PAD; or neither."""
    place = tiny_folder(folder, family, scale=3.0, vocab_size=328)  # room for the PAD of Qwen2's class
    path = place / "tokenizer_config.json"
    config = json.loads(path.read_text())
    whole = json.loads((place / "tokenizer.json").read_text())
    if tokenizer != "pad":
        del config["pad_token"]
    if tokenizer == "unk":
        config["unk_token"] = next(token for token, number in whole["model"]["vocab"].items() if number == UNK)
    path.write_text(json.dumps(config))
    return str(place)


@pytest.fixture(scope="module", params=BASES, ids="-".join)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """The folder of a base, and the id that the published code pads with."""
    folder = base_with(tmp_path_factory.mktemp("base"), *request.param)
    return folder, published_pad(folder)


def encoder_of(base: str, name: str) -> Any:
    """The preset on a base, its head at a size that fits a test and with every weight away from zero."""
    recipe = Recipe(base_model=base, max_length=64, lora=False, attn_implementation="sdpa")
    design = Design.model_validate({"preset": "m1"}) if name == "m1" else paper(f"{name}-paper")
    encoder = build(recipe, design, 0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder[1].parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder


def released(head: Any) -> dict[str, torch.Tensor]:
    """A head's weights in the released layout."""
    ours = head.state_dict()
    first, second = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    weights = {
        "latents": ours["latents"],
        first + "fn.to_q.weight": ours["to_q.weight"],
        first + "fn.to_kv.weight": torch.cat([ours["to_k.weight"], ours["to_v.weight"]]),
        first + "fn.to_out.weight": ours["to_out.weight"],
    }
    for part in ("weight", "bias"):
        weights[first + f"norm.{part}"] = ours[f"norm_states.{part}"]
        weights[first + f"norm_context.{part}"] = ours[f"norm_latents.{part}"]
        weights[second + f"norm.{part}"] = ours[f"norm_ffn.{part}"]
        weights[second + f"fn.net.0.{part}"] = ours[f"ffn_in.{part}"]
        weights[second + f"fn.net.2.{part}"] = ours[f"ffn_out.{part}"]
    if "layer_weights" in ours:
        weights["pos_emb.weight"] = ours["layer_weights"]
    return weights


def published_pad(base: str) -> int:
    """PAD of the tokenizer as it is in its folder, else its UNK, else EOS."""
    given = AutoTokenizer.from_pretrained(base)
    return next(i for i in (given.pad_token_id, given.unk_token_id, given.eos_token_id) if i is not None)


def theirs(encoder: Any, name: str, texts: list[str], pad: int) -> np.ndarray:
    """The published vectors (N, D) of one batch of texts."""
    model = encoder[0].model
    rows = [encoder[0].tokenizer(text)["input_ids"] for text in texts]
    assert all(row[-1] == EOS for row in rows)
    head = {} if name == "m1" else released(encoder[1].head)
    return published.embeddings(name, model.state_dict(), model.config, head, rows, pad).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_as_it_was_published(name: str, base: tuple[str, int]) -> None:
    encoder = encoder_of(base[0], name)
    fast = FastEncoder(encoder)
    ours = PublishedBatches(fast, "STS").kept_vectors(TEXTS, None, "", 32) if name == "m4" else fast.encode(TEXTS)
    expected = theirs(encoder, name, TEXTS, base[1])
    assert np.abs(ours - expected).max() < CLOSE
    assert np.abs(expected[0] - expected[1]).max() > 0.05  # and it tells texts apart


def test_padding_tokens_are_those_of_the_published_code(tmp_path: Path) -> None:
    pads = {kind: published_pad(base_with(tmp_path / kind, "mistral", kind)) for kind in ("pad", "unk", "neither")}
    assert pads == {"pad": 0, "unk": UNK, "neither": EOS}


def test_m4_in_training_is_one_text_at_a_time(base: tuple[str, int]) -> None:
    """Masked, any batch gives what the published training computes: each text by itself, without padding."""
    encoder = encoder_of(base[0], "m4")
    weights, config, head = encoder[0].model.state_dict(), encoder[0].model.config, released(encoder[1].head)
    expected = []
    for text in TEXTS:
        ids = torch.tensor(encoder[0].tokenizer(text)["input_ids"])
        layers = published.states(weights, config, ids, torch.ones_like(ids), causal=False)
        expected.append(published.paper_head(head, layers[-1:], 2)[0])
    assert np.abs(FastEncoder(encoder).encode(TEXTS) - torch.stack(expected).numpy()).max() < CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_the_published_states_on_either_side(side: str, base: tuple[str, int]) -> None:
    """Attention's output is zero at padding, so a state there does not depend on where the padding is."""
    encoder = encoder_of(base[0], "m4")
    rows = [encoder[0].tokenizer(text)["input_ids"] for text in TEXTS]
    ids, mask = published.left_padded(rows, base[1])
    if side == "right":
        ids = torch.stack([row.roll(int(real.sum())) for row, real in zip(ids, mask, strict=True)])
        mask = mask.flip(1)
    with torch.no_grad(), encoder[0].pooling_padding():
        ours = encoder({"input_ids": ids, "attention_mask": mask})["sentence_embedding"].numpy()
    assert np.abs(ours - theirs(encoder, "m4", TEXTS, base[1])).max() < CLOSE


def test_what_padding_changes_is_large(base: tuple[str, int]) -> None:
    """The comparisons above can fail: masked, m4 is far from the published batch; with EOS as padding, so is m5."""
    m4, m5 = encoder_of(base[0], "m4"), encoder_of(base[0], "m5")
    assert np.abs(FastEncoder(m4).encode(TEXTS) - theirs(m4, "m4", TEXTS, base[1])).max() > 1e-3
    if base[1] != EOS:
        dropped = theirs(m5, "m5", TEXTS, EOS)
        assert np.abs(FastEncoder(m5).encode(TEXTS) - dropped).max() > 1e-3


def test_a_corpus_is_sorted_and_other_texts_are_not(base: tuple[str, int]) -> None:
    encoder = encoder_of(base[0], "m4")
    texts = [f"{'long ' * (number % 7)}{number}" for number in range(70)]
    order = sorted(range(70), key=lambda number: -len(texts[number]))
    corpus = PublishedBatches(FastEncoder(encoder), "Retrieval").kept_vectors(texts, "document", "", 32)
    batches = [theirs(encoder, "m4", [texts[n] for n in order[start : start + 64]], base[1]) for start in (64,)]
    assert np.abs(corpus[order[64:]] - batches[0]).max() < CLOSE
    queries = PublishedBatches(FastEncoder(encoder), "Retrieval").kept_vectors(texts, "query", "", 32)
    assert np.abs(queries[64:] - theirs(encoder, "m4", texts[64:], base[1])).max() < CLOSE
