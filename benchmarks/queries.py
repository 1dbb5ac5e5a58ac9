"""Queries that begin with one instruction, causal attention: its keys and values computed once, against
sentence-transformers' `encode` with the same prompt. 16 or 32 instruction tokens, 12 of the query; bf16."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpus import Corpus, one_by_one
from benchmarks.measure import angle, hardware, interleave, ratio_record
from poolwise.encoding.fast import FastEncoder

QUERIES, TOKENS, ROUNDS = 256, 12, 5
GOALS = {16: 1.6, 32: 2.3}


def run() -> list[dict[str, Any]]:
    device, clock = hardware()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder), "bfloat16", device)
        peer = corpus.peer()
        queries = [corpus.text(TOKENS) for _ in range(QUERIES)]
        figures = []
        for tokens, goal in GOALS.items():
            prompt = "".join(f" {word}" for word in corpus.random.choice(corpus.words, tokens))
            fast = FastEncoder(corpus.encoder, compiled=False)
            found = torch.from_numpy(fast.encode(queries, prompt))
            alone = one_by_one(corpus.encoder, queries[:32], prompt)
            without = one_by_one(corpus.encoder, queries[:32])
            assert angle(without, alone) > 0.01, "the instruction changes nothing: nothing would be checked"
            counts = fast.counts
            times = interleave(
                {
                    "st": lambda prompt=prompt: peer.encode(queries, prompt=prompt, batch_size=32),
                    "ours": lambda prompt=prompt, fast=fast: fast.encode(queries, prompt),
                },
                ROUNDS,
                clock=clock,
            )
            figures.append(
                ratio_record(
                    f"queries_{tokens}", times["st"], times["ours"], goal, agreement=angle(found[:32], alone),
                    agreement_of="1 - cosine to batches of one", dtype="bfloat16", device=device,
                    tokens_per_query=round(counts.tokens / QUERIES, 1),
                    computed_per_query=round(counts.computed / QUERIES, 1), notes=fast.notes,
                )
            )  # fmt: skip
    return figures
