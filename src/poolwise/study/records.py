"""What the JSON files of run folders and of saved models hold, as types, and the only functions that read them.

A folder may come from a stranger, from a disk that failed or from an editor: every file is sealed (see `files`), and
its content has the type declared here, or it is not used. What is only a cache, or a remark for the user, is left out
when it is damaged; anything else raises a CheckpointError that names the file and what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from poolwise.errors import CheckpointError, explain, name_problem
from poolwise.files import read_any_json, read_json, safe_name, sha256


def _one_part(name: str) -> str:
    """A name that is joined to a path must not lead out of the folder."""
    if name != safe_name(name) or not name.strip("."):
        raise ValueError("not the name of a file")
    return name


def _visible(name: str) -> str:
    """A name that is printed must not hide anything."""
    if problem := name_problem(name):
        raise ValueError(problem)
    return name


Shown = Annotated[str, AfterValidator(_visible)]
RUN_FILE = "run.json"
CHECKSUMS = "checksums.json"
"""The marker of an exported folder, written last: the hash of every other file."""
FORMAT = 2
UNSEALED = 1
"""The format before files were sealed, which is still read."""
TRUSTED = ("sentence_transformers", "poolwise")
"""Packages whose modules a folder may name in its `modules.json`."""

Name = Annotated[str, Field(max_length=250), AfterValidator(_one_part)]
Seed = Annotated[int, Field(ge=0, le=2**32)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """The content of one file; values are not converted, unknown ones are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class TrialRow(Record):
    """One trial in `trials.json`; `scores`: the names of the score files that count."""

    model_config = ConfigDict(extra="allow")

    name: Name
    label: Shown
    role: Shown
    seed: Seed
    base: str | None
    id: str
    scores: list[Name] = Field(default_factory=list)


class Trials(Record):
    """`trials.json`."""

    trials: list[TrialRow]


class Failed(Record):
    """`failed.json`: why a trial stopped."""

    reason: str


class Computed(Record):
    """`dtype.json`: the base model of a trial, the dtype and the device in which it was computed."""

    base: str
    dtype: str
    device: str


class Work(Record):
    """`work.json`: the counts of `encoding.fast.Counts`, and what else was counted."""

    asked: Count = 0
    encoded: Count = 0
    tokens: Count = 0
    computed: Count = 0
    frozen_asked: Count = 0
    frozen_computed: Count = 0
    peak_memory: Count | None = None


class Ladder(Record):
    """`ladder.json`: the noise of each rung."""

    shares: dict[str, float | None]


class LayerShares(Record):
    """`layers.json`: the attention over layers, and on how many texts."""

    texts: Count
    attention: list[float]


class Trained(Record):
    """`train.json`, which exists only when training is finished."""

    model_config = ConfigDict(extra="allow")

    losses: dict[str, float]
    seconds: float


class Complete(Record):
    """The marker of a checkpoint, written last: seconds of training up to there, and the SHA-256 of every file."""

    seconds: float
    files: dict[str, str]


class LookVerdict(Record):
    """One verdict of a look; see `runs.looks.RECORDED`."""

    model_config = ConfigDict(extra="allow")

    group: Shown
    design: Shown
    verdict: Shown


class Look(Record):
    """One look: which seeds were tested, at what level, when, and what came out."""

    look: Seed
    seeds: Annotated[list[Seed], Field(min_length=1)]
    alpha: float
    taken: str
    verdicts: list[LookVerdict]


class Declared(Record):
    """`looks.json`; see `runs.looks.Plan`."""

    planned: Annotated[list[Seed], Field(min_length=1)]
    extend_to: int | None
    extended: bool
    looks: list[Look]


class Versions(Record):
    """`versions.json`: package -> the versions with which the study ran."""

    packages: dict[Shown, list[Shown]]


class CostRow(Record):
    """The cost of one design on one base model; `runs.costs.base_costs` lists the other fields."""

    model_config = ConfigDict(extra="allow")

    design: str
    base: str
    attention: str
    pooling: str
    base_parameters: Count
    tuned_base_parameters: Count
    head_parameters: Count
    trainable_parameters: Count
    encode_flops: Annotated[int, Field(gt=0)]
    training_flops: Count


class Costs(Record):
    """`costs.json`."""

    designs: list[CostRow]


R = TypeVar("R", bound=Record)


