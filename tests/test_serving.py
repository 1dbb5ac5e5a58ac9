"""`poolwise serve`, over real HTTP: whoever asks gets the vectors of his own texts, and mistakes get a reason."""

from __future__ import annotations

import base64
import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolwise
from poolwise.encoding import server as serving_file
from poolwise.encoding.server import MAX_BYTES, MAX_TEXTS, ROUTE, Server, serving
from poolwise.errors import PoolwiseError
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from tiny import SENTENCES, tiny_folder

QUERY = "query: find the island. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    recipe = Recipe(base_model=str(tiny_folder(root)), max_length=48, dtype="float32", query_prompt=QUERY)
    encoder = poolwise.build(
        recipe, Design(name="d", attention="causal", pooling="cross_attention"), seed=0, device="cpu"
    )
    return poolwise.export(encoder, root / "own")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, port=0) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    """The vectors of texts, encoded one by one by the plain encoder."""
    encoder = poolwise.load(folder)
    return lambda texts, prompt="": np.stack([encoder.encode(text, prompt=prompt) for text in texts])


def ask(server: Server, content: Any, path: str = ROUTE, method: str = "POST") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    body = content if isinstance(content, (bytes, type(None))) else json.dumps(content)
    connection.request(method, path, body)
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "application/json"
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def vectors(answer: dict[str, Any]) -> np.ndarray:
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return np.array([row["embedding"] for row in answer["data"]], np.float32)


def test_one_text_and_several(server: Server, folder: Path, expected):
    code, answer = ask(server, {"input": SENTENCES[0], "model": str(folder)})
    assert (code, answer["object"], answer["model"]) == (200, "list", str(folder))
    assert np.abs(vectors(answer) - expected(SENTENCES[:1])).max() < 1e-5
    texts = [*SENTENCES, SENTENCES[1]]  # one comes twice
    _, answer = ask(server, {"input": texts, "user": "somebody"})
    assert np.abs(vectors(answer) - expected(texts)).max() < 1e-5
    tokens = sum(len(poolwise.load(folder)[0].words(text)["input_ids"]) for text in texts)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_sides_and_forms(server: Server, expected):
    _, plain = ask(server, {"input": [*SENTENCES], "input_type": "document"})
    _, query = ask(server, {"input": [*SENTENCES], "input_type": "query", "dimensions": 32})
    assert np.abs(vectors(plain) - expected(SENTENCES)).max() < 1e-5
    assert np.abs(vectors(query) - expected(SENTENCES, QUERY)).max() < 1e-5
    assert np.abs(vectors(query) - vectors(plain)).max() > 1e-2
    assert query["usage"]["total_tokens"] > plain["usage"]["total_tokens"]
    _, packed = ask(server, {"input": [*SENTENCES], "encoding_format": "base64"})
    read = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in packed["data"]]
    assert np.abs(np.stack(read) - vectors(plain)).max() < 1e-6


def test_the_instruction_alone_is_reused(server: Server):
    """The encoder was warmed up with texts that share nothing, or the first request would pass for the instruction."""
    fast = server.batcher.fast
    ids = fast.backbone.words(QUERY + "x")["input_ids"]
    assert 0 < fast._prefixes[QUERY].length <= len(ids)
    before = fast.counts.computed, fast.counts.tokens
    ask(server, {"input": [*SENTENCES], "input_type": "query"})
    assert fast.counts.computed - before[0] < fast.counts.tokens - before[1]


