"""Which tokens may attend to which: set the mode, measure it, refuse a model that does not follow.

transformers >= 5.2 turns a decoder bidirectional when `config.is_causal` is False *on the loaded model*. Passed to
`from_pretrained` or set on a config before loading it is dropped silently, some models ignore it, and one (StableLM
under SDPA) follows it only in padded batches. So no declaration is trusted: `verify` changes one token at a time and
measures which hidden states respond. The mask decides what is padding, and positions are always given explicitly. Modes
in which layers or tokens differ are implemented by hooks: see `model.hooks`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poolwise.errors import AttentionError, suggest
from poolwise.model.base import restored_rng
from poolwise.model.hooks import LayerMasks, attending, base_model, decoder_layers, inner_modes, layer_masks, reachable
from poolwise.study.catalogue import ATTENTIONS, is_attention

MODES = ("causal", "bidirectional")
PADDINGS = ("none", "left", "right")
PROBE_LENGTH = 5  # tokens whose influence is measured: more cost time and show nothing else
SHOWN_LENGTH = 8  # of the matrices that `poolwise probe` prints
PROBE_PADDING = 3  # padding positions added to them
PROBE_PREFIX = 3  # how many of the measured tokens are the prompt, for modes that treat it differently

# A relative change below this is no influence: a few units in the last place of the state's largest entry.
EPSILON = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# A real position may differ by this much between padding cases, which run other kernels.
AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
_CASES = {"none": "an unpadded batch", "left": "a left-padded batch", "right": "a right-padded batch"}


def set_attention(model: nn.Module, mode: str) -> None:
    """Give `model` (a transformers `PreTrainedModel` or a `PeftModel` over one) an attention mode.

    This only declares the mode: `verify` tells whether the model follows. Raises `AttentionError` for an unknown mode,
    for an encoder-decoder, which has no single attention to choose, and if layers cannot be given their own masks.
    """
    _check_mode(mode)
    backbone = base_model(model)
    if getattr(backbone.config, "is_encoder_decoder", False):
        raise AttentionError(
            f"{_name(model)} is an encoder-decoder: causal and bidirectional are choices for a decoder-only "
            "base model. Fix: take a causal language model as base_model."
        )
    if (masks := layer_masks(model)) is not None:
        masks.remove()
    backbone.poolwise_masks = None if mode in MODES else LayerMasks(backbone, mode, backend(model))
    # modes with hooks start from causal: the hooks replace the masks of the layers that differ
    backbone.config.get_text_config().is_causal = mode != "bidirectional"


def get_attention(model: nn.Module) -> str:
    """The mode that `model` declares: that of its hooks, `config.is_causal` if set, else its modules' flags."""
    if (masks := layer_masks(model)) is not None:
        return masks.mode
    backbone = base_model(model)
    config = backbone.config.get_text_config()
    declared = getattr(config, "is_causal", None)
    if declared is None:
        flags = {getattr(module, "is_causal", None) for module in backbone.modules()} - {None}
        declared = flags != {False} and not getattr(config, "use_bidirectional_attention", False)
    return "causal" if declared else "bidirectional"


@contextlib.contextmanager
def restored_attention(model: nn.Module) -> Iterator[None]:
    """Restores the model's mode at the end of the block, and whether it declares one at all."""
    config = base_model(model).config.get_text_config()
    mode, undeclared = get_attention(model), not hasattr(config, "is_causal")
    try:
        yield
    finally:
        set_attention(model, mode)
        if undeclared:
            del config.is_causal


def backend(model: nn.Module) -> str:
    """The attention implementation in use: "eager", "sdpa", "flash_attention_2", …"""
    return str(getattr(base_model(model).config.get_text_config(), "_attn_implementation", None) or "eager")


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) long under `mask` (B, T): 0 for the first real token, whatever the padding side."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def takes_position_ids(model: nn.Module) -> bool:
    """Whether the forward pass has a parameter `position_ids` (Mamba, for one, has no positions)."""
    return "position_ids" in inspect.signature(base_model(model).forward).parameters


def check_window(model: nn.Module, mode: str, max_length: int) -> None:
    """Refuse FlashAttention with a bidirectional sliding window shorter than the texts.

    It reaches `window - 1` tokens to each side where eager, SDPA and flex reach `window`: the same weights would give
    other embeddings on another backend. `max_length` is in tokens. Raises `AttentionError`.
    """
    _check_mode(mode)
    window = sliding_window(model)
    if mode.startswith("bidirectional") and "flash" in backend(model) and window is not None and max_length > window:
        raise AttentionError(
            f"{_name(model)} has a sliding window of {window} tokens, and {backend(model)} makes it one token narrower "
            f"than other backends do when attention is bidirectional: max_length = {max_length} would give embeddings "
            f"that change with the backend. Fix: attn_implementation = 'sdpa', or max_length <= {window}, or "
            "attention = 'causal'."
        )


