"""Which layers a multi-layers pooling attends to: a heat map and its table, from what the trials left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from poolwise.reporting import plots
from poolwise.reporting.tables import Table
from poolwise.reporting.wording import count, number

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
