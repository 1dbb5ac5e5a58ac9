"""Texts to vectors: opens a model by name or folder, encodes texts from Python or from file to file, keeps the vectors
of a large collection on disk and searches them exactly, block by block."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer

from poolwise.data.reading import read_texts
from poolwise.encoding import fast as encoding
from poolwise.encoding.fast import FastEncoder
from poolwise.errors import DataError, ModelError, PoolwiseError, suggest
from poolwise.files import open_atomic, write_json
from poolwise.model.backbone import Backbone
from poolwise.model.base import cpu_bfloat16_gain, torch_dtype
from poolwise.model.checkpoint import load_any
from poolwise.study.catalogue import LEXICAL
from poolwise.study.records import Vectors, find

SIDES = ("query", "document")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PROGRESS_EVERY = 10.0
"""Seconds between two lines of progress."""
KEPT_AT_ONCE = 1024
"""Texts after which vectors are on the disk, so that a run which is killed loses no more; on CUDA a whole window."""
TIMED, TIMED_SECONDS = 200, 20.0
"""Texts whose latency is measured one by one, and the seconds after which that ends."""
QUERIES, DOCUMENTS = 256, 32768
"""Queries and documents of a block of exact search: 32 MiB of scores."""


def open_encoder(model: str | Path, dtype: str | None = None) -> SentenceTransformer:
    """A trial's folder (its last step) or one of its steps, an exported folder, a sentence-transformers model by name.

    dtype: one of `DTYPES` to convert the weights to, LoRA merged first; `auto` is bfloat16 if the device computes in
    it, else float32; None: as stored.

    Raises CheckpointError for a damaged folder, ModelError for a name that cannot be loaded or a lexical reference.
    """
    if dtype not in (None, *DTYPES):
        raise PoolwiseError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}{suggest(dtype, DTYPES)}")
    if str(model) in LEXICAL:
        raise ModelError(f"model {str(model)!r} knows only the texts of a task, it has no vectors; name an encoder")
    encoder = load_any(model)
    if dtype is None:
        return encoder
    on_cpu = encoder.device.type == "cpu"
    wanted = torch.bfloat16 if dtype == "auto" and on_cpu and cpu_bfloat16_gain() > 1 else torch_dtype(dtype)
    if not isinstance(encoder[0], Backbone):
        return cast(Any, encoder).to(wanted)
    backbone = cast(Any, encoder[0])
    if isinstance(backbone.model, PeftModel):
        backbone.model = cast(Any, backbone.model.float()).merge_and_unload()  # so that LoRA is rounded only once
    backbone.model.to(wanted)  # the pooling stays in fp32; `FastEncoder` converts its matrices
    return encoder


def open_model(model: str | Path, dtype: str | None = None) -> FastEncoder:
    """`open_encoder`, ready for fast encoding."""
    return FastEncoder(open_encoder(model, dtype))


def prompt_of(fast: FastEncoder, prompt: str | None, side: str | None) -> str:
    """The text put before each text: `prompt`, or the model's own for a `query`, a `document` or any text."""
    if prompt is not None:
        return prompt
    names = {"query": ("query",), "document": ("document", "passage", "corpus"), None: (fast.default_prompt_name,)}
    prompts = fast.prompts or {}
    return next((prompts[name] for name in names[side] if name in prompts), "")


def encode(
    model: SentenceTransformer | FastEncoder | str | Path,
    texts: Iterable[str],
    *,
    prompt: str | None = None,
    side: str | None = None,
) -> np.ndarray:
    """(N, D) fp32 embeddings of `texts` in their order. Give a `FastEncoder` to open a model only once.

    prompt: text put before each text. side: `query` or `document`, for the model's own prompt instead. Raises
    ModelError if an embedding is not finite.
    """
    if isinstance(texts, str):
        raise DataError(f"texts = {texts[:60]!r} is one text; give a list: [text]")
    _check(prompt, side)
    if isinstance(model, (str, Path)):
        model = open_model(model)
    fast = model if isinstance(model, FastEncoder) else FastEncoder(model)
    return finite(fast.encode([*texts], prompt_of(fast, prompt, side), side=side))


