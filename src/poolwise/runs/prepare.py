"""Preparation of a study: checks before the first trial, the data and tasks that trials share, the list of trials.

It happens once, in a process of its own that touches no accelerator (`runs.worker`). What the trials need of it goes to
the workers as plain data: `save` writes texts and plans as memory-mapped files, `load` opens them in a worker.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from poolwise.data.batches import Plan, plan
from poolwise.data.pairs import REMOVED, Pairs, decontaminate, load_pairs
from poolwise.data.rows import Rows, random_stream
from poolwise.data.tasks import Task, resolve_tasks
from poolwise.errors import AttentionError, ModelError, StudyError, TaskError
from poolwise.files import read_json, safe_name, write_json
from poolwise.model.attention import check_window, partial_layers, set_attention, verify
from poolwise.model.base import (
    base_identity,
    base_path,
    cannot_load,
    check_positions,
    ensure_eos,
    load_base,
    load_config,
)
from poolwise.model.packing import choose
from poolwise.pooling.cost import base_costs, base_parameters, resolve_args
from poolwise.runs import layout
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study, content_hash

ROLES = ("design", "aa", "broken", "ladder", "untuned", "reference")
AA_SEEDS = 1000
"""The A/A arm is the baseline trained with each seed plus this."""
BROKEN = Design(name="broken", attention="causal", pooling="first_token")
"""The arm that must lose: under causal attention the first token sees nothing of the text."""
NOT_IN_SPEC = {"base_model", "decontaminate", "guide", "report_to", "save_steps"}
"""Fields of the recipe that are not in a spec: the base model and the guide are there by content, and so are the rows
that are left of the data."""
ADDED = {"accumulation": 1, "matryoshka": [], "guide_margin": 0.0}
"""Options of the recipe that are left out of a spec while they have these values, so that names of trials stay the same
when an option is added."""
LARGEST = 1_000_000_000
"""Parameters up to which a base model in a folder is loaded (fp32, CPU) and probed beforehand."""
SAMPLED_ROWS = 1000
"""Training rows on which the share of texts that are cut is estimated."""


def check_base(study: Study, path: str, config: Any) -> list[str]:
    """Refuse a base model that does not fit the study. Returns notes on what has to wait for the first trial.

    Raises ModelError if `max_length` exceeds the model's positions or a width of `matryoshka` its hidden size,
    AttentionError if it ignores a design's attention mode.
    """
    recipe = study.recipe
    check_positions(recipe, config)
    width = config.get_text_config().hidden_size
    if too_wide := [wanted for wanted in recipe.matryoshka if wanted >= width]:
        raise ModelError(
            f"recipe.matryoshka = {list(recipe.matryoshka)}: {', '.join(map(str, too_wide))} must be below {width}, "
            f"the width of {recipe.base_model}'s embeddings, which is trained anyway"
        )
    if not Path(path).is_dir() or base_parameters(config) > LARGEST or recipe.attn_implementation.startswith("flash"):
        return [f"{recipe.base_model}'s attention support will be checked when the first trial loads it."]
    model = load_base(recipe.base_model, study.base_dir, attn_implementation=recipe.attn_implementation)
    for mode in dict.fromkeys(design.attention for design in study.designs):
        try:
            set_attention(model, mode)
            check_window(model, mode, recipe.max_length)
            verify(model, mode)
        except AttentionError as error:
            names = _names(study.designs, mode)
            raise AttentionError(f"recipe.base_model = {recipe.base_model!r} cannot carry {names}: {error}") from error
    layout, reason = choose(model, study.designs, recipe.max_length)
    slower = f"Training batches are {layout}, not packed, which is slower: {reason}." if reason else None
    return [note for note in (partial_layers(model, recipe.max_length), slower) if note]


def _names(designs: Sequence[Design], mode: str) -> str:
    names = [design.name for design in designs if design.attention == mode]
    return f"the design{'s' * (len(names) > 1)} {', '.join(names)}"


def data_notes(pairs: Pairs, recipe: Recipe, path: str) -> list[str]:
    """What was counted, changed or dropped in the training data, and how many of its texts are cut."""
    notes = pairs.notes()
    cut, texts = cut_texts(pairs, recipe, path)
    if cut:
        notes.append(
            f"{cut:,} of {texts:,} sampled training texts are longer than recipe.max_length = {recipe.max_length} "
            "tokens and are cut"
        )
    return notes


def cut_texts(pairs: Pairs, recipe: Recipe, path: str) -> tuple[int, int]:
    """(texts longer than `max_length` tokens, texts) in a sample of at most `SAMPLED_ROWS` training rows."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise cannot_load("recipe.base_model", recipe.base_model, error) from error
    if recipe.append_eos:
        ensure_eos(tokenizer)
    rows = random_stream("lengths").permutation(len(pairs.dataset))[:SAMPLED_ROWS]
    sample = pairs.dataset.select(rows)
    texts = []
    for name in (name for name in sample.column_names if name != "source"):
        prompt = recipe.query_prompt if name == "query" else recipe.document_prompt
        texts += [prompt + text for text in sample[name]]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return sum(length > recipe.max_length for length in lengths), len(texts)


