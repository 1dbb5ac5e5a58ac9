"""The layers of trained designs as tables, a heat map, pictures and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poolwise.reports import plots
from poolwise.reports.tables import Cells, Table
from poolwise.reports.words import count, group_words, mean_and_sd, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Shares = Mapping[str, Mapping[int, Sequence[float]]]
"""Design -> seed -> (L,) shares of attention that sum to 1."""
Run = Mapping[str, Any]
"""One trained design as `poolwise layers` returns it."""
HEIGHT = 220  # px


def attention_table(shares: Shares, texts: int) -> Table | None:
    """Mean share of each layer over the seeds, in percent, a column for each design; None without designs."""
    if not shares:
        return None
    layers = max(len(weights) for runs in shares.values() for weights in runs.values())

    def cell(runs: Mapping[int, Sequence[float]], layer: int) -> str:
        values = [100 * weights[layer] for weights in runs.values() if layer < len(weights)]
        return mean_and_sd(values, 1) if values else "–"

    body = tuple((str(layer + 1), *(cell(runs, layer) for runs in shares.values())) for layer in range(layers))
    note = (
        "Percent of the attention on each layer, layer 1 being the lowest; mean over latents, heads, seeds and "
        f"{count(texts, 'evaluation text')}; ± is the sd of the runs. Uniform attention would be "
        f"{number(100 / layers, 1)}."
    )
    return Table("Attention over layers", ("Layer", *shares), (("", body),), note)


def largest_share(shares: Shares) -> str:
    """The largest share of one layer in one run, in percent: the strongest colour of the heat map."""
    every = [weight for runs in shares.values() for weights in runs.values() for weight in weights]
    return f"{100 * max(every, default=0):.0f}"


def attention_panel(shares: Shares) -> list[plots.Panel]:
    """A row for each run of each design, a cell for each layer: the stronger its colour, the more attention."""
    if not shares:
        return []
    rows = [(f"{design} · {seed}", list(weights)) for design, runs in shares.items() for seed, weights in runs.items()]
    layers = max(len(weights) for _, weights in rows)
    top = max(max(weights) for _, weights in rows)
    labels = [label if len(label) <= 21 else f"{label[:16]}…{label[-4:]}" for label, _ in rows]
    left = plots.LETTER * max(map(len, labels)) + 16

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        axes.set_xlim(0.5, layers + 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [label.replace("$", r"\$") for label in labels])
        axes.set_xticks(_ticks(list(range(1, layers + 1))))
        axes.set_xlabel("layer", color=plots.MUTED, fontsize=11, labelpad=4)
        for y, (_, weights) in enumerate(rows):
            for layer, weight in enumerate(weights, 1):
                for colour, alpha in ((plots.BAND, 1.0), (plots.BETTER, weight / top)):
                    corner = (layer - 0.48, y - 0.42)
                    axes.add_patch(Rectangle(corner, 0.96, 0.84, linewidth=0, color=colour, alpha=alpha))

    most = "; ".join(f"{label} most on layer {weights.index(max(weights)) + 1}" for label, weights in rows)
    alt = f"Heat map of attention over {layers} layers, a row for each run: {most}."
    height = plots.ROW * len(rows) + plots.TOP + plots.AXIS
    return [plots.sketch("Design · seed", alt, height, left, plots.RIGHT, draw)]


def _ticks(layers: Sequence[int]) -> list[int]:
    """About eight layers to label, the first and the last among them."""
    every = max(1, -(-len(layers) // 8))
    ends = (layers[0], layers[-1])
    # A number that would touch that of the first or the last layer is left out.
    return [n for n in layers if n in ends or (n % every == 0 and min(abs(n - end) for end in ends) > every / 2)]


def _by_design(view: Mapping[str, Any]) -> dict[str, list[Run]]:
    """The runs of each design (on each base model, if there are several)."""
    several = len({run["base"] for run in view["runs"]}) > 1
    grouped: dict[str, list[Run]] = {}
    for run in view["runs"]:
        grouped.setdefault(f"{run['design']} on {run['base']}" if several else run["design"], []).append(run)
    return grouped


def tables(view: Mapping[str, Any]) -> list[Table]:
    """One table per design: a row for each layer, a column for each task type, then attention and layer weights.

    view: the dictionary of `poolwise layers --json`.
    """
    return [_table(name, runs) for name, runs in _by_design(view).items()]


def _table(name: str, runs: Sequence[Run]) -> Table:
    kinds = list(dict.fromkeys(score["task_type"] for run in runs for score in run["scores"]))
    layers = (
        max(score["layer"] for run in runs for score in run["scores"]) if kinds else len(runs[0]["attention"] or ())
    )
    inside = [key for key in ("attention", "weights") if all(run[key] for run in runs)]
    scale = {"attention": 100, "weights": 1}
    rows: list[Cells] = []
    for layer in range(1, layers + 1):
        cells = [mean_and_sd([100 * mean(run["scores"], kind, layer) for run in runs]) for kind in kinds]
        cells += [mean_and_sd([scale[key] * run[key][layer - 1] for run in runs]) for key in inside]
        rows.append((str(layer), *cells))
    if kinds and all(run["own"] for run in runs):
        design = [mean_and_sd([100 * mean(run["own"], kind) for run in runs]) for kind in kinds]
        rows.append(("the design", *design, *("" for _ in inside)))
    token = "mean of its tokens" if runs[0]["reduce"] == "mean" else "last token"
    spread = "± is the sd of the runs" if len(runs) > 1 else "a single run, so its chance effect is in every number"
    if "correlation" in runs[0]:
        spread = "an untuned base, which has no chance effect"
    note = (
        f"Scores ×100 of each layer's {token} as the embedding, mean over tasks; {count(len(runs), 'run')}; {spread}. "
        "Layer 1 is the lowest."
    )
    heads = {"attention": "Attention, %", "weights": "Norm of weights"}
    columns = ("Layer", *(group_words(kind) for kind in kinds), *(heads[key] for key in inside))
    return Table(f"Layers of {name}", columns, (("", tuple(rows)),), note)


def mean(scores: Sequence[Mapping[str, Any]], kind: str, layer: int | None = None) -> float:
    """Mean over the tasks of a type, after averaging the splits and subsets of each."""
    by_task: dict[str, list[float]] = {}
    for score in scores:
        if score["task_type"] == kind and (layer is None or score["layer"] == layer):
            by_task.setdefault(score["task"], []).append(score["score"])
    means = [sum(values) / len(values) for values in by_task.values()]
    return sum(means) / len(means) if means else float("nan")


@dataclass(frozen=True)
class Line:
    """The scores of a design's layers on one task type, ×100: `layers` (L,) mean over runs, `runs` (runs, L), and what
    the design itself scores, None if that is unknown."""

    kind: str
    layers: tuple[float, ...]
    runs: tuple[tuple[float, ...], ...]
    design: float | None

    @property
    def best(self) -> int:
        """The number of the best layer, from 1."""
        return self.layers.index(max(self.layers)) + 1

    def scaled(self, value: float) -> float:
        """0 for the worst single layer, 1 for the best, so that task types of different scale share a picture."""
        low, high = min(self.layers), max(self.layers)
        return (value - low) / (high - low) if high > low else 0.5

    @property
    def label(self) -> str:
        """`STS: layer 9 best, 61.2; design 63.0`."""
        whole = "" if self.design is None else f"; design {number(self.design, 1)}"
        return f"{group_words(self.kind)}: layer {self.best} best, {number(max(self.layers), 1)}{whole}"


def lines(runs: Sequence[Run]) -> list[Line]:
    """A line for each task type."""
    found = []
    for kind in dict.fromkeys(score["task_type"] for run in runs for score in run["scores"]):
        count_ = max(score["layer"] for score in runs[0]["scores"])
        each = [tuple(100 * mean(run["scores"], kind, layer) for layer in range(1, count_ + 1)) for run in runs]
        design = [100 * mean(run["own"], kind) for run in runs if run["own"]]
        middle = tuple(sum(values) / len(values) for values in zip(*each, strict=True))
        found.append(Line(kind, middle, tuple(each), sum(design) / len(design) if design else None))
    return found


def sentences(view: Mapping[str, Any]) -> list[str]:
    """For each design, which single layer is best on which task type, and how the design compares with it."""
    made = []
    for name, runs in _by_design(view).items():
        parts = []
        for line in lines(runs):
            text = (
                f"layer {line.best} is the best single one on {group_words(line.kind)} ({number(max(line.layers), 1)})"
            )
            if line.design is not None:
                text += f", where the design scores {number(line.design, 1)}"
            parts.append(text)
        if attention := runs[0]["attention"]:
            share = max(attention)
            parts.append(f"its pooling attends most to layer {list(attention).index(share) + 1} ({100 * share:.0f} %)")
        made += [f"{name}: {'; '.join(parts)}."] if parts else []
    return made


def panels(view: Mapping[str, Any]) -> list[plots.Panel]:
    """One panel for each design: the scores of its layers on every task type, and the attention of its pooling."""
    made = []
    for name, runs in _by_design(view).items():
        if found := lines(runs):
            made.append(_panel(name, found, runs[0]["attention"]))
        if correlation := runs[0].get("correlation"):
            made.append(_correlation_panel(f"{name} · correlation between layers", correlation))
    return made


def _correlation_panel(title: str, correlation: Sequence[Sequence[float]]) -> plots.Panel:
    """A cell for each two layers: the stronger its colour, the more alike they rank pairs of texts."""
    layers = len(correlation)
    neighbours = [correlation[i][i + 1] for i in range(layers - 1)]
    alt = f"{title}: layer 1 and {layers} correlate {number(correlation[0][-1])}; neighbouring layers from "
    alt += f"{number(min(neighbours, default=1.0))} to {number(max(neighbours, default=1.0))}."

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        axes.set_xlim(0.5, layers + 0.5)
        axes.set_ylim(0.5, layers + 0.5)
        axes.set_xticks(_ticks(list(range(1, layers + 1))))
        axes.set_yticks(_ticks(list(range(1, layers + 1))))
        axes.set_xlabel("layer; palest 0 or below, strongest 1", color=plots.MUTED, fontsize=11, labelpad=4)
        for y, row in enumerate(correlation, 1):
            for x, value in enumerate(row, 1):
                for colour, alpha in ((plots.BAND, 1.0), (plots.BETTER, min(1.0, max(0.0, value)))):
                    corner = (x - 0.48, y - 0.48)
                    axes.add_patch(Rectangle(corner, 0.96, 0.96, linewidth=0, color=colour, alpha=alpha))

    return plots.sketch(title, alt, plots.WIDTH, 40, plots.RIGHT, draw)


STYLES = ((plots.BETTER, "-"), (plots.WORSE, "-"), (plots.INK, "-"), (plots.BETTER, ":"), (plots.WORSE, ":"),
          (plots.INK, ":"))  # fmt: skip
"""Colour and line of each task type in a panel."""
LABEL = 16  # px


def _panel(title: str, found: Sequence[Line], attention: Sequence[float] | None) -> plots.Panel:
    """Lines from the worst single layer (bottom) to the best (top), each with its name inside the picture; diamonds:
    the design itself, beside the last layer; bars: attention."""
    layers = len(found[0].layers)
    drawn = [(line, *STYLES[place % len(STYLES)]) for place, line in enumerate(found)]
    ends = [0.0, 1.0, *(line.scaled(line.design) for line in found if line.design is not None)]
    ends += [line.scaled(value) for line in found for run in line.runs for value in run]
    # One very good design must not flatten the lines of the layers.
    low, high = max(min(ends), -0.6), min(max(ends), 1.6)
    floor = low - (0.55 if attention else 0.12) * (high - low)  # the bars have a place below the lines
    rows = len(found) + bool(attention)
    height = HEIGHT + LABEL * rows
    room = height - plots.TOP - plots.AXIS
    top = floor + (high + 0.08 - floor) * room / (room - LABEL * rows - 4)

    span = layers + (2.0 if any(line.design is not None for line in found) else 0.2)

    def draw(axes: Axes) -> None:
        axes.set_xlim(0.4, 0.4 + span)
        axes.set_ylim(floor, top)
        axes.set_yticks([])
        for level in (0, 1):
            axes.axhline(level, color=plots.RULE, linewidth=0.7, zorder=0)
        if attention:
            tall = 0.42 * (high - low) / max(attention)
            for layer, share in enumerate(attention, 1):
                axes.bar(layer, tall * share, bottom=floor, width=0.86, color=plots.MUTED, alpha=0.55, linewidth=0)
        for line, colour, style in drawn:
            along = range(1, layers + 1)
            for run in line.runs if len(line.runs) > 1 else ():
                axes.plot(along, [line.scaled(value) for value in run], color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(along, [line.scaled(value) for value in line.layers], style, color=colour, linewidth=1.5)
            axes.plot([line.best], [1.0], "o", color=colour, markersize=5)
            if line.design is not None:
                place = min(max(line.scaled(line.design), low), high)
                axes.plot([layers + 1.5], [place], "D", color=colour, markersize=5.5, clip_on=False)
        texts = [(line.label, colour) for line, colour, _ in drawn]
        texts += [(f"bars: attention, {100 * max(attention):.0f} % at most", plots.MUTED)] if attention else []
        for row, (text, colour) in enumerate(texts):
            place = top - (LABEL * row + 6) * (top - floor) / room
            if row < len(drawn):
                axes.plot([0.5, 0.5 + span / 18], [place, place], drawn[row][2], color=colour, linewidth=1.5)
            axes.text(0.5 + span / 14, place, text.replace("$", r"\$"), color=colour, fontsize=11, va="center")
        axes.set_xlabel("layer", color=plots.MUTED, fontsize=11, labelpad=4)
        axes.set_xticks(_ticks(list(range(1, layers + 1))))

    alt = f"{title}: scores of {layers} layers. {'; '.join(line.label for line in found)}."
    return plots.sketch(title, alt, height, 6, plots.RIGHT, draw)
