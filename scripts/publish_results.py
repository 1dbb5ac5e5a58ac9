"""Published studies: a folder of `results/` is a run folder without weights and texts.

python scripts/publish_results.py results/NAME/study.toml RUN_FOLDER …   # scores of finished runs into results/NAME
python scripts/publish_results.py                                        # every report and figure from the scores

Only numbers and identifiers are taken over: main scores of all steps, item scores of the last one, losses, versions,
costs. Tasks that the study file does not list stay out, and so do trials without scores and those of other designs and
references. Where a run was made with other paths or before own folders took a known origin, base model and source are
written as the study file and the present code name them. The second form changes nothing unless scores or code changed,
which `tests/test_evidence.py` checks.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import figures
import pictures
import polars as pl

from poolwise import api
from poolwise.files import write_atomic, write_json
from poolwise.runs import layout
from poolwise.runs.prepare import store_costs
from poolwise.study import records
from poolwise.study.catalogue import origin
from poolwise.study.study import Study

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["role", "design", "seed", "step", "task", "split", "subset", "metric", "item_id"]
KEPT = (layout.SPEC, layout.DTYPE, layout.TRAINED, layout.LADDER, layout.LAYERS, layout.WORK)


def publish(study_file: str | Path, runs: list[str]) -> None:
    """Copy what `runs` hold of a study into the folder of its file, which must say `output = "."`."""
    study = Study.load(study_file)
    target = study.folder.resolve()
    if target != Path(study_file).resolve().parent:
        sys.exit(f'{study_file}: write output = "." so that the study is where its file is')
    found = [(Path(run), row) for run in runs for row in _trials(Path(run)) if _belongs(study, row)]
    found = [(run, row) for run, row in found if layout.score_files(layout.trial(run, row["name"]))]
    frame = pl.concat([_scores(run, row) for run, row in found], how="diagonal_relaxed")
    tasks = sorted(set(frame["task"]) & {Path(name).name for name in study.tasks} or set(frame["task"]))
    frame = frame.filter(pl.col("task").is_in(tasks))
    _write_scores(_present(study, frame), target / layout.RESULTS)
    rows = []
    shutil.rmtree(target / "trials", ignore_errors=True)
    for run, row in found:
        old, new = layout.trial(run, row["name"]), layout.trial(target, row["name"])
        new.mkdir(parents=True)
        for name in KEPT:
            if (old / name).exists():
                shutil.copyfile(old / name, new / name)
        files = [name for name in row["scores"] if name.rpartition("-")[0] in tasks]
        if all(list(old.glob(f"scores/*/{name}")) for name in files):  # nothing that is published is missing
            (new / layout.DONE).touch()
        rows.append({**row, "base": row["base"] and study.bases[0], "scores": files})
    write_json(target / layout.TRIALS, {"trials": rows})
    write_json(target / layout.STUDY, study.model_dump(mode="json"))
    for name in (layout.LOOKS, layout.VERSIONS):
        if (Path(runs[0]) / name).exists():
            shutil.copyfile(Path(runs[0]) / name, target / name)
    store_costs(study, target)


def rewrite() -> list[Path]:
    """Every report, page and picture from the committed scores. Returns what was written."""
    written = [path for study_file in published() for path in api.report(study_file)]
    written += [write_atomic(page, figures.filled(page.read_text(encoding="utf-8"))) for page in figures.pages()]
    return written + [write_atomic(path, pictures.svg(*which)) for path, which in pictures.paths().items()]


def published() -> list[Path]:
    """The study files of `results/`."""
    return sorted(ROOT.glob("results/*/study.toml"))


def _trials(run: Path) -> list[dict[str, Any]]:
    found = records.read(run / layout.TRIALS, records.Trials, "run the study again")
    return [row.model_dump() for row in found.trials]


def _belongs(study: Study, row: dict[str, Any]) -> bool:
    """Whether a trial is one of the study's designs, references or controls."""
    role, label = row["role"], row["label"]
    if role == "design":
        return label in {design.name for design in study.designs} and row["seed"] in study.all_seeds
    return study.controls if role in ("aa", "broken") else {role, label} & {*study.references} != set()


def _scores(run: Path, row: dict[str, Any]) -> pl.DataFrame:
    """The rows of a trial, those of its ladder included; of the items only those of the last step."""
    files = [path for path in layout.score_files(layout.trial(run, row["name"])) if path.name in row["scores"]]
    frame = pl.concat([pl.read_parquet(path) for path in files], how="diagonal_relaxed")
    return frame.filter(pl.col("item_id").is_null() | (pl.col("step") == pl.col("step").max()))


def _present(study: Study, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows with base model and sources as the study file and the present code name them, sorted."""
    known = pl.col("task").replace_strict({task: origin(task) or task for task in frame["task"].unique()})
    own = pl.col("source").is_null() | (pl.col("source") == pl.col("task"))
    frame = frame.with_columns(pl.when(own).then(known).otherwise("source").alias("source"))
    if len(study.bases) == 1 and "base" in frame.columns:
        frame = frame.with_columns(pl.when(pl.col("base").is_not_null()).then(pl.lit(study.bases[0])).alias("base"))
    return frame.sort([name for name in ORDER if name in frame.columns])


def _write_scores(frame: pl.DataFrame, path: Path) -> None:
    """Parquet that is small: single-precision cosines end in equal bytes, which this encoding puts side by side."""
    table = frame.to_arrow()
    numbers = [name for name in ("score", "seconds") if name in frame.columns]
    words = [name for name in frame.columns if name not in numbers]
    layout.write_table(
        path, table, compression_level=19, use_dictionary=words,
        column_encoding=dict.fromkeys(numbers, "BYTE_STREAM_SPLIT"), write_page_checksum=True,
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 2:
        publish(sys.argv[1], sys.argv[2:])
    for path in rewrite():
        print(path.relative_to(ROOT))
