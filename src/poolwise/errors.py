"""Errors a user can act on: each names the field, the value, what is allowed and the fix.

The command line prints a `PoolwiseError` without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import copy
import difflib
import functools
import html
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import quote

from pydantic import BaseModel, ValidationError


class PoolwiseError(Exception):
    """Something the user can fix: wrong input, a missing file, a model that cannot do what was asked."""

    exit_code = 2


class StudyError(PoolwiseError):
    """A study file with mistakes. `problems` holds one line for each, all found at once."""

    def __init__(self, problems: Iterable[str], where: str = "study"):
        self.problems = list(problems)
        super().__init__(_listed(where, len(self.problems), self.problems))


class DataError(PoolwiseError):
    """A file or table that cannot be read, used or written: names the file, the line and the field."""


class TaskError(PoolwiseError):
    """An evaluation task that is unknown, incomplete or malformed."""


class ModelError(PoolwiseError):
    """A base model that cannot be found, loaded or used."""


class AttentionError(ModelError):
    """A model whose tokens do not see what the design says they see."""


class CheckpointError(PoolwiseError):
    """A run folder that is missing, incomplete, corrupt or made by another study."""


class TrainingError(PoolwiseError):
    """A trial that stopped: NaN loss, a loss that never left chance level, a full disk."""


class StatisticsError(PoolwiseError):
    """A test that the data cannot support."""


MOST_MISTAKES = 20
"""Different mistakes of one input after which reading stops."""
PLACES_SHOWN = 5


@dataclass
class _Repeated:
    """A mistake made once or several times: the first places with the values found there, and how often."""

    places: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    count: int = 0


class Mistakes:
    """The mistakes in one input (a file, a folder), reported together; and notes on how the input was read.

    Equal mistakes share one line: "lines 3, 7 and 12 more: column 'score': expected a number, got 'high', 'low', …".
    `label` names the input, `error` is what `check` raises, `page` is where the documentation shows the right form.
    """

    def __init__(self, label: str, error: type[PoolwiseError] = DataError, page: str = ""):
        self.label, self.error = label, error
        self.ending = f"\nEvery layout that is read, with an example: {page}" if page else ""
        self.notes: list[str] = []
        self._found: dict[tuple[str, str], _Repeated] = {}
        self._file = ""

    def within(self, file: str) -> Mistakes:
        """The same collection, for one file of a folder: places and notes start with its name."""
        part = copy.copy(self)
        part._file = file
        return part

    def note(self, text: str) -> None:
        """Something the user should know that is no mistake."""
        line = f"{self._file or self.label}: {text}"
        if line not in self.notes:
            self.notes.append(line)

    def add(self, place: str, message: str, value: object = ...) -> None:
        """A mistake at a place such as "line 3" ("": the whole input), with the value found there, if any.

        Raises `error` once there are `MOST_MISTAKES` different ones.
        """
        unit, _, number = place.rpartition(" ")
        if not number.isdigit():
            unit, number = place, ""
        where = ", ".join(part for part in (self._file, unit) if part)
        known = self._found.setdefault((where, message), _Repeated())
        known.count += 1
        if len(known.places) < PLACES_SHOWN:
            known.places.append(number)
            if value is not ... and short(value) not in known.values:
                known.values.append(short(value))
        if len(self._found) == MOST_MISTAKES and known.count == 1:
            self.check()

    def __bool__(self) -> bool:
        return bool(self._found)

    def check(self) -> None:
        """Raises `error` with all mistakes, if there are any."""
        if not self._found:
            return
        lines = [_mistake(where, message, found) for (where, message), found in self._found.items()]
        if len(lines) == 1 and ("", lines[0]) in self._found:  # about the input as a whole
            raise self.error(f"{self.label}: {lines[0]}{self.ending}")
        stopped = " (stopped there; there may be more)" if len(lines) == MOST_MISTAKES else ""
        count = sum(found.count for found in self._found.values())
        raise self.error(_listed(self.label, count, lines, stopped) + self.ending)


def _mistake(where: str, message: str, found: _Repeated) -> str:
    more = found.count - len(found.places)
    if where and found.places[0]:
        where += f"{'s' if found.count > 1 else ''} {enumerate_words(found.places, more)}"
    if found.values:
        message += f", got {', '.join(found.values)}{', …' if more and len(found.values) > 1 else ''}"
    return f"{where}: {message}" if where else message


def _listed(label: str, count: int, lines: list[str], remark: str = "") -> str:
    head = f"{label}: {count:,} mistake{'s' if count != 1 else ''}{remark}"
    return "\n".join([head, *(f"  - {line}" for line in lines)])


def enumerate_words(words: Iterable[str], more: int = 0) -> str:
    """ "3", "3 and 7", "3, 7 and 12 more"."""
    *first, last = [*words, *([f"{more:,} more"] if more else [])]
    return f"{', '.join(first)} and {last}" if first else last


def short(value: object, length: int = 60) -> str:
    """`repr(value)` ("null" for None, as in the files it comes from), cut after `length` characters."""
    try:
        text = "null" if value is None else repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= length else text[: length - 1] + "…"


def _is_hidden(character: str) -> bool:
    """Whether a character is not seen but changes what is seen: control and format characters (among them escape and
    the marks of bidirectional text), lone surrogates, and the separators of lines and paragraphs."""
    return unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str, keep: str = "") -> str:
    """The text with every hidden character written as an escape such as `\\x1b`, apart from those in `keep`.

    This is the only place where names and messages that came from a file are made safe to show.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode() if _is_hidden(c) and c not in keep else c for c in text
    )


