"""One design of a study, a pooling of the user's own, and the `[grid]` that makes designs of lists."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from poolwise.errors import StudyError, explain, suggest
from poolwise.study import catalogue
from poolwise.study.catalogue import POOLING_ARGS, POOLINGS_READ, Arg
from poolwise.study.recipe import Strict

OWN: dict[str, type] = {}
"""`module:Class` -> class, of all that are registered in this process."""

_allowed: ContextVar[bool] = ContextVar("allow_code", default=False)
_BUILT = ("hidden_size", "n_layers")


@contextlib.contextmanager
def allowing_code(allowed: bool, folder: Path | None = None) -> Iterator[None]:
    """Inside, `find_own` may import; modules are also looked for in `folder`, last of all."""
    if allowed and folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def is_own(pooling: str) -> bool:
    """Whether this names code and not one of poolwise's poolings."""
    return ":" in pooling


def find_own(pooling: str) -> type:
    """The class named `module:Class`, imported if code is allowed. Raises `StudyError` with the fix."""
    if pooling in OWN:
        return OWN[pooling]
    if not _allowed.get():
        raise StudyError(
            [
                f"pooling = {pooling!r} is code, which is imported only if you say so: allow_code = true in the study "
                "file, poolwise.load(folder, allow_code=True), or Design(pooling=YourClass) in Python"
            ]
        )
    name, _, label = pooling.partition(":")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
        raise StudyError(
            [
                f"pooling = {pooling!r}: module {name!r} cannot be imported ({type(error).__name__}: {error}); it must "
                f"lie beside the study file as {name.replace('.', '/')}.py, or be installed"
            ]
        ) from error
    found = vars(module).get(label)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise StudyError([f"pooling = {pooling!r}: module {name!r} has no class {label!r}{suggest(label, classes)}"])
    register_own(found, pooling)
    return found


def register_own(cls: type, name: str | None = None) -> str:
    """Make a pooling known; returns its name. Raises `StudyError`, all mistakes at once, where it is none.

    It must be a subclass of `poolwise.Pooling` at the top level of a module, built as `Cls(hidden_size, n_layers,
    **arguments)`; each argument has a default that is a number, a word, true or false.
    """
    name = name or f"{cls.__module__}:{cls.__qualname__}"
    mistakes = []
    if not any((base.__module__, base.__name__) == ("poolwise.pooling.heads", "Pooling") for base in cls.__mro__[1:]):
        mistakes.append(f"{name} must be a subclass of poolwise.Pooling")
    if "<locals>" in name:
        mistakes.append(f"{name} is defined inside a function; move it to the top level, where it can be found again")
    reads = getattr(cls, "reads", None)
    if reads not in ("tokens", "layers"):
        mistakes.append(f"{name}.reads = {reads!r}: must be 'tokens' or 'layers'")
    arguments, wrong = _arguments(cls, name)
    if mistakes or wrong:
        raise StudyError([*mistakes, *wrong])
    OWN[name], POOLING_ARGS[name], POOLINGS_READ[name] = cls, arguments, str(reads)
    return name


def code_hash(pooling: str) -> str:
    """Hash of the source of the class's module; of its name where there is no source (a notebook)."""
    cls = find_own(pooling)
    try:
        source = inspect.getsource(sys.modules[cls.__module__])
    except (OSError, TypeError):
        source = pooling
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _arguments(cls: Any, name: str) -> tuple[dict[str, Arg], list[str]]:
    """The arguments that a study may give, by their defaults; and what is wrong with the signature."""
    parameters = list(inspect.signature(cls).parameters.values())
    if tuple(parameter.name for parameter in parameters[:2]) != _BUILT:
        return {}, [f"{name} must be built as {cls.__name__}(hidden_size, n_layers, **arguments)"]
    arguments, mistakes = {}, []
    for parameter in parameters[2:]:
        default = parameter.default
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or type(default) not in (
            bool, int, float, str,
        ):  # fmt: skip
            mistakes.append(f"{name}: argument {parameter} needs a default: a number, a word, True or False")
            continue
        words = ("last", "mean") if parameter.name == "tokens" and cls.reads == "layers" else None
        arguments[parameter.name] = Arg(type(default), default, f"an argument of {cls.__name__}", words)
    return arguments, mistakes


def _attention(value: str) -> str:
    if not catalogue.is_attention(value):
        allowed = ", ".join(map(repr, catalogue.ATTENTIONS))
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": allowed})
    return value


