"""What follows from the contrasts, in words, tables and pictures: the choice of a design, the overall contrast, single
runs under a run effect from another study, all pairs and the leaderboard, items of one data set, designs at equal cost,
and the front of quality over cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from poolwise.reports import plots
from poolwise.reports.tables import Cells, Table, sections
from poolwise.reports.words import (
    count,
    detectable_words,
    group_words,
    interval,
    listing,
    magnitude,
    number,
    outcome,
    points,
    probability,
    sample_words,
    verdict_claim,
)
from poolwise.verdicts.arms import FEW_SOURCES
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Overall, Row
from poolwise.verdicts.costs import PRICED_TOKENS, TOLERANCE, TRAINING, Budget, Point
from poolwise.verdicts.findings import BASELINE, BETTER, LEXICAL, Findings, Recommendation
from poolwise.verdicts.items import Paired
from poolwise.verdicts.leaderboard import Pairs, Place, word_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def recommended(findings: Findings) -> tuple[Recommendation, ...]:
    """The recommendations to print; none if the summary states that exploratory verdicts carry none."""
    return () if findings.exploratory else findings.recommendations


def advice(comparison: Comparison, recommendation: Recommendation) -> str:
    """Which design to use for a group, why, and how far to trust that."""
    base, design = comparison.baseline, recommendation.design
    if recommendation.reference:
        return (
            f"No recommendation: every design scores below {recommendation.reference} "
            f"({points(recommendation.reference_score, 1)} against {points(recommendation.best_score, 1)} for the best "
            "design)."
        )
    if design is None:
        speaks = _nothing_speaks if recommendation.judged else _unjudged
        return f"No choice from this: {speaks(comparison, recommendation)}."
    others = listing([name for name in comparison.designs if name not in (base, *LEXICAL)] or ["none"])
    if recommendation.basis == BETTER:
        several = len(comparison.designs) > 2
        why = f"the best of the designs that score above {base} after Holm" if several else f"which scores above {base}"
        text = f"Recommended: {design}, {why}."
    elif recommendation.basis == BASELINE:
        text = f"Recommended: {base}, as {others} {'is' if ' ' not in others else 'are'} shown to score below it."
    else:
        cheapest = "the cheapest to encode of those not shown to be worse"
        text = f"Recommended: {design}, {cheapest}, as no design is shown to score above {base}."
    if recommendation.basis == BETTER and recommendation.relative_cost:
        text += f" It encodes at {number(recommendation.relative_cost)} × the cost of {base}."
    if recommendation.stays is not None:
        same = round(recommendation.stays * recommendation.folds)
        text += (
            f" Leaving out one source at a time gives the same choice in {same} of {recommendation.folds} folds; "
            f"expected regret {points(recommendation.expected_regret)} points."
        )
    return text


def _nothing_speaks(comparison: Comparison, recommendation: Recommendation) -> str:
    """Why no design is chosen: none is better, and none costs less."""
    shown = f"no design is shown to score above {comparison.baseline}"
    if recommendation.as_cheap:
        return f"{shown}, and {listing(recommendation.as_cheap)} cost the same to encode, the others more"
    known = "none costs less to encode" if getattr(comparison, "costs", ()) else "costs are unknown"
    return f"{shown}, and {known}"


def _unjudged(comparison: Comparison, recommendation: Recommendation) -> str:
    """Why a group has no verdicts on designs to choose by, and what its checkpoints are good for."""
    if comparison.exploratory:
        return "its verdicts are exploratory"
    rows = [row for row in comparison.rows if row.group == recommendation.group]
    if any(row.single for row in rows):
        words = {row.design: outcome(comparison, row) for row in rows}
        above, below = ([name for name in words if words[name] == word] for word in ("better", "worse"))
        claims = [f"{listing(above)} scored above {comparison.baseline}"] if above else []
        claims += [f"{comparison.baseline} above {listing(below)}" if above else
                   f"{comparison.baseline} scored above {listing(below)}"] if below else []  # fmt: skip
        deploy = f"; if you deploy these very checkpoints, {' and '.join(claims)}" if claims else ""
        return f"its designs were run once{deploy}"
    sources = comparison.arm(recommendation.group, comparison.baseline).by_source.shape[1]
    return f"a verdict takes {FEW_SOURCES} sources of tasks, and here {'is' if sources == 1 else 'are'} {sources}"


def overall_sentence(comparison: Comparison, overall: Overall) -> str:
    """One sentence for a contrast over all task types with declared weights."""
    verdict = overall.verdict
    sample = f"{count(verdict.tasks, 'task')} from {count(verdict.sources, 'source')}, {count(verdict.seeds, 'seed')}"
    claim = verdict_claim(comparison, (overall.design, overall.baseline), verdict, sample)
    return f"Overall, by the declared weights ({weight_words(overall)}), {claim}"


def weight_words(overall: Overall) -> str:
    """`retrieval .75, STS .25`."""
    return ", ".join(f"{group_words(kind)} {number(weight)}" for kind, weight in overall.weights)


def overall(comparison: Comparison) -> Table | None:
    """Contrasts over all task types with declared weights; None without weights."""
    if not comparison.overall:
        return None
    rows = tuple(
        (
            contrast.design, points(v.difference, 2, True), interval(v.ci_low, v.ci_high), probability(v.p_value),
            probability(v.p_holm), detectable_words(v.detectable), v.verdict,
        )
        for contrast in comparison.overall
        if (v := contrast.verdict)
    )  # fmt: skip
    first = comparison.overall[0]
    v = first.verdict
    head = f"{count(v.tasks, 'task')} from {count(v.sources, 'source')}, {count(v.seeds, 'seed')}"
    note = (
        f"Weights declared before the runs: {weight_words(first)}. Types are fixed, their tasks random; part of the "
        "family of Holm's correction."
    )
    columns = ("Design", "Difference", f"{comparison.percent} % interval", "p", "p Holm", "Detectable", "Verdict")
    return Table("Overall", columns, ((head, rows),), note)


PAPER_ALPHA = 0.05
"""Level of the stars of arXiv 2409.02727."""


def paper_terms(comparison: Comparison) -> Table | None:
    """The table as arXiv 2409.02727 prints it, from the same scores: means of the baseline by group, differences of the
    means, a star where the Wilcoxon test over tasks has p < .05, two-sided and uncorrected. None without such a test.
    """
    groups = [group for group in comparison.groups if not comparison.of_items(group)]
    tested = [row for row in comparison.rows if row.group in groups and row.tasks > 1 and not comparison.interim]
    if not tested:
        return None

    def cell(group: str, design: str) -> str:
        arm, base = comparison.arm(group, design), comparison.arm(group, comparison.baseline)
        p = comparison.p_over_tasks(group, design)
        star = "*" if len(arm.tasks) > 1 and not comparison.interim and p < PAPER_ALPHA else ""
        return number(arm.mean - base.mean, 4, True) + star

    first = [number(comparison.arm(group, comparison.baseline).mean, 4) for group in groups]
    body = ((comparison.baseline, *first), *((d, *(cell(g, d) for g in groups)) for d in comparison.designs[1:]))
    note = (
        f"Mean scores of {comparison.baseline}, 0 to 1, and differences of the means from it, seeds averaged. "
        "* p < .05 in the exact two-sided Wilcoxon signed-rank test over tasks, not corrected: in "
        f"{count(len(tested), 'test')}, {number(PAPER_ALPHA * len(tested), 1)} stars are expected where nothing "
        "differs. They are about these checkpoints."
    )
    return Table("In the paper's terms", ("Design", *groups), (("", body),), note)


def given(comparison: Comparison) -> Table | None:
    """Single runs under a run effect from another study; None without one."""
    known = [(row, row.given) for row in comparison.rows if row.given]
    if not known:
        return None

    def heading(group: str) -> str:
        return f"{group} · {count(next(g for row, g in known if row.group == group).sources, 'source')}"

    body = sections(
        comparison.groups,
        lambda group: [
            (
                row.design, points(g.difference, 2, True), interval(g.ci_low, g.ci_high),
                probability(g.p_value), probability(g.p_holm), g.verdict,
            )
            for row, g in known
            if row.group == group
        ],
        heading,
    )  # fmt: skip
    first = known[0][1]
    df = "known exactly" if first.run_df == float("inf") else f"{first.run_df:g} df"
    note = (
        f"Points against {comparison.baseline}, one run each. The run effect, {points(first.run_sd)} ({df}), was not "
        "measured here: these results are only as good as that number. t by Welch and Satterthwaite, Holm over the "
        "family."
    )
    columns = ("Design", "Difference", f"{comparison.percent} % interval", "p", "p Holm", "Verdict")
    return Table("Designs, given a run effect", columns, body, note)


def all_pairs(pairs: Pairs) -> Table:
    """Every contrast of every two designs."""
    designs = pairs.scope == "designs"

    def cells(row: Row) -> Cells:
        shown = row.verdict or row
        return (
            row.design, row.baseline, points(shown.difference, 2, True), interval(shown.ci_low, shown.ci_high),
            probability(shown.p_value), probability(shown.p_holm), word_of(row, pairs.alpha),
        )  # fmt: skip

    body = sections(pairs.groups, lambda group: [cells(row) for row in pairs.rows if row.group == group])
    claim = "for runs and tasks like these" if designs else "seeds averaged: the claims are about these checkpoints"
    note = (
        f"Points, design − against, tasks of a source averaged, {claim}; Holm over all {count(pairs.family, 'pair')}."
    )
    columns = ("Design", "Against", "Difference", "95 % interval", "p", "p Holm", "Verdict")
    return Table("All pairs", columns, body, note, 2)


def leaderboard(pairs: Pairs) -> Table:
    """The designs of each group in order, with their rank intervals and the groups that are not told apart."""

    def cells(place: Place) -> Cells:
        ranks = str(place.rank_low) if place.rank_low == place.rank_high else f"{place.rank_low} to {place.rank_high}"
        return place.design, points(place.mean), str(place.runs), ranks, place.tied

    def heading(group: str) -> str:
        rows = [row for row in pairs.rows if row.group == group]
        apart = sum(word_of(row, pairs.alpha) in ("better", "worse") for row in rows)
        smallest = "" if rows[0].verdict else f"; smallest reachable p {probability(rows[0].min_reachable_p)}"
        told = f"{apart} of {count(len(rows), 'pair')} told apart"
        return f"{group} · {sample_words(rows[0].tasks, rows[0].n)}; {told}{smallest}"

    body = sections(
        pairs.groups, lambda group: [cells(place) for place in pairs.places if place.group == group], heading
    )
    note = (
        "In the order of the means over sources, ×100. Rank: 1 + the designs shown to score above it, to the number of "
        "designs less those shown to score below it. Neighbours that share a letter are not told apart. "
        f"Holm over all {count(pairs.family, 'pair')}, "
        + ("for runs and tasks like these." if pairs.scope == "designs" else "about these checkpoints.")
    )
    return Table("Leaderboard", ("Design", "Mean", "Runs", "Rank", "Tied"), body, note)


def paired(pairs: Sequence[Paired]) -> Table:
    """Comparisons of items: the scores of both systems and their difference in points."""
    body = tuple(
        (
            pair.task, pair.metric, pair.design, pair.baseline, points(pair.score), points(pair.baseline_score),
            points(pair.difference, sign=True), interval(pair.ci_low, pair.ci_high), f"{pair.n:,}",
            probability(pair.p_value), probability(pair.p_holm), pair.test,
        )
        for pair in pairs
    )  # fmt: skip
    columns = ("task", "metric", "design", "baseline", "score", "baseline's", "difference", "95 % interval", "n", "p",
               "Holm p", "test")  # fmt: skip
    return Table("", columns, (("", body),), text=4)


def equal_cost(findings: Findings) -> Table | None:
    """Every contrast at equal cost, by kind of cost and group; None if there are none."""
    rows = findings.budgets.rows if findings.budgets else ()
    if not rows:
        return None
    body = tuple(
        (f"{group} · equal {kind}", cells)
        for kind in dict.fromkeys(row.kind for row in rows)
        for group in findings.groups
        if (cells := tuple(_cells(row) for row in rows if (row.kind, row.group) == (kind, group)))
    )
    note = (
        f"Points, exploratory: Benjamini–Hochberg over {count(len(rows), 'contrast')}, no stars. Equal training cost: "
        "the more expensive design at the share of its steps at which it has spent the total of the other, "
        "interpolated between evaluated checkpoints; its schedule was not finished there, which is to its "
        f"disadvantage. Equal encode cost: within {100 * TOLERANCE:.0f} %."
    )
    columns = ("Design", "Against", "At", "Difference", f"{findings.percent} % interval", "p", "p BH")
    return Table("At equal cost", columns, body, note, 3)


def _cells(row: Budget) -> Cells:
    at = f"costs {100 * (row.apart or 0):.1f} % apart"
    if row.kind == TRAINING:
        at = f"{row.stopped} at {100 * (row.at or 0):.0f} % of its steps"
    return (
        row.design, row.against, at, points(row.difference, 2, True), interval(row.ci_low, row.ci_high),
        probability(row.p_value), probability(row.p_bh),
    )  # fmt: skip


# Pixels: the height of a label, the height of the axes, the margin to their left; and the letters shown of a name.
LABEL, HEIGHT, MARGIN, LETTERS = 14.0, 170.0, 44.0, 20
FLAT = 4.0  # costs that differ by less than this factor are drawn on a linear scale


def front_table(fronts: Mapping[str, Sequence[Point]], baseline: str) -> Table | None:
    """The front of quality over cost in numbers; None without costs."""

    def rows(group: str) -> list[Cells]:
        base = next((point.cost for point in fronts[group] if point.design == baseline), None)
        return [
            (
                point.design, magnitude(point.cost), f"{point.cost / base:.3f}" if base else "–", points(point.mean),
                "–" if point.low is None else interval(point.low, point.high), "on the front" if point.front else "–",
            )
            for point in fronts[group]
        ]  # fmt: skip

    note = (
        f"Encode cost of one text of {PRICED_TOKENS} tokens. The front, by means: no other design scores as high at no "
        "more cost. 95 % interval of the mean over runs (t, variance between runs pooled over the designs); the tasks "
        "are taken as given."
    )
    columns = ("Design", "FLOPs per text", "× baseline", "Mean", "95 % run interval", "Front")
    return Table("Quality and cost", columns, sections(fronts, rows), note) if fronts else None


def front_panels(fronts: Mapping[str, Sequence[Point]], baseline: str) -> list[plots.Panel]:
    """Mean score over encode cost with the interval of the runs; the front and the baseline are labelled."""
    return [_panel(group, rows, baseline) for group, rows in fronts.items()]


def _panel(group: str, rows: Sequence[Point], baseline: str) -> plots.Panel:
    costs = [point.cost for point in rows]
    log = max(costs) > FLAT * min(costs)
    x = [float(value) for value in (np.log10(costs) if log else costs)]
    right = x[-1] + (0.06 * (x[-1] - x[0]) or 0.05 * x[-1])
    names = [p.design if len(p.design) <= LETTERS else p.design[: LETTERS - 1] + "…" for p in rows]
    named = [i for i, p in enumerate(rows) if p.front or p.design == baseline]
    width = plots.WIDTH - MARGIN - plots.RIGHT
    # Names end at their points, so the scale must start far enough to the left for the longest of them.
    room = (plots.LETTER * max(len(names[i]) for i in named) + 12) / width
    left = (x[0] - room * right) / (1 - room)
    low, high = plots.padded([100 * value for p in rows for value in (p.mean, p.low, p.high) if value is not None])
    high += LABEL / HEIGHT * (high - low)
    across, up = (right - left) / width, (high - low) / HEIGHT  # one pixel in data units

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: magnitude(10**v if log else v) if log or v else "0"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plots.tick(v, axes.get_yticks(), False)))
        axes.tick_params(axis="y", labelcolor=plots.MUTED, labelsize=11, pad=5)
        axes.grid(color=plots.RULE, linewidth=0.7)
        axes.set_xlabel("FLOPs per text" + (" (log scale)" if log else ""), color=plots.MUTED, fontsize=11, labelpad=4)
        front = [(v, 100 * p.mean) for v, p in zip(x, rows, strict=True) if p.front]
        axes.step(*zip(*front, (right, front[-1][1]), strict=True), where="post", color=plots.BETTER, linewidth=1.1)
        for v, point in zip(x, rows, strict=True):
            colour = plots.BETTER if point.front else plots.MUTED
            if point.low is not None and point.high is not None:
                axes.plot((v, v), (100 * point.low, 100 * point.high), color=colour, linewidth=1.4, zorder=2)
            shape, face = ("o", colour) if point.front else ("s", plots.PAPER)
            axes.plot([v], [100 * point.mean], shape, color=colour, zorder=3 + point.front,
                      markersize=6.4, markerfacecolor=face, markeredgewidth=1.4)  # fmt: skip
        wanted = [(x[i] / across, 100 * rows[i].mean / up, len(names[i])) for i in named]
        for i, place in zip(named, _heights(wanted), strict=True):
            axes.text(x[i] - 7 * across, place * up, names[i].replace("$", r"\$"), ha="right", va="center", fontsize=11,
                      color=plots.INK, bbox=plots.ON_PAPER)  # fmt: skip

    parts = [f"{p.design} {number(100 * p.mean)} at {magnitude(p.cost)}{' (front)' if p.front else ''}" for p in rows]
    alt = f"Mean score over FLOPs per text, {group}: {'; '.join(parts)}."
    return plots.sketch(group, alt, HEIGHT + plots.TOP + plots.AXIS, MARGIN, plots.RIGHT, draw)


def _heights(wanted: Sequence[tuple[float, float, int]]) -> list[float]:
    """Heights in px of the labels of points (x, y, letters).

    Nothing lies above and to the left of a point on the front, so its label goes there, or beside the leftmost point,
    and moves up if it would touch a label that is already placed.
    """
    leftmost = min(x for x, _, _ in wanted)
    placed: dict[int, tuple[float, float, float]] = {}
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i][1]):
        x, y, letters = wanted[i]
        start, height = x - plots.LETTER * letters, y + (0 if x == leftmost else LABEL / 2 + 1)
        for other_start, other_end, other in sorted(placed.values(), key=lambda label: label[2]):
            if start < other_end and other_start < x and abs(height - other) < LABEL:
                height = other + LABEL
        placed[i] = (start, x, height)
    return [placed[i][2] for i in range(len(wanted))]
