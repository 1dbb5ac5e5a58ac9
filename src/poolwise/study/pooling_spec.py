"""The declaration of a pooling, ours or a user's: arguments, what it reads, capacity controls and cost. No torch.

Ours are declared in `study.catalogue`. A user's pooling is a class `module:Class`, imported only if the study allows
code, and declared like ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from poolwise.errors import StudyError, suggest

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


_allowed: ContextVar[bool] = ContextVar("allow_code", default=False)
_by_name: ContextVar[bool] = ContextVar("by_name", default=False)
_BUILT = ("hidden_size", "n_layers")
OWN: dict[str, PoolingSpec] = {}
"""`module:Class` -> declaration of the users' poolings that this process has imported."""


@contextlib.contextmanager
def allowing_code(allowed: bool, folder: Path | None = None) -> Iterator[None]:
    """Inside, `find_own` may import modules; the last place where they are looked for is `folder`."""
    if allowed and folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


@contextlib.contextmanager
def code_by_name() -> Iterator[None]:
    """Inside, no code is imported, and designs may name poolings that are not: enough to read results."""
    allowed, named = _allowed.set(False), _by_name.set(True)
    try:
        yield
    finally:
        _allowed.reset(allowed)
        _by_name.reset(named)


def is_unseen(pooling: str) -> bool:
    """Whether this names a user's class that need not be imported now, so that nothing is known but its name."""
    return is_own(pooling) and pooling not in OWN and _by_name.get()


def unseen_spec(pooling: str, arguments: Mapping[str, Any]) -> PoolingSpec:
    """The declaration of a class that was not imported: the arguments that a design gives it, without defaults."""
    unknown = "an argument of code that was not imported"
    args = {name: Arg(type(value), "", unknown) for name, value in arguments.items()}
    return PoolingSpec(pooling, "", args=args, reads="tokens", tokens="all", cost=None)


def is_own(name: str) -> bool:
    """Whether this names a user's class, `module:Class`, and not one of our poolings."""
    return ":" in name


def find_own(pooling: str) -> Any:
    """The class `module:Class`, imported if code is allowed. Raises `StudyError` if it is not, or is not a pooling."""
    if pooling in OWN:
        return OWN[pooling].code
    if not _allowed.get():
        raise StudyError(
            [
                f"pooling = {pooling!r} is code, which is imported only with your permission: allow_code = true in the "
                "study file, poolwise.load(folder, allow_code=True), or Design(pooling=YourClass) in Python"
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
    """Declare a user's pooling in `OWN`; returns its name. Raises `StudyError` with all mistakes at once.

    It must be a subclass of `poolwise.Pooling` at the top level of a module, built as `Cls(hidden_size, n_layers,
    **arguments)`; each argument has a default that is a number, a word, true or false.
    """
    name = name or f"{cls.__module__}:{cls.__qualname__}"
    mistakes = []
    # compared by name: importing the class would import torch
    if not any((base.__module__, base.__name__) == ("poolwise", "Pooling") for base in cls.__mro__[1:]):
        mistakes.append(f"{name} must be a subclass of poolwise.Pooling")
    if "<locals>" in name:
        mistakes.append(f"{name} is defined inside a function; move it to the top level, where it can be found again")
    reads = getattr(cls, "reads", None)
    if reads not in ("tokens", "layers"):
        mistakes.append(f"{name}.reads = {reads!r}: must be 'tokens' or 'layers'")
    arguments, wrong = _arguments(cls, name)
    if mistakes or wrong or reads is None:
        raise StudyError([*mistakes, *wrong])
    formula = (inspect.getdoc(cls) or "").partition("\n")[0]
    tokens: Literal["last", "all"] = "last" if reads == "layers" else "all"
    OWN[name] = PoolingSpec(name, formula, args=arguments, reads=reads, tokens=tokens, cost=None, code=cls)
    return name


def code_hash(pooling: str) -> str:
    """Hash of the source of the class's module; of its name if there is no source, as in a notebook."""
    try:
        source = inspect.getsource(sys.modules[find_own(pooling).__module__])
    except (OSError, TypeError):
        source = pooling
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _arguments(cls: Any, name: str) -> tuple[dict[str, Arg], list[str]]:
    """(arguments that a study may give, mistakes in the signature)."""
    parameters = list(inspect.signature(cls).parameters.values())
    if tuple(parameter.name for parameter in parameters[:2]) != _BUILT:
        return {}, [f"{name} must be built as {cls.__name__}(hidden_size, n_layers, **arguments)"]
    arguments, mistakes = {}, []
    for parameter in parameters[2:]:
        default = parameter.default
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if variadic or type(default) not in (bool, int, float, str):
            mistakes.append(f"{name}: argument {parameter} needs a default: a number, a word, True or False")
            continue
        words = ("last", "mean") if parameter.name == "tokens" and cls.reads == "layers" else None
        arguments[parameter.name] = Arg(type(default), default, f"an argument of {cls.__name__}", words)
    return arguments, mistakes
