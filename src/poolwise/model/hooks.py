"""What hooks give to and take from the decoder's layers: a mask of its own for each, one vector from each."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from poolwise.errors import AttentionError, ModelError, suggest
from poolwise.study.catalogue import bidirectional_layers

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_finding = threading.Lock()


def lock_of(guarded: Any) -> AbstractContextManager[Any]:
    """The lock of a module or a tokenizer; the thread that holds it may take it again."""
    with _finding:
        return _LOCKS.setdefault(guarded, threading.RLock())


def _forget() -> None:
    global _finding
    _finding = threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


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


REDUCTIONS = ("last", "mean")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model (PEFT-wrapped or not), in order.

    They are the one outermost `ModuleList` of length `config.num_hidden_layers`. Raises `ModelError` where none or
    several fit (shared layers, vision towers, encoder-decoders).
    """
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)  # an expert list of the same length, say
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found[name] = module
    if len(found) != 1:
        names = ", ".join(found) if found else "none"
        raise ModelError(
            f"{type(model).__name__}: expected one list of {count} decoder layers (config.num_hidden_layers), "
            f"found {len(found)} ({names}). Fix: take a decoder-only base model, "
            "or a pooling that reads only the last layer."
        )
    return next(iter(found.values()))


def base_model(model: nn.Module) -> Any:
    """`model` without its PEFT wrapper."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


def check_checkpointing(layer: Any) -> None:
    """Raise `ModelError` where hooks of a decoder layer would run inside its gradient checkpoint, which runs them a
    second time and loses the gradients of what they kept: transformers < 5.23 checkpoints a layer's `__call__`."""
    active = layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled()
    if active and type(layer).__call__ is not nn.Module.__call__:
        raise ModelError(
            f"{type(layer).__name__}: this version of transformers runs hooks inside its gradient checkpoints, so "
            "per-layer vectors would have no gradient. Fix: transformers >= 5.23, or no gradient checkpointing."
        )


