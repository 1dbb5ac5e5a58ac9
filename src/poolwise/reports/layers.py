"""The layers of trained designs as tables, a heat map, pictures and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    return [layer for layer in layers if layer % every == 0 or layer in (layers[0], layers[-1])]


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


def panels(view: Mapping[str, Any]) -> list[plots.Panel]:
    """One panel for each design and task type: the score of every layer, a thin line per run; bars: attention."""
    made = []
    for name, runs in _by_design(view).items():
        for kind in dict.fromkeys(score["task_type"] for run in runs for score in run["scores"]):
            layers = sorted({score["layer"] for score in runs[0]["scores"]})
            lines = [[100 * mean(run["scores"], kind, layer) for layer in layers] for run in runs]
            design = [100 * mean(run["own"], kind) for run in runs if run["own"]]
            made.append(_panel(f"{name} · {group_words(kind)}", layers, lines, design, runs[0]["attention"]))
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


def _panel(
    title: str, layers: Sequence[int], lines: Sequence[Sequence[float]], design: Sequence[float], attention: Any
) -> plots.Panel:
    """`lines`: the scores of each run by layer; `design`: the design's score in each run."""
    middle = [sum(values) / len(values) for values in zip(*lines, strict=True)]
    best = layers[middle.index(max(middle))]
    alt = f"{title}: score of every layer; the best single layer is {best} with {max(middle):.1f}"
    alt += f"; the design scores {sum(design) / len(design):.1f}." if design else "."

    def draw(axes: Axes) -> None:
        values = [value for line in lines for value in line] + list(design)
        low, high = min(values), max(values)
        pad = max(0.08 * (high - low), 0.5)
        axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
        axes.set_ylim(low - 2 * pad, high + pad)
        if attention:
            for layer, share in zip(layers, attention, strict=False):
                tall = share / max(attention) * (high - low + 3 * pad)
                axes.bar(layer, tall, bottom=low - 2 * pad, width=0.9, color=plots.BAND)
        for line in lines:
            axes.plot(layers, line, color=plots.BETTER, linewidth=1.2, alpha=0.6)
        axes.plot(layers, middle, "o", color=plots.BETTER, markersize=5)
        if design:
            axes.axhline(sum(design) / len(design), color=plots.INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("layer", color=plots.MUTED, fontsize=11, labelpad=4)
        axes.set_xticks(_ticks(layers))

    return plots.sketch(title, alt, HEIGHT, 46, plots.RIGHT, draw)
