"""Contrasts of designs with a baseline, one for each group of tasks, at the two scopes that scores can support.

- Scope checkpoints: seeds are averaged, tasks are the sample. Exact Wilcoxon signed-rank, Hodges–Lehmann difference,
  rank-biserial effect size. It speaks about the trained checkpoints over tasks like these. With one run a design it is
  all there is, beside the tipping point: the largest run effect at which the result would still stand.
- Scope designs: two or more runs a side. Random runs × random tasks (`poolwise.stats.crossed`), tasks of one source
  averaged first. It speaks about the designs, for runs and tasks like these, and alone carries a verdict.

One family, declared before looking: contrasts against the baseline × groups; Holm over all of it. Controls (A/A arm,
broken arm, dilution ladder, references) stand outside the family and never lend their variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from poolwise import stats
from poolwise.arms import FEW_SOURCES, Arm, arms, natural
from poolwise.errors import StatisticsError, suggest
from poolwise.factorial import Factorial, factorial
from poolwise.recommendation import Recommendation, recommend

if TYPE_CHECKING:
    import polars as pl

    from poolwise.study import Design

JSON_FIELDS = (
    "group", "design", "baseline", "n", "difference", "ci_low", "ci_high", "p_value", "p_holm", "effect_size",
    "wins", "ties", "losses", "min_reachable_p",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a contrast says about two designs (scope: designs), in scores 0–1.

    `difference` is the mean over runs and sources, with its 95 % interval; `equivalence_low/high` is the 90 % interval
    that lies inside ±margin exactly where the two one-sided tests (`p_equivalence`) find the designs equivalent.
    `run_sd` is the sd of the effect of one run on the mean over tasks, with its own interval. `detectable` is the true
    difference that these runs and tasks would find with 80 % power after correction for the family (its first step).
    `settle_low` to `settle_high` seeds a design would find a difference of the margin, where that is open: a range, as
    the run effect is uncertain; None: no number up to 50 would, it takes more tasks.
    `verdict`: better, worse (p_holm at most alpha), equivalent, inconclusive; `none` for controls.
    """

    seeds: int
    baseline_seeds: int
    tasks: int
    sources: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    run_sd: float
    run_sd_low: float
    run_sd_high: float
    scope: str
    note: str
    detectable: float
    equivalence_low: float
    equivalence_high: float
    p_equivalence: float
    settle_low: int | None = None
    settle_high: int | None = None
    p_holm: float | None = None
    verdict: str = "none"


@dataclass(frozen=True)
class Row:
    """One contrast of one group (scope: checkpoints), with the design-level verdict where runs allow one.

    `difference` is design − baseline (Hodges–Lehmann over `n` tasks, seeds averaged); unbounded ends are None.
    `p_value`, `p_holm` and `effect_size` are None where one task leaves nothing to test.
    `tipping_run_sd`, with one run a side: the largest run effect at which the result would still stand; 0 if none.
    """

    group: str
    design: str
    baseline: str
    n: int
    difference: float
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    p_holm: float | None
    effect_size: float | None
    wins: int
    ties: int
    losses: int
    min_reachable_p: float
    tipping_run_sd: float | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Comparison:
    """All contrasts of a set of scores against its baseline; `rows` is the family, `controls` stands outside it.

    `lenders` are the designs whose runs estimate the run effect together, `costs` the encode cost of each design where
    it is known, `treatments` the designs as the study declares them, where there is a study.
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

    @cached_property
    def recommendations(self) -> tuple[Recommendation, ...]:
        """The design to use for each group."""
        return recommend(self)

    @cached_property
    def factorial(self) -> Factorial | None:
        """What each factor of the designs does; None without a study of two factors or capacity controls."""
        return factorial(self)

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
        return tuple(task for group in self.groups for task in self.arm(group, self.baseline).tasks)

    @property
    def banner(self) -> str | None:
        """The warning that belongs above every table of single runs; None where each design was run twice or more."""
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
        return {
            "comparisons": [{name: getattr(row, name) for name in JSON_FIELDS} for row in self.rows],
            "scope": self.scope,
            "verdicts": [
                {"group": row.group, "design": row.design, "baseline": row.baseline, **asdict(verdict)}
                for row, verdict in verdicts
            ],
            "recommendations": [asdict(found) for found in self.recommendations],
            "factors": asdict(self.factorial) if self.factorial else None,
            "notes": [*([self.banner] if self.banner else []), *self.notes, *self.excluded],
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
) -> Comparison:
    """Compare every design of a long table with the baseline, group by group.

    Args:
        frame: the long table (`poolwise.results.read`); per-item rows and earlier steps are ignored.
        baseline: the design to compare with; by default the first of the table, and a note says so.
        by: the column that groups tasks, or `all` for one group.
        controls: designs outside the family and the pool; those that the table lacks are noted.
        pool: designs whose runs estimate the run effect together; by default all of the family, `()` only the two.
        margin: half-width of the equivalence region (0–1), fixed before the runs.
        missing: `error` refuses a table with gaps; `drop` leaves out, and lists, each task that a design lacks.
        order: designs in the order in which to list them; the rest follow by name.
        costs: what each design costs to encode, in one unit; where nothing is better, the cheapest is recommended.
        treatments: the designs as a study declares them, for the analysis of factors.

    Raises:
        StatisticsError: unknown baseline or column, fewer than two designs, a task with two metrics, gaps, runs that
            stopped at different steps.
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
    groups, excluded = arms(frame, designs, outside, by, missing)
    lent_by = set(designs if pool is None else pool)
    lenders = [name for name in designs if name in lent_by]
    strictest = alpha / (len(groups) * (len(designs) - 1))
    rows, control_rows = [], []
    for group, group_arms in groups.items():
        base = group_arms[baseline]
        for design in designs[1:]:
            lent = [group_arms[name] for name in lenders if name not in (baseline, design)]
            rows.append(_contrast(base, group_arms[design], lent, margin, alpha, strictest))
        for arm in (group_arms[name] for name in outside if name in group_arms):
            shared = [task for task in base.tasks if task in arm.tasks]
            control_rows.append(_contrast(base.on(shared), arm, (), margin, alpha, alpha))
        sources = len(set(base.sources))
        if sources == 1 < len(base.tasks):
            notes.append(f"{group}: all tasks come from one source, so there is no verdict on designs over tasks.")
        elif 1 < sources < FEW_SOURCES and len(base.seeds) > 1:
            notes.append(
                f"{group}: tasks from {sources} sources tell little of the spread over tasks, and p-values far below "
                f".05 come out too small; a verdict needs {FEW_SOURCES} sources."
            )
        if len(base.tasks) == 1:
            notes.append(f"{group} has one task: there is nothing to test over tasks, so it has no p-value.")
    return Comparison(
        baseline, by, tuple(designs), tuple(outside), tuple(groups), _holm(rows, alpha), tuple(control_rows),
        tuple(arm for group_arms in groups.values() for arm in group_arms.values()),
        alpha, margin, tuple(notes), tuple(excluded),
        tuple(lenders), tuple((costs or {}).items()), tuple(treatments),
    )  # fmt: skip


