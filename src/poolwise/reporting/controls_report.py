"""The controls of a study in sentences and tables: noise band, broken arm, dilution ladder, predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poolwise import stats
from poolwise.reporting.tables import Table
from poolwise.reporting.wording import count, group_words, interval, listing, points, probability
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.control_arms import noise_bands, scored
from poolwise.verdicts.rungs import Rung, rungs, smallest_seen


def sentences(comparison: Comparison) -> list[str]:
    """The noise band, the broken arm and the smallest loss that is seen, a sentence or two each."""
    return [*_bands(comparison), *_broken(comparison), *_ladder(comparison)]


def alarms(comparison: Comparison, roles: Mapping[str, str]) -> list[str]:
    """What the controls say against the study: an A/A arm that differs, a broken arm that nobody notices.

    Args:
        roles: `aa` or `broken` for those of `comparison.control_designs`; other roles raise no alarm.
    """
    said = []
    for design in comparison.control_designs:
        rows = [
            row for row in comparison.control_rows if row.design == design and (row.verdict or row.p_value is not None)
        ]
        shown = [row.verdict or row for row in rows]
        p = stats.holm([1.0 if found.p_value is None else found.p_value for found in shown]).tolist()
        told = [(row.group, q, found) for row, q, found in zip(rows, p, shown, strict=True) if q <= comparison.alpha]
        for band in noise_bands(comparison, [design]) if roles.get(design) == "aa" else ():
            if band.differs:
                where = listing(
                    [f"{group_words(g)} (Holm p {probability(q)})" for g, q in band.p_holm if g in band.differs]
                )
                said.append(
                    f"The A/A arm {design} differs from {comparison.baseline} on {where}, though it is the same design "
                    "under other seeds. Something besides the design is at work: read every claim here as exploratory."
                )
        if roles.get(design) == "broken" and rows and not any(found.difference < 0 for _, _, found in told):
            said.append(
                f"The broken arm {design} is not found below {comparison.baseline} anywhere: this study would not "
                "notice a design that does not work."
            )
    return said


def _bands(comparison: Comparison) -> list[str]:
    said = []
    for band in noise_bands(comparison):
        span = interval(band.ci_low, band.ci_high)
        least = f"; smallest Holm p {probability(min(p for _, p in band.p_holm))}" if band.p_holm else ""
        said.append(
            f"Noise band: {band.design}, the same design as {comparison.baseline} under other seeds, differs from it "
            f"by {points(abs(band.difference))} points at most ({group_words(band.group)}, "
            f"{comparison.percent} % interval {span}{least})."
        )
    return said


def _broken(comparison: Comparison) -> list[str]:
    said = []
    for design in (name for name, role in comparison.roles if role == "broken"):
        rows = [row for row in comparison.control_rows if row.design == design]
        shown = [row.verdict or row for row in rows]
        p = stats.holm([1.0 if found.p_value is None else found.p_value for found in shown]).tolist()
        lost = [f for f, q in zip(shown, p, strict=True) if q <= comparison.alpha and f.difference < 0]
        if not rows:
            continue
        losses = sorted(-found.difference for found in lost)
        by = f", by {points(losses[0], 1)} to {points(losses[-1], 1)} points" if losses else ""
        said.append(
            f"Broken arm: {design} is found below {comparison.baseline} in {len(lost)} of "
            f"{count(len(rows), 'group')}{by}."
        )
    return said


def _ladder(comparison: Comparison) -> list[str]:
    found = rungs(comparison)
    if not found or all(rung.p_value is None for rung in found):
        return []
    seen, unseen = [], []
    for group in dict.fromkeys(rung.group for rung in found):
        smallest = smallest_seen(found, group)
        largest = max((rung for rung in found if rung.group == group), key=lambda rung: -rung.difference)
        if smallest:
            seen.append(f"{group_words(group)} {points(-smallest.difference, 1)}")
        elif largest.p_value is not None:
            unseen.append(f"{group_words(group)} {points(-largest.difference, 1)}")
    said = []
    if seen:
        said.append(
            f"Dilution ladder: the smallest loss that this study's own test calls one, in points: {listing(seen)}."
        )
    if unseen:
        said.append(f"Dilution ladder: the largest loss tried is too small to be seen, in points: {listing(unseen)}.")
    verdicts = [row.verdict for row in comparison.rows if row.verdict]
    if not seen and verdicts:
        found_from = sorted(verdict.detectable for verdict in verdicts)
        said.append(
            f"A design's loss would be found with 80 % power from {points(found_from[0], 1)} points on in the most, "
            f"{points(found_from[-1], 1)} in the least sensitive contrast."
        )
    return said


def ladder_table(comparison: Comparison) -> Table | None:
    """Every rung of every group: what it was calibrated to lose, what it loses, whether the study's test says so."""
    found = rungs(comparison)
    if not found:
        return None
    sections = []
    for group in dict.fromkeys(rung.group for rung in found):
        rows = tuple(_rung(rung) for rung in found if rung.group == group)
        sections.append((group, rows))
    note = (
        f"{comparison.baseline} with noise in its embeddings, calibrated on training pairs; nothing was trained. "
        f"Points against {comparison.baseline}; tested as one more design at Holm's first step over "
        f"{comparison.family} contrasts."
    )
    columns = ("Rung", "Calibrated to lose", "Difference", f"{comparison.percent} % interval", "p × contrasts", "Seen")
    return Table("Dilution ladder", columns, tuple(sections), note)


def _rung(rung: Rung) -> tuple[str, ...]:
    return (
        rung.design, points(rung.target, 1), points(rung.difference, 2, True),
        "–" if rung.ci_low is None else interval(rung.ci_low, rung.ci_high), probability(rung.p_adjusted),
        "yes" if rung.seen else "no",
    )  # fmt: skip


def predictions_table(comparison: Comparison, predictions: Mapping[str, Any] | None) -> Table | None:
    """Each prediction beside what came out; None without predictions for the designs of the study.

    predictions: `sha256`, `written`, `mechanisms` (group -> favoured, over).
    """
    found = scored(comparison, predictions["mechanisms"]) if predictions else ()
    if not found or not predictions:
        return None
    rows = tuple(
        (
            each.group, f"{each.favoured} over {each.over}", points(each.difference, 1, True),
            "–" if each.ci_low is None else interval(each.ci_low, each.ci_high, 1), each.outcome,
        )
        for each in found
    )  # fmt: skip
    outcomes = [each.outcome for each in found]
    note = (
        f"Written {predictions['written']}, before any design was run (predictions.toml, sha256 "
        f"{predictions['sha256'][:16]}). Favoured − other in points, 95 % interval over runs and items, uncorrected: "
        "right above 0, wrong below, else undecided. "
        f"Right {outcomes.count('right')}, wrong {outcomes.count('wrong')}, undecided "
        f"{outcomes.count('undecided')}; {sum(each.sign for each in found)} of {len(found)} have the right sign."
    )
    columns = ("Mechanism", "Predicted", "Difference", "95 % interval", "Came out")
    return Table("Predictions", columns, (("", rows),), note, text=2)


def predicted(comparison: Comparison, predictions: Mapping[str, Any] | None) -> dict[str, str]:
    """A sentence for each group with a prediction: what was predicted and what came out."""
    said = {}
    for each in scored(comparison, predictions["mechanisms"]) if predictions else ():
        span = "" if each.ci_low is None else f", 95 % interval {interval(each.ci_low, each.ci_high, 1)}"
        said[each.group] = (
            f"Predicted: {each.favoured} above {each.over}. Came out: {points(each.difference, 1, True)} points{span}: "
            f"{each.outcome}."
        )
    return said
