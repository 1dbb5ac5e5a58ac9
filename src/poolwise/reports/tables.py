"""A comparison as tables of ready-made strings, the same for terminal, Markdown, LaTeX and HTML. Scores are ×100 here.

Nothing is computed but what a table needs to be read: seed means, their sd, and units.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poolwise.reports.words import (
    count,
    detectable_words,
    group_words,
    inner_percent,
    interval,
    number,
    outcome,
    points,
    probability,
    sample_words,
)
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Row
from poolwise.verdicts.controls import RUNGS
from poolwise.verdicts.mechanisms import by_mechanism

if TYPE_CHECKING:
    import polars as pl


MARKS = {"better": "▲", "worse": "▼", "equivalent": "≈", "inconclusive": "", "untested": ""}
COST_COLUMNS = {  # key of a cost row -> heading; others are left out
    "attention": "Attention",
    "pooling": "Pooling",
    "trainable_parameters": "Trained",
    "head_parameters": "Head",
    "encode_flops": "FLOPs a text",
    "relative_cost": "× baseline",
    "encode_seconds": "Encode, s",
    "train_seconds": "Train, s",
}
MANY_GROUPS = 6  # of more groups than this, means stand a row a group and pictures are folded
ENCODE_TOKENS = 128  # length of the text whose encoding is priced
ROLES = {
    "aa": "A/A arm: the baseline again, other seeds; must not differ",
    "broken": "broken on purpose; must lose",
    "ladder": "diluted baseline; must lose a little",
    "untuned": "not trained",
    "reference": "reference",
}


@dataclass(frozen=True)
class Table:
    """Rows of strings under `columns`, in sections with a heading or without; the first `text` columns are words."""

    title: str
    columns: tuple[str, ...]
    sections: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]
    note: str = ""
    text: int = 1

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """All rows, whatever their section."""
        return [row for _, rows in self.sections for row in rows]


def means(comparison: Comparison) -> Table:
    """Mean score of each design by group, with the sd of its runs."""
    rows = []
    for design in comparison.designs:
        cells = []
        for group in comparison.groups:
            arm = comparison.arm(group, design)
            runs = [float(value) for value in arm.run_means]
            starred = design != comparison.baseline and not comparison.exploratory
            mark = "" if not starred else MARKS[outcome(comparison, comparison.row(group, design))]
            spread = f" ±{points(statistics.stdev(runs))}" if len(runs) > 1 else ""
            cells.append(f"{mark} {points(arm.mean)}{spread}".strip())
        rows.append(cells)
    scope = "" if comparison.scope == "designs" else " (checkpoints only)"
    note = "Mean over tasks, ×100; ± is the sd of the runs."
    if not comparison.exploratory and not comparison.interim:
        note += f" ▲ above, ▼ below {comparison.baseline} after Holm{scope}"
        note += f", ≈ equivalent within ±{points(comparison.margin, 1)}." if not scope else "."
    if comparison.banner:
        note = note.replace("; ± is the sd of the runs", "")
    heads = [
        f"{group} ({len(comparison.arm(group, comparison.baseline).whole().tasks)})" for group in comparison.groups
    ]
    if len(heads) > max(MANY_GROUPS, len(rows)):  # a row a group: a page is wide enough for designs
        body = tuple((head, *cells) for head, *cells in zip(heads, *rows, strict=True))
        return Table("Mean scores", ("Tasks", *comparison.designs), (("", body),), note)
    body = tuple((design, *cells) for design, cells in zip(comparison.designs, rows, strict=True))
    return Table("Mean scores", ("Design", *heads), (("", body),), note)


def verdicts(comparison: Comparison) -> Table | None:
    """Contrasts of designs: random runs × random tasks, Holm over the family; None where each design has one run."""
    sections = []
    for group in comparison.groups:
        rows = [
            (
                row.design, points(v.difference, 2, True), interval(v.ci_low, v.ci_high), probability(v.p_value),
                probability(v.p_holm), points(v.run_sd), detectable_words(v.detectable), v.verdict,
            )
            for row in comparison.rows
            if row.group == group and (v := row.verdict)
        ]  # fmt: skip
        if rows:
            first = next(row.verdict for row in comparison.rows if row.group == group and row.verdict)
            sample = sample_words(first.tasks, first.sources)
            sections.append((f"{group} · {sample}, {count(first.seeds, 'seed')}", tuple(rows)))
    if not sections:
        return None
    noted: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.verdict and row.verdict.note:
            noted.setdefault(row.verdict.note, []).append(f"{row.design} ({row.group})")
    notes = "".join(f" Own run variance, as {why}: {', '.join(who)}." for why, who in noted.items())
    note = (
        f"Points against {comparison.baseline}, for runs and tasks like these; Holm over {comparison.family} "
        "contrasts. Run effect: sd of one run. Detectable: true difference found with 80 % power at Holm's first step. "
        f"Equivalent: {inner_percent(comparison)} % interval inside ±{points(comparison.margin, 1)}.{notes}"
    )
    columns = (
        "Design", "Difference", f"{comparison.percent} % interval", "p", "p Holm", "Run effect", "Detectable",
        "Verdict",
    )  # fmt: skip
    return Table("Differences between designs", columns, tuple(sections), note)


def checkpoints(comparison: Comparison) -> Table | None:
    """Contrasts of checkpoints: exact Wilcoxon over tasks on seed means, the field's usual test; only differences and
    wins/ties/losses while runs are missing."""
    if comparison.interim:
        return _so_far(comparison)
    sections = []
    for group in comparison.groups:
        if comparison.of_items(group):
            continue
        rows = [row for row in comparison.rows if row.group == group]
        title = f"{group} · {count(rows[0].n, 'task')}, smallest reachable p {probability(rows[0].min_reachable_p)}"
        sections.append((title, tuple(_checkpoint_row(row) for row in rows)))
    if not sections:
        return None
    note = (
        f"Points against {comparison.baseline}; seeds averaged, tasks as the sample: this speaks about these "
        "checkpoints. Hodges–Lehmann difference with exact interval, exact Wilcoxon p, Holm over "
        f"{len(comparison.rows)} contrasts, matched-pairs rank-biserial effect size, wins/ties/losses."
    )
    columns = ["Design", "Difference", f"{comparison.percent} % interval", "p", "p Holm", "Effect size", "W/T/L"]
    if any(row.tipping_run_sd is not None for row in comparison.rows):
        columns.append("Tipping point")
        note += " Tipping point: the largest run effect at which the mean difference would still stand."
    sections = [(head, tuple(row[: len(columns)] for row in rows)) for head, rows in sections]
    return Table("Differences between checkpoints", tuple(columns), tuple(sections), note)


def _so_far(comparison: Comparison) -> Table:
    sections = tuple(
        (
            f"{group} · {count(len(comparison.arm(group, comparison.baseline).tasks), 'task')}",
            tuple(
                (row.design, points(row.difference, 2, True), f"{row.wins}/{row.ties}/{row.losses}")
                for row in comparison.rows
                if row.group == group
            ),
        )
        for group in comparison.groups
    )
    note = f"Points against {comparison.baseline} (Hodges–Lehmann over tasks), seeds averaged; nothing is tested yet."
    return Table("Differences so far", ("Design", "Difference", "W/T/L"), sections, note)


def _checkpoint_row(row: Row) -> tuple[str, ...]:
    return (
        row.design, points(row.difference, 2, True), interval(row.ci_low, row.ci_high), probability(row.p_value),
        probability(row.p_holm), "–" if row.effect_size is None else number(row.effect_size, 2, True),
        f"{row.wins}/{row.ties}/{row.losses}", "–" if row.tipping_run_sd is None else points(row.tipping_run_sd),
    )  # fmt: skip


def task_scores(comparison: Comparison) -> Table:
    """Score of each design on each task, seeds averaged."""
    sections = []
    for group in comparison.groups:
        arms = [comparison.arm(group, design).whole() for design in comparison.designs]
        rows = [(task, *(points(float(arm.task_means[i])) for arm in arms)) for i, task in enumerate(arms[0].tasks)]
        sections.append((group, tuple(rows)))
    return Table("Scores on each task", ("Task", *comparison.designs), tuple(sections), "×100, seeds averaged.")


def run_scores(comparison: Comparison) -> Table:
    """Mean score of each run by group."""
    seeds = sorted({seed for arm in comparison.arms if arm.design in comparison.designs for seed in arm.seeds})
    sections = []
    for group in comparison.groups:
        rows = []
        for design in comparison.designs:
            arm = comparison.arm(group, design)
            found = dict(zip(arm.seeds, arm.run_means.tolist(), strict=True))
            rows.append((design, *(points(found[seed]) if seed in found else "–" for seed in seeds)))
        sections.append((group, tuple(rows)))
    return Table(
        "Scores of each run", ("Design", *(f"Seed {seed}" for seed in seeds)), tuple(sections), "Mean over tasks, ×100."
    )


def over_steps(frame: pl.DataFrame, comparison: Comparison) -> Table | None:
    """Mean score of each design after a part of the training; None where only the end was scored."""
    import polars as pl

    scored = frame.filter(pl.col("item_id").is_null() & pl.col("design").is_in(list(comparison.designs)))
    scored = by_mechanism(scored, scored)
    steps = sorted(scored["step"].drop_nulls().unique().to_list()) if "step" in scored.columns else []
    if len(steps) < 2:
        return None
    by = pl.coalesce("mechanism", pl.lit("all") if comparison.by == "all" else pl.col(comparison.by))
    means = {
        (group, design, step): score
        for group, design, step, score in scored.group_by(by.alias("group"), "design", "step")
        .agg(pl.col("score").mean())
        .iter_rows()
    }
    sections = []
    for group in comparison.groups:
        rows = [
            (design, *(points(means[key]) if (key := (group, design, step)) in means else "–" for step in steps))
            for design in comparison.designs
        ]
        sections.append((group, tuple(rows)))
    note = "Mean over tasks and runs, ×100, after so many steps: an order that still moves at the end is not settled."
    return Table("Scores while training", ("Design", *(str(step) for step in steps)), tuple(sections), note)


def costs(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each design costs: parameters, FLOPs, seconds, as far as the rows know."""
    keys = [key for key in COST_COLUMNS if any(row.get(key) is not None for row in rows)]
    body = tuple((str(row["design"]), *(_amount(key, row.get(key)) for key in keys)) for row in rows)
    note = f"FLOPs: forward pass of base and head, one text of {ENCODE_TOKENS} tokens, a multiply-add as two."
    words = 1 + sum(key in ("attention", "pooling") for key in keys)
    return Table(
        "Cost",
        ("Design", *(COST_COLUMNS[key] for key in keys)),
        (("", body),),
        note if "encode_flops" in keys else "",
        words,
    )


