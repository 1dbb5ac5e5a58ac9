"""What a study would do, before it does it: factors, sizes, cost, and what its statistics can reach."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from poolwise.data.batches import effective_negatives, plan
from poolwise.data.pairs import DEMO, REMOVED, decontaminate, is_hub_name, load_pairs
from poolwise.data.tasks import Task, resolve_tasks
from poolwise.demo import PREFIX as DEMO_TASKS
from poolwise.demo.mechanisms import item_count
from poolwise.errors import PoolwiseError
from poolwise.files import write_atomic
from poolwise.pooling.cost import (
    base_flops,
    base_parameters,
    head_flops,
    head_parameters,
    lora_parameters,
    resolve_args,
)
from poolwise.runs import layout
from poolwise.runs.prepare import AA_SEEDS, base_config, check_base, check_tuning, data_notes
from poolwise.stats.exact import min_reachable_p
from poolwise.study.catalogue import read_tokens
from poolwise.study.pooling_spec import AUTO
from poolwise.study.recipe import Lora, Recipe, settings
from poolwise.study.study import Study

LENGTHS = (32, 128, 512)
"""Tokens a text at which FLOPs are quoted."""

TRAINED_LENGTH = 128
"""Tokens a text at which a whole training is priced."""

HEAD_SHARE = 0.05
"""The share of the base's FLOPs at 32 tokens that a head of default size is to stay below."""


def costs(study: Study) -> list[dict[str, Any]]:
    """`base_costs` on every base model of a study."""
    return [row for name in study.bases for row in base_costs(study.on_base(name), base_config(study.on_base(name))[1])]


def base_costs(study: Study, config: Any) -> list[dict[str, Any]]:
    """Per design: trainable parameters and forward FLOPs of base and head (multiply-add = 2) at `LENGTHS` tokens."""
    lora = study.recipe.lora
    base = base_parameters(config)
    tuned = base if lora == "full" else 0
    if isinstance(lora, Lora):
        tuned = lora_parameters(config, lora.rank, lora.target)
    texts = study.recipe.steps * study.recipe.batch_size * (2 + study.recipe.negatives)
    rows = []
    layers = config.get_text_config().num_hidden_layers
    for design in study.designs:
        arguments = resolve_args(design.pooling, design.pooling_args, config)
        read = design.spec.layers_read(arguments, layers)  # what is above is not trained
        row: dict[str, Any] = {
            "design": design.name,
            "base": study.recipe.base_model,
            "attention": design.attention,
            "pooling": design.pooling,
            "pooling_args": arguments,
            "base_parameters": base,
            "tuned_base_parameters": tuned * read // layers,
            "head_parameters": head_parameters(design.pooling, arguments, config),
        }
        row["trainable_parameters"] = row["tuned_base_parameters"] + row["head_parameters"]
        for tokens in LENGTHS:
            row[f"base_flops_{tokens}"] = base_flops(config, read_tokens(design.template, tokens))
            row[f"head_flops_{tokens}"] = head_flops(design.pooling, arguments, config, tokens)
        forward = row[f"base_flops_{TRAINED_LENGTH}"] + row[f"head_flops_{TRAINED_LENGTH}"]
        row["training_flops"] = forward * _passes(study.recipe) * texts
        rows.append(row)
    return rows


def _passes(recipe: Recipe) -> int:
    """Work on a text in training, in forward passes: forward, gradients of the states, those of the base's weights if
    they are trained, and each forward pass that is made twice to save memory."""
    return 2 + (recipe.lora == "full") + recipe.gradient_checkpointing + (recipe.mini_batch_size > 0)


