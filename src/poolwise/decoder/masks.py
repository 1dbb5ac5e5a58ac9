"""Attention that differs between layers or between tokens: each decoder layer is handed a mask of its own.

- `bidirectional_last_N`: the last N layers are bidirectional, those before them causal (BeLLM, arXiv 2311.05296).
- `prefix`: the prompt's tokens see each other both ways, the rest is causal, as in a prefix language model.
- `causal_prefix`: the prompt is causal, all other tokens see everything.

Forward pre-hooks replace the mask that the model made; its class, weights and configuration stay as they are. A mask
holds, for texts of T tokens, what each token i may see: (B, 1, T, T), from the padding mask, so that neither the side
nor the amount of padding matters. Sliding windows W reach back to i - j < W, and to |i - j| <= W where both ways are
open, as in transformers. Cost: a mask of T × T numbers, and no fused kernel that knows causal masks only.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poolwise.decoder.layers import base_model, check_checkpointing, decoder_layers
from poolwise.designs import bidirectional_layers
from poolwise.errors import AttentionError

PLAIN = ("eager", "sdpa")  # backends that take a mask of any shape
KINDS = ("full_attention", "sliding_attention")


class LayerMasks:
    """The pre-hooks of one model in one of the modes above. `attending` says which batch comes next."""

    def __init__(self, model: nn.Module, mode: str, backend: str):
        self.mode, self.backend = mode, backend
        layers = decoder_layers(model)
        count = bidirectional_layers(mode) or len(layers)
        config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
        name = type(model).__name__
        if count > len(layers):
            raise AttentionError(f"attention = {mode!r}: {name} has {len(layers)} layers; give at most that many")
        flash = "flash" in backend and bidirectional_layers(mode) is not None
        if backend not in PLAIN and not flash:
            raise AttentionError(
                f"attention = {mode!r}: attention backend {backend!r} takes no mask for single tokens. "
                "Fix: attn_implementation = 'sdpa'."
            )
        same = KINDS[getattr(config, "sliding_window", None) is not None]
        self.kinds = list(getattr(config, "layer_types", None) or [same] * len(layers))
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or "attention_mask" not in inspect.signature(layers[0].forward).parameters:
            raise AttentionError(
                f"attention = {mode!r}: the layers of {name} take no mask of their own{': '.join(['', *unknown])}. "
                "Fix: attention = 'causal' or 'bidirectional', or another base model."
            )
        self.window: int | None = getattr(config, "sliding_window", None)
        self.layer = layers[0]
        self._made: dict[Any, Tensor] = {}
        self._call: tuple[Tensor, Tensor] | None = None
        self._handles = [
            layer.register_forward_pre_hook(functools.partial(self._give, self.kinds[index]), with_kwargs=True)
            for index, layer in enumerate(layers)
            if index >= len(layers) - count
        ]

    @contextlib.contextmanager
    def attending(self, mask: Tensor, prefix: Tensor | int = 0) -> Iterator[None]:
        """Around the one forward of a batch: its padding mask (B, T), and how many tokens of each text are its prompt
        (a number, or (B,)). Raises `ModelError` where this transformers would run hooks inside gradient checkpoints."""
        check_checkpointing(self.layer)
        counted = mask.long().cumsum(1)
        length = torch.as_tensor(prefix, device=mask.device).reshape(-1, 1)
        self._call, self._made = (mask.bool(), mask.bool() & (counted <= length)), {}
        try:
            yield
        finally:
            self._call, self._made = None, {}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no half-finished call."""
        return {**self.__dict__, "_call": None, "_made": {}}

    def _give(self, kind: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.backend not in PLAIN:  # FlashAttention keeps the padding mask and is told what to do
            return args, {**kwargs, "is_causal": False}
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        mask = self._mask(kind, states)
        place = list(inspect.signature(layer.forward).parameters).index("attention_mask")
        if place < len(args):
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _mask(self, kind: str, states: Tensor) -> Tensor:
        """(B, 1, T, T) for a batch of states (B, T, D): what each token sees; added to the logits under eager."""
        if self._call is None or self._call[0].shape != states.shape[:2]:
            raise AttentionError(
                f"attention = {self.mode!r} needs the padding mask of the batch: run the model through poolwise's "
                "encoder, padded, or inside LayerMasks.attending(mask, prefix)"
            )
        key = (kind, states.dtype, states.device)
        if key not in self._made:
            real, prefix = (part.to(states.device) for part in self._call)
            seen = visible(self.mode, real, prefix, self.window if kind == KINDS[1] else None)[:, None]
            if self.backend == "eager":
                lowest = torch.finfo(states.dtype).min
                seen = torch.zeros_like(seen, dtype=states.dtype).masked_fill(~seen, lowest)
            self._made[key] = seen
        return self._made[key]


def layer_masks(model: nn.Module) -> LayerMasks | None:
    """The hooks that make the model's attention mode; None where its configuration does."""
    return getattr(base_model(model), "poolwise_masks", None)


def attending(model: nn.Module, mask: Tensor, prefix: Tensor | int = 0) -> contextlib.AbstractContextManager[None]:
    """Around every forward of a batch: see `LayerMasks.attending`. Does nothing in the other modes."""
    masks = layer_masks(model)
    return contextlib.nullcontext() if masks is None else masks.attending(mask, prefix)


def visible(mode: str, real: Tensor, prefix: Tensor, window: int | None = None) -> Tensor:
    """What a layer shows each token, (B, T, T) bool: [b, i, j] if token i of text b sees token j.

    real, prefix: (B, T) bool, the tokens that are no padding, and those of them that belong to the prompt. For
    `bidirectional_last_N` it is what the last N layers show. Padding sees itself alone: no row is empty.
    """
    places = torch.arange(real.shape[1], device=real.device)
    back = places[:, None] - places  # i - j
    if mode in ("prefix", "causal_prefix"):
        both = (
            prefix[:, :, None] & prefix[:, None]
            if mode == "prefix"
            else ~prefix[:, :, None].expand(-1, -1, len(places))
        )
    else:
        both = torch.full((1, 1, 1), mode != "causal", device=real.device)
    seen = both | (back >= 0)
    if window is not None:
        seen = seen & torch.where(both, back.abs() <= window, back < window)
    return seen & real[:, None] & real[:, :, None] | (back == 0)


def inner_modes(model: nn.Module, mode: str) -> list[tuple[int, str]]:
    """(index of a layer, the mode that its states must show): before and after the first bidirectional layer."""
    if (count := bidirectional_layers(mode)) is None:
        return []
    first = len(decoder_layers(base_model(model))) - count
    return [*([(first - 1, "causal")] if first else []), (first, "bidirectional")]


def reachable(mode: str, tokens: int, prefix: int) -> Tensor:
    """What each token's last state may depend on, (T, T) bool, in an unpadded text without sliding windows."""
    real = torch.ones(1, tokens, dtype=torch.bool)
    return visible(mode, real, real & (torch.arange(tokens) < prefix))[0]
