"""Everything that follows from a comparison: recommendations, factors, controls, base models, tuning, and its JSON.

A `Findings` is a `Comparison` plus what is known besides its scores (costs, the study's designs, its looks). Each
analysis is computed when it is first read. `poolwise.compare` returns one, and the reports are made from one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.controls import Band, BrokenArm, Rung, broken_arms, noise_bands, rungs, smallest_seen, unsound
from poolwise.verdicts.costs import Budgets, Point, encode_flops, fronts
from poolwise.verdicts.factors import Factorial, factorial
from poolwise.verdicts.recommendations import Recommendation, recommend
from poolwise.verdicts.robustness import Outcome, Robustness, Winner, outcomes, robustness

if TYPE_CHECKING:
    from poolwise.study.design import Design

JSON_FIELDS = (
    "group", "design", "baseline", "n", "difference", "ci_low", "ci_high", "p_value", "p_holm", "effect_size",
    "wins", "ties", "losses", "min_reachable_p",
)  # fmt: skip
"""The fields of one contrast in `poolwise compare --json`."""


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
        }

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
