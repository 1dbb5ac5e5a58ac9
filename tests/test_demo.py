"""The built-in tasks and pairs: deterministic, disjoint, planted as they say; the built-in base loads offline."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer

from poolwise import demo
from poolwise.demo.grammar import FACT, FUNCTION_WORDS, TOPICS, WORDS, generator, sentence
from poolwise.demo.mechanisms import MECHANISMS
from poolwise.errors import TaskError

BOUND = ("roles", "negation", "number", "swap", "context", "tail")  # same words, bound differently
KINDS = ("sts", "retrieval", "classification")
ROOT = Path(__file__).parents[1]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def texts(value: Any) -> Iterator[str]:
    """Every text of a task, ids and labels left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            if key not in ("_id", "query-id", "corpus-id", "label", "labels", "title"):
                yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


@functools.cache
def evaluation_texts() -> tuple[str, ...]:
    return tuple(text for name in demo.task_names() for text in texts(demo.task_data(name)["records"]))


@functools.cache
def training_texts(seed: int = 0) -> tuple[str, ...]:
    return tuple(
        text for row in demo.training_pairs(seed) for text in (row["query"], row["positive"], *row["negatives"])
    )


FINGERPRINT = """
import hashlib, json
from poolwise import demo
whole = [demo.training_pairs(3), [dict(demo.task_data(name)["records"]) for name in demo.task_names()]]
print(hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest())
"""


def test_same_data_in_every_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    whole = [demo.training_pairs(3), [dict(demo.task_data(name)["records"]) for name in demo.task_names()]]
    here = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    assert {line.strip() for line in found} == {here}


def test_import_is_light() -> None:
    code = "import sys, poolwise.demo; print([m for m in ('torch', 'mteb', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_training_seed_changes_the_pairs_but_never_the_tasks() -> None:
    assert demo.training_pairs(0) != demo.training_pairs(1)
    name = "demo/roles-sts"
    assert demo.task_data(name) == demo.task_data(name)


@pytest.mark.parametrize("seed", [0, 5])
def test_training_and_evaluation_share_no_content_word(seed: int) -> None:
    trained = {word for text in training_texts(seed) for word in words(text)}
    evaluated = {word for text in evaluation_texts() for word in words(text)}
    assert trained & evaluated <= FUNCTION_WORDS
    assert len(trained - FUNCTION_WORDS) > 150
    assert len(evaluated - FUNCTION_WORDS) > 150


def test_vocabulary_halves_and_topics_share_nothing() -> None:
    halves = {
        split: {word for lists in (WORDS[split], TOPICS[split]) for group in lists.values() for word in group}
        for split in ("train", "eval")
    }
    assert not halves["train"] & halves["eval"]
    assert not (halves["train"] | halves["eval"]) & FUNCTION_WORDS
    for split in ("train", "eval"):
        assert WORDS[split].keys() == WORDS["train"].keys()
        counts = Counter(word for topic in TOPICS[split].values() for word in topic)
        assert set(counts.values()) == {1}  # no word belongs to two topics
        assert all(len(topic) == 12 for topic in TOPICS[split].values())


def test_training_and_evaluation_share_no_template() -> None:
    """Neither as written nor with fields and punctuation taken out."""

    def frames(split: str) -> set[str]:
        found = set()
        for mechanism in MECHANISMS.values():
            for side in ("queries", "documents"):
                for template in mechanism.templates.side(split, side):  # type: ignore[arg-type]
                    found.add(" ".join(re.findall(r"[a-z]+|\{", re.sub(r"\{\w+\}", "{", template))))
        return found

    assert not frames("train") & frames("eval")


