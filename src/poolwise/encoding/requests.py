"""Requests for embeddings: what they may ask for, and the thread that encodes them.

Texts of all requests that wait are encoded together, in turns of about `TURN` seconds that each waiting request has its
share of, so that a request of one short text does not wait for one of two thousand long ones.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import logging
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.responses import Response

from poolwise.encoding.encode import SIDES, prompt_of
from poolwise.encoding.fast import FastEncoder
from poolwise.encoding.rows import cut
from poolwise.model.encoder import trained_widths

MAX_BYTES = 4 << 20
"""Largest body of a request. A larger one is answered with 413, as are more than `MAX_TEXTS` texts."""
MAX_TEXTS = 2048
WAITING = 256
"""Requests that may wait; further ones are answered with 429."""
WAITING_TEXTS = 16 * MAX_TEXTS
"""Texts that may wait."""
ANSWER_SECONDS = 120
"""Seconds after which a request that still waits is answered with 503."""
TURN = 0.1
"""Seconds that the texts encoded together should take, by the pace of those before."""
ROOM = (512, 65536)
"""Fewest and most tokens encoded together."""
SAMPLED_ROWS, SAMPLED_IDS = 8, 64
"""How much of a request's token ids is decoded to see whose they are."""
FORMS = ("float", "base64")

log = logging.getLogger("poolwise.serve")

Item = str | tuple[int, ...]


class RequestError(Exception):
    """A request that is refused. status: of HTTP. param: the field or the item at fault, such as `input[3]`."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def response(self, close: bool = False) -> Response:
        """The error as OpenAI's clients expect it. close: the connection is closed."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        content = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        more = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "1"}}
        headers = {**more.get(self.status, {}), **({"connection": "close"} if close else {})}
        return Response(orjson.dumps({"error": content}), self.status, headers, "application/json")


class GoneError(Exception):
    """The client has closed the connection; nobody reads an answer."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for: its texts or token ids, side, encoding format and width of the vectors."""

    items: list[Item]
    side: str | None
    form: str
    width: int

    def answer(self, vectors: np.ndarray, tokens: int, model: str) -> bytes:
        """The body with the vectors (N, D); those that are cut to a trained width get unit length again."""
        if self.width < vectors.shape[1]:
            short = vectors[:, : self.width]
            vectors = short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)
        rows: Any = np.ascontiguousarray(vectors, "<f4")
        if self.form == "base64":
            rows = [base64.b64encode(row).decode() for row in rows]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        content = {"object": "list", "data": data, "model": model, "usage": usage}
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


@dataclass(eq=False)
class Job:
    """A request in the queue. `answer` becomes its vectors (N, D) fp32 and its number of tokens."""

    items: Sequence[Item]
    side: str | None
    answer: Future[tuple[np.ndarray, int]] = field(default_factory=Future)
    vectors: np.ndarray | None = None
    next: int = 0
    left: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.left = len(self.items)

    def put(self, number: int, vector: np.ndarray, tokens: int) -> None:
        """The vector (D,) of item `number`; the last one completes the answer."""
        if not np.isfinite(vector).all():
            self.fail(RequestError(500, f"the embedding of input[{number}] is not finite", f"input[{number}]"))
            return
        if self.vectors is None:
            self.vectors = np.empty((len(self.items), len(vector)), "<f4")
        self.vectors[number] = vector
        self.tokens += tokens
        self.left -= 1
        if not self.left:
            with contextlib.suppress(InvalidStateError):  # the client has left meanwhile
                self.answer.set_result((self.vectors, self.tokens))

    def fail(self, error: Exception) -> None:
        """Answer with an error."""
        with contextlib.suppress(InvalidStateError):
            self.answer.set_exception(error)


