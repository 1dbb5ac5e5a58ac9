"""Batches without padding: texts end to end in one row (a pack), attention inside each, and which models allow it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from poolwise.errors import ModelError
from poolwise.model.attention import (
    AGREEMENT,
    EPSILON,
    MODES,
    backend,
    evaluating,
    get_attention,
    probe_ids,
    relative_change,
    set_attention,
    sliding_window,
    takes_position_ids,
)
from poolwise.model.hooks import LayerCollector, base_model, decoder_layers, is_compiled
from poolwise.study.design import Design

VARLEN: Any = None
"""torch's FlashAttention over segments; None if this torch lacks it or its `window_size` (complete from about 2.11)."""
with contextlib.suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" in inspect.signature(varlen_attn).parameters:
        VARLEN = varlen_attn

TAKES_GQA = VARLEN is not None and "enable_gqa" in inspect.signature(VARLEN).parameters

PACKED_SDPA = "poolwise_packed_sdpa"
"""The name under which transformers knows the attention below."""
UNKNOWN_TERMS = ("softcap", "s_aux", "position_bias")  # Gemma 2, gpt-oss and T5 change their logits by these
SIMILAR = 2  # in a group, the longest text is at most this many times as long as the shortest


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` in pinned memory if it is on the CPU and `device` is a GPU: only from there are copies asynchronous."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. From the CPU to a GPU the host does not wait for the copy, nor for kernels before it."""
    return pinned(tensor, device).to(device, non_blocking=True)


def flat_index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices (sum of lengths,) of the runs [start, start + length), one after the other."""
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - ends + lengths, lengths)


@dataclass
class Ragged:
    """B texts as one flat array on the CPU, where reading a number makes no device wait.

    ids (N,) int64: the tokens of all texts, one text after the other. lengths (B,): tokens of each text. pooled (N,)
    bool: which tokens are pooled; None: all of them. prompt: tokens before each text that belong to its prompt.
    """

    ids: np.ndarray
    lengths: np.ndarray
    pooled: np.ndarray | None = None
    prompt: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """(B,) index of the first token of each text."""
        return self.lengths.cumsum() - self.lengths

    @property
    def positions(self) -> np.ndarray:
        """(N,) place of each token in its text, from 0."""
        return flat_index(np.zeros_like(self.lengths), self.lengths)

    def take(self, order: np.ndarray) -> Ragged:
        """The texts numbered `order` (any number of them), in that order."""
        lengths = self.lengths[order]
        index = flat_index(self.starts[order], lengths)
        return Ragged(self.ids[index], lengths, None if self.pooled is None else self.pooled[index], self.prompt)

    def between(self, first: int, last: int) -> Ragged:
        """Texts `first` to `last` (exclusive), without a copy."""
        start = int(self.starts[first])
        part = slice(start, start + int(self.lengths[first:last].sum()))
        pooled = None if self.pooled is None else self.pooled[part]
        return Ragged(self.ids[part], self.lengths[first:last], pooled, self.prompt)

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask and pooled mask (B, T), padded on the right to the longest text."""
        mask = torch.from_numpy(np.arange(int(self.lengths.max(initial=0))) < self.lengths[:, None])
        ids = torch.zeros(mask.shape, dtype=torch.long).masked_scatter_(mask, torch.from_numpy(self.ids))
        if self.pooled is None:
            return ids, mask, mask
        return ids, mask, torch.zeros_like(mask).masked_scatter_(mask, torch.from_numpy(self.pooled))


NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""The attention mask of a pack. transformers passes on a mask of four dimensions as it is; given none, it would search
the positions for the ends of texts, and the host would wait for the GPU."""


class Segments:
    """Where the texts of a pack begin and end.

    lengths (S,): tokens of the texts, the longest first. ends (S + 1,) int32 on the device: 0 and the end of each text.
    longest: tokens of the longest. calls: how many layers have read it. kernel: whether the device runs VARLEN (Ampere
    or later).

    Compiled layers may read numbers and `ends`, but not `lengths`, which would make them recompile for each pack.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, device: torch.device):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.longest = int(self.lengths.max())
        self.ends = sent(torch.from_numpy(np.append(0, self.lengths.cumsum()).astype(np.int32)), device)
        self.calls = 0
        self.kernel = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(texts, tokens of each) for each run of equal length."""
        edges = np.flatnonzero(np.diff(self.lengths, prepend=-1, append=-1))
        runs = zip(np.diff(edges).tolist(), self.lengths[edges[:-1]].tolist(), strict=True)
        return [(texts, length) for texts, length in runs if length]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Tokens of each run."""
        return [texts * length for texts, length in self.runs]

    def arguments(self, flash: bool) -> dict[str, Any]:
        """The arguments of the model's forward that carry the segments to its attention."""
        names = {"cu_seq_lens": self.ends, "max_length": self.longest}
        given = {f"{name}_{side}": value for name, value in names.items() for side in "qk"}
        return given if flash else {**given, "segments": self, "attention_mask": NO_MASK}


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention inside each segment; without segments, transformers' `sdpa`.

    query (1, H, N, E), key and value (1, K, N, E), H a multiple of K -> (1, N, H, E). Raises ModelError for what it
    does not implement: a mask, a sliding window shorter than a text, soft caps, sinks, position biases.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ModelError("its attention has a mask of its own")
    if unknown := [name for name in UNKNOWN_TERMS if kwargs.get(name) is not None]:
        raise ModelError(f"its attention has {', '.join(unknown)}")
    window = kwargs.get("sliding_window")
    if window is not None and segments.longest > window:
        raise ModelError(f"a text of {segments.longest} tokens is longer than its sliding window of {window}")
    if not torch.compiler.is_compiling():  # each new value of a counter would be compiled anew
        segments.calls += 1
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    grouped = query.shape[1] != key.shape[1]
    states = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (N, heads, E)
    if segments.kernel and _takes_varlen(query, dropout):
        bounds = (segments.ends, segments.ends, segments.longest, segments.longest)
        out = VARLEN(*states, *bounds, scale=scaling, window_size=(-1, 0 if causal else -1), **_fewer_keys(grouped))
        return out[None], None
    # split, not sliced: each slice's gradient would be as large as the whole tensor, those of a split only together
    parts = zip(segments.runs, *(tensor.split(segments.sizes) for tensor in states), strict=True)
    attended = []
    for run, *split in parts:
        q, k, v = (tensor.unflatten(0, run).transpose(1, 2) for tensor in split)  # (texts, heads, tokens, E)
        part = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
        attended.append(part.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)[None], None


def _fewer_keys(grouped: bool) -> dict[str, bool]:
    """The argument by which VARLEN accepts fewer heads of keys than of queries; torch < 2.12 needs and has none."""
    return {"enable_gqa": grouped} if TAKES_GQA else {}


def _takes_varlen(query: Tensor, dropout: float) -> bool:
    """Whether torch's own FlashAttention computes this: half precision, heads of up to 256 numbers, no dropout."""
    half, size = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    return VARLEN is not None and half and not dropout and size <= 256 and size % 8 == 0


def _packed_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """`sdpa`'s mask for padded batches. A batch without a padding mask needs none."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_attention)
AttentionMaskInterface.register(PACKED_SDPA, _packed_mask)


class Rows(Ragged):
    """The texts of a padded batch, whichever side it is padded on. came (B, T): the mask of that batch."""

    def __init__(self, ids: Tensor, mask: Tensor, pooled: Tensor):
        self.came = mask.cpu().bool()
        real = (part.cpu()[self.came] for part in (ids, pooled))
        super().__init__(next(real).long().numpy(), self.came.sum(1).numpy(), next(real).bool().numpy())

    def as_it_came(self, states: Tensor) -> Tensor:
        """States (N, D) of all real tokens, text by text -> (B, T, D), padded as the batch was, with zeros."""
        padded = states.new_zeros(self.came.numel(), states.shape[-1])
        places = sent(self.came.flatten().nonzero()[:, 0], states.device)
        return padded.index_copy(0, places, states).view(*self.came.shape, -1)


def joined(columns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The features of several columns of texts as those of one batch, one column after the other."""
    width = max(column["input_ids"].shape[1] for column in columns)
    batch: dict[str, Any] = {
        name: torch.cat([F.pad(column[name], (0, width - column[name].shape[1])) for column in columns])
        for name in ("input_ids", "attention_mask")
    }
    prompts = [(torch.as_tensor(column.get("prompt_length", 0)), len(column["input_ids"])) for column in columns]
    lengths = torch.cat([prompt.reshape(-1)[:1].expand(texts) for prompt, texts in prompts])
    return {**batch, "prompt_length": lengths.to(batch["input_ids"].device)}


def run_pack(
    model: nn.Module, collector: LayerCollector | None, segments: Segments, tokens: Tensor, pooled: Tensor
) -> tuple[Tensor, Tensor | None]:
    """States (N, D) and, if collected, vectors (S, L, D) of one pack.

    tokens (2, N) on the device: ids, and the place of each in its text. pooled (N,) bool on the CPU. Raises ModelError
    if a layer does not attend by segments.
    """
    positions = tokens[1:].clone()  # the offset of a view would be one more size for compiled layers to depend on
    inputs = {"input_ids": tokens[:1], "position_ids": positions, "return_dict": True}
    inputs |= segments.arguments("flash" in backend(model))
    on = contextlib.nullcontext()
    with on if collector is None else collector.collect_packed(segments.ends, pinned(pooled, tokens.device)):
        states = model(**inputs).last_hidden_state
        vectors = None if collector is None else collector.vectors(states)
    check_calls(model, segments)
    return states[0], vectors


def forward_packed(
    model: nn.Module, collector: LayerCollector | None, rows: Rows, *, once: bool
) -> tuple[Tensor, Tensor | None]:
    """States (B, T, D), padded as the batch was, with zeros, and collected vectors (B, L, D), from one packed forward.

    once: texts with equal tokens, equally pooled, are encoded once; exact only without dropout. Raises ModelError if a
    layer does not attend by segments.
    """
    device = next(model.parameters()).device
    order, text = _longest_first(rows, once)  # rows of the pack; and which of its texts each row is
    pack = rows.take(order)
    segments = Segments(pack.lengths, device)
    tokens = sent(torch.from_numpy(np.stack([pack.ids, pack.positions])), device)
    assert pack.pooled is not None
    states, vectors = run_pack(model, collector, segments, tokens, torch.from_numpy(pack.pooled))
    token = sent(torch.from_numpy(flat_index(pack.starts[text], rows.lengths)), device)
    found = rows.as_it_came(states.index_select(0, token))
    return found, None if vectors is None else vectors[sent(torch.from_numpy(text), device)]


def _longest_first(rows: Rows, once: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows to encode, the longest first, and the place among them of each row of the batch."""
    first = np.arange(len(rows))
    if once:
        seen: dict[tuple[bytes, bytes], int] = {}
        assert rows.pooled is not None
        for row, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
            part = slice(start, start + length)
            first[row] = seen.setdefault((rows.ids[part].tobytes(), rows.pooled[part].tobytes()), row)
    chosen = np.unique(first)
    chosen = chosen[np.argsort(-rows.lengths[chosen], kind="stable")]
    place = np.empty_like(first)
    place[chosen] = np.arange(len(chosen))
    return chosen, place[first]


def check_calls(model: nn.Module, segments: Segments) -> None:
    """Raise ModelError unless every layer has read the segments; a layer that has not attends across texts."""
    if "flash" in backend(model):
        return  # FlashAttention does not count; `refusal` has checked what it computes
    layers = decoder_layers(model)
    if segments.calls != len(layers) and not any(map(is_compiled, layers)):
        raise ModelError(f"{segments.calls} of its {len(layers)} layers received the ends of the texts of a pack")


def forward_grouped(
    run: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]], rows: Rows, prefix: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same as `forward_packed`, from padded forwards of texts of similar length.

    `run` takes ids, mask and pooled mask of each group, and its part of `prefix` (B, 1), the lengths of the prompts.
    """
    order = np.argsort(-rows.lengths, kind="stable")
    lengths = rows.lengths[order]
    start, states, vectors, device = 0, [], [], prefix.device
    while start < len(order):
        end = start + int((lengths[start:] * SIMILAR >= lengths[start]).sum())
        if end < len(order) and not lengths[end]:
            end = len(order)  # texts without tokens are no batch of their own
        group = order[start:end]
        ids, mask, pooled = (sent(part, device) for part in rows.take(group).padded())
        some, collected = run(ids, mask, pooled, prefix[sent(torch.from_numpy(group), device)])
        states.append(some[mask])
        vectors += [] if collected is None else [collected]
        start = end
    back = np.argsort(order)
    token = flat_index((lengths.cumsum() - lengths)[back], rows.lengths)
    found = rows.as_it_came(torch.cat(states)[sent(torch.from_numpy(token), device)])
    return found, torch.cat(vectors)[sent(torch.from_numpy(back), device)] if vectors else None


@contextlib.contextmanager
def packed_attention_on(model: nn.Module) -> Iterator[None]:
    """Inside, `model` attends by segments: `sdpa` is replaced by the attention above, FlashAttention is not."""
    backbone, before = base_model(model), backend(model)
    if before == "sdpa":
        backbone.set_attn_implementation(PACKED_SDPA)
    try:
        yield
    finally:
        if before == "sdpa":
            backbone.set_attn_implementation(before)


LAYER_TYPES = {"full_attention", "sliding_attention"}
PROBE_LENGTHS = [8, 6, 4]  # tokens of the probed text and its neighbours, the longest first


def refusal(model: nn.Module, mode: str, max_length: int) -> str | None:
    """Why `model` cannot be packed under attention `mode` on texts of `max_length` tokens; None if it can.

    It is set to `mode` and probed: a text's states must not change with its neighbours in the pack, must be those of
    the text alone, and each layer must have read the segments. Afterwards the model is as it was before.
    """
    config = base_model(model).config.get_text_config()
    name = type(base_model(model)).__name__
    if not takes_position_ids(model):
        return f"{name} takes no position ids"
    if backend(model) not in ("sdpa", "flash_attention_2"):
        return f"attention backend {backend(model)!r} cannot attend by segments"
    window = sliding_window(model)
    if window is not None and window < max_length:
        return f"{name} has a sliding window of {window} tokens, shorter than max_length = {max_length}"
    if other := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"{name} has layers of {', '.join(sorted(other))}"
    declared, unset = get_attention(model), not hasattr(config, "is_causal")
    try:
        set_attention(model, mode)
        with packed_attention_on(model), evaluating(model), torch.no_grad():
            seen = _contradiction(model)
    except (ModelError, TypeError, ValueError, RuntimeError) as error:
        seen = str(error).split("\n")[0].split(". ")[0]
    finally:
        set_attention(model, declared)
        if unset:
            del config.is_causal
    return f"{name} cannot be packed under {mode} attention: {seen}" if seen else None


def _contradiction(model: nn.Module) -> str:
    """How a text's states between two neighbours differ from those of the text alone, in words; empty if they agree."""
    ids, changed = probe_ids(model, sum(PROBE_LENGTHS))
    first, text, last = ids.split(PROBE_LENGTHS)
    other_first, _, other_last = changed.split(PROBE_LENGTHS)
    before, states, _ = _packed_states(model, first, text, last)
    other_before, beside, _ = _packed_states(model, other_first, text, other_last)
    (alone,) = _packed_states(model, text)
    positions = torch.arange(len(text), device=text.device)[None]
    padded = model(input_ids=text[None], attention_mask=torch.ones_like(text)[None], position_ids=positions)
    small, close = EPSILON.get(states.dtype, 1e-3), AGREEMENT.get(states.dtype, 0.2)
    if not _largest_change(other_before, before) > small:
        return "its states do not change with its tokens"
    if (moved := _largest_change(beside, states)) > small:
        return f"a text's states change by {moved:.1e} of their size with its neighbours in the pack"
    for expected, where in ((alone, "alone in a pack"), (padded.last_hidden_state[0], "in a padded batch")):
        if not (apart := _largest_change(states, expected)) <= close:
            return f"a text's states differ by {apart:.1e} of their size from those {where}"
    return ""


def _largest_change(a: Tensor, b: Tensor) -> float:
    return float(relative_change(a.float(), b.float()).max())


def _packed_states(model: nn.Module, *texts: Tensor) -> tuple[Tensor, ...]:
    """Last hidden states (T, D) of each text, from one pack of all."""
    ids = torch.cat(texts)
    segments = Segments([len(text) for text in texts], ids.device)
    positions = torch.cat([torch.arange(len(text), device=ids.device) for text in texts])
    states, _ = run_pack(model, None, segments, torch.stack([ids, positions]), torch.empty(0))
    return states.split(segments.lengths.tolist())


def choose(model: nn.Module, designs: Sequence[Design], max_length: int) -> tuple[str, str | None]:
    """The layout in which a study with these `designs` is trained, and why it is not `packed`.

    All designs get the same layout, because with dropout two layouts draw different random numbers.
    """
    modes = dict.fromkeys(design.attention for design in designs)
    reasons = [f"attention {mode} needs a mask for each layer" for mode in modes if mode not in MODES]
    if reasons or any(reasons := [reason for mode in modes if (reason := refusal(model, mode, max_length))]):
        return "grouped", f"{reasons[0]}; texts of similar length are padded together instead"
    return "packed", None


def has_dropout(model: nn.Module) -> bool:
    """Whether any layer, adapter or attention of `model` has dropout."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    settings = vars(base_model(model).config.get_text_config())
    return layers or any(
        isinstance(value, float) and value > 0
        for name, value in settings.items()
        if "dropout" in name or "pdrop" in name or "layerdrop" in name
    )
