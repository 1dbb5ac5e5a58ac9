"""The documents agree with the program: every command and option, every field and default, every study in them.

`python tests/test_docs.py` rewrites `docs/cli.md`; with `run` it also runs its examples again (some CPU-minutes).
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from poolwise.cli import app
from poolwise.study.catalogue import POOLINGS
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe, Source, Tuning
from poolwise.study.study import Study

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
GROUP: Any = typer.main.get_command(app)
EXAMPLES = {
    "init": ["poolwise init demo"],
    "check": ["poolwise check first.toml"],
    "run": ["poolwise run first.toml"],
    "status": ["poolwise status first.toml"],
    "compare": ["poolwise compare scores.csv --baseline m1", "poolwise compare scores.csv --baseline m1 --json"],
    "report": ["poolwise report scores.csv --baseline m1 --to my-report"],
    "evaluate": ["poolwise evaluate bm25 --tasks demo/late-retrieval --json"],
    "ab": [],
    "probe": ["poolwise probe nano"],
    "layers": [],
    "export": ["poolwise export first.toml mean-bi --to my-embedder"],
    "encode": ["poolwise encode my-embedder texts.txt --to vectors.npy"],
    "serve": [],
    "demo": [],
}
"""What the page shows; `RERUN` are quick and depend on little, so the test runs them again."""
RERUN = ("poolwise init demo", "poolwise report scores.csv --baseline m1 --to my-report", "poolwise probe nano")
SHORTENED = 40
SCORES = "design,seed,task,task_type,metric,score\n" + "".join(
    f"{design},{seed},task-{task},STS,cosine_spearman,{start + 0.031 * task + 0.004 * seed:.3f}\n"
    for design, start in (("m1", 0.60), ("m5", 0.62))
    for seed in (0, 1)
    for task in range(6)
)
INTRO = """\
# Commands

Every command lists its arguments with `--help`. Tables go to stdout, progress and notes to stderr; with `--json` stdout
contains JSON alone. Exit codes: 0 done, 1 some trials failed, 2 a mistake in the input (with a message, without a
traceback), 130 stopped by Ctrl-C. The outputs on this page are real; `python tests/test_docs.py run` reproduces them.
`first.toml` is the small study of [study-file.md](study-file.md), and `scores.csv` a table of the form

```csv
design,seed,task,task_type,metric,score
m1,0,task-0,STS,cosine_spearman,0.600
```
"""


def options(name: str) -> str:
    """The table of a command's arguments and options, as typer knows them."""
    rows = ["| argument, option | default | meaning |", "|---|---|---|"]
    for parameter in GROUP.commands[name].params:
        if parameter.name == "help":
            continue
        argument = not parameter.opts[0].startswith("-")
        label = parameter.metavar or parameter.name.upper() if argument else parameter.opts[0]
        default = "none" if parameter.default is None else f"`{json.dumps(parameter.default, default=str)}`"
        default = "required" if parameter.required else default
        rows.append(f"| `{label.replace('|', ' or ')}` | {default} | {(parameter.help or '').replace('|', ' or ')} |")
    return "\n".join(rows)


def page(outputs: dict[str, str]) -> str:
    """`docs/cli.md` with these outputs."""
    parts = [INTRO]
    for name, command in GROUP.commands.items():
        parts.append(f"## `poolwise {name}`\n\n{command.help.strip()}\n\n{options(name)}\n")
        parts += [f"```console\n$ {line}\n{outputs[line]}```\n" for line in EXAMPLES[name]]
    return "\n".join(parts)


def execute(line: str, folder: Path) -> str:
    """What a command prints on stdout; long outputs are shortened, paths made relative to `folder`."""
    program = [sys.executable, "-c", "from poolwise.cli import main; main()"]
    done = subprocess.run([*program, *shlex.split(line)[1:]], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [row.rstrip() for row in done.stdout.replace(f"{folder}/", "").splitlines()]
    lines = [*lines[:SHORTENED], "..."] if len(lines) > SHORTENED else lines
    return "\n".join(lines) + "\n"


def prepare(folder: Path) -> Path:
    """The folder in which the examples are run."""
    (folder / "first.toml").write_text(first_study())
    (folder / "scores.csv").write_text(SCORES)
    (folder / "texts.txt").write_text("The ferry takes forty minutes.\nThe heron waits for a fish.\n")
    return folder


def first_study() -> str:
    return next(text for path, text in blocks("toml") if path.name == "study-file.md")


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for path in PAGES:
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S):
            if match[1] == language:
                yield path, match[2]


