"""Templates of study files, as text for a person to edit: the paper's designs, the demo, a full factorial."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from poolwise import demo
from poolwise.errors import PoolwiseError, suggest
from poolwise.study.study import Study

_FIVE = "\n".join(f'[[designs]]\npreset = "{name}"\n' for name in ("m1", "m2", "m3", "m4", "m5"))

_CELLS = "\n".join(
    f'[[designs]]\nname = "{short}-{mode[:2]}"\nattention = "{mode}"\npooling = "{pooling}"{arguments}\n'
    for mode in ("causal", "bidirectional")
    for short, pooling, arguments in (
        ("last", "last_token", ""),
        ("mean", "mean", ""),
        ("last-ffn", "last_token_ffn", ""),
        ("mean-ffn", "mean_ffn", ""),
        ("cross", "cross_attention", ""),
        ("layers", "layer_cross_attention", '\npooling_args = { tokens = "mean" }'),
    )
)

DEMO_RECIPE = """\
[recipe]
base_model = "nano"
dataset = "demo"
steps = 16
learning_rate = 2e-3
head_learning_rate = 2e-3
warmup_steps = 2
batch_size = 24
negatives = 1
max_length = 128
save_steps = 1000
"""

QUICK = ("overlap", "late", "topic")
"""Mechanisms of `poolwise demo --quick`: they have every form, and m1 and m5 were predicted to differ on them."""
QUICK_STEPS = 10

PAPER_BASES = {
    "paper-mistral-7b": (
        "mistralai/Mistral-7B-v0.1",
        """\
# its main study, on Mistral-7B: 21 trainings of a 7B base with controls, many GPU-days.
""",
    ),
    "paper-qwen2-0.5b": (
        "Qwen/Qwen2-0.5B",
        """\
# its robustness check, on Qwen2-0.5B. Two differences beside those below: every text has an end token (`append_eos`),
# which the published code does not add for Qwen2; and m4 and m5 are bidirectional in every batch, while there that
# depends on the padding.
""",
    ),
    "paper-llama3-8b": (
        "meta-llama/Meta-Llama-3-8B",
        """\
# the third base model of its figures, Llama-3-8B.
""",
    ),
}
"""A study of the paper -> its base model and the end of its title; `studies/NAME.toml` is `paper_study(NAME)`."""


def paper_study(name: str) -> str:
    """The paper's study on one of its base models, with its designs as its released code computes them."""
    base, about = PAPER_BASES[name]
    designs = "\n".join(f'[[designs]]\npreset = "{design}"\n' for design in _PAPER_DESIGNS)
    return f"""\
# "Pooling and Attention: What are Effective Designs for LLM-Based Embedding Models?" (arXiv 2409.02727):
{about}#
# The same as in the paper and its released code: recipe, data, designs, tasks, instructions, lengths, and the batches
# in which m4 is scored. A step of 2,048 queries is 256 parts of 8, and a query's negatives come from its own part: 15
# of them (`accumulation`; on 8 GPUs one query each).
#
# What still differs:
# - Three seeds instead of one run. They set initial weights, order and dropout; there the head's weights have no seed.
# - LoRA and head are trained in float32 over the bfloat16 base, and texts are encoded in bfloat16; there they are
#   encoded under autocast to float16.
# - Rows without a query or a positive and repeated rows are left out, and no text comes twice in a batch.
# - The last token is the last real token whatever the padding side; there it is the last position.
# - mteb's data are newer for the four reranking tasks and SciFact, and its reranking encodes each candidate once, which
#   also changes the batches in which m4 is scored there.
# - The dilution ladder, the A/A arm and the broken arm are ours (`controls`).
# Add the presets m2 to m5 to see the effect of masks and a width-matched head.
name = "{name}"
baseline = "m1"
seeds = [0, 1, 2]
tasks = ["paper"]
evaluate_at = [1.0]

[recipe]
base_model = "{base}"
{_PAPER_RECIPE}
{designs}"""


