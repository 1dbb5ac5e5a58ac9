"""Connections to `poolwise serve` that are slow, broken, hostile or too many, keys, and the end of the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from poolwise.encoding import requests
from poolwise.encoding import server as server_file
from poolwise.encoding.server import ROUTE, Server, serving
from poolwise.errors import PoolwiseError
from served import ask, running, send, small_model, wait_for

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with running(folder, names=["own"]) as made:
        yield made


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Server]:
    with running(folder, names=["own"], token=KEY, hosts=["embeddings.example"]) as made:
        yield made


def request(body: bytes = b'{"input": "a"}', *lines: str, head: str = f"POST {ROUTE}") -> bytes:
    """A request as bytes, with a Content-Length unless `lines` of the head give one."""
    given = (
        lines if any("content-length" in line.lower() for line in lines) else (*lines, f"Content-Length: {len(body)}")
    )
    return "\r\n".join([f"{head} HTTP/1.1", "Host: localhost", *given, "", ""]).encode() + body


def statuses(answer: bytes) -> list[int]:
    """The status of each response."""
    return [int(code) for code in re.findall(rb"HTTP/1.1 (\d+) ", answer)]


CLOSE = "Connection: close"
INNER = request(b'{"input": "smuggled"}')


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (request(INNER, head="GET /health") + request(b"", CLOSE, head="GET /health"), [200, 200]),
        (request(INNER, CLOSE, head="GET /nowhere"), [404]),
        (request(b"5\r\nhello\r\n0\r\n\r\n" + INNER, "Transfer-Encoding: chunked"), [400]),
        (request(b"0\r\n\r\n" + INNER, "Transfer-Encoding: chunked", "Content-Length: 3"), [400]),
        (request(INNER, "Content-Length: 5", "Content-Length: 200"), [400]),
        (request(INNER, "Content-Length: 5, 200"), [400]),
        (request(INNER, "Content-Length: +5"), [400]),
        (request(INNER, "Content-Length: " + "9" * 5000), [400]),
        (request(INNER, "Content-Length: " + "9" * 19), [413]),
        (request(INNER, "Transfer-Encoding: gzip, chunked"), [400]),
        (request(b"", "Host: other", head="GET /health"), [400]),
        (b"GET /health HTTP/1.1\r\n\r\n", [400]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", [400]),
        (b"GET /" + b"a" * 200_000, [400]),
        (request(b"", "Upgrade: websocket", "Connection: Upgrade", CLOSE, head="GET /health"), [200]),
    ],
    ids=range(15),
)
def test_bodies_are_framed_in_one_way_or_refused(
    server: Server, content: bytes, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No body is taken for a request: each connection gets as many answers as it has requests."""
    before = server.metrics.texts._value.get()
    monkeypatch.setattr(server_file, "REFUSED_SECONDS", 0.3)
    assert statuses(send(server, content)) == expected
    assert server.metrics.texts._value.get() == before


def test_chunked_bodies_and_several_requests_at_once_are_answered(server: Server) -> None:
    body = b'{"input": "a"}'
    pieces = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    chunked = f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + pieces
    answer = send(server, chunked + request() + request(body, CLOSE))
    assert statuses(answer) == [200, 200, 200]


def test_a_body_that_ends_early_gets_no_answer_and_leaves_nothing(server: Server) -> None:
    assert send(server, request(b'{"input": ', "Content-Length: 100"), close=True) == b""
    wait_for(lambda: server.gate.active == 0)
    assert server.gate.bytes == 0


def test_a_client_may_close_its_side_after_a_whole_request(server: Server) -> None:
    assert statuses(send(server, request(), close=True)) == [200]


