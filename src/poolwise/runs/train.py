"""One trainer for every design: sentence-transformers' trainer and losses over the planned batches.

What this file adds: the order of the rows (planned beforehand, so that it is the same for every design), the content of
a checkpoint (adapter and pooling, no copy of the base), and the rules that stop a trial which cannot be trusted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from poolwise.errors import CheckpointError, TrainingError
from poolwise.files import flush_folder, hashes, write_json
from poolwise.model import checkpoint
from poolwise.model.backbone import Backbone
from poolwise.model.base import torch_dtype
from poolwise.model.encoder import derived_seed
from poolwise.model.lora import fast_training
from poolwise.model.packing import choose, joined
from poolwise.pooling.heads import Norm
from poolwise.runs import layout
from poolwise.study import records
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe

COMPLETE = "complete"
"""Marker that is written into a checkpoint after everything else: without it, the checkpoint is never resumed from. It
holds the seconds of training up to there and the hash of every file; see `study.records.Complete`."""
LOGGER = logging.getLogger("poolwise")
"""Warnings of a trial. A worker sends them to the process that runs the study (`runs.worker`)."""
CHANCE_WINDOW = 200
"""Steps whose mean loss is compared with that of guessing."""
CHANCE_SHARE = 0.01
"""Relative distance from it within which a loss counts as guessing."""
Progress = Callable[[int, float, float | None], None]
"""Called after each step with its number, its loss, and the seconds that are left (None while that is unknown)."""
DIRECTIONS = {"infonce": ("query_to_doc",), "symmetric_infonce": ("query_to_doc", "doc_to_query")}


def train(
    encoder: SentenceTransformer,
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    *,
    seed: int,
    milestones: Sequence[int] = (),
    progress: Progress | None = None,
    stop_at_chance: bool = True,
    designs: Sequence[Design] = (),
) -> dict[str, Any]:
    """Train `encoder` in place on `dataset`, whose rows are in the order of use (`data.batches.training_dataset`).

    Checkpoints go to `folder`; a run that was killed continues from the last complete one, to the same weights. At each
    step of `milestones` the encoder is also saved to `folder/step-N`. designs: those it is compared with; all of them
    are trained in one layout of the batches (`model.packing`): packed, unless one of them cannot be.

    Returns the losses by step, the seconds of the steps that count (also those before a kill, up to the checkpoint),
    the world size, the layout, why it is not packed (None if it is), and what `fast_training` used.

    Raises TrainingError for a loss that is not finite or that stays at chance level, and for a batch that cannot be
    split over the processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.part_size % world:
        raise TrainingError(f"recipe.batch_size = {recipe.batch_size} cannot be split over {world} processes")
    folder.mkdir(parents=True, exist_ok=True)
    watch = _Watch(encoder, recipe, folder, set(milestones), progress, stop_at_chance)
    head_patterns = {r"^model\.1\.": recipe.head_learning_rate} if list(encoder[1].parameters()) else {}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.part_size // world,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        learning_rate_mapping=head_patterns,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=min(recipe.warmup_steps, recipe.steps),
        weight_decay=recipe.weight_decay,
        bf16=recipe.lora == "full" and torch_dtype(recipe.dtype) == torch.bfloat16,
        seed=derived_seed(recipe, "dropout", seed),
        prompts=_prompts(recipe, dataset.column_names),
        batch_sampler=_in_order,  # type: ignore[arg-type]
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(recipe.report_to) or "none",
        run_name=folder.parent.name,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=encoder.device.type == "cpu",  # otherwise two processes on CPUs would train without each other
    )
    if arguments.world_size != world:
        raise TrainingError(f"WORLD_SIZE is {world}, but the trainer found {arguments.world_size}; start with torchrun")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with several in sight the trainer would multiply the batch by them
    backbone = cast(Backbone, encoder[0])
    own = Design.model_validate(cast(Any, encoder.poolwise)["design"])
    layout, reason = choose(backbone.model, [own, *designs], recipe.max_length)
    resume = latest_checkpoint(folder, milestones)
    watch.started = time.perf_counter()
    if resume is not None:
        watch.losses = _logged(resume)
        watch.recent.extend(watch.losses.values())
        watch.started -= records.read(resume / COMPLETE, records.Complete, "run the study again").seconds
    with backbone.in_layout(layout), fast_training(backbone, recipe) as kernels:
        trainer = _Trainer(
            model=encoder,
            args=arguments,
            train_dataset=dataset,
            loss=_loss(encoder, recipe, gather=world > 1),
            callbacks=[watch],
        )
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    encoder.eval()
    return {
        "layout": layout,
        "layout_reason": reason,
        "kernels": kernels,
        "losses": watch.losses,
        "seconds": watch.seconds(),
        "world_size": world,
        "resumed_from": int(resume.name.split("-")[1]) if resume else 0,
    }


