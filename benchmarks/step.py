"""One LoRA step on the shape of SmolLM2-135M: with PEFT's forward, fused, compiled; and sentence-transformers' own.

Random weights in bf16, dropout .1, pairs of about 40 tokens (lognormal, at most 128), packed; a step is forward,
backward, clipping and fused AdamW. `gpu_step`: what a training uses on this GPU against PEFT's forward in the same
packs (the code of 837e2a3); `gpu_step_st`: against sentence-transformers' modules and loss, padded. Both in wall-clock
time, with 64 pairs. `step_cpu`: the same on one thread of a CPU with 8 pairs, in CPU time, without the compiler.

Each variant is printed as it ends: milliseconds a step, kernels and their own time on the GPU (which is what several
trainings on one GPU share), memory at its peak, seconds to prepare and compile it. A variant that fails is a record
with `failed`; one that would start after `LATEST` seconds is left out.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoTokenizer, LlamaConfig

from benchmarks.measure import hardware, ratio_record
from poolwise.demo import nano_path
from poolwise.model.encoder import build
from poolwise.model.lora import compiled_layers, fused_lora
from poolwise.runs.train import _loss as loss_of
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe

SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
LONGEST, BATCHES = 128, 8
PAIRS = {"cuda": 64, "cpu": 8}
STEPS = {"cuda": 24, "cpu": 3}
ROUNDS = {"cuda": 1, "cpu": 2}  # of all variants, so that another process does not slow just one of them
LATEST = {"cuda": 60.0, "cpu": 600.0}
Batch = list[dict[str, torch.Tensor]]


def run(sizes: dict[str, int] | None = None, device: str | None = None) -> list[dict[str, Any]]:
    """The figures on a GPU where there is one, else on one thread of the CPU."""
    sizes, device = sizes or SMOLLM2_135M, device or hardware()[0]
    with tempfile.TemporaryDirectory() as folder:
        base = llama_base(Path(folder), sizes)
        return list(_figures(base, sizes["vocab_size"], device))


def llama_base(folder: Path, sizes: dict[str, int], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Llama-shaped model of random weights with the built-in tokenizer, whose ids are a part of the vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(nano_path())
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=2048, **special)
    AutoModel.from_config(config).to(dtype).save_pretrained(folder)
    for file in nano_path().glob("*token*"):
        shutil.copy(file, folder)
    return folder


class _Steps:
    """An encoder, its batches and its optimizer; `variants` says how a step can be made."""

    def __init__(self, base: Path, vocabulary: int, device: str, dtype: str = "bfloat16", dropout: float = 0.1):
        self.device, self.clock = device, hardware()[1]
        self.recipe = Recipe(base_model=str(base), dtype=dtype, max_length=LONGEST, lora=Lora(dropout=dropout))  # type: ignore[arg-type]
        self.encoder = build(self.recipe, Design.model_validate({"preset": "m1"}), 0, device=device).train()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # B is zero at first: A would have no gradient to compare
            for name, parameter in self.encoder.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        self.trained = [p for p in self.encoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=True)
        self.batches = [self._batch(vocabulary, number) for number in range(BATCHES)]
        self.turn = 0
        plain = Transformer(str(base), max_seq_length=LONGEST)
        plain.model = self.encoder[0].model
        modules = [plain, Pooling(self.encoder[0].model.config.hidden_size, "lasttoken"), Normalize()]
        self.peer = MultipleNegativesRankingLoss(SentenceTransformer(modules=modules, device=device).train())

    def _batch(self, vocabulary: int, seed: int) -> Batch:
        generator, columns = torch.Generator().manual_seed(seed), []
        for _ in range(2):
            lengths = 37 * torch.exp(0.4 * torch.randn(PAIRS[self.device], generator=generator))
            lengths = lengths.round().long().clamp(4, LONGEST)
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            ids = torch.randint(10, vocabulary, mask.shape, generator=generator) * mask
            columns.append({"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)})
        return columns

    def loss(self, peer: bool = False) -> torch.Tensor:
        batch = [dict(column) for column in self.batches[self.turn % BATCHES]]
        self.turn += 1
        return self.peer(batch, None) if peer else loss_of(self.encoder, self.recipe, gather=False)(batch, None)

    def step(self, peer: bool = False) -> None:
        self.loss(peer).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self) -> torch.Tensor:
        """The gradient of the first batch, in one vector."""
        self.turn = 0
        self.loss().backward()
        gradient = torch.cat([p.grad.flatten().double() for p in self.trained])
        self.optimizer.zero_grad()
        return gradient

    @contextlib.contextmanager
    def variant(self, name: str) -> Iterator[Callable[[], None]]:
        """A step as `name` makes it. Raises RuntimeError with the reason if poolwise would not use it."""
        with contextlib.ExitStack() as stack:
            if name == "st":
                yield lambda: self.step(peer=True)
                return
            backbone = self.encoder[0]
            stack.enter_context(backbone.in_layout("packed"))
            if "fused" in name:
                how, note = stack.enter_context(fused_lora(backbone))
                if how != "fused" or note:
                    raise RuntimeError(note)
            if "compiled" in name and (reason := stack.enter_context(compiled_layers(backbone))):
                raise RuntimeError(reason)
            yield self.step


VARIANTS = {"cuda": ("peft", "fused", "fused+compiled", "st", "peft+compiled"), "cpu": ("peft", "fused", "st")}


def _figures(base: Path, vocabulary: int, device: str) -> Iterator[dict[str, Any]]:
    started = time.perf_counter()
    steps = _Steps(base, vocabulary, device)
    tokens = sum(int(column["attention_mask"].sum()) for column in steps.batches[0])
    _say(f"{PAIRS[device]} pairs, {tokens} tokens in the first batch, {device}")
    found: dict[str, dict[str, Any]] = {}
    for name in VARIANTS[device] * ROUNDS[device]:
        if time.perf_counter() - started > LATEST[device]:
            _say(f"{name}: left out after {LATEST[device]:.0f} s")
            continue
        try:
            earlier = found.get(name, {"times": []})["times"]
            found[name] = _measured(steps, name)
            found[name]["times"] += earlier
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            _say(f"{name}: failed, {reason}")
            yield {"name": f"step_{name}", "failed": reason}
        else:
            _say(f"{name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in found[name].items()))
    used = "fused+compiled" if "fused+compiled" in found else "fused"
    facts = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "tokens": tokens, "used": used}
    agreement = _agreement(base, vocabulary) if device == "cpu" else None
    names = {"cuda": (("gpu_step", "peft", 2.0), ("gpu_step_st", "st", 3.0)), "cpu": (("step_cpu", "peft", 1.15),)}
    for name, slow, goal in names[device]:
        if slow in found and used in found:
            times = (found[slow]["times"], found[used]["times"])
            yield ratio_record(name, *times, goal, agreement=agreement, variants=_without_times(found), **facts)


def _agreement(base: Path, vocabulary: int) -> float:
    """The fused gradient against PEFT's in fp32 without dropout, relative."""
    steps = _Steps(base, vocabulary, "cpu", dtype="float32", dropout=0.0)
    with steps.variant("peft"):
        expected = steps.gradient()
    with steps.variant("fused"):
        return float((steps.gradient() - expected).norm() / expected.norm())


