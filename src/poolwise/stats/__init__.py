"""Statistics of comparisons: arrays in, frozen results out; no I/O, and no randomness but a generator passed in.

- `crossed`: is one design better than another, over runs and tasks (two or more seeds).
- `exact`: are two checkpoints different over tasks, by exact counting.
- `resample`: are two models different on one data set, by resampling its items.
- `many`: families of comparisons. `factors`: effects of a factorial study. `planning`: how many seeds.
"""

from poolwise.stats.crossed import (
    Crossed,
    Equivalence,
    OneSeed,
    average_sources,
    contrast,
    crossed,
    crossed_overall,
    equivalence,
    minimum_detectable_effect,
    one_seed,
)
from poolwise.stats.exact import (
    HodgesLehmann,
    McNemar,
    RankBiserial,
    SignedRank,
    WinsTiesLosses,
    hodges_lehmann,
    mcnemar,
    min_reachable_p,
    rank_biserial,
    signed_rank,
    wins_ties_losses,
)
from poolwise.stats.factors import Effect, FactorStudy, factor_effects
from poolwise.stats.many import TWO_LOOK_ALPHA, Friedman, bh, friedman, holm
from poolwise.stats.planning import planned_detectable_effect, seeds_to_settle
from poolwise.stats.resample import (
    PER_QUERY_RANK_TESTS_REFUSED,
    Bootstrap,
    CorrelationDifference,
    Permutation,
    SignedRankPosterior,
    ap_bootstrap,
    bayesian_signed_rank,
    iqm,
    iqm_interval,
    paired_bootstrap,
    paired_permutation,
    spearman_bootstrap,
    zou_interval,
)

__all__ = [
    "PER_QUERY_RANK_TESTS_REFUSED",
    "TWO_LOOK_ALPHA",
    "Bootstrap",
    "CorrelationDifference",
    "Crossed",
    "Effect",
    "Equivalence",
    "FactorStudy",
    "Friedman",
    "HodgesLehmann",
    "McNemar",
    "OneSeed",
    "Permutation",
    "RankBiserial",
    "SignedRank",
    "SignedRankPosterior",
    "WinsTiesLosses",
    "ap_bootstrap",
    "average_sources",
    "bayesian_signed_rank",
    "bh",
    "contrast",
    "crossed",
    "crossed_overall",
    "equivalence",
    "factor_effects",
    "friedman",
    "hodges_lehmann",
    "holm",
    "iqm",
    "iqm_interval",
    "mcnemar",
    "min_reachable_p",
    "minimum_detectable_effect",
    "one_seed",
    "paired_bootstrap",
    "paired_permutation",
    "planned_detectable_effect",
    "rank_biserial",
    "seeds_to_settle",
    "signed_rank",
    "spearman_bootstrap",
    "wins_ties_losses",
    "zou_interval",
]
