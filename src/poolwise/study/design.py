"""One design of a study, and the `[grid]` that multiplies lists of values into designs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from poolwise.errors import StudyError, explain, name_problem, short, suggest
from poolwise.files import LONGEST_NAME, too_long
from poolwise.study.catalogue import ALIASES, ATTENTIONS, OWN, POOLINGS, PRESETS, is_attention, spec_of
from poolwise.study.pooling_spec import (
    Arg,
    PoolingSpec,
    code_hash,
    find_own,
    is_own,
    is_unseen,
    register_own,
    unseen_spec,
)
from poolwise.study.recipe import Strict


def _attention(value: str) -> str:
    if not is_attention(value):
        allowed = ", ".join(map(repr, ATTENTIONS))
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": allowed})
    return value


def _visible(value: str) -> str:
    if problem := name_problem(value):
        raise ValueError(f"{short(value)} {problem}")
    if too_long(value):
        raise ValueError(f"{short(value)} is longer than {LONGEST_NAME} bytes; it names a folder")
    return value


def _translated(call: Callable[[Any], Any], pooling: Any) -> Any:
    """The result of `call(pooling)`, its StudyError as the ValueError that pydantic collects."""
    try:
        return call(pooling)
    except StudyError as error:
        raise ValueError("; ".join(error.problems)) from error


def _unknown_preset(preset: Any) -> str:
    """The message for a preset that does not exist: the names of all, and the one that was probably meant."""
    word = str(preset).lower() if isinstance(preset, str) else ""
    guess = suggest(word, [*PRESETS, *ALIASES])
    if word in POOLINGS or (not guess and (near := suggest(word, POOLINGS))):
        pooling = word if word in POOLINGS else near.split("'")[1]
        guess = f'; {pooling} is a pooling: write attention = "causal" and pooling = "{pooling}" instead of a preset'
    if not guess and word[:1] == "m" and word[1:].isdigit():
        guess = "; the designs of the paper are m1 to m5"
    return f"preset {short(preset)} is unknown; allowed: {', '.join(PRESETS)}{guess}"


MOST_DESIGNS = 1000
LARGEST_ARGUMENT = 65_536
"""The largest number that an argument of a pooling may be: heads, widths and latents of real models are far below."""


class Design(Strict):
    """The treatment: which tokens may see which, and how the hidden states become one vector."""

    name: Annotated[str, AfterValidator(_visible)] = Field(min_length=1)
    attention: Annotated[str, AfterValidator(_attention)]
    pooling: str
    pooling_args: dict[str, Any] = Field(default_factory=dict)
    template: Literal["plain", "prompteol", "echo"] = "plain"
    special_tokens: bool = True
    preset: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        if isinstance(raw.get("pooling"), type):
            raw["pooling"] = _translated(register_own, raw["pooling"])
        preset = raw.get("preset")
        if preset is not None:
            known = ALIASES.get(preset, preset) if isinstance(preset, str) else None
            if known not in PRESETS:
                raise ValueError(_unknown_preset(preset))
            for key, value in PRESETS[known].items():
                if key in raw and raw[key] != value:
                    raise ValueError(
                        f"preset {preset!r} sets {key} = {value!r} already; "
                        f"drop the preset to choose attention, pooling and pooling_args yourself"
                    )
                raw[key] = value
            raw.setdefault("name", preset)
        elif "attention" in raw and "pooling" in raw:
            raw.setdefault("name", f"{str(raw['pooling']).rpartition(':')[2]}-{raw['attention']}")
        return raw

    @model_validator(mode="after")
    def _known_pooling(self) -> Self:
        large = [name for name, value in self.pooling_args.items() if type(value) is int and value > LARGEST_ARGUMENT]
        if large:
            raise ValueError(f"pooling_args.{large[0]} is larger than {LARGEST_ARGUMENT:,}")
        if is_unseen(self.pooling):
            return self
        if is_own(self.pooling):
            _translated(find_own, self.pooling)
        if problems := _translated(spec_of, self.pooling).problems(self.pooling_args):
            raise ValueError("; ".join(problems))
        return self

    @property
    def spec(self) -> PoolingSpec:
        """The declaration of the design's pooling; of a class that was not imported, its arguments in this design."""
        if is_own(self.pooling) and self.pooling not in OWN:
            return unseen_spec(self.pooling, self.pooling_args)
        return spec_of(self.pooling)

    def factors(self) -> dict[str, Any]:
        """What makes this design: `attention`, `pooling`, every argument of its pooling with defaults filled in,
        `template` and `special_tokens`."""
        arguments = self.spec.complete(self.pooling_args)
        fields = {"attention": self.attention, "pooling": self.pooling, **arguments}
        return {**fields, "template": self.template, "special_tokens": self.special_tokens}

    def treatment(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The design's part of a trial's identity, JSON-able: attention, pooling and its resolved `arguments`; other
        fields if they are not at their defaults, so that a new field changes no older trial; a hash of a user's code.
        """
        fields = {"attention": self.attention, "pooling": self.pooling, "pooling_args": arguments}
        optional = {"template": self.template, "special_tokens": self.special_tokens}
        changed = {name: value for name, value in optional.items() if value != Design.model_fields[name].default}
        code = {"code": code_hash(self.pooling)} if is_own(self.pooling) else {}
        return {**fields, **changed, **code}

    def differs_from(self, other: Design) -> list[str]:
        """The factors in which two designs differ; arguments count only if both poolings take them."""
        mine, theirs = self.factors(), other.factors()
        return [name for name in mine if name in theirs and mine[name] != theirs[name]]


Axes = Mapping[str, Sequence[Any]]
"""The lists of a grid by name: `attention`, `pooling`, other fields of a design, arguments of poolings."""
Cell = dict[str, Any]
"""One value of each list, of those arguments that the cell's pooling takes."""
FIELDS = [name for name in Design.model_fields if name not in ("name", "preset", "pooling_args")]
REQUIRED = {"attention": "causal", "pooling": "mean"}
"""The axes that every grid has, with an example of a value."""


class Expansion(NamedTuple):
    """The designs of a grid; a line for each combination that is left out; a line for each mistake."""

    designs: list[Design]
    left_out: list[str]
    mistakes: list[str]


def expand(axes: Axes, declared: Sequence[Design]) -> Expansion:
    """Every combination of a grid's values as a design, without those that are among the `declared` designs.

    A combination that no design can have is left out; a value that no design can have is a mistake.
    """
    if mistakes := _mistakes(axes):
        return Expansion([], [], mistakes)
    designs: list[Design] = []
    left_out: list[str] = []
    known = [(other.name, other.factors()) for other in declared]
    refused: defaultdict[tuple[str, str], list[str]] = defaultdict(list)  # (pooling, reason) -> cells
    reasons: dict[tuple[str, str], str] = {}  # (axis, value) -> why the first cell with it was refused
    used: set[tuple[str, str]] = set()  # (axis, value) of all designs
    for cell in _cells(axes):
        values = {(name, repr(value)) for name, value in cell.items()}
        try:
            design = Design.model_validate(_design(cell))
        except ValidationError as error:
            reason = "; ".join(explain(error, {"": Design}))
            refused[str(cell["pooling"]), reason].append(_words(cell))
            reasons = {**dict.fromkeys(values, reason), **reasons}
            continue
        used |= values
        factors = design.factors()
        twin = next((name for name, others in known if others == factors), None)
        if twin is None:
            designs.append(design)
        elif twin != design.name:
            left_out.append(f"{_words(cell)}: already listed as {twin}")
    for (_, reason), cells in refused.items():
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        left_out.append(f"{cells[0]}{more}: {reason}")
    for name, listed in axes.items():
        for value in listed:
            key = (name, repr(value))
            if used and key not in used:
                why = reasons.get(key, f"none of the poolings {', '.join(map(str, axes['pooling']))} takes it")
                mistakes.append(f"grid.{name}: no design can have {value!r}: {why}")
    if not used:
        mistakes = [f"grid: {line}" for line in left_out]
    return Expansion(designs, left_out, mistakes)


def _takes(pooling: Any) -> Mapping[str, Arg]:
    """The arguments of a pooling; none for a name that is not known, which `Design` refuses."""
    known = isinstance(pooling, str) and (pooling in POOLINGS or pooling in OWN)
    return spec_of(pooling).args if known else {}


def _mistakes(axes: Axes) -> list[str]:
    """Mistakes in a grid that do not depend on what its values mean."""
    mistakes = []
    arguments = dict.fromkeys(name for spec in (*POOLINGS.values(), *OWN.values()) for name in spec.args)
    known = [*FIELDS, *arguments]
    for name, example in REQUIRED.items():
        if name not in axes:
            mistakes.append(f'grid.{name} is missing: list the values, such as {name} = ["{example}"]')
    for name, values in axes.items():
        if name not in known:
            mistakes.append(f"grid.{name} is not a factor; allowed: {', '.join(known)}{suggest(name, known)}")
        elif not values:
            mistakes.append(f"grid.{name} = []: give at least one value")
        elif len({repr(value) for value in values}) < len(values):
            mistakes.append(f"grid.{name} = {short(list(values))}: give each value once")
    cells = len(axes.get("pooling", ())) * math.prod(len(values) for name, values in axes.items() if name != "pooling")
    if not mistakes and cells > MOST_DESIGNS:  # an axis that only some poolings take multiplies only those
        cells = sum(math.prod(len(axes[name]) for name in _axes_of(axes, pooling)) for pooling in axes["pooling"])
        if cells > MOST_DESIGNS:
            mistakes.append(f"grid: {cells:,} combinations; at most {MOST_DESIGNS:,}")
    return mistakes


def _axes_of(axes: Axes, pooling: Any) -> list[str]:
    """The axes that multiply a pooling: all fields, and those arguments that it takes."""
    takes = _takes(pooling)
    return [name for name in axes if name != "pooling" and (name in FIELDS or name in takes)]


def _cells(axes: Axes) -> Iterator[Cell]:
    """All combinations: fields multiply every pooling, an argument only the poolings that take it."""
    for pooling in axes["pooling"]:
        names = _axes_of(axes, pooling)
        for values in product(*(axes[name] for name in names)):
            yield {"pooling": pooling, **dict(zip(names, values, strict=True))}


def _design(cell: Cell) -> dict[str, Any]:
    """A cell as a design, named after its pooling and attention and after what is not at its default.

    The name depends on the cell alone, so that the designs of a grid keep theirs when it grows.
    """
    fields = {name: value for name, value in cell.items() if name in FIELDS}
    arguments = {name: value for name, value in cell.items() if name not in FIELDS}
    others = [str(value) for name, value in fields.items() if name not in REQUIRED and value != "plain"]
    takes = _takes(cell["pooling"])
    changed = [f"{name}-{value}".lower() for name, value in arguments.items() if value != takes[name].default]
    name = "-".join([str(cell["pooling"]), str(cell["attention"]), *others, *changed])
    return {"name": name, **fields, **({"pooling_args": arguments} if arguments else {})}


def _words(cell: Cell) -> str:
    """`cross_attention × causal × tokens mean`."""
    others = [f"{name} {value}" for name, value in cell.items() if name not in REQUIRED]
    return " × ".join([str(cell["pooling"]), str(cell["attention"]), *others])
