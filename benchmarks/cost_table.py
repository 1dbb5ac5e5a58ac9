"""The tables of the documentation that follow from the catalogue: docs/cost.md, poolings, controls and arguments.

python benchmarks/cost_table.py    # writes all of them; seconds, no weights and no network

docs/cost.md is written whole: the cost of every preset on the paper's two base models. In docs/design-space.md and
docs/study-file.md a table is between two marks, `<!-- NAME, by benchmarks/cost_table.py -->` and `<!-- end -->`.
Costs are computed on the meta device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import MistralConfig, Qwen2Config

from poolwise.pooling.cost import LENGTHS, base_costs, head_cost, resolve_args
from poolwise.reports.words import magnitude
from poolwise.study.catalogue import POOLINGS, PRESETS, REFERENCES
from poolwise.study.pooling_spec import Arg, PoolingSpec
from poolwise.study.study import Study

DOCS = Path(__file__).parents[1] / "docs"
BASES = {
    "Mistral-7B": MistralConfig(),  # the defaults are Mistral-7B-v0.1
    "Qwen2-0.5B": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}
BASE = BASES["Qwen2-0.5B"]
"""The base model of the tables of poolings and controls."""
LORA = {"rank": 16, "target": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
INTRO = """\
# What a design costs

Every preset on the base models of the paper, computed from shapes alone (`python benchmarks/cost_table.py` writes this
page; `poolwise check STUDY.toml` prints the same for your study before anything runs). LoRA has rank 16 on all seven
projections. FLOPs are those of one forward pass over one text, a multiply-add counted as two; "head" gives the FLOPs of
the pooling and their share of the total. A head is counted as its formula is written, each text separately, which is an
upper bound. The tokens that a template adds are not counted here. On short texts the paper's head (`-paper`) costs more
than the base model itself; if it pools the tokens of the last layer, it has 1,278,275,584 parameters on Mistral-7B and
245,216,384 on Qwen2-0.5B.
"""


def rows(config: Any) -> list[dict[str, Any]]:
    """One row per preset."""
    designs = [{"preset": name} for name in PRESETS]
    study = Study.parse({"name": "costs", "baseline": "m1", "designs": designs, "recipe": {"lora": LORA}})
    return base_costs(study, config)


def table(name: str, config: Any) -> str:
    """The table of one base model in Markdown."""
    found = rows(config)
    base, lora = found[0]["base_parameters"], found[0]["tuned_base_parameters"]
    heads = [f"{tokens} tokens, head" for tokens in LENGTHS]
    lines = [
        f"## {name}\n",
        f"{base:,} parameters; LoRA {lora:,}; one text: "
        + ", ".join(f"{magnitude(found[0][f'base_flops_{n}'])} FLOPs at {n} tokens" for n in LENGTHS)
        + ".\n",
        f"| preset | attention | pooling | head parameters | share of trainable | {' | '.join(heads)} |",
        "|:--|:--|:--|--:|--:|" + "--:|" * len(LENGTHS),
    ]
    for row in found:
        cells = []
        for tokens in LENGTHS:
            head, rest = row[f"head_flops_{tokens}"], row[f"base_flops_{tokens}"]
            cells.append(f"{magnitude(head)} ({head / (head + rest):.1%})" if head else "0")
        share = row["head_parameters"] / row["trainable_parameters"]
        lines.append(
            f"| `{row['design']}` | {row['attention']} | {row['pooling']} | {row['head_parameters']:,} | {share:.1%} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole of docs/cost.md."""
    return "\n".join([INTRO, *(table(name, config) for name, config in BASES.items())])


def poolings(reads: str) -> Iterable[str]:
    """A row for each pooling over tokens or over layers."""
    yield "| pooling | vector | source | parameters | FLOPs, 128 tokens |"
    yield "|---|---|---|--:|--:|"
    for spec in POOLINGS.values():
        if spec.reads == reads:
            cost = head_cost(spec.name, resolve_args(spec.name, {}, BASE), BASE, 128)
            flops = magnitude(cost.flops) if cost.flops else "0"
            source = spec.source or _controlled(spec)
            yield f"| `{spec.name}` | {spec.formula} | {source} | {cost.parameters:,} | {flops} |"


