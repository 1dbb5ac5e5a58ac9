"""The ten mechanisms: what each plants, as a function that yields groups of confusable meanings.

In `roles`, `negation`, `number`, `swap`, `context` and `tail` the meanings of a group have the same words in every
wording, only bound differently: a bag of words cannot tell them apart. `topic` shares no content word between texts
that belong together. `overlap`, `early` and `late` can be solved by shared words; they ask how well a vector keeps
them, in a short text and with neutral sentences after or before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from poolwise.demo.grammar import Group, Picker, Split, Templates, build, filler, generator, sentence
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

    def groups(self, split: Split, *key: object, pinned: bool = False) -> Iterator[Group]:
        """An endless stream of groups, a function of split and key alone."""
        rng = generator(self.name, split, pinned, *key)
        while True:
            yield self.make(Picker(split, rng, self.pinned if pinned else ()))


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
    codes, fields = _facts(picker, 4)
    group = build(codes, FACT, picker.split, lambda i: fields[i])
    padding = sentence(filler(picker, 6))
    documents = tuple(
        tuple(f"{text} {padding}" if place == "first" else f"{padding} {text}" for text in wordings)
        for wordings in group.documents
    )
    return Group(group.codes, group.queries, documents)


def early(picker: Picker) -> Group:
    """Four unrelated facts; in the documents each is followed by the same six neutral sentences."""
    return _padded(picker, "first")


def late(picker: Picker) -> Group:
    """As `early`, with the neutral sentences before the fact."""
    return _padded(picker, "last")


def _arrangements(
    picker: Picker, templates: Templates, values: Sequence[str], fields: Callable[[Sequence[str]], Mapping[str, str]]
) -> Group:
    """All orders of `values` over the slots of a template: the same words, bound differently."""
    codes = list(permutations(values))
    return build(codes, templates, picker.split, lambda i: fields(codes[i]))


ROLES = Templates(
    train_queries=("the {a} {v} the {b} to the {c}", "it was the {a} who {v} the {b} to the {c}"),
    train_documents=("the {b} was {v} to the {c} by the {a}", "to the {c} the {b} had been {v} by the {a}"),
    eval_queries=("here the {a} {v} the {b} to the {c}", "the {a} is the one who {v} the {b} to the {c}"),
    eval_documents=("the {b} , {v} by the {a} , came to the {c}", "by the {a} the {b} has been {v} to the {c}"),
)


def roles(picker: Picker) -> Group:
    """Who sent whom to whom: three people in all six orders."""
    people, (verb,) = picker.pick("people", 3), picker.pick("transfers", 1)
    return _arrangements(picker, ROLES, people, lambda code: dict(zip("abc", code, strict=True), v=verb))


NEGATION = Templates(
    train_queries=("the {x} is {a} and {b} but not {c}", "not {c} is the {x} , but {a} and {b}"),
    train_documents=("being {a} and {b} , the {x} was never {c}", "no {c} {x} was it ; it was {a} and {b}"),
    eval_queries=("{a} and {b} is the {x} , yet not {c}", "this {x} has never been {c} ; it has been {a} and {b}"),
    eval_documents=("it is not a {c} {x} , it is a {a} , {b} one", "the {x} does not have to be {c} , being {a} and {b}"),
)


def negation(picker: Picker) -> Group:
    """Three qualities of a thing, one of them denied."""
    qualities, (thing,) = picker.pick("qualities", 3), picker.pick("things", 1)
    codes = [(denied,) for denied in qualities]

    def fields(i: int) -> dict[str, str]:
        first, second = (quality for quality in qualities if quality != qualities[i])
        return {"x": thing, "a": first, "b": second, "c": qualities[i]}

    return build(codes, NEGATION, picker.split, fields)


NUMBER = Templates(
    train_queries=("the {p} had {a} {x} , {b} {y} and {c} {z}", "{a} {x} , {b} {y} and {c} {z} were in the {p}"),
    train_documents=("in the {p} the {x} were {a} , the {y} {b} , the {z} {c}", "{p} : {x} {a} ; {y} {b} ; {z} {c}"),
    eval_queries=("there are {a} {x} , {b} {y} and {c} {z} at the {p}", "the {p} has {a} {x} , {b} {y} , {c} {z}"),
    eval_documents=("of the {p} : {x} ( {a} ) , {y} ( {b} ) , {z} ( {c} )", "at the {p} {x} are {a} , {y} {b} and {z} {c}"),
)


def number(picker: Picker) -> Group:
    """How many of what: three numbers over three kinds of things."""
    numbers, plurals, (place,) = picker.pick("numbers", 3), picker.pick("plurals", 3), picker.pick("places", 1)
    fixed = dict(zip("xyz", plurals, strict=True), p=place)
    return _arrangements(picker, NUMBER, numbers, lambda code: {**dict(zip("abc", code, strict=True)), **fixed})


SWAP = Templates(
    train_queries=("{a} had the {x} , {b} the {y} and {c} the {z}", "with {a} was the {x} , with {b} the {y} , with {c} the {z}"),
    train_documents=("the {x} was for {a} , the {y} for {b} , the {z} for {c}", "the {x} of {a} , the {y} of {b} and the {z} of {c}"),
    eval_queries=("{a} has a {x} , {b} a {y} , {c} a {z}", "here is {a} with the {x} , {b} with the {y} and {c} with the {z}"),
    eval_documents=("a {x} is from {a} , a {y} from {b} , a {z} from {c}", "to the {x} came {a} , to the {y} {b} and to the {z} {c}"),
)


def swap(picker: Picker) -> Group:
    """Whose is what: three names over three things."""
    names, things = picker.pick("names", 3), picker.pick("things", 3)
    fixed = dict(zip("xyz", things, strict=True))
    return _arrangements(picker, SWAP, names, lambda code: {**dict(zip("abc", code, strict=True)), **fixed})


CONTEXT = Templates(
    train_queries=("only {a} {v} in the {p}", "it was {a} who {v} , in the {p}"),
    train_documents=("{x} , {y} and {z} were in the {p} , and the {o} one {v}", "{x} , {y} , {z} : the {o} of them {v} in the {p}"),
    eval_queries=("{a} {v} at the {p}", "at the {p} {a} was the one who {v}"),
    eval_documents=("at the {p} there are {x} , {y} and {z} ; of these the {o} {v}", "of {x} , {y} and {z} the {o} {v} at the {p}"),
)


def context(picker: Picker) -> Group:
    """Three names, and only then the ordinal that says which of them is meant."""
    names, (deed,), (place,) = picker.pick("names", 3), picker.pick("deeds", 1), picker.pick("places", 1)
    picker.rng.shuffle(names)
    fixed = dict(zip("xyz", names, strict=True), v=deed, p=place)
    codes = [(name,) for name in names]
    return build(codes, CONTEXT, picker.split, lambda i: {**fixed, "a": names[i], "o": ("first", "second", "third")[i]})


TAIL = Templates(
    train_queries=("the {a} {u} in the {p}", "it was the {a} that {u} , in the {p}"),
    train_documents=(
        "in the {p} the {a} {u} . {f} . then there was a {b} that {v} and a {c} that {w}",
        "there {u} a {a} in the {p} . as for the {b} , it {v} , and the {c} {w} . {f}",
    ),
    eval_queries=("a {a} {u} at the {p}", "at the {p} {u} the {a}"),
    eval_documents=(
        "the {a} at the {p} {u} . {f} . the {b} also {v} , the {c} also {w}",
        "at the {p} a {a} {u} . while a {b} {v} , there {w} a {c} . {f}",
    ),
)


def tail(picker: Picker) -> Group:
    """Three facts; the first is what the text is about, the others trail behind it in neutral sentences."""
    things, motions, (place,) = picker.pick("things", 3), picker.pick("motions", 3), picker.pick("places", 1)
    padding = filler(picker, 3)

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
    sides: dict[str, list[tuple[str, ...]]] = {"queries": [], "documents": []}
    for words in topics.values():
        dealt = picker.rng.sample(words, 12)
        for number_of_side, (side, texts) in enumerate(sides.items()):
            templates = TOPIC.side(picker.split, side)
            texts.append(
                tuple(
                    sentence(template.format(**dict(zip("abc", dealt[start : start + 3], strict=True))))
                    for template, start in zip(templates, (6 * number_of_side, 6 * number_of_side + 3), strict=True)
                )
            )
    return Group(tuple((name,) for name in topics), tuple(sides["queries"]), tuple(sides["documents"]))


MECHANISMS: dict[str, Mechanism] = {
    mechanism.name: mechanism
    for mechanism in (
        Mechanism("overlap", "shared words, graded", FACT, overlap, ("places",)),
        Mechanism("roles", "who did what to whom", ROLES, roles, ("people",)),
        Mechanism("negation", "which quality is denied", NEGATION, negation, ("qualities",)),
        Mechanism("number", "how many of what", NUMBER, number, ("numbers", "plurals")),
        Mechanism("swap", "whose is what", SWAP, swap, ("names", "things")),
        Mechanism("early", "a fact before neutral sentences", FACT, early, ("places",)),
        Mechanism("late", "a fact after neutral sentences", FACT, late, ("places",)),
        Mechanism("context", "a later ordinal says which name is meant", CONTEXT, context, ("names",)),
        Mechanism("tail", "the first of three facts, with a long tail", TAIL, tail, ("things",)),
        Mechanism("topic", "one topic, no shared content word", TOPIC, topic, ()),
    )
}
