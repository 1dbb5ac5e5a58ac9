"""Training with fewer kernels: one autograd function for all LoRA layers that share an input, compiled decoder layers.

For the layers i = 1 … n of a group (a layer's queries, keys and values, say), with frozen W_i and b_i, adapters A_i and
B_i and scaling s (Hu et al., arXiv 2106.09685):

    y_i = x W_iᵀ + b_i + s · dropout_i(x) A_iᵀ B_iᵀ

PEFT runs about eight operations for each layer and twice as many in the backward pass, on a copy of x in fp32. Here the
W_i are one matrix, the B_i one block-diagonal matrix, and products run in the dtype of x with fp32 accumulation, as
under autocast. The adapters themselves, their gradients and the optimizer stay fp32, and they remain PEFT's modules:
saving, loading, merging and export do not change. Each layer has its own dropout mask, as in PEFT; the masks come from
torch's generator in another order, so that a run is reproducible and resumable but not equal to one of PEFT's.

A step of a small model is a few thousand kernels that each take less time than their launch. `fast_training` is the one
place that decides what is used: fused LoRA everywhere, compiled layers on a GPU, each only after it has been verified.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from poolwise.errors import ModelError, PoolwiseError
from poolwise.model.attention import AGREEMENT, evaluating, probe_ids, restored_mode
from poolwise.model.backbone import Backbone
from poolwise.model.hooks import decoder_layers
from poolwise.study.recipe import Recipe

LENGTHS = (13, 10)
"""Tokens of the two texts on which shortcuts are verified, similar enough for one batch in every layout. No other size
of a model is likely to be 13 or 23: the compiler takes equal sizes for the same one and recompiles when they differ."""


class _GroupFunction(torch.autograd.Function):
    """x (…, D) -> y (…, O), O the sum of `sizes`. Only adapters and x get gradients.

    `scale` is s / (1 - dropout): what dropout scales up is scaled once, in the small matrices.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: list[int],
        scale: float,
        dropout: float,
        *adapters: Tensor,
    ) -> Tensor:
        n = len(sizes)
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        a = torch.stack(adapters[:n]).to(x.dtype)  # (n, R, D)
        b = (torch.block_diag(*adapters[n:]) * scale).to(x.dtype)  # (O, n·R)
        keep = None
        if dropout > 0:
            keep = kept((n, *flat.shape), dropout, flat)
            hidden = torch.bmm(flat * keep, a.mT).transpose(0, 1).flatten(1)  # (N, n·R)
        else:
            hidden = flat @ a.flatten(0, 1).T
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        y = torch.addmm(y, hidden, b.T)
        ctx.save_for_backward(flat, weight, a, b, hidden, keep)
        ctx.shape, ctx.sizes, ctx.scale = x.shape, sizes, scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, hidden, keep = ctx.saved_tensors
        n, rank = a.shape[:2]
        g = gradient.reshape(-1, gradient.shape[-1])  # (N, O)
        dh = g @ b  # (N, n·R), scaled as b is
        by_layer = dh.unflatten(1, (n, rank)).transpose(0, 1)  # (n, N, R)
        db = g.T @ (hidden * ctx.scale)  # (O, n·R), of which only the diagonal blocks are needed
        # masking x again costs less than keeping n masked copies of it
        da = (dh.T @ x).view_as(a) if keep is None else torch.bmm(by_layer.mT, x * keep)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            if keep is None:
                dx = torch.addmm(dx, dh, a.flatten(0, 1))
            else:
                through = torch.bmm(by_layer, a) * keep  # (n, N, D)
                dx = dx + (through[0] if n == 1 else through.sum(0))
            dx = dx.view(ctx.shape)
        blocks = [part[:, i * rank : (i + 1) * rank].float() for i, part in enumerate(db.split(ctx.sizes))]
        return (dx, None, None, None, None, None, *da.float().unbind(), *blocks)


LEVELS = 2**15
"""Dropout rates are rounded to multiples of 1 / LEVELS."""


def kept(shape: tuple[int, ...], dropout: float, like: Tensor) -> Tensor:
    """A dropout mask: 1 with probability 1 - dropout, else 0; in the dtype and on the device of `like`."""
    if torch.compiler.is_compiling():  # one kernel with what reads the mask
        return (torch.rand(shape, device=like.device) >= dropout).to(like.dtype)
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - dropout)
    # Seven times as fast as bernoulli_, which draws one number for each entry: four masks from 64 random bits
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    bits &= LEVELS - 1
    bits -= round(dropout * LEVELS)
    bits >>= 15  # -1 where it was below, else 0
    bits = ~bits & 0x3F80  # the bits of 1 in bfloat16, and those of 0
    return bits.view(torch.bfloat16).view(shape).to(like.dtype)