def sliding_window(model: nn.Module) -> int | None:
    """The sliding window, in tokens, of the layers that have one; None if every layer attends to all tokens."""
    config = base_model(model).config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def partial_layers(model: nn.Module, longest: int | None = None) -> str | None:
    """What an attention mode means for a base in which not every layer attends to all tokens; None if all do.

    longest: tokens of the longest text; a window of that many is as good as none.
    transformers turns a sliding window into a symmetric one; what is no attention (LFM2's convolutions, the recurrences
    of Qwen3-Next) reads earlier tokens only in every mode. The probe sees that some layer mixes both ways, not which.
    """
    config = base_model(model).config.get_text_config()
    kinds, window = Counter(getattr(config, "layer_types", None) or ()), sliding_window(model)
    if not kinds and window is not None:
        kinds = Counter({"sliding_attention": config.num_hidden_layers})
    chunk = getattr(config, "attention_chunk_size", None)
    limits = {"sliding_attention": (window, "to either side"), "chunked_attention": (chunk, "within their chunk")}
    local = {kind: kinds.pop(kind) for kind in limits if kind in kinds}
    whole = kinds.pop("full_attention", 0)
    for kind in tuple(local):
        tokens, _ = limits[kind]
        if longest and tokens and longest <= tokens:
            whole += local.pop(kind)
    if not local and not kinds:
        return None
    parts = [f"{whole} attend to all tokens"]
    for kind, n in local.items():
        tokens, where = limits[kind]
        parts.append(f"{n} to {tokens or 'some'} tokens at most (bidirectional: {where})")
    parts += [f"{n} ({kind}) read earlier tokens only, whatever the mode" for kind, n in sorted(kinds.items())]
    return f"Of {whole + sum(local.values()) + kinds.total()} layers {'; '.join(parts)}."


def influence(model: nn.Module, padding: str = "none", length: int = SHOWN_LENGTH) -> Tensor:
    """The influence matrix (T, T) fp32 on CPU: [i, j] is the largest change of state i when token j changes.

    Relative to the largest absolute entry of state i; T = `length` real tokens; `padding`: "none", "left" or "right".
    A causal model's matrix is lower triangular. Modes, gradients and random state of the model are restored.
    """
    if padding not in PADDINGS:
        raise AttentionError(f"padding = {padding!r}: allowed are {', '.join(map(repr, PADDINGS))}")
    return _probe(model, (padding,), length)[padding, None].influence


def verify(model: nn.Module, mode: str) -> None:
    """Raise `AttentionError` unless `model` attends as `mode` says: unpadded, left- and right-padded, on its backend.

    causal: no state moves with a later token, and each but the first moves with some earlier one. bidirectional: each
    state moves with some earlier and some later token (some, because a sliding window hides distant ones). The prefix
    modes likewise, the first `PROBE_PREFIX` tokens being the prompt. With the last N layers bidirectional, states are
    also causal before them and bidirectional after the first of them. In all modes neither the content of the padding
    nor its side moves a state, and `position_ids` are what the model expects.
    """
    _check_mode(mode)
    reason, _ = _examine(model, mode)
    if reason:
        raise AttentionError(reason)


def verdict(model: nn.Module) -> dict[str, Any]:
    """What `poolwise probe` prints: causal and bidirectional attention tried on `model`, whose own mode is restored.

    Keys: model, backend, dtype, declared, layers (`partial_layers`), modes; modes[mode] has ok, reason (None if ok) and
    influence[padding], the (T, T) matrix as lists.
    """
    answer: dict[str, Any] = {
        "model": _name(model),
        "backend": backend(model),
        "dtype": str(_embeddings(model).dtype).removeprefix("torch."),
        "declared": get_attention(model),
        "layers": partial_layers(model),
        "modes": {},
    }
    with restored_attention(model):
        for mode in MODES:
            set_attention(model, mode)
            reason, matrices = _examine(model, mode, SHOWN_LENGTH)
            answer["modes"][mode] = {
                "ok": reason is None,
                "reason": reason,
                "influence": {padding: matrix.tolist() for padding, matrix in matrices.items()},
            }
    return answer


def _name(model: nn.Module) -> str:
    return type(base_model(model)).__name__


def _check_mode(mode: str) -> None:
    if not is_attention(mode):
        allowed = ", ".join(map(repr, ATTENTIONS))
        raise AttentionError(f"attention = {mode!r}: allowed are {allowed}{suggest(mode, ATTENTIONS)}")


