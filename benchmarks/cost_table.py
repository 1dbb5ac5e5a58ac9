"""docs/cost.md: what every preset costs on the paper's two base models, computed on the meta device.

python benchmarks/cost_table.py    # writes docs/cost.md; seconds, no weights and no network
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import MistralConfig, Qwen2Config

from poolwise.reports.tables import magnitude
from poolwise.runs.check import LENGTHS, base_costs
from poolwise.study.catalogue import PRESETS
from poolwise.study.study import Study

PAGE = Path(__file__).parents[1] / "docs" / "cost.md"
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
LORA = {"rank": 16, "target": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
INTRO = """\
# What a design costs

Every preset on the base models of the paper, from shapes alone (`python benchmarks/cost_table.py` writes this page;
`poolwise check STUDY.toml` shows the same for your own study before anything runs). LoRA has rank 16 on all seven
projections. FLOPs: one forward pass of a text of so many tokens, a multiply-add counted as two; "head" is the share of
the pooling in the whole. A head is counted as its formula is written, each text on its own: an upper bound. Templates
that repeat a text or write words around it make it longer, which is not counted here. On short texts the paper's head
(`-paper`) costs more than the base model itself; on Mistral-7B it has 1,278,275,584 parameters, on Qwen2-0.5B
245,216,384, where the tokens of the last layer are pooled.
"""


def rows(config: Any) -> list[dict[str, Any]]:
    """One row a preset."""
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
    """The whole page."""
    return "\n".join([INTRO, *(table(name, config) for name, config in BASES.items())])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
