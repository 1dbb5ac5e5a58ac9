"""What a Python user calls: run, compare, report and evaluate. The command line adds nothing but words to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise import results
from poolwise.comparison import Comparison
from poolwise.comparison import compare as compare_scores
from poolwise.errors import CheckpointError, PoolwiseError
from poolwise.paired import Paired
from poolwise.paired import compare_items as compare_on_items
from poolwise.runner import results as study_results
from poolwise.runner import run
from poolwise.study import Study
from poolwise.tables import priced

if TYPE_CHECKING:
    import polars as pl

__all__ = ["compare", "compare_items", "compare_runs", "evaluate", "report", "run"]


def scores(source: Study | str | Path) -> tuple[Study | None, pl.DataFrame]:
    """The long table of a study (or its file), a CSV or Parquet file, or a folder of mteb results."""
    if not isinstance(source, Study) and str(source).endswith(".toml"):
        source = Study.load(source)
    if isinstance(source, Study):
        return source, study_results(source)
    return None, results.read(source)


def compare(
    source: Study | str | Path, *, baseline: str | None = None, by: str = "task_type", missing: str = "error"
) -> Comparison:
    """Contrasts of all designs against the baseline, by task type or another column of the table.

    Raises StatisticsError, DataError or CheckpointError where the scores do not support a comparison.
    """
    study, frame = scores(source)
    return _compare(study, frame, baseline, by, missing)


def _compare(study: Study | None, frame: pl.DataFrame, baseline: str | None, by: str, missing: str) -> Comparison:
    if study is None:
        return compare_scores(frame, baseline, by, controls=_controls(frame), missing=missing)
    frame, dropped = last_step(study, frame)
    if not frame.height:
        raise CheckpointError(f"{study.name}: no design has been scored at its last step yet; run the study first")
    # a study that still runs is compared on what all designs have: an interim picture, said to be one
    return compare_scores(
        frame,
        baseline or study.baseline,
        by,
        controls=_controls(frame),
        margin=study.margin,
        missing="drop" if dropped else missing,
        order=[design.name for design in study.designs],
        costs=_encode_flops(study),
        treatments=study.designs,
    )


def _controls(frame: pl.DataFrame) -> list[str]:
    """Designs outside the comparison, where the table has a column that says what each is (a study's table has)."""
    if "role" not in frame.columns:
        return []
    return frame.filter(frame["role"] != "design")["design"].unique().to_list()


def compare_items(
    source: Study | str | Path,
    task: str,
    *,
    design: str | None = None,
    baseline: str | None = None,
    metric: str | None = None,
    missing: str = "error",
    test: str | None = None,
    seed: int = 0,
) -> tuple[Paired, ...]:
    """Compare designs on the queries, examples, sets or pairs of one task; arguments as in `paired.compare_items`.

    Raises StatisticsError, DataError or CheckpointError where the scores do not support a comparison.
    """
    study, frame = scores(source)
    if study is not None:
        frame, _ = last_step(study, frame)
        baseline = baseline or study.baseline
    controls = _controls(frame)
    return compare_on_items(
        frame, task, design=design, baseline=baseline, metric=metric, missing=missing, controls=controls,
        test=test, seed=seed,
    )  # fmt: skip


def compare_runs(
    runs: Sequence[str | Path],
    qrels: str | Path,
    *,
    metric: str = "ndcg_at_10",
    task: str | None = None,
    design: str | None = None,
    baseline: str | None = None,
    test: str | None = None,
    seed: int = 0,
) -> tuple[Paired, ...]:
    """Compare TREC runs query by query, the first one being the baseline; files are read as in `results.read_trec`.

    As pytrec_eval does, only queries that a run holds are evaluated: a judged query that one of them lacks is left out
    of all. The note lists such queries and says what a 0 for them (trec_eval's `-c`) would make of the difference.
    """
    name = task or Path(qrels).stem
    frame = results.read_trec(runs, qrels, metric, name)
    return compare_on_items(
        frame, name, design=design, baseline=baseline, missing="drop", test=test, seed=seed
    )  # fmt: skip


def last_step(study: Study, frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The scores at the end of the training (of the untrained ones at step 0), and the trials that have none yet."""
    import polars as pl

    kept = frame.filter((pl.col("step") == study.recipe.steps) | pl.col("role").is_in(["untuned", "reference"]))
    have = set(kept.filter(pl.col("role") == "design").select("design", "seed").unique().iter_rows())
    return kept, [f"{d.name} seed {s}" for d in study.designs for s in study.seeds if (d.name, s) not in have]


def report(source: Study | str | Path, *, out: str | Path | None = None, baseline: str | None = None) -> list[Path]:
    """Write `report.md` and `report.html`: into the study's folder, or into `out`. Returns their paths."""
    from poolwise.reports import render

    study, frame = scores(source)
    comparison = _compare(study, frame, baseline, "task_type", "error")
    if study is None:
        folder = Path(out) if out else Path.cwd()
        info = {"name": Path(str(source)).stem, "command": f"poolwise report {source}"}
        return render(info, frame, comparison, None, None, folder)
    folder = Path(out) if out else study.folder
    return render(study_info(study), frame, comparison, _costs(study), None, folder)


def study_info(study: Study) -> dict[str, Any]:
    """What a report says of a study: base, recipe, seeds, versions, the command that repeats it."""
    from importlib.metadata import version

    packages = ("poolwise", "torch", "transformers", "sentence-transformers", "peft", "mteb")
    return {
        "name": study.name,
        "base_model": study.recipe.base_model,
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "recipe": study.recipe.model_dump(mode="json"),
        "designs": [design.model_dump(mode="json") for design in study.designs],
        "fingerprint": study.fingerprint,
        "versions": {name: version(name) for name in packages},
        "command": f"poolwise run {study.name}.toml",
    }


def _encode_flops(study: Study) -> dict[str, float]:
    """What each design takes to encode a text of 128 tokens; empty where the base model cannot be reached any more."""
    try:
        return {row["design"]: row["encode_flops"] for row in priced(_costs(study), study.baseline)}
    except (PoolwiseError, OSError):
        return {}


def _costs(study: Study) -> list[dict[str, Any]]:
    """The cost table, kept in the study's folder: reading it needs no model library."""
    path = study.folder / "costs.json"
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))
        if {row["design"] for row in rows} >= {design.name for design in study.designs}:
            return rows  # type: ignore[no-any-return]
    from poolwise.preview import costs
    from poolwise.trial import base_config

    rows = costs(study, base_config(study)[1])
    results.write_atomic(path, json.dumps(rows))
    return rows


