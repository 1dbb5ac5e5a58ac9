"""Whole encodes: tokenising, batching, the base model, pooling.

`encode_st`: a last-token design against sentence-transformers' own `encode` (batches of 32, sorted by length), bf16,
10,000 documents by slices: every 20th batch of the sorted corpus, so that both sides have the whole corpus's padding.
The decoder layers are compiled before the clock starts; `compile_seconds`, and `break_even_documents` from which on
compiling repays itself. `encode_st_plain`: without compilation.
`encode_bf16`: a 135M shape in bfloat16 against the same in float32, mean pooling, both by us; 1 on a CPU without the
instructions.
`encode_paper`: a multi-layers design with a head of the paper's size against the loop and the head of the paper's code:
batches of 64 in the order of the input, padded to a multiple of 8, queries computed again for each text.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.corpus import Corpus, one_by_one
from benchmarks.head import Unfolded
from benchmarks.measure import angle, hardware, interleave, ratio_record
from poolwise.encoding.fast import FastEncoder
from poolwise.model.base import cpu_bfloat16_gain
from poolwise.study.catalogue import PRESETS

DOCUMENTS, BATCH, EVERY = 10_000, 32, 20
ROUNDS = 5
PAPER_BATCH, PAPER_ROUNDS = 64, 2
BF16_TEXTS, DTYPES = 96, ("float32", "bfloat16")
SMALL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip
"""SmolLM2-135M's."""
HEAD_CHUNK = 8  # texts for which the plain head's queries are held at once


def run() -> list[dict[str, Any]]:
    folders = [tempfile.TemporaryDirectory() for _ in range(3)]
    with folders[0] as first, folders[1] as second, folders[2] as third:
        return [*_against_st(Path(first)), _bf16(Path(second)), _against_paper(Path(third))]


def _against_st(folder: Path) -> list[dict[str, Any]]:
    device, clock = hardware()
    corpus = Corpus(folder, "bfloat16", device)
    lengths = np.sort(corpus.lengths(DOCUMENTS))[::-1]
    starts = range(0, DOCUMENTS - BATCH, BATCH * EVERY)
    slices = [[corpus.text(n) for n in lengths[start : start + BATCH]] for start in starts]
    peer, plain = corpus.peer(), FastEncoder(corpus.encoder, compiled=False)
    fast = FastEncoder(copy.deepcopy(corpus.encoder))  # compiling it must not compile the peer's layers
    texts = [text for part in slices for text in part]

    def theirs() -> torch.Tensor:
        return torch.from_numpy(np.concatenate([peer.encode(part, batch_size=BATCH) for part in slices]))

    def ours(encoder: FastEncoder) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([encoder.encode(part) for part in slices]))

    alone = one_by_one(corpus.encoder, texts[:: len(texts) // 40])
    some = {"st": theirs()[:: len(texts) // 40], "plain": ours(plain)[:: len(texts) // 40]}
    start = clock()
    fast.compile()
    ours(fast)
    first = clock() - start
    some["fast"] = ours(fast)[:: len(texts) // 40]
    times = interleave({"st": theirs, "plain": lambda: ours(plain), "fast": lambda: ours(fast)}, ROUNDS, clock=clock)
    compile_seconds = first - float(np.median(times["fast"]))
    saved = (np.median(times["plain"]) - np.median(times["fast"])) / len(texts)
    counts = plain.counts
    facts = {
        "dtype": "bfloat16", "device": device, "agreement_of": "1 - cosine to batches of one",
        "documents": len(texts), "extrapolated_to": DOCUMENTS,
        "padded_per_real": round(counts.computed / counts.tokens, 3),
        "st_agreement": angle(some["st"], alone), "notes": plain.notes + fast.notes,
    }  # fmt: skip
    return [
        ratio_record(
            "encode_st", times["st"], times["fast"], 1.3, agreement=angle(some["fast"], alone),
            compile_seconds=round(compile_seconds, 1),
            break_even_documents=round(compile_seconds / saved) if saved > 0 else None, **facts,
        ),
        ratio_record(
            "encode_st_plain", times["st"], times["plain"], None,
            agreement=angle(some["plain"], alone), **facts,
        ),
    ]  # fmt: skip


def _bf16(folder: Path) -> dict[str, Any]:
    device, clock = hardware()
    design = {"attention": "causal", "pooling": "mean"}
    fast = {
        dtype: FastEncoder(Corpus(folder, dtype, device, design, SMALL).encoder, compiled=False) for dtype in DTYPES
    }
    corpus = Corpus(folder, "float32", device, design, SMALL)
    texts = corpus.texts(corpus.lengths(BF16_TEXTS), different=True)
    found = {dtype: torch.from_numpy(encoder.encode(texts)) for dtype, encoder in fast.items()}
    times = interleave({dtype: partial(encoder.encode, texts) for dtype, encoder in fast.items()}, 3, clock=clock)
    return ratio_record(
        "encode_bf16", times["float32"], times["bfloat16"], 2.5, agreement=angle(*found.values()), device=device,
        agreement_of="1 - cosine to float32", documents=len(texts), product_gain=round(cpu_bfloat16_gain(), 2),
    )  # fmt: skip


def _against_paper(folder: Path) -> dict[str, Any]:
    device, clock = hardware()
    paper = {"attention": "bidirectional", "pooling": "layer_cross_attention"}
    arguments = {**PRESETS["m5-paper"]["pooling_args"], "pad_by_id": False, "layer_weights": 12}
    corpus = Corpus(folder, "bfloat16", device, {**paper, "pooling_args": arguments})
    fast = FastEncoder(corpus.encoder, compiled=False)
    texts = [corpus.text(n) for n in corpus.lengths(PAPER_BATCH)]
    head = copy.deepcopy(Unfolded(corpus.encoder[1].head)).to(torch.bfloat16)
    backbone, tokenizer = corpus.encoder[0], corpus.tokenizer

    def theirs() -> torch.Tensor:
        with torch.inference_mode():
            batch = tokenizer(texts, padding=True, pad_to_multiple_of=8, return_tensors="pt").to(device)
            features = backbone({key: batch[key] for key in ("input_ids", "attention_mask")})
            parts = features["layer_embeddings"].split(HEAD_CHUNK)
            return F.normalize(torch.cat([head(part.to(torch.bfloat16)).float() for part in parts]), dim=-1).cpu()

    def ours() -> torch.Tensor:
        return torch.from_numpy(fast.encode(texts))

    apart = angle(ours(), theirs())
    times = interleave({"paper": theirs, "ours": ours}, PAPER_ROUNDS, warmup=0, clock=clock)
    return ratio_record(
        "encode_paper", times["paper"], times["ours"], 15.0, agreement=apart, dtype="bfloat16", device=device,
        agreement_of="1 - cosine to the paper's loop", documents=len(texts),
    )  # fmt: skip
