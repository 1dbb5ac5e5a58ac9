"""The Python calls around results: compare, report, evaluate, export, layers. The command line prints their results.

Comparing and reporting write nothing but the report's own files, and load no model library.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise import demo
from poolwise.errors import CheckpointError, PoolwiseError, StatisticsError
from poolwise.reports.pages import render
from poolwise.runs import layout, looks
from poolwise.runs.run import losses, results, started, trials, tuned_results, versions
from poolwise.study.study import Study
from poolwise.verdicts import readers, robustness
from poolwise.verdicts.comparison import compare as compare_scores
from poolwise.verdicts.costs import equal_budgets, mean_costs
from poolwise.verdicts.findings import Findings
from poolwise.verdicts.items import Paired
from poolwise.verdicts.items import compare_items as compare_on_items
from poolwise.verdicts.leaderboard import Pairs, all_pairs
from poolwise.verdicts.mteb_files import Choice
from poolwise.verdicts.table import Scores, controls_of
from poolwise.verdicts.trec import compare_runs as compare_runs

if TYPE_CHECKING:
    import polars as pl


def scores(source: Study | str | Path, choice: Choice = Choice()) -> tuple[Study | None, Scores]:
    """The validated long table of a study (or its file), a CSV or Parquet file, or a folder of mteb results, and notes
    on how it was read; of all but a study the part that `choice` names."""
    if not isinstance(source, Study) and str(source).endswith(".toml"):
        source = layout.open_study(source)
    if not isinstance(source, Study):
        return None, readers.read(source, choice)
    layout.guard(source)
    if choice != Choice():
        raise StatisticsError("a study declares its splits, subsets and tasks: choose among those of published results")
    return source, Scores(results(source))


def _missing(missing: str | None, source: Study | str | Path) -> str:
    """What to do about gaps: by default refuse them, but published results always have some."""
    return missing or ("drop" if not isinstance(source, Study) and Path(source).is_dir() else "error")


def compare(
    source: Study | str | Path,
    *,
    baseline: str | None = None,
    by: str = "task_type",
    missing: str | None = None,
    run_sd: float | None = None,
    run_df: float | None = None,
    base: str | None = None,
    choice: Choice = Choice(),
) -> Findings:
    """Contrasts of all designs with the baseline, by task type or another column of the table.

    Args:
        source: a study or its file, a CSV or Parquet file of scores, or a folder of mteb results.
        baseline, by, missing: as in `verdicts.comparison.compare`; a study declares its own baseline. By default gaps
            are refused, but in a folder of mteb results the tasks that a model lacks are left out of all.
        run_sd, run_df: sd, in points, of one run's effect on a mean over such tasks, and its degrees of freedom, both
            from another study; with them single runs support a claim about designs.
        base: the base model to look at, in a study of several. Without it scores are averaged over them, and `by_base`
            and `robustness` give the result on each.
        choice: the splits, subsets, tasks and revisions of published results to compare.

    Raises:
        StatisticsError, DataError, CheckpointError: the scores do not support a comparison.
    """
    study, read = scores(source, choice)
    return _findings(study, read, baseline, by, _missing(missing, source), base, _run_effect(run_sd, run_df))


def compare_pairs(
    source: Study | str | Path,
    *,
    by: str = "task_type",
    missing: str | None = None,
    base: str | None = None,
    choice: Choice = Choice(),
) -> Pairs:
    """Every design against every other one, and from that the rank of each with its interval (`Pairs.places`).

    Args:
        source, by, missing, base, choice: as in `compare`.

    Raises:
        StatisticsError, DataError, CheckpointError: the scores do not support a comparison.
    """
    study, read = scores(source, choice)
    frame = robustness.chosen(read.frame, base)
    options: dict[str, Any] = {"notes": read.notes, "missing": _missing(missing, source)}
    if study is not None:
        options |= {"order": [design.name for design in study.designs], "margin": study.margin}
        at = looks.state(study, looks.finished(study, frame, trials(study) if started(study) else ()))
        if at.interim:
            raise StatisticsError(f"{study.name}: {at.interim} Pairs are compared when all runs are done")
        frame = looks.visible(looks.last_step(study, frame), at)
    return all_pairs(frame, by, controls=controls_of(frame), **options)


def report(
    source: Study | str | Path,
    *,
    out: str | Path | None = None,
    baseline: str | None = None,
    command: str | None = None,
    choice: Choice = Choice(),
) -> list[Path]:
    """Write `report.md`, `report.html` and `report.tex` and return their paths.

    Args:
        source: as in `compare`.
        out: the folder to write into; by default the study's folder, or the working directory for a file of scores.
        command: the command that repeats the study, if it is not `poolwise run` of its file.
        choice: as in `compare`.
    """
    study, read = scores(source, choice)
    findings = _findings(study, read, baseline, "task_type", _missing(None, source), None, {})
    if study is None:
        info = {"name": Path(str(source)).stem, "command": f"poolwise report {source}"}
        return render(info, read.frame, findings, out or Path.cwd())
    shares = layout.layer_attention(study, trials(study) if started(study) else ())
    known = study_info(study) | {"layers": shares, "losses": losses(study)}
    if not isinstance(source, Study):  # its file may be called otherwise than the study
        known["command"] = f"poolwise run {Path(source).name}"
    known["command"] = command or known["command"]
    return render(known, read.frame, findings, out or study.folder)


def _run_effect(run_sd: float | None, run_df: float | None) -> dict[str, Any]:
    """The run effect of another study, in scores 0–1."""
    if (run_sd is None) != (run_df is None):
        raise StatisticsError("a run effect from another study needs its sd and its degrees of freedom: give both")
    return {} if run_sd is None or run_df is None else {"run_sd": run_sd / 100, "run_df": run_df}


def _findings(
    study: Study | None, read: Scores, baseline: str | None, by: str, missing: str, base: str | None,
    run_effect: dict[str, Any],
) -> Findings:  # fmt: skip
    frame = read.frame
    names = robustness.bases(frame)
    if base is not None:
        frame = robustness.chosen(frame, base)
    pooled = base is None and len(names) > 1
    means = robustness.pooled(frame, names) if pooled else frame
    if study is None:
        controls = controls_of(means)
        compared = compare_scores(means, baseline, by, controls=controls, missing=missing, **run_effect)
        findings = Findings.of(compared, notes=(*read.notes, *compared.notes))
    else:
        one_of_several = base is not None and len(names) > 1
        findings = _study_findings(study, means, baseline, by, missing, one_of_several, run_effect)
    if not pooled:
        return findings
    each = {name: robustness.alone(frame, name) for name in names}
    return replace(findings, by_base=tuple((n, _on_base(study, rows, findings, missing)) for n, rows in each.items()))


def _study_findings(
    study: Study, frame: pl.DataFrame, baseline: str | None, by: str, missing: str, one_of_several: bool,
    run_effect: dict[str, Any],
) -> Findings:  # fmt: skip
    """`frame` has one score per cell: means over the base models, or the scores on one of them."""
    if not looks.last_step(study, frame).height:
        raise CheckpointError(f"{study.name}: no design has been scored at its last step yet; run the study first")
    at = looks.state(study, looks.finished(study, frame, trials(study) if started(study) else ()))
    declared = (baseline or study.baseline, by) == (study.baseline, "task_type") and not one_of_several
    over = " over all its base models" if one_of_several else ""
    other = f"Exploratory: the study declares contrasts with {study.baseline} by task type{over}."
    comparison = looks.compared(study, frame, at, baseline, by, missing, "" if declared else other, **run_effect)
    rows = mean_costs(layout.stored_costs(study), study.baseline)
    taken = looks.plan(study).looks if declared else ()
    findings = Findings.of(
        comparison,
        costs=tuple(rows),
        treatments=study.designs,
        budgets=equal_budgets(comparison, looks.visible(frame, at), rows),
        plan=" ".join(text for text in (at.note, looks.earlier(taken, at)) if text),
        looks=taken,
        notes=comparison.notes if rows else (*comparison.notes, _costs_missing(study)),
    )
    return findings if one_of_several else _with_tuning(study, findings)


def _costs_missing(study: Study) -> str:
    path = study.folder / layout.COSTS
    return f"Costs are unknown: {path} is missing or does not cover every design; `poolwise run` writes it."


def _on_base(study: Study | None, rows: pl.DataFrame, pooled: Findings, missing: str) -> Findings:
    """The findings on one base model, beside those over all of them; by the same rules, with a family of its own."""
    import polars as pl

    if study:
        seeds = {seed for arm in pooled.arms if arm.design in pooled.designs for seed in arm.seeds}
        rows = looks.last_step(study, rows).filter((pl.col("role") != "design") | pl.col("seed").is_in(list(seeds)))
    comparison = compare_scores(
        rows, pooled.baseline, pooled.by, controls=controls_of(rows), margin=pooled.margin, alpha=pooled.alpha,
        missing="drop" if pooled.interim else missing, order=pooled.designs, interim=pooled.interim,
        exploratory=pooled.exploratory,
    )  # fmt: skip
    return Findings.of(comparison, treatments=pooled.treatments)


def _with_tuning(study: Study, findings: Findings) -> Findings:
    """The findings with those of the equally tuned designs, if the study tunes and all of that has run."""
    if study.tuning is None or findings.interim:
        return findings
    tuned = tuned_results(study) if findings.costs else None
    if tuned is None:
        note = "Equally tuned: not all of the search has run yet, so it is not shown; `poolwise run` continues it."
        return replace(findings, notes=(*findings.notes, note))
    frame, winners = tuned
    frame = robustness.pooled(frame, names) if len(names := robustness.bases(frame)) > 1 else frame
    comparison = compare_scores(
        frame, findings.baseline, findings.by, margin=findings.margin, alpha=findings.alpha, order=findings.designs,
        exploratory=findings.exploratory,
    )  # fmt: skip
    tuned_findings = Findings.of(comparison, treatments=findings.treatments)
    return replace(findings, tuned=tuned_findings, winners=tuple(winners))


def compare_items(
    source: Study | str | Path,
    task: str,
    *,
    design: str | None = None,
    baseline: str | None = None,
    metric: str | None = None,
    missing: str = "error",
    seed: int = 0,
    base: str | None = None,
) -> tuple[Paired, ...]:
    """Compare designs on the queries, examples, sets or pairs of one task.

    Args:
        source: as in `compare`.
        design, baseline, metric, missing, seed: as in `verdicts.items.compare_items`.
        base: which base model, in a study of several.

    Raises:
        StatisticsError, DataError, CheckpointError: the scores do not support a comparison.
    """
    study, read = scores(source)
    frame = robustness.chosen(read.frame, base)
    if study is not None:
        frame = looks.last_step(study, frame)
        baseline = baseline or study.baseline
    return compare_on_items(
        frame, task, design=design, baseline=baseline, metric=metric, missing=missing, controls=controls_of(frame),
        seed=seed,
    )  # fmt: skip


def study_info(study: Study) -> dict[str, Any]:
    """What a report states about a study: base model, recipe, versions, predictions, the command that repeats it."""
    return {
        "name": study.name,
        "base_model": ", ".join(study.bases),
        "recipe": study.recipe.model_dump(mode="json"),
        "fingerprint": study.fingerprint,
        "predictions": demo.predictions() if any(task.startswith("demo") for task in study.tasks) else None,
        "versions": versions(study),
        "command": f"poolwise run {study.name}.toml",
    }


def evaluate(
    model: Any,
    tasks: Sequence[str],
    *,
    base_dir: str | Path | None = None,
    batch_size: int = 32,
    dtype: str | None = None,
    template: str | None = None,
    max_length: int | None = None,
    release: str | None = None,
    base: str | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score any sentence-transformers model (a name, a folder, an object) on tasks named as in a study file.

    Returns one row per task × split × subset with mteb's main score: task, task_type, split, subset, metric, score.
    Models that poolwise did not build keep their own length, prompts and normalisation; runs of poolwise are scored
    with the length and the prompts of their study.

    Args:
        base_dir: the folder that relative paths of tasks start from; by default the working directory.
        batch_size: texts at a time.
        dtype: of a model given by name or folder, see `encoding.encode.open_encoder`; None: as it is stored.
        template: put before each text (in retrieval before queries alone), with `{instruction}` replaced by the task's
            instruction in mteb: for instruct models, e.g. "Instruct: {instruction}\nQuery: ". None: its own prompts.
        max_length: tokens to which texts are cut; None: as many as the model's own limit.
        release, base: `model` is a folder that the paper's authors released: its design, m1 to m5, and its base model.
        note: called with a line for everything unusual about own data (columns not read, empty documents, …).
    """
    from sentence_transformers import SentenceTransformer

    from poolwise.data.tasks import resolve_tasks
    from poolwise.encoding.encode import open_encoder
    from poolwise.encoding.fast import MASKED, reads_padding
    from poolwise.model.checkpoint import default_pooling, recipe_of
    from poolwise.model.encoder import evaluation_prompts, instructions
    from poolwise.model.release import load_release
    from poolwise.scoring.evaluate import evaluate as score
    from poolwise.scoring.evaluate import model_identity, unscorable
    from poolwise.scoring.references import reference
    from poolwise.study.catalogue import LEXICAL
    from poolwise.study.recipe import INSTRUCTION

    if template is not None and INSTRUCTION not in template:
        raise PoolwiseError(f"template {template!r} must contain {INSTRUCTION}, such as 'Instruct: {INSTRUCTION}'")
    resolved = resolve_tasks(tuple(tasks), Path(base_dir) if base_dir else Path.cwd())
    for task in resolved:
        for line in task.notes:
            note(line)
    if (release is None) != (base is None):
        raise PoolwiseError("a release needs its design and its base model: give both release and base")
    if release and base:
        model = load_release(model, base, release, dtype=dtype or "auto")
    elif isinstance(model, (str, Path)):
        lexical = str(model) in LEXICAL
        model = model if lexical else layout.trial_in(Path(model))
        model = reference(str(model)) if lexical and dtype is None else open_encoder(model, dtype)
    if why := unscorable(model, resolved):
        note(why)
    ours = model if isinstance(model, SentenceTransformer) else None
    recipe = recipe_of(ours) if ours else None
    prompts = instructions(template) if template else evaluation_prompts(recipe) if recipe else None
    before = ours and ours.max_seq_length
    if ours and (limit := max_length or (recipe and recipe.scored_length)):
        ours.max_seq_length = limit
    for line in filter(None, [MASKED * reads_padding(ours), default_pooling(ours)] if ours else ()):
        note(line)
    try:
        identity = model_identity(model)
        rows = score(model, resolved, identity=identity, batch_size=batch_size, items=False, prompts=prompts)
    finally:
        if ours:
            ours.max_seq_length = before
    return [{name: row[name] for name in ("task", "task_type", "split", "subset", "metric", "score")} for row in rows]