def test_many_at_once_get_their_own(server: Server, expected, monkeypatch):
    """The first request keeps the worker busy until 23 others wait, of mixed sides and sizes: three calls do."""
    fast, calls, gate = server.batcher.fast, [], threading.Event()
    encode = type(fast).encode

    def slow(self: Any, texts: list[str], prompt: str = "", **rest: Any) -> np.ndarray:
        calls.append(len(texts))
        assert gate.wait(20)
        return encode(self, texts, prompt, **rest)

    monkeypatch.setattr(type(fast), "encode", slow)
    sides = ("query", "document", None)
    asked = [([f"{SENTENCES[(n + i) % 6][: 9 + n]} {i}" for i in range(1 + n % 4)], sides[n % 3]) for n in range(24)]
    with ThreadPoolExecutor(24) as clients:

        def send(number: int) -> Future[tuple[int, dict[str, Any]]]:
            texts, side = asked[number]
            return clients.submit(ask, server, {"input": texts, "input_type": side})

        answers = [send(0)]
        wait_for(lambda: calls)
        answers += [send(number) for number in range(1, 24)]
        wait_for(lambda: server.batcher.queue.qsize() == 23)
        gate.set()
    for (texts, side), future in zip(asked, answers, strict=True):
        code, answer = future.result()
        assert code == 200
        assert np.abs(vectors(answer) - expected(texts, QUERY if side == "query" else "")).max() < 1e-5
    assert len(calls) == 4
    assert sum(calls) == sum(len(texts) for texts, _ in asked)


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_text_that_fails_does_not_fail_the_others(server: Server, expected, monkeypatch, capfd):
    fast, calls, gate = server.batcher.fast, [], threading.Event()
    encode = type(fast).encode

    def fragile(self: Any, texts: list[str], prompt: str = "", **rest: Any) -> np.ndarray:
        calls.append(texts)
        if "first" in texts:
            assert gate.wait(20)
        if "bad" in texts:
            raise RuntimeError("no such text")
        found = encode(self, texts, prompt, **rest)
        found[[text == "diverged" for text in texts]] = np.nan
        return found

    monkeypatch.setattr(type(fast), "encode", fragile)
    with ThreadPoolExecutor(5) as clients:
        answers = [clients.submit(ask, server, {"input": "first"})]
        wait_for(lambda: calls)
        answers += [clients.submit(ask, server, {"input": text}) for text in ("good", "bad", "fine", "diverged")]
        wait_for(lambda: server.batcher.queue.qsize() == 4)
        gate.set()
    codes = [future.result()[0] for future in answers]
    assert codes == [200, 200, 500, 200, 500]
    assert np.abs(vectors(answers[3].result()[1]) - expected(["fine"])).max() < 1e-5
    assert answers[2].result()[1]["error"]["type"] == "server_error"
    log = capfd.readouterr().err  # not in the answer
    assert "no such text" in log
    assert "text 1 is not finite" in log
    assert ask(server, {"input": "good"})[0] == 200  # and the worker lives


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[" * 100_000, 400, "not valid JSON"),
        ([], 400, "send {"),
        ({"model": "x"}, 400, "send {"),
        ({"input": []}, 400, "none of them empty"),
        ({"input": ["a", " "]}, 400, "none of them empty"),
        ({"input": [1, 2]}, 400, "token ids are not supported"),
        ({"input": "\ud800"}, 400, "unpaired surrogate"),
        ({"input": "a", "input_type": "querry"}, 400, 'input_type = "querry"; allowed: "query", "document"'),
        ({"input": "a", "encoding_format": ["float"]}, 400, "encoding_format"),
        ({"input": "a", "dimensions": 8}, 400, "dimensions = 8; allowed: 32"),
        ({"input": "a", "model": "gpt"}, 404, "model 'gpt' is not served here"),
        ({"input": ["a"] * (MAX_TEXTS + 1)}, 413, "at most 2048"),
        (b" " * (MAX_BYTES + 1), 413, "send fewer texts"),
    ],
)
def test_mistakes(server: Server, content: Any, code: int, told: str):
    found, answer = ask(server, content)
    assert (found, answer["error"]["code"]) == (code, code)
    assert told in answer["error"]["message"]


def test_pages(server: Server, folder: Path):
    code, about = ask(server, None, "/health", "GET")
    assert (code, about) == (200, {"status": "ok", "model": str(folder), "dimensions": 32, "max_length": 48})
    models = {"object": "list", "data": [{"id": str(folder), "object": "model"}]}
    assert ask(server, None, "/v1/models", "GET") == (200, models)
    for path, method in ((ROUTE, "GET"), ("/v1/chat", "POST"), ("/", "GET")):
        code, answer = ask(server, b"{}" if method == "POST" else None, path, method)
        assert code == 404
        assert f"POST {ROUTE}" in answer["error"]["message"]
    assert ask(server, None, ROUTE, "PUT")[0] == 501
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest("POST", ROUTE)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest("POST", ROUTE)
    connection.putheader("Content-Length", "9" * 5000)
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


def test_a_connection_is_kept_and_a_lost_client_is_no_error(server: Server, capfd):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    for text in ("one", "two"):
        connection.request("POST", ROUTE, json.dumps({"input": text}))
        socket_before = connection.sock
        assert connection.getresponse().read()
        assert connection.sock is socket_before is not None
    connection.close()
    with socket.create_connection(("127.0.0.1", server.server_port)) as lost:
        lost.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
        lost.sendall(f"POST {ROUTE} HTTP/1.1\r\nContent-Length: 100\r\n\r\n{{".encode())
    assert ask(server, {"input": "still here"})[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_queue_says_so(server: Server, monkeypatch):
    monkeypatch.setattr(serving_file, "WAITING", 0)
    code, answer = ask(server, {"input": "a"})
    assert (code, answer["error"]["type"]) == (503, "server_error")


def test_an_address_that_cannot_be_had(server: Server, monkeypatch):
    monkeypatch.setattr(serving_file, "open_model", lambda *given: pytest.fail("loaded before the port was tried"))
    with (
        pytest.raises(PoolwiseError, match=f"--port {server.server_port}: Address already in use"),
        serving("x", port=server.server_port),
    ):
        pass
    with pytest.raises(PoolwiseError, match=r"--host no\.such\.host"), serving("x", "no.such.host.invalid", 0):
        pass


def test_the_command_stops_at_ctrl_c(folder: Path):
    program = [sys.executable, "-c", "from poolwise.cli import main; main()", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if ROUTE in line)
        port = int(re.search(r":(\d+)/v1", line)[1])  # type: ignore[index]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", ROUTE, json.dumps({"input": "a"}))
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)  # while the connection is open
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "stopped\n")
