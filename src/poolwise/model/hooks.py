"""Hooks on the decoder's layers: a mask of its own for each layer, one vector from each layer.

Shapes: (B, T, D) states of a padded batch, (1, N, D) states of a packed one, (B, L, D) one vector per layer.
"""

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
from poolwise.pooling.heads import last_token, weighted_mean
from poolwise.study.catalogue import bidirectional_layers

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def lock_of(guarded: Any) -> AbstractContextManager[Any]:
    """The reentrant lock that belongs to a module or a tokenizer."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(guarded, threading.RLock())


def _reset_locks() -> None:
    global _LOCKS_GUARD
    _LOCKS_GUARD = threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    # a lock that another thread holds while the process forks would never be released in the child
    os.register_at_fork(after_in_child=_reset_locks)


def base_model(model: nn.Module) -> Any:
    """`model` without its PEFT wrapper."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model (PEFT-wrapped or not), in order.

    They are the only outermost `ModuleList` of length `config.num_hidden_layers`. Raises `ModelError` if there is none
    or more than one (shared layers, vision towers, encoder-decoders).
    """
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)  # e.g. a list of experts of the same length
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


def is_compiled(layer: Any) -> bool:
    """Whether torch compiles the layer, by `layer.compile()` or by `torch.compile` of its forward."""
    # the name under which torch keeps the function that it compiles; tests/test_compiled.py notices if it changes
    return layer._compiled_call_impl is not None or hasattr(layer.forward, "_torchdynamo_orig_callable")


def check_checkpointing(layer: Any) -> None:
    """Raise `ModelError` if hooks of a decoder layer would run inside its gradient checkpoint.

    transformers < 5.23 checkpoints a layer's `__call__`: hooks would run twice, and what they keep has no gradient.
    """
    active = layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled()
    if active and type(layer).__call__ is not nn.Module.__call__:
        raise ModelError(
            f"{type(layer).__name__}: this version of transformers runs hooks inside its gradient checkpoints, so "
            "per-layer vectors would have no gradient. Fix: transformers >= 5.23, or no gradient checkpointing."
        )


MASK_BACKENDS = ("eager", "sdpa")  # attention implementations that take a mask of any shape
LAYER_KINDS = ("full_attention", "sliding_attention")


OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")
"""Names of the linear layer at the end of an attention module."""


def output_projections(model: nn.Module) -> list[nn.Module]:
    """The projection at the end of each decoder layer's attention. Raises `ModelError` if it is not found."""
    found = []
    for layer in decoder_layers(base_model(model)):
        ends = [
            module
            for name, module in layer.named_modules()
            if "att" in name.rpartition(".")[0] and name.rpartition(".")[2] in OUTPUT_PROJECTIONS
        ]
        if len(ends) != 1:
            raise ModelError(
                f"{type(layer).__name__}: expected one output projection of its attention "
                f"({', '.join(OUTPUT_PROJECTIONS)}), found {len(ends)}. Fix: evaluation_padding = false."
            )
        found += ends
    return found


