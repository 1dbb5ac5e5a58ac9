"""Small plots as inline SVG, one panel for each group of tasks, drawn at the size at which they are read.

A panel is about 340 px wide, so that a wide page sets panels side by side and a narrow one below each other, and text
keeps its size. Colours are CSS variables of the page (light, dark, print). Every meaning of a colour is also a shape:
filled circle better, filled square worse, diamond equivalent, hollow triangle withheld, hollow circle inconclusive.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poolwise.reports.words import interval, number, outcome, points
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Pixels: width of a panel, height of a row, margins above and below the axes and to their right, width of a letter.
WIDTH, ROW, TOP, AXIS, RIGHT, LETTER = 340, 24, 8, 38, 14, 6.6
LABEL_LETTERS = 21
TENFOLD = 10
# matplotlib knows no CSS variables: it draws in placeholder colours, which `_inline` replaces.
INK, MUTED, RULE, BETTER, WORSE, BAND, PAPER = (f"#0{i}0{i}0{i}" for i in range(1, 8))
VARIABLES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule", BETTER: "--better", WORSE: "--worse", BAND: "--band",
    PAPER: "--paper",
}  # fmt: skip
MARKS = {  # marker, size, edge, face
    "better": ("o", 7, BETTER, BETTER),
    "worse": ("s", 6.4, WORSE, WORSE),
    "equivalent": ("D", 6, INK, PAPER),
    "withheld": ("^", 7, INK, PAPER),
    "inconclusive": ("o", 6.6, MUTED, PAPER),
    "untested": ("o", 6.6, MUTED, PAPER),
}
ON_PAPER = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}  # behind a text that may cross a line


@dataclass(frozen=True)
class Panel:
    """One plot: its group, the SVG element and its description in words."""

    group: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Interval:
    """One row of a plot of intervals: values 0–1, an unbounded end None, the word of `MARKS` that decides its shape.

    `band`: half-width of the pale bar around 0. `tested`: an unbounded interval is drawn as a dotted line.
    """

    label: str
    low: float | None
    middle: float
    high: float | None
    word: str
    band: float | None = None
    tested: bool = False


def forest(comparison: Comparison) -> list[Panel]:
    """Difference to the baseline with its interval, a row for each design, one scale for all groups.

    The pale bar behind a row spans the differences that are too small to be detected here.
    """

    def drawn(row: Row) -> Interval:
        shown, word = row.verdict or row, outcome(comparison, row)
        band = row.verdict.detectable if row.verdict else None
        return Interval(row.design, shown.ci_low, shown.difference, shown.ci_high, word, band, row.p_value is not None)

    groups = [(group, [drawn(row) for row in comparison.rows if row.group == group]) for group in comparison.groups]
    axis = f"points above {comparison.baseline}"
    return intervals(groups, axis, f"Forest plot with {comparison.percent} % interval")


def intervals(
    groups: Sequence[tuple[str, Sequence[Interval]]], axis: str, title: str, above: bool = False
) -> list[Panel]:
    """A panel with the intervals of each group; labels at the left, or `above` their row.

    All panels have one scale, unless the scales of two groups would differ tenfold.
    """
    own = [_scale(rows) for _, rows in groups]
    reach = [max(-low, high) for low, high in own]
    shared = not reach or max(reach) < TENFOLD * min(reach)
    scales = [_scale([row for _, rows in groups for row in rows])] * len(groups) if shared else own
    axis = axis if shared else f"{axis} (own scale)"
    panels = []
    for (group, rows), limits in zip(groups, scales, strict=True):

        def draw(axes: Axes, rows: Sequence[Interval] = rows, limits: tuple[float, float] = limits) -> None:
            axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
            for place, row in enumerate(rows):
                _draw_interval(axes, place, row, limits)

        parts = [f"{row.label} {points(row.middle, 2, True)} ({interval(row.low, row.high)})" for row in rows]
        alt = f"{title}, {group}: {axis}: {'; '.join(parts)}."
        panels.append(_panel(group, alt, [row.label for row in rows], limits, draw, axis, True, above))
    return panels


def _scale(rows: Sequence[Interval]) -> tuple[float, float]:
    ends = [100 * end for row in rows for end in (row.low, row.middle, row.high) if end is not None]
    return focused([100 * row.middle for row in rows], ends)


def task_dots(comparison: Comparison) -> list[Panel]:
    """Difference to the baseline on each task (seeds averaged), a dot for each task, a bar at the mean."""
    differences = {
        (row.group, row.design): 100
        * (
            comparison.arm(row.group, row.design).whole().task_means
            - comparison.arm(row.group, row.baseline).whole().task_means
        )
        for row in comparison.rows
    }
    limits = padded([0.0, *(float(value) for values in differences.values() for value in values)])
    panels = []
    for group in comparison.groups:
        names = list(comparison.designs[1:])

        def draw(axes: Axes, group: str = group, names: Sequence[str] = names) -> None:
            axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
            for place, name in enumerate(names):
                _dots(axes, place, differences[group, name])

        ends = {name: (float(differences[group, name].min()), float(differences[group, name].max())) for name in names}
        parts = [f"{name} from {number(low)} to {number(high)}" for name, (low, high) in ends.items()]
        alt = f"Dots for each task, {group}: points above {comparison.baseline}: {'; '.join(parts)}."
        panels.append(
            _panel(group, alt, names, limits, draw, f"points above {comparison.baseline}, each task a dot", True)
        )
    return panels


def run_strip(comparison: Comparison) -> list[Panel]:
    """Mean score of each run, a dot for each seed, a bar at the mean of the design; each group has its own scale.

    What needs no training (TF-IDF, BM25) is a cross in a row of its own, where it has scores on all tasks of the group.
    """
    panels = []
    lexical = [name for name, role in comparison.roles if role == "reference"]
    for group in comparison.groups:
        means = {name: 100 * comparison.arm(group, name).run_means for name in comparison.designs}
        means |= {name: 100 * arm.run_means for name in lexical if (arm := comparison.whole_arm(group, name))}
        limits = padded([float(value) for values in means.values() for value in values])

        def draw(axes: Axes, means: dict[str, Any] = means) -> None:
            for place, (name, values) in enumerate(means.items()):
                if name in lexical:
                    axes.plot(list(values), [place], "x", color=MUTED, markersize=6, markeredgewidth=1.6)
                else:
                    _dots(axes, place, values)

        parts = [f"{name} {', '.join(number(float(value)) for value in values)}" for name, values in means.items()]
        alt = f"Runs, {group}: mean score of each seed: {'; '.join(parts)}."
        panels.append(_panel(group, alt, list(means), limits, draw, "mean score ×100, each seed a dot", False))
    return panels


def focused(estimates: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """A scale for estimates and the ends of their intervals that a few very wide intervals do not dominate."""
    low, high = padded([0.0, *estimates, *ends])
    sizes = sorted(abs(end) for end in ends)
    reach = max(2.5 * max(map(abs, estimates)), 2 * sizes[len(sizes) // 2]) if sizes else 0.0
    return (max(low, -reach), min(high, reach)) if reach > 0 else (low, high)


def padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with a margin on both sides."""
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def _draw_interval(axes: Axes, place: int, row: Interval, limits: tuple[float, float]) -> None:
    edge = MARKS[row.word][2]
    if row.band is not None:
        reach = 100 * row.band
        axes.barh(place, 2 * reach, left=-reach, height=0.62, color=BAND, linewidth=0, zorder=0)
    if row.low is not None and row.high is not None:
        _bar(axes, place, 100 * row.low, 100 * row.high, edge, limits)
    elif row.tested:  # too few tasks to bound the difference
        axes.plot(limits, (place, place), color=edge, linewidth=1.4, linestyle=(0, (1, 2.2)), zorder=2)
    marker, size, edge, face = MARKS[row.word]
    axes.plot(
        [100 * row.middle], [place], marker, color=edge, markerfacecolor=face, markersize=size, markeredgewidth=1.4,
        zorder=3,
    )  # fmt: skip


