"""Training pairs: where they come from, which columns are read, and how they are checked and cleaned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from poolwise.data.reading import (
    FORMATS,
    PAGE,
    Placed,
    Record,
    file_format,
    is_delimited,
    is_list,
    note_unread,
    read_records,
    text_problem,
)
from poolwise.data.rows import Rows, RowsBuilder, near_hashes
from poolwise.errors import DataError, Mistakes, short, suggest
from poolwise.files import cached_if_unreachable, user_path

if TYPE_CHECKING:
    from datasets import Dataset

    from poolwise.study.recipe import Recipe


DEMO = "demo"
ROLES = {
    "query": ("query", "anchor", "question"),
    "positive": ("positive", "postive", "pos", "document", "passage", "answer"),
}
"""Accepted names of a column, the preferred one first. `postive` is the spelling in the paper's README."""
NEGATIVE = re.compile(r"(?:negatives?|neg)(?:_?(\d{1,9}))?")
UNREAD_NEGATIVE = re.compile(r"(hard_?)?neg(ative)?s?(_?(texts?|passages?|docs?|documents?|ctxs?|contexts?|list|\d+))?")
"""Names that other tools give to negatives. Ignoring such a column would train on random negatives in its place."""
PASSAGES = ("positive_passages", "negative_passages")
SPLIT_WORDS = {"train", "dev", "valid", "validation", "test", "eval"}

COUNTS = {
    "duplicate_rows": "rows dropped because every text equals that of an earlier row",
    "query_equals_positive": "rows whose query is its own positive, kept (as in SimCSE)",
    "cut_negatives": "negatives beyond the recipe's number, left out",
    "repeated_negatives": "negatives given twice in one row, left out once",
    "contradicting_negatives": "negatives equal to their query or a positive of it (up to case, punctuation), left out",
    "filled_negatives": "negatives filled in, where none is given, with other positives of the source",
    "unusable_rows": "rows of a Hub data set dropped because the query or positive is empty or not a text",
    "unusable_negatives": "negatives of a Hub data set left out because they are empty, not a text, or the query or "
    "positive",
}
"""What `Pairs.report` counts, in words."""
KINDS = ("queries", "test texts", "training texts", "documents")
"""Kinds of evaluation texts: queries and documents of retrieval and reranking; of other tasks the texts that are scored
and those that classifiers are trained on."""
REMOVED: Mapping[str | bool, Collection[str]] = {"queries": ("queries", "test texts"), "all": KINDS, False: ()}
"""Value of `recipe.decontaminate` -> the kinds of evaluation texts whose training rows are removed."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Training rows ready for use: n rows of a query, a positive and k hard negatives.

    dataset: columns query, positive, negative_1 … negative_k, source
    report (JSON-able): `rows`, `rows_by_source`, all of `COUNTS`, what `decontaminate` removed, and `notes` on how the
        sources were read
    fingerprint: hash of the exact texts in the order read
    rows: the same rows with their hashes and the names of the sources
    """

    dataset: Dataset
    report: dict[str, Any]
    fingerprint: str
    rows: Rows

    def notes(self) -> list[str]:
        """What was counted, changed, dropped or left unread, a sentence each."""
        report = self.report
        sources = ", ".join(f"{name} {rows:,}" for name, rows in report["rows_by_source"].items())
        notes = [f"{report['rows']:,} training rows ({sources})", *report["notes"]]
        for name, words in COUNTS.items():
            noun, rest = words.split(" ", 1)
            notes += [f"{report[name]:,} {noun.removesuffix('s' * (report[name] == 1))} {rest}"] if report[name] else []
        for removed in (True, False):
            kinds = {kind: found for kind, found in report["contaminated"].items() if found["removed"] == removed}
            if any(found["rows"] for found in kinds.values()) or (removed and kinds):
                counted = ", ".join(f"{kind} {kinds[kind]['rows']:,}" for kind in KINDS if kind in kinds)
                total = f"{report['decontaminated_rows']:,} training rows" if removed else "training rows"
                verb = "removed because they contain" if removed else "kept although they contain"
                texts = sum(found["texts"] for found in kinds.values())
                notes.append(f"{total} {verb} one of {texts:,} evaluation texts (rows by kind: {counted})")
        return notes


