"""The folder of a study's runs: which file lies where, and which study it is of. No other file spells these paths.

    FOLDER/                         `output` of the study file, or runs/NAME beside it
        study.json                  the study as it was started
        trials.json                 its trials: name, label, role, seed, base, hash of the spec, their score files
        results.parquet             the long table of all scores, rewritten after each run
        looks.json, costs.json      the seeds that were declared and the looks taken; parameters and FLOPs per design
        versions.json               the versions of the libraries that took part, by package
        frozen/KEY/                 hidden states of an untuned base, shared by its trials
        prepared-SHARD/             what preparation hands to the workers; removed when the run ends
        search/SETTING/             the runs of a study's `[tuning]`, one study folder per setting
        tuned/SETTING/              each design with its best setting, likewise
        trials/NAME/                one folder per trial:
            spec.json               what the trial is; NAME ends in its hash
            dtype.json              its base model, and the dtype and device in which it was computed
            training/checkpoint-N/  the trainer's own checkpoints while it trains
            training/step-N/        the encoder at each milestone, kept
            train.json              losses, seconds; exists only when training is finished
            scores/step-N/TASK.parquet    rows of the long table, one file per task
            scores/ladder-X/TASK.parquet  the rungs of the baseline's dilution ladder; ladder.json: their noise
            layers.json             attention over the layers at the last step, for heads that attend to layers
            work.json               texts asked for, encoded and reused; peak memory of the device
            log.txt                 what libraries printed
            done                    exists only while nothing is missing
            failed.json             why the trial stopped, if it did

Every file is written whole or not at all, so that a run which was killed continues with what is missing. JSON and
Parquet files contain their own checksum (`files.seal`); `study.records` has the types of the JSON files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolwise.errors import CheckpointError, StudyError
from poolwise.files import BLANK, atomic_path, is_sealed, read_json, safe_name, seal, whole_number
from poolwise.study import records
from poolwise.study.pooling_spec import is_own
from poolwise.study.study import Study, content_hash

if TYPE_CHECKING:
    import pyarrow as pa

    from poolwise.data.tasks import Task


# Files of a study's folder.
STUDY = "study.json"
TRIALS = "trials.json"
RESULTS = "results.parquet"
LOOKS = "looks.json"
COSTS = "costs.json"
VERSIONS = "versions.json"
# Files of a trial's folder.
SPEC = "spec.json"
DTYPE = "dtype.json"
TRAINED = "train.json"
LADDER = "ladder.json"
LAYERS = "layers.json"
WORK = "work.json"
LOG = "log.txt"
DONE = "done"
FAILED = "failed.json"

GROWS = ("designs", "base_models", "seeds", "tasks", "references", "controls")
"""Fields that may grow after the first run; any other change would alter the comparison."""
NAMING = ("name", "output", "grid")
"""Fields without bearing on results: `grid` is spelled out as designs."""


def trial(study: Path, name: str) -> Path:
    """The folder of a trial in the folder of its study."""
    return study / "trials" / name


def study_of(trial: Path) -> Path:
    """The folder of the study that a trial's folder belongs to."""
    return trial.parents[1]


def in_trials(study: Path, name: str) -> list[Path]:
    """The files called `name` in the folders of a study's trials, sorted by trial."""
    return sorted((study / "trials").glob(f"*/{name}"))


def study_in(source: Study | str | Path) -> tuple[Study, str | None]:
    """The study that `source` names, and the name of a trial if it names one."""
    if isinstance(source, Study):
        return source, None
    path = Path(source)
    if path.suffix == ".toml":
        return Study.load(path), None
    for folder, only in ((path, None), (study_of(path.resolve()), path.name)):
        if (folder / STUDY).is_file():
            return open_folder(folder), only
    raise CheckpointError(f"{path}: neither a study file nor the folder of a study's runs or of a trial")


def trial_in(model: Path) -> Path:
    """The folder of the one trained design if `model` is a study's run folder; any other path as it is."""
    if not (model / STUDY).is_file():
        return model
    rows = records.read(model / TRIALS, records.Trials, "`poolwise run` writes it again").trials
    designs = [trial(model, row.name) for row in rows if row.role == "design"]
    folders = [folder for folder in designs if (folder / DONE).exists()]
    if len(folders) != 1:
        each = "".join(f"\n  - {folder}" for folder in folders)
        which = f"give one of them:{each}" if folders else "run it first"
        raise CheckpointError(f"{model} is the run folder of a study with {len(folders)} trained designs; {which}")
    return folders[0]


