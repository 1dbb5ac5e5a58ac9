"""A trial: one design × one seed, a pure function of its spec, named by the hash of that spec.

Its folder is described in `runs.layout`. A trial that is run again does only what is missing. Files that were damaged
since are found by their checksums and named in a warning; what was in them is computed again.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer

from poolwise.data.batches import training_dataset
from poolwise.data.pairs import Pairs
from poolwise.data.tasks import Task
from poolwise.encoding.fast import KEPT_BYTES, Counts, FastEncoder, reads_padding
from poolwise.errors import PoolwiseError, TrainingError, printable, redact
from poolwise.files import write_json
from poolwise.model import checkpoint
from poolwise.model.backbone import Backbone, FrozenStates
from poolwise.model.base import base_path, torch_dtype
from poolwise.model.encoder import build, evaluation_prompts
from poolwise.model.packing import has_dropout
from poolwise.runs import layout
from poolwise.runs.prepare import Prepared, Trial
from poolwise.runs.train import LOGGER, milestone_damage, train
from poolwise.scoring import references
from poolwise.scoring.adapters import PublishedBatches
from poolwise.scoring.evaluate import evaluate
from poolwise.scoring.layers import attends_to_layers, layer_attention, sample_texts
from poolwise.scoring.references import reference
from poolwise.study import records
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import content_hash
from poolwise.verdicts.controls import RUNGS

Progress = Callable[[str, float, dict[str, Any]], None]
"""Called with the stage (`train`, `score`), the share of it that is done, 0 to 1, and details: `step`, `steps`, `loss`
and `seconds_left` (of the training; None while unknown), or `task`."""
STALE_SECONDS = 6 * 3600
"""Age from which an unfinished file of frozen states is taken for a killed run's, and not for another trial's."""
SMALLEST_FREE = 1 << 20
"""Free bytes on a disk below which it counts as full."""


def run_trial(trial: Trial, prepared: Prepared, folder: Path, progress: Progress | None = None) -> None:
    """Train and score one trial, as far as that is not done yet.

    Raises TrainingError (also for a full disk), ModelError, TaskError or CheckpointError; the reason is also written to
    `failed.json`.
    """
    report = progress or (lambda stage, share, details: None)
    trained = not is_trained(trial) or _training_is_done(trial, folder)
    if trained and _is_done(trial, prepared, folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for marker in (layout.DONE, layout.FAILED):
            (folder / marker).unlink(missing_ok=True)
        _sweep(folder)
        write_json(folder / layout.SPEC, {"label": trial.label, "role": trial.role, **trial.spec})
        if trial.role == "reference":
            _score(reference(trial.label), trial, 0, prepared, folder, report)
        else:
            _run_design(trial, prepared, folder, report, trained)
        (folder / layout.DONE).touch()
    except Exception as error:
        reason = reason_of(error, folder)
        with contextlib.suppress(OSError):  # a full disk may not take this file either
            write_json(folder / layout.FAILED, {"reason": reason})
        if not isinstance(error, PoolwiseError) and _disk_is_full(error, folder):
            raise TrainingError(reason) from error
        raise


def _run_design(trial: Trial, prepared: Prepared, folder: Path, report: Progress, trained: bool) -> None:
    """Build, train (unless that is done) and score an encoder at each of the trial's steps; record what that took."""
    work = Counts()
    encoder = _encoder(trial, prepared)
    _record_dtype(encoder, trial, folder)
    _freeze(encoder, trial, folder)
    if not trained:
        _train(encoder, trial, prepared, folder, report)
    # Only once training is recorded as finished: until then a killed run continues from them.
    for path in layout.checkpoints(layout.training(folder)).values():
        shutil.rmtree(path)
    encoder.max_seq_length = prepared.study.recipe.scored_length
    for step in trial.steps:
        look = trial.role == "design" and step == trial.steps[-1]
        scored = not _missing(trial, step, prepared, folder)
        if scored and not (look and _is_damaged(folder / layout.LAYERS)):
            continue
        if step:
            weights = layout.milestone(folder, step)
            checkpoint.load_weights(encoder, weights)
        if look:
            _look_at_layers(encoder, prepared, folder)
        work += _score(encoder, trial, step, prepared, folder, report)
    facts = {**asdict(work), **_share_states(encoder)}
    if encoder.device.type == "cuda":
        facts["peak_memory"] = torch.cuda.max_memory_allocated(encoder.device)
    write_json(folder / layout.WORK, facts)