def last_index(mask: Tensor) -> Tensor:
    """Index (B,) of the last 1 in each row of `mask` (B, T), whatever the padding side; 0 for an empty row."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), positions, 0).amax(1)


def last_state(states: Tensor, mask: Tensor) -> Tensor:
    """The state (B, D) fp32 of the last token under `mask` (B, T), from `states` (B, T, D); zeros for an empty row.

    Indexing by tensors copies, so the result keeps `states` alive only where autograd does.
    """
    rows = torch.arange(len(states), device=states.device)
    last = states[rows, last_index(mask)].float()
    return last.masked_fill(~mask.bool().any(1, keepdim=True), 0.0)


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """The mean (B, D) of `states` (B, T, D) under `mask` (B, T), summed in fp32; zeros for an empty row.

    Padding is replaced before the sum, not multiplied by 0: attention may leave NaN there.
    """
    keep = mask.bool().unsqueeze(-1)
    total = states.masked_fill(~keep, 0.0).sum(1, dtype=torch.float32)
    return total / keep.sum(1).clamp(min=1)


_REDUCE = {"last": last_state, "mean": mean_state}


class PackedReduction:
    """The same reductions for a pack: states (1, N, D) of S texts laid end to end -> (S, D) fp32.

    `ends` (S + 1,): 0 and the end of each text; `pooled` (N,): the tokens that are pooled. Raises `ModelError` for
    states of another shape.
    """

    def __init__(self, reduce: str, ends: Tensor, pooled: Tensor):
        self.all_pooled = bool(pooled.all())  # asked where `pooled` comes from: on the CPU no GPU has to wait
        self.reduce, self.pooled = reduce, pooled.bool().to(ends.device, non_blocking=True)
        lengths = ends.diff().long()
        tokens = torch.arange(len(pooled), device=ends.device)
        self.text = torch.repeat_interleave(lengths, output_size=len(pooled))  # which text a token belongs to
        self.count = torch.zeros_like(lengths).index_add(0, self.text, self.pooled.long())
        pooled_tokens = torch.where(self.pooled, tokens, 0)
        self.last = torch.zeros_like(lengths).scatter_reduce(0, self.text, pooled_tokens, "amax")

    def __call__(self, states: Tensor) -> Tensor:
        if states.shape[:2] != (1, len(self.pooled)):
            raise ModelError(f"LayerCollector: states of shape {tuple(states.shape)}, a pack of {len(self.pooled)}")
        tokens = states[0]
        if self.reduce == "last":
            return tokens[self.last].float().masked_fill((self.count == 0)[:, None], 0.0)
        if not self.all_pooled:
            tokens = tokens.masked_fill(~self.pooled[:, None], 0.0)
        total = torch.zeros(len(self.count), states.shape[-1], device=states.device)
        return total.index_add(0, self.text, tokens.float()) / self.count.clamp(min=1)[:, None]


@dataclass
class _Call:
    """What one forward pass has collected."""

    reduced: Callable[[Tensor], Tensor]  # a layer's states -> (B, D) fp32
    vectors: dict[int, Tensor] = field(default_factory=dict)  # layer -> (B, D) fp32


class LayerCollector:
    """Collects one vector per layer of `model`: the reduced output of each layer, the last one after the final norm.

    ::

        collector = LayerCollector(model, reduce="mean")
        with collector.collect(attention_mask):
            output = model(input_ids, attention_mask=attention_mask)
        vectors = collector.vectors(output.last_hidden_state)  # (B, L, D) fp32

    The entries equal the reduced `hidden_states[1:]` of `output_hidden_states=True`. Each call has its own state, so
    GradCache's double forwards and gradient checkpointing (whose recomputation runs outside the block) do not mix.
    """

    def __init__(self, model: nn.Module, reduce: str = "last"):
        if reduce not in REDUCTIONS:
            raise ModelError(f"reduce = {reduce!r}: allowed are 'last', 'mean'{suggest(reduce, REDUCTIONS)}")
        self.reduce = reduce
        self.layers = decoder_layers(model)
        self._call: _Call | None = None
        self._collecting = False
        # the last layer's entry is the model's output, after the final norm: no hook there
        self._handles = [
            layer.register_forward_hook(functools.partial(self._collect_output, index))
            for index, layer in enumerate(self.layers[:-1])
        ]

    @contextlib.contextmanager
    def collect(self, mask: Tensor, pooling_mask: Tensor | None = None) -> Iterator[LayerCollector]:
        """Collect from the one forward pass run inside the block.

        `mask` (B, T) is the attention mask; `pooling_mask` (B, T) leaves further tokens out of the reduction, such as a
        prompt's. A row with no token left gives zeros. Raises `ModelError` where this transformers would hide the
        hooks inside a gradient checkpoint.
        """
        pooled = mask if pooling_mask is None else mask.bool() & pooling_mask.bool()
        with self._open(functools.partial(self._reduced, mask=pooled)):
            yield self

    @contextlib.contextmanager
    def collect_packed(self, ends: Tensor, pooled: Tensor) -> Iterator[LayerCollector]:
        """The same for one packed forward pass; see `PackedReduction`. The vectors are then (S, L, D)."""
        with self._open(PackedReduction(self.reduce, ends, pooled)):
            yield self

    @contextlib.contextmanager
    def _open(self, reduced: Callable[[Tensor], Tensor]) -> Iterator[None]:
        check_checkpointing(self.layers[0])
        self._call = _Call(reduced)
        self._collecting = True
        try:
            yield
        except BaseException:
            self._call = None
            raise
        finally:
            self._collecting = False

    def vectors(self, last_hidden_state: Tensor) -> Tensor:
        """The vectors (B, L, D) fp32 of the last `collect`, given the model's output (B, T, D); handed out once.

        Raises `ModelError` where a layer gave no output or `collect` was not used.
        """
        call, self._call = self._call, None
        if call is None:
            raise ModelError("LayerCollector.vectors: nothing collected. Fix: run the model inside `collect(mask)`.")
        call.vectors[len(self.layers) - 1] = call.reduced(last_hidden_state)
        missing = [index for index in range(len(self.layers)) if index not in call.vectors]
        if missing:
            raise ModelError(
                f"LayerCollector: layers {missing} of {len(self.layers)} gave no output (skipped, or replaced after "
                "the hooks were set). Fix: build the collector on the model that runs, without layer dropping."
            )
        device = last_hidden_state.device
        return torch.stack([call.vectors[index].to(device) for index in range(len(self.layers))], dim=1)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no half-finished call."""
        return {**self.__dict__, "_call": None, "_collecting": False}

    def _collect_output(self, index: int, layer: nn.Module, inputs: tuple, output: Any) -> None:
        if self._collecting and self._call is not None:
            states = output if isinstance(output, Tensor) else output[0]
            self._call.vectors[index] = self._call.reduced(states)

    def _reduced(self, states: Tensor, mask: Tensor) -> Tensor:
        if states.shape[:2] != mask.shape:
            raise ModelError(
                f"LayerCollector: states of shape {tuple(states.shape)} do not fit a mask of {tuple(mask.shape)}. "
                "Fix: pass the padded batch (unpad_inputs=False), or open `collect_packed` for a pack."
            )
        return _REDUCE[self.reduce](states, mask.to(states.device))
