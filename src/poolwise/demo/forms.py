"""Groups of meanings -> the records of STS, retrieval, classification and clustering tasks, and training pairs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from random import Random
from typing import Any

from poolwise.demo.grammar import Group, generator, unique
from poolwise.demo.mechanisms import MECHANISMS, Mechanism

SEED = 2025  # of every evaluation task: the tasks are fixed, only training varies

# Items of each form. `sts`: pairs. `retrieval`: groups in the corpus, meanings of each that are asked for, in two
# wordings. `classification`: training and test texts. `clustering`: sets.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "overlap": {"sts": (80,), "retrieval": (12, 3), "classification": (32, 40), "clustering": (3,)},
    "roles": {"sts": (80,), "retrieval": (3, 10), "classification": (32, 40), "clustering": (2,)},
    "negation": {"sts": (80,), "retrieval": (8, 5), "classification": (32, 40)},
    "number": {"sts": (80,), "retrieval": (3, 10), "classification": (32, 40), "clustering": (2,)},
    "swap": {"sts": (80,), "retrieval": (3, 10), "classification": (32, 40), "clustering": (2,)},
    "early": {"sts": (60,), "retrieval": (10, 3), "classification": (32, 40), "clustering": (3,)},
    "late": {"sts": (60,), "retrieval": (10, 3), "classification": (32, 40), "clustering": (3,)},
    "context": {"sts": (80,), "retrieval": (8, 5), "classification": (32, 40)},
    "tail": {"sts": (80,), "retrieval": (10, 3), "classification": (30, 60)},
    "topic": {"sts": (80,), "retrieval": (3, 8), "classification": (64, 64), "clustering": (3,)},
}


def item_count(name: str, kind: str) -> int:
    """Items of one task: pairs, meanings asked for, test examples or sets (`poolwise.verdicts.mechanism_items`)."""
    sizes = SIZES[name][kind]
    return sizes[0] * sizes[1] if kind == "retrieval" else sizes[-1]


def records(name: str, kind: str) -> dict[str, list[dict[str, Any]]]:
    """The records of one task in the layout of `poolwise.reading.folders.TaskData`."""
    forms: dict[str, Callable[..., dict[str, list[dict[str, Any]]]]] = {
        "sts": _sts,
        "retrieval": _retrieval,
        "classification": _classification,
        "clustering": _clustering,
    }
    return forms[kind](MECHANISMS[name], *SIZES[name][kind])


def _sts(mechanism: Mechanism, pairs: int) -> dict[str, list[dict[str, Any]]]:
    """Query and document of the same meaning, and of another one of the same group, in turn."""
    rng = generator("sts", mechanism.name, SEED)
    rows = []
    for number, group in enumerate(islice(mechanism.groups("eval", "sts", SEED, most=2), pairs)):
        first = rng.randrange(len(group.codes))
        others = [i for i in range(len(group.codes)) if i != first]
        second = first if number % 2 == 0 else rng.choice(others)
        row = {"sentence1": rng.choice(group.queries[first]), "sentence2": rng.choice(group.documents[second])}
        rows.append({**row, "score": round(group.similarity(first, second), 4)})
    return {"test": rows}


def _retrieval(mechanism: Mechanism, groups: int, per_group: int) -> dict[str, list[dict[str, Any]]]:
    """Every meaning of every group is a document; `per_group` meanings of each group are asked for.

    A topic has many texts, all of them relevant to each of its queries; elsewhere one document has the meaning.
    """
    rng = generator("retrieval", mechanism.name, SEED)
    shared = mechanism.name == "topic"
    corpus: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []
    holders: dict[str, list[str]] = {}
    asked: dict[str, str] = {}
    for number, group in enumerate(unique(mechanism.groups("eval", "retrieval", SEED, pinned=shared), groups)):
        chosen = rng.sample(range(len(group.codes)), per_group)
        for i, code in enumerate(group.codes):
            meaning = "/".join(code) if shared else f"{number}-{i}"
            for text in group.documents[i] if shared else [rng.choice(group.documents[i])]:
                holders.setdefault(meaning, []).append(f"d{len(corpus)}")
                corpus.append({"_id": f"d{len(corpus)}", "title": "", "text": text})
            for text in group.queries[i] if i in chosen else ():
                asked[f"q{len(queries)}"] = meaning
                queries.append({"_id": f"q{len(queries)}", "text": text})
    qrels = [
        {"query-id": query, "corpus-id": document, "score": 1}
        for query, meaning in asked.items()
        for document in holders[meaning]
    ]
    rng.shuffle(corpus)
    return {"corpus": corpus, "queries": queries, "qrels": qrels}


def _classification(mechanism: Mechanism, train: int, test: int) -> dict[str, list[dict[str, Any]]]:
    """Texts with their classes, as even as can be: the pinned words make a meaning a class.

    No test text is a training text. Topics are trained on the query side's words and tested on the document side's.
    """
    sizes = {"train": train, "test": test}
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in sizes}
    seen: set[str] = set()
    labels: dict[str, int] = {}
    for side, count in sizes.items():
        rng = generator("classification", mechanism.name, side, SEED)
        for group in mechanism.groups("eval", "classification", side, SEED, pinned=True):
            wordings = group.queries if mechanism.name == "topic" and side == "train" else group.documents
            order = rng.sample(range(len(group.codes)), len(group.codes))
            for name in sorted({code[mechanism.label] for code in group.codes}):
                i = next(i for i in order if group.codes[i][mechanism.label] == name)
                text = rng.choice(wordings[i])
                if side == "test" and text in seen:
                    continue
                seen.add(text)
                rows[side].append({"text": text, "label": labels.setdefault(name, len(labels))})
            if len(rows[side]) >= count:
                break
        del rows[side][count:]
    return rows


def _clustering(mechanism: Mechanism, sets: int) -> dict[str, list[dict[str, Any]]]:
    """Each set holds every wording of up to eight meanings of one group; the meaning is the cluster."""
    rng = generator("clustering", mechanism.name, SEED)
    rows = []
    for group in unique(mechanism.groups("eval", "clustering", SEED, most=8), sets):
        items = [
            (text, "/".join(code))
            for code, queries, documents in zip(group.codes, group.queries, group.documents, strict=True)
            for text in (documents if len(documents) > len(queries) else (*queries, *documents))
        ]
        rng.shuffle(items)
        rows.append({"sentences": [text for text, _ in items], "labels": [label for _, label in items]})
    return {"test": rows}


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` training rows for each mechanism, mechanisms in turn, from the training halves alone.

    The negative is another meaning of the same group: the same words where the mechanism is about their binding.
    """
    rng = generator("pairs", seed)
    streams = {name: mechanism.groups("train", "pairs", seed, most=2) for name, mechanism in MECHANISMS.items()}
    rows = []
    for _ in range(count):
        for name, stream in streams.items():
            rows.append({**_pair(next(stream), rng), "mechanism": name})
    return rows


def _pair(group: Group, rng: Random) -> dict[str, Any]:
    meaning, other = rng.sample(range(len(group.codes)), 2)
    return {
        "query": rng.choice(group.queries[meaning]),
        "positive": rng.choice(group.documents[meaning]),
        "negatives": [rng.choice(group.documents[other])],
    }
