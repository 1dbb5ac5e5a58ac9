"""The house keeps its shape: one rank per folder, imports only downwards, no circle, one owner for each concern.

`python tests/test_layout.py` prints the import graph that these tests read, folder by folder.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "poolwise"
RANKS = [
    "errors",
    "files",
    "stats",
    "demo",
    "study",
    "data",
    "verdicts",
    "reports",
    "pooling",
    "model",
    "encoding",
    "scoring",
    "runs",
    "api",
    "screen",
    "commands",
    "cli",
]
"""Folders and the files of the ground floor, the lowest first. A file imports from its own folder or from lower ranks;
lazy imports and those for type checkers count like any other."""
GROUND = {"__init__", "errors", "files", "api", "screen", "cli"}
PUBLIC = {"build", "check", "compare", "encode", "evaluate", "export", "layers", "load", "probe", "report", "run"}
SHORTEST, LONGEST = 60, 450
HEAVY = {"torch", "mteb", "transformers", "sentence_transformers", "peft", "datasets", "polars", "matplotlib", "pandas"}
LIGHT = {"errors", "files", "stats", "demo", "study", "data", "verdicts", "reports"}
"""Ranks whose files load none of `HEAVY` when they are imported: all that is right of the long table works without."""

MODULES = {
    "poolwise." + ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.name != "__init__.py"
}
PACKAGES = {"poolwise." + path.parent.name: path for path in sorted(SOURCE.glob("*/__init__.py"))}
FILES = {**MODULES, **PACKAGES}


def rank(module: str) -> int:
    return RANKS.index(module.split(".")[1])


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> list[tuple[str, str, int]]:
    """(module of poolwise, name taken from it, line) of every import of a file, lazy and typing ones included."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "poolwise":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                module, name = (whole, "") if whole in FILES else (node.module or "", alias.name)
                if module != "poolwise":
                    found.append((module, name, node.lineno))
        elif isinstance(node, ast.Import):
            found += [(alias.name, "", node.lineno) for alias in node.names if alias.name in FILES]
    return found


