"""`poolwise serve`, over real HTTP: clients get the vectors of their own texts, and mistakes get a reason."""

from __future__ import annotations

import base64
import http.client
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

import poolwise
from poolwise.encoding import requests
from poolwise.encoding import server as server_file
from poolwise.encoding.requests import MAX_BYTES, MAX_TEXTS, TURN
from poolwise.encoding.server import ROUTE, Server, serving
from poolwise.errors import PoolwiseError
from served import QUERY, ask, running, small_model, vectors, wait_for
from tiny import SENTENCES, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with running(folder, names=["own", "text-embedding-3-small"]) as made:
        yield made


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    """The vectors of texts, encoded one by one by the plain encoder."""
    encoder = poolwise.load(folder)
    return lambda texts, prompt="": np.stack([encoder.encode(text, prompt=prompt) for text in texts])


def test_one_text_and_several(server: Server, folder: Path, expected):
    code, answer = ask(server, {"input": SENTENCES[0], "model": "own"})
    assert (code, answer["object"], answer["model"]) == (200, "list", "own")
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
    assert np.array_equal(np.stack(read), vectors(plain))


def test_trained_widths_are_prefixes_of_unit_length(server: Server, expected):
    _, answer = ask(server, {"input": [*SENTENCES], "dimensions": 8})
    short = expected(SENTENCES)[:, :8]
    assert np.abs(vectors(answer) - short / np.linalg.norm(short, axis=1, keepdims=True)).max() < 1e-5


@pytest.mark.parametrize("side", [None, "query"])
def test_token_ids_are_encoded_as_their_texts_are(server: Server, folder: Path, side: str | None):
    words = poolwise.load(folder)[0].words
    ids = [words(text)["input_ids"] for text in SENTENCES]
    _, answer = ask(server, {"input": ids, "input_type": side})
    _, texts = ask(server, {"input": [*SENTENCES], "input_type": side})
    if side is None:
        assert np.abs(vectors(answer) - vectors(texts)).max() < 1e-6
        _, alone = ask(server, {"input": ids[0]})
        assert np.abs(vectors(alone)[0] - vectors(answer)[0]).max() < 1e-6
    else:  # the prompt's last space is a token of its own beside ids
        assert ((vectors(answer) * vectors(texts)).sum(1) > 0.9).all()
        assert answer["usage"]["total_tokens"] > sum(map(len, ids))


def test_token_ids_of_another_tokenizer_are_refused(server: Server, folder: Path):
    words = poolwise.load(folder)[0].words
    order = np.random.default_rng(0).permutation(np.arange(3, len(words)))
    foreign = [[int(order[each - 3]) for each in words(text)["input_ids"]] for text in SENTENCES]
    code, answer = ask(server, {"input": foreign})
    assert code == 422
    assert "of another tokenizer" in answer["error"]["message"]
    assert "check_embedding_ctx_length=False" in answer["error"]["message"]


def test_the_instruction_alone_is_reused(server: Server):
    """The encoder was warmed up with texts that share nothing, or the first request would pass for the instruction."""
    fast = server.batcher.fast
    ids = fast.backbone.words(QUERY + "x")["input_ids"]
    assert 0 < fast._prefixes[QUERY].length <= len(ids)
    before = fast.counts.computed, fast.counts.tokens
    ask(server, {"input": [*SENTENCES], "input_type": "query"})
    assert fast.counts.computed - before[0] < fast.counts.tokens - before[1]


def blocked(monkeypatch: pytest.MonkeyPatch, server: Server) -> tuple[list[int], threading.Event]:
    """(number of texts of each call, gate): the encoder waits in its first call until the gate is opened."""
    fast, calls, gate = server.batcher.fast, list[int](), threading.Event()
    encode = type(fast).encode_rows

    def slow(self: Any, rows: Any, prompt: str = "") -> np.ndarray:
        calls.append(len(rows))
        assert gate.wait(20)
        return encode(self, rows, prompt)

    monkeypatch.setattr(type(fast), "encode_rows", slow)
    return calls, gate


def test_many_at_once_get_their_own(server: Server, expected, monkeypatch):
    """The first request keeps the encoder busy until 23 others wait, of mixed sides and sizes: four calls do."""
    calls, gate = blocked(monkeypatch, server)
    monkeypatch.setattr(server.batcher, "pace", 1e9)
    sides = ("query", "document", None)
    asked = [([f"{SENTENCES[(n + i) % 6][: 9 + n]} {i}" for i in range(1 + n % 4)], sides[n % 3]) for n in range(24)]
    with ThreadPoolExecutor(24) as clients:

        def send(number: int) -> Future[tuple[int, dict[str, Any]]]:
            texts, side = asked[number]
            return clients.submit(ask, server, {"input": texts, "input_type": side})

        answers = [send(0)]
        wait_for(lambda: calls)
        answers += [send(number) for number in range(1, 24)]
        wait_for(lambda: len(server.batcher.waiting) == 23)
        gate.set()
    for (texts, side), future in zip(asked, answers, strict=True):
        code, answer = future.result()
        assert code == 200
        assert np.abs(vectors(answer) - expected(texts, QUERY if side == "query" else "")).max() < 1e-5
    assert len(calls) == 4
    assert sum(calls) == sum(len(texts) for texts, _ in asked)


