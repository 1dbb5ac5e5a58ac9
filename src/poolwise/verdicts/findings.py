"""Everything that follows from a comparison: recommendations, factors, controls, base models, tuning, and its JSON.

A `Findings` is a `Comparison` plus what is known besides its scores (costs, the study's designs, its looks). Each
analysis is computed when it is first read. `poolwise.compare` returns one, and the reports are made from one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from poolwise import stats
from poolwise.stats.crossed import Crossed
from poolwise.verdicts.arms import FEW_SOURCES, Arm
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Elsewhere, elsewhere_of, run_squares
from poolwise.verdicts.controls import Band, BrokenArm, Rung, broken_arms, noise_bands, rungs, smallest_seen, unsound
from poolwise.verdicts.costs import Budgets, Point, encode_flops, fronts
from poolwise.verdicts.factors import Factorial, factorial
from poolwise.verdicts.leaderboard import word_of
from poolwise.verdicts.robustness import Outcome, Robustness, Winner, outcomes, robustness
from poolwise.verdicts.table import Note

if TYPE_CHECKING:
    import polars as pl

    from poolwise.study.design import Design

LEXICAL = ("tfidf", "tfidf_chars", "bm25")
BETTER, CHEAPEST, BASELINE, BELOW, NONE = "better", "cheapest", "baseline", "below_reference", "none"
SAME_COST = 0.005
"""Encode costs that differ by a smaller share are equal: it is far below what a clock would show."""
JSON_FIELDS = (
    "group", "design", "baseline", "n", "difference", "ci_low", "ci_high", "p_value", "p_holm", "effect_size",
    "wins", "ties", "losses", "min_reachable_p", "tasks", "tipping_run_sd",
)  # fmt: skip
"""The fields of one contrast in `poolwise compare --json`."""


@dataclass(frozen=True)
class Recommendation:
    """The design to use for one group of tasks.

    `basis`: `better` (than the baseline after Holm, and the best of those), `cheapest` (none is better: it costs less
    than every other design not shown to be worse), `baseline` (all others are shown to be worse), `none` (nothing
    speaks for one design, or there are no verdicts on designs; `design` is None, and `as_cheap` are the least costly if
    others cost more), `below_reference` (every design scores below `reference`; `design` is None). `judged`: the group
    carries verdicts on designs that are not exploratory. `stays` (the share of `folds` with the same choice) and
    `expected_regret` (0–1) are given for a design that is better, as that a default stays the default is no evidence;
    not on a single task, which is one source. `cost` is the encode cost in FLOPs, `relative_cost` that over the
    baseline's.
    """

    group: str
    design: str | None
    basis: str
    judged: bool
    difference: float | None = None
    cost: float | None = None
    relative_cost: float | None = None
    folds: int = 0
    stays: float | None = None
    expected_regret: float | None = None
    reference: str | None = None
    reference_score: float | None = None
    best_score: float | None = None
    as_cheap: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings(Comparison):
    """A comparison with all that follows from it.

    `costs`: cost rows of the designs (`verdicts.costs`). `treatments`: the designs as the study declares them.
    `budgets`: the exploratory contrasts at equal cost. `plan` says which look at the study this is, if two are
    declared; `looks` are the ones recorded. `by_base`: the findings on each base model, if scores are means over
    several. `tuned`: the findings of the equally tuned designs, `winners` their settings, if the study tunes.
    """

    costs: tuple[Mapping[str, Any], ...] = ()
    treatments: tuple[Design, ...] = ()
    budgets: Budgets | None = None
    plan: str = ""
    looks: tuple[Mapping[str, Any], ...] = ()
    by_base: tuple[tuple[str, Findings], ...] = ()
    tuned: Findings | None = None
    winners: tuple[Winner, ...] = ()

    @classmethod
    def of(cls, comparison: Comparison, **known: Any) -> Findings:
        """The findings of a comparison; `known` are the fields above. An A/A arm that differs makes it exploratory."""
        shared = {field.name: getattr(comparison, field.name) for field in fields(Comparison)}
        findings = cls(**{**shared, **known})
        return replace(findings, exploratory=findings.exploratory or findings.unsound)

    @cached_property
    def recommendations(self) -> tuple[Recommendation, ...]:
        """The design to use for each group; none while runs are missing."""
        return () if self.interim else recommend(self, encode_flops(self.costs))

    @cached_property
    def factorial(self) -> Factorial | None:
        """The effect of each factor of the designs; None without a study of two factors or capacity controls."""
        return None if self.interim else factorial(self, self.treatments)

    @cached_property
    def robustness(self) -> Robustness | None:
        """Whether several base models agree; None for a study of one."""
        return robustness(self.by_base)

    @cached_property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Each verdict with the same recipe and equally tuned; empty if the study does not tune."""
        return outcomes(self, self.tuned) if self.tuned else ()

    @cached_property
    def fronts(self) -> dict[str, tuple[Point, ...]]:
        """The designs of each group by encode cost, and which of them are on the front; empty without costs."""
        return fronts(self, encode_flops(self.costs))

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The noise band of each A/A arm."""
        return noise_bands(self)

    @cached_property
    def broken(self) -> tuple[BrokenArm, ...]:
        """Where each broken arm was shown to score below the baseline."""
        return broken_arms(self)

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """The rungs of the dilution ladder, group by group."""
        return rungs(self)

    @cached_property
    def unsound(self) -> str:
        """Why the A/A arm makes all verdicts exploratory; empty if it does not."""
        return unsound(self.baseline, self.bands)

    def __repr__(self) -> str:
        words = [word_of(row, self.alpha) for row in self.rows]
        known = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        state = "runs are missing, nothing tested" if self.interim else known
        return f"<Findings: {', '.join(self.designs[1:])} against {self.baseline} on {', '.join(self.groups)}: {state}>"

    def to_frame(self) -> pl.DataFrame:
        """A row for each contrast of the family, scores and differences 0–1: group, design, baseline, score,
        baseline_score, difference, ci_low, ci_high, p_value, p_holm, verdict, scope, unit, n.

        At scope `designs` the numbers are those of the verdict, else those of the checkpoints; `n` counts `unit`s.
        """
        import polars as pl

        rows = []
        for row in self.rows:
            shown, arm = row.verdict or row, self.arm(row.group, row.design)
            rows.append(
                {
                    "group": row.group, "design": row.design, "baseline": row.baseline, "score": arm.mean,
                    "baseline_score": self.arm(row.group, row.baseline).mean, "difference": shown.difference,
                    "ci_low": shown.ci_low, "ci_high": shown.ci_high, "p_value": shown.p_value, "p_holm": shown.p_holm,
                    "verdict": word_of(row, self.alpha),
                    "scope": "designs" if row.verdict else "checkpoints", "unit": arm.unit, "n": len(arm.tasks),
                }
            )  # fmt: skip
        return pl.DataFrame(rows, infer_schema_length=None)

    def _repr_html_(self) -> str:
        """The contrasts as a table, for notebooks; scores and differences in points."""
        heads = ("Group", "Design", "Score", self.baseline, "Difference", "Interval", "p Holm", "Verdict")
        body = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"]
        for row in self.to_frame().iter_rows(named=True):
            low, high, p = row["ci_low"], row["ci_high"], row["p_holm"]
            cells = (
                row["group"], row["design"], f"{100 * row['score']:.2f}", f"{100 * row['baseline_score']:.2f}",
                f"{100 * row['difference']:+.2f}", "–" if low is None else f"{100 * low:.2f} to {100 * high:.2f}",
                "–" if p is None else f"{p:.3f}", row["verdict"],
            )  # fmt: skip
            body.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        why = "".join(f"<p>{escape(text)}</p>" for text in (self.interim, self.exploratory, self.banner) if text)
        return f"{why}<table>{''.join(body)}</table>"

    def to_json(self) -> dict[str, Any]:
        """The content of `poolwise compare --json`: the contrasts, the verdicts on designs, and every analysis."""
        return {
            "comparisons": [{name: getattr(row, name) for name in JSON_FIELDS} for row in self.rows],
            "scope": self.scope,
            "verdicts": [
                {"group": row.group, "design": row.design, "baseline": row.baseline, **asdict(row.verdict)}
                for row in self.rows
                if row.verdict
            ],
            "status": "interim" if self.interim else "exploratory" if self.exploratory else "as declared",
            "alpha": self.alpha,
            "looks": [dict(look) for look in self.looks],
            "overall": [asdict(contrast) for contrast in self.overall],
            "given_run_effect": [
                {"group": row.group, "design": row.design, "baseline": row.baseline, **_finite(asdict(row.given))}
                for row in self.rows
                if row.given
            ],
            "equal_budget": asdict(self.budgets) if self.budgets else None,
            "recommendations": [asdict(recommendation) for recommendation in self.recommendations],
            "factors": asdict(self.factorial) if self.factorial else None,
            "controls": self._controls_to_json(),
            "tuning": self._tuning_to_json(),
            "base_models": self._bases_to_json(),
            "notes": [text for text in (self.interim, self.exploratory, self.plan, self.banner) if text]
            + [*self.notes, *self.excluded],
            "cases": {str(note): list(note.cases) for note in self.listed},
        }

    @property
    def listed(self) -> tuple[Note, ...]:
        """The notes that have a list of cases behind them."""
        return tuple(note for note in (*self.notes, *self.excluded) if isinstance(note, Note) and note.cases)

    def _controls_to_json(self) -> dict[str, Any]:
        """`noise_bands` of the A/A arms, and the `ladder` with the loss of its first rung that was detected."""
        bands = [{**asdict(b), "p_holm": dict(b.p_holm), "differs": list(b.differs)} for b in self.bands]
        if not self.rungs:
            return {"noise_bands": bands, "ladder": None}
        seen = {group: smallest_seen(self.rungs, group) for group in self.groups}
        losses = {group: -rung.difference if rung else None for group, rung in seen.items()}
        return {
            "noise_bands": bands,
            "ladder": {"rungs": [asdict(rung) for rung in self.rungs], "smallest_seen": losses},
        }

    def _tuning_to_json(self) -> dict[str, Any] | None:
        if self.tuned is None:
            return None
        return {
            "winners": [asdict(winner) for winner in self.winners],
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "comparison": self.tuned.to_json(),
        }

    def _bases_to_json(self) -> dict[str, Any] | None:
        if self.robustness is None:
            return None
        return {**asdict(self.robustness), "comparisons": {name: each.to_json() for name, each in self.by_base}}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, so an unbounded number of degrees of freedom becomes null."""
    return {name: None if value == float("inf") else value for name, value in values.items()}


