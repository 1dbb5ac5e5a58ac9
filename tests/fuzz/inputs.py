"""Inputs made from valid ones: bytes altered at random, JSON values replaced, checksums forged; all from one seed."""

# ruff: noqa: E501
from __future__ import annotations

import copy
import hashlib
import json
import random
from typing import Any

from poolwise.files import BLANK, SEAL

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**12, 10**39, -(10**39), 0.5, -0.5, 1e308, 1e-320, "", " ", "a", "m1", "..",
    "../../x", "/dev/zero", "~no-such-user/x", "a/b", "\x1b[31m", "\u202e", "\x00", "\ud800", "é" * 300, "\\1\\g<0>", "=1+1", "x" * 5000, [], {},
    [[]], [None], {"a": {}}, [1, "a"], {"": 0}, "0" * 64, "evil:Class", ["mean"] * 50, "2026-01-01", "NaN", [0] * 2000, "9" * 5000, "²",
]  # fmt: skip
TOKENS = [
    b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-", b"0x" + b"f" * 4000, b"[" * 5000, b'{"a":' * 2000, b"\\ud800",
    b'"', b"'", b'"""', b"=", b"[[designs]]\n", b"[grid]\n", b"\x00", b"\x1b[2J", b"\xe2\x80\xae", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\r\n", b"\n", b"\t", b",", b";", b"{", b"}", b"a." * 100, b"inf", b"1_000", b"true", b"\xed\xa0\x80", b"PAR1", b"\x1f\x8b",
]  # fmt: skip


def make(seeds: tuple[bytes, ...], form: str, rng: random.Random) -> bytes:
    """One input."""
    data = rng.choice(seeds)
    if form in ("json", "sealed") and rng.random() < 0.6:
        data = _structured(data, rng)
    else:
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            data = _altered(data, seeds, rng)
    return sealed_again(data) if form == "sealed" and rng.random() < 0.9 else data


def sealed_again(data: bytes) -> bytes:
    """With the right checksum, if there is still a place for it."""
    blank = BLANK.encode()
    if data.count(blank) != 1:
        return data
    return data.replace(blank, SEAL.encode() + hashlib.sha256(data).hexdigest().encode())


def _altered(data: bytes, seeds: tuple[bytes, ...], rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 64, 1 << 20)))
    kind = rng.randrange(8)
    if kind <= 1 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.choice(TOKENS) + data[at:]
    if kind == 3:
        return data[:at] + rng.choice(TOKENS) + data[to:]
    if kind == 4:
        return data[:at] + data[to:]
    if kind == 5:
        return data[:to] + data[at:]
    if kind == 6:
        return data[:at] + rng.randbytes(rng.choice((1, 4, 40))) + data[to:]
    return data[:at] + rng.choice(seeds)[rng.randrange(len(data) + 1) :]


def _structured(data: bytes, rng: random.Random) -> bytes:
    content = copy.deepcopy(json.loads(data))
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = _replaced(content, rng)
    return json.dumps(content).encode()


def _replaced(content: Any, rng: random.Random) -> Any:
    """A random value inside replaced, removed, doubled or renamed; the checksum is left alone."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.25:
        return copy.deepcopy(rng.choice(VALUES))
    keys = [key for key in content if key != "checksum"] if isinstance(content, dict) else list(range(len(content)))
    if not keys:
        return content
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.1:
        del content[key]
    elif kind < 0.2 and isinstance(content, list):
        content += [copy.deepcopy(content[key])] * rng.choice((1, 2, 50))
    elif kind < 0.2:
        content[str(rng.choice(VALUES))[:50]] = content.pop(key)
    else:
        content[key] = _replaced(content[key], rng)
    return content
