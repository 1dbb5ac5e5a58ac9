"""A trial: one design × one seed, a pure function of its spec, named by the hash of that spec.

Its folder is described in `runs.layout`. A trial that is run again does only what is missing. Files that were damaged
since are found by their checksums: damaged scores are computed again, damaged weights are refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from sentence_transformers import SentenceTransformer

from poolwise.data.batches import training_dataset
from poolwise.data.pairs import Pairs
from poolwise.data.tasks import Task
from poolwise.encoding.fast import KEPT_BYTES, Counts, FastEncoder
from poolwise.errors import PoolwiseError, TrainingError
from poolwise.files import write_json
from poolwise.model import checkpoint
from poolwise.model.backbone import Backbone, FrozenStates
from poolwise.model.base import base_path, torch_dtype
from poolwise.model.encoder import build
from poolwise.model.packing import has_dropout, reads_padding
from poolwise.runs import layout
from poolwise.runs.prepare import Prepared, Trial
from poolwise.runs.train import train
from poolwise.scoring import references
from poolwise.scoring.evaluate import evaluate
from poolwise.scoring.layers import attends_to_layers, layer_attention, sample_texts
from poolwise.scoring.references import reference
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import content_hash
from poolwise.verdicts.controls import RUNGS

Progress = Callable[[str, float], None]
"""Called with the stage (`train`, `score`) and its done share, 0 to 1."""
STALE = 6 * 3600
"""Seconds after which a file that nobody has finished writing is left over from a killed run."""


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
        for marker in (layout.DONE, layout.FAILED):
            (folder / marker).unlink(missing_ok=True)
        _sweep(folder)
        write_json(folder / layout.SPEC, {"label": trial.label, "role": trial.role, **trial.spec})
        if trial.role == "reference":
            _score(reference(trial.label), trial, 0, prepared, folder, report)
        else:
            work = Counts()
            encoder = _encoder(trial, prepared)
            _keep_dtype(encoder, trial, folder)
            _freeze(encoder, trial, folder)
            if _is_trained(trial):
                _train(encoder, trial, prepared, folder, report)
            for step in trial.steps:
                if _missing(trial, step, prepared, folder):
                    if step:
                        weights = layout.milestone(folder, step)
                        checkpoint.verify_files(weights, checkpoint.read_run(weights))
                        checkpoint.load_weights(encoder, weights)
                    if trial.role == "design" and step == trial.steps[-1]:
                        _look_at_layers(encoder, prepared, folder)
                    work += _score(encoder, trial, step, prepared, folder, report)
            write_json(folder / layout.WORK, {**asdict(work), **_leave_states(encoder)})
        (folder / layout.DONE).touch()
    except Exception as error:
        reason = _leave_reason(error, folder)
        if not isinstance(error, PoolwiseError) and _disk_is_full(error, folder):
            raise TrainingError(reason) from error
        raise


def _look_at_layers(encoder: SentenceTransformer, prepared: Prepared, folder: Path) -> None:
    """Record which layers the head attends to, on the first texts of each task; nothing for other heads."""
    if not attends_to_layers(encoder) or not prepared.tasks:
        return
    texts = sample_texts(prepared.tasks)
    write_json(folder / layout.LAYERS, {"texts": len(texts), "attention": layer_attention(encoder, texts).tolist()})


def _is_trained(trial: Trial) -> bool:
    return trial.role not in {"untuned", "reference"}


def _is_done(trial: Trial, prepared: Prepared, folder: Path) -> bool:
    return (
        (folder / layout.DONE).exists()
        and (not _is_trained(trial) or _training_is_done(trial, folder))
        and not any(_missing(trial, step, prepared, folder) for step in trial.steps)
    )


def _training_is_done(trial: Trial, folder: Path) -> bool:
    return (folder / layout.TRAINED).exists() and all(layout.milestone(folder, step).is_dir() for step in trial.steps)


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written; of what other trials may be writing now, only what is hours old."""
    for path in list(folder.rglob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in layout.unfinished_frozen(layout.study_of(folder)):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def _encoder(trial: Trial, prepared: Prepared) -> SentenceTransformer:
    recipe = prepared.study.on_base(cast(str, trial.base)).recipe
    encoder = build(recipe, cast(Design, trial.design), trial.seed, base_dir=prepared.study.base_dir)
    return encoder.eval()


def _keep_dtype(encoder: SentenceTransformer, trial: Trial, folder: Path) -> None:
    """Record the dtype in which the base computes. With `dtype = "auto"` that is the machine's, so raise TrainingError
    where a trial on this base, of which anything is kept, has another: the comparison would be one of dtypes.

    Of two machines that begin at the same moment neither sees the other; the next trial of either does.
    """
    recipe = trial.spec["recipe"]
    dtype = cast(Backbone, encoder[0]).model.dtype
    if recipe["lora"] == "full":  # float32 weights, for whatever it computes in
        dtype = torch_dtype(recipe["dtype"])
    mine = {"base": trial.spec["base"], "dtype": str(dtype).removeprefix("torch.")}
    for path in layout.in_trials(layout.study_of(folder), layout.DTYPE) if recipe["dtype"] == "auto" else ():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            other = theirs["dtype"] if theirs["base"] == mine["base"] else mine["dtype"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if other != mine["dtype"] and layout.has_results(path.parent):
            raise TrainingError(
                f"recipe.dtype = 'auto' is {mine['dtype']} on this machine, but the trial {path.parent.name} was made "
                f"in {other}, and the two cannot be compared; run this on the same kind of machine, or delete that "
                f"trial, or start anew under another name or output with recipe.dtype = '{other}' or '{mine['dtype']}'"
            )
    write_json(folder / layout.DTYPE, mine)


def _freeze(encoder: SentenceTransformer, trial: Trial, folder: Path) -> None:
    """Where nothing of the base is tuned, keep its states, in a folder that all trials of the study share; those of
    real tokens alone, so not for a head that reads padding."""
    backbone = cast(Backbone, encoder[0])
    tuned = trial.spec["recipe"]["lora"] is not False
    if tuned or has_dropout(backbone.model) or reads_padding(cast(Design, trial.design)):
        return
    dtype = str(backbone.model.dtype)
    kind = [trial.spec["base"], trial.spec["recipe"], dtype, backbone.attention, backbone.collect]
    backbone.frozen = FrozenStates(layout.frozen(layout.study_of(folder), content_hash(kind)))


def _leave_states(encoder: SentenceTransformer) -> dict[str, int]:
    """Write the states of a frozen base for the trials to come; how many texts were asked for and how many computed."""
    frozen = cast(Backbone, encoder[0]).frozen
    if frozen is None:
        return {}
    frozen.leave()
    return {"frozen_asked": frozen.asked, "frozen_computed": frozen.computed}


def _train(encoder: SentenceTransformer, trial: Trial, prepared: Prepared, folder: Path, report: Progress) -> None:
    if not _training_is_done(trial, folder):
        _train_on(encoder, trial, prepared, folder, report)
    # Only once training is recorded as finished: half of a checkpoint must never be resumed from.
    for path in layout.checkpoints(layout.training(folder)).values():
        shutil.rmtree(path)


def _train_on(encoder: SentenceTransformer, trial: Trial, prepared: Prepared, folder: Path, report: Progress) -> None:
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
        progress=lambda step, loss: report("train", step / recipe.steps),
        stop_at_chance=trial.role == "design",
        designs=prepared.study.designs,
    )
    write_json(folder / layout.TRAINED, {**result, "order": order.fingerprint})


def _missing(trial: Trial, step: int, prepared: Prepared, folder: Path) -> list[Task]:
    scored = [layout.scored_at(step), *(RUNGS if _has_ladder(trial, step, prepared) else ())]
    return [task for task in prepared.tasks if any(_unread(folder, name, task) for name in scored)]


def _unread(folder: Path, scored: str, task: Task) -> bool:
    return layout.read_scores(layout.score_file(folder, scored, task)) is None


def _has_ladder(trial: Trial, step: int, prepared: Prepared) -> bool:
    """The baseline's last step carries the dilution ladder."""
    study = prepared.study
    return study.controls and trial.role == "design" and trial.label == study.baseline and step == trial.steps[-1]


def _score(model: Any, trial: Trial, step: int, prepared: Prepared, folder: Path, report: Progress) -> Counts:
    missing = _missing(trial, step, prepared, folder)
    if isinstance(model, SentenceTransformer):
        model = FastEncoder(model, keep=KEPT_BYTES, compiled=False)  # in a forked process: no compiler of its own
    shares = _shares(model, trial, prepared, folder) if missing and _has_ladder(trial, step, prepared) else {}
    identity, prompts = f"{trial.id}-{step}", _prompts(trial, prepared)
    mine = {"design": trial.label, "role": trial.role, "seed": trial.seed, "step": step, "trial": trial.id}
    mine["base"] = trial.base

    def write(name: str, task: Task, rows: list[dict[str, Any]], **other: Any) -> None:
        layout.write_scores(layout.score_file(folder, name, task), [{**row, **mine, **other} for row in rows])

    for done, task in enumerate(missing):
        report("score", done / len(missing))
        scored = references.Kept(model) if shares else model
        if _unread(folder, layout.scored_at(step), task):
            write(layout.scored_at(step), task, evaluate(scored, [task], identity=identity, prompts=prompts))
        for rung, share in shares.items():
            if not _unread(folder, rung, task):
                continue
            rows = []  # where no noise loses as much, or the embeddings were too many to keep
            if share is not None and scored.whole:
                diluted = references.Diluted(scored, share, trial.seed)
                rows = evaluate(diluted, [task], identity=f"{identity}-{rung}", prompts=prompts)
            write(rung, task, rows, design=rung, role="ladder", noise=share)
    return model.counts if isinstance(model, FastEncoder) else Counts()


def _shares(model: Any, trial: Trial, prepared: Prepared, folder: Path) -> dict[str, float | None]:
    """How much noise each rung of the ladder takes; found once."""
    path, pairs, recipe = folder / layout.LADDER, cast(Pairs, prepared.pairs), prepared.study.recipe
    if not path.exists():
        found = references.calibrate(model, recipe, pairs, prepared.plans[trial.seed], trial.seed)
        write_json(path, found)
    shares: dict[str, float | None] = json.loads(path.read_text(encoding="utf-8"))["shares"]
    return shares


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
        write_json(folder / layout.FAILED, {"reason": reason})
    return reason


def _disk_is_full(error: Exception, folder: Path) -> bool:
    """Also where a library hides it: torch says only that a write failed."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return True
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free < 1 << 20
