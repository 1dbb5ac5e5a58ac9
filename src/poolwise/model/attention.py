"""Which tokens may see which: set the mode, measure it, refuse a model that does not follow.

transformers >= 5.2 turns a decoder bidirectional when `config.is_causal` is False *on the loaded model*. Given to
`from_pretrained` or to a config it is dropped without a word, some models ignore it, and one (StableLM under SDPA)
follows it only when the batch is padded. So nothing here is believed: `verify` changes one token at a time and looks
which hidden states move. The mask decides what is padding, and positions are always given explicitly. Modes in which
layers or tokens differ are made by hooks: see `decoder.masks`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poolwise.errors import AttentionError, suggest
from poolwise.model.hooks import LayerMasks, attending, base_model, decoder_layers, inner_modes, layer_masks, reachable
from poolwise.study.catalogue import ATTENTIONS, is_attention

MODES = ("causal", "bidirectional")
PADDINGS = ("none", "left", "right")
PROBE_LENGTH = 8  # tokens whose influence is measured
PROBE_PADDING = 3  # padding positions beside them
PROBE_PREFIX = 3  # of the measured tokens: the prompt, where the mode cares

# A relative change below this is no influence: a few units in the last place of the state's largest entry.
EPSILON = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
# A real position may differ by this much between padding cases, which run other kernels.
AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
_CASES = {"none": "an unpadded batch", "left": "a left-padded batch", "right": "a right-padded batch"}


def set_attention(model: nn.Module, mode: str) -> None:
    """Give `model` (a transformers `PreTrainedModel` or a `PeftModel` over one) an attention mode.

    Only declares: call `verify` to know whether the model follows. Raises `AttentionError` for an unknown mode, for an
    encoder-decoder, which has no single attention to choose, and where layers cannot be given masks of their own.
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
    backbone.config.get_text_config().is_causal = mode != "bidirectional"


def get_attention(model: nn.Module) -> str:
    """The mode that `model` declares: `config.is_causal` where set, otherwise what its modules say of themselves."""
    if (masks := layer_masks(model)) is not None:
        return masks.mode
    backbone = base_model(model)
    config = backbone.config.get_text_config()
    declared = getattr(config, "is_causal", None)
    if declared is None:
        flags = {getattr(module, "is_causal", None) for module in backbone.modules()} - {None}
        declared = flags != {False} and not getattr(config, "use_bidirectional_attention", False)
    return "causal" if declared else "bidirectional"


def backend(model: nn.Module) -> str:
    """The attention implementation in use: "eager", "sdpa", "flash_attention_2", …"""
    return str(getattr(base_model(model).config.get_text_config(), "_attn_implementation", None) or "eager")


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) long under `mask` (B, T): 0 for the first real token, whatever the padding side."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def takes_position_ids(model: nn.Module) -> bool:
    """Whether the forward pass names `position_ids` (Mamba, for one, has no positions)."""
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
    """The sliding window, in tokens, of the layers that have one; None where every layer sees all tokens."""
    config = base_model(model).config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


class Probe(NamedTuple):
    """One padding case. All changes are relative to the largest absolute entry of the state they change."""

    influence: Tensor  # (T, T): [i, j] how far state i moves when token j changes
    padding: Tensor  # (T,): how far state i moves when the padding's content changes
    noise: float  # how far the states of two equal rows of the batch differ
    positions: float  # how far states move when the model counts positions itself; 0 in a padded batch
    states: Tensor  # (T, D) of the unchanged row


def influence(model: nn.Module, padding: str = "none", length: int = PROBE_LENGTH) -> Tensor:
    """The influence matrix (T, T) fp32 on CPU: [i, j] is the largest change of state i when token j changes.

    Relative to the largest absolute entry of state i; T = `length` real tokens; `padding`: "none", "left" or "right".
    A causal model's matrix is lower triangular. The model is left as found: modes, gradients, random state.
    """
    return _probe(model, padding, length).influence


