"""A study before it runs: its factors, sizes and cost, its data, and what its statistics can detect."""

from __future__ import annotations

import math
from typing import Any

from scipy.special import ndtri, stdtrit

from poolwise.data.batches import effective_negatives, plan
from poolwise.data.pairs import DEMO, REMOVED, decontaminate, is_hub_name, load_pairs
from poolwise.data.rows import untestable
from poolwise.data.tasks import SEARCH_TYPES, Task, resolve_tasks
from poolwise.demo import PREFIX as DEMO_TASKS
from poolwise.demo.mechanisms import item_count
from poolwise.files import user_path
from poolwise.model.base import cpu_bfloat16_gain, torch_dtype
from poolwise.pooling.cost import base_costs
from poolwise.runs.prepare import AA_SEEDS, base_config, check_base, check_tuning, data_notes
from poolwise.stats.crossed import POWER, planned_detectable_effect
from poolwise.stats.exact import min_reachable_p
from poolwise.study.pooling_spec import AUTO
from poolwise.study.recipe import Recipe, settings
from poolwise.study.study import Study
from poolwise.verdicts.arms import FEW_SOURCES, ITEM_UNITS

HEAD_SHARE = 0.05
"""A head of default size should cost less than this share of the base's FLOPs at 32 tokens."""
ASSUMED_SDS = (0.01, 0.14, 0.19)
"""Standard deviations for planning, in scores 0–1: of the effect of one run, of a single score around its run and item,
and of the true difference of two designs over items. They are the medians over the eight data sets of
`results/smollm2-h200` (per data set .00 to .02, .09 to .18 and .10 to .27), to a hundredth."""


def check(study: Study) -> dict[str, Any]:
    """Validate a study against its base model and tasks, without training anything.

    Returns a JSON-able dictionary: `designs` (factors that differ from the baseline, and the rows of
    `pooling.cost.base_costs`), `trials`, `effective_negatives`, `tasks` by type with what they are tested over and the
    smallest two-sided p that a Wilcoxon test over them can reach, before and after Holm's first step, `folders` (tasks
    read from folders, tested over seeds × items: their items, and the difference that would be detected if runs and
    items vary as in `ASSUMED_SDS`), `mechanisms` (the built-in tasks, tested over items as well), `training_flops` of
    all trainings together (evaluation not counted), `tuning` (what `[tuning]` adds to them), `grid` (a line for each
    combination that is not a design), `bfloat16_gain`, `data` (counts of the training pairs) and `warnings`. Training
    pairs on the Hub are read only when the study runs.

    Raises:
        ModelError: the base model cannot be loaded (AttentionError: it ignores a design's attention mode).
        DataError, TaskError, StudyError: the training data, a task or the study itself cannot be used.
    """
    configs = {name: base_config(study.on_base(name)) for name in study.bases}
    unchecked = [note for name in configs for note in check_base(study.on_base(name), *configs[name])]
    baseline = study.design(study.baseline)
    designs = [row for name, (_, config) in configs.items() for row in base_costs(study.on_base(name), config)]
    bases = [
        {
            "name": name,
            "path": path,
            "parameters": next(row["base_parameters"] for row in designs if row["base"] == name),
        }
        for name, (path, _) in configs.items()
    ]
    for row in designs:
        row["differs_in"] = study.design(row["design"]).differs_from(baseline)
    tasks = every_task = resolve_tasks(study.tasks, study.base_dir)
    planted = _mechanisms([task.name for task in tasks if task.name.startswith(DEMO_TASKS)])
    tasks = [task for task in tasks if not task.name.startswith(DEMO_TASKS)]
    items = {task.name: (_items(task), task.task_type) for task in tasks if task.from_folder}
    # As in `verdicts.arms`: tasks read from folders are tested over their items, and with enough sources of one type
    # over tasks as well.
    by_type: dict[str, list[Task]] = {}
    for task in tasks:
        by_type.setdefault(task.task_type, []).append(task)
    rest = {kind: [task for task in each if not items.get(task.name, (0, ""))[0]] for kind, each in by_type.items()}
    many = {kind for kind, each in by_type.items() if len({task.source for task in each}) >= FEW_SOURCES}
    over_tasks = {kind: by_type[kind] if kind in many else rest[kind] for kind in by_type if kind in many or rest[kind]}
    tested = len(over_tasks) + sum(count > 0 for count, _ in items.values()) + len(planted)
    contrasts = (len(study.designs) - 1) * max(1, tested)
    groups = [
        {
            "task_type": kind,
            "tasks": len(each := over_tasks.get(kind, by_type[kind])),
            "sources": len({task.source for task in each}),
            "tested_over": "tasks" if kind in over_tasks else "items",
            "min_reachable_p": min_reachable_p(len(each)),
            "min_reachable_p_holm": min(1.0, min_reachable_p(len(each)) * max(1, contrasts)),
        }
        for kind in sorted(by_type)
    ]
    folders = [
        {
            "task": name,
            "task_type": kind,
            "items": count,
            "unit": ITEM_UNITS[kind],
            "detectable": _detectable(count, len(study.seeds), len(study.designs), 0.05 / max(1, contrasts)),
        }
        for name, (count, kind) in items.items()
        if count
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
        "folders": folders,
        "mechanisms": planted,
        "bfloat16_gain": _bfloat16_gain(study.recipe),
        "data": [
            *(note for task in every_task for note in task.notes),
            *_data(study, every_task, [base["path"] for base in bases]),
        ],
        "warnings": unchecked + list(dict.fromkeys(_warnings(study, designs, groups))),
    }


