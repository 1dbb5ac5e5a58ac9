"""How many runs would settle it: the detectable difference of a study that has not been run, and of a longer one."""

from __future__ import annotations

import math

from poolwise.errors import StatisticsError
from poolwise.stats.crossed import Crossed
from poolwise.stats.exact import check_level
from poolwise.stats.variance import MeanSquares, null_distribution


def planned_detectable_effect(
    seeds: int,
    tasks: float,
    run_sd: float,
    noise_sd: float,
    task_sd: float,
    designs: int = 2,
    level: float = 0.95,
    power: float = 0.8,
) -> float:
    """The true difference of two designs that `crossed` finds with probability `power`, before any run.

    Args:
        seeds: runs of each design, 2 or more.
        tasks: number of tasks, above 1.
        run_sd, noise_sd, task_sd: as in `Crossed`; in the unit of the scores, not all 0.
        designs: designs that share one run variance; 2 for the two-arm form.
    """
    check_level(level, "planned_detectable_effect")
    if seeds < 2 or tasks <= 1 or designs < 2 or not 1 - level < power < 1:
        raise StatisticsError(
            f"planned_detectable_effect: seeds={seeds}, tasks={tasks}, designs={designs}, power={power}; two or more "
            f"seeds, tasks and designs, and a power between {1 - level:g} and 1"
        )
    if min(run_sd, noise_sd, task_sd) < 0 or not run_sd + noise_sd + task_sd > 0:
        raise StatisticsError(
            f"planned_detectable_effect: run_sd={run_sd}, noise_sd={noise_sd}, task_sd={task_sd}; none is below 0, "
            "nor are all 0"
        )
    error = noise_sd**2
    run = error + tasks * run_sd**2
    task = error + seeds / 2 * task_sd**2
    pooled = designs > 2
    run_df = float((designs - 1) * (seeds - 1)) if pooled else 2.0 * (seeds - 1)
    shares = (1.0,) if pooled else (0.5, 0.5)
    null = null_distribution(
        MeanSquares(
            runs=tuple(share * run for share in shares),
            run_shares=shares,
            run_dfs=(run_df,) if pooled else (seeds - 1.0, seeds - 1.0),
            run_df=run_df,
            tasks=task,
            task_df=tasks - 1,
            error=error,
            error_df=run_df * (tasks - 1),
            unit=2 / (seeds * tasks),
        )
    )
    return null.detectable(null.critical(level), power)


def seeds_to_settle(
    result: Crossed, effect: float, power: float = 0.8, limit: int = 50
) -> tuple[int | None, int | None]:
    """Seeds per design at which a true difference of `effect` would be found: a range, as the run effect is uncertain.

    Args:
        result: of the study so far; the range runs over the interval of its run effect, its other variances are kept.
        effect: in score units, above 0: the margin, or the smallest difference that matters.
        limit: seeds beyond which the answer is `None`; also where the tasks differ so much that no number suffices.
    """
    if not effect > 0:
        raise StatisticsError(
            f"seeds_to_settle: effect={effect!r}; it is a difference above 0, in the unit of the scores"
        )
    fewest, most = (
        _fewest_seeds(result, run_sd, effect, power, limit) for run_sd in (result.run_sd_low, result.run_sd_high)
    )
    return fewest, most


def _fewest_seeds(result: Crossed, run_sd: float, effect: float, power: float, limit: int) -> int | None:
    if not run_sd + result.noise_sd + result.task_sd > 0:
        return 2

    def enough(seeds: int) -> bool:
        found = planned_detectable_effect(
            seeds, result.tasks, run_sd, result.noise_sd, result.task_sd, result.designs, result.level, power
        )
        return found <= effect or math.isclose(found, effect)

    if not enough(limit):
        return None
    low, high = 1, limit  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