def verify(model: nn.Module, mode: str) -> None:
    """Raise `AttentionError` unless `model` attends as `mode` says: unpadded, left- and right-padded, on its backend.

    causal: no state moves with a later token, and each but the first moves with some earlier one. bidirectional: each
    state moves with some earlier and some later token (some, because a sliding window hides far ones). The prefix modes
    likewise, the first `PROBE_PREFIX` tokens being the prompt. With the last N layers bidirectional, states are also
    causal before them and bidirectional after the first of them. In all, what stands in the padding moves nothing,
    neither does the padding side, and `position_ids` are what the model expects.
    """
    _check_mode(mode)
    reason, _ = _examine(model, mode)
    if reason:
        raise AttentionError(reason)


def verdict(model: nn.Module) -> dict[str, Any]:
    """What `poolwise probe` prints: both modes tried on `model`, which keeps the mode it had.

    Keys: model, backend, dtype, declared, modes; modes[mode] has ok, reason (None if ok) and
    influence[padding], the (T, T) matrix as lists.
    """
    config = base_model(model).config.get_text_config()
    before = {"is_causal": config.is_causal} if hasattr(config, "is_causal") else {}
    answer: dict[str, Any] = {
        "model": _name(model),
        "backend": backend(model),
        "dtype": str(_embeddings(model).dtype).removeprefix("torch."),
        "declared": get_attention(model),
        "modes": {},
    }
    try:
        for mode in MODES:
            set_attention(model, mode)
            reason, matrices = _examine(model, mode)
            answer["modes"][mode] = {
                "ok": reason is None,
                "reason": reason,
                "influence": {padding: matrix.tolist() for padding, matrix in matrices.items()},
            }
    finally:
        if before:
            config.is_causal = before["is_causal"]
        elif hasattr(config, "is_causal"):
            del config.is_causal
    return answer


def _name(model: nn.Module) -> str:
    return type(base_model(model)).__name__


def _check_mode(mode: str) -> None:
    if not is_attention(mode):
        allowed = ", ".join(map(repr, ATTENTIONS))
        raise AttentionError(f"attention = {mode!r}: allowed are {allowed}{suggest(mode, ATTENTIONS)}")


def _examine(model: nn.Module, mode: str) -> tuple[str | None, dict[str, Tensor]]:
    """Probe each padding case: what speaks against `mode` first (None: nothing), and all influence matrices."""
    probes = {padding: _probe(model, padding) for padding in PADDINGS}
    seen = {padding: _contradiction(probe, probes["none"], mode) for padding, probe in probes.items()}
    for layer, inner in inner_modes(model, mode):
        for padding in PADDINGS:
            words = _contradiction(probe := _probe(model, padding, layer=layer), probe, inner)
            seen[padding] = seen[padding] or (words and f"after layer {layer + 1}, which must be {inner}, {words}")
    reason = next((_refusal(model, mode, padding, words) for padding, words in seen.items() if words), None)
    return reason, {padding: probe.influence for padding, probe in probes.items()}


def _contradiction(probe: Probe, unpadded: Probe, mode: str) -> str:
    """What `probe` shows against `mode`, in words; empty when it agrees."""
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
    if probe.positions > AGREEMENT.get(dtype, 0.2):
        return f"positions counted from 0 give other states than the model's own (by {probe.positions:.1e})"
    return ""


def _refusal(model: nn.Module, mode: str, padding: str, seen: str) -> str:
    config = base_model(model).config.get_text_config()
    fixes = ["another base model (`poolwise probe MODEL` shows what one can do)"]
    fixes.insert(0, f"attention = {next(other for other in MODES if other != mode)!r}")
    if mode != "causal" and backend(model) != "eager":
        fixes.insert(0, "attn_implementation = 'eager'")
    return (
        f"{_name(model)} on attention backend {backend(model)!r} is not {mode} in {_CASES[padding]}: "
        f"declared is config.is_causal = {getattr(config, 'is_causal', None)}, seen is that {seen}. "
        f"Fix: try {', or '.join(fixes)}."
    )


