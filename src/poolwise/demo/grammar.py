"""The authored vocabulary and templates of the mechanism tasks, in two halves that share no content word.

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


# The templates of each mechanism, by split and side. In evaluation templates no planted slot is next to punctuation,
# which would show its position to TF-IDF of characters within words. The function in `mechanisms` that fills a template
# explains its field letters.
FACT = Templates(
    train_queries=("the {q} {x} {v} in the {p}", "in the {p} there {v} a {q} {x}"),
    train_documents=("it was in the {p} that the {x} {v} , {q} as it was", "the {x} that {v} in the {p} was {q}"),
    eval_queries=("a {q} {x} {v} near the {p}", "near the {p} {v} the {q} {x}"),
    eval_documents=("by the {p} the {x} {v} , and it was {q}", "there was one {q} {x} which {v} at the {p}"),
)

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

TOPIC = Templates(
    train_queries=("of {a} , {b} and {c}", "with a {a} , a {b} and a {c}"),
    train_documents=("the {a} , the {b} and the {c}", "{a} and {b} , and then {c}"),
    eval_queries=("about {a} , {b} and {c}", "here {a} , there {b} , and {c}"),
    eval_documents=("on the {a} , on the {b} and on the {c}", "what of {a} , of {b} and of {c}"),
)
