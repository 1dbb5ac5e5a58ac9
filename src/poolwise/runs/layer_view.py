"""A look inside trained designs: which layers their latents attend to, their layer weights, and how good each single
layer would be as an embedding."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from poolwise.data.tasks import Task, resolve_tasks
from poolwise.errors import CheckpointError
from poolwise.model import checkpoint
from poolwise.runs import run as runner
from poolwise.scoring.layers import attends_to_layers, layer_attention, layer_weights, probe_layers
from poolwise.study.catalogue import spec_of
from poolwise.study.study import Study

LOOKED_AT = 64
"""Evaluation texts over which attention is averaged, about."""


def layer_view(
    source: Study | str | Path,
    *,
    design: str | None = None,
    seed: int | None = None,
    base: str | None = None,
    batch_size: int = 32,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """What the layers of a study's trained designs hold, JSON-able.

    source: a study or its file, the folder of its runs, or the folder of one trial (relative paths of tasks then start
    at the working directory). design, seed, base: only those.

    Returns `study` and `runs`, one for each trial: `design`, `seed`, `base`, `reduce` (what stands for a layer: its
    `last` token or the `mean` of its tokens, as the design reads them), `attention` (L shares) and `weights` (L norms
    of the layer weights) where the design attends to layers, `scores` (`layer` from 1, `task`, `task_type`, `metric`,
    `score`) and `own`, the design's own scores on the same tasks.

    Raises CheckpointError where nothing of what is asked for is trained.
    """
    study, only = _study(source)
    wanted = {"label": design, "seed": seed, "base": base, "name": only}
    rows = [row for row in runner.trials(study) if row["role"] == "design"]
    rows = [row for row in rows if all(value is None or row.get(key) == value for key, value in wanted.items())]
    folders = [(row, study.folder / "trials" / row["name"]) for row in rows]
    found = [(row, weights) for row, folder in folders if (weights := _last(folder, study.recipe.steps)).is_dir()]
    if not found:
        asked = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None)
        raise CheckpointError(f"{study.name}: no trained design{' of ' + asked if asked else ''}; run the study first")
    tasks = resolve_tasks(study.tasks, study.base_dir)
    runs = []
    for row, weights in found:
        progress(row["name"])
        runs.append(_look(checkpoint.load(weights), row, study, tasks, batch_size))
    return {"study": study.name, "runs": runs}


def _study(source: Study | str | Path) -> tuple[Study, str | None]:
    """The study, and the name of the one trial that is asked for."""
    if isinstance(source, Study):
        return source, None
    path = Path(source)
    if path.suffix == ".toml":
        return Study.load(path), None
    for folder, only in ((path, None), (path.resolve().parents[1], path.name)):
        if (folder / "study.json").is_file():
            written = json.loads((folder / "study.json").read_text(encoding="utf-8"))
            return Study.parse({**written, "output": str(folder.resolve())}, base_dir=Path.cwd()), only
    raise CheckpointError(f"{path}: neither a study file nor the folder of a study's runs or of a trial")


def _last(folder: Path, steps: int) -> Path:
    return folder / "training" / f"step-{steps}"


def _look(
    encoder: SentenceTransformer, row: dict[str, Any], study: Study, tasks: Sequence[Task], batch_size: int
) -> dict[str, Any]:
    arguments: dict[str, Any] = encoder.poolwise["design"]  # type: ignore[assignment,index]
    tokens = spec_of(arguments["pooling"]).tokens_read(arguments["pooling_args"])
    reduce = "last" if tokens == "last" else "mean"  # a layer's vector, as close to the design's as can be
    recipe = study.recipe
    prompts = {"query": recipe.query_prompt, "document": recipe.document_prompt, **recipe.prompts}
    attention = weights = None
    if attends_to_layers(encoder):
        share = -(-LOOKED_AT // max(1, len(tasks)))
        texts = [text for task in tasks for text in itertools.islice(task.texts(), share)]
        attention = layer_attention(encoder, texts).tolist() if texts else None
        matrix = layer_weights(encoder)
        weights = None if matrix is None else (matrix**2).sum(axis=1).__pow__(0.5).tolist()
    scores = probe_layers(
        encoder, tasks, identity=row["id"], reduce=reduce, prompts=prompts, batch_size=batch_size
    )  # fmt: skip
    kept = ("layer", "task", "task_type", "metric", "score")
    return {
        **{name: row.get(key) for name, key in (("design", "label"), ("seed", "seed"), ("base", "base"))},
        "reduce": reduce,
        "attention": attention,
        "weights": weights,
        "scores": [{name: score[name] for name in kept} for score in scores],
        "own": _own(study, row),
    }


def _own(study: Study, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of the run itself at its last step, as far as there are any."""
    import polars as pl

    path = study.folder / "results.parquet"
    if not path.exists():
        return []
    frame = pl.read_parquet(path)
    mine = frame.filter(pl.col("trial") == row["id"], pl.col("item_id").is_null(), pl.col("role") == "design")
    mine = mine.filter(pl.col("step") == study.recipe.steps)
    return mine.select("task", "task_type", "metric", "score").to_dicts()