def relative_change(a: Tensor, b: Tensor) -> Tensor:
    """Largest absolute difference over the last axis, relative to the largest absolute entry of `b`."""
    return (a - b).abs().amax(-1) / b.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)


def _probe(model: nn.Module, padding: str, length: int = PROBE_LENGTH, layer: int | None = None) -> Probe:
    """One forward of length + 3 rows: unchanged, one per changed token, changed padding, unchanged again.

    Of the model's last states, or of those that the decoder layer of index `layer` gives.
    """
    if padding not in PADDINGS:
        raise AttentionError(f"padding = {padding!r}: allowed are {', '.join(map(repr, PADDINGS))}")
    ids, changed = probe_ids(model, length + PROBE_PADDING)
    pads = 0 if padding == "none" else PROBE_PADDING
    start = pads if padding == "left" else 0
    real = slice(start, start + length)
    # the last `pads` ids fill the padding, so that real tokens are the same in each case
    filled, other = ids[: length + pads].roll(start), changed[: length + pads].roll(start)
    rows = filled.repeat(length + 3, 1)
    mask = torch.zeros_like(rows)
    mask[:, real] = 1
    single = torch.arange(length, device=ids.device)
    rows[single + 1, single + start] = other[real]
    rows[length + 1] = torch.where(mask[0].bool(), filled, other)
    states = _states(model, rows, mask, layer=layer)[:, real].cpu()
    first = states[0].double()  # on CPU: some devices have no float64
    positions = 0.0
    if padding == "none" and layer is None and takes_position_ids(model):
        own = _states(model, rows[:1], mask[:1], explicit_positions=False)[0].cpu()
        positions = float(relative_change(own.double(), first).max())
    return Probe(
        influence=relative_change(states[1 : length + 1].double(), first).T.float(),
        padding=relative_change(states[length + 1].double(), first).float(),
        noise=float(relative_change(states[length + 2].double(), first).max()),
        positions=positions,
        states=states[0],
    )


def _embeddings(model: nn.Module) -> Tensor:
    """The input embedding matrix (V, D)."""
    return base_model(model).get_input_embeddings().weight


def probe_ids(model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Token ids (count,) and for each another id to change it to, far away in the embedding space.

    Taken from the whole vocabulary without the ids that the configuration names (padding, BOS, EOS, image tokens, …).
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
    model: nn.Module, ids: Tensor, mask: Tensor, explicit_positions: bool = True, layer: int | None = None
) -> Tensor:
    """States (B, T, D), the last ones or a layer's, of one forward in eval mode, which leaves no trace in the model."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if explicit_positions and takes_position_ids(model):
        inputs["position_ids"] = position_ids(mask)
    if "use_cache" in inspect.signature(base_model(model).forward).parameters:
        inputs["use_cache"] = False
    kept: list[Any] = []
    watched = [] if layer is None else [decoder_layers(base_model(model))[layer]]
    hooks = [module.register_forward_hook(lambda *call: kept.append(call[-1])) for module in watched]
    with evaluating(model), torch.no_grad(), attending(model, mask, PROBE_PREFIX):
        output = model(**inputs)
    for hook in hooks:
        hook.remove()
    output = kept[0] if kept else output
    states = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    return output[0] if states is None else states


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; each submodule's own mode and the random state restored after."""
    training = [module for module in model.modules() if module.training]
    # Not torch.random.fork_rng: it asks for the current accelerator even if no device is given, and a probe on the CPU
    # must not touch a GPU.
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    on_cpu, on_gpu = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
        torch.set_rng_state(on_cpu)
        for device, state in on_gpu.items():
            torch.cuda.set_rng_state(state, device)
