"""Quality against cost: which designs are neither dearer nor worse than another, by group, as a picture and a table.

Cost is what encoding one text takes (exact, from the cost rows); quality is the mean score over tasks with the 95 %
interval of its runs: t over seeds, with the variance between runs pooled over the designs of the group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit

from poolwise.reporting import plots
from poolwise.reporting.tables import Table, magnitude
from poolwise.reporting.wording import interval, number, points
from poolwise.verdicts.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
