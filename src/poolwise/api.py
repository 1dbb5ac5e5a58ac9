"""What a Python user calls: run, compare, report and evaluate. The command line adds nothing but words to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise import demo
from poolwise.errors import CheckpointError, StatisticsError
from poolwise.reports.tables import priced
from poolwise.runs import layout, looks
from poolwise.runs.check import known_costs, mean_costs
from poolwise.runs.run import results as study_results
from poolwise.runs.run import trials, tuned_results
from poolwise.study.study import Study
from poolwise.verdicts import readers, robustness
from poolwise.verdicts.comparison import Comparison
from poolwise.verdicts.comparison import compare as compare_scores
from poolwise.verdicts.findings import equal_budgets
from poolwise.verdicts.items import Paired
from poolwise.verdicts.items import compare_items as compare_on_items

if TYPE_CHECKING:
    import polars as pl


def scores(source: Study | str | Path) -> tuple[Study | None, pl.DataFrame]:
    """The long table of a study (or its file), a CSV or Parquet file, or a folder of mteb results."""
    if not isinstance(source, Study) and str(source).endswith(".toml"):
        source = Study.load(source)
    if isinstance(source, Study):
        return source, study_results(source)
    return None, readers.read(source)


def compare(
    source: Study | str | Path, *, baseline: str | None = None, by: str = "task_type", missing: str = "error",
    run_sd: float | None = None, run_df: float | None = None, base: str | None = None,
) -> Comparison:  # fmt: skip
    """Contrasts of all designs against the baseline, by task type or another column of the table.

    run_sd, run_df: sd, in points, of one run's effect on a mean over such tasks and its degrees of freedom, both from
    an earlier study; single runs then carry a statement about designs.

    base: the one base model to look at, in a study of several; without it scores are averaged over them, and
    `by_base` and `robustness` say what each says.

    Raises StatisticsError, DataError or CheckpointError where the scores do not support a comparison.
    """
    study, frame = scores(source)
    alone = ""
    if base is not None:
        alone = base if len(robustness.bases(frame)) > 1 else ""
        frame = robustness.chosen(frame, base)
    return _compare(study, frame, baseline, by, missing, _run_effect(run_sd, run_df), alone)


def _run_effect(run_sd: float | None, run_df: float | None) -> dict[str, Any]:
    """The run effect known from elsewhere, in scores 0–1."""
    if (run_sd is None) != (run_df is None):
        raise StatisticsError("a run effect from elsewhere needs its sd and its degrees of freedom: give both or none")
    return {} if run_sd is None or run_df is None else {"run_sd": run_sd / 100, "run_df": run_df}


def _compare(
    study: Study | None, frame: pl.DataFrame, baseline: str | None, by: str, missing: str,
    run_effect: dict[str, Any], alone: str = "",
) -> Comparison:  # fmt: skip
    """`alone`: the one base model of several that `frame` holds."""
    import polars as pl

    if len(names := robustness.bases(frame)) > 1:
        means = robustness.pooled(frame, names)
        return on_each(study, frame, names, _compare(study, means, baseline, by, missing, run_effect), missing)
    if study is None:
        return compare_scores(frame, baseline, by, controls=controls_of(frame), missing=missing, **run_effect)
    last = last_step(study, frame)
    if not last.height:
        raise CheckpointError(f"{study.name}: no design has been scored at its last step yet; run the study first")
    state = looks.state(study, _done(study, last))
    shown = (pl.col("role") != "design") | pl.col("seed").is_in(list(state.seeds))
    costs = priced(known_costs(study), study.baseline)
    primary = (baseline or study.baseline, by) == (study.baseline, "task_type") and not alone
    declared = " over all its base models" if alone else ""
    other = f"Exploratory: what the study declares is contrasts with {study.baseline} by task type{declared}."
    found = compare_scores(
        last.filter(shown),
        baseline or study.baseline,
        by,
        controls=controls_of(frame),
        margin=study.margin,
        alpha=state.alpha,
        missing="drop" if state.interim else missing,  # an interim picture: what all designs have
        order=[design.name for design in study.designs],
        costs={row["design"]: row["encode_flops"] for row in costs},
        treatments=study.designs,
        type_weights=study.type_weights,
        interim=state.interim,
        exploratory=state.exploratory or ("" if primary else other),
        **run_effect,
    )
    taken = looks.record(study, state, found) if primary else ()
    return replace(
        found if alone else equally_tuned(study, found),
        plan=" ".join(text for text in (state.note, looks.earlier(taken, state)) if text),
        looks=taken,
        budgets=equal_budgets(found, frame.filter(shown), costs),
    )


def _done(study: Study, last: pl.DataFrame) -> set[tuple[str, int]]:
    """The trials (design, seed) that are done: nothing failed, and scored on as much as any other."""
    cells = last.filter((last["role"] == "design") & last["item_id"].is_null()).group_by("design", "seed").len()
    most = cells["len"].max()
    done = {(design, seed) for design, seed, size in cells.iter_rows() if size == most}
    if not (study.folder / layout.TRIALS).exists():
        return done
    open_ = {(row["label"], row["seed"]) for row in trials(study) if row["role"] == "design" and row["state"] != "done"}
    return done - open_


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
    base: str | None = None,
) -> tuple[Paired, ...]:
    """Compare designs on the queries, examples, sets or pairs of one task; arguments as in `paired.compare_items`.

    base: which base model, in a study of several.

    Raises StatisticsError, DataError or CheckpointError where the scores do not support a comparison.
    """
    study, frame = scores(source)
    frame = robustness.chosen(frame, base)
    if study is not None:
        frame = last_step(study, frame)
        baseline = baseline or study.baseline
    controls = controls_of(frame)
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
    """Compare TREC runs query by query, the first one being the baseline; files are read as in `readers.read_trec`.

    As pytrec_eval does, only queries that a run holds are evaluated: a judged query that one of them lacks is left out
    of all. The note lists such queries and says what a 0 for them (trec_eval's `-c`) would make of the difference.
    """
    name = task or Path(qrels).stem
    frame = readers.read_trec(runs, qrels, metric, name)
    return compare_on_items(
        frame, name, design=design, baseline=baseline, missing="drop", test=test, seed=seed
    )  # fmt: skip


def report(
    source: Study | str | Path,
    *,
    out: str | Path | None = None,
    baseline: str | None = None,
    command: str | None = None,
) -> list[Path]:
    """Write `report.md` and `report.html`: into the study's folder, or into `out`. Returns their paths.

    command: what repeats the study, where it is not `poolwise run` of its file.
    """
    from poolwise.reports.pages import render

    study, frame = scores(source)
    comparison = _compare(study, frame, baseline, "task_type", "error", {})
    if study is None:
        folder = Path(out) if out else Path.cwd()
        info = {"name": Path(str(source)).stem, "command": f"poolwise report {source}"}
        return render(info, frame, comparison, None, None, folder)
    folder = Path(out) if out else study.folder
    found = {**study_info(study), "layers": layer_attention(study)}
    found |= {"command": command} if command else {}
    return render(found, frame, comparison, mean_costs(study), None, folder)


def layer_attention(study: Study) -> dict[str, Any]:
    """What the finished trials say of layers: `texts` looked at, and `runs`: design -> seed -> (L,) weights, sum 1.

    Only designs that attend to layers, only trials that left it behind; designs of several base models apart.
    """
    found: dict[str, dict[int, list[float]]] = {}
    texts = 0
    for row in trials(study) if (study.folder / layout.TRIALS).exists() else ():
        path = layout.trial(study.folder, row["name"]) / layout.LAYERS
        if row["role"] == "design" and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            name = f"{row['label']} on {row['base']}" if len(study.bases) > 1 else row["label"]
            found.setdefault(name, {})[row["seed"]] = content["attention"]
            texts = content["texts"]
    return {"texts": texts, "runs": found}


def study_info(study: Study) -> dict[str, Any]:
    """What a report says of a study: base, recipe, seeds, versions, the command that repeats it."""
    from importlib.metadata import version

    packages = ("poolwise", "torch", "transformers", "sentence-transformers", "peft", "mteb")
    return {
        "name": study.name,
        "base_model": ", ".join(study.bases),
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "recipe": study.recipe.model_dump(mode="json"),
        "designs": [design.model_dump(mode="json") for design in study.designs],
        "fingerprint": study.fingerprint,
        "predictions": demo.predictions() if any(task.startswith("demo") for task in study.tasks) else None,
        "versions": {name: version(name) for name in packages},
        "command": f"poolwise run {study.name}.toml",
    }


def evaluate(
    model: Any,
    tasks: Sequence[str],
    *,
    base_dir: str | Path | None = None,
    batch_size: int = 32,
    note: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score any sentence-transformers model (a name, a folder, an object) on tasks named as in a study file.

    Returns one row per task × split × subset with mteb's main score: task, task_type, split, subset, metric, score.
    Models that poolwise did not build keep their own dtype, length, prompts and normalisation. `note` gets a line for
    everything unusual about own data (columns not read, empty documents, …).
    """
    from poolwise.data.tasks import resolve_tasks
    from poolwise.scoring.evaluate import evaluate as score
    from poolwise.scoring.evaluate import model_identity
    from poolwise.scoring.references import reference

    resolved = resolve_tasks(tuple(tasks), Path(base_dir) if base_dir else Path.cwd())
    for task in resolved:
        for line in task.notes:
            note(line)
    if isinstance(model, (str, Path)):
        folder = Path(model)
        if (folder / "run.json").exists():
            from poolwise.model.checkpoint import load

            model = load(folder)
        else:
            model = reference(str(model))
    rows = score(model, resolved, identity=model_identity(model), batch_size=batch_size, items=False)
    return [{name: row[name] for name in ("task", "task_type", "split", "subset", "metric", "score")} for row in rows]


def export_design(study: Study, design: str, to: str | Path, seed: int | None = None, base: str | None = None) -> Path:
    """Export a trained design of a study: its run of `seed` on `base` (the first ones by default) at the last step."""
    from poolwise.model.checkpoint import export, load

    study.design(design)
    wanted = study.seeds[0] if seed is None else seed
    if wanted not in study.all_seeds:
        raise CheckpointError(f"--seed {wanted} is not in this study; it has {', '.join(map(str, study.all_seeds))}")
    model = study.bases[0] if base is None else base
    if model not in study.bases:
        raise CheckpointError(f"--base {model} is not in this study; it has {', '.join(study.bases)}")
    for trial in trials(study):
        key = (trial["label"], trial["role"], trial["seed"], trial.get("base", model))
        if key == (design, "design", wanted, model):
            folder = layout.milestone(layout.trial(study.folder, trial["name"]), study.recipe.steps)
            if not folder.exists():
                raise CheckpointError(f"{design} with seed {wanted} is not trained yet; run the study first")
            return export(load(folder), to)
    raise CheckpointError(f"{design} with seed {wanted} has not been started; run the study first")


def on_each(
    study: Study | None, frame: pl.DataFrame, names: Sequence[str], found: Comparison, missing: str
) -> Comparison:
    """The pooled comparison with that of each base model beside it."""
    import polars as pl

    seeds = {seed for arm in found.arms if arm.design in found.designs for seed in arm.seeds}
    each = []
    for name in names:
        rows = robustness.alone(frame, name)
        if study:
            rows = last_step(study, rows).filter((pl.col("role") != "design") | pl.col("seed").is_in(list(seeds)))
        one = compare_scores(
            rows, found.baseline, found.by, controls=controls_of(rows), margin=found.margin, alpha=found.alpha,
            missing="drop" if found.interim else missing, order=found.designs, treatments=found.treatments,
            interim=found.interim, exploratory=found.exploratory,
        )  # fmt: skip
        each.append((name, one))
    return replace(found, by_base=tuple(each))


def equally_tuned(study: Study, found: Comparison) -> Comparison:
    """The comparison with that of the second arm beside it, where the study tunes and all of it has run."""
    if study.tuning is None or found.interim:
        return found
    results_of_second = tuned_results(study)
    if results_of_second is None:
        return replace(found, notes=(*found.notes, "Equally tuned: not all of the search has run yet; run the study."))
    frame, chosen = results_of_second
    frame = robustness.pooled(frame, names) if len(names := robustness.bases(frame)) > 1 else frame
    tuned = compare_scores(
        frame, found.baseline, found.by, margin=found.margin, alpha=found.alpha, order=found.designs,
        treatments=found.treatments, exploratory=found.exploratory,
    )  # fmt: skip
    return replace(found, tuned=tuned, winners=tuple(chosen))


def last_step(study: Study, frame: pl.DataFrame) -> pl.DataFrame:
    """The scores at the end of the training, and of the untrained ones at step 0."""
    import polars as pl

    return frame.filter((pl.col("step") == study.recipe.steps) | pl.col("role").is_in(["untuned", "reference"]))


def controls_of(frame: pl.DataFrame) -> list[str]:
    """Designs outside the comparison, where the table has a column that says what each is (a study's table has)."""
    if "role" not in frame.columns:
        return []
    return frame.filter(frame["role"] != "design")["design"].unique().to_list()


def layers(
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

    Returns `study` and `runs`, one for each trial: `design`, `seed`, `base`, what `scoring.layers.inspect` finds, and
    `own`, the design's own scores on the same tasks.

    Raises CheckpointError where nothing of what is asked for is trained.
    """
    from poolwise.data.tasks import resolve_tasks
    from poolwise.model import checkpoint
    from poolwise.scoring.layers import inspect

    study, only = _study_in(source)
    wanted = {"label": design, "seed": seed, "base": base, "name": only}
    rows = [row for row in trials(study) if row["role"] == "design"]
    rows = [row for row in rows if all(value is None or row.get(key) == value for key, value in wanted.items())]
    last = {row["name"]: layout.milestone(layout.trial(study.folder, row["name"]), study.recipe.steps) for row in rows}
    rows = [row for row in rows if last[row["name"]].is_dir()]
    if not rows:
        asked = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None)
        raise CheckpointError(f"{study.name}: no trained design{' of ' + asked if asked else ''}; run the study first")
    tasks = resolve_tasks(study.tasks, study.base_dir)
    runs = []
    for row in rows:
        progress(row["name"])
        found = inspect(checkpoint.load(last[row["name"]]), tasks, row["id"], study.recipe, batch_size)
        named = {"design": row["label"], "seed": row["seed"], "base": row.get("base")}
        runs.append({**named, **found, "own": _own_scores(study, row["id"])})
    return {"study": study.name, "runs": runs}


def _study_in(source: Study | str | Path) -> tuple[Study, str | None]:
    """The study that `source` names, and the name of a trial where it names one."""
    if isinstance(source, Study):
        return source, None
    path = Path(source)
    if path.suffix == ".toml":
        return Study.load(path), None
    for folder, only in ((path, None), (layout.study_of(path.resolve()), path.name)):
        if (folder / layout.STUDY).is_file():
            written = json.loads((folder / layout.STUDY).read_text(encoding="utf-8"))
            return Study.parse({**written, "output": str(folder.resolve())}, base_dir=Path.cwd()), only
    raise CheckpointError(f"{path}: neither a study file nor the folder of a study's runs or of a trial")


def _own_scores(study: Study, trial_id: str) -> list[dict[str, Any]]:
    """The main scores of a trial at its last step; empty where there are none yet."""
    import polars as pl

    path = study.folder / layout.RESULTS
    if not path.exists():
        return []
    mine = (pl.col("trial") == trial_id) & pl.col("item_id").is_null() & (pl.col("role") == "design")
    rows = pl.read_parquet(path).filter(mine, pl.col("step") == study.recipe.steps)
    return rows.select("task", "task_type", "metric", "score").to_dicts()
