"""A comparison as tables of ready-made strings, the same for terminal, Markdown, LaTeX and HTML. Scores are ×100 here.

Nothing is computed beyond what a table needs to be read: seed means, their sd, and units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poolwise.reports.words import (
    KNOWN_RUN_EFFECTS,
    chance,
    count,
    detectable_words,
    group_words,
    interval,
    magnitude,
    mean_and_sd,
    number,
    outcome,
    points,
    probability,
    sample_words,
)
from poolwise.verdicts.arms import FEW_SOURCES
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Row, Verdict
from poolwise.verdicts.controls import RUNGS
from poolwise.verdicts.costs import PRICED_TOKENS

if TYPE_CHECKING:
    import polars as pl

Cells = tuple[str, ...]

MARKS = {"better": "▲", "worse": "▼", "equivalent": "≈", "withheld": "△", "inconclusive": "", "untested": ""}
COST_COLUMNS = {  # key of a cost row -> heading
    "attention": "Attention",
    "pooling": "Pooling",
    "trainable_parameters": "Trained",
    "head_parameters": "Head",
    "encode_flops": "FLOPs per text",
    "relative_cost": "× baseline",
}
MANY_GROUPS = 6  # with more groups than this, the table of means has a row per group, and pictures are folded
ROLES = {
    "aa": "A/A arm: the baseline again, other seeds; must not differ",
    "broken": "broken on purpose; must score lower",
    "ladder": "diluted baseline; must score a little lower",
    "untuned": "not trained",
    "reference": "reference",
}


WORDS = ("Verdict", "Needed to decide", "Test")
"""Columns of words, wherever they are in a table."""


@dataclass(frozen=True)
class Table:
    """Rows of strings under `columns`, in sections with or without a heading; the first `text` columns are words."""

    title: str
    columns: Cells
    sections: tuple[tuple[str, tuple[Cells, ...]], ...]
    note: str = ""
    text: int = 1

    def is_words(self, place: int) -> bool:
        """Whether a column holds words, which are flush left, and not numbers."""
        return place < self.text or self.columns[place] in WORDS

    @property
    def rows(self) -> list[Cells]:
        """All rows of all sections."""
        return [row for _, rows in self.sections for row in rows]


def sections(
    groups: Iterable[str], rows: Callable[[str], Iterable[Cells]], heading: Callable[[str], str] = str
) -> tuple[tuple[str, tuple[Cells, ...]], ...]:
    """The sections of a table: for each group that has rows, its heading and its rows."""
    made = ((group, tuple(rows(group))) for group in groups)
    return tuple((heading(group), body) for group, body in made if body)


def means(comparison: Comparison) -> Table:
    """Mean score of each design by group, with the sd of its runs."""
    starred = not comparison.exploratory and not comparison.interim
    rows = []
    for design in comparison.designs:
        cells = []
        for group in comparison.groups:
            runs = 100 * comparison.arm(group, design).run_means
            compared = starred and design != comparison.baseline
            mark = MARKS[outcome(comparison, comparison.row(group, design))] if compared else ""
            cells.append(f"{mark} {mean_and_sd(runs.tolist())}".strip())
        rows.append(cells)
    note = "Mean over tasks, ×100."
    if any(runs > 1 for runs in comparison.seeds.values()):
        note = "Mean over tasks, ×100; ± is the sd of the runs."
    arms = [comparison.arm(group, comparison.baseline) for group in comparison.groups]
    if any(arm.unit == "task" and arm.by_source.shape[1] < len(arm.tasks) for arm in arms):
        note += " Differences below average the tasks of a source first, so they are not those of these means."
    if starred:
        note += f" ▲ above, ▼ below {comparison.baseline} after Holm"
        equivalent = f", ≈ equivalent within ±{points(comparison.margin, 1)}."
        if any(row.verdict and row.verdict.verdict == "withheld" for row in comparison.rows):
            equivalent = f"{equivalent[:-1]}, △ withheld for lack of sources."
        note += equivalent if comparison.scope == "designs" else " (checkpoints only)."
    heads = []
    for group in comparison.groups:
        arm = comparison.arm(group, comparison.baseline)
        own = comparison.of_own_task(group)
        heads.append(f"{group} ({count(len(arm.tasks), arm.unit) if own else len(arm.whole().tasks)})")
    if len(heads) > max(MANY_GROUPS, len(rows)):  # a page is wide enough for the designs, but not for the groups
        body = tuple((head, *cells) for head, *cells in zip(heads, *rows, strict=True))
        return Table("Mean scores", ("Tasks", *comparison.designs), (("", body),), note)
    body = tuple((design, *cells) for design, cells in zip(comparison.designs, rows, strict=True))
    return Table("Mean scores", ("Design", *heads), (("", body),), note)


def planned(preview: Mapping[str, Any]) -> list[Table]:
    """What a study that has not run yet will be tested on, from the result of `poolwise check`: task types over their
    tasks, with the smallest p that is possible; tasks read from folders over their items, with what could be found."""
    made, contrasts = [], preview["contrasts"]
    if groups := [group for group in preview["tasks"] if group["tested_over"] == "tasks"]:
        rows: list[Cells] = [
            (
                group["task_type"], str(group["tasks"]), str(group["sources"]), probability(group["min_reachable_p"]),
                probability(group["min_reachable_p_holm"]),
            )
            for group in groups
        ]  # fmt: skip
        columns = ("Tested over tasks", "Tasks", "Sources", "Smallest p", f"Holm over {contrasts}")
        note = "Smallest p: that of Wilcoxon's test if all tasks agree."
        made.append(Table("", columns, (("", tuple(rows)),), note))
    if preview["folders"]:
        runs = count(len(preview["seeds"]), "seed")
        rows = [
            (
                row["task"], row["task_type"], f"{runs} × {count(row['items'], row['unit'])}",
                "–" if row["detectable"] is None else detectable_words(row["detectable"]),
            )
            for row in preview["folders"]
        ]  # fmt: skip
        note = (
            f"Detectable: the true difference, in points, that is found with 80 % power after Holm over "
            f"{count(contrasts, 'contrast')}, if runs and items vary as on SmolLM2-135M (docs/results.md)."
        )
        note += " With one seed it is about these checkpoints, not the designs." if len(preview["seeds"]) == 1 else ""
        heads = ("Tested over items", "Task type", "Sample", "Detectable")
        made.append(Table("", heads, (("", tuple(rows)),), note, text=3))
    return made


def own_tasks(comparison: Comparison) -> Table | None:
    """The verdict on each task that is tested over its items: scores, difference, interval, Holm's p; None without."""
    groups = [group for group in comparison.groups if comparison.of_own_task(group)]
    if not groups or comparison.interim:
        return None

    def cells(row: Row) -> Cells:
        shown, word = row.verdict or row, outcome(comparison, row)
        means = (points(comparison.arm(row.group, name).mean) for name in (row.design, row.baseline))
        span = "–" if shown.ci_low is None else interval(shown.ci_low, shown.ci_high)
        return row.design, *means, points(shown.difference, 2, True), span, probability(shown.p_holm), word

    def heading(group: str) -> str:
        arm = comparison.arm(group, comparison.baseline)
        return f"{group} · {count(len(arm.tasks), arm.unit)}, {count(len(arm.seeds), 'seed')}"

    body = sections(groups, lambda group: [cells(row) for row in comparison.rows if row.group == group], heading)
    scope = "for runs and items like these" if all(row.verdict for row in comparison.rows if row.group in groups) else (
        "for these checkpoints and items like these where a design was run once"
    )  # fmt: skip
    family = count(comparison.family, "contrast")
    note = f"Each task is tested over its items. Points, {scope}; p after Holm over {family}."
    columns = (
        "Design", "Score", f"Score of {comparison.baseline}", "Difference", f"{comparison.percent} % interval",
        "p Holm", "Verdict",
    )  # fmt: skip
    return Table("Single tasks", columns, body, note)


