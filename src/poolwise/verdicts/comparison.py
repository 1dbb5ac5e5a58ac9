"""Contrasts of designs with a baseline, one for each group of tasks, at the two scopes that scores can support.

- Scope checkpoints: seeds are averaged, tasks are the sample. Exact Wilcoxon signed-rank, Hodges–Lehmann difference,
  rank-biserial effect size. It speaks about the trained checkpoints over tasks like these. With one run a design it is
  all there is, beside the tipping point: the largest run effect at which the result would still stand.
- Scope designs: two or more runs a side. Random runs × random tasks (`poolwise.stats.crossed`), tasks of one source
  averaged first. It speaks about the designs, for runs and tasks like these, and alone carries a verdict.

One family, declared before looking: contrasts against the baseline × groups, and the overall ones where task types have
declared weights; Holm over all of it. Controls (A/A arm, broken arm, dilution ladder, references) stand outside the
family and never lend their variance. While runs of a study are missing, differences are shown and nothing is tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from poolwise.errors import StatisticsError, suggest
from poolwise.verdicts import robustness as robust
from poolwise.verdicts import robustness as tuning
from poolwise.verdicts.arms import Arm, arms, natural
from poolwise.verdicts.contrasts import (
    Given,
    Overall,
    Row,
    Rules,
    Verdict,
    contrast,
    corrected,
    overall,
    thin_groups,
    usable_weights,
)
from poolwise.verdicts.controls import controls_to_json, roles_of, unsound
from poolwise.verdicts.factors import Factorial, factorial
from poolwise.verdicts.findings import Budgets, Recommendation, recommend
from poolwise.verdicts.table import with_origins

if TYPE_CHECKING:
    import polars as pl

    from poolwise.study.design import Design


__all__ = ["JSON_FIELDS", "Comparison", "Given", "Overall", "Row", "Verdict", "compare"]

JSON_FIELDS = (
    "group", "design", "baseline", "n", "difference", "ci_low", "ci_high", "p_value", "p_holm", "effect_size",
    "wins", "ties", "losses", "min_reachable_p",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """All contrasts of a set of scores against its baseline; `rows` is the family, `controls` stands outside it.

    `lenders` are the designs whose runs estimate the run effect together, `costs` the encode cost of each design where
    it is known, `treatments` the designs as the study declares them, where there is a study. `overall` belongs to the
    family, `budgets` are the exploratory contrasts at equal cost. `interim` and `exploratory` say why nothing is tested
    yet, or why verdicts carry no star; both are empty where the study went as planned. `plan` says which look at the
    study this is, where it has two, and `looks` what each has shown. `by_base`: where scores are means
    over several base models, the comparison on each.
    """

    baseline: str
    by: str
    designs: tuple[str, ...]
    control_designs: tuple[str, ...]
    groups: tuple[str, ...]
    rows: tuple[Row, ...]
    control_rows: tuple[Row, ...]
    arms: tuple[Arm, ...]
    alpha: float
    margin: float
    notes: tuple[str, ...]
    excluded: tuple[str, ...]
    lenders: tuple[str, ...] = ()
    costs: tuple[tuple[str, float], ...] = ()
    treatments: tuple[Design, ...] = ()
    overall: tuple[Overall, ...] = ()
    budgets: Budgets | None = None
    interim: str = ""
    exploratory: str = ""
    looks: tuple[Mapping[str, Any], ...] = ()
    plan: str = ""
    roles: tuple[tuple[str, str], ...] = ()
    by_base: tuple[tuple[str, Comparison], ...] = ()
    tuned: Comparison | None = None
    winners: tuple[tuning.Winner, ...] = ()

    @cached_property
    def recommendations(self) -> tuple[Recommendation, ...]:
        """The design to use for each group; none while runs are missing."""
        return () if self.interim else recommend(self)

    @cached_property
    def factorial(self) -> Factorial | None:
        """What each factor of the designs does; None without a study of two factors or capacity controls."""
        return None if self.interim else factorial(self)

    @cached_property
    def robustness(self) -> robust.Robustness | None:
        """Whether several base models agree; None for a study of one."""
        return robust.robustness(self.by_base)

    @cached_property
    def outcomes(self) -> tuple[tuning.Outcome, ...]:
        """Each verdict with the same recipe and equally tuned; empty where the study does not tune."""
        return tuning.outcomes(self, self.tuned) if self.tuned else ()

    @property
    def family(self) -> int:
        """Contrasts that Holm's correction spans."""
        return len(self.rows) + len(self.overall)

    @property
    def percent(self) -> int:
        """Level of the intervals: 95, or 97 at each of two declared looks."""
        return round(100 * (1 - self.alpha))

    @property
    def scope(self) -> str:
        """`designs` where at least one contrast carries a verdict, else `checkpoints`."""
        return "designs" if any(row.verdict for row in self.rows) else "checkpoints"

    @property
    def seeds(self) -> dict[str, int]:
        """Runs of each design of the family."""
        return {arm.design: len(arm.seeds) for arm in self.arms if arm.design in self.designs}

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks compared."""
        return tuple(task for group in self.groups for task in self.arm(group, self.baseline).whole().tasks)

    def of_items(self, group: str) -> bool:
        """Whether a group is a mechanism of the built-in tasks, compared over items."""
        return self.arm(group, self.baseline).unit == "item"

    @property
    def banner(self) -> str | None:
        """The warning that belongs above every table of single runs; None where each design was run twice or more."""
        if self.interim:
            return None
        single = [design for design, count in self.seeds.items() if count < 2]
        if not single:
            return None
        who = "Every design was" if len(single) == len(self.designs) else f"{', '.join(single)}: each"
        return (
            f"One run only. {who} trained once, so a difference may be the luck of a run, and no verdict on designs is "
            "possible: what follows speaks about these checkpoints. Run two seeds or more (the default is three)."
        )

    def row(self, group: str, design: str) -> Row:
        """The contrast of `design` in `group`, controls included."""
        return next(row for row in (*self.rows, *self.control_rows) if (row.group, row.design) == (group, design))

    def arm(self, group: str, design: str) -> Arm:
        """The scores of `design` in `group`; KeyError where it has none (a control that was not evaluated there)."""
        for arm in self.arms:
            if (arm.group, arm.design) == (group, design):
                return arm
        raise KeyError((group, design))

    def to_json(self) -> dict[str, Any]:
        """What `poolwise compare --json` prints: the contrasts, and the design-level verdicts beside them."""
        verdicts = [(row, row.verdict) for row in self.rows if row.verdict]
        given = [(row, row.given) for row in self.rows if row.given]
        return {
            "comparisons": [{name: getattr(row, name) for name in JSON_FIELDS} for row in self.rows],
            "scope": self.scope,
            "verdicts": [
                {"group": row.group, "design": row.design, "baseline": row.baseline, **asdict(verdict)}
                for row, verdict in verdicts
            ],
            "status": "interim" if self.interim else "exploratory" if self.exploratory else "as declared",
            "alpha": self.alpha,
            "looks": [dict(look) for look in self.looks],
            "overall": [asdict(found) for found in self.overall],
            "given_run_effect": [
                {"group": row.group, "design": row.design, "baseline": row.baseline, **_finite(asdict(found))}
                for row, found in given
            ],
            "equal_budget": asdict(self.budgets) if self.budgets else None,
            "recommendations": [asdict(found) for found in self.recommendations],
            "factors": asdict(self.factorial) if self.factorial else None,
            "controls": controls_to_json(self),
            "tuning": tuning.tuning_to_json(self),
            "base_models": robust.bases_to_json(self),
            "notes": [text for text in (self.interim, self.exploratory, self.plan, self.banner) if text]
            + [*self.notes, *self.excluded],
        }


def compare(
    frame: pl.DataFrame,
    baseline: str | None = None,
    by: str = "task_type",
    controls: Iterable[str] = (),
    pool: Iterable[str] | None = None,
    margin: float = 0.005,
    alpha: float = 0.05,
    missing: str = "error",
    order: Sequence[str] = (),
    costs: Mapping[str, float] | None = None,
    treatments: Sequence[Design] = (),
    type_weights: Mapping[str, float] | None = None,
    run_sd: float | None = None,
    run_df: float = float("inf"),
    interim: str = "",
    exploratory: str = "",
    looks: Sequence[Mapping[str, Any]] = (),
) -> Comparison:
    """Compare every design of a long table with the baseline, group by group.

    Args:
        frame: the long table (`poolwise.verdicts.readers.read`); per-item rows and earlier steps are ignored.
        baseline: the design to compare with; by default the first of the table, and a note says so.
        by: the column that groups tasks, or `all` for one group.
        controls: designs outside the family and the pool; those that the table lacks are noted.
        pool: designs whose runs estimate the run effect together; by default all of the family, `()` only the two.
        margin: half-width of the equivalence region (0–1), fixed before the runs.
        missing: `error` refuses a table with gaps; `drop` leaves out, and lists, each task that a design lacks.
        order: designs in the order in which to list them; the rest follow by name.
        costs: what each design costs to encode, in one unit; where nothing is better, the cheapest is recommended.
        treatments: the designs as a study declares them, for the analysis of factors.
        type_weights: declared weights of task types, for an overall verdict (by task type only).
        run_sd, run_df: sd (0–1) of one run's effect on a mean over tasks, known from elsewhere, and its df.
        interim, exploratory: why nothing is tested yet, or why verdicts are not confirmatory.
        looks: the looks taken so far, kept for the report.

    Raises:
        StatisticsError: unknown baseline or column, fewer than two designs, a task with two metrics, gaps, runs that
            stopped at different steps, a run effect from elsewhere where the runs themselves show it.
    """
    present = frame["design"].unique(maintain_order=True).to_list()
    asked, notes = list(dict.fromkeys(controls)), list[str]()
    if absent := [name for name in asked if name not in present]:
        notes.append(f"Controls without scores: {', '.join(absent)}.")
    rank = {name: place for place, name in enumerate(order)}
    listed = sorted(present, key=lambda name: (rank.get(name, len(rank)), natural(name)))
    outside = [name for name in listed if name in asked]
    family = [name for name in present if name not in outside]
    if len(family) < 2:
        raise StatisticsError(f"a comparison needs two designs; the scores hold {', '.join(family) or 'controls only'}")
    if baseline is None:
        baseline = family[0]
        notes.append(f"No baseline was named: {baseline}, the first design of the scores, serves as one.")
    if baseline not in family:
        why = "is a control" if baseline in outside else "has no scores"
        hint = suggest(baseline, family)
        raise StatisticsError(f"baseline {baseline!r} {why}; the designs are {', '.join(family)}{hint}")
    designs = [baseline, *(name for name in listed if name in family and name != baseline)]
    frame, shared_origins = with_origins(frame)
    groups, excluded = arms(frame, designs, outside, by, missing)
    notes += shared_origins
    lent_by = set(designs if pool is None else pool)
    lenders = [name for name in designs if name in lent_by]
    weighted, said = usable_weights(groups, designs, by, type_weights, interim)
    notes += said
    contrasts = len(groups) * (len(designs) - 1) + (len(designs) - 1 if weighted else 0)
    rules = Rules(margin, alpha, contrasts, bool(interim), run_sd, run_df)
    rows, control_rows = [], []
    for group_arms in groups.values():
        base = group_arms[baseline]
        for design in designs[1:]:
            lent = [group_arms[name] for name in lenders if name not in (baseline, design)]
            rows.append(contrast(base, group_arms[design], lent, rules))
        for arm in (group_arms[name] for name in outside if name in group_arms):
            shared = [task for task in base.tasks if task in arm.tasks]
            control_rows.append(contrast(base.on(shared), arm, (), replace(rules, family=1, run_sd=None)))
    notes += thin_groups(groups, baseline)
    if run_sd is not None and not any(row.given for row in rows):
        raise StatisticsError(
            "a run effect from elsewhere is for designs that were run once, on tasks from two sources or more; with "
            "two runs a design or more it is measured, so leave it out"
        )
    overalls = [overall(groups, baseline, design, lenders, weighted, rules) for design in designs[1:] if weighted]
    tested, weighed = corrected(rows, overalls, alpha)
    found = Comparison(
        baseline, by, tuple(designs), tuple(outside), tuple(groups), tested, tuple(control_rows),
        tuple(arm for group_arms in groups.values() for arm in group_arms.values()),
        alpha, margin, tuple(notes), tuple(excluded),
        tuple(lenders), tuple((costs or {}).items()), tuple(treatments),
        overall=weighed, interim=interim, exploratory=exploratory, looks=tuple(looks), roles=roles_of(frame),
    )  # fmt: skip
    return replace(found, exploratory=exploratory or unsound(found))


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an unbounded number of degrees of freedom is null."""
    return {name: None if value == float("inf") else value for name, value in found.items()}