def _bar(axes: Axes, place: int, low: float, high: float, colour: str, limits: tuple[float, float]) -> None:
    """An interval, with an arrow where it extends beyond the scale."""
    shown = max(low, limits[0]), min(high, limits[1])
    axes.plot(shown, (place, place), color=colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
    for beyond, edge, arrow in ((low < limits[0], limits[0], "<"), (high > limits[1], limits[1], ">")):
        if beyond:
            axes.plot([edge], [place], arrow, color=colour, markersize=5, clip_on=False, zorder=2)


POINTS = 50  # of a training curve, each a mean over as many steps as it takes


def loss_curves(losses: Mapping[str, Mapping[Any, Sequence[float]]]) -> list[Panel]:
    """The loss in training, a panel for each design and a line for each run. losses: design -> run -> loss by step."""
    binned = {design: [_binned(values) for values in runs.values() if values] for design, runs in losses.items()}
    ends = [loss for lines in binned.values() for line in lines for _, loss in line]
    if not ends:
        return []
    limits, last = padded(ends), max(line[-1][0] for lines in binned.values() for line in lines)
    panels = []
    for design, lines in binned.items():

        def draw(axes: Axes, lines: Sequence[Sequence[tuple[float, float]]] = lines) -> None:
            axes.set_xlim(0, last)
            axes.set_ylim(*limits)
            axes.grid(color=RULE, linewidth=0.7)
            for line in lines:
                axes.plot(*zip(*line, strict=True), color=BETTER, linewidth=1.2, alpha=0.7)
            axes.tick_params(axis="y", labelcolor=MUTED, labelsize=11)
            axes.set_xlabel("step", color=MUTED, fontsize=11, labelpad=4)

        final = ", ".join(number(line[-1][1], 2) for line in lines)
        panels.append(sketch(design, f"Training loss of {design} over steps, ending at {final}.", 170, 46, RIGHT, draw))
    return panels


def _binned(values: Sequence[float]) -> list[tuple[float, float]]:
    """(step, mean loss) of about `POINTS` equal parts of the training."""
    size = max(1, len(values) // POINTS)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [(size * place + len(part), sum(part) / len(part)) for place, part in enumerate(parts)]


def _dots(axes: Axes, place: int, values: Any) -> None:
    shifts = [(-0.16, 0.16, 0.0)[i % 3] if len(values) > 5 else 0.0 for i in range(len(values))]
    mean = float(values.mean())
    axes.plot([mean, mean], [place - 0.34, place + 0.34], color=INK, linewidth=1.6, zorder=2)
    axes.plot(
        list(values), [place + shift for shift in shifts], "o", color=BETTER, markerfacecolor="none",
        markersize=5, markeredgewidth=1.1, zorder=3,
    )  # fmt: skip


def _panel(
    group: str,
    alt: str,
    names: Sequence[str],
    limits: tuple[float, float],
    draw: Callable[..., None],
    axis: str,
    sign: bool,
    above: bool = False,
) -> Panel:
    """Rows below each other, labelled at the left or, for long labels, `above` the row; a scale at the bottom."""
    letters = 3 * LABEL_LETTERS if above else LABEL_LETTERS
    labels = [name if len(name) <= letters else name[: letters - 1] + "…" for name in names]
    labels = [label.replace("$", r"\$") for label in labels]
    left = 16.0 if above else min(LETTER * max(map(len, labels)) + 16, 0.46 * WIDTH)

    def rows(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.set_xlim(*limits)
        axes.set_ylim(len(names) - 0.5, -0.9 if above else -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, axes.get_xticks(), sign)))
        axes.grid(axis="x", color=RULE, linewidth=0.7)
        axes.set_yticks([] if above else range(len(names)), [] if above else labels)
        for place, label in enumerate(labels if above else []):
            axes.text(limits[0], place - 0.34, label, color=INK, fontsize=11, va="center", bbox=ON_PAPER)
        axes.set_xlabel(axis.replace("$", r"\$"), color=MUTED, fontsize=11, labelpad=4)
        draw(axes)

    return sketch(group, alt, (1.6 if above else 1) * ROW * len(names) + TOP + AXIS, left, RIGHT, rows)


def sketch(group: str, alt: str, height: float, left: float, right: float, draw: Callable[[Axes], None]) -> Panel:
    """A panel of `height` px with margins of `left` and `right` px, drawn into bare axes by `draw`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    salt = re.sub(r"\W+", "-", f"{group} {alt}")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11}):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        axes = figure.add_axes(
            (left / WIDTH, AXIS / height, (WIDTH - left - right) / WIDTH, (height - TOP - AXIS) / height), frameon=False
        )
        axes.tick_params(axis="x", length=0, pad=5, labelcolor=MUTED, labelsize=11)
        axes.tick_params(axis="y", length=0, pad=7, labelcolor=INK, labelsize=12)
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Panel(group, _inline(buffer.getvalue(), alt), alt)


def tick(value: float, ticks: Any, sign: bool) -> str:
    """The label of a tick, with as many decimals as the step between ticks needs."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    digits = next((d for d in range(4) if abs(round(step, d) - step) < 1e-9), 3)
    return "0" if abs(value) < 1e-9 else number(value, digits, sign)


def _inline(svg: str, alt: str) -> str:
    """matplotlib's file as an element of a page: no prolog, metadata or style, but the page's font and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1\.1"', "", svg).replace("xlink:href", "href")
    label = f' role="img" aria-label="{html.escape(alt)}"'
    svg = re.sub(r' width="[^"]*" height="[^"]*"', lambda _: label, svg, count=1)  # a backslash in it is no escape
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg).replace("\n", " ")
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"<defs>\s*</defs>", "", re.sub(r"\s{2,}", " ", svg)).replace("> <", "><")
