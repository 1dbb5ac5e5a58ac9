"""Designs as levels of factors: the effects of attention, of pooling and of its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from poolwise import stats
from poolwise.stats.many import Effect
from poolwise.study.catalogue import OWN, POOLINGS, spec_of
from poolwise.verdicts.arms import FEW_SOURCES
from poolwise.verdicts.comparison import Comparison

if TYPE_CHECKING:
    from poolwise.study.design import Design


Levels = Mapping[str, str]


def distinct(designs: Sequence[Design]) -> tuple[list[Design], list[str]]:
    """The designs without repetitions of the same treatment, and a note for each design that repeats another."""
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
    varying: dict[str, list[str]] = {}
    for pooling in dict.fromkeys(design.pooling for design in designs):
        mine = [design for design in designs if design.pooling == pooling]
        rows = [design.factors() for design in mine]
        arguments = dict.fromkeys(name for design in mine for name in design.spec.args)
        names = [name for name in arguments if len({repr(row.get(name)) for row in rows}) > 1]
        if names:
            varying[pooling] = names
    return varying


def pooling_level(design: Design, varying: Mapping[str, Sequence[str]]) -> str:
    """The level of the factor pooling: its name, the varying arguments that are not at their default, and how else the
    design changes the pooled text."""
    values = design.factors()
    shown = [
        f"{name} {str(values[name]).lower()}"
        for name in varying.get(design.pooling, ())
        if name in values and values[name] != design.spec.args[name].default
    ]
    if design.template != "plain":
        shown.append(f"template {design.template}")
    if not design.special_tokens:
        shown.append("no special tokens")
    return f"{design.pooling} ({', '.join(shown)})" if shown else design.pooling


def argument_levels(designs: Sequence[Design], varying: Mapping[str, Sequence[str]]) -> list[dict[str, str | None]]:
    """Levels with each varying argument as a separate factor, None if the design has another pooling."""
    rows = []
    for design in designs:
        values = design.factors()
        row: dict[str, str | None] = {"attention": design.attention, "pooling": pooling_level(design, {})}
        for pooling, names in varying.items():
            for name in names:
                row[f"{name} of {pooling}"] = str(values.get(name)) if pooling == design.pooling else None
        rows.append(row)
    return rows


def argument_references(rows: Sequence[Mapping[str, str | None]], names: set[str]) -> dict[str, str]:
    """The default of each argument as its reference, if a design has it; other arguments are left out."""
    references = {}
    for name in names:
        argument, pooling = name.split(" of ")
        if pooling not in POOLINGS and pooling not in OWN:
            continue  # code that was not imported, whose defaults are not known
        default = str(spec_of(pooling).args[argument].default)
        if default in {row[name] for row in rows}:
            references[name] = default
    return references


def control_pairs(designs: Sequence[Design], levels: Sequence[Levels]) -> Iterator[tuple[str, str]]:
    """(trainable pooling, its capacity control) as levels, once each; arguments that both take must agree."""
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
    controlled, missing = {pooling for pooling, _ in pairs}, dict[str, tuple[str, ...]]()
    for design, row in zip(designs, levels, strict=True):
        controls = design.spec.controls_for(design.factors())
        if controls and row["pooling"] not in controlled:
            missing[row["pooling"]] = controls
    return missing


@dataclass(frozen=True)
class FactorEffect:
    """One effect in one group: level − reference, 0–1; for an interaction, that difference of the first factor at the
    second's level minus the same at its reference.

    `at`: the settings of the other factors over which the effect is averaged. `coefficients`: the weight of each
    design's mean. `verdict`: above, below (BH p at most alpha, `FEW_SOURCES` sources or more), inconclusive.
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
    """All effects that the designs can estimate, group by group; `confounded` and `notes` are sentences."""

    effects: tuple[FactorEffect, ...]
    confounded: tuple[str, ...]
    notes: tuple[str, ...]


