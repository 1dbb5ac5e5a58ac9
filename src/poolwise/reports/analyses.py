"""The analyses besides the contrasts, in words and tables: factors, controls, predictions, base models, tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from poolwise.reports import plots
from poolwise.reports.tables import Cells, Table, sections
from poolwise.reports.words import (
    count,
    decimals,
    group_words,
    interval,
    listing,
    points,
    probability,
    sample_words,
)
from poolwise.verdicts.controls import scored, smallest_seen
from poolwise.verdicts.factors import FactorEffect, Factorial
from poolwise.verdicts.findings import Findings

KINDS = {
    "main": "main effects",
    "control": "against capacity controls",
    "interaction": "interactions",
}
MARKS = {"above": "better", "below": "worse", "inconclusive": "inconclusive"}
DRAWN = 14  # number of effects that a panel of the picture has room for


def _groups(results: Iterable[Any]) -> list[str]:
    """The groups of some results, in order of appearance."""
    return list(dict.fromkeys(result.group for result in results))


def _by_group(results: Iterable[Any], cells: Callable[[Any], Cells]) -> tuple[tuple[str, tuple[Cells, ...]], ...]:
    """The sections of a table with one row for each result."""
    rows = list(results)
    return sections(_groups(rows), lambda group: [cells(row) for row in rows if row.group == group])


def factor_sentences(factors: Factorial) -> list[str]:
    """One sentence for each main effect of attention, each contrast with a capacity control and each interaction with
    a verdict, and one for all other interactions of a group."""
    effects = factors.effects
    text = [_factor_sentence(e) for e in effects if e.kind == "control" or e.factors == ("attention",)]
    text += [_factor_sentence(e) for e in effects if e.kind == "interaction" and e.verdict != "inconclusive"]
    for group in _groups(effects):
        open_ones = [e for e in effects if (e.group, e.kind, e.verdict) == (group, "interaction", "inconclusive")]
        if open_ones:
            widest = max(max(abs(e.ci_low), abs(e.ci_high)) for e in open_ones)
            text.append(
                f"On {group_words(group)}, {count(len(open_ones), 'interaction')} of attention and pooling "
                f"{'is' if len(open_ones) == 1 else 'are'} inconclusive: up to {points(widest, 1)} points either way "
                "are compatible."
            )
    return text


def factor_table(factors: Factorial, alpha: float) -> Table | None:
    """Every effect with its interval, by group and kind; None if there are none."""

    def cells(effect: FactorEffect) -> Cells:
        matched = sum(c > 0 for _, c in effect.coefficients) // len(effect.factors)
        return (
            label(effect), points(effect.difference, 2, True), interval(effect.ci_low, effect.ci_high),
            probability(effect.p_value), probability(effect.p_bh), points(effect.run_sd), str(matched), effect.verdict,
        )  # fmt: skip

    body = tuple(
        (f"{group} · {words}", rows)
        for group in _groups(factors.effects)
        for kind, words in KINDS.items()
        if (rows := tuple(cells(e) for e in factors.effects if (e.group, e.kind) == (group, kind)))
    )
    if not body:
        return None
    note = (
        "Points, for runs and tasks like these, tasks of one source averaged first; an effect is the mean over matched "
        "designs, which differ in nothing else. A capacity control is the same head without its attention. An "
        "interaction is the gain of the first factor under the second's level minus its gain under the second's "
        f"reference. Exploratory: Benjamini–Hochberg over {count(len(factors.effects), 'effect')}, above or below if "
        f"its p is at most {points(alpha / 100)}."
    )
    columns = ("Effect", "Difference", "95 % interval", "p", "p BH", "Run effect", "Matched", "Verdict")
    return Table("What each factor does", columns, body, note)


def factor_forest(factors: Factorial) -> list[plots.Panel]:
    """Main effects and contrasts with capacity controls with their intervals, a panel for each group, one scale."""
    shown = [effect for effect in factors.effects if effect.kind != "interaction"]
    rows = {
        group: [
            plots.Interval(label(e), e.ci_low, e.difference, e.ci_high, MARKS[e.verdict])
            for e in shown
            if e.group == group
        ]
        for group in _groups(shown)
    }
    return plots.intervals(
        [(group, some[:DRAWN]) for group, some in rows.items()],
        "points, level − reference",
        "Effects with 95 % interval",
        above=True,
    )


def label(effect: FactorEffect) -> str:
    """`bidirectional − causal`; for an interaction `(bidirectional − causal) × (mean − last_token)`."""
    parts = [f"{a} − {b}" for a, b in zip(effect.levels, effect.references, strict=True)]
    return parts[0] if len(parts) == 1 else " × ".join(f"({part})" for part in parts)


def _factor_sentence(effect: FactorEffect) -> str:
    digits = decimals(effect.difference, effect.ci_low, effect.ci_high)
    span = interval(effect.ci_low, effect.ci_high, digits)
    size = points(abs(effect.difference), digits)
    context = (
        f"{sample_words(effect.tasks, effect.sources)}, {count(effect.seeds, 'seed')}; run effect "
        f"{points(effect.run_sd)}; BH p {probability(effect.p_bh)}, exploratory"
    )
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
    if effect.verdict == "inconclusive":
        return (
            f"{where}{at}, {level} against {against} is inconclusive: differences from {span} points are "
            f"compatible ({context})."
        )
    side = "above" if effect.difference > 0 else "below"
    return f"{where}{at}, {level} scores {size} points {side} {against.rstrip(',')} (95 % interval {span}; {context})."


def alarms(findings: Findings) -> list[str]:
    """Warnings of the controls: an A/A arm that differs, a broken arm that nowhere scores lower."""
    text = []
    for band in (band for band in findings.bands if band.differs):
        where = listing([f"{group_words(g)} (Holm p {probability(q)})" for g, q in band.p_holm if g in band.differs])
        text.append(
            f"The A/A arm {band.design} differs from {findings.baseline} on {where}, though it is the same design "
            "under other seeds. Something besides the design is at work: treat every claim here as exploratory."
        )
    for arm in (arm for arm in findings.broken if arm.tested and not arm.losses):
        text.append(
            f"The broken arm {arm.design} is not shown to score below {findings.baseline} anywhere: this study would "
            "not detect a design that does not work."
        )
    return text


def control_sentences(findings: Findings) -> list[str]:
    """The noise band, the broken arm and the smallest loss that is detected, a sentence or two for each."""
    return [*_band_sentences(findings), *_broken_sentences(findings), *_ladder_sentences(findings)]


def _band_sentences(findings: Findings) -> list[str]:
    text = []
    for band in findings.bands:
        span = interval(band.ci_low, band.ci_high)
        least = f"; smallest Holm p {probability(min(p for _, p in band.p_holm))}" if band.p_holm else ""
        text.append(
            f"Noise band: {band.design}, the same design as {findings.baseline} under other seeds, differs from it "
            f"by {points(abs(band.difference))} points at most ({group_words(band.group)}, "
            f"{findings.percent} % interval {span}{least})."
        )
    return text


def _broken_sentences(findings: Findings) -> list[str]:
    text = []
    for arm in findings.broken:
        by = f", by {points(arm.losses[0], 1)} to {points(arm.losses[-1], 1)} points" if arm.losses else ""
        text.append(
            f"Broken arm: {arm.design} is shown to score below {findings.baseline} in {len(arm.losses)} of "
            f"{count(arm.groups, 'group')}{by}."
        )
    return text


def _ladder_sentences(findings: Findings) -> list[str]:
    rungs = findings.rungs
    seen, unseen = [], []
    for group in _groups(rung for rung in rungs if rung.p_value is not None):
        smallest = smallest_seen(rungs, group)
        largest = min((rung for rung in rungs if rung.group == group), key=lambda rung: rung.difference)
        if smallest:
            seen.append(f"{group_words(group)} {points(-smallest.difference, 1)}")
        elif largest.p_value is not None:
            unseen.append(f"{group_words(group)} {points(-largest.difference, 1)}")
    text = []
    if seen:
        text.append(f"Dilution ladder: the smallest loss that this study's test detects, in points: {listing(seen)}.")
    if unseen:
        text.append(
            f"Dilution ladder: the largest loss tried is too small to be detected, in points: {listing(unseen)}."
        )
    detectable = sorted(row.verdict.detectable for row in findings.rows if row.verdict)
    if unseen and not seen and detectable:
        text.append(
            f"A design's loss would be detected with 80 % power from {points(detectable[0], 1)} points in the most, "
            f"{points(detectable[-1], 1)} in the least sensitive contrast."
        )
    return text


def ladder_table(findings: Findings) -> Table | None:
    """Every rung of every group: the loss it was calibrated to, its loss, whether the study's test detects it."""
    if not findings.rungs:
        return None
    body = _by_group(
        findings.rungs,
        lambda rung: (
            rung.design, points(rung.target, 1), points(rung.difference, 2, True),
            "–" if rung.ci_low is None else interval(rung.ci_low, rung.ci_high), probability(rung.p_adjusted),
            "yes" if rung.seen else "no",
        ),
    )  # fmt: skip
    note = (
        f"{findings.baseline} with noise in its embeddings, calibrated on training pairs; nothing was trained. "
        f"Points against {findings.baseline}; tested as one more design at Holm's first step over "
        f"{count(findings.family, 'contrast')}."
    )
    columns = ("Rung", "Calibrated loss", "Difference", f"{findings.percent} % interval", "p × contrasts", "Detected")
    return Table("Dilution ladder", columns, body, note)


