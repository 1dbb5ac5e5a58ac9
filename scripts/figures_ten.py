"""Tables of `results/smollm2-ten` and `results/smollm2-five`, from their scores; `figures` puts them into the pages.

Both come from one run: ten designs with two runs each, and the five of them that have a third. Designs are compared on
the sets of each task type: the sets are fixed and have the same weight, runs and items are random. So these are
statements about designs on these sets, not about the type. Items are those that `poolwise compare` uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from statistics import fmean

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scores import (
    DESIGNS,
    PAPER,
    REFERENCES,
    ROOT,
    STS,
    data_table,
    main_scores,
    papers_figure,
    run_means,
    scores,
    seconds_table,
    table,
)  # fmt: skip

from poolwise import stats
from poolwise.reports.words import interval, mean_and_sd, number, points, probability
from poolwise.stats.crossed import Crossed, planned_detectable_effect
from poolwise.study.study import Study
from poolwise.verdicts.arms import ITEM_UNITS, Arm, arms

TEN, FIVE, FIRST = "smollm2-ten", "smollm2-five", "smollm2-h200"
OF = {
    TEN: (*DESIGNS, "last-bi", "mean-causal", "mean-bi", "last-ffn", "mean-ffn-bi"),
    FIVE: ("m1", "m2", "m3", "m4", "mean-bi"),
    FIRST: DESIGNS,
}
KINDS = ("STS", "Retrieval", "Classification", "Clustering", "PairClassification", "Reranking")
BOTH = (*STS, "SciFact", "Cranfield")
"""The sets that were scored under both recipes."""
CROSSED = "the second line less the first"
CELLS = (("m1", "last-bi"), ("mean-causal", "mean-bi"), ("m1", "mean-causal"), ("last-bi", "mean-bi"))
CONTROLS = (("last-ffn", "m3"), ("mean-ffn-bi", "m4"), ("mean-ffn-bi", "m5"))


@cache
def of_task(name: str) -> dict[str, dict[str, Arm]]:
    """Task -> design -> its runs × items."""
    return arms(scores(name).filter(pl.col("role") == "design"), OF[name], (), "task", "error")[0]


@cache
def sets() -> dict[str, list[str]]:
    """Task type -> its tasks, in the order of the study file."""
    types = dict(main_scores(TEN).select("task", "task_type").unique().iter_rows())
    order = [name.rpartition("/")[2] for name in Study.load(ROOT / "results" / TEN / "study.toml").tasks]
    return {kind: [task for task in order if types[task] == kind] for kind in KINDS}


@cache
def values(name: str, kind: str, design: str) -> NDArray[np.float64]:
    """(runs, items) of a design on the sets of a type, one after the other."""
    return np.concatenate([of_task(name)[task][design].array for task in sets()[kind]], axis=1)


@cache
def difference(name: str, kind: str, base: str, design: str) -> Crossed:
    """`design` - `base` on the mean of the sets of a type; the other designs lend their runs."""
    of = [task for task in sets()[kind] for _ in of_task(name)[task][base].tasks]
    lent = [values(name, kind, other) for other in OF[name] if other not in (base, design)]
    weights = dict.fromkeys(sets()[kind], 1.0)
    return stats.crossed_overall(values(name, kind, base), values(name, kind, design), of, weights, lent)


def corrected(name: str, asked: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str, str], float]:
    """(type, baseline, design) -> Holm's p over all of them."""
    p = stats.holm([difference(name, *each).p_value for each in asked]).tolist()
    return dict(zip(asked, p, strict=True))


def words(found: Crossed, p_holm: float) -> str:
    """`+1.12 (.55 to 1.69)`, bold if Holm's p is at most .05."""
    text = f"{points(found.difference, 2, True)} ({interval(found.ci_low, found.ci_high)})"
    return f"**{text}**" if p_holm <= 0.05 else text


def heading(kind: str) -> str:
    return f"{kind} ({len(sets()[kind])})"


def means(name: str) -> str:
    rows = [
        [f"`{design}`", *(mean_and_sd(run_means(name, design, sets()[kind]), 1) for kind in KINDS)]
        for design in OF[name]
    ]
    for reference, said in REFERENCES.items():
        found = [run_means(name, reference, sets()[kind]) for kind in KINDS]
        rows.append([said, *(number(value[0], 1) if value else "–" for value in found)])
    return table(["", *map(heading, KINDS)], rows)


