"""What multi-layers pooling adds to the memory of a training step: collecting one vector per layer, and its head.

`collect_memory`: peak of a step whose loss reads one collected vector per layer, over that of a step whose loss reads
the last token alone. `collect_memory_checkpointed`: the same under gradient checkpointing. The head's own part is the
fact `head_share`: what the default multi-layers head adds, per peak of the last-token step. Qwen2-shaped base of 12
layers and width 512, LoRA, fp32, 4 texts of 96 tokens. Agreement: the last collected vector against the last token's
state. Intervals are the range over rounds.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import deviation, extra_memory, hardware, record
from benchmarks.train import _base
from poolwise.model.encoder import build
from poolwise.pooling.heads import last_token
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe

TEXTS, TOKENS, ROUNDS, GOAL = 4, 96, 3, 1.02


def run() -> list[dict[str, Any]]:
    """Both figures."""
    device, _ = hardware()
    with tempfile.TemporaryDirectory() as folder:
        base, words = _base(Path(folder))
        return [_figure(base, words, device, checkpointing) for checkpointing in (False, True)]


def _figure(base: Path, words: int, device: str, checkpointing: bool) -> dict[str, Any]:
    recipe = Recipe(
        base_model=str(base),
        dtype="float32",
        max_length=TOKENS,
        lora=Lora(dropout=0.0),
        gradient_checkpointing=checkpointing,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, words, (TEXTS, TOKENS), generator=generator).to(device)
    mask = torch.ones_like(ids)
    plain, layered = (
        build(recipe, Design.model_validate({"preset": preset}), 0, device=device).train() for preset in ("m1", "m3")
    )

    def last(backbone: Any) -> Tensor:
        return last_token(backbone({"input_ids": ids, "attention_mask": mask})["token_embeddings"], mask)

    def collected(backbone: Any) -> Tensor:
        return backbone({"input_ids": ids, "attention_mask": mask})["layer_embeddings"]

    def head(encoder: Any) -> Tensor:
        return encoder({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]

    def step(vectors: Callable[[Any], Tensor], model: Any) -> Callable[[], None]:
        def once() -> None:
            found = vectors(model)
            found = F.normalize(found if found.ndim == 2 else found.mean(dim=1), dim=-1)
            F.cross_entropy(found @ found.T / 0.05, torch.arange(TEXTS, device=device)).backward()
            model.zero_grad(set_to_none=True)

        return once

    steps = {"last": step(last, plain[0]), "collect": step(collected, layered[0]), "head": step(head, layered)}
    peaks: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, once in steps.items():
            peaks[name].append(extra_memory(once))
    with torch.no_grad():
        agreement = deviation(collected(layered[0])[:, -1], last(plain[0]))
    ratios = [ours / theirs for ours, theirs in zip(peaks["collect"], peaks["last"], strict=True)]
    mib = {name: statistics.median(values) for name, values in peaks.items()}
    return record(
        "collect_memory_checkpointed" if checkpointing else "collect_memory",
        mib["collect"] / mib["last"],
        min(ratios),
        max(ratios),
        GOAL,
        lower_is_better=True,
        agreement=agreement,
        head_share=(mib["head"] - mib["collect"]) / mib["last"],
        **{f"{name}_mib": value for name, value in mib.items()},
    )