def encode_file(
    model: str | Path,
    texts: str | Path,
    to: str | Path,
    *,
    prompt: str | None = None,
    side: str | None = None,
    field: str = "text",
    dtype: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Encode a file of texts (see `read_texts`) into a NumPy file (N, D) fp32, row n for text n. Arguments as those of
    `encode`, and `dtype` as that of `open_encoder`.

    The texts are read twice: once to count and check them before the model is loaded, then a window at a time while the
    vectors are written, so that memory does not grow with the file. `to` is written whole or not at all. `say` receives
    lines of progress, and at the end the speed, the share of tokens that was computed, and the encoder's notes.

    Raises DataError if the texts cannot be read or `to` cannot be written, and what `open_model` raises.
    """
    to = Path(to)
    if to.suffix != ".npy" or to.is_dir():
        raise DataError(f"{to}: vectors are written to one NumPy file; give a name like vectors.npy")
    _check(prompt, side)
    total = sum(1 for _ in read_texts(texts, field, say))
    if not total:
        raise DataError(f"{texts}: holds no text; give a file with at least one")
    fast = open_model(model, dtype)
    prompt = prompt_of(fast, prompt, side)
    done, started, reported = 0, time.perf_counter(), time.perf_counter()
    with open_atomic(to) as file:  # not a memory map: if the disk is full, writing to one kills the process
        for vectors in _windows(fast, read_texts(texts, field), prompt, side, total):
            finite(vectors, done)
            if not done:
                form = {"descr": "<f4", "fortran_order": False, "shape": (total, vectors.shape[1])}
                np.lib.format.write_array_header_1_0(file, form)
            file.write(np.ascontiguousarray(vectors, "<f4").data)
            done += len(vectors)
            if time.perf_counter() - reported > PROGRESS_EVERY:
                reported = time.perf_counter()
                say(f"{done:,} of {total:,} texts, {done / (reported - started):,.1f} texts/s")
        if done != total:
            raise DataError(f"{texts} had {total:,} texts, then {done:,}: it changed while it was read; run again")
    say(_summary(fast, total, time.perf_counter() - started, prompt))
    for note in fast.notes:
        say(f"note: {note}")
    return to


def finite(vectors: np.ndarray, before: int = 0) -> np.ndarray:
    """The vectors (N, D) of texts number `before` and following. Raises ModelError if one of them is not finite."""
    if not (good := np.isfinite(vectors).all(1)).all():
        row = before + int(np.flatnonzero(~good)[0])
        raise ModelError(
            f"the embedding of text {row + 1} is not finite: the model has diverged or overflows in its dtype; "
            "try dtype bfloat16 or float32"
        )
    return vectors


def _check(prompt: str | None, side: str | None) -> None:
    if side is not None and side not in SIDES:
        raise PoolwiseError(f"side {side!r}: allowed are {', '.join(SIDES)}{suggest(side, SIDES)}")
    if prompt is not None and side is not None:
        raise PoolwiseError("both a prompt and a side (query or document) are given; give one of them")


def _windows(
    fast: FastEncoder, texts: Iterator[str], prompt: str, side: str | None, total: int
) -> Iterator[np.ndarray]:
    """Embeddings (n, D), a window of texts at a time."""
    if fast.ours:
        yield from fast.stream(texts, prompt, total)
        return
    while window := [*itertools.islice(texts, encoding.WINDOW)]:
        yield fast.encode(window, prompt, side=side)


def _summary(fast: FastEncoder, texts: int, seconds: float, prompt: str) -> str:
    words = f"{texts:,} texts in {seconds:,.1f} s, {texts / seconds:,.1f} texts/s"
    if fast.counts.tokens:
        share = fast.counts.computed / fast.counts.tokens
        words += f", {fast.counts.tokens:,} tokens, {share:.2f} computed for each (padding adds, reuse subtracts)"
    return f"{words}; prompt {prompt!r}"


@dataclass(frozen=True)
class Kept:
    """The vectors (N, D) fp32 of a collection of texts on disk, memory-mapped, and the seconds that encoding took."""

    vectors: np.ndarray
    seconds: float
    path: Path


def keep_vectors(
    fast: FastEncoder,
    identity: str,
    texts: Callable[[], Iterable[str]],
    total: int,
    content: str,
    folder: Path,
    *,
    side: str | None = None,
    name: str = "texts",
    say: Callable[[str], None] = lambda line: None,
) -> Kept:
    """The vectors of `texts`, encoded once for each model and content; an interrupted encoding continues.

    Vectors are appended to a file named after model, prompt and content. A record beside it says how many there are,
    with their checksum: what is damaged is encoded again.

    Args:
        identity: of the model (`scoring.evaluate.model_identity`). content: hash of the texts in their order.
        texts: gives the texts from the start, each time it is called. total: how many there are.
        folder: of the files. name: of the texts in lines of progress, which `say` receives.

    Raises PoolwiseError if another process is encoding the same, ModelError if a vector is not finite.
    """
    prompt = prompt_of(fast, None, side)
    key = hashlib.sha256(json.dumps([identity, prompt, side, content]).encode()).hexdigest()[:20]
    path, about = folder / f"{key}.f32", folder / f"{key}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PoolwiseError(f"{path}: another process is encoding these texts; wait until it is done") from None
        record, digest = _whole(path, about, total, say)
        width, done, seconds = record.width, record.rows, record.seconds
        if path.stat().st_size != 4 * width * done:  # a row that was being written when the process was killed
            file.truncate(4 * width * done)
        start, first, reported = time.perf_counter(), done, time.perf_counter()
        rest = itertools.islice(texts(), done, None) if done < total else iter(())
        for vectors in _kept_windows(fast, iter(rest), prompt, side, total - done):
            width, done = vectors.shape[1], done + len(finite(vectors, done))
            spent = time.perf_counter() - start
            data = np.ascontiguousarray(vectors, "<f4").data
            file.write(data)
            file.flush()
            digest.update(data)
            record = Vectors(width=width, rows=done, seconds=seconds + spent, sha256=digest.hexdigest())
            write_json(about, {**record.model_dump(), "model": identity, "prompt": prompt, "texts": total})
            if time.perf_counter() - reported > PROGRESS_EVERY:
                reported = time.perf_counter()
                pace = (done - first) / spent
                say(f"{done:,} of {total:,} {name}, {pace:,.0f} texts/s, about {_clock((total - done) / pace)} left")
        seconds += time.perf_counter() - start if done > first else 0.0
    if done != total:
        raise DataError(f"{total:,} {name} were counted, then {done:,}: the file changed while it was read; run again")
    return Kept(np.memmap(path, "<f4", "r", shape=(total, width)), seconds, path)


def _whole(path: Path, about: Path, total: int, say: Callable[[str], None]) -> tuple[Vectors, Any]:
    """What is recorded of kept vectors, and the running SHA-256 of those; no rows if they are not what was written."""
    digest = hashlib.sha256()
    nothing = Vectors(width=0, rows=0, seconds=0.0, sha256=digest.hexdigest())
    if not about.exists():
        return nothing, digest
    record = find(about, Vectors)
    if record is not None and record.rows <= total:
        with path.open("rb") as file:
            left = 4 * record.width * record.rows
            while left and (data := file.read(min(left, 1 << 24))):
                digest.update(data)
                left -= len(data)
        if digest.hexdigest() == record.sha256:
            return record, digest
    say(f"{path} is damaged; its texts are encoded again")
    return nothing, hashlib.sha256()


def _kept_windows(
    fast: FastEncoder, texts: Iterator[str], prompt: str, side: str | None, total: int
) -> Iterator[np.ndarray]:
    if fast.ours and fast.device.type == "cuda":
        yield from fast.stream(texts, prompt, total)
        return
    while window := [*itertools.islice(texts, KEPT_AT_ONCE)]:
        yield fast.encode(window, prompt, side=side)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def unit(vectors: np.ndarray) -> np.ndarray:
    """(N, D) vectors brought to length 1 in fp32; a vector of zeros stays one."""
    found = np.asarray(vectors, np.float32)
    return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12))


def lengths(vectors: np.ndarray) -> np.ndarray:
    """(N,) the length of each vector, block by block; 1 for a vector of zeros."""
    blocks = [vectors[start : start + DOCUMENTS] for start in range(0, len(vectors), DOCUMENTS)]
    found = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
    return np.where(found > 0, found, 1).astype(np.float32)


def search(
    queries: np.ndarray, documents: np.ndarray, depth: int, rank: np.ndarray, norms: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` best documents of each query and their scores, (Q, depth) each, by exact search in blocks.

    Args:
        queries (Q, D), documents (N, D): fp32; documents may be memory-mapped.
        rank: (N,) decides between equal scores, the lowest first.
        norms: (N,) `lengths` of the documents, for the cosine; None: the dot product. Cosines are rounded to six
            decimals, below which they are noise of fp32 that depends on the block, so that equal documents have equal
            scores.
    """
    depth = min(depth, len(documents))
    places, scores = np.zeros((len(queries), depth), np.int64), np.zeros((len(queries), depth), np.float32)
    for low in range(0, len(queries), QUERIES):
        asked = np.asarray(queries[low : low + QUERIES])
        asked = asked if norms is None else unit(asked)
        best: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(asked)
        for start in range(0, len(documents), DOCUMENTS):
            block = documents[start : start + DOCUMENTS]
            found = asked @ np.asarray(block).T
            if norms is not None:
                found = np.round(found / norms[start : start + len(block)], 6)
            here = np.arange(start, start + len(block))
            for row, (old, old_scores) in enumerate(best):
                best[row] = top(np.append(old, here), np.append(old_scores, found[row]), depth, rank)
        for row, (found_places, found_scores) in enumerate(best):
            places[low + row], scores[low + row] = found_places, found_scores
    return places, scores


def top(places: np.ndarray, scores: np.ndarray, depth: int, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` best (places, scores), the highest score first and of equal ones that of the lowest rank."""
    if len(scores) > depth:
        bar = np.partition(scores, len(scores) - depth)[len(scores) - depth]
        above, level = np.flatnonzero(scores > bar), np.flatnonzero(scores == bar)
        level = level[np.argsort(rank[places[level]], kind="stable")[: depth - len(above)]]
        chosen = np.append(above, level)
        places, scores = places[chosen], scores[chosen]
    order = np.lexsort((rank[places], -scores))
    return places[order], scores[order]


def latency(call: Callable[[str], Any], texts: Sequence[str]) -> dict[str, float]:
    """Percentiles of the milliseconds that a call takes for one text; the first call is not counted."""
    call(texts[0])
    times, start = [], time.perf_counter()
    for text in texts[:TIMED]:
        before = time.perf_counter()
        call(text)
        times.append(1000 * (time.perf_counter() - before))
        if time.perf_counter() - start > TIMED_SECONDS:
            break
    p50, p95, p99 = np.percentile(times, [50, 95, 99]).tolist()
    return {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3), "texts": len(times)}
