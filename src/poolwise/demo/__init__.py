"""The built-in base model and the mechanism tasks: a study that needs nothing but the package.

    from poolwise import demo
    demo.nano_path()              # a model folder: a 3.8M-parameter causal LM
    demo.smollm2_study()          # a published study on a real model, with its scores
    demo.training_pairs(seed=0)   # [{"query", "positive", "negatives": [...], "mechanism"}]
    demo.task_names()             # ["demo/overlap-sts", ...]
    demo.task_data("demo/roles-retrieval")

Every task is generated from one planted mechanism (`poolwise.demo.mechanisms`); the training pairs come from the same
mechanisms with other words and other templates. Importing this package loads neither torch nor numpy.
"""

from __future__ import annotations

import functools
import hashlib
import tomllib
from pathlib import Path
from typing import Any

from poolwise.demo import mechanisms as forms
from poolwise.demo.mechanisms import MECHANISMS
from poolwise.errors import TaskError, suggest

__all__ = ["MECHANISMS", "nano_path", "predictions", "smollm2_study", "task_data", "task_names", "training_pairs"]

PREFIX = "demo/"
PAIRS_PER_MECHANISM = 400


def nano_path() -> Path:
    """Folder of the built-in base model (weights, tokenizer, card)."""
    return Path(__file__).parent / "nano"


def smollm2_study() -> Path:
    """The study file of the published study on SmolLM2-135M; its scores lie beside it, as in a run folder."""
    return Path(__file__).parent / "smollm2" / "study.toml"


def training_pairs(seed: int = 0) -> list[dict[str, Any]]:
    """4,000 rows of query, positive, one hard negative and the mechanism they teach, mechanisms in turn.

    A function of `seed` alone; no content word and no template of it occurs in an evaluation task.
    """
    return [{**row, "negatives": list(row["negatives"])} for row in _pairs(seed)]


@functools.cache
def _pairs(seed: int) -> list[dict[str, Any]]:
    """Kept, as making them takes a second and a study is checked, prepared and run in the same process."""
    return forms.pairs(PAIRS_PER_MECHANISM, seed)


def predictions() -> dict[str, Any]:
    """What each mechanism was predicted to favour, before any design was run.

    The package holds a copy of `studies/predictions.toml`.

    Returns `sha256` of the file, `written` (a date as text), `mechanisms`: name -> favoured, over, bag_of_words, why,
    and what it `plants`, in a few words.
    """
    content = (Path(__file__).parent / "predictions.toml").read_bytes()
    rows = tomllib.loads(content.decode())
    written = rows.pop("written")
    mechanisms = {name: {**row, "plants": MECHANISMS[name].plants} for name, row in rows.items()}
    return {"sha256": hashlib.sha256(content).hexdigest(), "written": written.isoformat(), "mechanisms": mechanisms}


def task_names() -> list[str]:
    """All built-in tasks, `demo/<mechanism>-<kind>`."""
    return [f"{PREFIX}{mechanism}-{kind}" for mechanism, kinds in forms.SIZES.items() for kind in kinds]


def task_data(name: str) -> dict[str, Any]:
    """The data of a built-in task, always the same: `kind`, and its `records` as own evaluation folders hold them.

    Raises:
        TaskError: there is no such task.
    """
    if name not in task_names():
        raise TaskError(f"unknown demo task {name!r} (allowed: {', '.join(task_names())}){suggest(name, task_names())}")
    mechanism, kind = name.removeprefix(PREFIX).split("-")
    return {"kind": kind, "records": forms.records(mechanism, kind)}
