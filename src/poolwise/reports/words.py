"""Results in words, by a fixed grammar: what was found, its interval, its n, its scope; never more than was tested.

Scores are 0–1 in the data and ×100 ("points") in words. Numbers drop the leading zero and use a true minus sign.
Absence of evidence is called inconclusive and given as a range; equality is claimed only inside a margin, by test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Given, Row, Verdict
from poolwise.verdicts.findings import BASELINE, BETTER, Recommendation

MTEB_TYPES = (
    "Classification", "Clustering", "InstructionRetrieval", "MultilabelClassification", "PairClassification",
    "Reranking", "Retrieval", "Summarization", "BitextMining",
)  # fmt: skip
NO_VERDICT = "No verdict on designs is possible here"
MISSING_RUNS = "these are checkpoints, and no verdict on designs is possible"
ENCODE_COSTS = ("encode_seconds", "encode_flops")  # keys of a cost row, the measured one first


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """`.87`, `1.60`, `−.40`; with `sign` also `+.87`; an unbounded end (None) is `∞`."""
    if value is None:
        return "∞"
    text = f"{abs(value):.{digits}f}"
    text = text[1:] if text.startswith("0.") else text
    if not text.strip(".0"):
        return text
    return ("−" if value < 0 else "+" if sign else "") + text


def points(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A score or a difference (0–1) in points: .0087 is `.87`."""
    return number(None if value is None else 100 * value, digits, sign)


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """`−.40 to 1.30` from two ends in 0–1; `unbounded` where either is None."""
    return "unbounded" if low is None or high is None else f"{points(low, digits)} to {points(high, digits)}"


def probability(p: float | None) -> str:
    """`.031`, `<.001`, `–` where nothing was tested."""
    if p is None:
        return "–"
    if p < 0.001 or p > 0.9995:
        return "<.001" if p < 0.001 else "1"
    return number(p, 3 if round(p, 3) != 0.05 else 4)  # .0498 must not read as .050


def count(n: int, noun: str) -> str:
    """`1 task`, `10 tasks`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def sample_words(tasks: int, sources: int) -> str:
    """`10 tasks`, `10 tasks from 7 sources`; of a planted mechanism (items are sources) `152 items of 4 tasks`."""
    if sources > tasks:
        return f"{count(sources, 'item')} of {count(tasks, 'task')}"
    return count(tasks, "task") + (f" from {count(sources, 'source')}" if sources < tasks else "")


def group_words(group: str) -> str:
    """mteb's type words as prose: `PairClassification` is `pair classification`; other names stay as they are."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", group).lower() if group in MTEB_TYPES else group


