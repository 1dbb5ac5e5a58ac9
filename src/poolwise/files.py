"""Files on disk: written whole or not at all, hashed, named; and a Hub that may be out of reach.

Only this file writes temporary names and renames them. A crash or a full disk leaves the old content, or none; hidden
`.NAME.*.tmp` entries of a killed process may stay behind and can be deleted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from poolwise.errors import DataError, PoolwiseError

CONNECT_SECONDS = 5.0
"""How long to wait for the Hub to accept a connection."""
REMEMBERED_SECONDS = 60.0
"""How long an answer is trusted before the Hub is tried again."""


@contextlib.contextmanager
def atomic_path(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path in the folder of `path` to write to; renamed to `path` at the end, deleted if anything fails.

    The folder is created. durable: False skips fsync, for caches that carry their own checksum. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _finish(temporary, durable)
        temporary.replace(path)
        if durable:
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; at the end every file in it is flushed to disk and it takes the place of `folder`.

    An existing folder is kept until the new one is complete. Raises OSError.
    """
    folder = Path(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old.tmp"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        flush_folder(temporary)
        if folder.exists():  # rename replaces a file but not a folder that holds something
            folder.rename(old)
        temporary.rename(folder)
        _flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends; whatever stops it leaves the old file as it was.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            yield file
    except OSError as error:
        advice = "free some space or choose another folder"
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write a file whole or not at all; raises as `open_atomic` does."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one. Raises OSError."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def check_place(to: Path | None, force: bool = True, taken: str = "") -> None:
    """Refuse a --to that cannot be written, or that is taken, before any work is done for it."""
    if to is None:
        return
    if not force and (to.is_file() or (to.is_dir() and any(to.iterdir()))):
        raise PoolwiseError(f"--to {to} {taken}; give another name, or --force to replace it")
    parent = next(place for place in (to, *to.absolute().parents) if place.exists())
    if not (parent.is_dir() or parent == to) or not os.access(parent, os.W_OK):
        raise PoolwiseError(f"--to {to}: {parent} cannot be written to; name another path")


def flush_folder(folder: Path) -> None:
    """Force all files below a folder onto the disk. Call it before writing a marker that vouches for them."""
    for path in [*folder.rglob("*"), folder]:
        _finish(path, durable=True)


def _finish(path: Path, durable: bool) -> None:
    """Give a new file or folder the usual permissions and flush it; temporary files start out private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    if durable:
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_name(name: str) -> str:
    """A name as part of a path: letters, digits, `-`, `_` and `.` stay, anything else becomes `-`."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


@contextlib.contextmanager
def cached_if_unreachable(name: str | Path) -> Iterator[None]:
    """Offline mode inside the block, if `name` is no local path and the Hub (`HF_ENDPOINT`) accepts no connection.

    Without it the Hub's clients retry for minutes before they turn to the cache.
    """
    if Path(name).exists():
        yield
        return
    import datasets.config
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _reachable(constants.ENDPOINT, int(time.monotonic() / REMEMBERED_SECONDS)):
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
    """Whether the endpoint accepts a connection; `period` makes the cache expire."""
    url = urlsplit(endpoint)
    host = url.hostname or ""
    if url.scheme in getproxies() and not proxy_bypass(host):
        return True  # only the proxy can tell
    try:
        socket.create_connection((host, url.port or (443 if url.scheme == "https" else 80)), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