def arm(study: Path, name: str, setting: str) -> Path:
    """The folder of one part of a study that tunes: of its `search`, or `tuned` with the best setting."""
    return study.resolve() / name / setting


def find_log(study: Path, name: str) -> Path | None:
    """The log of a trial of a study or of its search, by name; None if it has none."""
    places = [study, *study.glob("search/*"), *study.glob("tuned/*")]
    return next((path for place in places if (path := trial(place, name) / LOG).exists()), None)


def prepared(study: Path, shard: int = 1) -> Path:
    """Where the preparation of a run leaves memory-mapped data for its workers. Each shard has a folder of its own."""
    return study / f"prepared-{shard}"


def all_prepared(study: Path) -> list[Path]:
    """What `prepared` names, for every shard: left behind by runs that were killed, or in use by shards beside this."""
    return sorted(study.glob("prepared-*"))


def frozen(study: Path, key: str) -> Path:
    """Hidden states of an untuned base, for all trials in which `key` agrees."""
    return study / "frozen" / key


def unfinished_frozen(study: Path) -> list[Path]:
    """Files of frozen states that are being written, or were when their process was killed."""
    return list((study / "frozen").glob("*/.*.tmp"))


def lock(study: Path, shard: int | None = None) -> Path:
    """The file that a whole run locks, or one shard of a run."""
    return study / (".lock" if shard is None else f".lock-{shard}")


def training(trial: Path) -> Path:
    """Where a trial trains: checkpoints while it does, milestones for good."""
    return trial / "training"


def milestone(trial: Path, step: int) -> Path:
    """The encoder of a trial after `step` steps."""
    return at_step(training(trial), step)


def at_step(training: Path, step: int) -> Path:
    """The encoder after `step` steps, in the folder in which it is trained."""
    return training / f"step-{step}"


def checkpoint(training: Path, step: int) -> Path:
    """The trainer's checkpoint of a step; the name is that of transformers' trainer."""
    return training / f"checkpoint-{step}"


def checkpoints(training: Path) -> dict[int, Path]:
    """All checkpoints by step, whole or not."""
    steps = {path: whole_number(path.name.removeprefix("checkpoint-")) for path in training.glob("checkpoint-*")}
    return {step: path for path, step in steps.items() if step is not None}  # not "checkpoint-2.bak" of the user's


def has_results(trial: Path) -> bool:
    """Whether a trial left a checkpoint, a milestone or scores: anything that its device and dtype went into."""
    return any(any((trial / name).glob("*-*")) for name in ("training", "scores"))


def scored_at(step: int | str) -> str:
    """The name of the scores of a milestone ("*": of all), beside those of the ladder's rungs."""
    return f"step-{step}"


def score_file(trial: Path, scored: str, task: Task) -> Path:
    """Where the scores of a task lie. `scored`: `scored_at(step)` or a rung of the ladder.

    The name changes with the task's content, splits and subsets, so that scores on an edited task are not reused; it
    holds the task's own name too, since two names may be equal once made safe.
    """
    content = [task.name, task.identity, task.splits, task.subsets]
    return trial / "scores" / scored / f"{safe_name(task.name)}-{content_hash(content, 8)}.parquet"


def score_files(trial: Path, scored: str = "*") -> list[Path]:
    """The score files of a trial, those of the ladder included."""
    return sorted(trial.glob(f"scores/{scored}/*.parquet"))


def write_scores(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of the long table as sealed Parquet; the file appears whole or not at all."""
    import pyarrow as pa

    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_table(path, pa.table({name: [row.get(name) for row in rows] for name in columns}))


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Write a table as sealed Parquet: the seal is an entry of its metadata, and covers pages and footer.

    options: of pyarrow's ParquetWriter.
    """
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        with pq.ParquetWriter(temporary, table.schema, compression="zstd", **options) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"checksum": BLANK})
        seal(temporary)


def read_scores(path: Path) -> pa.Table | None:
    """The rows of a score file; None where it is missing or damaged, so that its task is scored again."""
    try:
        return read_table(path, "")
    except CheckpointError:
        return None


