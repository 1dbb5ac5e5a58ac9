"""The command line. Tables go to stdout, progress to stderr; a user's mistake exits with code 2 and no traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from poolwise.commands import models
from poolwise.commands.options import (
    KEPT,
    Benchmark,
    Command,
    Json,
    Revisions,
    Source,
    Sources,
    Split,
    StudyFile,
    Subset,
    quiet,
    say,
    shard_of,
    stdout_to_stderr,
)
from poolwise.errors import PoolwiseError, StudyError, printable, redact
from poolwise.files import check_place

app = typer.Typer(
    name="poolwise",
    help="Which pooling and attention should my LLM embedder use, is the difference real, and what does it cost?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

PLACES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
"""Errors of the operating system that the user can fix by naming another path or changing its permissions."""


def main() -> None:
    """Entry point: runs the app and turns a `PoolwiseError` into one clear message."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may be no valid text
    try:
        app(prog_name="poolwise")
    except PoolwiseError as error:
        print(f"error: {redact(printable(str(error), keep=KEPT))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = "the disk is full; free some space and run the same command to continue"
        elif error.errno in PLACES and error.filename is not None:
            message = f"{str(error.filename)!r}: {error.strerror}; name another path that can be read and written"
        else:
            raise
        print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from poolwise import __version__

        print(f"poolwise {__version__}")
        raise typer.Exit


@app.command(cls=Command)
def init(
    template: Annotated[str, typer.Argument(help="paper, demo, factorial, or own: a study of your own data.")],
    folder: Annotated[Path | None, typer.Argument(help="With own: the folder of your data; the current one.")] = None,
    to: Annotated[Path | None, typer.Option(help="File to write; TEMPLATE.toml by default.")] = None,
) -> None:
    """Write a study file to start from; with `own`, from what lies in a folder."""
    from poolwise.study.starters import write, write_own

    if template == "own":
        from poolwise.data.survey import survey

        found, unread = survey(folder or Path())
        path = to or Path("own.toml")
        tasks, pairs = [each.path for each in found if not each.pairs], {e.path: e.pairs for e in found if e.pairs}
        write_own(tasks, pairs, path)
        for each in found:
            print("\n".join([f"{each.path}: {each.what}", *(f"  note: {note}" for note in each.notes)]))
        if unread:
            print(f"not read: {', '.join(unread)}")
        print(f"wrote {path}; next: poolwise check {path}")
        return
    if folder:
        raise PoolwiseError(f"init {template} takes no folder ({folder}); `init own FOLDER` does")
    print(f"wrote {write(template, to)}; next: poolwise check {to or template + '.toml'}")


@app.command(cls=Command)
def check(study: StudyFile, as_json: Json = False) -> None:
    """Validate a study; show its factors, sizes, cost, trials, negatives and the smallest reachable p."""
    from poolwise.screen import show_check
    from poolwise.study.study import Study

    loaded = Study.load(study)
    quiet()
    from poolwise.runs.check import check as check_study

    with stdout_to_stderr():
        preview = check_study(loaded)
    print(json.dumps(preview, indent=1)) if as_json else show_check(preview)


@app.command(cls=Command)
def run(
    study: StudyFile,
    workers: Annotated[int, typer.Option(help="Trials at a time; 0: by GPUs, else one per core.", min=0)] = 0,
    per_gpu: Annotated[int, typer.Option(help="Trials at a time on each GPU; 0: by the memory they need.", min=0)] = 0,
    shard: Annotated[str, typer.Option(help="i/n: run every n-th trial from the i-th on, for job arrays.")] = "1/1",
    extend: Annotated[
        bool, typer.Option("--extend", help="After the first look, run up to `extend_to` seeds.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print events as lines of JSON on stdout instead of results.")
    ] = False,
) -> None:
    """Train and score what is missing, then compare and report."""
    from poolwise.runs.engine import event_record, start_server
    from poolwise.study.study import Study

    loaded = Study.load(study)
    say(loaded.place)
    start_server()  # before this process imports the libraries itself, which takes as long
    from poolwise.runs.run import all_done
    from poolwise.screen import run_with_grid

    def follow(event: Any) -> None:
        if as_json:
            print(json.dumps(event_record(event)), flush=True)

    failed = run_with_grid(loaded, workers, shard_of(shard), extend, per_gpu, follow)
    if all_done(loaded):
        if loaded.tasks and len(loaded.designs) > 1:
            if as_json:
                from poolwise.api import report as write_report

                paths = [str(path) for path in write_report(str(study))]
                print(json.dumps({"event": "report", "paths": paths}))
            else:
                compare([str(study)])
                report(str(study))
        else:
            print(f"done; nothing to compare: {'one design' if loaded.tasks else 'no tasks'}", file=sys.stderr)
    elif not failed and shard != "1/1":
        print("this shard is done; run `poolwise compare` and `report` when the others are", file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


@app.command(cls=Command)
def status(study: StudyFile, as_json: Json = False) -> None:
    """Print the grid of trials: waiting, started, done, failed and why; on which device, with how much memory."""
    from poolwise.runs import layout
    from poolwise.runs.run import trials
    from poolwise.screen import show_status

    loaded = layout.open_study(study)
    say(loaded.place)
    rows = trials(loaded)
    try:
        layout.guard(loaded)
    except StudyError as error:  # `run` would refuse it; what has run can be shown all the same
        print(f"warning: {error}", file=sys.stderr)
    print(json.dumps(rows, indent=1)) if as_json else show_status(rows)


@app.command(cls=Command)
def compare(
    sources: Sources,
    baseline: Annotated[str | None, typer.Option(help="Baseline (default: the study's, or the first design).")] = None,
    by: Annotated[str, typer.Option(help="Column that groups the tasks, or `all`.")] = "task_type",
    missing: Annotated[
        str | None,
        typer.Option(help="error, or drop: leave out tasks that a design lacks (default: drop for mteb results)."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Compare on the items of this task.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="Judgements of TREC runs, to compare them query by query.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric of the items; ndcg_at_10 for runs by default.")] = None,
    design: Annotated[str | None, typer.Option(help="With --task or --qrels: compare only this design.")] = None,
    run_sd: Annotated[float | None, typer.Option(help="Sd of a run's effect, from another study, in points.")] = None,
    run_df: Annotated[float | None, typer.Option(help="Degrees of freedom behind --run-sd.")] = None,
    base: Annotated[str | None, typer.Option(help="Show only this base model, in a study of several.")] = None,
    split: Split = None,
    subset: Subset = None,
    benchmark: Benchmark = None,
    revisions: Revisions = "newest",
    pairs: Annotated[bool, typer.Option("--all-pairs", help="Compare every two designs; Holm over all pairs.")] = False,
    leaderboard: Annotated[
        bool, typer.Option("--leaderboard", help="Rank the designs, with rank intervals and groups not told apart.")
    ] = False,
    details: Annotated[bool, typer.Option("--details", help="List every case behind the notes.")] = False,
    as_json: Json = False,
) -> None:
    """Test the differences between designs, by task type; with --task or --qrels, item by item on one data set."""
    for option, value in (("--task", task), ("--baseline", baseline)):
        if value is not None and not value.strip():
            raise PoolwiseError(f"{option} is empty: name one, or leave the option out")
    if task or qrels:
        if pairs or leaderboard or run_sd is not None or run_df is not None or by != "task_type":
            raise PoolwiseError(
                "--task and --qrels compare systems two by two on one data set: they take neither --by, --all-pairs, "
                "--leaderboard, --run-sd nor --run-df"
            )
        names = {"task": task, "design": design, "baseline": baseline}
        _compare_items(sources, as_json, missing or "error", qrels, metric, base, **names)
        return
    if metric or design:
        raise PoolwiseError("--metric and --design compare items: name their task with --task")
    choice = _choice(split, subset, benchmark, revisions)
    if pairs or leaderboard:
        if baseline or run_sd is not None or run_df is not None:
            raise PoolwiseError("--all-pairs and --leaderboard have no baseline and take no run effect from elsewhere")
        from poolwise.api import compare_pairs
        from poolwise.screen import show_pairs

        every = compare_pairs(_only(sources), by=by, missing=missing, base=base, choice=choice)
        print(json.dumps(every.to_json(), indent=1)) if as_json else show_pairs(every, leaderboard, details)
        return
    from poolwise.api import compare as compare_source
    from poolwise.screen import show_findings

    findings = compare_source(
        _only(sources), baseline=baseline, by=by, missing=missing, run_sd=run_sd, run_df=run_df, base=base,
        choice=choice,
    )  # fmt: skip
    print(json.dumps(findings.to_json(), indent=1)) if as_json else show_findings(findings, details)


@app.command(cls=Command)
def report(
    source: Source,
    to: Annotated[Path | None, typer.Option(help="Folder to write into; for a study, its own by default.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Baseline (default: the study's, or the first design).")] = None,
    split: Split = None,
    subset: Subset = None,
    benchmark: Benchmark = None,
    revisions: Revisions = "newest",
) -> None:
    """Write the report as Markdown, as LaTeX and as one HTML file."""
    from poolwise.api import report as write_report

    check_place(to)
    choice = _choice(split, subset, benchmark, revisions)
    for path in write_report(source, out=to, baseline=baseline, choice=choice):
        print(path.resolve())


app.command(cls=Command)(models.evaluate)
app.command(cls=Command)(models.ab)
app.command(cls=Command)(models.probe)
app.command(cls=Command)(models.export)
app.command(cls=Command)(models.encode)
app.command(cls=Command)(models.serve)
app.command(cls=Command)(models.layers)


@app.command(cls=Command)
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Only m1 and m5, two seeds, three mechanisms.")] = False,
    to: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("demo"),
) -> None:
    """Run a whole study on the built-in model and tasks, offline, from training to a report; then report a real one.

    The second report, smollm2.html, is made from the stored scores of a study on SmolLM2-135M.
    """
    from poolwise.runs.engine import start_server
    from poolwise.study.starters import demo_study

    loaded = demo_study(to, quick=quick)
    start_server()
    from poolwise.screen import run_with_grid

    failed = run_with_grid(loaded, 0, (1, 1))
    if failed:
        raise typer.Exit(1)
    from poolwise.api import compare as compare_source
    from poolwise.api import report as write_report
    from poolwise.api import study_info
    from poolwise.screen import show_end

    show_end(study_info(loaded), compare_source(loaded))
    for path in write_report(loaded, out=to, command=f"poolwise demo{' --quick' if quick else ''}"):
        print(path)
    from poolwise.demo import smollm2_study

    print(_one_page(smollm2_study(), to / "smollm2.html"))


def _one_page(study_file: Path, path: Path) -> Path:
    """The HTML report of a stored study, as a file of that name."""
    from tempfile import TemporaryDirectory

    from poolwise.api import report as write_report
    from poolwise.files import write_atomic

    with TemporaryDirectory() as place:
        pages = {page.suffix: page for page in write_report(str(study_file), out=place)}
        return write_atomic(path, pages[".html"].read_bytes())


def _compare_items(
    sources: list[str],
    as_json: bool,
    missing: str,
    qrels: Path | None,
    metric: str | None,
    base: str | None,
    **names: Any,
) -> None:
    from poolwise.api import compare_items, compare_runs
    from poolwise.screen import show_paired
    from poolwise.verdicts.items import to_json

    if qrels:
        lines = compare_runs(sources, qrels, metric=metric or "ndcg_at_10", **names)
    else:
        lines = compare_items(_only(sources), metric=metric, missing=missing, base=base, **names)
    print(json.dumps(to_json(lines), indent=1)) if as_json else show_paired(lines)


def _choice(split: list[str] | None, subset: list[str] | None, benchmark: str | None, revisions: str) -> Any:
    from poolwise.verdicts.mteb_files import Choice

    return Choice(tuple(subset or ()), tuple(split or ()), benchmark, revisions)


def _only(sources: list[str]) -> str:
    if len(sources) > 1:
        raise PoolwiseError(f"{len(sources)} sources were given: give one, or TREC runs with --qrels FILE")
    return sources[0]