def evaluate(
    model: Any, tasks: Sequence[str], *, base_dir: str | Path | None = None, batch_size: int = 32
) -> list[dict[str, Any]]:
    """Score any sentence-transformers model (a name, a folder, an object) on tasks named as in a study file.

    Returns one row per task × split × subset with mteb's main score: task, task_type, split, subset, metric, score.
    Models that poolwise did not build keep their own dtype, length, prompts and normalisation.
    """
    from poolwise.evaluation import evaluate as score
    from poolwise.evaluation import model_identity
    from poolwise.references import reference
    from poolwise.tasks import resolve_tasks

    resolved = resolve_tasks(tuple(tasks), Path(base_dir) if base_dir else Path.cwd())
    if isinstance(model, (str, Path)):
        folder = Path(model)
        if (folder / "run.json").exists():
            from poolwise.checkpoint import load

            model = load(folder)
        else:
            model = reference(str(model))
    rows = score(model, resolved, identity=model_identity(model), batch_size=batch_size, items=False)
    return [{name: row[name] for name in ("task", "task_type", "split", "subset", "metric", "score")} for row in rows]


def export_design(study: Study, design: str, to: str | Path, seed: int | None = None) -> Path:
    """Export a trained design of a study: its run of `seed` (the first by default) at the last step."""
    from poolwise.checkpoint import load
    from poolwise.exporting import export
    from poolwise.runner import trials

    study.design(design)
    wanted = study.seeds[0] if seed is None else seed
    if wanted not in study.seeds:
        raise CheckpointError(f"--seed {wanted} is not in this study; it has {', '.join(map(str, study.seeds))}")
    for trial in trials(study):
        if (trial["label"], trial["role"], trial["seed"]) == (design, "design", wanted):
            folder = study.folder / "trials" / trial["name"] / "training" / f"step-{study.recipe.steps}"
            if not folder.exists():
                raise CheckpointError(f"{design} with seed {wanted} is not trained yet; run the study first")
            return export(load(folder), to)
    raise CheckpointError(f"{design} with seed {wanted} has not been started; run the study first")
