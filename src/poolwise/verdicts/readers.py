"""Reading scores: CSV, TSV and Parquet files, and folders of results as mteb writes and publishes them.

| file of a folder | what it is |
|---|---|
| `MODEL/REVISION/TASK.json` | the scores of one task |
| `MODEL/REVISION/model_meta.json` | when the revision was released |
| `MODEL/external/TASK.json` | scores copied from a model card |
| `MODEL/REVISION/experiments/ARGUMENTS/TASK.json` | scores under other arguments |
| `MODEL/TASK.json` | the layout before revisions |

The model is the design (`org__name` becomes `org/name`), its result the only run. Whatever must be decided while
reading (which revision, split, subset; what is copied from a card, damaged, doubled) becomes one note each. Every
source ends as the validated long table of `verdicts.table`; an error names file, line, column and value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.data.reading import DELIMITERS, UnreadableError, file_format, read_lines, read_table
from poolwise.errors import DataError, suggest
from poolwise.files import read_any_json, whole_number
from poolwise.verdicts.mteb_files import NEWEST, RUNS, Choice, Log, Result, benchmark_cells, known_task, read_file
from poolwise.verdicts.table import OPTIONAL, REQUIRED, Note, Scores, first_few, table, to_polars, validate

if TYPE_CHECKING:
    import polars as pl


DEFAULTS = {"seed": "0", "task_type": "all", "metric": "score"}
"""Columns that a table of scores may lack -> what every row is taken to have."""
EXTERNAL, EXPERIMENTS, META = "external", "experiments", "model_meta.json"
UNNAMED = "no_revision_available"
REVISION = re.compile(rf"[0-9a-f]{{7,64}}|{UNNAMED}|main|master|v?\d[\w.-]*")
"""Names of folders that are revisions whatever lies around them."""


def read(path: str | Path, choice: Choice = Choice()) -> Scores:
    """Read a CSV, TSV or Parquet file of scores, or a folder of mteb results, as the validated long table.

    A table is separated by commas, semicolons or tabs, and may be compressed (`.csv.gz`).

    choice: which splits, subsets and tasks to keep; of a folder also which revisions of a model.

    Raises:
        DataError: the file is missing, of an unknown kind, malformed, or breaks a rule of `validate`; nothing is left
            of it by `choice`.
    """
    import polars as pl

    path = Path(path)
    if path.is_dir():
        return read_mteb(path, choice)
    if not path.exists():
        near = suggest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(f"{path}: no such file or folder{near}")
    kind = file_format(path)
    try:
        if kind == "parquet":
            frame, notes = completed(to_polars(read_table(path), str(path)), str(path))
            return selected(validate(frame, str(path), unit="row", first=1), choice, str(path), notes)
        if kind in DELIMITERS:
            _, header = next(read_lines(path), ("", ""))
            separator = max(DELIMITERS[kind], key=header.count)
            frame = pl.read_csv(path, separator=separator, infer_schema=False, encoding="utf8")
            rows = frame.height
            frame, notes = completed(frame, str(path))
            unit, start = (
                ("line", 2) if rows == frame.height else ("row", 1)
            )  # of a wide table a line has several scores
            return selected(validate(frame, str(path), unit, start), choice, str(path), notes)
    except UnreadableError as error:
        raise DataError(f"{path}: {error}") from error
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{path}: the file is empty; its first line must be {','.join(REQUIRED)}") from error
    except pl.exceptions.PolarsError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: not a readable {str(kind).upper()} file ({reason})") from error
    allowed = ".csv, .tsv, .parquet or a folder of mteb results"
    raise DataError(f"{path}: unknown file type {path.suffix!r}; allowed: {allowed}")


def completed(frame: pl.DataFrame, where: str) -> tuple[pl.DataFrame, tuple[Note, ...]]:
    """A table whose columns are designs as one row per score, and `DEFAULTS` for columns that it lacks;
    with a note on each.

    Raises DataError if a column is missing that has no default.
    """
    import polars as pl

    frame = frame.rename({name: name.strip().removeprefix("\ufeff") for name in frame.columns})
    notes = list[Note]()
    others = [name for name in frame.columns if name not in (*REQUIRED, *OPTIONAL)]
    if "task" in frame.columns and not {"design", "score"} & set(frame.columns) and len(others) > 1:
        kept = [name for name in frame.columns if name not in others]
        texts = frame.with_columns(pl.col(others).cast(pl.String))
        frame = texts.unpivot(others, index=kept, variable_name="design", value_name="score")
        notes.append(Note(f"{where}: one column for each design: {', '.join(others)}."))
    if {"design", "task", "score"} <= set(frame.columns):
        unknown = [name for name in frame.columns if name not in (*REQUIRED, *OPTIONAL)]
        # a column that is nearly called so is a slip, which `validate` reports
        lacking = [name for name in DEFAULTS if name not in frame.columns and not suggest(name, unknown)]
        frame = frame.with_columns(pl.lit(DEFAULTS[name]).alias(name) for name in lacking)
        meaning = {"seed": "every design was run once", "task_type": "all tasks are one group", "metric": "one metric"}
        if lacking:
            taken = "; ".join(meaning[name] for name in lacking)
            notes.append(Note(f"{where}: no column {', '.join(lacking)}: {taken}."))
    return frame, tuple(notes)


def selected(frame: pl.DataFrame, choice: Choice, where: str, notes: tuple[Note, ...] = ()) -> Scores:
    """The rows of a table with the splits, subsets and tasks of a choice; a task without subsets is kept whole.

    notes: on how the table was read.

    Raises:
        DataError: the table has no column to choose by; no row is left.
    """
    import polars as pl

    if choice.revisions != NEWEST:
        raise DataError(
            f"{where}: --revisions is for folders of mteb results; in a table the column seed names the runs"
        )
    wanted = benchmark_cells(choice.benchmark) if choice.benchmark else {}
    named = {"split": choice.splits, "subset": choice.subsets}
    for column in named:
        if named[column] and frame[column].null_count() == frame.height:
            raise DataError(f"{where}: --{column} needs a column {column!r}, which the table does not have")
    if not wanted and not any(named.values()):
        return Scores(frame, notes)
    alone = pl.col("subset").is_null() | (pl.col("subset") == "default")
    kept = frame
    if wanted:
        cells = [
            (task, split, subset)
            for task, (splits, subsets) in wanted.items()
            for split in splits
            for subset in subsets
        ]
        allowed = pl.DataFrame(cells, schema=["task", "split", "subset"], orient="row")
        whole = kept.filter(pl.col("task").is_in(list(wanted)) & pl.col("split").is_null())
        kept = pl.concat([kept.join(allowed, on=["task", "split", "subset"], how="semi"), whole])
    if choice.splits:
        kept = kept.filter(pl.col("split").is_null() | pl.col("split").is_in(choice.splits))
    if choice.subsets:
        kept = kept.filter(alone | pl.col("subset").is_in(choice.subsets))
    text = ", ".join(
        [*filter(None, [choice.benchmark]), *(f"{name} {value}" for name in named for value in named[name])]
    )
    if kept.is_empty():
        raise DataError(f"{where}: no score is left by {text}; tasks in it: {first_few(sorted(set(frame['task'])))}")
    lost = tuple(sorted(set(frame["task"]) - set(kept["task"])))
    note = f"Kept: {text}, {kept['task'].n_unique()} of {frame['task'].n_unique()} tasks."
    return Scores(kept, (*notes, Note(note, tuple(f"{task}: left out" for task in lost))))


def read_mteb(folder: str | Path, choice: Choice = Choice()) -> Scores:
    """Read every result below a folder; see the layouts above.

    A task is taken from a model's own results, or else from `external`. Of several revisions with the same task the
    newest counts, by `release_date` in `model_meta.json`, and a named one before an unnamed one; equal copies are one.
    Without a benchmark, a part of an aggregate task is left out if every model has the aggregate, and else the
    aggregate if every model has the part.

    Raises:
        DataError: no result file below the folder; an unknown benchmark; revisions with different scores of which none
            is known to be the newest; no score that can be used.
    """
    folder = Path(folder)
    if choice.revisions not in (NEWEST, RUNS):
        hint = suggest(choice.revisions, [NEWEST, RUNS])
        raise DataError(f"revisions={choice.revisions!r} is unknown; allowed: {NEWEST}, {RUNS}{hint}")
    root = folder.resolve()
    files = sorted(path for path in root.rglob("*.json") if path.name != META and _is_result(path))
    if not files:
        raise DataError(f"{folder} contains no mteb results; expected <model>/<revision>/<Task>.json")
    wanted = benchmark_cells(choice.benchmark) if choice.benchmark else None
    log, models = Log(), dict[str, dict[str, list[Result]]]()
    for path in files:
        model, revision, experiment = _place(path, root)
        if experiment:
            log.once(EXPERIMENTS, f"{model} ({experiment})")
        elif result := read_file(path, root, model, revision, choice, wanted, log):
            models.setdefault(model, {}).setdefault(revision, []).append(result)
    runs = {model: _runs_of(root, model, revisions, choice, log) for model, revisions in models.items()}
    if not wanted:
        _drop_aggregates(runs, log)
    rows = [row for model, of_model in runs.items() for row in _rows(model, of_model)]
    notes = _notes(choice, wanted, runs, log)
    if not rows:
        reasons = "".join(f"\n  - {note}" for note in notes)
        raise DataError(f"{folder}: no score in its {len(files)} result files can be used{reasons}")
    return Scores(table(rows, str(folder)), tuple(notes))


def _is_result(path: Path) -> bool:
    """Whether a JSON file is a result of mteb, of the current or of its first format."""
    try:
        text = path.read_bytes()
    except OSError:
        return False
    return any(key in text for key in (b'"main_score"', b'"mteb_dataset_name"', b'"task_name"'))


def _place(path: Path, root: Path) -> tuple[str, str, str]:
    """(model, revision, arguments of an experiment or "") of a result file, by the folders it lies in."""
    folder, experiment = path.parent, ""
    if folder.parent.name == EXPERIMENTS and folder.parent != root:
        folder, experiment = folder.parent.parent, folder.name
    above = folder.parent
    is_revision = folder.name == EXTERNAL or REVISION.fullmatch(folder.name) or (folder / META).exists()
    top = folder == root or above.name == "results" or (above == root and "__" not in above.name)
    if not is_revision and ("__" in folder.name or top):
        model, revision = folder.name, UNNAMED  # the layout before revisions
    else:
        model, revision = above.name, folder.name
    return model.replace("__", "/"), revision, experiment


def _runs_of(
    root: Path, model: str, revisions: Mapping[str, list[Result]], choice: Choice, log: Log
) -> list[dict[str, Result]]:
    """The runs of one model, each task -> result."""
    single = {name: _one_spelling(results, log) for name, results in revisions.items()}
    external = single.pop(EXTERNAL, {})
    if choice.revisions == RUNS:
        runs: list[dict[str, Result]] = []
        for _, results in sorted(single.items()):
            # Revisions without a common task are parts of one run: this one belongs to the first that lacks its tasks.
            free = next((run for run in runs if not run.keys() & results.keys()), None)
            if free is None:
                runs.append(free := {})
            free |= results
    else:
        runs = [_newest(root, model, single, log)] if single else []
    for task, result in external.items():
        if not any(task in run for run in runs):
            log.add(EXTERNAL, f"{model}: {task}")
            if not runs:
                runs.append({})
            runs[0][task] = result
    return runs


def _one_spelling(results: Iterable[Result], log: Log) -> dict[str, Result]:
    """Task -> result; of two files of one task the one under mteb's name for it, or else of the newer mteb, counts."""
    found: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: (result.canonical, _version(result.version), str(result.path))):
        if other := found.get(result.task):
            same = "equal" if other.cells == result.cells else "different scores"
            log.add("spelled", f"{result.task}: {result.path}, not {other.path} ({same})")
        found[result.task] = result
    return found


