"""Training pairs: where they come from, which columns are read, and how they are checked and cleaned."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poolwise.data.reading import Mistakes, Opened, Record, open_source
from poolwise.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

    from poolwise.study.recipe import Recipe


CHUNK = 10_000
TRIES = 64
HASHES = np.dtype([("exact", "<u8", 2), ("near", "<u8")])
MISSING = bytes(HASHES.itemsize)
_PUNCTUATION = " " + "".join(c for c in map(chr, range(0x11000)) if unicodedata.category(c).startswith("P"))


def normalise(text: str) -> str:
    """The form in which two texts count as the same: NFKC, case folded, single spaces, no surrounding punctuation."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    folded = " ".join(folded.casefold().split())
    return folded.strip(_PUNCTUATION) or folded


def near_hash(text: str) -> bytes:
    """8 bytes, equal for texts that are equal once normalised."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def random_stream(purpose: str, *numbers: int) -> np.random.Generator:
    """Random numbers of their own for each purpose and seed, the same on every machine."""
    name = ":".join(["poolwise", purpose, *map(str, numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "little"))


def mix(hashes: np.ndarray) -> np.ndarray:
    """One 64-bit hash for each row of an array (n, c) of 64-bit hashes; the columns do not commute."""
    mixed = np.zeros(len(hashes), dtype=np.uint64)
    for column in hashes.T:
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + column
    return mixed


@dataclass(frozen=True, eq=False)
class Rows:
    """n rows; those of one source stand together, in the order of `labels`.

    table: large strings: query, positive, negative_1 … negative_k, source
    source (n,): which of `labels`
    exact (n, c, 2), near (n, c): the hashes; near is 0 where a negative is missing
    filled (n, k): the negatives that were filled in
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
        """sha256 over the exact hashes of all texts, row by row, in this order of rows (default: as they stand)."""
        content = hashlib.sha256(f"poolwise rows of {self.near.shape[1]}".encode())
        order = np.arange(len(self)) if order is None else order.ravel()
        for start in range(0, len(order), CHUNK):
            content.update(self.exact[order[start : start + CHUNK]].tobytes())
        return content.hexdigest()

    def select(self, keep: np.ndarray) -> Rows:
        """The rows where the mask `keep` (n,) is true."""
        import pyarrow

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
        """Mask (n,): rows that repeat no earlier row text for text."""
        flat = self.exact.reshape(len(self), -1)
        _, first, which = np.unique(mix(flat), return_index=True, return_inverse=True)
        earlier = first[which]
        return (earlier == np.arange(len(self))) | (flat != flat[earlier]).any(axis=1)

    def contradictions(self) -> np.ndarray:
        """Mask (n, k): negatives that stand elsewhere as a positive of the same query, letter for letter."""
        texts = self.exact[:, :, 0]
        known = np.unique(mix(texts[:, :2]))
        pairs = [np.isin(mix(texts[:, [0, column]]), known) for column in range(2, texts.shape[1])]
        return np.stack(pairs, axis=1) if pairs else self.filled

    def without_negatives(self, drop: np.ndarray) -> Rows:
        """The rows with the negatives of the mask `drop` (n, k) missing."""
        exact, near = self.exact.copy(), self.near.copy()
        exact[:, 2:][drop] = 0
        near[:, 2:][drop] = 0
        return replace(self, exact=exact, near=near, filled=self.filled & ~drop)

    def fill(self) -> Rows:
        """Every missing negative drawn from the positives of the same source; none is a known positive of the query.

        The draw depends on the rows alone. Raises DataError where a source has no text to draw.
        """
        import pyarrow
        import pyarrow.compute

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
        """For each of `rows` (m,) another row of its source whose positive may be its negative -> (m,)."""
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
        for i in open_:  # few different positives: look at every one
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
    """Mask (m,): the text texts[i] stands nowhere in the row rows[i] (c,) and is no known positive of its query."""
    repeated = (rows == texts[:, None]).any(axis=1)
    return ~repeated & ~np.isin(mix(np.stack([rows[:, 0], texts], axis=1)), known)


