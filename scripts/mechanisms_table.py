"""What a demo study found on each mechanism: predictions, designs, tuned against untuned and against TF-IDF.

python scripts/mechanisms_table.py demo/runs              Markdown on stdout
python scripts/mechanisms_table.py demo/runs --write      into docs/mechanisms.md, between its two marks

The folder is a study's run folder (`results.parquet` in it) with references untuned, tfidf and, if wanted, tfidf_chars.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from poolwise import demo, stats
from poolwise.reports.analyses import control_sentences as sentences
from poolwise.reports.words import count, interval, points
from poolwise.verdicts.arms import Arm
from poolwise.verdicts.comparison import Comparison, compare
from poolwise.verdicts.controls import scored
from poolwise.verdicts.findings import Findings

DOC = Path(__file__).parents[1] / "docs" / "mechanisms.md"
BEGIN, END = "<!-- begin of what scripts/mechanisms_table.py wrote -->", "<!-- end -->"
SHOWN = ("broken", "m1-untuned", "tfidf", "tfidf_chars")


def against(arm: Arm, fixed: Arm) -> tuple[float, float, float, float]:
    """Difference, its 95 % interval and p of a design's runs against something that does not vary from run to run.

    Items and runs of the design are random. Each run is held against the same fixed scores (untuned, TF-IDF), which are
    taken off item by item; what is left is compared with a row of zeros for each run (`stats.crossed`, two arms, as if
    the fixed side had runs without any effect).
    """
    shared = [task for task in arm.tasks if task in fixed.tasks]
    d = arm.on(shared).by_source - fixed.on(shared).by_source.mean(axis=0)
    found = stats.crossed(np.zeros_like(d), d)
    return found.difference, found.ci_low, found.ci_high, found.p_value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def designs(found: Comparison, others: Sequence[str]) -> str:
    arms = {(arm.group, arm.design): arm for arm in found.arms}
    rows = []
    for group in found.groups:
        cells = [points(arms[group, name].mean, 1) for name in found.designs]
        cells += [points(arms[group, name].mean, 1) if (group, name) in arms else "–" for name in others]
        rows.append([f"`{group}`", *cells])
    return table(["mechanism", *found.designs, *others], rows)


def predictions(found: Comparison) -> tuple[str, str]:
    said = demo.predictions()
    outcomes = scored(found, said["mechanisms"])
    rows = [
        (
            f"`{o.group}`", f"{o.favoured} over {o.over}", points(o.difference, 1, True),
            interval(o.ci_low, o.ci_high, 1), o.outcome,
        )
        for o in outcomes
    ]  # fmt: skip
    words = [o.outcome for o in outcomes]
    summary = (
        f"{sum(o.sign for o in outcomes)} of {len(outcomes)} predictions have the right sign; right (interval above 0) "
        f"{words.count('right')}, wrong (interval below 0) {words.count('wrong')}, undecided "
        f"{words.count('undecided')}. `predictions.toml`: sha256 `{said['sha256'][:16]}`."
    )
    return table(["mechanism", "predicted", "difference", "95 % interval", "came out"], rows), summary


def tuned(found: Comparison, fixed: Sequence[str]) -> tuple[str, list[str]]:
    """The baseline, tuned, against what is not tuned; and for each of those on how many mechanisms it lies above."""
    arms = {(arm.group, arm.design): arm for arm in found.arms}
    chance = {name for name, said in demo.predictions()["mechanisms"].items() if said["bag_of_words"] == "chance"}
    fixed = [name for name in fixed if any((group, name) in arms for group in found.groups)]
    rows = []
    above: dict[str, list[tuple[bool, bool, bool]]] = {name: [] for name in fixed}
    for group in found.groups:
        cells = [f"`{group}`" + ("" if group in chance else " (bag of words solves it)")]
        for name in fixed:
            difference, low, high, _ = against(arms[group, found.baseline], arms[group, name])
            above[name].append((difference > 0, low > 0, group in chance))
            cells.append(f"{points(difference, 1, True)} ({interval(low, high, 1)})")
        rows.append(cells)
    said = []
    for name, each in above.items():
        kept = each if name.endswith("untuned") else [row for row in each if row[2]]
        which = "mechanisms" if name.endswith("untuned") else "mechanisms that bags of words cannot solve"
        said.append(
            f"Tuned {found.baseline} lies above {name} on {sum(row[0] for row in kept)} of {len(kept)} {which}, with "
            f"an interval above 0 on {sum(row[1] for row in kept)}."
        )
    return table(["mechanism", *(f"{found.baseline} − {name}" for name in fixed)], rows), said


def page(folder: Path) -> str:
    frame = pl.read_parquet(folder / "results.parquet")
    last = pl.col("step").max().over("design", "seed")
    frame = frame.filter(pl.col("step").eq_missing(last))
    controls = frame.filter(pl.col("role") != "design")["design"].unique().to_list()
    found = compare(frame, "m1", controls=controls, missing="drop")
    groups = {arm.design for arm in found.arms}
    others = [name for name in SHOWN if name in groups]
    predicted, summary = predictions(found)
    gained, said = tuned(found, ("m1-untuned", "tfidf", "tfidf_chars"))
    seeds = count(found.seeds[found.baseline], "seed")
    steps = frame.filter(pl.col("role") == "design")["step"].max()
    parts = [
        BEGIN,
        f"{count(len(found.designs), 'design')}, {seeds}, {steps} steps. Scores × 100, each form of a mechanism "
        "counting the same.",
        designs(found, others),
        "Predictions. Differences in points, 95 % interval over seeds and items (`stats.crossed`), uncorrected:",
        predicted,
        summary,
        f"Tuned against not tuned: {found.baseline} less a row that no training moves, 95 % interval over seeds and "
        "items.",
        gained,
        " ".join(said),
        "Controls. " + " ".join(sentences(Findings.of(found))),
        END,
    ]
    return "\n\n".join(parts) + "\n"


def main(folder: str, *options: str) -> None:
    text = page(Path(folder))
    if "--write" not in options:
        print(text)
        return
    doc = DOC.read_text(encoding="utf-8")
    before, _, rest = doc.partition(BEGIN)
    DOC.write_text(before + text.rstrip("\n") + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
