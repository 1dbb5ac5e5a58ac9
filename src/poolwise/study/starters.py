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
learning_rate = 5e-3
head_learning_rate = 5e-3
warmup_steps = 2
batch_size = 24
negatives = 1
max_length = 128
save_steps = 1000
"""

QUICK = ("overlap", "late", "topic")
"""Mechanisms of `poolwise demo --quick`: they have every form, and m1 and m5 were predicted to differ on them."""
QUICK_STEPS = 10

TEMPLATES = {
    "paper": f"""\
# The five designs of "Pooling and Attention: What are Effective Designs for LLM-Based Embedding Models?"
# (arXiv 2409.02727) with its recipe and tasks: several GPU-days for a 7B base. The heads are about as wide as the model
# and masked; use the presets m2-paper ... m5-paper for what the paper's code computes.
name = "paper"
baseline = "m1"
seeds = [0, 1, 2]
tasks = ["paper"]
references = ["untuned", "tfidf", "bm25"]

[recipe]
base_model = "mistralai/Mistral-7B-v0.1"
dataset = "yixuantt/ir_data"
decontaminate = false
steps = 1000
learning_rate = 1e-5
head_learning_rate = 1e-5
warmup_steps = 100
weight_decay = 0.01
batch_size = 2048
mini_batch_size = 8
negatives = 1
temperature = 0.05
max_length = 1024
dtype = "bfloat16"
gradient_checkpointing = true
save_steps = 100

[recipe.lora]
rank = 16
alpha = 32
dropout = 0.1
target = "all-linear"

{_FIVE}""",
    "demo": f"""\
# The built-in model and tasks: runs offline in minutes and shows how designs differ on planted mechanisms.
name = "demo"
baseline = "m1"
seeds = [0, 1, 2]
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
