"""Models that poolwise did not build take its fast path where it gives their own embeddings; others do as before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import poolwise
from poolwise.data.own_tasks import TaskData
from poolwise.data.tasks import task_from_data
from poolwise.encoding import shortcuts as adopted_file
from poolwise.encoding.encode import encode_file, open_model
from poolwise.encoding.fast import FastEncoder
from poolwise.encoding.shortcuts import adopt, number_change
from poolwise.errors import AttentionError, ModelError
from poolwise.model.backbone import Backbone
from poolwise.model.base import ensure_eos
from poolwise.model.encoder import STANDARD
from poolwise.model.packing import refusal
from poolwise.scoring.evaluate import evaluate, model_identity
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from served import ask, running
from tiny import FAMILIES, REFUSED, SENTENCES, tiny_folder, tiny_tokenizer

PROMPT = "query: find the island. "
TEXTS = [*(f"{sentence[: 11 + 9 * (n % 7)]} {n % 9}" for n, sentence in enumerate(SENTENCES * 3)), "", *SENTENCES, "a"]
DESIGNS = {
    "last_token": {"preset": "m1"},
    "mean": {"attention": "bidirectional", "pooling": "mean"},
    "weighted_mean": {"attention": "causal", "pooling": "weighted_mean"},
    "max": {"attention": "causal", "pooling": "max"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny base models, and one exported folder for each pooling that sentence-transformers has."""
    root = tmp_path_factory.mktemp("adopted")
    for family in ("llama", "gpt2", *REFUSED):
        tiny_folder(root, family)
    recipe = Recipe(base_model=str(root / "llama"), max_length=48, dtype="float32", lora=False, query_prompt=PROMPT)
    for name, design in DESIGNS.items():
        encoder = poolwise.build(recipe, Design.model_validate({"name": "d", **design}), seed=0, device="cpu")
        poolwise.export(encoder, root / f"exported-{name}")
    return root


def model(root: Path, family: str = "llama", pooling: Any = "lasttoken", *more: Any, **transformer: Any) -> Any:
    """What `SentenceTransformer` makes of a tiny model."""
    modules = [Transformer(str(root / family), **transformer), Pooling(32, pooling), *more]
    return SentenceTransformer(modules=modules, device="cpu")


def own(of: SentenceTransformer, texts: list[str] = TEXTS, prompt: str = "") -> np.ndarray:
    return of.encode(texts, prompt=prompt, show_progress_bar=False)


@pytest.mark.parametrize("pooling", STANDARD)
def test_an_exported_folder_takes_the_shortcuts(root: Path, pooling: str):
    plain = SentenceTransformer(str(root / f"exported-{pooling}"), device="cpu")
    fast = FastEncoder(SentenceTransformer(str(root / f"exported-{pooling}"), device="cpu"), budget=60)
    assert (fast.ours, fast.notes, fast.counts.asked) == (True, [], 0)
    long = "word " * 80  # beyond the limit of 48 tokens
    for prompt in ("", PROMPT):
        before, fast.counts = fast.counts, type(fast.counts)()
        texts = [*TEXTS, TEXTS[2], long, TEXTS[0]]
        assert np.abs(fast.encode(texts, prompt) - own(plain, texts, prompt)).max() < 1e-5
        assert fast.counts.encoded == len(set(texts)) < fast.counts.asked
    assert before.computed >= before.tokens
    if pooling == "mean":  # bidirectional: the instruction reads the text
        assert not fast._checked
        assert fast.counts.computed >= fast.counts.tokens
    else:
        assert fast.counts.computed < fast.counts.tokens
        assert (("last layer", "") in fast._checked, fast.prunes) == ((pooling == "last_token",) * 2)
    assert fast.notes == []


def test_weights_are_shared_and_the_model_stays_as_it_was(root: Path):
    plain = SentenceTransformer(str(root / "exported-last_token"), device="cpu")
    before, identity, config = own(plain), model_identity(plain), plain[0].config.to_dict()
    kinds = [type(module) for module in plain]
    fast = FastEncoder(plain)
    fast.encode(TEXTS, PROMPT)
    ours = fast.encoder
    assert ours[0].model is plain[0].model
    assert ours[0].tokenizer is plain[0].tokenizer
    assert [type(module) for module in plain] == kinds
    assert type(ours[0]) is Backbone
    assert PROMPT not in plain[0]._prompt_length_mapping  # ours measures it another way
    assert PROMPT in ours[0]._prompt_length_mapping
    assert (own(plain) == before).all()
    assert model_identity(plain) == identity
    assert plain[0].config.to_dict() == config
    assert copy.deepcopy(fast.encoder).encode(TEXTS).shape == before.shape