def export_design(
    study: Study, design: str, to: str | Path, seed: int | None = None, base: str | None = None, force: bool = False
) -> Path:
    """Export a trained design of a study: its run of `seed` on `base` (by default the first ones) at the last step.

    force: replace an exported folder at `to`; anything else there is refused.

    Raises:
        StudyError: the study has no such design.
        CheckpointError: no such seed or base model; the run has not started, is not finished, or has failed.
    """
    from poolwise.model.checkpoint import export, load

    study.design(design)
    seed = study.seeds[0] if seed is None else seed
    if seed not in study.all_seeds:
        raise CheckpointError(f"--seed {seed} is not in this study; allowed: {', '.join(map(str, study.all_seeds))}")
    base = study.bases[0] if base is None else base
    if base not in study.bases:
        raise CheckpointError(f"--base {base} is not in this study; allowed: {', '.join(study.bases)}")
    wanted = (design, "design", seed, base)
    for trial in trials(study):
        if (trial["label"], trial["role"], trial["seed"], trial["base"]) != wanted:
            continue
        folder = layout.trial(study.folder, trial["name"])
        weights = layout.milestone(folder, study.recipe.steps)
        if weights.exists():
            encoder = load(weights)
            if force and (Path(to) / "modules.json").is_file():
                shutil.rmtree(to)
            return export(encoder, to)
        if trial["state"] == "failed":
            raise CheckpointError(
                f"{design} with seed {seed} failed: {trial['reason']}. Its log is {folder / layout.LOG}; "
                "`poolwise run` tries it again"
            )
        raise CheckpointError(f"{design} with seed {seed} is not trained yet; `poolwise run` continues the study")
    raise CheckpointError(f"{design} with seed {seed} has not been started; run the study first")


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

    Args:
        source: a study or its file, the folder of its runs, or the folder of one trial (relative paths of tasks then
            start at the working directory).
        design, seed, base: only these.
        batch_size: texts at a time.
        progress: called with the name of each trial before it is loaded.

    Returns `study` and `runs`, one for each trial: `design`, `seed`, `base`, the fields of `scoring.layers.inspect`,
    and `own`, the design's own scores on the same tasks.

    Raises:
        CheckpointError: none of these is trained.
    """
    from poolwise.data.tasks import resolve_tasks
    from poolwise.model import checkpoint
    from poolwise.scoring.layers import inspect

    study, only = layout.study_in(source)
    wanted = {"label": design, "seed": seed, "base": base, "name": only}
    rows = [row for row in trials(study) if row["role"] == "design"]
    rows = [row for row in rows if all(value is None or row[key] == value for key, value in wanted.items())]
    last = {row["name"]: layout.milestone(layout.trial(study.folder, row["name"]), study.recipe.steps) for row in rows}
    rows = [row for row in rows if last[row["name"]].is_dir()]
    if not rows:
        asked = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None)
        raise CheckpointError(f"{study.name}: no trained design{' of ' + asked if asked else ''}; run the study first")
    tasks = resolve_tasks(study.tasks, study.base_dir)
    runs = []
    for row in rows:
        progress(row["name"])
        content = inspect(checkpoint.load(last[row["name"]]), tasks, row["id"], study.recipe, batch_size)
        named = {"design": row["label"], "seed": row["seed"], "base": row["base"]}
        runs.append({**named, **content, "own": _design_scores(study, row["id"])})
    return {"study": study.name, "runs": runs}


def _design_scores(study: Study, trial_id: str) -> list[dict[str, Any]]:
    """The main scores of a trial at its last step; empty if there are none yet."""
    import polars as pl

    if not (study.folder / layout.RESULTS).exists():
        return []
    mine = (pl.col("trial") == trial_id) & pl.col("item_id").is_null() & (pl.col("role") == "design")
    rows = results(study).filter(mine, pl.col("step") == study.recipe.steps)
    return rows.select("task", "task_type", "metric", "score").to_dicts()