class _Group:
    """Adapted layers that share an input, computed together when the first of them is called."""

    def __init__(self, layers: Sequence[LoraLinear]):
        self.layers = list(layers)
        name = layers[0].active_adapters[0]
        bases = [cast(nn.Linear, layer.get_base_layer()) for layer in layers]
        self.sizes = [base.out_features for base in bases]
        self.scale = float(layers[0].scaling[name])
        self.dropout = layers[0].lora_dropout[name]
        pairs = [(layer.lora_A[name], layer.lora_B[name]) for layer in layers]
        self.adapters = [cast(nn.Linear, adapter) for adapters in zip(*pairs, strict=True) for adapter in adapters]
        self.weight: Tensor = bases[0].weight
        self.bias: Tensor | None = bases[0].bias
        if len(bases) > 1:  # the layers' own weights become views of one matrix, so that nothing is held twice
            self.weight = _joined([base.weight for base in bases])
            self.bias = None if self.bias is None else _joined([base.bias for base in bases])
        self.input: Tensor | None = None
        self.outputs: list[Tensor | None] = []

    def output(self, place: int, x: Tensor) -> Tensor:
        """y of one layer. Those of the others are kept until they are asked for, which the model does at once."""
        if len(self.sizes) == 1:
            return self._computed(x)
        if self.input is not x or self.outputs[place] is None:
            self.input, self.outputs = x, list(self._computed(x).split(self.sizes, -1))
        found, self.outputs[place] = self.outputs[place], None
        if all(output is None for output in self.outputs):
            self.input = None  # the graph of a batch must not outlive it
        return cast(Tensor, found)

    def _computed(self, x: Tensor) -> Tensor:
        rate = self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0
        rate = round(rate * LEVELS) / LEVELS
        adapters = [adapter.weight for adapter in self.adapters]
        scale = self.scale / (1 - rate)
        return cast(Tensor, _GroupFunction.apply(x, self.weight, self.bias, self.sizes, scale, rate, *adapters))

    def attach(self) -> None:
        """Let the layers run as a group."""
        for place, layer in enumerate(self.layers):
            layer.__class__ = _FusedLinear
            layer.group, layer.place = self, place  # type: ignore[assignment]

    def detach(self) -> None:
        """Give the layers PEFT's forward and weights of their own again."""
        self.input, self.outputs = None, []
        for layer in self.layers:
            if type(layer) is _FusedLinear:
                layer.__class__ = LoraLinear  # type: ignore[assignment]
                del layer.group, layer.place
            for part in layer.get_base_layer().parameters() if len(self.layers) > 1 else ():
                if part.untyped_storage().nbytes() > part.nbytes:
                    part.data = part.data.clone()
        self.weight, self.bias = torch.empty(0), None  # frees one group before the next is copied


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor with the rows of several parameters, which become views of it."""
    whole = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return whole


class _FusedLinear(LoraLinear):
    """PEFT's layer with the forward of its group, for as long as its class is this one."""

    group: _Group
    place: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = args or kwargs or self.disable_adapters or self.merged or torch.is_autocast_enabled(x.device.type)
        if plain or x.dtype != self.group.weight.dtype:
            return super().forward(x, *args, **kwargs)
        return self.group.output(self.place, x)


def _kind(layer: nn.Module) -> tuple[Any, ...] | None:
    """What the layers of a group must have in common; None for a layer that is left to PEFT."""
    if type(layer) is not LoraLinear or layer.merged or len(layer.active_adapters) != 1:
        return None
    name, base = layer.active_adapters[0], layer.get_base_layer()
    if type(base) is not nn.Linear or layer.fan_in_fan_out or set(layer.lora_A) != {name} or layer.lora_variant:
        return None  # a convolution, a quantised layer, several adapters, or DoRA, for example
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    trained = [part.requires_grad for part in (*a.parameters(), *b.parameters())] == [True, True]  # no biases
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
    if not frozen or not trained or hooked or type(dropout) not in (nn.Dropout, nn.Identity):
        return None
    rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
    return a.out_features, layer.scaling[name], rate, base.weight.dtype, base.weight.device, base.bias is None


