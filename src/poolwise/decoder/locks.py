"""One thread at a time: a decoder is hooked, laid out and cut short for one batch, and a tokenizer set up for one call.

Locks are found by the object that they guard and are no part of it: whatever shares a decoder shares its lock, a copy
or a pickle has one of its own, and so has a forked child, in which a thread that held one does not run on.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_finding = threading.Lock()


def lock_of(guarded: Any) -> AbstractContextManager[Any]:
    """The lock of a module or a tokenizer; the thread that holds it may take it again."""
    with _finding:
        return _LOCKS.setdefault(guarded, threading.RLock())


def _forget() -> None:
    global _finding
    _finding = threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
