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


FACT = Templates(
    train_queries=("the {q} {x} {v} in the {p}", "in the {p} there {v} a {q} {x}"),
    train_documents=("it was in the {p} that the {x} {v} , {q} as it was", "the {x} that {v} in the {p} was {q}"),
    eval_queries=("a {q} {x} {v} near the {p}", "near the {p} {v} the {q} {x}"),
    eval_documents=("by the {p} the {x} {v} , and it was {q}", "there was one {q} {x} which {v} at the {p}"),
)


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


ROLES = Templates(
    train_queries=(
        "the {a} {v} the {b} with the {c} to the {d}",
        "it was the {a} who {v} the {b} with the {c} to the {d}",
    ),
    train_documents=(
        "so the {a} had {v} the {b} , with the {c} , to the {d}",
        "by the {a} was the {b} with the {c} {v} to the {d}",
    ),
    eval_queries=(
        "here the {a} {v} the {b} and with it the {c} to the {d} too",
        "the {a} is the one who {v} the {b} with the {c} to the {d} then",
    ),
    eval_documents=(
        "from the {a} came the {b} who with the {c} was {v} to the {d} there",
        "by the {a} the {b} and the {c} had been {v} to the {d} there",
    ),
)


def roles(picker: Picker) -> Group:
    """Who sent whom with whom to whom: four people in all orders."""
    people, (verb,) = picker.pick("people", 4), picker.pick("transfers", 1)
    return _arrangements(picker, ROLES, people, {"v": verb})


NUMBER = Templates(
    train_queries=(
        "the {p} had {a} {x} , {b} {y} , {c} {z} and {d} {w}",
        "{a} {x} , {b} {y} , {c} {z} and {d} {w} were in the {p}",
    ),
    train_documents=(
        "in the {p} the {x} were {a} , the {y} {b} , the {z} {c} , the {w} {d}",
        "{p} : {x} {a} ; {y} {b} ; {z} {c} ; {w} {d}",
    ),
    eval_queries=(
        "there are {a} {x} and {b} {y} and {c} {z} and {d} {w} at the {p} here",
        "the {p} has {a} {x} with {b} {y} and {c} {z} and {d} {w} in it",
    ),
    eval_documents=(
        "at the {p} {x} are {a} and {y} {b} while {z} are {c} and {w} {d} in all",
        "of {x} {a} and of {y} {b} and of {z} {c} and of {w} {d} are at the {p} there",
    ),
)


def number(picker: Picker) -> Group:
    """How many of what: four numbers over four kinds of things."""
    numbers, plurals, (place,) = picker.pick("numbers", 4), picker.pick("plurals", 4), picker.pick("places", 1)
    return _arrangements(picker, NUMBER, numbers, dict(zip("xyzw", plurals, strict=True), p=place))


SWAP = Templates(
    train_queries=(
        "{a} had the {x} , {b} the {y} , {c} the {z} and {d} the {w}",
        "with {a} was the {x} , with {b} the {y} , with {c} the {z} , with {d} the {w}",
    ),
    train_documents=(
        "the {x} was for {a} , the {y} for {b} , the {z} for {c} , the {w} for {d}",
        "the {x} of {a} , the {y} of {b} , the {z} of {c} and the {w} of {d}",
    ),
    eval_queries=(
        "{a} has a {x} and {b} a {y} while {c} has a {z} and {d} a {w} too",
        "here is {a} with the {x} and {b} with the {y} and {c} with the {z} and {d} with the {w} too",
    ),
    eval_documents=(
        "a {x} is from {a} and a {y} from {b} while a {z} is from {c} and a {w} from {d} here",
        "to the {x} came {a} and to the {y} {b} and to the {z} {c} and to the {w} {d} too",
    ),
)


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