def check(study: Study) -> dict[str, Any]:
    """Validate a study against its base model and tasks, and say what it would do.

    Returns a JSON-able dictionary: `designs` (factors that differ from the baseline, parameters, FLOPs), `trials`,
    `effective_negatives`, `tasks` by type with the smallest two-sided p that a Wilcoxon test over them can reach,
    before and after Holm's first step, `mechanisms` (the built-in tasks: their unit is the mechanism, over seeds ×
    items, so that no test over tasks speaks of them), `training_flops` of all trainings together (texts of
    `TRAINED_LENGTH` tokens; evaluation not counted), `tuning` (what `[tuning]` adds to them), `grid` (what the grid did
    not make, a line each), `data` (what was counted in the training pairs) and `warnings`. Training pairs on the Hub
    are left to the run.

    Raises ModelError (AttentionError where the base ignores a design's mode), DataError, TaskError or StudyError.
    """
    found = {name: base_config(study.on_base(name)) for name in study.bases}
    untried = [note for name in found for note in check_base(study.on_base(name), *found[name])]
    baseline = study.design(study.baseline)
    designs = [row for name, (_, config) in found.items() for row in base_costs(study.on_base(name), config)]
    bases = [
        {
            "name": name,
            "path": path,
            "parameters": next(row["base_parameters"] for row in designs if row["base"] == name),
        }
        for name, (path, _) in found.items()
    ]
    for row in designs:
        row["differs_in"] = study.design(row["design"]).differs_from(baseline)
    tasks = every_task = resolve_tasks(study.tasks, study.base_dir)
    planted = _mechanisms([task.name for task in tasks if task.name.startswith(DEMO_TASKS)])
    tasks = [task for task in tasks if not task.name.startswith(DEMO_TASKS)]
    types = Counter(task.task_type for task in tasks)
    contrasts = (len(study.designs) - 1) * max(1, len(types) + len(planted))
    groups = [
        {
            "task_type": kind,
            "tasks": count,
            "sources": len({task.source for task in tasks if task.task_type == kind}),
            "min_reachable_p": min_reachable_p(count),
            "min_reachable_p_holm": min(1.0, min_reachable_p(count) * max(1, contrasts)),
        }
        for kind, count in sorted(types.items())
    ]
    controls = 2 * len(study.seeds) if study.controls else 0
    untuned = len(study.designs) if "untuned" in study.references else 0
    return {
        "study": study.name,
        "fingerprint": study.fingerprint,
        "folder": str(study.folder),
        "base_model": bases[0],
        "base_models": bases,
        "baseline": study.baseline,
        "designs": designs,
        "seeds": list(study.seeds),
        "trials": {
            "trained": len(bases) * (len(study.designs) * len(study.seeds) + controls),
            "of which controls": len(bases) * controls,
            "untuned": len(bases) * untuned,
            "references": len([name for name in study.references if name != "untuned"]),
        },
        "training_flops": _training_flops(study, designs),
        "tuning": _tuning(study, designs),
        "grid": study.grid_notes,
        "steps": study.recipe.steps,
        "effective_negatives": effective_negatives(study.recipe),
        "contrasts": contrasts,
        "tasks": groups,
        "mechanisms": planted,
        "data": [
            *(note for task in every_task for note in task.notes),
            *_data(study, every_task, [base["path"] for base in bases]),
        ],
        "warnings": untried + list(dict.fromkeys(_warnings(study, designs, groups))),
    }