def read_table(path: Path, fix: str) -> pa.Table:
    """The table in a file of `write_table`. Raises CheckpointError, ending with the fix, if it is not what was written.

    Nothing of a file is decoded before its checksum agrees.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        data = path.read_bytes()
        if not is_sealed(data):
            raise CheckpointError(f"{path} is damaged (its checksum is missing or differs); {fix}")
        table = pq.read_table(pa.BufferReader(data))
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).splitlines()[0]}); {fix}") from None
    return table.replace_schema_metadata()


def stored_costs(study: Study, folder: Path | None = None) -> list[dict[str, Any]]:
    """The rows of `poolwise.pooling.cost.base_costs` of the study's designs and base models, as a run stored them.

    folder: that of the study's runs. Empty if the file is missing or damaged, or lacks one of the rows.
    """
    found = records.find((folder or study.folder) / COSTS, records.Costs)
    known = {(row.base, row.design): row.model_dump() for row in found.designs} if found else {}
    wanted = [(name, design.name) for name in study.bases for design in study.designs]
    return [known[key] for key in wanted] if known.keys() >= set(wanted) else []


def open_study(path: str | Path) -> Study:
    """The study of a file, to read its results: poolings of the user's own are known by name, and not imported."""
    raw = Study.read(path)
    where, base_dir = str(path), Path(path).resolve().parent
    axes = raw.get("grid")
    listed = axes.get("pooling") if isinstance(axes, dict) else None
    if any(isinstance(name, str) and is_own(name) for name in (listed if isinstance(listed, list) else [listed])):
        # which arguments of the grid such a pooling takes, only its code knows; the first run has spelled it out
        plain = Study.parse(
            {**raw, "grid": {}, "designs": [{"preset": "m1"}], "baseline": "m1"}, base_dir, where, False
        )
        raw = {**raw, "grid": {}, "designs": written(plain.folder)["designs"]}
    return Study.parse(raw, base_dir, where, code=False)


def open_folder(folder: Path) -> Study:
    """The study in a run folder, which has no say in what code is imported: that is for the user's own study file."""
    raw = {**written(folder), "output": str(folder.resolve()), "grid": {}}
    study = Study.parse(raw, Path.cwd(), str(folder / STUDY), code=False)
    return study.model_copy(update={"allow_code": False})


def written(folder: Path) -> dict[str, Any]:
    """The study as it was started, from its run folder. Raises CheckpointError if that is missing or damaged."""
    path = folder / STUDY
    fix = "restore it, or delete it, and `poolwise run` writes the study as it is now"
    try:
        return read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"nothing has run in {folder} yet; start with `poolwise run`") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({records.reason(error)}); {fix}") from None


def guard(study: Study) -> None:
    """Raise StudyError if the study is no longer the one whose results are in its folder. `GROWS` may have grown."""
    path = study.folder / STUDY
    if not path.exists():
        return
    # Fields that a later version added get their defaults. Code that the folder names is not imported.
    before_study = Study.parse({**written(study.folder), "grid": {}}, study.base_dir, str(path), code=False)
    old = before_study.model_dump(mode="json")
    new = study.model_dump(mode="json")
    problems = []
    for key in dict.fromkeys([*old, *new]):
        if key in GROWS or key in NAMING or (key == "tuning" and old.get(key) is None):
            continue
        before: Any = old.get(key)
        after: Any = new.get(key)
        if key == "recipe":
            fields = [f for f in {**before, **after} if f not in {"base_model", "report_to", "save_steps"}]
            changed = [(f"recipe.{f}", before.get(f), after.get(f)) for f in fields if before.get(f) != after.get(f)]
        else:
            changed = [(key, before, after)] if before != after else []
        problems += [f"{name} was {b!r} and is now {a!r}" for name, b, a in changed]
    if gone := [name for name in before_study.bases if name not in study.bases]:
        problems.append(f"the base model was {', '.join(gone)} and is now {', '.join(study.bases)}")
    now = {design["name"]: design for design in new["designs"]}
    for design in old["designs"]:
        name = design["name"]
        if name in now and now[name] != design:
            problems.append(f"design {name!r} has changed; give the new one another name")
    if problems:
        problems.append(f"restore this, or choose another name or output, or delete {study.folder} to start over")
        raise StudyError(problems, f"the study changed under the run in {study.folder}")


def layer_attention(study: Study, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The attention of finished trials over layers: the number of `texts`, and `runs`: design -> seed -> (L,) shares.

    rows: the trials. Only those of designs that attend to layers have it; designs on several base models are listed
    separately.
    """
    shares: dict[str, dict[int, list[float]]] = {}
    texts = 0
    for row in rows:
        path = trial(study.folder, row["name"]) / LAYERS
        if row["role"] == "design" and path.exists():
            content = records.read(path, records.LayerShares, "`poolwise run` computes it again")
            name = f"{row['label']} on {row['base']}" if len(study.bases) > 1 else row["label"]
            shares.setdefault(name, {})[row["seed"]] = content.attention
            texts = content.texts
    return {"texts": texts, "runs": shares}
