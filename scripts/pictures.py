"""The two pictures of README, each for a light and a dark page: `docs/forest-light.svg` and its sisters.

`python scripts/publish_results.py` draws them, with all other figures. Their numbers are those of `figures.py`.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from figures import ATTENTION, DESIGNS, RETRIEVAL, ROOT, TASKS, differences, false_alarms
from matplotlib.axes import Axes
from matplotlib.figure import Figure

THEMES = {
    "light": {"ink": "#1f2328", "muted": "#59636e", "rule": "#d9dde2", "mark": "#0067a3", "loss": "#b84a00"},
    "dark": {"ink": "#e6e9ed", "muted": "#9198a1", "rule": "#3a4149", "mark": "#62b8ee", "loss": "#f2955a"},
}
WIDTH = 840  # pixels, as wide as GitHub shows a README


def bare(axes: Axes, theme: dict[str, str]) -> None:
    """No frame, quiet ticks, a grid along the values only."""
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=theme["muted"], labelsize=11)
    for spine in axes.spines.values():
        spine.set_visible(False)


def forest(theme: dict[str, str]) -> Figure:
    """A panel a design, a row a data set: difference to m1 with its 95 % interval, filled if it holds after Holm."""
    figure = Figure(figsize=(WIDTH / 72, 320 / 72), dpi=72)
    found = differences()
    places = {task: place + (0.6 if task in RETRIEVAL else 0) for place, task in enumerate(TASKS)}
    low = min(100 * each.found.ci_low for each in found.values()) - 1
    high = max(100 * each.found.ci_high for each in found.values()) + 1
    for column, design in enumerate(DESIGNS[1:]):
        axes = figure.add_axes((0.135 + 0.217 * column, 0.15, 0.2, 0.73))
        bare(axes, theme)
        axes.grid(axis="x", color=theme["rule"], linewidth=0.8)
        axes.axvline(0, color=theme["muted"], linewidth=1.1)
        for task, place in places.items():
            each = found[task, design]
            held = each.p_holm <= 0.05
            colour = (theme["mark"] if each.found.difference > 0 else theme["loss"]) if held else theme["muted"]
            ends = [100 * each.found.ci_low, 100 * each.found.ci_high]
            axes.plot(ends, [place, place], color=colour, linewidth=2.2 if held else 1.4, solid_capstyle="butt")
            axes.plot(
                [100 * each.found.difference], [place], "s" if held else "o", color=colour, markersize=7,
                markerfacecolor=colour if held else "none", markeredgewidth=1.5,
            )  # fmt: skip
        axes.set_xlim(low, high)
        axes.set_ylim(max(places.values()) + 0.6, -0.6)
        axes.set_xticks([-10, -5, 0, 5], ["−10", "−5", "0", "+5"])
        axes.set_yticks([] if column else list(places.values()), [] if column else list(places))
        axes.tick_params(axis="y", labelcolor=theme["ink"], labelsize=12, pad=8)
        axes.set_title(f"{design} · {ATTENTION[design]}", color=theme["ink"], fontsize=13, loc="left", pad=8)
    label = "points above m1 with 95 % interval, 3 runs each; filled: after Holm’s correction over all 32"
    figure.text(0.135, 0.02, label, color=theme["muted"], fontsize=12)
    return figure


def alarms(theme: dict[str, str]) -> Figure:
    """Pairs of bars: how often equal designs are called different, by the usual test and by this one."""
    figure = Figure(figsize=(WIDTH / 72, 230 / 72), dpi=72)
    axes = figure.add_axes((0.115, 0.17, 0.86, 0.68))
    bare(axes, theme)
    rates = false_alarms()
    for place, (tasks, found) in enumerate(rates.items()):
        for shift, method, colour in ((-0.19, "wilcoxon", theme["loss"]), (0.19, "study", theme["mark"])):
            share = 100 * found[method]
            axes.barh(place + shift, share, height=0.34, color=colour)
            axes.text(share + 0.4, place + shift, f"{share:.1f} %", va="center", color=theme["ink"], fontsize=12)
        axes.text(-0.6, place, f"{tasks} tasks", va="center", ha="right", color=theme["ink"], fontsize=12)
    axes.axvline(5, color=theme["muted"], linewidth=1.1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 40)
    axes.set_ylim(len(rates) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_xticks([0, 5, 10, 20, 30, 40], ["0", "5 % promised", "10", "20", "30", "40 %"])
    for x, name, colour in ((0.115, "Wilcoxon over tasks", "loss"), (0.36, "poolwise: runs × tasks", "mark")):
        figure.text(x, 0.91, "■ ", color=theme[colour], fontsize=13)
        figure.text(x + 0.022, 0.91, name, color=theme["ink"], fontsize=13)
    return figure


PICTURES = {"forest": forest, "alarms": alarms}


def svg(name: str, theme: str) -> str:
    """A picture as an SVG file that is the same on every machine; text stays text, in the reader's own font."""
    style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": f"{name}-{theme}"}
    with mpl.rc_context(style):
        buffer = io.StringIO()
        PICTURES[name](THEMES[theme]).savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = re.sub(r"font-family: [^;\"]*|(?<=font: )([\d.]+px) [^;\"]*", _font, buffer.getvalue())
    return re.sub(r" *\n", "\n", text)


def _font(match: re.Match[str]) -> str:
    family = "system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
    return f"{match[1]} {family}" if match[1] else f"font-family: {family}"


def paths() -> dict[Path, tuple[str, str]]:
    """File -> (picture, theme)."""
    return {ROOT / "docs" / f"{name}-{theme}.svg": (name, theme) for name in PICTURES for theme in THEMES}