Attention = Annotated[str, AfterValidator(_attention)]


def _wrong_arguments(pooling: str, given: dict[str, Any]) -> list[str]:
    """One line for each argument that this pooling does not take or that has a value it may not have."""
    known = catalogue.POOLING_ARGS[pooling]
    problems = []
    for name, value in given.items():
        arg = known.get(name)
        if arg is None:
            allowed = f"allowed: {', '.join(known)}{suggest(name, known)}" if known else "it takes none"
            problems.append(f"pooling_args.{name} is not an argument of {pooling}; {allowed}")
        elif value == catalogue.AUTO and arg.default == catalogue.AUTO:
            continue
        elif type(value) is not arg.type:
            also = " or 'auto'" if arg.default == catalogue.AUTO else ""
            problems.append(f"pooling_args.{name} = {value!r}: allowed: {arg.type.__name__}{also} ({arg.help})")
        elif arg.allowed and value not in arg.allowed:
            problems.append(
                f"pooling_args.{name} = {value!r}: allowed: {', '.join(arg.allowed)}{suggest(value, arg.allowed)}"
            )
        elif arg.minimum is not None and isinstance(value, int) and value < arg.minimum:
            problems.append(f"pooling_args.{name} = {value!r}: must be at least {arg.minimum} ({arg.help})")
    return problems


def _code(step: Callable[[Any], Any], pooling: Any) -> Any:
    """A step of `own`, its mistakes as pydantic wants them."""
    try:
        return step(pooling)
    except StudyError as error:
        raise ValueError("; ".join(error.problems)) from error