def name_problem(name: str) -> str:
    """Why a name cannot be shown as it is ("contains …"), or an empty string if it can."""
    hidden = next((c for c in name if _is_hidden(c)), None) if not (name.isascii() and name.isprintable()) else None
    return f"contains the hidden character {printable(hidden)}; remove it" if hidden else ""


_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_SECRET_NAMES = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY)S?(_?\d+)?$", re.IGNORECASE
)
_KEY_NAMES = re.compile(r"(^|_)KEYS?(_?\d+)?$", re.IGNORECASE)
"""Names that may also be those of a key of a table or a cache."""
_SHORTEST_SECRET = 8
_REDACTED = "[secret]"
_LONGEST_LINE = 1 << 16
"""Characters of a line after which it is written to a log before its end."""


def secrets_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Name -> value of each variable whose name ends like that of a token, key, secret or password.

    Values that would be found in ordinary text are left out: those of fewer than 8 characters, paths, and the plain
    words of what is only called a key (`SORT_KEY=embeddings`).
    """
    found = {}
    for name, value in environment.items():
        plain = not _SECRET_NAMES.search(name) and re.fullmatch(r"[A-Za-z_-]+|\d+", value.strip())
        if (_SECRET_NAMES.search(name) or _KEY_NAMES.search(name)) and not plain:
            found[name] = value.strip()
    return {name: value for name, value in found.items() if len(value) >= _SHORTEST_SECRET and value[0] != "/"}


@functools.lru_cache(maxsize=8)
def _pattern(values: frozenset[str]) -> re.Pattern[str]:
    """Finds the values as they are and as JSON, HTML and addresses write them; also each line of those with several."""
    written = set[str]()
    for value in values:
        lines = [line for line in value.splitlines() if len(line) >= _SHORTEST_SECRET]
        for part in (value, *lines):
            written |= {
                part,
                json.dumps(part, ensure_ascii=False)[1:-1],
                json.dumps(part)[1:-1],
                html.escape(part),
                quote(part, ""),
            }
    return re.compile("|".join(map(re.escape, sorted(written, key=len, reverse=True))) or r"(?!)")


def redact(text: str, environment: bool = True) -> str:
    """The text without secrets: Hugging Face tokens, and values of environment variables named like secrets."""
    values = frozenset(secrets_in(os.environ).values()) if environment else frozenset[str]()
    return _TOKEN.sub(_REDACTED, _pattern(values).sub(_REDACTED, text))


def redact_stream(source: BinaryIO, target: BinaryIO) -> None:
    """Copy what is written to a pipe, without secrets, line by line until its end.

    A target that takes nothing more, as on a full disk, is written to no longer, but `source` is read to its end:
    otherwise whoever writes to it would wait for ever.
    """
    left, broken = "", False
    while data := source.read1(1 << 16):  # type: ignore[attr-defined]
        left += data.decode("utf-8", "surrogateescape")
        end = max(left.rfind("\n"), left.rfind("\r")) + 1
        if not end and len(left) > 2 * _LONGEST_LINE:
            left = redact(left)
            end = len(left) - _LONGEST_LINE  # what is kept is longer than any secret, so that none is cut in two
        broken = broken or not _copied(target, redact(left[:end]))
        left = left[end:]
    if not broken:
        _copied(target, redact(left))


def _copied(target: BinaryIO, text: str) -> bool:
    try:
        target.write(text.encode("utf-8", "surrogateescape"))
        target.flush()
    except OSError:
        return False
    return True


def suggest(value: object, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the nearest allowed word, or an empty string."""
    try:
        word = str(value)[:100]  # matching takes quadratic time
    except (RecursionError, ValueError):
        return ""
    near = difflib.get_close_matches(word, [name for name in allowed if len(name) <= 200], n=1, cutoff=0.6)
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
"""What pydantic adds to a path to name the branch of a union it tried."""


def _path(location: tuple[int | str, ...]) -> str:
    """`recipe.learning_rate`, `designs[2].attention`: as the user would write it."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in _BRANCHES and not part.startswith("function"):
            text += f".{part}" if text else part
    return text


def explain(error: ValidationError, models: dict[str, type[BaseModel]]) -> list[str]:
    """One line for each mistake of a study file: path, value, what is allowed, the nearest guess.

    `models` maps the path of a table ("" for the file itself) to the class that reads it.
    """
    lines: list[str] = []
    details = error.errors()
    paths = [_path(item["loc"]) for item in details]
    for item, where in zip(details, paths, strict=True):
        inside = any(path.startswith((f"{where}.", f"{where}[")) for path in paths)
        if inside and (where == "recipe.lora" or item["type"] == "too_short"):
            continue  # the mistakes inside are more precise
        if where == "recipe.lora":
            allowed = 'a table with rank, alpha, dropout, target; false; "full"'
            line = f"{where} = {short(item['input'], 80)}: allowed: {allowed}"
        else:
            line = _line(item, where, models)
        if line not in lines:
            lines.append(line)
    return [part for line in lines for part in line.split("\n")]


def _line(item: Any, where: str, models: dict[str, type[BaseModel]]) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    owner, _, key = where.rpartition(".")
    model = models.get(re.sub(r"\[\d+\]", "", owner))  # None for entries of free tables such as prompts
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
        return f"{where} = {short(value, 80)}: allowed: {allowed}{guess}"
    if kind == "value_error":
        message = str(context.get("error", item["msg"]))
        return f"{where}: {message}" if where and not message.startswith(where) else message
    message = item["msg"][0].lower() + item["msg"][1:]
    message = message.replace("valid tuple", "list").replace("valid dictionary", "table")
    return f"{where} = {short(value, 80)}: {message} (it is a {type(value).__name__})"