def drip(server: Server, content: bytes) -> None:
    """Send a byte now and then until the server closes the connection, which it must do before the end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for byte in content:
            try:
                connection.sendall(bytes([byte]))
            except ConnectionError:
                return
            time.sleep(0.05)
        pytest.fail("the connection stayed open")


def test_slow_heads_and_bodies_are_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_file, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(server_file, "BODY_SECONDS", 0.3)
    assert send(server, b"") == b""  # nothing at all
    drip(server, b"GET /health" + b"h" * 100)  # a byte now and then does not help
    assert statuses(send(server, request(b"{", "Content-Length: 100"))) == [408]
    assert statuses(send(server, request()[:-5])) == [408]


def test_an_answer_that_nobody_reads_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_file, "STALLED_SECONDS", 0.3)
    body = json.dumps({"input": [f"text {n}" for n in range(2048)]}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted sockets take it over
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request(body))
        wait_for(lambda: len(server.server_state.connections) == 1)
        wait_for(lambda: not server.server_state.connections)
    assert ask(server, {"input": "a"})[0] == 200


def test_a_lost_client_is_no_error(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as lost:
        lost.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
        lost.sendall(f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{{".encode())
    assert ask(server, {"input": "still here"})[0] == 200
    assert caplog.text == ""


@pytest.fixture
def gate(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The encoder waits until this is set."""
    opened, encode = threading.Event(), type(server.batcher)._encode

    def waiting(self: Any, *given: Any) -> None:
        assert opened.wait(20)
        encode(self, *given)

    monkeypatch.setattr(type(server.batcher), "_encode", waiting)
    yield opened
    opened.set()


def test_a_request_whose_client_has_left_is_not_encoded(server: Server, gate: threading.Event) -> None:
    before = server.metrics.texts._value.get()
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask, server, {"input": "first"})
        wait_for(lambda: len(server.batcher.open) == 1)
        with socket.create_connection(("127.0.0.1", server.port)) as lost:
            lost.sendall(request(b'{"input": "left"}'))
            wait_for(lambda: len(server.batcher.open) == 2)
            lost.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_for(lambda: len(server.batcher.open) == 1)
        gate.set()
        assert first.result()[0] == 200
    assert server.metrics.texts._value.get() == before + 1


def test_a_full_queue_is_answered_with_429_and_recovers(
    server: Server, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "WAITING", 1)
    monkeypatch.setattr(requests, "WAITING_TEXTS", 5)
    with ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(ask, server, {"input": "first"})]
        wait_for(lambda: server.batcher.open and not server.batcher.waiting)
        code, answer = ask(server, {"input": ["a"] * 6})
        assert (code, "0 requests with 0 texts" in answer["error"]["message"]) == (429, True)
        answers.append(clients.submit(ask, server, {"input": "second"}))
        wait_for(lambda: server.batcher.waiting)
        code, answer = ask(server, {"input": "third"})
        assert (code, answer["error"]["type"]) == (429, "rate_limit_error")
        gate.set()
        assert [each.result()[0] for each in answers] == [200, 200]
    assert ask(server, {"input": "fourth"})[0] == 200


def test_a_request_that_waits_too_long_is_given_up(
    server: Server, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "ANSWER_SECONDS", 0.2)
    code, answer = ask(server, {"input": "a"})
    assert (code, "within 0.2 seconds" in answer["error"]["message"]) == (503, True)
    wait_for(lambda: not server.batcher.open)