def predictions_table(findings: Findings, predictions: Mapping[str, Any] | None) -> Table | None:
    """Each prediction with its outcome; None without predictions for the designs of the study.

    predictions: `sha256`, `written`, `mechanisms` (group -> favoured, over).
    """
    outcomes = scored(findings, predictions["mechanisms"]) if predictions else ()
    if not outcomes or not predictions:
        return None
    rows = tuple(
        (
            each.group, f"{each.favoured} over {each.over}", points(each.difference, 1, True),
            "–" if each.ci_low is None else interval(each.ci_low, each.ci_high, 1), each.outcome,
        )
        for each in outcomes
    )  # fmt: skip
    words = [each.outcome for each in outcomes]
    note = (
        f"Written {predictions['written']}, before any design was run (predictions.toml, sha256 "
        f"{predictions['sha256'][:16]}). Favoured − other in points, 95 % interval over runs and items, uncorrected: "
        "right if it lies above 0, wrong if below, otherwise undecided. "
        f"Right {words.count('right')}, wrong {words.count('wrong')}, undecided {words.count('undecided')}; "
        f"{sum(each.sign for each in outcomes)} of {len(outcomes)} have the right sign."
    )
    columns = ("Mechanism", "Predicted", "Difference", "95 % interval", "Outcome")
    return Table("Predictions", columns, (("", rows),), note, text=2)


