"""What a user waits for before anything happens: CPU seconds (user + system) of a fresh interpreter.

`import`: `import poolwise`; `import_help`: `poolwise --help`. The figures are seconds, Python's own start included
(it is given apart as `python`). Neither may load torch.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.measure import interleave, record

GOAL = 0.3
REPEATS = 15
LIGHT = "import sys; assert 'torch' not in sys.modules, 'torch was loaded'"
PROGRAMS = {
    "python": "pass",
    "import": f"import poolwise; {LIGHT}",
    "import_help": f"import atexit; atexit.register(lambda: exec({LIGHT!r})); "
    "import sys; sys.argv = ['poolwise', '--help']; from poolwise.cli import main; main()",
}


def children() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode or "AssertionError" in done.stderr:
        raise RuntimeError(done.stderr)


def run() -> list[dict[str, Any]]:
    """Medians and quartiles of interleaved starts; the first ones, which write bytecode, do not count."""
    variants = {name: lambda program=program: start(program) for name, program in PROGRAMS.items()}
    times = interleave(variants, REPEATS, clock=children)
    python = statistics.median(times.pop("python"))
    figures = []
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        figures.append(record(name, middle, low, high, GOAL, lower_is_better=True, unit="CPU seconds", python=python))
    return figures
