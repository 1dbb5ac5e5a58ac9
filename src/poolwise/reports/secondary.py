"""What stands beside the main verdicts: overall by declared weights, single runs under a run effect from elsewhere, and
designs at equal cost; tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit

from poolwise.reports import plots
from poolwise.reports.tables import Table, magnitude
from poolwise.reports.words import (
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
)
from poolwise.verdicts.arms import FEW_SOURCES
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Overall
from poolwise.verdicts.findings import TOLERANCE, TRAINING, Budget, Budgets

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


LABEL, HEIGHT, MARGIN, LETTERS = 14.0, 170.0, 44.0, 20  # px: a label, the axes, left of them; letters shown of a name
FLAT = 4.0  # costs that differ by less than this factor lie on a linear scale


@dataclass(frozen=True)
class Point:
    """One design: cost of one text, mean score 0–1 with the interval of its runs (None with one), and whether no other
    design scores at least as high at no more cost."""

    design: str
    cost: float
    mean: float
    low: float | None
    high: float | None
    front: bool


def fronts(comparison: Comparison, costs: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Points of each group, the cheapest first; empty where fewer than two designs have `encode_flops`."""
    price = {row["design"]: float(row["encode_flops"]) for row in costs if row.get("encode_flops")}
    designs = [design for design in comparison.designs if design in price]
    if len(designs) < 2:
        return {}
    found = {}
    for group in comparison.groups:
        arms = {design: comparison.arm(group, design) for design in designs}
        squares = sum(float(((arm.run_means - arm.mean) ** 2).sum()) for arm in arms.values())
        df = sum(len(arm.seeds) - 1 for arm in arms.values())
        half = float(stdtrit(df, 0.975)) * np.sqrt(squares / df) if df else 0.0
        ordered = sorted(designs, key=lambda design: (price[design], -arms[design].mean))
        rows: list[Point] = []
        for design in ordered:
            arm = arms[design]
            reach = float(half / np.sqrt(len(arm.seeds))) if len(arm.seeds) > 1 else None
            rows.append(
                Point(
                    design, price[design], arm.mean,
                    None if reach is None else arm.mean - reach, None if reach is None else arm.mean + reach,
                    all(arm.mean > other.mean for other in rows),
                )
            )  # fmt: skip
        found[group] = rows
    return found


def table(found: Mapping[str, Sequence[Point]], baseline: str) -> Table | None:
    """The numbers behind the picture."""
    sections = []
    for group, rows in found.items():
        base = next((point.cost for point in rows if point.design == baseline), None)
        body = [
            (
                point.design, magnitude(point.cost), f"{point.cost / base:.3f}" if base else "–", points(point.mean),
                "–" if point.low is None else interval(point.low, point.high), "on the front" if point.front else "–",
            )
            for point in rows
        ]  # fmt: skip
        sections.append((group, tuple(body)))
    note = (
        "The front, by means: no other design scores as high at no more cost. 95 % interval of the mean over runs (t, "
        "variance between runs pooled over the designs); the tasks are as they are."
    )
    columns = ("Design", "FLOPs a text", "× baseline", "Mean", "95 % run interval", "Front")
    return Table("Quality and cost", columns, tuple(sections), note) if sections else None


def panels(found: Mapping[str, Sequence[Point]], baseline: str) -> list[plots.Panel]:
    """Mean score over encode cost with the interval of the runs; the front and the baseline are named."""
    return [_panel(group, rows, baseline) for group, rows in found.items()]


def _panel(group: str, rows: Sequence[Point], baseline: str) -> plots.Panel:
    costs = [point.cost for point in rows]
    log = max(costs) > FLAT * min(costs)
    x = [float(value) for value in (np.log10(costs) if log else costs)]
    right = x[-1] + (0.06 * (x[-1] - x[0]) or 0.05 * x[-1])
    names = [p.design if len(p.design) <= LETTERS else p.design[: LETTERS - 1] + "…" for p in rows]
    named = [i for i, p in enumerate(rows) if p.front or p.design == baseline]
    width = plots.WIDTH - MARGIN - plots.RIGHT
    room = (plots.LETTER * max(len(names[i]) for i in named) + 12) / width  # the leftmost name ends at its point
    left = (x[0] - room * right) / (1 - room)
    low, high = plots.padded([100 * value for p in rows for value in (p.mean, p.low, p.high) if value is not None])
    high += LABEL / HEIGHT * (high - low)
    across, up = (right - left) / width, (high - low) / HEIGHT  # a pixel

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
        axes.set_xlabel("FLOPs a text" + (" (log scale)" if log else ""), color=plots.MUTED, fontsize=11, labelpad=4)
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
    alt = f"Mean score over FLOPs a text, {group}: {'; '.join(parts)}."
    return plots.sketch(group, alt, HEIGHT + plots.TOP + plots.AXIS, MARGIN, plots.RIGHT, draw)


def _heights(wanted: Sequence[tuple[float, float, int]]) -> list[float]:
    """Heights of the labels of points (x, y, letters), in px: up and left of a point of the front nothing lies, so a
    label sits there, level with the leftmost point, and moves up where it would touch one that is placed."""
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
