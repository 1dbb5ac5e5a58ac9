"""How often does each test call two equal designs different, and how often does it see a true difference?

    python -m benchmarks.type1 [--quick] [--json] [--csv FILE] [--studies N] [--jobs N]

Simulated studies of five designs, in points (score x 100). Design 1 is compared with design 0 by

    study      `crossed` with the other three designs in its pool (guard included)
    two arms   `crossed` alone
    wilcoxon   exact signed-rank over tasks, on seed means
    t          paired t over seeds, on task means
    two looks  `study` at 3 and again at 5 seeds, at .03 each (cells with 5 seeds)

all at .05. A full run takes some ten CPU minutes. Mean squares are computed for all studies of a cell at once; the null
distribution is the shipped one, but studies whose p lies clearly away from .05 on a coarser grid are decided there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.special import fdtrc, ndtr, stdtr

from poolwise.stats.exact import largest_rejected_sum
from poolwise.stats.many import TWO_LOOK_ALPHA
from poolwise.stats.variance import GUARD_LEVEL, MeanSquares, chi_square_over_df, null_distribution

ALPHA = 0.05
DESIGNS = 5
TYPES = 4
POWER_AT = (0.25, 0.5, 1.0, 2.0)
SCENARIOS = ("base", "shared seeds", "run effects by type", "heavy tails", "unequal variances")
COARSE = {1: (14, 14, 4), 2: (8, 8, 8, 2)}  # grid points by number of run variances
CLOSE = 0.3  # p within this share of alpha on the coarse grid is computed on the shipped one (coarse error: up to .2)


@dataclass(frozen=True)
class Cell:
    """One kind of study: sizes, standard deviations in points, and how the simple model is bent."""

    scenario: str
    tasks: int
    seeds: int
    run_sd: float
    heterogeneity: float
    noise: float


@dataclass(frozen=True)
class Rate:
    """Share of `studies` in which `method` rejects, at a true difference in points."""

    scenario: str
    tasks: int
    seeds: int
    run_sd: float
    heterogeneity: float
    noise: float
    true_difference: float
    method: str
    studies: int
    rate: float


def grid(scenarios: Iterable[str], quick: bool) -> Iterator[Cell]:
    """The cells of the benchmark; `quick` keeps the corners."""
    tasks, seeds = ((8, 41), (3, 5)) if quick else ((8, 10, 15, 41), (3, 5))
    runs, heterogeneity, noise = (
        ((0.0, 0.4), (0.0, 0.6), (0.4,)) if quick else ((0, 0.1, 0.2, 0.4), (0, 0.3, 0.6), (0.2, 0.4))
    )
    for values in itertools.product(scenarios, tasks, seeds, runs, heterogeneity, noise):
        yield Cell(*values)


def simulate(cell: Cell, studies: int, rng: np.random.Generator) -> np.ndarray:
    """(studies, designs, seeds, tasks) scores in points, all designs equally good."""

    def draw(*shape: int) -> np.ndarray:
        if cell.scenario == "heavy tails":
            return rng.standard_t(3, shape) / np.sqrt(3)
        return rng.standard_normal(shape)

    n, k, s, t = studies, DESIGNS, cell.seeds, cell.tasks
    run = draw(n, k, s, 1)
    if cell.scenario == "shared seeds":  # correlation .5 between designs under one seed
        run = np.sqrt(0.5) * (run + draw(n, 1, s, 1))
    if cell.scenario == "run effects by type":  # half of a run's effect is another one for each type of task
        run = np.sqrt(0.5) * (run + draw(n, k, s, TYPES)[..., np.arange(t) * TYPES // t])
    run_sd = np.full((k, 1, 1), cell.run_sd)
    if cell.scenario == "unequal variances":
        run_sd[1] *= 3
    return run_sd * run + cell.heterogeneity * draw(n, k, 1, t) + cell.noise * draw(n, k, s, t)


@dataclass(frozen=True)
class Contrasts:
    """Mean squares of many studies at once, (studies,) each and (studies, 1 or 2) for runs; see `MeanSquares`."""

    difference: np.ndarray
    runs: np.ndarray
    tasks: np.ndarray
    error: np.ndarray
    run_dfs: tuple[float, ...]
    task_df: float
    unit: float

    @property
    def run_df(self) -> float:
        return sum(self.run_dfs)

    def one(self, i: int) -> MeanSquares:
        share = 1 / len(self.run_dfs)
        return MeanSquares(
            runs=tuple(self.runs[i].tolist()),
            run_shares=(share,) * len(self.run_dfs),
            run_dfs=self.run_dfs,
            run_df=self.run_df,
            tasks=float(self.tasks[i]),
            task_df=self.task_df,
            error=float(self.error[i]),
            error_df=self.run_df * self.task_df,
            unit=self.unit,
        )


def contrasts(y: np.ndarray) -> tuple[Contrasts, Contrasts, np.ndarray]:
    """Study form and two-arm form of design 1 against design 0, and where the guard keeps the former from pooling."""
    _, k, s, t = y.shape
    run_means = y.mean(axis=3)
    run_ms = t * run_means.var(axis=2, ddof=1)
    by_task = y[:, 1].mean(axis=1) - y[:, 0].mean(axis=1)
    tasks = s / 2 * by_task.var(axis=1, ddof=1)
    residual = _centred(_centred(y, 2), 3)
    own_error = (residual[:, :2] ** 2).sum(axis=(1, 2, 3)) / (2 * (s - 1) * (t - 1))
    run_df = (k - 1) * (s - 1)
    pooled_runs = t * (_centred(_centred(run_means, 1), 2) ** 2).sum(axis=(1, 2)) / run_df
    pooled_error = (_centred(residual, 1) ** 2).sum(axis=(1, 2, 3)) / (run_df * (t - 1))
    ratios = [run_ms[:, i] / np.delete(run_ms, i, axis=1).mean(axis=1) for i in (0, 1)]
    noisier = 2 * fdtrc(s - 1, run_df, np.maximum(*ratios)) < GUARD_LEVEL
    common = {"difference": by_task.mean(axis=1), "tasks": tasks, "task_df": t - 1.0, "unit": 2 / (s * t)}
    study = Contrasts(runs=pooled_runs[:, None], error=pooled_error, run_dfs=(float(run_df),), **common)
    arms = Contrasts(runs=run_ms[:, :2] / 2, error=own_error, run_dfs=(s - 1.0, s - 1.0), **common)
    return study, arms, noisier


def rejected(c: Contrasts, alpha: float, shift: float = 0.0) -> np.ndarray:
    """(studies,) whether `crossed` rejects at `alpha` when `shift` is added to every difference."""
    runs = c.runs.sum(axis=1)
    se = np.sqrt(c.unit * np.maximum(np.maximum(runs, c.tasks), runs + c.tasks - c.error))
    t = np.abs(c.difference + shift) / se
    p = _coarse_p(c, t)
    for i in np.flatnonzero(np.abs(p - alpha) < CLOSE * alpha):
        p[i] = null_distribution(c.one(i)).p_value(t[i])
    return p <= alpha


def _coarse_p(c: Contrasts, t: np.ndarray) -> np.ndarray:
    """`Null.p_value` of every study, on the coarse grid."""
    runs, tasks, error, error_df = c.runs.sum(axis=1), c.tasks, c.error, c.run_df * c.task_df
    low = runs < error
    error = np.where(low, (c.run_df * runs + error_df * error) / (c.run_df + error_df), error)
    below = tasks < error
    error = np.where(below, (c.task_df * tasks + error_df * error) / (c.task_df + error_df), error)
    tasks = np.where(below, error, tasks)
    parts = np.where(low[:, None], error[:, None] / len(c.run_dfs), c.runs)
    dfs = (*c.run_dfs, c.task_df, error_df)
    axes = np.meshgrid(*(chi_square_over_df(df, m) for df, m in zip(dfs, COARSE[len(c.run_dfs)], strict=True)))
    *run_draws, task_draw, error_draw = (axis.ravel() for axis in axes)
    x = sum(part[:, None] * draw for part, draw in zip(parts.T, run_draws, strict=True))
    y, e = tasks[:, None] * task_draw, error[:, None] * error_draw
    ratios = np.sqrt(np.maximum(np.maximum(x, y), x + y - e) / (parts.sum(axis=1) + tasks - error)[:, None])
    return 2 * ndtr(-t[:, None] * ratios).mean(axis=1)


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
    y = simulate(cell, studies, rng)
    study, arms, noisier = contrasts(y)
    rates = []
    for shift in differences:
        alone = rejected(arms, ALPHA, shift)
        verdicts = {
            "study": np.where(noisier, alone, rejected(study, ALPHA, shift)),
            "two arms": alone,
            "wilcoxon": wilcoxon_rejects(y, shift),
            "t": t_rejects(y, shift),
        }
        if cell.seeds == 5:
            looks = [y[:, :, :3], y]
            verdicts["two looks"] = np.logical_or(*(_guarded(look, TWO_LOOK_ALPHA, shift) for look in looks))
        for method, verdict in verdicts.items():
            rates.append(Rate(*asdict(cell).values(), shift, method, studies, float(verdict.mean())))
    return rates


def _guarded(y: np.ndarray, alpha: float, shift: float) -> np.ndarray:
    study, arms, noisier = contrasts(y)
    return np.where(noisier, rejected(arms, alpha, shift), rejected(study, alpha, shift))


def _centred(values: np.ndarray, axis: int) -> np.ndarray:
    return values - values.mean(axis=axis, keepdims=True)


def summary(rates: Sequence[Rate]) -> list[str]:
    """False alarms by scenario and method, then power, as lines of text."""
    lines = [
        f"{'false alarms at .05':<22}{'method':<11}{'seeds':>5}  {'min':>5} {'median':>6} {'max':>5}  cells in .03-.08"
    ]
    null = [r for r in rates if r.true_difference == 0]
    for scenario, method, seeds in dict.fromkeys((r.scenario, r.method, r.seeds) for r in null):
        values = np.array([r.rate for r in null if (r.scenario, r.method, r.seeds) == (scenario, method, seeds)])
        inside = f"{((values >= 0.03) & (values <= 0.08)).mean():.0%} of {len(values)}"
        low, middle, high = np.quantile(values, [0, 0.5, 1])
        lines.append(f"{scenario:<22}{method:<11}{seeds:>5}  {low:5.3f} {middle:6.3f} {high:5.3f}  {inside}")
    power = [r for r in rates if r.true_difference and r.method in ("study", "two arms")]
    if power:
        lines += ["", "power: tasks seeds run sd  " + " ".join(f"{d:>11g}" for d in POWER_AT) + "   (study / two arms)"]
    found = {(r.tasks, r.seeds, r.run_sd, r.true_difference, r.method): r.rate for r in power}
    for tasks, seeds, run_sd in dict.fromkeys(key[:3] for key in found):
        pairs = [
            f"{found[tasks, seeds, run_sd, d, 'study']:.2f} / {found[tasks, seeds, run_sd, d, 'two arms']:.2f}"
            for d in POWER_AT
        ]
        lines.append(f"{tasks:>12} {seeds:>5} {run_sd:>6g}  " + " ".join(f"{pair:>11}" for pair in pairs))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.type1", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the corners of the grid, 400 studies each")
    parser.add_argument("--json", action="store_true", help="print every rate as JSON instead of the summary")
    parser.add_argument("--csv", type=Path, help="write every rate to this file")
    parser.add_argument("--studies", type=int, help="studies per cell (default 2,000)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(argv)
    studies = options.studies or (400 if options.quick else 2000)
    cells = list(grid(SCENARIOS, options.quick))
    powered = [
        c
        for c in cells
        if c.scenario == "base" and c.noise == 0.4 and c.heterogeneity == (0.6 if options.quick else 0.3)
    ]
    work = [(cell, studies, 1, (0.0, *POWER_AT) if cell in powered else (0.0,)) for cell in cells]
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
