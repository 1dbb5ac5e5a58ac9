"""`[tuning]`: the same search for every design, on development tasks that are never reported; and what it changes.

Every design is trained once with each setting of the grid, at one seed that is none of the study's, and scored on
the development tasks; the setting with the best mean score is its own. The study is then run again, each design with
its setting. Beside the first arm ("same recipe") the second ("equally tuned") shows which verdicts are the design's
and which depend on the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from poolwise.settings.recipe import Recipe, Strict, to_tuple

if TYPE_CHECKING:
    from poolwise.verdicts.comparison import Comparison

DECISIVE = ("better", "worse", "equivalent")
Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(to_tuple)]


class Tuning(Strict):
    """A grid of settings and the development tasks on which each design's best one is chosen."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = Field(min_length=1)
    learning_rate: Rates = ()
    head_learning_rate: Rates = ()
    steps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(to_tuple)] = ()
    seed: int = Field(default=2000, ge=0)

    def problems(self, tasks: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """What is wrong with it in a study of these tasks and seeds."""
        found = []
        if both := [name for name in self.tasks if name in tasks]:
            found.append(
                f"tuning.tasks: {', '.join(both)} would be reported too; tune on tasks that are not among tasks"
            )
        if self.seed in seeds:
            found.append(f"tuning.seed = {self.seed} is one of seeds: a run that was chosen must not be reported")
        if max(len(self.learning_rate), len(self.head_learning_rate), len(self.steps)) < 2:
            found.append("tuning: one setting is no search; list values of learning_rate, head_learning_rate or steps")
        for name in ("tasks", "learning_rate", "head_learning_rate", "steps"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                found.append(f"tuning.{name} = {list(getattr(self, name))}: give each value once")
        return found


@dataclass(frozen=True, order=True)
class Setting:
    """One point of the grid."""

    learning_rate: float
    head_learning_rate: float
    steps: int

    @property
    def name(self) -> str:
        """For a folder."""
        return f"lr-{self.learning_rate:g}-head-{self.head_learning_rate:g}-steps-{self.steps}"

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with this setting."""
        return recipe.model_copy(update=vars(self))


def own_setting(recipe: Recipe) -> Setting:
    """The setting that a recipe has."""
    return Setting(recipe.learning_rate, recipe.head_learning_rate, recipe.steps)


def settings(tuning: Tuning, recipe: Recipe, has_head: bool = True) -> list[Setting]:
    """All points of the grid, what is not listed as in the recipe; without a head its rate makes no difference, so its
    first value stands for all."""
    heads = tuning.head_learning_rate or (recipe.head_learning_rate,)
    axes = (tuning.learning_rate or (recipe.learning_rate,), heads if has_head else heads[:1])
    return [Setting(*point) for point in product(*axes, tuning.steps or (recipe.steps,))]


@dataclass(frozen=True)
class Winner:
    """The setting that a design is given: the best of `tried` by the mean score on the development tasks, one seed."""

    design: str
    base: str
    setting: Setting
    score: float
    tried: int


@dataclass(frozen=True)
class Outcome:
    """One contrast with the same recipe and equally tuned: verdicts, differences and intervals, 0–1.

    `verdict`: `holds` (better, worse or equivalent in both), `depends on the recipe` (two of these that differ), else
    `open`.
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
    """All contrasts that both arms have."""
    found = []
    theirs = {(row.group, row.design): row for row in tuned.rows}
    for row in same.rows:
        other = theirs.get((row.group, row.design))
        if other is None:
            continue
        words = [r.verdict.verdict if r.verdict else "untested" for r in (row, other)]
        a, b = row.verdict or row, other.verdict or other
        verdict = "open"
        if all(word in DECISIVE for word in words):
            verdict = "holds" if words[0] == words[1] else "depends on the recipe"
        same_ci, tuned_ci = ((x.ci_low, x.ci_high) for x in (a, b))
        found.append(
            Outcome(row.group, row.design, words[0], a.difference, same_ci, words[1], b.difference, tuned_ci, verdict)
        )
    return tuple(found)


def to_json(comparison: Comparison) -> dict[str, Any] | None:
    """The winners of the search, the outcomes and the second arm; None where the study does not tune."""
    if comparison.tuned is None:
        return None
    return {
        "winners": [asdict(found) for found in comparison.winners],
        "outcomes": [asdict(found) for found in comparison.outcomes],
        "comparison": comparison.tuned.to_json(),
    }