def graph() -> dict[str, set[str]]:
    """Module -> the modules of poolwise that it imports."""
    return {name: {module for module, _, _ in imported(path)} - {name} for name, path in FILES.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of two modules or more."""

    def reached(start: str) -> set[str]:
        seen, left = set[str](), [start]
        while left:
            new = edges.get(left.pop(), set()) - seen
            seen |= new
            left += new
        return seen

    reach = {name: reached(name) for name in edges}
    groups = {tuple(sorted(b for b in edges if b in reach[a] and a in reach[b])) for a in edges if a in reach[a]}
    return [list(group) for group in sorted(groups)]


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name: str) -> None:
    for module, _, line in imported(FILES[name]):
        assert module in FILES, f"{name}:{line} imports {module}, which is no file of the package"
        same = module.split(".")[1] == name.split(".")[1]
        assert same or rank(module) < rank(name), f"{name}:{line} imports upwards: {module}"


def test_no_circle_between_files() -> None:
    assert circles(graph()) == []


def test_the_circle_finder_finds_circles() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}
    assert circles(edges) == [["a", "b", "c"], ["e"]]


def test_the_ground_floor() -> None:
    """Six files; none shares a noun with a folder, and no folder or file there hides a public function."""
    ground = {path.stem for path in SOURCE.glob("*.py")}
    folders = {path.parent.name for path in PACKAGES.values()}
    assert ground == GROUND
    assert folders | ground - {"__init__"} == set(RANKS)
    assert not {name.rstrip("s") for name in ground} & {name.rstrip("s") for name in folders}
    assert not (folders | ground) & PUBLIC


@pytest.mark.parametrize("name", MODULES)
def test_files_are_read_in_one_sitting(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert SHORTEST <= lines <= LONGEST, f"{name} has {lines} lines"


def test_the_number_of_files() -> None:
    assert len(MODULES) <= 86


@pytest.mark.parametrize("name", FILES)
def test_private_names_stay_in_their_file(name: str) -> None:
    for module, taken, line in imported(FILES[name]):
        assert not taken.startswith("_"), f"{name}:{line} takes {taken} from {module}"
    text = FILES[name].read_text(encoding="utf-8")
    for alias in {taken or module.rpartition(".")[2] for module, taken, _ in imported(FILES[name])}:
        found = re.search(rf"(?<![\w.\"'`]){alias}\._[a-z]\w*", text)
        assert found is None, f"{name} uses {found and found.group()}"


def names_used(path: Path) -> set[str]:
    """Every attribute, name and imported module of a file."""
    found = set[str]()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
            found |= {alias.name for alias in node.names}
    return found


def owners(*names: str) -> set[str]:
    return {name for name, path in FILES.items() if names_used(path) & set(names)}


def test_one_owner_for_each_concern() -> None:
    assert owners("mkstemp", "fsync", "NamedTemporaryFile") == {"poolwise.files"}, "only files.py writes atomically"
    assert owners("csv", "gzip") == {"poolwise.data.reading"}, "only data/reading.py reads CSV and gzip"


def spelled(path: Path) -> set[str]:
    """What a file spells of a run folder: a file's name, a folder's name joined to a path, or a piece of either."""
    body = tree(path)
    names = "study|trials|looks|costs|versions|spec|dtype|train|ladder|layers|work|failed"
    files = rf"({names})\.json|results\.parquet|log\.txt"
    pieces = r"(checkpoint|step|prepared)-.*|.*\b(trials|training|scores|frozen)/.*"
    joined = {"trials", "training", "scores", "frozen", "search", "tuned", "done"}
    texts = {node.value for node in ast.walk(body) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    found = {text for text in texts if re.fullmatch(f"{files}|{pieces}", text)}
    for node in ast.walk(body):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            found |= {node.right.value} & joined
    return found


def test_only_the_layout_spells_the_paths_of_a_run_folder() -> None:
    found = {name: sorted(spelled(path)) for name, path in MODULES.items() if spelled(path)}
    layout = found.pop("poolwise.runs.layout")
    assert found == {}
    assert {"study.json", "trials", "step-", "checkpoint-*", "scores/", "failed.json"} <= set(layout)


def test_reports_compute_nothing() -> None:
    for name, path in MODULES.items():
        if name.startswith("poolwise.reports."):
            modules = {module.split(".")[1] for module, _, _ in imported(path)}
            assert not modules & {"stats", "runs"}, f"{name} imports {modules & {'stats', 'runs'}}"
            assert "scipy" not in names_used(path), f"{name} imports scipy"


def test_poolings_are_told_apart_by_their_declaration() -> None:
    """No `if pooling == "…"` outside `pooling/`: what a pooling needs is declared in the catalogue."""
    for name, path in MODULES.items():
        if name.startswith("poolwise.pooling."):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                named = any(getattr(side, "attr", getattr(side, "id", "")) == "pooling" for side in sides)
                word = any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in sides)
                assert not (named and word), f"{name}:{node.lineno} {ast.unparse(node)}"


@pytest.mark.parametrize("name", [name for name in FILES if name.split(".")[1] in LIGHT])
def test_light_files_load_no_model_library(name: str) -> None:
    body = tree(FILES[name]).body
    at_import = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in at_import:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        assert not {module.split(".")[0] for module in modules} & HEAVY, f"{name}:{node.lineno}"


def test_importing_is_light() -> None:
    """`import poolwise` and `poolwise --help` load neither torch nor mteb."""
    program = (
        "import sys, poolwise; from poolwise.cli import app; from typer.testing import CliRunner;"
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0 and 'compare' in result.output;"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":
    edges = graph()
    for folder in reversed(RANKS):
        mine = [name for name in edges if name.split(".")[1] == folder]
        below = sorted({module.split(".")[1] for name in mine for module in edges[name]} - {folder}, key=RANKS.index)
        print(f"{folder:9} {len(mine):3} files -> {' '.join(reversed(below))}")
    print(f"{len(MODULES)} files, {sum(map(len, edges.values()))} imports, {len(circles(edges))} circles")
