"""The long table of scores: one row for each design × seed × task × split × subset, and one for each stored item score.

| column | meaning |
|---|---|
| `design`, `seed` | what was trained (a design, a model, a system) and which run of it |
| `task`, `task_type`, `metric`, `score` | what was measured; scores lie in 0–1 (correlations in −1–1) |
| `step` | optimiser step of the evaluated checkpoint; null if it does not apply |
| `source` | the data set a task was made from, on any of its rows; null: the task is its own source |
| `split`, `subset` | as in mteb; null if a file does not say |
| `item_id` | query, example or set of a per-item score; null on the main score |

Any further column is provenance and kept as it is. `verdicts.readers` reads this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poolwise.errors import DataError, StatisticsError, printable, short, suggest
from poolwise.study.catalogue import origin

if TYPE_CHECKING:
    import polars as pl


REQUIRED = ("design", "seed", "task", "task_type", "metric", "score")
OPTIONAL = ("step", "source", "split", "subset", "item_id")
KEY = ("design", "seed", "step", "task", "split", "subset", "metric", "item_id")
SIGNED_METRICS = r"(?i)spearman|pearson|kendall|corr|mcc|mrr|^cosine$"  # p-MRR and correlations go below zero
NOT_IN_RUN = "query not in the run"  # `note` of an item that scores 0 because the run ranked nothing for it
FORMULA = r"^[=+\-@\t\r]"
HIDDEN = r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]"
"""Control characters, escape among them, and the marks of bidirectional text."""
LISTED = 5  # number of names or rows that a message lists
OUTPUT = "cosine"  # metric of rows that hold a model's output, which is scored against the column `gold`
MEASURED = {"STS": "cosine_spearman", "PairClassification": "cosine_ap"}
"""Task type -> the main metric of outputs that are scored against gold values."""
COPIES = 3  # scores that two runs must share, all of them equal, to be taken for one run


class Note(str):
    """A sentence on the scores of a comparison (a decision taken, a limit), and the `cases` that it concerns."""

    cases: tuple[str, ...]

    def __new__(cls, text: str, cases: Sequence[str] = ()) -> Note:
        note = super().__new__(cls, text)
        note.cases = tuple(cases)
        return note


@dataclass(frozen=True)
class Scores:
    """A validated long table, and a note on each decision that was taken while reading it."""

    frame: pl.DataFrame
    notes: tuple[Note, ...] = ()


def table(rows: Iterable[Mapping[str, Any]], where: str = "scores") -> pl.DataFrame:
    """The validated long table of rows given as dictionaries, such as those of `poolwise.evaluate`.

    Raises:
        DataError: there are no rows, or one of them breaks a rule of `validate` or holds what no table can hold.
    """
    import polars as pl

    rows = list(rows)
    if not rows:
        raise DataError(f"{where}: no scores at all")
    try:
        frame = pl.from_dicts(rows, infer_schema_length=None)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, TypeError, OverflowError) as error:
        reason = printable(next(iter(str(error).splitlines()), type(error).__name__))
        raise DataError(f"{where}: the rows are no table ({short(reason, 200)}); give texts, numbers or None") from None
    for name in frame.columns:
        _refuse_nested(name, frame[name].dtype, where)
    return validate(frame, where)


NESTED = ("List", "Array", "Struct", "Object", "Binary", "Unknown")


def _refuse_nested(name: str, dtype: Any, where: str) -> None:
    if str(dtype).startswith(NESTED):
        raise DataError(f"{where}: column {name!r} holds values of type {dtype}; drop it, or write texts or numbers")


def to_polars(table: Any, where: str) -> pl.DataFrame:
    """A pyarrow table as polars. Raises DataError for a column that is no list of texts, numbers or dates."""
    import polars as pl

    frames = []
    for number, name in enumerate(table.column_names):
        try:
            frame = pl.DataFrame(pl.from_arrow(table.select([number])))
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, TypeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{where}: column {name!r} cannot be read ({reason}); drop it") from None
        _refuse_nested(name, frame.dtypes[0], where)
        frames.append(frame)
    return pl.concat(frames, how="horizontal")


def csv_safe(frame: pl.DataFrame) -> pl.DataFrame:
    """The table with an apostrophe before each text that a spreadsheet would take for a formula, for CSV files."""
    import polars as pl

    text = pl.col(pl.String)
    return frame.with_columns(pl.when(text.str.contains(FORMULA)).then("'" + text).otherwise(text).name.keep())


def validate(frame: pl.DataFrame, where: str, unit: str = "row", first: int = 1) -> pl.DataFrame:
    """Check a table of scores, convert its columns and add the optional ones as nulls.

    Args:
        where: the file or the origin of the rows, as messages name it.
        unit, first: how messages number the rows ("line 2" is the first row of data in a CSV).

    Raises:
        DataError: missing columns, empty cells, seeds or steps that are not whole numbers, scores that are not numbers
            or out of range, tasks with two types or two sources, duplicate rows. The message lists every kind of
            mistake with a few examples.
    """
    import polars as pl

    frame = frame.rename({name: name.strip().removeprefix("\ufeff") for name in frame.columns})
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        hints = "".join(f"\n  - {name!r} is missing{suggest(name, frame.columns)}" for name in missing)
        extra = "\n  - one column only: is the file comma-separated?" if len(frame.columns) == 1 else ""
        raise DataError(f"{where}: columns needed: {', '.join(REQUIRED)}{hints}{extra}")
    text = [name for name in (*REQUIRED, *OPTIONAL) if name not in ("seed", "score", "step")]
    absent = [pl.lit(None).alias(name) for name in OPTIONAL if name not in frame.columns]
    frame = frame.with_columns(absent).with_columns(pl.col(text).cast(pl.String).str.strip_chars().replace("", None))
    if any(frame[name].str.contains("\n", literal=True).any() for name in text):
        unit, first = "row", 1  # quoted line breaks: line numbers of the file no longer match the rows
    frame = frame.with_row_index("_row", offset=first)
    frame = frame.filter(~pl.all_horizontal(pl.exclude("_row").is_null()))
    if frame.is_empty():
        raise DataError(f"{where}: a header, but no scores")
    typed = frame.with_columns(
        pl.col("seed", "step").cast(pl.Int64, strict=False), pl.col("score").cast(pl.Float64, strict=False)
    )
    problems = _Problems(unit, frame)
    for name in REQUIRED:
        problems.add(f"{name} is empty", frame[name].is_null() if name != "score" else _empty(frame["score"]), None)
    for name in text:
        if name != "item_id":  # ids come from a data set, and are escaped where they are shown
            hidden = frame[name].str.contains(HIDDEN).fill_null(False)
            problems.add(f"{name} contains a hidden character, such as an escape sequence", hidden, name)
    for name in ("seed", "step"):
        wrong = typed[name].is_null() & frame[name].is_not_null()
        if frame[name].dtype.is_float():
            wrong = wrong | (typed[name].cast(pl.Float64) != frame[name])
        problems.add(f"{name} must be a whole number", wrong.fill_null(False), name)
    number = typed["score"]
    problems.add("score is not a number", ~_empty(frame["score"]) & ~number.is_finite().fill_null(False), "score")
    low = pl.when(pl.col("metric").str.contains(SIGNED_METRICS)).then(-1.0).otherwise(0.0)
    outside = typed.select(
        (pl.col("score").is_finite() & ((pl.col("score") > 1 + 1e-9) | (pl.col("score") < low - 1e-9))).fill_null(False)
    ).to_series()
    scale = ""
    if outside.any() and 1 < (number.filter(number.is_finite().fill_null(False)).median() or 0) <= 100:  # type: ignore[operator]
        scale = "; they look like percentages: divide every score by 100"
    problems.add("score must lie between 0 and 1 (a correlation: −1 and 1)" + scale, outside, "score")
    for name in ("task_type", "source"):  # both belong to the task, whatever a single row of it says
        values = typed.group_by("task").agg(pl.col(name).drop_nulls().unique().sort())
        for task, several in values.filter(pl.col(name).list.len() > 1).sort("task").iter_rows():
            listed = ", ".join(map(repr, several))
            problems.lines.append(f"task {task!r} has {len(several)} values of {name}: {listed}; keep one")
    key = [*KEY, "base"] if "base" in typed.columns else KEY
    repeated = typed.select(pl.struct(key).is_duplicated()).to_series()
    problems.add("the same design, seed, task, split, subset and metric are listed more than once", repeated, "task")
    problems.stop(where)
    typed = typed.with_columns(pl.col("source").fill_null(pl.col("source").drop_nulls().first().over("task")))
    order = [*REQUIRED[:2], "step", "task", "task_type", "source", "split", "subset", "metric", "score", "item_id"]
    return typed.select([*order, *[name for name in typed.columns if name not in (*order, "_row")]])


def first_few(names: Sequence[str]) -> str:
    """The first `LISTED` names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return printable(", ".join(names[:LISTED])) + more


