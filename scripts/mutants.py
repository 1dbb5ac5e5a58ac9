"""Mutation testing with cosmic-ray: which wrong lines would no test notice? `make mutants`; hours, by hand.

    python scripts/mutants.py [PART …] [--sample N] [--json FILE]     PART: of a module's path, such as stats/

Each module of tests/mutants.toml is mutated in a copy of the repository, a sample of its mutants one after the other,
each against the tests named there. Prints a row per module and every survivor that is not listed with a reason.

cosmic-ray makes the mutants. The tests run in forked children of this process, which has imported torch and the other
libraries but nothing of poolwise: starting them anew for each mutant would take longer than most tests.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from _pytest.config import get_config as pytest_config

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    "hypothesis", "scipy.stats", "scipy.optimize", "pydantic", "typer", "rich.console", "torch", "peft",
    "transformers.models.llama.modeling_llama", "sentence_transformers",
)  # fmt: skip
"""What the tests import of others, but for polars (and mteb, which imports it): its threads do not survive a fork."""
OPERATORS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul)"
    r"|ReplaceComparisonOperator_(Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is|In_NotIn|NotIn_In)"
    r"|ReplaceUnaryOperator_(Delete_Not|Delete_USub)|NumberReplacer|ReplaceTrueWithFalse|ReplaceFalseWithTrue"
    r"|ReplaceAndWithOr|ReplaceOrWithAnd|AddNot|ZeroIterationForLoop)"
)
"""The operators that make wrong programs which still run; most others end in a TypeError that every test notices."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    plan = tomllib.loads((ROOT / "tests/mutants.toml").read_text(encoding="utf-8"))
    known = {(entry["path"], entry["becomes"]) for entry in plan.get("survivor", ())}
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing the plugins takes longer than most tests
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    for name in LIBRARIES:
        importlib.import_module(name)
    pytest_config()  # imports pytest's own plugins
    gc.freeze()  # pytest collects garbage, which need not be looked for in the libraries
    assert not any(name.partition(".")[0] == "poolwise" for name in sys.modules)
    records = []
    print(f"{'module':28} {'mutants':>8} {'killed':>7} {'listed':>7} {'survived':>9} {'seconds':>8}")
    for module in plan["module"]:
        if not given.parts or any(part in module["path"] for part in given.parts):
            record = mutate(module, given.sample or module.get("sample", plan["sample"]), plan["seed"], known)
            records.append(record)
            print("{module:28} {mutants:8} {killed:7} {listed:7} {survived:9} {seconds:8}".format(**record), flush=True)
            for diff in record["survivors"]:
                print(diff, flush=True)
            if given.json:
                given.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    mutants, killed, listed = (sum(record[key] for record in records) for key in ("mutants", "killed", "listed"))
    share = killed / max(1, mutants - listed)
    print(f"{'all':28} {mutants:8} {killed:7} {listed:7} {mutants - killed - listed:9}   {share:.1%} killed")
    sys.exit(mutants > killed + listed)


def mutate(module: dict[str, Any], sample: int, seed: int, known: set[tuple[str, str]]) -> dict[str, Any]:
    """Run a sample of the mutants of one module against its tests."""
    start, alive = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
        path = copy / "src/poolwise" / module["path"]
        source = path.read_text(encoding="utf-8")
        if not passes(copy, module, limit=1800):
            sys.exit(f"{module['path']}: its tests fail without any mutant")
        stale = Path(importlib.util.cache_from_source(str(path)))
        limit = 30 + 10 * (time.monotonic() - start)
        mutants = sampled(source, sample, random.Random(f"{seed} {module['path']}"))
        for mutant in mutants:
            path.write_text(mutant, encoding="utf-8")
            stale.unlink(missing_ok=True)  # two mutants may have the same size and second
            lives = passes(copy, module, limit)
            alive += [changed(source, mutant)] if lives else []
            print("!" if lives else ".", end="", file=sys.stderr, flush=True)
    new = [diff for diff in alive if (module["path"], diff.splitlines()[-1][1:].strip()) not in known]
    counts = {"mutants": len(mutants), "killed": len(mutants) - len(alive), "listed": len(alive) - len(new)}
    seconds = round(time.monotonic() - start)
    return {"module": module["path"], **counts, "survived": len(new), "survivors": new, "seconds": seconds}


def sampled(source: str, sample: int, chance: random.Random) -> list[str]:
    """A sample of the sensible mutants of a module's source, one for each place, less those that are no Python."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast(source)))
    places: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in sorted(filter(OPERATORS.fullmatch, operator_names())):
        positions = [position for node in nodes for position in get_operator(name)().mutation_positions(node)]
        for occurrence, (begin, _) in enumerate(positions):
            places.setdefault(begin, []).append((name, occurrence))
    chosen = [chance.choice(kinds) for kinds in chance.sample(sorted(places.values()), min(sample, len(places)))]
    made = [mutate_code(source, get_operator(name)(), occurrence) for name, occurrence in chosen]
    return [mutant for mutant in made if compiles(mutant)]


def compiles(source: str) -> bool:
    """Whether it is Python at all: a few operators do not know all of its grammar, and tests prove nothing there."""
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def passes(copy: Path, module: dict[str, Any], limit: float) -> bool:
    """Run the module's tests on the copy in a forked child; False if one fails or `limit` seconds are over."""
    child = os.fork()
    if not child:
        run_tests(copy, module)
    deadline, ended = time.monotonic() + limit, 0
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status == 0
            time.sleep(0.02)
        return False
    finally:
        if not ended:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def run_tests(copy: Path, module: dict[str, Any]) -> None:
    """Become a run of pytest on the copy and end with its exit status."""
    status = 1
    try:
        os.setsid()
        os.chdir(copy)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(copy / "src"), os.environ.get("PYTHONPATH", "")])
        sys.path.insert(0, str(copy / "src"))
        import hypothesis
        import pytest

        # One failing example is enough: it need not be made smaller.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutants", phases=phases, database=None)
        hypothesis.settings.load_profile("mutants")
        without = ["-k", f"not ({module['without']})"] if "without" in module else []
        tests = [f"tests/{name}" for name in module["tests"]]
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", *without, *tests]))
    finally:
        os._exit(status)


def changed(source: str, mutant: str) -> str:
    """The lines that differ."""
    lines = list(difflib.unified_diff(source.split("\n"), mutant.split("\n"), lineterm=""))[2:]
    return "\n".join(line for line in lines if line[:1] in "+-@")


if __name__ == "__main__":
    main()