def _look_at_layers(encoder: SentenceTransformer, prepared: Prepared, folder: Path) -> None:
    """Record which layers the head attends to, on the first texts of each task; nothing for other heads."""
    if not attends_to_layers(encoder) or not prepared.tasks:
        return
    texts = sample_texts(prepared.tasks)
    write_json(folder / layout.LAYERS, {"texts": len(texts), "attention": layer_attention(encoder, texts).tolist()})


def is_trained(trial: Trial) -> bool:
    """Whether a trial trains anything: all but untuned designs and references."""
    return trial.role not in {"untuned", "reference"}


def _is_done(trial: Trial, prepared: Prepared, folder: Path) -> bool:
    if not (folder / layout.DONE).exists() or _is_damaged(folder / layout.LAYERS):
        return False
    return not any(_missing(trial, step, prepared, folder) for step in trial.steps)


def _is_damaged(path: Path) -> bool:
    """Whether there is a record of attention over layers that is not what was written."""
    return path.exists() and records.find(path, records.LayerShares) is None


def _training_is_done(trial: Trial, folder: Path) -> bool:
    """Whether training is recorded as finished and every milestone is whole; warns of one that is not."""
    path = folder / layout.TRAINED
    if not path.exists():
        return False
    if records.find(path, records.Trained) is None:
        LOGGER.warning(f"{path} is damaged; the trial is trained again")
        return False
    damaged = [found for step in trial.steps if (found := milestone_damage(layout.milestone(folder, step)))]
    for line in damaged:
        LOGGER.warning(f"{line.partition('; ')[0]}; the trial is trained again")
    return not damaged


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written in the trial's folder, and old leftovers of shared frozen states."""
    for path in list(folder.rglob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in layout.unfinished_frozen(layout.study_of(folder)):
        with contextlib.suppress(FileNotFoundError):  # another trial sweeps, too
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _encoder(trial: Trial, prepared: Prepared) -> SentenceTransformer:
    recipe = prepared.study.on_base(cast(str, trial.base)).recipe
    encoder = build(recipe, cast(Design, trial.design), trial.seed, base_dir=prepared.study.base_dir)
    return encoder.eval()


def _record_dtype(encoder: SentenceTransformer, trial: Trial, folder: Path) -> None:
    """Record the dtype and the device in which the base computes.

    With `dtype = "auto"` the dtype is the machine's, so raise TrainingError if results of a trial on the same base were
    computed in another one: the study would compare dtypes, not designs. Two machines that begin at the same moment do
    not see each other; the next trial of either does.
    """
    recipe = trial.spec["recipe"]
    dtype = cast(Backbone, encoder[0]).model.dtype
    if recipe["lora"] == "full":  # its weights are float32, whatever it computes in
        dtype = torch_dtype(recipe["dtype"])
    mine = {"base": trial.spec["base"], "dtype": str(dtype).removeprefix("torch."), "device": device_name(encoder)}
    for path in layout.in_trials(layout.study_of(folder), layout.DTYPE) if recipe["dtype"] == "auto" else ():
        theirs = records.find(path, records.Computed)
        other = theirs.dtype if theirs and theirs.base == mine["base"] else mine["dtype"]
        if other != mine["dtype"] and layout.has_results(path.parent):
            raise TrainingError(
                f"recipe.dtype = 'auto' is {mine['dtype']} on this machine, but the trial {path.parent.name} was "
                f"computed in {other}, and the two cannot be compared; run this on the same kind of machine, or delete "
                "that trial, or start over under another name or output with recipe.dtype = "
                f"'{other}' or '{mine['dtype']}'"
            )
    write_json(folder / layout.DTYPE, mine)


def device_name(encoder: SentenceTransformer) -> str:
    """The GPU's product name, or torch's word for any other device."""
    device = encoder.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _freeze(encoder: SentenceTransformer, trial: Trial, folder: Path) -> None:
    """If nothing of the base is tuned, keep its hidden states in a folder that the study's trials share.

    A base with dropout does without, because its states differ from call to call. The key holds
    everything that a state depends on apart from the text itself.
    """
    backbone = cast(Backbone, encoder[0])
    tuned = trial.spec["recipe"]["lora"] is not False
    if tuned or has_dropout(backbone.model):
        return
    key = [trial.spec["base"], trial.spec["recipe"], str(backbone.model.dtype), backbone.attention, backbone.collect]
    backbone.frozen = FrozenStates(layout.frozen(layout.study_of(folder), content_hash(key)))


def _share_states(encoder: SentenceTransformer) -> dict[str, int]:
    """Write the states of a frozen base for later trials. Returns how many were asked for and how many computed."""
    frozen = cast(Backbone, encoder[0]).frozen
    if frozen is None:
        return {}
    frozen.share()
    return {"frozen_asked": frozen.asked, "frozen_computed": frozen.computed}


def _train(encoder: SentenceTransformer, trial: Trial, prepared: Prepared, folder: Path, report: Progress) -> None:
    (folder / layout.TRAINED).unlink(missing_ok=True)  # training ended once, and part of it was damaged or lost since
    recipe: Recipe = prepared.study.recipe
    order = prepared.plans[trial.seed]
    if recipe.guide:
        guide = base_path(recipe.guide, prepared.study.base_dir, "recipe.guide")
        recipe = recipe.model_copy(update={"guide": guide})
    result = train(
        encoder,
        recipe,
        training_dataset(cast(Pairs, prepared.pairs), order),
        layout.training(folder),
        seed=trial.seed,
        milestones=trial.steps,
        progress=lambda step, loss, left: report(
            "train", step / recipe.steps, {"step": step, "steps": recipe.steps, "loss": loss, "seconds_left": left}
        ),
        stop_at_chance=trial.role == "design",  # a control arm is allowed to learn nothing
        designs=prepared.study.designs,
    )
    write_json(folder / layout.TRAINED, {**result, "order": order.fingerprint})


def _missing(trial: Trial, step: int, prepared: Prepared, folder: Path) -> list[Task]:
    scored = [layout.scored_at(step), *(RUNGS if _has_ladder(trial, step, prepared) else ())]
    return [task for task in prepared.tasks if any(_unread(folder, name, task) for name in scored)]


def _unread(folder: Path, scored: str, task: Task) -> bool:
    return layout.read_scores(layout.score_file(folder, scored, task)) is None


def _has_ladder(trial: Trial, step: int, prepared: Prepared) -> bool:
    """Whether this is the baseline's last step, which carries the dilution ladder."""
    study = prepared.study
    return study.controls and trial.role == "design" and trial.label == study.baseline and step == trial.steps[-1]


def _score(model: Any, trial: Trial, step: int, prepared: Prepared, folder: Path, report: Progress) -> Counts:
    """Score a model on the tasks whose files are missing, and on the rungs of the ladder if this step carries it."""
    missing = _missing(trial, step, prepared, folder)
    published = False
    if isinstance(model, SentenceTransformer):
        recipe = prepared.study.recipe
        published = recipe.evaluation_padding == "published" and reads_padding(model)
        # Never compiled: that depends on the time left, and scores must not.
        model = FastEncoder(model, keep=KEPT_BYTES, compiled=False)
    shares = _shares(model, trial, prepared, folder) if missing and _has_ladder(trial, step, prepared) else {}
    identity, prompts = f"{trial.id}-{step}", _prompts(trial, prepared)
    mine = {"design": trial.label, "role": trial.role, "seed": trial.seed, "step": step, "trial": trial.id}
    mine["base"] = trial.base

    def write(name: str, task: Task, rows: list[dict[str, Any]], **other: Any) -> None:
        path = layout.score_file(folder, name, task)
        if path.exists():  # it could not be read
            LOGGER.warning(f"{path} is damaged; its task is scored again")
        layout.write_scores(path, [{**row, **mine, **other} for row in rows])

    for done, task in enumerate(missing):
        report("score", done / len(missing), {"task": task.name})
        scored = model
        if published:
            scored = PublishedBatches(model, task.task_type)
        if shares:
            scored = references.Kept(scored)
        if _unread(folder, layout.scored_at(step), task):
            write(layout.scored_at(step), task, evaluate(scored, [task], identity=identity, prompts=prompts))
        for rung, share in shares.items():
            if not _unread(folder, rung, task):
                continue
            rows = []  # stays empty if no noise loses as much, or if there were too many embeddings to keep
            if share is not None and scored.whole:
                diluted = references.Diluted(scored, share, trial.seed)
                rows = evaluate(diluted, [task], identity=f"{identity}-{rung}", prompts=prompts)
            write(rung, task, rows, design=rung, role="ladder", noise=share)
    return model.counts if isinstance(model, FastEncoder) else Counts()


def _shares(model: Any, trial: Trial, prepared: Prepared, folder: Path) -> dict[str, float | None]:
    """How much noise each rung of the ladder takes; calibrated once per trial."""
    path, pairs, recipe = folder / layout.LADDER, cast(Pairs, prepared.pairs), prepared.study.recipe
    stored = records.find(path, records.Ladder)
    if stored is None:
        if path.exists():
            LOGGER.warning(f"{path} is damaged; the noise of the ladder is calibrated again")
        found = references.calibrate(model, recipe, pairs, prepared.plans[trial.seed], trial.seed)
        write_json(path, found)
        stored = records.read(path, records.Ladder, "run the study again")
    return dict(stored.shares)


def _prompts(trial: Trial, prepared: Prepared) -> dict[str, str] | None:
    if trial.role == "reference":
        return None  # the model's own
    return evaluation_prompts(prepared.study.recipe)


def reason_of(error: Exception, folder: Path) -> str:
    """Why a trial stopped, in words, with what to do about it where that is known; safe to show and without secrets."""
    return redact(printable(_reason(error, folder), keep="\n"))


def _reason(error: Exception, folder: Path) -> str:
    if ended_by_memory(error):
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return (
            f"the GPU's memory is too small ({said}); set recipe.mini_batch_size, a smaller recipe.batch_size or "
            "recipe.gradient_checkpointing = true, or run one trial at a time on each GPU (--per-gpu 1)"
        )
    if isinstance(error, PoolwiseError):
        return str(error)
    if _disk_is_full(error, folder):
        return f"the disk is full ({folder}); free some space and run the study again"
    return f"{type(error).__name__}: {error}"


def ended_by_memory(error: BaseException) -> bool:
    """Whether a GPU ran out of memory; also if a library wrapped the error in one of its own."""
    return any(
        isinstance(cause, torch.OutOfMemoryError) or "CUDA out of memory" in str(cause) or "ALLOC_FAILED" in str(cause)
        for cause in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it: libraries and the scoring of tasks wrap what they catch."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_is_full(error: Exception, folder: Path) -> bool:
    """Whether a write failed for lack of space; torch says only that it failed, so the disk is asked, too."""
    if any(getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in str(cause) for cause in causes(error)):
        return True
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free < SMALLEST_FREE
