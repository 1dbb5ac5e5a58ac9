"""What stands beside the main verdicts: overall by declared weights, single runs under a run effect from elsewhere, and
designs at equal cost; tables and sentences."""

from __future__ import annotations

from poolwise.reporting.tables import Table
from poolwise.reporting.wording import (
    above_or_below,
    count,
    decimals,
    detectable_words,
    group_words,
    inner_percent,
    interval,
    number,
    opened,
    outcome,
    outcomes,
    points,
    probability,
)  # fmt: skip
from poolwise.verdicts.arms import FEW_SOURCES
from poolwise.verdicts.budgets import TOLERANCE, TRAINING, Budget, Budgets
from poolwise.verdicts.comparison import Comparison, Overall


def overall(comparison: Comparison) -> Table | None:
    """Contrasts over all task types with declared weights; None without weights."""
    if not comparison.overall:
        return None
    rows = tuple(
        (
            found.design, points(v.difference, 2, True), interval(v.ci_low, v.ci_high), probability(v.p_value),
            probability(v.p_holm), detectable_words(v.detectable), v.verdict,
        )
        for found in comparison.overall
        if (v := found.verdict)
    )  # fmt: skip
    weights = ", ".join(f"{group_words(kind)} {number(weight)}" for kind, weight in comparison.overall[0].weights)
    v = comparison.overall[0].verdict
    head = f"{count(v.tasks, 'task')} from {count(v.sources, 'source')}, {count(v.seeds, 'seed')}"
    note = f"Weights declared before the runs: {weights}. Types are fixed, their tasks random; in Holm's family."
    columns = ("Design", "Difference", f"{comparison.percent} % interval", "p", "p Holm", "Detectable", "Verdict")
    return Table("Overall", columns, ((head, rows),), note)


def given(comparison: Comparison) -> Table | None:
    """Single runs under a run effect known from elsewhere; None without one."""
    known = [(row, row.given) for row in comparison.rows if row.given]
    if not known:
        return None
    sections = []
    for group in comparison.groups:
        rows = tuple(
            (
                row.design, points(found.difference, 2, True), interval(found.ci_low, found.ci_high),
                probability(found.p_value), probability(found.p_holm), found.verdict,
            )
            for row, found in known
            if row.group == group
        )  # fmt: skip
        if rows:
            sections.append(
                (f"{group} · {count(next(g for r, g in known if r.group == group).sources, 'source')}", rows)
            )
    first = known[0][1]
    df = "known exactly" if first.run_df == float("inf") else f"{first.run_df:g} df"
    note = (
        f"Points against {comparison.baseline}, one run each; the run effect, {points(first.run_sd)} ({df}), was "
        "not measured here: these lines stand and fall with it. t by Welch and Satterthwaite, Holm over the family."
    )
    columns = ("Design", "Difference", f"{comparison.percent} % interval", "p", "p Holm", "Verdict")
    return Table("Designs, given a run effect", columns, tuple(sections), note)


def overall_answer(comparison: Comparison) -> tuple[str, str] | None:
    """The answer over all weighted types in one line, and the weights it rests on; None without weights."""
    if not comparison.overall:
        return None
    ordered = sorted(comparison.overall, key=lambda found: -abs(found.verdict.difference))
    words = outcomes(comparison, [(found.design, found.verdict.verdict) for found in ordered])
    weights = ", ".join(f"{group_words(kind)} {number(weight)}" for kind, weight in ordered[0].weights)
    return opened(
        f"{'Exploratory: ' if comparison.exploratory else ''}{words}."
    ), f"By the declared weights: {weights}."


def overall_sentence(comparison: Comparison, found: Overall) -> str:
    """One sentence for a contrast over all task types with declared weights."""
    verdict = found.verdict
    weights = ", ".join(f"{group_words(kind)} {number(weight)}" for kind, weight in found.weights)
    digits = decimals(verdict.difference, verdict.ci_low, verdict.ci_high)
    span = interval(verdict.ci_low, verdict.ci_high, digits)
    context = f"{count(verdict.tasks, 'task')} from {count(verdict.sources, 'source')}, {count(verdict.seeds, 'seed')}"
    pair = f"{found.design} and {found.baseline}"
    start = f"Overall, by the declared weights ({weights}),"
    if verdict.verdict == "inconclusive":
        pair = f"{found.design} against {found.baseline}"
        return f"{start} {pair} is inconclusive: differences from {span} points are compatible ({context})."
    if verdict.verdict == "equivalent":
        low, high = verdict.equivalence_low, verdict.equivalence_high
        inner = interval(low, high, decimals(low, high, comparison.margin - max(-low, high)))
        margin = points(comparison.margin, 1)
        level = inner_percent(comparison)
        return f"{start} {pair} are equivalent within ±{margin} points ({level} % interval {inner}; {context})."
    return (
        f"{start} {found.design} scores {above_or_below(verdict.difference, digits)} {found.baseline} "
        f"({comparison.percent} % interval {span}; {context})."
    )


def reason(comparison: Comparison, group: str) -> str:
    """What an answer without a winner rests on: the largest difference, its interval, and what a verdict would need."""
    rows = [row for row in comparison.rows if row.group == group]
    base = comparison.arm(group, comparison.baseline)
    if comparison.interim or len(base.tasks) < 2 or any(outcome(comparison, row) == "better" for row in rows):
        return ""
    row = max(rows, key=lambda row: abs((row.verdict or row).difference))
    shown = row.verdict or row
    digits = decimals(shown.difference, shown.ci_low, shown.ci_high)
    size = above_or_below(shown.difference, digits)
    said = f"Largest difference: {row.design}, {size} {row.baseline}"
    span = interval(shown.ci_low, shown.ci_high, digits)
    said += f" ({comparison.percent} % interval {span})." if span != "unbounded" else "."
    sources = base.by_source.shape[1]
    if len(base.seeds) > 1 and sources < FEW_SOURCES:
        said += f" A verdict on designs needs tasks from {FEW_SOURCES} sources; here {'is' if sources == 1 else 'are'} "
        said += f"{sources}."
    return said


def equal_cost(found: Budgets | None, comparison: Comparison) -> Table | None:
    """Every contrast at equal cost, by kind of cost and group; None where there is none."""
    if found is None or not found.rows:
        return None
    sections = []
    for kind in dict.fromkeys(row.kind for row in found.rows):
        for group in comparison.groups:
            rows = tuple(_cells(row) for row in found.rows if (row.kind, row.group) == (kind, group))
            if rows:
                sections.append((f"{group} · equal {kind}", rows))
    note = (
        f"Points, exploratory: Benjamini–Hochberg over {len(found.rows)} contrasts, no stars. Equal training cost: the "
        "dearer one at the share of its steps at which it has spent what the other spends in all, between evaluated "
        "checkpoints; its schedule was not finished there, which speaks against it. Equal encode cost: within "
        f"{100 * TOLERANCE:.0f} %."
    )
    columns = ("Design", "Against", "At", "Difference", f"{comparison.percent} % interval", "p", "p BH")
    return Table("At equal cost", columns, tuple(sections), note, 3)


def _cells(row: Budget) -> tuple[str, ...]:
    if row.kind == TRAINING:
        at = f"{row.stopped} at {100 * (row.at or 0):.0f} % of its steps"
    else:
        at = f"costs {100 * (row.apart or 0):.1f} % apart"
    return (
        row.design, row.against, at, points(row.difference, 2, True), interval(row.ci_low, row.ci_high),
        probability(row.p_value), probability(row.p_bh),
    )  # fmt: skip
