"""Reading scores: CSV, TSV, Parquet, folders of mteb results, TREC runs with their judgements.

Every source ends as the validated long table of `verdicts.table`; an error names the file, the line, the column and the
value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.data.own_tasks import HIGHEST_GRADE
from poolwise.data.reading import read_table
from poolwise.errors import DataError, short, suggest
from poolwise.verdicts.table import NOT_IN_RUN, REQUIRED, table, to_polars, validate

if TYPE_CHECKING:
    import polars as pl


def read(path: str | Path) -> pl.DataFrame:
    """Read a CSV, TSV or Parquet file of scores, or a folder of mteb results, as the validated long table.

    Raises:
        DataError: the file is missing, of an unknown kind, malformed, or breaks a rule of `validate`.
    """
    import polars as pl

    path = Path(path)
    if path.is_dir():
        return read_mteb(path)
    if not path.exists():
        near = suggest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(f"{path}: no such file or folder{near}")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return validate(to_polars(read_table(path), str(path)), str(path), unit="row", first=1)
        if suffix in (".csv", ".tsv"):
            separator = "\t" if suffix == ".tsv" else ","
            frame = pl.read_csv(path, separator=separator, infer_schema=False, encoding="utf8")
            return validate(frame, str(path), unit="line", first=2)
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{path}: the file is empty; its first line must be {','.join(REQUIRED)}") from error
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable {suffix[1:].upper()} file ({reason})") from error
    raise DataError(f"{path}: unknown file type {suffix!r}; allowed: .csv, .tsv, .parquet or a folder of mteb results")


def read_mteb(folder: str | Path) -> pl.DataFrame:
    """Read `<model>/<revision>/<Task>.json` below a folder, the layout that mteb writes and publishes.

    The model's name is the design (`org__name` becomes `org/name`); its revision folders, in alphabetical order, are
    its seeds, but folders without a common task are parts of one run. Of tasks that mteb knows only the evaluation
    splits are kept, and a part of an aggregate task is left out if the aggregate is present; results copied from model
    cards (`external`) are used only if a model has no others.

    Raises:
        DataError: no result file below the folder, or a file that mteb cannot read.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.resolve().rglob("*.json") if p.name != "model_meta.json" and _is_result(p))
    if not files:
        raise DataError(f"{folder} contains no mteb results; expected <model>/<revision>/<Task>.json")
    runs: dict[str, dict[str, list[Path]]] = {}
    for path in files:
        runs.setdefault(path.parent.parent.name.replace("__", "/"), {}).setdefault(path.parent.name, []).append(path)
    rows = []
    for model, revisions in runs.items():
        measured = [name for name in revisions if name != "external"] or list(revisions)
        tasks_of_seed: list[set[str]] = []
        for revision in sorted(measured):
            tasks = {path.name for path in revisions[revision]}
            # The first seed that has none of these tasks yet: revisions with disjoint tasks are parts of one run.
            seed = next((seed for seed, names in enumerate(tasks_of_seed) if not names & tasks), len(tasks_of_seed))
            if seed == len(tasks_of_seed):
                tasks_of_seed.append(set())
            tasks_of_seed[seed] |= tasks
            for row in _task_rows(revisions[revision]):
                rows.append({"design": model, "seed": seed, "revision": revision, **row})
    return table(rows, str(folder))


def _is_result(path: Path) -> bool:
    """Whether a JSON file is a result of mteb, of the current or of its first format."""
    text = path.read_bytes()
    return b'"main_score"' in text or b'"mteb_dataset_name"' in text


def _task_rows(files: list[Path]) -> Iterable[dict[str, Any]]:
    """The main scores in the result files of one revision."""
    import mteb
    from mteb.results import TaskResult

    loaded, parts = [], set[str]()
    for path in files:
        try:
            result = TaskResult.from_disk(path)
        except Exception as error:  # mteb lets through whatever its validators raise
            raise DataError(f"{path}: mteb cannot read it ({str(error).splitlines()[0]})") from error
        try:
            known = mteb.get_task(result.task_name).metadata
        except KeyError:
            known = None
        parts |= {part.metadata.name for part in getattr(known, "tasks", None) or ()}
        loaded.append((path, result, known))
    for path, result, known in loaded:
        if result.task_name in parts:
            continue
        splits = [name for name in result.scores if known is None or name in known.eval_splits] or list(result.scores)
        for split in splits:
            for scores in result.scores[split]:
                if not isinstance(scores["main_score"], int | float):
                    raise DataError(f"{path}: main_score is {short(scores['main_score'])}, not a number")
                metric, kind = (known.main_score, known.type) if known else _guess_kind(path, scores)
                yield {
                    "task": result.task_name, "task_type": str(kind), "split": split, "subset": scores["hf_subset"],
                    "metric": str(metric), "score": float(scores["main_score"]), "mteb_version": result.mteb_version,
                    "dataset_revision": result.dataset_revision, "evaluation_time": result.evaluation_time,
                }  # fmt: skip


def _guess_kind(path: Path, scores: Mapping[str, Any]) -> tuple[str, str]:
    """Main metric and task type of a task that mteb does not know, from the metrics in its file."""
    by_metric = {
        "cosine_spearman": "STS", "v_measure": "Clustering", "max_ap": "PairClassification",
        "ndcg_at_10": "Retrieval", "map_at_1000": "Reranking", "map": "Reranking",
        "accuracy": "Classification", "f1": "Classification", "lrap": "MultilabelClassification",
    }  # fmt: skip
    for metric, kind in by_metric.items():
        if scores.get(metric) == scores["main_score"]:
            return metric, kind
    raise DataError(
        f"{path}: mteb does not know this task, and its metrics do not determine its type; give a CSV with task_type"
    )


