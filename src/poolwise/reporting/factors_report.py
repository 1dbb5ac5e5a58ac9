"""The analysis of factors in words, as a table and as a picture; the grammar is that of `reporting.wording`."""

from __future__ import annotations

from poolwise.reporting import plots
from poolwise.reporting.tables import Table
from poolwise.reporting.wording import (
    count,
    decimals,
    group_words,
    interval,
    listing,
    points,
    probability,
    sample_words,
)
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.factorial import FactorEffect, Factorial

KINDS = {
    "main": "main effects",
    "control": "against capacity controls",
    "interaction": "interactions",
}
DRAWN = 14  # effects that a panel of the picture has room for


def sentences(found: Factorial) -> list[str]:
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


def table(found: Factorial, alpha: float) -> Table | None:
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


def forest(comparison: Comparison, found: Factorial) -> list[plots.Panel]:
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
