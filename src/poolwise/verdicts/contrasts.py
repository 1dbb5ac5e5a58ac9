"""One design against the baseline in one group of tasks, at the scope of checkpoints and at the scope of designs.

A comparison (`verdicts.comparison`) consists of `Row`s; the tests are those of `poolwise.stats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from poolwise import stats
from poolwise.stats.crossed import Crossed
from poolwise.stats.variance import TaskTypes, run_mean_square
from poolwise.verdicts.arms import FEW_SOURCES, Arm

Elsewhere = Mapping[str, Mapping[str, float]]
"""Group -> design -> how much its runs vary there (`stats.variance.run_mean_square`)."""


@dataclass(frozen=True)
class Rules:
    """How contrasts are tested, fixed before the runs.

    `margin`: half-width of the equivalence region (0–1). `alpha`: level of each test (.03 at each of two declared
    looks). `family`: the number of contrasts that Holm's correction spans. `interim`: runs are missing, so nothing is
    tested. `run_sd`, `run_df`: the run effect (0–1) from another study and its degrees of freedom, for designs that
    were run once. `cautious`: as in `stats.crossed`.
    """

    margin: float
    alpha: float
    family: int
    interim: bool = False
    run_sd: float | None = None
    run_df: float = float("inf")
    cautious: bool = False

    @property
    def level(self) -> float:
        """Level of the intervals."""
        return 1 - self.alpha

    @property
    def strictest(self) -> float:
        """Alpha of Holm's first step."""
        return self.alpha / self.family


@dataclass(frozen=True)
class Verdict:
    """The contrast of two designs (scope: designs), in scores 0–1.

    `difference` is the mean over runs and sources, with its interval at 1 − alpha (95 %); `equivalence_low/high` is the
    interval at 1 − 2 alpha (90 %), which lies inside ±margin exactly when the two one-sided tests (`p_equivalence`)
    show that the designs are equivalent.
    `se` is its standard error, `run_sd` the sd of the effect of one run on the mean over tasks, with its own interval.
    `detectable` is the true difference that these runs and tasks detect with 80 % power after correction for the family
    (its first step).
    `settle_low` to `settle_high` seeds per design would detect a true difference of `settle_for`, if the contrast is
    open: a range, as the run effect is uncertain; None: no number up to 50 would, it takes more tasks. `settle_for` is
    the margin, or the difference found where only the correction stands between it and a verdict.
    `new_task_low/high` is the interval for the difference on one further task like these, `better_on_new` the chance
    that it exceeds the margin; None for a mechanism, whose columns are items.
    `verdict`: better, worse (p_holm at most alpha), equivalent, inconclusive; withheld if it would be one of the first
    three but there are `missing_sources` too few sources to trust it; `none` for controls.
    """

    seeds: int
    baseline_seeds: int
    tasks: int
    sources: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    se: float
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
    settle_for: float | None = None
    new_task_low: float | None = None
    new_task_high: float | None = None
    better_on_new: float | None = None
    missing_sources: int = 0
    p_holm: float | None = None
    verdict: str = "none"

    @property
    def by_runs(self) -> bool:
        """Whether runs, not tasks or items, make most of the variance of the difference."""
        return self.run_sd**2 * (1 / self.seeds + 1 / self.baseline_seeds) > self.se**2 / 2


@dataclass(frozen=True)
class Given:
    """The contrast of two designs from single runs, given the run effect of another study: the sd `run_sd` of one run's
    effect on a mean over such tasks, with `run_df` degrees of freedom (scores 0–1; tasks of one source averaged first).
    `verdict` and `missing_sources` as in `Verdict`.
    """

    run_sd: float
    run_df: float
    tasks: int
    sources: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    missing_sources: int = 0
    p_holm: float | None = None
    verdict: str = "inconclusive"