class RowsBuilder:
    """Takes rows one by one, keeps them as Arrow chunks and hashes."""

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
        """A query, its positive and at most k negatives, stripped; sources come in rising order."""
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
        import pyarrow

        columns = [pyarrow.array(column, pyarrow.large_string()) for column in self._texts]
        hashes = np.frombuffer(b"".join(self._hashes), dtype=HASHES).reshape(-1, self.width)
        self._chunks.append((columns, hashes, np.array(self._sources, dtype=np.int32)))
        self._flushed += len(self._sources)
        self._texts, self._hashes, self._sources = [[] for _ in range(self.width)], [], []

    def rows(self, labels: tuple[str, ...]) -> Rows:
        """All rows taken so far; `labels` names the sources."""
        import pyarrow

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


COUNTS = {
    "duplicate_rows": "rows equal to an earlier one in every text, dropped",
    "query_equals_positive": "rows whose query is its own positive, kept (as in SimCSE)",
    "cut_negatives": "negatives beyond the recipe's number, left out",
    "repeated_negatives": "negatives that stand twice in one row, left out once",
    "contradicting_negatives": "negatives that are a positive of the same query in another row, left out",
    "filled_negatives": "missing negatives, drawn from the other positives of the source",
    "unusable_rows": "rows of a Hub data set with an empty query or positive, or none of text, dropped",
    "unusable_negatives": "negatives of a Hub data set that are empty, no text, or the query or positive, left out",
}
"""What `Pairs.report` counts, in words."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Training rows ready for use: n rows of a query, a positive and k hard negatives.

    dataset: columns query, positive, negative_1 … negative_k, source
    report: `rows`, `rows_by_source`, all of `COUNTS`, and what `decontaminate` removed; JSON-able
    fingerprint: hash of the exact texts in the order read
    rows: the same rows with their hashes and the names of the sources
    """

    dataset: Dataset
    report: dict[str, Any]
    fingerprint: str
    rows: Rows


def load_pairs(recipe: Recipe, base_dir: Path) -> Pairs:
    """The training pairs of a recipe (`data_sources`, `negatives`), paths relative to `base_dir`.

    Texts are stripped. Rows that repeat an earlier row exactly are dropped. Each row keeps its first k = `negatives`
    hard negatives; one that another row calls a positive of the same query is left out; missing ones are filled with
    a random positive of another row of the same source that is not known as a positive of this query. Rows of a Hub
    data set that cannot be used are dropped and counted; in the user's own file they are an error.

    Raises DataError: a source that cannot be found or read; every mistake of a file (up to 20), each with its line.
    """
    sources = recipe.data_sources
    labels = _labels([source.path for source in sources])
    counts: Counter[str] = Counter()
    builder = RowsBuilder(recipe.negatives)
    for number, (source, label) in enumerate(zip(sources, labels, strict=True)):
        before = len(builder)
        for opened in open_source(source.path, source.split, Path(base_dir)):
            for texts in _checked_rows(opened, recipe.negatives, counts):
                builder.append(texts, number)
        if len(builder) == before:
            raise DataError(f"training data {label!r}: no rows; give at least one query with its positive")
    rows = builder.rows(labels)
    fresh = rows.first_of_each()
    counts["duplicate_rows"] = int((~fresh).sum())
    rows = rows.select(fresh)
    _refuse_empty(rows, "every row stands in an earlier source already; name the source once")
    wrong = rows.contradictions()
    counts["contradicting_negatives"] = int(wrong.sum())
    rows = rows.without_negatives(wrong).fill()
    counts["filled_negatives"] = int(rows.filled.sum())
    report = {
        "rows": len(rows),
        "rows_by_source": rows.by_source(),
        **{name: counts[name] for name in COUNTS},
        "evaluation_texts": 0,
        "decontaminated_rows": 0,
        "decontaminated_by_source": dict.fromkeys(labels, 0),
    }
    return _pairs(rows, report)