def recommend(comparison: Comparison, costs: Mapping[str, float]) -> tuple[Recommendation, ...]:
    """One recommendation for each group, in the order of `comparison.groups`; none for built-in mechanisms.

    costs: what each design costs to encode, in one unit; empty if unknown.
    """
    return tuple(
        _recommend(comparison, costs, group) for group in comparison.groups if not comparison.of_mechanism(group)
    )


def _recommend(comparison: Comparison, costs: Mapping[str, float], group: str) -> Recommendation:
    rows = [row for row in comparison.rows if row.group == group]
    sources = comparison.arm(group, comparison.baseline).sources
    judged = not comparison.exploratory and all(row.verdict for row in rows) and len(set(sources)) >= FEW_SOURCES
    if below := _below_reference(comparison, group):
        name, floor, best = below
        return Recommendation(group, None, BELOW, judged, reference=name, reference_score=floor, best_score=best)
    if not judged:
        return Recommendation(group, None, NONE, judged)
    verdicts = {row.design: row.verdict for row in rows if row.verdict}
    words = {design: verdict.verdict for design, verdict in verdicts.items()}
    shifts = {design: verdict.difference for design, verdict in verdicts.items()}
    design, basis, as_cheap = _choose(comparison, costs, words, shifts)
    cost, base_cost = costs.get(design or ""), costs.get(comparison.baseline)
    folds, stays, regret = 0, None, None
    if basis == BETTER and not comparison.of_items(group):
        folds, stays, regret = _leave_one_source_out(comparison, costs, group, design)
    return Recommendation(
        group, design, basis, judged, as_cheap=as_cheap,
        difference=shifts.get(design or ""), cost=cost, relative_cost=cost / base_cost if cost and base_cost else None,
        folds=folds, stays=stays, expected_regret=regret,
    )  # fmt: skip


