"""TREC runs and judgements, scored query by query as trec_eval does, but ranked by scores of 64 bits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.data.own_tasks import HIGHEST_GRADE, chooser
from poolwise.data.reading import PAGE, UnreadableError, file_format, read_lines, read_records
from poolwise.errors import DataError, Mistakes, suggest
from poolwise.verdicts.items import Paired, compare_items
from poolwise.verdicts.table import NOT_IN_RUN, table

if TYPE_CHECKING:
    import polars as pl


MEASURES = {"ndcg_at": "ndcg_cut", "map_at": "map_cut", "recall_at": "recall", "precision_at": "P"}
ENDINGS = {".run", ".trec", ".res", ".txt", ".tsv"}
"""Endings of file names that are no part of a system's name."""
Line = tuple[str, list[str]]
"""(file and line for messages, its cells)."""


@dataclass(frozen=True)
class Runs:
    """Scored runs: the long table with a row for each query and one for the mean of each run.

    `notes` are sentences on the judgements, `by_design` those on the runs of a system.
    """

    frame: pl.DataFrame
    notes: tuple[str, ...]
    by_design: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Ranking:
    """Documents of each query, best first; the queries with tied scores, and those whose ranks contradict scores."""

    documents: dict[str, list[str]]
    tied: tuple[str, ...]
    contradicted: tuple[str, ...]


def read_trec(
    runs: Sequence[str | Path], qrels: str | Path, metric: str = "ndcg_at_10", task: str | None = None
) -> Runs:
    """Score TREC runs (`query Q0 document rank score tag`) against judgements.

    Cells are separated by tabs or by blanks; ids that contain blanks need tabs. Files may be compressed (`.gz`).
    `qrels` is TREC's table (`query 0 document grade`), or one with the columns `query-id`, `corpus-id` and `score`, as
    in an evaluation folder: CSV, TSV, JSONL or Parquet. `metric` is mteb's name:
    `ndcg_at_k`, `map_at_k`, `recall_at_k`, `precision_at_k`, `map`, `mrr`.

    The design is a run's file name without `.run` or another of `ENDINGS`; a trailing `.seed1`, `-seed1` or `_seed1` is
    its seed (default 0). A judged query that a run lacks scores 0, and its `note` states that. Documents with equal
    scores are ranked by their ids, descending, whatever the file's ranks say, as trec_eval does; scores that differ
    only beyond the 32 bits that trec_eval reads are not equal.

    Grades are whole numbers (1.0 counts as one), those below 1 are not relevant, and scores are finite. A query ranks
    each document once; judgements of a document may repeat but not differ.

    Raises:
        DataError: a line that breaks these rules (file, line), two files of one design and seed, no relevant document,
            an unknown metric.
    """
    import pytrec_eval

    match = re.fullmatch(r"(ndcg_at|map_at|recall_at|precision_at)_([1-9]\d{0,3})|map|mrr", metric)
    if match is None:
        allowed = ["ndcg_at_10", "map_at_10", "recall_at_10", "precision_at_10", "map", "mrr"]
        hint = suggest(metric, allowed)
        raise DataError(
            f"metric {metric!r} is unknown; allowed: {', '.join(allowed)}, with any cut-off below 10,000{hint}"
        )
    measure = f"{MEASURES[match[1]]}.{match[2]}" if match[1] else {"map": "map", "mrr": "recip_rank"}[metric]
    notes: list[str] = []
    judged = _judgements(Path(qrels), notes)
    bare = [query for query, grades in judged.items() if max(grades.values()) <= 0]
    if len(bare) == len(judged):
        raise DataError(f"{qrels}: no query with a relevant document")
    if bare:
        share = f"{len(bare)} of {len(judged)} judged queries"
        notes.append(f"without any relevant document, so 0 in every run: {share} ({_few(bare)})")
    # Not relevant is not relevant, however negative; a query with negative grades alone makes trec_eval write to memory
    # that is not its own.
    judged = {query: {name: max(0, grade) for name, grade in grades.items()} for query, grades in judged.items()}
    task, rows, by_design = task or Path(qrels).stem, list[dict[str, Any]](), dict[str, list[str]]()
    for path, (design, seed) in _names([Path(run) for run in runs]).items():
        ranking = _ranking(path)
        # Ranks as scores: whole numbers keep an order that 32 bits would lose.
        ranked = {query: {d: float(-i) for i, d in enumerate(found)} for query, found in ranking.documents.items()}
        evaluated = pytrec_eval.RelevanceEvaluator(judged, {measure}).evaluate(ranked)
        field = measure.replace(".", "_")
        scores = {query: evaluated[query][field] if query in evaluated else 0.0 for query in judged}
        by_design.setdefault(design, []).extend(_remarks(path.name, ranking))
        common = {"design": design, "seed": seed, "task": task, "task_type": "Retrieval", "metric": metric}
        rows.append({**common, "score": sum(scores.values()) / len(scores), "item_id": None})
        rows += [
            {**common, "score": score, "item_id": query, "note": None if query in evaluated else NOT_IN_RUN}
            for query, score in scores.items()
        ]
    frame = table(rows, "the runs")
    return Runs(frame, tuple(notes), {design: tuple(found) for design, found in by_design.items()})