def prediction_sentences(findings: Findings, predictions: Mapping[str, Any] | None) -> dict[str, str]:
    """Group -> a sentence with its prediction and the outcome."""
    text = {}
    for each in scored(findings, predictions["mechanisms"]) if predictions else ():
        span = "" if each.ci_low is None else f", 95 % interval {interval(each.ci_low, each.ci_high, 1)}"
        text[each.group] = (
            f"Predicted: {each.favoured} above {each.over}. Outcome: {points(each.difference, 1, True)} points{span}: "
            f"{each.outcome}."
        )
    return text


def base_sentences(findings: Findings) -> list[str]:
    """The agreement of the base models, group by group."""
    across = findings.robustness
    if across is None:
        return []
    text = [
        f"The scores above are means over {count(len(across.bases), 'base model')} ({listing(across.bases)}), run by "
        "run; their verdicts are about these base models. Costs are means over them too."
    ]
    agreements = {
        "contradicts": "the base models contradict each other",
        "agrees": "the base models agree",
    }
    for group in _groups(across.designs):
        rows = [row for row in across.designs if row.group == group]
        for word, claim in agreements.items():
            if names := [row.design for row in rows if row.agreement == word]:
                text.append(f"{group}: on {listing(names)} {claim}.")
        signs = sum(row.same_sign for row in rows)
        text.append(
            f"{group}: {signs} of {count(len(rows), 'difference')} to {findings.baseline} "
            f"{'has' if signs == 1 else 'have'} the same sign on every base model."
        )
    for ranking in across.rankings:
        text.append(
            f"{ranking.group}: Kendall's tau between the rankings of {count(ranking.designs, 'design')} on "
            f"{ranking.base} and {ranking.other} is {ranking.tau:.2f} (95 % interval {ranking.ci_low:.2f} to "
            f"{ranking.ci_high:.2f})."
        )
    return text


