"""The laws of the encoder, on tiny random models whose weights are scaled up (at std .02 nothing could fail).

1 padding and neighbours, 4 same start and order, 5 gradients, 9 fp32 sums, 10 the mask decides. Laws 2 and 7 stand in
test_attention and test_comparison, 3 in test_design_space, 6 in test_runner, 8 in test_processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from poolwise.errors import CheckpointError, ModelError
from poolwise.model import checkpoint
from poolwise.model.checkpoint import export, load_exported
from poolwise.model.encoder import build, derived_seed
from poolwise.runs.train import train
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe
from tiny import tiny_folder

SMALL = {"latents": 4}
DESIGNS = [
    Design.model_validate(raw)
    for raw in (
        {"preset": "m1"},
        {"preset": "m2"},
        {"preset": "m3"},
        {"preset": "m4"},
        {"preset": "m5"},
        {"attention": "bidirectional", "pooling": "mean"},
        {"attention": "causal", "pooling": "weighted_mean"},
        {"attention": "bidirectional", "pooling": "last_token_ffn"},
        {"attention": "causal", "pooling": "mean_ffn"},
    )
]
TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "some people walk to the river every morning and some people stay at home with a book",
    "water",
]


def paper(name: str) -> Design:
    """A paper preset at a size that fits a test."""
    from poolwise.study.catalogue import PRESETS

    preset = PRESETS[name]
    arguments = {**preset["pooling_args"], "latents": 4, "heads": 2, "head_dim": 8}
    return Design.model_validate({"name": name, **preset, "pooling_args": arguments})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama"))


def recipe(base: str, **changes: Any) -> Recipe:
    values = {"base_model": base, "steps": 2, "batch_size": 4, "warmup_steps": 0, "max_length": 64, "save_steps": 1}
    return Recipe(**{**values, "learning_rate": 1e-3, "head_learning_rate": 1e-3, **changes})


def pairs(rows: int) -> Dataset:
    words = ["cat", "dog", "river", "book", "water", "morning", "people", "home", "mat", "walk"]
    return Dataset.from_dict(
        {
            "query": [f"the {words[i % 10]} {words[i % 7]} {i}" for i in range(rows)],
            "positive": [f"a {words[i % 10]} and {words[i % 7]} {i}" for i in range(rows)],
            "negative_1": [f"no {words[(i + 3) % 10]} {i}" for i in range(rows)],
        }
    )


def embed(encoder: Any, texts: list[str], side: str = "right", more: int = 0, junk: int = 0) -> torch.Tensor:
    """Embeddings (B, D) of one batch, padded on `side` with `more` extra columns whose ids are `junk`."""
    tokenizer = encoder[0].tokenizer
    rows = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in texts]
    width = max(map(len, rows)) + more
    ids = torch.full((len(rows), width), junk)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    with torch.no_grad():
        return encoder({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_law_1_padding_and_neighbours(design: Design, base: str) -> None:
    encoder = build(recipe(base), design, 0).eval()
    alone = torch.cat([embed(encoder, [text]) for text in TEXTS])
    assert (alone[0] - alone[1]).abs().max() > 1e-2  # the embeddings say something
    for side in ("left", "right"):
        for more, junk in ((0, 0), (5, 0), (5, 7)):
            assert torch.allclose(embed(encoder, TEXTS, side, more, junk), alone, atol=1e-5), (side, more, junk)


def test_law_1_is_broken_by_the_papers_code(base: str) -> None:
    """m4-paper's evaluation attends to padding; m5-paper takes a real token with its id for padding (law 10 too)."""
    m4 = build(recipe(base), paper("m4-paper"), 0).eval()
    assert (embed(m4, TEXTS[1:2]) - embed(m4, TEXTS[1:2], more=5)).abs().max() < 1e-5
    with m4[0].pooling_padding():
        assert (embed(m4, TEXTS[1:2]) - embed(m4, TEXTS[1:2], more=5)).abs().max() > 1e-4
    m5 = build(recipe(base), paper("m5-paper"), 0).eval()
    tokenizer = m5[0].tokenizer
    tokenizer.pad_token = tokenizer.eos_token  # as the paper's bases have it: the real EOS then counts as padding
    ours = build(recipe(base), Design.model_validate({**paper("m5-paper").model_dump(exclude={"preset"}),
        "pooling_args": {**paper("m5-paper").pooling_args, "pad_by_id": False}}), 0).eval()  # fmt: skip
    assert (embed(m5, TEXTS) - embed(ours, TEXTS)).abs().max() > 1e-4


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_law_1_bf16(design: Design, base: str) -> None:
    encoder = build(recipe(base, dtype="bfloat16"), design, 0).eval()
    alone = torch.cat([embed(encoder, [text]) for text in TEXTS])
    assert alone.dtype == torch.float32  # law 9
    for side in ("left", "right"):
        cosine = torch.nn.functional.cosine_similarity(embed(encoder, TEXTS, side, 3, 7), alone)
        assert cosine.min() > 0.999