def verdicts(comparison: Comparison) -> Table | None:
    """Contrasts of designs: random runs × random tasks, Holm over the family; None if there is no verdict."""
    judged = [(row, row.verdict) for row in comparison.rows if row.verdict]
    new = any(verdict.better_on_new is not None for _, verdict in judged)

    def heading(group: str) -> str:
        first = next(v for row, v in judged if row.group == group)
        sample = sample_words(first.tasks, first.sources, comparison.arm(group, comparison.baseline).unit)
        return f"{group} · {sample}, {count(first.seeds, 'seed')}"

    body = sections(
        comparison.groups,
        lambda group: [
            (
                row.design, points(v.difference, 2, True), interval(v.ci_low, v.ci_high), probability(v.p_value),
                probability(v.p_holm), points(v.run_sd), detectable_words(v.detectable),
                *(_new_task(v) if new else ()), v.verdict,
            )
            for row, v in judged
            if row.group == group
        ],
        heading,
    )  # fmt: skip
    if not body:
        return None
    kinds = {comparison.of_own_task(row.group) for row, _ in judged}
    units = "items" if kinds == {True} else "tasks (items, on single tasks)" if True in kinds else "tasks"
    unpooled: dict[str, list[str]] = {}
    for row, verdict in judged:
        if verdict.note:
            unpooled.setdefault(verdict.note, []).append(f"{row.design} ({row.group})")
    further, held = "", ""
    if new:
        further = (
            " One new task: the interval for the difference on a single further task, and the chance that it is above "
            f"{points(comparison.margin, 1)} points."
        )
    if any(verdict.verdict == "withheld" for _, verdict in judged):
        held = f" Withheld: would be a verdict, but takes {FEW_SOURCES} sources of tasks."
    notes = "".join(f" Run variance not pooled, as {why}: {', '.join(who)}." for why, who in unpooled.items())
    note = (
        f"Points against {comparison.baseline}, for runs and {units} like these; Holm over "
        f"{count(comparison.family, 'contrast')}. Run effect: sd of one run. Detectable: the true difference that is "
        f"detected with 80 % power at Holm's first step. Equivalent: {comparison.inner_percent} % interval inside "
        f"±{points(comparison.margin, 1)}.{further}{held}{notes}"
    )
    columns = (
        "Design", "Difference", f"{comparison.percent} % interval", "p", "p Holm", "Run effect", "Detectable",
        *(("One new task", f">{points(comparison.margin, 1)}") if new else ()), "Verdict",
    )  # fmt: skip
    return Table("Differences between designs", columns, body, note)


