"""What a device gives: matrix products, copies, launches, the products of a decoder layer, packed attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.measure import deviation, ratio_record, record, wall
from poolwise.model import packing

if TYPE_CHECKING:
    from benchmarks.gpu import Job

Figures = Iterator[dict[str, Any]]
PEAKS = {"H200": (989.4, 4.8), "H100 PCIe": (756.0, 2.0), "H100": (989.4, 3.35), "A100": (312.0, 2.0)}
"""Part of a device's name -> its data sheet's dense bf16 TFLOP/s and memory TB/s; the first that fits."""


def seconds_of(call: Callable[[], Any]) -> float:
    start = wall()
    call()
    return wall() - start


def fastest(call: Callable[[], Any], count: int = 20, tries: int = 3) -> float:
    """Seconds of one of `count` calls in a row, at best."""
    call()
    return min(seconds_of(lambda: [call() for _ in range(count)]) for _ in range(tries)) / count


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
