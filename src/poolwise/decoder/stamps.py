"""What shows that a model is not the one it was: its weights were written to or replaced, or its settings changed.

Autograd counts the writes to each tensor. It does not see the steps of fused optimisers, so these are counted here; nor
writing through `weight.data`, nor to weights that were made in inference mode: nothing but reading all weights would.
"""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_fused_steps = 0


def _count(optimizer: Optimizer, *_: Any) -> None:
    global _fused_steps
    _fused_steps += any(group.get("fused") for group in optimizer.param_groups)


register_optimizer_step_post_hook(_count)


class Stamp:
    """A model's state. It holds the storages of the weights, so that no address is used again; a copy or a pickle of it
    holds nothing and fits no model."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.state: Any = _state(model)
        self.storages = [weight.untyped_storage() for weight in _weights(model)]

    def fits(self, model: SentenceTransformer) -> bool:
        """Whether the model is as it was."""
        return bool(self.state == _state(model))

    def __getstate__(self) -> dict[str, Any]:
        return {"state": None, "storages": []}


def _state(model: SentenceTransformer) -> Any:
    written = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in _weights(model)]
    return _fused_steps, model.max_seq_length, model.truncate_dim, written


def _weights(model: nn.Module) -> list[Tensor]:
    """All parameters; shared ones may come twice. Twice as fast as `parameters()`, which names them too."""
    found: list[Tensor] = []
    modules = [model]
    for module in modules:  # which grows meanwhile
        found += [weight for weight in module._parameters.values() if weight is not None]
        modules += [part for part in module._modules.values() if part is not None]
    return found
