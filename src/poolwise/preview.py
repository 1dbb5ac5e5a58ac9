"""What a study would do, before it does it: factors, sizes, cost, and what its statistics can reach."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from poolwise.batches import effective_negatives, plan
from poolwise.cost import base_flops, base_parameters, head_flops, head_parameters, lora_parameters
from poolwise.data import load_pairs
from poolwise.pooling import resolve_args
from poolwise.preflight import check_base, data_notes
from poolwise.sources import DEMO, is_hub_name
from poolwise.stats import min_reachable_p
from poolwise.study import Lora, Study
from poolwise.tasks import resolve_tasks
from poolwise.trial import AA_SEEDS, base_config

LENGTHS = (32, 128, 512)
"""Tokens a text at which FLOPs are quoted."""

HEAD_SHARE = 0.05
"""The share of the base's FLOPs at 32 tokens that a head of default size is to stay below."""


def costs(study: Study, config: Any) -> list[dict[str, Any]]:
    """Per design: trainable parameters and forward FLOPs of base and head (multiply-add = 2) at `LENGTHS` tokens."""
    lora = study.recipe.lora
    base = base_parameters(config)
    tuned = base if lora == "full" else 0
    if isinstance(lora, Lora):
        tuned = lora_parameters(config, lora.rank, lora.target)
    rows = []
    for design in study.designs:
        arguments = resolve_args(design.pooling, design.pooling_args, config)
        row: dict[str, Any] = {
            "design": design.name,
            "attention": design.attention,
            "pooling": design.pooling,
            "pooling_args": arguments,
            "base_parameters": base,
            "tuned_base_parameters": tuned,
            "head_parameters": head_parameters(design.pooling, arguments, config),
        }
        row["trainable_parameters"] = row["tuned_base_parameters"] + row["head_parameters"]
        for tokens in LENGTHS:
            row[f"base_flops_{tokens}"] = base_flops(config, tokens)
            row[f"head_flops_{tokens}"] = head_flops(design.pooling, arguments, config, tokens)
        rows.append(row)
    return rows


def check(study: Study) -> dict[str, Any]:
    """Validate a study against its base model and tasks, and say what it would do.

    Returns a JSON-able dictionary: `designs` (factors that differ from the baseline, parameters, FLOPs), `trials`,
    `effective_negatives`, `tasks` by type with the smallest two-sided p that a Wilcoxon test over them can reach,
    before and after Holm's first step, `data` (what was counted in the training pairs) and `warnings`. Training pairs
    on the Hub are left to the run. Raises ModelError (AttentionError where the base ignores a design's mode),
    DataError, TaskError or StudyError.
    """
    path, config = base_config(study)
    untried = check_base(study, path, config)
    baseline = study.design(study.baseline)
    designs = costs(study, config)
    for row in designs:
        row["differs_in"] = study.design(row["design"]).differs_from(baseline)
    tasks = resolve_tasks(study.tasks, study.base_dir)
    types = Counter(task.task_type for task in tasks)
    contrasts = (len(study.designs) - 1) * max(1, len(types))
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
        "base_model": {"name": study.recipe.base_model, "path": path, "parameters": designs[0]["base_parameters"]},
        "baseline": study.baseline,
        "designs": designs,
        "seeds": list(study.seeds),
        "trials": {
            "trained": len(study.designs) * len(study.seeds) + controls,
            "of which controls": controls,
            "untuned": untuned,
            "references": len([name for name in study.references if name != "untuned"]),
        },
        "steps": study.recipe.steps,
        "effective_negatives": effective_negatives(study.recipe),
        "contrasts": contrasts,
        "tasks": groups,
        "data": _data(study, path),
        "warnings": untried + _warnings(study, designs, groups),
    }


def _data(study: Study, path: str) -> list[str]:
    """The training pairs read and laid out in batches once, where they lie on this machine."""
    recipe = study.recipe
    for source in recipe.data_sources:
        here = source.path == DEMO or Path(study.base_dir, Path(source.path).expanduser()).exists()
        if not here and is_hub_name(source.path):
            return [f"training data {source.path!r} is read from the Hub when the study runs"]
    pairs = load_pairs(recipe, study.base_dir)
    plan(pairs, recipe, study.seeds[0])
    return data_notes(pairs, recipe, path)


def _warnings(study: Study, designs: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[str]:
    warnings = []
    if len(study.seeds) == 1:
        warnings.append("One seed: differences between designs cannot be told from luck of the run; give at least two.")
    if not study.tasks:
        warnings.append("No tasks: the designs are trained but not scored.")
    if study.controls and any(seed >= AA_SEEDS for seed in study.seeds):
        warnings.append(f"Seeds from {AA_SEEDS} on are used by the A/A arm.")
    for row in designs:
        share = row["head_flops_32"] / row["base_flops_32"]
        if share > HEAD_SHARE and study.design(row["design"]).pooling_args.get("latents", "auto") == "auto":
            warnings.append(
                f"{row['design']}: this base is so small that even 4 latents cost {share:.1%} of its FLOPs."
            )
    for group in groups:
        if group["min_reachable_p_holm"] > 0.05 and len(study.designs) > 1:
            warnings.append(
                f"{group['task_type']}: with {group['tasks']} task(s) and {len(study.designs) - 1} contrast(s) in "
                f"{len(groups)} group(s), a Wilcoxon test over tasks cannot reach .05 after Holm "
                f"(at best {group['min_reachable_p_holm']:.3f})."
            )
    return warnings
