"""Results in words, by a fixed grammar: difference, interval, sample and scope; never more than was tested.

Scores are 0–1 in the data and ×100 ("points") in words. Numbers drop the leading zero and use a true minus sign.
A contrast without evidence is called inconclusive and given as a range; equality is claimed only within a margin, by a
test. `sentences` has one sentence for each contrast, `summary` the answer over all groups.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from poolwise.study.catalogue import TASK_TYPES
from poolwise.verdicts.arms import FEW_SOURCES
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Given, Row, Verdict
from poolwise.verdicts.controls import scored
from poolwise.verdicts.costs import encode_flops
from poolwise.verdicts.findings import BELOW, Findings

KNOWN_RUN_EFFECTS = ".1 to 4 points (1.4 on STS for SmolLM2-135M)"
"""What one run's effect on a mean over tasks has been measured to be, as its standard deviation."""
FEW_DESIGNS = 8
"""Up to this many designs are named; of more, the summary gives only how many of them differ on each group."""


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """`.87`, `1.60`, `−.40`; with `sign` also `+.87`; an unbounded end (None) is `∞`."""
    if value is None:
        return "∞"
    text = f"{abs(value):.{digits}f}"
    text = text[1:] if text.startswith("0.") else text
    if not text.strip(".0"):  # a value that rounds to zero has no sign
        return text
    return ("−" if value < 0 else "+" if sign else "") + text


