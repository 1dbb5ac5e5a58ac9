"""A `FastEncoder` in use: by threads, while weights and settings change, copied, beside heads that read padding."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import poolwise
from poolwise.encoding import fast as encoding
from poolwise.encoding.fast import MASKED, FastEncoder
from poolwise.encoding.shortcuts import pruned
from poolwise.model import hooks
from poolwise.model.hooks import lock_of
from poolwise.scoring.adapters import PublishedBatches
from poolwise.scoring.evaluate import model_identity
from poolwise.scoring.references import Kept
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from tiny import SENTENCES, tiny_folder

PROMPT = "query: find the island. "
PADDED = {"attention": "bidirectional", "pooling": "cross_attention", "pooling_args": {"masked": False}}
LAYER_MEANS = {"attention": "causal", "pooling": "layer_cross_attention", "pooling_args": {"tokens": "mean"}}
WORDS = " ".join(SENTENCES).split()
RANDOM = np.random.default_rng(0)
MANY = [" ".join(RANDOM.choice(WORDS, int(n))) for n in RANDOM.integers(2, 8, 40)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("bases"), "llama"))


def build(base: str, design: dict[str, Any], **recipe: Any) -> SentenceTransformer:
    made = Recipe(base_model=base, **{"max_length": 48, "dtype": "float32", "lora": False, **recipe})
    encoder = poolwise.build(made, Design.model_validate({"name": "d", **design}), seed=0, device="cpu").eval()
    disturb(encoder, "lora_B", 0.3)
    return encoder


def disturb(encoder: SentenceTransformer, name: str = "", size: float = 0.05) -> None:
    """Write to all weights of this name in place, as an optimiser does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for own, parameter in encoder.named_parameters():
            if name in own:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def one_by_one(encoder: SentenceTransformer, texts: list[str], prompt: str = "") -> np.ndarray:
    return np.stack([encoder.encode(text, prompt=prompt or None) for text in texts])


# heads that read padding


def test_a_design_whose_published_evaluation_reads_padding_is_masked(base: str) -> None:
    encoder = build(base, PADDED)
    fast = FastEncoder(encoder, keep=1 << 20)
    assert fast.notes == [MASKED]
    texts = [*SENTENCES[:3], " ".join(MANY[:3])[:140], SENTENCES[0]]
    assert np.abs(fast.encode(texts) - one_by_one(encoder, texts)).max() < 1e-5
    assert np.abs(np.concatenate([*fast.stream(texts, PROMPT)]) - one_by_one(encoder, texts, PROMPT)).max() < 1e-5


def test_published_batches_depend_on_the_texts_beside(base: str) -> None:
    published = PublishedBatches(FastEncoder(build(base, PADDED)), "STS")
    first, second = [*SENTENCES[:3]], [*SENTENCES[:3], " ".join(MANY[:3])[:140], SENTENCES[0]]
    alone = published.kept_vectors(second, None, "", 32)
    assert np.abs(alone[:3] - published.kept_vectors(first, None, "", 32)).max() > 1e-3
    remembering = Kept(published)
    remembering.kept_vectors(first, None, "", 32)
    assert (remembering.kept_vectors(second, None, "", 32) == alone).all()  # whatever was encoded before


# widths


@pytest.mark.parametrize("lora", [False, {"rank": 4}])
def test_truncated_as_the_model_truncates(base: str, lora: Any) -> None:
    encoder = build(base, {"preset": "m1"}, lora=lora)
    fast = FastEncoder(encoder, keep=1 << 20)
    for width in (None, 8, 31, 32, 64, 8):
        encoder.truncate_dim = width
        fast.refresh()
        for prompt in ("", PROMPT):
            own = encoder.encode(MANY, prompt=prompt)
            found = fast.encode(MANY, prompt)
            assert found.shape == own.shape
            assert np.abs(found - own).max() < 1e-5
        assert fast.encode([]).shape == (0, min(width or 32, 32))
        assert np.concatenate([*fast.stream(MANY)]).shape == own.shape
    assert np.linalg.norm(found, axis=1).max() < 0.99  # not brought back to unit length


def test_the_width_is_part_of_the_identity(base: str) -> None:
    encoder = build(base, {"preset": "m1"})
    whole, found = model_identity(encoder), set()
    for width in (8, 16):
        encoder.truncate_dim = width
        found.add(model_identity(encoder))
    encoder.truncate_dim = None
    assert len(found | {whole}) == 3
    assert model_identity(encoder) == whole


# threads


@pytest.mark.parametrize("design", ["m1", "m5"])
def test_threads_share_a_model(base: str, design: str) -> None:
    encoder = build(base, {"preset": design})
    fast = FastEncoder(encoder, budget=60)
    parts = [MANY[start::4] for start in range(4)]
    prompts = ["", PROMPT, "", PROMPT]
    expected = [one_by_one(encoder, part, prompt) for part, prompt in zip(parts, prompts, strict=True)]
    ways = [fast.encode, lambda texts, prompt: poolwise.encode(encoder, texts, prompt=prompt)]
    ways.append(lambda texts, prompt: encoder.encode(texts, prompt=prompt))
    with ThreadPoolExecutor(4) as pool:
        for way in ways:
            for _ in range(4):
                found = pool.map(way, parts, prompts)
                for one, right in zip(found, expected, strict=True):
                    assert np.abs(one - right).max() < 1e-5


