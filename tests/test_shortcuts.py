"""Shortcuts of the encoder: where none may be taken, and that a wrong one is found whichever texts it hurts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import poolwise
from poolwise.encoding import fast as encoding
from poolwise.encoding import shortcuts
from poolwise.encoding.fast import FastEncoder
from poolwise.encoding.rows import Tokeniser, spread
from poolwise.encoding.shortcuts import AGREEMENT, Prefix, angle_change, disagreement, number_change
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from tiny import SENTENCES, tiny_folder, tiny_model, tiny_tokenizer

PROMPT = "query: find the island. "
LAYER_MEANS = {"attention": "causal", "pooling": "layer_cross_attention", "pooling_args": {"tokens": "mean"}}
WORDS = " ".join(SENTENCES).split()
RANDOM = np.random.default_rng(0)
MANY = [" ".join(RANDOM.choice(WORDS, int(n))) for n in RANDOM.integers(2, 8, 40)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("bases"), "llama"))


def build(base: str, design: dict[str, Any], **recipe: Any) -> SentenceTransformer:
    made = Recipe(base_model=base, **{"max_length": 48, "dtype": "float32", "lora": False, **recipe})
    return poolwise.build(made, Design.model_validate({"name": "d", **design}), seed=0, device="cpu").eval()


def one_by_one(encoder: SentenceTransformer, texts: list[str], prompt: str = "") -> np.ndarray:
    return np.stack([encoder.encode(text, prompt=prompt or None) for text in texts])


def test_the_last_pooled_token_is_not_always_the_last(base: str) -> None:
    design = {"attention": "causal", "pooling": "last_token", "special_tokens": False}
    encoder = build(base, design, append_eos=False)
    texts = [*MANY[:30], MANY[30] + "<eos>", *MANY[31:]]
    fast = FastEncoder(encoder)
    assert np.abs(fast.encode(texts) - one_by_one(encoder, texts)).max() < 1e-5
    assert fast.prunes


@pytest.mark.parametrize("include_prompt", [True, False])
def test_a_text_without_content_pools_its_prompt(base: str, include_prompt: bool) -> None:
    encoder = build(base, LAYER_MEANS, include_prompt=include_prompt, append_eos=False)
    fast = FastEncoder(encoder, budget=60)
    texts = ["", *MANY]
    assert np.abs(fast.encode(texts, PROMPT) - one_by_one(encoder, texts, PROMPT)).max() < 1e-5
    assert fast.counts.computed < fast.counts.tokens  # the others go on from the prompt's states
    assert fast.notes == []


ROPES = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 2.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_positions_that_depend_on_the_length_are_not_reused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long texts come in a later window, after the shortcut would have been believed."""
    family = "phi3" if kind == "longrope" else "llama"
    rope = {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}}
    more = {"max_position_embeddings": 128, "original_max_position_embeddings": 32} if kind == "longrope" else {}
    tiny_model(family, **rope, **more).save_pretrained(tmp_path)
    tiny_tokenizer(max_length=128).save_pretrained(tmp_path)
    monkeypatch.setattr(encoding, "WINDOW", 30)
    encoder = build(str(tmp_path), {"preset": "m1"}, max_length=100 if more else 64)
    fast = FastEncoder(encoder)
    assert not fast.reuses
    texts = [*(text[:12] for text in MANY[:30]), *(" ".join(MANY[start : start + 3])[:150] for start in range(3))]
    texts = [f"{text} {number}" for number, text in enumerate(texts)]
    assert np.abs(fast.encode(texts, PROMPT) - one_by_one(encoder, texts, PROMPT)).max() < 1e-5


# what is believed


def test_texts_are_looked_at_from_the_longest_to_the_shortest(base: str) -> None:
    rows = Tokeniser(build(base, {"preset": "m1"}), [])(["a " * n for n in range(1, 20)], "")
    lengths = rows.lengths[spread(rows.lengths, 4)].tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 4
    assert (lengths[0], lengths[-1]) == (rows.lengths.max(), rows.lengths.min())
    assert [len(spread(rows.lengths[:n], 4)) for n in range(6)] == [0, 1, 2, 3, 4, 4]
    assert spread(np.array([0, 3, 0]), 4).tolist() == [1]


