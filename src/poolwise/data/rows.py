"""Rows of training texts as Arrow columns and hashes: repeated texts are found, and missing negatives drawn, by number.

Each text has two hashes: `exact` (128 bits) of its letters and `near` (64 bits) of its normal form.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow
import pyarrow.compute

from poolwise.errors import DataError

CHUNK = 10_000
TRIES = 64
"""Random draws for a missing negative before every candidate is looked at."""
HASHES = np.dtype([("exact", "<u8", 2), ("near", "<u8")])
MISSING = bytes(HASHES.itemsize)
_PUNCTUATION = " " + "".join(c for c in map(chr, range(0x11000)) if unicodedata.category(c).startswith("P"))


def normalise(text: str) -> str:
    """The form in which two texts count as the same: NFKC, case folded, single spaces, no surrounding punctuation."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    folded = " ".join(folded.casefold().split())
    return folded.strip(_PUNCTUATION) or folded


def near_hash(text: str) -> bytes:
    """8 bytes, equal for texts with the same normal form."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def near_hashes(texts: Iterable[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Kind -> its different near hashes (n,), sorted, of (kind, text) pairs. No text is kept, so whole corpora fit."""
    found: dict[str, np.ndarray] = {}
    new: dict[str, set[bytes]] = {}

    def collect(kind: str) -> None:
        fresh = np.frombuffer(b"".join(new[kind]), dtype="<u8")
        found[kind] = np.union1d(found[kind], fresh) if kind in found else np.unique(fresh)
        new[kind] = set()

    for kind, text in texts:
        hashes = new.setdefault(kind, set())
        hashes.add(near_hash(text))
        if len(hashes) == 100 * CHUNK:  # a set takes ten times the memory of an array
            collect(kind)
    for kind in new:
        collect(kind)
    return found


