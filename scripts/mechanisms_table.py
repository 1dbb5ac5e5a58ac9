"""What a demo study found on each mechanism, beside what was predicted: Markdown on stdout.

python scripts/mechanisms_table.py demo/runs/results.parquet studies/predictions.toml
"""

from __future__ import annotations

import sys
import tomllib

import numpy as np
import polars as pl
from scipy.stats import t


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval over seeds (Student's t), in points."""
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{100 * values.mean():+.1f} ± {100 * half:.1f}"


def main(results: str, predictions: str) -> None:
    with open(predictions, "rb") as file:
        predicted = {name: item for name, item in tomllib.load(file).items() if isinstance(item, dict)}
    scores = pl.read_parquet(results).filter(pl.col("item_id").is_null())
    runs = scores.group_by("source", "design", "role", "seed").agg(pl.col("score").mean())
    designs = sorted(runs.filter(pl.col("role") == "design")["design"].unique().to_list())
    others = [d for d in ("broken", "tfidf") if d in set(runs["design"])]
    print(f"| mechanism | {' | '.join([*designs, *others])} | predicted | difference over seeds | came out |")
    print("|---|" + "---|" * (len(designs) + len(others) + 3))
    right = 0
    for name in sorted(predicted):
        mine = runs.filter(pl.col("source") == name)

        def of(design: str, mine: pl.DataFrame = mine) -> np.ndarray:
            return mine.filter(pl.col("design") == design).sort("seed")["score"].to_numpy()

        better, worse = predicted[name]["favoured"], predicted[name]["over"]
        gap = of(better) - of(worse)
        right += gap.mean() > 0
        cells = [f"{100 * of(d).mean():.1f}" for d in [*designs, *others]]
        word = "as predicted" if gap.mean() > 0 else "the other way"
        print(f"| `{name}` | {' | '.join(cells)} | {better} over {worse} | {interval(gap)} | {word} |")
    print(f"\n{right} of {len(predicted)} predictions have the right sign.")


if __name__ == "__main__":
    main(*sys.argv[1:])
