"""The answer of a comparison over all its groups in a few plain sentences, and a list of its designs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from poolwise.reports.words import count, group_words, listing, outcome
from poolwise.verdicts.arms import FEW_SOURCES
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Row
from poolwise.verdicts.controls import scored
from poolwise.verdicts.findings import Findings
from poolwise.verdicts.recommendations import Recommendation

FEW_DESIGNS = 8
"""Up to this many designs are named; of more, the summary gives only how many of them differ on each group."""


def group_noun(comparison: Comparison) -> str:
    """The name of a group of the comparison: `mechanism`, `task type` or `group`."""
    planted = [comparison.of_items(group) for group in comparison.groups]
    if all(planted):
        return "mechanism"
    return "task type" if comparison.by == "task_type" and not any(planted) else "group"


def summary(findings: Findings, predictions: Mapping[str, Any] | None = None) -> str:
    """Which designs score above and below the baseline and where, what remains open, how predictions came out.

    Empty while runs are missing.
    """
    if findings.interim:
        return ""
    parts = [
        _differences(findings),
        _thin(findings),
        _untested(findings),
        _references(findings),
        _predictions(findings, predictions),
    ]
    return " ".join(text for text in parts if text)


def _differences(findings: Findings) -> str:
    base, noun = findings.baseline, group_noun(findings)
    tested = [(row, word) for row in findings.rows if (word := outcome(findings, row)) != "untested"]
    if not tested:
        return ""
    groups = list(dict.fromkeys(row.group for row, _ in tested))
    where = f"on any of {count(len(groups), noun)}" if len(groups) > 1 else f"on {group_words(groups[0])}"
    where += " that can be tested" if 1 < len(groups) < len(findings.groups) else ""
    nobody = f"{findings.designs[1]} is not" if len(findings.designs) == 2 else "No design is"
    open_ones = sum(word == "inconclusive" for _, word in tested)
    sentences = []
    if open_ones == len(tested):
        contrasts = f"all {len(tested)} contrasts are" if len(tested) > 1 else "the only contrast is"
        sentences.append(f"{nobody} shown to differ from {base} {where}: {contrasts} inconclusive.")
    for word, claim in (("better", "Above"), ("worse", "Below"), ("equivalent", "Equivalent to")):
        rows = [row for row, known in tested if known == word]
        if rows:
            sentences.append(f"{claim} {base}: {_who(findings, rows, noun)}.")
        elif word == "better" and open_ones < len(tested):
            sentences.append(f"{nobody} shown to score above {base} {where}.")
    if 0 < open_ones < len(tested):
        sentences.append(f"{open_ones} of {len(tested)} contrasts {'is' if open_ones == 1 else 'are'} inconclusive.")
    if findings.exploratory and findings.recommendations:
        sentences.append("Exploratory verdicts carry no recommendation.")
    start = "Exploratory: " if findings.exploratory else "Checkpoints only: " if findings.scope != "designs" else ""
    return start + " ".join(sentences)


def recommended(findings: Findings) -> tuple[Recommendation, ...]:
    """The recommendations to print; none if the summary states that exploratory verdicts carry none."""
    return () if findings.exploratory else findings.recommendations


def _who(comparison: Comparison, rows: Sequence[Row], noun: str) -> str:
    """`m2 on late and roles; m3 on all 10 mechanisms`; of many designs only counts, `18 of 19 designs on STS`."""
    others = len(comparison.designs) - 1

    def place(row: Row) -> str:
        checkpoints = row.verdict is None and comparison.scope == "designs"
        return group_words(row.group) + (" (checkpoints)" if checkpoints else "")

    if len({row.design for row in rows}) > FEW_DESIGNS:
        places = Counter(place(row) for row in rows)
        return "; ".join(f"{number} of {others} designs on {group}" for group, number in places.items())
    parts = []
    for name in comparison.designs:
        groups = [place(row) for row in rows if row.design == name]
        everywhere = 1 < len(groups) == len(comparison.groups)
        if groups:
            parts.append(f"{name} on {f'all {count(len(groups), noun)}' if everywhere else listing(groups)}")
    return "; ".join(parts)


def _thin(comparison: Comparison) -> str:
    """The groups whose tasks come from too few sources for a verdict, although each design was run twice."""
    thin = []
    for group in comparison.groups:
        arm = comparison.arm(group, comparison.baseline)
        if len(arm.tasks) > 1 and len(arm.seeds) > 1 and arm.by_source.shape[1] < FEW_SOURCES:
            thin.append(group_words(group))
    have = "has" if len(thin) == 1 else "have"
    return f"A verdict needs tasks from {FEW_SOURCES} sources; {listing(thin)} {have} fewer." if thin else ""


def _untested(comparison: Comparison) -> str:
    """The groups in which nothing can be tested."""
    tested = {row.group for row in comparison.rows if outcome(comparison, row) != "untested"}
    bare = [group_words(group) for group in comparison.groups if group not in tested]
    return f"Nothing can be tested on {listing(bare)}." if bare else ""


def _references(findings: Findings) -> str:
    """The groups in which no design reaches a reference without training."""
    below: dict[str, list[str]] = {}
    for recommendation in findings.recommendations:
        if recommendation.design is None:
            below.setdefault(str(recommendation.reference), []).append(group_words(recommendation.group))
    sentences = []
    for reference, groups in below.items():
        everywhere = 1 < len(groups) == len(findings.groups)
        where = f"all {count(len(groups), group_noun(findings))}" if everywhere else listing(groups)
        sentences.append(f"Every design scores below {reference} on {where}.")
    return " ".join(sentences)


def _predictions(comparison: Comparison, predictions: Mapping[str, Any] | None) -> str:
    outcomes = [each.outcome for each in scored(comparison, predictions["mechanisms"])] if predictions else []
    if not outcomes:
        return ""
    counts = ", ".join(f"{outcomes.count(word)} {word}" for word in ("right", "wrong", "undecided"))
    return f"Of {count(len(outcomes), 'prediction')} written before the runs: {counts}."


def designs(findings: Findings) -> str:
    """The definition of each design, `m1: causal, last_token; …`; empty if unknown, or if their names say as much."""
    parts = []
    for design in findings.treatments:
        if design.name not in findings.designs:
            continue
        args = ", ".join(f"{name} {value}" for name, value in design.pooling_args.items())
        parts.append(f"{design.name}: {design.attention}, {design.pooling}{f' ({args})' if args else ''}")
    named = all(design.name == f"{design.pooling}-{design.attention}" for design in findings.treatments)
    return "" if named or len(parts) > FEW_DESIGNS else "; ".join(parts) + "."
