"""Many comparisons at once: correction within a declared family, and the effect of each factor of a study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poolwise.errors import StatisticsError
from poolwise.stats.crossed import Crossed, contrast
from poolwise.stats.exact import Array

TWO_LOOK_ALPHA = 0.03
"""Level of each of two looks, at 3 and at 5 seeds: a false alarm in .01 to .06 (results/type1.csv, equal variances)."""


def holm(p: ArrayLike) -> Array:
    """p-values adjusted so that the chance of any false alarm in the family stays at the level (Holm 1979).

    Args:
        p: (comparisons,) raw p-values of the whole declared family; nan for a comparison that could not be tested.

    Returns:
        (comparisons,) adjusted p-values, nan where nan came in.
    """
    raw, order = _family(p, "holm")
    size = len(raw)
    steps = raw[order] * (size - np.arange(size))
    return _restored(np.maximum.accumulate(steps), order, raw)


def bh(p: ArrayLike) -> Array:
    """p-values adjusted for the expected share of false alarms among the rejections (Benjamini & Hochberg 1995).

    Args:
        p: (comparisons,) raw p-values; nan for a comparison that could not be tested.

    Returns:
        (comparisons,) adjusted p-values, nan where nan came in.
    """
    raw, order = _family(p, "bh")
    size = len(raw)
    steps = raw[order] * size / (np.arange(size) + 1)
    steps[np.isnan(steps)] = np.inf
    return _restored(np.minimum.accumulate(steps[::-1])[::-1], order, raw)


def _family(p: ArrayLike, who: str) -> tuple[Array, NDArray[np.intp]]:
    """The p-values and the order that sorts them."""
    raw = np.asarray(p, dtype=float)
    if raw.ndim != 1:
        raise StatisticsError(f"{who}: p-values of shape {raw.shape}; give one flat list, the whole family")
    wrong = np.flatnonzero((raw < 0) | (raw > 1))
    if len(wrong):
        raise StatisticsError(f"{who}: p[{wrong[0]}] = {raw[wrong[0]]!r} is not between 0 and 1")
    return raw, np.argsort(raw, kind="stable")  # nan sorts last, so an untested comparison still counts in the family


def _restored(adjusted: Array, order: NDArray[np.intp], raw: Array) -> Array:
    """Adjusted p-values in the order of the raw ones, at most 1."""
    result = np.empty_like(raw)
    result[order] = np.minimum(adjusted, 1.0)
    result[np.isnan(raw)] = np.nan
    return result


Levels = Mapping[str, str | None]


@dataclass(frozen=True)
class Effect:
    """One main effect (one factor) or interaction (two factors): the mean of matched comparisons.

    `levels` and `references` name, for each factor, what is compared with what; `result.difference` is
    level - reference, or for two factors (level - reference of the first) at the second's level minus the same at its
    reference. `coefficients` (designs,) are the weights of the design means.
    """

    factors: tuple[str, ...]
    levels: tuple[str, ...]
    references: tuple[str, ...]
    coefficients: tuple[float, ...]
    result: Crossed


@dataclass(frozen=True)
class FactorStudy:
    """All estimable effects, and the comparisons for which no designs match (`factor: level vs reference`)."""

    effects: tuple[Effect, ...]
    confounded: tuple[str, ...]


def factor_effects(
    scores: ArrayLike, designs: Sequence[Levels], references: Mapping[str, str] | None = None
) -> FactorStudy:
    """Main effects and two-factor interactions of a study, with 95 % intervals over runs and tasks.

    Args:
        scores: (designs, seeds, tasks), none missing. All designs lend their run variance, so leave out broken arms.
        designs: for each design the level of each factor, such as {"attention": "causal", "pooling": "mean"}; None
            if a factor does not apply to it (such a design is not compared in that factor).
        references: the level of each factor that others are compared with; by default the first to appear.

    The p-values are raw: an analysis of factors is exploratory, correct it with `bh`.

    Raises:
        StatisticsError: tables that do not fit together, an unknown reference, one seed, missing scores.
    """
    y = np.asarray(scores, dtype=float)
    factors = _factors(designs, y)
    chosen = _references(designs, factors, references or {})
    effects: list[Effect] = []
    confounded: list[str] = []
    comparisons = {factor: _comparisons(designs, factor, chosen[factor]) for factor in factors}
    for factor, pairs in comparisons.items():
        for pair in pairs:
            effect = _effect(y, designs, {factor: pair}, factors)
            if effect:
                effects.append(effect)
            else:
                confounded.append(f"{factor}: {pair[0]} vs {pair[1]}")
    for first, second in combinations(factors, 2):
        for one, other in product(comparisons[first], comparisons[second]):
            effect = _effect(y, designs, {first: one, second: other}, factors)
            if effect:
                effects.append(effect)
    return FactorStudy(tuple(effects), tuple(confounded))


def _effect(
    y: Array, designs: Sequence[Levels], compared: Mapping[str, tuple[str, str]], factors: Sequence[str]
) -> Effect | None:
    cells = list(_matched_cells(designs, compared, factors))
    if not cells:
        return None
    coefficients = np.zeros(len(designs))
    for cell in cells:
        for design, sign in cell:
            coefficients[design] += sign / len(cells)
    return Effect(
        factors=tuple(compared),
        levels=tuple(pair[0] for pair in compared.values()),
        references=tuple(pair[1] for pair in compared.values()),
        coefficients=tuple(coefficients.tolist()),
        result=contrast(y, coefficients),
    )


def _matched_cells(
    designs: Sequence[Levels], compared: Mapping[str, tuple[str, str]], factors: Sequence[str]
) -> Iterator[list[tuple[int, int]]]:
    """For each setting of the other factors at which all compared combinations exist: the designs and their signs."""
    others = [factor for factor in factors if factor not in compared]
    where = {tuple(row[factor] for factor in [*compared, *others]): k for k, row in enumerate(designs)}
    for setting in dict.fromkeys(tuple(row[factor] for factor in others) for row in designs):
        cell = []
        for choice in product(*((0, 1) for _ in compared)):
            key = tuple(pair[side] for pair, side in zip(compared.values(), choice, strict=True))
            cell.append((where.get((*key, *setting), -1), (-1) ** sum(choice)))
        if all(design >= 0 for design, _ in cell):
            yield cell


def _comparisons(designs: Sequence[Levels], factor: str, reference: str) -> list[tuple[str, str]]:
    """(level, reference) of every level but the reference, in order of appearance."""
    seen = dict.fromkeys(row[factor] for row in designs)
    return [(name, reference) for name in seen if name is not None and name != reference]


def _factors(designs: Sequence[Levels], y: Array) -> tuple[str, ...]:
    """The names of the factors; refuses levels that do not fit the scores or do not tell two designs apart."""
    if y.ndim != 3 or len(designs) != len(y):
        raise StatisticsError(
            f"factor_effects: {len(designs)} rows of levels for scores of shape {y.shape}; scores are (designs, seeds, "
            "tasks), with one row of levels for each design"
        )
    factors = tuple(designs[0])
    for k, row in enumerate(designs):
        if set(row) != set(factors):
            wrong = ", ".join(sorted(set(row) ^ set(factors)))
            raise StatisticsError(f"factor_effects: design {k} and design 0 name different factors ({wrong}); use None")
    rows = [tuple(row[factor] for factor in factors) for row in designs]
    for k, key in enumerate(rows):
        if key in rows[:k]:
            raise StatisticsError(
                f"factor_effects: designs {rows.index(key)} and {k} have the same levels {key}; name the factor in "
                "which they differ, or leave one out"
            )
    return factors


def _references(designs: Sequence[Levels], factors: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """The reference level of each factor; refuses one that no design has."""
    chosen: dict[str, str] = {}
    for factor in factors:
        seen = [name for name in dict.fromkeys(row[factor] for row in designs) if name is not None]
        reference = given.get(factor, seen[0] if seen else "")
        if seen and reference not in seen:
            raise StatisticsError(
                f"factor_effects: reference {reference!r} of {factor!r}; its levels are {', '.join(seen)}"
            )
        chosen[factor] = reference
    return chosen
