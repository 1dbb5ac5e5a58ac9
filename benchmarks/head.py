"""The paper-size head at inference: folded against a plain transcription of it; and what a default head costs.

Sizes: width 896 and 24 layers (Qwen2-0.5B), 768 latents, 32 heads of 2048, feed-forward × 4; random weights.
`head_fp32_b1`, `head_bf16_b1`, `head_bf16_b16`: seconds; `fold_seconds` is spent once, when the weights are folded.
`head_memory`: what a forward of 16 texts needs beside weights and input. `head_share_…`: FLOPs of the dearest trainable
pooling at its default sizes, folded, per FLOP of its base, for a text of 32 tokens.
Agreement: fp32 largest relative deviation from the transcription; bf16 1 − cosine with the transcription in fp32.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config

from benchmarks.cost_table import BASES as PAPER_BASES
from benchmarks.measure import angle, deviation, extra_memory, hardware, interleave, ratio_record, record
from poolwise.pooling import cost
from poolwise.pooling.heads import LayerCrossAttention
from poolwise.study.catalogue import POOLINGS

WIDTH, LAYERS, LATENTS, HEADS, HEAD_DIM = 896, 24, 768, 32, 2048
BASES = {
    "bench": Qwen2Config(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=8192,
    ),
    "qwen2_0.5b": PAPER_BASES["Qwen2-0.5B"],
    "mistral_7b": PAPER_BASES["Mistral-7B"],
}


class Unfolded(nn.Module):
    """The head as it is published (arXiv 2409.02727), nothing computed ahead: each text has its own queries."""

    def __init__(self, ours: LayerCrossAttention):
        super().__init__()
        self.latents, self.layer_weights = ours.latents, ours.layer_weights
        for name in ("norm_states", "norm_latents", "norm_ffn"):
            norm, source = nn.LayerNorm(ours.latents.shape[1]), getattr(ours, name)
            norm.weight, norm.bias = source.weight, source.bias
            setattr(self, name, norm)
        for name in ("to_q", "to_k", "to_v", "to_out", "ffn_in", "ffn_out"):
            source = getattr(ours, name)
            linear = nn.Linear(source.in_features, source.out_features, bias=source.bias is not None, device="meta")
            linear.weight, linear.bias = source.weight, source.bias
            setattr(self, name, linear)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, L, D) -> (B, D)."""
        batch, layers, _ = vectors.shape
        context = self.norm_states(vectors + self.layer_weights[:layers])
        x = self.latents.expand(batch, -1, -1).contiguous()
        query, key, value = (
            part.view(batch, -1, HEADS, HEAD_DIM).transpose(1, 2)
            for part in (self.to_q(self.norm_latents(x)), self.to_k(context), self.to_v(context))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        x = self.to_out(attended.transpose(1, 2).reshape(batch, LATENTS, HEADS * HEAD_DIM)) + x
        value, gate = self.ffn_in(self.norm_ffn(x)).chunk(2, dim=-1)
        return (self.ffn_out(value * F.gelu(gate)) + x).mean(dim=1)


def paper_head(device: str) -> LayerCrossAttention:
    """The published sizes and first weights; the norms' scales and shifts random, as after training."""
    torch.manual_seed(0)
    head = LayerCrossAttention(
        WIDTH, LAYERS, latents=LATENTS, heads=HEADS, head_dim=HEAD_DIM, layer_weights=LAYERS, init="paper"
    )
    with torch.no_grad():
        for norm in (head.norm_states, head.norm_latents, head.norm_ffn):
            norm.weight.normal_(1, 0.2)
            norm.bias.normal_(0, 0.2)
    return head.eval().to(device)


@torch.no_grad()
def run() -> list[dict[str, Any]]:
    """All figures; the goals are those of the project's plan."""
    device, clock = hardware()
    head = paper_head(device)
    states = torch.randn(16, LAYERS, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    reference = torch.cat([Unfolded(head)(text[None]) for text in states[:4]])
    figures = []
    for name, dtype, batch, repeats, goal in (
        ("head_fp32_b1", torch.float32, 1, 7, 12.0),
        ("head_bf16_b1", torch.bfloat16, 1, 9, 10.0),
        ("head_bf16_b16", torch.bfloat16, 16, 3, 10.0),
    ):
        print(name, file=sys.stderr, flush=True)
        head = copy.deepcopy(head).to(dtype)
        plain, given = Unfolded(head).eval(), states[:batch].to(dtype)
        start = clock()
        ours = head(given)
        fold_seconds, theirs = clock() - start, plain(given)
        if dtype == torch.float32:
            agreement, facts = deviation(ours, theirs), {"fold_seconds": fold_seconds}
        else:
            agreement = angle(ours[:4], reference[:batch])
            facts = {"agreement_of_unfolded": angle(theirs[:4], reference[:batch]), "fold_seconds": fold_seconds}
        times = interleave(
            {"unfolded": lambda: plain(given), "folded": lambda: head(given)},  # noqa: B023 (called in this round)
            repeats,
            clock=clock,
        )
        figures.append(
            ratio_record(name, times["unfolded"], times["folded"], goal, agreement=agreement, batch=batch, **facts)
        )
        if batch == 16:
            theirs_mib, ours_mib = (extra_memory(call) for call in (lambda: plain(given), lambda: head(given)))  # noqa: B023
            ratio = theirs_mib / max(ours_mib, 1.0)
            figures.append(
                record("head_memory", ratio, ratio, ratio, 8.0, unfolded_mib=theirs_mib, folded_mib=ours_mib)
            )
    return figures + shares()


def shares() -> list[dict[str, Any]]:
    """FLOPs of the default heads over those of the base at 32 tokens: the dearest pooling, folded and as written."""
    figures = []
    for base, config in BASES.items():
        flops = cost.base_flops(config, cost.SHARE_TOKENS)
        found = {}
        for pooling in (
            name for name, spec in POOLINGS.items() if "latents" in spec.args and name != "latent_attention"
        ):
            args = cost.resolve_args(pooling, {}, config)
            found[pooling] = (
                cost.folded_flops(pooling, args, config, cost.SHARE_TOKENS) / flops,
                cost.head_flops(pooling, args, config, cost.SHARE_TOKENS) / flops,
            )
        dearest = max(found, key=lambda name: found[name][0])
        folded, _ = found[dearest]
        figures.append(
            record(
                f"head_share_{base}",
                folded,
                folded,
                folded,
                cost.SHARE,
                lower_is_better=True,
                pooling=dearest,
                as_written=max(share for _, share in found.values()),
            )
        )
    return figures
