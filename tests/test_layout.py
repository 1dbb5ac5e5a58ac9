"""The house keeps its floors: a file imports only from its own floor or lower ones, without cycles, and stays short."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "poolwise"
ROOMS = {path.name for path in SOURCE.iterdir() if path.is_dir()}
WHOLE = {"stats", "demo"}
"""Rooms that stand on one floor as a whole; the files of the others have a floor each."""
FLOORS = [
    "errors designs mistakes own recipe design grid tuning study results score_files rows long_table arms",
    "factor_levels factorial robustness recommendation origins budgets single_runs contrasts comparison looks",
    "item_sets paired stats rungs mechanism_items control_arms texts",
    "hub terminal attention layers masks packing layouts folding heads controls latent layer_poolings pooling testing",
    "inputs cost sources data batches folders in_memory tasks references tables wording plots pareto ranks_report",
    "side_report layers_report controls_report factors_report robustness_report tuning_report probing_report",
    "summary brief reports",
    "locks stamps base backbone frozen encoder tokens prefix last_layer adopted lighter encoding adapters",
    "checkpoint",
    "train inside probing evaluation items exporting ladder bulk",
    "preflight preparation trial layer_view engines runner search beside study_costs preview api starters demo serving",
    "screen cli",
]
"""File -> floor, the lowest first; lines that belong to one floor are listed in `SAME`."""
SAME = {0: range(3), 1: range(3, 7), 2: [7], 3: [8], 4: [9], 5: [10], 6: [11]}
FLOOR = {name: floor for floor, lines in SAME.items() for line in lines for name in FLOORS[line].split()}
HEAVY = {"torch", "mteb", "transformers", "sentence_transformers", "peft", "datasets", "polars", "matplotlib", "pandas"}
LAZY = {("data", "demo"), ("sources", "demo"), ("tasks", "demo"), ("base", "demo"), ("checkpoint", "exporting")}
"""Imports inside a function that look upstairs on purpose: the built-in data is found by name like any other."""


def standing(parts: tuple[str, ...]) -> str:
    """What stands on a floor: a file of the ground or of a room, or a room as a whole. `parts`: below `poolwise`."""
    inside = parts[0] in ROOMS - WHOLE and len(parts) > 1
    return parts[1 if inside else 0].removesuffix(".py")


def room(path: Path) -> str:
    return standing(path.relative_to(SOURCE).parts)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at import time) for every import of a file; those for type checkers only are left out."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(block)
    }
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "poolwise" or node.module.removeprefix("poolwise.") in ROOMS - WHOLE
            names = [f"{node.module}.{a.name}" if whole else node.module for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name, id(node) not in lazy) for name in names]
    return found


FILES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py" or path.parent.name in WHOLE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_file_keeps_its_floor(path: Path) -> None:
    mine = room(path)
    assert mine in FLOOR, f"{mine} has no floor: add it to FLOORS"
    for name, at_import in imports(path):
        parts = tuple(name.split("."))
        other = standing(parts[1:]) if parts[0] == "poolwise" and len(parts) > 1 else mine
        if other != mine and other in FLOOR:
            allowed = FLOOR[other] <= FLOOR[mine] or (not at_import and (mine, other) in LAZY)
            assert allowed, f"{mine} (floor {FLOOR[mine]}) imports {other} (floor {FLOOR[other]})"
        if parts[0] in HEAVY and FLOOR[mine] == 0:
            assert not at_import, f"{mine} is on floor 0 and imports {parts[0]} when it is imported"
    assert len(path.read_text().splitlines()) <= 350, "too long to read in one sitting"


def test_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        mine = room(path)
        ours = [name.split(".")[1:] for name, at_import in imports(path) if at_import and name.startswith("poolwise.")]
        names = {standing(tuple(parts)) for parts in ours}
        graph.setdefault(mine, set()).update(names & FLOOR.keys() - {mine})
    assert list(TopologicalSorter(graph).static_order())


def test_importing_is_light() -> None:
    """`import poolwise` and `poolwise --help` load neither torch nor mteb."""
    program = (
        "import sys, poolwise; from poolwise.cli import app; from typer.testing import CliRunner;"
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0 and 'compare' in result.output;"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
