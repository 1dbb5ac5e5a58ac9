"""The study file: the designs to compare, the recipe that they share, the tasks and the seeds.

TOML in, frozen pydantic objects out. All mistakes are reported at once, each with its path, its value, what is allowed
and the nearest valid name. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator

from poolwise.errors import StudyError, explain, name_problem, redact, secrets_in, short, suggest
from poolwise.files import LONGEST_NAME, MOST_TOML_BYTES, parse_toml, read_bytes, safe_name, user_path
from poolwise.study.catalogue import TASK_TYPES
from poolwise.study.design import MOST_DESIGNS, Design, expand
from poolwise.study.pooling_spec import allowing_code, code_by_name, find_own, is_own
from poolwise.study.recipe import Lora, Recipe, Source, Strict, Tuning, to_tuple

MOST_SEEDS = 1000
MOST_TRAININGS = 20_000
LARGEST_SEED = 2_000_000_000
"""Of numbers that derive from a seed the largest still fits 32 bits, as NumPy wants it."""


def _seeds(value: object) -> object:
    """`seeds = 3` means 0, 1, 2."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(
                f"seeds = {short(value)}: give the number of seeds, 1 or more, or a list such as [0, 1, 2]"
            )
        if value > MOST_SEEDS:
            raise ValueError(f"seeds = {short(value)}: at most {MOST_SEEDS:,} seeds")
        return tuple(range(value))
    return to_tuple(value)


def _load_code(raw: dict[str, Any]) -> None:
    """Import the users' poolings that a study names in its designs or its grid."""
    designs, axes = raw.get("designs"), raw.get("grid")
    named = [d.get("pooling") for d in designs if isinstance(d, dict)] if isinstance(designs, list) else []
    listed = axes.get("pooling") if isinstance(axes, dict) else ()
    for pooling in [*named, *(listed if isinstance(listed, list | tuple) else [listed])]:
        if isinstance(pooling, str) and is_own(pooling):
            find_own(pooling)


def _missing_baseline(baseline: object, names: list[str]) -> list[str]:
    if not names or baseline in names:
        return []
    return [f"baseline = {baseline!r} is not among the designs; allowed: {', '.join(names)}{suggest(baseline, names)}"]


def _axes(value: Any) -> Any:
    """`latents = 16` is a list of one."""
    if not isinstance(value, dict):
        return value
    return {name: to_tuple(found) if isinstance(found, list | tuple) else (found,) for name, found in value.items()}


def _valid_designs(raw_designs: object) -> list[Design]:
    """The designs of the file that have no mistake."""
    found = []
    for raw in raw_designs if isinstance(raw_designs, list | tuple) else ():
        with contextlib.suppress(ValidationError):
            found.append(Design.model_validate(raw))
    return found


def _names(raw_designs: object) -> list[str]:
    """The names of all designs in the file, valid or not."""
    found = []
    for raw in raw_designs if isinstance(raw_designs, list) else []:
        if isinstance(raw, dict):
            name = raw.get("name", raw.get("preset", f"{raw.get('pooling')}-{raw.get('attention')}"))
            found.append(str(name))
    return found


