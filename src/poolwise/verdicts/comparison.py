"""Contrasts of designs with a baseline, one for each group of tasks, at the two scopes that scores can support.

- Scope checkpoints: seeds are averaged, sources of tasks are the sample. Exact Wilcoxon signed-rank test,
  Hodges–Lehmann difference, rank-biserial effect size. The claim is about the trained checkpoints over tasks like
  these. With one run per design this is all there is, besides the tipping point: the largest run effect at which the
  result would hold.
- Single tasks are compared over their items (`verdicts.arms`); with one run per design, by Student's t over items.
- Scope designs: two or more runs on either side. Random runs × random sources (`poolwise.stats.crossed`). The claim is
  about the designs, for runs and tasks like these; only this scope carries a verdict.

At both scopes the tasks of one source are averaged first, as they are not independent.

There is one family, declared before looking: contrasts against the baseline × groups, plus the overall contrasts if
task types have declared weights; Holm's correction spans all of it. Controls (A/A arm, broken arm, dilution ladder,
references) stay outside the family and lend no run variance. While runs of a study are missing, differences are shown
and nothing is tested.

`Comparison` holds the contrasts as data; `verdicts.findings` derives everything else from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from poolwise import stats
from poolwise.errors import StatisticsError, suggest
from poolwise.verdicts.arms import Arm, arms, natural
from poolwise.verdicts.contrasts import (
    Overall,
    Row,
    Rules,
    contrast,
    corrected,
    overall,
    run_squares,
    thin_groups,
    tipped,
    usable_weights,
)
from poolwise.verdicts.table import Note, early_only, roles_of, with_origins, without_copies

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Comparison:
    """All contrasts of a set of scores with its baseline.

    `rows` and `overall` are the family; `control_rows` are the contrasts of the controls, outside of it. `designs`
    starts with the baseline. `margin` (0–1) is the half-width of the equivalence region, `alpha` the level of each
    test. `roles`: (design, role) of the controls, if the table has a column `role`. `interim` says why nothing is
    tested yet, `exploratory` why verdicts are not confirmatory; both are empty if the study went as planned.
    """

    baseline: str
    by: str
    designs: tuple[str, ...]
    control_designs: tuple[str, ...]
    groups: tuple[str, ...]
    rows: tuple[Row, ...]
    control_rows: tuple[Row, ...]
    overall: tuple[Overall, ...]
    arms: tuple[Arm, ...]
    alpha: float
    margin: float
    notes: tuple[str, ...]
    excluded: tuple[Note, ...]
    roles: tuple[tuple[str, str], ...] = ()
    interim: str = ""
    exploratory: str = ""

    @property
    def family(self) -> int:
        """Number of contrasts that Holm's correction spans."""
        return len(self.rows) + len(self.overall)

    @property
    def percent(self) -> int:
        """Level of the intervals in percent: 95, or 97 at each of two declared looks."""
        return round(100 * (1 - self.alpha))

    @property
    def inner_percent(self) -> int:
        """Level of the interval of the two one-sided tests in percent: 90, or 94 at each of two looks."""
        return round(100 * (1 - 2 * self.alpha))

    @property
    def scope(self) -> str:
        """`designs` if at least one contrast carries a verdict, otherwise `checkpoints`."""
        return "designs" if any(row.verdict for row in self.rows) else "checkpoints"

    @property
    def seeds(self) -> dict[str, int]:
        """Number of runs of each design of the family."""
        return {arm.design: len(arm.seeds) for arm in self.arms if arm.design in self.designs}

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks compared."""
        whole = (task for group in self.groups for task in self.arm(group, self.baseline).whole().tasks)
        return tuple(dict.fromkeys(whole))

    def of_items(self, group: str) -> bool:
        """Whether a group is compared over items: a mechanism of the built-in tasks, or a single task."""
        return self.arm(group, self.baseline).unit != "task"

    def of_mechanism(self, group: str) -> bool:
        """Whether a group is a mechanism of the built-in tasks."""
        return self.arm(group, self.baseline).unit == "item"

    def of_own_task(self, group: str) -> bool:
        """Whether a group is a single task, compared over its items."""
        return self.arm(group, self.baseline).of_own_task

    @property
    def banner(self) -> str:
        """The warning that belongs above every table of single runs; empty if each design was run twice or more."""
        single = [design for design, count in self.seeds.items() if count < 2]
        if self.interim or not single:
            return ""
        who = "Every design was" if len(single) == len(self.designs) else f"{', '.join(single)}: each was"
        return (
            f"One run only. {who} trained once, so a difference may be due to chance in a single run, and no verdict "
            "on designs is possible: these results are about the checkpoints. Designs take two runs each, better three."
        )

    def row(self, group: str, design: str) -> Row:
        """The contrast of `design` in `group`, controls included."""
        return next(row for row in (*self.rows, *self.control_rows) if (row.group, row.design) == (group, design))

    def p_over_tasks(self, group: str, design: str) -> float:
        """Exact two-sided Wilcoxon p of design − baseline over the tasks of a group, seeds averaged, as in arXiv
        2409.02727: the sample is tasks, although some of them share their texts."""
        return stats.signed_rank(self.arm(group, design).task_means - self.arm(group, self.baseline).task_means)

    def arm(self, group: str, design: str) -> Arm:
        """The scores of `design` in `group`; KeyError if it has none (a control that was not evaluated there)."""
        for arm in self.arms:
            if (arm.group, arm.design) == (group, design):
                return arm
        raise KeyError((group, design))

    def whole_arm(self, group: str, design: str) -> Arm | None:
        """The scores of `design` in `group`; None unless it was scored on all tasks of the group."""
        found = next((arm for arm in self.arms if (arm.group, arm.design) == (group, design)), None)
        return found if found and len(found.tasks) == len(self.arm(group, self.baseline).tasks) else None


def compare(
    frame: pl.DataFrame,
    baseline: str | None = None,
    by: str = "task_type",
    controls: Iterable[str] = (),
    margin: float = 0.005,
    alpha: float = 0.05,
    missing: str = "error",
    order: Sequence[str] = (),
    type_weights: Mapping[str, float] | None = None,
    run_sd: float | None = None,
    run_df: float = float("inf"),
    interim: str = "",
    exploratory: str = "",
) -> Comparison:
    """Compare every design of a long table with the baseline, group by group.

    Args:
        frame: the long table (`poolwise.verdicts.readers.read`); per-item rows and earlier steps are ignored.
        baseline: the design to compare with; by default the first of the table, which a note then states.
        by: the column that groups tasks, or `all` for one group.
        controls: designs outside the family; a note lists those that the table lacks.
        margin: half-width of the equivalence region (0–1), fixed before the runs.
        alpha: level of each test; the intervals have the level 1 − alpha.
        missing: `error` refuses a table with gaps; `drop` leaves out, and lists, each task that a design lacks.
        order: designs in the order in which to list them; the rest follow by name.
        type_weights: declared weights of task types, for an overall verdict (only if grouped by task type).
        run_sd, run_df: sd (0–1) of one run's effect on a mean over tasks, from another study, and its degrees of
            freedom.
        interim, exploratory: why nothing is tested yet, or why verdicts are not confirmatory.

    Raises:
        StatisticsError: unknown baseline or column, fewer than two designs, a task with two metrics, gaps, runs that
            stopped at different steps, a run effect from another study although the runs themselves show it.
    """
    notes: list[str] = []
    present = frame["design"].unique(maintain_order=True).to_list()
    asked = list(dict.fromkeys(controls))
    if absent := [name for name in asked if name not in present]:
        notes.append(f"Controls without scores: {', '.join(absent)}.")
    rank = {name: place for place, name in enumerate(order)}
    listed = sorted(present, key=lambda name: (rank.get(name, len(rank)), natural(name)))
    outside = [name for name in listed if name in asked]
    family = [name for name in present if name not in outside]
    if len(family) < 2:
        names = ", ".join(family) or "controls only"
        raise StatisticsError(f"a comparison needs two designs; the scores contain {names}")
    if baseline is None:
        baseline = family[0]
        notes.append(f"No baseline was named, so {baseline}, the first design of the scores, is the baseline.")
    if baseline not in family:
        why = "is a control" if baseline in outside else "has no scores"
        hint = suggest(baseline, family)
        raise StatisticsError(f"baseline {baseline!r} {why}; the designs are {', '.join(family)}{hint}")
    designs = [baseline, *(name for name in listed if name in family and name != baseline)]
    early = early_only(frame)
    frame, copies = without_copies(frame)
    frame, shared_origins = with_origins(frame)
    groups, excluded = arms(frame, designs, outside, by, missing)
    squares = run_squares(groups, designs)
    weights, weight_notes = usable_weights(groups, designs, by, type_weights, interim)
    contrasts = len(groups) * (len(designs) - 1) + (len(designs) - 1 if weights else 0)
    rules = Rules(margin, alpha, contrasts, bool(interim), run_sd, run_df)
    rows, control_rows = [], []
    for group_arms in groups.values():
        base = group_arms[baseline]
        for design in designs[1:]:
            lent = [group_arms[name] for name in designs if name not in (baseline, design)]
            rows.append(contrast(base, group_arms[design], lent, rules, squares))
        for arm in (group_arms[name] for name in outside if name in group_arms):
            shared = [task for task in base.tasks if task in arm.tasks]
            control_rows.append(contrast(base.on(shared), arm, (), replace(rules, family=1, run_sd=None)))
    if run_sd is not None and not any(row.given for row in rows):
        raise StatisticsError(
            "a run effect from another study is for designs that were run once, on tasks from two or more sources; "
            "with two or more runs per design it is measured here, so leave out --run-sd and --run-df"
        )
    overalls = [
        overall(groups, baseline, design, designs, weights, rules, squares) for design in designs[1:] if weights
    ]
    tested, weighted = corrected(rows, overalls, alpha)
    return Comparison(
        baseline=baseline,
        by=by,
        designs=tuple(designs),
        control_designs=tuple(outside),
        groups=tuple(groups),
        rows=tipped(tested, groups, alpha),
        control_rows=tuple(control_rows),
        overall=weighted,
        arms=tuple(arm for group_arms in groups.values() for arm in group_arms.values()),
        alpha=alpha,
        margin=margin,
        notes=(*notes, *copies, *shared_origins, *weight_notes, *thin_groups(groups, baseline)),
        excluded=(*early, *excluded),
        roles=roles_of(frame),
        interim=interim,
        exploratory=exploratory,
    )
