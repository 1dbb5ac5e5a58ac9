"""Files on disk: written whole or not at all, sealed, hashed, named, read within bounds; a Hub that may be unreachable.

Only this file writes temporary names and renames them. A crash or a full disk leaves the old content, or none; hidden
`.NAME.*.tmp` entries of a killed process may stay behind and can be deleted.

A sealed file contains its own checksum: the SHA-256 of all its bytes, the digits of the checksum itself taken as zeros.
So every flipped or lost byte is noticed, those of a Parquet footer and of the checksum included.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from poolwise.errors import DataError, PoolwiseError, redact, short

CONNECT_SECONDS = 5.0
"""How long to wait for the Hub to accept a connection."""
REMEMBERED_SECONDS = 60.0
"""How long an answer is trusted before the Hub is tried again."""
MOST_BYTES = 32 << 20
"""Bytes of a JSON text. Parsed, the worst of them take 25 times as much memory."""
MOST_TOML_BYTES = 1 << 20
"""Bytes of a TOML file, whose parser takes time that grows with the square of some inputs."""
MOST_DEPTH = 60
"""Levels of tables and lists in a JSON or TOML text; beyond some hundreds, printing or comparing a value fails."""
LONGEST_NAME = 200
"""Bytes of a name in a path: file systems allow 255, and seeds, hashes and endings are added to it."""
MOST_DIGITS = 40
"""Digits of an integer: enough for any identifier, and few enough to be converted to a float."""
SEAL = "poolwise-sha256:"
"""What stands before the checksum in a sealed file."""
BLANK = SEAL + "0" * 64
"""The seal of a file that is not complete yet."""
_TOML_QUOTED = re.compile(r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL)
"""Strings and comments of a TOML text."""
_SEALED = re.compile(re.escape(SEAL).encode() + rb"([0-9a-f]{64})")


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
    """Write a file whole or not at all, a text without secrets; raises as `open_atomic` does."""
    with open_atomic(path) as file:
        file.write(redact(content).encode() if isinstance(content, str) else content)
    return Path(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a sealed JSON object, without secrets, so that a reader sees the old file or the whole new one.

    Raises OSError.
    """
    text = redact(json.dumps({**content, "checksum": BLANK}, indent=1, ensure_ascii=False))
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
        seal(temporary)


def write_any_json(path: Path, content: Any) -> None:
    """Write JSON for other programs, without a checksum; otherwise as `write_json`."""
    with atomic_path(path) as temporary:
        temporary.write_text(redact(json.dumps(content, indent=1, ensure_ascii=False)) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of `write_json`, without its checksum.

    Raises OSError if there is no such file, and ValueError with the reason if it is not what was written.
    """
    data = read_bytes(path, MOST_BYTES)
    if not is_sealed(data):
        raise ValueError("its checksum differs" if _SEALED.search(data) else "it has no checksum")
    content = parse_json(data)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    content.pop("checksum", None)
    return content


def read_any_json(path: Path) -> Any:
    """The value in a JSON file that another program wrote. Raises OSError or ValueError with the reason."""
    return parse_json(read_bytes(path, MOST_BYTES))


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file. Raises OSError, and ValueError for more than `most` bytes, before they are read."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError("it is no regular file")  # reading a pipe may never end
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return data


def seal(path: Path) -> None:
    """Replace the `BLANK` in a file by its checksum. Raises ValueError if there is not exactly one `BLANK`."""
    data = path.read_bytes()
    if data.count(BLANK.encode()) != 1 or len(_SEALED.findall(data)) != 1:
        raise ValueError(f"{path}: no single place for a checksum")
    with path.open("r+b") as file:
        file.seek(data.index(BLANK.encode()) + len(SEAL))
        file.write(hashlib.sha256(data).hexdigest().encode())


def is_sealed(data: bytes) -> bool:
    """Whether the content of a file has a checksum and agrees with it."""
    found = _SEALED.findall(data)
    if len(found) != 1:
        return False
    return hashlib.sha256(data.replace(SEAL.encode() + found[0], BLANK.encode())).hexdigest().encode() == found[0]


def parse_json(text: str | bytes, finite: bool = True, unicode: bool = True) -> Any:
    """The value of a JSON text within the bounds above. Raises ValueError with the reason, in one line.

    finite: refuse NaN and Infinity, which are not JSON but which Python writes. unicode: refuse unpaired surrogates,
    which JSON can escape (`\\ud800`) but no UTF-8 file or table can hold.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"longer than {MOST_BYTES:,} bytes")
    try:
        options: dict[str, Any] = {"parse_float": _finite, "parse_constant": _no_constant} if finite else {}
        content = json.loads(text, parse_int=_integer, **options)
    except RecursionError:
        raise ValueError(f"nested more than {MOST_DEPTH} levels deep") from None
    # a text with few opening brackets cannot be deep, and most texts of a large file are such
    opening = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if opening > MOST_DEPTH:
        _check_depth(content)
    if unicode and (b"\\ud" in text.lower() if isinstance(text, bytes) else "\\ud" in text.lower()):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            found = error.object[error.start : error.start + 1]
            raise ValueError(f"an unpaired surrogate ({found!r}), which is not valid Unicode") from None
    return content


def parse_toml(data: bytes) -> dict[str, Any]:
    """The table of a TOML file within the bounds above. Raises ValueError with the reason."""
    if len(data) > MOST_TOML_BYTES:
        raise ValueError(f"larger than {MOST_TOML_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
        # tomllib takes time that grows with the square of the parts of a dotted key
        if any(line.count(".") > MOST_DEPTH for line in _TOML_QUOTED.sub("", text).splitlines()):
            raise ValueError(f"a key of more than {MOST_DEPTH} parts")
        content = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"nested more than {MOST_DEPTH} levels deep") from None
    _check_depth(content)
    return content


def whole_number(digits: str) -> int | None:
    """The number that decimal digits write; None for any other text, and for more than `MOST_DIGITS` digits.

    Python's `int` refuses texts that `str.isdigit` accepts ("²"), and those of thousands of digits.
    """
    return int(digits) if digits.isdecimal() and len(digits) <= MOST_DIGITS else None


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits; at most {MOST_DIGITS} are read")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_constant(digits)


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON value")


def _check_depth(content: Any) -> None:
    """Raises ValueError for values nested too deeply or integers that are too long, without recursion."""
    left = [(content, 1)]
    while left:
        value, depth = left.pop()
        if isinstance(value, dict | list):
            if depth > MOST_DEPTH:
                raise ValueError(f"nested more than {MOST_DEPTH} levels deep")
            left += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
            digits = int(abs(value).bit_length() * math.log10(2)) + 1
            raise ValueError(f"an integer of about {digits:,} digits; at most {MOST_DIGITS} are read")


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


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def user_path(name: str | Path, base_dir: Path = Path()) -> Path:
    """The path of a file or folder that the user names, relative to `base_dir`, with `~` expanded.

    It may not exist. Raises DataError for a name that no file can have: too long, or with a null character.
    """
    try:
        path = base_dir / os.path.expanduser(name)
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{short(str(name))} cannot be the name of a file or folder ({reason})") from None
    return path


def too_long(name: str) -> bool:
    """Whether a name has more than `LONGEST_NAME` bytes as part of a path."""
    return len(safe_name(name).encode()) > LONGEST_NAME


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
