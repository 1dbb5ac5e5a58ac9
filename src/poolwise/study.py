"""The study file: what is compared (designs), what is held equal (recipe), on what (tasks), how often (seeds).

TOML in, frozen pydantic objects out. All mistakes are reported at once, each with its path, its value, what is
allowed and the nearest guess. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from poolwise import designs as catalogue
from poolwise.errors import StudyError, suggest
from poolwise.mistakes import explain

Attention = Literal["causal", "bidirectional"]
SeedPart = Literal["init", "order", "dropout", "data"]


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _seeds(value: object) -> object:
    """`seeds = 3` means 0, 1, 2."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return tuple(range(value))
    return _tuple(value)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Source(_Strict):
    """One set of training pairs: a Hub name, a file or a folder."""

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    split: str = "train"


class Lora(_Strict):
    """Low-rank adapters on the backbone (Hu et al., arXiv 2106.09685), through PEFT."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    target: str | Annotated[tuple[str, ...], BeforeValidator(_tuple)] = "all-linear"


class Recipe(_Strict):
    """All that is held equal between the designs of a study. A design cannot override any of it."""

    base_model: str = Field(default="nano", min_length=1)
    dataset: str | None = None
    sources: Annotated[tuple[Source, ...], BeforeValidator(_tuple)] = ()
    one_source_batches: bool = False
    steps: int = Field(default=1000, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0)
    head_learning_rate: float = Field(default=1e-5, gt=0)
    seed_varies: Annotated[tuple[SeedPart, ...], BeforeValidator(_tuple)] = ("init", "order", "dropout", "data")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=64, ge=2)
    mini_batch_size: int = Field(default=0, ge=0)
    negatives: int = Field(default=1, ge=0)
    loss: Literal["infonce", "symmetric_infonce"] = "infonce"
    temperature: float = Field(default=0.05, gt=0)
    max_length: int = Field(default=512, ge=2)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    append_eos: bool = True
    query_prompt: str = ""
    document_prompt: str = ""
    prompts: dict[str, str] = Field(default_factory=dict)
    include_prompt: bool = True
    save_steps: int = Field(default=100, ge=1)
    report_to: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = ()
    lora: Lora | Literal[False] | Literal["full"] = Field(default_factory=Lora)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dataset is not None and self.sources:
            raise ValueError("give either dataset or sources, not both")
        if self.mini_batch_size > self.batch_size:
            raise ValueError(f"mini_batch_size {self.mini_batch_size} is larger than batch_size {self.batch_size}")
        return self

    @property
    def data_sources(self) -> tuple[Source, ...]:
        """The training sets: `sources`, or the one `dataset` (default: the built-in `demo` pairs)."""
        return self.sources or (Source(path=self.dataset or "demo"),)


def _wrong_arguments(pooling: str, given: dict[str, Any]) -> list[str]:
    """One line for each argument that this pooling does not take or that has a value it may not have."""
    known = catalogue.POOLING_ARGS[pooling]
    problems = []
    for name, value in given.items():
        arg = known.get(name)
        if arg is None:
            allowed = f"allowed: {', '.join(known)}{suggest(name, known)}" if known else "it takes none"
            problems.append(f"pooling_args.{name} is not an argument of {pooling}; {allowed}")
        elif value == catalogue.AUTO and arg.default == catalogue.AUTO:
            continue
        elif type(value) is not arg.type:
            also = " or 'auto'" if arg.default == catalogue.AUTO else ""
            problems.append(f"pooling_args.{name} = {value!r}: allowed: {arg.type.__name__}{also} ({arg.help})")
        elif arg.allowed and value not in arg.allowed:
            problems.append(
                f"pooling_args.{name} = {value!r}: allowed: {', '.join(arg.allowed)}{suggest(value, arg.allowed)}"
            )
        elif arg.minimum is not None and isinstance(value, int) and value < arg.minimum:
            problems.append(f"pooling_args.{name} = {value!r}: must be at least {arg.minimum} ({arg.help})")
    return problems


class Design(_Strict):
    """The treatment: which tokens may see which, and how the hidden states become one vector."""

    name: str = Field(min_length=1)
    attention: Attention
    pooling: str
    pooling_args: dict[str, Any] = Field(default_factory=dict)
    preset: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        preset = raw.get("preset")
        if preset is not None:
            known = catalogue.ALIASES.get(preset, preset) if isinstance(preset, str) else preset
            if known not in catalogue.PRESETS:
                allowed = [*catalogue.PRESETS, *catalogue.ALIASES]
                guess = suggest(preset, allowed)
                raise ValueError(f"preset {preset!r} is unknown; allowed: {', '.join(allowed)}{guess}")
            for key, value in catalogue.PRESETS[known].items():
                if key in raw and raw[key] != value:
                    raise ValueError(
                        f"preset {preset!r} sets {key} = {value!r} already; "
                        f"drop the preset to choose attention, pooling and pooling_args yourself"
                    )
                raw[key] = value
            raw.setdefault("name", preset)
        elif "attention" in raw and "pooling" in raw:
            raw.setdefault("name", f"{raw['pooling']}-{raw['attention']}")
        return raw

    @model_validator(mode="after")
    def _known_pooling(self) -> Self:
        if self.pooling not in catalogue.POOLING_ARGS:
            allowed = list(catalogue.POOLING_ARGS)
            raise ValueError(
                f"pooling {self.pooling!r} is unknown; allowed: {', '.join(allowed)}{suggest(self.pooling, allowed)}"
            )
        problems = _wrong_arguments(self.pooling, self.pooling_args)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def factors(self) -> dict[str, Any]:
        """What makes this design: `attention`, `pooling` and every argument of its pooling, defaults filled in."""
        arguments = {name: arg.default for name, arg in catalogue.POOLING_ARGS[self.pooling].items()}
        return {"attention": self.attention, "pooling": self.pooling, **arguments, **self.pooling_args}

    def differs_from(self, other: Design) -> list[str]:
        """The factors in which two designs differ; arguments count only where both poolings take them."""
        mine, theirs = self.factors(), other.factors()
        return [name for name in mine if name in theirs and mine[name] != theirs[name]]


def _missing_baseline(baseline: object, names: list[str]) -> list[str]:
    if not names or baseline in names:
        return []
    return [f"baseline = {baseline!r} is not among the designs; allowed: {', '.join(names)}{suggest(baseline, names)}"]


def _names(raw_designs: object) -> list[str]:
    """The names of designs as written, valid or not."""
    found = []
    for raw in raw_designs if isinstance(raw_designs, list) else []:
        if isinstance(raw, dict):
            name = raw.get("name", raw.get("preset", f"{raw.get('pooling')}-{raw.get('attention')}"))
            found.append(str(name))
    return found


class Study(_Strict):
    """A controlled comparison: every design trained once per seed under one recipe and scored on the same tasks."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    baseline: str = "m1"
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_seeds)] = (0, 1, 2)
    tasks: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = ()
    references: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = ("untuned", "tfidf", "bm25")
    controls: bool = True
    evaluate_at: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(_tuple)] = (0.25, 0.5, 1.0)
    margin: float = Field(default=0.005, gt=0, lt=1)
    output: str | None = None
    recipe: Recipe = Field(default_factory=Recipe)
    designs: Annotated[tuple[Design, ...], BeforeValidator(_tuple)] = Field(min_length=1)

    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        names = [design.name for design in self.designs]
        for name in sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"designs: the name {name!r} is used {names.count(name)} times; give each design its own")
        problems += _missing_baseline(self.baseline, names)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            problems.append(f"seeds = {list(self.seeds)}: give at least one seed, each once")
        if 1.0 not in self.evaluate_at:
            problems.append(f"evaluate_at = {list(self.evaluate_at)} must contain 1.0, the end of the training")
        if len(set(self.tasks)) != len(self.tasks):
            problems.append("tasks: a task is listed twice")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read a study file. Relative paths in it are relative to its folder.

        Raises StudyError with every mistake in the file.
        """
        path = Path(path)
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            near = suggest(path.name, [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else [])
            raise StudyError([f"no such file{near} Make one with `poolwise init demo`"], str(path)) from None
        except (OSError, UnicodeDecodeError) as error:
            raise StudyError([f"cannot be read: {error}"], str(path)) from None
        except tomllib.TOMLDecodeError as error:
            raise StudyError([f"is not valid TOML: {error}"], str(path)) from None
        return cls.parse(raw, base_dir=path.resolve().parent, where=str(path))

    @classmethod
    def parse(cls, raw: dict[str, Any], base_dir: Path | None = None, where: str = "study") -> Study:
        """Validate a study given as plain dictionaries, as TOML reads them."""
        try:
            study = cls.model_validate(raw)
        except ValidationError as error:
            problems = explain(error, _MODELS)
            if not any(line.startswith("baseline") for line in problems):  # other mistakes hide this one from pydantic
                problems += _missing_baseline(raw.get("baseline", "m1"), _names(raw.get("designs")))
            raise StudyError(problems, where) from None
        study._base_dir = base_dir or Path.cwd()
        return study

    @property
    def base_dir(self) -> Path:
        """The folder that relative paths in the study start from."""
        return self._base_dir

    @property
    def folder(self) -> Path:
        """Where the runs go: `output`, or `runs/NAME` in the working directory."""
        return (self._base_dir / self.output) if self.output else Path("runs") / self.name

    @property
    def fingerprint(self) -> str:
        """Hash of everything that bears on results: all but the name, the output folder and the trackers."""
        content = self.model_dump(mode="json", exclude={"name": True, "output": True, "recipe": {"report_to": True}})
        return content_hash(content)

    def design(self, name: str) -> Design:
        """The design of that name. Raises StudyError with the nearest guess."""
        for design in self.designs:
            if design.name == name:
                return design
        names = [design.name for design in self.designs]
        raise StudyError([f"design {name!r} is not in this study; it has {', '.join(names)}{suggest(name, names)}"])


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
}
