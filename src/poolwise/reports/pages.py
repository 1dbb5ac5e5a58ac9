"""Reports: the findings and what is known of their study as Markdown, LaTeX and one HTML file.

Every part is optional, so that a bare CSV of scores gives a report as well. Nothing is computed here: numbers come from
`verdicts.findings`, words from `words`, tables from `tables`, `analyses` and `secondary`, pictures from
`plots`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.files import write_atomic
from poolwise.reports import analyses, plots, secondary, tables
from poolwise.reports import layers as layer_report
from poolwise.reports.words import (
    FEW_DESIGNS,
    answer,
    contender,
    count,
    group_words,
    interval,
    listing,
    magnitude,
    number,
    outcome,
    points,
    sentences,
    summary,
)
from poolwise.verdicts.arms import FEW_SOURCES
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.contrasts import Row
from poolwise.verdicts.costs import encode_flops
from poolwise.verdicts.findings import Findings

if TYPE_CHECKING:
    import polars as pl
    from jinja2 import Environment


CLAIM = "Every claim is limited to tasks like these, runs like these, this base model and this recipe."


def render(info: Mapping[str, Any], frame: pl.DataFrame, findings: Findings, out_dir: str | Path) -> list[Path]:
    """Write `report.md`, `report.html` and `report.tex` into `out_dir`, each atomically; returns their paths.

    Args:
        info: any of name, base_model, recipe (nested dict), fingerprint, versions, command, predictions, layers, losses
            (design -> seed -> loss by step); an empty dict is enough.
        frame: the long table that was compared, with its earlier steps.
    """
    facts = _facts(info, frame, findings)
    pages = {name: page(f"{name}.j2", facts) for name in ("report.md", "report.html", "report.tex")}
    pages["report.html"] = _with_contents(pages["report.html"])
    return [write_atomic(Path(out_dir) / name, text) for name, text in pages.items()]


def _with_contents(html: str) -> str:
    """The page with links to its sections in its empty <nav>; they are known only once it is made."""
    found = re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', html)
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title in found)
    return html.replace('<nav aria-label="Contents"></nav>', f'<nav aria-label="Contents">{links}</nav>', 1)


def at_a_glance(findings: Findings) -> tables.Table:
    """A row for each group: the winner, the best design that is compared, what it costs, what its contrast lacks if it
    is open, and the designs shown to be worse."""
    costs = encode_flops(findings.costs)
    own, base = costs.get(findings.baseline), findings.baseline
    worse = {
        group: [r.design for r in findings.rows if r.group == group and r.verdict and outcome(findings, r) == "worse"]
        for group in findings.groups
    }

    def cells(group: str) -> tables.Cells:
        row = contender(findings, group)
        shown, word = row.verdict or row, outcome(findings, row)
        price = f"× {number(costs[row.design] / own)}" if own and row.design in costs else "–"
        words = {"better": row.design, "equivalent": "equal", "withheld": "withheld"} if row.verdict else {}
        winner = words.get(word, "no winner")  # single runs have none, whatever their checkpoints show
        best = f"{row.design} {points(shown.difference, 2, True)}"
        found = (group, winner, best, interval(shown.ci_low, shown.ci_high), price, _needed(findings, row))
        return (*found, ", ".join(worse[group]) or "–") if any(worse.values()) else found

    columns = (
        "Tasks",
        "Winner",
        f"Best against {base}",
        "Interval" if findings.interim else f"{findings.percent} % interval",
        "Encoding",
        "Needed to decide",
        *([f"Worse than {base}"] if any(worse.values()) else ()),
    )
    rows = tuple(cells(group) for group in findings.groups)
    note = (
        f"Points. Winner: better than {base} after Holm over {count(findings.family, 'contrast')}; the interval is "
        f"that of the one contrast. Encoding: FLOPs over {base}’s. Needed to decide: the seeds of each design, in all, "
        "that would find a difference as large as the one found (80 % power), or where the interval includes 0 one of "
        f"{points(findings.margin, 1)} points. The effect of a run is uncertain, so it is a range: take its end."
    )
    if any(row.verdict is None for row in findings.rows):
        note += " Where designs cannot be tested, difference and interval are those of the checkpoints."
    return tables.Table("At a glance", columns, (("", rows),), note, 2)


def _needed(findings: Findings, row: Row) -> str:
    """What a contrast without a verdict lacks: finished runs, sources, seeds, or more tasks or items."""
    verdict, word = row.verdict, outcome(findings, row)
    if findings.interim:
        return "the missing runs"
    if word in ("better", "worse", "equivalent") and verdict:
        return "decided"
    runs = [len(findings.arm(row.group, name).seeds) for name in (row.design, row.baseline)]
    if min(runs) < 2:
        return "two seeds or more"
    arm = findings.arm(row.group, row.baseline)
    if arm.by_source.shape[1] < FEW_SOURCES:
        return f"tasks from {FEW_SOURCES} sources"
    if verdict is None or verdict.settle_low is None:
        by_runs = verdict and verdict.by_runs
        return "over 50 seeds" if by_runs else "more items" if arm.unit != "task" else "more tasks"
    fewest, most = verdict.settle_low, verdict.settle_high
    if most is None:
        return f"{fewest} seeds or more" if fewest > max(runs) else f"more than {max(runs)} seeds"
    if fewest == most:
        return count(most, "seed")
    return f"{fewest} to {most} seeds" if fewest > max(runs) else f"up to {most} seeds"


def with_references(means: tables.Table, findings: Findings) -> tables.Table:
    """The table of means with what needs no training: TF-IDF, BM25 and the untuned designs, where they have scores on
    all tasks of a group."""
    names = [name for name, role in findings.roles if role in ("reference", "untuned")]
    arms = {name: [findings.whole_arm(group, name) for group in findings.groups] for name in names}
    cells = {name: tuple(points(arm.mean) if arm else "–" for arm in found) for name, found in arms.items()}
    cells = {name: found for name, found in cells.items() if set(found) != {"–"}}
    (_, rows), *_ = means.sections
    if means.columns[0] == "Design":
        columns, rows = means.columns, (*rows, *((name, *found) for name, found in cells.items()))
    else:
        columns = (*means.columns, *cells)
        rows = tuple((*row, *(found[place] for found in cells.values())) for place, row in enumerate(rows))
    return replace(means, columns=columns, sections=(("", rows),))


def layers_page(view: Mapping[str, Any]) -> str:
    """The page of `poolwise layers`: its pictures, then its tables.

    view: the dictionary of `poolwise layers --json`.
    """
    facts = {
        "title": f"{view['study']}: layers",
        "pictures": layer_report.panels(view),
        "sentences": layer_report.sentences(view),
        "tables": layer_report.tables(view),
        "untuned": any("correlation" in run for run in view["runs"]),
        "attends": any(run["attention"] for run in view["runs"]),
        "several": len(view["runs"]) > len({(run["design"], run["base"]) for run in view["runs"]}),
    }
    return page("layers.html.j2", facts)


def page(template: str, facts: Mapping[str, Any]) -> str:
    """A page of the given template (its name in `templates/`)."""
    return _templates().get_template(template).render(facts)


def opening(info: Mapping[str, Any], findings: Findings) -> str:
    """The first line of every report: base model and its size, designs, seeds, tasks."""
    base = _base(info)
    named = f"Base model {base}" if base else "Base model not stated"
    size = findings.costs[0].get("base_parameters") if findings.costs and not findings.by_base else None
    if size:
        named += f", {magnitude(size)} parameters"
    runs = sorted(set(findings.seeds.values()))
    seeds = count(runs[0], "seed") if len(runs) == 1 else f"{runs[0]} to {runs[-1]} seeds"
    designs = count(len(findings.designs), "design")
    return f"{named}; {designs}, {seeds}, {_task_words(findings)}; baseline {findings.baseline}."


def designs(findings: Findings) -> str:
    """The definition of each design, `m1: causal, last_token; …`; empty if unknown, or if their names say as much."""
    parts = []
    for design in findings.treatments:
        if design.name not in findings.designs:
            continue
        args = ", ".join(f"{name} {value}" for name, value in design.pooling_args.items())
        parts.append(f"{design.name}: {design.attention}, {design.pooling}{f' ({args})' if args else ''}")
    named = all(design.name == f"{design.pooling}-{design.attention}" for design in findings.treatments)
    return "" if named or len(parts) > FEW_DESIGNS else "; ".join(parts) + "."


def _base(info: Mapping[str, Any]) -> str | None:
    """The name of the base model, or of several; of a local folder only the last part, as its path means nothing to a
    reader."""
    names = str(info.get("base_model") or "").split(", ")
    return ", ".join(Path(name).name if name.startswith((".", "/", "~")) else name for name in names) or None


def _task_words(comparison: Comparison) -> str:
    """`17 tasks (10 retrieval and 7 STS)`, `9 tasks on 3 mechanisms`."""
    total = count(len(comparison.tasks), "task")
    types = [group for group in comparison.groups if not comparison.of_items(group)]
    if comparison.by != "task_type":
        return f"{total} ({count(len(comparison.groups), 'group')})"
    planted = [group for group in comparison.groups if comparison.of_mechanism(group)]
    own = [group for group in comparison.groups if comparison.of_own_task(group)]
    if len(own) == len(comparison.groups):
        return f"{total}, each tested over its items"
    if not types and not own:
        return f"{total} on {count(len(planted), 'mechanism')}"

    def tasks(groups: Sequence[str]) -> int:
        return sum(len(comparison.arm(group, comparison.baseline).whole().tasks) for group in groups)

    parts = [f"{tasks([group])} {group_words(group)}" for group in types]
    parts += [f"{tasks(planted)} on {count(len(planted), 'mechanism')}"] if planted else []
    parts += [count(len(own), "single task")] if own else []
    return f"{total} ({listing(parts)})"


def warnings(findings: Findings) -> list[str]:
    """The warnings at the top; that of an A/A arm that differs is one of `analyses.alarms`."""
    exploratory = "" if findings.exploratory == findings.unsound else findings.exploratory
    return [text for text in (findings.interim, exploratory, findings.banner) if text]


def paragraph(info: Mapping[str, Any], findings: Findings) -> str:
    """The methods paragraph of a paper: which estimator, which family, which scope."""
    family = f"Holm's correction over the {count(findings.family, 'contrast')} with {findings.baseline}"
    wilcoxon = (
        "exact two-sided Wilcoxon signed-rank tests over sources of tasks on seed-averaged scores, with the "
        f"Hodges–Lehmann estimate, its exact {findings.percent} % interval and the matched-pairs rank-biserial "
        "correlation"
    )
    start = opening(info, findings)
    if findings.interim:
        return f"{start} {findings.interim}"
    if findings.scope == "checkpoints":
        tests = f"Differences were tested between checkpoints by {wilcoxon}, and {family}."
        return f"{start} {tests} {_why_checkpoints(findings)}"
    looks = f"The study declares two looks, each tested at {number(findings.alpha)}. " if findings.plan else ""
    if findings.exploratory:
        looks += "The verdicts are exploratory. "
    planted = [findings.of_items(group) for group in findings.groups]
    kinds = [
        kind
        for kind, some in (
            ("mechanism", any(map(findings.of_mechanism, findings.groups))),
            ("single task", any(map(findings.of_own_task, findings.groups))),
        )
        if some
    ]
    units = f"items of each {' and '.join(kinds)}" if all(planted) else "tasks"
    averaged = "" if all(planted) else ", tasks of one source averaged first"
    if kinds and not all(planted):
        units += f" (items of each {' and '.join(kinds)})"
    checkpoints = "" if all(planted) else f" Checkpoints were compared by {wilcoxon}."
    return (
        f"{start} Differences between designs were estimated over random runs and random {units} (crossed random "
        f"effects, null distribution by parametric bootstrap at the truncated variance estimates{averaged}), with "
        f"{family}; equivalence was tested by two one-sided tests within ±{points(findings.margin, 1)} points."
        f"{checkpoints} {looks}{CLAIM}"
    )


def _why_checkpoints(comparison: Comparison) -> str:
    """Why there is no verdict on designs: single runs, or tasks from a single source."""
    once = [design for design, runs in comparison.seeds.items() if runs < 2]
    if once:
        who = "each design" if len(once) == len(comparison.seeds) else listing(once)
        return f"As {who} was trained once, the tests do not separate designs from the variation between runs."
    return (
        "Each design was trained more than once, but in no group do the tasks come from two sources or more, which a "
        "test of designs needs: the tests are about these checkpoints."
    )


def _facts(info: Mapping[str, Any], frame: pl.DataFrame, findings: Findings) -> dict[str, Any]:
    """Everything that the templates show."""
    predictions, layers = info.get("predictions"), info.get("layers") or {}
    shares = layers.get("runs", {})
    factors = findings.factorial
    recommendations = {choice.group: secondary.advice(findings, choice) for choice in secondary.recommended(findings)}
    predicted = analyses.prediction_sentences(findings, predictions)
    answers = [
        {
            "group": group,
            "evidence": answer(findings, contender(findings, group)),
            "advice": [text[group] for text in (recommendations, predicted) if group in text],
        }
        for group in findings.groups
    ]
    versions = [(name, str(version)) for name, version in (info.get("versions") or {}).items()]
    if info.get("fingerprint"):
        versions.append(("study fingerprint", str(info["fingerprint"])))
    mechanisms = (predictions or {}).get("mechanisms", {})
    forest = plots.forest(findings)
    bounded = {row.group for row in findings.rows if (row.verdict or row).ci_low is not None}
    return {
        "title": info.get("name") or "Scores",
        "opening": opening(info, findings),
        "findings": findings,
        "answers": answers,
        "summary": summary(findings, predictions),
        "designs": designs(findings),
        "warnings": warnings(findings),
        "alarms": analyses.alarms(findings),
        "many": tables.MANY_GROUPS,
        "plants": {group: planted.get("plants", "") for group, planted in mechanisms.items()},
        "claim": CLAIM,
        "sentences": sentences(findings, _base(info)),
        "overall_sentences": [secondary.overall_sentence(findings, contrast) for contrast in findings.overall],
        "overall": secondary.overall(findings),
        "given": secondary.given(findings),
        "own": tables.own_tasks(findings),
        "glance": at_a_glance(findings),
        "paper_terms": secondary.paper_terms(findings),
        "curves": plots.loss_curves(info.get("losses") or {}),
        "means": tables.means(findings),
        "references": with_references(tables.means(findings), findings),
        "verdicts": tables.verdicts(findings),
        "checkpoints": tables.checkpoints(findings),
        "forest": [panel for panel in forest if panel.group in bounded or not bounded],
        "unbounded": [panel for panel in forest if bounded and panel.group not in bounded],
        "dots": plots.task_dots(findings),
        "strip": plots.run_strip(findings),
        "task_scores": tables.task_scores(findings),
        "run_scores": tables.run_scores(findings),
        "over_steps": tables.over_steps(frame, findings),
        "costs": tables.costs(findings.costs),
        "front_panels": secondary.front_panels(findings.fronts, findings.baseline),
        "front_table": secondary.front_table(findings.fronts, findings.baseline),
        "budget_table": secondary.equal_cost(findings),
        "budget_notes": list(findings.budgets.notes) if findings.budgets else [],
        "layer_table": layer_report.attention_table(shares, layers.get("texts", 0)),
        "layer_panels": layer_report.attention_panel(shares),
        "largest_share": layer_report.largest_share(shares),
        "controls": tables.controls(findings),
        "control_sentences": analyses.control_sentences(findings),
        "ladder": analyses.ladder_table(findings),
        "predictions": analyses.predictions_table(findings, predictions),
        "tuning_sentences": analyses.tuning_sentences(findings),
        "tuning_tables": [t for t in (analyses.tuning_table(findings), analyses.settings_table(findings)) if t],
        "base_sentences": analyses.base_sentences(findings),
        "base_table": analyses.base_table(findings),
        "factor_sentences": analyses.factor_sentences(factors) if factors else [],
        "unresolved": [*factors.confounded, *factors.notes] if factors else [],
        "factor_table": analyses.factor_table(factors, findings.alpha) if factors else None,
        "factor_forest": analyses.factor_forest(factors) if factors else [],
        "tasks": tables.tasks(frame, findings),
        "recipe": tables.recipe(info.get("recipe") or {}),
        "versions": tables.Table("Versions", ("Package", "Version"), (("", tuple(versions)),), text=2)
        if versions
        else None,
        "command": info.get("command"),
        "notes": [*findings.notes, *findings.excluded],
        "paragraph": paragraph(info, findings),
    }


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def dress(cell: str) -> Markup:
        """A cell of an HTML table: the ± part and the mark of a mean get their own elements."""
        text = str(escape(cell))
        text = re.sub(r"±(\S+)$", r'<span class="pm">±\1</span>', text)
        names = {
            "▲": "above the baseline",
            "▼": "below the baseline",
            "≈": "equivalent to the baseline",
            "△": "withheld",
        }
        return Markup(
            re.sub(r"^([▲▼≈△]) ", lambda m: f'<span class="m" title="{names[m[1]]}">{m[1]}</span> ', text)
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
        special |= {">": "$>$", "▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$", "△": r"$\triangle$"}
        return "".join(special.get(letter, letter).replace("%s", letter) for letter in str(text))

    environment = Environment(
        loader=PackageLoader("poolwise.reports"),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def slug(text: str) -> str:
        """A heading as the name of its anchor."""
        return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

    environment.filters.update(dress=dress, glue=glue, md=markdown, tex=latex, slug=slug)
    return environment
