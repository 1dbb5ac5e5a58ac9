"""What a device gives: matrix products, copies, launches, the products of a decoder layer, packed attention; and where
the time of a call goes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from benchmarks.device import Figures, Job, fastest
from benchmarks.measure import deviation, ratio_record, record, wall
from poolwise.model import packing


def limits(job: Job) -> Figures:
    """The roofline: products, copies, launches; and what the model's own products allow."""

    def product(rows: int, inner: int, columns: int) -> float:
        a, b = (torch.randn(s, device=job.device, dtype=torch.bfloat16) for s in ((rows, inner), (inner, columns)))
        return fastest(lambda: a @ b)

    squares = {size: 2 * size**3 / product(size, size, size) / 1e12 for size in job.sizes.squares}
    job.matmul = max(squares.values())
    share = job.matmul / job.sheet[0] if job.sheet else 1.0
    by_size = {str(size): round(rate, 1) for size, rate in squares.items()}
    yield record("gpu_matmul", share, share, share, None, device=job.device_name, tflops=by_size, sheet=job.sheet)
    a = torch.empty(job.sizes.copied, dtype=torch.uint8, device=job.device)
    b = torch.empty_like(a)
    rate = 2 * len(a) / fastest(lambda: b.copy_(a), 10) / 1e12
    share = rate / job.sheet[1] if job.sheet else 1.0
    yield record("gpu_copy", share, share, share, None, terabytes_per_second=rate, sheet=job.sheet)
    few = a[:8]
    micros = 1e6 * fastest(lambda: few.add_(1), 1000)
    yield record("gpu_launch", micros, micros, micros, None, lower_is_better=True, unit="microseconds")
    base, tokens = job.sizes.base, job.sizes.tokens
    width, inner = base["hidden_size"], base["intermediate_size"]
    keys = width * base["num_key_value_heads"] // base["num_attention_heads"]
    shapes = [*[(width, width), (width, keys), (width, inner)] * 2, (inner, width)]  # q o, k v, gate up, down
    seconds = {shape: product(tokens, *shape) for shape in set(shapes)}
    flops = {shape: 2 * tokens * shape[0] * shape[1] for shape in set(shapes)}
    rate = sum(flops[shape] for shape in shapes) / sum(seconds[shape] for shape in shapes) / 1e12
    bound = rate / (job.sheet[0] if job.sheet else job.matmul)
    intensity = {f"{n}x{m}": round(n * m * tokens / (tokens * (n + m) + n * m)) for n, m in set(shapes)}
    yield record(
        "gpu_layer_bound", bound, bound, bound, None, tflops=rate, tokens=tokens, flops_per_byte=intensity,
        tflops_by_shape={f"{n}x{m}": round(flops[n, m] / seconds[n, m] / 1e12, 1) for n, m in seconds},
        balance=None if job.sheet is None else round(job.sheet[0] / job.sheet[1]),
    )  # fmt: skip


def kernel(job: Job) -> Figures:
    """Packed attention by torch's FlashAttention and by SDPA over runs: numbers, gradients, seconds."""
    base = job.sizes.base
    heads, kept = base["num_attention_heads"], base["num_key_value_heads"]
    size = base["hidden_size"] // heads
    lengths = sorted(np.random.default_rng(0).integers(1, 129, job.sizes.tokens // 64).tolist(), reverse=True)
    states = [
        torch.randn(1, h, sum(lengths), size, device=job.device, dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, kept, kept)
    ]
    module = torch.nn.Module()
    for causal in (True, False):
        found, seconds = {}, {}
        for name in ("runs", "kernel"):
            segments = packing.Segments(lengths, torch.device(job.device))
            used = segments.kernel = segments.kernel and name == "kernel"
            call = functools.partial(
                packing.packed_attention, module, *states, None, size**-0.5, is_causal=causal, segments=segments
            )
            out = call()[0]
            gradients = torch.autograd.grad(out.float().square().sum(), states)
            found[name] = [part.detach().flatten().float() for part in (out, *gradients)]
            seconds[name] = [fastest(call, 3, 1) for _ in range(3)]
        agreement = deviation(*(torch.stack([torch.cat(found[name])]) for name in ("kernel", "runs")))
        yield ratio_record(
            f"gpu_varlen_{'causal' if causal else 'bidirectional'}", seconds["runs"], seconds["kernel"], None,
            agreement=agreement, agreement_of="output and gradients, relative, bf16", kernel=used,
        )  # fmt: skip


TOP = 8  # names listed in a trace
GAP = 20.0  # microseconds between two kernels from which on the device counts as waiting for the host


class Trace:
    """What torch's profiler sees between `start` and `stop`. It slows the host down, so read shares, not seconds."""

    def __init__(self, job: Job) -> None:
        self.on_cuda, self.seconds = job.device == "cuda", 0.0
        kinds = torch.profiler.ProfilerActivity
        self.profile = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if self.on_cuda else [])])

    def start(self) -> None:
        self.seconds -= wall()
        self.profile.start()

    def stop(self) -> None:
        self.seconds += wall()
        self.profile.stop()

    def figure(self, name: str, **facts: Any) -> dict[str, Any]:
        """The share of the time in which the device is busy; the kernels that take longest, the gaps between kernels,
        the launches, and what takes the host longest."""
        wanted = torch.autograd.DeviceType.CUDA if self.on_cuda else torch.autograd.DeviceType.CPU
        spans = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in self.profile.events() or ()
            if event.device_type == wanted and (self.on_cuda or event.cpu_parent is None)
        ]
        entries = list(self.profile.key_averages())
        launches = [entry for entry in entries if "LaunchKernel" in entry.key]
        host = sorted(entries, key=lambda entry: -entry.self_cpu_time_total)[:TOP]
        found = summary(spans)
        return record(
            name, found["busy"], found["busy"], found["busy"], None, unit="share of the time from first to last kernel",
            seconds=self.seconds, launches=sum(entry.count for entry in launches),
            launch_ms=round(sum(entry.self_cpu_time_total for entry in launches) / 1e3, 1),
            host_ms={entry.key[:60]: round(entry.self_cpu_time_total / 1e3, 1) for entry in host}, **found, **facts,
        )  # fmt: skip


def summary(spans: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
    """Of (name, start, end) in microseconds: kernels, the share of the time in which one runs, the longest by name, and
    the gaps of more than `GAP` between them."""
    ordered = sorted(spans, key=lambda span: span[1])
    by_name: dict[str, list[float]] = {}
    busy, gaps, end = 0.0, list[float](), None
    for name, start, stop in ordered:
        by_name.setdefault(name, []).append(stop - start)
        if end is None or start >= end:
            gaps += [start - end] if end is not None and start - end > GAP else []
            busy += stop - start
        else:
            busy += max(0.0, stop - end)
        end = stop if end is None else max(end, stop)
    whole = end - ordered[0][1] if ordered and end is not None else 0.0
    longest = sorted(by_name, key=lambda name: -sum(by_name[name]))[:TOP]
    return {
        "kernels": len(ordered),
        "busy": busy / whole if whole else 0.0,
        "milliseconds": round(whole / 1e3, 1),
        "gaps": len(gaps),
        "gap_ms": round(sum(gaps) / 1e3, 1),
        "top_ms": {name[:60]: [round(sum(by_name[name]) / 1e3, 1), len(by_name[name])] for name in longest},
    }
