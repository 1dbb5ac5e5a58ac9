"""Where tables are printed."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from poolwise.files import write_atomic
from poolwise.reports import analyses, tables
from poolwise.reports import layers as probing_report
from poolwise.reports.summary import designs, summary
from poolwise.reports.words import count, interval, points, probability
from poolwise.runs.engine import Event
from poolwise.runs.run import run, shared_work
from poolwise.study.study import Study
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.items import Paired

if TYPE_CHECKING:
    from rich.console import Console


PIPE_WIDTH = 140


def terminal(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; a file or a pipe gets `PIPE_WIDTH` columns at least."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


SHARES = {"train": (0.0, 0.6), "score": (0.6, 1.0)}
"""Where a stage begins and ends in a trial's bar."""


class Grid:
    """The trials of a study as a table: a row a design, a cell a seed, with the time that is left."""

    def __init__(self) -> None:
        self.trials: list[dict[str, Any]] = []
        self.share: dict[str, float] = {}
        self.states: dict[str, str] = {}
        self.notes: list[str] = []
        self.places: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.skipped = 0.0

    def follow(self, event: Event) -> None:
        """Take in one event of the engine."""
        kind, content = event
        if kind == "trials":
            self.trials = content
            self.started = time.monotonic()
        elif kind == "notes":
            self.notes = content
        elif kind == "places":
            self.places = content
        elif kind == "progress":
            name, stage, share = content
            low, high = SHARES[stage]
            self.states[name] = stage
            self.share[name] = low + (high - low) * share
        elif kind == "done":
            self.skipped += name_was_new(self.share, content)
            self.states[content], self.share[content] = "done", 1.0
        elif kind == "failed":
            self.states[content[0]], self.share[content[0]] = "failed", 1.0

    def line(self) -> str:
        """Trials done, elapsed, left."""
        done = sum(self.share.values())
        elapsed = time.monotonic() - self.started
        worked = done - self.skipped
        left = f", about {clock(elapsed / worked * (len(self.trials) - done))} left" if worked > 0.3 else ""
        finished = sum(state in {"done", "failed"} for state in self.states.values())
        devices = [f"{place['trials']} at a time on {place['device']}" for place in self.places]
        at = f"; {', '.join(devices)}" if devices else ""
        return f"{finished} of {len(self.trials)} trials, {clock(elapsed)} so far{left}{at}"

    def __rich__(self) -> Any:
        if not self.trials:
            return Text(f"reading model, data and tasks ... {clock(time.monotonic() - self.started)}", style="dim")
        table = grid_table(
            [{**trial, "state": self.states.get(trial["name"], "waiting")} for trial in self.trials], self.share
        )
        table.caption = self.line()
        return table


def name_was_new(share: dict[str, float], name: str) -> float:
    """1 where a trial was found done: it took no time and must not count for the time that is left."""
    return 0.0 if name in share else 1.0


def grid_table(trials: Sequence[dict[str, Any]], share: dict[str, float] | None = None) -> Table:
    """One row a design, one column a run."""
    rows: dict[str, list[str]] = {}
    bases = {trial["base"] for trial in trials if trial.get("base")}
    for trial in trials:
        state = trial["state"]
        text = {"done": "[green]done[/]", "failed": "[red]failed[/]", "waiting": "[dim]·[/]"}.get(state)
        if text is None:
            part = (share or {}).get(trial["name"])
            text = f"{state} {part:4.0%}" if part is not None else state
        base = trial.get("base") if len(bases) > 1 else None
        rows.setdefault(f"{trial['label']} on {base}" if base else trial["label"], []).append(text)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("design", overflow="fold")
    for number in range(max(len(cells) for cells in rows.values())):
        table.add_column(f"run {number + 1}", min_width=11)
    for label, cells in rows.items():
        table.add_row(Text(label), *cells)
    return table


def run_with_grid(
    study: Study, workers: int, shard: tuple[int, int], extend: bool = False, per_gpu: int = 0
) -> dict[str, str]:
    """Run a study under a live grid (a line a trial where stderr is no terminal). Returns the failures."""
    console = terminal(stderr=True)
    grid = Grid()
    options: dict[str, Any] = {"workers": workers, "per_gpu": per_gpu, "shard": shard, "extend": extend}
    if len(study.seeds) == 1:
        console.print("One seed: differences between designs cannot be told from luck of the run.", style="yellow")
    try:
        if console.is_terminal:
            with Live(grid, console=console, refresh_per_second=2):
                failed = run(study, on_event=grid.follow, **options)
        else:

            def lines(event: Event) -> None:
                _print_line(console, grid, event)

            failed = run(study, on_event=lines, **options)
    except KeyboardInterrupt:
        console.print("stopped; what is done is kept, run the same command to go on", soft_wrap=True)
        raise SystemExit(130) from None
    for note in grid.notes:
        console.print(note, style="dim", markup=False, soft_wrap=True)
    if words := shared_work(study):
        console.print(words, style="dim", markup=False, soft_wrap=True)
    for name, reason in failed.items():
        console.print(f"failed: {name}: {reason}", style="red", markup=False, soft_wrap=True)
    return failed