def read(path: Path, record: type[R], fix: str) -> R:
    """The content of a file. Raises CheckpointError, ending with the fix, if it is missing or not what was written."""
    try:
        return record.model_validate(read_json(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {fix}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({reason(error)}); {fix}") from None


def find(path: Path, record: type[R]) -> R | None:
    """The content of a file that can be done without; None if it is missing or not what was written."""
    try:
        return record.model_validate(read_json(path))
    except (OSError, ValueError):
        return None


def reason(error: Exception) -> str:
    """What is wrong with a file, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}" if place else str(first["msg"])
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]


class Base(Record):
    """The base model of a saved encoder, in `run.json`."""

    path: str
    local: bool
    identity: str


class Run(Record):
    """The types in `run.json`; recipe and design are validated by their own classes."""

    model_config = ConfigDict(extra="allow")
    recipe: dict[str, Any]
    design: dict[str, Any]
    seed: int
    base: Base
    files: dict[str, str]
    step: int = 0


class Vectors(Record):
    """The record of kept vectors: `rows` vectors of `width` numbers, the SHA-256 of their bytes, and what they took."""

    model_config = ConfigDict(extra="allow")
    width: int = Field(ge=0)
    rows: int = Field(ge=0)
    seconds: float
    sha256: str


class Exported(Record):
    """The content of `checksums.json`."""

    files: dict[str, str]


def read_run(folder: str | Path) -> dict[str, Any]:
    """The content of a saved folder's `run.json`. Raises CheckpointError if it is missing, damaged or too new."""
    path = Path(folder) / RUN_FILE
    advice = f"delete {folder} and run the study again"
    try:
        run = read_any_json(path)
        found = run.get("format") if isinstance(run, dict) else None
        if type(found) is int and found > FORMAT:
            raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}; upgrade poolwise")
        if found != UNSEALED:
            run = read_json(path)
        checked = Run.model_validate(run)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {RUN_FILE} in it; give a folder that poolwise saved") from None
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged ({'; '.join(explain(error, {'': Run}))}); {advice}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {advice}") from None
    return checked.model_dump()


def verify_files(folder: Path, files: dict[str, str]) -> None:
    """Compare every file with its hash. Raises CheckpointError naming one that is missing or changed."""
    for name, expected in files.items():
        path = folder / name
        if not _is_inside(folder, name):
            raise CheckpointError(f"{path} is missing; delete {folder} and run the study again")
        if sha256(path) != expected:
            raise CheckpointError(f"{path} is damaged (its hash differs); delete {folder} and run the study again")


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a folder has a file of this name, which must not lead out of it."""
    try:
        return (folder / name).is_file() and not Path(name).is_absolute() and ".." not in Path(name).parts
    except (OSError, ValueError):  # a name that no file can have
        return False


def verify_export(folder: Path) -> None:
    """Compare an exported folder with its checksums, if it has any. Raises CheckpointError naming a damaged file."""
    path = folder / CHECKSUMS
    if not path.exists():
        return
    advice = f"export the design again, or delete {CHECKSUMS} if you changed the folder on purpose"
    try:
        files = Exported.model_validate(read_json(path)).files
    except (OSError, ValueError) as error:
        reason = "it does not list the files" if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{path} is damaged ({reason}); {advice}") from None
    for name, expected in files.items():
        if name == "README.md":  # a model card is meant to be edited
            continue
        if not _is_inside(folder, name):
            raise CheckpointError(f"{folder / name} is missing; {advice}")
        if sha256(folder / name) != expected:
            raise CheckpointError(f"{folder / name} is damaged or changed (its hash differs); {advice}")


def check_modules(folder: Path) -> list[dict[str, str]]:
    """The content of a folder's `modules.json`, empty if it has none. Raises CheckpointError for a class of another
    package than `TRUSTED`: sentence-transformers would import it."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = read_any_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    fields = ("type", "path")
    if (
        not isinstance(modules, list)
        or not modules
        or not all(
            isinstance(module, dict) and all(isinstance(module.get(name), str) for name in fields) for module in modules
        )
    ):
        raise CheckpointError(f"{path}: expected a list of modules, each with a type and a path")
    for module in modules:
        if module["type"].partition(".")[0] not in TRUSTED:
            raise CheckpointError(
                f"{path}: the class {module['type']!r} is code of another package, which is not imported; allowed: "
                f"classes of {' and '.join(TRUSTED)}. Load such a model in Python, "
                "SentenceTransformer(folder, trust_remote_code=True), and give the object to poolwise.evaluate"
            )
    return modules