def decontaminate(pairs: Pairs, texts: Iterable[str]) -> Pairs:
    """The pairs without every row whose query, positive or own hard negative is an evaluation text, once normalised.

    A filled-in negative that is an evaluation text costs no row: it is drawn again. The report tells the number of
    different evaluation texts and the rows removed, in all and by source.

    Raises DataError if no row of a source is left.
    """
    hashes = np.frombuffer(b"".join({near_hash(text) for text in texts}), dtype="<u8")
    rows = pairs.rows
    seen = np.isin(rows.near, hashes)
    clean = ~(seen[:, :2].any(axis=1) | (seen[:, 2:] & ~rows.filled).any(axis=1))
    rows = rows.select(clean)
    _refuse_empty(rows, "every row holds a text of an evaluation task; train on other data")
    rows = rows.without_negatives(seen[clean][:, 2:]).fill()
    old = pairs.report
    lost = {label: old["rows_by_source"][label] - left for label, left in rows.by_source().items()}
    report = {
        **old,
        "rows": len(rows),
        "rows_by_source": rows.by_source(),
        "filled_negatives": int(rows.filled.sum()),
        "evaluation_texts": len(hashes),
        "decontaminated_rows": old["decontaminated_rows"] + sum(lost.values()),
        "decontaminated_by_source": {k: n + old["decontaminated_by_source"][k] for k, n in lost.items()},
    }
    return _pairs(rows, report)


def _pairs(rows: Rows, report: dict[str, Any]) -> Pairs:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    fingerprint = rows.fingerprint()
    return Pairs(Dataset(InMemoryTable(rows.table), fingerprint=fingerprint[:16]), report, fingerprint, rows)


def _labels(paths: Sequence[str]) -> tuple[str, ...]:
    """The sources' names in reports: the path, numbered where one path is given twice."""
    return tuple(f"{path} ({i + 1})" if paths.count(path) > 1 else path for i, path in enumerate(paths))


def _refuse_empty(rows: Rows, why: str) -> None:
    for label, count in rows.by_source().items():
        if not count:
            raise DataError(f"training data {label!r}: {why}")


def _checked_rows(opened: Opened, negatives: int, counts: Counter[str]) -> Iterator[list[str]]:
    """Query, positive and at most `negatives` negatives of each good row; a list of positives gives a row for each.

    Raises DataError with the mistakes of this file.
    """
    mistakes = Mistakes(opened.label)
    for place, record in opened.records(mistakes):
        problems: list[str] = []
        query = _text(record["query"], "query", problems)
        given = record["positive"] if isinstance(record["positive"], list) else [record["positive"]]
        positives = [_text(value, "positive", problems) for value in given]
        if not positives:
            problems.append("'positive' is an empty list; give a text")
        wrong: list[str] = []
        different = _negatives(record, opened.blank_is_none, (query, *positives), wrong)
        if opened.mendable and (problems or wrong):
            mistakes.add(place, "; ".join(problems + wrong))
        elif problems:
            counts["unusable_rows"] += 1
        else:
            counts["unusable_negatives"] += len(wrong)
            kept = list(dict.fromkeys(different))
            counts["repeated_negatives"] += len(different) - len(kept)
            counts["cut_negatives"] += max(0, len(kept) - negatives)
            counts["query_equals_positive"] += query in positives
            for positive in dict.fromkeys(positives):
                yield [query, positive, *kept[:negatives]]
    mistakes.check()


def _negatives(record: Record, blank_is_none: bool, others: tuple[str, ...], problems: list[str]) -> list[str]:
    """The negatives of all cells. null and an empty list are none; so is a blank cell of a CSV."""
    found = []
    for cell in record["negatives"]:
        for value in cell if isinstance(cell, list) else [] if cell is None else [cell]:
            if blank_is_none and isinstance(value, str) and not value.strip():
                continue
            before = len(problems)
            text = _text(value, "negative", problems)
            if text in others and len(problems) == before:
                role = "query" if text == others[0] else "positive"
                problems.append(f"the negative is equal to the {role} ({_short(text)}); give a wrong answer or none")
            if len(problems) == before:
                found.append(text)
    return found


def _text(value: object, role: str, problems: list[str]) -> str:
    """The text stripped; what is wrong with it goes to `problems`."""
    if not isinstance(value, str):
        kind = "null" if value is None else f"{_short(value)} ({type(value).__name__})"
        problems.append(f"{role!r} is {kind}; give a text")
        return ""
    text = value.strip()
    if not text:
        problems.append(f"{role!r} is empty; give a text" + (" or leave it out" if role == "negative" else ""))
    elif not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problems.append(f"{role!r} holds half a character ({text[error.start]!r}), which is no Unicode text")
    return text


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