def _choose(
    comparison: Comparison, costs: Mapping[str, float], words: Mapping[str, str], shifts: Mapping[str, float]
) -> tuple[str | None, str, tuple[str, ...]]:
    """(design, basis, designs as cheap as it) from the word and the difference of each contrast.

    Without evidence of a better design only a lower cost speaks for one: nothing does if all cost the same.
    """
    allowed = [design for design in _candidates(comparison) if words.get(design) != "worse"]
    better = [design for design in allowed if words.get(design) == "better"]
    if better:
        return max(better, key=lambda design: shifts[design]), BETTER, ()
    if allowed == [comparison.baseline]:
        return comparison.baseline, BASELINE, ()
    if not all(costs.get(design) for design in allowed):
        return None, NONE, ()
    least = min(costs[design] for design in allowed)
    cheap = [design for design in allowed if costs[design] <= least * (1 + SAME_COST)]
    if len(cheap) > 1:
        return None, NONE, tuple(cheap) if len(cheap) < len(allowed) else ()
    return cheap[0], CHEAPEST, ()


def _candidates(comparison: Comparison) -> list[str]:
    """The designs to choose from, the baseline first; without the lexical references of a table without roles."""
    return [design for design in comparison.designs if design == comparison.baseline or design not in LEXICAL]