def _newest(root: Path, model: str, revisions: Mapping[str, Mapping[str, Result]], log: Log) -> dict[str, Result]:
    """Each task from the newest revision that has it. Raises DataError if that is unknown and the scores differ."""
    dates = {name: _released(root, results.values()) for name, results in revisions.items()}
    chosen: dict[str, Result] = {}
    superseded, copied, undecided = set[str](), set[str](), list[str]()
    for task in dict.fromkeys(task for results in revisions.values() for task in results):
        having = [name for name in revisions if task in revisions[name]]
        cells = [revisions[name][task].cells for name in having]
        named = [name for name in having if name != UNNAMED] or having
        named.sort(key=lambda name: (dates[name], name))
        newest = named[-1]
        chosen[task] = revisions[newest][task]
        others = [name for name in having if name != newest]
        if all(content == cells[0] for content in cells):
            copied.update(others)
            continue
        if len(named) > 1 and ("" in {dates[name] for name in named} or dates[named[-1]] == dates[named[-2]]):
            undecided.append(task)
        superseded.update(others)
    if undecided:
        listed = ", ".join(f"{name} ({dates[name] or 'no release_date'})" for name in sorted(revisions))
        raise DataError(
            f"{model}: its revisions have different scores of {first_few(undecided)}, and {META} does not say which "
            f"is the newest: {listed}. Remove the others, give release_date, or take them as runs of one design with "
            f"--revisions {RUNS}"
        )
    used = {result.revision for result in chosen.values()}
    if superseded:
        log.add("newest", f"{model}: {', '.join(sorted(used))}, not {', '.join(sorted(superseded - used)) or 'all'}")
    if copied - superseded:
        log.add("copies", f"{model}: {', '.join(sorted((copied - superseded) | used))}")
    return chosen