def points(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A score or a difference (0–1) in points: .0087 is `.87`."""
    return number(None if value is None else 100 * value, digits, sign)


def mean_and_sd(values: Sequence[float], digits: int = 2) -> str:
    """`67.95 ±.28`: mean and standard deviation of several runs; only the mean of a single one."""
    mean = number(statistics.fmean(values), digits)
    return f"{mean} ±{number(statistics.stdev(values), digits)}" if len(values) > 1 else mean


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """`−.40 to 1.30` from two ends in 0–1; `unbounded` if either is None."""
    return "unbounded" if low is None or high is None else f"{points(low, digits)} to {points(high, digits)}"


def probability(p: float | None) -> str:
    """`.031`, `<.001`; `–` if nothing was tested."""
    if p is None:
        return "–"
    if p < 0.001 or p > 0.9995:
        return "<.001" if p < 0.001 else "1"
    return number(p, 3 if round(p, 3) != 0.05 else 4)  # .0498 must not read as .050


def magnitude(value: float) -> str:
    """`2.6 M`, `1.28 G`, `640`: three significant digits and a metric prefix."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def count(n: int, noun: str) -> str:
    """`1 task`, `10 tasks`, `30 queries`."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def sample_words(tasks: int, sources: int, unit: str = "task") -> str:
    """`10 tasks`, `10 tasks from 7 sources`; for a mechanism, whose items are sources, `152 items of 4 tasks`; for an
    single task, whose items are of some `unit`, `30 queries`."""
    if unit not in ("task", "item"):
        return count(sources, unit)
    if sources > tasks:
        return f"{count(sources, 'item')} of {count(tasks, 'task')}"
    return count(tasks, "task") + (f" from {count(sources, 'source')}" if sources < tasks else "")


def group_words(group: str) -> str:
    """mteb's task types as prose (`PairClassification` becomes `pair classification`); other names are unchanged."""
    if group == "all":
        return "all tasks"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", group).lower() if group in TASK_TYPES and group != "STS" else group


def listing(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def decimals(*values: float | None) -> int:
    """One decimal of a point, or more if a number other than zero would read as zero."""
    known = [abs(100 * value) for value in values if value]
    return next((digits for digits in (1, 2) if all(round(value, digits) > 0 for value in known)), 3)


def above_or_below(difference: float, digits: int) -> str:
    """`2.0 points above`, `.4 points below`, `level with`."""
    size = points(abs(difference), digits)
    if not size.strip(".0"):
        return "level with"
    return f"{size} points {'above' if difference > 0 else 'below'}"


def detectable_words(value: float) -> str:
    """A detectable difference in points; none is larger than 100."""
    return ">100" if value >= 1 else points(value)


def outcome(comparison: Comparison, row: Row) -> str:
    """`better`, `worse`, `equivalent`, `withheld`, `inconclusive` or `untested`; of the checkpoints if there is no
    verdict."""
    if row.verdict:
        return row.verdict.verdict
    if row.p_holm is None:
        return "untested"
    if row.p_holm > comparison.alpha:
        return "inconclusive"
    return "better" if row.difference > 0 else "worse"


def contender(comparison: Comparison, group: str) -> Row:
    """The contrast that answers for a group: of the designs shown to be better, if any, or of all the one that is
    furthest above the baseline, or least below it."""
    rows = [row for row in comparison.rows if row.group == group]
    better = [row for row in rows if outcome(comparison, row) == "better"]
    return max(better or rows, key=lambda row: (row.verdict or row).difference)


def sentences(findings: Findings, base: str | None = None) -> list[str]:
    """One sentence for each contrast of the family, in the order of `findings.rows`.

    base: name of the base model, repeated in every claim.
    """
    costs = encode_flops(findings.costs)
    prices = {design: cost / costs[findings.baseline] for design, cost in costs.items() if findings.baseline in costs}
    return [
        f"{answer(findings, row, base)}{_power(findings, row)}{new_task_words(findings, row)}"
        f"{_price(row, prices.get(row.design))}"
        for row in findings.rows
    ]


def answer(comparison: Comparison, row: Row, base: str | None = None) -> str:
    """The sentence of a contrast without its power and its price."""
    tail = f"; base {base}" if base else ""
    where, unit = f"On {group_words(row.group)}", comparison.arm(row.group, row.design).unit
    if comparison.interim:
        return (
            f"{where}, {row.design} is {above_or_below(row.difference, 1)} {row.baseline} so far "
            f"({sample_words(row.tasks, row.n, unit)}; wins/ties/losses {row.wins}/{row.ties}/{row.losses}{tail}). "
            "Runs are missing, so nothing is tested."
        )
    if row.verdict:
        return f"{where}, {_design_claim(comparison, row, row.verdict, tail)}"
    if row.p_value is None and comparison.of_items(row.group):
        return (
            f"{where}, {row.design} scores {above_or_below(row.difference, 2)} {row.baseline}: these are checkpoints, "
            "and no verdict on designs is possible."
        )
    if row.p_value is None:
        arm = comparison.arm(row.group, row.design)
        seeds = count(min(comparison.seeds[row.design], comparison.seeds[row.baseline]), "seed")
        what = f"task, {arm.tasks[0]}" if row.tasks == 1 else f"source, {arm.sources[0]}"
        return (
            f"{where}, there is one {what}: {row.design} scores {above_or_below(row.difference, 2)} "
            f"{row.baseline} ({seeds}{tail}). A single {what.partition(',')[0]} leaves nothing to test over tasks."
        )
    given = f" {_given_claim(comparison, row, row.given)}" if row.given else ""
    return f"{where}, {_checkpoint_claim(comparison, row, tail)}{given}"


def verdict_claim(comparison: Comparison, pair: tuple[str, str], verdict: Verdict, context: str) -> str:
    """`m2 scores 2.0 points above m1 (95 % interval 1.2 to 2.8; context).` for a (design, baseline) and its verdict."""
    design, baseline = pair
    digits = decimals(verdict.difference, verdict.ci_low, verdict.ci_high)
    span = interval(verdict.ci_low, verdict.ci_high, digits)
    if verdict.verdict in ("better", "worse"):
        return (
            f"{design} scores {above_or_below(verdict.difference, digits)} {baseline} "
            f"({comparison.percent} % interval {span}; {context})."
        )
    if verdict.verdict == "equivalent":
        low, high = verdict.equivalence_low, verdict.equivalence_high
        # An end just inside the margin must not be rounded onto it.
        inner = interval(low, high, decimals(low, high, comparison.margin - max(-low, high)))
        return (
            f"{design} and {baseline} are equivalent within ±{points(comparison.margin, 1)} points "
            f"({comparison.inner_percent} % interval {inner}; {context})."
        )
    if verdict.verdict == "withheld":
        return (
            f"{design} against {baseline}: {points(verdict.difference, digits, True)} points ({span}; {context}), Holm "
            f"p {probability(verdict.p_holm)}, {withheld_words(verdict)}."
        )
    open_ = "inconclusive" if verdict.ci_low <= 0 <= verdict.ci_high else "inconclusive after Holm’s correction"
    return f"{design} against {baseline} is {open_}: differences from {span} points are compatible ({context})."


def withheld_words(verdict: Verdict | Given) -> str:
    """`withheld: 4 sources, a verdict takes 5; add one source of such tasks`."""
    more = "one more source" if verdict.missing_sources == 1 else f"{verdict.missing_sources} more sources"
    have = count(verdict.sources, "source")
    return f"withheld: {have}, a verdict takes {FEW_SOURCES}; add tasks of this kind from {more}"


def new_task_words(comparison: Comparison, row: Row) -> str:
    """What to expect on one further task; only beside a verdict on designs over tasks."""
    verdict = row.verdict
    if verdict is None or verdict.better_on_new is None:
        return ""
    digits = decimals(verdict.new_task_low, verdict.new_task_high)
    span = interval(verdict.new_task_low, verdict.new_task_high, digits)
    return (
        f" On one further task like these, expect {span} points; better by more than {points(comparison.margin, 1)} "
        f"with a chance of {chance(verdict.better_on_new)}."
    )


def chance(share: float) -> str:
    """`62 %`, `<1 %`, `>99 %`."""
    percent = 100 * share
    return "<1 %" if percent < 1 else ">99 %" if percent > 99 else f"{percent:.0f} %"


def _design_claim(comparison: Comparison, row: Row, verdict: Verdict, tail: str) -> str:
    seeds = count(verdict.seeds, "seed")
    if verdict.seeds != verdict.baseline_seeds:
        seeds = f"{verdict.seeds} and {verdict.baseline_seeds} seeds"
    sample = sample_words(verdict.tasks, verdict.sources, comparison.arm(row.group, row.design).unit)
    context = f"{sample}, {seeds}; run effect {points(verdict.run_sd)}{tail}"
    return verdict_claim(comparison, (row.design, row.baseline), verdict, context)


def _power(comparison: Comparison, row: Row) -> str:
    """For an inconclusive verdict, what this study could have detected and what it would need."""
    verdict = row.verdict
    if verdict is None or verdict.verdict != "inconclusive":
        return ""
    units = count(2, comparison.arm(row.group, row.design).unit).removeprefix("2 ")
    needed = f"more than 50 seeds{'' if verdict.by_runs else f', or more {units}'}"
    if verdict.settle_low is not None:
        fewest, most = verdict.settle_low, verdict.settle_high
        needed = f"{fewest} to {most} seeds" if most else f"{fewest} seeds or more"
        needed = count(fewest, "seed") if fewest == most else needed
    power = f"A true difference of {points(verdict.detectable, 1)} points would be detected with 80 % power"
    power = "No true difference would be detected with 80 % power" if verdict.detectable >= 1 else power
    power = f"{_not_after_holm(verdict, comparison.family)} {power}"
    aim = verdict.settle_for if verdict.settle_for is not None else comparison.margin
    as_found = ", as large as the one found," if aim > comparison.margin else ""
    return f"{power}; one of {points(aim, 1)} points{as_found} would need {needed}."


def _not_after_holm(result: Row | Verdict, family: int) -> str:
    """Why an interval may exclude 0 beside an inconclusive contrast; never by a correction over one contrast."""
    if family == 1 or result.ci_low is None or result.ci_high is None or result.ci_low <= 0 <= result.ci_high:
        return ""
    return f" The interval excludes 0, but not after Holm over {family} contrasts (p {probability(result.p_holm)})."


def _checkpoint_claim(comparison: Comparison, row: Row, tail: str) -> str:
    runs = [comparison.seeds[name] for name in (row.design, row.baseline)]
    seeds = count(runs[0], "seed") if runs[0] == runs[1] else f"{runs[0]} and {runs[1]} seeds"
    digits = decimals(row.difference, row.ci_low, row.ci_high)
    span = interval(row.ci_low, row.ci_high, digits)
    unit = comparison.arm(row.group, row.design).unit
    effect = "" if row.effect_size is None else f", rank-biserial {number(row.effect_size)}"
    estimate = "Hodges–Lehmann" if unit == "task" else "mean"
    context = (
        f"{sample_words(row.tasks, row.n, unit)}, {seeds}; wins/ties/losses {row.wins}/{row.ties}/{row.losses}; "
        f"Holm p {probability(row.p_holm)}{effect}{tail}"
    )
    why = f"These are checkpoints, not designs: {'one run each' if max(runs) == 1 else 'too few runs or sources'}."
    if row.p_holm is not None and row.p_holm <= comparison.alpha:
        claim = f"the checkpoint of {row.design} scores {above_or_below(row.difference, digits)} that of {row.baseline}"
        tipping = ""
        if row.tipping_run_sd:
            tipping = (
                f" It would hold up to a run effect of {points(row.tipping_run_sd)} points; runs of one design are "
                f"known to vary by {KNOWN_RUN_EFFECTS}."
            )
        elif row.tipping_run_sd is not None:
            tipping = " The difference of the means would not hold even without a run effect."
        return f"{claim} ({estimate}, {comparison.percent} % interval {span}; {context}). {why}{tipping}"
    compatible = f"{count(row.n, 'source' if unit == 'task' else unit)} rule out no size of difference"
    if span != "unbounded":
        compatible = f"differences from {span} points are compatible"
    pair = f"the checkpoint of {row.design} against that of {row.baseline}"
    return f"{pair} is inconclusive: {compatible} ({context}).{_not_after_holm(row, len(comparison.rows))} {why}"


def _given_claim(comparison: Comparison, row: Row, given: Given) -> str:
    """The claim about the designs that single runs support under a run effect from another study."""
    digits = decimals(given.difference, given.ci_low, given.ci_high)
    span = interval(given.ci_low, given.ci_high, digits)
    df = "known exactly" if given.run_df == float("inf") else f"{given.run_df:g} df"
    start = f"Given a run effect of {points(given.run_sd)} points from another study ({df})"
    sample = f"{count(given.sources, 'source')}, 1 seed each; Holm p {probability(given.p_holm)}"
    if given.verdict == "withheld":
        return f"{start}, {points(given.difference, digits, True)} points ({span}; {sample}), {withheld_words(given)}."
    if given.verdict == "inconclusive":
        return f"{start}, the designs are inconclusive: differences from {span} points are compatible ({sample})."
    return (
        f"{start}, the design {row.design} scores {above_or_below(given.difference, digits)} {row.baseline} "
        f"({comparison.percent} % interval {span}; {sample}); these runs do not measure that effect."
    )


def _price(row: Row, relative: float | None) -> str:
    """What a design costs to encode, relative to the baseline; only beside a verdict on designs."""
    if row.verdict is None or relative is None:
        return ""
    if abs(relative - 1) < 0.005:
        return " It costs the same to encode, in FLOPs."
    return f" It costs {abs(100 * (relative - 1)):.0f} % {'more' if relative > 1 else 'less'} to encode, in FLOPs."


def group_noun(comparison: Comparison) -> str:
    """The name of a group of the comparison: `mechanism`, `task`, `task type` or `group`."""
    if all(comparison.of_mechanism(group) for group in comparison.groups):
        return "mechanism"
    if all(comparison.of_own_task(group) for group in comparison.groups):
        return "task"
    plain = not any(comparison.of_items(group) for group in comparison.groups)
    return "task type" if comparison.by == "task_type" and plain else "group"


def summary(findings: Findings, predictions: Mapping[str, Any] | None = None) -> str:
    """Which designs score above and below the baseline and where, what remains open, how predictions came out.

    Empty while runs are missing.
    """
    if findings.interim:
        return ""
    parts = [
        _differences(findings),
        _thin(findings),
        _untested(findings),
        _references(findings),
        _predictions(findings, predictions),
    ]
    return " ".join(text for text in parts if text)


def _differences(findings: Findings) -> str:
    base, noun = findings.baseline, group_noun(findings)
    tested = [(row, word) for row in findings.rows if (word := outcome(findings, row)) != "untested"]
    if not tested:
        return ""
    groups = dict.fromkeys(row.group for row, _ in tested)
    where = f"on any of {count(len(groups), noun)}" if len(groups) > 1 else f"on {group_words(tested[0][0].group)}"
    where += " that can be tested" if 1 < len(groups) < len(findings.groups) else ""
    nobody = f"{findings.designs[1]} is not" if len(findings.designs) == 2 else "No design is"
    open_ones = sum(word in ("inconclusive", "withheld") for _, word in tested)
    held = [row for row, word in tested if word == "withheld"]
    sentences = []
    if open_ones == len(tested):
        named = {1: "the only contrast is", 2: "both contrasts are"}
        contrasts = named.get(len(tested), f"all {len(tested)} contrasts are")
        why = "inconclusive" if not held else "inconclusive or withheld" if len(held) < len(tested) else "withheld"
        sentences.append(f"{nobody} shown to differ from {base} {where}: {contrasts} {why}.")
    for word, claim in (("better", "Above"), ("worse", "Below"), ("equivalent", "Equivalent to")):
        rows = [row for row, known in tested if known == word]
        if rows:
            sentences.append(f"{claim} {base}: {_who(findings, rows, noun)}.")
        elif word == "better" and open_ones < len(tested):
            sentences.append(f"{nobody} shown to score above {base} {where}.")
    if 0 < open_ones < len(tested):
        unsure = open_ones - len(held)
        if unsure:
            sentences.append(f"{unsure} of {len(tested)} contrasts {'is' if unsure == 1 else 'are'} inconclusive.")
    if held:
        sentences.append(f"Withheld for lack of sources: {_who(findings, held, noun)}.")
    if findings.exploratory and findings.recommendations:
        sentences.append("Exploratory verdicts carry no recommendation.")
    start = "Exploratory: " if findings.exploratory else "Checkpoints only: " if findings.scope != "designs" else ""
    return start + " ".join(sentences)


def _who(comparison: Comparison, rows: Sequence[Row], noun: str) -> str:
    """`m2 on late and roles; m3 on all 10 mechanisms`; of many designs only counts, `18 of 19 designs on STS`."""
    others = len(comparison.designs) - 1

    def place(row: Row) -> str:
        checkpoints = row.verdict is None and comparison.scope == "designs"
        return group_words(row.group) + (" (checkpoints)" if checkpoints else "")

    if len({row.design for row in rows}) > FEW_DESIGNS:
        places = Counter(place(row) for row in rows)
        return "; ".join(f"{number} of {others} designs on {group}" for group, number in places.items())
    parts = []
    for name in comparison.designs:
        groups = [place(row) for row in rows if row.design == name]
        everywhere = 1 < len(groups) == len(comparison.groups)
        if groups:
            parts.append(f"{name} on {f'all {count(len(groups), noun)}' if everywhere else listing(groups)}")
    return "; ".join(parts)


def _thin(comparison: Comparison) -> str:
    """The groups whose tasks come from too few sources for a verdict, although each design was run twice."""
    thin = []
    for group in comparison.groups:
        arm = comparison.arm(group, comparison.baseline)
        if len(arm.tasks) > 1 and len(arm.seeds) > 1 and arm.by_source.shape[1] < FEW_SOURCES:
            thin.append(group_words(group))
    have = "has" if len(thin) == 1 else "have"
    return f"A verdict needs tasks from {FEW_SOURCES} sources; {listing(thin)} {have} fewer." if thin else ""


def _untested(comparison: Comparison) -> str:
    """The groups in which nothing can be tested."""
    tested = {row.group for row in comparison.rows if outcome(comparison, row) != "untested"}
    bare = [group_words(group) for group in comparison.groups if group not in tested]
    return f"Nothing can be tested on {listing(bare)}." if bare else ""


def _references(findings: Findings) -> str:
    """The groups in which no design reaches a reference without training."""
    below: dict[str, list[str]] = {}
    for recommendation in findings.recommendations:
        if recommendation.basis == BELOW:
            below.setdefault(str(recommendation.reference), []).append(group_words(recommendation.group))
    sentences = []
    for reference, groups in below.items():
        everywhere = 1 < len(groups) == len(findings.groups)
        where = f"all {count(len(groups), group_noun(findings))}" if everywhere else listing(groups)
        sentences.append(f"Every design scores below {reference} on {where}.")
    return " ".join(sentences)


def _predictions(comparison: Comparison, predictions: Mapping[str, Any] | None) -> str:
    outcomes = [each.outcome for each in scored(comparison, predictions["mechanisms"])] if predictions else []
    if not outcomes:
        return ""
    counts = ", ".join(f"{outcomes.count(word)} {word}" for word in ("right", "wrong", "undecided"))
    return f"Of {count(len(outcomes), 'prediction')} written before the runs: {counts}."
