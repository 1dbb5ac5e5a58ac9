"""Tokens from one call of the tokenizer: the ids of `preprocess`, or `preprocess` itself where they would differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import poolwise
from poolwise.encoding import rows as rows_file
from poolwise.encoding.fast import FastEncoder
from poolwise.encoding.rows import Tokeniser, batches, features, pooled_tokens
from poolwise.errors import ModelError
from poolwise.model.packing import Ragged, Rows, flat_index, forward_grouped
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from tiny import SENTENCES, tiny_folder

PROMPT = "query: find the island. "
TEXTS = ["", *SENTENCES, "a", "  spaces  ", "word " * 60, "<eos> in a text", "Ünï", *SENTENCES[:2]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("bases"), "llama"))


def build(base: str, design: dict[str, Any] | None = None, **recipe: Any) -> SentenceTransformer:
    made = Recipe(base_model=base, **{"max_length": 48, "dtype": "float32", "lora": False, **recipe})
    given = {"name": "d", "attention": "causal", "pooling": "mean", **(design or {})}
    return poolwise.build(made, Design.model_validate(given), seed=0, device="cpu").eval()


def lists(rows: Ragged) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(rows.ids, rows.lengths.cumsum()[:-1])]


def by_preprocess(encoder: SentenceTransformer, text: str, prompt: str) -> list[int]:
    return encoder.preprocess([text], prompt=prompt or None)["input_ids"][0].tolist()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("template", ["plain", "prompteol", "echo"])
def test_ids_are_those_of_preprocess(template: str, threads: int, base: str) -> None:
    """With prompts, cut at the limit, EOS kept, whatever a text holds; in the order of the texts."""
    for recipe in ({}, {"append_eos": False}):
        encoder = build(base, {"template": template}, **recipe)
        notes: list[str] = []
        tokenise = Tokeniser(encoder, notes, threads)
        for prompt in ("", PROMPT):
            found = tokenise(TEXTS, prompt)
            assert lists(found) == [by_preprocess(encoder, text, prompt) for text in TEXTS]
            assert found.lengths.max() >= 47  # a text is cut; two equal copies may leave one token free
            assert found.prompt == encoder.preprocess(["a"], prompt=prompt or None).get("prompt_length", 0)
        assert tokenise.direct
        assert notes == []


def test_a_tokenizer_is_left_as_preprocess_needs_it(base: str) -> None:
    encoder = build(base)
    expected = [by_preprocess(encoder, text, "") for text in TEXTS]
    Tokeniser(encoder, [])(TEXTS, "")
    assert [by_preprocess(encoder, text, "") for text in TEXTS] == expected


def test_ids_that_differ_are_left_to_preprocess(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here `preprocess` strips texts, as earlier versions of sentence-transformers did; only an odd text shows it."""
    encoder = build(base)
    own = encoder[0].preprocess
    monkeypatch.setattr(encoder[0], "preprocess", lambda texts, **given: own([text.strip() for text in texts], **given))
    notes: list[str] = []
    tokenise = Tokeniser(encoder, notes)
    assert lists(tokenise([*SENTENCES, " a "], "")) == [by_preprocess(encoder, t, "") for t in [*SENTENCES, "a"]]
    assert not tokenise.direct
    assert notes == ["texts are tokenised by the model's own `preprocess`, whose ids differ"]
    fast = FastEncoder(encoder)
    assert np.abs(fast.encode([" a "]) - encoder.encode(["a"])).max() < 1e-6
    assert fast.notes == notes


