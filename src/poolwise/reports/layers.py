"""The layers of trained designs as tables, a heat map, a picture and a page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from poolwise.reports import plots
from poolwise.reports.tables import Table
from poolwise.reports.words import count, group_words, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Found = Mapping[str, Mapping[int, Sequence[float]]]
"""Design -> seed -> (L,) weights that sum to 1."""


def table(found: Found, texts: int) -> Table | None:
    """Mean weight of each layer over the seeds, in percent, a column a design; None without designs."""
    if not found:
        return None
    layers = max(len(weights) for runs in found.values() for weights in runs.values())
    body = tuple((str(layer + 1), *(_cell(runs, layer) for runs in found.values())) for layer in range(layers))
    note = (
        "Percent of the attention that goes to each layer, 1 the lowest; mean over latents, heads, seeds and "
        f"{count(texts, 'evaluation text')}; ± is the sd of the runs. Even would be {number(100 / layers, 1)}."
    )
    return Table("Attention over layers", ("Layer", *found), (("", body),), note)


def _cell(runs: Mapping[int, Sequence[float]], layer: int) -> str:
    values = [100 * weights[layer] for weights in runs.values() if layer < len(weights)]
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) < 2:
        return number(mean, 1)
    sd = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{number(mean, 1)} ±{number(sd, 1)}"


def most(found: Found) -> str:
    """The largest share of one layer in one run, in percent: the strongest colour of the heat map."""
    shares = [weight for runs in found.values() for weights in runs.values() for weight in weights]
    return f"{100 * max(shares, default=0):.0f}"


def panel(found: Found) -> list[plots.Panel]:
    """A row for each run of each design, a cell for each layer: the stronger its colour, the more attention."""
    if not found:
        return []
    rows = [(f"{design} · {seed}", list(weights)) for design, runs in found.items() for seed, weights in runs.items()]
    layers = max(len(weights) for _, weights in rows)
    top = max(max(weights) for _, weights in rows)
    labels = [label if len(label) <= 21 else f"{label[:16]}…{label[-4:]}" for label, _ in rows]
    left = plots.LETTER * max(map(len, labels)) + 16

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        axes.set_xlim(0.5, layers + 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [label.replace("$", r"\$") for label in labels])
        every = max(1, -(-layers // 8))
        axes.set_xticks([1, *range(every, layers + 1, every)] if every > 1 else range(1, layers + 1))
        axes.set_xlabel("layer", color=plots.MUTED, fontsize=11, labelpad=4)
        for y, (_, weights) in enumerate(rows):
            for layer, weight in enumerate(weights, 1):
                axes.add_patch(Rectangle((layer - 0.48, y - 0.42), 0.96, 0.84, linewidth=0, color=plots.BAND))
                axes.add_patch(
                    Rectangle((layer - 0.48, y - 0.42), 0.96, 0.84, linewidth=0, color=plots.BETTER, alpha=weight / top)
                )

    told = "; ".join(f"{label} most on layer {weights.index(max(weights)) + 1}" for label, weights in rows)
    alt = f"Heat map of attention over {layers} layers, a row a run: {told}."
    height = plots.ROW * len(rows) + plots.TOP + plots.AXIS
    return [plots.sketch("Design · seed", alt, height, left, plots.RIGHT, draw)]


Run = Mapping[str, Any]
HEIGHT = 220  # px
STYLE = (
    ":root{color-scheme:light dark;--paper:#fdfdfb;--ink:#1d1d1b;--muted:#66655f;--rule:#deddd6;--better:#1f6f54;"
    "--worse:#a8431f;--band:#e6ece8}@media(prefers-color-scheme:dark){:root{--paper:#1a1a18;--ink:#ececea;"
    "--muted:#a3a29b;--rule:#3a3a36;--better:#6fc3a2;--worse:#e0906f;--band:#2c3430}}"
    "body{background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;"
    "padding:0 1rem}table{border-collapse:collapse}td,th{padding:.1rem .8rem .1rem 0;text-align:right}"
    "figure{display:inline-block;margin:0 1rem 1rem 0;width:340px}svg{width:340px}figcaption,p{color:var(--muted)}"
)


def designs(found: Mapping[str, Any]) -> dict[str, list[Run]]:
    """The runs by design (and base model, where there are several)."""
    several = len({run["base"] for run in found["runs"]}) > 1
    grouped: dict[str, list[Run]] = {}
    for run in found["runs"]:
        grouped.setdefault(f"{run['design']} on {run['base']}" if several else run["design"], []).append(run)
    return grouped


def tables(found: Mapping[str, Any]) -> list[Table]:
    """One table a design: a row a layer, a column a task type, then attention and layer weights where it has them."""
    return [_table(name, runs) for name, runs in designs(found).items()]


def _table(name: str, runs: Sequence[Run]) -> Table:
    kinds = list(dict.fromkeys(score["task_type"] for run in runs for score in run["scores"]))
    layers = (
        max(score["layer"] for run in runs for score in run["scores"]) if kinds else len(runs[0]["attention"] or ())
    )
    inside = [key for key in ("attention", "weights") if all(run[key] for run in runs)]
    rows = []
    for layer in range(1, layers + 1):
        cells = [_score_cell([100 * mean(run["scores"], kind, layer) for run in runs]) for kind in kinds]
        cells += [
            _score_cell([(100 if key == "attention" else 1) * run[key][layer - 1] for run in runs]) for key in inside
        ]
        rows.append((str(layer), *cells))
    if kinds and all(run["own"] for run in runs):
        own = [_score_cell([100 * mean(run["own"], kind) for run in runs]) for kind in kinds]
        rows.append(("the design", *own, *("" for _ in inside)))
    token = "mean of its tokens" if runs[0]["reduce"] == "mean" else "last token"
    spread = "± is the sd of the runs" if len(runs) > 1 else "one run, whose luck is in every number"
    note = (
        f"Scores ×100 of each layer's {token} as the embedding, mean over tasks; {count(len(runs), 'run')}; {spread}. "
        "Layer 1 is the lowest."
    )
    heads = {"attention": "Attention, %", "weights": "Norm of weights"}
    columns = ("Layer", *(group_words(kind) for kind in kinds), *(heads[key] for key in inside))
    return Table(f"Layers of {name}", columns, (("", tuple(rows)),), note)


def mean(scores: Sequence[Mapping[str, Any]], kind: str, layer: int | None = None) -> float:
    """Mean over the tasks of a type, splits and subsets of each averaged first."""
    by_task: dict[str, list[float]] = {}
    for score in scores:
        if score["task_type"] == kind and (layer is None or score["layer"] == layer):
            by_task.setdefault(score["task"], []).append(score["score"])
    means = [sum(values) / len(values) for values in by_task.values()]
    return sum(means) / len(means) if means else float("nan")


def _score_cell(values: Sequence[float]) -> str:
    middle = sum(values) / len(values)
    if len(values) < 2:
        return number(middle, 2)
    sd = (sum((value - middle) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{number(middle, 2)} ±{number(sd, 2)}"


def panels(found: Mapping[str, Any]) -> list[plots.Panel]:
    """One panel for each design and task type: the score of every layer, a thin line a run; bars: attention."""
    made = []
    for name, runs in designs(found).items():
        for kind in dict.fromkeys(score["task_type"] for run in runs for score in run["scores"]):
            layers = sorted({score["layer"] for score in runs[0]["scores"]})
            lines = [[100 * mean(run["scores"], kind, layer) for layer in layers] for run in runs]
            own = [100 * mean(run["own"], kind) for run in runs if run["own"]]
            attention = runs[0]["attention"]
            made.append(_panel(f"{name} · {group_words(kind)}", layers, lines, own, attention))
    return made


def _panel(
    title: str, layers: Sequence[int], lines: Sequence[Sequence[float]], own: Sequence[float], attention: Any
) -> plots.Panel:
    middle = [sum(values) / len(values) for values in zip(*lines, strict=True)]
    best = layers[middle.index(max(middle))]
    alt = f"{title}: score of every layer; the best single layer is {best} with {max(middle):.1f}"
    alt += f"; the design itself scores {sum(own) / len(own):.1f}." if own else "."

    def draw(axes: Axes) -> None:
        values = [value for line in lines for value in line] + list(own)
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
        if own:
            axes.axhline(sum(own) / len(own), color=plots.INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("layer", color=plots.MUTED, fontsize=11, labelpad=4)
        every = max(1, -(-len(layers) // 8))
        axes.set_xticks([layer for layer in layers if layer % every == 0 or layer in (layers[0], layers[-1])])

    return plots.sketch(title, alt, HEIGHT, 46, plots.RIGHT, draw)


def page(found: Mapping[str, Any]) -> str:
    """One self-contained HTML page: the pictures, then the tables."""
    figures = "".join(
        f"<figure><figcaption>{html.escape(panel.group)}</figcaption>{panel.svg}</figure>" for panel in panels(found)
    )
    parts = []
    for table in tables(found):
        head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
        )
        parts.append(
            f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{body}</table><p>{html.escape(table.note)}</p>"
        )
    said = "Line: each run; dot: their mean; dashed: the design itself; bars: attention of its latents to the layers."
    title = f"{html.escape(found['study'])}: layers"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>"
        f"<body><h1>{title}</h1><p>{said}</p>{figures}{''.join(parts)}</body></html>\n"
    )