def test_connections_and_bodies_are_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_file, "CONNECTIONS", 2)
    crowd = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    wait_for(lambda: len(server.server_state.connections) == 2)
    code, answer = ask(server, None, "/health", "GET")
    assert (code, answer["error"]["message"][:27]) == (503, "more than 2 connections are")
    crowd += [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    crowd[-1].settimeout(20)
    with contextlib.suppress(ConnectionError):  # closed or reset
        assert crowd[-1].recv(1) == b""
    for each in crowd:
        each.close()
    wait_for(lambda: not server.server_state.connections)
    monkeypatch.setattr(server_file, "BODIES", 10)
    assert ask(server, {"input": "a"})[0] == 429
    monkeypatch.undo()
    assert ask(server, {"input": "a"})[0] == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"bearer {KEY}", "Host": "embeddings.example:8080"}, 200),
        ({"Authorization": f"Bearer {KEY}", "Origin": "http://localhost:3000"}, 200),
        ({}, 401),
        ({"Authorization": KEY}, 401),
        ({"Authorization": f"Bearer {KEY}x"}, 401),
        ({"Authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": "Bearer \xe9"}, 401),
        ({"Authorization": f"Bearer {KEY}", "Host": "evil.example"}, 403),
        ({"Authorization": f"Bearer {KEY}", "Host": "localhost.evil.example"}, 403),
        ({"Authorization": f"Bearer {KEY}", "Origin": "http://evil.example"}, 403),
        ({"Authorization": f"Bearer {KEY}", "Origin": "null"}, 403),
        ({"Authorization": f"Bearer {KEY}", "Origin": "http://["}, 403),
    ],
)
def test_a_key_and_known_hosts_are_required(locked: Server, headers: dict[str, str], code: int) -> None:
    found, answer = ask(locked, {"input": "a"}, headers=headers)
    assert found == code
    assert KEY not in json.dumps(answer)
    for path in ("/v1/models", "/openapi.json"):
        assert ask(locked, None, path, "GET", headers)[0] == code
    if "Host" not in headers and "Origin" not in headers:
        assert ask(locked, None, "/health", "GET", headers)[0] == 200  # for load balancers


def test_keys_that_cannot_be_sent_are_refused() -> None:
    for key in ("", " ", "two words", "schlüssel"):
        with pytest.raises(PoolwiseError, match="POOLWISE_TOKEN: a key of ASCII"), serving("x", token=key):
            pass


def test_any_host_can_be_allowed(folder: Path) -> None:
    with running(folder, token=KEY, hosts=["*"]) as server:
        headers = {"Authorization": f"Bearer {KEY}", "Host": "whatever.example"}
        assert ask(server, {"input": "a"}, headers=headers)[0] == 200


@contextlib.contextmanager
def started(folder: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command in a process of its own, and its port."""
    program = [
        sys.executable,
        "-c",
        "from poolwise.cli import main; main()",
        "serve",
        str(folder),
        "--port",
        "0",
        *options,
    ]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, env={**os.environ, **environment}, **pipes) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if ROUTE in line)
            yield process, int(re.search(r":(\d+)/v1", line)[1])  # type: ignore[index]
        finally:
            process.kill()


def test_the_command_stops_at_ctrl_c(folder: Path) -> None:
    with started(folder, "--name", "first", "--name", "second", POOLWISE_TOKEN=KEY) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"input": "a", "model": "second"})
        connection.request("POST", ROUTE, body, {"Authorization": f"Bearer {KEY}"})
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["model"]) == (200, "first")
        process.send_signal(signal.SIGINT)  # while the connection is open
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "stopped\n")


def test_sigterm_under_load_loses_nothing(folder: Path) -> None:
    """Every request is answered: with its vectors, with 503, or its connection is refused before it is sent."""
    ends: list[Any] = []

    def client(number: int, port: int) -> None:
        text = json.dumps({"input": [f"text {n} of client {number}" for n in range(1 + 40 * (number % 4))]})
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                connection.connect()
            except ConnectionRefusedError:
                return
            for _ in range(5):  # several requests on a connection, unless the server closes it
                connection.request("POST", ROUTE, text)
                response = connection.getresponse()
                ends.append((response.status, len(json.loads(response.read()))))
                if response.will_close:
                    break
            connection.close()

    with started(folder) as (process, port), ThreadPoolExecutor(16) as clients:
        running_clients = [clients.submit(client, number, port) for number in range(16)]
        wait_for(lambda: len(ends) > 16 or any(each.done() for each in running_clients))
        before = len(ends)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        for each in running_clients:
            each.result()  # raises if an answer was cut or a connection reset
    assert (process.returncode, out, err) == (143, "", "")
    assert {status for status, _ in ends} <= {200, 503}
    assert sum(status == 200 for status, _ in ends[before:]) > 0  # those in flight
