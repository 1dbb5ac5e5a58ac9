"""Training without padding: the texts of a batch laid end to end in one row; and when that is allowed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

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
"""torch's FlashAttention over segments, where this torch has it in full (about 2.11 on)."""
with contextlib.suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" in inspect.signature(varlen_attn).parameters:
        VARLEN = varlen_attn

TAKES_GQA = VARLEN is not None and "enable_gqa" in inspect.signature(VARLEN).parameters

PACKED_SDPA = "poolwise_packed_sdpa"
"""The name under which transformers knows the attention below."""
UNKNOWN_TERMS = ("softcap", "s_aux", "position_bias")  # of Gemma 2, gpt-oss and T5: they change the logits
SIMILAR = 2  # texts of one group are at most so many times shorter than its longest


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from a CPU to CUDA without waiting for what the device is still at."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


class Segments:
    """Where the texts of a pack begin and end.

    lengths: of the texts in tokens, the longest first. ends (S + 1,) int32: 0 and the ends of the texts. runs:
    (texts, tokens of each) for each run of equal length. calls: how often attention has read it. kernel: whether
    VARLEN runs on the device (from Ampere on).

    Attention may read numbers and tensors of it, not `lengths`: it would be compiled anew for each number of texts.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths, self.longest = lengths, max(lengths)
        self.ends = sent(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), device)
        self.runs = [(len(list(same)), length) for length, same in groupby(lengths) if length]
        self.sizes = [texts * length for texts, length in self.runs]
        self.calls = 0
        self.kernel = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

    def arguments(self, flash: bool) -> dict[str, Any]:
        """The arguments of the model's forward that carry the segments to its attention."""
        names = {"cu_seq_lens": self.ends, "max_length": self.longest}
        given = {f"{name}_{side}": value for name, value in names.items() for side in "qk"}
        return given if flash else {**given, "segments": self}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention inside each segment; transformers' `sdpa` where there are none.

    query (1, H, N, E), key and value (1, K, N, E), H a multiple of K -> (1, N, H, E). Raises ModelError for what it
    cannot honour: a mask, a sliding window shorter than a text, soft caps, sinks, position biases.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if attention_mask is not None:
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
    # split, not sliced: the gradient of a slice is as large as the whole, that of all parts of a split together
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
    """What tells VARLEN that keys have fewer heads than queries. Its kernel always knew; torch < 2.12 takes no word."""
    return {"enable_gqa": grouped} if TAKES_GQA else {}


def _takes_varlen(query: Tensor, dropout: float) -> bool:
    """Whether torch's own FlashAttention knows these sizes and numbers: half precision, no dropout."""
    return (
        VARLEN is not None
        and query.dtype in (torch.bfloat16, torch.float16)
        and not dropout
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
    )


def _packed_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for a pack, which is the one batch given without a padding mask; `sdpa`'s for all others."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_attention)
AttentionMaskInterface.register(PACKED_SDPA, _packed_mask)


class Rows:
    """The texts of a batch, from the first real token to the last, whatever side it came padded on. All of it is kept
    on the CPU, where looking at it makes no device wait.

    ids, mask, pooled (B, T): the tokens padded on the right to the longest text, which of them are real, and which of
    those are pooled. lengths: B numbers of real tokens. came (B, T'): the mask as it came.
    """

    def __init__(self, ids: Tensor, mask: Tensor, pooled: Tensor):
        ids, mask, pooled = ids.cpu(), mask.cpu(), pooled.cpu()
        self.came = mask.bool()
        count = self.came.sum(1)
        self.lengths: list[int] = count.tolist()
        self.mask = torch.arange(max(self.lengths)) < count[:, None]
        self.ids = torch.zeros_like(self.mask, dtype=ids.dtype).masked_scatter(self.mask, ids[self.came])
        self.pooled = torch.zeros_like(self.mask).masked_scatter(self.mask, pooled.bool()[self.came])

    def as_it_came(self, states: Tensor) -> Tensor:
        """States (N, D) of all real tokens, text by text, put back to (B, T', D); zeros where there is padding."""
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
    device = batch["input_ids"].device
    prompts = [torch.as_tensor(column.get("prompt_length", 0), device=device).reshape(-1) for column in columns]
    batch["prompt_length"] = torch.cat(
        [prompt[:1].expand(len(column["input_ids"])) for prompt, column in zip(prompts, columns, strict=True)]
    )
    return batch


def forward_packed(
    model: nn.Module, collector: LayerCollector | None, rows: Rows, *, once: bool
) -> tuple[Tensor, Tensor | None]:
    """States as the batch came, zeros where there is padding, and the collected vectors (B, L, D): one packed forward.

    once: texts with equal tokens, equally pooled, are encoded once; exact only without dropout. Raises ModelError where
    a layer does not attend by segments.
    """
    device = next(model.parameters()).device
    chosen, copy = _longest_first(rows, once)
    order, text = torch.tensor(chosen), torch.tensor(copy)  # rows of the pack; and which of its texts each row is
    real = rows.mask[order]
    segments = Segments([rows.lengths[row] for row in chosen], device)
    positions = torch.arange(rows.ids.shape[1]).expand_as(rows.ids)
    starts = torch.tensor([0, *segments.lengths[:-1]]).cumsum(0)
    token = sent((starts[text][:, None] + positions)[rows.mask], device)
    inputs = {
        "input_ids": sent(rows.ids[order][real][None], device),
        "position_ids": sent(positions[order][real][None], device),
        "return_dict": True,
        **segments.arguments("flash" in backend(model)),
    }
    vectors = None
    if collector is None:
        states = model(**inputs).last_hidden_state
    else:
        with collector.collect_packed(segments.ends, rows.pooled[order][real]):
            states = model(**inputs).last_hidden_state
            vectors = collector.vectors(states)
    check_calls(model, segments)
    found = rows.as_it_came(states[0].index_select(0, token))
    return found, None if vectors is None else vectors[sent(text, device)]