def _controlled(spec: PoolingSpec) -> str:
    """`control of …`, for a pooling that is nothing else."""
    names = [f"`{other.name}`" for other in POOLINGS.values() if spec.name in other.all_controls]
    return f"control of {', '.join(names)}" if names else ""


def controls() -> Iterable[str]:
    """A row for each trainable pooling and each of its controls, with the parameters that the control lacks."""
    yield "| trainable | control | parameters | without counterpart |"
    yield "|---|---|--:|--:|"
    for spec in POOLINGS.values():
        choices = list(spec.controls) if isinstance(spec.controls, dict) else [""]
        for tokens in choices if spec.controls else ():
            args = resolve_args(spec.name, {"tokens": tokens} if tokens else {}, BASE)
            name = f'`{spec.name}`, `tokens = "{tokens}"`' if tokens else f"`{spec.name}`"
            for control in spec.controls_for(args):
                shared = {key: value for key, value in args.items() if key in POOLINGS[control].args}
                mine, theirs = (
                    head_cost(pooling, resolve_args(pooling, given, BASE), BASE, 0).parameters
                    for pooling, given in ((spec.name, args), (control, shared))
                )
                yield f"| {name} | `{control}` | {mine:,} | {mine - theirs:,} |"


def arguments() -> Iterable[str]:
    """A row for each argument, one for all poolings in which it is the same."""
    yield "| argument | default | of | meaning, allowed |"
    yield "|---|---|---|---|"
    takers: dict[tuple[str, Arg], list[str]] = {}
    for spec in POOLINGS.values():
        for name, arg in spec.args.items():
            takers.setdefault((name, arg), []).append(f"`{spec.name}`")
    for (name, arg), names in takers.items():
        allowed = f"; {', '.join(f'`{word}`' for word in arg.allowed)}" if arg.allowed else ""
        allowed = f"; {arg.minimum} or more" if arg.minimum is not None else allowed
        yield f"| `{name}` | `{json.dumps(arg.default)}` | {', '.join(names)} | {arg.help}{allowed} |"


def known_models() -> Iterable[str]:
    """A row for each preset of a known model."""
    yield "| preset | attention | pooling | template | paper | the model's recipe |"
    yield "|---|---|---|---|---|---|"
    for name, (paper, recipe) in REFERENCES.items():
        preset = PRESETS[name]
        args = "".join(f", `{key} = {json.dumps(value)}`" for key, value in preset["pooling_args"].items())
        template = preset.get("template", "plain")
        yield f"| `{name}` | {preset['attention']} | `{preset['pooling']}`{args} | {template} | {paper} | {recipe} |"


TABLES: dict[str, dict[str, Callable[[], Iterable[str]]]] = {
    "design-space.md": {
        "poolings over tokens": lambda: poolings("tokens"),
        "poolings over layers": lambda: poolings("layers"),
        "controls": controls,
        "known models": known_models,
    },
    "study-file.md": {"arguments": arguments},
}
"""Page of docs/ -> the name between its marks -> lines of the table."""


def inserted(name: str) -> str:
    """The page with its tables updated."""
    text = (DOCS / name).read_text(encoding="utf-8")
    for mark, lines in TABLES[name].items():
        start = f"<!-- {mark}, by benchmarks/cost_table.py -->\n"
        between = re.compile(re.escape(start) + r".*?(?=<!-- end -->)", re.DOTALL)
        text, count = between.subn(lambda _: start + "\n".join(lines()) + "\n", text)  # noqa: B023 (called at once)
        assert count == 1, f"docs/{name} needs the marks of {mark!r} once"
    return text


if __name__ == "__main__":
    (DOCS / "cost.md").write_text(page(), encoding="utf-8")
    for page_name in TABLES:
        (DOCS / page_name).write_text(inserted(page_name), encoding="utf-8")
