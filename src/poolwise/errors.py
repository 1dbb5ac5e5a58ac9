"""Errors a user can act on: each says what was wrong, what is allowed and how to mend it.

The command line prints a `PoolwiseError` without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError


class PoolwiseError(Exception):
    """Something the user can mend: wrong input, a missing file, a model that cannot do what was asked."""

    exit_code = 2


class StudyError(PoolwiseError):
    """A study file with mistakes. `problems` holds one line for each, all found at once."""

    def __init__(self, problems: Iterable[str], where: str = "study"):
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{where}: {count} mistake{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {line}" for line in self.problems)]))


class DataError(PoolwiseError):
    """Training data that cannot be read or used: names the file, the line and the field."""


class TaskError(PoolwiseError):
    """An evaluation task that is unknown, incomplete or malformed."""


class ModelError(PoolwiseError):
    """A base model that cannot be found, loaded or used."""


class AttentionError(ModelError):
    """A model whose tokens do not see what the design says they see."""


class CheckpointError(PoolwiseError):
    """A run folder that is missing, half-written, corrupt or made by another study."""


class TrainingError(PoolwiseError):
    """A trial that stopped: NaN loss, a loss that never left chance level, a full disk."""


class StatisticsError(PoolwiseError):
    """A test asked for that the data cannot support."""


def suggest(value: object, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed word, or an empty string."""
    near = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


_SYNONYMS = {
    "lr": "learning_rate",
    "head_lr": "head_learning_rate",
    "warmup": "warmup_steps",
    "max_steps": "steps",
    "model": "base_model",
    "data": "dataset",
    "max_seq_length": "max_length",
    "r": "rank",
    "lora_alpha": "alpha",
    "scheduler": "schedule",
    "seed": "seeds",
}


_BRANCHES = {"Lora", "literal[False]", "literal['full']", "str", "tuple"}
"""What pydantic adds to a path to say which branch of a union it tried."""


def _path(location: tuple[int | str, ...]) -> str:
    """`recipe.learning_rate`, `designs[2].attention`: as a person would point at it."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in _BRANCHES and not part.startswith("function"):
            text += f".{part}" if text else part
    return text


def explain(error: ValidationError, models: dict[str, type[BaseModel]]) -> list[str]:
    """One line for each mistake: path, value, what is allowed, the nearest guess.

    `models` maps the path of a table ("" for the file itself) to the class that reads it.
    """
    lines: list[str] = []
    details = error.errors()
    paths = [_path(item["loc"]) for item in details]
    for item, where in zip(details, paths, strict=True):
        inside = any(path.startswith((f"{where}.", f"{where}[")) for path in paths)
        if inside and (where == "recipe.lora" or item["type"] == "too_short"):
            continue  # what is wrong inside says it better
        if where == "recipe.lora":
            allowed = 'a table with rank, alpha, dropout, target; false; "full"'
            line = f"{where} = {item['input']!r}: allowed: {allowed}"
        else:
            line = _line(item, where, models)
        if line not in lines:
            lines.append(line)
    return [part for line in lines for part in line.split("\n")]


def _line(item: Any, where: str, models: dict[str, type[BaseModel]]) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    owner, _, key = where.rpartition(".")
    model = models.get(re.sub(r"\[\d+\]", "", owner))  # none: an entry of a table such as type_weights or prompts
    fields = list(model.model_fields) if model else []
    if kind == "extra_forbidden":
        if owner.startswith("designs") and key in models["recipe"].model_fields:
            return f"{where}: a design cannot override the recipe; move {key} to [recipe], which holds for all designs"
        guess = f"; did you mean {_SYNONYMS[key]!r}?" if _SYNONYMS.get(key) in fields else suggest(key, fields)
        return f"{where} is not a field; allowed: {', '.join(fields)}{guess}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "literal_error":
        allowed = context.get("expected", "")
        guess = suggest(value, [word.strip(" '") for word in allowed.replace(" or ", ",").split(",")])
        return f"{where} = {value!r}: allowed: {allowed}{guess}"
    if kind == "value_error":
        message = str(context.get("error", item["msg"]))
        return f"{where}: {message}" if where and not message.startswith(where) else message
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    message = item["msg"][0].lower() + item["msg"][1:]
    message = message.replace("valid tuple", "list").replace("valid dictionary", "table")
    return f"{where} = {shown}: {message} (it is a {type(value).__name__})"