def latest_checkpoint(folder: Path, milestones: Sequence[int] = ()) -> Path | None:
    """The last checkpoint that is whole, and so are the `milestones` up to it; those after it are removed.

    A checkpoint that was not written to its end is removed in silence, a damaged one with a warning.
    """
    whole = {}
    for step, path in sorted(layout.checkpoints(folder).items()):
        damage = _damage(path) if (path / COMPLETE).exists() else ""
        if damage:
            LOGGER.warning(f"{damage}; the training continues from an earlier checkpoint or starts again")
        if damage or not (path / COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            whole[step] = path
    last = max(whole, default=0)
    for step in sorted(step for step in milestones if step <= last):
        damage = milestone_damage(layout.at_step(folder, step))
        if damage:
            # the optimiser's state is kept in checkpoints only, so the weights of this step have to be trained again
            LOGGER.warning(f"{damage}; the training continues from before step {step}")
            for path in [layout.at_step(folder, step), *(path for at, path in whole.items() if at >= step)]:
                shutil.rmtree(path, ignore_errors=True)
            whole = {at: path for at, path in whole.items() if at < step}
            break
    return whole[max(whole)] if whole else None


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint that has its marker; empty if nothing is."""
    try:
        marker = records.read(folder / COMPLETE, records.Complete, "it is removed")
        checkpoint.verify_files(folder, marker.files)
    except CheckpointError as error:
        return str(error)
    return ""


def milestone_damage(folder: Path) -> str:
    """What is wrong with the encoder saved at a milestone; empty if nothing is."""
    try:
        checkpoint.verify_files(folder, checkpoint.read_run(folder)["files"])
    except CheckpointError as error:
        return str(error)
    return ""


class _Trainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer; its checkpoints hold what is tuned, not the base."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return  # transformers asks every process, and two must not write one file
        target = Path(output_dir or str(self.args.output_dir))
        target.mkdir(parents=True, exist_ok=True)
        checkpoint.save_weights(self.model, target)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weights that decay: not those of a head's norms, as transformers leaves out the norms it knows."""
        norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Norm)}
        return [name for name in super().get_decay_parameter_names(model) if name not in norms]

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override]
        checkpoint.load_weights(self.model, Path(checkpoint_path))

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No model card while training: the export writes one."""


class _Watch(TrainerCallback):
    """Follows the loss, saves the milestones, marks complete checkpoints, stops a trial that cannot be trusted."""

    def __init__(
        self,
        encoder: SentenceTransformer,
        recipe: Recipe,
        folder: Path,
        milestones: set[int],
        progress: Progress | None,
        stop_at_chance: bool,
    ) -> None:
        self.encoder, self.folder, self.milestones, self.progress = encoder, folder, milestones, progress
        self.steps, self.first = recipe.steps, (0, 0.0)  # the first step of this process and when it ended
        self.started = time.perf_counter()
        self.losses: dict[int, float] = {}
        self.recent: deque[float] = deque(maxlen=CHANCE_WINDOW)
        self.chance = math.log(recipe.part_size * (1 + recipe.negatives)) * (1 + len(recipe.matryoshka))
        self.stop_at_chance = stop_at_chance and recipe.loss == "infonce" and recipe.guide is None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Record the loss of a step. Raises TrainingError for one that is not finite or that stays at chance."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}; lower recipe.learning_rate or "
                "recipe.head_learning_rate, or use dtype = 'float32'"
            )
        self.losses[state.global_step] = loss
        self.recent.append(loss)
        if self.stop_at_chance and self._stays_at_chance():
            mean = sum(self.recent) / len(self.recent)
            raise TrainingError(
                f"the mean loss of the last {CHANCE_WINDOW} steps is {mean:.3f}, that of guessing ({self.chance:.3f}) "
                f"at step {state.global_step}: nothing is learned; raise the learning rates or check the data"
            )
        if self.progress:
            self.progress(state.global_step, loss, self._seconds_left(state.global_step))

    def _seconds_left(self, step: int) -> float | None:
        """At the pace of this process since its first step, which is slower than others and does not count."""
        now = time.perf_counter()
        if not self.first[0]:
            self.first = step, now
        done = step - self.first[0]
        return (now - self.first[1]) / done * (self.steps - step) if done else None

    def _stays_at_chance(self) -> bool:
        """Whether both halves of the window are at chance; a loss that falls through that level is in one at most."""
        losses, half = list(self.recent), CHANCE_WINDOW // 2
        means = [sum(part) / half for part in (losses[:half], losses[half:])]
        near = all(abs(mean - self.chance) < CHANCE_SHARE * self.chance for mean in means)
        return near and len(losses) == CHANCE_WINDOW

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the encoder at the milestones."""
        if state.global_step in self.milestones and state.is_world_process_zero:
            checkpoint.save(self.encoder, layout.at_step(self.folder, state.global_step), step=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as complete."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes a file of its own
        if state.is_world_process_zero:
            folder = layout.checkpoint(Path(args.output_dir), state.global_step)
            flush_folder(folder)  # the marker must not reach the disk before the weights
            write_json(folder / COMPLETE, {"seconds": self.seconds(), "files": hashes(folder)})

    def seconds(self) -> float:
        """Seconds of training so far, those of an earlier process up to its checkpoint included."""
        return time.perf_counter() - self.started


def _in_order(dataset: Dataset, batch_size: int, drop_last: bool, **kwargs: Any) -> DefaultBatchSampler:
    """Batches in the order of the rows, which was planned."""
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def _loss(encoder: SentenceTransformer, recipe: Recipe, gather: bool) -> torch.nn.Module:
    """InfoNCE as the recipe asks for it; the sum over the widths of `matryoshka`, too (arXiv 2205.13147)."""
    loss = _guided(encoder, recipe, gather) if recipe.guide else _infonce(encoder, recipe, gather)
    if recipe.matryoshka:
        return MatryoshkaLoss(encoder, loss, [*recipe.matryoshka, cast(int, encoder.get_embedding_dimension())])
    return loss


def _guided(encoder: SentenceTransformer, recipe: Recipe, gather: bool) -> torch.nn.Module:
    """InfoNCE without likely false negatives (GISTEmbed, arXiv 2402.16829).

    Dropped are documents whose cosine to the query, computed by the guide, exceeds the positive's less `guide_margin`.
    Of GISTEmbed's terms only query to document is used, so that the filter is all that differs from `infonce`.
    """
    guide = SentenceTransformer(recipe.guide, device=str(encoder.device)).eval().requires_grad_(False)
    options: dict[str, Any] = {
        "temperature": recipe.temperature,
        "margin": recipe.guide_margin,
        "contrast_anchors": False,
        "contrast_positives": False,
        "gather_across_devices": gather,
    }
    if recipe.mini_batch_size:
        return CachedGISTEmbedLoss(encoder, guide, mini_batch_size=recipe.mini_batch_size, **options)
    return GISTEmbedLoss(encoder, guide, **options)


def _infonce(encoder: SentenceTransformer, recipe: Recipe, gather: bool) -> torch.nn.Module:
    options: dict[str, Any] = {
        "scale": 1 / recipe.temperature,
        "gather_across_devices": gather,
        "directions": DIRECTIONS[recipe.loss],
    }
    if recipe.mini_batch_size:
        return CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=recipe.mini_batch_size, **options)
    return _OneForward(encoder, **options)


class _OneForward(MultipleNegativesRankingLoss):
    """sentence-transformers' loss over one forward pass of all columns.

    Its own runs the queries separately, because padded to the length of the documents they would cost as much. Without
    padding they do not, and one forward pass over all texts is cheaper than two.
    """

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: torch.Tensor) -> torch.Tensor:
        """The loss of columns (query, positive, negatives …) of B texts each."""
        columns = list(sentence_features)
        embeddings = self.model(joined(columns))["sentence_embedding"]
        return self.compute_loss_from_embeddings(list(embeddings.chunk(len(columns))), labels)


def _prompts(recipe: Recipe, columns: list[str]) -> dict[str, str] | None:
    prompts = {name: recipe.query_prompt if name == "query" else recipe.document_prompt for name in columns}
    return {name: prompt for name, prompt in prompts.items() if prompt} or None


def _logged(folder: Path) -> dict[int, float]:
    """The losses up to a checkpoint, from the trainer's own record."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
