"""The control arms: the A/A arm has other seeds than the designs, whose seeds are shared."""

from __future__ import annotations

import numpy as np
import polars as pl

from poolwise.verdicts.comparison import compare
from poolwise.verdicts.controls import noise_bands
from poolwise.verdicts.table import table
from test_comparison import rows

RUN, OWN, NOISE = 0.03, 0.001, 0.004


def with_an_aa_arm(seed: int) -> list[dict]:
    """Four equal designs on twelve tasks of three types: a seed moves all designs alike, by `RUN`, and each of them a
    little."""
    rng, found = np.random.default_rng(seed), list[dict]()
    for kind in ("Retrieval", "STS", "Clustering"):
        level, shared = rng.uniform(0.3, 0.7, 12), rng.normal(0, RUN, (3, 1))
        runs = dict.fromkeys(("m1", "m2", "m3", "m4"), shared) | {"m1-aa": rng.normal(0, RUN, (3, 1))}
        for name, effect in runs.items():
            scores = level + effect + rng.normal(0, OWN, (3, 1)) + rng.normal(0, NOISE, (3, 12))
            first, role = (1000, "aa") if name == "m1-aa" else (0, "design")
            for row in rows({name: scores.tolist()}, kind):
                found.append(row | {"seed": row["seed"] + first, "role": role})
    return found


def alarms() -> int:
    bands = [noise_bands(compare(table(with_an_aa_arm(seed)), "m1"))[0] for seed in range(20)]
    return sum(bool(band.differs) for band in bands)


def test_what_a_seed_does_to_all_designs_alike_is_no_alarm_of_the_aa_arm() -> None:
    """It cancels between designs, not between the baseline and its repetition under other seeds. With the variance of
    the designs' contrasts alone 5 of these 20 studies raise the alarm."""
    assert alarms() <= 2
    assert noise_bands(compare(table(with_an_aa_arm(0)), "m2")) == ()  # it repeats m1, not m2


def test_an_aa_arm_with_the_seeds_of_the_designs_is_tested_with_their_runs_alone() -> None:
    """Under other seeds the two arms alone must agree, and the larger p counts."""
    bands = []
    for first in (0, 1000):
        scores = [row | {"seed": row["seed"] % 1000 + first * (row["role"] == "aa")} for row in with_an_aa_arm(1)]
        bands += noise_bands(compare(table(scores), "m1"))
    same, other = (dict(band.p_holm) for band in bands)
    assert all(same[group] <= other[group] for group in same)
    assert same != other


def test_an_aa_arm_is_tested_from_two_sources_on() -> None:
    scores = table(with_an_aa_arm(1))
    for sources, tested in ((2, 3), (1, 0)):
        few = scores.filter(pl.col("task").rank("dense").over("task_type") <= sources)
        (band,) = noise_bands(compare(few, "m1"))
        assert len(band.p_holm) == tested
