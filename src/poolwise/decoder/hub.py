"""The Hub, where it cannot be reached: its cache is used, and a name that is not cached fails within seconds.

Left to itself, the Hub's client asks six times for every file, half a minute a file.
"""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

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
