"""Same recipe and equally tuned, side by side, and what each design was tuned to."""

from __future__ import annotations

from poolwise.reporting.tables import Table
from poolwise.reporting.wording import count, interval, listing, number, points
from poolwise.verdicts.comparison import Comparison


def table(comparison: Comparison) -> Table | None:
    """Each contrast in both arms; None where the study does not tune."""
    if not comparison.outcomes:
        return None
    sections = []
    for group in dict.fromkeys(found.group for found in comparison.outcomes):
        rows = []
        for found in (found for found in comparison.outcomes if found.group == group):
            same = f"{points(found.same_difference, 2, True)} ({interval(*found.same_ci)})"
            tuned = f"{points(found.tuned_difference, 2, True)} ({interval(*found.tuned_ci)})"
            rows.append((found.design, same, found.same, tuned, found.tuned, found.verdict))
        sections.append((group, tuple(rows)))
    note = (
        f"Points against {comparison.baseline} with {comparison.percent} % interval; Holm within each arm. holds: the "
        "same verdict in both; depends on the recipe: two verdicts that contradict each other; open: anything else."
    )
    columns = ("Design", "Same recipe", "says", "Equally tuned", "says so", "Verdict")
    return Table("Same recipe and equally tuned", columns, tuple(sections), note)


def settings(comparison: Comparison) -> Table | None:
    """The setting of each design in the second arm; None where the study does not tune."""
    if not comparison.winners:
        return None
    several = len({winner.base for winner in comparison.winners}) > 1
    rows = tuple(
        (
            f"{found.design} on {found.base}" if several else found.design,
            f"{found.setting.learning_rate:g}",
            f"{found.setting.head_learning_rate:g}",
            str(found.setting.steps),
            points(found.score),
            str(found.tried),
        )
        for found in comparison.winners
    )
    note = (
        "Best mean score on the development tasks, which are reported nowhere, of one run each: the largest of several "
        "noisy scores, so too high. A design without trainable pooling has no head rate to search."
    )
    columns = ("Design", "Learning rate", "Head learning rate", "Steps", "Development score", "Settings tried")
    return Table("Equally tuned: settings", columns, (("", rows),), note)


def sentences(comparison: Comparison) -> list[str]:
    """How many verdicts hold, and which depend on the recipe."""
    if not comparison.outcomes:
        return []
    said = []
    for group in dict.fromkeys(found.group for found in comparison.outcomes):
        rows = [found for found in comparison.outcomes if found.group == group]
        holds = sum(found.verdict == "holds" for found in rows)
        said.append(f"{group}: {number(holds, 0)} of {count(len(rows), 'verdict')} hold with equal tuning.")
        if flips := [found for found in rows if found.verdict == "depends on the recipe"]:
            parts = [f"{found.design} ({found.same} with the same recipe, {found.tuned} tuned)" for found in flips]
            said.append(f"{group}: depends on the recipe: {listing(parts)}.")
    return said
