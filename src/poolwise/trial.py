"""A trial: one design × one seed, a pure function of its spec, named by the hash of that spec.

    FOLDER/spec.json                what the trial is
    FOLDER/training/                the trainer's checkpoints while it runs; the encoder at each milestone, for good
    FOLDER/train.json               losses, seconds; there only when the training is done
    FOLDER/scores/step-N/TASK.parquet  rows of the long table; one file a task, written whole
    FOLDER/done                     there only while nothing is missing
    FOLDER/failed.json              why it stopped, if it did

Everything is written atomically: whatever is there is whole, and a trial that is run again does only what is missing.
What was damaged since is found by its checksum: scores are made anew, weights are refused.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from sentence_transformers import SentenceTransformer

from poolwise import checkpoint, score_files
from poolwise.base import base_identity, base_path, load_config
from poolwise.batches import plan, training_dataset
from poolwise.data import Pairs, decontaminate, load_pairs
from poolwise.encoder import build
from poolwise.errors import PoolwiseError, TrainingError
from poolwise.evaluation import evaluate
from poolwise.pooling import resolve_args
from poolwise.preflight import check_base, data_notes
from poolwise.references import reference
from poolwise.study import Design, Recipe, Study, content_hash
from poolwise.tasks import Task, resolve_tasks
from poolwise.train import train

Progress = Callable[[str, float], None]
"""Called with the stage (`train`, `score`) and its done share, 0 to 1."""
ROLES = ("design", "aa", "broken", "untuned", "reference")
AA_SEEDS = 1000
"""The A/A arm is the baseline trained with these seeds more."""
NOT_IN_SPEC = {"base_model", "report_to", "save_steps"}
BROKEN = Design(name="broken", attention="causal", pooling="first_token")


@dataclass(frozen=True)
class Trial:
    """What is trained or scored. `role` says whether it is part of the comparison (`design`) or a control."""

    label: str
    role: str
    seed: int
    spec: dict[str, Any]
    design: Design | None = None
    steps: tuple[int, ...] = (0,)

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
    """A study made ready: base found, sizes resolved, pairs read, cleaned and planned, tasks resolved."""

    study: Study
    trials: list[Trial]
    tasks: list[Task]
    pairs: Pairs | None
    base: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def base_config(study: Study) -> tuple[str, Any]:
    """Path and configuration of the study's base model. Raises ModelError where it cannot be found."""
    path = base_path(study.recipe.base_model, study.base_dir)
    return path, load_config(study.recipe.base_model, path)


def milestones(study: Study) -> tuple[int, ...]:
    """The steps after which every design is scored."""
    return tuple(sorted({max(1, round(share * study.recipe.steps)) for share in study.evaluate_at}))


def prepare(study: Study) -> Prepared:
    """Everything that is shared by the trials of a study, and the list of trials."""
    path, config = base_config(study)
    notes = check_base(study, path, config)
    base = {"name": study.recipe.base_model, "identity": base_identity(path, getattr(config, "_commit_hash", None))}
    tasks = resolve_tasks(study.tasks, study.base_dir)
    pairs = load_pairs(study.recipe, study.base_dir)
    pairs = decontaminate(pairs, (text for task in tasks for text in task.texts()))
    trials = _trials(study, config, base, pairs)
    return Prepared(study, trials, tasks, pairs, base, notes + data_notes(pairs, study.recipe, path))


def _trials(study: Study, config: Any, base: dict[str, Any], pairs: Pairs) -> list[Trial]:
    recipe = study.recipe.model_dump(mode="json", exclude=NOT_IN_SPEC)
    orders: dict[int, str] = {}

    def spec(role: str, design: Design, seed: int) -> dict[str, Any]:
        arguments = resolve_args(design.pooling, design.pooling_args, config)
        content: dict[str, Any] = {
            "base": base["identity"],
            "recipe": recipe,
            "design": {"attention": design.attention, "pooling": design.pooling, "pooling_args": arguments},
            "seed": seed,
            "tuned": role != "untuned",
        }
        if role != "untuned":
            if seed not in orders:
                orders[seed] = plan(pairs, study.recipe, seed).fingerprint
            content["data"] = orders[seed]
        return content

    trials = []
    for seed in study.seeds:
        for design in study.designs:
            trials.append(Trial(design.name, "design", seed, spec("design", design, seed), design, milestones(study)))
        if study.controls:
            baseline, last = study.design(study.baseline), milestones(study)[-1:]
            other = seed + AA_SEEDS
            trials.append(Trial(f"{baseline.name}-aa", "aa", other, spec("aa", baseline, other), baseline, last))
            trials.append(Trial("broken", "broken", seed, spec("broken", BROKEN, seed), BROKEN, last))
    for name in study.references:
        if name == "untuned":
            first = study.seeds[0]
            trials += [
                Trial(f"{design.name}-untuned", "untuned", first, spec("untuned", design, first), design)
                for design in study.designs
            ]
        else:
            trials.append(Trial(name, "reference", 0, {"reference": name}))
    return trials