def _below_reference(comparison: Comparison, group: str) -> tuple[str, float, float] | None:
    """(reference, its mean, the best design's mean) if TF-IDF or BM25 beats every design on the tasks of both, by more
    than the margin: it is not tested, and a smaller difference does not matter. Of several, that furthest above.
    """
    arms = {arm.design: arm for arm in comparison.arms if arm.group == group}
    designs = [arms[name] for name in _candidates(comparison)]
    found = []
    for name in LEXICAL:
        floor = arms.get(name)
        known = set(floor.tasks) if floor else set()
        shared = [task for task in designs[0].tasks if task in known]
        if floor and shared:
            best = max(arm.on(shared).mean for arm in designs)
            if best + comparison.margin < floor.on(shared).mean:
                found.append((name, floor.on(shared).mean, best))
    return max(found, key=lambda each: each[1] - each[2], default=None)


def _leave_one_source_out(
    comparison: Comparison, costs: Mapping[str, float], group: str, chosen: str | None
) -> tuple[int, float, float]:
    """(folds, share of folds that choose `chosen`, expected regret): the rule repeated without each source in turn.

    The contrasts of the other groups keep their p-values, so that Holm spans the same family in every fold. A fold in
    which nothing speaks for any design stays with the baseline, which is what its regret counts.
    """
    arms = {design: comparison.arm(group, design) for design in comparison.designs}
    scores = {design: arm.by_source for design, arm in arms.items()}
    candidates = _candidates(comparison)
    means = np.array([scores[design].mean(axis=0) for design in candidates])
    elsewhere = [row.verdict.p_value if row.verdict else float("nan") for row in comparison.rows if row.group != group]
    elsewhere += [contrast.verdict.p_value for contrast in comparison.overall]
    designs = comparison.designs[1:]
    squares = run_squares(_by_group(comparison), comparison.designs)
    same, regrets = 0, []
    for fold in range(means.shape[1]):
        kept = {design: np.delete(array, fold, axis=1) for design, array in scores.items()}
        results = [_crossed(comparison, arms, kept, design, squares) for design in designs]
        p = stats.holm([*(result.p_value for result in results), *elsewhere])[: len(designs)].tolist()
        shifts = {design: result.difference for design, result in zip(designs, results, strict=True)}
        words = {
            design: "inconclusive" if q > comparison.alpha else "better" if shifts[design] > 0 else "worse"
            for design, q in zip(designs, p, strict=True)
        }
        choice, _, _ = _choose(comparison, costs, words, shifts)
        same += choice == chosen
        regrets.append(float(means[:, fold].max() - means[candidates.index(choice or comparison.baseline), fold]))
    return means.shape[1], same / means.shape[1], float(np.mean(regrets))


def _by_group(comparison: Comparison) -> dict[str, dict[str, Arm]]:
    return {group: {d: comparison.arm(group, d) for d in comparison.designs} for group in comparison.groups}


def _crossed(
    comparison: Comparison, arms: Mapping[str, Arm], kept: Mapping[str, np.ndarray], design: str, squares: Elsewhere
) -> Crossed:
    """The contrast of one fold; designs with the same seeds lend their runs, as in the full comparison."""
    base = comparison.baseline
    pool: Sequence[str] = ()
    if arms[base].seeds == arms[design].seeds:
        pool = [
            name for name in comparison.designs if name not in (base, design) and arms[name].seeds == arms[base].seeds
        ]
    alone = not pool or arms[base].of_own_task
    known = None if alone else elsewhere_of(squares, arms[base].group, [base, design, *pool])
    return stats.crossed(kept[base], kept[design], pool=[kept[name] for name in pool], elsewhere=known)