def pairs(name: str, asked: Sequence[tuple[str, str]]) -> str:
    """A row for each pair of designs, a column for each type; Holm over the whole table."""
    p = corrected(name, [(kind, *pair) for pair in asked for kind in KINDS])
    rows = []
    for base, design in asked:
        cells = (words(difference(name, kind, base, design), p[kind, base, design]) for kind in KINDS)
        rows.append([f"`{design}` − `{base}`", *cells])
    return table(["Points", *map(heading, KINDS)], rows)


@cache
def crossing(kind: str) -> Crossed:
    """How much more bidirectional attention gains with the mean than with the last token, on the sets of a type."""
    signs = {"m1": 1.0, "last-bi": -1.0, "mean-causal": -1.0, "mean-bi": 1.0}
    study = [values(TEN, kind, design) for design in OF[TEN]]
    of = [task for task in sets()[kind] for _ in of_task(TEN)[task]["m1"].tasks]
    coefficients = [signs.get(design, 0.0) for design in OF[TEN]]
    return stats.contrast(study, coefficients, of, dict.fromkeys(sets()[kind], 1.0))


def attention() -> dict[str, list[tuple[Crossed, float]]]:
    """Row of the table -> what was found for each type, and Holm's p over the whole table."""
    found = {f"`{last}` − `{first}`": [difference(TEN, kind, first, last) for kind in KINDS] for first, last in CELLS}
    found[CROSSED] = [crossing(kind) for kind in KINDS]
    p = iter(stats.holm([one.p_value for row in found.values() for one in row]).tolist())
    return {name: [(one, next(p)) for one in row] for name, row in found.items()}


def attention_table() -> str:
    rows = [[name, *(words(*cell) for cell in cells)] for name, cells in attention().items()]
    return table(["Points", *map(heading, KINDS)], rows)


def directions(name: str) -> list[tuple[str, str, float, Crossed, float, str]]:
    """Design, type, the paper's figure, what was found, Holm's p over all of them, and how they compare."""
    asked = [(design, kind, gain) for (design, kind), gain in PAPER.items() if design in OF[name]]
    p = corrected(name, [(kind, "m1", design) for design, kind, _ in asked])
    found = []
    for design, kind, gain in asked:
        here, p_holm = difference(name, kind, "m1", design), p[kind, "m1", design]
        reading = "holds here" if (here.difference > 0) == (gain > 0) else "the opposite here"
        found.append((design, kind, gain, here, p_holm, reading if p_holm <= 0.05 else "cannot be told"))
    return found


def paper(name: str) -> str:
    rows = []
    for design, kind, gain, here, p_holm, reading in directions(name):
        runs, items = values(name, kind, design).shape
        claim = f"`{design}` {'above' if gain > 0 else 'below'} `m1` in {'STS' if kind == 'STS' else kind.lower()}"
        sample = f"{items:,} items of {len(sets()[kind])} sets, {runs} runs each"
        rows.append([claim, papers_figure(design, kind), words(here, 1), sample, probability(p_holm), reading])
    return table(["The paper", "its figure", "here, points (95 % interval)", "sample", "p Holm", "reading"], rows)


def third_run() -> str:
    """What two runs said of each design against m1, and what three say."""
    others = OF[FIVE][1:]
    asked = [(kind, "m1", design) for design in others for kind in KINDS]
    two, three = corrected(TEN, asked), corrected(FIVE, asked)
    rows = []
    for design in others:
        for name, said, p in ((TEN, "two runs", two), (FIVE, "three runs", three)):
            cells = (words(difference(name, kind, "m1", design), p[kind, "m1", design]) for kind in KINDS)
            rows.append([f"`{design}`, {said}", *cells])
    return table(["Points above `m1`", *map(heading, KINDS)], rows)


def recipe() -> str:
    """The five designs of the paper under this recipe and under that of the first study, on the sets of both."""
    rows = []
    for what, tasks in (("STS (6)", STS), ("SciFact", ("SciFact",)), ("Cranfield", ("Cranfield",))):
        for said, of in (("mixed batches", FIRST), ("one source a batch", FIVE)):
            runs = [run_means(of if design != "m5" or of == FIRST else TEN, design, tasks) for design in DESIGNS]
            squares = [(len(each) - 1, np.var(each, ddof=1)) for each in runs]
            sd = float(np.sqrt(sum(df * square for df, square in squares) / sum(df for df, _ in squares)))
            rows.append([f"{what}, {said}", *(mean_and_sd(each, 1) for each in runs), number(sd, 1)])
    return table(["", *(f"`{design}`" for design in DESIGNS), "sd of a run"], rows)