def read_trec(
    runs: Iterable[str | Path], qrels: str | Path, metric: str = "ndcg_at_10", task: str | None = None
) -> pl.DataFrame:
    """Score TREC runs (`query Q0 document rank score tag`) against judgements: a row for each query, one for the mean.

    The design is a run's file name without its suffix; a trailing `.seed1`, `-seed1` or `_seed1` is its seed (default
    0). `qrels` is TREC's table (`query 0 document grade`) or BEIR's (`query-id corpus-id score`). Queries without a
    relevant document are left out; a judged query that a run lacks scores 0, and its `note` states that. `metric` is
    mteb's name: `ndcg_at_k`, `map_at_k`, `recall_at_k`, `precision_at_k`, `map`, `mrr`.

    Grades are whole numbers (1.0 counts as one) and scores are finite. A query ranks each document once; judgements of
    a document may repeat but not differ.

    Raises:
        DataError: a line that breaks these rules (file, line), two files of one design and seed, no judged query, an
            unknown metric.
    """
    import re

    import pytrec_eval

    names = {"ndcg_at": "ndcg_cut", "map_at": "map_cut", "recall_at": "recall", "precision_at": "P"}
    match = re.fullmatch(r"(ndcg_at|map_at|recall_at|precision_at)_([1-9]\d{0,3})|map|mrr", metric)
    if match is None:
        allowed = ["ndcg_at_10", "map_at_10", "recall_at_10", "precision_at_10", "map", "mrr"]
        hint = suggest(metric, allowed)
        raise DataError(
            f"metric {metric!r} is unknown; allowed: {', '.join(allowed)}, with any cut-off below 10,000{hint}"
        )
    measure = f"{names[match[1]]}.{match[2]}" if match[1] else {"map": "map", "mrr": "recip_rank"}[metric]
    judged = {query: docs for query, docs in _judgements(Path(qrels)).items() if max(docs.values()) > 0}
    if not judged:
        raise DataError(f"{qrels}: no query with a relevant document")
    task, rows, paths = task or Path(qrels).stem, list[dict[str, Any]](), dict[tuple[str, int], Path]()
    for path in map(Path, runs):
        seeded = re.fullmatch(r"(.+?)[._-]seed(\d+)", path.stem)
        design, seed = (seeded[1], int(seeded[2])) if seeded else (path.stem, 0)
        if first := paths.get((design, seed)):
            raise DataError(
                f"{path}: by the file names, run {seed} of {design!r} is given more than once (also {first}); name "
                "the files after their systems, with .seed0, .seed1 … for several runs of one system"
            )
        paths[design, seed] = path
        evaluated = pytrec_eval.RelevanceEvaluator(judged, {measure}).evaluate(_ranking(path))
        field = measure.replace(".", "_")
        scores = {query: evaluated[query][field] if query in evaluated else 0.0 for query in judged}
        common = {"design": design, "seed": seed, "task": task, "task_type": "Retrieval", "metric": metric}
        rows.append({**common, "score": sum(scores.values()) / len(scores), "item_id": None})
        rows += [
            {**common, "score": score, "item_id": query, "note": None if query in evaluated else NOT_IN_RUN}
            for query, score in scores.items()
        ]
    return table(rows, "the runs")


def _lines(path: Path) -> Iterable[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((number, line.split()) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _judgements(path: Path) -> dict[str, dict[str, int]]:
    """Query -> document -> grade."""
    judged: dict[str, dict[str, int]] = {}
    for number, cells in _lines(path):
        if number == 1 and cells[-1] == "score":  # the header of BEIR's table
            continue
        try:
            query, document, cell = (cells[0], cells[2], cells[3]) if len(cells) == 4 else cells
            grade = float(cell)
        except ValueError as error:
            form = "'query 0 document grade' or 'query document grade'"
            raise DataError(f"{path}, line {number}: {' '.join(cells)!r} is not {form}") from error
        if not grade.is_integer() or abs(grade) > HIGHEST_GRADE:
            raise DataError(
                f"{path}, line {number}: grade {cell!r} is not a whole number from -{HIGHEST_GRADE} to {HIGHEST_GRADE} "
                "(above 0 = relevant); scale the grades (0.5 and 1 to 1 and 2) or round them"
            )
        known = judged.setdefault(query, {}).setdefault(document, int(grade))
        if known != grade:
            raise DataError(
                f"{path}, line {number}: grade {cell} for query {query!r} and document {document!r} differs "
                f"from {known} in an earlier line; a document has one grade per query, keep one of the lines"
            )
    return judged


def _ranking(path: Path) -> dict[str, dict[str, float]]:
    """Query -> document -> score."""
    ranking: dict[str, dict[str, float]] = {}
    for number, cells in _lines(path):
        try:
            query, _, document, _, cell, *_ = cells
            score = float(cell)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: {' '.join(cells)!r} is not 'query Q0 document rank score tag'"
            ) from error
        if not math.isfinite(score):
            raise DataError(
                f"{path}, line {number}: score {cell!r} is not a finite number, so the document has no rank; remove "
                "the line or fix the system that wrote it"
            )
        documents = ranking.setdefault(query, {})
        if document in documents:
            raise DataError(
                f"{path}, line {number}: document {document!r} is already ranked for query {query!r}, with score "
                f"{documents[document]:g}; a run ranks a document once per query, keep one of the lines"
            )
        documents[document] = score
    return ranking
