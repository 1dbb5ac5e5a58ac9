"""Reports: a comparison and what is known of its study as terminal tables, Markdown, LaTeX and one HTML file.

Every part is optional, so that a bare CSV of scores gives a report as well. Nothing is computed here: numbers come from
`comparison`, words from `wording`, tables from `tables`, pictures from `plots`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.files import write_atomic
from poolwise.reports import analyses, secondary, tables
from poolwise.reports import layers as layers_report
from poolwise.reports.summary import designs, recommended, summary
from poolwise.reports.words import advice, count, group_words, headline, listing, outcome, points, sentences
from poolwise.screen import print_table, terminal
from poolwise.stats.many import TWO_LOOK_ALPHA
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.controls import unsound

if TYPE_CHECKING:
    import polars as pl
    from jinja2 import Environment
    from rich.console import Console


CLAIM = "Every claim stops at tasks like these, runs like these, this base model and this recipe."


def render(
    study_info: Mapping[str, Any],
    frame: pl.DataFrame,
    comparison: Comparison,
    costs: Sequence[Mapping[str, Any]] | None,
    controls: Mapping[str, str] | None,
    out_dir: str | Path,
) -> list[Path]:
    """Write `report.md`, `report.html` and `report.tex` into `out_dir`, each whole or not at all; returns their paths.

    Args:
        study_info: any of name, base_model, base_parameters, recipe (nested dict), recipe_name, designs, fingerprint,
            versions, machine, command, notes; an empty dict will do.
        frame: the long table that was compared.
        costs: rows of a cost table, one for each design (`tables.COST_COLUMNS`).
        controls: role of each control design (`aa`, `broken`, …, or words); by default the table's column `role`.
    """
    facts = _facts(dict(study_info), frame, comparison, costs, controls)
    folder = Path(out_dir)
    pages = {"report.md": "report.md.j2", "report.html": "report.html.j2", "report.tex": "report.tex.j2"}
    return [write_atomic(folder / name, _templates().get_template(page).render(facts)) for name, page in pages.items()]


def show(
    comparison: Comparison, costs: Sequence[Mapping[str, Any]] | None = None, console: Console | None = None
) -> None:
    """Print the comparison as tables: means, contrasts of designs, contrasts of checkpoints, cost."""
    from rich.text import Text

    console = console or terminal()
    comparison, priced = _priced(comparison, costs)

    for warning in (*warnings(comparison), *analyses.alarms(comparison, dict(comparison.roles))):
        console.print(Text(warning, style="bold yellow"))
    if comparison.plan:
        console.print(Text(comparison.plan))
    if answer := summary(comparison):
        console.print(Text(answer, style="bold"))
    for overall in comparison.overall:
        console.print(Text(secondary.overall_sentence(comparison, overall)))
    for group in comparison.groups:
        console.print(Text.assemble((f"{group}: ", "bold"), headline(comparison, group)))
    for found in recommended(comparison):
        console.print(Text.assemble((f"{found.group}: ", "bold"), advice(comparison, found)))
    for table in _tables(comparison, priced):
        print_table(console, table)
    analysed = (analyses.tuning_sentences, analyses.base_sentences, analyses.control_sentences)
    for said in (text for speak in analysed for text in speak(comparison)):
        console.print(said, highlight=False, markup=False)
    for note in (*comparison.notes, *_budget_notes(comparison), *comparison.excluded):
        console.print(Text(note, style="yellow"))


def _tables(comparison: Comparison, costs: Sequence[Mapping[str, Any]]) -> list[tables.Table]:
    factors = comparison.factorial
    found = (
        tables.means(comparison),
        secondary.overall(comparison),
        tables.verdicts(comparison),
        secondary.given(comparison),
        tables.checkpoints(comparison),
        tables.costs(costs) if costs else None,
        secondary.equal_cost(comparison.budgets, comparison),
        analyses.factor_table(factors, comparison.alpha) if factors else None,
        analyses.base_table(comparison),
        analyses.tuning_table(comparison),
        analyses.settings(comparison),
    )
    return [table for table in found if table]


def _budget_notes(comparison: Comparison) -> tuple[str, ...]:
    return comparison.budgets.notes if comparison.budgets else ()


def _priced(
    comparison: Comparison, costs: Sequence[Mapping[str, Any]] | None
) -> tuple[Comparison, list[dict[str, Any]]]:
    """Complete cost rows, and the comparison with what they say of encoding."""
    priced = tables.priced(costs or [], comparison.baseline)
    known = tuple((row["design"], float(row["encode_flops"])) for row in priced if row.get("encode_flops"))
    return (replace(comparison, costs=known) if known else comparison), priced


def opening(info: Mapping[str, Any], comparison: Comparison) -> str:
    """The first line of every report: base model and its size, designs, seeds, tasks."""
    base = info.get("base_model")
    if base and str(base).startswith((".", "/", "~")):  # a folder: where it lies says nothing
        base = Path(base).name
    size = info.get("base_parameters")
    named = f"Base model {base}" if base else "Base model not stated"
    if size:
        named += f", {tables.magnitude(size)} parameters"
    runs = sorted(set(comparison.seeds.values()))
    seeds = count(runs[0], "seed") if len(runs) == 1 else f"{runs[0]} to {runs[-1]} seeds"
    tasks = f"{count(len(comparison.tasks), 'task')} ({count(len(comparison.groups), 'group')})"
    if comparison.by == "task_type":
        tasks = _types(comparison)
    designs = count(len(comparison.designs), "design")
    return f"{named}; {designs}, {seeds}, {tasks}; baseline {comparison.baseline}."


def _types(comparison: Comparison) -> str:
    types = [group for group in comparison.groups if not comparison.of_items(group)]
    sizes = [f"{len(comparison.arm(g, comparison.baseline).tasks)} {group_words(g)}" for g in types]
    if not types:
        return f"{count(len(comparison.tasks), 'task')} on {count(len(comparison.groups), 'mechanism')}"
    if planted := len(comparison.groups) - len(types):
        sizes.append(
            f"{len(comparison.tasks) - sum(int(size.split()[0]) for size in sizes)} on {count(planted, 'mechanism')}"
        )
    return f"{count(len(comparison.tasks), 'task')} ({listing(sizes)})"


def warnings(comparison: Comparison) -> list[str]:
    """What stands above everything; an A/A arm that makes all exploratory has its own words (`alarms`)."""
    exploratory = "" if comparison.exploratory == unsound(comparison) else comparison.exploratory
    return [text for text in (comparison.interim, exploratory, comparison.banner) if text]


def paragraph(info: Mapping[str, Any], comparison: Comparison) -> str:
    """The methods paragraph of a paper: which estimator, which family, which scope."""
    family = f"Holm's correction over the {comparison.family} contrasts with {comparison.baseline}"
    wilcoxon = (
        "exact two-sided Wilcoxon signed-rank tests over tasks on seed-averaged scores, with the Hodges–Lehmann "
        f"estimate, its exact {comparison.percent} % interval and the matched-pairs rank-biserial correlation"
    )
    start = opening(info, comparison)
    if comparison.interim:
        return f"{start} {comparison.interim}"
    if comparison.scope == "checkpoints":
        return (
            f"{start} Differences were tested between checkpoints by {wilcoxon}, and {family}. As each design was "
            "trained once, the tests do not separate designs from the luck of a run."
        )
    looked = "The study was looked at twice, each time at .03. " if comparison.alpha == TWO_LOOK_ALPHA else ""
    if comparison.exploratory:
        looked += "The verdicts are exploratory. "
    planted = [comparison.of_items(group) for group in comparison.groups]
    units = "items of each mechanism" if all(planted) else "tasks"
    averaged = "" if all(planted) else ", tasks of one source averaged first"
    if any(planted) and not all(planted):
        units += ", on built-in mechanisms random items"
    checkpoints = "" if all(planted) else f" Checkpoints were compared by {wilcoxon}."
    return (
        f"{start} Differences between designs were estimated over random runs and random {units} (crossed random "
        f"effects, null distribution by parametric bootstrap at the truncated variance estimates{averaged}), with "
        f"{family}; equivalence was tested by two one-sided tests within ±{points(comparison.margin, 1)} points."
        f"{checkpoints} {looked}{CLAIM}"
    )


def _facts(
    info: dict[str, Any],
    frame: pl.DataFrame,
    comparison: Comparison,
    costs: Sequence[Mapping[str, Any]] | None,
    controls: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Everything the templates show."""
    from poolwise.reports import plots

    comparison, priced = _priced(comparison, costs)
    if "base_parameters" not in info and priced:
        info["base_parameters"] = priced[0].get("base_parameters")
    fronts, factors = secondary.fronts(comparison, priced), comparison.factorial
    said = sentences(comparison, info.get("base_model"), info.get("recipe_name"), priced)
    answers = []
    choices = {choice.group: advice(comparison, choice) for choice in recommended(comparison)}
    predictions = info.get("predictions")
    choices |= analyses.predicted(comparison, predictions)
    for group in comparison.groups:
        members = [(row, text) for row, text in zip(comparison.rows, said, strict=True) if row.group == group]
        found = [pair for pair in members if outcome(comparison, pair[0]) == "better"]
        best = max(found, key=lambda pair: (pair[0].verdict or pair[0]).difference, default=None)
        answers.append(
            {
                "group": group,
                "headline": headline(comparison, group),
                "advice": choices.get(group, ""),
                "best": best[1] if best else secondary.reason(comparison, group),
                "sentences": [text for _, text in members],
            }
        )
    layers = info.get("layers") or {}
    roles = tables.roles(frame, controls)
    versions = [(name, str(version)) for name, version in (info.get("versions") or {}).items()]
    for label, key in (("machine", "machine"), ("study fingerprint", "fingerprint")):
        if info.get(key):
            versions.append((label, str(info[key])))
    return {
        "title": info.get("name") or "Scores",
        "opening": opening(info, comparison),
        "comparison": comparison,
        "answers": answers,
        "summary": summary(comparison, predictions),
        "designs": designs(comparison),
        "warnings": warnings(comparison),
        "many": tables.MANY_GROUPS,
        "plants": {group: said.get("plants", "") for group, said in (predictions or {}).get("mechanisms", {}).items()},
        "claim": CLAIM,
        "overall_words": [secondary.overall_sentence(comparison, found) for found in comparison.overall],
        "overall_answer": secondary.overall_answer(comparison),
        "overall": secondary.overall(comparison),
        "given": secondary.given(comparison),
        "budget_table": secondary.equal_cost(comparison.budgets, comparison),
        "budget_notes": _budget_notes(comparison),
        "layer_table": layers_report.table(layers.get("runs", {}), layers.get("texts", 0)),
        "layer_panels": layers_report.panel(layers.get("runs", {})),
        "layer_most": layers_report.most(layers.get("runs", {})),
        "means": tables.means(comparison),
        "verdicts": tables.verdicts(comparison),
        "checkpoints": tables.checkpoints(comparison),
        "task_scores": tables.task_scores(comparison),
        "run_scores": tables.run_scores(comparison),
        "over_steps": tables.over_steps(frame, comparison),
        "costs": tables.costs(priced) if priced else None,
        "controls": tables.controls(comparison, roles),
        "control_words": analyses.control_sentences(comparison),
        "ladder": analyses.ladder_table(comparison),
        "predictions": analyses.predictions_table(comparison, predictions),
        "alarms": analyses.alarms(comparison, roles),
        "tasks": tables.tasks(frame, comparison),
        "recipe": tables.recipe(info),
        "versions": tables.Table("Versions", ("What", "Which"), (("", tuple(versions)),), text=2) if versions else None,
        "command": info.get("command"),
        "notes": [*(info.get("notes") or []), *comparison.notes, *comparison.excluded],
        "paragraph": paragraph(info, comparison),
        "forest": plots.forest(comparison),
        "dots": plots.task_dots(comparison),
        "strip": plots.run_strip(comparison),
        "pareto": secondary.panels(fronts, comparison.baseline),
        "pareto_table": secondary.table(fronts, comparison.baseline),
        "tuning_words": analyses.tuning_sentences(comparison),
        "tuning_tables": [t for t in (analyses.tuning_table(comparison), analyses.settings(comparison)) if t],
        "base_words": analyses.base_sentences(comparison),
        "base_table": analyses.base_table(comparison),
        "factors": analyses.factor_sentences(factors) if factors else [],
        "unresolved": [*factors.confounded, *factors.notes] if factors else [],
        "factor_table": analyses.factor_table(factors, comparison.alpha) if factors else None,
        "factor_forest": analyses.factor_forest(comparison, factors) if factors else [],
    }


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def dress(cell: str) -> Markup:
        """A cell of an HTML table: the ± part and the mark of a mean get elements of their own."""
        text = str(escape(cell))
        text = re.sub(r"±(\S+)$", r'<span class="pm">±\1</span>', text)
        names = {"▲": "above the baseline", "▼": "below the baseline", "≈": "equivalent to the baseline"}
        return Markup(
            re.sub(r"^([▲▼≈]) ", lambda m: f'<span class="m" title="{names[m[1]]}">{m[1]}</span> ', text)
        )  # escaped above

    def glue(text: str) -> str:
        """No line break inside ±.5, 95 % or 3 seeds, nor before a number that starts with its point."""
        kept = re.sub(r" (?=[.−]|%)|(?<=\d) (?=(?:task|seed|source|point)s?\b)", "\u00a0", text)
        return kept.replace("±", "±\u2060")

    def markdown(text: object) -> str:
        """Text as text in Markdown: no tags, no table cells, no emphasis."""
        return re.sub(r"([\\`*_\[\]|])", r"\\\1", str(text).replace("&", "&amp;").replace("<", "&lt;"))

    def latex(text: object) -> str:
        """Text as text in LaTeX."""
        special = dict.fromkeys("&%$#_{}", r"\%s")
        special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
        special |= {"−": "$-$", "±": r"$\pm$", "∞": r"$\infty$", "×": r"$\times$", "≈": r"$\approx$", "<": "$<$"}
        special |= {">": "$>$", "▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$"}
        return "".join(special.get(letter, letter).replace("%s", letter) for letter in str(text))

    environment = Environment(
        loader=PackageLoader("poolwise.reports"),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(dress=dress, glue=glue, md=markdown, tex=latex)
    return environment
