"""In which layout a study is trained: `packed`, unless a base model or a design of it does not allow that.

A model that does not hand the segments of a pack on to its attention would mix its texts without a word. So nothing is
believed: `refusal` packs a text between two others and looks whether it moves when they change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from poolwise.attention import (
    AGREEMENT,
    EPSILON,
    MODES,
    backend,
    base_model,
    evaluating,
    get_attention,
    probe_ids,
    relative_change,
    set_attention,
    sliding_window,
    takes_position_ids,
)
from poolwise.decoder.packing import Segments, check_calls, packed_attention_on
from poolwise.errors import ModelError
from poolwise.study import Design

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
    return design.factors().get("masked") is False


def has_dropout(model: nn.Module) -> bool:
    """Whether any layer, adapter or attention of `model` drops numbers at random while it trains."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    settings = vars(base_model(model).config.get_text_config())
    return layers or any(
        isinstance(value, float) and value > 0
        for name, value in settings.items()
        if "dropout" in name or "pdrop" in name or "layerdrop" in name
    )