class Design(Strict):
    """The treatment: which tokens may see which, and how the hidden states become one vector."""

    name: str = Field(min_length=1)
    attention: Attention
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
            raw["pooling"] = _code(register_own, raw["pooling"])
        preset = raw.get("preset")
        if preset is not None:
            known = catalogue.ALIASES.get(preset, preset) if isinstance(preset, str) else None
            if known not in catalogue.PRESETS:
                allowed = [*catalogue.PRESETS, *catalogue.ALIASES]
                guess = suggest(preset, allowed)
                raise ValueError(f"preset {preset!r} is unknown; allowed: {', '.join(allowed)}{guess}")
            for key, value in catalogue.PRESETS[known].items():
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
        if is_own(self.pooling):
            _code(find_own, self.pooling)
        if self.pooling not in catalogue.POOLING_ARGS:
            allowed = [name for name in catalogue.POOLING_ARGS if not is_own(name)]
            raise ValueError(
                f"pooling {self.pooling!r} is unknown; allowed: {', '.join(allowed)}{suggest(self.pooling, allowed)}"
            )
        problems = _wrong_arguments(self.pooling, self.pooling_args)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def factors(self) -> dict[str, Any]:
        """What makes this design: `attention`, `pooling` and every argument of its pooling, defaults filled in;
        `template` and `special_tokens`."""
        arguments = {name: arg.default for name, arg in catalogue.POOLING_ARGS[self.pooling].items()}
        fields = {"attention": self.attention, "pooling": self.pooling, **arguments, **self.pooling_args}
        return {**fields, "template": self.template, "special_tokens": self.special_tokens}

    def treatment(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a trial of this design is told of it: JSON values, with the pooling's arguments as resolved; `template`
        and `special_tokens` where they are not at their defaults; the hash of the code of a pooling of one's own."""
        fields = {"attention": self.attention, "pooling": self.pooling, "pooling_args": arguments}
        named = {"template": self.template, "special_tokens": self.special_tokens}
        defaults = {name: Design.model_fields[name].default for name in named}
        code = {"code": code_hash(self.pooling)} if is_own(self.pooling) else {}
        return {**fields, **{name: value for name, value in named.items() if value != defaults[name]}, **code}

    def differs_from(self, other: Design) -> list[str]:
        """The factors in which two designs differ; arguments count only where both poolings take them."""
        mine, theirs = self.factors(), other.factors()
        return [name for name in mine if name in theirs and mine[name] != theirs[name]]


Axes = Mapping[str, Sequence[Any]]
Cell = dict[str, Any]


def expand(axes: Axes, declared: Sequence[Design], kind: type[Design]) -> tuple[list[Design], list[str], list[str]]:
    """(designs, lines on what was left out, mistakes) of a grid.

    axes: value lists by name: `attention` and `pooling`, other fields of a design, arguments of poolings.
    declared: designs that the study lists by themselves; a cell that is one of them is not made again.
    kind: the class `Design`, whose rules decide what a cell may be. A value that no cell can have is a mistake.
    """
    fields = [name for name in kind.model_fields if name not in ("name", "preset", "pooling_args")]
    mistakes = _mistakes(axes, fields)
    if mistakes:
        return [], [], mistakes
    made: list[Design] = []
    left_out: list[str] = []
    refused: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    reasons: dict[tuple[str, str], str] = {}
    taken: set[tuple[str, str]] = set()
    for chosen in _combinations(axes, fields):
        used = {(name, repr(value)) for name, value in chosen.items()}
        try:
            design = kind.model_validate(_cell(chosen, fields))
        except ValidationError as error:
            reason = "; ".join(explain(error, {"": kind}))
            refused[str(chosen["pooling"]), reason].append(_words(chosen))
            reasons |= {key: reason for key in used if key not in reasons}
            continue
        taken |= used
        twin = next((other for other in declared if other.factors() == design.factors()), None)
        if twin is None:
            made.append(design)
        elif twin.name != design.name:
            left_out.append(f"{_words(chosen)}: stands among the designs, as {twin.name}")
    for (_, reason), cells in refused.items():
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        left_out.append(f"{cells[0]}{more}: {reason}")
    for name, values in axes.items():
        for value in values:
            key = (name, repr(value))
            if key not in taken and taken:
                why = reasons.get(key, f"none of the poolings {', '.join(map(str, axes['pooling']))} takes it")
                mistakes.append(f"grid.{name}: no design can have {value!r}: {why}")
    if not taken:
        mistakes += [f"grid: {line}" for line in left_out]
    return made, left_out, mistakes


def _mistakes(axes: Axes, fields: Sequence[str]) -> list[str]:
    """What is wrong with a grid whatever its values mean."""
    mistakes = []
    known = [*fields, *dict.fromkeys(name for arguments in POOLING_ARGS.values() for name in arguments)]
    for name in ("attention", "pooling"):
        if name not in axes:
            mistakes.append(f'grid.{name} is missing: list the values, such as {name} = ["{_EXAMPLE[name]}"]')
    for name, values in axes.items():
        if name not in known:
            mistakes.append(f"grid.{name} is not a factor; allowed: {', '.join(known)}{suggest(name, known)}")
        elif not values:
            mistakes.append(f"grid.{name} = []: give at least one value")
        elif len({repr(value) for value in values}) < len(values):
            mistakes.append(f"grid.{name} = {list(values)}: give each value once")
    return mistakes


_EXAMPLE = {"attention": "causal", "pooling": "mean"}


def _combinations(axes: Axes, fields: Sequence[str]) -> Iterator[Cell]:
    """One dictionary for each combination: of all fields, and of those arguments that the pooling takes."""
    for pooling in axes["pooling"]:
        takes = POOLING_ARGS.get(pooling, {}) if isinstance(pooling, str) else {}
        names = [name for name in axes if name != "pooling" and (name in fields or name in takes)]
        for values in product(*(axes[name] for name in names)):
            yield {"pooling": pooling, **dict(zip(names, values, strict=True))}


def _cell(chosen: Cell, fields: Sequence[str]) -> Cell:
    """A design: named after its pooling and attention, and after what is not at its default."""
    arguments = {name: value for name, value in chosen.items() if name not in fields}
    takes = POOLING_ARGS.get(str(chosen["pooling"]), {})
    shown = [f"{name}-{value}".lower() for name, value in arguments.items() if value != takes[name].default]
    others = [str(value) for name, value in chosen.items() if name in fields and name not in ("pooling", "attention")]
    name = "-".join([str(chosen["pooling"]), str(chosen["attention"]), *(o for o in others if o != "plain"), *shown])
    cell = {name: value for name, value in chosen.items() if name in fields}
    return {"name": name, **cell, **({"pooling_args": arguments} if arguments else {})}


def _words(chosen: Cell) -> str:
    """`cross_attention × causal × tokens mean`."""
    parts = [str(chosen["pooling"]), str(chosen["attention"])]
    parts += [f"{name} {value}" for name, value in chosen.items() if name not in ("pooling", "attention")]
    return " × ".join(parts)
