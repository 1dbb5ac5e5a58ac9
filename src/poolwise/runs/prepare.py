"""A study made ready: what its trials share, their list, and what is found out before the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.data.batches import Plan, plan
from poolwise.data.pairs import COUNTS, Pairs, decontaminate, load_pairs, random_stream
from poolwise.data.tasks import Task, resolve_tasks
from poolwise.errors import AttentionError, ModelError, StudyError
from poolwise.files import safe_name
from poolwise.model.attention import check_window, set_attention, verify
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
from poolwise.pooling.cost import base_parameters
from poolwise.pooling.poolings import resolve_args
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study, content_hash

if TYPE_CHECKING:
    from poolwise.data.tasks import Task
    from poolwise.study.design import Design


LARGEST = 1_000_000_000
"""Parameters up to which a base model in a folder is loaded (fp32, CPU) to be probed beforehand."""
SAMPLED_ROWS = 1000


def check_base(study: Study, path: str, config: Any) -> list[str]:
    """Refuse a base model that cannot carry the study; says what could not be tried yet.

    Raises ModelError where `max_length` exceeds the positions or a width of `matryoshka` the model's, AttentionError
    where a design's attention is ignored.
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
        return [f"Whether {recipe.base_model} takes the attention modes is probed when a trial loads it."]
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
    return [f"Training batches are {layout}, not packed, which costs time: {reason}."] if reason else []


def _names(designs: Sequence[Design], mode: str) -> str:
    names = [design.name for design in designs if design.attention == mode]
    return f"the design{'s' * (len(names) > 1)} {', '.join(names)}"


def data_notes(pairs: Pairs, recipe: Recipe, path: str) -> list[str]:
    """What was counted, changed or dropped in the training data, and what the base model will not see of it."""
    report = pairs.report
    sources = ", ".join(f"{name} {rows:,}" for name, rows in report["rows_by_source"].items())
    notes = [f"{report['rows']:,} training rows ({sources})"]
    notes += [f"{report[name]:,} {words}" for name, words in COUNTS.items() if report[name]]
    if report["evaluation_texts"]:
        notes.append(
            f"{report['decontaminated_rows']:,} training rows removed, as they hold one of the "
            f"{report['evaluation_texts']:,} evaluation texts"
        )
    cut, texts = cut_texts(pairs, recipe, path)
    if cut:
        notes.append(
            f"{cut:,} of {texts:,} sampled training texts are longer than recipe.max_length = {recipe.max_length} "
            "tokens and are cut"
        )
    return notes


def cut_texts(pairs: Pairs, recipe: Recipe, path: str) -> tuple[int, int]:
    """How many texts of at most `SAMPLED_ROWS` training rows exceed `max_length` tokens, of how many."""
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
        return f"{safe_name(self.label)}-s{self.seed}-{self.id[:8]}"


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


def check_tuning(study: Study) -> list[Task]:
    """The development tasks. Raises StudyError for one that is a task of the study under another name."""
    assert study.tuning is not None
    reported = {task.identity: task.name for task in resolve_tasks(study.tasks, study.base_dir)}
    names = set(reported.values())
    development = resolve_tasks(study.tuning.tasks, study.base_dir)
    if both := [task.name for task in development if task.identity in reported or task.name in names]:
        raise StudyError(
            [f"tuning.tasks: {', '.join(both)} would be reported too; tune on tasks that are not among tasks"]
        )
    return development
