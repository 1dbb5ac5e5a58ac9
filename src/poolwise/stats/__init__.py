"""Statistics of comparisons: arrays in, frozen results out; no I/O, and randomness only from a generator passed in.

- `crossed`: is one design better than another, over runs and tasks (two or more seeds); `variance` beneath it.
- `exact`: do two checkpoints differ over tasks, by exact counting.
- `resample`: do two models differ on one data set, by resampling its items.
- `many`: families of comparisons, and the effects of factors.
"""

from poolwise.stats.crossed import (
    contrast,
    crossed,
    crossed_overall,
    equivalence,
    minimum_detectable_effect,
    one_new_task,
    one_seed,
    seeds_to_settle,
)
from poolwise.stats.exact import (
    average_sources,
    hodges_lehmann,
    mcnemar,
    min_reachable_p,
    rank_biserial,
    signed_rank,
    wins_ties_losses,
)
from poolwise.stats.many import bh, factor_effects, holm
from poolwise.stats.resample import ap_bootstrap, paired_bootstrap, paired_permutation, spearman_bootstrap, zou_interval

__all__ = [
    "ap_bootstrap",
    "average_sources",
    "bh",
    "contrast",
    "crossed",
    "crossed_overall",
    "equivalence",
    "factor_effects",
    "hodges_lehmann",
    "holm",
    "mcnemar",
    "min_reachable_p",
    "minimum_detectable_effect",
    "one_new_task",
    "one_seed",
    "paired_bootstrap",
    "paired_permutation",
    "rank_biserial",
    "seeds_to_settle",
    "signed_rank",
    "spearman_bootstrap",
    "wins_ties_losses",
    "zou_interval",
]