def _print_line(console: Console, grid: Grid, event: Event) -> None:
    grid.follow(event)
    if event[0] in {"done", "failed"}:
        name = event[1] if event[0] == "done" else event[1][0]
        console.print(f"{event[0]} {name}  ({grid.line()})", markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_status(trials: Sequence[dict[str, Any]]) -> None:
    """The grid as it stands on disk, and why trials failed."""
    console = terminal()
    console.print(grid_table(trials))
    for line in device_lines(trials):
        console.print(line, style="dim", markup=False, soft_wrap=True)
    for trial in trials:
        if trial["state"] == "failed":
            console.print(f"failed: {trial['name']}: {trial['reason']}", markup=False, soft_wrap=True)


def device_lines(trials: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each device: how many trials ran there, and how much of a GPU's memory their tensors filled."""
    lines = []
    for device in dict.fromkeys(trial["device"] for trial in trials if trial.get("device")):
        mine = [trial for trial in trials if trial.get("device") == device]
        peaks = [trial["peak_memory"] / 2**30 for trial in mine if trial.get("peak_memory")]
        memory = f", {min(peaks):.1f} to {max(peaks):.1f} GiB of tensors each" if peaks else ""
        lines.append(f"{device}: {count(len(mine), 'trial')}{memory}")
    return lines


def amount(number: float) -> str:
    """1278275584 -> 1.28 G."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def show_check(found: dict[str, Any]) -> None:
    """What `poolwise check` prints."""
    console = terminal()
    bases = found["base_models"]
    on = f" on {len(bases)} base models" if len(bases) > 1 else ""
    named = ", ".join(f"{base['name']} ({amount(base['parameters'])} parameters)" for base in bases)
    console.print(
        f"{found['study']}: base {named}, {found['steps']} steps, "
        f"{found['effective_negatives']} negatives a query, fingerprint {found['fingerprint']}",
        markup=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("design", "attention", "pooling"):
        longest = max(len(row[name]) for row in found["designs"])
        table.add_column(name, overflow="fold", min_width=min(36, longest) if console.width >= PIPE_WIDTH else None)
    table.add_column("differs in", overflow="fold")
    for name in ("trained", "of it head", "FLOPs", "head"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found["designs"]:
        differs = row["differs_in"]
        factors = f"{len(differs)} factor{'s' * (len(differs) != 1)}: {', '.join(differs)}" if differs else "-"
        if row["design"] == found["baseline"]:
            factors = "(baseline)"
        name = f"{row['design']} on {row['base']}" if on else row["design"]
        table.add_row(
            Text(name), row["attention"], row["pooling"], factors,
            amount(row["trainable_parameters"]), amount(row["head_parameters"]),
            amount(row["base_flops_32"] + row["head_flops_32"]),
            f"{row['head_flops_32'] / (row['base_flops_32'] + row['head_flops_32']):.1%}",
        )  # fmt: skip
    console.print(table)
    trials = found["trials"]
    console.print(
        f"\n{count(len({row['design'] for row in found['designs']}), 'design')}{on}: {trials['trained']} trainings "
        f"({trials['of which controls']} of them controls), {trials['untuned']} untuned and {trials['references']} "
        f"other reference rows; results in {found['folder']}",
        markup=False,
    )
    console.print("FLOPs: forward pass of a text of 32 tokens, and the share of the head in it", style="dim")
    console.print(f"about {amount(found['training_flops'])}FLOP of training, at 128 tokens a text", markup=False)
    if tuning := found["tuning"]:
        console.print(
            f"tuning: {tuning['searched']} more trainings on {', '.join(tuning['tasks'])} "
            f"(seed {tuning['seed']}), then "
            f"up to {tuning['again']} with each design's best setting; up to {amount(tuning['training_flops'])}FLOP",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    for note in found["grid"]:
        console.print(f"grid, left out: {note}", style="dim", markup=False, soft_wrap=True)
    if found["tasks"]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("task type")
        for name in ("tasks", "sources", "smallest p", f"after Holm over {found['contrasts']}"):
            table.add_column(name, justify="right")
        for group in found["tasks"]:
            table.add_row(
                group["task_type"], str(group["tasks"]), str(group["sources"]),
                f"{group['min_reachable_p']:.4f}", f"{group['min_reachable_p_holm']:.4f}",
            )  # fmt: skip
        console.print(table)
    if planted := found["mechanisms"]:
        items = ", ".join(f"{group['mechanism']} {group['items']}" for group in planted)
        console.print(
            f"built-in tasks are compared by mechanism, over {count(len(found['seeds']), 'seed')} × items: {items} "
            f"items; Holm over {count(found['contrasts'], 'contrast')}",
            markup=False,
        )
    for note in found["data"]:
        console.print(f"data: {note}", style="dim", markup=False)
    for warning in found["warnings"]:
        console.print(f"note: {warning}", style="yellow", markup=False)


def show_scores(rows: Sequence[dict[str, Any]]) -> None:
    """What `poolwise evaluate` prints: scores × 100."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "type", "split", "subset", "metric"):
        table.add_column(name, overflow="fold")
    table.add_column("score", justify="right")
    for row in rows:
        words = [Text(str(row[name])) for name in ("task", "task_type", "split", "subset", "metric")]
        table.add_row(*words, f"{100 * row['score']:.2f}")
    terminal().print(table)


def show_paired(lines: Sequence[Paired]) -> None:
    """What `poolwise compare --task` and `--qrels` print: differences in points, each with its scope and its note."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "metric", "design", "baseline"):
        table.add_column(name, overflow="fold")
    for name in ("difference", "95 % interval", "n", "p", "Holm p"):
        table.add_column(name, justify="right")
    table.add_column("test", overflow="fold")
    for line in lines:
        names = [Text(name) for name in (line.task, line.metric, line.design, line.baseline)]
        numbers = [points(line.difference, sign=True), interval(line.ci_low, line.ci_high), f"{line.n:,}"]
        table.add_row(*names, *numbers, probability(line.p_value), probability(line.p_holm), line.test)
    console = terminal()
    console.print(table)
    for line in lines:
        said = f"{line.design}, {line.test}: {line.scope}."
        console.print(Text(f"{said} {line.note}." if line.note else said, style="dim"))


def show_layers(found: dict[str, Any], page: Path) -> None:
    """What `poolwise layers` prints, and the page with its pictures."""
    console = terminal()
    for made in probing_report.tables(found):
        table = Table(box=None, pad_edge=False, header_style="bold", title=made.title, title_justify="left")
        for name in made.columns:
            table.add_column(name, justify="right")
        for row in made.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print(Text(made.note, style="dim"))
    console.print(f"pictures: {write_atomic(page, probing_report.page(found))}", markup=False, soft_wrap=True)


def show_verdict(name: str, found: dict[str, Any]) -> None:
    """What `poolwise probe` prints: the verdict for each mode and who moves whom."""
    console = terminal()
    console.print(f"{name}: {found['model']}, {found['backend']}, {found['dtype']}; as it stands: {found['declared']}")
    for mode, result in found["modes"].items():
        console.print(f"\n{mode}: {'yes' if result['ok'] else 'NO'}", style="green" if result["ok"] else "red")
        if result["reason"]:
            console.print(result["reason"], markup=False)
        paddings = list(result["influence"])
        console.print("state i moves when token j changes (row i, column j); " + ", ".join(paddings))
        size = len(result["influence"][paddings[0]])
        for i in range(size):
            cells = ["".join("█" if value > 1e-6 else "·" for value in result["influence"][p][i]) for p in paddings]
            console.print("   ".join(cells), highlight=False)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what libraries print to stderr, at the level of file descriptors."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def print_table(console: Console, table: tables.Table) -> None:
    """A table in aligned columns, never cut and never wrapped."""
    from rich.text import Text

    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    words = [index < table.text or name == "Verdict" for index, name in enumerate(table.columns)]

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), no_wrap=True, overflow="ignore", crop=False)

    def cells(row: Sequence[str]) -> str:
        padded = zip(row, widths, words, strict=True)
        return "  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word in padded).rstrip()

    line()
    line((table.title, "bold"))
    line((cells(table.columns), "dim"))
    for heading, rows in table.sections:
        if heading:
            line((heading, "italic"))
        for row in rows:
            line(cells(row))
    if table.note:
        console.print(Text(table.note, style="dim"))


def show_end(opening: str, comparison: Comparison, predictions: Any, console: Console | None = None) -> None:
    """What `poolwise demo` ends with; every number behind it is in the report."""
    from rich.text import Text

    console = console or terminal()
    roles = dict(comparison.roles)
    console.print()
    console.print(Text(opening))
    if told := designs(comparison):
        console.print(Text(told, style="dim"))
    console.print()
    console.print(Text(summary(comparison, predictions), style="bold"))
    for alarm in analyses.alarms(comparison, roles):
        console.print(Text(alarm, style="bold yellow"))
    print_table(console, tables.means(comparison))
    if found := analyses.predictions_table(comparison, predictions):
        print_table(console, found)
    console.print()
    for said in analyses.control_sentences(comparison):
        console.print(Text(said))
    for note in (*comparison.notes, *comparison.excluded):
        console.print(Text(note, style="yellow"))
    console.print()