def _mechanisms(names: list[str]) -> list[dict[str, Any]]:
    """Built-in tasks by what they plant: tasks and items, the units that a verdict averages over."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        mechanism, _, kind = name.removeprefix(DEMO_TASKS).rpartition("-")
        kinds.setdefault(mechanism, []).append(kind)
    return [
        {"mechanism": mechanism, "tasks": len(found), "items": sum(item_count(mechanism, kind) for kind in found)}
        for mechanism, found in kinds.items()
    ]


def _tuning(study: Study, designs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Trainings and FLOPs of the search and of the second arm: at most, as a setting of the recipe is not run again."""
    if study.tuning is None:
        return None
    searched = flops = longest = 0
    for row in designs:
        tried = settings(study.tuning, study.recipe, has_head=bool(row["head_parameters"]))
        searched += len(tried)
        flops += sum(row["training_flops"] * setting.steps // study.recipe.steps for setting in tried)
        longest += row["training_flops"] * max(setting.steps for setting in tried) // study.recipe.steps
    return {
        "searched": searched,
        "again": len(designs) * len(study.seeds),
        "training_flops": flops + len(study.seeds) * longest,
        "tasks": [task.name for task in check_tuning(study)],
        "seed": study.tuning.seed,
    }


def _training_flops(study: Study, designs: list[dict[str, Any]]) -> int:
    """Of all trainings; a control arm costs what the baseline does."""
    arms = 2 * study.controls
    return len(study.seeds) * sum(
        row["training_flops"] * (1 + arms * (row["design"] == study.baseline)) for row in designs
    )


def _data(study: Study, tasks: list[Task], paths: list[str]) -> list[str]:
    """The training pairs, if they are on this machine: read, compared with the tasks at hand, laid out in batches."""
    recipe = study.recipe
    for source in recipe.data_sources:
        here = source.path == DEMO or Path(study.base_dir, Path(source.path).expanduser()).exists()
        if not here and is_hub_name(source.path):
            return [f"training data {source.path!r} is read from the Hub when the study runs"]
    pairs = load_pairs(recipe, study.base_dir)
    evaluated = (text for task in tasks if task.in_memory for text in task.texts_by_kind())
    pairs = decontaminate(pairs, evaluated, REMOVED[recipe.decontaminate])
    plan(pairs, recipe, study.seeds[0])
    notes = list(dict.fromkeys(note for path in paths for note in data_notes(pairs, recipe, path)))
    if not all(task.in_memory for task in tasks):
        notes.append("training rows are compared with the texts of official tasks when the study runs")
    return notes


def _warnings(study: Study, designs: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[str]:
    warnings = []
    if len(study.seeds) == 1:
        warnings.append("One seed: differences between designs cannot be told from luck of the run; give at least two.")
    if not study.tasks:
        warnings.append("No tasks: the designs are trained but not scored.")
    if study.controls and any(seed >= AA_SEEDS for seed in study.seeds):
        warnings.append(f"Seeds from {AA_SEEDS} on are used by the A/A arm.")
    crowded: dict[str, list[str]] = {}
    for row in designs:
        share = row["head_flops_32"] / row["base_flops_32"]
        design = study.design(row["design"])
        if share > HEAD_SHARE and design.pooling_args.get("latents", AUTO) == AUTO:
            who = f"{row['design']} on {row['base']}" if len(study.bases) > 1 else row["design"]
            head = "even 4 latents cost" if design.factors().get("latents") == AUTO else f"{design.pooling} costs"
            crowded.setdefault(f"{head} {share:.1%}", []).append(who)
    for costs, who in crowded.items():
        warnings.append(f"{', '.join(who)}: this base is so small that {costs} of its FLOPs.")
    thin = [group for group in groups if group["min_reachable_p_holm"] > 0.05]
    if thin and len(study.designs) > 1:
        where = ", ".join(group["task_type"] for group in thin) if len(thin) < len(groups) else "any task type"
        warnings.append(f"A Wilcoxon test over tasks cannot reach .05 after Holm on {where}: too few tasks.")
    return warnings


def known_costs(study: Study) -> list[dict[str, Any]]:
    """The cost table; empty where the base model cannot be reached any more."""
    try:
        return mean_costs(study)
    except (PoolwiseError, OSError):
        return []


def mean_costs(study: Study) -> list[dict[str, Any]]:
    """One row a design: its costs averaged over the study's base models."""
    rows = [row for row in costs_of(study) if row.get("base", study.bases[0]) in study.bases]
    found = []
    for design in study.designs:
        mine = [row for row in rows if row["design"] == design.name]
        mean = {key: sum(row[key] for row in mine) / len(mine) for key, value in mine[0].items() if type(value) is int}
        found.append(mine[0] if len(mine) == 1 else {**mine[0], **mean})
    return found


def costs_of(study: Study) -> list[dict[str, Any]]:
    """The cost table, kept in the study's folder: reading it needs no model library."""
    path = study.folder / layout.COSTS
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))
        have = {(row["design"], row.get("base", study.bases[0])) for row in rows}
        if have >= {(design.name, base) for design in study.designs for base in study.bases}:
            return rows  # type: ignore[no-any-return]

    rows = costs(study)
    write_atomic(path, json.dumps(rows))
    return rows
