"""What several base models say, in words and as tables; the grammar is that of `reporting.wording`."""

from __future__ import annotations

from poolwise.reporting.tables import Table
from poolwise.reporting.wording import count, interval, listing, points
from poolwise.verdicts.comparison import Comparison

WORDS = {
    "agrees": "the base models agree",
    "contradicts": "the base models contradict each other",
    "open": "not settled on every base model",
}


def sentences(comparison: Comparison) -> list[str]:
    """What can be said of all base models, group by group."""
    found = comparison.robustness
    if found is None:
        return []
    said = [
        f"Scores above are means over {count(len(found.bases), 'base model')} ({listing(found.bases)}), run by run: "
        "their verdicts speak about these base models. Costs are means over them too."
    ]
    for group in dict.fromkeys(row.group for row in found.designs):
        rows = [row for row in found.designs if row.group == group]
        for word in ("contradicts", "agrees"):
            if names := [row.design for row in rows if row.agreement == word]:
                said.append(f"{group}: on {listing(names)} {WORDS[word]}.")
        signs = sum(row.same_sign for row in rows)
        said.append(
            f"{group}: {signs} of {count(len(rows), 'difference')} to {comparison.baseline} "
            f"{'point' if signs != 1 else 'points'} the same way on every base model."
        )
    for ranking in found.rankings:
        said.append(
            f"{ranking.group}: Kendall's tau between the rankings of {count(ranking.designs, 'design')} on "
            f"{ranking.base} and {ranking.other} is {ranking.tau:.2f} (95 % interval {ranking.ci_low:.2f} to "
            f"{ranking.ci_high:.2f})."
        )
    return said


def table(comparison: Comparison) -> Table | None:
    """Difference to the baseline on each base model, with its interval and verdict; and whether they agree."""
    found = comparison.robustness
    if found is None:
        return None
    sections = []
    for group in dict.fromkeys(row.group for row in found.designs):
        rows = []
        for row in (row for row in found.designs if row.group == group):
            cells = []
            for on in row.on:
                verdict = "" if on.verdict == "none" else f", {on.verdict}"
                cells.append(f"{points(on.difference, 2, True)} ({interval(on.ci_low, on.ci_high)}){verdict}")
            rows.append((row.design, *cells, "yes" if row.same_sign else "no", row.agreement))
        sections.append((group, tuple(rows)))
    note = (
        f"Points against {comparison.baseline}, {comparison.percent} % interval; Holm within each base model. "
        "agrees: better on all or worse on all; contradicts: better on one and worse on another; open: anything else."
    )
    columns = ("Design", *found.bases, "Same sign", "Verdict")
    return Table("Base models", columns, tuple(sections), note)