def _new_task(verdict: Verdict) -> Cells:
    if verdict.better_on_new is None:
        return "–", "–"
    return interval(verdict.new_task_low, verdict.new_task_high), chance(verdict.better_on_new)


def checkpoints(comparison: Comparison) -> Table | None:
    """Contrasts of checkpoints: exact Wilcoxon test over sources on seed means; while runs are missing only differences
    and wins/ties/losses."""
    tested = {row.group for row in comparison.rows if row.p_value is not None}
    groups = [
        group for group in comparison.groups if comparison.interim or group in tested or not comparison.of_items(group)
    ]
    tipping = any(row.single and row.p_value is not None for row in comparison.rows)

    def cells(row: Row) -> Cells:
        difference, counts = points(row.difference, 2, True), f"{row.wins}/{row.ties}/{row.losses}"
        if comparison.interim:
            return row.design, difference, counts
        effect = "–" if row.effect_size is None else number(row.effect_size, 2, True)
        tip = ("–" if row.tipping_run_sd is None else points(row.tipping_run_sd),) if tipping else ()
        span = interval(row.ci_low, row.ci_high)
        return row.design, difference, span, probability(row.p_value), probability(row.p_holm), effect, counts, *tip

    def heading(group: str) -> str:
        if comparison.interim:
            arm = comparison.arm(group, comparison.baseline)
            return f"{group} · {count(len(arm.tasks), arm.unit)}"
        first = next(row for row in comparison.rows if row.group == group)
        if comparison.of_items(group):
            return f"{group} · {count(first.n, comparison.arm(group, first.design).unit)}"
        sample = sample_words(first.tasks, first.n)
        return f"{group} · {sample}, smallest reachable p {probability(first.min_reachable_p)}"

    body = sections(groups, lambda group: [cells(row) for row in comparison.rows if row.group == group], heading)
    if not body:
        return None
    start = f"Points against {comparison.baseline}"
    own = any(map(comparison.of_own_task, groups))
    if comparison.interim:
        note = f"{start} (Hodges–Lehmann over sources), seeds averaged; nothing is tested yet."
        return Table("Differences so far", ("Design", "Difference", "W/T/L"), body, note)
    note = (
        f"{start}; seeds and the tasks of a source averaged, sources as the sample: the claims are about these "
        "checkpoints. Hodges–Lehmann "
        f"difference with exact interval, exact Wilcoxon p, Holm over {count(len(comparison.rows), 'contrast')}, "
        "matched-pairs rank-biserial effect size, wins/ties/losses."
    )
    if own:
        note += " Single tasks: mean difference and Student's t over their items."
    columns = ["Design", "Difference", f"{comparison.percent} % interval", "p", "p Holm", "Effect size", "W/T/L"]
    if tipping:
        columns.append("Tipping point")
        note += (
            " Tipping point: the largest run effect at which the mean difference would still hold after Holm, – where "
            f"it does not hold anyway. Runs of one design are known to vary by {KNOWN_RUN_EFFECTS}."
        )
    return Table("Differences between checkpoints", tuple(columns), body, note)


def task_scores(comparison: Comparison) -> Table:
    """Score of each design on each task, seeds averaged."""

    def rows(group: str) -> list[Cells]:
        arms = [comparison.arm(group, design).whole() for design in comparison.designs]
        return [(task, *(points(float(arm.task_means[i])) for arm in arms)) for i, task in enumerate(arms[0].tasks)]

    body = sections(comparison.groups, rows)
    return Table("Scores on each task", ("Task", *comparison.designs), body, "×100, seeds averaged.")


def run_scores(comparison: Comparison) -> Table:
    """Mean score of each run by group."""
    seeds = sorted({seed for arm in comparison.arms if arm.design in comparison.designs for seed in arm.seeds})

    def cells(group: str, design: str) -> Cells:
        arm = comparison.arm(group, design)
        means = dict(zip(arm.seeds, arm.run_means.tolist(), strict=True))
        return design, *(points(means[seed]) if seed in means else "–" for seed in seeds)

    body = sections(comparison.groups, lambda group: [cells(group, design) for design in comparison.designs])
    columns = ("Design", *(f"Seed {seed}" for seed in seeds))
    return Table("Scores of each run", columns, body, "Mean over tasks, ×100.")


