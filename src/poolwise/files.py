"""Files on disk: written whole or not at all, hashed, and a Hub that may be out of reach."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from poolwise.errors import DataError

if TYPE_CHECKING:
    pass


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` at the end, deleted if anything fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def safe_name(name: str) -> str:
    """A name as part of a path: letters, digits, `-`, `_` and `.` stay, anything else becomes `-`."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write a file whole or not at all, as `open_atomic` does."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write under a temporary name beside `path`; at the end it is flushed to disk and renamed. Whatever
    stops it, Ctrl-C included, leaves nothing behind and the old file as it was.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        advice = "free some space or choose another folder"
        raise DataError(f"{path}: cannot be written ({error.strerror}); {advice}") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


SECONDS = 5.0
"""How long an answer to a connection is waited for."""
REMEMBERED = 60.0
"""Seconds until the Hub is asked again."""


@contextmanager
def cached_if_unreachable(name: str | Path) -> Iterator[None]:
    """Offline mode inside, if `name` is no local path and the Hub (`HF_ENDPOINT`) takes no connection."""
    if Path(name).exists():
        yield
        return
    import datasets.config
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _reachable(constants.ENDPOINT, int(time.monotonic() / REMEMBERED)):
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = False, before


@functools.lru_cache(maxsize=8)
def _reachable(endpoint: str, period: int) -> bool:
    """Whether a connection is taken; `period` is there to ask again in the next one."""
    url = urlsplit(endpoint)
    host = url.hostname or ""
    if url.scheme in getproxies() and not proxy_bypass(host):
        return True  # the proxy is to say
    try:
        socket.create_connection((host, url.port or (443 if url.scheme == "https" else 80)), SECONDS).close()
    except OSError:
        return False
    return True
