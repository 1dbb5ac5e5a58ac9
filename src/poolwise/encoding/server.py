"""One model over HTTP with the interface of OpenAI's `/v1/embeddings`; `/health` describes the model.

Each connection has a thread that reads and answers; one worker encodes, so that requests that wait at the same time
form one batch. There are no keys and no TLS: to be reached from other machines it needs a proxy that has them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from poolwise.encoding.encode import SIDES, finite, open_model, prompt_of
from poolwise.encoding.fast import FastEncoder
from poolwise.errors import PoolwiseError

ROUTE, MODELS = "/v1/embeddings", "/v1/models"
MAX_BYTES = 4 << 20
"""Largest body of a request. A larger one is answered with 413, as are more than `MAX_TEXTS` texts."""
MAX_TEXTS = 2048
GATHER = 0.005
"""Seconds that the first request of a batch waits for others."""
WAITING = 256
"""Requests in the queue; further ones are answered with 503."""
PATIENCE = 60
"""Seconds after which a silent connection is closed."""


class RequestError(Exception):
    """A request that is refused: HTTP status and reason."""


@dataclass
class Job:
    """One request: its texts, and the future of their vectors (N, D) fp32 and number of tokens."""

    texts: Sequence[str]
    side: str | None
    answer: Future[tuple[np.ndarray, int]] = field(default_factory=Future)


class Batcher:
    """The thread that encodes what all connections submit."""

    def __init__(self, fast: FastEncoder) -> None:
        self.fast = fast
        self.prompts = {side: prompt_of(fast, None, side) for side in (None, *SIDES)}
        for side, prompt in self.prompts.items():
            self.width = fast.encode(["warm up"], prompt, side=side).shape[1]
        self.queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.closing = False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, texts: Sequence[str], side: str | None) -> Future[tuple[np.ndarray, int]]:
        """A future of the (N, D) vectors of the texts and the number of their tokens."""
        if self.closing or self.queue.qsize() >= WAITING:
            raise RequestError(503, "too many requests are waiting, or the server is stopping; try again later")
        job = Job(texts, side)
        self.queue.put(job)
        return job.answer

    def close(self) -> None:
        """Finish the current batch and stop."""
        self.closing = True
        self.queue.put(None)
        self.thread.join()

    def _work(self) -> None:
        while not self.closing and (job := self.queue.get()) is not None:
            jobs = [job, *self._others(MAX_TEXTS - len(job.texts))]
            for side in dict.fromkeys(job.side for job in jobs):
                self._encode([job for job in jobs if job.side == side])

    def _others(self, room: int) -> Iterator[Job]:
        """Further requests that arrive within `GATHER`, up to `room` texts."""
        end = time.monotonic() + GATHER
        with contextlib.suppress(queue.Empty):
            while room > 0 and (job := self.queue.get(timeout=max(0.0, end - time.monotonic()))) is not None:
                room -= len(job.texts)
                yield job

    def _encode(self, jobs: list[Job]) -> None:
        side, texts = jobs[0].side, [text for job in jobs for text in job.texts]
        try:
            vectors = finite(self.fast.encode(texts, self.prompts[side], side=side)).astype("<f4")
            counts = [self._tokens(job.texts, self.prompts[side]) for job in jobs]
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:  # one by one, so that only the request at fault fails
                for job in jobs:
                    self._encode([job])
            return
        for job, count in zip(jobs, counts, strict=True):
            own, vectors = vectors[: len(job.texts)], vectors[len(job.texts) :]
            job.answer.set_result((own, count))

    def _tokens(self, texts: Sequence[str], prompt: str) -> int:
        """Number of tokens of the texts with their prompts, truncated as the model truncates them."""
        if self.fast.ours:
            return int(self.fast.tokenise(texts, prompt).lengths.sum())
        count = 0
        for start in range(0, len(texts), 64):
            features = self.fast.encoder.preprocess([*texts[start : start + 64]], prompt=prompt or None)
            mask = features.get("attention_mask")
            count += int(mask.sum()) if mask is not None else len(features["input_ids"])
        return count


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    disable_nagle_algorithm = True  # otherwise each body waits 40 ms for its header to be acknowledged
    server: Server

    def do_POST(self) -> None:
        """Answers every request, GET too."""
        try:
            body = self._body() if self.command == "POST" else b""
            if (self.command, self.path) == ("GET", "/health"):
                answer = self.server.about()
            elif (self.command, self.path) == ("GET", MODELS):
                answer = {"object": "list", "data": [{"id": self.server.model, "object": "model"}]}
            elif (self.command, self.path) == ("POST", ROUTE):
                answer = self._embeddings(body)
            else:
                raise RequestError(
                    404,
                    f"no such route: {self.command} {self.path}; allowed: GET /health, GET {MODELS}, POST {ROUTE}",
                )
        except RequestError as error:
            self.send_error(*error.args)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            self.log_error("%s: %s", type(error).__name__, error)
            self.send_error(500, "the texts could not be encoded; the reason is in the server's log")
        else:
            self._answer(200, answer)

    do_GET = do_POST  # noqa: N815 (the parent's names)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and len(length) < 20):
            raise RequestError(400, "no Content-Length; send the body in one piece, not in chunks")
        if int(length) > MAX_BYTES:
            for _ in range(min(int(length), 16 * MAX_BYTES) >> 16):  # clients read the answer after they have sent all
                self.rfile.read(1 << 16)
            raise RequestError(
                413, f"a body of {length} bytes; at most {MAX_BYTES} are allowed: send fewer texts at a time"
            )
        return self.rfile.read(int(length))

    def _embeddings(self, body: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"not valid JSON: {error}") from None
        texts, side, form = self._checked(asked)
        vectors, tokens = self.server.batcher.submit(texts, side).result()
        values = [base64.b64encode(row).decode() for row in vectors] if form == "base64" else vectors.tolist()
        data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.server.model, "usage": usage}

    def _checked(self, asked: Any) -> tuple[list[str], str | None, str]:
        """Texts, side and encoding format of a request. Unknown fields, which some clients send, are ignored."""
        if not isinstance(asked, dict) or "input" not in asked:
            raise RequestError(
                400, 'send {"input": text or list of texts, "model": name, "input_type": query or document}'
            )
        model, width = self.server.model, self.server.batcher.width
        if asked.get("model", model) != model:
            raise RequestError(404, f"model {asked['model']!r} is not served here; {model!r} is")
        texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise RequestError(
                400, "input must be a text or a list of texts, none of them empty; token ids are not supported"
            )
        if len(texts) > MAX_TEXTS:
            raise RequestError(413, f"{len(texts)} texts; at most {MAX_TEXTS} are allowed in one request")
        if any(0xD800 <= ord(c) <= 0xDFFF for text in texts if not text.isascii() for c in text):
            raise RequestError(400, "input contains an unpaired surrogate, so it is not valid Unicode")
        given = {
            "input_type": (None, *SIDES),
            "encoding_format": (None, "float", "base64"),
            "dimensions": (None, width),
        }
        for name, allowed in given.items():
            if asked.get(name) not in allowed:
                words = ", ".join(map(json.dumps, allowed[1:]))
                raise RequestError(400, f"{name} = {json.dumps(asked[name])}; allowed: {words}")
        return texts, asked.get("input_type"), asked.get("encoding_format") or "float"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """An error as OpenAI's clients expect it. The connection is closed: the body may not have been read."""
        self.close_connection = True
        kind = "server_error" if code >= 500 else "invalid_request_error"
        reason = message or self.responses.get(code, ("error",))[0]
        self._answer(code, {"error": {"message": reason, "type": kind, "param": None, "code": code}})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Only errors of the server are logged, not requests."""


class Server(ThreadingHTTPServer):
    """Bound to its address; `serving` adds the model."""

    model: str
    batcher: Batcher
    request_queue_size = WAITING  # of connections; with the default of 5 some time out under load

    def about(self) -> dict[str, Any]:
        """The model, the width of its vectors and its maximum number of tokens."""
        length = self.batcher.fast.max_seq_length
        return {"status": "ok", "model": self.model, "dimensions": self.batcher.width, "max_length": length}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not report clients that close the connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(model: str | Path, host: str = "127.0.0.1", port: int = 8080, dtype: str | None = None) -> Iterator[Server]:
    """A server with `model` (see `open_encoder`) loaded and warmed up, for `serve_forever`. Port 0: any free port.

    Raises PoolwiseError if the address cannot be used, before the model is loaded, and what `open_model` raises.
    """
    try:
        server = Server((host, port), Handler)
    except OSError as error:
        raise PoolwiseError(
            f"--host {host} --port {port}: {error.strerror or error}; give an address of this machine and a free port"
        ) from None
    with server:
        server.model, server.batcher = str(model), Batcher(open_model(model, dtype))
        try:
            yield server
        finally:
            server.batcher.close()


def serve(model: str | Path, host: str, port: int, say: Callable[[str], None], dtype: str | None = None) -> None:
    """Serve until Ctrl-C. `say` receives the model, its address and the encoder's notes."""
    with serving(model, host, port, dtype) as server:
        say(f"{model} ({server.batcher.width} numbers a text): http://{host}:{server.server_port}{ROUTE}; Ctrl-C stops")
        for note in server.batcher.fast.notes:
            say(f"note: {note}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")
            raise SystemExit(130) from None