def _longest_first(rows: Rows, once: bool) -> tuple[list[int], list[int]]:
    """Rows to encode, the longest first, and for each row of the batch its place among them."""
    first = list(range(len(rows.lengths)))
    if once:
        seen: dict[tuple, int] = {}
        ids, pooled = rows.ids.tolist(), rows.pooled.tolist()
        for row, length in enumerate(rows.lengths):
            first[row] = seen.setdefault((*ids[row][:length], *pooled[row][:length]), row)
    chosen = sorted(dict.fromkeys(first), key=lambda row: -rows.lengths[row])
    place = {row: number for number, row in enumerate(chosen)}
    return chosen, [place[row] for row in first]


def check_calls(model: nn.Module, segments: Segments) -> None:
    if "flash" in backend(model):
        return  # FlashAttention does not count; `refusal` has seen what it does
    layers = decoder_layers(model)
    if segments.calls != len(layers) and not any(map(is_compiled, layers)):
        raise ModelError(f"{segments.calls} of its {len(layers)} layers were told where the texts of a pack end")


def forward_grouped(
    run: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]], rows: Rows, prefix: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same from padded forwards of texts of similar length.

    `run` takes ids, mask and pooled mask of each group, and its part of `prefix` (B, 1), the lengths of the prompts.
    """
    order = sorted(range(len(rows.lengths)), key=lambda row: -rows.lengths[row])
    left, states, vectors, device = order, [], [], prefix.device
    while left:
        longest = rows.lengths[left[0]]
        group = [row for row in left if rows.lengths[row] * SIMILAR >= longest]
        if len(group) < len(left) and not rows.lengths[left[len(group)]]:
            group = left  # texts without tokens are no batch of their own
        left = left[len(group) :]
        chosen = torch.tensor(group)
        ids, mask, pooled = (sent(part[chosen, :longest], device) for part in (rows.ids, rows.mask, rows.pooled))
        some, collected = run(ids, mask, pooled, prefix[sent(chosen, device)])
        states.append(F.pad(some, (0, 0, 0, rows.mask.shape[1] - longest)))
        vectors += [] if collected is None else [collected]
    back = sent(torch.tensor(order).argsort(), device)
    found = rows.as_it_came(torch.cat(states)[back][sent(rows.mask, device)])
    return found, torch.cat(vectors)[back] if vectors else None


@contextlib.contextmanager
def packed_attention_on(model: nn.Module) -> Iterator[None]:
    """Inside, `model` can read packs: an `sdpa` model has the attention registered above. FlashAttention needs none."""
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
    """Why `model` cannot be trained packed under attention `mode` on texts of `max_length` tokens; None if it can.

    It is set to `mode`, packed, and looked at: a text's states must not move when its neighbours on both sides change,
    must be those of the text alone, and each layer must have been told the segments. Left as found.
    """
    config = base_model(model).config.get_text_config()
    name = type(base_model(model)).__name__
    if not takes_position_ids(model):
        return f"{name} takes no positions"
    if backend(model) not in ("sdpa", "flash_attention_2"):
        return f"attention backend {backend(model)!r} knows no packs"
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
    """What a text's states between two neighbours show against packing, in words; empty when nothing does."""
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
        return f"a text's states change by {moved:.1e} of their size with the texts beside it"
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
    arguments = segments.arguments("flash" in backend(model))
    states = model(input_ids=ids[None], position_ids=positions[None], **arguments).last_hidden_state[0]
    check_calls(model, segments)
    return states.split(segments.lengths)


def choose(model: nn.Module, designs: Sequence[Design], max_length: int) -> tuple[str, str | None]:
    """The layout in which a study with these `designs` is trained, and why it is not `packed`.

    One layout for all of them: with dropout, two layouts draw other random numbers. `model` is left as found.
    """
    for design in designs:
        if reads_padding(design):
            return "padded", f"the design {design.name} reads padding, so batches must be padded as they come"
    modes = dict.fromkeys(design.attention for design in designs)
    reasons = [f"attention {mode} needs masks of its own" for mode in modes if mode not in MODES]
    if reasons or any(reasons := [reason for mode in modes if (reason := refusal(model, mode, max_length))]):
        return "grouped", f"{reasons[0]}; texts of similar length are padded together instead"
    return "packed", None


def reads_padding(design: Design) -> bool:
    """Whether the states of padding tokens go into a text's embedding, which then depends on the texts beside it."""
    return design.spec.reads_padding(design.factors())


def has_dropout(model: nn.Module) -> bool:
    """Whether any layer, adapter or attention of `model` drops numbers at random while it trains."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    settings = vars(base_model(model).config.get_text_config())
    return layers or any(
        isinstance(value, float) and value > 0
        for name, value in settings.items()
        if "dropout" in name or "pdrop" in name or "layerdrop" in name
    )