class Batcher:
    """The thread that encodes what all connections submit.

    width: of the vectors. widths: all that may be asked for. limit: tokens to which a text is cut, if known.
    """

    def __init__(self, fast: FastEncoder) -> None:
        self.fast = fast
        self.prompts = {side: prompt_of(fast, None, side) for side in (None, *SIDES)}
        self.limit = int(fast.max_seq_length or 0)
        self.words = copy.deepcopy(getattr(fast.encoder, "tokenizer", None))  # shared with no other thread
        self.known_ids = self._known_ids()
        self.pace = 10_000.0
        for (
            side,
            prompt,
        ) in self.prompts.items():  # shortcuts are verified and prompts computed before the first request
            self.width = self._vectors(["warm up"], side)[0].shape[1]
            if fast.ours:
                fast.tokenise(
                    ["warm up " * max(self.limit, 64)], prompt
                )  # ids are compared again for texts that are cut
        self.widths = (*(width for width in trained_widths(fast.encoder) if width < self.width), self.width)
        self.changed = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.open: set[Job] = set()
        self.closing = False
        self.thread = threading.Thread(target=self._work, name="poolwise-encoder", daemon=True)
        self.thread.start()

    def submit(self, items: Sequence[Item], side: str | None) -> Future[tuple[np.ndarray, int]]:
        """A future of the (N, D) vectors of the items and the number of their tokens; cancel it if nobody waits."""
        job = Job(items, side)
        with self.changed:
            if self.closing:
                raise RequestError(503, "the server is stopping; try another one")
            texts = sum(len(each.items) - each.next for each in self.waiting)
            if len(self.waiting) >= WAITING or texts + len(items) > WAITING_TEXTS:
                raise RequestError(429, f"{len(self.waiting)} requests with {texts} texts are waiting; try again later")
            self.open.add(job)
            self.waiting.append(job)
            self.changed.notify()
        job.answer.add_done_callback(lambda _: self.open.discard(job))
        return job.answer

    def close(self, seconds: float = 0.0) -> None:
        """Take no more work, finish what was submitted, and answer with 503 what `seconds` do not suffice for."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(seconds)
        for job in [*self.open]:
            job.fail(RequestError(503, "the server stopped before it had encoded this request; try another one"))

    def _work(self) -> None:
        while turn := self._turn():
            groups = defaultdict(list)
            for job, number in turn:
                groups[job.side, type(job.items[number])].append((job, number))
            for (side, _), places in groups.items():
                self._encode(places, side)

    def _turn(self) -> list[tuple[Job, int]]:
        """The next items to encode, one of each waiting request after the other; none if the server is closing."""
        with self.changed:
            turn = list[tuple[Job, int]]()
            while not turn:
                while not self.waiting:
                    if self.closing:
                        return []
                    self.changed.wait()
                room = min(max(self.pace * TURN, ROOM[0]), ROOM[1])
                while self.waiting and room > 0:
                    job = self.waiting.popleft()
                    if job.answer.done():  # it failed, or its client has left
                        continue
                    turn.append((job, job.next))
                    room -= self._size(job.items[job.next])
                    job.next += 1
                    if job.next < len(job.items):
                        self.waiting.append(job)
            return turn

    def _size(self, item: Item) -> int:
        """About how many tokens an item has after it is cut."""
        tokens = len(item) // 4 + 2 if isinstance(item, str) else len(item)
        return min(tokens, self.limit) if self.limit else tokens

    def _encode(self, places: list[tuple[Job, int]], side: str | None) -> None:
        """Give the jobs the vectors of these items, all texts or all token ids. If that fails, each job is tried alone,
        so that only the one at fault fails."""
        places = [(job, number) for job, number in places if not job.answer.done()]
        if not places:
            return
        items = [*dict.fromkeys(job.items[number] for job, number in places)]
        try:
            start = time.perf_counter()
            vectors, lengths = self._vectors(items, side)
            self.pace += 0.3 * (sum(lengths) / (time.perf_counter() - start) - self.pace)
        except Exception as error:
            jobs = [*dict.fromkeys(job for job, _ in places)]
            if len(jobs) > 1:
                for job in jobs:
                    self._encode([place for place in places if place[0] is job], side)
                return
            log.error("a request could not be encoded: %s", described(error))
            reason = "the texts could not be encoded; the kind of error is in the server's log"
            jobs[0].fail(RequestError(500, reason))
            return
        rows = {item: row for row, item in enumerate(items)}
        for job, number in places:
            row = rows[job.items[number]]
            job.put(number, vectors[row], lengths[row])

    def _vectors(self, items: Sequence[Any], side: str | None) -> tuple[np.ndarray, list[int]]:
        """(N, D) embeddings of texts, or of token ids, and their numbers of tokens, the prompt's included."""
        fast, prompt = self.fast, self.prompts[side]
        if fast.ours:
            tokenise = fast.tokenise if isinstance(items[0], str) else fast.tokenise.of_ids
            rows = tokenise(items, prompt)
            return fast.encode_rows(rows, prompt), rows.lengths.tolist()
        texts = cut(items, self.words, self.limit) if self.limit else items
        lengths = []
        for text in texts:
            features = fast.encoder.preprocess([text], prompt=prompt or None)
            mask = features.get("attention_mask")
            lengths.append(int(mask.sum()) if mask is not None else len(features["input_ids"]))
        return fast.encode(texts, prompt, side=side), lengths

    def _known_ids(self) -> int:
        """Token ids below this are known to tokenizer and model; 0: token ids are not taken."""
        if not self.fast.ours or self.words is None:
            return 0
        rows: Any = self.fast.backbone.model.get_input_embeddings()
        return min(len(self.words), int(rows.num_embeddings))

    def is_foreign(self, ids: Sequence[int]) -> bool:
        """Whether another tokenizer made these ids: decoded and tokenised again they come out as others.

        Own ids of a text come out as they were, but for the ends of a text that was cut into pieces. Ids of another
        tokenizer are random words of this one's vocabulary, which it would often write otherwise; the fewer they are,
        the more of them pass by chance.
        """
        words = self.words
        assert words is not None
        special, cut_off = {*words.all_special_ids}, 4 if len(ids) > SAMPLED_IDS else 0
        some = [each for each in ids[:SAMPLED_IDS] if each not in special]
        text = words.decode(some, clean_up_tokenization_spaces=False)
        again = words(text, add_special_tokens=False, verbose=False)["input_ids"]
        first = next((n for n, (a, b) in enumerate(zip(some, again, strict=False)) if a != b), len(some))
        if first >= len(some) - cut_off:
            return False
        return len(some) < 16 or cut_off > 0 or some[3:] != again[len(again) - len(some) + 3 :]


