"""On CUDA: whole encodes and LoRA steps of a Qwen2-0.5B and a Mistral-7B shape, against sentence-transformers and what
the GPU allows.

    python -m benchmarks gpu [PART[=SECONDS] …] [--seconds SECONDS]

Random weights, bf16; texts of lognormal length (mean 40 tokens, median 24, at most 512) of words that are one token
each; wall clock with synchronisation, interleaved. A baseline runs at its fastest of several batch sizes.

- `encode`: `gpu_encode_…_plain` against sentence-transformers with padding (`sdpa`), without padding by torch's
  FlashAttention (`varlen`), and with the flash-attn package if it is installed (then called `gpu_encode`);
  `gpu_mfu_plain`, FLOPs of the base model (`pooling.cost`) a second over the data sheet's dense bf16 peak;
  `gpu_tokeniser`, the seconds that tokenising takes by itself.
- `mfu`: the same with compiled layers, `gpu_encode_…` and `gpu_mfu`, the compiler's seconds apart.
- `step`: `gpu_step`, LoRA steps of our trainer against the same trainer with PEFT's own layers, nothing compiled, and
  `gpu_step_st` against sentence-transformers' trainer, padded, with the cached loss if a batch does not fit.
- `trace`: where the time of an encode and of a step goes.
- `7b`: `gpu_7b_…`, memory and seconds of a LoRA step and of an encode, m1 and m5, and the hours that 1,000 steps of
  2,048 pairs would take.
- `limits`, `kernel`, `budgets`: what the device gives; packed attention; tokens given ready, by the tokens of a pack.
- `heads`, `queries`, `memory`: the other benchmarks, on this device.

Each figure is a JSON line on stdout as soon as it is known. A part that fails, asserts or runs out of its seconds is a
line with `failed`, and the next one begins. Without names all parts run, in the order of their importance, until
`TOTAL` seconds are over.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import Qwen2Config, TrainerCallback

from benchmarks import head, memory, queries
from benchmarks.corpus import Corpus, made_on
from benchmarks.device import Figures, Job, Sizes, base_flops, checked_layout, mistral, report, seconds_of
from benchmarks.measure import angle, interleave, ratio_record, record, table, wall
from benchmarks.roofline import Trace, kernel, limits
from poolwise.encoding.fast import FastEncoder
from poolwise.model import lora
from poolwise.model.encoder import build
from poolwise.runs import train as trainer
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe

NAMES = {"flash-attn": "gpu_encode", "varlen": "gpu_encode_varlen", "sdpa": "gpu_encode_sdpa"}
GOALS = {"flash-attn": 1.2, "varlen": 1.5, "sdpa": None}
GOAL_MFU = 0.45
CLOSE = 1e-3  # 1 - cosine to the padded path of sentence-transformers, at most
TOTAL = 360.0
PAPER = 1000 * 2048  # steps × pairs of the paper's training


def encode(job: Job) -> Figures:
    """Not compiled: against each baseline at its best batch size; the tokenizer; the share of the peaks."""
    some = job.texts[::4]
    for name, peer in job.peers.items():
        peer.encode(some[:64])
        calls = {size: functools.partial(peer.encode, some, batch_size=size) for size in job.sizes.batches}
        tried = {size: seconds_of(call) for size, call in calls.items()}
        job.best[name] = min(tried, key=lambda size: tried[size])
        report(f"{name}: seconds by batch size {tried}")
    yield from _against(job, job.plain, "_plain", min(3, job.sizes.rounds))
    tokenise = [seconds_of(lambda: job.plain.tokenise(job.texts, "")) for _ in range(3)]
    whole = [seconds_of(lambda: job.plain.encode(job.texts)) for _ in range(3)]
    yield ratio_record(
        "gpu_tokeniser", tokenise, whole, None, unit="its seconds / the whole encode's",
        threads=job.plain.tokenise.threads,
        texts_per_second=round(len(job.texts) / statistics.median(tokenise)), cores=os.cpu_count(),
    )  # fmt: skip
    if job.device == "cuda":
        yield from _waits(job)


def _waits(job: Job) -> Figures:
    """How often the host waits for the GPU while it queues all windows, which should be never; and where."""
    windows = job.prepared(job.plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            queued = [job.plain._window(window, "", job.plain._tokens_of_a_batch()) for window in windows]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)
    ]
    count = len(places)
    yield record(
        "gpu_waits", count, count, count, 0, lower_is_better=True, unit="waits of the host", windows=len(queued),
        places=dict(collections.Counter(places).most_common(5)),
    )  # fmt: skip


def mfu(job: Job) -> Figures:
    """The decoder layers compiled before the clock starts."""
    fast = job.compiled
    fast.compile()
    first = seconds_of(lambda: fast.encode(job.texts))
    report(f"first encode with the compiler: {first:.1f} s")
    yield from _against(job, fast, "", job.sizes.rounds, first)


def _against(job: Job, fast: FastEncoder, end: str, rounds: int, first: float | None = None) -> Figures:
    """Ours against all baselines in the same rounds; asserts that all give the same embeddings."""
    calls = {"ours": lambda: fast.encode(job.texts), **job.their_calls()}
    found = {name: torch.from_numpy(call()) for name, call in calls.items()}
    apart = angle(found["ours"], found["sdpa"])
    assert bool(found["ours"].isfinite().all()), "an embedding is not finite"
    assert apart < CLOSE, f"1 - cosine to sentence-transformers, padded: {apart:.1e}"
    agreement = {name: angle(job.some(vectors), job.alone) for name, vectors in found.items()}
    if first is not None:  # plain has run too
        calls["plain"] = lambda: job.plain.encode(job.texts)
    times = interleave(calls, rounds, warmup=0, clock=wall)  # each has run once
    medians = {name: statistics.median(values) for name, values in times.items()}
    facts: dict[str, Any] = {
        "agreement_of": "1 - cosine to batches of one", "apart_from_padded": apart, "notes": fast.notes,
        "budget": fast._tokens_of_a_batch(), **job.facts(),
    }  # fmt: skip
    if first is not None:
        facts["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        saved = (medians["plain"] - medians["ours"]) / len(job.texts)
        facts["compile_seconds"] = round(first - medians["ours"], 1)
        facts["break_even_documents"] = round((first - medians["ours"]) / saved) if saved > 0 else None
        facts["plain_seconds"] = medians["plain"]
    for name in job.peers:
        yield ratio_record(
            NAMES[name] + end, times[name], times["ours"], GOALS[name], agreement=agreement["ours"],
            baseline=name, baseline_batch=job.best.get(name), baseline_agreement=agreement[name],
            fastest_baseline=min(job.peers, key=lambda peer: medians[peer]), **job.rates(medians["ours"]), **facts,
        )  # fmt: skip
    yield from job.mfu(f"gpu_mfu{end}", times["ours"], job.flops, GOAL_MFU, **facts)


def budgets(job: Job) -> Figures:
    """Tokens given ready, by the tokens of a pack; compiled if that part has run."""
    for name, fast in {"": job.plain, "_compiled": job.compiled}.items():
        if name and not fast._is_compiled:
            continue
        windows = job.prepared(fast)
        for budget in job.sizes.budgets:

            def given(fast: FastEncoder = fast, windows: Any = windows, budget: int = budget) -> None:
                for window in windows:
                    fast._window(window, "", budget)

            given()
            times = [seconds_of(given) for _ in range(min(3, job.sizes.rounds))]
            yield from job.mfu(f"gpu_model_{budget}{name}", times, job.flops, None, budget=budget)


# --- training ---------------------------------------------------------------------------------------------------------


def _pairs(corpus: Corpus, count: int) -> tuple[Dataset, np.ndarray]:
    """`count` different triples, and the tokens of each of their texts."""
    lengths = corpus.lengths(3 * count)
    texts = corpus.texts(lengths, different=True)
    columns = ("query", "positive", "negative_1")
    return Dataset.from_dict({name: texts[place::3] for place, name in enumerate(columns)}), lengths


def _steps(encoder: SentenceTransformer, recipe: Recipe, dataset: Dataset, folder: Path) -> list[float]:
    """Seconds of each step of our own trainer, the first of which warms up and is left out."""
    times = [wall()]
    result = trainer.train(
        encoder, recipe, dataset, folder, seed=0, progress=lambda *_: times.append(wall()), stop_at_chance=False
    )
    report(json.dumps({key: value for key, value in result.items() if key != "losses"}))
    assert all(np.isfinite(list(result["losses"].values()))), "a loss is not finite"
    if encoder.device.type == "cuda":
        assert result["layout"] == "packed", result["layout_reason"]
    return np.diff(times)[2:].tolist()


@contextlib.contextmanager
def _as_peft_has_it(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
    """In place of what makes a step fast: PEFT's own layers, nothing compiled, as at 837e2a3."""
    yield {"lora": "peft", "compiled": False, "notes": []}