def load_pairs(recipe: Recipe, base_dir: Path) -> Pairs:
    """The training pairs of a recipe (`data_sources`, `negatives`), paths relative to `base_dir`.

    Texts are stripped. Rows that repeat an earlier row letter for letter are dropped. Each row keeps its first
    k = `negatives` hard negatives; one with the normal form of the query or of a positive of the query in any row is
    left out. Missing ones are filled with the positive of another row of the same source that is not known as a
    positive of this query. Unusable rows of a Hub data set are dropped and counted; in the user's file they are an
    error.

    Raises DataError: a source that cannot be found or read; every mistake of a file, each with its line.
    """
    sources = recipe.data_sources
    labels = _labels([source.path for source in sources])
    counts: Counter[str] = Counter()
    notes: list[str] = []
    builder = RowsBuilder(recipe.negatives)
    for number, (source, label) in enumerate(zip(sources, labels, strict=True)):
        before = len(builder)
        for part in open_source(source.path, source.split, Path(base_dir)):
            for texts in _checked_rows(part, recipe.negatives, counts, notes):
                builder.append(texts, number)
        if len(builder) == before:
            raise DataError(f"training data {label!r}: no rows; give at least one query with its positive")
    rows = builder.rows(labels)
    fresh = rows.first_of_each()
    counts["duplicate_rows"] = int((~fresh).sum())
    rows = rows.select(fresh)
    _refuse_empty(rows, "every row is in an earlier source already; name the source once")
    wrong = rows.contradictions()
    counts["contradicting_negatives"] = int(wrong.sum())
    rows = rows.without_negatives(wrong).fill()
    counts["filled_negatives"] = int(rows.filled.sum())
    report = {
        "rows": len(rows),
        "rows_by_source": rows.by_source(),
        **{name: counts[name] for name in COUNTS},
        "contaminated": {},
        "decontaminated_rows": 0,
        "decontaminated_by_source": dict.fromkeys(labels, 0),
        "notes": notes,
    }
    return _pairs(rows, report)