def test_lora_and_head_are_fp32_over_a_bf16_base_also_after_load(base: str, tmp_path: Path) -> None:
    encoder = build(recipe(base, dtype="bfloat16"), DESIGNS[3], 0)
    again = checkpoint.load(checkpoint.save(encoder, tmp_path / "run"), trainable=True)
    for model in (encoder, again):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert {n for n, p in encoder.named_parameters() if p.requires_grad} == {
        n for n, p in again.named_parameters() if p.requires_grad
    }


def test_law_4_same_start_for_every_design(base: str) -> None:
    states = {d.name: build(recipe(base), d, 3).state_dict() for d in DESIGNS}
    other = build(recipe(base), DESIGNS[0], 4).state_dict()
    first = states["m1"]
    compared = 0
    for name, state in states.items():
        for key in state.keys() & first.keys():
            assert torch.equal(state[key], first[key]), (name, key)
            compared += "lora_A" in key
    assert compared > 10
    assert any(not torch.equal(other[key], first[key]) for key in other if "lora_A" in key)
    heads = [states[name] for name in ("m2", "m3", "m4", "m5")]
    for key in (k for k in heads[0] if k.startswith("1.") and all(k in h for h in heads)):
        for state in heads[1:]:
            if state[key].shape == heads[0][key].shape:
                assert torch.equal(state[key], heads[0][key]), key


def test_seed_parts(base: str) -> None:
    fixed = recipe(base, seed_varies=["order"])
    assert derived_seed(fixed, "init", 0) == derived_seed(fixed, "init", 5)
    assert derived_seed(fixed, "order", 0) != derived_seed(fixed, "order", 5)
    a, b = (build(fixed, DESIGNS[1], seed).state_dict() for seed in (0, 5))
    assert all(torch.equal(a[key], b[key]) for key in a)


def gradients(encoder: Any, r: Recipe, folder: Path) -> dict[str, bool]:
    """Which trainable tensors moved in two steps."""
    before = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    train(encoder, r, pairs(8), folder, seed=0)
    return {n: not torch.equal(p.detach().cpu(), before[n].cpu()) for n, p in encoder.named_parameters()}


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_law_5_every_trainable_tensor_learns(design: Design, base: str, tmp_path: Path) -> None:
    r = recipe(base, weight_decay=0.0, steps=2)
    encoder = build(r, design, 0)
    trainable = {n for n, p in encoder.named_parameters() if p.requires_grad}
    moved = gradients(encoder, r, tmp_path)
    frozen_that_moved = [n for n, yes in moved.items() if yes and n not in trainable]
    assert not frozen_that_moved
    assert trainable
    stuck = [n for n in trainable if not moved[n]]
    assert not stuck, stuck


def test_law_5_is_broken_by_the_papers_m2(base: str, tmp_path: Path) -> None:
    """One token: softmax over one key is 1, so queries, keys and the latents' norm never get a gradient."""
    r = recipe(base, weight_decay=0.0)
    moved = gradients(build(r, paper("m2-paper"), 0), r, tmp_path)
    stuck = {n.removeprefix("1.head.") for n, yes in moved.items() if n.startswith("1.head.") and not yes}
    assert stuck == {"to_q.weight", "to_k.weight", "norm_latents.weight", "norm_latents.bias"}


@pytest.mark.parametrize(("lora", "tuned"), [(False, False), ("full", True), (Lora(rank=2), True)])
def test_what_lora_tunes(lora: Any, tuned: bool, base: str, tmp_path: Path) -> None:
    r = recipe(base, lora=lora, weight_decay=0.0)
    encoder = build(r, DESIGNS[1], 0)
    moved = gradients(encoder, r, tmp_path / "training")
    assert any(yes for n, yes in moved.items() if n.startswith("0.")) == tuned
    assert any(yes for n, yes in moved.items() if n.startswith("1."))
    again = checkpoint.load(checkpoint.save(encoder, tmp_path / "run"))
    assert np.abs(again.encode(TEXTS) - encoder.encode(TEXTS)).max() < 1e-6


def test_cached_loss_equals_the_plain_one(base: str, tmp_path: Path) -> None:
    """GradCache splits the batch, not the negatives."""
    plain, cached = (recipe(base, mini_batch_size=m, lora=Lora(dropout=0.0)) for m in (0, 2))
    losses = [
        train(build(r, DESIGNS[4], 0), r, pairs(8), tmp_path / str(i), seed=0)["losses"]
        for i, r in enumerate((plain, cached))
    ]
    assert losses[0].keys() == losses[1].keys() == {1, 2}
    assert all(abs(losses[0][k] - losses[1][k]) < 1e-4 for k in losses[0])


