"""The analyses beside the contrasts in words and tables: factors, controls, base models, tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poolwise import stats
from poolwise.reports import plots
from poolwise.reports.tables import Table
from poolwise.reports.words import (
    count,
    decimals,
    group_words,
    interval,
    listing,
    number,
    points,
    probability,
    sample_words,
)
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.controls import Rung, noise_bands, rungs, scored, smallest_seen
from poolwise.verdicts.factors import FactorEffect, Factorial

KINDS = {
    "main": "main effects",
    "control": "against capacity controls",
    "interaction": "interactions",
}
DRAWN = 14  # effects that a panel of the picture has room for


def factor_sentences(found: Factorial) -> list[str]:
    """One sentence for each main effect of attention and each contrast with a capacity control, for each interaction
    that stands, and for all others of a group together."""
    said = []
    for effect in found.effects:
        if effect.kind == "control" or effect.factors == ("attention",):
            said.append(_sentence(effect))
    said += [_sentence(effect) for effect in found.effects if effect.kind == "interaction" and _stands(effect)]
    for group in dict.fromkeys(effect.group for effect in found.effects):
        effects = [effect for effect in found.effects if (effect.group, effect.kind) == (group, "interaction")]
        open_ = [effect for effect in effects if not _stands(effect)]
        if open_:
            widest = max(max(abs(effect.ci_low), abs(effect.ci_high)) for effect in open_)
            said.append(
                f"On {group_words(group)}, {count(len(open_), 'interaction')} of attention and pooling "
                f"{'is' if len(open_) == 1 else 'are'} inconclusive: up to {points(widest, 1)} points either way are "
                "compatible."
            )
    return said


def factor_table(found: Factorial, alpha: float) -> Table | None:
    """Every effect with its interval, by group and kind."""
    sections = []
    for group in dict.fromkeys(effect.group for effect in found.effects):
        for kind, words in KINDS.items():
            rows = [
                (
                    label(effect), points(effect.difference, 2, True), interval(effect.ci_low, effect.ci_high),
                    probability(effect.p_value), probability(effect.p_bh), points(effect.run_sd),
                    str(sum(c > 0 for _, c in effect.coefficients) // len(effect.factors)), effect.verdict,
                )
                for effect in found.effects
                if (effect.group, effect.kind) == (group, kind)
            ]  # fmt: skip
            if rows:
                sections.append((f"{group} · {words}", tuple(rows)))
    if not sections:
        return None
    note = (
        "Points, for runs and tasks like these, tasks of one source averaged first; an effect is the mean over matched "
        "designs, which differ in nothing else. A capacity control is the same head without its attention. An "
        "interaction is what the first gains under the second's level beyond its gain under the second's reference. "
        f"Exploratory: Benjamini–Hochberg over {len(found.effects)} effects, above or below where its p is at most "
        f"{points(alpha / 100)}."
    )
    columns = ("Effect", "Difference", "95 % interval", "p", "p BH", "Run effect", "Matched", "Verdict")
    return Table("What each factor does", columns, tuple(sections), note)


def factor_forest(comparison: Comparison, found: Factorial) -> list[plots.Panel]:
    """Main effects and contrasts with capacity controls with their intervals, a panel for each group, one scale."""
    shown = [effect for effect in found.effects if effect.kind != "interaction"]
    marks = {"above": "better", "below": "worse", "inconclusive": "inconclusive"}
    return plots.intervals(
        [
            (
                group,
                [
                    (label(e), e.ci_low, e.difference, e.ci_high, marks[e.verdict])
                    for e in shown
                    if e.group == group
                ][:DRAWN],
            )
            for group in comparison.groups
            if any(e.group == group for e in shown)
        ],
        "points, level − reference",
    )  # fmt: skip


def label(effect: FactorEffect) -> str:
    """`bidirectional − causal`; of an interaction `(bidirectional − causal) × (mean − last_token)`."""
    parts = [f"{a} − {b}" for a, b in zip(effect.levels, effect.references, strict=True)]
    return parts[0] if len(parts) == 1 else " × ".join(f"({part})" for part in parts)


def _stands(effect: FactorEffect) -> bool:
    return effect.verdict != "inconclusive"


def _sentence(effect: FactorEffect) -> str:
    digits = decimals(effect.difference, effect.ci_low, effect.ci_high)
    span = interval(effect.ci_low, effect.ci_high, digits)
    size = points(abs(effect.difference), digits)
    context = f"{sample_words(effect.tasks, effect.sources)}, {count(effect.seeds, 'seed')}; "
    context += f"run effect {points(effect.run_sd)}; BH p {probability(effect.p_bh)}, exploratory"
    where, level, reference = f"On {group_words(effect.group)}", effect.levels[0], effect.references[0]
    if effect.kind == "interaction":
        more = "more" if effect.difference > 0 else "less"
        return (
            f"{where}, {level} over {reference} gains {size} points {more} under {effect.levels[1]} than under "
            f"{effect.references[1]} (95 % interval {span}; {context})."
        )
    against = f"{reference}, its head without the attention," if effect.kind == "control" else reference
    at = f", averaged over {listing(effect.at) if len(effect.at) < 4 else f'{len(effect.at)} poolings'}"
    if len(effect.at) == 1:
        at = f", under {effect.at[0]}"
    if not _stands(effect):
        return (
            f"{where}{at}, {level} against {against} is inconclusive: differences from {span} points are "
            f"compatible ({context})."
        )
    side = "above" if effect.difference > 0 else "below"
    return f"{where}{at}, {level} scores {size} points {side} {against.rstrip(',')} (95 % interval {span}; {context})."


def control_sentences(comparison: Comparison) -> list[str]:
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


WORDS = {
    "agrees": "the base models agree",
    "contradicts": "the base models contradict each other",
    "open": "not settled on every base model",
}


def base_sentences(comparison: Comparison) -> list[str]:
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


def base_table(comparison: Comparison) -> Table | None:
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


def tuning_table(comparison: Comparison) -> Table | None:
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


def tuning_sentences(comparison: Comparison) -> list[str]:
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
