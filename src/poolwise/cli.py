"""The command line. Tables go to stdout, progress to stderr; a user's mistake exits with code 2 and no traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

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

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.")]
Source = Annotated[
    str, typer.Argument(metavar="STUDY.toml|SCORES", help="A study, a CSV or Parquet file, mteb results.")
]
Sources = Annotated[
    list[str],
    typer.Argument(metavar="STUDY.toml|SCORES|RUN...", help="As for `report`; or TREC runs, with --qrels."),
]
Split = Annotated[
    list[str] | None,
    typer.Option(help="Keep this split of published scores; repeat for more (default: each task's evaluation split)."),
]
Subset = Annotated[
    list[str] | None,
    typer.Option(help="Keep this subset, such as a language; repeat for more (default: all, averaged)."),
]
Benchmark = Annotated[
    str | None, typer.Option(help="Keep the tasks, splits and subsets of a benchmark, such as 'MTEB(eng, v2)'.")
]
Revisions = Annotated[
    str, typer.Option(help="Of several revisions of a model in mteb results: newest, or runs (each is a run).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16, or auto: bfloat16 if the device has it. Default: as stored."),
]
KEPT = "\n\t"
"""Control characters that messages may contain; all others come from names and are escaped."""
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --to.")]
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


@app.command()
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


@app.command()
def check(study: StudyFile, as_json: Json = False) -> None:
    """Validate a study; show its factors, sizes, cost, trials, negatives and the smallest reachable p."""
    from poolwise.screen import show_check
    from poolwise.study.study import Study

    loaded = Study.load(study)
    _quiet()
    from poolwise.runs.check import check as check_study

    with _stdout_to_stderr():
        preview = check_study(loaded)
    print(json.dumps(preview, indent=1)) if as_json else show_check(preview)


@app.command()
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
    _say(loaded.place)
    start_server()  # before this process imports the libraries itself, which takes as long
    from poolwise.runs.run import all_done
    from poolwise.screen import run_with_grid

    def follow(event: Any) -> None:
        if as_json:
            print(json.dumps(event_record(event)), flush=True)

    failed = run_with_grid(loaded, workers, _shard(shard), extend, per_gpu, follow)
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


@app.command()
def status(study: StudyFile, as_json: Json = False) -> None:
    """Print the grid of trials: waiting, started, done, failed and why; on which device, with how much memory."""
    from poolwise.runs import layout
    from poolwise.runs.run import trials
    from poolwise.screen import show_status

    loaded = layout.open_study(study)
    _say(loaded.place)
    rows = trials(loaded)
    try:
        layout.guard(loaded)
    except StudyError as error:  # `run` would refuse it; what has run can be shown all the same
        print(f"warning: {error}", file=sys.stderr)
    print(json.dumps(rows, indent=1)) if as_json else show_status(rows)


@app.command()
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
    if task or qrels:
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


@app.command()
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


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A sentence-transformers model, by name or folder, or a run folder.")],
    tasks: Annotated[list[str], typer.Option(help="Task, benchmark or folder; repeat for more.")],
    batch_size: Annotated[int, typer.Option(help="Texts at a time.", min=1)] = 32,
    dtype: Dtype = None,
    template: Annotated[
        str | None, typer.Option(help="Prompt with {instruction}, which becomes each task's instruction in mteb.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens to which texts are cut.", min=2)] = None,
    release: Annotated[str | None, typer.Option(help="Design, m1 to m5, of a release by the paper's authors.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model of that release.")] = None,
    as_json: Json = False,
) -> None:
    """Score a model on mteb tasks or your own data."""
    _quiet()
    from poolwise.api import evaluate as score
    from poolwise.screen import show_scores

    with _stdout_to_stderr():  # what libraries print must not mix with the JSON
        rows = score(
            model, tasks, batch_size=batch_size, dtype=dtype, template=template and template.replace("\\n", "\n"),
            max_length=max_length, release=release, base=base, note=lambda line: _say(f"note: {line}"),
        )  # fmt: skip
    print(json.dumps(rows, indent=1)) if as_json else show_scores(rows)


@app.command()
def ab(
    data: Annotated[Path, typer.Argument(help="A retrieval folder; or a CSV or folder of pairs or labelled texts.")],
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL_A MODEL_B", help="Folder, Hub name, tfidf, bm25 or STUDY.toml:DESIGN."),
    ],
    margin: Annotated[float, typer.Option(help="The smallest difference that matters, in points.")] = 1.0,
    to: Annotated[Path | None, typer.Option(help="Folder of ab.html, .md and .json; NAME-ab beside the data.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of kept embeddings; .poolwise beside the data.")] = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Switch or stay: compare models on your own data; the first is the one in use."""
    check_place(to)
    _quiet()
    from poolwise.reports.ab import render
    from poolwise.runs.ab import ab as compare_models
    from poolwise.screen import show_ab

    with _stdout_to_stderr():
        if not 0 < margin < 100:
            raise PoolwiseError(f"--margin {margin:g}: give points, above 0 and below 100")
        result = compare_models(data, models, margin=margin / 100, dtype=dtype, cache=cache, say=_say)
    place = to or Path(result["data"]).parent / f"{result['name']}-ab"
    paths = render(result, " ".join(["poolwise ab", str(data), *models, f"--margin {margin:g}"]), place)
    print(json.dumps(result, indent=1)) if as_json else show_ab(result)
    for path in paths:
        _say(str(path.resolve()))


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="A causal LM: `nano`, a folder or a Hub name.")], as_json: Json = False
) -> None:
    """Show which tokens see which, and whether the model supports both attention modes."""
    if model.endswith(".toml"):
        raise PoolwiseError(f"{model} is a study file; give a base model: `nano`, a folder or a Hub name")
    _quiet()
    from poolwise.model.attention import verdict
    from poolwise.model.base import load_base
    from poolwise.screen import show_probe

    with _stdout_to_stderr():
        result = verdict(load_base(model))
    print(json.dumps(result, indent=1)) if as_json else show_probe(model, result)


