"""What stands beside a comparison of a study: each of several base models alone, and the designs equally tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from poolwise.running.search import tuned_results
from poolwise.study import Study
from poolwise.verdicts import robustness
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.comparison import compare as compare_scores

if TYPE_CHECKING:
    import polars as pl


def on_each(
    study: Study | None, frame: pl.DataFrame, names: Sequence[str], found: Comparison, missing: str
) -> Comparison:
    """The pooled comparison with that of each base model beside it."""
    import polars as pl

    seeds = {seed for arm in found.arms if arm.design in found.designs for seed in arm.seeds}
    each = []
    for name in names:
        rows = robustness.alone(frame, name)
        if study:
            rows = last_step(study, rows).filter((pl.col("role") != "design") | pl.col("seed").is_in(list(seeds)))
        one = compare_scores(
            rows, found.baseline, found.by, controls=controls_of(rows), margin=found.margin, alpha=found.alpha,
            missing="drop" if found.interim else missing, order=found.designs, treatments=found.treatments,
            interim=found.interim, exploratory=found.exploratory,
        )  # fmt: skip
        each.append((name, one))
    return replace(found, by_base=tuple(each))


def equally_tuned(study: Study, found: Comparison) -> Comparison:
    """The comparison with that of the second arm beside it, where the study tunes and all of it has run."""
    if study.tuning is None or found.interim:
        return found
    results_of_second = tuned_results(study)
    if results_of_second is None:
        return replace(found, notes=(*found.notes, "Equally tuned: not all of the search has run yet; run the study."))
    frame, chosen = results_of_second
    frame = robustness.pooled(frame, names) if len(names := robustness.bases(frame)) > 1 else frame
    tuned = compare_scores(
        frame, found.baseline, found.by, margin=found.margin, alpha=found.alpha, order=found.designs,
        treatments=found.treatments, exploratory=found.exploratory,
    )  # fmt: skip
    return replace(found, tuned=tuned, winners=tuple(chosen))


def last_step(study: Study, frame: pl.DataFrame) -> pl.DataFrame:
    """The scores at the end of the training, and of the untrained ones at step 0."""
    import polars as pl

    return frame.filter((pl.col("step") == study.recipe.steps) | pl.col("role").is_in(["untuned", "reference"]))


def controls_of(frame: pl.DataFrame) -> list[str]:
    """Designs outside the comparison, where the table has a column that says what each is (a study's table has)."""
    if "role" not in frame.columns:
        return []
    return frame.filter(frame["role"] != "design")["design"].unique().to_list()