def test_a_short_request_does_not_wait_for_a_long_one(server: Server, monkeypatch):
    calls, gate = blocked(monkeypatch, server)
    monkeypatch.setattr(server.batcher, "pace", requests.ROOM[0] / TURN)
    with ThreadPoolExecutor(3) as clients:
        long = clients.submit(ask, server, {"input": [f"text {n} of many in one request" for n in range(1000)]})
        wait_for(lambda: calls)
        short = clients.submit(ask, server, {"input": "a short one"})
        wait_for(lambda: len(server.batcher.waiting) == 2)
        gate.set()
        assert short.result()[0] == 200
        assert not long.done()
        assert long.result()[0] == 200


def test_a_text_that_fails_does_not_fail_the_others(server: Server, expected, monkeypatch, caplog):
    batcher, calls, gate = server.batcher, [], threading.Event()
    compute = type(batcher)._vectors

    def fragile(self: Any, items: Any, side: str | None) -> Any:
        calls.append(items)
        if "first" in items:
            assert gate.wait(20)
        if "a bad secret" in items:
            raise RuntimeError(f"cannot encode {items}")
        found, lengths = compute(self, items, side)
        found[[item == "diverged" for item in items]] = np.nan
        return found, lengths

    monkeypatch.setattr(type(batcher), "_vectors", fragile)
    with ThreadPoolExecutor(5) as clients:
        answers = [clients.submit(ask, server, {"input": "first"})]
        wait_for(lambda: calls)
        texts = ("good", "a bad secret", "fine", ["good", "diverged"])
        answers += [clients.submit(ask, server, {"input": text}) for text in texts]
        wait_for(lambda: len(batcher.waiting) == 4)
        gate.set()
    codes = [future.result()[0] for future in answers]
    assert codes == [200, 200, 500, 200, 500]
    assert np.abs(vectors(answers[3].result()[1]) - expected(["fine"])).max() < 1e-5
    assert answers[2].result()[1]["error"]["type"] == "server_error"
    assert answers[4].result()[1]["error"]["param"] == "input[1]"
    assert "RuntimeError at " in caplog.text
    assert "secret" not in caplog.text  # no text is logged, not even in the message of an error
    assert ask(server, {"input": "good"})[0] == 200  # and the encoder lives


@pytest.mark.parametrize(
    ("content", "code", "param", "message"),
    [
        (b"", 400, None, "not valid JSON"),
        (b"{", 400, None, "not valid JSON"),
        (b"[" * 100_000, 400, None, "not valid JSON"),
        (b'{"input": "\xff"}', 400, None, "not valid JSON"),
        (b'{"input": "\\ud800"}', 400, None, "not valid JSON"),
        (b'{"input": NaN}', 400, None, "not valid JSON"),
        (b'{"input": ' + b"9" * 5000 + b"}", 400, None, "not valid JSON"),
        ([], 422, "input", "must be an object"),
        ({"model": "own"}, 422, "input", "must be an object"),
        ({"input": None}, 422, "input", "give a text or a list"),
        ({"input": {"text": "a"}}, 422, "input", "give a text or a list"),
        ({"input": []}, 422, "input", "at least one"),
        ({"input": ""}, 422, "input[0]", "is empty"),
        ({"input": ["a", " "]}, 422, "input[1]", "input[1] is empty"),
        ({"input": ["a", "b", 3]}, 422, "input[2]", "input[2] = 3; it must be a text"),
        ({"input": ["a", [3]]}, 422, "input[1]", "it must be a text"),
        ({"input": [True]}, 422, "input[0]", "it must be"),
        ({"input": [[1], []]}, 422, "input[1]", "is empty"),
        ({"input": [[1], [1, 2.5]]}, 422, "input[1]", "token ids are whole numbers"),
        ({"input": [5, 320]}, 422, "input[0]", "whose ids are 0 to 319"),
        ({"input": [[5], [-1]]}, 422, "input[1]", "check_embedding_ctx_length=False"),
        ({"input": "a", "input_type": "querry"}, 422, "input_type", '"querry"; allowed: "query", "document"'),
        ({"input": "a", "encoding_format": ["float"]}, 422, "encoding_format", 'allowed: "float", "base64"'),
        ({"input": "a", "dimensions": 9}, 422, "dimensions", "dimensions = 9; allowed: 8, 16, 32"),
        ({"input": "a", "dimensions": 8.0}, 422, "dimensions", "dimensions = 8.0"),
        ({"input": "a", "dimensions": True}, 422, "dimensions", "dimensions = true"),
        ({"input": "a", "model": "gpt"}, 404, "model", 'model "gpt" is not served here'),
        ({"input": "a", "model": [1]}, 404, "model", "is not served here"),
        ({"input": ["a"] * (MAX_TEXTS + 1)}, 413, "input", "at most 2048"),
        ({"input": ["a"] * 100_000}, 413, "input", "100000 texts"),
        (b" " * (MAX_BYTES + 1), 413, None, "send fewer texts"),
        (b" " * 10_000_000, 413, None, "send fewer texts"),
    ],
)  # fmt: skip
def test_mistakes(server: Server, content: Any, code: int, param: str | None, message: str):
    found, answer = ask(server, content)
    assert (found, answer["error"]["code"], answer["error"]["param"]) == (code, code, param)
    assert message in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 400