NEGATION = Templates(
    train_queries=(
        "the {p} had {m0} {x} , {m1} {y} , {m2} {z} , {m3} {w}",
        "there was {m0} {x} , {m1} {y} , {m2} {z} , {m3} {w} in the {p}",
    ),
    train_documents=(
        "in the {p} , the {x} was {n0} , the {y} {n1} , the {z} {n2} , the {w} {n3}",
        "{m0} {x} and {m1} {y} were in the {p} , and {m2} {z} and {m3} {w}",
    ),
    eval_queries=(
        "at the {p} there is {m0} {x} and {m1} {y} and {m2} {z} and {m3} {w} here",
        "{m0} {x} and {m1} {y} has the {p} , and {m2} {z} and {m3} {w} too",
    ),
    eval_documents=(
        "{m0} {x} or {m1} {y} is there , {m2} {z} or {m3} {w} is there , at the {p} too",
        "of the {p} this is all , {m0} {x} and {m1} {y} , then {m2} {z} and {m3} {w} too",
    ),
)


def negation(picker: Picker) -> Group:
    """Four things in a place, two of them denied."""
    things, (place,) = picker.pick("things", 4), picker.pick("places", 1)
    marks = {"m": ("a", "no"), "n": ("there", "not")}
    return _marked(picker, NEGATION, marks, dict(zip("xyzw", things, strict=True), p=place))


CONTEXT = Templates(
    train_queries=(
        "who {v} in the {p} : {m0} {x} , {m1} {y} , {m2} {z} , {m3} {w}",
        "{m0} {x} , {m1} {y} , {m2} {z} and {m3} {w} {v} in the {p}",
    ),
    train_documents=(
        "{x} ? {m0} . {y} ? {m1} . {z} ? {m2} . {w} ? {m3} . so they {v} in the {p}",
        "in the {p} , as they {v} , {x} {m0} , {y} {m1} , {z} {m2} and {w} {m3}",
    ),
    eval_queries=(
        "it was {m0} to {x} and {m1} to {y} and {m2} to {z} and {m3} to {w} who {v} at the {p} here",
        "at the {p} they {v} and it is {m0} for {x} and {m1} for {y} and {m2} for {z} and {m3} for {w} too",
    ),
    eval_documents=(
        "who {v} at the {p} then ? for {x} it is {m0} and for {y} {m1} and for {z} {m2} and for {w} {m3} too",
        "if {x} {v} at the {p} then {m0} and if {y} then {m1} and if {z} then {m2} and if {w} then {m3} too",
    ),
)


def context(picker: Picker) -> Group:
    """Four names; in the documents the word that says whether a name is meant comes after it."""
    names, (deed,), (place,) = picker.pick("names", 4), picker.pick("deeds", 1), picker.pick("places", 1)
    fixed = dict(zip("xyzw", names, strict=True), v=deed, p=place)
    return _marked(picker, CONTEXT, {"m": ("yes", "no")}, fixed)


TAIL = Templates(
    train_queries=("the {a} {u} in the {p}", "it was the {a} that {u} , in the {p}"),
    train_documents=(
        "in the {p} the {a} {u} . {f} . then there was a {b} that {v} and a {c} that {w}",
        "there {u} a {a} in the {p} . as for the {b} , it {v} , and the {c} {w} . {f}",
    ),
    eval_queries=("a {a} {u} at the {p} here", "at the {p} there {u} the {a} too"),
    eval_documents=(
        "the {a} at the {p} {u} first . {f} . the {b} also {v} and the {c} also {w} there",
        "at the {p} a {a} {u} then . while a {b} {v} there the {c} {w} too . {f}",
    ),
)


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


TOPIC = Templates(
    train_queries=("of {a} , {b} and {c}", "with a {a} , a {b} and a {c}"),
    train_documents=("the {a} , the {b} and the {c}", "{a} and {b} , and then {c}"),
    eval_queries=("about {a} , {b} and {c}", "here {a} , there {b} , and {c}"),
    eval_documents=("on the {a} , on the {b} and on the {c}", "what of {a} , of {b} and of {c}"),
)


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