def _items(task: Task) -> int:
    """The queries, examples, sets or pairs of a task read from a folder, over which it is tested; 0: it is not."""
    task.load()
    data = task.split_data(task.splits[0], task.subsets[0])
    if task.task_type == "Clustering" and untestable(data):
        return 0
    return len(data["queries"] if task.task_type in SEARCH_TYPES else data)


def _detectable(items: int, seeds: int, designs: int, alpha: float) -> float | None:
    """The true difference that a test over seeds × items finds with 80 % power, planned with `ASSUMED_SDS`; None for a
    single item. With one seed it is that of Student's t over the items, about the checkpoints."""
    run_sd, noise_sd, item_sd = ASSUMED_SDS
    if items < 2 or designs < 2:
        return None
    if seeds > 1:
        return planned_detectable_effect(seeds, items, run_sd, noise_sd, item_sd, designs, 1 - alpha)
    return float((stdtrit(items - 1, 1 - alpha / 2) + ndtri(POWER)) * math.sqrt((2 * noise_sd**2 + item_sd**2) / items))


def _mechanisms(names: list[str]) -> list[dict[str, Any]]:
    """Built-in tasks by mechanism: the number of tasks, and of items, over which a verdict averages."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        mechanism, _, kind = name.removeprefix(DEMO_TASKS).rpartition("-")
        kinds.setdefault(mechanism, []).append(kind)
    return [
        {"mechanism": mechanism, "tasks": len(forms), "items": sum(item_count(mechanism, form) for form in forms)}
        for mechanism, forms in kinds.items()
    ]


def _tuning(study: Study, designs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Upper bounds on the trainings and FLOPs of the search and of the tuned designs: the recipe's own setting, if it
    is among those searched, is not run again."""
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
    """FLOPs of all trainings; a control arm costs as much as the baseline."""
    arms = 2 * study.controls
    return len(study.seeds) * sum(
        row["training_flops"] * (1 + arms * (row["design"] == study.baseline)) for row in designs
    )


def _data(study: Study, tasks: list[Task], paths: list[str]) -> list[str]:
    """Notes on the training pairs if they are on this machine: read, compared with the tasks at hand, batched."""
    recipe = study.recipe
    for source in recipe.data_sources:
        local = source.path == DEMO or user_path(source.path, study.base_dir).exists()
        if not local and is_hub_name(source.path):
            return [f"training data {source.path!r} is read from the Hub when the study runs"]
    pairs = load_pairs(recipe, study.base_dir)
    evaluated = (text for task in tasks if task.in_memory for text in task.texts_by_kind())
    pairs = decontaminate(pairs, evaluated, REMOVED[recipe.decontaminate])
    plan(pairs, recipe, study.seeds[0])
    notes = list(dict.fromkeys(note for path in paths for note in data_notes(pairs, recipe, path)))
    if not all(task.in_memory for task in tasks):
        notes.append("training rows are compared with the texts of official tasks when the study runs")
    return notes


def _bfloat16_gain(recipe: Recipe) -> float | None:
    """How many times faster matrix products are in bfloat16, if `auto` computes in float32 on a CPU that has it."""
    if recipe.dtype != "auto" or torch_dtype(recipe.dtype) != torch_dtype("float32") or cpu_bfloat16_gain() <= 1:
        return None
    return round(cpu_bfloat16_gain(), 1)


def _warnings(study: Study, designs: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[str]:
    warnings = []
    if len(study.seeds) == 1:
        warnings.append("One seed: differences between designs cannot be separated from chance; give at least two.")
    unmasked = [design.name for design in study.designs if design.spec.reads_padding(design.factors())]
    if unmasked and not study.recipe.evaluation_padding:
        warnings.append(
            f"{', '.join(unmasked)}: padding is masked; recipe.evaluation_padding = 'published' scores it as the paper "
            "did."
        )
    if study.recipe.evaluation_padding and not unmasked:
        warnings.append("recipe.evaluation_padding has no effect: no design has masked = false.")
    if not study.tasks:
        warnings.append("No tasks: the designs are trained but not scored.")
    if study.controls and any(seed >= AA_SEEDS for seed in study.seeds):
        warnings.append(f"Seeds from {AA_SEEDS} on are also used by the A/A arm; choose smaller ones.")
    crowded: dict[str, list[str]] = {}
    for row in designs:
        share = row["head_flops_32"] / row["base_flops_32"]
        design = study.design(row["design"])
        if share > HEAD_SHARE and design.pooling_args.get("latents", AUTO) == AUTO:
            who = f"{row['design']} on {row['base']}" if len(study.bases) > 1 else row["design"]
            excess = "even 4 latents cost" if design.factors().get("latents") == AUTO else f"{design.pooling} costs"
            crowded.setdefault(f"{excess} {share:.1%}", []).append(who)
    for excess, who in crowded.items():
        warnings.append(f"{', '.join(who)}: this base is so small that {excess} of its FLOPs.")
    over_tasks = [group for group in groups if group["tested_over"] == "tasks"]
    thin = [group for group in over_tasks if group["min_reachable_p_holm"] > 0.05]
    if thin and len(study.designs) > 1:
        where = ", ".join(group["task_type"] for group in thin) if len(thin) < len(groups) else "any task type"
        warnings.append(f"A Wilcoxon test over tasks cannot reach .05 after Holm on {where}: too few tasks.")
    return warnings