def shown() -> dict[str, str]:
    """Command line -> output, as they stand in `docs/cli.md`."""
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    return {m[1]: m[2] for m in re.finditer(r"^```console\n\$ (poolwise .*)\n((?:.*\n)*?)```", text, re.M)}


def test_every_command_has_help_and_a_section() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `poolwise (.*)`", text, re.M) == list(GROUP.commands)
    for name, command in GROUP.commands.items():
        assert (command.help or "").strip(), name
        for parameter in command.params:
            assert (parameter.help or "").strip(), f"{name}: {parameter.name}"


def test_page_is_what_the_program_says() -> None:
    """Words, arguments, options, defaults: all but the outputs is written from typer's own knowledge."""
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == page(shown())


@pytest.mark.parametrize("line", RERUN)
def test_example_again(line: str, tmp_path: Path) -> None:
    assert execute(line, prepare(tmp_path)) == shown()[line]


def test_every_command_line_in_the_documents_is_legal() -> None:
    """`poolwise …` in any block of any page names a command and options that exist."""
    seen = 0
    for path, text in [*blocks("console"), *blocks("sh"), *blocks("bash"), *blocks("")]:
        for line in text.splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True) if "poolwise " in line else []
            if words[:1] != ["poolwise"] or len(words) < 2 or words[1].startswith("-"):
                continue
            assert words[1] in GROUP.commands, f"{path.name}: {line}"
            GROUP.commands[words[1]].make_context(words[1], words[2:])  # raises on what typer would refuse
            seen += 1
    assert seen >= len(EXAMPLES) - 1


def test_every_study_in_the_documents_is_valid() -> None:
    studies = [(path, text) for path, text in blocks("toml") if "[[designs]]" in text]
    assert len(studies) >= 2
    for path, text in studies:
        if "allow_code = true" in text:
            continue  # test_own_pooling writes the module beside it and runs it
        Study.parse(tomllib.loads(text), where=path.name)


ARGUMENTS = {name for spec in POOLINGS.values() for name in spec.args}


def tables() -> dict[str, dict[str, str]]:
    """Heading -> field -> default of each table in `docs/study-file.md`; the poolings' arguments by whose they are."""
    found: dict[str, dict[str, str]] = {}
    heading = ""
    for line in (DOCS / "study-file.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.strip("# `[]")
        cells = [cell.strip("| ") for cell in line.split(" | ")]
        if line.startswith("| `") and len(cells) == 4:
            name = cells[0].strip("`")
            of_pooling = heading == "designs" and name in ARGUMENTS
            found.setdefault(cells[2] if of_pooling else heading, {})[name] = cells[1] if of_pooling else cells[2]
    return found


@pytest.mark.parametrize(
    ("heading", "model", "words"),
    [
        (
            "Top level",
            Study,
            {"tuning": "none", "recipe": "all defaults", "output": "none", "extend_to": "none", "type_weights": "none"},
        ),
        ("recipe", Recipe, {"dataset": "none", "guide": "none", "lora": "the defaults below"}),
        ("recipe.lora", Lora, {}),
        ("recipe.sources", Source, {}),
        ("tuning", Tuning, {}),
        (
            "designs",
            Design,
            {
                "name": "the preset, or `POOLING-ATTENTION`",
                "attention": "required without a preset",
                "pooling": "required without a preset",
                "preset": "none",
            },
        ),
    ],
)
def test_fields_and_defaults(heading: str, model: Any, words: dict[str, str]) -> None:
    """`words` are the defaults that are said in words."""
    expected = {}
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        expected[name] = words.get(name) or ("required" if field.is_required() else f"`{json.dumps(default)}`")
    assert tables()[heading] == expected


def test_pooling_arguments_and_defaults() -> None:
    listed: dict[str, dict[str, str]] = {pooling: {} for pooling in POOLINGS}
    for of, arguments in tables().items():
        for pooling in re.findall(r"`(\w+)`", of):
            listed[pooling].update(arguments)
    for pooling, spec in POOLINGS.items():
        assert listed[pooling] == {name: f"`{json.dumps(argument.default)}`" for name, argument in spec.args.items()}


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        with tempfile.TemporaryDirectory() as scratch:
            place = prepare(Path(scratch).resolve())
            results = {line: execute(line, place) for lines in EXAMPLES.values() for line in lines}
    else:
        results = shown()
    (DOCS / "cli.md").write_text(page(results), encoding="utf-8")