@app.command()
def export(
    study: StudyFile,
    design: Annotated[str, typer.Argument(help="Name of the design.")],
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int | None, typer.Option(help="Seed of the run; the study's first by default.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model of the run; the study's first by default.")] = None,
    force: Force = False,
) -> None:
    """Write a trained design as a sentence-transformers folder, LoRA merged."""
    from poolwise.study.study import Study

    loaded = Study.load(study)
    exported = loaded.design(design)
    check_place(to, force, "exists and is not empty")
    _quiet()
    from poolwise.api import export_design
    from poolwise.encoding.fast import MASKED

    print(export_design(loaded, design, to, seed, base, force))
    if exported.spec.reads_padding(exported.factors()):
        _say(f"note: {MASKED}")


@app.command()
def encode(
    model: Annotated[str, typer.Argument(help="A trial's or an exported folder, or a sentence-transformers name.")],
    texts: Annotated[Path, typer.Argument(help="A .txt, one text a line; a .jsonl, .csv, .tsv or .parquet.")],
    to: Annotated[Path, typer.Option(help="NumPy file to write, such as vectors.npy.")],
    prompt: Annotated[str | None, typer.Option(help="Text to put before each; none by default.")] = None,
    query: Annotated[
        bool | None,
        typer.Option("--query/--document", help="Use the model's own prompt for queries or documents."),
    ] = None,
    field: Annotated[str, typer.Option(help="Field or column that holds the texts.")] = "text",
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Encode a file of texts into a NumPy file, one row for each text, in order."""
    check_place(to, force, "exists")
    _quiet()
    from poolwise.encoding.encode import encode_file

    side = {True: "query", False: "document", None: None}[query]
    with _stdout_to_stderr():
        path = encode_file(model, texts, to, prompt=prompt, side=side, field=field, dtype=dtype, say=_say)
    print(path)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A trial's or an exported folder, or a sentence-transformers name.")],
    name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model, as often as needed; MODEL by default.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; use a proxy for access from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.", min=0, max=65535)] = 8080,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="With POOLWISE_TOKEN: a further name by which clients and pages reach it; '*': any."),
    ] = None,
    dtype: Dtype = None,
) -> None:
    """Serve a model's embeddings over HTTP, in the format of OpenAI's /v1/embeddings.

    Clients must send the key in the environment variable POOLWISE_TOKEN, if it is set.
    """
    _quiet()
    try:
        from poolwise.encoding.server import serve as serve_forever
    except ModuleNotFoundError as error:
        raise PoolwiseError(f"serving needs {error.name!r}; install it: pip install 'poolwise[serve]'") from None

    serve_forever(model, host, port, say=_say, dtype=dtype, names=name or (), hosts=allow_host or ())


@app.command()
def layers(
    run: Annotated[
        str | None, typer.Argument(metavar="STUDY.toml|FOLDER", help="A study, its run folder, or one trial's.")
    ] = None,
    untuned: Annotated[str | None, typer.Option(help="Instead of a run: a base model before training.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="With --untuned: task, benchmark or folder; repeat for more.")
    ] = None,
    design: Annotated[str | None, typer.Option(help="Only this design.")] = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed.")] = None,
    base: Annotated[str | None, typer.Option(help="Only this base model.")] = None,
    to: Annotated[Path, typer.Option(help="HTML page to write, with the pictures.")] = Path("layers.html"),
    as_json: Json = False,
) -> None:
    """Show the inside of trained designs: attention over layers, layer weights, the score of each single layer.

    With --untuned the scores of a base model's layers before training, and how alike two layers rank pairs of texts.
    """
    if (run is None) == (untuned is None) or bool(tasks) != bool(untuned):
        raise PoolwiseError("give a study or a run folder, or a base model and tasks: --untuned NAME --tasks TASK")
    check_place(to)
    _quiet()
    from poolwise.screen import show_layers

    with _stdout_to_stderr():
        if run is None or untuned:
            from poolwise.data.tasks import resolve_tasks
            from poolwise.scoring.layers import untuned as view_untuned

            view = view_untuned(str(untuned), resolve_tasks(tasks or (), Path.cwd()))
        else:
            from poolwise.api import layers as view_layers

            view = view_layers(run, design=design, seed=seed, base=base, progress=_say)
    print(json.dumps(view, indent=1)) if as_json else show_layers(view, to)


@app.command()
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


def _say(line: str) -> None:
    print(redact(printable(line, keep=KEPT)), file=sys.stderr, flush=True)


def _shard(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise PoolwiseError(f"--shard {text!r}: give i/n with 1 <= i <= n, such as 2/8")
    return int(first), int(last)


def _quiet() -> None:
    """Keep progress bars and notices of the libraries out of the tables."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
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