@cache
def changed(task: str, design: str | None) -> Crossed:
    """What batches of one source change on a set: in `design` - m1, or (None) in the mean of m1 to m4."""
    of = DESIGNS[:4] if design is None else ("m1", design)
    first, second = (of_task(name)[task] for name in (FIRST, TEN if design == "m5" else FIVE))
    assert first["m1"].tasks == second["m1"].tasks
    signs = [1.0 / len(of)] * len(of) if design is None else [-1.0, 1.0]
    cells = [*(first[name].array for name in of), *(second[name].array for name in of)]
    return stats.contrast(cells, [*(-sign for sign in signs), *signs])


def corrected_changes(designs: Sequence[str | None]) -> dict[tuple[str, str | None], float]:
    """(task, design) -> Holm's p of `changed` over all of them."""
    asked = [(task, design) for task in BOTH for design in designs]
    return dict(zip(asked, stats.holm([changed(*each).p_value for each in asked]).tolist(), strict=True))


def interaction() -> str:
    """Does the recipe move the scores (Holm over that column), and the differences to m1 (Holm over the others)?"""
    p = {**corrected_changes([None]), **corrected_changes(DESIGNS[1:])}
    rows = [
        [task, *(words(changed(task, design), p[task, design]) for design in (None, *DESIGNS[1:]))] for task in BOTH
    ]
    return table(["Points", "mean of `m1` to `m4`", *(f"`{design}` − `m1`" for design in DESIGNS[1:])], rows)


def runs_needed() -> str:
    """The effect of a run on each data set, and the difference of two designs that 3, 5 and 10 runs of each show."""
    rows = []
    for kind in KINDS:
        for task in sets()[kind]:
            mine = {design: arm.by_source for design, arm in of_task(FIVE)[task].items()}
            found = [
                stats.crossed(mine["m1"], mine[design], pool=[mine[o] for o in mine if o not in ("m1", design)])
                for design in OF[FIVE][1:]
            ]
            run, noise, task_sd = np.median([(one.run_sd, one.noise_sd, one.task_sd) for one in found], axis=0)
            items = mine["m1"].shape[1]
            shown = [planned_detectable_effect(seeds, items, run, noise, task_sd) for seeds in (3, 5, 10)]
            unit = ITEM_UNITS[kind].replace("query", "querie")
            rows.append([task, f"{items:,} {unit}s", points(run, 1), *(points(one, 1) for one in shown)])
    return table(["Data set", "items", "effect of a run (sd)", "3 runs show", "5 runs show", "10 runs show"], rows, 2)


def data() -> str:
    return data_table(TEN, {task: len(of_task(TEN)[task]["m1"].tasks) for kind in KINDS for task in sets()[kind]})


BLOCKS = {
    "ten-means": lambda: means(TEN),
    "ten-paper": lambda: paper(TEN),
    "ten-attention": attention_table,
    "ten-controls": lambda: pairs(TEN, CONTROLS),
    "ten-data": data,
    "ten-seconds": lambda: seconds_table({design: FIVE if design in OF[FIVE] else TEN for design in OF[TEN]}),
    "five-means": lambda: means(FIVE),
    "five-paper": lambda: paper(FIVE),
    "five-third-run": third_run,
    "five-recipe": recipe,
    "five-interaction": interaction,
    "five-runs": runs_needed,
}