def random_stream(purpose: str, *numbers: int) -> np.random.Generator:
    """An independent stream of random numbers for each purpose and seed, the same on every machine."""
    name = ":".join(["poolwise", purpose, *map(str, numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "little"))


def mix(hashes: np.ndarray) -> np.ndarray:
    """(n,) one 64-bit hash for each row of an array (n, c) of 64-bit hashes; the order of the columns matters."""
    mixed = np.zeros(len(hashes), dtype=np.uint64)
    for column in hashes.T:
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + column
    return mixed


@dataclass(frozen=True, eq=False)
class Rows:
    """n rows with c = 2 + k texts each; the rows of one source are adjacent, in the order of `labels`.

    table: large strings: query, positive, negative_1 … negative_k, source
    source (n,): index into `labels`
    exact (n, c, 2), near (n, c): the hashes; near is 0 where a negative is missing
    filled (n, k): which negatives were filled in
    """

    table: pyarrow.Table
    labels: tuple[str, ...]
    source: np.ndarray
    exact: np.ndarray
    near: np.ndarray
    filled: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def by_source(self) -> dict[str, int]:
        counts = np.bincount(self.source, minlength=len(self.labels))
        return dict(zip(self.labels, counts.tolist(), strict=True))

    def fingerprint(self, order: np.ndarray | None = None) -> str:
        """sha256 over the exact hashes of all texts, row by row, in this order of rows (default: unchanged)."""
        content = hashlib.sha256(f"poolwise rows of {self.near.shape[1]}".encode())
        order = np.arange(len(self)) if order is None else order.ravel()
        for start in range(0, len(order), CHUNK):
            content.update(self.exact[order[start : start + CHUNK]].tobytes())
        return content.hexdigest()

    def select(self, keep: np.ndarray) -> Rows:
        """The rows where the mask `keep` (n,) is true."""
        if keep.all():
            return self
        return Rows(
            self.table.filter(pyarrow.array(keep)),
            self.labels,
            self.source[keep],
            self.exact[keep],
            self.near[keep],
            self.filled[keep],
        )

    def first_of_each(self) -> np.ndarray:
        """Mask (n,): rows that do not repeat an earlier row letter for letter."""
        flat = self.exact.reshape(len(self), -1)
        _, first, which = np.unique(mix(flat), return_index=True, return_inverse=True)
        earlier = first[which]
        return (earlier == np.arange(len(self))) | (flat != flat[earlier]).any(axis=1)

    def contradictions(self) -> np.ndarray:
        """Mask (n, k): negatives with the normal form of their query or of a positive of it, in this row or another.

        Normal forms, as everywhere else: "paris" is no wrong answer where "Paris." is the right one.
        """
        query, known = self.near[:, 0], np.unique(mix(self.near[:, :2]))
        wrong = np.zeros_like(self.filled)
        for column in range(wrong.shape[1]):
            texts = self.near[:, 2 + column]
            wrong[:, column] = (texts == query) | np.isin(mix(np.stack([query, texts], axis=1)), known)
        return wrong

    def without_negatives(self, drop: np.ndarray) -> Rows:
        """The rows without the negatives of the mask `drop` (n, k)."""
        exact, near = self.exact.copy(), self.near.copy()
        exact[:, 2:][drop] = 0
        near[:, 2:][drop] = 0
        return replace(self, exact=exact, near=near, filled=self.filled & ~drop)

    def fill(self) -> Rows:
        """The rows with every missing negative drawn from the positives of the same source that are not known as
        positives of the query. The draw depends on the rows alone.

        Raises DataError if a source has no text to draw.
        """
        exact, near, filled, table = self.exact.copy(), self.near.copy(), self.filled.copy(), self.table
        known = np.unique(mix(near[:, :2]))
        random = random_stream("fill")
        for column in range(2, near.shape[1]):
            rows = np.flatnonzero(near[:, column] == 0)
            if not len(rows):
                continue
            drawn = self._draw(rows, near, known, random)
            exact[rows, column], near[rows, column] = exact[drawn, 1], near[drawn, 1]
            filled[rows, column - 2] = True
            origin = np.full(len(self), -1)
            origin[rows] = drawn
            texts = table.column("positive").take(pyarrow.array(origin, mask=origin < 0))
            texts = pyarrow.compute.if_else(pyarrow.array(origin >= 0), texts, table.column(column))
            table = table.set_column(column, table.field(column), texts)
        return replace(self, table=table, exact=exact, near=near, filled=filled)

    def _draw(self, rows: np.ndarray, near: np.ndarray, known: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """(m,) for each of `rows` (m,) another row of its source whose positive may serve as its negative."""
        counts = np.bincount(self.source, minlength=len(self.labels))
        starts = np.cumsum(counts) - counts
        drawn = np.full(len(rows), -1)
        open_ = np.arange(len(rows))
        for _ in range(TRIES):
            at = self.source[rows[open_]]
            drawn[open_] = starts[at] + random.integers(0, counts[at])
            open_ = open_[~_allowed(near[rows[open_]], near[drawn[open_], 1], known)]
            if not len(open_):
                return drawn
        for i in open_:  # the source has few different positives: look at every one
            label = self.source[rows[i]]
            others = np.arange(starts[label], starts[label] + counts[label])
            others = others[_allowed(np.tile(near[rows[i]], (len(others), 1)), near[others, 1], known)]
            if not len(others):
                query = self.table.column("query")[int(rows[i])].as_py()
                raise DataError(
                    f"training data {self.labels[label]!r}: no text left to fill in a missing negative of the query "
                    f"{query[:60]!r}; add negatives to the file, add rows, or set recipe.negatives lower"
                )
            drawn[i] = random.choice(others)
        return drawn


def _allowed(rows: np.ndarray, texts: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mask (m,): the text texts[i] is not in the row rows[i] (c,) and is not a known positive of its query."""
    repeated = (rows == texts[:, None]).any(axis=1)
    return ~repeated & ~np.isin(mix(np.stack([rows[:, 0], texts], axis=1)), known)


class RowsBuilder:
    """Collects rows one by one as Arrow chunks and hashes, which take a fraction of the memory of Python strings."""

    def __init__(self, negatives: int):
        self.width = 2 + negatives
        self._texts: list[list[str | None]] = [[] for _ in range(self.width)]
        self._hashes: list[bytes] = []
        self._sources: list[int] = []
        self._chunks: list[tuple[list[pyarrow.Array], np.ndarray, np.ndarray]] = []
        self._flushed = 0

    def __len__(self) -> int:
        return self._flushed + len(self._sources)

    def append(self, texts: Sequence[str], source: int) -> None:
        """Add a query, its positive and at most k negatives, all stripped; sources come in rising order."""
        for column, text in zip(self._texts, texts, strict=False):
            column.append(text)
            self._hashes.append(hashlib.blake2b(text.encode(), digest_size=16).digest() + near_hash(text))
        for column in self._texts[len(texts) :]:
            column.append(None)
            self._hashes.append(MISSING)
        self._sources.append(source)
        if len(self._sources) == CHUNK:
            self._flush()

    def _flush(self) -> None:
        columns = [pyarrow.array(column, pyarrow.large_string()) for column in self._texts]
        hashes = np.frombuffer(b"".join(self._hashes), dtype=HASHES).reshape(-1, self.width)
        self._chunks.append((columns, hashes, np.array(self._sources, dtype=np.int32)))
        self._flushed += len(self._sources)
        self._texts, self._hashes, self._sources = [[] for _ in range(self.width)], [], []

    def rows(self, labels: tuple[str, ...]) -> Rows:
        """All rows so far; `labels` names the sources."""
        self._flush()
        columns, hashes, sources = zip(*self._chunks, strict=True)
        together = np.concatenate(hashes)
        source = np.concatenate(sources)
        names = ["query", "positive", *(f"negative_{i + 1}" for i in range(self.width - 2))]
        texts = [pyarrow.chunked_array(parts) for parts in zip(*columns, strict=True)]
        by_source = pyarrow.DictionaryArray.from_arrays(source, list(labels)).cast(pyarrow.large_string())
        return Rows(
            table=pyarrow.table([*texts, by_source], names=[*names, "source"]),
            labels=labels,
            source=source,
            exact=np.ascontiguousarray(together["exact"]),
            near=np.ascontiguousarray(together["near"]),
            filled=np.zeros((len(source), self.width - 2), dtype=bool),
        )