def test_a_cut_layer_is_whole_in_other_threads(base: str) -> None:
    """An adopted model's own `encode` knows no lock, and shares the layers that we cut short."""
    plain = SentenceTransformer(modules=[Transformer(base), Pooling(32, "lasttoken")], device="cpu")
    expected = plain.encode(MANY)
    ours = FastEncoder(plain).encoder
    features = ours.preprocess(SENTENCES)
    with pruned(ours[0], features, True), ThreadPoolExecutor(1) as other:
        assert np.abs(other.submit(plain.encode, MANY).result() - expected).max() < 1e-6


def test_locks_belong_to_the_decoder(base: str) -> None:
    encoder = build(base, {"preset": "m1"}, lora={"rank": 4})
    own = encoder[0].lock
    assert copy.copy(encoder[0]).lock is own
    assert lock_of(encoder[0].model.get_base_model()) is own
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert other[0].lock is not own
        assert np.abs(other.encode(MANY) - encoder.encode(MANY)).max() < 1e-6
    count = len(hooks._LOCKS)
    del other
    gc.collect()
    assert len(hooks._LOCKS) < count


def test_a_forked_child_finds_no_lock_taken(base: str) -> None:
    encoder = build(base, {"preset": "m1"})
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with encoder[0].lock:
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(10)
    child = multiprocessing.get_context("fork").Process(target=lambda: encoder[0].lock.__enter__())
    child.start()
    child.join(20)
    done.set()
    thread.join()
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert child.exitcode == 0


def test_layouts_nest(base: str) -> None:
    """Encoding in the middle of a training that is packed leaves it packed."""
    encoder = build(base, {"preset": "m1"})
    with encoder[0].in_layout("packed"):
        FastEncoder(encoder).encode(SENTENCES)
        assert encoder[0].layout == "packed"
    assert encoder[0].layout == "padded"


# weights and settings that change


@pytest.mark.parametrize("lora", [False, "full", {"rank": 4}])
def test_refresh_rebuilds_what_was_derived(base: str, lora: Any) -> None:
    """Merged weights, states of a prompt, kept embeddings, the length limit, weights that were replaced."""
    encoder = build(base, {"preset": "m1"}, lora=lora)
    fast = FastEncoder(encoder, keep=1 << 20)
    before = fast.encode(MANY, PROMPT)
    disturb(encoder)
    assert (fast.encode(MANY, PROMPT) == before).all()  # nothing watches the weights
    for change in (
        lambda: None,
        lambda: disturb(encoder),
        lambda: setattr(encoder, "max_seq_length", 8),
        lambda: encoder.load_state_dict(
            {name: 1.1 * value for name, value in encoder.state_dict().items()}, assign=True
        ),
    ):
        change()
        fast.refresh()
        for prompt in ("", PROMPT):
            assert np.abs(fast.encode(MANY, prompt) - one_by_one(encoder, MANY, prompt)).max() < 1e-4
    prefixes, kept = fast._prefixes, fast.kept
    fast.encode(MANY, PROMPT)
    assert fast._prefixes is prefixes
    assert fast.kept is kept


def test_kept_embeddings_are_copies(base: str) -> None:
    fast = FastEncoder(build(base, {"preset": "m1"}), keep=1 << 20)
    first = fast.encode(MANY)
    expected = first.copy()
    first[:] = 0
    assert (fast.encode(MANY) == expected).all()


def test_weights_of_inference_mode(base: str) -> None:
    """They have no count of what was written to them."""
    encoder = build(base, {"preset": "m3"})
    with torch.inference_mode():
        twin = copy.deepcopy(encoder)
    assert next(twin.parameters()).is_inference()
    assert np.abs(FastEncoder(twin).encode(MANY, PROMPT) - encoder.encode(MANY, prompt=PROMPT)).max() < 1e-5


def test_what_was_left_training_is_not_when_it_encodes(base: str) -> None:
    encoder = build(base, {"preset": "m1"}, lora={"rank": 4, "dropout": 0.5}, dtype="bfloat16")  # not merged
    fast = FastEncoder(encoder)
    expected = fast.encode(MANY)
    encoder.train()
    assert (fast.encode(MANY) == expected).all()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_copies_encode_by_themselves(base: str, how: Any) -> None:
    for encoder in (
        build(base, {"preset": "m3"}, lora={"rank": 4}),
        SentenceTransformer(modules=[Transformer(base), Pooling(32, "lasttoken")], device="cpu"),
    ):
        fast = FastEncoder(encoder, keep=1 << 20)
        expected = fast.encode(MANY, PROMPT)
        twin = how(fast)
        assert np.abs(twin.encode(MANY, PROMPT) - expected).max() < 1e-5
        assert np.abs(twin.encode(MANY) - fast.encode(MANY)).max() < 1e-5
        disturb(encoder)
        twin.refresh()
        changed = np.abs(twin.encode(MANY, PROMPT) - expected).max() > 1e-3
        assert changed == (how is copy.copy)  # only the shallow copy shares the weights


def test_prefixes_of_the_last_prompts_are_held(base: str) -> None:
    encoder = build(base, {"preset": "m1"})
    fast = FastEncoder(encoder)
    prompts = [f"user {number} asks: " for number in range(encoding.PREFIXES + 4)]
    for prompt in [prompts[0], *prompts, prompts[-2]]:
        found = fast.encode(SENTENCES, prompt)
        assert np.abs(found - one_by_one(encoder, [*SENTENCES], prompt)).max() < 1e-5
    assert [*fast._prefixes] == [*prompts[4:-2], prompts[-1], prompts[-2]]
    assert len(fast._checked) <= encoding.PREFIXES + 1
    assert fast.counts.computed < fast.counts.tokens
