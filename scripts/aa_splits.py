"""How often does the study's own test call two groups of runs of ONE design different? Splits of stored runs.

python scripts/aa_splits.py runs/aa/results.parquet results/aa [splits]

Each split draws disjoint groups of 2, 3 or 5 seeds without replacement. `two arms`: two groups, each with its own
run variance. `study`: several groups, two of them compared and the others lending their runs, as designs and the A/A
arm are tested. Every contrast is one of the report's: a mechanism over its items, p < .05
uncorrected, which should be called different in 5 % of splits. `after Holm`: any mechanism of a split at Holm p < .05;
`A/A alarm`: any at Holm p < .01, which is what would make a report exploratory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl

from poolwise import stats
from poolwise.verdicts.arms import arms

ALPHA = 0.05
SCHEMES = (  # name, seeds a group, groups
    ("two arms", 2, 2), ("study", 2, 3), ("study", 2, 6), ("two arms", 3, 2), ("study", 3, 5),
    ("two arms", 5, 2), ("study", 5, 4),
)  # fmt: skip


def split(scores: dict[str, np.ndarray], seeds: int, groups: int, rng: np.random.Generator) -> list[float]:
    """p of each mechanism, for one draw; `scores`: mechanism -> (runs, items)."""
    runs = len(next(iter(scores.values())))
    chosen = rng.permutation(runs)[: seeds * groups].reshape(groups, seeds)
    found = []
    for array in scores.values():
        first, second, *others = (array[rows] for rows in chosen)
        found.append(stats.crossed(first, second, pool=others).p_value)
    return found


def main(results: str, target: str, splits: str = "400") -> None:
    frame = pl.read_parquet(results)
    design = frame["design"][0]
    found, _ = arms(frame, [design], [], "task_type", "error")
    scores = {group: by_design[design].by_source for group, by_design in found.items()}
    runs = len(next(iter(scores.values())))
    rows, shares = [], []
    for name, seeds, groups in SCHEMES:
        rng = np.random.default_rng([seeds, groups])
        p = np.array([split(scores, seeds, groups, rng) for _ in range(int(splits))])  # (splits, mechanisms)
        holm = np.array([stats.holm(row.tolist()) for row in p])
        rows += [
            {"scheme": name, "seeds": seeds, "split": i, "mechanism": mechanism, "p": round(float(p[i, j]), 4)}
            for i in range(len(p))
            for j, mechanism in enumerate(scores)
        ]
        each = dict(zip(scores, (p < ALPHA).mean(axis=0), strict=True))
        some = [(holm < alpha).any(axis=1).mean() for alpha in (ALPHA, 0.01)]
        shares.append((name, seeds, groups, (p < ALPHA).mean(), *some, each))
    pl.DataFrame(rows).write_csv(f"{target}.csv")
    lines = [
        "# A/A splits",
        "",
        f"Made by `python scripts/aa_splits.py RESULTS {Path(target).parent.name}/{Path(target).name} {splits}` from "
        f"{runs} runs of `{design}` (`studies/aa.toml`). {splits} splits a row; every p: `{Path(target).name}.csv`.",
        "",
        "| test | seeds a group | groups | called different (p < .05) | any of a split after Holm | A/A alarm | "
        + " | ".join(scores) + " |",
        "|---|--:|--:|--:|--:|--:|" + "--:|" * len(scores),
    ]  # fmt: skip
    for name, seeds, groups, share, any_holm, alarm, each in shares:
        cells = " | ".join(f"{100 * value:.1f} %" for value in (share, any_holm, alarm, *each.values()))
        lines.append(f"| {name} | {seeds} | {groups} | {cells} |")
    lines += [
        "",
        "Splits reuse the same runs, so they are not independent: a mechanism whose runs happen to fall in two",
        "clusters is called different too often in every row. What the splits cannot show is how often designs that",
        "differ on single items, but not in the mean, are called different: within one design items differ by the run",
        "only.",
    ]
    Path(f"{target}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[4:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