@dataclass(frozen=True)
class Overall:
    """One design against the baseline over all task types that have a declared weight; `weights` sum to 1."""

    design: str
    baseline: str
    weights: tuple[tuple[str, float], ...]
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    """One contrast of one group (scope: checkpoints), with the verdict on designs if the runs allow one.

    `difference` is design − baseline (Hodges–Lehmann over `n` sources, the tasks of a source and seeds averaged);
    unbounded ends are None. `wins`, `ties` and `losses` are sources too, `tasks` is the number of tasks. On a single
    task `n` counts items, and single runs are compared by the mean difference and Student's t over them.
    `p_value`, `p_holm` and `effect_size` are None if there is only one source, or if runs are still missing.
    `single`: one run on either side. Then `tipping_run_sd` is the largest run effect at which the mean difference would
    still be significant at the step of Holm's correction at which the row is; None if the row is not significant.
    `given`: the contrast of the designs under a run effect from another study.
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
    tasks: int
    single: bool = False
    tipping_run_sd: float | None = None
    verdict: Verdict | None = None
    given: Given | None = None


def contrast(base: Arm, arm: Arm, lent: Sequence[Arm], rules: Rules, elsewhere: Elsewhere | None = None) -> Row:
    """One design against the baseline on the same tasks, at both scopes; `corrected` adds Holm's p and the word.

    lent: further designs of the group, whose runs help to estimate the run effect. elsewhere: how much the runs of the
    designs vary in other groups.
    """
    differences = _over_sources(base, arm)
    n = len(differences)
    # Rank tests over items do not keep their level (docs/compare.md), so items have no ranked contrast.
    ranked = arm.unit == "task"
    tested = ranked and n > 1 and not rules.interim
    single = len(base.seeds) == len(arm.seeds) == 1
    difference, ci_low, ci_high = arm.mean - base.mean, None, None
    over_items = None
    if arm.unit not in ("task", "item") and single and n > 1 and not rules.interim:
        over_items = stats.one_seed(differences, 0, level=rules.level)
        ci_low, ci_high = over_items.ci_low, over_items.ci_high
    if ranked:
        shift = stats.hodges_lehmann(differences, rules.level)
        difference = shift.estimate
        ci_low, ci_high = (None, None) if rules.interim else (shift.ci_low, shift.ci_high)
    counts = stats.wins_ties_losses(differences)
    return Row(
        group=arm.group, design=arm.design, baseline=base.design, n=n,
        difference=difference, ci_low=ci_low, ci_high=ci_high,
        p_value=over_items.p_value if over_items else stats.signed_rank(differences) if tested else None,
        p_holm=None,
        effect_size=stats.rank_biserial(differences) if tested else None,
        wins=counts.wins, ties=counts.ties, losses=counts.losses,
        min_reachable_p=stats.min_reachable_p(n), tasks=len(arm.whole().tasks), single=single,
        verdict=None if rules.interim else _verdict(base, arm, lent, rules, elsewhere),
        given=_given(base, arm, rules) if single and tested else None,
    )  # fmt: skip


def _over_sources(base: Arm, arm: Arm) -> NDArray[np.float64]:
    """(sources,) design − baseline, seeds and the tasks of a source averaged; of a mechanism one for each item."""
    if arm.unit == "item":
        return arm.task_means - base.task_means
    return np.asarray(arm.by_source.mean(axis=0) - base.by_source.mean(axis=0))


def run_squares(groups: Mapping[str, Mapping[str, Arm]], designs: Sequence[str]) -> Elsewhere:
    """Group -> design -> its run mean square, for the groups in which all designs have the same seeds, two or more."""
    found: dict[str, dict[str, float]] = {}
    for group, arms in groups.items():
        mine = [arms[name] for name in designs]
        if len({arm.seeds for arm in mine}) == 1 and len(mine[0].seeds) > 1 and not mine[0].of_own_task:
            types = TaskTypes.one(mine[0].by_source.shape[1])
            found[group] = {arm.design: run_mean_square(arm.by_source, types) for arm in mine}
    return found


def elsewhere_of(squares: Elsewhere | None, group: str, designs: Sequence[str]) -> NDArray[np.float64] | None:
    """(groups, designs) run mean squares in the other groups than `group`; None if there are none."""
    rows = [[by[name] for name in designs] for other, by in (squares or {}).items() if other != group]
    rows = [row for row in rows if any(row)]
    return np.array(rows) if rows else None


def _verdict(
    base: Arm, arm: Arm, lent: Sequence[Arm], rules: Rules, elsewhere: Elsewhere | None = None
) -> Verdict | None:
    """The contrast of the designs; None with one run on either side, or with tasks from one source."""
    if min(len(base.seeds), len(arm.seeds)) < 2 or len(set(base.sources)) < 2:
        return None
    lenders = [x for x in lent if base.seeds == arm.seeds == x.seeds]
    names = [base.design, arm.design, *(x.design for x in lenders)]
    known = elsewhere_of(elsewhere, arm.group, names) if lenders and not arm.of_own_task else None
    pool = [x.by_source for x in lenders]
    result = stats.crossed(
        base.by_source, arm.by_source, pool=pool, level=rules.level, elsewhere=known, cautious=rules.cautious
    )
    return _described(result, base, arm, len(arm.whole().tasks), rules)


def _described(result: Crossed, base: Arm, arm: Arm, tasks: int, rules: Rules) -> Verdict:
    """The verdict without Holm's p and its word; its power is that of the strictest step of Holm's correction."""
    strictest = result
    if result.null:
        level = 1 - rules.strictest
        strictest = replace(result, level=level, critical=result.null.critical(level))
    same = stats.equivalence(result, rules.margin, alpha=rules.alpha)
    settled = result.p_value <= rules.strictest or same.equivalent
    found = abs(result.difference) if not result.ci_low <= 0 <= result.ci_high else 0.0
    aim = max(found, rules.margin)
    fewest, most = (None, None) if settled else stats.seeds_to_settle(strictest, aim)
    new = None if arm.unit != "task" else stats.one_new_task(result, rules.margin)
    return Verdict(
        seeds=len(arm.seeds), baseline_seeds=len(base.seeds), tasks=tasks, sources=result.tasks,
        difference=result.difference, ci_low=result.ci_low, ci_high=result.ci_high, p_value=result.p_value,
        se=result.se, run_sd=result.run_sd, run_sd_low=result.run_sd_low, run_sd_high=result.run_sd_high,
        scope=result.scope, note=result.note,
        detectable=stats.minimum_detectable_effect(strictest),
        equivalence_low=same.ci_low, equivalence_high=same.ci_high, p_equivalence=same.p_value,
        settle_low=fewest, settle_high=most, settle_for=None if settled else aim,
        new_task_low=new.low if new else None, new_task_high=new.high if new else None,
        better_on_new=new.chance if new else None,
    )  # fmt: skip


def _given(base: Arm, arm: Arm, rules: Rules) -> Given | None:
    """The contrast of the designs under a run effect from another study; None without one, or with a single source."""
    if rules.run_sd is None or base.by_source.shape[1] < 2:
        return None
    differences = (arm.by_source - base.by_source)[0]
    result = stats.one_seed(differences, rules.run_sd, rules.run_df, rules.level)
    return Given(
        rules.run_sd, rules.run_df, len(arm.tasks), result.tasks, result.difference, result.ci_low, result.ci_high,
        result.p_value,
    )  # fmt: skip


def overall(
    groups: Mapping[str, Mapping[str, Arm]], baseline: str, design: str, lent: Sequence[str],
    weights: Mapping[str, float], rules: Rules, elsewhere: Elsewhere,
) -> Overall:  # fmt: skip
    """The contrast over all weighted task types: types are fixed, the sources within a type are random.

    Raises:
        StatisticsError: a type has one source, or a design one run.
    """
    kinds = [group for group in groups if group in weights]
    lent = [name for name in lent if name not in (baseline, design)]
    joined = {
        name: np.concatenate([groups[kind][name].by_source for kind in kinds], axis=1)
        for name in dict.fromkeys([baseline, design, *lent])
    }
    base, arm = groups[kinds[0]][baseline], groups[kinds[0]][design]
    types = [kind for kind in kinds for _ in range(groups[kind][baseline].by_source.shape[1])]
    lenders = [name for name in lent if base.seeds == arm.seeds == groups[kinds[0]][name].seeds]
    pool = [joined[name] for name in lenders]
    known = elsewhere_of(elsewhere, "", [baseline, design, *lenders]) if lenders else None
    result = stats.crossed_overall(joined[baseline], joined[design], types, weights, pool, rules.level, known)
    total = sum(weights[kind] for kind in kinds)
    tasks = sum(len(groups[kind][baseline].tasks) for kind in kinds)
    return Overall(
        design, baseline, tuple((kind, weights[kind] / total) for kind in kinds),
        _described(result, base, arm, tasks, rules),
    )  # fmt: skip


def corrected(
    rows: Sequence[Row], overalls: Sequence[Overall], alpha: float
) -> tuple[tuple[Row, ...], tuple[Overall, ...]]:
    """Holm over the family, separately at each scope, and the word of each verdict.

    Overall contrasts belong to the family of the designs.
    """
    untested = float("nan")  # it keeps its place in the family, so that it never makes the others easier to pass
    checkpoints = stats.holm([untested if row.p_value is None else row.p_value for row in rows])
    p = [row.verdict.p_value if row.verdict else untested for row in rows]
    designs = stats.holm([*p, *(contrast.verdict.p_value for contrast in overalls)]).tolist()
    known = stats.holm([row.given.p_value if row.given else untested for row in rows]).tolist()
    done = []
    for row, p_checkpoints, p_designs, p_given in zip(rows, checkpoints.tolist(), designs, known, strict=False):
        verdict, given = row.verdict, row.given
        if verdict:
            verdict = _worded(verdict, p_designs, alpha)
        if given:
            word = ("better" if given.difference > 0 else "worse") if p_given <= alpha else "inconclusive"
            word, lacking = withheld(word, given.sources)
            given = replace(given, p_holm=p_given, verdict=word, missing_sources=lacking)
        p_checkpoints = None if row.p_value is None else p_checkpoints
        done.append(replace(row, p_holm=p_checkpoints, verdict=verdict, given=given))
    last = [
        replace(contrast, verdict=_worded(contrast.verdict, q, alpha))
        for contrast, q in zip(overalls, designs[len(rows) :], strict=True)
    ]
    return tuple(done), tuple(last)


def _worded(verdict: Verdict, p_holm: float, alpha: float) -> Verdict:
    word = "equivalent" if verdict.p_equivalence <= alpha else "inconclusive"
    if p_holm <= alpha:
        word = "better" if verdict.difference > 0 else "worse"
    word, lacking = withheld(word, verdict.sources)
    return replace(verdict, p_holm=p_holm, verdict=word, missing_sources=lacking)


def withheld(word: str, sources: int) -> tuple[str, int]:
    """(word, sources that are missing): below `FEW_SOURCES` every verdict but inconclusive is withheld."""
    lacking = max(FEW_SOURCES - sources, 0) if word != "inconclusive" else 0
    return ("withheld" if lacking else word), lacking


def tipped(
    rows: Sequence[Row], groups: Mapping[str, Mapping[str, Arm]], alpha: float
) -> tuple[Row, ...]:  # fmt: skip
    """The rows with the tipping point of each significant contrast of single runs, at its own step of Holm."""
    p = np.array([np.inf if row.p_value is None else row.p_value for row in rows])
    place = np.argsort(np.argsort(p, kind="stable"), kind="stable")
    done = []
    for row, rank in zip(rows, place.tolist(), strict=True):
        if row.single and row.p_holm is not None and row.p_holm <= alpha:
            arms = groups[row.group]
            differences = _over_sources(arms[row.baseline], arms[row.design])
            level = 1 - alpha / (len(rows) - rank)
            row = replace(row, tipping_run_sd=stats.one_seed(differences, 0, level=level).tipping_run_sd)
        done.append(row)
    return tuple(done)


def thin_groups(groups: Mapping[str, Mapping[str, Arm]], baseline: str) -> list[str]:
    """A sentence for each limitation that comes from few tasks, few sources or two seeds, with the groups concerned."""
    bases = [arms[baseline] for arms in groups.values()]
    alone = [base.group for base in bases if len(base.tasks) == 1]
    sources = {base.group: len(set(base.sources)) for base in bases if len(base.tasks) > 1}
    one = [group for group, n in sources.items() if n == 1]
    few = [f"{b.group} ({sources[b.group]})" for b in bases
           if 1 < sources.get(b.group, 0) < FEW_SOURCES and len(b.seeds) > 1]  # fmt: skip
    notes = []
    if one:
        notes.append(
            f"{', '.join(one)}: all tasks come from one source, so nothing can be tested over sources; the difference "
            "is that of this one."
        )
    if few:
        notes.append(
            f"{', '.join(few)}: so few sources measure the spread over tasks badly, and p-values far below .05 come "
            f"out too small; a verdict needs {FEW_SOURCES} sources."
        )
    if alone:
        notes.append(f"{', '.join(alone)}: there is one task, so nothing can be tested over tasks and p is missing.")
    if any(len(base.seeds) == 2 for base in bases):
        notes.append(
            "Two seeds measure the run effect badly: when stored runs of one design were split into groups of two, the "
            "groups differed at p < .05 in 8 % of splits, and on at least one mechanism after Holm in up to 20 % (with "
            "three seeds 4 to 7 % and 6 to 10 %). Confirm with three or more."
        )
    return notes


def usable_weights(
    groups: Mapping[str, Mapping[str, Arm]],
    designs: Sequence[str],
    by: str,
    weights: Mapping[str, float] | None,
    interim: str,
) -> tuple[dict[str, float], list[str]]:
    """The declared weights that an overall verdict can use, none if there can be no such verdict; and notes on why.

    Types are fixed, so the spread over sources must be estimated within each: two sources per type, and in total as
    many degrees of freedom as `FEW_SOURCES` sources of one type have.
    """
    groups = {group: arms for group, arms in groups.items() if arms[designs[0]].unit == "task"}
    if by != "task_type" or len(groups) < 2 or interim:
        return {}, []
    runs = [len(arm.seeds) for by_design in groups.values() for name, arm in by_design.items() if name in designs]
    if min(runs) < 2:
        return {}, []
    if not weights:
        return {}, ["No overall verdict: it needs weights of the task types ([type_weights] in the study file)."]
    kept = {group: weights[group] for group in groups if group in weights}
    notes = []
    if ignored := [name for name in weights if name not in groups]:
        notes.append(f"type_weights: no task is of type {', '.join(ignored)}.")
    if unweighted := [group for group in groups if group not in weights]:
        notes.append(f"Without weight in the overall verdict: {', '.join(unweighted)}.")
    arms = [groups[group][designs[0]] for group in kept]
    sources = [arm.by_source.shape[1] for arm in arms]
    if not arms:
        return {}, notes
    if min(sources) < 2 or sum(sources) - len(sources) < FEW_SOURCES - 1:
        thin = ", ".join(f"{arm.group} {n}" for arm, n in zip(arms, sources, strict=True))
        return {}, [*notes, f"No overall verdict: too few sources within the weighted types ({thin})."]
    return kept, notes