def _empty(column: pl.Series) -> pl.Series:
    """Which cells are empty; a CSV may spell that as a word."""
    import polars as pl

    if column.dtype == pl.String:
        word = column.fill_null("").str.strip_chars().str.to_lowercase()
        return word.is_in(["", "nan", "na", "null"])
    return column.is_null() | (column.is_nan() if column.dtype.is_float() else column.is_null())


class _Problems:
    """Collects mistakes, one line for each kind with its first examples, so that all are reported at once."""

    def __init__(self, unit: str, frame: pl.DataFrame):
        self.unit, self.frame, self.lines = unit, frame, list[str]()

    def add(self, message: str, wrong: pl.Series, column: str | None) -> None:
        if not wrong.any():
            return
        rows = self.frame.filter(wrong)
        places = [
            f"{self.unit} {row['_row']}" + (f" ({row[column]!r})" if column else "")
            for row in rows.head(LISTED).iter_rows(named=True)
        ]
        more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
        self.lines.append(f"{message}: {', '.join(places)}{more}")

    def stop(self, where: str) -> None:
        if self.lines:
            raise DataError("\n".join([f"{where}: the scores cannot be used", *(f"  - {line}" for line in self.lines)]))


def main_scores(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of the long table that are main scores of final checkpoints: no items, only the last step of each run."""
    import polars as pl

    last = pl.col("step").max().over("design", "seed")
    return frame.filter(pl.col("item_id").is_null()).filter(pl.col("step").eq_missing(last))


def items_of(frame: pl.DataFrame, task: str) -> pl.DataFrame:
    """The item rows of one task at the last step of each run."""
    import polars as pl

    items = frame.filter(pl.col("item_id").is_not_null())
    known = items["task"].unique(maintain_order=True).to_list()
    if not known:
        raise StatisticsError("the scores contain no items (rows with an item_id); only main scores can be compared")
    if task not in known:
        why = "has no per-item scores" if task in frame["task"] else "is not in the scores"
        names = ", ".join(known[:20]) + (" …" if len(known) > 20 else "")
        raise StatisticsError(f"task {task!r} {why}; tasks with items: {names}{suggest(task, known)}")
    last = pl.col("step").max().over("design", "seed")
    return items.filter(pl.col("step").eq_missing(last) & (pl.col("task") == task))


def last_steps(rows: pl.DataFrame) -> dict[str, int | None]:
    """The step of each design's checkpoints. Raises StatisticsError if runs of a design stopped at different steps."""
    steps: dict[str, int | None] = {}
    for design, seed, step in rows.select("design", "seed", "step").unique().sort("design", "seed").iter_rows():
        if steps.setdefault(design, step) != step:
            raise StatisticsError(
                f"runs of {design!r} stopped at different steps ({steps[design]}, and {step} with seed {seed}); finish "
                "them with `poolwise run`, or leave the short ones out"
            )
    return steps


def item_metric(frame: pl.DataFrame, rows: pl.DataFrame, task: str, wanted: str | None) -> str:
    """The metric of the rows to compare: the one asked for, the task's main one, or the only one."""
    import polars as pl

    kind = rows["task_type"][0]
    stored = {MEASURED.get(kind, OUTPUT) if name == OUTPUT else name: name for name in sorted(rows["metric"].unique())}
    if wanted is None:
        main = frame.filter((pl.col("task") == task) & pl.col("item_id").is_null())["metric"].unique().to_list()
        wanted = next((name for name in main if name in stored), None)
        wanted = next(iter(stored)) if wanted is None and len(stored) == 1 else wanted
        if wanted is None:
            raise StatisticsError(f"{task}: items have several metrics ({', '.join(stored)}); choose one with --metric")
    if wanted not in {*stored, *stored.values()}:
        raise StatisticsError(
            f"metric {wanted!r} does not exist for the items of {task!r}; allowed: {', '.join(stored)}"
            f"{suggest(wanted, stored)}"
        )
    return stored.get(wanted, wanted)


def early_only(frame: pl.DataFrame) -> list[Note]:
    """A note on the tasks that have scores at earlier steps alone, so that they are no part of a comparison."""
    import polars as pl

    scored = frame.filter(pl.col("item_id").is_null())
    tasks = sorted(set(scored["task"]) - set(main_scores(scored)["task"]))
    if not tasks:
        return []
    steps = scored.filter(pl.col("task").is_in(tasks)).group_by("task").agg(pl.col("step").max()).sort("task")
    cases = tuple(f"{task}: step {step}" for task, step in steps.iter_rows())
    last = max(step for step in scored["step"].to_list() if step is not None)
    return [Note(f"Left out, not scored at the last step ({last}): {first_few(tasks)}.", cases)]


def without_copies(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[Note]]:
    """The table without runs that repeat another run of their design score by score, and a note on them.

    Copies of one run (a file written three times, one checkpoint under two revisions) would measure a run effect of 0.
    Two runs are copies if they have the same main scores in the same `COPIES` cells or more, unless `model_identity`
    shows that they are different models. References are left alone.
    """
    import polars as pl

    cells = ["task", "split", "subset", "metric", *(["base"] if "base" in frame.columns else [])]
    scored = main_scores(frame)
    if "role" in frame.columns:
        scored = scored.filter(pl.col("role").is_null() | ~pl.col("role").is_in(["reference", "untuned"]))
    kept: dict[tuple[str, tuple[Any, ...]], int] = {}
    copies = list[tuple[str, int, int]]()
    model = ["model_identity"] if "model_identity" in scored.columns else []
    runs = scored.select("design", "seed", *cells, *model, "score").sort("design", "seed", *cells)
    for (design, seed), run in runs.partition_by("design", "seed", as_dict=True, maintain_order=True).items():
        content = tuple(run.select(*cells, *model, "score").iter_rows())
        first = kept.setdefault((design, content), seed)
        if first != seed and len(content) >= COPIES:
            copies.append((design, seed, first))
    if not copies:
        return frame, []
    dropped = pl.DataFrame(
        [(design, seed) for design, seed, _ in copies], schema={"design": pl.String, "seed": pl.Int64}, orient="row"
    )
    named = ", ".join(dict.fromkeys(design for design, *_ in copies))
    text = f"Runs with exactly the same scores are copies and count as one run: {len(copies)} left out ({named})."
    cases = tuple(f"{design}: seed {seed} repeats seed {first}" for design, seed, first in copies)
    return frame.join(dropped, on=["design", "seed"], how="anti"), [Note(text, cases)]


def with_origins(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[Note]]:
    """The table with the missing sources of official tasks filled in, and a note on the tasks that now share one."""
    import polars as pl

    bare = frame.filter(pl.col("source").is_null())["task"].unique().to_list()
    known = {task: name for task in sorted(bare) if (name := origin(task))}
    if not known:
        return frame, []
    filled = pl.col("source").fill_null(pl.col("task").replace_strict(known, default=None, return_dtype=pl.String))
    shared = [
        f"{', '.join(tasks)} ({name})"
        for name in dict.fromkeys(known.values())
        if len(tasks := [task for task in known if known[task] == name]) > 1
    ]
    text = f"Averaged as one source each, by mteb's task names (a column `source` overrides this): {'; '.join(shared)}."
    return frame.with_columns(filled), [Note(text)] if shared else []


def roles_of(frame: pl.DataFrame) -> tuple[tuple[str, str], ...]:
    """(design, role) of every control; empty if the table has no column `role`."""
    import polars as pl

    if "role" not in frame.columns:
        return ()
    known = frame.select("design", "role").unique().drop_nulls().filter(pl.col("role") != "design")
    return tuple(known.sort("design", "role").iter_rows())


def controls_of(frame: pl.DataFrame) -> list[str]:
    """The designs outside the comparison, by the column `role`; empty if the table has none."""
    return list(dict.fromkeys(design for design, _ in roles_of(frame)))
