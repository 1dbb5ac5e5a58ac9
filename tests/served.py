"""A small model and a server of it, in a thread of the test's process, for the tests of `poolwise serve`."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import poolwise
from poolwise.encoding.server import ROUTE, Server, serving
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from tiny import tiny_folder

QUERY = "query: find the island. "


def small_model(root: Path) -> Path:
    """An exported model of width 32, at most 48 tokens, with a prompt for queries and trained widths 8 and 16."""
    base = str(tiny_folder(root))
    recipe = Recipe(base_model=base, max_length=48, dtype="float32", query_prompt=QUERY, matryoshka=(8, 16))
    design = Design(name="d", attention="causal", pooling="cross_attention")
    return poolwise.export(poolwise.build(recipe, design, seed=0, device="cpu"), root / "own")


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[Server]:
    """A server that answers until the block ends."""
    with serving(folder, port=0, **options) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield server
        finally:
            server.should_exit = True
            thread.join()


def ask(
    server: Server, content: Any, path: str = ROUTE, method: str = "POST", headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """The status and the JSON of an answer; content: what is sent as JSON, or bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = content if isinstance(content, (bytes, type(None))) else json.dumps(content)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "application/json"
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def send(server: Server, content: bytes, *, close: bool = False, seconds: float = 20) -> bytes:
    """All that the server answers to these bytes, until it closes the connection. close: our side is closed first."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                answer += piece
        return answer


def vectors(answer: dict[str, Any]) -> np.ndarray:
    """(N, D) the embeddings of an answer."""
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return np.array([row["embedding"] for row in answer["data"]], np.float32)


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 120  # a busy machine is slow
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