def _contrast(base: Arm, arm: Arm, lent: Sequence[Arm], margin: float, alpha: float, strictest: float) -> Row:
    """One design against the baseline on the same tasks, at both scopes; Holm and the verdict's word come later."""
    differences = arm.task_means - base.task_means
    n = len(differences)
    shift = stats.hodges_lehmann(differences)
    counts = stats.wins_ties_losses(differences)
    single = len(base.seeds) == len(arm.seeds) == 1
    return Row(
        group=arm.group, design=arm.design, baseline=base.design, n=n,
        difference=shift.estimate, ci_low=shift.ci_low, ci_high=shift.ci_high,
        p_value=stats.signed_rank(differences).p_value if n > 1 else None,
        p_holm=None,
        effect_size=stats.rank_biserial(differences).value if n > 1 else None,
        wins=counts.wins, ties=counts.ties, losses=counts.losses,
        min_reachable_p=stats.min_reachable_p(n),
        tipping_run_sd=stats.one_seed(differences, 0.0, level=1 - alpha).tipping_run_sd if single and n > 1 else None,
        verdict=_verdict(base, arm, lent, margin, alpha, strictest),
    )  # fmt: skip


def _verdict(base: Arm, arm: Arm, lent: Sequence[Arm], margin: float, alpha: float, strictest: float) -> Verdict | None:
    """The design-level contrast; None with one run a side, or with tasks from one source."""
    if min(len(base.seeds), len(arm.seeds)) < 2 or len(set(base.sources)) < 2:
        return None
    shared = base.seeds == arm.seeds
    pool = [x.by_source for x in lent if shared and x.seeds == base.seeds]
    result = stats.crossed(base.by_source, arm.by_source, pool=pool)
    corrected = result
    if result.null:
        corrected = replace(result, level=1 - strictest, critical=result.null.critical(1 - strictest))
    same = stats.equivalence(result, margin, alpha=alpha)
    settled = result.p_value <= strictest or same.equivalent
    fewest, most = (None, None) if settled else stats.seeds_to_settle(corrected, margin)
    return Verdict(
        seeds=len(arm.seeds), baseline_seeds=len(base.seeds), tasks=len(arm.tasks), sources=base.by_source.shape[1],
        difference=result.difference, ci_low=result.ci_low, ci_high=result.ci_high, p_value=result.p_value,
        run_sd=result.run_sd, run_sd_low=result.run_sd_low, run_sd_high=result.run_sd_high,
        scope=result.scope, note=result.note,
        detectable=stats.minimum_detectable_effect(corrected),
        equivalence_low=same.ci_low, equivalence_high=same.ci_high, p_equivalence=same.p_value,
        settle_low=fewest, settle_high=most,
    )  # fmt: skip


def _holm(rows: Sequence[Row], alpha: float) -> tuple[Row, ...]:
    """Holm over the family, at each scope by itself, and the word of each verdict (withheld below `FEW_SOURCES`).

    A contrast that could not be tested keeps its place: it never makes the others easier to pass.
    """
    untested = float("nan")
    checkpoints = stats.holm([untested if row.p_value is None else row.p_value for row in rows])
    designs = stats.holm([row.verdict.p_value if row.verdict else untested for row in rows])
    done = []
    for row, p_checkpoints, p_designs in zip(rows, checkpoints.tolist(), designs.tolist(), strict=True):
        verdict = row.verdict
        if verdict:
            word = "equivalent" if verdict.p_equivalence <= alpha else "inconclusive"
            if p_designs <= alpha:
                word = "better" if verdict.difference > 0 else "worse"
            if verdict.sources < FEW_SOURCES:
                word = "inconclusive"
            verdict = replace(verdict, p_holm=p_designs, verdict=word)
        done.append(replace(row, p_holm=None if row.p_value is None else p_checkpoints, verdict=verdict))
    return tuple(done)