def compare_runs(
    runs: Sequence[str | Path],
    qrels: str | Path,
    *,
    metric: str = "ndcg_at_10",
    task: str | None = None,
    design: str | None = None,
    baseline: str | None = None,
    seed: int = 0,
) -> tuple[Paired, ...]:
    """Compare TREC runs query by query, the first one being the baseline; files are read as in `read_trec`.

    As in pytrec_eval, only queries that a run contains are evaluated: a pair of runs is compared on the judged queries
    that both have. The note lists the others and the difference that a score of 0 for them (trec_eval's `-c`) would
    make, and what had to be decided in reading the two runs.
    """
    name = task or Path(qrels).stem
    scored = read_trec(runs, qrels, metric, name)
    lines = compare_items(scored.frame, name, design=design, baseline=baseline, missing="drop", seed=seed)
    of = scored.by_design
    return tuple(
        replace(line, note="; ".join([*filter(None, [line.note]), *scored.notes, *of[line.baseline], *of[line.design]]))
        for line in lines
    )


def _names(paths: Sequence[Path]) -> dict[Path, tuple[str, int]]:
    """(design, seed) of each run by its file name; with its folder where files of two folders have the same name."""
    plain = {path: Path(path.name.removesuffix(".gz")) for path in paths}
    stems = {path: name.stem if name.suffix.lower() in ENDINGS else name.name for path, name in plain.items()}
    if len({path.resolve() for path in paths}) < len(paths) or len(stems) < len(paths):
        twice = next(path for path, n in Counter(path.resolve() for path in paths).items() if n > 1)
        raise DataError(f"{twice}: the same run is given more than once")
    found: dict[Path, tuple[str, int]] = {}
    for path, stem in stems.items():
        same = [other for other in paths if stems[other] == stem]
        name = stem
        if len(same) > 1:  # x.run and x.txt, or the same name in two folders
            name = path.name if len({other.name for other in same}) == len(same) else f"{path.parent.name}/{stem}"
        seeded = re.fullmatch(r"(.+?)[._-]seed(\d+)", name)
        found[path] = (seeded[1], int(seeded[2])) if seeded else (name, 0)
        if first := next((other for other in found if other != path and found[other] == found[path]), None):
            design, seed = found[path]
            raise DataError(
                f"{path}: by the file names, run {seed} of {design!r} is given more than once (also {first}); name "
                "the files after their systems, with .seed0, .seed1 … for several runs of one system"
            )
    return found


def _remarks(name: str, ranking: _Ranking) -> Iterator[str]:
    """What a reader must know of one run: tied scores, ranks that contradict them, queries among their own results."""
    total = len(ranking.documents)
    if ranking.tied:
        yield (
            f"{name}: tied scores in {len(ranking.tied)} of {total} queries ({_few(ranking.tied)}), ranked by document "
            "id as trec_eval does"
        )
    if ranking.contradicted:
        yield (
            f"{name}: the ranks of the file contradict its scores in {len(ranking.contradicted)} of {total} queries "
            f"({_few(ranking.contradicted)}); the scores count"
        )
    own = [query for query, documents in ranking.documents.items() if query in documents]
    if own:
        yield f"{name}: {len(own)} of {total} queries are among their own results ({_few(own)})"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _lines(path: Path, fits: Callable[[list[str]], bool]) -> Iterator[Line]:
    """Every line that is not blank, with its cells: split at tabs if that gives cells that fit, otherwise at blanks."""
    try:
        for place, line in read_lines(path):
            if line.strip():
                by_tab = [cell.strip() for cell in line.strip("\r\n").split("\t")]
                yield f"{path}, {place}", by_tab if fits(by_tab) else line.split()
    except UnreadableError as error:
        where = f"{path}, {error.place}" if error.place else str(path)
        raise DataError(f"{where}: {error}") from error