def _recipe(corpus: Corpus, pairs: int, steps: int, **changes: Any) -> Recipe:
    given = {"base_model": str(corpus.base), "dtype": "bfloat16", "batch_size": pairs, "steps": steps, **changes}
    return Recipe(**{"warmup_steps": 0, "save_steps": 10**6, "learning_rate": 1e-4, "max_length": 512, **given})


def _built(job: Job, recipe: Recipe, preset: str = "m1") -> SentenceTransformer:
    with made_on(job.device):
        return build(recipe, Design.model_validate({"preset": preset}), 0, device=job.device)


def step(job: Job) -> Figures:
    """LoRA on all projections, rank 16, dropout .1, `sizes.pairs` triples a step."""
    dataset, lengths = _pairs(job.corpus, job.sizes.pairs * job.sizes.steps)
    recipe = _recipe(job.corpus, job.sizes.pairs, job.sizes.steps)
    facts: dict[str, Any] = {
        "device": job.device_name, "pairs": job.sizes.pairs, "tokens_a_step": round(lengths.sum() / job.sizes.steps),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        with patch.object(lora, "COMPILE_STEPS", 0):  # compiled, though so few steps do not repay it
            ours = _steps(_built(job, recipe), recipe, dataset, Path(folder) / "ours")
        facts["ours_peak_gib"] = _peak(job)
        with patch.object(trainer, "fast_training", _as_peft_has_it):
            plain = _steps(_built(job, recipe), recipe, dataset, Path(folder) / "plain")
        facts["peft_peak_gib"] = _peak(job)
        yield ratio_record("gpu_step", plain, ours, 2.0, baseline="our trainer, packed, PEFT's layers", **facts)
        yield from job.mfu(
            "gpu_step_mfu", ours, 2 * base_flops(Qwen2Config(**job.sizes.base), lengths) / job.sizes.steps, None,
            counted="forward and gradients of the states", **facts,
        )  # fmt: skip
        st, loss = _sentence_transformers(job, recipe, dataset, Path(folder) / "st")
        facts["st_peak_gib"] = _peak(job)
        yield ratio_record("gpu_step_st", st, ours, 3.0, baseline=f"sentence-transformers, padded, {loss}", **facts)


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times = [wall()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(wall())


def _sentence_transformers(job: Job, recipe: Recipe, dataset: Dataset, folder: Path) -> tuple[list[float], str]:
    """Seconds of each step of sentence-transformers' trainer, same model, PEFT's LoRA; and the loss that it used."""
    losses: dict[str, Callable[[Any], Any]] = {
        "plain loss": MultipleNegativesRankingLoss,
        "cached loss, mini-batches of 32": lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=32),
    }
    encoder = _built(job, recipe)
    with made_on(job.device):
        transformer = Transformer(str(job.corpus.base), max_seq_length=recipe.max_length)
    transformer.model = encoder[0].model
    modules = [transformer, Pooling(encoder[0].model.config.hidden_size, "lasttoken"), Normalize()]
    model = SentenceTransformer(modules=modules, device=job.device)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=recipe.steps, per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=job.device == "cpu",
    )  # fmt: skip
    for name, loss in losses.items():
        clock = _Clock()
        try:
            SentenceTransformerTrainer(
                model=model, args=arguments, train_dataset=dataset, loss=loss(model), callbacks=[clock]
            ).train()
            return np.diff(clock.times)[2:].tolist(), name
        except torch.OutOfMemoryError:
            report(f"{name}: out of memory")
            model.zero_grad(set_to_none=True)
            job.free()
    raise RuntimeError("no loss of sentence-transformers fits this device")


