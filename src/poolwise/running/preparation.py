"""A study made ready: everything that its trials share, and the list of trials, each named by the hash of its spec."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from poolwise.data import Pairs, decontaminate, load_pairs
from poolwise.decoder.base import base_identity, base_path, load_config
from poolwise.pooling import resolve_args
from poolwise.reading.batches import Plan, plan
from poolwise.running.preflight import check_base, data_notes
from poolwise.study import Design, Study, content_hash
from poolwise.tasks import Task, resolve_tasks

ROLES = ("design", "aa", "broken", "ladder", "untuned", "reference")
AA_SEEDS = 1000
"""The A/A arm is the baseline trained with these seeds more."""
NOT_IN_SPEC = {"base_model", "guide", "report_to", "save_steps"}
ADDED = {"accumulation": 1, "matryoshka": [], "guide_margin": 0.0}
"""Options of later versions, left out of a spec while unused: the trials of earlier versions keep their names."""
BROKEN = Design(name="broken", attention="causal", pooling="first_token")


@dataclass(frozen=True)
class Trial:
    """What is trained or scored. `role`: part of the comparison (`design`) or a control; `base`: on which base model,
    None for references with none of the study's."""

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
        label = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.label)
        return f"{label}-s{self.seed}-{self.id[:8]}"


@dataclass
class Prepared:
    """A study made ready: bases found, sizes resolved, pairs read, cleaned and planned, tasks resolved. `plans`: the
    order of training of each seed."""

    study: Study
    trials: list[Trial]
    tasks: list[Task]
    pairs: Pairs | None
    notes: list[str] = field(default_factory=list)
    plans: dict[int, Plan] = field(default_factory=dict)


def base_config(study: Study) -> tuple[str, Any]:
    """Path and configuration of the study's base model. Raises ModelError where it cannot be found."""
    path = base_path(study.recipe.base_model, study.base_dir)
    return path, load_config(study.recipe.base_model, path)


def milestones(study: Study) -> tuple[int, ...]:
    """The steps after which every design is scored."""
    return tuple(sorted({max(1, round(share * study.recipe.steps)) for share in study.evaluate_at}))


def prepare(study: Study) -> Prepared:
    """Everything that is shared by the trials of a study, and the list of trials."""
    study.load_code()
    bases = {name: base_config(study.on_base(name)) for name in study.bases}
    notes = [note for name in bases for note in check_base(study.on_base(name), *bases[name])]
    tasks = resolve_tasks(study.tasks, study.base_dir)
    pairs = load_pairs(study.recipe, study.base_dir)
    pairs = decontaminate(pairs, (text for task in tasks for text in task.texts()))
    plans: dict[int, Plan] = {}
    trials = [trial for name in bases for trial in _trials(study.on_base(name), *bases[name], pairs, plans)]
    trials += [Trial(name, "reference", 0, {"reference": name}) for name in study.references if name != "untuned"]
    notes += [note for path, _ in bases.values() for note in data_notes(pairs, study.recipe, path)]
    return Prepared(study, trials, tasks, pairs, list(dict.fromkeys(notes)), plans)


def _trials(study: Study, path: str, config: Any, pairs: Pairs, plans: dict[int, Plan]) -> list[Trial]:
    """The trials on one base model; `plans` keeps the order of each seed's data, the same for every base."""
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