def test_looking_whether_it_can_be_packed_leaves_no_trace(root: Path):
    decoder = model(root)[0].model
    before = decoder.config.to_dict()
    assert refusal(decoder, "causal", 48) is None
    assert decoder.config.to_dict() == before


def test_tokens_are_the_models_own(root: Path):
    for side in ("left", "right"):
        plain = model(root)
        plain.tokenizer.padding_side, plain.max_seq_length = side, 24
        ours = adopt(plain)
        for prompt in (None, PROMPT):
            texts = ["", "a", "word " * 40, *SENTENCES]
            found, expected = ours.preprocess(texts, prompt=prompt), plain.preprocess(texts, prompt=prompt)
            assert found["input_ids"].shape[1] == 24
            for name in ("input_ids", "attention_mask"):
                assert torch.equal(found[name], expected[name]), (side, prompt)


def test_prompts_limit_and_similarity_are_the_models_own(root: Path):
    plain = model(root)
    plain.prompts, plain.default_prompt_name = {"query": PROMPT, "document": ""}, "query"
    plain.similarity_fn_name, plain.max_seq_length = "dot", 20
    fast = FastEncoder(plain)
    assert fast.ours
    assert (fast.prompts, fast.default_prompt_name, fast.max_seq_length) == (plain.prompts, "query", 20)
    a, b = torch.randn(2, 32), torch.randn(3, 32)
    assert torch.equal(fast.similarity(a, b), a @ b.T)
    found = poolwise.encode(fast, [*SENTENCES])  # with the default prompt
    assert np.abs(found - plain.encode([*SENTENCES])).max() < 1e-5 * np.linalg.norm(found[0])
    for side, prompt in (("query", PROMPT), ("document", "")):
        assert np.allclose(fast.encode(TEXTS, prompt, side=side), own(plain, TEXTS, prompt), atol=1e-4)


@pytest.mark.parametrize("pooling", STANDARD)
def test_left_padding_and_no_unit_length(root: Path, pooling: str):
    plain = model(root, "llama", STANDARD[pooling])
    plain.tokenizer.padding_side = "left"
    fast = FastEncoder(plain)
    assert (fast.ours, fast.notes) == (True, [])
    texts = [text for text in TEXTS if text]
    expected = own(plain, texts, PROMPT)
    size = np.linalg.norm(expected, axis=1, keepdims=True)
    assert size.min() > 2  # or the test would not tell absolute from relative
    assert np.abs((fast.encode(texts, PROMPT) - expected) / size).max() < 1e-5
    assert fast.counts.computed < fast.counts.tokens


