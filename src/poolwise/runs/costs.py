"""The cost of each design of a study, parameters and FLOPs, as rows; a run stores them in its folder.

Computing the rows builds each base model on torch's meta device. Reading stored rows loads no model library, so that
scores can be compared anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from poolwise.files import write_atomic
from poolwise.runs import layout
from poolwise.study.catalogue import read_tokens
from poolwise.study.recipe import Lora
from poolwise.study.study import Study
from poolwise.verdicts.costs import PRICED_TOKENS

LENGTHS = (32, PRICED_TOKENS, 512)
"""Text lengths in tokens at which FLOPs are given."""


def compute(study: Study) -> list[dict[str, Any]]:
    """The rows of `base_costs` for every base model of a study. Raises ModelError if one cannot be found."""
    from poolwise.runs.prepare import base_config

    return [row for name in study.bases for row in base_costs(study.on_base(name), base_config(study.on_base(name))[1])]


def base_costs(study: Study, config: Any) -> list[dict[str, Any]]:
    """One row per design on one base model, whose transformers configuration is `config`.

    A row holds the parameters of base and head (`base_parameters`, `head_parameters`) and those that are trained
    (`tuned_base_parameters`, `trainable_parameters`), the forward FLOPs of one text at each of `LENGTHS`
    (`base_flops_32`, `head_flops_32`, …; a multiply-add counts as two), and the two prices by which designs are
    compared: `encode_flops` of one text and `training_flops` of one whole training, both at `PRICED_TOKENS` tokens per
    text.
    """
    from poolwise.pooling import cost

    recipe, layers = study.recipe, config.get_text_config().num_hidden_layers
    base = cost.base_parameters(config)
    tuned = base if recipe.lora == "full" else 0
    if isinstance(recipe.lora, Lora):
        tuned = cost.lora_parameters(config, recipe.lora.rank, recipe.lora.target)
    texts = recipe.steps * recipe.batch_size * (2 + recipe.negatives)
    rows = []
    for design in study.designs:
        arguments = cost.resolve_args(design.pooling, design.pooling_args, config)
        read = design.spec.layers_read(arguments, layers)  # the layers above are not trained
        row: dict[str, Any] = {
            "design": design.name,
            "base": recipe.base_model,
            "attention": design.attention,
            "pooling": design.pooling,
            "pooling_args": arguments,
            "base_parameters": base,
            "tuned_base_parameters": tuned * read // layers,
            "head_parameters": cost.head_parameters(design.pooling, arguments, config),
        }
        row["trainable_parameters"] = row["tuned_base_parameters"] + row["head_parameters"]
        for tokens in LENGTHS:
            row[f"base_flops_{tokens}"] = cost.base_flops(config, read_tokens(design.template, tokens))
            row[f"head_flops_{tokens}"] = cost.head_flops(design.pooling, arguments, config, tokens)
        forward = row[f"base_flops_{PRICED_TOKENS}"], row[f"head_flops_{PRICED_TOKENS}"]
        row["encode_flops"] = sum(forward)
        row["training_flops"] = texts * cost.training_flops(*forward, recipe, read / layers)
        rows.append(row)
    return rows


def store(study: Study, folder: Path) -> None:
    """Write the rows into `folder`, that of the study's runs, unless those of all its designs are there already."""
    if not _read(study, folder):
        write_atomic(folder / layout.COSTS, json.dumps(compute(study), indent=1) + "\n")


def stored(study: Study) -> list[dict[str, Any]]:
    """The stored rows of the study's designs and base models; empty if the file or one of them is missing."""
    return _read(study, study.folder)


def _read(study: Study, folder: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads((folder / layout.COSTS).read_text(encoding="utf-8"))
        known = {(row["base"], row["design"]): row for row in rows}
        return [known[name, design.name] for name in study.bases for design in study.designs]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def missing(study: Study) -> str:
    """The note for a study whose costs are not stored."""
    path = study.folder / layout.COSTS
    return f"Costs are unknown: {path} is missing or does not cover every design; `poolwise run` writes it."


def mean_costs(study: Study) -> list[dict[str, Any]]:
    """One stored row per design, averaged over the study's base models, with `relative_cost`: its encode cost over the
    baseline's. Empty if no costs are stored."""
    rows = stored(study)
    if not rows:
        return []
    means = []
    for design in study.designs:
        mine = [row for row in rows if row["design"] == design.name]
        numbers = [key for key, value in mine[0].items() if type(value) is int]
        mean = {key: sum(row[key] for row in mine) / len(mine) for key in numbers} if len(mine) > 1 else {}
        means.append({**mine[0], **mean})
    base = next(row["encode_flops"] for row in means if row["design"] == study.baseline)
    return [{**row, "relative_cost": row["encode_flops"] / base} for row in means]
