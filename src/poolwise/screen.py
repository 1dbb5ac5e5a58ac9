"""What the command line prints: tables, the live grid of a run, results.

Every table is a `reports.tables.Table`, printed in aligned columns that are never cut and never wrapped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from poolwise.errors import printable, redact
from poolwise.files import write_atomic
from poolwise.reports import ab as ab_report
from poolwise.reports import analyses, pages, secondary, tables
from poolwise.reports import layers as layer_report
from poolwise.reports.tables import Cells, Table
from poolwise.reports.words import count, magnitude, summary
from poolwise.runs import layout
from poolwise.runs.engine import Event
from poolwise.runs.run import run, shared_work
from poolwise.study.study import Study
from poolwise.verdicts.findings import Findings
from poolwise.verdicts.items import Paired
from poolwise.verdicts.leaderboard import Pairs
from poolwise.verdicts.table import Note

PIPE_WIDTH = 140
WIDEST_STATE = 11  # letters of the widest cell of the grid, so that the live table does not change its width
SHARES = {"train": (0.0, 0.6), "score": (0.6, 1.0)}
"""Stage of a trial -> where it begins and ends in the trial's share."""
STYLES = {"done": "green", "failed": "red", "·": "dim"}
"""Cell of the grid -> its style."""


def terminal(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; a file or a pipe gets `PIPE_WIDTH` columns at least."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def lines(table: Table) -> list[Text]:
    """The lines of a table, without its note: words flush left, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    words = [table.is_words(index) for index in range(len(table.columns))]

    def line(row: Cells, style: str = "") -> Text:
        text = Text(style=style)
        for index, (cell, width, word) in enumerate(zip(row, widths, words, strict=True)):
            padded = cell.ljust(width) if word else cell.rjust(width)
            text.append(padded if index == 0 else f"  {padded}", STYLES.get(cell.strip(), ""))
        text.rstrip()
        return text

    made = [Text(table.title, "bold")] if table.title else []
    made.append(line(table.columns, "dim"))
    for heading, rows in table.sections:
        made += [Text(heading, "italic")] if heading else []
        made += [line(row) for row in rows]
    return made


def print_table(console: Console, table: Table) -> None:
    """Print a table and its note; a titled table comes after a blank line."""
    if table.title:
        console.print()
    for line in lines(table):
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
    if table.note:
        console.print(Text(table.note, "dim"))


class Grid:
    """The trials of a study as a table: a row for each design, a cell for each run, with the time that is left."""

    def __init__(self) -> None:
        self.trials: list[dict[str, Any]] = []
        self.share: dict[str, float] = {}
        self.states: dict[str, str] = {}
        self.notes: list[str] = []
        self.places: list[dict[str, Any]] = []
        self.details: dict[str, dict[str, Any]] = {}
        self.started = time.monotonic()
        self.skipped = 0
        self.warnings: list[str] = []

    def follow(self, event: Event) -> None:
        """Update the grid with one event of the engine."""
        kind, content = event
        if kind == "trials":
            self.trials = content
            self.started = time.monotonic()
        elif kind == "notes":
            self.notes = content
        elif kind == "places":
            self.places = content
        elif kind == "progress":
            name, stage, share, self.details[name] = content
            low, high = SHARES[stage]
            self.states[name] = stage
            self.share[name] = low + (high - low) * share
        elif kind == "done":
            # A trial without any progress was done before: it took no time, so it must not count for the time left.
            self.skipped += content not in self.share
            self.states[content], self.share[content] = "done", 1.0
        elif kind == "failed":
            self.states[content[0]], self.share[content[0]] = "failed", 1.0
        elif kind == "warning":
            self.warnings.append(f"{content[0]}: {content[1]}")

    def line(self) -> str:
        """Trials done, time elapsed, time left, and how many trials run on each device."""
        done = sum(self.share.values())
        elapsed = time.monotonic() - self.started
        worked = done - self.skipped
        left = f", about {clock(elapsed / worked * (len(self.trials) - done))} left" if worked > 0.3 else ""
        finished = sum(state in {"done", "failed"} for state in self.states.values())
        devices = ", ".join(f"{place['trials']} at a time on {place['device']}" for place in self.places)
        return f"{finished} of {len(self.trials)} trials, {clock(elapsed)} so far{left}{'; ' * bool(devices)}{devices}"

    def __rich__(self) -> Any:
        if not self.trials:
            return Text(f"reading model, data and tasks ... {clock(time.monotonic() - self.started)}", "dim")
        states = [{**trial, "state": self.states.get(trial["name"], "waiting")} for trial in self.trials]
        return Group(
            *lines(grid_table(states, self.share)), *(Text(line, "dim") for line in [self.line(), *self.inside()])
        )

    def inside(self) -> list[str]:
        """A line for each trial that is running: its step, loss and time left, or the task that is scored."""
        found = []
        for name, details in self.details.items():
            if self.states[name] == "train":
                left = details["seconds_left"]
                ends = "" if left is None else f", {clock(left)} of training left"
                found.append(f"{name}: step {details['step']} of {details['steps']}, loss {details['loss']:.3f}{ends}")
            elif self.states[name] == "score":
                found.append(f"{name}: scoring {details['task']}")
        return found


def grid_table(trials: Sequence[Mapping[str, Any]], share: Mapping[str, float]) -> Table:
    """One row for each design, one column for each of its runs; `share` of a trial that is done, by its name."""
    rows: dict[str, list[str]] = {}
    several = len({trial["base"] for trial in trials if trial["base"]}) > 1
    for trial in trials:
        state = {"waiting": "·"}.get(trial["state"], trial["state"])
        if state in SHARES and trial["name"] in share:
            state = f"{state} {share[trial['name']]:4.0%}"
        label = f"{trial['label']} on {trial['base']}" if several and trial["base"] else trial["label"]
        rows.setdefault(label, []).append(state)
    runs = max(map(len, rows.values()))
    body = tuple(
        (label, *(cell.ljust(WIDEST_STATE) for cell in [*cells, *[""] * (runs - len(cells))]))
        for label, cells in rows.items()
    )
    return Table("", ("design", *(f"run {number + 1}" for number in range(runs))), (("", body),), text=1 + runs)


def run_with_grid(
    study: Study,
    workers: int,
    shard: tuple[int, int],
    extend: bool = False,
    per_gpu: int = 0,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, str]:
    """Run a study under a live grid (a line per trial if stderr is no terminal); returns why trials failed, by name.

    on_event: also called with each event.
    """
    console = terminal(stderr=True)
    grid = Grid()

    def follow(event: Event) -> None:
        grid.follow(event)
        on_event(event)
        if not live and event[0] in {"done", "failed"}:
            name = event[1] if event[0] == "done" else event[1][0]
            console.print(f"{event[0]} {name}  ({grid.line()})", markup=False, soft_wrap=True)

    if len(study.seeds) == 1:
        console.print("One seed: differences between designs cannot be separated from chance.", style="yellow")
    live = console.is_terminal
    try:
        with Live(grid, console=console, refresh_per_second=2) if live else contextlib.nullcontext():
            failed = run(study, workers=workers, per_gpu=per_gpu, shard=shard, extend=extend, on_event=follow)
    except KeyboardInterrupt:
        console.print("stopped; finished work is kept, run the same command to continue", soft_wrap=True)
        raise SystemExit(130) from None
    for warning in grid.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    for note in (*grid.notes, *filter(None, [shared_work(study)])):
        console.print(redact(printable(note)), style="dim", markup=False, soft_wrap=True)
    for name, reason in failed.items():
        log = layout.find_log(study.folder, name)
        also = f" (log: {log})" if log else ""
        console.print(f"failed: {name}: {reason}{also}", style="red", markup=False, soft_wrap=True)
    return failed


def clock(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_status(trials: Sequence[Mapping[str, Any]]) -> None:
    """Print the grid as the study's folder shows it, the devices of the trials, and why trials failed."""
    console = terminal()
    print_table(console, grid_table(trials, {}))
    for line in device_lines(trials):
        console.print(line, style="dim", markup=False, soft_wrap=True)
    for trial in trials:
        if trial["state"] == "failed":
            console.print(f"failed: {trial['name']}: {trial['reason']}", markup=False, soft_wrap=True)


def device_lines(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each device: how many trials ran there, and how much of a GPU's memory their tensors filled."""
    text = []
    for device in dict.fromkeys(trial["device"] for trial in trials if trial["device"]):
        mine = [trial for trial in trials if trial["device"] == device]
        peaks = [trial["peak_memory"] / 2**30 for trial in mine if trial["peak_memory"]]
        memory = f", {min(peaks):.1f} to {max(peaks):.1f} GiB of tensors each" if peaks else ""
        text.append(f"{device}: {count(len(mine), 'trial')}{memory}")
    return text


def show_check(preview: Mapping[str, Any]) -> None:
    """Print the result of `poolwise check`."""
    console = terminal()
    bases = preview["base_models"]
    on = f" on {len(bases)} base models" if len(bases) > 1 else ""
    named = ", ".join(f"{base['name']} ({magnitude(base['parameters'])} parameters)" for base in bases)
    console.print(
        f"{preview['study']}: base {named}, {preview['steps']} steps, "
        f"{preview['effective_negatives']} negatives per query, fingerprint {preview['fingerprint']}",
        markup=False,
    )

    def cells(row: Mapping[str, Any]) -> Cells:
        differs, base, head = row["differs_in"], row["base_flops_32"], row["head_flops_32"]
        factors = f"{count(len(differs), 'factor')}: {', '.join(differs)}" if differs else "-"
        return (
            f"{row['design']} on {row['base']}" if on else row["design"], row["attention"], row["pooling"],
            "(baseline)" if row["design"] == preview["baseline"] else factors, magnitude(row["trainable_parameters"]),
            magnitude(row["head_parameters"]), magnitude(base + head), f"{head / (base + head):.1%}",
        )  # fmt: skip

    heads = ("design", "attention", "pooling", "differs in", "trained", "in head", "FLOPs", "in head")
    print_table(console, Table("", heads, (("", tuple(map(cells, preview["designs"]))),), text=4))
    trials = preview["trials"]
    console.print(
        f"\n{count(len({row['design'] for row in preview['designs']}), 'design')}{on}: {trials['trained']} trainings "
        f"({trials['of which controls']} of them controls), {trials['untuned']} untuned and {trials['references']} "
        f"other reference rows; results in {preview['folder']}",
        markup=False,
    )
    console.print(
        "trained: parameters; FLOPs: forward pass of a text of 32 tokens; each with the share of the head", style="dim"
    )
    console.print(f"about {magnitude(preview['training_flops'])}FLOP of training, at 128 tokens per text", markup=False)
    if tuning := preview["tuning"]:
        console.print(
            f"tuning: {tuning['searched']} more trainings on {', '.join(tuning['tasks'])} "
            f"(seed {tuning['seed']}), then up to {tuning['again']} with each design's best setting; up to "
            f"{magnitude(tuning['training_flops'])}FLOP",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    for note in preview["grid"]:
        console.print(f"grid, left out: {note}", style="dim", markup=False, soft_wrap=True)
    for table in tables.planned(preview):
        print_table(console, table)
    if planted := preview["mechanisms"]:
        items = ", ".join(f"{group['mechanism']} {group['items']}" for group in planted)
        console.print(
            f"built-in tasks are compared by mechanism, over {count(len(preview['seeds']), 'seed')} × items: {items} "
            f"items; Holm over {count(preview['contrasts'], 'contrast')}",
            markup=False,
        )
    if gain := preview["bfloat16_gain"]:
        console.print(
            f"dtype: float32 on this CPU; its matrix products are {gain:g} times faster in bfloat16 "
            "(recipe.dtype = 'bfloat16')", style="dim", markup=False, soft_wrap=True,
        )  # fmt: skip
    for note in preview["data"]:
        console.print(f"data: {printable(note)}", style="dim", markup=False)
    for warning in preview["warnings"]:
        console.print(f"note: {printable(warning)}", style="yellow", markup=False)


def show_scores(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the result of `poolwise evaluate`: scores × 100."""
    names = ("task", "task_type", "split", "subset", "metric")
    body = tuple((*(str(row[name]) for name in names), f"{100 * row['score']:.2f}") for row in rows)
    columns = ("task", "type", "split", "subset", "metric", "score")
    print_table(terminal(), Table("", columns, (("", body),), text=5))


def show_paired(pairs: Sequence[Paired]) -> None:
    """Print `poolwise compare --task` or `--qrels`: differences in points, each with its scope and its note."""
    console = terminal()
    print_table(console, secondary.paired(pairs))
    for pair in pairs:
        text = f"{pair.design}, {pair.test}: {pair.scope}."
        console.print(Text(f"{text} {pair.note}." if pair.note else text, "dim"))


def show_ab(result: Mapping[str, Any]) -> None:
    """Print the result of `poolwise ab`: the decision first, then the evidence; texts are cut, the files have them."""
    (console := terminal()).print(Text(ab_report.headline(result), "bold"), soft_wrap=True)
    for line in (ab_report.opening(result), *ab_report.sentences(result)):
        console.print(Text(line), soft_wrap=True)
    for table in ab_report.tables(result):
        print_table(console, ab_report.narrow(table))
    for note in ab_report.notes(result):
        console.print(Text(note, "yellow"), soft_wrap=True)


def show_layers(view: Mapping[str, Any], page: Path) -> None:
    """Print the tables of `poolwise layers` and write the page with its pictures."""
    console = terminal()
    for table in layer_report.tables(view):
        print_table(console, table)
    console.print(f"pictures: {write_atomic(page, pages.layers_page(view))}", markup=False, soft_wrap=True)


def show_probe(name: str, probe: Mapping[str, Any]) -> None:
    """Print the result of `poolwise probe`: whether the model supports each mode, and which token moves which."""
    console = terminal()
    console.print(f"{name}: {probe['model']}, {probe['backend']}, {probe['dtype']}; as loaded: {probe['declared']}")
    if probe["layers"]:
        console.print(probe["layers"], markup=False)
    for mode, result in probe["modes"].items():
        console.print(f"\n{mode}: {'yes' if result['ok'] else 'NO'}", style="green" if result["ok"] else "red")
        if result["reason"]:
            console.print(result["reason"], markup=False)
        paddings = list(result["influence"])
        console.print("state i moves when token j changes (row i, column j); padding: " + ", ".join(paddings))
        size = len(result["influence"][paddings[0]])
        for i in range(size):
            cells = ["".join("█" if value > 1e-6 else "·" for value in result["influence"][p][i]) for p in paddings]
            console.print("   ".join(cells), highlight=False)


def show_pairs(pairs: Pairs, leaderboard: bool, details: bool = False) -> None:
    """Print every pair of designs, or their leaderboard; with `details` the cases behind each note."""
    console = terminal()
    print_table(console, secondary.leaderboard(pairs) if leaderboard else secondary.all_pairs(pairs))
    print_notes(console, pairs.notes, details)


def print_notes(console: Console, notes: Sequence[str], details: bool) -> None:
    """A line for each note, and with `details` the cases behind it."""
    hidden = False
    for note in notes:
        console.print(Text(note, "yellow"))
        cases = note.cases if isinstance(note, Note) else ()
        hidden = hidden or (bool(cases) and not details)
        for case in cases if details else ():
            console.print(Text(f"  - {case}", "dim"), soft_wrap=True)
    if hidden:
        console.print(Text("--details lists every case behind these notes.", "dim"))


LONG = 40
"""Contrasts above which the answer is printed again at the end, since it has left the screen by then."""


def show_findings(findings: Findings, details: bool = False) -> None:
    """Print a comparison: warnings, the answer, recommendations, the tables, sentences on other analyses, notes; with
    `details` the cases behind each note."""
    console = terminal()
    for warning in (*pages.warnings(findings), *analyses.alarms(findings)):
        console.print(Text(warning, "bold yellow"))
    if findings.plan:
        console.print(Text(findings.plan))
    if answer := summary(findings):
        console.print(Text(answer, "bold"))
    for contrast in findings.overall:
        console.print(Text(secondary.overall_sentence(findings, contrast)))
    groups: dict[str, list[str]] = {}
    for recommendation in secondary.recommended(findings):
        groups.setdefault(secondary.advice(findings, recommendation), []).append(recommendation.group)
    for text, names in groups.items():
        console.print(Text.assemble((f"{', '.join(names)}: ", "bold"), text))
    factors = findings.factorial
    for table in (
        tables.own_tasks(findings),
        tables.means(findings),
        secondary.overall(findings),
        tables.verdicts(findings),
        secondary.given(findings),
        tables.checkpoints(findings),
        tables.costs(findings.costs),
        secondary.equal_cost(findings),
        analyses.factor_table(factors, findings.alpha) if factors else None,
        analyses.base_table(findings),
        analyses.tuning_table(findings),
        analyses.settings_table(findings),
    ):
        if table:
            print_table(console, table)
    for sentence in (
        *analyses.tuning_sentences(findings),
        *analyses.base_sentences(findings),
        *analyses.control_sentences(findings),
    ):
        console.print(Text(sentence))
    budgets = findings.budgets.notes if findings.budgets else ()
    print_notes(console, (*findings.notes, *budgets, *findings.excluded), details)
    if answer and len(findings.rows) > LONG:
        console.print(Text(answer, "bold"))


def show_end(info: Mapping[str, Any], findings: Findings) -> None:
    """Print the end of `poolwise demo`; the report has every number behind it."""
    console = terminal()
    console.print()
    console.print(Text(pages.opening(info, findings)))
    if definitions := pages.designs(findings):
        console.print(Text(definitions, "dim"))
    console.print()
    console.print(Text(summary(findings, info["predictions"]), "bold"))
    for alarm in analyses.alarms(findings):
        console.print(Text(alarm, "bold yellow"))
    for table in (tables.means(findings), analyses.predictions_table(findings, info["predictions"])):
        if table:
            print_table(console, table)
    console.print()
    for sentence in analyses.control_sentences(findings):
        console.print(Text(sentence))
    for note in (*findings.notes, *findings.excluded):
        console.print(Text(note, "yellow"))
    console.print()