def test_a_folder_as_the_hub_has_them(tmp_path: Path):
    """Settings of older versions, left padding, a chat template that is not used, prompts: Qwen3-Embedding in tiny."""
    folder = tiny_folder(tmp_path, "qwen3")
    tokenizer = tiny_tokenizer("left")
    ensure_eos(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<bos>{% endfor %}"
    tokenizer.save_pretrained(folder)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    for name, content in (
        ("modules.json", modules),
        ("sentence_bert_config.json", {"max_seq_length": 40, "do_lower_case": False}),
        ("config_sentence_transformers.json", {"prompts": {"query": PROMPT, "document": ""}}),
        ("1_Pooling/config.json", {**pooling, "include_prompt": True}),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    plain = SentenceTransformer(str(folder), device="cpu")
    assert plain.tokenizer.padding_side == "left"
    fast = FastEncoder(plain)
    assert (fast.ours, fast.notes) == (True, [])
    texts = [*TEXTS, "word " * 60]
    assert np.abs(poolwise.encode(fast, texts, side="query") - plain.encode_query(texts)).max() < 1e-5
    assert fast.counts.computed < fast.counts.tokens
    assert np.abs(poolwise.encode(fast, texts, side="document") - plain.encode_document(texts)).max() < 1e-5


def test_a_text_without_tokens_is_never_a_batch_of_its_own(root: Path):
    fast = FastEncoder(model(root, "llama", "mean"), budget=1)
    texts = ["", *SENTENCES]  # each text is a batch
    assert np.allclose(fast.encode(texts), own(fast.encoder, texts), atol=1e-4)


def test_a_model_whose_embeddings_change_with_the_padding_stays_by_itself(root: Path):
    """GPT-2 counts positions from the left, padding included, unless it is told otherwise: not ours to correct."""
    plain = model(root, "gpt2", "mean")
    assert FastEncoder(plain).ours
    plain.tokenizer.padding_side = "left"
    fast = FastEncoder(plain)
    assert not fast.ours
    assert "its embeddings would move by" in fast.notes[0]
    assert (fast.encode(SENTENCES) == own(plain, [*SENTENCES])).all()


def test_moved_is_relative_to_the_length():
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert number_change(torch.tensor([[3.0, 4.5], [0.0, 0.0]]), expected) == pytest.approx(0.1)
    assert not number_change(torch.tensor([[3.0, torch.nan], [0.0, 0.0]]), expected) <= 1


class Own(Transformer):
    """It preprocesses in its own way."""

    def preprocess(self, inputs: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        return super().preprocess([text[::-1] for text in inputs], *rest, **more)


def without_prompt(root: Path) -> SentenceTransformer:
    found = model(root)
    found.set_pooling_include_prompt(False)
    return found


def shortened(root: Path) -> SentenceTransformer:
    found = model(root)
    found.truncate_dim = 8
    return found


def replaced(root: Path) -> SentenceTransformer:
    found = model(root)
    found[0].preprocess = lambda inputs, *rest, **more: Transformer.preprocess(
        found[0], [text[::-1] for text in inputs], *rest, **more
    )
    return found


def limited(root: Path) -> SentenceTransformer:
    found = model(root)
    found[0].query_length = 4
    return found


def chatting(root: Path) -> SentenceTransformer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}"
    folder = tiny_folder(root / "chatting")
    tokenizer.save_pretrained(folder)
    return model(folder.parent)


def half_blind(root: Path) -> SentenceTransformer:
    found = model(root, "gpt_neo")
    found[0].model.config.is_causal = False  # which GPT-Neo ignores
    return found


def tampered(root: Path) -> SentenceTransformer:
    found = model(root)
    encode = found.encode
    found.encode = lambda *rest, **more: encode(*rest, **more)[::-1].copy()
    return found


OTHERS: list[tuple[Callable[[Path], SentenceTransformer], str]] = [
    (lambda root: model(root, "bert", "mean"), "BertModel is bidirectional by design"),
    (half_blind, "is not bidirectional"),
    (lambda root: model(root, "llama", "lasttoken", Dense(32, 8)), "Transformer, Pooling, Dense"),
    (lambda root: model(root, "llama", "lasttoken", Normalize(), Normalize()), "Normalize, Normalize"),
    (lambda root: model(root, "llama", "cls"), "'cls'"),
    (lambda root: model(root, "llama", ("mean", "max")), "('mean', 'max')"),
    (lambda root: SentenceTransformer(modules=[Own(str(root / "llama")), Pooling(32)]), "of Own, Pooling"),
    (lambda root: model(root, "llama", "mean", Normalize(module_input_name="token_embeddings")), "token_embeddings"),
    (without_prompt, "include_prompt = False"),
    (shortened, "truncate_dim = 8"),
    (replaced, "Transformer.preprocess was replaced"),
    (limited, "query_length = 4"),
    (chatting, "modality_config"),
    (tampered, "its embeddings would move by"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_what_is_unlike_ours_is_encoded_by_itself(root: Path, number: int, tmp_path: Path):
    make, told = OTHERS[number]
    if make is chatting:
        tmp_path.joinpath("chatting").mkdir()
        root = tmp_path
    plain = make(root)
    fast = FastEncoder(plain)
    assert (fast.ours, fast.encoder is plain) == (False, True)
    (note,) = fast.notes
    assert note.startswith("encoded without shortcuts, by the model's own `encode`: ")
    assert told in note
    texts = [*SENTENCES, SENTENCES[0]]
    for side, encode in ((None, plain.encode), ("query", plain.encode_query)):
        expected = encode([*SENTENCES], prompt=PROMPT)[[*range(len(SENTENCES)), 0]]
        assert np.array_equal(fast.encode(texts, PROMPT, side=side), expected)


def test_refusals_are_errors_of_poolwise(root: Path):
    with pytest.raises(ModelError, match="truncate_dim"):
        adopt(shortened(root))
    with pytest.raises(AttentionError, match="is not bidirectional"):
        adopt(half_blind(root))


def test_scores_of_a_reference_stay(root: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [(a, b, float(n % 6)) for n, (a, b) in enumerate(zip(TEXTS[:18], reversed(TEXTS[:18]), strict=True))]
    records = {"test": [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in rows]}
    task = task_from_data("sts", TaskData("sts", records), source="tests")
    plain = SentenceTransformer(str(root / "exported-last_token"), device="cpu")
    fast = FastEncoder(plain)
    (new,) = evaluate(fast, [task], identity="m", items=False)
    assert fast.ours
    assert fast.counts.encoded > 0

    def refuse(model: SentenceTransformer) -> SentenceTransformer:
        raise ModelError("no")

    monkeypatch.setattr("poolwise.encoding.fast.adopt", refuse)
    (old,) = evaluate(plain, [task], identity="m", items=False)
    assert new["score"] == pytest.approx(old["score"], abs=1e-6)


def test_encode_and_serve_an_exported_folder(root: Path, tmp_path: Path):
    folder = root / "exported-last_token"
    plain = SentenceTransformer(str(folder), device="cpu")
    assert open_model(folder).ours
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    said: list[str] = []
    to = encode_file(folder, tmp_path / "texts.txt", tmp_path / "v.npy", side="query", say=said.append)
    assert np.abs(np.load(to) - own(plain, [*SENTENCES], PROMPT)).max() < 1e-5
    assert "computed for each" in said[-1]
    with running(folder) as server:
        assert server.batcher.fast.ours
        _, answer = ask(server, {"input": [*SENTENCES], "input_type": "query"})
    found = np.array([row["embedding"] for row in answer["data"]])
    assert np.abs(found - own(plain, [*SENTENCES], PROMPT)).max() < 1e-5
    ids = plain.preprocess([*SENTENCES], prompt=PROMPT)["attention_mask"]
    assert answer["usage"]["prompt_tokens"] == int(ids.sum())


def test_half_precision_agrees_as_far_as_it_can(root: Path):
    plain = model(root, "llama", "mean", Normalize(), model_kwargs={"dtype": torch.bfloat16})
    fast = FastEncoder(plain)
    assert fast.ours
    found, expected = fast.encode(SENTENCES, PROMPT), own(plain, [*SENTENCES], PROMPT)
    assert (found * expected).sum(1) / np.linalg.norm(expected, axis=1) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, *REFUSED])
def test_every_family_keeps_its_embeddings(root: Path, tmp_path: Path, family: str):
    """Windows, positions of other kinds, no positions at all: whatever is taken over, the embeddings stay."""
    plain = model(tiny_folder(tmp_path, family).parent, family)
    fast = FastEncoder(plain)
    assert fast.ours == (family != "bert")
    for prompt in ("", PROMPT):
        expected = own(plain, [*SENTENCES, *TEXTS[:9]], prompt)
        size = np.linalg.norm(expected, axis=1, keepdims=True)
        assert np.abs((fast.encode([*SENTENCES, *TEXTS[:9]], prompt) - expected) / size).max() < 1e-5


@pytest.mark.shared
def test_a_model_with_trained_weights(shared: Path):
    """`stories260K` as sentence-transformers loads a causal language model: last token, not normalised."""
    folder, kwargs = shared / "models" / "stories260K", {"dtype": torch.float32}
    plain = SentenceTransformer(str(folder), device="cpu", model_kwargs=kwargs)
    fast = FastEncoder(plain)
    assert fast.ours
    texts = [text for text in TEXTS if text]
    expected = own(plain, texts, PROMPT)
    apart = np.abs(fast.encode(texts, PROMPT) - expected) / np.linalg.norm(expected, axis=1, keepdims=True)
    assert apart.max() < adopted_file.AGREEMENT[torch.float32][0]
    assert fast.counts.computed < fast.counts.tokens
