"""python -m benchmarks [NAME …] [--json]: all benchmarks, or those named; a table, or one JSON line for each figure."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence

BENCHMARKS = {
    "head": "benchmarks.head",
    "encode": "benchmarks.encode",
    "host": "benchmarks.host",
    "queries": "benchmarks.queries",
    "train": "benchmarks.train",
    "step": "benchmarks.step",
    "check": "benchmarks.check",
    "memory": "benchmarks.memory",
    "study": "benchmarks.study",
    "serve": "benchmarks.serve",
    "heads": "benchmarks.heads",
    "import": "benchmarks.imports",
    "gpu": "benchmarks.gpu",
    "type1": "benchmarks.type1",
}
"""Name -> module with `run() -> list[dict]` (see `measure`), imported when it is run; type1 reports for itself."""
PROGRAMS = ("gpu", "type1")
"""Benchmarks with a command line of their own, such as `python -m benchmarks gpu encode`: run when named, alone."""


def available() -> dict[str, str]:
    """The benchmarks whose module is there."""
    return {name: module for name, module in BENCHMARKS.items() if importlib.util.find_spec(module)}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] != ["type1"]:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch is imported
            os.environ.setdefault(variable, "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if argv and argv[0] in PROGRAMS:
        return importlib.import_module(BENCHMARKS[argv[0]]).main(argv[1:])
    there = [name for name in available() if name not in PROGRAMS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(there)}; alone: {', '.join(PROGRAMS)}")
    parser.add_argument("--json", action="store_true", help="one JSON line for each figure instead of a table")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in there]:
        parser.error(
            f"no benchmark {', '.join(unknown)}; choose from {', '.join(there)} (alone: {', '.join(PROGRAMS)})"
        )
    from benchmarks.measure import matmul_peak, table

    for name in options.names or there:
        start = time.perf_counter()
        print(f"{name} …", file=sys.stderr, flush=True)
        figures = importlib.import_module(BENCHMARKS[name]).run()
        seconds = time.perf_counter() - start
        peaks = {dtype: round(matmul_peak(dtype)) for dtype in ("float32", "bfloat16")}
        if options.json:
            for figure in figures:
                print(json.dumps({**figure, "matmul_gflops": peaks}), flush=True)
        else:
            print(
                f"{table(figures)}\n{name}: {seconds:.0f} s; matmul peak of this process, GFLOP/s: {peaks}\n",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