@contextlib.contextmanager
def fused_lora(backbone: Backbone) -> Iterator[tuple[str | None, str | None]]:
    """Runs the LoRA layers of `backbone` in groups inside the block.

    Every use is verified: the states of a small batch must be those that PEFT's forward gives, and the same weights
    must get finite gradients. Yields `fused`, `peft` or None (no LoRA), and a note on layers that run as PEFT has them.
    """
    adapted = [layer for layer in backbone.model.modules() if isinstance(layer, LoraLayer)]
    if not adapted:
        yield None, None
        return
    groups: list[_Group] = []
    try:
        reason = _attach_if_equal(backbone, groups)
        for group in groups if reason else ():
            group.detach()
        left = len(adapted) - sum(len(group.layers) for group in groups)
        if reason:
            yield "peft", f"LoRA runs as PEFT has it: {reason}"
        else:
            yield "fused", f"{left} of {len(adapted)} LoRA layers run as PEFT has them" if left else None
    finally:
        for group in groups:
            group.detach()


def _attach_if_equal(backbone: Backbone, groups: list[_Group]) -> str:
    """Fills `groups` and attaches them; how the model then differs from the plain one, in words."""
    batch = _small_batch(backbone)
    try:
        expected, gradients = _response(backbone, batch)
        groups += [_Group(layers) for layers in _by_input(backbone, batch)]
        for group in groups:
            group.attach()
        states, found = _response(backbone, batch)
    except (RuntimeError, TypeError, ValueError, PoolwiseError) as error:
        return _first_line(error)
    if [part is None for part in found] != [part is None for part in gradients]:
        return "other weights have gradients"
    if not _finite(found):
        return "its gradients are not finite"
    return _apart(states, expected, AGREEMENT.get(backbone.model.dtype, 0.2))


COMPILE_STEPS = 200
"""Steps of a training from which on compiling repays itself: on an H200 it took 17 s for the 30 layers of a 135M base
and saved 85 ms of each step."""
COMPILERS = 4
"""Processes that generate code for one training."""