def run_trial(trial: Trial, prepared: Prepared, folder: Path, progress: Progress | None = None) -> None:
    """Train and score one trial, as far as that is not done yet.

    Raises TrainingError (also for a full disk), ModelError, TaskError or CheckpointError; the reason is also left in
    `failed.json`.
    """
    report = progress or (lambda stage, share: None)
    if _is_done(trial, prepared, folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for marker in ("done", "failed.json"):
            (folder / marker).unlink(missing_ok=True)
        _sweep(folder)
        checkpoint.write_json(folder / "spec.json", {"label": trial.label, "role": trial.role, **trial.spec})
        if trial.role == "reference":
            _score(reference(trial.label), trial, 0, prepared, folder, report)
        else:
            encoder = _encoder(trial, prepared)
            if _is_trained(trial):
                _train(encoder, trial, prepared, folder, report)
            for step in trial.steps:
                if _missing(step, prepared, folder):
                    if step:
                        weights = _milestone(folder, step)
                        checkpoint.verify_files(weights, checkpoint.read_run(weights))
                        checkpoint.load_weights(encoder, weights)
                    _score(encoder, trial, step, prepared, folder, report)
        (folder / "done").touch()
    except Exception as error:
        reason = _leave_reason(error, folder)
        if not isinstance(error, PoolwiseError) and _disk_is_full(error, folder):
            raise TrainingError(reason) from error
        raise


def _is_trained(trial: Trial) -> bool:
    return trial.role not in {"untuned", "reference"}


def _is_done(trial: Trial, prepared: Prepared, folder: Path) -> bool:
    return (
        (folder / "done").exists()
        and (not _is_trained(trial) or _training_is_done(trial, folder))
        and not any(_missing(step, prepared, folder) for step in trial.steps)
    )


def _training_is_done(trial: Trial, folder: Path) -> bool:
    return (folder / "train.json").exists() and all(_milestone(folder, step).is_dir() for step in trial.steps)


def _milestone(folder: Path, step: int) -> Path:
    return folder / "training" / f"step-{step}"


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in list(folder.rglob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _encoder(trial: Trial, prepared: Prepared) -> SentenceTransformer:
    encoder = build(prepared.study.recipe, cast(Design, trial.design), trial.seed, base_dir=prepared.study.base_dir)
    return encoder.eval()


def _train(encoder: SentenceTransformer, trial: Trial, prepared: Prepared, folder: Path, report: Progress) -> None:
    if not _training_is_done(trial, folder):
        _train_on(encoder, trial, prepared, folder, report)
    for path in (folder / "training").glob("checkpoint-*"):  # only now: half of one must never be resumed from
        shutil.rmtree(path)


def _train_on(encoder: SentenceTransformer, trial: Trial, prepared: Prepared, folder: Path, report: Progress) -> None:
    recipe: Recipe = prepared.study.recipe
    order = plan(cast(Pairs, prepared.pairs), recipe, trial.seed)
    if order.fingerprint != trial.spec["data"]:
        raise TrainingError("the training data changed while the study ran; restore it or start under another name")
    result = train(
        encoder,
        recipe,
        training_dataset(cast(Pairs, prepared.pairs), order),
        folder / "training",
        seed=trial.seed,
        milestones=trial.steps,
        progress=lambda step, loss: report("train", step / recipe.steps),
        stop_at_chance=trial.role == "design",
    )
    checkpoint.write_json(folder / "train.json", {**result, "order": order.fingerprint})


def score_file(folder: Path, step: int, task: Task) -> Path:
    """Where the scores of a task lie; the name changes with the task's content."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in task.name)
    return folder / "scores" / f"step-{step}" / f"{safe}-{content_hash(task.identity, 8)}.parquet"


def _missing(step: int, prepared: Prepared, folder: Path) -> list[Task]:
    return [task for task in prepared.tasks if score_files.read(score_file(folder, step, task)) is None]


def _score(model: Any, trial: Trial, step: int, prepared: Prepared, folder: Path, report: Progress) -> None:
    missing = _missing(step, prepared, folder)
    for done, task in enumerate(missing):
        report("score", done / len(missing))
        rows = evaluate(model, [task], identity=f"{trial.id}-{step}", prompts=_prompts(trial, prepared))
        mine = {"design": trial.label, "role": trial.role, "seed": trial.seed, "step": step, "trial": trial.id}
        score_files.write(score_file(folder, step, task), [{**row, **mine} for row in rows])


def _prompts(trial: Trial, prepared: Prepared) -> dict[str, str] | None:
    if trial.role == "reference":
        return None  # the model's own
    recipe = prepared.study.recipe
    return {"query": recipe.query_prompt, "document": recipe.document_prompt, **recipe.prompts}


def _leave_reason(error: Exception, folder: Path) -> str:
    """Why a trial stopped; also in `failed.json`, as far as the disk allows."""
    if isinstance(error, PoolwiseError):
        reason = str(error)
    elif _disk_is_full(error, folder):
        reason = f"the disk is full ({folder}); free some space and run the study again"
    else:
        reason = f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        checkpoint.write_json(folder / "failed.json", {"reason": reason})
    return reason


def _disk_is_full(error: Exception, folder: Path) -> bool:
    """Also where a library hides it: torch says only that a write failed."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return True
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free < 1 << 20
