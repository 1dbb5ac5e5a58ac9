"""A pooling that a user wrote: a class `module:Class`, imported only if the study allows code, declared like ours."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from poolwise.errors import StudyError, suggest
from poolwise.study.catalogue import OWN
from poolwise.study.pooling_spec import Arg, PoolingSpec

_allowed: ContextVar[bool] = ContextVar("allow_code", default=False)
_BUILT = ("hidden_size", "n_layers")


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
    """Declare a user's pooling in `catalogue.OWN`; returns its name. Raises `StudyError` with all mistakes at once.

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
