"""How often does each test call two equal designs different, and how often does it detect a true difference?

    python -m benchmarks.type1 [--quick] [--json] [--csv FILE] [--studies N] [--jobs N]    (some 12 CPU minutes)

Simulated studies, in points (score x 100), of equally good designs; design 1 is compared with design 0, by

    study      `crossed` with the other designs of the study lending their runs
    two arms   `crossed` alone
    wilcoxon   exact signed-rank over tasks, on seed means
    t          paired t over seeds, on task means
    two looks  `study` at 3 and again at 5 seeds, at .03 each (cells with 5 seeds)

all at .05. In cells of `items` the tasks are the 400 items of one data set; there `study` and `two arms` are counted at
.003 and .0002 as well, where Holm's correction over many contrasts looks. In cells with several groups of tasks,
`family` is the share of studies in which any contrast with design 0 in any group is called different after Holm,
`study` the mean rate of a contrast before it. In cells of a leaderboard, `pairs` is the share of studies in which any
two of the equal designs are told apart after Holm over all pairs.

Mean squares are computed for all studies of a cell at once; the null distribution is the shipped one, but studies whose
p lies clearly away from alpha on a coarser grid, or whose runs alone have a p above alpha, are decided there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import fdtrc, ndtr, stdtr

from poolwise.stats.exact import largest_rejected_sum, signed_rank
from poolwise.stats.many import TWO_LOOK_ALPHA
from poolwise.stats.variance import (
    AGREE,
    ARM_LEVEL,
    LENDER_LEVEL,
    MEASURED_DF,
    MeanSquares,
    chi_square_over_df,
    null_distribution,
)

ALPHA = 0.05
TYPES = 4
SMALL_LEVELS = (0.003, 0.0002)  # of the smallest p among some 16 and 250 contrasts after Holm
POWER_AT = (0.25, 0.5, 1.0, 2.0)
POWER_AT_ITEMS = 4.0
SCENARIOS = ("base", "shared seeds", "run effects by type", "heavy tails", "compared x3", "lender x3")
COARSE = {1: (14, 14, 4), 2: (8, 8, 8, 2)}  # grid points by number of run variances
# Times as many studies where rates come close to .08, so that .08 is a line to hold, and where they are small.
MORE_STUDIES = {"compared x3": 5, "items": 6}
AT_ONCE = 2 * 10**7  # scores of the studies that are held in memory together
CLOSE = 0.35  # p within this share of alpha on the coarse grid is computed on the shipped one


@dataclass(frozen=True)
class Cell:
    """One kind of study: sizes, standard deviations in points, and how it departs from the simple model."""

    scenario: str
    tasks: int
    seeds: int
    run_sd: float
    heterogeneity: float
    noise: float
    designs: int = 5
    groups: int = 1


@dataclass(frozen=True)
class Rate:
    """Share of `studies` in which `method` rejects at `level`, at a true difference in points.

    The two looks, at .03 each, and the families, at .05 together, have level .05.
    """

    scenario: str
    tasks: int
    seeds: int
    run_sd: float
    heterogeneity: float
    noise: float
    designs: int
    groups: int
    true_difference: float
    method: str
    level: float
    studies: int
    rate: float


def grid(scenarios: Iterable[str], quick: bool) -> Iterator[Cell]:
    """The cells of the benchmark; `quick` keeps the corners."""
    tasks, seeds = ((8, 41), (3, 5)) if quick else ((8, 15, 41), (3, 5))
    runs, sizes = ((0.0, 0.4), (5,)) if quick else ((0.0, 0.1, 0.2, 0.4), (2, 5, 8))
    for scenario, designs, n, s, run_sd in itertools.product(scenarios, sizes, tasks, seeds, runs):
        if scenario == "lender x3" and designs == 2:
            continue
        for heterogeneity, noise in ((0.0, 0.2), (0.3, 0.4)):
            yield Cell(scenario, n, s, run_sd, heterogeneity, noise, designs)
    for scenario in ("base", "compared x3", "baseline x3", "lender x3"):
        for run_sd in (0.2, 0.4):
            yield Cell(scenario, 10, 3, run_sd, 0.3, 0.4, groups=4)
    for run_sd in (0.1, 0.4):
        yield Cell("leaderboard", 15, 3, run_sd, 0.3, 0.4, designs=8)
    for s, run_sd in itertools.product(
        (2, 3, 5), (0.0, 0.5, 1.0, 2.0, 5.0)
    ):  # sd of a mean over the items: .57 or more
        yield Cell("items", 400, s, run_sd, 8.0, 8.0)
    for designs in (8, 20):  # models that were run once, and whose checkpoints are equally good
        yield Cell("leaderboard", 25, 1, 0.0, 0.3, 0.4, designs=designs)


def differences(cell: Cell) -> tuple[float, ...]:
    """True differences in points at which a cell is counted: 0, and those at which power is measured."""
    if cell.scenario == "items":
        return 0.0, POWER_AT_ITEMS
    level_held = cell.scenario in ("base", "shared seeds", "lender x3")
    return (0.0, *POWER_AT) if level_held and cell.groups == 1 and cell.heterogeneity > 0 else (0.0,)


def simulate(cell: Cell, studies: int, rng: np.random.Generator) -> np.ndarray:
    """(studies, groups, designs, seeds, tasks) scores in points, all designs equally good."""

    def draw(*shape: int) -> np.ndarray:
        if cell.scenario == "heavy tails":
            return rng.standard_t(3, shape) / np.sqrt(3)
        return rng.standard_normal(shape)

    n, g, k, s, t = studies, cell.groups, cell.designs, cell.seeds, cell.tasks
    run = draw(n, g, k, s, 1)
    if cell.scenario == "shared seeds":  # correlation .5 between designs under one seed
        run = np.sqrt(0.5) * (run + draw(n, g, 1, s, 1))
    if cell.scenario == "run effects by type":  # half of a run's effect is another one for each type of task
        run = np.sqrt(0.5) * (run + draw(n, g, k, s, TYPES)[..., np.arange(t) * TYPES // t])
    run_sd = np.full((k, 1, 1), cell.run_sd)
    noisy = {"baseline x3": 0, "compared x3": 1, "lender x3": 2}.get(cell.scenario)
    if noisy is not None:
        run_sd[noisy] *= 3
    return run_sd * run + cell.heterogeneity * draw(n, g, k, 1, t) + cell.noise * draw(n, g, k, s, t)


@dataclass(frozen=True)
class Contrasts:
    """Design 1 against design 0 in many studies at once: (studies,) each, (studies, components) for runs.

    The fields are those of `MeanSquares`, with the difference; `of` takes them from (studies, designs, seeds, tasks).
    """

    difference: np.ndarray
    runs: np.ndarray
    tasks: np.ndarray
    error: np.ndarray
    run_shares: tuple[float, ...]
    run_dfs: tuple[float, ...]
    run_df: np.ndarray
    task_df: float
    error_df: float
    unit: float

    @classmethod
    def of(
        cls, y: np.ndarray, runs: np.ndarray, shares: Sequence[float], dfs: Sequence[float], run_df: np.ndarray,
        error: np.ndarray, error_df: float,
    ) -> Contrasts:  # fmt: skip
        s, t = y.shape[2:]
        by_task = y[:, 1].mean(axis=1) - y[:, 0].mean(axis=1)
        tasks = s / 2 * by_task.var(axis=1, ddof=1)
        unit = 2 / (s * t)
        mean = by_task.mean(axis=1)
        return cls(mean, runs, tasks, error, tuple(shares), tuple(dfs), run_df, t - 1.0, error_df, unit)

    def take(self, places: np.ndarray) -> Contrasts:
        """The studies at `places`."""
        names = ("difference", "runs", "run_df", "tasks", "error")
        return replace(self, **{name: getattr(self, name)[places] for name in names})

    def one(self, i: int) -> MeanSquares:
        return MeanSquares(
            runs=tuple(self.runs[i].tolist()),
            run_shares=self.run_shares,
            run_dfs=self.run_dfs,
            run_df=float(self.run_df[i]),
            tasks=float(self.tasks[i]),
            task_df=self.task_df,
            error=float(self.error[i]),
            error_df=self.error_df,
            unit=self.unit,
        )


def run_mean_squares(y: np.ndarray) -> np.ndarray:
    """`stats.variance.run_mean_square` of (..., seeds, tasks)."""
    return y.shape[-1] * y.mean(axis=-1).var(axis=-1, ddof=1)


def unstable(runs: np.ndarray, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """(studies, designs) which are set aside, and their ratios: `stats.variance.unstable` of many studies at once.

    runs: (studies, groups, designs).
    """
    n, groups, k = runs.shape
    relative = (runs / runs.mean(axis=2, keepdims=True)).mean(axis=1)
    df = groups * (seeds - 1.0)
    levels = np.full(k, LENDER_LEVEL)
    levels[:2] = ARM_LEVEL
    out = np.zeros((n, k), dtype=bool)
    for left in range(k, 2, -1):
        waiting = np.flatnonzero(out.sum(axis=1) == k - left)
        kept = np.where(out[waiting], 0.0, relative[waiting])
        rest = (kept.sum(axis=1, keepdims=True) - kept) / (left - 1)
        with np.errstate(divide="ignore"):
            p = fdtrc(df, (left - 1) * df, kept / rest) / levels
        p[out[waiting]] = np.inf
        fires = p.min(axis=1) < 1
        out[waiting[fires], p.argmin(axis=1)[fires]] = True
    typical = np.where(out, 0.0, relative).sum(axis=1) / (~out).sum(axis=1)
    return out, relative / typical[:, None]


def two_arms(y: np.ndarray) -> Contrasts:
    """The two-arm form, of (studies, designs, seeds, tasks)."""
    _, _, s, t = y.shape
    error_df = 2.0 * (s - 1) * (t - 1)
    error = (_centred(_centred(y[:, :2], 2), 3) ** 2).sum(axis=(1, 2, 3)) / error_df
    runs, run_df = run_mean_squares(y[:, :2]) / 2, np.full(len(y), 2.0 * (s - 1))
    return Contrasts.of(y, runs, (0.5, 0.5), (s - 1.0, s - 1.0), run_df, error, error_df)


def pooled_form(y: np.ndarray, runs: np.ndarray) -> Iterator[tuple[np.ndarray, Contrasts]]:
    """The form with pooled runs, of (studies, designs, seeds, tasks): places of studies of one shape, their contrasts.

    runs: (studies, groups, designs) run mean squares in all groups of the study.
    """
    groups, s = runs.shape[1], y.shape[2]
    out, ratios = unstable(runs, s)
    lenders = (~out[:, 2:]).sum(axis=1)
    for first, second, lent in sorted(set(zip(*out[:, :2].T.tolist(), lenders.tolist(), strict=True))):
        places = np.flatnonzero((out[:, 0] == first) & (out[:, 1] == second) & (lenders == lent))
        if not lent or (first and second and groups == 1):
            yield places, two_arms(y[places])
            continue
        order = np.argsort(out[places, 2:], axis=1, kind="stable")[:, :lent] + 2  # the stable lenders
        chosen = np.concatenate([np.tile([0, 1], (len(places), 1)), order], axis=1)
        known = ratios[places, :2] if groups > 1 else None
        yield places, _with_lenders(y[places[:, None], chosen], (not first, not second), known, groups)


def _with_lenders(y: np.ndarray, stable: tuple[bool, bool], ratios: np.ndarray | None, groups: int) -> Contrasts:
    """`study_mean_squares` or `shared_mean_squares` of the first two designs and their lenders."""
    _, k, s, t = y.shape
    keep = [*[i for i in (0, 1) if stable[i]], *range(2, k)]
    count = len(keep)
    deviations = _centred(_centred(y.mean(axis=3)[:, keep], 1), 2)
    squares = t * max(count, 2) / max(count - 1, 1) * (deviations**2).sum(axis=2) / (s - 1)
    total_df = (count - 1.0) * (s - 1)
    parts, shares, dfs = list[np.ndarray](), list[float](), list[float]()
    for i in (0, 1):
        own = run_mean_squares(y[:, i])
        if not stable[i] and (ratios is None or count < 2):
            parts.append(own / 2)
            shares.append(0.5)
            dfs.append(s - 1.0)
        elif not stable[i]:
            parts.append(np.maximum(own, ratios[:, i] * squares.mean(axis=1)) / 2)
            shares.append(0.5)
            dfs.append(1 / (1 / (groups * (s - 1)) + 1 / total_df))
    if any(stable):
        lent = sum(stable) / 2
        parts.insert(0, lent * squares.mean(axis=1))
        shares.insert(0, lent)
        dfs.insert(0, total_df)
    error_df = (k - 1.0) * (s - 1) * (t - 1)
    error = (_centred(_centred(_centred(y, 1), 2), 3) ** 2).sum(axis=(1, 2, 3)) / error_df
    runs = np.stack(parts, axis=1)
    run_df = np.full(len(y), float(sum(dfs)))
    if len(dfs) > 1:  # Satterthwaite's
        spread = (runs**2 / np.array(dfs)).sum(axis=1)
        np.divide(runs.sum(axis=1) ** 2, spread, out=run_df, where=spread > 0)
    return Contrasts.of(y, runs, shares, dfs, run_df, error, error_df)


def rejected(c: Contrasts, alpha: float, shift: float = 0.0) -> np.ndarray:
    """(studies,) whether `crossed` rejects at `alpha` when `shift` is added to every difference."""
    runs = c.runs.sum(axis=1)
    se = np.sqrt(c.unit * np.maximum(np.maximum(runs, c.tasks), runs + c.tasks - c.error))
    t = np.abs(c.difference + shift) / se
    p = run_p(c, shift)
    waiting = np.flatnonzero(p <= alpha)
    p[waiting] = np.maximum(p[waiting], _coarse_p(c.take(waiting), t[waiting]))
    for i in waiting[np.abs(p[waiting] - alpha) < CLOSE * alpha]:
        p[i] = null_distribution(c.one(i)).p_value(t[i])
    return p <= alpha


def run_p(c: Contrasts, shift: float) -> np.ndarray:
    """(studies,) p of the t test on the means of the runs, the bound on that of `crossed` (`Null.run_scale`)."""
    with np.errstate(divide="ignore"):  # runs that do not vary at all set no bound
        return 2 * stdtr(c.run_df, -np.abs(c.difference + shift) / np.sqrt(c.unit * c.runs.sum(axis=1)))


def _coarse_p(c: Contrasts, t: np.ndarray) -> np.ndarray:
    """`Null.p_value` of every study, on the coarse grid."""
    runs, tasks, error, run_df = c.runs.sum(axis=1), c.tasks, c.error, c.run_df
    low = runs < error
    error = np.where(low, (run_df * runs + c.error_df * error) / (run_df + c.error_df), error)
    below = tasks < error
    error = np.where(below, (c.task_df * tasks + c.error_df * error) / (c.task_df + c.error_df), error)
    tasks = np.where(below, error, tasks)
    parts = np.where(low[:, None], error[:, None] * np.array(c.run_shares), c.runs)
    dfs = (*c.run_dfs, c.task_df, c.error_df)
    axes = np.meshgrid(*(chi_square_over_df(df, m) for df, m in zip(dfs, COARSE[len(c.run_dfs)], strict=True)))
    *run_draws, task_draw, error_draw = (axis.ravel() for axis in axes)
    x = sum(part[:, None] * draw for part, draw in zip(parts.T, run_draws, strict=True))
    y, e = tasks[:, None] * task_draw, error[:, None] * error_draw
    ratios = np.sqrt(np.maximum(np.maximum(x, y), x + y - e) / (parts.sum(axis=1) + tasks - error)[:, None])
    return 2 * ndtr(-t[:, None] * ratios).mean(axis=1)


def study_rejects(
    y: np.ndarray, alpha: float, shift: float = 0.0, group: int = 0, cautious: bool = False
) -> np.ndarray:
    """(studies,) `crossed` in its study form in one group of (studies, groups, designs, seeds, tasks)."""
    if y.shape[2] == 2:
        return rejected(two_arms(y[:, group]), alpha, shift)
    runs = np.roll(run_mean_squares(y), -group, axis=1)
    found, level = np.ones(len(y), dtype=bool), alpha
    if runs.shape[1] * (y.shape[3] - 1) < MEASURED_DF:
        found = rejected(two_arms(y[:, group]), alpha, shift)
        level *= 1.0 if cautious else AGREE
    for places, contrasts in pooled_form(y[:, group], runs):
        found[places] &= rejected(contrasts, level, shift)
    return found


def wilcoxon_rejects(y: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """(studies,) exact signed-rank test over tasks on seed means."""
    d = y[:, 1].mean(axis=1) - y[:, 0].mean(axis=1) + shift
    ranks = np.abs(d).argsort(axis=1).argsort(axis=1) + 1
    positive = (ranks * (d > 0)).sum(axis=1)
    n = d.shape[1]
    return np.minimum(positive, n * (n + 1) // 2 - positive) <= largest_rejected_sum(n, ALPHA)


def t_rejects(y: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """(studies,) paired t-test over seeds on task means."""
    d = (y[:, 1] - y[:, 0]).mean(axis=2) + shift
    t = np.abs(d.mean(axis=1)) / (d.std(axis=1, ddof=1) / np.sqrt(d.shape[1]))
    return 2 * stdtr(d.shape[1] - 1, -t) <= ALPHA


def run_cell(cell: Cell, studies: int, seed: int, differences: Sequence[float] = (0.0,)) -> list[Rate]:
    """All methods on `studies` simulated studies of one kind."""
    rng = np.random.default_rng([seed, *(int(1000 * v) for v in asdict(cell).values() if not isinstance(v, str))])
    most = max(1, AT_ONCE // (cell.groups * cell.designs * cell.seeds * cell.tasks))
    found: dict[tuple[float, str, float], list[np.ndarray]] = {}
    for first in range(0, studies, most):
        y = simulate(cell, min(most, studies - first), rng)
        for shift in differences:
            for (method, level), verdict in _verdicts(cell, y, shift).items():
                found.setdefault((shift, method, level), []).append(verdict)
    return [
        Rate(*asdict(cell).values(), *key, studies, float(np.concatenate(parts).mean())) for key, parts in found.items()
    ]


def _verdicts(cell: Cell, y: np.ndarray, shift: float) -> dict[tuple[str, float], np.ndarray]:
    """Method and level -> (studies,) whether it rejects."""
    if cell.scenario == "leaderboard":
        return {("pairs", ALPHA): _any_pair(y)}
    if cell.groups > 1:
        return _family(y)
    one = y[:, 0]
    arms = two_arms(one)
    verdicts = {}
    for level in (ALPHA, *SMALL_LEVELS) if cell.scenario == "items" else (ALPHA,):
        verdicts["study", level] = study_rejects(y, level, shift)
        verdicts["two arms", level] = rejected(arms, level, shift)
    if cell.scenario == "items":
        return verdicts
    verdicts["wilcoxon", ALPHA] = wilcoxon_rejects(one, shift)
    verdicts["t", ALPHA] = t_rejects(one, shift)
    if cell.seeds == 5:
        looks = [study_rejects(seen, TWO_LOOK_ALPHA, shift) for seen in (y[..., :3, :], y)]
        verdicts["two looks", ALPHA] = np.logical_or(*looks)
    return verdicts


def _family(y: np.ndarray) -> dict[tuple[str, float], np.ndarray]:
    """Every design against design 0 in every group: any rejection after Holm, and the mean rate before it."""
    _, groups, k, _, _ = y.shape
    alone, corrected = [], []
    for group, design in itertools.product(range(groups), range(1, k)):
        order = [0, design, *(other for other in range(1, k) if other != design)]
        alone.append(study_rejects(y[:, :, order], ALPHA, group=group))
        corrected.append(study_rejects(y[:, :, order], ALPHA / (groups * (k - 1)), group=group))
    return {("study", ALPHA): np.mean(alone, axis=0), ("family", ALPHA): np.any(corrected, axis=0)}


def _any_pair(y: np.ndarray) -> np.ndarray:
    """(studies,) whether any two designs are told apart after Holm over all pairs."""
    _, _, k, seeds, _ = y.shape
    pairs = list(itertools.combinations(range(k), 2))
    found = []
    for first, second in pairs:
        others = [design for design in range(k) if design not in (first, second)]
        if seeds > 1:
            found.append(study_rejects(y[:, :, [first, second, *others]], ALPHA / len(pairs), cautious=True))
        else:
            differences = y[:, 0, second, 0] - y[:, 0, first, 0]
            found.append(np.array([signed_rank(d) <= ALPHA / len(pairs) for d in differences]))
    return np.any(found, axis=0)


def _centred(values: np.ndarray, axis: int) -> np.ndarray:
    return values - values.mean(axis=axis, keepdims=True)


def summary(rates: Sequence[Rate]) -> list[str]:
    """Rates by scenario, designs, seeds, method and level, false alarms unless `+` names a difference; then power."""
    lines = [
        f"{'false alarms':<24}{'designs':>7} {'seeds':>5}  {'method':<10} {'level':>6}    "
        "min median    max  cells above 1.6 x level"
    ]
    counted: dict[tuple[str, int, int, str, float], list[float]] = {}
    for r in rates:
        if r.true_difference == 0 or r.scenario == "items":
            named = r.scenario + (f", {r.groups} groups" if r.groups > 1 else "")
            named += f" + {r.true_difference:g} points" if r.true_difference else ""
            counted.setdefault((named, r.designs, r.seeds, r.method, r.level), []).append(r.rate)
    for (named, designs, seeds, method, level), values in counted.items():
        low, middle, high = np.quantile(values, [0, 0.5, 1])
        above = f"{sum(value > 1.6 * level for value in values)} of {len(values)}"
        spread = f"{low:6.4f} {middle:6.4f} {high:6.4f}"
        lines.append(f"{named:<24}{designs:>7} {seeds:>5}  {method:<10} {level:>6g} {spread}  {above}")
    power = [r for r in rates if r.true_difference in POWER_AT and r.method in ("study", "two arms")]
    if power:
        lines += ["", f"{'power (study / two arms)':<26}tasks designs seeds run sd  at {POWER_AT} points"]
    found = {(r.scenario, r.tasks, r.designs, r.seeds, r.run_sd, r.true_difference, r.method): r.rate for r in power}
    for key in dict.fromkeys(key[:5] for key in found):
        pairs = [f"{found[*key, d, 'study']:.2f} / {found[*key, d, 'two arms']:.2f}" for d in POWER_AT]
        scenario, tasks, designs, seeds, run_sd = key
        lines.append(f"{scenario:<26}{tasks:>5} {designs:>7} {seeds:>5} {run_sd:>6g}  " + "  ".join(pairs))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.type1", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the corners of the grid, 400 studies each")
    parser.add_argument("--json", action="store_true", help="print every rate as JSON instead of the summary")
    parser.add_argument("--csv", type=Path, help="write every rate to this file")
    parser.add_argument("--studies", type=int, help="studies per cell (default 1,500)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(argv)
    studies = options.studies or (400 if options.quick else 1500)
    cells = list(grid(SCENARIOS, options.quick))
    work = [(cell, studies * MORE_STUDIES.get(cell.scenario, 1), 1, differences(cell)) for cell in cells]
    rates: list[Rate] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for done, result in enumerate(pool.map(run_cell, *zip(*work, strict=True)), 1):
            rates += result
            print(f"\r{done} of {len(work)} cells", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, asdict(rates[0]).keys())
            writer.writeheader()
            writer.writerows(asdict(rate) for rate in rates)
    print(json.dumps([asdict(rate) for rate in rates]) if options.json else "\n".join(summary(rates)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
