"""The authored vocabulary of the mechanism tasks, in two halves that share no content word.

`WORDS["train"]` is used by the training pairs and `WORDS["eval"]` by the tasks. Both use `FUNCTION_WORDS`: articles,
auxiliaries, prepositions, negators and ordinals, without which training could teach nothing about an evaluation text.
All words and sentences of this package were written for it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_FUNCTION = """
    a an the this that these those it its they them he she who whom whose which what one ones
    is was were be been being are has have had did does do
    and or but yet nor so as if than then when while because though
    yes not no never neither nobody nothing none without
    of in on at to from by for with about into near after before behind beside under over between
    only also too both each all every other others same there here still even just
    first second third last former latter
"""

Lists = dict[str, tuple[str, ...]]


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FUNCTION_WORDS = frozenset(_split(_FUNCTION))

_TRAIN: Lists = {
    "people": _split(
        "baker nurse judge farmer sailor painter lawyer singer hunter miller "
        "priest tailor soldier servant gardener stranger"
    ),
    "names": _split("Anna Peter Clara Henry Laura Simon Julia Martin Helen Oscar Emma Victor Alice Walter Nora Felix"),
    "transfers": _split("sent led introduced carried returned"),
    "deeds": _split("sang left won fell laughed slept waited worked"),
    "motions": _split("stood rested appeared burned vanished turned"),
    "things": _split("lamp chair clock kettle wagon mirror basket bottle carpet ladder drum flute candle blanket"),
    "plurals": _split("apples plates coins horses shirts bricks ropes eggs pens keys goats stamps"),
    "numbers": _split("two four six eight ten twelve twenty sixty"),
    "qualities": _split("old heavy broken clean wooden empty narrow bright cheap quiet green round dirty soft"),
    "places": _split("garden kitchen church market harbour station forest tower cellar bridge mill barn"),
    "papers": _split("report meeting form clerk office page committee notice"),
    "states": _split("late brief plain ready open usual final public"),
}

_EVAL: Lists = {
    "people": _split(
        "doctor teacher captain butcher driver poet merchant guard "
        "king queen actor pilot shepherd widow thief neighbour"
    ),
    "names": _split("Mary Thomas Rose George Susan Robert Jane Edward Kate Philip Ruth Albert Lucy Arthur Grace Hugh"),
    "transfers": _split("brought recommended presented delivered guided"),
    "deeds": _split("danced smiled lost spoke cried escaped wrote swam"),
    "motions": _split("lay stayed moved arrived shone disappeared"),
    "things": _split("table box bell sword book ring hat pipe cup spoon violin saddle pillow bucket"),
    "plurals": _split("stones bowls sheep boats letters chairs nails trees gloves maps birds jars"),
    "numbers": _split("three hundred seven million five thousand nine forty"),
    "qualities": _split("small dark new warm strong black dry wide sharp rich red smooth thick pale"),
    "places": _split("house river school hospital castle theatre island valley village prison library farm"),
    "papers": _split("letter council paper desk record journal minister hearing"),
    "states": _split("early long clear simple common private formal short"),
}

WORDS: dict[str, Lists] = {"train": _TRAIN, "eval": _EVAL}

# Twelve words per topic; a text takes three, and two texts of one topic in the same task never share a word.
TOPICS: dict[str, Lists] = {
    "train": {
        "cooking": _split("butter soup oven flour sugar dinner bread cheese sauce boil roast recipe"),
        "sea": _split("ship ocean wave coast sail anchor storm deck pirate shore voyage tide"),
        "law": _split("court trial crime guilty witness jury sentence police arrest appeal murder attorney"),
        "music": _split("song guitar album piano band concert orchestra melody choir rhythm lyrics tune"),
        "family": _split("mother father son daughter brother sister uncle wife husband cousin child parents"),
        "weather": _split("rain snow wind cloud thunder frost fog sunshine hail breeze ice drought"),
        "clothes": _split("coat dress shoes trousers sleeve collar silk boots jacket wool skirt button"),
        "school": _split("pupil lesson exam classroom homework college grammar lecture essay degree student diploma"),
    },
    "eval": {
        "war": _split("army battle troops cannon enemy regiment attack siege victory rifle invasion surrender"),
        "sport": _split("football league goal championship coach player season cricket tennis score stadium team"),
        "medicine": _split("disease fever patient surgeon medicine wound cure illness pain infection drug clinic"),
        "religion": _split("god bible prayer bishop holy christian saint worship faith temple monk gospel"),
        "money": _split("bank price tax debt purchase loan profit wages budget gold trade investment"),
        "government": _split(
            "president election parliament senate vote party governor law congress reform mayor treaty"
        ),
        "body": _split("arm leg shoulder finger knee throat chest elbow skin bone foot neck"),
        "railway": _split(
            "train track locomotive passenger tunnel freight engine platform signal carriage junction rail"
        ),
    },
}


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
    """A generator that depends on `key` alone: Python seeds it by SHA-512 of the string, not by the salted hash."""
    return random.Random("/".join(str(part) for part in key))


class Picker:
    """Draws words of one split: `pick("things", 3)` gives three different ones.

    `pinned` categories always give the same words in the same order, so that a meaning keeps its name from group to
    group and can be a class label. `most` is the largest number of meanings of a group that will be used.
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
    """Remove spaces before punctuation, capitalise sentences, add a full stop."""
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
    """The group in which meaning `i` fills the templates of the split with `fields(i)`."""
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


SENTENCES = {"train": 1, "eval": 3}  # neutral sentences per padding: long in the tasks, short in training to save time


def filler(picker: Picker) -> str:
    """Neutral sentences, joined by full stops."""
    templates = FILLER.side(picker.split, "documents")
    lines = []
    for _ in range(SENTENCES[picker.split]):
        first, second = picker.rng.sample(WORDS[picker.split]["papers"], 2)
        state = picker.rng.choice(WORDS[picker.split]["states"])
        lines.append(picker.rng.choice(templates).format(p=first, q=second, s=state))
    return " . ".join(lines)


def unique(groups: Iterator[Group], count: int) -> list[Group]:
    """The first `count` groups with no document seen before.

    Raises ValueError if the vocabulary has fewer, after 50 draws per group without success.
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
                raise ValueError(f"the vocabulary gives {len(found)} different groups, {count} are needed")
            continue
        seen |= texts
        found.append(group)
    return found