@pytest.mark.parametrize("hurt", ["longest", "shortest", "padded"])
@pytest.mark.parametrize("shortcut", ["prefix", "last layer"])
def test_a_shortcut_that_is_wrong_for_some_is_found(
    base: str, shortcut: str, hurt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it hurts the longest text, the shortest or those with padding, and whichever batch they are in."""
    prompt = PROMPT if shortcut == "prefix" else ""
    encoder = build(base, {"preset": "m1"})
    texts = MANY
    lengths = encoder.preprocess(texts, prompt=prompt)["attention_mask"].sum(1)

    def wrong(mask: torch.Tensor) -> torch.Tensor:
        real = mask.sum(1)
        return {
            "longest": real == lengths.max(),
            "shortest": real == lengths.min(),
            "padded": real < mask.shape[1],
        }[hurt]

    if shortcut == "prefix":
        right = Prefix.forward

        def forward(self: Prefix, backbone: Any, features: dict) -> dict:
            bad = wrong(features["attention_mask"])
            out = right(self, backbone, features)
            states = out["token_embeddings"].clone()
            states[bad] = states[bad].flip(-1)
            return {**out, "token_embeddings": states}

        monkeypatch.setattr(Prefix, "forward", forward)
    else:
        last = shortcuts.last_index
        monkeypatch.setattr(shortcuts, "last_index", lambda mask: torch.where(wrong(mask), 0, last(mask)))
    fast = FastEncoder(encoder, budget=60)
    assert np.abs(fast.encode(texts, prompt) - one_by_one(encoder, texts, prompt)).max() < 1e-5
    (note,) = fast.notes
    assert shortcut in note


def test_a_single_text_is_not_enough_to_believe(base: str) -> None:
    """A server warms up with one text; what follows is looked at too, until there were enough."""
    fast = FastEncoder(build(base, {"preset": "m1"}))
    seen = []
    for text in MANY[:6]:
        fast.encode([text], "find:")
        seen.append((fast._checked["last layer", ""], fast._checked["prefix", "find:"]))
    assert seen == [(min(n, 4),) * 2 for n in range(1, 7)]


def test_a_shortcut_without_a_text_to_look_at_is_not_used(base: str) -> None:
    fast = FastEncoder(build(base, {"preset": "m1"}))
    rows = fast.tokenise(MANY, PROMPT)
    fast.encode(MANY[:1], "find:")
    prefix = fast._prefixes["find:"]
    nothing = rows.take(np.array([], dtype=int))
    assert not fast._trusts("prefix", PROMPT, nothing, prefix)
    assert fast._trusts("prefix", "find:", nothing, prefix)  # looked at before


def test_every_prompt_is_looked_at(base: str) -> None:
    fast = FastEncoder(build(base, {"preset": "m1"}))
    for prompt in (PROMPT, "another: "):
        fast.encode(MANY, prompt)
        assert fast._checked["prefix", prompt] == encoding.CHECKED


@pytest.mark.parametrize("width", [512, 4096])
def test_in_half_precision_the_angle_counts(width: int) -> None:
    """Small changes of all numbers at once: each passes for rounding, but not all of them together."""
    generator = torch.Generator().manual_seed(0)
    right = torch.nn.functional.normalize(torch.randn(4, width, generator=generator), dim=1)
    for dtype in (torch.bfloat16, torch.float16):
        most, widest = AGREEMENT[dtype]
        noise = torch.randn(4, width, generator=generator)
        wrong = right + 0.9 * most / noise.abs().max() * noise
        assert number_change(wrong, right) <= most
        assert angle_change(wrong, right) > 3 * widest
        assert "1 - cosine" in disagreement(wrong, right, dtype)
        rounded = right.to(dtype).float()
        assert disagreement(rounded, right, dtype) == ""
    one = right.clone()
    one[0, 0] += 0.03  # a single number: the angle hardly moves
    assert angle_change(one, right) < AGREEMENT[torch.bfloat16][1]
    assert disagreement(one, right, torch.bfloat16)
    assert angle_change(right * 3, right) == pytest.approx(0, abs=1e-12)
    assert angle_change(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    assert disagreement(right * torch.nan, right, torch.bfloat16)


# texts of no tokens


@pytest.fixture(scope="module")
def stripping(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base whose tokenizer makes nothing of white space."""
    folder = tmp_path_factory.mktemp("stripping")
    tiny_model("llama").save_pretrained(folder)
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    ids = {word: number for number, word in enumerate([*special.values(), *sorted(set(WORDS))])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("design", ["m1", "m2", "m5"])
def test_texts_of_no_tokens(stripping: str, design: str) -> None:
    encoder = build(stripping, {"preset": design}, append_eos=False)
    texts = [*MANY[:4], "\n", *(" " * n for n in range(10))]  # most of them
    expected = encoder.encode(texts)
    for prompt in ("", "find the island "):
        fast = FastEncoder(encoder, budget=20)
        assert np.abs(fast.encode(texts, prompt) - encoder.encode(texts, prompt=prompt)).max() < 1e-5
        assert fast.notes == []
    with torch.no_grad():
        for layout in ("padded", "packed", "grouped"):
            with encoder[0].in_layout(layout):
                found = encoder(encoder.preprocess(texts))["sentence_embedding"].numpy()
            assert np.abs(found - expected).max() < 1e-5, layout
