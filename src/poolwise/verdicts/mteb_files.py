"""One result file of mteb, of its current or its first format: the main scores that were asked for.

Whatever must be decided on the way (a split, a missing main score, a damaged file) is put into a `Log`, so that each
kind of decision becomes one note.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from poolwise.errors import DataError, suggest
from poolwise.files import parse_json
from poolwise.verdicts.table import SIGNED_METRICS, Note, first_few

NEWEST, RUNS = "newest", "runs"
Cells = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
"""Task -> (splits, subsets) of a benchmark."""
PREFIXES = {"cos_sim": "cosine", "euclidean": "euclidean", "manhattan": "manhattan", "dot": "dot", "max": "max",
            "similarity": "similarity"}  # fmt: skip
"""Groups of metrics in files of mteb before 1.11 -> the prefix of those metrics since."""
KINDS = {
    "cosine_spearman": "STS", "v_measure": "Clustering", "max_ap": "PairClassification",
    "ndcg_at_10": "Retrieval", "map_at_1000": "Reranking", "map": "Reranking",
    "accuracy": "Classification", "f1": "Classification", "lrap": "MultilabelClassification",
}  # fmt: skip
"""Main metric -> task type, for tasks that mteb does not know."""


@dataclass(frozen=True)
class Choice:
    """Which part of published results to read.

    `subsets`, `splits`: keep these alone; empty: every subset, and the evaluation split of each task. `benchmark`: keep
    the tasks, splits and subsets of this benchmark of mteb. `revisions`: `newest` (one result for each model) or `runs`
    (each revision of a model is one of its runs).
    """

    subsets: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    benchmark: str | None = None
    revisions: str = NEWEST


@dataclass(frozen=True)
class Result:
    """The scores in one file: `cells` are (split, subset) -> main score, as far as they were asked for."""

    path: Path
    model: str
    revision: str
    task: str
    kind: str
    metric: str
    canonical: bool
    version: str
    dataset_revision: str
    cells: Mapping[tuple[str, str], float]
    seconds: float | None


@dataclass
class Log:
    """Cases by what was decided about them, so that each kind becomes one note."""

    cases: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, case: str) -> None:
        self.cases.setdefault(kind, []).append(case)

    def once(self, kind: str, case: str) -> None:
        if case not in self.cases.get(kind, ()):
            self.add(kind, case)

    def note(self, kind: str, text: str) -> Iterator[Note]:
        """The note on one kind; `{n}` and `{names}` in its text are the number of cases and the first of them."""
        if found := self.cases.get(kind):
            yield Note(text.format(n=len(found), names=first_few(found)), tuple(found))


def read_file(
    path: Path, root: Path, model: str, revision: str, choice: Choice,
    wanted: Cells | None, log: Log,
) -> Result | None:  # fmt: skip
    """One result file; None, with a case in the log, if it holds nothing that was asked for."""
    name = str(path.relative_to(root))
    try:
        content = parse_json(path.read_bytes().decode("utf-8-sig"), finite=False)
        written, by_split = _splits(content)
    except ValueError as error:
        log.add("damaged", f"{name} ({model}, {path.stem}): {str(error).splitlines()[0]}")
        return None
    known = known_task(written)
    task = known.name if known else written
    if wanted is not None and task not in wanted:
        return None
    splits = _chosen_splits(task, list(by_split), known, choice, wanted, log)
    cells, metric, kind = dict[tuple[str, str], float](), "", ""
    for split in splits:
        for subset, scores in _chosen_subsets(task, by_split[split], choice, wanted):
            metric, kind = (str(known.main_score), str(known.type)) if known else _guessed(scores)
            if not kind:
                log.add("unknown", f"{task} ({name})")
                return None
            value, substitute = _main_score(scores, metric, kind)
            if problem := _problem(value, metric):
                log.add("no score", f"{name} ({model}, {task}, {split}, {subset}): {problem}")
                continue
            if substitute:
                log.add("substitute", f"{name}: {substitute} for {metric}")
            assert value is not None
            cells[split, subset] = value
    if not cells:
        return None
    seconds = content.get("evaluation_time")
    return Result(
        path.relative_to(root), model, revision, task, kind, metric, written == task,
        str(content.get("mteb_version") or ""), str(content.get("dataset_revision") or ""), cells,
        float(seconds) if isinstance(seconds, (int, float)) else None,
    )  # fmt: skip


def _splits(content: Any) -> tuple[str, dict[str, dict[str, dict[str, Any]]]]:
    """(task, split -> subset -> metrics) of a result file of either format. Raises ValueError if it is neither."""
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__}, expected an object")
    if isinstance(task := content.get("mteb_dataset_name"), str) and task:
        splits = {
            name: values
            for name, values in content.items()
            if isinstance(values, dict) and name not in ("evaluation_phases",)
        }
        return task, {name: _before_1_11(values) for name, values in splits.items()}
    task, scores = content.get("task_name"), content.get("scores")
    if not isinstance(task, str) or not task or not isinstance(scores, dict):
        raise ValueError("neither task_name and scores nor mteb_dataset_name")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for split, rows in scores.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"the scores of split {split!r} are not a list of objects")
        subsets = [str(row.get("hf_subset", "default")) for row in rows]
        if len(set(subsets)) < len(subsets):
            twice = next(name for name, count in Counter(subsets).items() if count > 1)
            raise ValueError(f"subset {twice!r} of split {split!r} is listed twice")
        found[split] = dict(zip(subsets, rows, strict=True))
    return task, found


def _before_1_11(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Subset -> metrics of one split in mteb's first format, in which cosine_spearman is `cos_sim: {spearman: …}`."""
    nested = {name: inner for name, inner in values.items() if isinstance(inner, dict)}
    subsets = {name: inner for name, inner in nested.items() if name not in PREFIXES and name != "v_measures"}
    if not subsets:
        subsets = {"default": dict(values)}
    found = {}
    for subset, metrics in subsets.items():
        flat = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
        for group, prefix in PREFIXES.items():
            if isinstance(inner := metrics.get(group), dict):
                flat |= {f"{prefix}_{name}": value for name, value in inner.items()}
        found[subset] = flat
    return found