def _measured(steps: _Steps, name: str) -> dict[str, Any]:
    """Milliseconds of a step at the median, kernels, their own milliseconds, MiB at the peak, seconds to prepare."""
    cuda, started = steps.device == "cuda", time.perf_counter()
    with steps.variant(name) as step:
        step()
        if cuda:
            torch.cuda.synchronize()
        prepared = time.perf_counter() - started
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(STEPS[steps.device]):
            before = steps.clock()
            step()
            times.append(steps.clock() - before)
        facts: dict[str, Any] = {"ms": 1e3 * statistics.median(times), "prepared_s": prepared, "times": times}
        if cuda:
            facts["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            with contextlib.suppress(Exception):  # a profiler that does not work here costs two facts, not the variant
                facts |= _on_gpu(step)
        else:
            with _Kernels() as kernels:
                step()
            facts["kernels"] = kernels.count.total()
        return facts


def _on_gpu(step: Callable[[], None]) -> dict[str, Any]:
    """Kernels of one step and the sum of their own times."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    largest: Counter[str] = Counter()
    for event in kernels:
        largest[event.name[:60]] += event.device_time
    shown = {name: round(micros / 1e3, 2) for name, micros in largest.most_common(12)}
    return {"kernels": len(kernels), "gpu_ms": sum(largest.values()) / 1e3, "largest_ms": shown}


VIEWS = {
    *("view", "t", "transpose", "unsqueeze", "expand", "slice", "_unsafe_view", "split", "split_with_sizes", "alias"),
    *("detach", "select", "reshape", "permute", "_reshape_alias", "unbind", "squeeze", "as_strided"),
}


class _Kernels(TorchDispatchMode):
    """Counts the operations that would be kernels: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        if name not in VIEWS:
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


def _without_times(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: {key: value for key, value in facts.items() if key != "times"} for name, facts in found.items()}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)
