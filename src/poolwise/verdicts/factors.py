"""Designs as levels of factors, and what attention, pooling and its arguments do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from poolwise import stats
from poolwise.stats.many import Effect
from poolwise.study.catalogue import spec_of
from poolwise.verdicts.arms import FEW_SOURCES

if TYPE_CHECKING:
    from poolwise.study.design import Design
    from poolwise.verdicts.comparison import Comparison


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
        names = [name for name in spec_of(pooling).args if len({repr(row[name]) for row in rows}) > 1]
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
        if values[name] != design.spec.args[name].default
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
        default = str(spec_of(pooling).args[argument].default)
        if default in {row[name] for row in rows}:
            found[name] = default
    return found


def control_pairs(designs: Sequence[Design], levels: Sequence[Levels]) -> Iterator[tuple[str, str]]:
    """(trainable pooling, its control), as levels, once each; arguments that both take must agree."""
    seen = set()
    for design, row in zip(designs, levels, strict=True):
        for control, other in zip(designs, levels, strict=True):
            mine, theirs = design.factors(), control.factors()
            shared = design.spec.args.keys() & control.spec.args.keys()
            pair = (row["pooling"], other["pooling"])
            agree = all(mine[name] == theirs[name] for name in {*shared, "template", "special_tokens"})
            if control.pooling in design.spec.controls_for(mine) and agree and pair not in seen:
                seen.add(pair)
                yield pair


def uncontrolled(
    designs: Sequence[Design], levels: Sequence[Levels], pairs: Sequence[tuple[str, str]]
) -> dict[str, tuple[str, ...]]:
    """Trainable pooling without any control, as a level -> the poolings that would be one."""
    have, found = {pooling for pooling, _ in pairs}, dict[str, tuple[str, ...]]()
    for design, row in zip(designs, levels, strict=True):
        controls = design.spec.controls_for(design.factors())
        if controls and row["pooling"] not in have:
            found[row["pooling"]] = controls
    return found


@dataclass(frozen=True)
class FactorEffect:
    """One effect in one group: level − reference, 0–1; of an interaction, that of the first factor at the second's
    level minus the same at its reference.

    `at`: the settings of the other factors that were averaged over. `coefficients`: the weight of each design's mean.
    `verdict`: above, below (BH p at most alpha, `FEW_SOURCES` sources or more), inconclusive.
    """

    group: str
    kind: str
    factors: tuple[str, ...]
    levels: tuple[str, ...]
    references: tuple[str, ...]
    at: tuple[str, ...]
    coefficients: tuple[tuple[str, float], ...]
    seeds: int
    tasks: int
    sources: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    run_sd: float
    p_bh: float = 1.0
    verdict: str = "inconclusive"


@dataclass(frozen=True)
class Factorial:
    """All effects that the designs allow, group by group; `confounded` and `notes` are sentences."""

    effects: tuple[FactorEffect, ...]
    confounded: tuple[str, ...]
    notes: tuple[str, ...]


def factorial(comparison: Comparison) -> Factorial | None:
    """The factors of the designs that a study declares; None where fewer than two vary and no control was run."""
    designs, notes = distinct([d for d in comparison.treatments if d.name in comparison.designs])
    varying = varying_arguments(designs)
    levels = [{"attention": d.attention, "pooling": pooling_level(d, varying)} for d in designs]
    pairs = list(control_pairs(designs, levels))
    factors = sum(len({row[name] for row in levels}) > 1 for name in ("attention", "pooling"))
    if factors < 2 and not pairs and not varying:
        return None
    if bare := uncontrolled(designs, levels, pairs):
        would = dict.fromkeys(control for controls in bare.values() for control in controls)
        notes.append(
            f"No capacity control ({', '.join(would)}) was run for {', '.join(bare)}: what they gain over a plain "
            "pooling may be what their parameters gain."
        )
    confounded = _confounded(comparison, designs, levels, varying)
    effects: list[FactorEffect] = []
    for group in comparison.groups:
        arms = [comparison.arm(group, d.name) for d in designs]
        if len({arm.seeds for arm in arms}) > 1 or len(arms[0].seeds) < 2 or arms[0].by_source.shape[1] < 2:
            notes.append(f"{group}: factors need two or more seeds, the same of every design, and two or more sources.")
            continue
        y = np.stack([arm.by_source for arm in arms])
        for kind, effect in _effects(y, comparison, designs, levels, varying, pairs):
            used = [(d.name, c) for d, c in zip(designs, effect.coefficients, strict=True) if c]
            result = effect.result
            effects.append(
                FactorEffect(
                    group=group, kind=kind, factors=effect.factors, levels=effect.levels,
                    references=effect.references, at=_settings(effect, levels), coefficients=tuple(used),
                    seeds=y.shape[1], tasks=len(arms[0].whole().tasks), sources=y.shape[2],
                    difference=result.difference, ci_low=result.ci_low, ci_high=result.ci_high,
                    p_value=result.p_value, run_sd=result.run_sd,
                )
            )  # fmt: skip
    return Factorial(_corrected(effects, comparison.alpha), tuple(confounded), tuple(notes))


def _effects(
    y: np.ndarray, comparison: Comparison, designs: Sequence[Design], levels: Sequence[Levels],
    varying: Mapping[str, Sequence[str]], pairs: Sequence[tuple[str, str]],
) -> Iterator[tuple[str, Effect]]:  # fmt: skip
    """(kind, effect) in the order in which they are shown: main effects, interactions, controls, arguments."""
    references = _references(comparison, designs, levels)
    for effect in stats.factor_effects(y, levels, references).effects:
        main = "control" if (*effect.levels, *effect.references) in pairs else "main"
        yield main if len(effect.factors) == 1 else "interaction", effect
    for control in dict.fromkeys(control for _, control in pairs if control != references["pooling"]):
        found = stats.factor_effects(y, levels, {**references, "pooling": control}).effects
        yield from (
            ("control", effect)
            for effect in found
            if effect.factors == ("pooling",) and (effect.levels[0], control) in pairs
        )
    if varying:
        detailed = argument_levels(designs, varying)
        names = set(detailed[0]) - {"attention", "pooling"}
        yield from (
            ("main", effect)
            for effect in stats.factor_effects(y, detailed, argument_references(detailed, names)).effects
            if len(effect.factors) == 1 and effect.factors[0] in names
        )


def _corrected(effects: Sequence[FactorEffect], alpha: float) -> tuple[FactorEffect, ...]:
    done = []
    for effect, p in zip(effects, stats.bh([effect.p_value for effect in effects]) if effects else (), strict=True):
        word = "inconclusive"
        if p <= alpha and effect.sources >= FEW_SOURCES:
            word = "above" if effect.difference > 0 else "below"
        done.append(replace(effect, p_bh=float(p), verdict=word))
    return tuple(done)


def _settings(effect: Effect, levels: Sequence[Levels]) -> tuple[str, ...]:
    """The levels of the factors that are held equal, over which the effect is averaged."""
    other = [name for name in ("attention", "pooling") if name not in effect.factors]
    used = [row for row, c in zip(levels, effect.coefficients, strict=True) if c]
    return tuple(dict.fromkeys(row[name] for row in used for name in other if len(effect.factors) == 1))


def _confounded(
    comparison: Comparison, designs: Sequence[Design], levels: Sequence[Levels],
    varying: Mapping[str, Sequence[str]],
) -> list[str]:  # fmt: skip
    """What cannot be told apart, in sentences; from the designs alone, so the same for all groups."""
    zeros = np.zeros((len(designs), 2, 2))
    found = stats.factor_effects(zeros, levels, _references(comparison, designs, levels))
    said = [_sentence(missing, designs, levels) for missing in found.confounded]
    both = {name: len({row[name] for row in levels}) > 1 for name in ("attention", "pooling")}
    if all(both.values()):
        poolings = list(dict.fromkeys(row["pooling"] for row in levels))
        crossed = [e for e in found.effects if len(e.factors) == 2]
        open_ = [name for name in poolings if name not in {n for e in crossed for n in (e.levels[1], e.references[1])}]
        if not crossed:
            said.append(
                "The interaction of attention and pooling cannot be estimated: it takes two poolings, each under both "
                "attention modes."
            )
        elif open_:
            said.append(f"Whether attention acts differently is not known of {', '.join(open_)}: one mode only.")
    if varying:
        detailed = argument_levels(designs, varying)
        names = set(detailed[0]) - {"attention", "pooling"}
        found = stats.factor_effects(zeros, detailed, argument_references(detailed, names))
        said += [
            _sentence(missing, designs, detailed) for missing in found.confounded if missing.split(": ")[0] in names
        ]
    return said


def _sentence(missing: str, designs: Sequence[Design], levels: Sequence[Mapping[str, str | None]]) -> str:
    factor, compared = missing.split(": ", 1)
    level, reference = compared.split(" vs ")
    ends = {}
    for end in (level, reference):
        ends[end] = [k for k, row in enumerate(levels) if row[factor] == end]
    others = [
        name
        for name in levels[0]
        if name != factor and not {levels[k][name] for k in ends[level]} & {levels[k][name] for k in ends[reference]}
    ]
    who, against = (" and ".join(designs[k].name for k in ends[end]) for end in (level, reference))
    verb = "differs" if len(ends[level]) == 1 else "differ"
    if not others:
        return f"{factor.capitalize()}, {level} against {reference}: no two designs differ in nothing else."
    return (
        f"{factor.capitalize()}, {level} against {reference}, cannot be told apart from {' and '.join(others)}: {who} "
        f"{verb} from {against} in both."
    )


def _references(comparison: Comparison, designs: Sequence[Design], levels: Sequence[Levels]) -> dict[str, str]:
    """The baseline's levels."""
    return dict(next((row for d, row in zip(designs, levels, strict=True) if d.name == comparison.baseline), levels[0]))
