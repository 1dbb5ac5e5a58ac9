"""`poolwise serve` under load, over real connections, every vector compared with an offline encode.

The server, with the built-in base, is a process of its own; its clients are threads of this one, each with a connection
that it keeps. They share the machine's cores, so that the clients' own work is in all figures.

`serve_load`: 64 clients for `SERVE_SECONDS` seconds (60), each of which sends one text, waits for its vector and sends
the next one; texts a second against one client alone (the ratio). `wrong` vectors differ from those of an offline
encode by more than 1e-5, `lost` requests got no vector.
`serve_beside_1mb`: the 99th percentile of the seconds that 16 clients with short texts wait while another one sends
texts of a million characters, one after the other.
`serve_sigterm`: the share of requests that lost their answer when the server was stopped under the load of 64 clients:
neither a vector, nor 503, nor a connection that was refused before anything was sent.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import record

CLIENTS, SHORT_CLIENTS, TEXTS = 64, 16, 2000
SECONDS = float(os.environ.get("SERVE_SECONDS", "60"))
WORDS = [
    "the",
    "heron",
    "waits",
    "in",
    "shallow",
    "water",
    "for",
    "a",
    "fish",
    "and",
    "ferry",
    "takes",
    "forty",
    "minutes",
    "to",
    "reach",
    "an",
    "island",
]
GOAL = 1.0  # second


@dataclass
class Client:
    """What one client has seen: seconds of each answer, largest differences, and requests without a vector."""

    seconds: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    refused: int = 0
    lost: list[str] = field(default_factory=list)


def run() -> list[dict[str, Any]]:
    import poolwise
    from poolwise.study.design import Design
    from poolwise.study.recipe import Recipe

    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, generator.integers(4, 24))) + f" {n}" for n in range(TEXTS)]
    long = [" ".join(generator.choice(WORDS, 200_000))[:1_000_000] for _ in range(4)]
    with tempfile.TemporaryDirectory() as root:
        design = Design(name="d", attention="bidirectional", pooling="mean")
        encoder = poolwise.build(Recipe(base_model="nano", max_length=512, dtype="float32"), design, 0, device="cpu")
        folder = poolwise.export(encoder, Path(root) / "model")
        expected = np.concatenate([encoder.encode(texts), encoder.encode([text[:8000] for text in long])])
        every = [*texts, *long]
        with serving(folder) as (process, port):
            alone = load(port, every, expected, [range(TEXTS)], max(5.0, SECONDS / 6))
            together = load(port, every, expected, [range(n, TEXTS, CLIENTS) for n in range(CLIENTS)], SECONDS)
            short = [range(n, TEXTS, SHORT_CLIENTS) for n in range(SHORT_CLIENTS)]
            mixed = load(port, every, expected, [*short, range(TEXTS, TEXTS + len(long))], max(5.0, SECONDS / 3))
            stop = threading.Timer(max(2.0, SECONDS / 20), process.send_signal, [signal.SIGTERM])
            stop.start()
            last = load(port, every, expected, [range(n, TEXTS, CLIENTS) for n in range(CLIENTS)], 30.0)
    return [_load(alone, together), _beside(mixed), _sigterm(last)]


def _load(alone: Sequence[Client], together: Sequence[Client]) -> dict[str, Any]:
    seconds = max(5.0, SECONDS / 6), SECONDS
    rates = [sum(len(each.seconds) for each in side) / s for side, s in zip((alone, together), seconds, strict=True)]
    facts = {**_waits("", together), "clients": len(together), "texts_per_second": round(rates[1], 1)}
    facts |= {**_waits("alone_", alone), "alone_texts_per_second": round(rates[0], 1)}
    ratio = rates[1] / rates[0]
    apart = max(max(each.apart) for each in [*alone, *together])
    of = "largest difference of a number of an embedding"
    return record("serve_load", ratio, ratio, ratio, None, agreement=apart, agreement_of=of, **facts)


def _beside(clients: Sequence[Client]) -> dict[str, Any]:
    short, long = clients[:-1], clients[-1:]
    facts = {**_waits("", short), **_waits("long_", long), "unit": "seconds"}
    p99 = facts["p99_ms"] / 1000
    return record("serve_beside_1mb", p99, p99, p99, GOAL, lower_is_better=True, **facts)


def _sigterm(clients: Sequence[Client]) -> dict[str, Any]:
    facts = {**_waits("", clients), "refused": sum(each.refused for each in clients), "unit": "share of requests lost"}
    lost = facts["lost"] / max(1, facts["answered"] + facts["lost"])
    return record("serve_sigterm", lost, lost, lost, 0.0, lower_is_better=True, **facts)


def _waits(name: str, clients: Sequence[Client]) -> dict[str, Any]:
    waits = np.concatenate([each.seconds for each in clients])
    apart = np.concatenate([each.apart for each in clients])
    p50, p99 = np.quantile(waits, [0.5, 0.99]) * 1000
    lost = [reason for each in clients for reason in each.lost]
    facts = {"answered": len(waits), "wrong": int((apart > 1e-5).sum()), "lost": len(lost)}
    facts |= {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}
    return {f"{name}{key}": value for key, value in facts.items()} | ({f"{name}reasons": lost[:3]} if lost else {})


def load(
    port: int, texts: Sequence[str], expected: np.ndarray, shares: Sequence[range], seconds: float
) -> list[Client]:
    """One client for each share of the texts; each sends its texts in turn, one at a time, until the time is over."""
    end = time.monotonic() + seconds
    clients = [Client() for _ in shares]
    work: list[Callable[[], None]] = [
        lambda client=client, share=share: _ask(client, port, texts, expected, share, end)
        for client, share in zip(clients, shares, strict=True)
    ]
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients


def _ask(client: Client, port: int, texts: Sequence[str], expected: np.ndarray, share: range, end: float) -> None:
    connection, turn = http.client.HTTPConnection("127.0.0.1", port, timeout=60), 0
    while time.monotonic() < end:
        number = share[turn % len(share)]
        turn += 1
        body = json.dumps({"input": texts[number], "encoding_format": "base64"})
        start = time.perf_counter()
        try:
            if connection.sock is None:
                connection.connect()
        except ConnectionRefusedError:
            client.refused += 1
            return  # the server has stopped
        try:
            connection.request("POST", "/v1/embeddings", body)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            client.lost.append(repr(error))
            return
        if response.status == 503:
            client.refused += 1
            time.sleep(0.05)
        elif response.status != 200:
            client.lost.append(f"{response.status} {answer}")
        else:
            client.seconds.append(time.perf_counter() - start)
            found = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
            client.apart.append(float(np.abs(found - expected[number]).max()))
    connection.close()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command in a process of its own, and its port."""
    program = [sys.executable, "-c", "from poolwise.cli import main; main()", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "/v1/embeddings" in line)
            yield process, int(re.search(r":(\d+)/v1", line)[1])  # type: ignore[index]
        finally:
            process.kill()
