"""Mutation testing with cosmic-ray: which wrong lines would no test notice? `make mutants`; hours, by hand.

    python scripts/mutants.py [PART …] [--sample N] [--json FILE]     PART: of a module's path, such as stats/

Each module of tests/mutants.toml is mutated in a copy of the repository, a sample of its mutants one after the other,
each against the tests named there. Prints a row per module and every survivor that is not listed with a reason.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult

ROOT = Path(__file__).parents[1]
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
    sample, records = given.sample or plan["sample"], []
    print(f"{'module':28} {'mutants':>8} {'killed':>7} {'listed':>7} {'survived':>9}")
    for module in plan["module"]:
        if not given.parts or any(part in module["path"] for part in given.parts):
            record = mutate(module, sample, plan["seed"], known)
            records.append(record)
            print("{module:28} {mutants:8} {killed:7} {listed:7} {survived:9}".format(**record), flush=True)
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
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        tests = " ".join(f"tests/{name}" for name in module["tests"])
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"
        path = f"src/poolwise/{module['path']}"
        Path(copy, "cr.toml").write_text(
            f'[cosmic-ray]\nmodule-path = "{path}"\ntimeout = 600.0\nexcluded-modules = []\n'
            f'test-command = "{command}"\n[cosmic-ray.distributor]\nname = "local"\n',
            encoding="utf-8",
        )
        paths = os.pathsep.join([str(copy / "src"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
        tool = [sys.executable, "-m", "cosmic_ray.cli"]
        subprocess.run(command.split(), cwd=copy, env=environment, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*tool, "init", "cr.toml", "cr.sqlite"], cwd=copy, env=environment, check=True)
        with use_db(str(copy / "cr.sqlite"), WorkDB.Mode.open) as database:
            keep_a_sample(database, sample, random.Random(f"{seed} {module['path']}"))
        subprocess.run([*tool, "exec", "cr.toml", "cr.sqlite"], cwd=copy, env=environment, check=True)
        with use_db(str(copy / "cr.sqlite"), WorkDB.Mode.open) as database:
            results = [result for _, result in database.results if result.worker_outcome != WorkerOutcome.SKIPPED]
    alive = [changed(result.diff or "") for result in results if not result.is_killed]
    new = [diff for diff in alive if (module["path"], diff.splitlines()[-1][1:].strip()) not in known]
    counts = {"mutants": len(results), "killed": len(results) - len(alive), "listed": len(alive) - len(new)}
    return {"module": module["path"], **counts, "survived": len(new), "survivors": new}


def keep_a_sample(database: WorkDB, sample: int, chance: random.Random) -> None:
    """Skip all mutants but a sample of the sensible ones, one for each place."""
    items = sorted(database.work_items, key=lambda item: (item.mutations[0].start_pos, item.mutations[0].operator_name))
    places: dict[tuple[int, int], list[str]] = {}
    for item in items:
        (mutation,) = item.mutations
        if OPERATORS.fullmatch(mutation.operator_name):
            places.setdefault(mutation.start_pos, []).append(item.job_id)
    kept = {chance.choice(jobs) for jobs in chance.sample(sorted(places.values()), min(sample, len(places)))}
    skipped = [item.job_id for item in items if item.job_id not in kept]
    database.set_multiple_results(skipped, WorkResult(WorkerOutcome.SKIPPED))


def changed(diff: str) -> str:
    """The lines of a diff that change."""
    lines = [line for line in diff.splitlines() if line[:1] in "+-@" and not line.startswith(("+++", "---"))]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