def _with_header(path: Path) -> bool:
    """Whether judgements are a table with named columns, as in an evaluation folder, and not TREC's bare lines."""
    kind = file_format(path)
    if kind != "tsv":  # whose lines may be TREC's
        return kind is not None
    _, header = next(_lines(path, lambda cells: True), ("", []))
    return {"query-id", "corpus-id"} <= set(header)


def _named(path: Path, notes: list[str]) -> Iterator[Line]:
    """The judgements of a table with named columns: (place, [query, document, grade])."""
    mistakes = Mistakes(str(path), DataError, PAGE)
    for place, record in read_records(path, mistakes, chooser("qrels")):
        yield f"{path}, {place}", [str(record[name]).strip() for name in ("query-id", "corpus-id", "score")]
    mistakes.check()
    notes += mistakes.notes


def _judgements(path: Path, notes: list[str]) -> dict[str, dict[str, int]]:
    """Query -> document -> grade. How a table was read is added to `notes`."""
    judged: dict[str, dict[str, int]] = {}
    table = _with_header(path)
    lines = _named(path, notes) if table else _lines(path, lambda cells: len(cells) in (3, 4))
    for where, cells in lines:
        if where.endswith(", line 1") and cells[-1] == "score":  # a header of a file that has no ending
            continue
        try:
            query, document, cell = (cells[0], cells[2], cells[3]) if len(cells) == 4 else cells
            if len(cells) == 4 and not re.fullmatch(r"[Qq]?\d+", cells[1]):
                raise ValueError
            grade = float(cell)
        except ValueError as error:
            why = f"column 'score': expected a number, got {cells[2]!r}" if table else _unfit(cells, 3, QRELS_FORM)
            raise DataError(f"{where}: {why}") from error
        if not grade.is_integer() or abs(grade) > HIGHEST_GRADE:
            raise DataError(
                f"{where}: grade {cell!r} is not a whole number from -{HIGHEST_GRADE} to {HIGHEST_GRADE} "
                "(above 0 = relevant); scale the grades (0.5 and 1 to 1 and 2) or round them"
            )
        known = judged.setdefault(query, {}).setdefault(document, int(grade))
        if known != grade:
            raise DataError(
                f"{where}: grade {cell} for query {query!r} and document {document!r} differs "
                f"from {known} in an earlier line; a document has one grade per query, keep one of the lines"
            )
    if not judged:
        raise DataError(f"{path}: no judgement; expected lines of the form {QRELS_FORM}, or a table as in {PAGE}")
    return judged


QRELS_FORM, RUN_FORM = "'query 0 document grade' or 'query document grade'", "'query Q0 document rank score tag'"


def _unfit(cells: Sequence[str], least: int, form: str) -> str:
    """Why the cells of a line are not a judgement or a result."""
    hint = "; ids that contain blanks need tabs between the cells" if len(cells) > least else ""
    return f"{' '.join(cells)!r} is not {form}{hint}"


def _ranking(path: Path) -> _Ranking:
    """The ranking of a run by its scores, ties by document id, descending."""
    scores: dict[str, dict[str, float]] = {}
    ranks: dict[str, dict[str, float]] = {}
    for where, cells in _lines(path, lambda cells: len(cells) in (5, 6)):
        try:
            query, _, document, rank, cell, *tag = cells
            if len(tag) > 1 or not re.fullmatch(r"-?\d+(\.0*)?", rank):
                raise ValueError
            score = float(cell)
        except ValueError as error:
            raise DataError(f"{where}: {_unfit(cells, 5, RUN_FORM)}") from error
        if not math.isfinite(score):
            raise DataError(
                f"{where}: score {cell!r} is not a finite number, so the document has no rank; remove "
                "the line or fix the system that wrote it"
            )
        documents = scores.setdefault(query, {})
        if document in documents:
            raise DataError(
                f"{where}: document {document!r} is already ranked for query {query!r}, with score "
                f"{documents[document]:g}; a run ranks a document once per query, keep one of the lines"
            )
        documents[document] = score
        ranks.setdefault(query, {})[document] = float(rank)
    ordered, tied, contradicted = dict[str, list[str]](), list[str](), list[str]()
    for query, documents in scores.items():
        # sorted twice: by id, then by score, which keeps the order of ids among equal scores
        found = sorted(sorted(documents, reverse=True), key=lambda document: -documents[document])
        ordered[query] = found
        if len(set(documents.values())) < len(documents):
            tied.append(query)
        places = [ranks[query][document] for document in found]
        if places != sorted(places):
            contradicted.append(query)
    return _Ranking(ordered, tuple(tied), tuple(contradicted))
