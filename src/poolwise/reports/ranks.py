"""Ranks and posteriors of single runs: a table, a sentence a group, and the critical-difference picture.

The picture is Demšar's (2006), turned by a right angle so that names have room: checkpoints by mean rank, a bar along
those that are not told apart; the bars come from pairwise Wilcoxon tests with Holm's correction, not from mean ranks
(Benavoli, Corani & Mangili 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from poolwise.reports import plots
from poolwise.reports.tables import Table
from poolwise.reports.words import count, group_words, listing, number, points, probability
from poolwise.verdicts.single_runs import SingleRuns

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table(found: Sequence[SingleRuns], baseline: str) -> Table | None:
    """Mean ranks and posterior probabilities of every checkpoint, by group."""
    if not found:
        return None
    sections = []
    for group in found:
        chances = {p.design: p for p in group.posteriors}
        body = tuple(
            (
                name, number(rank),
                *(
                    [number(value) for value in (p.worse, p.equivalent, p.better)]
                    if (p := chances.get(name))
                    else ("–",) * 3
                ),
            )
            for name, rank in group.ranks
        )  # fmt: skip
        friedman = f"Friedman’s p {probability(group.p_value)} (χ² {number(group.chi2)})"
        sections.append((f"{group.group} · {count(group.tasks, 'task')}, {friedman}", body))
    margin = points(found[0].margin, 1)
    note = (
        "Checkpoints only. Mean rank over tasks, 1 is best. Probabilities by the Bayesian signed-rank test against "
        f"{baseline}: below, within ±{margin} points of, above it on a task like these."
    )
    columns = ("Design", "Mean rank", "P below", f"P within ±{margin}", "P above")
    return Table("Ranks of checkpoints", columns, tuple(sections), note)


def sentences(found: Sequence[SingleRuns]) -> list[str]:
    """One sentence a group: Friedman's test and who is not told apart."""
    said = []
    for group in found:
        where = f"On {group_words(group.group)} ({count(group.tasks, 'task')}, checkpoints only)"
        sets = "; ".join(listing(members) for members in group.alike)
        apart = f"not told apart: {sets}" if sets else "every pair is told apart"
        said.append(f"{where}, Friedman’s p is {probability(group.p_value)}; after Holm over all pairs, {apart}.")
    return said


def panels(found: Sequence[SingleRuns]) -> list[plots.Panel]:
    """A critical-difference picture for each group of three designs or more."""
    return [_panel(group) for group in found if len(group.ranks) > 2]


def _panel(group: SingleRuns) -> plots.Panel:
    names, ranks = zip(*group.ranks, strict=True)
    labels = [name if len(name) <= plots.LABEL_LETTERS else f"{name[: plots.LABEL_LETTERS - 1]}…" for name in names]
    left = min(plots.LETTER * max(map(len, labels)) + 16, 0.46 * plots.WIDTH)
    k, gap = len(names), 0.045 * len(names)
    end = k + 0.3 + gap * len(group.alike)

    def draw(axes: Axes) -> None:
        axes.set_xlim(0.7, end)
        axes.set_ylim(k - 0.5, -0.5)
        every = -(-k // 6)
        axes.set_xticks(range(1, k + 1, every))
        axes.grid(axis="x", color=plots.RULE, linewidth=0.7)
        axes.set_yticks(range(k), [label.replace("$", r"\$") for label in labels])
        axes.set_xlabel("mean rank, 1 is best", color=plots.MUTED, fontsize=11, labelpad=4)
        for place, rank in enumerate(ranks):
            axes.plot([rank], [place], "o", color=plots.INK, markersize=6.6, zorder=3)
        for column, members in enumerate(group.alike):
            x, rows = k + 0.3 + gap * column, [names.index(name) for name in members]
            axes.plot((x, x), (rows[0], rows[-1]), color=plots.BETTER, linewidth=2, clip_on=False, zorder=2)
            axes.plot([x] * len(rows), rows, "o", color=plots.BETTER, markersize=4.5, clip_on=False, zorder=3)

    told = "; ".join(f"{name} {number(rank)}" for name, rank in group.ranks)
    alike = "; ".join(listing(members) for members in group.alike) or "none"
    alt = f"Critical-difference picture, {group.group}: mean ranks {told}. Not told apart: {alike}."
    return plots.sketch(group.group, alt, plots.ROW * k + plots.TOP + plots.AXIS, left, plots.RIGHT, draw)