class Probe(NamedTuple):
    """What one padding case shows. All changes are relative to the largest absolute entry of the state they change."""

    influence: Tensor  # (T, T): [i, j] how far state i moves when token j changes
    padding: Tensor  # (T,): how far state i moves when the padding's content changes
    noise: float  # how far the states of two equal rows of the batch differ
    states: Tensor  # (T, D) of the unchanged row


def _examine(model: nn.Module, mode: str, length: int = PROBE_LENGTH) -> tuple[str | None, dict[str, Tensor]]:
    """The first contradiction to `mode` as a message (None: the model follows), and all influence matrices."""
    inner = inner_modes(model, mode)
    layers = (None, *(layer for layer, _ in inner))
    # unpadded rows are a batch of their own, because models take another path through a batch without padding
    probes = {**_probe(model, ("none",), length, layers), **_probe(model, ("left", "right"), length, layers)}
    seen = {}
    for padding in PADDINGS:
        found = _contradiction(probes[padding, None], probes["none", None], mode)
        if padding == "none":
            found = found or _positions(model, probes["none", None], length)
        for layer, inner_mode in inner:
            words = _contradiction(probes[padding, layer], probes[padding, layer], inner_mode)
            found = found or (words and f"after layer {layer + 1}, which must be {inner_mode}, {words}")
        seen[padding] = found
    reason = next((_refusal(model, mode, padding, words) for padding, words in seen.items() if words), None)
    return reason, {padding: probes[padding, None].influence for padding in PADDINGS}


def _contradiction(probe: Probe, unpadded: Probe, mode: str) -> str:
    """How `probe` contradicts `mode`, in words; empty if it agrees."""
    T, dtype = len(probe.influence), probe.states.dtype
    if not (probe.states.isfinite().all() and probe.influence.isfinite().all()):
        return f"hidden states are not finite numbers in {dtype}"
    epsilon = max(EPSILON.get(dtype, 1e-3), 4 * probe.noise)
    moved = probe.influence > epsilon
    allowed = reachable(mode, T, PROBE_PREFIX)
    leaks, sees = (moved & ~allowed).any(1), allowed.triu(1).any(1)
    future, past = moved.triu(1).any(1)[sees], moved.tril(-1).any(1)[1:]
    if leaks.any():
        size = f"(by up to {float((probe.influence * ~allowed).max()):.1e} of their size)"
        return f"{int(leaks.sum())} of {int((~allowed).any(1).sum())} positions change with a later token {size}"
    if not future.all():
        return f"{int((~future).sum())} of {int(sees.sum())} positions do not change with any later token"
    if not past.all():
        return f"{int((~past).sum())} of {T - 1} positions do not change with any earlier token"
    if (probe.padding > epsilon).any():
        return f"real tokens change with the content of the padding (by up to {float(probe.padding.max()):.1e})"
    apart = float(relative_change(probe.states.double(), unpadded.states.double()).max())
    if apart > AGREEMENT.get(dtype, 0.2):
        return f"real tokens change by {apart:.1e} of their size against an unpadded batch"
    return ""


def _positions(model: nn.Module, unpadded: Probe, length: int) -> str:
    """How explicit positions contradict those that the model counts itself, in words; empty if they agree."""
    if not takes_position_ids(model):
        return ""
    ids = probe_ids(model, length)[0][None]
    own = _states(model, ids, torch.ones_like(ids), explicit_positions=False)[None][0].cpu()
    apart = float(relative_change(own.double(), unpadded.states.double()).max())
    if apart <= AGREEMENT.get(own.dtype, 0.2):
        return ""
    return f"positions counted from 0 give other states than the model's own (by {apart:.1e})"


def _refusal(model: nn.Module, mode: str, padding: str, seen: str) -> str:
    config = base_model(model).config.get_text_config()
    fixes = ["another base model (`poolwise probe MODEL` shows what one can do)"]
    fixes.insert(0, f"attention = {next(other for other in MODES if other != mode)!r}")
    if mode != "causal" and backend(model) != "eager":
        fixes.insert(0, "attn_implementation = 'eager'")
    return (
        f"{_name(model)} on attention backend {backend(model)!r} is not {mode} in {_CASES[padding]}: "
        f"declared is config.is_causal = {getattr(config, 'is_causal', None)}, measured is that {seen}. "
        f"Fix: try {', or '.join(fixes)}."
    )


def relative_change(a: Tensor, b: Tensor) -> Tensor:
    """Largest absolute difference over the last axis, relative to the largest absolute entry of `b`."""
    return (a - b).abs().amax(-1) / b.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)


