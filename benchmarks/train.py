"""One LoRA step on triples: packed, against sentence-transformers' own loss and against three padded forwards.

`train_st`: the same model in sentence-transformers' own modules under its MultipleNegativesRankingLoss (queries apart,
documents merged). `train_paper`: query, positive and negative each padded and encoded on its own, as in the code of
arXiv 2409.02727. `train_memory`: bytes that autograd keeps for the backward pass. `train_grouped`: the layout of base
models that cannot be packed. All variants share one model (Qwen2-shaped, 12 layers, width 512, random weights); texts
are random tokens with lognormal lengths (mean 40, median 24, at most 512). Each round takes another batch, of those
drawn the ones whose padding is nearest the median. Without dropout, so that losses and gradients can be compared.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer, Qwen2Config

from benchmarks.measure import interleave, ratio_record, record, wall
from poolwise.demo import nano_path
from poolwise.model.encoder import build
from poolwise.runs.train import _loss as loss_of
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe

TRIPLES, DRAWN, LONGEST = 8, 200, 512
ROUNDS = 4
Features = list[dict[str, torch.Tensor]]


def run() -> list[dict[str, Any]]:
    """The figures in fp32 (with agreement of loss and gradient) and in bf16 (speed)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        base, words = _base(Path(folder))
        return [figure for dtype in ("float32", "bfloat16") for figure in _figures(base, words, dtype, device)]


def _figures(base: Path, words: int, dtype: str, device: str, triples: int = TRIPLES) -> list[dict[str, Any]]:
    recipe = Recipe(base_model=str(base), dtype=dtype, max_length=LONGEST, lora=Lora(dropout=0.0))
    encoder = build(recipe, Design.model_validate({"preset": "m1"}), 0, device=device).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # B is zero at first: A would have no gradient to compare
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    plain = Transformer(str(base), max_seq_length=LONGEST)
    plain.model = encoder[0].model
    modules = [plain, Pooling(encoder[0].model.config.hidden_size, "lasttoken"), Normalize()]
    peer = SentenceTransformer(modules=modules, device=device).train()
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.0)
    batches = [
        [{k: v.to(device) for k, v in f.items()} for f in batch] for batch in _batches(words, ROUNDS + 1, triples)
    ]
    ours, theirs = MultipleNegativesRankingLoss(encoder), MultipleNegativesRankingLoss(peer)

    def packed(batch: Features) -> torch.Tensor:
        with encoder[0].in_layout("packed"):
            return loss_of(encoder, recipe, gather=False)(batch, None)

    def grouped(batch: Features) -> torch.Tensor:
        with encoder[0].in_layout("grouped"):
            return loss_of(encoder, recipe, gather=False)(batch, None)

    def paper(batch: Features) -> torch.Tensor:
        return ours.compute_loss_from_embeddings([encoder(dict(f))["sentence_embedding"] for f in batch], None)

    def st(batch: Features) -> torch.Tensor:
        return theirs([dict(f) for f in batch], None)

    losses = {"packed": packed, "grouped": grouped, "paper": paper, "st": st}
    turn = dict.fromkeys(losses, 1)

    def step(name: str) -> Callable[[], None]:
        def once() -> None:
            batch = batches[turn[name]]
            turn[name] += 1
            losses[name](batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        return once

    found = {name: _gradient(loss, optimizer, batches[0]) for name, loss in losses.items()}  # warms everything up
    apart = {name: _apart(found["packed"], found[name]) for name in losses}
    clock = {"clock": wall} if device == "cuda" else {}
    times = interleave({name: step(name) for name in losses}, ROUNDS, warmup=0, **clock)
    facts = {"dtype": dtype, "device": device, "agreement_of": "loss and gradient, relative", **_padding(batches[1:])}
    print(
        f"  {dtype}: {facts['real_tokens']} real tokens a step, {facts['padded_per_real']} padded for each",
        file=sys.stderr,
    )
    end = "" if dtype == "float32" else "_bf16"
    figures = [
        ratio_record(f"train_{name}{end}", times[slow], times[fast], goal, agreement=apart[other], **facts)
        for name, slow, fast, other, goal in (
            ("st", "st", "packed", "st", 2.0),
            ("paper", "paper", "packed", "paper", 1.9),
            ("grouped", "paper", "grouped", "grouped", None),
        )
    ]
    kept = [(_kept(packed, encoder, batch), _kept(paper, encoder, batch)) for batch in batches[1:3]]
    shares = [mine / yours for mine, yours in kept]
    share, low, high = statistics.median(shares), min(shares), max(shares)
    megabytes = {"packed_mib": kept[0][0] / 2**20, "paper_mib": kept[0][1] / 2**20}
    figures.append(record(f"train_memory{end}", share, low, high, 0.4, lower_is_better=True, **megabytes, **facts))
    return figures


def _base(folder: Path, sizes: dict[str, int] | None = None) -> tuple[Path, int]:
    """A Qwen2-shaped model of random weights with the built-in tokenizer; its folder and number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(nano_path())
    words = len(tokenizer)
    torch.manual_seed(0)
    usual = {
        "vocab_size": words, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    config = Qwen2Config(
        **{**usual, **(sizes or {})}, max_position_embeddings=LONGEST, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    for file in nano_path().glob("*token*"):
        shutil.copy(file, folder)
    return folder, words


def _batches(words: int, count: int, triples: int) -> list[Features]:
    """`count` of `DRAWN` batches, those with the most usual padding: three columns of ids and masks each."""
    generator = torch.Generator().manual_seed(1)
    spread = (2 * torch.log(torch.tensor(40 / 24))).sqrt()
    drawn = 24 * torch.exp(spread * torch.randn(DRAWN, 3, triples, generator=generator))
    lengths = drawn.round().long().clamp(2, LONGEST)
    padded = lengths.amax(2).sum(1) * triples / lengths.sum((1, 2))
    chosen = (padded - padded.median()).abs().argsort()[:count]
    batches = []
    for columns in lengths[chosen]:
        batch = []
        for column in columns:
            mask = (torch.arange(int(column.max())) < column[:, None]).long()
            ids = torch.randint(10, words, mask.shape, generator=generator) * mask
            batch.append({"input_ids": ids, "attention_mask": mask})
        batches.append(batch)
    return batches


def _padding(batches: list[Features]) -> dict[str, Any]:
    real = sum(int(f["attention_mask"].sum()) for batch in batches for f in batch)
    padded = sum(f["attention_mask"].numel() for batch in batches for f in batch)
    return {
        "triples": len(batches[0][0]["input_ids"]),
        "real_tokens": real // len(batches),
        "padded_per_real": round(padded / real, 2),
    }


def _gradient(loss: Callable, optimizer: torch.optim.Optimizer, batch: Features) -> tuple[float, torch.Tensor]:
    """The loss and its gradient over all trained tensors, in one vector."""
    value = loss(batch)
    value.backward()
    gradients = [p.grad.flatten().double() for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    return value.item(), torch.cat(gradients)


def _apart(ours: tuple[float, torch.Tensor], theirs: tuple[float, torch.Tensor]) -> float:
    """The larger of the relative differences of two losses and of their gradients."""
    (a, g), (b, h) = ours, theirs
    return max(abs(a - b) / abs(b), float((g - h).norm() / h.norm()))


def _kept(loss: Callable[[Features], torch.Tensor], encoder: SentenceTransformer, batch: Features) -> int:
    """Bytes of the storages that autograd keeps between forward and backward, those of the weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(batch)  # alive until all is counted: no storage is freed and its place taken by another
    assert value.requires_grad
    return sum(kept.values())
