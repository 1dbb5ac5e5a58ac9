"""Whether results hold: on several base models, and with equally tuned designs.

Several base models: each run's score is averaged over them, seed by seed (a seed gives the same data order on all of
them), and runs and tasks remain the samples. A pooled verdict is about these base models, which are not a sample. Each
base model also has a comparison of its own, with its own family for Holm's correction.

Equal tuning: each verdict with the same recipe, and the one with each design's best setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from poolwise.errors import StatisticsError, suggest
from poolwise.study.recipe import Setting
from poolwise.verdicts.comparison import Comparison

if TYPE_CHECKING:
    import polars as pl


DRAWS = 2000  # bootstrap samples of a rank correlation
CELL = ("design", "role", "seed", "step", "task", "task_type", "source", "split", "subset", "metric", "item_id")


@dataclass(frozen=True)
class OnBase:
    """The difference between a design and the baseline on one base model, 0–1, with its 95 % interval and verdict.

    `verdict` is `none` if there is a single run or source; the difference is then that of the checkpoints.
    """

    base: str
    difference: float
    ci_low: float | None
    ci_high: float | None
    verdict: str


@dataclass(frozen=True)
class AcrossBases:
    """A design against the baseline on every base model.

    `agreement`: `agrees` (better on all, or worse on all), `contradicts` (better on one, worse on another), `open`.
    `same_sign`: whether all differences have the same sign.
    """

    group: str
    design: str
    baseline: str
    on: tuple[OnBase, ...]
    same_sign: bool
    agreement: str


@dataclass(frozen=True)
class RankAgreement:
    """Kendall's tau-b between the mean scores of the designs on two base models (1: the same ranking, −1: reversed).

    The 95 % interval is a percentile bootstrap: the runs of each base model separately, the sources of tasks jointly.
    """

    group: str
    base: str
    other: str
    designs: int
    tau: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Robustness:
    """Whether the base models agree."""

    bases: tuple[str, ...]
    designs: tuple[AcrossBases, ...]
    rankings: tuple[RankAgreement, ...]


def bases(frame: pl.DataFrame) -> list[str]:
    """The base models of a long table, in order; empty if it does not name them."""
    if "base" not in frame.columns:
        return []
    return frame["base"].drop_nulls().unique(maintain_order=True).to_list()  # type: ignore[no-any-return]


def pooled(frame: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """The long table with scores averaged over base models; rows that one base lacks are dropped, references kept."""
    import polars as pl

    key = [name for name in CELL if name in frame.columns]
    mean = (
        frame.filter(pl.col("base").is_in(list(names)))
        .group_by(key, maintain_order=True)
        .agg(pl.col("score").mean(), pl.col("base").n_unique().alias("_bases"))
        .filter(pl.col("_bases") == len(names))
        .drop("_bases")
    )
    return pl.concat([mean, frame.filter(pl.col("base").is_null()).select([*key, "score"])], how="diagonal_relaxed")


def alone(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """The rows of one base model, and those of references that have none."""
    import polars as pl

    return frame.filter((pl.col("base") == name) | pl.col("base").is_null())


def chosen(frame: pl.DataFrame, name: str | None) -> pl.DataFrame:
    """The rows of the base model asked for. Raises StatisticsError if it is unknown, or missing although needed."""
    names = bases(frame)
    if name is None and len(names) > 1:
        raise StatisticsError(f"the scores are of several base models: choose one with --base ({', '.join(names)})")
    if name is not None and name not in names:
        allowed = ", ".join(names) or "none, as the scores have no column base"
        raise StatisticsError(f"base model {name!r} has no scores; allowed: {allowed}{suggest(name, names)}")
    return alone(frame, name) if name else frame


def robustness(by_base: Sequence[tuple[str, Comparison]]) -> Robustness | None:
    """Whether comparisons of the same designs on several base models agree; None for fewer than two."""
    if len(by_base) < 2:
        return None
    first = by_base[0][1]
    shared = [group for group in first.groups if all(group in comparison.groups for _, comparison in by_base)]
    rows = [
        _across(group, design, by_base)
        for group in shared
        for design in first.designs[1:]
        if all(design in comparison.designs for _, comparison in by_base)
    ]
    rankings = [_ranking(group, *pair) for group in shared for pair in combinations(by_base, 2)]
    return Robustness(tuple(name for name, _ in by_base), tuple(rows), tuple(rankings))


def _across(group: str, design: str, by_base: Sequence[tuple[str, Comparison]]) -> AcrossBases:
    results = []
    for name, comparison in by_base:
        row = comparison.row(group, design)
        shown = row.verdict or row
        word = row.verdict.verdict if row.verdict else "none"
        results.append(OnBase(name, shown.difference, shown.ci_low, shown.ci_high, word))
    words = {result.verdict for result in results}
    agreement = "open"
    if words in ({"better"}, {"worse"}):
        agreement = "agrees"
    elif {"better", "worse"} <= words:
        agreement = "contradicts"
    signs = {np.sign(result.difference) for result in results}
    return AcrossBases(group, design, by_base[0][1].baseline, tuple(results), len(signs) == 1, agreement)


def _ranking(group: str, a: tuple[str, Comparison], b: tuple[str, Comparison]) -> RankAgreement:
    (name, one), (other, two) = a, b
    designs = [design for design in one.designs if design in two.designs]
    arms_a, arms_b = ([c.arm(group, design) for design in designs] for c in (one, two))
    sources = [source for source in dict.fromkeys(arms_a[0].sources) if source in arms_b[0].sources]
    x, y = (
        np.stack([arm.by_source[:, [list(dict.fromkeys(arm.sources)).index(s) for s in sources]] for arm in arms])
        for arms in (arms_a, arms_b)
    )
    tau = kendall_tau(x.mean(axis=(1, 2)), y.mean(axis=(1, 2)))
    random = np.random.default_rng(0)
    drawn = np.empty(DRAWS)
    for draw in range(DRAWS):
        picked = random.integers(0, len(sources), len(sources))
        means = []
        for scores in (x, y):
            runs = random.integers(0, scores.shape[1], scores.shape[1])
            means.append(scores[:, runs][:, :, picked].mean(axis=(1, 2)))
        drawn[draw] = kendall_tau(*means)
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return RankAgreement(group, name, other, len(designs), tau, low, high)


def kendall_tau(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Kendall's tau-b of two (n,) vectors (Kendall 1945): (concordant − discordant) / √(pairs untied in x × in y).

    0 if all values of a vector are tied, as there is no ranking to compare.
    """
    rows, columns = np.triu_indices(len(x), 1)
    a, b = np.sign(x[rows] - x[columns]), np.sign(y[rows] - y[columns])
    untied = np.sqrt(float(np.count_nonzero(a)) * np.count_nonzero(b))
    return float((a * b).sum() / untied) if untied else 0.0


