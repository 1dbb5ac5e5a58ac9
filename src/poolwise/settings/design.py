"""One design of a study: which tokens may see which, what a text is written into, how states become one vector.

The modes, templates, poolings, their arguments and the presets stand in `poolwise.designs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from poolwise import designs as catalogue
from poolwise.errors import StudyError, suggest
from poolwise.settings import own
from poolwise.settings.recipe import Strict


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
            raw["pooling"] = _code(own.register, raw["pooling"])
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
        if own.is_own(self.pooling):
            _code(own.find, self.pooling)
        if self.pooling not in catalogue.POOLING_ARGS:
            allowed = [name for name in catalogue.POOLING_ARGS if not own.is_own(name)]
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
        code = {"code": own.code_hash(self.pooling)} if own.is_own(self.pooling) else {}
        return {**fields, **{name: value for name, value in named.items() if value != defaults[name]}, **code}

    def differs_from(self, other: Design) -> list[str]:
        """The factors in which two designs differ; arguments count only where both poolings take them."""
        mine, theirs = self.factors(), other.factors()
        return [name for name in mine if name in theirs and mine[name] != theirs[name]]
