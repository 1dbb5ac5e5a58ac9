"""Errors a user can act on: each says what was wrong, what is allowed and how to mend it.

The command line prints a `PoolwiseError` without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