def test_sizes() -> None:
    kinds = Counter(name.rsplit("-", 1)[1] for name in demo.task_names())
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= 6  # six tasks of a type can reach p = .031 two-sided
    assert 8 <= len(MECHANISMS) <= 10
    for mechanism in MECHANISMS:
        items = 0
        for kind in KINDS:
            if f"demo/{mechanism}-{kind}" in demo.task_names():
                records = demo.task_data(f"demo/{mechanism}-{kind}")["records"]
                rows = records["queries"] if kind == "retrieval" else records["test"]
                items += len(rows)
        assert items >= 200, (mechanism, items)
    pairs = demo.training_pairs()
    assert Counter(row["mechanism"] for row in pairs) == dict.fromkeys(MECHANISMS, len(pairs) // len(MECHANISMS))


def test_records_are_whole() -> None:
    for name in demo.task_names():
        kind, records = demo.task_data(name).values()
        if kind == "retrieval":
            documents, queries = ([row["_id"] for row in records[part]] for part in ("corpus", "queries"))
            assert len(set(documents)) == len(documents)
            assert len(set(queries)) == len(queries)
            assert {row["corpus-id"] for row in records["qrels"]} <= set(documents)
            assert {row["query-id"] for row in records["qrels"]} == set(queries)
            assert len({row["text"] for row in records["corpus"]}) == len(documents)
        elif kind == "classification":
            counts = Counter(row["label"] for row in records["train"])
            assert min(counts.values()) >= 7
            assert counts.keys() == {row["label"] for row in records["test"]}
            assert not {row["text"] for row in records["train"]} & {row["text"] for row in records["test"]}
    for row in demo.training_pairs():
        assert len({row["query"], row["positive"], *row["negatives"]}) == 3


@pytest.mark.parametrize("name", BOUND)
def test_meanings_of_a_group_have_the_same_words(name: str) -> None:
    """What makes a bag of words blind: wordings from one template differ in nothing but the binding."""
    for split in ("train", "eval"):
        stream = MECHANISMS[name].groups(split, "bags")  # type: ignore[arg-type]
        for _ in range(20):
            group = next(stream)
            for wording in range(len(group.documents[0])):
                assert len({tuple(sorted(words(texts[wording]))) for texts in group.documents}) == 1


@pytest.mark.parametrize("name", [*BOUND, "topic"])
def test_bags_of_words_are_at_chance(name: str) -> None:
    """TF-IDF of words and of characters within words orders the pairs at random: |Spearman| below its 99.9 % bound."""
    rows = demo.task_data(f"demo/{name}-sts")["records"]["test"]
    gold = [row["score"] for row in rows]
    for options in ({}, {"analyzer": "char_wb", "ngram_range": (3, 5)}):
        vectorizer = TfidfVectorizer(**options).fit(evaluation_texts())
        first, second = (vectorizer.transform([row[side] for row in rows]) for side in ("sentence1", "sentence2"))
        similarity = np.asarray(first.multiply(second).sum(axis=1)).ravel().round(9)
        assert abs(spearmanr(similarity, gold)[0]) < 3.29 / np.sqrt(len(rows) - 1)


@pytest.mark.parametrize("name", ["overlap", "early", "late"])
def test_shared_words_solve_what_they_should(name: str) -> None:
    rows = demo.task_data(f"demo/{name}-sts")["records"]["test"]
    vectorizer = TfidfVectorizer().fit(evaluation_texts())
    first, second = (vectorizer.transform([row[side] for row in rows]) for side in ("sentence1", "sentence2"))
    similarity = np.asarray(first.multiply(second).sum(axis=1)).ravel()
    assert spearmanr(similarity, [row["score"] for row in rows])[0] > 0.7


# The first group of each mechanism, read through by hand: (wanted code, its query, its document, the document of the
# next meaning, similarity of the two).
HAND = {
    "overlap": (
        ("hospital", "saddle", "dark", "moved"),
        "A dark saddle moved near the hospital.",
        "By the hospital the saddle moved, and it was dark.",
        "By the hospital the saddle shone, and it was dark.",
        0.75,
    ),
    "roles": (
        ("guard", "thief", "doctor", "king"),
        "Here the guard presented the thief and with it the doctor to the king too.",
        "From the guard came the thief who with the doctor was presented to the king there.",
        "From the guard came the thief who with the king was presented to the doctor there.",
        0.5,
    ),
    "negation": (
        ("yes", "yes", "no", "no"),
        "At the village there is a saddle and a violin and no pillow and no pipe here.",
        "A saddle or a violin is there, no pillow or no pipe is there, at the village too.",
        "A saddle or no violin is there, a pillow or no pipe is there, at the village too.",
        0.5,
    ),
    "number": (
        ("nine", "seven", "forty", "million"),
        "There are nine nails and seven maps and forty birds and million gloves at the castle here.",
        "At the castle nails are nine and maps seven while birds are forty and gloves million in all.",
        "At the castle nails are nine and maps seven while birds are million and gloves forty in all.",
        0.5,
    ),
    "swap": (
        ("Arthur", "Mary", "Ruth", "Edward"),
        "Arthur has a pillow and Mary a book while Ruth has a saddle and Edward a cup too.",
        "A pillow is from Arthur and a book from Mary while a saddle is from Ruth and a cup from Edward here.",
        "A pillow is from Arthur and a book from Mary while a saddle is from Edward and a cup from Ruth here.",
        0.5,
    ),
    "early": (
        ("village", "spoon", "pale", "lay"),
        "A pale spoon lay near the village.",
        "By the village the spoon lay, and it was pale. About the letter nothing was long. About the hearing nothing "
        "was formal. Then the private hearing went to the minister.",
        "By the library the bucket arrived, and it was sharp. About the letter nothing was long. About the hearing "
        "nothing was formal. Then the private hearing went to the minister.",
        0.0,
    ),
    "late": (
        ("hospital", "pipe", "dark", "arrived"),
        "A dark pipe arrived near the hospital.",
        "Then the short journal went to the desk. Every letter had its own clear paper. Then the short record went to "
        "the minister. By the hospital the pipe arrived, and it was dark.",
        "Then the short journal went to the desk. Every letter had its own clear paper. Then the short record went to "
        "the minister. By the house the box stayed, and it was smooth.",
        0.0,
    ),
    "context": (
        ("yes", "yes", "no", "no"),
        "It was yes to Arthur and yes to Philip and no to Kate and no to Edward who escaped at the hospital here.",
        "Who escaped at the hospital then? For Arthur it is yes and for Philip yes and for Kate no and for Edward no "
        "too.",
        "Who escaped at the hospital then? For Arthur it is yes and for Philip no and for Kate yes and for Edward no "
        "too.",
        0.5,
    ),
    "tail": (
        ("pipe",),
        "A pipe lay at the school here.",
        "The pipe at the school lay first. Then the clear council went to the record. Every desk had its own clear "
        "journal. One record had been clear. The table also moved and the violin also shone there.",
        "The table at the school moved first. Then the clear council went to the record. Every desk had its own clear "
        "journal. One record had been clear. The pipe also lay and the violin also shone there.",
        0.0,
    ),
    "topic": (
        ("war",),
        "About invasion, enemy and attack.",
        "On the cannon, on the victory and on the army.",
        "On the championship, on the tennis and on the cricket.",
        0.0,
    ),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_hand_checked_items(name: str) -> None:
    group = next(MECHANISMS[name].groups("eval", "hand"))
    code, query, document, other, similarity = HAND[name]
    found = (group.codes[0], group.queries[0][0], group.documents[0][0], group.documents[1][0], group.similarity(0, 1))
    assert found == (code, query, document, other, similarity)


def test_predictions_name_every_mechanism_and_two_presets() -> None:
    predictions = tomllib.loads((ROOT / "studies" / "predictions.toml").read_text(encoding="utf-8"))
    predictions.pop("written")
    assert predictions.keys() == MECHANISMS.keys()
    for prediction in predictions.values():
        assert prediction["favoured"] != prediction["over"]
        assert {prediction["favoured"], prediction["over"]} <= {"m1", "m2", "m3", "m4", "m5"}
        assert prediction["bag_of_words"] in ("solves", "chance")
        assert len(prediction["why"]) > 30


def test_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(TaskError, match="did you mean 'demo/roles-sts'"):
        demo.task_data("demo/role-sts")


def test_generator_and_sentence() -> None:
    assert generator("a", 1).random() == generator("a", 1).random() != generator("a", 2).random()
    assert sentence("a old {x} , and it . then on".format(x="lamp")) == "An old lamp, and it. Then on."
    fact = FACT.eval_queries[0].format(q="red", x="ring", v="lay", p="river")
    assert sentence(fact) == "A red ring lay near the river."


def test_nano_is_small_and_loads_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo.nano_path()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_hidden_layers >= 6
    text = "The history of the city began in the early years of the century."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]).strip() == text
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        losses = [model(each, labels=each).loss.item() for each in (ids, shuffled)]
    assert losses[0] < 5 < losses[1]  # ln(6144) = 8.7 is chance; it knows English from a heap of words