DECISIVE = ("better", "worse", "equivalent")


@dataclass(frozen=True)
class Winner:
    """The best setting of a design among those `tried`, by the mean score of one run on the development tasks (0–1)."""

    design: str
    base: str
    setting: Setting
    score: float
    tried: int


@dataclass(frozen=True)
class Outcome:
    """One contrast with the same recipe and with equal tuning: verdicts, differences and intervals, 0–1.

    `verdict`: `holds` (the same of better, worse or equivalent in both), `depends on the recipe` (two of these that
    differ), otherwise `open`.
    """

    group: str
    design: str
    same: str
    same_difference: float
    same_ci: tuple[float | None, float | None]
    tuned: str
    tuned_difference: float
    tuned_ci: tuple[float | None, float | None]
    verdict: str


def outcomes(same: Comparison, tuned: Comparison) -> tuple[Outcome, ...]:
    """The contrasts that both comparisons have."""
    results = []
    tuned_rows = {(row.group, row.design): row for row in tuned.rows}
    for row in same.rows:
        other = tuned_rows.get((row.group, row.design))
        if other is None:
            continue
        words = [r.verdict.verdict if r.verdict else "untested" for r in (row, other)]
        a, b = row.verdict or row, other.verdict or other
        verdict = "open"
        if all(word in DECISIVE for word in words):
            verdict = "holds" if words[0] == words[1] else "depends on the recipe"
        same_ci, tuned_ci = ((x.ci_low, x.ci_high) for x in (a, b))
        results.append(
            Outcome(row.group, row.design, words[0], a.difference, same_ci, words[1], b.difference, tuned_ci, verdict)
        )
    return tuple(results)