def test_pages(server: Server):
    code, about = ask(server, None, "/health", "GET")
    widths = {"dimensions": 32, "trained_dimensions": [8, 16, 32]}
    assert (code, about) == (200, {"status": "ok", "model": "own", **widths, "max_length": 48})
    code, models = ask(server, None, "/v1/models", "GET")
    assert [each["id"] for each in models["data"]] == ["own", "text-embedding-3-small"]
    assert ask(server, None, "/v1/models/own", "GET") == (200, models["data"][0])
    assert ask(server, None, "/v1/models/a/b", "GET")[0] == 404
    assert ask(server, {"input": "a", "model": "text-embedding-3-small"})[1]["model"] == "own"
    for path, method, code in ((ROUTE, "GET", 405), ("/v1/chat", "POST", 404), ("/", "GET", 404), (ROUTE, "PUT", 405)):
        found, answer = ask(server, b"{}" if method != "GET" else None, path, method)
        assert found == code
        assert f"POST {ROUTE}" in answer["error"]["message"]


def test_metrics_count_requests_texts_and_tokens(folder: Path):
    with running(folder) as server:
        _, answer = ask(server, {"input": [*SENTENCES]})
        ask(server, {"input": []})
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    assert f'poolwise_requests_total{{route="{ROUTE}",status="200"}} 1.0' in text
    assert f'poolwise_requests_total{{route="{ROUTE}",status="422"}} 1.0' in text
    assert "poolwise_texts_total 6.0" in text
    assert f"poolwise_tokens_total {float(answer['usage']['total_tokens'])}" in text
    assert "poolwise_request_seconds_count 2.0" in text


def test_models_with_an_encode_of_their_own_are_served_too(tmp_path: Path):
    loaded = Transformer(str(tiny_folder(tmp_path)), max_seq_length=48)
    plain = SentenceTransformer(modules=[loaded, Pooling(32, "mean"), Dense(32, 12)], device="cpu")
    batcher = requests.Batcher(poolwise.FastEncoder(plain))
    assert not batcher.fast.ours
    found, tokens = batcher.submit([*SENTENCES], None).result()
    assert np.abs(found - plain.encode([*SENTENCES])).max() < 1e-5
    assert tokens == sum(min(48, len(plain.tokenizer(text)["input_ids"])) for text in SENTENCES)
    assert np.abs(batcher.submit(["ferry " * 100_000], None).result()[0] - plain.encode(["ferry " * 90])).max() < 1e-5
    with pytest.raises(requests.RequestError, match="this model does not take"):
        requests.checked(b'{"input": [1, 2]}', ["m"], batcher)
    batcher.close()


def test_an_address_that_cannot_be_had(server: Server, monkeypatch):
    monkeypatch.setattr(server_file, "open_model", lambda *given: pytest.fail("loaded before the port was tried"))
    with (
        pytest.raises(PoolwiseError, match=f"--port {server.port}: Address already in use"),
        serving("x", port=server.port),
    ):
        pass
    with pytest.raises(PoolwiseError, match=r"--host no\.such\.host"), serving("x", "no.such.host.invalid", 0):
        pass


def test_without_the_extra_the_command_names_it(monkeypatch):
    from poolwise.commands.models import serve

    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "poolwise.encoding.server")
    with pytest.raises(PoolwiseError, match=r"pip install 'poolwise\[serve\]'"):
        serve("x")


def test_the_schema_lists_what_is_allowed(server: Server):
    _, page = ask(server, None, "/openapi.json", "GET")
    body = page["paths"][ROUTE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["dimensions"]["enum"] == [None, 8, 16, 32]
    assert json.dumps(body).count('"maximum": 319') == 2
