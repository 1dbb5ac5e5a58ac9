"""The answer of a comparison over all its groups in a few plain sentences, and what its designs are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from poolwise.reports.words import count, group_words, listing, outcome
from poolwise.verdicts.arms import FEW_SOURCES
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Row
from poolwise.verdicts.controls import scored
from poolwise.verdicts.findings import Recommendation

FEW_DESIGNS = 8
"""Up to so many designs are told one by one; of more, only how many differ on each group."""


def group_noun(comparison: Comparison) -> str:
    """What a group of the comparison is: `mechanism`, `task type` or `group`."""
    planted = [comparison.of_items(group) for group in comparison.groups]
    return (
        "mechanism" if all(planted) else "task type" if comparison.by == "task_type" and not any(planted) else "group"
    )


def summary(comparison: Comparison, predictions: Mapping[str, Any] | None = None) -> str:
    """Who scores above and below the baseline and where, what stays open, how predictions came out.

    Empty with a single group, whose headline says it all, and while runs are missing.
    """
    if comparison.interim or len(comparison.groups) < 2:
        return ""
    said = [
        _differences(comparison),
        _thin(comparison),
        _untested(comparison),
        _references(comparison),
        _predictions(comparison, predictions),
    ]
    return " ".join(text for text in said if text)


def _differences(comparison: Comparison) -> str:
    base, noun = comparison.baseline, group_noun(comparison)
    tested = [(row, word) for row in comparison.rows if (word := outcome(comparison, row)) != "untested"]
    if not tested:
        return ""
    groups = list(dict.fromkeys(row.group for row, _ in tested))
    where = f"on any of {count(len(groups), noun)}" if len(groups) > 1 else f"on {group_words(groups[0])}"
    where += " that can be tested" if 1 < len(groups) < len(comparison.groups) else ""
    one = len(comparison.designs) == 2
    nobody = f"{comparison.designs[1]} is not" if one else "No design is"
    open_ones = sum(word == "inconclusive" for _, word in tested)
    start = "Exploratory: " if comparison.exploratory else "Checkpoints only: " if comparison.scope != "designs" else ""
    said = []
    if open_ones == len(tested):
        told = f"all {len(tested)} contrasts are" if len(tested) > 1 else "the only contrast is"
        said.append(f"{nobody} shown to differ from {base} {where}: {told} inconclusive.")
    for word, claim in (("better", "Above"), ("worse", "Below"), ("equivalent", "Equivalent to")):
        found = [row for row, known in tested if known == word]
        if found:
            said.append(f"{claim} {base}: {_who(comparison, found, noun)}.")
        elif word == "better" and open_ones < len(tested):
            said.append(f"{nobody} shown to score above {base} {where}.")
    if 0 < open_ones < len(tested):
        said.append(f"{open_ones} of {len(tested)} contrasts are inconclusive.")
    if comparison.exploratory and comparison.recommendations:
        said.append("Exploratory verdicts carry no recommendation.")
    return start + " ".join(said)


def recommended(comparison: Comparison) -> tuple[Recommendation, ...]:
    """What to say of each group: nothing where the summary says once that exploratory verdicts recommend nothing."""
    return () if comparison.exploratory and len(comparison.groups) > 1 else comparison.recommendations


def _who(comparison: Comparison, rows: Sequence[Row], noun: str) -> str:
    """`m2 on late and roles; m3 on all 10 mechanisms`; of many designs how many on each, `18 of 19 designs on STS`."""
    others = len(comparison.designs) - 1

    def place(row: Row) -> str:
        return group_words(row.group) + (
            " (checkpoints)" if row.verdict is None and comparison.scope == "designs" else ""
        )

    if len({row.design for row in rows}) > FEW_DESIGNS:
        there = Counter(place(row) for row in rows)
        return "; ".join(f"{number} of {others} designs on {group}" for group, number in there.items())
    told = []
    for name in comparison.designs:
        places = [place(row) for row in rows if row.design == name]
        everywhere = len(places) == len(comparison.groups)
        if places:
            told.append(f"{name} on {f'all {count(len(places), noun)}' if everywhere else listing(places)}")
    return "; ".join(told)


def _thin(comparison: Comparison) -> str:
    """Groups whose tasks come from too few sources for a verdict on designs, where each design was run twice."""
    thin = []
    for group in comparison.groups:
        arm = comparison.arm(group, comparison.baseline)
        if len(arm.tasks) > 1 and len(arm.seeds) > 1 and arm.by_source.shape[1] < FEW_SOURCES:
            thin.append(group_words(group))
    have = "has" if len(thin) == 1 else "have"
    return f"A verdict takes tasks from {FEW_SOURCES} sources; {listing(thin)} {have} fewer." if thin else ""


def _untested(comparison: Comparison) -> str:
    """Groups in which nothing can be tested."""
    rows = comparison.rows
    bare = [
        g for g in comparison.groups if all(outcome(comparison, row) == "untested" for row in rows if row.group == g)
    ]
    return f"Nothing can be tested on {listing([group_words(group) for group in bare])}." if bare else ""


def _references(comparison: Comparison) -> str:
    """Where no design reaches what was never trained."""
    below: dict[str, list[str]] = {}
    for found in comparison.recommendations:
        if found.design is None:
            below.setdefault(str(found.reference), []).append(group_words(found.group))
    said = []
    for reference, groups in below.items():
        everywhere = len(groups) == len(comparison.groups)
        where = f"all {count(len(groups), group_noun(comparison))}" if everywhere else listing(groups)
        said.append(f"Every design stays below {reference} on {where}.")
    return " ".join(said)


def _predictions(comparison: Comparison, predictions: Mapping[str, Any] | None) -> str:
    found = [each.outcome for each in scored(comparison, predictions["mechanisms"])] if predictions else []
    if not found:
        return ""
    told = ", ".join(f"{found.count(word)} {word}" for word in ("right", "wrong", "undecided"))
    return f"Of {count(len(found), 'prediction')} written before the runs: {told}."


def designs(comparison: Comparison) -> str:
    """What each design is, `m1: causal, last_token; …`; empty where the study does not say, or its names do."""
    said = []
    for design in comparison.treatments:
        if design.name not in comparison.designs:
            continue
        given = ", ".join(f"{name} {value}" for name, value in design.pooling_args.items())
        said.append(f"{design.name}: {design.attention}, {design.pooling}{f' ({given})' if given else ''}")
    named = all(design.name == f"{design.pooling}-{design.attention}" for design in comparison.treatments)
    return "" if named or len(said) > FEW_DESIGNS else "; ".join(said) + "."
