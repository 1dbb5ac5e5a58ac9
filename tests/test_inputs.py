"""Templates: what the model reads, what is pooled of it, and that training, saving and exporting keep both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poolwise.encoding.fast import FastEncoder
from poolwise.errors import ModelError
from poolwise.model import checkpoint
from poolwise.model.base import FORMS, special_frame, write
from poolwise.model.checkpoint import export, load_exported
from poolwise.model.encoder import build
from poolwise.model.packing import joined
from poolwise.pooling.cost import base_costs, base_flops
from poolwise.runs.train import train
from poolwise.study.catalogue import PRESETS, TEMPLATES, read_tokens
from poolwise.study.design import Design
from poolwise.study.study import Study
from test_laws import TEXTS, pairs, recipe
from tiny import tiny_config, tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama", max_position_embeddings=128))


def design(template: str, pooling: str = "mean", attention: str = "causal", **more: Any) -> Design:
    return Design(name="d", template=template, pooling=pooling, attention=attention, **more)  # type: ignore[arg-type]


def decoded(encoder: Any, text: str, prompt: str = "") -> tuple[str, str]:
    """What is read of a text and what is pooled of that, as words."""
    features = encoder[0](encoder[0].preprocess([text], prompt=prompt or None))
    ids = features["input_ids"][0]
    return encoder[0].words.decode(ids), encoder[0].words.decode(ids[features["pooling_mask"][0].bool()])


def test_what_is_read_and_what_is_pooled(base: str) -> None:
    r = recipe(base, max_length=120)
    assert decoded(build(r, design("plain"), 0), "a dog") == ("a dog<eos>", "a dog<eos>")
    whole = 'This sentence : "a dog" means in one word:"'
    assert decoded(build(r, design("prompteol"), 0), "a dog") == (whole, whole)
    whole = "Rewrite the sentence: a dog, rewritten sentence: a dog<eos>"
    assert decoded(build(r, design("echo"), 0), "a dog") == (whole, " a dog<eos>")
    bare = build(r, design("echo", special_tokens=False), 0)
    assert decoded(bare, "a dog", "find: ") == ("find: " + whole, " a dog")
    without = build(recipe(base, max_length=120, append_eos=False), design("echo"), 0)
    assert decoded(without, "a dog") == (whole.removesuffix("<eos>"), " a dog")
    cut = build(recipe(base, max_length=120, include_prompt=False), design("prompteol"), 0)
    assert decoded(cut, "a dog", "find: ")[1] == 'a dog" means in one word:"'


def test_long_texts_are_cut_inside_the_template() -> None:
    tokenizer = tiny_tokenizer()
    text = "the heron stands in the shallow water and waits for a fish " * 5
    for template, copies in (("prompteol", 1), ("echo", 2)):
        (row, short), before = write(template, [text, "a"], "query: ", tokenizer, 100)
        assert 100 - copies < len(row) <= 100
        form = FORMS[template]
        words = tokenizer.decode(row)
        assert words.startswith("query: " + form.before)
        assert words.endswith(form.after)
        assert row[:before] == short[:before]
        if form.between:
            first, second = words.removeprefix("query: " + form.before).split(form.between)
            assert first == second
            assert text.startswith(first.strip())
    with pytest.raises(ModelError, match=r"max_length = 20 leaves no room for a text beside its prompt and template"):
        write("echo", ["a"], "query: ", tokenizer, 20)
    assert special_frame(tokenizer) == ([], [])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional", "bidirectional_last_1", "prefix", "causal_prefix"])
@pytest.mark.parametrize("template", ["prompteol", "echo"])
def test_law_1_padding_and_neighbours(template: str, attention: str, side: str, base: str) -> None:
    encoder = build(recipe(base, max_length=120), design(template, attention=attention), 0).eval()
    encoder[0].words.padding_side = side
    alone = np.concatenate([encoder.encode([text], prompt="find: ") for text in TEXTS])
    assert np.abs(alone[0] - alone[1]).max() > 1e-2
    assert np.abs(encoder.encode(TEXTS, prompt="find: ") - alone).max() < 1e-5


def test_echo_gives_every_pooled_token_the_whole_text(base: str) -> None:
    """A changed last word moves the first pooled state under causal attention; without the echo it does not."""

    def first_states(template: str) -> list[torch.Tensor]:
        encoder = build(recipe(base, max_length=120), design(template), 0).eval()
        found = []
        for text in ("the cat sat", "the cat ran"):
            features = encoder[0](encoder[0].preprocess([text]))
            found.append(features["token_embeddings"][0][features["pooling_mask"][0].bool()][0])
        return found

    plain, echo = first_states("plain"), first_states("echo")
    assert torch.allclose(*plain, atol=1e-6)
    assert (echo[0] - echo[1]).abs().max() > 1e-3


@pytest.mark.parametrize("template", ["prompteol", "echo"])
def test_it_is_trained_saved_loaded_and_exported(template: str, base: str, tmp_path: Path) -> None:
    r = recipe(base, max_length=100, query_prompt="find: ", include_prompt=False)
    encoder = build(r, design(template, "last_token" if template == "prompteol" else "mean"), 0)
    before = encoder.encode_query(TEXTS)
    train(encoder, r, pairs(8), tmp_path / "training", seed=0)
    encoder.eval()
    trained = encoder.encode_query(TEXTS)
    assert np.abs(trained - before).max() > 1e-4
    run = checkpoint.save(encoder, tmp_path / "run")
    folder = export(checkpoint.load(run), tmp_path / "export")
    for again in (checkpoint.load(run), load_exported(folder)):
        assert again[0].template == template
        assert np.abs(again.encode_query(TEXTS) - trained).max() < 1e-5
    assert np.abs(FastEncoder(encoder).encode(TEXTS, "find: ") - trained).max() < 1e-5


def test_templates_are_priced() -> None:
    config = tiny_config("llama")
    designs = [{"preset": name} for name in ("sgpt", "echo", "prompteol")]
    rows = base_costs(Study.parse({"name": "s", "baseline": "sgpt", "designs": designs}), config)
    plain, echo, prompteol = (row["base_flops_128"] for row in rows)
    assert (plain, echo, prompteol) == tuple(base_flops(config, n) for n in (128, 2 * 128 + 10, 128 + 11))
    assert {read_tokens(name, 0) for name in TEMPLATES} == {0, 10, 11}


def test_special_tokens_can_be_left_out(base: str) -> None:
    encoder = build(recipe(base), design("plain", "last_token", special_tokens=False), 0).eval()
    features = encoder[0](encoder[0].preprocess(["a dog", "", "the cat sat on the mat"]))
    last = [ids[mask.bool()][-1] for ids, mask in zip(features["input_ids"], features["pooling_mask"], strict=True)]
    words = encoder[0].words
    assert last[0] == words("a dog")["input_ids"][-2]
    assert last[1] == words.eos_token_id  # an empty text keeps what it has
    assert np.isfinite(encoder.encode([""])).all()
    with_them = build(recipe(base), design("plain", "last_token"), 0).eval()
    assert np.abs(with_them.encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-3


def test_presets_carry_their_template() -> None:
    for name, preset in PRESETS.items():
        assert Design.model_validate({"preset": name}).template == preset.get("template", "plain")


@pytest.mark.parametrize("attention", ["causal", "prefix", "bidirectional_last_1"])
@pytest.mark.parametrize("template", ["plain", "echo"])
def test_texts_of_several_prompts_in_one_batch(template: str, attention: str, base: str) -> None:
    """As training joins its columns; grouped by length, every text keeps its own prompt, masks and span."""
    encoder = build(recipe(base, max_length=120, include_prompt=False), design(template, attention=attention), 0).eval()
    prompts = ["find: ", "", "look for the right book: "]
    rows = [encoder[0].preprocess([text], prompt=prompt) for text, prompt in zip(TEXTS[:3], prompts, strict=True)]
    alone = torch.cat([encoder(dict(row))["sentence_embedding"] for row in rows])
    for layout in ("padded", "grouped"):
        with encoder[0].in_layout(layout):
            together = encoder(joined([dict(row) for row in rows]))["sentence_embedding"]
        assert torch.allclose(together, alone, atol=1e-5), layout
