"""From a planted meaning to sentences: splits, seeded choice, templates and the groups that mechanisms are made of.

A `Group` is a handful of meanings that are easily taken for one another, each written out several times on two sides
(query and document). Everything downstream, training pairs and all task forms, is made from groups, so a mechanism
is one function that yields them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from poolwise.demo.words import WORDS

Split = Literal["train", "eval"]
Side = Literal["queries", "documents"]
SIDES: tuple[Side, Side] = ("queries", "documents")


@dataclass(frozen=True)
class Group:
    """Confusable meanings and their wordings.

    codes: one tuple of slot values for each meaning; two meanings are as similar as their share of equal slots.
    queries, documents: for each meaning its wordings on that side, from different templates.
    """

    codes: tuple[tuple[str, ...], ...]
    queries: tuple[tuple[str, ...], ...]
    documents: tuple[tuple[str, ...], ...]

    def similarity(self, first: int, second: int) -> float:
        """Share of equal slots of two meanings, 0 to 1."""
        pairs = list(zip(self.codes[first], self.codes[second], strict=True))
        return sum(a == b for a, b in pairs) / len(pairs)


@dataclass(frozen=True)
class Templates:
    """Templates by split and side; no template of one split occurs in the other."""

    train_queries: tuple[str, ...]
    train_documents: tuple[str, ...]
    eval_queries: tuple[str, ...]
    eval_documents: tuple[str, ...]

    def side(self, split: Split, side: Side) -> tuple[str, ...]:
        """The templates of one split and side."""
        templates: tuple[str, ...] = getattr(self, f"{split}_{side}")
        return templates


def generator(*key: object) -> random.Random:
    """A generator that depends on `key` alone: string seeds are hashed by SHA-512, not by Python's salted hash."""
    return random.Random("/".join(str(part) for part in key))


class Picker:
    """Draws words of one split: `pick("things", 3)` gives three different ones.

    `pinned` categories always give the same words in the same order, so that a meaning keeps its name from group to
    group and can be a class label. `most` is the largest number of meanings that anybody will look at.
    """

    def __init__(self, split: Split, rng: random.Random, pinned: Sequence[str] = (), most: int = 24):
        self.split: Split = split
        self.rng = rng
        self.pinned = frozenset(pinned)
        self.most = most

    def pick(self, category: str, count: int) -> list[str]:
        """`count` different words of a category."""
        words = WORDS[self.split][category]
        return list(words[:count]) if category in self.pinned else self.rng.sample(words, count)


def sentence(text: str) -> str:
    """Spaces before punctuation out, first letters up, a full stop at the end."""
    text = re.sub(r"\s+([,.;:?])", r"\1", " ".join(text.split()))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    text = re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    return text if text.endswith((".", "?")) else text + "."


def write(templates: Sequence[str], **fields: str) -> tuple[str, ...]:
    """Each template with its fields filled in, as a sentence."""
    return tuple(sentence(template.format(**fields)) for template in templates)


def build(
    codes: Sequence[tuple[str, ...]], templates: Templates, split: Split, fields: Callable[[int], Mapping[str, str]]
) -> Group:
    """The group whose meaning `i` fills the templates of the split with `fields(i)`."""
    rows = range(len(codes))
    queries, documents = (templates.side(split, side) for side in SIDES)
    return Group(
        tuple(codes),
        tuple(write(queries, **fields(i)) for i in rows),
        tuple(write(documents, **fields(i)) for i in rows),
    )


FILLER = Templates(
    train_queries=(),
    train_documents=(
        "the {p} was {s}",
        "as for the {p} , it was {s}",
        "there was a {p} , and it was {s}",
        "a {s} {p} was with the other {q}",
    ),
    eval_queries=(),
    eval_documents=(
        "one {p} had been {s}",
        "about the {p} nothing was {s}",
        "every {p} had its own {s} {q}",
        "then the {s} {p} went to the {q}",
    ),
)


SENTENCES = {"train": 1, "eval": 3}  # neutral sentences a padding: long where it counts, short where it costs


def filler(picker: Picker) -> str:
    """Sentences that say nothing of note, joined by full stops."""
    templates = FILLER.side(picker.split, "documents")
    lines = []
    for _ in range(SENTENCES[picker.split]):
        first, second = picker.rng.sample(WORDS[picker.split]["papers"], 2)
        state = picker.rng.choice(WORDS[picker.split]["states"])
        lines.append(picker.rng.choice(templates).format(p=first, q=second, s=state))
    return " . ".join(lines)


def unique(groups: Iterator[Group], count: int) -> list[Group]:
    """The first `count` groups with no document seen before.

    Raises ValueError where the vocabulary gives fewer (after 50 draws in vain for one group).
    """
    found: list[Group] = []
    seen: set[str] = set()
    misses = 0
    while len(found) < count:
        group = next(groups)
        texts = {text for wordings in group.documents for text in wordings}
        if texts & seen:
            misses += 1
            if misses > 50 * count:
                raise ValueError(f"the vocabulary gives {len(found)} different groups, {count} were asked for")
            continue
        seen |= texts
        found.append(group)
    return found