def priced(rows: Iterable[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Cost rows with `encode_flops` (base and head at `ENCODE_TOKENS`) and `relative_cost` against the baseline."""
    out = [dict(row) for row in rows]
    for row in out:
        parts = [row.get(f"{part}_flops_{ENCODE_TOKENS}") for part in ("base", "head")]
        if "encode_flops" not in row and all(part is not None for part in parts):
            row["encode_flops"] = sum(parts)
    key = next((key for key in ("encode_seconds", "encode_flops") if any(row.get(key) for row in out)), None)
    base = next((row for row in out if row.get("design") == baseline), None)
    if key and base and base.get(key):
        for row in out:
            row["relative_cost"] = row[key] / base[key] if row.get(key) else None
    return out


def controls(comparison: Comparison, roles: Mapping[str, str]) -> Table | None:
    """Designs outside the family: what each is, its mean and its difference to the baseline by group."""
    if not comparison.control_rows:
        return None
    sections = []
    for design in comparison.control_designs:
        if design in RUNGS:
            continue
        rows = []
        for row in (row for row in comparison.control_rows if row.design == design):
            shown = row.verdict or row
            scope = "designs" if row.verdict else "checkpoints"
            mean = points(comparison.arm(row.group, design).mean)
            difference = points(shown.difference, 2, True)
            rows.append(
                (row.group, mean, difference, interval(shown.ci_low, shown.ci_high), probability(shown.p_value), scope)
            )
        role = roles.get(design)
        sections.append((f"{design} · {ROLES.get(role, role)}" if role else design, tuple(rows)))
    note = (
        f"Points against {comparison.baseline}, outside the family, uncorrected; means over the tasks each was given."
    )
    columns = ("Group", "Mean", "Difference", "95 % interval", "p", "Scope")
    return Table("Controls and references", columns, tuple(sections), note)


def roles(frame: pl.DataFrame, given: Mapping[str, str] | None) -> dict[str, str]:
    """The role of each control: from `given`, else from the table's column `role`."""
    found: dict[str, str] = {}
    if "role" in frame.columns:
        found = dict(frame.select("design", "role").unique().drop_nulls().iter_rows())
    return {**found, **(given or {})}


def tasks(frame: pl.DataFrame, comparison: Comparison) -> Table:
    """Every task compared, with its type, metric, source and the split and subset that were scored."""
    import polars as pl

    rows = frame.filter(pl.col("item_id").is_null() & pl.col("task").is_in(list(comparison.tasks)))
    rows = rows.group_by("task", "task_type", "metric").agg(
        *(pl.col(name).drop_nulls().unique().sort() for name in ("source", "split", "subset"))
    )
    body = tuple(
        (task, group_words(kind), metric, *(", ".join(found) or "–" for found in lists))
        for task, kind, metric, *lists in rows.sort("task_type", "task").iter_rows()
    )
    return Table("Tasks", ("Task", "Type", "Metric", "Source", "Split", "Subset"), (("", body),), text=6)


def recipe(info: Mapping[str, Any]) -> Table | None:
    """The recipe that all designs share, nested keys joined by dots."""
    flat: list[tuple[str, str]] = []

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            flat.append((name, "–" if shown in (None, "") else str(shown)))

    walk(info.get("recipe") or {}, "")
    return Table("Recipe", ("Field", "Value"), (("", tuple(flat)),), "The same for every design.", 2) if flat else None


def _amount(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "–"
    if key.endswith("seconds"):
        return f"{value:,.1f}"
    return f"{value:.3f}" if key == "relative_cost" else magnitude(value)


def magnitude(value: float) -> str:
    """`2.6 M`, `1.28 G`, `640`: three significant digits and a metric prefix."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"
