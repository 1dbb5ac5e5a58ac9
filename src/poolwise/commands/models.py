"""The commands about one model or several: score, compare, look inside, write, encode, serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from poolwise.commands.options import Dtype, Force, Json, StudyFile, quiet, say, stdout_to_stderr
from poolwise.errors import PoolwiseError
from poolwise.files import check_place


def evaluate(
    model: Annotated[str, typer.Argument(help="A sentence-transformers model, by name or folder, or a run folder.")],
    tasks: Annotated[list[str], typer.Option(metavar="TASK", help="Task, benchmark or folder; repeat for more.")],
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
    quiet()
    from poolwise.api import evaluate as score
    from poolwise.screen import show_scores

    with stdout_to_stderr():  # what libraries print must not mix with the JSON
        rows = score(
            model, tasks, batch_size=batch_size, dtype=dtype, template=template and template.replace("\\n", "\n"),
            max_length=max_length, release=release, base=base, note=lambda line: say(f"note: {line}"),
        )  # fmt: skip
    print(json.dumps(rows, indent=1)) if as_json else show_scores(rows)


def ab(
    data: Annotated[Path, typer.Argument(help="A retrieval folder; or a CSV or folder of pairs or labelled texts.")],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_A MODEL_B [MODEL...]",
            help="The model in use, then its rivals: each a folder, a Hub name, tfidf, bm25 or STUDY.toml:DESIGN.",
        ),
    ],
    margin: Annotated[float, typer.Option(help="The smallest difference that matters, in points.")] = 1.0,
    to: Annotated[Path | None, typer.Option(help="Folder of ab.html, .md and .json; NAME-ab beside the data.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of kept embeddings; .poolwise beside the data.")] = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Switch or stay: compare models on your own data; the first is the one in use."""
    check_place(to)
    quiet()
    from poolwise.reports.ab import render
    from poolwise.runs.ab import ab as compare_models
    from poolwise.screen import show_ab

    with stdout_to_stderr():
        if not 0 < margin < 100:
            raise PoolwiseError(f"--margin {margin:g}: give points, above 0 and below 100")
        result = compare_models(data, models, margin=margin / 100, dtype=dtype, cache=cache, say=say)
    place = to or Path(result["data"]).parent / f"{result['name']}-ab"
    paths = render(result, " ".join(["poolwise ab", str(data), *models, f"--margin {margin:g}"]), place)
    print(json.dumps(result, indent=1)) if as_json else show_ab(result)
    for path in paths:
        say(str(path.resolve()))


def probe(
    model: Annotated[str, typer.Argument(help="A causal LM: `nano`, a folder or a Hub name.")], as_json: Json = False
) -> None:
    """Show which tokens see which, and whether the model supports both attention modes."""
    if model.endswith(".toml"):
        raise PoolwiseError(f"{model} is a study file; give a base model: `nano`, a folder or a Hub name")
    quiet()
    from poolwise.model.attention import verdict
    from poolwise.model.base import load_base
    from poolwise.screen import show_probe

    with stdout_to_stderr():
        result = verdict(load_base(model))
    print(json.dumps(result, indent=1)) if as_json else show_probe(model, result)


def export(
    study: StudyFile,
    design: Annotated[str, typer.Argument(help="Name of the design.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write.")],
    seed: Annotated[int | None, typer.Option(help="Seed of the run; the study's first by default.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model of the run; the study's first by default.")] = None,
    force: Force = False,
) -> None:
    """Write a trained design as a sentence-transformers folder, LoRA merged."""
    from poolwise.study.study import Study

    loaded = Study.load(study)
    exported = loaded.design(design)
    check_place(to, force, "exists and is not empty")
    quiet()
    from poolwise.api import export_design
    from poolwise.encoding.fast import MASKED

    print(export_design(loaded, design, to, seed, base, force))
    if exported.spec.reads_padding(exported.factors()):
        say(f"note: {MASKED}")


def encode(
    model: Annotated[str, typer.Argument(help="A trial's or an exported folder, or a sentence-transformers name.")],
    texts: Annotated[Path, typer.Argument(help="A .txt, one text a line; a .jsonl, .csv, .tsv or .parquet.")],
    to: Annotated[Path, typer.Option(metavar="FILE", help="NumPy file to write, such as vectors.npy.")],
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
    quiet()
    from poolwise.encoding.encode import encode_file

    side = {True: "query", False: "document", None: None}[query]
    with stdout_to_stderr():
        path = encode_file(model, texts, to, prompt=prompt, side=side, field=field, dtype=dtype, say=say)
    print(path)


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
    quiet()
    try:
        from poolwise.encoding.server import serve as serve_forever
    except ModuleNotFoundError as error:
        raise PoolwiseError(f"serving needs {error.name!r}; install it: pip install 'poolwise[serve]'") from None

    serve_forever(model, host, port, say=say, dtype=dtype, names=name or (), hosts=allow_host or ())


def layers(
    run: Annotated[
        str | None, typer.Argument(metavar="STUDY.toml", help="A study, its run folder, or one trial's.")
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
    quiet()
    from poolwise.screen import show_layers

    with stdout_to_stderr():
        if run is None or untuned:
            from poolwise.data.tasks import resolve_tasks
            from poolwise.scoring.layers import untuned as view_untuned

            view = view_untuned(str(untuned), resolve_tasks(tasks or (), Path.cwd()))
        else:
            from poolwise.api import layers as view_layers

            view = view_layers(run, design=design, seed=seed, base=base, progress=say)
    print(json.dumps(view, indent=1)) if as_json else show_layers(view, to)
