"""Every figure that README, `docs/results.md` and the pages of `results/` state, from the committed scores.

`python scripts/publish_results.py` fills the blocks of those pages (`<!-- NAME -->` … `<!-- /NAME -->`) and draws the
pictures of README; `tests/test_evidence.py` compares both with what is committed, and finds the `claims` in the prose.

The study on SmolLM2-135M is compared on each data set over runs × items, as `poolwise compare --task` compares designs,
with Holm's correction over all contrasts at once. An STS set has one score for all pairs together, so its pairs take
their pseudo-values of Spearman's correlation (`poolwise.verdicts.arms`), whose mean is that score.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import figures_ten
import numpy as np
import polars as pl
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
    trainings,
)  # fmt: skip

from poolwise import stats
from poolwise.reports.words import count, interval, mean_and_sd, number, points, probability
from poolwise.stats.crossed import Crossed
from poolwise.stats.exact import midranks

H200 = ROOT / "results" / "smollm2-h200"
RETRIEVAL = ("SciFact", "Cranfield")
TASKS = (*STS, *RETRIEVAL)
KINDS = {"STS": STS, "Retrieval": RETRIEVAL}
ATTENTION = {"m1": "causal", "m2": "causal", "m3": "causal", "m4": "bidirectional", "m5": "bidirectional"}


@dataclass(frozen=True)
class Difference:
    """A design against m1 on `where`, over 3 runs of each and `items`; scores 0–1."""

    where: str
    design: str
    items: int
    found: Crossed
    p_holm: float

    @property
    def words(self) -> str:
        """`−4.46 (−7.62 to −1.31)`; bold if Holm's p is at most .05."""
        found = self.found
        text = f"{points(found.difference, 2, True)} ({interval(found.ci_low, found.ci_high)})"
        return f"**{text}**" if self.p_holm <= 0.05 else text


@cache
def items(task: str, design: str) -> np.ndarray[Any, Any]:
    """(runs, items) of one task of the H200 study, runs by seed, items by id."""
    rows = scores("smollm2-h200").filter(
        (pl.col("task") == task) & (pl.col("design") == design) & pl.col("item_id").is_not_null()
    )
    runs = []
    for run in rows.sort("seed", "item_id").partition_by("seed", maintain_order=True):
        values = run["score"].to_numpy()
        if task in STS:
            z, w = (standard(midranks(x)) for x in (values, run["gold"].to_numpy()))
            rho = float((z * w).mean())
            values = rho + z * w - rho * (z**2 + w**2) / 2
        runs.append(values)
    return np.array(runs)