def _main_score(scores: Mapping[str, Any], metric: str, kind: str) -> tuple[Any, str]:
    """(the main score or None, the metric that stands in for a missing one)."""
    if scores.get("main_score") is not None:
        return scores["main_score"], ""
    if scores.get(metric) is not None:
        return scores[metric], ""
    if kind == "Reranking" and scores.get("map") is not None:  # what files before 1.11 have
        return scores["map"], "map"
    return None, ""


def _problem(value: Any, metric: str) -> str:
    """Why a value is not a score, or an empty string."""
    if value is None:
        return "no main score"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"the main score is {value!r}, not a number"
    if not math.isfinite(value):
        return f"the main score is {value}"
    low = -1.0 if re.search(SIGNED_METRICS, metric) else 0.0
    return "" if low <= value <= 1 else f"the main score {value:g} is not between {low:g} and 1"


def _chosen_splits(
    task: str, present: Sequence[str], known: Any, choice: Choice,
    wanted: Cells | None, log: Log,
) -> list[str]:  # fmt: skip
    if choice.splits:
        return [name for name in present if name in choice.splits]
    if wanted is not None:
        return [name for name in present if name in wanted[task][0]]
    evaluated = [name for name in present if name in known.eval_splits] if known else list(present)
    if not evaluated:
        log.once("other splits", f"{task}: {', '.join(present)}")
        return list(present)
    if len(evaluated) > 1 and "test" in evaluated:
        others = ", ".join(name for name in evaluated if name != "test")
        log.once("test alone", f"{task}: test, not {others}")
        return ["test"]
    return evaluated


def _chosen_subsets(
    task: str, subsets: Mapping[str, Mapping[str, Any]], choice: Choice,
    wanted: Cells | None,
) -> list[tuple[str, Mapping[str, Any]]]:  # fmt: skip
    """The subsets asked for; a task that has none but `default` is the same in every language choice."""
    if choice.subsets and list(subsets) != ["default"]:
        return [(name, scores) for name, scores in subsets.items() if name in choice.subsets]
    if wanted is not None and not choice.subsets:
        return [(name, scores) for name, scores in subsets.items() if name in wanted[task][1]]
    return list(subsets.items())


def _guessed(scores: Mapping[str, Any]) -> tuple[str, str]:
    """Main metric and type of a task that mteb does not know, by the metric that equals its main score."""
    main = scores.get("main_score")
    return next(((m, kind) for m, kind in KINDS.items() if main is not None and scores.get(m) == main), ("", ""))


@cache
def _registry() -> dict[str, Any]:
    """Name in lower case -> what mteb knows about a task; old names lead to the new ones."""
    import mteb
    from mteb.results import task_result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = {task.metadata.name.lower(): task.metadata for task in mteb.get_tasks(exclude_superseded=False)}
    renamed = getattr(task_result, "renamed_tasks", {})
    return known | {old.lower(): known[new.lower()] for old, new in renamed.items() if new.lower() in known}


def known_task(name: str) -> Any:
    """mteb's metadata of a task by any spelling of its name, or None."""
    return _registry().get(name.lower())


def benchmark_cells(name: str) -> Cells:
    """Task -> (splits, subsets) of one of mteb's benchmarks. Raises DataError for an unknown one."""
    import mteb

    names = [benchmark.name for benchmark in mteb.get_benchmarks()]
    if name not in names:
        raise DataError(f"benchmark {name!r} is unknown to mteb; known are {first_few(names)}{suggest(name, names)}")
    tasks = mteb.get_benchmark(name).tasks
    return {task.metadata.name: (tuple(task.eval_splits), tuple(task.hf_subsets)) for task in tasks}