def listing(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def outcome(comparison: Comparison, row: Row) -> str:
    """`better`, `worse`, `equivalent`, `inconclusive` or `untested` (one task); of checkpoints without a verdict."""
    if row.verdict:
        return row.verdict.verdict
    if row.p_holm is None:
        return "untested"
    if row.p_holm > comparison.alpha:
        return "inconclusive"
    return "better" if row.difference > 0 else "worse"


def headline(comparison: Comparison, group: str) -> str:
    """The answer for one group of tasks in one line, e.g. "m4 scores above m1; m2 and m3 are inconclusive."."""
    rows = [row for row in comparison.rows if row.group == group]
    rows.sort(key=lambda row: -abs(row.verdict.difference if row.verdict else row.difference))
    if comparison.interim:
        shifts = [f"{row.design} {points(row.difference, 1, True)}" for row in rows]
        return f"So far, in points against {comparison.baseline}: {', '.join(shifts)}. Nothing is tested yet."
    if all(outcome(comparison, row) == "untested" for row in rows):
        if comparison.of_items(group):
            return "One run only: no verdict on designs is possible."
        return f"One task only, {comparison.arm(group, comparison.baseline).tasks[0]}: nothing to test over tasks."
    found = [(row.design, outcome(comparison, row)) for row in rows]
    parts = outcomes(comparison, found)
    scope = "" if any(row.verdict for row in rows) else "Checkpoints only: "
    return opened(f"{'Exploratory: ' if comparison.exploratory else ''}{scope}{parts}.")


def opened(sentence: str) -> str:
    """A sentence with a capital where it begins with a word of its own, and not with the name of a design."""
    return re.sub("^no design", "No design", sentence)


def outcomes(comparison: Comparison, found: Sequence[tuple[str, str]]) -> str:
    """`m4 scores above m1; m2 and m3 are inconclusive`, from (design, word), the largest difference first."""
    base, parts = comparison.baseline, list[str]()
    for word, one, many in (
        ("better", f"scores above {base}", f"score above {base}"),
        ("worse", f"scores below {base}", f"score below {base}"),
        ("equivalent", f"is equivalent to {base}", f"are equivalent to {base}"),
        ("inconclusive", "is inconclusive", "are inconclusive"),
    ):
        chosen = [design for design, said in found if said == word]
        if word not in ("better", "worse"):
            chosen.sort(key=comparison.designs.index)
        elif len(chosen) > 8:  # the largest differences stand for them
            chosen = [*chosen[:3], f"{len(chosen) - 3} others"]
        if word == "inconclusive" and len(chosen) > 2:
            alone = f"no design is shown to differ from {base}: all {len(chosen)}"
            parts.append(f"{f'the other {len(chosen)}' if parts else alone} are inconclusive")
        elif chosen:
            parts.append(f"{listing(chosen)} {one if len(chosen) == 1 else many}")
    return "; ".join(parts)


def advice(comparison: Comparison, found: Recommendation) -> str:
    """Which design to use for a group, why, and how far to trust it."""
    base = comparison.baseline
    if found.design is None:
        return (
            f"No recommendation: every design stays below {found.reference} ({points(found.reference_score, 1)} "
            f"against {points(found.best_score, 1)} for the best of them)."
        )
    cheapest = "the cheapest to encode of those not shown worse"
    if not found.judged:
        why = "the baseline, stays the choice" if found.basis == BASELINE else f"{cheapest}, is the choice"
        why_not = "Exploratory verdicts carry no recommendation" if comparison.exploratory else NO_VERDICT
        return f"{why_not}: {found.design}, {why} for want of evidence."
    if found.basis == BETTER:
        said = f"Recommended: {found.design}, the best of what scores above {base} after Holm."
    elif found.basis == BASELINE:
        said = f"Recommended: {base}, as no design is shown to score above it; costs are not known."
    else:
        said = f"Recommended: {found.design}, {cheapest}, as no design is shown to score above {base}."
    if found.basis == BETTER and found.relative_cost:
        said += f" It encodes at {number(found.relative_cost)} × the cost of {base}."
    if found.stays is not None:
        said += (
            f" Leaving out one source at a time keeps it in {round(found.stays * found.folds)} of {found.folds} folds; "
            f"expected regret {points(found.expected_regret)} points."
        )
    return said


def sentences(
    comparison: Comparison,
    base: str | None = None,
    recipe: str | None = None,
    costs: Iterable[Mapping[str, Any]] | None = None,
) -> list[str]:
    """One sentence for each contrast of the family, in the order of `comparison.rows`.

    Args:
        base, recipe: names of what all designs shared, repeated in every claim.
        costs: rows with `design` and `encode_seconds` or `encode_flops`; adds what the design costs to encode.
    """
    tail = "".join(f"; {word} {name}" for word, name in (("recipe", recipe), ("base", base)) if name)
    priced = list(costs or ())
    return [_sentence(comparison, row, tail, priced) for row in comparison.rows]


def _sentence(comparison: Comparison, row: Row, tail: str, costs: Sequence[Mapping[str, Any]]) -> str:
    where = f"On {group_words(row.group)}"
    if comparison.interim:
        return (
            f"{where}, {row.design} lies {above_or_below(row.difference, 1)} {row.baseline} so far "
            f"({count(row.n, 'task')}; "
            f"wins/ties/losses {row.wins}/{row.ties}/{row.losses}{tail}). Runs are missing: nothing is tested."
        )
    if row.verdict:
        return f"{where}, {_design_claim(comparison, row, row.verdict, tail)}{_cost(row, costs)}"
    if row.p_value is None and comparison.of_items(row.group):
        return f"{where}, {row.design} scores {above_or_below(row.difference, 2)} {row.baseline}: {MISSING_RUNS}."
    if row.p_value is None:
        task, size = comparison.arm(row.group, row.design).tasks[0], above_or_below(row.difference, 2)
        seeds = count(min(comparison.seeds[row.design], comparison.seeds[row.baseline]), "seed")
        return (
            f"{where} there is one task, {task}: {row.design} scores {size} {row.baseline} there "
            f"({seeds}{tail}). One task has no spread over tasks to test against."
        )
    known = f" {_given_claim(comparison, row, row.given)}" if row.given else ""
    return f"{where}, {_checkpoint_claim(comparison, row, tail)}{known}"


def _design_claim(comparison: Comparison, row: Row, verdict: Verdict, tail: str) -> str:
    sample = sample_words(verdict.tasks, verdict.sources)
    seeds = count(verdict.seeds, "seed")
    if verdict.seeds != verdict.baseline_seeds:
        seeds = f"{verdict.seeds} and {verdict.baseline_seeds} seeds"
    context = f"{sample}, {seeds}; run effect {points(verdict.run_sd)}{tail}"
    digits = decimals(verdict.difference, verdict.ci_low, verdict.ci_high)
    span = interval(verdict.ci_low, verdict.ci_high, digits)
    if verdict.verdict in ("better", "worse"):
        return (
            f"{row.design} scores {above_or_below(verdict.difference, digits)} {row.baseline} "
            f"({comparison.percent} % interval {span}; {context})."
        )
    if verdict.verdict == "equivalent":
        low, high = verdict.equivalence_low, verdict.equivalence_high
        ends = (low, high, comparison.margin - max(-low, high))  # an end inside the margin must not read as on it
        inner = interval(low, high, decimals(*ends))
        margin = points(comparison.margin, 1)
        pair = f"{row.design} and {row.baseline}"
        level = inner_percent(comparison)
        return f"{pair} are equivalent within ±{margin} points ({level} % interval {inner}; {context})."
    pair = f"{row.design} against {row.baseline}"
    claim = f"{pair} is inconclusive: differences from {span} points are compatible ({context})."
    if verdict.ci_low > 0 or verdict.ci_high < 0:
        claim += (
            f" The interval leaves out 0, but not after Holm over {comparison.family} contrasts "
            f"(p {probability(verdict.p_holm)})."
        )
    margin = points(comparison.margin, 1)
    units = "items" if comparison.of_items(row.group) else "tasks"
    needed = f"more {units}, as no number of seeds up to 50 would do"
    if verdict.settle_low is not None:
        fewest, most = verdict.settle_low, verdict.settle_high
        needed = f"{fewest} to {most} seeds" if most else f"{fewest} seeds or more"
        needed = count(fewest, "seed") if fewest == most else needed
    return f"{claim} {_power(verdict.detectable)}; one of {margin} points would need {needed}."


def _power(detectable: float) -> str:
    if detectable >= 1:
        return "No true difference would be found with 80 % power"
    return f"A true difference of {points(detectable, 1)} points would be found with 80 % power"


def detectable_words(value: float) -> str:
    """A detectable difference in points; none is larger than 100."""
    return ">100" if value >= 1 else points(value)


def _checkpoint_claim(comparison: Comparison, row: Row, tail: str) -> str:
    runs = [comparison.seeds[name] for name in (row.design, row.baseline)]
    seeds = count(runs[0], "seed") if runs[0] == runs[1] else f"{runs[0]} and {runs[1]} seeds"
    digits = decimals(row.difference, row.ci_low, row.ci_high)
    span = interval(row.ci_low, row.ci_high, digits)
    context = (
        f"{count(row.n, 'task')}, {seeds}; wins/ties/losses {row.wins}/{row.ties}/{row.losses}; "
        f"Holm p {probability(row.p_holm)}, rank-biserial {number(row.effect_size)}{tail}"
    )
    why = (
        "These are checkpoints, not designs: " + ("one run each" if max(runs) == 1 else "too few runs or sources") + "."
    )
    if row.p_holm is not None and row.p_holm <= comparison.alpha:
        claim = f"the checkpoint of {row.design} scores {above_or_below(row.difference, digits)} that of {row.baseline}"
        tipping = ""
        if row.tipping_run_sd is not None:
            tipping = (
                f" It would stand up to a run effect of {points(row.tipping_run_sd)} points."
                if row.tipping_run_sd
                else " By the mean over tasks it would not stand even without a run effect."
            )
        return f"{claim} (Hodges–Lehmann, {comparison.percent} % interval {span}; {context}). {why}{tipping}"
    compatible = f"{count(row.n, 'task')} rule out no size of difference"
    if span != "unbounded":
        compatible = f"differences from {span} points are compatible"
    pair = f"the checkpoint of {row.design} against that of {row.baseline}"
    return f"{pair} is inconclusive: {compatible} ({context}). {why}"


def _given_claim(comparison: Comparison, row: Row, found: Given) -> str:
    """What single runs say of the designs, if the run effect is what the user was told elsewhere."""
    digits = decimals(found.difference, found.ci_low, found.ci_high)
    span = interval(found.ci_low, found.ci_high, digits)
    df = "known exactly" if found.run_df == float("inf") else f"{found.run_df:g} df"
    start = f"Given a run effect of {points(found.run_sd)} points from elsewhere ({df})"
    sample = f"{count(found.sources, 'source')}, 1 seed each; Holm p {probability(found.p_holm)}"
    if found.verdict == "inconclusive":
        return f"{start}, the designs are inconclusive: differences from {span} points are compatible ({sample})."
    return (
        f"{start}, the design {row.design} scores {above_or_below(found.difference, digits)} {row.baseline} "
        f"({comparison.percent} % interval {span}; {sample}); the runs here do not show that effect themselves."
    )


def inner_percent(comparison: Comparison) -> int:
    """Level of the interval of the two one-sided tests, in percent: 90, or 94 at each of two looks."""
    return round(100 * (1 - 2 * comparison.alpha))


def above_or_below(difference: float, digits: int) -> str:
    size = points(abs(difference), digits)
    if not size.strip(".0"):
        return "level with"
    return f"{size} points {'above' if difference > 0 else 'below'}"


def decimals(*values: float | None) -> int:
    """One decimal of a point, more where a number that is not zero would read as zero."""
    known = [abs(100 * value) for value in values if value]
    return next((digits for digits in (1, 2) if all(round(value, digits) > 0 for value in known)), 3)


def _cost(row: Row, costs: Sequence[Mapping[str, Any]]) -> str:
    by_design = {cost.get("design"): cost for cost in costs}
    mine, base = by_design.get(row.design), by_design.get(row.baseline)
    for key in ENCODE_COSTS:
        if mine and base and mine.get(key) and base.get(key):
            change = mine[key] / base[key] - 1
            unit = ", in FLOPs" if key.endswith("flops") else ""
            if abs(change) < 0.005:
                return f" It costs the same to encode{unit}."
            return f" It costs {abs(100 * change):.0f} % {'more' if change > 0 else 'less'} to encode{unit}."
    return ""
