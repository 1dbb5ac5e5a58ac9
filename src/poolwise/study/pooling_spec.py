"""The declaration of a pooling, ours or a user's: arguments, what it reads, capacity controls and cost. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from poolwise.errors import suggest

AUTO = "auto"
"""The default of an argument whose value follows from the base model; see `poolwise.pooling.cost.resolve_args`."""


@dataclass(frozen=True)
class Arg:
    """One argument of a pooling: its type, its default (or `AUTO`) and the values that are allowed.

    `auto(width, layers)`: the value of `AUTO` on a base model of that hidden size and number of layers. The automatic
    `heads`, `head_dim` and `latents` depend on each other and on FLOPs; `resolve_args` sets these.
    `misfit(value, width, layers)`: what is wrong with a value on such a base model; empty if nothing is.
    """

    type: type
    default: int | float | bool | str
    help: str
    allowed: tuple[str, ...] | None = None  # for words
    minimum: int | None = None  # for numbers
    auto: Callable[[int, int], int] | None = None
    misfit: Callable[[int, int, int], str] | None = None

    def problem(self, value: Any) -> str:
        """What is wrong with a value on any base model; empty if nothing is."""
        if value == AUTO and self.default == AUTO:
            return ""
        if type(value) is not self.type:
            also = f" or {AUTO!r}" if self.default == AUTO else ""
            return f"allowed: {self.type.__name__}{also} ({self.help})"
        if self.allowed and value not in self.allowed:
            return f"allowed: {', '.join(self.allowed)}{suggest(value, self.allowed)}"
        if isinstance(value, int) and self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum} ({self.help})"
        return ""


class Cost(NamedTuple):
    """Trainable parameters, and FLOPs of one text's forward pass (a multiply-add is 2; matrix products only)."""

    parameters: int
    flops: int


CostFunction = Callable[[Mapping[str, Any], int, int, int], Cost]
"""(complete arguments, hidden size D, number of layers L, tokens T of a text) -> exact cost."""


def no_weights(args: Mapping[str, Any], width: int, layers: int, tokens: int) -> Cost:
    """The cost of a pooling without parameters."""
    return Cost(0, 0)


@dataclass(frozen=True)
class PoolingSpec:
    """The declaration of one pooling.

    `name`: as in a study file. `formula`: its vector in one line. `source`: paper (arXiv number) or model.
    `reads`: the tokens of the last layer (B, T, D), or one vector per layer (B, L, D).
    `tokens`: the tokens that the vector depends on, overridden by an argument of this name. Over layers it is the
    reduction of a layer to a vector: its `last` token, or the `mean` of its tokens.
    `attends_to_layers`: its attention weights over layers can be looked at, see `CrossAttentionHead.attention_weights`.
    `highest_layer`: the argument that names the highest layer read; without one it is the last layer.
    `cost`: None for a user's pooling, which torch counts while the module runs on the meta device.
    `controls`: its capacity controls, poolings with as many weights in the same places but without attention; by the
    value of `tokens` if they differ. Arguments that a pooling and its control share must agree.
    `sized_as`: the pooling whose cost sets the automatic number of latents; without one its own.
    `standard`: the `pooling_mode` of sentence-transformers that computes the same, if there is one.
    `code`: the class of a user's pooling; ours are found by name.
    """

    name: str
    formula: str
    source: str = ""
    args: Mapping[str, Arg] = field(default_factory=dict)
    reads: Literal["tokens", "layers"] = "tokens"
    tokens: Literal["all", "first", "last"] = "all"
    attends_to_layers: bool = False
    highest_layer: str = ""
    cost: CostFunction | None = no_weights
    controls: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ()
    sized_as: str = ""
    standard: str = ""
    code: type | None = None

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments: those given, and the defaults of the others."""
        return {name: given.get(name, arg.default) for name, arg in self.args.items()}

    def problems(self, given: Mapping[str, Any]) -> list[str]:
        """A line for each argument that the pooling does not take or whose value is not allowed on any base model."""
        found = []
        for name, value in given.items():
            if name not in self.args:
                takes = f"allowed: {', '.join(self.args)}{suggest(name, self.args)}" if self.args else "it takes none"
                found.append(f"pooling_args.{name} is not an argument of {self.name}; {takes}")
            elif problem := self.args[name].problem(value):
                found.append(f"pooling_args.{name} = {value!r}: {problem}")
        return found

    def tokens_read(self, args: Mapping[str, Any]) -> str:
        """`all`, `first` or `last`: the tokens that the vector depends on. Over layers `last` or `mean`."""
        if "tokens" not in self.args or (self.code and self.reads == "tokens"):  # a user's `tokens` may mean anything
            return self.tokens
        return str(args.get("tokens", self.args["tokens"].default))

    def reads_last_token_alone(self, args: Mapping[str, Any]) -> bool:
        """Whether the vector is a function of one state, the last token's in the last layer."""
        return self.reads == "tokens" and self.tokens_read(args) == "last"

    def reads_padding(self, args: Mapping[str, Any]) -> bool:
        """Whether a text's vector depends on its padding, and so on the texts beside it, as in the paper's code."""
        return self.code is None and args.get("masked") is False

    def layers_read(self, args: Mapping[str, Any], layers: int) -> int:
        """The highest of `layers` layers that is read; those above it cannot learn. `args` complete."""
        return int(args[self.highest_layer]) if self.highest_layer else layers

    @property
    def all_controls(self) -> tuple[str, ...]:
        """Its capacity controls under any arguments."""
        listed = [self.controls] if isinstance(self.controls, tuple) else self.controls.values()
        return tuple(dict.fromkeys(name for names in listed for name in names))

    def controls_for(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        """The capacity controls of the pooling with these arguments; empty if it has no weights to control for."""
        return self.controls if isinstance(self.controls, tuple) else self.controls[self.tokens_read(args)]