def _released(root: Path, results: Iterable[Result]) -> str:
    """The release date of a revision, as ISO text; empty if unknown."""
    folder = next((root / result.path).parent for result in results)
    try:
        date = read_any_json(folder / META).get("release_date")
    except (OSError, ValueError, AttributeError):
        return ""
    return date if isinstance(date, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", date) else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(whole_number(part) or 0 for part in re.findall(r"\d+", text)[:3])


def _drop_aggregates(runs: Mapping[str, list[dict[str, Result]]], log: Log) -> None:
    """Remove from every run the parts of an aggregate task, or the aggregate, so that none is counted twice."""
    every = [run for of_model in runs.values() for run in of_model]
    for task in sorted({task for run in every for task in run}):
        known = known_task(task)
        parts = {part.metadata.name for part in getattr(known, "tasks", None) or ()}
        present = {part for run in every for part in run if part in parts}
        if not present:
            continue
        shared = any(all(part in run for run in every) for part in present)
        dropped = {task} if shared and not all(task in run for run in every) else present
        for run in every:
            for name in dropped & run.keys():
                del run[name]
        log.add(
            "aggregates", f"{first_few(sorted(dropped))}: counted in {task if task not in dropped else 'its parts'}"
        )


def _rows(model: str, runs: Sequence[Mapping[str, Result]]) -> Iterator[dict[str, Any]]:
    for seed, run in enumerate(runs):
        for result in run.values():
            for (split, subset), score in result.cells.items():
                yield {
                    "design": model, "seed": seed, "task": result.task, "task_type": result.kind, "split": split,
                    "subset": subset, "metric": result.metric, "score": float(score), "revision": result.revision,
                    "mteb_version": result.version, "dataset_revision": result.dataset_revision,
                    "evaluation_time": result.seconds,
                }  # fmt: skip


def _notes(
    choice: Choice, wanted: Mapping[str, Any] | None, runs: Mapping[str, list[dict[str, Result]]], log: Log
) -> list[Note]:
    """One note for each kind of decision."""
    used = [result for of_model in runs.values() for run in of_model for result in run.values()]
    notes = list(_kept(choice, wanted, used, log))
    notes += log.note(
        EXTERNAL, f"Results copied from model cards (`{EXTERNAL}`) where a model has no own: {{n}} tasks."
    )
    notes += log.note(EXPERIMENTS, "Left out, results under other arguments (`experiments`): {names}.")
    notes += log.note("newest", "Of several revisions of a model the newest counts, task by task: {names}.")
    notes += log.note("copies", "Revisions with the same scores are one checkpoint and one run: {names}.")
    notes += log.note("spelled", "Two files of one task under two spellings, one of them is read: {names}.")
    notes += log.note("aggregates", "Tasks that are part of an aggregate task are not counted twice: {names}.")
    notes += log.note("substitute", "Main scores missing in files of an old mteb, another metric taken: {names}.")
    notes += log.note("no score", "Left out, files without a usable main score: {names}.")
    notes += log.note("damaged", "Left out, files that are not readable results: {names}.")
    notes += log.note("unknown", "Left out, tasks that mteb does not know and whose type their metrics do not show "
                      "(a table of scores with a column task_type can hold them): {names}.")  # fmt: skip
    return notes + list(_data_revisions(runs))


def _kept(choice: Choice, wanted: Mapping[str, Any] | None, used: Sequence[Result], log: Log) -> Iterator[Note]:
    """What was kept of the splits and subsets, and what is a mean over several."""
    tasks = {result.task for result in used}
    if wanted is not None:
        absent = sorted(set(wanted) - tasks)
        none = f"; no result of {first_few(absent)}" if absent else ""
        text = f"Kept: the tasks of {choice.benchmark} in its splits and subsets, {len(tasks)} of {len(wanted)}{none}."
        yield Note(text, tuple(absent))
    given = [f"split {name}" for name in choice.splits] + [f"subset {name}" for name in choice.subsets]
    if given:
        yield Note(f"Kept: {', '.join(given)} ({len(tasks)} tasks; those without languages are kept whole).")
    yield from log.note("test alone", "Kept of {n} tasks with several evaluation splits: test.")
    yield from log.note("other splits", "Not scored on mteb's evaluation split of the task: {names}.")
    sizes: dict[str, set[str]] = {}
    for result in used:
        sizes.setdefault(result.task, set()).update(subset for _, subset in result.cells)
    several = {task: subsets for task, subsets in sorted(sizes.items()) if len(subsets) > 1}
    if several:
        named = first_few([f"{task} ({len(subsets)})" for task, subsets in several.items()])
        cases = tuple(f"{task}: {', '.join(sorted(subsets))}" for task, subsets in several.items())
        yield Note(f"Means over several subsets (--subset or --benchmark chooses among them): {named}.", cases)


def _data_revisions(runs: Mapping[str, list[dict[str, Result]]]) -> Iterator[Note]:
    """How many of the tasks that models share were scored on different revisions of their data."""
    revisions: dict[str, dict[str, set[str]]] = {}
    for model, of_model in runs.items():
        for run in of_model:
            for result in run.values():
                revisions.setdefault(result.task, {}).setdefault(result.dataset_revision, set()).add(model)
    shared = {task: by for task, by in sorted(revisions.items()) if len(set().union(*by.values())) > 1}
    differing = {task: by for task, by in shared.items() if len([name for name in by if name]) > 1}
    if differing:
        cases = tuple(
            f"{task}: " + "; ".join(f"{name[:12] or '?'} ({', '.join(sorted(models))})" for name, models in by.items())
            for task, by in differing.items()
        )
        yield Note(
            f"Scored on different revisions of their data: {len(differing)} of {len(shared)} shared tasks.", cases
        )