_PAPER_DESIGNS = ("m1", "m2-paper", "m3-paper", "m4-paper", "m5-paper")
_PAPER_RECIPE = (
    """\
dataset = "yixuantt/ir_data"
decontaminate = false
steps = 1000
learning_rate = 1e-5
head_learning_rate = 1e-5
seed_varies = ["init", "order", "dropout"]
schedule = "linear"
warmup_steps = 100
weight_decay = 0.01
batch_size = 2048
accumulation = 256
negatives = 1
temperature = 0.05
max_length = 1024
evaluation_max_length = 512
evaluation_prompts = "mteb"
evaluation_template = "{instruction}"
evaluation_padding = "published"
dtype = "bfloat16"
gradient_checkpointing = true
save_steps = 100

[recipe.prompts]  # where the published instructions are not letter for letter those of mteb
Retrieval-query = "{instruction}."
TRECCOVID-query = "Given a query, retrieve documents that answer the query"
Banking77Classification = "{instruction}."
ImdbClassification = "{instruction}."
EmotionClassification = """
    + '"Classify the emotion expressed in the given Twitter message into one of the six emotions:anger, fear, joy, '
    'love, sadness, and surprise."\n'
    + """\
SummEval = "Given a news summary, retrieve other semantically similar summaries"

[recipe.lora]
rank = 16
alpha = 32
dropout = 0.1
target = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""
)

TEMPLATES = {
    "paper": paper_study("paper-mistral-7b").replace('name = "paper-mistral-7b"', 'name = "paper"'),
    "demo": f"""\
# The built-in model and tasks: runs offline in minutes and shows how designs differ on planted mechanisms.
name = "demo"
baseline = "m1"
seeds = [0, 1, 2, 3, 4]
tasks = ["demo"]
references = ["untuned", "tfidf", "tfidf_chars", "bm25"]
evaluate_at = [1.0]

{DEMO_RECIPE}
{_FIVE}""",
    "factorial": f"""\
# Every pooling under both attention modes. m1 to m5 alone confound the two factors; here the main effects and their
# interaction are separable, and the *-ffn designs are capacity controls: the trainable head without its attention.
name = "factorial"
baseline = "last-ca"
seeds = [0, 1, 2]
tasks = ["demo"]
evaluate_at = [1.0]

{DEMO_RECIPE}
{_CELLS}""",
}


OWN = """\
# Your own data: which attention and pooling suit it? "nano" is a toy model for a trial run in minutes. For an answer
# name a real base model (a folder or a Hub name), lower the learning rates (1e-5 for a 7B model under LoRA) and raise
# steps, batch_size and max_length. More designs: docs/design-space.md.
name = "own"
baseline = "m1"
seeds = [0, 1, 2]
tasks = {tasks}
references = ["untuned", "tfidf", "bm25"]
evaluate_at = [1.0]

[recipe]
base_model = "nano"
{dataset}steps = {steps}
learning_rate = 5e-3
head_learning_rate = 5e-3
warmup_steps = 2
batch_size = {batch_size}
negatives = 1
max_length = 128
save_steps = 1000
{sources}
[[designs]]
preset = "m1"

[[designs]]
name = "mean-causal"
attention = "causal"
pooling = "mean"

[[designs]]
name = "mean-bi"
attention = "bidirectional"
pooling = "mean"
"""


def write(template: str, to: Path | None = None) -> Path:
    """Write a starter study. Raises PoolwiseError for an unknown template or a file that exists."""
    if template not in TEMPLATES:
        allowed = [*TEMPLATES, "own"]
        hint = suggest(template, allowed)
        raise PoolwiseError(f"template {template!r} is unknown; allowed: {', '.join(allowed)}{hint}")
    return _write_new(to or Path(f"{template}.toml"), TEMPLATES[template])


def write_own(tasks: Sequence[Path], pairs: Mapping[Path, int], to: Path) -> Path:
    """Write a study of own evaluation folders and own files of training pairs (with their rows; none: the demo's).

    Raises PoolwiseError for a file that exists.
    """

    def relative(path: Path) -> str:
        place = os.path.relpath(path, to.resolve().parent)
        return json.dumps(place if place.startswith(".") else f"./{place}", ensure_ascii=False)

    rows = sum(pairs.values())
    # a bootstrap leaves about 63 % of the rows, of which a batch takes different ones
    batch_size = max(2, min(24, rows // 4)) if rows else 24
    steps = min(200, max(16, 3 * rows // batch_size))
    dataset, sources = 'dataset = "demo"\n', ""
    if pairs:
        dataset = f"dataset = {relative(next(iter(pairs)))}\n" if len(pairs) == 1 else ""
    if len(pairs) > 1:  # weighted by rows, so that every row counts alike
        parts = (f"\n[[recipe.sources]]\npath = {relative(path)}\nweight = {n}.0\n" for path, n in pairs.items())
        sources = "".join(parts)
    listed = "[\n" + "".join(f"  {relative(path)},\n" for path in tasks) + "]" if tasks else "[]"
    text = OWN.format(tasks=listed, dataset=dataset, steps=steps, batch_size=batch_size, sources=sources)
    return _write_new(to, text)


def _write_new(path: Path, text: str) -> Path:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise PoolwiseError(f"{path} exists; give another name with --to") from None
    except OSError as error:
        raise PoolwiseError(f"{path} cannot be written: {error.strerror}") from None
    return path


def demo_study(folder: Path, *, quick: bool = False) -> Study:
    """The study of `poolwise demo`, run in `folder/runs`. quick: m1 and m5, two seeds, the `QUICK` mechanisms."""
    raw = tomllib.loads(TEMPLATES["demo"])
    raw["output"] = str((folder / "runs").resolve())
    if quick:
        tasks = [name for name in demo.task_names() if name.removeprefix(demo.PREFIX).startswith(QUICK)]
        raw["recipe"]["steps"] = QUICK_STEPS
        raw.update(name="demo-quick", seeds=[0, 1], tasks=tasks, designs=[{"preset": "m1"}, {"preset": "m5"}])
    return Study.parse(raw, where="demo")
