"""What all benchmarks share: interleaved repeats, medians with their spread, records, the matmul peak of the run.

A benchmark is a module with a function `run() -> list[dict]`; each dict is made by `record` or `ratio_record`.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DRAWS = 2000  # of the bootstrap


def wall() -> float:
    """Wall-clock seconds, after the GPU has finished what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def hardware() -> tuple[str, Callable[[], float]]:
    """The device that a benchmark runs on, and the clock for it: `wall` on a GPU, CPU time elsewhere."""
    import torch

    return ("cuda", wall) if torch.cuda.is_available() else ("cpu", time.process_time)


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each call, by variant: `repeats` rounds, in each of which every variant runs once.

    The order turns from round to round, so that no variant always follows the same one. The default clock is the CPU
    time of this process (all threads), which a busy machine moves least; give `wall` on a GPU and wherever threads
    are the point. `warmup` rounds come first and are not counted.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            variants[name]()
            seconds = clock() - start
            if turn >= 0:
                times[name].append(seconds)
    return times


def record(
    name: str,
    ratio: float,
    low: float,
    high: float,
    goal: float | None,
    *,
    agreement: float | None = None,
    lower_is_better: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """One figure: a ratio with its interval and its goal, how far the two results differ, and further facts.

    `agreement`: 1 − cosine, or the largest relative deviation (say which in `facts`), None where nothing is compared.
    """
    return {
        "name": name,
        "ratio": ratio,
        "low": low,
        "high": high,
        "goal": goal,
        "lower_is_better": lower_is_better,
        "agreement": agreement,
        **facts,
    }


def ratio_record(
    name: str,
    slow_times: Sequence[float],
    fast_times: Sequence[float],
    goal: float | None,
    *,
    agreement: float | None = None,
    lower_is_better: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Median of the slow times / median of the fast ones (the other way round if `lower_is_better`).

    The i-th times of both belong to one round of `interleave`. The interval is the percentile bootstrap over rounds,
    95 %: with fewer than about ten rounds it is close to the range, and no confidence should be read into it.
    """
    above, below = (fast_times, slow_times) if lower_is_better else (slow_times, fast_times)
    rounds = list(zip(above, below, strict=True))
    generator = random.Random(0)
    draws = sorted(_ratio(generator.choices(rounds, k=len(rounds))) for _ in range(DRAWS))
    return record(
        name,
        _ratio(rounds),
        draws[round(0.025 * DRAWS)],
        draws[round(0.975 * DRAWS) - 1],
        goal,
        agreement=agreement,
        lower_is_better=lower_is_better,
        slow_seconds=statistics.median(slow_times),
        fast_seconds=statistics.median(fast_times),
        rounds=len(rounds),
        **facts,
    )


def _ratio(rounds: Sequence[tuple[float, float]]) -> float:
    return statistics.median(a for a, _ in rounds) / statistics.median(b for _, b in rounds)


def matmul_peak(dtype: str = "float32", device: str = "cpu") -> float:
    """GFLOP/s of the best of ten large square matrix products here and now: what times are to be read against."""
    import torch

    size, clock = (8192, wall) if device == "cuda" else (1024, time.process_time)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = interleave({"matmul": lambda: a @ b}, 10, warmup=2, clock=clock)["matmul"]
    return 2 * size**3 / max(min(times), 1e-9) / 1e9


def extra_memory(call: Callable[[], Any]) -> float:
    """MiB that one call needs at its peak beyond what is held before it; it is run once before, uncounted.

    On a GPU what torch allocates, else the growth of this process's resident memory, whose peak Linux can reset.
    """
    import torch

    call()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what the call needs
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return (_resident("VmHWM") - before) / 2**10


def _resident(kind: str) -> int:
    """VmRSS or VmHWM of this process, KiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0])


def deviation(ours: Any, theirs: Any) -> float:
    """Largest relative deviation of two tensors of vectors (B, D): max over rows of |ours − theirs| / |theirs|."""
    ours, theirs = ours.double(), theirs.double()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def angle(ours: Any, theirs: Any) -> float:
    """Largest 1 − cosine between the rows of two tensors (B, D), taken in fp64."""
    import torch

    return float((1 - torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1)).max())


def reached(figure: Mapping[str, Any]) -> bool | None:
    """Whether the goal is met by the median; None without a goal."""
    if figure["goal"] is None:
        return None
    return figure["ratio"] <= figure["goal"] if figure["lower_is_better"] else figure["ratio"] >= figure["goal"]


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Records as lines of text; intervals are those of `ratio_record`, or as the benchmark says."""
    lines = [f"{'name':<22}{'ratio':>9}  {'interval':<18}{'goal':>9}  {'':<8}{'agreement':>10}"]
    for f in figures:
        goal = "–" if f["goal"] is None else f"{'≤' if f['lower_is_better'] else '≥'} {f['goal']:.3g}"
        verdict = {True: "reached", False: "missed", None: ""}[reached(f)]
        agreement = "–" if f["agreement"] is None else f"{f['agreement']:.1e}"
        interval = f"{f['low']:.3g} … {f['high']:.3g}"
        lines.append(f"{f['name']:<22}{f['ratio']:>9.3g}  {interval:<18}{goal:>9}  {verdict:<8}{agreement:>10}")
    return "\n".join(lines)
