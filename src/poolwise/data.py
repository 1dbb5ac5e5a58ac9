"""Training pairs: read, checked, freed of duplicates, filled up with negatives, cleared of evaluation texts.

`load_pairs` gives `Pairs`; which row comes when is decided in `batches.py`. Every row that is changed or dropped is
counted in `Pairs.report`. Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poolwise.errors import DataError
from poolwise.reading.rows import Rows, RowsBuilder, near_hash
from poolwise.reading.sources import Mistakes, Opened, Record, open_source

if TYPE_CHECKING:
    from datasets import Dataset

    from poolwise.study import Recipe

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