def _peak(job: Job) -> float | None:
    """GiB allocated at most since the last call."""
    if job.device != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 1)


def large(job: Job) -> Figures:
    """Mistral-7B's shape: an encode, then LoRA steps with the cached loss."""
    config, sizes = mistral(job.sizes), job.sizes
    for preset in ("m1", "m5"):
        corpus = job.opened(config, "large", {"preset": preset})
        texts = corpus.texts(corpus.lengths(sizes.large_documents), different=True)
        fast = checked_layout(FastEncoder(corpus.encoder, compiled=False), job.device)
        found = fast.encode(texts)
        assert np.isfinite(found).all(), "an embedding is not finite"
        _peak(job)
        times = [seconds_of(lambda fast=fast, texts=texts: fast.encode(texts)) for _ in range(3)]
        lengths = fast.tokenise(texts, "").lengths
        facts = {
            "device": job.device_name, "preset": preset, "texts": len(texts), "tokens": int(lengths.sum()),
            "tokens_per_second": round(lengths.sum() / statistics.median(times)), "peak_gib": _peak(job),
            "budget": fast._tokens_of_a_batch(),
        }  # fmt: skip
        yield from job.mfu(f"gpu_7b_encode_{preset}", times, base_flops(config, lengths), None, **facts)
        dataset, lengths = _pairs(corpus, sizes.large_pairs * sizes.large_steps)
        recipe = _recipe(corpus, sizes.large_pairs, sizes.large_steps, mini_batch_size=sizes.large_mini_batch)
        del fast, corpus
        job.free()
        encoder = _built(job, recipe, preset)
        with tempfile.TemporaryDirectory() as folder:
            times = _steps(encoder, recipe, dataset, Path(folder) / preset)
        seconds = statistics.median(times)
        hours = seconds / sizes.large_pairs * PAPER / 3600
        yield record(
            f"gpu_7b_step_{preset}", hours, min(times) * hours / seconds, max(times) * hours / seconds, None,
            lower_is_better=True, unit="hours of 1,000 steps of 2,048 triples at these lengths", seconds=seconds,
            pairs=sizes.large_pairs, mini_batch=sizes.large_mini_batch, peak_gib=_peak(job), device=job.device_name,
            tokens_a_step=round(lengths.sum() / sizes.large_steps), preset=preset, lora=repr(Lora()),
        )  # fmt: skip
        flops = 3 * base_flops(config, lengths) / sizes.large_steps  # the cached loss runs each text forward twice
        yield from job.mfu(f"gpu_7b_step_mfu_{preset}", times, flops, None, counted="forward twice, gradients")
        del encoder
        job.free()


