"""A pooling of the user's own: a class, or its name `module:Class` where code is allowed.

`register(cls)` makes a class known under that name, with its arguments and what it reads; `Design(pooling=cls)` does so
by itself. A name alone is code that somebody wrote into a file: it is imported only inside `allowing(True)`, which is
what `allow_code` in a study file and in `poolwise.load` stand for. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from poolwise.designs import POOLING_ARGS, POOLINGS_READ, Arg
from poolwise.errors import StudyError, suggest

OWN: dict[str, type] = {}
"""`module:Class` -> class, of all that are registered in this process."""

_allowed: ContextVar[bool] = ContextVar("allow_code", default=False)
_BUILT = ("hidden_size", "n_layers")


@contextlib.contextmanager
def allowing(allowed: bool, folder: Path | None = None) -> Iterator[None]:
    """Inside, `find` may import; modules are also looked for in `folder`, last of all."""
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


def find(pooling: str) -> type:
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
    register(found, pooling)
    return found


def register(cls: type, name: str | None = None) -> str:
    """Make a pooling known; returns its name. Raises `StudyError`, all mistakes at once, where it is none.

    It must be a subclass of `poolwise.Pooling` at the top level of a module, built as `Cls(hidden_size, n_layers,
    **arguments)`; each argument has a default that is a number, a word, true or false.
    """
    name = name or f"{cls.__module__}:{cls.__qualname__}"
    mistakes = []
    if not any((base.__module__, base.__name__) == ("poolwise.poolings.heads", "Pooling") for base in cls.__mro__[1:]):
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
    cls = find(pooling)
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
