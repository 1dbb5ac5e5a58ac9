"""Heads in the layout in which the paper's authors release them (`attn_pool.pt`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poolwise.errors import CheckpointError
from poolwise.pooling.heads import CrossAttentionHead


class PaperHead(nn.Module):
    """A released head: vectors (B, N, D), mask (B, N) or None -> (B, D) of length 1."""

    def __init__(self, pooling: CrossAttentionHead):
        super().__init__()
        self.pooling = pooling

    def forward(self, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.normalize(self.pooling(vectors, mask), dim=-1)


ADAPTER, HEAD = "adapter_config.json", "attn_pool.pt"
"""Files of a release: PEFT's, beside an adapter's weights, and the weights of a head."""


def head_file(folder: Path) -> Path | None:
    """A release's head: in its folder or, as the published trainers name it, beside it with its name in front."""
    places = (folder / HEAD, folder.with_name(folder.name + HEAD))
    return next((path for path in places if path.is_file()), None)


def refuse_bare_adapter(folder: Path, run_file: str) -> None:
    """Raise `CheckpointError` for an adapter's folder that does not say how its states are pooled.

    sentence-transformers would pool by the mean, so that a score would be another model's. `run_file`: what poolwise
    writes into a folder that says it.
    """
    if not (folder / ADAPTER).is_file() or any((folder / name).exists() for name in ("modules.json", run_file)):
        return
    what = "a release of the paper's authors" if head_file(folder) else "an adapter without modules.json"
    raise CheckpointError(
        f"{folder} is {what}, which does not say how it pools. If it is a design of the paper, name it and its base: "
        f"`poolwise evaluate {folder} --release m5 --base NAME`, or poolwise.load_release(folder, base, 'm5')"
    )


_RELEASED = {  # released name -> our name; to_kv holds keys first, then values
    "latents": "latents",
    "pos_emb.weight": "layer_weights",
    "cross_attend_blocks.0.norm.weight": "norm_states.weight",
    "cross_attend_blocks.0.norm.bias": "norm_states.bias",
    "cross_attend_blocks.0.norm_context.weight": "norm_latents.weight",
    "cross_attend_blocks.0.norm_context.bias": "norm_latents.bias",
    "cross_attend_blocks.0.fn.to_q.weight": "to_q.weight",
    "cross_attend_blocks.0.fn.to_kv.weight": "to_k.weight, to_v.weight",
    "cross_attend_blocks.0.fn.to_out.weight": "to_out.weight",
    "cross_attend_blocks.1.norm.weight": "norm_ffn.weight",
    "cross_attend_blocks.1.norm.bias": "norm_ffn.bias",
    "cross_attend_blocks.1.fn.net.0.weight": "ffn_in.weight",
    "cross_attend_blocks.1.fn.net.0.bias": "ffn_in.bias",
    "cross_attend_blocks.1.fn.net.2.weight": "ffn_out.weight",
    "cross_attend_blocks.1.fn.net.2.bias": "ffn_out.bias",
}


def load_paper_head(state_dict: Mapping[str, Tensor] | str | Path, heads: int = 32) -> PaperHead:
    """A trained head from the paper's released layout: a state dict, or the path of an `attn_pool.pt`.

    All sizes but the number of `heads` follow from the shapes. Weights become fp32. With `pos_emb.weight` it is a
    multi-layers head (its first N rows are added to N vectors), without it a last-layer head. A prefix `module.` is
    dropped.

    Raises `CheckpointError` naming missing and unexpected keys, shapes that do not fit together, a file that is not a
    state dict, or heads that do not divide the inner width.
    """
    where = "state dict"
    if isinstance(state_dict, (str, Path)):
        where, state_dict = str(state_dict), read_weights(Path(state_dict))
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    missing = [name for name in _RELEASED if name not in weights and name != "pos_emb.weight"]
    unexpected = [name for name in weights if name not in _RELEASED]
    if missing or unexpected:
        parts = [
            f"{kind} {', '.join(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise CheckpointError(f"{where} is not a head in the layout of attn_pool.pt: {'; '.join(parts)}")

    latents, hidden_size = _shape(weights, "latents", where)
    width = _shape(weights, "cross_attend_blocks.0.fn.to_q.weight", where)[0]
    inner = _shape(weights, "cross_attend_blocks.1.fn.net.2.weight", where)[1]
    if width % heads:
        raise CheckpointError(f"{where}: heads = {heads} does not divide the inner width {width} of to_q.weight")
    with torch.device("meta"):
        pooling = CrossAttentionHead(
            hidden_size,
            latents=latents,
            heads=heads,
            head_dim=width // heads,
            ffn=max(1, inner // hidden_size),
            layer_weights=len(weights.get("pos_emb.weight", ())),
        )
    ours = {}
    for released, name in _RELEASED.items():
        if released in weights:
            names = name.split(", ")
            for part, tensor in zip(names, weights[released].float().chunk(len(names)), strict=False):
                ours[part] = tensor
    expected = pooling.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    wrong = [
        f"{name} {shapes.get(name, '(missing)')} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if shapes.get(name) != tuple(tensor.shape)
    ]
    if wrong:
        raise CheckpointError(f"{where}: shapes that do not fit latents of width {hidden_size}: {'; '.join(wrong)}")
    pooling.load_state_dict({name: tensor.clone() for name, tensor in ours.items()}, assign=True)
    return PaperHead(pooling)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """A state dict that torch saved, read without running code. Raises `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reads a damaged pickle as a program, which may fail in any way
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: not a file of weights that torch can load safely ({reason})") from error
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no state dict (names and tensors)")
    return content


def _shape(weights: Mapping[str, Tensor], name: str, where: str) -> torch.Size:
    shape = weights[name].shape
    if len(shape) != 2:
        raise CheckpointError(f"{where}: {name} has shape {tuple(shape)}, a matrix was expected")
    return shape