def factorial(comparison: Comparison, treatments: Sequence[Design]) -> Factorial | None:
    """The factors of the designs that a study declares; None if fewer than two vary and no control was run."""
    designs, notes = distinct([d for d in treatments if d.name in comparison.designs])
    varying = varying_arguments(designs)
    levels = [{"attention": d.attention, "pooling": pooling_level(d, varying)} for d in designs]
    pairs = list(control_pairs(designs, levels))
    factors = sum(len({row[name] for row in levels}) > 1 for name in ("attention", "pooling"))
    if factors < 2 and not pairs and not varying:
        return None
    if bare := uncontrolled(designs, levels, pairs):
        would = dict.fromkeys(control for controls in bare.values() for control in controls)
        notes.append(
            f"No capacity control ({', '.join(would)}) was run for {', '.join(bare)}: their gain over a plain pooling "
            "may be due to their parameters alone."
        )
    confounded = _confounded(comparison, designs, levels, varying)
    effects: list[FactorEffect] = []
    for group in comparison.groups:
        arms = [comparison.arm(group, d.name) for d in designs]
        if len({arm.seeds for arm in arms}) > 1 or len(arms[0].seeds) < 2 or arms[0].by_source.shape[1] < 2:
            notes.append(f"{group}: factors need two or more seeds, the same for each design, and two or more sources.")
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
    """(kind, effect) in order of display: main effects, interactions, controls, arguments."""
    references = _references(comparison, designs, levels)
    for effect in stats.factor_effects(y, levels, references).effects:
        main = "control" if (*effect.levels, *effect.references) in pairs else "main"
        yield main if len(effect.factors) == 1 else "interaction", effect
    for control in dict.fromkeys(control for _, control in pairs if control != references["pooling"]):
        against = stats.factor_effects(y, levels, {**references, "pooling": control}).effects
        yield from (
            ("control", effect)
            for effect in against
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
    """The effects with Benjamini–Hochberg's p over all of them, and their words."""
    corrected = []
    for effect, p in zip(effects, stats.bh([effect.p_value for effect in effects]), strict=True):
        word = "inconclusive"
        if p <= alpha and effect.sources >= FEW_SOURCES:
            word = "above" if effect.difference > 0 else "below"
        corrected.append(replace(effect, p_bh=float(p), verdict=word))
    return tuple(corrected)


def _settings(effect: Effect, levels: Sequence[Levels]) -> tuple[str, ...]:
    """The levels of the other factors, over which the effect is averaged."""
    other = [name for name in ("attention", "pooling") if name not in effect.factors]
    used = [row for row, c in zip(levels, effect.coefficients, strict=True) if c]
    return tuple(dict.fromkeys(row[name] for row in used for name in other if len(effect.factors) == 1))


def _confounded(
    comparison: Comparison, designs: Sequence[Design], levels: Sequence[Levels],
    varying: Mapping[str, Sequence[str]],
) -> list[str]:  # fmt: skip
    """A sentence for each comparison that these designs confound; the same for all groups."""
    zeros = np.zeros((len(designs), 2, 2))  # only which effects can be estimated matters here, not their values
    estimable = stats.factor_effects(zeros, levels, _references(comparison, designs, levels))
    sentences = [_sentence(missing, designs, levels) for missing in estimable.confounded]
    both = {name: len({row[name] for row in levels}) > 1 for name in ("attention", "pooling")}
    if all(both.values()):
        poolings = list(dict.fromkeys(row["pooling"] for row in levels))
        crossed = [e for e in estimable.effects if len(e.factors) == 2]
        open_ = [name for name in poolings if name not in {n for e in crossed for n in (e.levels[1], e.references[1])}]
        if not crossed:
            sentences.append(
                "The interaction of attention and pooling cannot be estimated: it takes two poolings, each under both "
                "attention modes."
            )
        elif open_:
            sentences.append(
                f"Whether attention has another effect with {', '.join(open_)} is unknown: run under one mode only."
            )
    if varying:
        detailed = argument_levels(designs, varying)
        names = set(detailed[0]) - {"attention", "pooling"}
        arguments = stats.factor_effects(zeros, detailed, argument_references(detailed, names))
        sentences += [
            _sentence(missing, designs, detailed) for missing in arguments.confounded if missing.split(": ")[0] in names
        ]
    return sentences


def _sentence(missing: str, designs: Sequence[Design], levels: Sequence[Mapping[str, str | None]]) -> str:
    """Why `missing` ("factor: level vs reference") cannot be estimated, with the designs concerned."""
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
        return f"{factor.capitalize()}, {level} against {reference}: no two designs differ in that alone."
    return (
        f"{factor.capitalize()}, {level} against {reference}, is confounded with {' and '.join(others)}: {who} {verb} "
        f"from {against} in both."
    )


def _references(comparison: Comparison, designs: Sequence[Design], levels: Sequence[Levels]) -> dict[str, str]:
    """The baseline's levels, against which the others are compared."""
    return dict(next((row for d, row in zip(designs, levels, strict=True) if d.name == comparison.baseline), levels[0]))
