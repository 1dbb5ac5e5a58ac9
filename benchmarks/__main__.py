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
    "queries": "benchmarks.queries",
    "train": "benchmarks.train",
    "step": "benchmarks.step",
    "check": "benchmarks.check",
    "memory": "benchmarks.memory",
    "study": "benchmarks.study",
    "heads": "benchmarks.heads",
    "import": "benchmarks.imports",
    "gpu": "benchmarks.gpu",
    "type1": "benchmarks.type1",
}
"""Name -> module with `run() -> list[dict]` (see `measure`), imported when it is run; type1 reports for itself."""
PROGRAMS = ("type1",)
"""Benchmarks with a command line of their own: `python -m benchmarks type1 --quick`; run when named, alone."""

NEED_CUDA = ("gpu",)
"""Left out where there is no CUDA; refused when named there."""


def available() -> dict[str, str]:
    """The benchmarks whose module is there."""
    return {name: module for name, module in BENCHMARKS.items() if importlib.util.find_spec(module)}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in PROGRAMS:
        return importlib.import_module(BENCHMARKS[argv[0]]).main(argv[1:])
    there = available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(there))
    parser.add_argument("--json", action="store_true", help="one JSON line for each figure instead of a table")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in there or name in PROGRAMS]:
        parser.error(f"no benchmark {', '.join(unknown)}; choose from {', '.join(there)} (type1 alone)")
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch is imported
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from benchmarks.measure import matmul_peak, table

    cuda = torch.cuda.is_available()
    if not cuda and (named := [name for name in options.names if name in NEED_CUDA]):
        parser.exit(2, f"{parser.prog} {named[0]}: needs a CUDA GPU, and torch {torch.__version__} sees none here\n")
    failed = False
    usual = [name for name in there if name not in PROGRAMS and (cuda or name not in NEED_CUDA)]
    for name in options.names or usual:
        start = time.perf_counter()
        print(f"{name} …", file=sys.stderr, flush=True)
        figures = importlib.import_module(BENCHMARKS[name]).run()
        seconds = time.perf_counter() - start
        dtypes = () if name in NEED_CUDA else ("float32", "bfloat16")  # those measure their own device's
        peaks = {dtype: round(matmul_peak(dtype)) for dtype in dtypes}
        if options.json:
            for figure in figures:
                print(json.dumps({**figure, "matmul_gflops": peaks}), flush=True)
        else:
            print(
                f"{table([figure for figure in figures if 'failed' not in figure])}\n"
                f"{name}: {seconds:.0f} s; matmul peak of this process, GFLOP/s: {peaks}\n",
                flush=True,
            )
        for figure in figures:
            if "failed" in figure:
                print(f"{figure['name']} failed: {figure['failed']}", file=sys.stderr, flush=True)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