def traces(job: Job) -> Figures:
    """Of an encode, not compiled and compiled if that part has run, and of two LoRA steps."""
    some = job.texts[: len(job.texts) // 4]
    encoders = {"": job.plain}
    if "compiled" in job.__dict__ and job.compiled._is_compiled:
        encoders["_compiled"] = job.compiled
    for end, fast in encoders.items():
        fast.encode(some)
        trace = Trace(job)
        trace.start()
        fast.encode(some)
        trace.stop()
        yield trace.figure(f"gpu_trace_encode{end}", texts=len(some))
    dataset, lengths = _pairs(job.corpus, job.sizes.pairs * 6)
    recipe, trace = _recipe(job.corpus, job.sizes.pairs, 6), Trace(job)

    def progress(step: int, *_: float) -> None:
        if step == 3:
            trace.start()
        elif step == 5:
            trace.stop()

    with tempfile.TemporaryDirectory() as folder:
        trainer.train(
            _built(job, recipe), recipe, dataset, Path(folder), seed=0, progress=progress, stop_at_chance=False
        )
    yield trace.figure("gpu_trace_step", steps=2, tokens_a_step=round(lengths.sum() / 6))


def heads(job: Job) -> Figures:
    """The folded head; shares of FLOPs are the same everywhere."""
    figures = (figure for figure in head.run() if not figure["name"].startswith("head_share"))
    yield from ({**figure, "name": f"gpu_{figure['name']}"} for figure in figures)


def others(module: Any) -> Callable[[Job], Figures]:
    """Another benchmark's figures, as that finds them on this device."""
    return lambda job: ({**figure, "name": f"gpu_{figure['name']}"} for figure in module.run())


PARTS: dict[str, tuple[Callable[[Job], Figures], float]] = {
    "limits": (limits, 20), "encode": (encode, 80), "mfu": (mfu, 120), "trace": (traces, 60), "budgets": (budgets, 40),
    "step": (step, 150), "7b": (large, 110), "kernel": (kernel, 20), "heads": (heads, 60),
    "queries": (others(queries), 60), "memory": (others(memory), 60),
}  # fmt: skip
"""Name -> the part, and the seconds that it may take."""
SHARING = ("encode", "mfu", "budgets", "trace")
"""Parts that use the same encoders; the others find the memory free."""


class OutOfTime(Exception):  # noqa: N818 (not a mistake)
    """A part has used up its seconds."""


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds, where the system has alarms."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(
    sizes: Sizes | None = None, device: str = "cuda", parts: dict[str, float] | None = None, total: float = TOTAL
) -> list[dict[str, Any]]:
    """All figures, each of which is also a JSON line on stdout as soon as it is known. `parts`: name -> seconds."""
    figures: list[dict[str, Any]] = []
    began = time.perf_counter()

    def add(figure: dict[str, Any]) -> None:
        figures.append(figure)
        print(json.dumps(figure), flush=True)

    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TOKENIZERS_PARALLELISM="true"):
        job = Job(Path(folder), sizes or Sizes(), device)
        for name, limit in (parts or {name: limit for name, (_, limit) in PARTS.items()}).items():
            start = time.perf_counter()
            left = total - (start - began)
            if left < min(limit, 10):
                report(f"{name}: left out, {left:.0f} of {total:.0f} s are left")
                continue
            try:
                if name not in SHARING:
                    job.free()
                with _within(min(limit, left)):
                    for figure in PARTS[name][0](job):
                        add(figure)
            except Exception as error:  # the others go on
                traceback.print_exc()
                add({"name": f"gpu_{name}", "failed": f"{type(error).__name__}: {error}"})
            report(f"{name}: {time.perf_counter() - start:.0f} s")
            if device == "cuda":
                torch.cuda.empty_cache()
    return figures


def main(argv: Sequence[str]) -> int:
    """The command line. Exit status 1 if a part failed."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__, formatter_class=kind)
    parser.add_argument("parts", nargs="*", metavar="PART[=SECONDS]", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, help=f"for all parts together; {TOTAL:.0f} if none is named")
    parser.add_argument("--json", action="store_true", help="no table at the end; the lines are always printed")
    options = parser.parse_args(argv)
    chosen = {}
    for part in options.parts:
        name, _, seconds = part.partition("=")
        if name not in PARTS or not (seconds or "1").replace(".", "", 1).isdigit():
            parser.error(f"no part {part!r}; choose from {', '.join(PARTS)}, with =SECONDS or without")
        chosen[name] = float(seconds or PARTS[name][1])
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: needs a CUDA GPU, and torch {torch.__version__} sees none here\n")
    figures = run(parts=chosen or None, total=options.seconds or (sum(chosen.values()) if chosen else TOTAL))
    if not options.json:
        print(table([figure for figure in figures if "failed" not in figure]), file=sys.stderr)
    return int(any("failed" in figure for figure in figures))