def _with_interval(difference: float, low: float | None, high: float | None) -> str:
    """`+2.00 (1.20 to 2.80)`."""
    return f"{points(difference, 2, True)} ({interval(low, high)})"


def base_table(findings: Findings) -> Table | None:
    """Difference to the baseline on each base model, with its interval and verdict; and whether they agree."""
    across = findings.robustness
    if across is None:
        return None
    body = _by_group(
        across.designs,
        lambda row: (
            row.design,
            *(
                _with_interval(on.difference, on.ci_low, on.ci_high)
                + ("" if on.verdict == "none" else f", {on.verdict}")
                for on in row.on
            ),
            "yes" if row.same_sign else "no",
            row.agreement,
        ),
    )
    note = (
        f"Points against {findings.baseline}, {findings.percent} % interval; Holm within each base model. "
        "agrees: better on all or worse on all; contradicts: better on one and worse on another; open: anything else."
    )
    columns = ("Design", *across.bases, "Same sign", "Verdict")
    return Table("Base models", columns, body, note)


def tuning_table(findings: Findings) -> Table | None:
    """Each contrast with the same recipe and equally tuned; None if the study does not tune."""
    if not findings.outcomes:
        return None
    body = _by_group(
        findings.outcomes,
        lambda row: (
            row.design, _with_interval(row.same_difference, *row.same_ci), row.same,
            _with_interval(row.tuned_difference, *row.tuned_ci), row.tuned, row.verdict,
        ),
    )  # fmt: skip
    note = (
        f"Points against {findings.baseline} with {findings.percent} % interval; Holm within each arm. holds: the "
        "same verdict in both; depends on the recipe: two verdicts that contradict each other; open: anything else."
    )
    columns = ("Design", "Same recipe", "Verdict (same recipe)", "Equally tuned", "Verdict (tuned)", "Verdict")
    return Table("Same recipe and equally tuned", columns, body, note)


def settings_table(findings: Findings) -> Table | None:
    """The best setting of each design; None if the study does not tune."""
    if not findings.winners:
        return None
    several = len({winner.base for winner in findings.winners}) > 1
    rows = tuple(
        (
            f"{winner.design} on {winner.base}" if several else winner.design,
            f"{winner.setting.learning_rate:g}", f"{winner.setting.head_learning_rate:g}",
            str(winner.setting.steps), points(winner.score), str(winner.tried),
        )
        for winner in findings.winners
    )  # fmt: skip
    note = (
        "Best mean score on the development tasks, which are not reported, of one run each: the largest of several "
        "noisy scores, hence too high. A design without trainable pooling has no head rate to search."
    )
    columns = ("Design", "Learning rate", "Head learning rate", "Steps", "Development score", "Settings tried")
    return Table("Equally tuned: settings", columns, (("", rows),), note)


def tuning_sentences(findings: Findings) -> list[str]:
    """How many verdicts hold with equal tuning, and which depend on the recipe."""
    text = []
    for group in _groups(findings.outcomes):
        rows = [row for row in findings.outcomes if row.group == group]
        holds = sum(row.verdict == "holds" for row in rows)
        text.append(f"{group}: {holds} of {count(len(rows), 'verdict')} hold with equal tuning.")
        if flips := [row for row in rows if row.verdict == "depends on the recipe"]:
            parts = [f"{row.design} ({row.same} with the same recipe, {row.tuned} tuned)" for row in flips]
            text.append(f"{group}: depends on the recipe: {listing(parts)}.")
    return text