def claims() -> dict[str, list[str]]:
    """Page -> the phrases with figures that its prose must hold. What the prose says without figures is asserted."""

    def by(name: str, kind: str, base: str, design: str, sign: int = 1) -> tuple[str, str]:
        found = difference(name, kind, base, design)
        ends = sorted(sign * end for end in (found.ci_low, found.ci_high))
        return points(sign * found.difference, 1), interval(*ends, 1)

    cells = attention().items()
    shown = {(kind, row) for row, found in cells for kind, (_, p) in zip(KINDS, found, strict=True) if p <= 0.05}
    falls = {(kind, "`mean-causal` − `m1`") for kind in ("STS", "Classification")}
    more = {(kind, CROSSED) for kind in ("Classification", "PairClassification")}
    assert shown == falls | more | {("Classification", "`last-bi` − `m1`")}, shown
    assert all(crossing(kind).difference > 0 for kind in KINDS)
    held = [("STS", "m1", "mean-causal"), *(("Classification", "m1", other) for other in ("mean-causal", "last-bi"))]
    assert all(difference(TEN, *each).run_sd < 0.0005 for each in held)
    assert all(difference(TEN, kind, "m1", "mean-causal").difference < 0 for kind in KINDS)
    assert all(difference(TEN, kind, "last-bi", "mean-bi").difference > 0 for kind in KINDS)
    assert min(corrected(TEN, [(kind, *pair) for pair in CONTROLS for kind in KINDS]).values()) > 0.05
    assert {row[-1] for row in directions(FIVE)} == {"cannot be told"}
    told = [row for row in directions(TEN) if row[-1] != "cannot be told"]
    assert [(design, kind, reading) for design, kind, *_, reading in told] == [("m3", "STS", "the opposite here")]
    losses = "Below m1: m2 on MRPC; m3 on TwentyNewsgroups; m4 on TwentyNewsgroups. 125 of 128 contrasts"
    assert losses in (ROOT / "results" / FIVE / "report.md").read_text(encoding="utf-8")
    nothing = "all 288 contrasts are inconclusive"
    assert nothing in (ROOT / "results" / TEN / "report.md").read_text(encoding="utf-8")
    three = corrected(FIVE, [(kind, "m1", design) for design in OF[FIVE][1:] for kind in KINDS])
    kept = {each for each, p in three.items() if p <= 0.05}
    assert kept == {("Classification", "m1", "m2"), ("Clustering", "m1", "m2")}
    moved = corrected_changes([None])
    above = [task for task in STS if changed(task, None).ci_low > 0]
    assert (len(above), sum(p <= 0.05 for p in moved.values())) == (5, 4)
    assert all(moved[task, None] <= 0.05 for task in ("STS12", "STS13", "STS14", "STS15"))
    assert min(corrected_changes(DESIGNS[1:]).values()) > 0.05
    assert all((changed("SciFact", design).difference < 0) is (design == "m3") for design in DESIGNS[1:])
    scifact = changed("SciFact", "m2")
    for task, design in (("MRPC", "m2"), ("TwentyNewsgroups", "m3"), ("TwentyNewsgroups", "m4")):
        arms_of = [of_task(FIVE)[task][name].by_source for name in ("m1", design)]
        assert stats.crossed(*arms_of).run_sd < 0.0005
    gained = {kind: points(crossing(kind).difference, 1) for kind in KINDS}
    spans = {kind: interval(crossing(kind).ci_low, crossing(kind).ci_high, 1) for kind in KINDS}
    sts, classes = by(TEN, "STS", "m1", "mean-causal", -1), by(TEN, "Classification", "m1", "mean-causal", -1)
    last, two = by(TEN, "Classification", "m1", "last-bi", -1), by(TEN, "STS", "m1", "m3", -1)
    *others, third = run_means(FIVE, "m3", STS)
    lead = by(FIVE, "Retrieval", "m1", "mean-bi")
    return {
        f"results/{TEN}/README.md": [
            f"in STS by {sts[0]} points ({sts[1]}), in classification by {classes[0]} ({classes[1]})",
            f"does {gained['Classification']} points more for the mean than for the last token in classification "
            f"({spans['Classification']})",
            f"and {gained['PairClassification']} more in pair classification ({spans['PairClassification']})",
            f"the last token {last[0]} points in classification ({last[1]})",
            f"gains {by(TEN, 'Retrieval', 'm1', 'last-bi')[0]} points with the last token and "
            f"{by(TEN, 'Retrieval', 'mean-causal', 'mean-bi')[0]} with the mean",
        ],
        f"results/{FIVE}/README.md": [
            f"The third run of m3 is {number(third - fmean(others), 1)} points above its other two on the STS mean",
            f"{two[0]} points below m1 there (Holm's p {probability(told[0][4])} among twelve)",
            f"nothing can be told ({by(FIVE, 'STS', 'm1', 'm3')[1]})",
            f"that it is {lead[0]} points ({lead[1]}) above m1 in retrieval is not more than chance after correction",
            f"(m2 by {points(scifact.difference, 1)} points, {interval(scifact.ci_low, scifact.ci_high, 1)})",
        ],
    }