def test_eos_ends_every_text_also_when_cut(base: str) -> None:
    encoder = build(recipe(base, max_length=8), DESIGNS[0], 0)
    features = encoder[0].preprocess(["water", "the cat sat on the mat and the dog sat on the mat " * 3])
    last = features["attention_mask"].sum(1) - 1
    ids = features["input_ids"][torch.arange(2), last]
    assert ids.tolist() == [encoder[0].tokenizer.eos_token_id] * 2
    assert features["input_ids"].shape[1] == 8


def test_prompt_can_be_left_out_of_pooling(base: str) -> None:
    design = Design(name="mean", attention="causal", pooling="mean")
    r = recipe(base, query_prompt="find the book: ", include_prompt=False)
    encoder = build(r, design, 0).eval()
    features = encoder[0].preprocess(["water and home", "dog"], prompt="find the book: ")
    features = encoder[0](features)
    prompt = len(encoder[0].tokenizer("find the book:")["input_ids"]) - 1  # less EOS
    pooled, mask = features["pooling_mask"], features["attention_mask"]
    assert torch.equal(mask.sum(1) - pooled.sum(1), torch.full((2,), features["prompt_length"]))
    assert prompt - 1 <= features["prompt_length"] <= prompt + 1
    expected = (features["token_embeddings"] * pooled[..., None]).sum(1) / pooled.sum(1, keepdim=True)
    expected = torch.nn.functional.normalize(expected, dim=-1)
    found = torch.tensor(encoder.encode_query(["water and home", "dog"]))
    assert torch.allclose(found, expected, atol=1e-5)
    whole = build(recipe(base, query_prompt="find the book: "), design, 0).eval()
    assert np.abs(whole.encode_query(["dog"]) - encoder.encode_query(["dog"])).max() > 1e-3


@pytest.mark.parametrize("pooling", ["last_token", "mean", "weighted_mean"])
def test_standard_designs_export_as_plain_sentence_transformers(pooling: str, base: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    design = Design(name="d", attention="bidirectional", pooling=pooling)
    encoder = build(recipe(base, query_prompt="find: "), design, 0).eval()
    folder = export(encoder, tmp_path / "export")
    plain = SentenceTransformer(str(folder))  # no trust flag, no poolwise code
    assert "poolwise" not in (folder / "modules.json").read_text()
    assert np.abs(plain.encode_query(TEXTS) - encoder.encode_query(TEXTS)).max() < 1e-5
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export(encoder, folder)


def test_load_refuses_what_it_cannot_trust(base: str, tmp_path: Path) -> None:
    encoder = build(recipe(base), DESIGNS[1], 0)
    folder = checkpoint.save(encoder, tmp_path / "run")
    weights = folder / "pooling.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"pooling\.safetensors is damaged"):
        checkpoint.load(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"pooling\.safetensors is missing"):
        checkpoint.load(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(folder)
    (folder / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"no run\.json"):
        checkpoint.load(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.load(tmp_path / "nowhere")


def test_weights_of_another_rank_do_not_fit(base: str, tmp_path: Path) -> None:
    checkpoint.save_weights(build(recipe(base), DESIGNS[0], 0), tmp_path)
    other = build(recipe(base, lora=Lora(rank=3)), DESIGNS[0], 0)
    with pytest.raises(CheckpointError, match="adapter does not fit the recipe and the design"):
        checkpoint.load_weights(other, tmp_path)


def test_load_refuses_another_base(base: str, tmp_path: Path) -> None:
    folder = checkpoint.save(build(recipe(base), DESIGNS[0], 0), tmp_path / "run")
    other = tiny_folder(tmp_path / "other", "llama", seed=1)
    with pytest.raises(CheckpointError, match="give the same base model"):
        checkpoint.load(folder, base=str(other))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model": "./nowhere"}, "no such model folder"),
        ({"base_model": "no-such-owner/no-such-model"}, "cannot be loaded"),
        ({"max_length": 4096}, "give at most"),
        ({"lora": Lora(target="no_such_layer")}, "recipe.lora.target"),
    ],
)
def test_build_refuses(changes: dict[str, Any], words: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=words):
        build(recipe(base, **changes), DESIGNS[0], 0)


def test_exported_folder_can_be_damaged(base: str, tmp_path: Path) -> None:
    folder = export(build(recipe(base), DESIGNS[3], 0).eval(), tmp_path / "export")
    (folder / "modules.json").write_text("[")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_exported(folder)
