"""The ten mechanisms: the property that each plants, and the task records and training pairs generated from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, permutations
from random import Random
from typing import Any

from poolwise.demo.grammar import (
    CONTEXT,
    FACT,
    NEGATION,
    NUMBER,
    ROLES,
    SWAP,
    TAIL,
    TOPIC,
    TOPICS,
    Group,
    Picker,
    Split,
    Templates,
    build,
    filler,
    generator,
    sentence,
    unique,
    write,
)


@dataclass(frozen=True)
class Mechanism:
    """One planted property.

    pinned: the word categories that are fixed when a meaning is a class label.
    label: the slot of a meaning's code that is the class.
    """

    name: str
    plants: str
    templates: Templates
    make: Callable[[Picker], Group]
    pinned: tuple[str, ...]
    label: int = 0

    def groups(self, split: Split, *key: object, pinned: bool = False, most: int = 24) -> Iterator[Group]:
        """An endless stream of groups that depends on the arguments alone; a group has at most `most` meanings."""
        rng = generator(self.name, split, pinned, *key)
        while True:
            yield self.make(Picker(split, rng, self.pinned if pinned else (), most))


def _facts(picker: Picker, count: int) -> tuple[list[tuple[str, ...]], list[dict[str, str]]]:
    """Unrelated facts (place, thing, quality, motion): their codes and template fields."""
    slots = [picker.pick(category, count) for category in ("places", "things", "qualities", "motions")]
    codes = list(zip(*slots, strict=True))
    return codes, [dict(zip("pxqv", code, strict=True)) for code in codes]


def overlap(picker: Picker) -> Group:
    """Five facts: one, and four that keep three, two, one and none of its words."""
    codes, _ = _facts(picker, 2)
    order = picker.rng.sample(range(4), 4)
    rows = [tuple(codes[int(slot in order[:k])][slot] for slot in range(4)) for k in range(5)]
    return build(rows, FACT, picker.split, lambda i: dict(zip("pxqv", rows[i], strict=True)))


def _padded(picker: Picker, place: str) -> Group:
    """Four unrelated facts; each document wording is combined with two different paddings of neutral sentences."""
    codes, fields = _facts(picker, 4)
    group = build(codes, FACT, picker.split, lambda i: fields[i])
    paddings = [sentence(filler(picker)) for _ in range(2)]
    documents = tuple(
        tuple(f"{text} {pad}" if place == "first" else f"{pad} {text}" for text in wordings for pad in paddings)
        for wordings in group.documents
    )
    return Group(group.codes, group.queries, documents)


def early(picker: Picker) -> Group:
    """Four unrelated facts; in the documents neutral sentences follow each."""
    return _padded(picker, "first")


def late(picker: Picker) -> Group:
    """As `early`, with the neutral sentences before the fact."""
    return _padded(picker, "last")


def _arrangements(picker: Picker, templates: Templates, values: Sequence[str], fixed: Mapping[str, str]) -> Group:
    """Orders of `values` over the slots a, b, c, d of a template, all 24 or `most` of them."""
    codes = list(permutations(values))
    if picker.most < len(codes):
        codes = picker.rng.sample(codes, picker.most)
    return build(codes, templates, picker.split, lambda i: {**fixed, **dict(zip("abcd", codes[i], strict=True))})


def roles(picker: Picker) -> Group:
    """Who sent whom with whom to whom: four people in all orders."""
    people, (verb,) = picker.pick("people", 4), picker.pick("transfers", 1)
    return _arrangements(picker, ROLES, people, {"v": verb})


def number(picker: Picker) -> Group:
    """How many of what: four numbers over four kinds of things."""
    numbers, plurals, (place,) = picker.pick("numbers", 4), picker.pick("plurals", 4), picker.pick("places", 1)
    return _arrangements(picker, NUMBER, numbers, dict(zip("xyzw", plurals, strict=True), p=place))


def swap(picker: Picker) -> Group:
    """Whose is what: four names over four things."""
    names, things = picker.pick("names", 4), picker.pick("things", 4)
    return _arrangements(picker, SWAP, names, dict(zip("xyzw", things, strict=True)))


def _marked(
    picker: Picker, templates: Templates, marks: Mapping[str, tuple[str, str]], fixed: Mapping[str, str]
) -> Group:
    """Four things, two of which are marked: all six choices.

    marks: for each kind of marker, its word for a thing that is meant and for one that is not. The field of a template
    is the letter of the kind and the slot, `m0` to `m3`.
    """
    chosen = [frozenset(pair) for pair in combinations(range(4), 2)]
    codes = [tuple("yes" if slot in pair else "no" for slot in range(4)) for pair in chosen]

    def fields(i: int) -> dict[str, str]:
        filled = {f"{kind}{slot}": words[slot not in chosen[i]] for kind, words in marks.items() for slot in range(4)}
        return {**fixed, **filled}

    return build(codes, templates, picker.split, fields)


def negation(picker: Picker) -> Group:
    """Four things in a place, two of them denied."""
    things, (place,) = picker.pick("things", 4), picker.pick("places", 1)
    marks = {"m": ("a", "no"), "n": ("there", "not")}
    return _marked(picker, NEGATION, marks, dict(zip("xyzw", things, strict=True), p=place))


def context(picker: Picker) -> Group:
    """Four names; in the documents, the word that decides whether a name is meant follows it."""
    names, (deed,), (place,) = picker.pick("names", 4), picker.pick("deeds", 1), picker.pick("places", 1)
    fixed = dict(zip("xyzw", names, strict=True), v=deed, p=place)
    return _marked(picker, CONTEXT, {"m": ("yes", "no")}, fixed)


def tail(picker: Picker) -> Group:
    """Three facts; the first is what the text is about, the others follow it among neutral sentences."""
    things, motions, (place,) = picker.pick("things", 3), picker.pick("motions", 3), picker.pick("places", 1)
    padding = filler(picker)

    def fields(i: int) -> dict[str, str]:
        order = [i, *(j for j in range(3) if j != i)]
        return {
            **dict(zip("abc", (things[j] for j in order), strict=True)),
            **dict(zip("uvw", (motions[j] for j in order), strict=True)),
            "p": place,
            "f": padding,
        }

    return build([(thing,) for thing in things], TAIL, picker.split, fields)


def topic(picker: Picker) -> Group:
    """Every topic of the split, its twelve words distributed over two queries and two documents."""
    topics = TOPICS[picker.split]

    def texts(templates: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
        triples = [dict(zip("abc", words[start : start + 3], strict=True)) for start in (0, 3)]
        return tuple(write([template], **triple)[0] for template, triple in zip(templates, triples, strict=True))

    queries, documents = [], []
    for words in topics.values():
        if "topics" in picker.pinned:  # the same six words on the query side in every group
            dealt = [*picker.rng.sample(words[:6], 6), *picker.rng.sample(words[6:], 6)]
        else:
            dealt = picker.rng.sample(words, 12)
        queries.append(texts(TOPIC.side(picker.split, "queries"), dealt[:6]))
        documents.append(texts(TOPIC.side(picker.split, "documents"), dealt[6:]))
    return Group(tuple((name,) for name in topics), tuple(queries), tuple(documents))


MECHANISMS: dict[str, Mechanism] = {
    mechanism.name: mechanism
    for mechanism in (
        Mechanism("overlap", "shared words, graded", FACT, overlap, ("places",)),
        Mechanism("roles", "who did what to whom", ROLES, roles, ("people",)),
        Mechanism("negation", "which quality is denied", NEGATION, negation, ("things",)),
        Mechanism("number", "how many of what", NUMBER, number, ("numbers", "plurals")),
        Mechanism("swap", "whose is what", SWAP, swap, ("names",)),
        Mechanism("early", "a fact before neutral sentences", FACT, early, ("places",)),
        Mechanism("late", "a fact after neutral sentences", FACT, late, ("places",)),
        Mechanism("context", "a later word says which name is meant", CONTEXT, context, ("names",)),
        Mechanism("tail", "the first of three facts, with a long tail", TAIL, tail, ("things",)),
        Mechanism("topic", "one topic, no shared content word", TOPIC, topic, ("topics",)),
    )
}


SEED = 2025  # of every evaluation task: the tasks are fixed, only training varies

# Sizes of each form. `sts`: pairs. `retrieval`: groups in the corpus, meanings of each that are searched for, in two
# wordings. `classification`: training and test texts.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "overlap": {"sts": (200,), "retrieval": (12, 3), "classification": (32, 80)},
    "roles": {"sts": (200,), "retrieval": (3, 10), "classification": (32, 80)},
    "negation": {"sts": (200,), "retrieval": (8, 5), "classification": (32, 80)},
    "number": {"sts": (200,), "retrieval": (3, 10), "classification": (32, 80)},
    "swap": {"sts": (200,), "retrieval": (3, 10), "classification": (32, 80)},
    "early": {"sts": (200,), "retrieval": (10, 3), "classification": (32, 80)},
    "late": {"sts": (200,), "retrieval": (10, 3), "classification": (32, 80)},
    "context": {"sts": (200,), "retrieval": (8, 5), "classification": (32, 80)},
    "tail": {"sts": (200,), "retrieval": (10, 3), "classification": (30, 90)},
    "topic": {"sts": (200,), "retrieval": (3, 8), "classification": (64, 96)},
}


def item_count(name: str, kind: str) -> int:
    """Items of one task: pairs, meanings searched for, or test examples (see `poolwise.verdicts.arms`)."""
    sizes = SIZES[name][kind]
    return sizes[0] * sizes[1] if kind == "retrieval" else sizes[-1]


def records(name: str, kind: str) -> dict[str, list[dict[str, Any]]]:
    """The records of one task in the layout of `poolwise.data.own_tasks.TaskData`."""
    forms: dict[str, Callable[..., dict[str, list[dict[str, Any]]]]] = {
        "sts": _sts,
        "retrieval": _retrieval,
        "classification": _classification,
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
    """Every meaning of every group is a document; `per_group` meanings of each group have queries.

    A topic has many texts, all of them relevant to each of its queries; otherwise one document has the meaning.
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
    """Texts with their classes, as balanced as possible: a pinned word makes a meaning a class.

    No test text is a training text. Topics are trained on words of the query side and tested on the document side's.
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


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` training rows for each mechanism, mechanisms in turn, from the training halves alone.

    The negative is another meaning of the same group: the same words, if the mechanism is about how they are bound.
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