@contextlib.contextmanager
def zero_at_padding(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside, the output of each attention is zero at padding before its projection, as FlashAttention leaves it.

    mask (B, T) is that of the batch. States at padding are then what the residual and the feed-forward layers make of
    the padding token; those of real tokens are unchanged, because no real token attends to padding.
    """
    padding = ~mask.bool()[..., None]

    def zeroed(module: nn.Module, args: tuple) -> tuple:
        return (args[0].masked_fill(padding, 0.0), *args[1:])

    handles = [projection.register_forward_pre_hook(zeroed) for projection in output_projections(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LayerMasks:
    """Forward pre-hooks that give the layers of one model the masks of a mode which `config.is_causal` cannot express.

    `attending` must surround each forward: it tells the hooks which batch they see.
    """

    def __init__(self, model: nn.Module, mode: str, backend: str):
        self.mode, self.backend = mode, backend
        layers = decoder_layers(model)
        count = bidirectional_layers(mode) or len(layers)
        config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
        name = type(model).__name__
        if count > len(layers):
            raise AttentionError(f"attention = {mode!r}: {name} has {len(layers)} layers; give at most that many")
        # FlashAttention takes no mask per token, but a flag per call: enough where whole layers differ
        flash = "flash" in backend and bidirectional_layers(mode) is not None
        if backend not in MASK_BACKENDS and not flash:
            raise AttentionError(
                f"attention = {mode!r}: attention backend {backend!r} takes no mask for single tokens. "
                "Fix: attn_implementation = 'sdpa'."
            )
        uniform = LAYER_KINDS[getattr(config, "sliding_window", None) is not None]
        self.kinds = list(getattr(config, "layer_types", None) or [uniform] * len(layers))
        unknown = sorted(set(self.kinds) - set(LAYER_KINDS))
        if unknown or "attention_mask" not in inspect.signature(layers[0].forward).parameters:
            raise AttentionError(
                f"attention = {mode!r}: the layers of {name} take no mask of their own{': '.join(['', *unknown])}. "
                "Fix: attention = 'causal' or 'bidirectional', or another base model."
            )
        self.window: int | None = getattr(config, "sliding_window", None)
        self.layer = layers[0]
        self._masks: dict[Any, Tensor] = {}
        self._batch: tuple[Tensor, Tensor] | None = None
        self._handles = [
            layer.register_forward_pre_hook(functools.partial(self._give, self.kinds[index]), with_kwargs=True)
            for index, layer in enumerate(layers)
            if index >= len(layers) - count
        ]

    @contextlib.contextmanager
    def attending(self, mask: Tensor, prefix: Tensor | int = 0) -> Iterator[None]:
        """Surrounds the one forward of a batch.

        mask (B, T): which tokens are no padding. prefix: how many tokens of each text are its prompt, a number or (B,).
        Raises `ModelError` if this transformers would run hooks inside gradient checkpoints.
        """
        check_checkpointing(self.layer)
        counted = mask.long().cumsum(1)
        length = torch.as_tensor(prefix, device=mask.device).reshape(-1, 1)
        self._batch, self._masks = (mask.bool(), mask.bool() & (counted <= length)), {}
        try:
            yield
        finally:
            self._batch, self._masks = None, {}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle made during a forward does not carry that forward's batch."""
        return {**self.__dict__, "_batch": None, "_masks": {}}

    def _give(self, kind: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.backend not in MASK_BACKENDS:
            return args, {**kwargs, "is_causal": False}
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        mask = self._mask(kind, states)
        place = list(inspect.signature(layer.forward).parameters).index("attention_mask")
        if place < len(args):  # models differ in whether they pass the mask by position or by name
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _mask(self, kind: str, states: Tensor) -> Tensor:
        """(B, 1, T, T) for a batch of states (B, T, D): bool as SDPA takes it, or what eager adds to the logits."""
        if self._batch is None or self._batch[0].shape != states.shape[:2]:
            raise AttentionError(
                f"attention = {self.mode!r} needs the padding mask of the batch: run the model through poolwise's "
                "encoder, padded, or inside LayerMasks.attending(mask, prefix)"
            )
        key = (kind, states.dtype, states.device)
        if key not in self._masks:  # layers of one kind share one mask
            real, prefix = (part.to(states.device) for part in self._batch)
            seen = visible(self.mode, real, prefix, self.window if kind == LAYER_KINDS[1] else None)[:, None]
            if self.backend == "eager":
                lowest = torch.finfo(states.dtype).min
                seen = torch.zeros_like(seen, dtype=states.dtype).masked_fill(~seen, lowest)
            self._masks[key] = seen
        return self._masks[key]


def layer_masks(model: nn.Module) -> LayerMasks | None:
    """The hooks that implement the model's attention mode; None if its configuration does."""
    return getattr(base_model(model), "poolwise_masks", None)


def attending(model: nn.Module, mask: Tensor, prefix: Tensor | int = 0) -> AbstractContextManager[None]:
    """Surrounds every forward of a batch: see `LayerMasks.attending`. Does nothing in modes without hooks."""
    masks = layer_masks(model)
    return contextlib.nullcontext() if masks is None else masks.attending(mask, prefix)


def visible(mode: str, real: Tensor, prefix: Tensor, window: int | None = None) -> Tensor:
    """What a layer shows each token, (B, T, T) bool: [b, i, j] if token i of text b attends to token j.

    real, prefix: (B, T) bool, the tokens that are no padding, and those of them that belong to the prompt. For
    `bidirectional_last_N` it is what the last N layers show. Padding attends to itself alone, so that no row is empty.
    """
    places = torch.arange(real.shape[1], device=real.device)
    back = places[:, None] - places  # i - j
    if mode == "prefix":
        both = prefix[:, :, None] & prefix[:, None]
    elif mode == "causal_prefix":
        both = ~prefix[:, :, None].expand(-1, -1, len(places))
    else:
        both = torch.full((1, 1, 1), mode != "causal", device=real.device)
    seen = both | (back >= 0)
    if window is not None:  # transformers counts the token itself in a causal window, not in a bidirectional one
        seen = seen & torch.where(both, back.abs() <= window, back < window)
    return seen & real[:, None] & real[:, :, None] | (back == 0)


def inner_modes(model: nn.Module, mode: str) -> list[tuple[int, str]]:
    """(index of a layer, the mode that its output must show): before and after the first bidirectional layer."""
    if (count := bidirectional_layers(mode)) is None:
        return []
    first = len(decoder_layers(base_model(model))) - count
    return [*([(first - 1, "causal")] if first else []), (first, "bidirectional")]


def reachable(mode: str, tokens: int, prefix: int) -> Tensor:
    """What each token's last state may depend on, (T, T) bool, in an unpadded text without sliding windows."""
    real = torch.ones(1, tokens, dtype=torch.bool)
    return visible(mode, real, real & (torch.arange(tokens) < prefix))[0]


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"last": last_token, "mean": weighted_mean}
"""How the states of a layer (B, T, D) become one vector (B, D) fp32 under a mask (B, T)."""


def last_index(mask: Tensor) -> Tensor:
    """Index (B,) of the last 1 in each row of `mask` (B, T), whatever the padding side; 0 for an empty row."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), positions, 0).amax(1)


class PackedReduction:
    """`REDUCTIONS` for a pack: states (1, N, D) of S texts laid end to end -> (S, D) fp32.

    `ends` (S + 1,): 0 and the end of each text; `pooled` (N,): the tokens that are pooled. Raises `ModelError` for
    states of another shape.
    """

    def __init__(self, reduce: str, ends: Tensor, pooled: Tensor):
        self.all_pooled = bool(
            pooled.all()
        )  # asked before `pooled` moves to the GPU, which would have to be waited for
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
    that GradCache's double forwards and gradient checkpointing (which recomputes outside the block) do not mix.
    """

    def __init__(self, model: nn.Module, reduce: str = "last"):
        if reduce not in REDUCTIONS:
            raise ModelError(f"reduce = {reduce!r}: allowed are 'last', 'mean'{suggest(reduce, REDUCTIONS)}")
        self.reduce = reduce
        self.layers = decoder_layers(model)
        self._call: _Call | None = None
        self._collecting = False
        # no hook on the last layer: its entry is the model's output, after the final norm
        self._handles = [
            layer.register_forward_hook(functools.partial(self._collect_output, index))
            for index, layer in enumerate(self.layers[:-1])
        ]

    @contextlib.contextmanager
    def collect(self, mask: Tensor, pooling_mask: Tensor | None = None) -> Iterator[LayerCollector]:
        """Collect from the one forward pass that runs inside the block.

        `mask` (B, T) is the attention mask; `pooling_mask` (B, T) leaves further tokens out of the reduction, such as a
        prompt's. A row without tokens gives zeros. Raises `ModelError` if this transformers would hide the hooks inside
        a gradient checkpoint.
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
        """The vectors (B, L, D) fp32 of the last `collect`, given the model's output (B, T, D); returned once.

        Raises `ModelError` if a layer gave no output or `collect` was not used.
        """
        call, self._call = self._call, None  # the graph of a batch is not kept alive until the next one
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
        """A copy or pickle made during a forward does not carry what that forward collected."""
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
        return REDUCTIONS[self.reduce](states, mask.to(states.device))