async def answered(batcher: Batcher, asked: Asked, left: Callable[[], Awaitable[Any]]) -> tuple[np.ndarray, int]:
    """The vectors (N, D) and tokens of a request. If its client leaves, which ends `left()`, it leaves the queue."""
    job = batcher.submit(asked.items, asked.side)
    future, gone = asyncio.wrap_future(job), asyncio.ensure_future(left())
    try:
        await asyncio.wait({future, gone}, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if gone.done():
            raise GoneError
        raise RequestError(503, f"the texts were not encoded within {ANSWER_SECONDS} seconds; try again later")
    finally:
        job.cancel()
        gone.cancel()


class Metrics:
    """What `GET /metrics` shows, in Prometheus' format."""

    def __init__(self, batcher: Batcher, connections: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("poolwise_requests", "Requests answered.", ["route", "status"], **given)
        self.texts = Counter("poolwise_texts", "Texts encoded.", **given)
        self.tokens = Counter("poolwise_tokens", "Tokens of these texts, prompts included.", **given)
        self.seconds = Histogram("poolwise_request_seconds", "Seconds from a request's head to its answer.", **given)
        waiting = Gauge("poolwise_waiting_requests", "Requests in the queue.", **given)
        waiting.set_function(lambda: len(batcher.waiting))
        open_ = Gauge("poolwise_connections", "Open connections.", **given)
        open_.set_function(connections)


def described(error: BaseException) -> str:
    """An error for the log: its kind and where it arose. Not its message, which may quote a text."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{type(error).__name__} at " + " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(frames))


def schema(batcher: Batcher, names: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of a request for embeddings."""
    text = {"type": "string", "minLength": 1, "pattern": r"\S"}
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": batcher.known_ids - 1}}
    several = [{"type": "array", "minItems": 1, "maxItems": MAX_TEXTS, "items": each} for each in (text, ids)]
    return {
        "type": "object",
        "required": ["input"],
        "properties": {
            "input": {"anyOf": [text, ids, *several] if batcher.known_ids else [text, several[0]]},
            "model": {"enum": [None, *names]},
            "input_type": {"enum": [None, *SIDES]},
            "encoding_format": {"enum": [None, *FORMS]},
            "dimensions": {"enum": [None, *batcher.widths]},
            "user": {"type": ["string", "null"]},
        },
    }


def checked(body: bytes, names: Sequence[str], batcher: Batcher) -> Asked:
    """A request's body as what it asks for. Fields that are not known, which some clients send, are ignored.

    Raises RequestError: 400 no JSON, 404 another model, 413 too many texts, 422 a wrong value.
    """
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError as error:  # of a type or a number that JSON lacks, invalid UTF-8, too deep a nesting
        raise RequestError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(asked, dict) or "input" not in asked:
        example = '{"input": text or list of texts, "model": name, "input_type": "query" or "document"}'
        raise RequestError(422, f"the body must be an object: {example}", "input")
    if asked.get("model") not in (None, *names):
        raise RequestError(404, f"model {_shown(asked['model'])} is not served here; {names[0]!r} is", "model")
    allowed: dict[str, tuple[Any, ...]] = {
        "input_type": (None, *SIDES),
        "encoding_format": (None, *FORMS),
        "dimensions": (None, *batcher.widths),
    }
    for name, values in allowed.items():
        value = asked.get(name)
        if value not in values or isinstance(value, bool | float):
            words = ", ".join(str(orjson.dumps(each), "utf-8") for each in values[1:])
            trained = " (the widths that this model was trained for)" if name == "dimensions" else ""
            raise RequestError(422, f"{name} = {_shown(value)}; allowed: {words}{trained}", name)
    return Asked(
        _items(asked["input"], batcher),
        asked.get("input_type"),
        asked.get("encoding_format") or "float",
        asked.get("dimensions") or batcher.width,
    )


def _items(given: Any, batcher: Batcher) -> list[Item]:
    """The texts or token ids of `input`, each checked."""
    if isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int):
        given = [given]
    if not isinstance(given, list) or not given:
        raise RequestError(422, f"input = {_shown(given)}; give a text or a list of texts, at least one", "input")
    if len(given) > MAX_TEXTS:
        raise RequestError(413, f"{len(given)} texts; at most {MAX_TEXTS} are allowed in one request", "input")
    kind = type(given[0])
    for number, item in enumerate(given):
        place = f"input[{number}]"
        if type(item) not in (str, list) or type(item) is not kind:
            rest = "a text" if kind is str else "a text or a list of token ids, all items alike"
            raise RequestError(422, f"{place} = {_shown(item)}; it must be {rest}", place)
        if isinstance(item, str) and not item.strip():
            raise RequestError(422, f"{place} is empty; leave empty texts out", place)
        if isinstance(item, list):
            _check_ids(item, place, batcher, sampled=number < SAMPLED_ROWS)
    return given if kind is str else [tuple(item) for item in given]


def _check_ids(ids: list[Any], place: str, batcher: Batcher, sampled: bool) -> None:
    """Raise RequestError unless these are token ids of the served model."""
    fix = "send texts (with LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
    if not batcher.known_ids:
        raise RequestError(422, f"{place} holds token ids, which this model does not take; {fix}", place)
    if not ids:
        raise RequestError(422, f"{place} is empty; leave empty texts out", place)
    if {*map(type, ids)} != {int}:
        number = next(number for number, each in enumerate(ids) if type(each) is not int)
        raise RequestError(422, f"{place}[{number}] = {_shown(ids[number])}; token ids are whole numbers", place)
    if min(ids) < 0 or max(ids) >= batcher.known_ids:
        number = next(number for number, each in enumerate(ids) if not 0 <= each < batcher.known_ids)
        most = batcher.known_ids - 1
        reason = f"{place}[{number}] = {ids[number]} is not a token of this model, whose ids are 0 to {most}"
        raise RequestError(422, f"{reason}; {fix}, or its own ids", place)
    if sampled and batcher.is_foreign(ids):
        raise RequestError(422, f"{place} holds token ids of another tokenizer; {fix}, or this model's own ids", place)


def _shown(value: Any) -> str:
    """A value of a request, short enough for a message and for nobody's log."""
    text = str(orjson.dumps(value), "utf-8")
    return text if len(text) <= 60 else f"{text[:60]}…"