@dataclass(frozen=True)
class Trial:
    """One training run or reference row.

    role: one of `ROLES`: part of the comparison (`design`) or a control. steps: the milestones that are scored. base:
    the base model, None for references that use none of the study's. spec: everything that the result depends on.
    """

    label: str
    role: str
    seed: int
    spec: dict[str, Any]
    design: Design | None = None
    steps: tuple[int, ...] = (0,)
    base: str | None = None

    @cached_property
    def id(self) -> str:
        """Hash of the spec."""
        return content_hash(self.spec)

    @property
    def name(self) -> str:
        """Folder name: readable, and unique by the hash."""
        return f"{safe_name(self.label)}-s{self.seed}-{self.id[:8]}"


@dataclass
class Prepared:
    """What the trials of a study share. `plans`: the order of the training rows for each seed."""

    study: Study
    trials: list[Trial]
    tasks: list[Task]
    pairs: Pairs | None
    notes: list[str] = field(default_factory=list)
    plans: dict[int, Plan] = field(default_factory=dict)


ARRAYS = ("source", "exact", "near", "filled")
"""The arrays of `Rows`, a file each."""
TEXTS, FACTS = "pairs.arrow", "prepared.json"


def save(prepared: Prepared, folder: Path) -> None:
    """Write what trials need of the preparation into `folder`: texts, hashes and plans as files to be memory-mapped.

    Study and trials are not in it; they are small and go to a worker directly.
    """
    import pyarrow

    pairs = prepared.pairs
    assert pairs is not None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with pyarrow.ipc.new_stream(folder / TEXTS, pairs.rows.table.schema) as writer:
        writer.write_table(pairs.rows.table)
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(pairs.rows, name))
    for seed, order in prepared.plans.items():
        np.save(_order(folder, seed), order.indices)
    facts = {
        "labels": pairs.rows.labels,
        "report": pairs.report,
        "fingerprint": pairs.fingerprint,
        "plans": {seed: {"fingerprint": p.fingerprint, "report": p.report} for seed, p in prepared.plans.items()},
        "tasks": {task.name: task.identity for task in prepared.tasks},
    }
    write_json(folder / FACTS, facts)


def load(study: Study, folder: Path) -> Prepared:
    """What `save` wrote, memory-mapped, for the trials of one worker. Tasks are resolved again from their names.

    Raises TaskError if a task has changed since the preparation: its scores would lie under another name.
    """
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    facts = read_json(folder / FACTS)
    tasks = resolve_tasks(study.tasks, study.base_dir)
    if changed := [task.name for task in tasks if task.identity != facts["tasks"].get(task.name)]:
        raise TaskError(f"{', '.join(changed)} changed while the study was running; run it again")
    table = MemoryMappedTable.from_file(str(folder / TEXTS))
    rows = Rows(
        table.table, tuple(facts["labels"]), **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    )
    fingerprint = facts["fingerprint"]
    pairs = Pairs(Dataset(table, fingerprint=fingerprint[:16]), facts["report"], fingerprint, rows)
    plans = {
        int(seed): Plan(np.load(_order(folder, int(seed)), mmap_mode="r"), **content)
        for seed, content in facts["plans"].items()
    }
    return Prepared(study, [], tasks, pairs, plans=plans)


def _order(folder: Path, seed: int) -> Path:
    return folder / f"order-{seed}.npy"


def base_config(study: Study) -> tuple[str, Any]:
    """Path and configuration of the study's base model. Raises ModelError if it cannot be found."""
    path = base_path(study.recipe.base_model, study.base_dir)
    return path, load_config(study.recipe.base_model, path)


def milestones(study: Study) -> tuple[int, ...]:
    """The steps after which every design is scored, rising."""
    return tuple(sorted({max(1, round(share * study.recipe.steps)) for share in study.evaluate_at}))


