"""The ten mechanisms: what each plants, as a function that yields groups of confusable meanings.

In `roles`, `negation`, `number`, `swap`, `context` and `tail` the meanings of a group have the same words in every
wording, only bound differently: a bag of words cannot tell them apart. `topic` shares no content word between texts
that belong together. `overlap`, `early` and `late` can be solved by shared words; they ask how well a vector keeps
them, in a short text and with neutral sentences after or before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from poolwise.demo.grammar import Group, Picker, Split, Templates, build, filler, generator, sentence, write
from poolwise.demo.templates import CONTEXT, FACT, NEGATION, NUMBER, ROLES, SWAP, TAIL, TOPIC
from poolwise.demo.words import TOPICS


@dataclass(frozen=True)
class Mechanism:
    """One planted property.

    pinned: the word categories held fixed where a meaning is a class label.
    label: the slot of a meaning's code that is the class.
    """

    name: str
    plants: str
    templates: Templates
    make: Callable[[Picker], Group]
    pinned: tuple[str, ...]
    label: int = 0

    def groups(self, split: Split, *key: object, pinned: bool = False, most: int = 24) -> Iterator[Group]:
        """An endless stream of groups, a function of the arguments alone; `most` bounds the meanings of a group."""
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
    """Four unrelated facts; each document wording stands beside two different paddings of neutral sentences."""
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

    marks: for each marker field of the templates, what it says of a thing that is meant and of one that is not. A
    field name is a letter for the kind of mark and the slot, `m0` to `m3`.
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
    """Four names; in the documents the word that says whether a name is meant comes after it."""
    names, (deed,), (place,) = picker.pick("names", 4), picker.pick("deeds", 1), picker.pick("places", 1)
    fixed = dict(zip("xyzw", names, strict=True), v=deed, p=place)
    return _marked(picker, CONTEXT, {"m": ("yes", "no")}, fixed)


def tail(picker: Picker) -> Group:
    """Three facts; the first is what the text is about, the others trail behind it in neutral sentences."""
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
    """Every topic of the split, its twelve words dealt out over two queries and two documents."""
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
