"""Fast encoding gives the embeddings of one text at a time, whatever shortcut it takes, and says when it takes none."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding

import poolwise
from poolwise.encoding import fast as encoding
from poolwise.encoding import shortcuts as shortcut_file
from poolwise.encoding.fast import FastEncoder
from poolwise.encoding.shortcuts import Prefix, shared_prefix
from poolwise.model.packing import Ragged
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe
from tiny import SENTENCES, VOCAB, tiny_folder, tiny_tokenizer

PROMPT = "query: find the island. "
WORDS = " ".join(SENTENCES).split()
DESIGNS = {
    "m1": {"preset": "m1"},
    "m2": {"preset": "m2"},
    "m3": {"preset": "m3"},
    "m4": {"preset": "m4"},
    "m5": {"preset": "m5"},
    "mean-causal": {"attention": "causal", "pooling": "mean"},
    "layer-means-causal": {
        "attention": "causal",
        "pooling": "layer_cross_attention",
        "pooling_args": {"tokens": "mean"},
    },
    "weighted": {"attention": "causal", "pooling": "weighted_mean"},
}
FAMILIES = ["llama", "qwen2", "mistral_window", "gemma3", "gpt2"]


def texts(count: int = 30) -> list[str]:
    random = np.random.default_rng(3)
    made = [" ".join(random.choice(WORDS, int(n))) for n in random.integers(1, 9, count)]
    return [*made, made[0], made[3]]


@pytest.fixture(scope="module", autouse=True)
def bases(tmp_path_factory: pytest.TempPathFactory):
    """Where `build` finds its base models."""
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        tiny_folder(root, family)
    build.root = root


def build(family: str = "llama", design: str = "m1", **recipe: object) -> SentenceTransformer:
    recipe = {"max_length": 48, "dtype": "float32", **recipe}
    encoder = poolwise.build(
        Recipe(base_model=str(build.root / family), **recipe),
        Design.model_validate({"name": "d", **DESIGNS[design]}),
        seed=0,
        device="cpu",
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder


def one_by_one(encoder: SentenceTransformer, of: list[str], prompt: str = "") -> np.ndarray:
    return np.stack([encoder.encode(text, prompt=prompt or None) for text in of])


@pytest.mark.parametrize(
    ("family", "design"),
    [*((family, design) for family in FAMILIES for design in ("m1", "m5")), *(("llama", design) for design in DESIGNS)],
)
def test_equals_one_text_at_a_time(family: str, design: str):
    some = texts(10)
    for include_prompt in (True, False):
        encoder = build(family, design, include_prompt=include_prompt)
        for prompt in ("", PROMPT):
            fast = FastEncoder(encoder, budget=60)
            found = fast.encode(some, prompt)
            assert np.abs(found - one_by_one(encoder, some, prompt)).max() < 1e-5, (include_prompt, prompt)
            assert found.dtype == np.float32
            assert fast.counts.encoded == fast.counts.asked - 2  # two texts come twice
        if encoder[0].attention == "bidirectional":
            assert fast.counts.computed >= fast.counts.tokens  # the instruction reads the text: nothing to reuse
        elif family in ("llama", "qwen2", "gpt2"):  # the others have windows shorter than the instruction
            assert fast.counts.computed < fast.counts.tokens


def test_a_window_shorter_than_the_prefix_is_not_reused():
    """Gemma 3's sliding layers keep four tokens: too few keys to go on from."""
    encoder = build("gemma3")
    fast = FastEncoder(encoder)
    found = fast.encode(texts(), PROMPT)
    assert fast.counts.computed >= fast.counts.tokens
    assert np.abs(found - one_by_one(encoder, texts(), PROMPT)).max() < 1e-5


def test_shared_prefix_leaves_every_text_a_token():
    rows = Ragged(np.array([5, 6, 7, 8, 5, 6, 7, 5, 6, 7, 7, 7]), np.array([4, 3, 5]))
    assert shared_prefix(rows).tolist() == [5, 6]
    assert shared_prefix(rows, Ragged(np.array([5, 7, 7]), np.array([3]))).tolist() == [5]
    assert shared_prefix(Ragged(np.array([1, 2, 3, 2]), np.array([2, 2]))).tolist() == []
    assert shared_prefix(rows, Ragged(np.array([], dtype=int), np.array([0]))).tolist() == []


def test_a_text_that_does_not_begin_with_the_prefix_is_encoded_whole():
    encoder = build()
    fast = FastEncoder(encoder, keep=1 << 20)
    fast.encode(texts(), PROMPT)
    assert fast._prefixes[PROMPT] is not None
    fast._prefixes[PROMPT].ids = fast._prefixes[PROMPT].ids + 1
    more = ["another text", "and another one"]
    assert np.abs(fast.encode(more, PROMPT) - one_by_one(encoder, more, PROMPT)).max() < 1e-5


