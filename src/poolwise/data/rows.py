"""Rows of training texts as Arrow columns and hashes: repeated texts are found, and missing negatives drawn, by number.

Each text has two hashes: `exact` (128 bits) of its letters and `near` (64 bits) of its normal form. Rows of labelled
texts become sets to be clustered.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from poolwise.errors import DataError

CHUNK = 10_000
TRIES = 64
"""Random draws for a missing negative before every candidate is looked at."""
HASHES = np.dtype([("exact", "<u8", 2), ("near", "<u8")])
MISSING = bytes(HASHES.itemsize)
SETS, SET_SIZE = 10, 2000
"""Clustering sets into which labelled texts are divided, and the texts of each: at most."""
TEXTS_PER_LABEL = 10
"""Texts of a set for each label, on average at least: with few, any clustering has a high V-measure."""
SHARED_TEXTS = 0.1
"""Share of the texts of clustering sets that may be in another set as well. At a tenth the variance of the mean over
sets is underestimated by a tenth at most."""
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


def clustering_sets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Clustering sets from labelled texts, which share no text: sets that overlap are no independent observations, and
    a test over them finds differences where there are none.

    The texts of each label, in a seeded random order, are dealt to the sets in turn, so that all sets have the same
    mixture of labels. There are as many sets as leave `TEXTS_PER_LABEL` to each label, `SETS` at most.
    """
    generator = np.random.default_rng(0)
    by_label: dict[str, list[dict[str, Any]]] = {}
    for i in generator.permutation(len(rows)):
        by_label.setdefault(rows[i]["label"], []).append(rows[i])
    count = max(1, min(SETS, len(rows) // (TEXTS_PER_LABEL * len(by_label))))
    dealt = [row for label in sorted(by_label) for row in by_label[label]]
    drawn = [dealt[start::count] for start in range(count)]
    # A set that is too large is cut at random, not by label.
    drawn = [[rows[i] for i in generator.permutation(len(rows))[:SET_SIZE]] for rows in drawn]
    return [{"sentences": [row["text"] for row in rows], "labels": [row["label"] for row in rows]} for rows in drawn]


def shared_texts(sets: Sequence[Mapping[str, Any]]) -> float:
    """The share of the texts of clustering sets that are in another set as well, 0–1."""
    counts = Counter(text for each in sets for text in set(each["sentences"]))
    total = sum(counts.values())
    return sum(n for n in counts.values() if n > 1) / total if total else 0.0


def untestable(sets: Sequence[Mapping[str, Any]]) -> str:
    """Why designs cannot be tested over clustering sets, an empty string if they can: there is one, or they overlap."""
    if len(sets) == 1:
        return (
            "one clustering set: designs are scored on it, not tested. A test takes two sets or more of "
            f"{TEXTS_PER_LABEL} texts for each label"
        )
    if (share := shared_texts(sets)) > SHARED_TEXTS:
        return (
            f"{share:.0%} of the texts are in more than one set, so the sets are no independent observations: designs "
            "are scored on them, not tested. Give sets that share no text, or a file of texts and labels"
        )
    return ""
