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

from poolwise import plots
from poolwise.comparison import Comparison
from poolwise.tables import Table, magnitude
from poolwise.wording import interval, number, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL, HEIGHT, LETTERS = 15.0, 170.0, 20  # px a label is high; px of the axes; letters of a name that are shown
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
    """Mean score over encode cost with the interval of the runs; the front and the baseline are named aside."""
    return [_panel(group, rows, baseline) for group, rows in found.items()]


def _panel(group: str, rows: Sequence[Point], baseline: str) -> plots.Panel:
    costs = [point.cost for point in rows]
    log = max(costs) > FLAT * min(costs)
    x = np.log10(costs) if log else np.array(costs)
    ends = [value for p in rows for value in (p.mean, p.low, p.high) if value is not None]
    low, high = plots.padded([100 * value for value in ends])
    left, right = plots.padded([float(value) for value in x])
    names = [p.design if len(p.design) <= LETTERS else p.design[: LETTERS - 1] + "…" for p in rows]
    named = [i for i, p in enumerate(rows) if p.front or p.design == baseline]
    aside = plots.LETTER * max(len(names[i]) for i in named) + 26
    height = max(HEIGHT, LABEL * len(named))

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
        front = [(float(v), 100 * p.mean) for v, p in zip(x, rows, strict=True) if p.front]
        axes.step(*zip(*front, (right, front[-1][1]), strict=True), where="post", color=plots.BETTER, linewidth=1.1)
        for v, point in zip(x.tolist(), rows, strict=True):
            colour = plots.BETTER if point.front else plots.MUTED
            if point.low is not None and point.high is not None:
                axes.plot((v, v), (100 * point.low, 100 * point.high), color=colour, linewidth=1.4, zorder=2)
            axes.plot([v], [100 * point.mean], "o" if point.front else "s", color=colour, zorder=3, markersize=6.4,
                      markerfacecolor=colour if point.front else plots.PAPER, markeredgewidth=1.4)  # fmt: skip
        end = right + 10 * (right - left) / (plots.WIDTH - 44 - aside)
        places = _spread([100 * rows[i].mean for i in named], LABEL / height, low, high)
        for i, place in zip(named, places, strict=True):
            axes.plot((x[i], right, end), (100 * rows[i].mean, place, place), color=plots.MUTED, linewidth=0.6,
                      zorder=1, clip_on=False)  # fmt: skip
            axes.annotate(names[i].replace("$", r"\$"), (end, place), (3, 0), textcoords="offset points", va="center",
                          fontsize=11, color=plots.INK, annotation_clip=False)  # fmt: skip

    parts = [f"{p.design} {number(100 * p.mean)} at {magnitude(p.cost)}{' (front)' if p.front else ''}" for p in rows]
    alt = f"Mean score over FLOPs a text, {group}: {'; '.join(parts)}."
    return plots.sketch(group, alt, height + plots.TOP + plots.AXIS, 44.0, aside, draw)


def _spread(values: Sequence[float], share: float, low: float, high: float) -> list[float]:
    """The values moved, in order, so that they lie `share` of the height apart between `low` and `high`."""
    gap = share * (high - low)
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [0.0] * len(values)
    floor = low + gap / 2
    for rank, i in enumerate(order):
        ceiling = high - gap / 2 - gap * (len(order) - 1 - rank)
        placed[i] = max(floor, min(values[i], ceiling))
        floor = placed[i] + gap
    return placed