def standard(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (x - x.mean()) / x.std()


@cache
def differences() -> dict[tuple[str, str], Difference]:
    """(data set, design) -> its difference to m1; Holm over all of them."""
    pairs = [(task, design) for task in TASKS for design in DESIGNS[1:]]
    found = []
    for task, design in pairs:
        lent = [items(task, other) for other in DESIGNS if other not in ("m1", design)]
        found.append(stats.crossed(items(task, "m1"), items(task, design), pool=lent))
    holm = stats.holm([result.p_value for result in found]).tolist()
    return {
        pair: Difference(*pair, items(pair[0], "m1").shape[1], result, p)
        for pair, result, p in zip(pairs, found, holm, strict=True)
    }


@cache
def over_sets() -> dict[tuple[str, str], Difference]:
    """(task type, design) -> its difference to m1 on the mean of the sets of that type; Holm over all of them.

    The sets are fixed, their items random: a statement about these sets, not about the type.
    """
    found: dict[tuple[str, str], Crossed] = {}
    sizes = {}
    for kind, tasks in KINDS.items():
        every = {design: np.concatenate([items(task, design) for task in tasks], axis=1) for design in DESIGNS}
        of = [task for task in tasks for _ in range(items(task, "m1").shape[1])]
        sizes[kind] = len(of)
        for design in DESIGNS[1:]:
            lent = [every[other] for other in DESIGNS if other not in ("m1", design)]
            weights = dict.fromkeys(tasks, 1.0)
            found[kind, design] = stats.crossed_overall(every["m1"], every[design], of, weights, lent)
    holm = stats.holm([result.p_value for result in found.values()]).tolist()
    return {
        pair: Difference(*pair, sizes[pair[0]], result, p)
        for (pair, result), p in zip(found.items(), holm, strict=True)
    }


def detectable(kind: str, design: str) -> float:
    """The true difference on the mean of the sets that these runs detect with 80 % power, at Holm's first step."""
    result = over_sets()[kind, design].found
    assert result.null is not None
    level = 1 - 0.05 / len(over_sets())
    return stats.minimum_detectable_effect(replace(result, level=level, critical=result.null.critical(level)))


def h200_means() -> str:
    columns = {"STS (6)": STS, **{task: (task,) for task in TASKS}}
    rows = []
    for design in DESIGNS:
        rows.append([f"`{design}`", *(mean_and_sd(run_means(H200.name, design, of), 1) for of in columns.values())])
    for name, words in REFERENCES.items():
        found = [run_means(H200.name, name, of) for of in columns.values()]
        rows.append([words, *(number(value[0], 1) if value else "–" for value in found)])
    return table(["", *columns], rows)


def h200_differences() -> str:
    rows = []
    for task in TASKS:
        found = [differences()[task, design] for design in DESIGNS[1:]]
        noun = "pairs" if task in STS else "queries"
        rows.append([f"{task} ({found[0].items:,} {noun})", *(each.words for each in found)])
    for kind, words in (("STS", "mean of the six STS sets"), ("Retrieval", "mean of SciFact and Cranfield")):
        rows.append([words, *(over_sets()[kind, design].words for design in DESIGNS[1:])])
    return table(["Points above `m1`", *(f"`{design}` ({ATTENTION[design]})" for design in DESIGNS[1:])], rows)


def reading(paper: float, found: Difference) -> str:
    """Whether a direction of the paper holds on these sets."""
    if found.p_holm > 0.05:
        return "cannot be told"
    return "holds here" if (found.found.difference > 0) == (paper > 0) else "the opposite here"


def h200_paper() -> str:
    rows = []
    for (design, kind), gain in PAPER.items():
        direction = f"`{design}` {'above' if gain > 0 else 'below'} `m1` in {'STS' if kind == 'STS' else kind.lower()}"
        if kind not in KINDS:
            rows.append([direction, papers_figure(design, kind), "–", "not scored", "–", "cannot be told"])
            continue
        found = over_sets()[kind, design]
        sets = "six STS sets" if kind == "STS" else "SciFact, Cranfield"
        sample = f"{found.items:,} items of {sets}, 3 runs each"
        words = found.words.replace("**", "")
        shown = papers_figure(design, kind)
        rows.append([direction, shown, words, sample, probability(found.p_holm), reading(gain, found)])
    head = ["The paper", "its figure", "here, points (95 % interval)", "sample", "p Holm", "reading"]
    return table(head, rows, 1)


def h200_repeat() -> str:
    """The first training of m1 again on a CPU (`one-trial.toml`): its scores beside those of the three on the H200."""
    again = json.loads((H200 / "one-trial.json").read_text(encoding="utf-8"))["scores"]
    columns = {
        **{task: (task,) for task in TASKS if task in again},
        **({"STS (6)": STS} if {*STS} <= again.keys() else {}),
    }
    rows = []
    for name, tasks in columns.items():
        runs, here = run_means(H200.name, "m1", tasks), 100 * fmean(again[task] for task in tasks)
        first, spread = runs[0], float(np.std(runs, ddof=1))
        rows.append([name, number(first, 1), number(here, 1), number(here - first, 1, True), number(spread, 1)])
    return table(["", "H200, seed 0", "CPU, seed 0", "difference", "sd of m1's runs"], rows)


def shared_real() -> str:
    groups = {"Classification": 3, "Clustering": 2, "PairClassification": 1, "Reranking": 1, "Retrieval": 4, "STS": 6}
    names = [*DESIGNS, *(f"{design}-untuned" for design in DESIGNS), "tfidf", "bm25"]
    return by_type("shared-real", groups, names)


def by_type(study: str, groups: Mapping[str, int], names: Sequence[str]) -> str:
    """Mean ± sd over runs by task type; – where a name was not scored on all tasks of the type."""
    main = main_scores(study)
    tasks = {kind: sorted(main.filter(pl.col("task_type") == kind)["task"].unique()) for kind in groups}
    assert {kind: len(found) for kind, found in tasks.items()} == dict(groups)
    rows = []
    for name in names:
        found = [run_means(study, name, tasks[kind]) for kind in groups]
        rows.append([f"`{name}`", *(mean_and_sd(runs, 1) if runs else "–" for runs in found)])
    return table(["design", *(f"{kind} ({size})" for kind, size in groups.items())], rows)


def stsb_nano() -> str:
    main = main_scores("stsb-nano")
    scored = {(row["design"], row["role"]): 100 * row["score"] for row in main.iter_rows(named=True)}
    rows = []
    for design, words in (("mean-bidirectional", "mean, bidirectional"), ("m1", "last token, causal (`m1`)")):
        rows.append([words, number(scored[design, "design"], 1), number(scored[f"{design}-untuned", "untuned"], 1)])
    for name in ("tfidf", "tfidf_chars"):
        rows.append([REFERENCES[name], "–", number(scored[name, "reference"], 1)])
    return table(["", "tuned", "untuned"], rows)


def demo() -> str:
    """Mean of the tasks of each mechanism. Every form of a mechanism counts the same, as in its verdict."""
    main = main_scores("demo").with_columns(pl.col("task").str.extract(r"^demo/(.*)-[^-]*$").alias("mechanism"))
    names = [*DESIGNS, "m1-aa", "tfidf"]
    rows = []
    for mechanism in sorted(main["mechanism"].drop_nulls().unique()):
        mine = main.filter(pl.col("mechanism") == mechanism)
        tasks = sorted(mine["task"].unique())
        runs = [run_means("demo", name, tasks) for name in names]
        rows.append([f"`{mechanism}` ({len(tasks)})", *(mean_and_sd(found, 1) if found else "–" for found in runs)])
    return table(["mechanism (tasks)", *names[:-2], "A/A arm", "TF-IDF"], rows)


def false_alarms() -> dict[int, dict[str, float]]:
    """Number of tasks -> method -> share of simulated studies of equal designs that find a difference (3 seeds, run
    effect .2, design × task .3, noise .4)."""
    frame = pl.read_csv(ROOT / "results" / "type1.csv")
    cell = {
        "scenario": "base",
        "seeds": 3,
        "run_sd": 0.2,
        "heterogeneity": 0.3,
        "noise": 0.4,
        "designs": 5,
        "groups": 1,
    }
    cell["true_difference"] = 0.0
    found = frame.filter(*(pl.col(name) == value for name, value in cell.items()))
    rates: dict[int, dict[str, float]] = {}
    for tasks, method, rate in found.select("tasks", "method", "rate").iter_rows():
        rates.setdefault(tasks, {})[method] = rate
    return dict(sorted(rates.items()))


def alarms_table() -> str:
    rows = [
        [str(tasks), f"{100 * rates['wilcoxon']:.1f} %", f"{100 * rates['study']:.1f} %"]
        for tasks, rates in false_alarms().items()
    ]
    return table(["Tasks", "Wilcoxon over tasks", "poolwise"], rows)


def readme_compare() -> str:
    """A command of README with the first lines of its output."""
    command = "poolwise compare results/smollm2-h200/study.toml --task Cranfield"
    program = "from poolwise.cli import main; main()"
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    run = [sys.executable, "-c", program, *command.split()[1:]]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    shown = [line.rstrip() for line in done.stdout.splitlines()[:9]]
    return "\n".join(["```console", f"$ {command}", *shown, "…", "```"])


COSTS = {  # key in results/benchmarks.md -> what it compares, in short
    "head_fp32_b1": "head of the paper's size, folded, against the same unfolded",
    "head_memory": "its extra memory for 16 texts",
    "encode_paper": "multi-layers design, whole encode, against the paper's loop and head",
    "encode_st": "last-token design, 10,000 documents, against sentence-transformers 6.2",
    "gpu_encode_varlen": "encoding a Qwen2-0.5B shape on a GPU, against sentence-transformers without padding",
    "queries_32": "queries with an instruction of 32 tokens, against sentence-transformers 6.2",
    "train_st": "LoRA step on triples, against sentence-transformers' own loss",
    "gpu_step_st": "LoRA step of a 135M shape on a GPU, against sentence-transformers' padded step",
    "study": "five designs × three seeds, trained and scored, against loops like the paper's",
    "study_heads": "head-only study with the frozen base's states kept, against the same without",
}


def costs() -> str:
    """The benchmarks that matter to users, with their intervals, as `results/benchmarks.md` has them."""
    text = (ROOT / "results" / "benchmarks.md").read_text(encoding="utf-8")
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if (key := cells[0].strip("`")) in COSTS and not cells[2].startswith("not run"):
            rows.append([COSTS[key], cells[2], cells[3], f"`{key}`"])
    return table(["what", "times", "95 % interval", "benchmark"], rows)


BLOCKS = {
    "readme-compare": readme_compare,
    "costs": costs,
    "h200-means": h200_means,
    "h200-differences": h200_differences,
    "h200-paper": h200_paper,
    "h200-data": lambda: data_table(H200.name, {task: items(task, "m1").shape[1] for task in TASKS}),
    "h200-repeat": h200_repeat,
    "h200-seconds": lambda: seconds_table(dict.fromkeys(DESIGNS, H200.name)),
    "shared-real": shared_real,
    "stsb-nano": stsb_nano,
    "demo": demo,
    "alarms": alarms_table,
    **figures_ten.BLOCKS,
}
PAGES = ("README.md", "docs/results.md", "results/*/README.md")


def filled(text: str) -> str:
    """A page with the content of its blocks made from the scores."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def pages() -> list[Path]:
    """The pages that hold blocks."""
    return [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]


def shown() -> list[Difference]:
    """The contrasts on single data sets that Holm's correction leaves."""
    return [each for each in differences().values() if each.p_holm <= 0.05]


def claims() -> dict[str, list[str]]:
    """Page -> the phrases with figures that its prose must hold, from the scores."""
    seconds = [training["seconds"] for _, training in trainings(H200.name)]
    best = max(fmean(run_means(H200.name, design, STS)) for design in DESIGNS)
    above = best - run_means(H200.name, "tfidf_chars", STS)[0]
    bm25 = {task: run_means(H200.name, "bm25", [task])[0] for task in RETRIEVAL}
    assert all(max(run_means(H200.name, design, [t])) < bm25[t] for design in DESIGNS for t in RETRIEVAL)
    effects = [over_sets()["STS", design].found.run_sd for design in DESIGNS[1:]]
    run_effect = f"{points(min(effects), 1)} to {points(max(effects), 1)}"
    zero = sum(each.found.run_sd < 0.00005 for (kind, _), each in over_sets().items() if kind == "Retrieval")
    told = [reading(gain, over_sets()[kind, design]) for (design, kind), gain in PAPER.items() if kind in KINDS]
    found = [
        f"{each.design} on {each.where} {points(each.found.difference, 1)} "
        f"({interval(each.found.ci_low, each.found.ci_high, 1)})"
        for each in shown()
    ]
    share = f"{count(len(shown()), 'contrast')} of {len(differences())}"
    least = f"no difference below {points(min(detectable('STS', design) for design in DESIGNS[1:]), 1)} points"
    assert [(each.where, each.design) for each in shown()] == [("Cranfield", "m4"), ("Cranfield", "m5")]
    largest = number(PAPER["m5", "STS"])
    mean = f"their mean is {run_effect} points"
    page = [*found, share, least, f"{largest} points", mean, f"the best is {number(above, 1)} points"]
    page.append(f"{min(seconds):.0f} to {max(seconds):.0f} seconds")
    page += [
        f"{told.count('the opposite here')} of the {len(told)} are contradicted",
        f"in {zero} of the 4 contrasts on the retrieval mean",
        "(effect of a run {} and {} points in these two contrasts)".format(
            *(points(differences()["Cranfield", design].found.run_sd, 1) for design in ("m4", "m5"))
        ),
    ]
    again = json.loads((H200 / "one-trial.json").read_text(encoding="utf-8"))
    first = next(training for design, training in trainings(H200.name) if design == "m1")  # seed 0
    assert again["order"] == first["order"]
    ends = [(losses["1"], fmean([*losses.values()][-20:])) for losses in (again["losses"], first["losses"])]
    page.append(
        f"the loss of the first step is {ends[0][0]:.3f} ({ends[1][0]:.3f} on the H200), that of the last 20 steps "
        f"{number(ends[0][1], 3)} ({number(ends[1][1], 3)})"
    )
    for task, score in again["scores"].items():
        runs = run_means(H200.name, "m1", [task])
        assert abs(100 * score - runs[0]) < np.std(runs, ddof=1), task
    report = (ROOT / "results" / "demo" / "report.md").read_text(encoding="utf-8")
    open_, gap = (
        re.search(words, report)
        for words in (r"(\d+) of (\d+) contrasts are inconclusive", r"other seeds, differs from it by (\S+) points")
    )
    assert open_ is not None
    assert gap is not None
    built_in = f"{int(open_[2]) - int(open_[1])} of the {open_[2]} contrasts of m2 to m5 with m1 hold"
    rates = false_alarms()
    wolf = [
        f"in {100 * rates[15]['wilcoxon']:.1f} % over 15 tasks and in {100 * rates[41]['wilcoxon']:.1f} % over 41",
        f"stays at {100 * rates[15]['study']:.1f} and {100 * rates[41]['study']:.1f} %",
    ]
    return {
        **figures_ten.claims(),
        "results/smollm2-h200/README.md": page,
        "results/demo/README.md": [built_in, f"differs from `m1` by {number(float(gap[1]), 1)} points at most"],
        "README.md": [
            f"Of {len(differences())} differences on single data sets {len(shown())} are more than chance",
            f"mean of six STS sets by {run_effect} points (sd)",
            least,
            f"gain there is {largest}",
            *wolf,
        ],
    }
