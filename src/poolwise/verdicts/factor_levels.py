"""Designs as levels of factors: what varies between them, and which pooling is the capacity control of which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from poolwise.designs import CONTROLS, POOLING_ARGS

if TYPE_CHECKING:
    from poolwise.study import Design

Levels = Mapping[str, str]


def distinct(designs: Sequence[Design]) -> tuple[list[Design], list[str]]:
    """Designs of which no two are the same treatment; a second one lends nothing but its name."""
    kept: list[Design] = []
    notes = []
    for design in designs:
        twin = next((other for other in kept if other.factors() == design.factors()), None)
        if twin:
            notes.append(f"{design.name} is the same design as {twin.name} and is left out of the factors.")
        else:
            kept.append(design)
    return kept, notes


def varying_arguments(designs: Sequence[Design]) -> dict[str, list[str]]:
    """Pooling -> the arguments in which designs with that pooling differ."""
    found: dict[str, list[str]] = {}
    for pooling in dict.fromkeys(design.pooling for design in designs):
        rows = [design.factors() for design in designs if design.pooling == pooling]
        names = [name for name in POOLING_ARGS[pooling] if len({repr(row[name]) for row in rows}) > 1]
        if names:
            found[pooling] = names
    return found


def pooling_level(design: Design, varying: Mapping[str, Sequence[str]]) -> str:
    """The level of the factor pooling: its name, those varying arguments that are not at their default, and what else
    the design does to the pooled text."""
    values = design.factors()
    shown = [
        f"{name} {str(values[name]).lower()}"
        for name in varying.get(design.pooling, ())
        if values[name] != POOLING_ARGS[design.pooling][name].default
    ]
    if design.template != "plain":
        shown.append(f"template {design.template}")
    if not design.special_tokens:
        shown.append("no special tokens")
    return f"{design.pooling} ({', '.join(shown)})" if shown else design.pooling


def argument_levels(designs: Sequence[Design], varying: Mapping[str, Sequence[str]]) -> list[dict[str, str | None]]:
    """Levels with each varying argument a factor of its own, None where the pooling is another."""
    rows = []
    for design in designs:
        values = design.factors()
        row: dict[str, str | None] = {"attention": design.attention, "pooling": pooling_level(design, {})}
        for pooling, names in varying.items():
            for name in names:
                row[f"{name} of {pooling}"] = str(values[name]) if pooling == design.pooling else None
        rows.append(row)
    return rows


def argument_references(rows: Sequence[Mapping[str, str | None]], names: set[str]) -> dict[str, str]:
    """The default of each argument where a design has it; else the first level."""
    found = {}
    for name in names:
        argument, pooling = name.split(" of ")
        default = str(POOLING_ARGS[pooling][argument].default)
        if default in {row[name] for row in rows}:
            found[name] = default
    return found


def control_pairs(designs: Sequence[Design], levels: Sequence[Levels]) -> Iterator[tuple[str, str]]:
    """(trainable pooling, its control), as levels, once each; arguments that both take must agree."""
    seen = set()
    for design, row in zip(designs, levels, strict=True):
        for control, other in zip(designs, levels, strict=True):
            key = (design.pooling, design.factors().get("tokens"))
            mine, theirs = design.factors(), control.factors()
            shared = POOLING_ARGS[design.pooling].keys() & POOLING_ARGS[control.pooling].keys()
            pair = (row["pooling"], other["pooling"])
            agree = all(mine[name] == theirs[name] for name in {*shared, "template", "special_tokens"})
            if control.pooling in CONTROLS.get(key, ()) and agree and pair not in seen:
                seen.add(pair)
                yield pair


def uncontrolled(
    designs: Sequence[Design], levels: Sequence[Levels], pairs: Sequence[tuple[str, str]]
) -> dict[str, tuple[str, ...]]:
    """Trainable pooling without any control, as a level -> the poolings that would be one."""
    have, found = {pooling for pooling, _ in pairs}, dict[str, tuple[str, ...]]()
    for design, row in zip(designs, levels, strict=True):
        key = (design.pooling, design.factors().get("tokens"))
        if key in CONTROLS and row["pooling"] not in have:
            found[row["pooling"]] = CONTROLS[key]
    return found