class Study(Strict):
    """A controlled comparison: every design trained once per seed under one recipe and scored on the same tasks."""

    name: str = Field(max_length=LONGEST_NAME, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    baseline: str = "m1"
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, le=LARGEST_SEED)], ...], BeforeValidator(_seeds), Field(max_length=MOST_SEEDS)
    ] = (0, 1, 2)
    tasks: Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = ()
    base_models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(to_tuple)] = ()
    references: Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = ("untuned", "tfidf", "bm25")
    controls: bool = True
    evaluate_at: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(to_tuple)] = (
        0.25,
        0.5,
        1.0,
    )
    margin: float = Field(default=0.005, gt=0, lt=1)
    extend_to: int | None = Field(default=None, le=MOST_SEEDS)
    type_weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    output: str | None = None
    allow_code: bool = False
    recipe: Recipe = Field(default_factory=Recipe)
    designs: Annotated[tuple[Design, ...], BeforeValidator(to_tuple)] = Field(min_length=1, max_length=MOST_DESIGNS)
    tuning: Tuning | None = None
    grid: Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_axes)] = Field(default_factory=dict)

    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)
    _where: str = PrivateAttr("study")

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, raw: Any) -> Any:
        """Refuse secrets: the study is copied into its run folder, its reports and its checkpoints."""
        text = repr(raw) if isinstance(raw, dict) else ""
        if redact(text, environment=False) != text:
            raise ValueError("a Hugging Face token (hf_…) stands in the study; give it as HF_TOKEN in the environment")
        if named := [name for name, value in secrets_in(os.environ).items() if value in text]:
            raise ValueError(f"the study contains the value of the environment variable {named[0]}; remove it there")
        return raw

    @field_validator("tasks", "base_models", "references")
    @classmethod
    def _visible(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        problems = [f"{short(name)} {problem}" for name in names if (problem := name_problem(name))]
        if problems:
            raise ValueError("\n".join(problems))
        return names

    @model_validator(mode="before")
    @classmethod
    def _with_grid(cls, raw: Any) -> Any:
        """Append the designs of the grid to those that are listed."""
        if not isinstance(raw, dict) or not isinstance(raw.get("grid"), dict) or not raw["grid"]:
            return raw
        listed = raw.get("designs") or ()
        if not isinstance(listed, list | tuple) or len(listed) > MOST_DESIGNS:
            return raw  # the field itself is refused
        expansion = expand(_axes(raw["grid"]), _valid_designs(listed))
        return raw if expansion.mistakes else {**raw, "designs": [*listed, *expansion.designs]}

    @field_validator("grid")
    @classmethod
    def _sensible_grid(cls, axes: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        if axes and (mistakes := expand(axes, ()).mistakes):
            raise ValueError("\n".join(mistakes))
        return axes

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        names = [design.name for design in self.designs]
        for name in sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"designs: the name {name!r} is used {names.count(name)} times; give each design its own")
        problems += _names_taken(names, self.references)
        problems += _missing_baseline(self.baseline, names)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            problems.append(f"seeds = {list(self.seeds)}: give at least one seed, each once")
        if self.extend_to is not None and self.extend_to <= len(self.seeds):
            problems.append(
                f"extend_to = {self.extend_to}: must be more than the {len(self.seeds)} seeds of the first look"
            )
        for kind in self.type_weights or ():
            if kind not in TASK_TYPES:
                allowed = ", ".join(TASK_TYPES)
                problems.append(
                    f"type_weights.{kind} is not a task type; allowed: {allowed}{suggest(kind, TASK_TYPES)}"
                )
        if 1.0 not in self.evaluate_at:
            problems.append(f"evaluate_at = {list(self.evaluate_at)} must contain 1.0, the end of the training")
        if len(set(self.tasks)) != len(self.tasks):
            problems.append("tasks: a task is listed twice")
        if len(set(self.base_models)) != len(self.base_models):
            problems.append(f"base_models = {list(self.base_models)}: give each base model once")
        trainings = len(self.all_seeds) * len(self.designs) * len(self.bases)
        if trainings > MOST_TRAININGS:
            problems.append(
                f"{len(self.designs):,} designs × {len(self.all_seeds):,} seeds × {len(self.bases):,} base models are "
                f"{trainings:,} trainings; at most {MOST_TRAININGS:,}"
            )
        if self.tuning:
            problems += self.tuning.problems(self.tasks, self.all_seeds)
        if self.base_models and self.recipe.base_model != Recipe.model_fields["base_model"].default:
            problems.append("give either base_models or recipe.base_model, not both")
        code = [design.pooling for design in self.designs if is_own(design.pooling)]
        if code and not self.allow_code:
            problems.append(f"designs: {code[0]} is your own code; set allow_code = true to permit its import")
        prompted = self.recipe.query_prompt or self.recipe.document_prompt or self.recipe.prompts
        for design in self.designs:
            if "prefix" in design.attention and design.template == "plain" and not prompted:
                problems.append(
                    f"designs: {design.name} has attention = {design.attention!r}, but the recipe has no prompt to be "
                    "the prefix; give recipe.query_prompt or document_prompt, or another attention"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read a study file; relative paths in it are relative to its folder.

        Raises StudyError with every mistake in the file.
        """
        raw = cls.read(path)
        return cls.parse(raw, base_dir=Path(path).resolve().parent, where=str(path))

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """The plain dictionaries of a study file, not validated yet. Raises StudyError."""
        path, data = Path(path), b""
        try:
            data = read_bytes(path, MOST_TOML_BYTES)
            return parse_toml(data)
        except FileNotFoundError:
            near = suggest(path.name, [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else [])
            raise StudyError([f"no such file{near} Make one with `poolwise init demo`"], str(path)) from None
        except OSError as error:
            raise StudyError([f"cannot be read: {error}"], str(path)) from None
        except ValueError as error:
            raise StudyError([f"is not valid TOML: {error}{_line_of(error, data)}"], str(path)) from None

    @classmethod
    def parse(cls, raw: dict[str, Any], base_dir: Path | None = None, where: str = "study", code: bool = True) -> Study:
        """Validate a study given as plain dictionaries, as TOML reads them.

        code: import the poolings of the user's own that it names, if it has `allow_code = true`. False, for a study
        that is only read or that lies in a run folder: they are known by name, and a grid must not name them.
        """
        allowed = code and raw.get("allow_code") is True
        try:
            with allowing_code(allowed, base_dir) if code else code_by_name():
                _load_code(raw if allowed else {})
                study = cls.model_validate(raw)
        except StudyError as error:
            raise StudyError(error.problems, where) from None
        except ValidationError as error:
            problems = explain(error, _MODELS)
            if any(line.startswith("grid") for line in problems):  # the designs seem too few only without the grid's
                problems = [line for line in problems if not line.startswith(("designs = ", "designs is missing"))]
            if not any(line.startswith("baseline") for line in problems):  # pydantic stops before it compares fields
                problems += _missing_baseline(raw.get("baseline", "m1"), _names(raw.get("designs")))
            raise StudyError(problems, where) from None
        study._base_dir, study._where = base_dir or Path.cwd(), where
        return study

    def load_code(self) -> None:
        """Import the users' poolings, in a process that received this study from another one."""
        with allowing_code(self.allow_code, self.base_dir):
            for design in self.designs:
                if is_own(design.pooling):
                    find_own(design.pooling)

    @property
    def base_dir(self) -> Path:
        """The folder that paths in the study are relative to."""
        return self._base_dir

    @property
    def folder(self) -> Path:
        """The run folder: `output`, or `runs/NAME` beside the study file. A run that an earlier version left in the
        working directory is used where it is."""
        if self.output:
            return user_path(self.output, self._base_dir)
        return Path("runs", self.name).resolve() if self._at_old_place else self._base_dir / "runs" / self.name

    @property
    def _at_old_place(self) -> bool:
        beside, old = self._base_dir / "runs" / self.name, Path("runs", self.name)
        return not self.output and not beside.is_dir() and old.is_dir()

    @property
    def place(self) -> str:
        """Where the results are, for the user: the absolute path, and why it is not the usual one."""
        why = " (found in the working directory; new runs lie beside the study file)" if self._at_old_place else ""
        return f"results in {self.folder.resolve()}{why}"

    @property
    def bases(self) -> tuple[str, ...]:
        """The base models: `base_models`, or the one of the recipe."""
        return self.base_models or (self.recipe.base_model,)

    def on_base(self, name: str) -> Study:
        """The same study on one of its base models."""
        recipe = self.recipe.model_copy(update={"base_model": name})
        return self.model_copy(update={"recipe": recipe, "base_models": ()})

    @property
    def grid_notes(self) -> list[str]:
        """A line for each combination of the grid that is invalid or already listed as a design."""
        return expand(self.grid, self.designs).left_out if self.grid else []

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The planned seeds, then the next numbers up to `extend_to` seeds if an extension is declared."""
        more = range((self.extend_to or 0) - len(self.seeds))
        return self.seeds + tuple(max(self.seeds) + 1 + i for i in more)

    def extended(self) -> Study:
        """The same study with the seeds of its declared extension. Raises StudyError if none is declared."""
        if self.extend_to is None:
            raise StudyError(
                ["no extension is declared, and seeds added after a look make a verdict exploratory: write "
                 "`extend_to = 5` into the file before the first run"],
                self._where,
            )  # fmt: skip
        return self.model_copy(update={"seeds": self.all_seeds})

    @property
    def fingerprint(self) -> str:
        """Hash of everything that affects results: all but the name, the output folder and the trackers."""
        content = self.model_dump(
            mode="json", exclude={"name": True, "output": True, "grid": True, "recipe": {"report_to": True}}
        )
        return content_hash(content)

    def design(self, name: str) -> Design:
        """The design of that name. Raises StudyError with the nearest guess."""
        for design in self.designs:
            if design.name == name:
                return design
        names = [design.name for design in self.designs]
        problem = f"design {name!r} is not in this study; it has {', '.join(names)}{suggest(name, names)}"
        raise StudyError([problem], self._where)


def _line_of(error: ValueError, data: bytes) -> str:
    """The line that a TOML error is about, if its message gives the number."""
    found = re.search(r"at line (\d+)", str(error))
    lines = data.decode("utf-8", "replace").splitlines()
    return f"\n      {lines[int(found[1]) - 1].strip()}" if found and int(found[1]) <= len(lines) else ""


def _names_taken(names: Sequence[str], references: Sequence[str]) -> list[str]:
    """A line for each name that belongs to a control arm or a reference, and for each two that would share a folder."""
    taken = {"broken", *references, *(f"{name}{end}" for name in names for end in ("-aa", "-untuned"))}
    problems = [
        f"designs: the name {name!r} is reserved for a control arm or a reference; give the design another"
        for name in dict.fromkeys(names)
        if name in taken or name.startswith("ladder-")
    ]
    folders: dict[str, str] = {}
    for name in dict.fromkeys(names):
        other = folders.setdefault(safe_name(name), name)
        if other != name:
            problems.append(
                f"designs: the names {other!r} and {name!r} differ only in characters that are replaced in folder names"
            )
    return problems


def content_hash(content: Any, length: int = 16) -> str:
    """Hash of JSON-able content, independent of key order."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


_MODELS: dict[str, type[BaseModel]] = {
    "": Study,
    "recipe": Recipe,
    "recipe.lora": Lora,
    "recipe.sources": Source,
    "designs": Design,
    "tuning": Tuning,
}
