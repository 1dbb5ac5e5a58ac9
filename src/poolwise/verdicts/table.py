"""The long table of scores: one row for each design × seed × task × split × subset, and one for each stored item score.

| column | meaning |
|---|---|
| `design`, `seed` | what was trained (a design, a model, a system) and which run of it |
| `task`, `task_type`, `metric`, `score` | what was measured; scores lie in 0–1 (correlations in −1–1) |
| `step` | optimiser step of the evaluated checkpoint; null if it does not apply |
| `source` | the data set a task was made from; null: the task is its own source |
| `split`, `subset` | as in mteb; null if a file does not say |
| `item_id` | query, example or set of a per-item score; null on the main score |

Any further column is provenance and kept as it is. `verdicts.readers` reads this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from poolwise.errors import DataError, printable, suggest
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


def table(rows: Iterable[Mapping[str, Any]], where: str = "scores") -> pl.DataFrame:
    """The validated long table of rows given as dictionaries, such as those of `poolwise.evaluate`.

    Raises:
        DataError: there are no rows, or one of them breaks a rule of `validate`.
    """
    import polars as pl

    rows = list(rows)
    if not rows:
        raise DataError(f"{where}: no scores at all")
    return validate(pl.from_dicts(rows, infer_schema_length=None), where)


NESTED = ("List", "Array", "Struct", "Object", "Binary", "Unknown")


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
        if (kind := str(frame.dtypes[0])).startswith(NESTED):
            raise DataError(f"{where}: column {name!r} holds values of type {kind}; drop it, or write texts or numbers")
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
    for name in ("task_type", "source"):
        values = typed.group_by("task").agg(pl.col(name).drop_nulls().unique().sort())
        for task, several in values.filter(pl.col(name).list.len() > 1).sort("task").iter_rows():
            listed = ", ".join(map(repr, several))
            problems.lines.append(f"task {task!r} has {len(several)} values of {name}: {listed}; keep one")
    key = [*KEY, "base"] if "base" in typed.columns else KEY
    repeated = typed.select(pl.struct(key).is_duplicated()).to_series()
    problems.add("the same design, seed, task, split, subset and metric are listed more than once", repeated, "task")
    problems.stop(where)
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


def with_origins(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
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
    note = f"Averaged as one source each, by mteb's task names (a column `source` overrides this): {'; '.join(shared)}."
    return frame.with_columns(filled), [note] if shared else []


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
