"""One model over HTTP with the interface of OpenAI's `/v1/embeddings`: FastAPI's routes on uvicorn's server.

`Connection` and `Gate` refuse what would cost memory or time before a request's content is read: too many or too slow
connections, bodies that are too large or framed in two ways, missing keys, foreign hosts. There is no TLS: the server
needs a proxy that has it before other machines reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from poolwise import __version__
from poolwise.encoding.encode import open_model
from poolwise.encoding.requests import (
    MAX_BYTES,
    Batcher,
    GoneError,
    Metrics,
    RequestError,
    answered,
    checked,
    described,
    schema,
)
from poolwise.errors import PoolwiseError

ROUTE, MODELS, HEALTH, METRICS = "/v1/embeddings", "/v1/models", "/health", "/metrics"
CONNECTIONS = 512
"""Open connections; requests on further ones are answered with 503, and twice as many are not accepted."""
BODIES = 64 * MAX_BYTES
"""Bytes of all bodies that are read or waiting; requests beyond are answered with 429."""
HEAD_SECONDS, BODY_SECONDS, REFUSED_SECONDS, IDLE_SECONDS, STALLED_SECONDS = 10, 60, 5, 75, 60
"""Time to send a request's head, its body, one that is refused, the next request, and to read an answer."""
DRAIN_SECONDS, LAST_SECONDS = 8.0, 1
"""At SIGTERM: for requests in flight, and then for connections to close."""
QUIET_SECONDS = 0.5
"""At SIGTERM: in which open connections are answered with 503, so that none is reset while it sends."""
TOKEN = "POOLWISE_TOKEN"
"""Environment variable with the key that clients must send."""
TOO_LARGE = f"the body is larger than {MAX_BYTES} bytes: send fewer texts at a time"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
log = logging.getLogger("poolwise.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """The ASGI application around FastAPI's: what is decided by a request's head, and the reading of its body.

    hosts: those that requests may name, if `token` is set; `*` allows all.
    """

    def __init__(self, app: Any, metrics: Metrics, token: str | None, hosts: Sequence[str]) -> None:
        self.app, self.metrics, self.token, self.hosts = app, metrics, token, {host.lower() for host in hosts}
        self.connections: Callable[[], int] = lambda: 0
        self.draining = False
        self.active = self.bytes = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start, status, route = time.perf_counter(), 499, scope["path"]
        route = route if route in (ROUTE, MODELS, HEALTH, METRICS) else "other"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.draining:
                    message.setdefault("headers", []).append((b"connection", b"close"))
            await send(message)

        admitted, reserved, body = 0, 0, bytearray()
        try:
            headers = heads(scope)
            refused = self._refused(scope, headers)
            admitted = int(refused is None)
            self.active += admitted
            if refused is None or b"expect" not in headers:  # else the client waits for an answer before it sends
                async for chunk in chunks(receive, keep=refused is None):
                    if refused is None and self.bytes + len(chunk) > BODIES:
                        refused = RequestError(429, "too many large requests are waiting; try again later")
                    if refused is None:
                        body += chunk
                        reserved, self.bytes = reserved + len(chunk), self.bytes + len(chunk)
            if refused is not None:
                raise refused
            await self.app(scope, replay(bytes(body), receive), watched)
        except RequestError as error:
            await error.response(close=error.status in (400, 408, 413, 503))(scope, receive, watched)
        except GoneError:
            pass
        except Exception as error:
            log.error("a request could not be answered: %s", described(error))
            if status == 499:
                failed = RequestError(500, "the request could not be answered")
                await failed.response()(scope, receive, watched)
        finally:
            self.active -= admitted
            self.bytes -= reserved
            self.metrics.requests.labels(route, status).inc()
            if route == ROUTE:
                self.metrics.seconds.observe(time.perf_counter() - start)

    def _refused(self, scope: Any, headers: dict[bytes, bytes]) -> RequestError | None:
        """Why a request is refused by its head, if it is."""
        if b"transfer-encoding" in headers and b"content-length" in headers:
            return RequestError(400, "both Content-Length and Transfer-Encoding; send one of them")
        if len(length := headers.get(b"content-length", b"0")) > 18 or int(length) > MAX_BYTES:
            return RequestError(413, TOO_LARGE)
        if self.connections() > CONNECTIONS:
            return RequestError(503, f"more than {CONNECTIONS} connections are open; try again later")
        if self.draining and scope["path"] != METRICS:
            return RequestError(503, "the server is stopping; try another one")
        if self.token is None:
            return None
        if (host := self._foreign(headers)) is not None:
            return RequestError(403, f"host {host!r} is not served here; start with --allow-host {host} to allow it")
        if scope["path"] == HEALTH:
            return None
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.token.encode()):
            return RequestError(401, "send the server's key: Authorization: Bearer KEY (api_key in OpenAI's clients)")
        return None

    def _foreign(self, headers: dict[bytes, bytes]) -> str | None:
        """The host that a request or the page it comes from names, if it is not one of ours: a page that lets its name
        resolve to this machine could otherwise use a browser's access to it."""
        if "*" in self.hosts:
            return None
        names = [f"//{headers.get(b'host', b'').decode('latin-1')}"]
        if b"origin" in headers:
            names.append(headers[b"origin"].decode("latin-1"))
        for name in names:
            host = name.removeprefix("//")
            with contextlib.suppress(ValueError):
                host = urlsplit(name).hostname or host
            if host.lower() not in self.hosts:
                return host
        return None


def heads(scope: Any) -> dict[bytes, bytes]:
    """A request's headers. Raises RequestError if one that decides something comes twice."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in found and name in (b"authorization", b"host", b"origin", b"content-length", b"transfer-encoding"):
            raise RequestError(400, f"the header {name.decode('latin-1')} comes twice")
        found[name] = value
    return found


async def chunks(receive: Receive, keep: bool) -> AsyncIterator[bytes]:
    """The pieces of a body. Of a refused one, whose client sends it before it reads the answer, only so much is read
    as comes in `REFUSED_SECONDS`. Raises RequestError if it is too large or too slow, GoneError if it ends early."""
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS if keep else REFUSED_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise GoneError
                chunk = message.get("body", b"")
                size += len(chunk)
                if keep and size > MAX_BYTES:
                    raise RequestError(413, TOO_LARGE)
                yield chunk
                if not message.get("more_body"):
                    return
    except TimeoutError:
        if keep:
            raise RequestError(408, f"the body was not complete after {BODY_SECONDS} seconds") from None


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which has been read, and then what follows it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class Connection(H11Protocol):
    """One connection of uvicorn's, with limits that it lacks: for the time of a request's head and for an answer that
    nobody reads. A client may close its side after a whole request and still gets its answer."""

    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > 2 * CONNECTIONS:
            transport.abort()
            return
        self._head = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_head")
        self._stop("_stalled")
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._stop("_head")
        elif self._head is None and self.conn.trailing_data[0]:  # the first bytes of the next head
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete:
            return None
        cycle.keep_alive = False
        return True

    def send_400_response(self, msg: str) -> None:
        """An answer to what is not HTTP. Inside a request, whose answer may have begun, the connection is cut."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = bytes(RequestError(400, "not a valid HTTP/1.1 request").response().body)
        fields = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=400, headers=fields, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop("_stalled")
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop("_stalled")
        super().resume_writing()

    def _stop(self, name: str) -> None:
        if (timer := getattr(self, name)) is not None:
            timer.cancel()
            setattr(self, name, None)


def create_app(batcher: Batcher, names: Sequence[str], metrics: Metrics) -> FastAPI:
    """The routes. names: of the model; the first is its own, the others are accepted too."""
    app = FastAPI(title="poolwise", version=__version__, docs_url=None, redoc_url=None)
    created = int(time.time())
    models = [{"id": name, "object": "model", "created": created, "owned_by": "poolwise"} for name in names]
    codes = (400, 401, 403, 408, 413, 422, 429, 500, 503)
    refused: dict[int | str, dict[str, Any]] = {code: {"description": HTTPStatus(code).phrase} for code in codes}
    body = {"required": True, "content": {"application/json": {"schema": schema(batcher, names)}}}
    others: dict[int | str, dict[str, Any]] = {code: refused[code] for code in (400, 401, 403, 408, 413, 503)}

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        routes = f"POST {ROUTE}, GET {MODELS}, GET {MODELS}/NAME, GET {HEALTH}, GET {METRICS}, GET /openapi.json"
        reason = f"no such route for {request.method}; there are {routes}"
        answer = RequestError(error.status_code, reason).response()
        answer.headers.update(error.headers or {})
        return answer

    @app.post(ROUTE, responses={**refused, 404: {"description": "Another model"}}, openapi_extra={"requestBody": body})
    async def embeddings(request: Request) -> Response:
        """Embeddings of texts, or of the model's own token ids."""
        asked = checked(await request.body(), names, batcher)
        vectors, tokens = await answered(batcher, asked, request.receive)
        metrics.texts.inc(len(vectors))
        metrics.tokens.inc(tokens)
        return Response(asked.answer(vectors, tokens, names[0]), media_type="application/json")

    @app.get(MODELS, responses=others)
    async def list_models() -> Any:
        """The names of the model."""
        return {"object": "list", "data": models}

    @app.get(MODELS + "/{name:path}", responses={**others, 404: {"description": "Another model"}})
    async def model(name: str) -> Any:
        """The model of this name."""
        if name not in names:
            raise RequestError(404, f"model {name[:60]!r} is not served here; {names[0]!r} is", "model")
        return models[names.index(name)]

    @app.get(HEALTH, responses=others)
    async def health() -> Any:
        """The model, the widths of its vectors and its maximum number of tokens."""
        facts = {"dimensions": batcher.width, "trained_dimensions": batcher.widths, "max_length": batcher.limit}
        return {"status": "ok", "model": names[0], **facts}

    @app.get(METRICS, responses=others, response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """Counts and times in Prometheus' format."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class Server(uvicorn.Server):
    """uvicorn's server of one model. `run` serves until `should_exit` or a signal."""

    def __init__(self, batcher: Batcher, names: Sequence[str], bound: socket.socket, **keys: Any) -> None:
        self.batcher, self.bound, self.port = batcher, bound, int(bound.getsockname()[1])
        self.announce: Callable[[], None] = lambda: None  # called when it listens
        self.metrics = Metrics(batcher, lambda: len(self.server_state.connections))
        self.gate = Gate(create_app(batcher, names, self.metrics), self.metrics, **keys)
        self.gate.connections = lambda: len(self.server_state.connections)
        settings: dict[str, Any] = {"ws": "none", "lifespan": "off", "loop": "asyncio", "log_config": None}
        settings |= {"access_log": False, "server_header": False, "proxy_headers": False}
        settings |= {"timeout_keep_alive": IDLE_SECONDS, "timeout_graceful_shutdown": LAST_SECONDS}
        super().__init__(uvicorn.Config(self.gate, http=Connection, **settings))
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # `Gate` logs, without any text

    def run(self, sockets: Any = None) -> None:
        super().run([self.bound])

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.announce()

    async def shutdown(self, sockets: Any = None) -> None:
        """Refuse new connections and requests, answer those in flight, close the rest: within ten seconds."""
        self.gate.draining = True
        end = time.monotonic() + DRAIN_SECONDS
        await self._accept_last()
        await asyncio.sleep(QUIET_SECONDS)
        while self.gate.active and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.batcher.close, 0.0 if self.force_exit else max(0.0, end - time.monotonic()))
        await asyncio.sleep(0.05)  # for the answers to those that were cut short
        await super().shutdown(sockets)

    async def _accept_last(self) -> None:
        """Accept the connections that wait, which closing the listening socket would reset, and close it."""
        loop, waiting = asyncio.get_running_loop(), []
        with contextlib.suppress(OSError):
            while True:
                waiting.append(self.bound.accept()[0])
        for server in self.servers:
            server.close()
        settings: Any = {"config": self.config, "server_state": self.server_state, "app_state": {}}
        for each in waiting:
            each.setblocking(False)
            await loop.connect_accepted_socket(lambda: Connection(**settings, _loop=loop), each)


@contextlib.contextmanager
def serving(
    model: str | Path,
    host: str = "127.0.0.1",
    port: int = 8080,
    dtype: str | None = None,
    *,
    names: Sequence[str] = (),
    token: str | None = None,
    hosts: Sequence[str] = (),
) -> Iterator[Server]:
    """A server with `model` (see `open_encoder`) loaded and warmed up, to `run`. Port 0: any free port.

    names: what clients call the model, `model` itself if none is given. token: a key that clients must send; requests
    must then name this host, the loopback's names or one of `hosts`.

    Raises PoolwiseError if the address cannot be used, before the model is loaded, and what `open_model` raises.
    """
    if token is not None and (not token.isascii() or not token.strip() or any(c.isspace() for c in token)):
        raise PoolwiseError(
            f"{TOKEN}: a key of ASCII characters without spaces is needed; make one: openssl rand -hex 32"
        )
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)  # asyncio sends small answers at once only if it is named
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise PoolwiseError(
            f"--host {host} --port {port}: {error.strerror or error}; give an address of this machine and a free port"
        ) from None
    with bound:  # it listens only when the model is loaded
        batcher = Batcher(open_model(model, dtype))
        try:
            yield Server(batcher, [*names] or [str(model)], bound, token=token, hosts=(*LOOPBACK, host, *hosts))
        finally:
            batcher.close()


def serve(
    model: str | Path,
    host: str,
    port: int,
    say: Callable[[str], None],
    dtype: str | None = None,
    names: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> None:
    """Serve until Ctrl-C or SIGTERM, with the key in the environment variable `POOLWISE_TOKEN` if there is one.

    `say` receives the model, its address and the encoder's notes. Exits with 130 after Ctrl-C, with 143 after SIGTERM.
    """

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    token = os.environ.get(TOKEN)
    try:
        with serving(model, host, port, dtype, names=names, token=token, hosts=hosts) as server:
            place = f"http://{host}:{server.port}{ROUTE}"
            line = f"{model} ({server.batcher.width} numbers a text): {place}; Ctrl-C stops"
            server.announce = lambda: say(line)
            if token is None and host not in LOOPBACK:
                say(f"note: anyone who reaches {host} can use it; set {TOKEN} to a key that clients must send")
            for note in server.batcher.fast.notes:
                say(f"note: {note}")
            server.run()
    except KeyboardInterrupt:
        say("stopped")
        raise SystemExit(130) from None
