"""The laws that every pooling keeps: `check_pooling(MyPooling)` before you train it.

    from poolwise.pooling.laws import check_pooling

1   padding: its side, amount and content, and the other texts of a batch, change no vector
3   a copy, a pickle and a reloaded state dict give the same vectors
4   initial weights come from the generator alone, so that designs of one seed start equal
5   every weight has a gradient within two steps
9   states of any type are pooled in fp32
10  the mask decides which states are read, and a text without any gives finite numbers

Besides, its vectors have the declared width and differ from text to text, and its cost can be counted.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poolwise.errors import ModelError, StudyError
from poolwise.pooling.cost import head_cost
from poolwise.pooling.heads import Pooling
from poolwise.pooling.poolings import module_class
from poolwise.study.catalogue import POOLINGS, spec_of
from poolwise.study.pooling_spec import AUTO, register_own

WIDTH, LAYERS, TOKENS, TEXTS = 16, 3, 7, 6
SIZES = {"latents": 4, "heads": 2, "head_dim": 8}
"""Of automatic arguments that depend on a base model."""
RTOL, ATOL = 1e-4, 1e-5
Law = Callable[[type[Pooling], dict[str, Any]], Iterator[str]]


def check_pooling(pooling: type[Pooling], **arguments: Any) -> list[str]:
    """Run the laws on a pooling class with these arguments, at hidden size 16 and three layers.

    Returns the names of the laws, all kept. Raises `ModelError` with a line for each breach; `StudyError` for a class
    or an argument that no study could have.
    """
    spec = spec_of(_name(pooling))
    if problems := spec.problems(arguments):
        raise StudyError(problems)
    arguments = spec.complete(arguments)
    for name, arg in spec.args.items():
        if arguments[name] == AUTO and not spec.code:
            arguments[name] = arg.auto(WIDTH, LAYERS) if arg.auto else SIZES[name]
    breaches = []
    for name, law in LAWS.items():
        try:
            found = list(law(pooling, arguments))
        except (ModelError, StudyError):
            raise
        except Exception as error:  # whatever the user's code raises
            found = [f"{type(error).__name__}: {error}"]
        breaches += [f"{name}: {line}" for line in found]
    if breaches:
        lines = "".join(f"\n  - {line}" for line in breaches)
        raise ModelError(f"{pooling.__name__} breaks {len(breaches)} of the laws of poolings:{lines}")
    return list(LAWS)


def _name(pooling: type[Pooling]) -> str:
    """The name under which the class is declared; a user's class is declared here if need be."""
    ours = (name for name in POOLINGS if module_class(name) is pooling)
    return next(ours, None) or register_own(pooling)


def _cost(pooling: type[Pooling], arguments: dict[str, Any]) -> Iterator[str]:
    config: Any = SimpleNamespace(hidden_size=WIDTH, num_hidden_layers=LAYERS)
    config.get_text_config = lambda: config
    try:
        declared = head_cost(_name(pooling), arguments, config, TOKENS).parameters
    except Exception as error:  # whatever the user's code raises
        yield f"`poolwise check` cannot count it on torch's meta device: {type(error).__name__}: {error}"
        return
    found = sum(parameter.numel() for parameter in _made(pooling, arguments).parameters())
    if declared != found:
        yield f"the class has {found} parameters, {declared} are declared"


def _made(pooling: type[Pooling], arguments: dict[str, Any], seed: int = 0, rough: bool = True) -> Pooling:
    """A pooling with the initial weights of this seed; `rough`: plus noise, because zeros hide what they multiply."""
    head: Any = pooling(WIDTH, LAYERS, **arguments)
    head.reset_parameters(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters() if rough else ():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head


def _states(pooling: type[Pooling], texts: int = TEXTS, seed: int = 0) -> Tensor:
    """States (texts, N, D): of 7 tokens, or of three layers."""
    vectors = TOKENS if pooling.reads == "tokens" else LAYERS
    return 2 * torch.randn(texts, vectors, WIDTH, generator=torch.Generator().manual_seed(seed))


def _apart(found: Tensor, expected: Tensor) -> bool:
    return found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), RTOL, ATOL)


def _shape(pooling: type[Pooling], arguments: dict[str, Any]) -> Iterator[str]:
    head, states = _made(pooling, arguments), _states(pooling)
    result = head(states, None if pooling.reads == "layers" else torch.ones(states.shape[:2], dtype=torch.long))
    width = getattr(head, "dimension", WIDTH)
    if tuple(result.shape) != (TEXTS, width):
        yield (
            f"gives {tuple(result.shape)} for {tuple(states.shape)}, not {(TEXTS, width)}; "
            "a pooling whose vectors are not as wide as the states sets self.dimension"
        )
    elif not (result[0] - result[1]).abs().max() > 1e-4:
        yield "two different texts get the same vector"