def _probe(
    model: nn.Module, paddings: Sequence[str], length: int, layers: Sequence[int | None] = (None,)
) -> dict[tuple[str, int | None], Probe]:
    """What each padding case shows of each layer (None: the model's output), from one forward of all their rows.

    The rows of a case: unchanged, one per changed token, the padding changed, unchanged again.
    """
    ids, changed = probe_ids(model, length + PROBE_PADDING)
    pads = 0 if "none" in paddings else PROBE_PADDING
    rows, masks = [], []
    for padding in paddings:
        start = pads if padding == "left" else 0
        # the last `pads` ids fill the padding, so that the real tokens are the same in each case
        filled, other = (part[: length + pads].roll(start) for part in (ids, changed))
        mask = torch.zeros_like(filled)
        mask[start : start + length] = 1
        case = filled.repeat(length + 3, 1)
        tokens = torch.arange(length, device=ids.device)
        case[tokens + 1, tokens + start] = other[start : start + length]
        case[length + 1] = torch.where(mask.bool(), filled, other)
        rows.append(case)
        masks.append(mask.expand_as(case))
    probes = {}
    for layer, states in _states(model, torch.cat(rows), torch.cat(masks), layers).items():
        for padding, case in zip(paddings, states.cpu().chunk(len(paddings)), strict=True):
            start = pads if padding == "left" else 0
            real = case[:, start : start + length]
            first = real[0].double()  # on the CPU, because some devices have no float64
            probes[padding, layer] = Probe(
                influence=relative_change(real[1 : length + 1].double(), first).T.float(),
                padding=relative_change(real[length + 1].double(), first).float(),
                noise=float(relative_change(real[length + 2].double(), first).max()),
                states=real[0],
            )
    return probes


def _embeddings(model: nn.Module) -> Tensor:
    """The input embedding matrix (V, D)."""
    return base_model(model).get_input_embeddings().weight


def probe_ids(model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Token ids (count,), and for each another id to change it to, distant in the embedding space.

    Taken from the whole vocabulary except the ids that the configuration names (padding, BOS, EOS, image tokens, …).
    """
    weight = _embeddings(model).detach()
    config = base_model(model).config
    special: set[int] = set()
    for name, value in {**vars(config), **vars(config.get_text_config())}.items():
        if name.endswith(("_token_id", "_token_index")):
            special.update(value if isinstance(value, (list, tuple)) else [value])
    size = min(len(weight), getattr(config.get_text_config(), "vocab_size", None) or len(weight))
    allowed = torch.tensor([i for i in range(size) if i not in special], device=weight.device)
    if len(allowed) < 2:
        raise AttentionError(f"{_name(model)}: a vocabulary of {size} ids is too small to probe")
    spread = allowed[torch.linspace(0, len(allowed) - 1, min(64, len(allowed)), device=weight.device).long()]
    # every 5th of 64 candidates, so that neighbours in the text are not neighbours in the vocabulary
    ids = spread[(torch.arange(count, device=weight.device) * 5 + 1) % len(spread)]
    distance = torch.cdist(weight[ids].float(), weight[spread].float())
    return ids, spread[distance.argmax(1)]


def _states(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    layers: Sequence[int | None] = (None,),
    explicit_positions: bool = True,
) -> dict[int | None, Tensor]:
    """The states (B, T, D) that each layer (None: the model) gives in one forward in eval mode."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if explicit_positions and takes_position_ids(model):
        inputs["position_ids"] = position_ids(mask)
    if "use_cache" in inspect.signature(base_model(model).forward).parameters:
        inputs["use_cache"] = False
    outputs: dict[int | None, Any] = {}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if layer is not None:
                hook = decoder_layers(base_model(model))[layer].register_forward_hook(
                    lambda module, args, output, layer=layer: outputs.update({layer: output})
                )
                stack.callback(hook.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(attending(model, mask, PROBE_PREFIX))
        outputs[None] = model(**inputs)
    return {layer: _tensor(outputs[layer]) for layer in layers}


def _tensor(output: Any) -> Tensor:
    """The states in what a layer or a model returns."""
    if isinstance(output, Tensor):
        return output
    states = getattr(output, "last_hidden_state", None)
    return output[0] if states is None else states


@contextlib.contextmanager
def restored_mode(model: nn.Module) -> Iterator[None]:
    """Restores each submodule's mode (training or eval) and the random state at the end of the block."""
    modes = [(module, module.training) for module in model.modules()]
    with restored_rng(model):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, on one thread; modes, threads and random state are restored.

    A probe's batches are so small that a second thread costs more than it computes.
    """
    threads = torch.get_num_threads()
    with restored_mode(model):
        model.eval()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