def prepare(study: Study) -> Prepared:
    """Check a study, read and plan its data, resolve its tasks, list its trials.

    Raises PoolwiseError (StudyError, ModelError, DataError, TaskError) for anything that would stop a trial.
    """
    study.load_code()
    bases = {name: base_config(study.on_base(name)) for name in study.bases}
    notes = [note for name in bases for note in check_base(study.on_base(name), *bases[name])]
    tasks = resolve_tasks(study.tasks, study.base_dir)
    pairs = load_pairs(study.recipe, study.base_dir)
    evaluated = (text for task in tasks for text in task.texts_by_kind())
    pairs = decontaminate(pairs, evaluated, REMOVED[study.recipe.decontaminate])
    plans: dict[int, Plan] = {}
    trials = [trial for name in bases for trial in _trials(study.on_base(name), *bases[name], pairs, plans)]
    trials += [Trial(name, "reference", 0, {"reference": name}) for name in study.references if name != "untuned"]
    notes += [note for task in tasks for note in task.notes]
    notes += [note for path, _ in bases.values() for note in data_notes(pairs, study.recipe, path)]
    return Prepared(study, trials, tasks, pairs, list(dict.fromkeys(notes)), plans)


def _trials(study: Study, path: str, config: Any, pairs: Pairs, plans: dict[int, Plan]) -> list[Trial]:
    """The trials on one base model. `plans` is filled with the order of each seed's data, which all bases share."""
    name, recipe = study.recipe.base_model, study.recipe.model_dump(mode="json", exclude=NOT_IN_SPEC)
    recipe = {key: value for key, value in recipe.items() if ADDED.get(key, ...) != value}
    if study.recipe.guide:
        recipe["guide"] = base_identity(base_path(study.recipe.guide, study.base_dir, "recipe.guide"))
    identity = base_identity(path, getattr(config, "_commit_hash", None))

    def spec(role: str, design: Design, seed: int) -> dict[str, Any]:
        arguments = resolve_args(design.pooling, design.pooling_args, config)
        content: dict[str, Any] = {
            "base": identity,
            "recipe": recipe,
            "design": design.treatment(arguments),
            "seed": seed,
            "tuned": role != "untuned",
        }
        if role != "untuned":
            if seed not in plans:
                plans[seed] = plan(pairs, study.recipe, seed)
            content["data"] = plans[seed].fingerprint
        return content

    trials = []
    for seed in study.seeds:
        for design in study.designs:
            content = spec("design", design, seed)
            trials.append(Trial(design.name, "design", seed, content, design, milestones(study), name))
        if study.controls:
            baseline, last = study.design(study.baseline), milestones(study)[-1:]
            other = seed + AA_SEEDS
            trials.append(Trial(f"{baseline.name}-aa", "aa", other, spec("aa", baseline, other), baseline, last, name))
            trials.append(Trial("broken", "broken", seed, spec("broken", BROKEN, seed), BROKEN, last, name))
    if "untuned" in study.references:
        first = study.seeds[0]
        trials += [
            Trial(f"{design.name}-untuned", "untuned", first, spec("untuned", design, first), design, base=name)
            for design in study.designs
        ]
    return trials


def check_tuning(study: Study) -> list[Task]:
    """The development tasks of a study's `[tuning]`.

    Raises StudyError for one that the study reports on, also under another name: the search would see the test.
    """
    assert study.tuning is not None
    reported = {task.identity: task.name for task in resolve_tasks(study.tasks, study.base_dir)}
    names = set(reported.values())
    development = resolve_tasks(study.tuning.tasks, study.base_dir)
    if both := [task.name for task in development if task.identity in reported or task.name in names]:
        raise StudyError(
            [f"tuning.tasks: {', '.join(both)} would be reported too; tune on tasks that are not in `tasks`"]
        )
    return development


def compute_costs(study: Study) -> list[dict[str, Any]]:
    """The rows of `base_costs` for every base model of a study. Raises ModelError if one cannot be found."""
    return [row for name in study.bases for row in base_costs(study.on_base(name), base_config(study.on_base(name))[1])]


def store_costs(study: Study, folder: Path) -> None:
    """Write the rows into `folder`, that of the study's runs, unless those of all its designs are there already."""
    if not layout.stored_costs(study, folder):
        write_json(folder / layout.COSTS, {"designs": compute_costs(study)})
