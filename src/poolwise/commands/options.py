"""Arguments and options that several commands take, and how commands speak: on stderr, without the libraries' noise."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from poolwise.errors import PoolwiseError, printable, redact, short
from poolwise.files import whole_number

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.")]
Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A study, a CSV or Parquet file of scores, or a folder of mteb results.")
]
Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE [RUN...]", help="As for `report`; or TREC runs, with --qrels."),
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


class Command(typer.core.TyperCommand):
    """A command whose usage line a reader can copy: `poolwise ab DATA MODEL_A MODEL_B [MODEL...] [OPTIONS]`.

    Brackets mean optional. Options without which the command does not run are in the line.
    """

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        for parameter in self.params:
            if parameter.param_type_name == "argument" and parameter.metavar is None:
                parameter.metavar = str(parameter.name).upper()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after the command's name."""
        arguments, needed = [], []
        for parameter in self.params:
            name = parameter.metavar or str(parameter.name).upper()
            if parameter.param_type_name == "argument":
                arguments.append(name if parameter.required else f"[{name}]")
            elif parameter.required:
                needed.append(f"{parameter.opts[0]} {name}")
        return [*arguments, *needed, "[OPTIONS]"]


KEPT = "\n\t"
"""Control characters that messages may contain; all others come from names and are escaped."""
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --to.")]


def say(line: str) -> None:
    print(redact(printable(line, keep=KEPT)), file=sys.stderr, flush=True)


def shard_of(text: str) -> tuple[int, int]:
    first, last = (whole_number(part) for part in text.partition("/")[::2])
    if first is None or last is None or not 1 <= first <= last:
        raise PoolwiseError(f"--shard {short(text)}: give i/n with 1 <= i <= n, such as 2/8")
    return first, last


def quiet() -> None:
    """Keep progress bars and notices of the libraries out of the tables."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()


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