def over_steps(frame: pl.DataFrame, comparison: Comparison) -> Table | None:
    """Mean score of each design after a part of the training; None if only the end was scored."""
    import polars as pl

    scored = frame.filter(pl.col("item_id").is_null() & pl.col("design").is_in(list(comparison.designs)))
    over_items = {
        task: group
        for group in comparison.groups
        if comparison.of_items(group)
        for task in comparison.arm(group, comparison.baseline).whole().tasks
    }
    steps = sorted(scored["step"].drop_nulls().unique().to_list())
    if len(steps) < 2:
        return None
    of_items = pl.col("task").replace_strict(over_items, default=None, return_dtype=pl.String)
    by = pl.coalesce(of_items, pl.lit("all") if comparison.by == "all" else pl.col(comparison.by))
    means = {
        (group, design, step): score
        for group, design, step, score in scored.group_by(by.alias("group"), "design", "step")
        .agg(pl.col("score").mean())
        .iter_rows()
    }

    def cells(group: str, design: str) -> Cells:
        return design, *(points(means[key]) if (key := (group, design, step)) in means else "–" for step in steps)

    body = sections(comparison.groups, lambda group: [cells(group, design) for design in comparison.designs])
    note = "Mean over tasks and runs, ×100, by step: an order that still changes at the end is not settled."
    return Table("Scores during training", ("Design", *(str(step) for step in steps)), body, note)


def costs(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """The cost of each design: parameters and FLOPs, as far as the rows have them; None without rows."""
    if not rows:
        return None
    keys = [key for key in COST_COLUMNS if any(row.get(key) is not None for row in rows)]

    def cell(key: str, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or "–"
        return f"{value:.3f}" if key == "relative_cost" else magnitude(value)

    body = tuple((str(row["design"]), *(cell(key, row.get(key)) for key in keys)) for row in rows)
    note = f"FLOPs: forward pass of base and head, one text of {PRICED_TOKENS} tokens, a multiply-add counted as two."
    words = 1 + sum(key in ("attention", "pooling") for key in keys)
    columns = ("Design", *(COST_COLUMNS[key] for key in keys))
    return Table("Cost", columns, (("", body),), note if "encode_flops" in keys else "", words)


def controls(comparison: Comparison) -> Table | None:
    """Designs outside the family: the role of each, its mean and its difference to the baseline by group."""
    roles = dict(comparison.roles)

    def rows(design: str) -> list[Cells]:
        return [
            (
                row.group, points(comparison.arm(row.group, design).mean), points(shown.difference, 2, True),
                interval(shown.ci_low, shown.ci_high), probability(shown.p_value),
                "designs" if row.verdict else "checkpoints",
            )
            for row in comparison.control_rows
            if row.design == design and (shown := row.verdict or row)
        ]  # fmt: skip

    def heading(design: str) -> str:
        role = roles.get(design)
        return f"{design} · {ROLES.get(role, role)}" if role else design

    body = sections([name for name in comparison.control_designs if name not in RUNGS], rows, heading)
    note = (
        f"Points against {comparison.baseline}, outside the family, uncorrected; means over the tasks that each was "
        "scored on."
    )
    columns = ("Group", "Mean", "Difference", "95 % interval", "p", "Scope")
    return Table("Controls and references", columns, body, note) if comparison.control_rows else None


def tasks(frame: pl.DataFrame, comparison: Comparison) -> Table:
    """Every task compared, with its type, metric, source and the split and subset that were scored."""
    import polars as pl

    rows = frame.filter(pl.col("item_id").is_null() & pl.col("task").is_in(list(comparison.tasks)))
    rows = rows.group_by("task", "task_type", "metric").agg(
        *(pl.col(name).drop_nulls().unique().sort() for name in ("source", "split", "subset"))
    )
    body = tuple(
        (task, group_words(kind), metric, *(", ".join(values) or "–" for values in lists))
        for task, kind, metric, *lists in rows.sort("task_type", "task").iter_rows()
    )
    return Table("Tasks", ("Task", "Type", "Metric", "Source", "Split", "Subset"), (("", body),), text=6)


def recipe(fields: Mapping[str, Any]) -> Table | None:
    """The recipe that all designs share, nested keys joined by dots; None without one."""
    flat: list[Cells] = []

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            flat.append((name, "–" if shown in (None, "") else str(shown)))

    walk(fields, "")
    return Table("Recipe", ("Field", "Value"), (("", tuple(flat)),), "The same for every design.", 2) if flat else None