def decontaminate(pairs: Pairs, texts: Iterable[tuple[str, str]], remove: Collection[str]) -> Pairs:
    """The pairs without the rows whose query, positive or given negative has the normal form of an evaluation text.

    texts: (kind, text), kinds as in `KINDS`. remove: kinds whose rows are removed; of the others they are only counted.

    A filled-in negative that is such a text costs no row: it is drawn again. Report: `contaminated`, for each kind the
    number of different `texts`, of `rows` that contain one, and whether these are `removed`; `decontaminated_rows`, all
    rows removed, and `decontaminated_by_source`.

    Raises DataError if no row of a source is left.
    """
    rows, old = pairs.rows, pairs.report
    wrong, contaminated = np.zeros_like(rows.near, dtype=bool), {}
    for kind, hashes in near_hashes(texts).items():
        seen = np.isin(rows.near, hashes)
        given = seen.copy()
        given[:, 2:] &= ~rows.filled
        contaminated[kind] = {"texts": len(hashes), "rows": int(given.any(axis=1).sum()), "removed": kind in remove}
        if kind in remove:
            wrong |= seen
    clean = ~(wrong[:, :2].any(axis=1) | (wrong[:, 2:] & ~rows.filled).any(axis=1))
    rows = rows.select(clean)
    _refuse_empty(
        rows,
        "every row contains a text of an evaluation task; train on other data, or keep such rows with "
        "recipe.decontaminate = false",
    )
    rows = rows.without_negatives(wrong[clean][:, 2:]).fill()
    lost = {label: old["rows_by_source"][label] - left for label, left in rows.by_source().items()}
    report = {
        **old,
        "rows": len(rows),
        "rows_by_source": rows.by_source(),
        "filled_negatives": int(rows.filled.sum()),
        "contaminated": contaminated,
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
    """The sources' names in reports: the path, numbered if it is given twice."""
    return tuple(f"{path} ({i + 1})" if paths.count(path) > 1 else path for i, path in enumerate(paths))


def _refuse_empty(rows: Rows, why: str) -> None:
    for label, count in rows.by_source().items():
        if not count:
            raise DataError(f"training data {label!r}: {why}")


# Sources


@dataclass(frozen=True)
class PairSource:
    """A file, a Hub data set or the demo. `records` gives the rows with their places, unreadable rows left out.

    editable: the user can correct the rows, so that mistakes are errors; those of a Hub data set are counted
    delimited: cells are plain texts, so that a blank one is a missing negative
    """

    label: str
    records: Callable[[Mistakes], Iterator[Placed]]
    editable: bool = True
    delimited: bool = False


def open_source(path: str, split: str, base_dir: Path) -> list[PairSource]:
    """One `PairSource` for each file behind `path`: "demo", a file or folder (relative to `base_dir`), or a Hub name.

    Raises DataError: no such file, no file of that split, a format that is not read, a name unknown to the Hub.
    """
    if path == DEMO:
        return [PairSource("the demo's training pairs", _demo_records)]
    local = user_path(path, base_dir)
    if local.is_file():
        return [_open_file(local, path)]
    if local.is_dir():
        return [_open_file(file, f"{path.rstrip('/')}/{file.name}") for file in _files_of_split(local, path, split)]
    if not is_hub_name(path):
        near = suggest(local.name, [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else [])
        raise DataError(f"training data {path!r}: no such file or folder, seen from {str(base_dir)!r}{near}")
    return [_open_hub(path, split, base_dir)]


def is_hub_name(path: str) -> bool:
    """Whether a name that is neither "demo" nor an existing file or folder should be looked up on the Hub."""
    return not (file_format(Path(path)) or re.match(r"[.~/]|.*\\", path) or path.count("/") > 1)


def _files_of_split(folder: Path, path: str, split: str) -> list[Path]:
    """`train.jsonl.gz`, `train-00000-of-00002.parquet`; all files if none is named after a split."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file_format(file))
    words = {file: re.split(r"[._-]", file.name)[0].lower() for file in files}
    chosen = [file for file in files if words[file] == split.lower()]
    if not chosen and not SPLIT_WORDS & set(words.values()):
        chosen = files
    if not chosen:
        found = ", ".join(file.name for file in files) or f"no {', '.join(FORMATS)} file"
        raise DataError(
            f"training data {path!r}: no file of the split {split!r} (found: {found}); "
            f"name a file {split}.jsonl or give `split` in [[recipe.sources]]; see {PAGE}"
        )
    return chosen


def _open_file(file: Path, label: str) -> PairSource:
    if file_format(file) is None:
        raise DataError(
            f"training data {label!r}: cannot read {file.name!r}; allowed: {', '.join(FORMATS)}, or .gz; see {PAGE}"
        )
    return PairSource(label, lambda mistakes: read_records(file, mistakes, choose), delimited=is_delimited(file))


def _demo_records(mistakes: Mistakes) -> Iterator[Placed]:
    from poolwise import demo

    yield from _numbered(demo.training_pairs())


def _open_hub(name: str, split: str, base_dir: Path) -> PairSource:
    import datasets

    try:
        with cached_if_unreachable(name):
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the Hub's client raises is about this name, this split or the connection
        near = suggest(name, [DEMO, *(path.name for path in islice(base_dir.iterdir(), 1000))])
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"training data {name!r}: neither a file or folder seen from {str(base_dir)!r}{near} nor usable as a "
            f"Hub data set with the split {split!r}: {reason}. "
            f"Check the name and the connection (HF_ENDPOINT, HF_HUB_OFFLINE), or give a file"
        ) from error
    try:
        chosen = choose(rows.column_names)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error

    def records(mistakes: Mistakes) -> Iterator[Placed]:
        note_unread([column for column in rows.column_names if column not in chosen], mistakes)
        batches = rows.select_columns(list(chosen)).iter(1000)
        return _numbered(
            dict(zip(batch, cells, strict=True)) for batch in batches for cells in zip(*batch.values(), strict=True)
        )

    return PairSource(name, records, editable=False)


def _numbered(rows: Iterable[Record]) -> Iterator[Placed]:
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


# Columns


class Columns(NamedTuple):
    """Which column plays which role; several columns may hold negatives."""

    query: str
    positive: str
    negatives: tuple[str, ...]


def choose(names: Sequence[str]) -> Sequence[str]:
    """The columns that are read of these. Raises ValueError as `find_columns` does."""
    columns = find_columns(tuple(names))
    return (columns.query, columns.positive, *columns.negatives)


@lru_cache(maxsize=1000)  # called for every row of a JSONL file
def find_columns(names: tuple[str, ...]) -> Columns:
    """The columns of the three roles, in any letter case. Raises ValueError with what was found and what is allowed."""
    by_word: dict[str, str] = {}
    for name in names:
        word = name.strip().lower()
        if word in PASSAGES:
            raise ValueError(
                f"the column {name!r} holds records of a document each (docid, title, text), as Tevatron writes them; "
                "write their texts as lists, in columns 'positive' and 'negatives'"
            )
        read = NEGATIVE.fullmatch(word) or any(word in spellings for spellings in ROLES.values())
        if read and word in by_word:
            twice = f"{by_word[word]!r} and {name!r}" if by_word[word] != name else f"two columns {name!r}"
            raise ValueError(f"{twice}: one role, and only one can be read; drop or rename the wrong one")
        if not read and UNREAD_NEGATIVE.fullmatch(word):
            raise ValueError(
                f"the column {name!r} is not read; if it holds negatives, name it 'negative', 'negatives', 'neg' or, "
                "one a column, 'negative_1', 'negative_2'; if not, rename or drop it"
            )
        if word:
            by_word[word] = name
    numbered = [(int(match[1] or -1), name) for word, name in by_word.items() if (match := NEGATIVE.fullmatch(word))]
    query, positive = (_column_of(role, by_word) for role in ROLES)
    return Columns(query, positive, tuple(name for _, name in sorted(numbered)))


def _column_of(role: str, by_word: Mapping[str, str]) -> str:
    spellings = ROLES[role]
    present = [by_word[word] for word in spellings if word in by_word]
    if not present:
        found = ", ".join(map(repr, by_word.values())) or "none"
        either = ", ".join(map(repr, spellings[:-1])) + f" or {spellings[-1]!r}"
        raise ValueError(f"no column {role!r} (found: {found}{suggest(role, by_word)}); name it {either}")
    if len(present) > 1 and spellings[0] not in by_word:
        both = " and ".join(map(repr, present))
        raise ValueError(f"{both} could each be the column {role!r}; rename the right one to {role!r}")
    return present[0]


# Rows


def _checked_rows(source: PairSource, negatives: int, counts: Counter[str], notes: list[str]) -> Iterator[list[str]]:
    """Query, positive and at most `negatives` negatives of each good row; a list of positives gives a row for each.

    Raises DataError with the mistakes of this source.
    """
    mistakes = Mistakes(source.label, page=PAGE)
    for place, record in source.records(mistakes):
        columns = find_columns(tuple(record))
        if source.delimited and (lists := [name for name, cell in record.items() if is_list(cell)]):
            fix = "write JSONL, or one text a cell (columns negative_1, negative_2; one row for each positive)"
            named = ", ".join(map(repr, lists))
            mistakes.add(place, f"column {named}: a list in a cell would be read as one text; {fix}")
            continue
        problems: list[str] = []
        query = _text(record[columns.query], "query", problems)
        given = record[columns.positive]
        positives = [_text(value, "positive", problems) for value in (given if isinstance(given, list) else [given])]
        if not positives:
            problems.append("'positive' is an empty list; give a text")
        cells = [record[name] for name in columns.negatives]
        wrong: list[str] = []
        different = _negatives(cells, source.delimited, (query, *positives), wrong)
        if source.editable and (problems or wrong):
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
    notes += mistakes.notes


def _negatives(cells: list[Any], blank_is_none: bool, others: tuple[str, ...], problems: list[str]) -> list[str]:
    """The negatives of all cells. null and an empty list are none; so is a blank cell of a CSV."""
    found = []
    for cell in cells:
        for value in cell if isinstance(cell, list) else [] if cell is None else [cell]:
            if blank_is_none and isinstance(value, str) and not value.strip():
                continue
            before = len(problems)
            text = _text(value, "negative", problems)
            if text in others and len(problems) == before:
                role = "query" if text == others[0] else "positive"
                problems.append(f"the negative is equal to the {role} ({short(text)}); give a wrong answer or none")
            if len(problems) == before:
                found.append(text)
    return found


def _text(value: object, role: str, problems: list[str]) -> str:
    """The text stripped; what is wrong with it goes to `problems`."""
    if problem := text_problem(value):
        leave = " or leave it out" if role == "negative" and problem == "is empty" else ""
        problems.append(f"{role!r} {problem}; give a text{leave}")
        return ""
    assert isinstance(value, str)
    return value.strip()
