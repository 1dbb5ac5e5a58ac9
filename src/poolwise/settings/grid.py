"""`[grid]`: every combination of the values it lists, as designs.

Attention, pooling and the other fields of a design are crossed with each other. An argument of poolings is crossed only
with the poolings that take it: `latents = [16, 64]` makes two designs of cross_attention and one of mean. What no
design can be, such as cross_attention with `tokens = "mean"`, is left out with a line that says why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from poolwise.designs import POOLING_ARGS
from poolwise.errors import suggest
from poolwise.settings.mistakes import explain

if TYPE_CHECKING:
    from poolwise.study import Design

Axes = Mapping[str, Sequence[Any]]
Cell = dict[str, Any]


def expand(axes: Axes, declared: Sequence[Design], kind: type[Design]) -> tuple[list[Design], list[str], list[str]]:
    """(designs, lines on what was left out, mistakes) of a grid.

    axes: value lists by name: `attention` and `pooling`, other fields of a design, arguments of poolings.
    declared: designs that the study lists by themselves; a cell that is one of them is not made again.
    kind: the class `Design`, whose rules decide what a cell may be. A value that no cell can have is a mistake.
    """
    fields = [name for name in kind.model_fields if name not in ("name", "preset", "pooling_args")]
    mistakes = _mistakes(axes, fields)
    if mistakes:
        return [], [], mistakes
    made: list[Design] = []
    left_out: list[str] = []
    refused: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    reasons: dict[tuple[str, str], str] = {}
    taken: set[tuple[str, str]] = set()
    for chosen in _combinations(axes, fields):
        used = {(name, repr(value)) for name, value in chosen.items()}
        try:
            design = kind.model_validate(_cell(chosen, fields))
        except ValidationError as error:
            reason = "; ".join(explain(error, {"": kind}))
            refused[str(chosen["pooling"]), reason].append(_words(chosen))
            reasons |= {key: reason for key in used if key not in reasons}
            continue
        taken |= used
        twin = next((other for other in declared if other.factors() == design.factors()), None)
        if twin is None:
            made.append(design)
        elif twin.name != design.name:
            left_out.append(f"{_words(chosen)}: stands among the designs, as {twin.name}")
    for (_, reason), cells in refused.items():
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        left_out.append(f"{cells[0]}{more}: {reason}")
    for name, values in axes.items():
        for value in values:
            key = (name, repr(value))
            if key not in taken and taken:
                why = reasons.get(key, f"none of the poolings {', '.join(map(str, axes['pooling']))} takes it")
                mistakes.append(f"grid.{name}: no design can have {value!r}: {why}")
    if not taken:
        mistakes += [f"grid: {line}" for line in left_out]
    return made, left_out, mistakes


def _mistakes(axes: Axes, fields: Sequence[str]) -> list[str]:
    """What is wrong with a grid whatever its values mean."""
    mistakes = []
    known = [*fields, *dict.fromkeys(name for arguments in POOLING_ARGS.values() for name in arguments)]
    for name in ("attention", "pooling"):
        if name not in axes:
            mistakes.append(f'grid.{name} is missing: list the values, such as {name} = ["{_EXAMPLE[name]}"]')
    for name, values in axes.items():
        if name not in known:
            mistakes.append(f"grid.{name} is not a factor; allowed: {', '.join(known)}{suggest(name, known)}")
        elif not values:
            mistakes.append(f"grid.{name} = []: give at least one value")
        elif len({repr(value) for value in values}) < len(values):
            mistakes.append(f"grid.{name} = {list(values)}: give each value once")
    return mistakes


_EXAMPLE = {"attention": "causal", "pooling": "mean"}


def _combinations(axes: Axes, fields: Sequence[str]) -> Iterator[Cell]:
    """One dictionary for each combination: of all fields, and of those arguments that the pooling takes."""
    for pooling in axes["pooling"]:
        takes = POOLING_ARGS.get(pooling, {}) if isinstance(pooling, str) else {}
        names = [name for name in axes if name != "pooling" and (name in fields or name in takes)]
        for values in product(*(axes[name] for name in names)):
            yield {"pooling": pooling, **dict(zip(names, values, strict=True))}


def _cell(chosen: Cell, fields: Sequence[str]) -> Cell:
    """A design: named after its pooling and attention, and after what is not at its default."""
    arguments = {name: value for name, value in chosen.items() if name not in fields}
    takes = POOLING_ARGS.get(str(chosen["pooling"]), {})
    shown = [f"{name}-{value}".lower() for name, value in arguments.items() if value != takes[name].default]
    others = [str(value) for name, value in chosen.items() if name in fields and name not in ("pooling", "attention")]
    name = "-".join([str(chosen["pooling"]), str(chosen["attention"]), *(o for o in others if o != "plain"), *shown])
    cell = {name: value for name, value in chosen.items() if name in fields}
    return {"name": name, **cell, **({"pooling_args": arguments} if arguments else {})}


def _words(chosen: Cell) -> str:
    """`cross_attention × causal × tokens mean`."""
    parts = [str(chosen["pooling"]), str(chosen["attention"])]
    parts += [f"{name} {value}" for name, value in chosen.items() if name not in ("pooling", "attention")]
    return " × ".join(parts)