@contextlib.contextmanager
def fast_training(backbone: Backbone, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Trains with fused LoRA and, on a GPU, compiled layers inside the block, as far as the plain model agrees.

    Yields what is used: `lora` (`fused`, `peft` or None), `compiled` and `notes`, the reasons for what is not.
    """
    # both recompute a forward with the random numbers of an earlier one, which compiled code does not promise
    recomputes = recipe.gradient_checkpointing or recipe.mini_batch_size > 0
    worthwhile = recipe.steps >= COMPILE_STEPS and not recomputes
    with contextlib.ExitStack() as stack:
        lora, note = stack.enter_context(fused_lora(backbone))
        used: dict[str, Any] = {"lora": lora, "compiled": False, "notes": [note] if note else []}
        if worthwhile and lora == "fused" and backbone.model.device.type == "cuda":
            reason = stack.enter_context(compiled_layers(backbone))
            used["compiled"] = reason is None
            used["notes"] += [reason] if reason else []
        yield used


@contextlib.contextmanager
def compiled_layers(backbone: Backbone) -> Iterator[str | None]:
    """Compiles the forward and backward of the decoder layers inside the block; yields why not, if that fails.

    All layers of one kind share one compiled graph, whatever the number of tokens. Hooks on the layers stay outside.
    """
    import torch._dynamo
    import torch._inductor.config

    batch = _small_batch(backbone)
    with contextlib.ExitStack() as stack:
        # numbers like a norm's epsilon never change: as inputs of the graph they would have it compiled twice
        stack.enter_context(torch._dynamo.config.patch(specialize_float=True))
        # the default is a process for each core, and other trials compile beside this one
        stack.enter_context(torch._inductor.config.patch(compile_threads=min(COMPILERS, os.cpu_count() or 1)))
        try:
            plain = _layer_states(backbone, batch)
            for layer in decoder_layers(backbone.model):
                if "forward" in vars(layer):
                    raise ModelError("another library has replaced the forward of a layer")
                layer.forward = torch.compile(layer.forward, dynamic=True)
                stack.callback(layer.__dict__.pop, "forward")
            hook = backbone.model.get_input_embeddings().register_forward_hook(_require_gradient)
            stack.callback(hook.remove)
            reason = _layers_apart(_layer_states(backbone, batch, plain), plain)
        except Exception as error:  # the compiler has many kinds
            reason = f"{type(error).__name__}: {_first_line(error)}"
        if reason:
            stack.close()
            yield f"decoder layers are not compiled: {reason}"
        else:
            # a failure in a later batch, of another shape, costs time and not the run
            stack.enter_context(torch._dynamo.config.patch(suppress_errors=True))
            yield None


def _require_gradient(embeddings: nn.Module, args: tuple, states: Tensor) -> None:
    """Without it the first layer, whose input has no gradient, would be compiled a second time."""
    if torch.is_grad_enabled() and not states.requires_grad:
        states.requires_grad_(True)


def _layer_states(
    backbone: Backbone, batch: dict[str, Tensor], known: Sequence[tuple[Tensor, Tensor]] = ()
) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of each decoder layer for a batch in training mode, with all B at 0, so that LoRA's dropout does
    not change them. known: those of another pass, whose inputs the layers are given here.

    Raises ModelError if a gradient is not finite.
    """
    model, layers = backbone.model, list(decoder_layers(backbone.model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    zeroed = [(p, p.detach().clone()) for name, p in model.named_parameters() if "lora_B" in name]
    found: list[tuple[Tensor, Tensor]] = []

    def give(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states, *others = args
        if known:
            states = states + (known[layers.index(layer)][0] - states).detach()
        return (states, *others), kwargs

    def keep(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        found.append((args[0].detach().clone(), states.detach().clone()))

    with restored_mode(model), torch.enable_grad(), contextlib.ExitStack() as stack:
        # with all threads: the compiler takes their number for a constant
        model.train()
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(give, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(keep).remove)
        try:
            for parameter, _ in zeroed:
                parameter.data.zero_()
            states = backbone(dict(batch))["token_embeddings"].float()
            gradients = torch.autograd.grad(states.sum(), trained, allow_unused=True)
        finally:
            for parameter, before in zeroed:
                parameter.data.copy_(before)
    if not _finite(gradients):
        raise ModelError("gradients are not finite")
    return found


def _layers_apart(found: Sequence[tuple[Tensor, Tensor]], plain: Sequence[tuple[Tensor, Tensor]]) -> str:
    """By how much layers compute something else than the plain ones, in words; empty if rounding explains it.

    Each layer is compared by itself, on equal inputs. From layer to layer rounding can grow without bound: a causal
    model under bidirectional attention, not tuned yet, has states in bfloat16 that differ from those in float32 by .4
    of their size.
    """
    if len(found) != len(plain):
        return f"{len(found)} layers ran instead of {len(plain)}"
    for number, ((_, states), (given, expected)) in enumerate(zip(found, plain, strict=True)):
        rounding, limit = 3 * torch.finfo(expected.dtype).eps, AGREEMENT.get(expected.dtype, 0.2) / 4
        states, given, expected = states.float(), given.float(), expected.float()
        apart, added = (states - expected).norm(), (expected - given).norm()
        if not apart <= limit * added + rounding * expected.norm():  # also for NaN
            return f"what layer {number} adds differs by {float(apart / added):.1e} of its size"
    return ""


def _small_batch(backbone: Backbone) -> dict[str, Tensor]:
    """Two texts of different length, on the device of the model."""
    ids, _ = probe_ids(backbone.model, 2 * max(LENGTHS))
    mask = torch.arange(max(LENGTHS), device=ids.device) < torch.tensor(LENGTHS, device=ids.device)[:, None]
    return {"input_ids": ids.view(mask.shape), "attention_mask": mask.long()}


def _by_input(backbone: Backbone, batch: dict[str, Tensor]) -> list[list[LoraLinear]]:
    """The layers that can be fused, grouped by the input that they receive, in the order of their calls."""
    calls: list[tuple[LoraLinear, Any, Tensor]] = []  # keeps the inputs alive, so that no two have one id
    with contextlib.ExitStack() as stack:
        for layer in backbone.model.modules():
            if (kind := _kind(layer)) is not None:
                hook = layer.register_forward_pre_hook(
                    lambda module, args, kind=kind: calls.append((cast(LoraLinear, module), kind, args[0]))
                )
                stack.callback(hook.remove)
        stack.enter_context(evaluating(backbone.model))
        stack.enter_context(torch.no_grad())
        backbone(dict(batch))
    times = Counter(layer for layer, *_ in calls)
    groups: dict[Any, list[LoraLinear]] = {}
    for layer, kind, x in calls:
        if times[layer] == 1:  # a layer that is shared between places has several inputs
            groups.setdefault((id(x), kind), []).append(layer)
    return list(groups.values())


def _response(backbone: Backbone, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """The states of a batch without dropout, and the gradients of their sum for all trained weights."""
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    with evaluating(backbone.model), torch.enable_grad():
        states = backbone(dict(batch))["token_embeddings"].float()
        gradients = torch.autograd.grad(states.sum(), trained, allow_unused=True)
    return states.detach(), list(gradients)


def _finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(bool(part.isfinite().all()) for part in gradients if part is not None)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _apart(states: Tensor, expected: Tensor, limit: float) -> str:
    """By how much states differ, in words; empty if it is less than the limit."""
    apart = float((states - expected).norm() / expected.norm())
    return "" if apart <= limit else f"its states differ by {apart:.1e} of their size"  # also for NaN