def test_the_first_truncated_text_is_compared_again(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`preprocess` cuts elsewhere: short texts cannot show it."""
    encoder = build(base)
    own = encoder[0].preprocess

    def shorter(texts: list[str], **given: Any) -> dict[str, Any]:
        made = own(texts, **given)
        return {name: value[:, :40] if torch.is_tensor(value) else value for name, value in made.items()}

    monkeypatch.setattr(encoder[0], "preprocess", shorter)
    tokenise = Tokeniser(encoder, [])
    tokenise(["a", "b"], "")
    assert tokenise.direct
    found = tokenise(["a", "word " * 60], "")
    assert not tokenise.direct
    assert found.lengths.max() == 40


def test_comparisons_are_made_once_a_prompt(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_file, "REMEMBERED", 3)
    encoder = build(base)
    calls: list[str] = []
    own = Tokeniser.by_preprocess

    def counted(self: Tokeniser, texts: list[str], prompt: str) -> Ragged:
        calls.append(prompt)
        return own(self, texts, prompt)

    monkeypatch.setattr(Tokeniser, "by_preprocess", counted)
    tokenise = Tokeniser(encoder, [])
    for prompt in ("", "one: ", "", "two: ", "three: ", "three: "):
        tokenise(["a"], prompt)
    assert calls == ["", "one: ", "two: ", "three: "]
    assert len(tokenise.prompts) == 3


def test_no_room_for_a_text(base: str) -> None:
    encoder = build(base, {"template": "echo"}, max_length=30)
    with pytest.raises(ModelError, match="leaves no room for a text"):
        Tokeniser(encoder, [])(["a"], PROMPT * 2)


@pytest.mark.parametrize(
    ("design", "recipe"),
    [
        ({}, {}),
        ({}, {"include_prompt": False}),
        ({"special_tokens": False}, {}),
        ({"template": "echo"}, {}),
        ({"pooling": "first_token"}, {}),
    ],
)
def test_pooled_tokens_are_the_backbones(design: Any, recipe: Any, base: str) -> None:
    encoder = build(base, design, **recipe)
    rows = Tokeniser(encoder, [])(TEXTS, PROMPT)
    given = encoder.preprocess(TEXTS, prompt=PROMPT)
    expected = encoder[0](dict(given))["pooling_mask"].bool()[given["attention_mask"].bool()].numpy()
    found = pooled_tokens(encoder[0], rows)
    assert (np.ones(len(rows.ids), bool) if found is None else found).tolist() == expected.tolist()
    assert (found is None) == (not recipe and design in ({}, {"pooling": "first_token"}))


def test_features_are_padded_on_the_right() -> None:
    rows = Ragged(np.array([5, 6, 7, 8]), np.array([1, 0, 3]), prompt=2)
    given = features(rows, "cpu")
    assert given["input_ids"].tolist() == [[5, 0, 0], [0, 0, 0], [6, 7, 8]]
    assert given["attention_mask"].tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert given["prompt_length"] == 2


def test_texts_of_similar_length_are_padded_together_and_none_without_tokens_alone() -> None:
    """The longest first, down to half its length; texts of no tokens go with the last of them."""
    lengths = torch.tensor([3, 0, 9, 5, 4, 0, 10])
    mask = torch.arange(10) < lengths[:, None]
    ids = torch.where(mask, torch.arange(70).view(7, 10), 0)
    seen = []

    def run(ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor, prefix: torch.Tensor) -> Any:
        seen.append((mask.sum(1).tolist(), prefix[:, 0].tolist()))
        return ids[..., None].float(), ids.sum(1).float()[:, None, None]

    prefix = torch.arange(7)[:, None]
    states, vectors = forward_grouped(run, Rows(ids, mask, mask), prefix)
    assert seen == [([10, 9, 5], [6, 2, 3]), ([4, 3, 0, 0], [4, 0, 1, 5])]
    assert torch.equal(states[..., 0], ids.float())
    assert torch.equal(vectors[:, 0, 0], ids.sum(1).float())


def test_ragged_texts() -> None:
    rows = Ragged(np.arange(10), np.array([3, 0, 2, 5]), np.arange(10) % 2 == 0)
    taken = rows.take(np.array([3, 1, 0, 3]))
    assert lists(taken) == [[5, 6, 7, 8, 9], [], [0, 1, 2], [5, 6, 7, 8, 9]]
    assert taken.pooled is not None
    assert taken.pooled.tolist() == [n % 2 == 0 for n in (5, 6, 7, 8, 9, 0, 1, 2, 5, 6, 7, 8, 9)]
    assert taken.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4]
    assert lists(rows.between(1, 3)) == [[], [3, 4]]
    assert flat_index(np.array([7, 2]), np.array([2, 3])).tolist() == [7, 8, 2, 3, 4]
    assert flat_index(np.array([], dtype=int), np.array([], dtype=int)).tolist() == []


def greedy(lengths: list[int], budget: int, skipped: int) -> list[list[int]]:
    """The rule text by text: a batch ends before the text with which its padded size exceeds the budget."""
    found: list[list[int]] = []
    for row, length in enumerate(lengths):
        longest = (lengths[found[-1][0]] if found else length) - skipped
        if not found or (length and (len(found[-1]) + 1) * longest > budget):
            found.append([])
        found[-1].append(row)
    return found


@pytest.mark.parametrize("budget", [1, 7, 40, 1000])
@pytest.mark.parametrize("skipped", [0, 3])
def test_padded_batches(budget: int, skipped: int) -> None:
    random = np.random.default_rng(budget)
    for _ in range(20):
        lengths = sorted(random.integers(0, 20, random.integers(1, 30)).tolist(), reverse=True)
        lengths[0] = max(lengths[0], 1)
        found = [[*range(*cut)] for cut in batches(np.array(lengths), budget, skipped=skipped)]
        assert found == greedy(lengths, budget, skipped)


def test_packs_hold_as_many_tokens_as_fit() -> None:
    lengths = np.array([9, 5, 5, 4, 2, 1, 1, 0, 0])
    assert [*batches(lengths, 10, padded=False)] == [(0, 1), (1, 3), (3, 9)]
    assert [*batches(lengths, 3, padded=False)] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6), (6, 9)]
    assert [*batches(np.array([0, 0]), 3, padded=False)] == [(0, 2)]


LONG_TEXTS = {
    "words": " ".join(SENTENCES) * 60,
    "one word": "heron" * 3000,
    "one letter": "a" * 20_000,
    "spaces": " " * 20_000,
    "spaces, then words": " " * 9000 + "heron " * 2000,
    "letters of several bytes": "ü語😀" * 5000,
    "special tokens": "<eos>" * 4000,
}


@pytest.mark.parametrize("template", ["plain", "echo"])
@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_long_texts_are_cut_before_they_are_tokenised_and_keep_their_ids(text: str, template: str, base: str) -> None:
    encoder = build(base, {"template": template})
    seen: list[int] = []
    tokenise = Tokeniser(encoder, [])
    encode = tokenise._encoded

    def watched(texts: Any, limit: int | None) -> Ragged:
        seen.extend(map(len, texts))
        return encode(texts, limit)

    tokenise._encoded = watched  # type: ignore[method-assign]
    found = tokenise(["short", text], "")
    assert lists(found)[1] == by_preprocess(encoder, text, "")
    assert max(seen) < len(text) / 2


@pytest.mark.parametrize("template", ["plain", "prompteol", "echo"])
def test_texts_given_as_ids_are_framed_and_cut_like_texts(template: str, base: str) -> None:
    """Whether the tokenizer's own frame (here an EOS) is among the ids or not."""
    encoder = build(base, {"template": template}, append_eos=True)
    tokenise = Tokeniser(encoder, [])
    words = encoder[0].words
    texts = [text for text in TEXTS if text]
    space = " " if template == "echo" else ""  # echo writes one before each copy
    bare = [words(space + text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = lists(tokenise(texts, ""))
    assert lists(tokenise.of_ids(bare, "")) == expected
    assert lists(tokenise.of_ids([[*ids, words.eos_token_id] for ids in bare], "")) == expected
    prompted = tokenise.of_ids(bare, PROMPT)
    before = tokenise(texts, PROMPT)
    assert prompted.prompt == before.prompt
    fixed = before.prompt - 1  # the prompt's last space merges with some texts, not with ids
    assert [ids[:fixed] for ids in lists(prompted)] == [ids[:fixed] for ids in lists(before)]


def test_rows_are_encoded_as_their_texts_are(base: str) -> None:
    fast = FastEncoder(build(base))
    rows = fast.tokenise(TEXTS, PROMPT)
    assert np.abs(fast.encode_rows(rows, PROMPT) - fast.encode(TEXTS, PROMPT)).max() < 1e-6