@pytest.mark.parametrize("shortcuts", [("prefix",), ("last layer",), ("prefix", "last layer")])
def test_a_shortcut_that_moves_embeddings_is_switched_off(shortcuts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    encoder = build()
    prompt = PROMPT if "prefix" in shortcuts else ""
    expected = one_by_one(encoder, texts(), prompt)
    if "prefix" in shortcuts:
        right = Prefix.forward

        def wrong(self: Prefix, backbone: object, features: dict) -> dict:
            out = right(self, backbone, features)
            return {**out, "token_embeddings": out["token_embeddings"].flip(-1)}

        monkeypatch.setattr(Prefix, "forward", wrong)
    if "last layer" in shortcuts:
        monkeypatch.setattr(shortcut_file, "last_index", lambda mask: torch.zeros(len(mask), dtype=torch.long))
    fast = FastEncoder(encoder)
    assert np.abs(fast.encode(texts(), prompt) - expected).max() < 1e-5
    assert len(fast.notes) == len(shortcuts)
    assert all(name in note for name, note in zip(shortcuts, fast.notes, strict=True))


def test_one_text_is_not_taken_for_the_instruction():
    """The prefix ends where the prompt does, also if the first texts begin alike."""
    encoder = build()
    fast = FastEncoder(encoder)
    fast.encode(["The heron stands here", "The heron stands there"], PROMPT)
    before = fast.counts
    fast.counts = type(before)()
    more = ["Which tokens", "Pooling is second"]
    assert np.abs(fast.encode(more, PROMPT) - one_by_one(encoder, more, PROMPT)).max() < 1e-5
    assert fast.counts.computed < fast.counts.tokens


def test_the_encoder_is_left_as_it_was():
    encoder = build(lora=Lora(rank=4, dropout=0.1))
    before = copy.deepcopy(encoder.state_dict())
    FastEncoder(encoder).encode(texts(), PROMPT)
    after = encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "forward" not in vars(encoder[0].model.get_base_model().layers[-1].mlp)
    assert encoder[0].layout == "padded"


def test_half_precision_is_not_merged_and_agrees():
    encoder = build(dtype="bfloat16")
    fast = FastEncoder(encoder, budget=60)
    assert fast.encoder is encoder
    apart = 1 - (fast.encode(texts(), PROMPT) * one_by_one(encoder, texts(), PROMPT)).sum(1)
    assert apart.max() < 1e-3


def test_kept_embeddings_are_not_made_again():
    fast = FastEncoder(build(), keep=1 << 20)
    first = fast.encode(texts())
    encoded = fast.counts.encoded
    assert (fast.encode(texts()[::-1])[::-1] == first).all()
    assert fast.counts.encoded == encoded
    fast.encode(texts()[:2], PROMPT)  # another prompt, another embedding
    assert fast.counts.encoded == encoded + 2
    forgetful = FastEncoder(build())
    forgetful.encode(texts()[:2])
    forgetful.encode(texts()[:2])
    assert forgetful.counts.encoded == 4
    assert forgetful.encode([]).shape == (0, 32)


def test_kept_embeddings_are_those_of_one_side():
    """A model with other modules for queries than for documents: one text as both, whichever comes first."""
    tokenizer = tiny_tokenizer().backend_tokenizer
    tables = np.random.default_rng(0).normal(size=(2, VOCAB, 8)).astype(np.float32)
    queries, documents = (StaticEmbedding(tokenizer, embedding_weights=table) for table in tables)
    model = SentenceTransformer(modules=[Router.for_query_document([queries], [documents])], device="cpu")
    fast = FastEncoder(model, keep=1 << 20)
    for side, encode in (("query", model.encode_query), ("document", model.encode_document)):
        for _ in range(2):
            assert (fast.encode(["a heron"], side=side) == encode(["a heron"])).all()


def test_a_stream_is_held_a_window_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoding, "WINDOW", 8)
    encoder, taken = build(), itertools.count()
    pool = texts()

    def endless():
        for number in itertools.count():
            next(taken)
            yield pool[number % len(pool)]

    stream = FastEncoder(encoder).stream(endless())
    found = np.concatenate([next(stream) for _ in range(3)])
    assert next(taken) <= 8 * 4  # three windows and the one that is tokenised ahead
    stream.close()
    assert np.abs(found - one_by_one(encoder, pool[:24])).max() < 1e-5


@pytest.mark.parametrize("design", ["m1", "m3"])  # m3 collects from each layer
def test_compiled_layers_agree(design: str):
    encoder = build(design=design)
    expected = one_by_one(encoder, texts(), PROMPT)
    fast = FastEncoder(encoder, compiled=True)
    fast.compile()
    assert np.abs(fast.encode(texts(), PROMPT) - expected).max() < 1e-5
    assert np.abs(encoder.encode(texts(), prompt=PROMPT) - expected).max() < 1e-5  # not compiled