def _padding(pooling: type[Pooling], arguments: dict[str, Any]) -> Iterator[str]:
    head, states = _made(pooling, arguments), _states(pooling)
    together = head(states)
    if any(_apart(head(states[b : b + 1])[0], together[b]) for b in range(TEXTS)):
        yield "a text's vector changes with the other texts of its batch"
    if pooling.reads == "layers":
        return
    alone = head(states[:1], torch.ones(1, TOKENS, dtype=torch.long))
    if _apart(alone, head(states[:1], None)):
        yield "no mask and a mask of ones give different vectors"
    for content in (0.0, 1e4, float("nan"), float("inf")):
        for left, right in ((3, 0), (0, 5), (2, 9)):
            padded = torch.full((1, left + TOKENS + right, WIDTH), content)
            mask = torch.zeros(padded.shape[:2], dtype=torch.long)
            padded[:, left : left + TOKENS], mask[:, left : left + TOKENS] = states[:1], 1
            if _apart(head(padded, mask), alone):
                yield f"the vector changes with padding: {left} positions on the left, {right} right, of {content}"
                return


def _copies(pooling: type[Pooling], arguments: dict[str, Any]) -> Iterator[str]:
    head, states = _made(pooling, arguments), _states(pooling)
    expected = head(states)
    fresh = _made(pooling, arguments, seed=5)
    fresh.load_state_dict(head.state_dict())
    for how, twin in (("a deep copy", copy.deepcopy(head)), ("its state dict, loaded into a new one,", fresh)):
        if not torch.equal(twin(states), expected):
            yield f"{how} gives other vectors; keep all weights and buffers in the state dict"
    try:
        pickle.dumps(head)
    except Exception as error:
        yield f"it cannot be pickled: {error}"


def _initial_weights(pooling: type[Pooling], arguments: dict[str, Any]) -> Iterator[str]:
    torch.manual_seed(0)
    first = _made(pooling, arguments, rough=False).state_dict()
    torch.manual_seed(1)
    again = _made(pooling, arguments, rough=False)
    moved = [name for name, value in again.state_dict().items() if not torch.equal(value, first[name])]
    if moved:
        yield f"the initial values of {', '.join(moved)} do not come from the generator passed to initial()"
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again.reset_parameters(torch.Generator().manual_seed(0))
    if not torch.equal(before, torch.get_rng_state()):
        yield "reset_parameters draws from torch's global generator"


def _gradients(pooling: type[Pooling], arguments: dict[str, Any]) -> Iterator[str]:
    head = _made(pooling, arguments, rough=False).train()
    weights = dict(head.named_parameters())
    if not weights:
        return
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    seen: set[str] = set()
    for step in range(2):
        queries, documents = (F.normalize(head(_states(pooling, 8, 2 * step + side)), dim=-1) for side in (0, 1))
        optimizer.zero_grad()
        F.cross_entropy(queries @ documents.T / 0.05, torch.arange(8)).backward()
        seen |= {name for name, weight in weights.items() if weight.grad is not None and weight.grad.count_nonzero()}
        optimizer.step()
    if stuck := [name for name in weights if name not in seen]:
        yield f"{', '.join(stuck)} had no gradient in two steps"


def _precision(pooling: type[Pooling], arguments: dict[str, Any]) -> Iterator[str]:
    head, states = _made(pooling, arguments), (_states(pooling) + 1).bfloat16()
    result = head(states)
    if result.dtype != torch.float32:
        yield f"states in bfloat16 give a vector in {result.dtype}, not float32"
    elif not torch.allclose(result, head(states.float()), RTOL, ATOL):
        yield "states in bfloat16 are not pooled in fp32: convert them with states.float() first"


def _masks(pooling: type[Pooling], arguments: dict[str, Any]) -> Iterator[str]:
    if pooling.reads == "layers":
        return
    head, states = _made(pooling, arguments), _states(pooling, 1).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0]])
    result = head(states, mask)
    result.sum().backward()
    assert states.grad is not None
    if states.grad[0, mask[0] == 0].any():
        yield "a state whose mask is 0 has a gradient: it is read"
    for kind in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        if _apart(head(states, mask.to(kind)), result):
            yield f"a mask in {kind} gives another vector than one in {mask.dtype}"
            break
    if not head(states, torch.zeros_like(mask)).isfinite().all():
        yield "a mask of zeros gives numbers that are not finite"


LAWS: dict[str, Law] = {
    "shape": _shape,
    "cost": _cost,
    "law 1, padding": _padding,
    "law 3, copies": _copies,
    "law 4, initial weights": _initial_weights,
    "law 5, gradients": _gradients,
    "law 9, precision": _precision,
    "law 10, masks": _masks,
}
"""Name of a law -> a line for each breach by a pooling class with these arguments."""
