"""The recipe: all that is held equal between the designs of a study; and the grid of `[tuning]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    pass


SeedPart = Literal["init", "order", "dropout", "data"]


def to_tuple(value: object) -> object:
    """A list as TOML reads it becomes a tuple, which cannot be changed."""
    return tuple(value) if isinstance(value, list) else value


class Strict(BaseModel):
    """A table of the study file: no unknown field, no silent conversion, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Source(Strict):
    """One set of training pairs: a Hub name, a file or a folder."""

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    split: str = "train"


class Lora(Strict):
    """Low-rank adapters on the backbone (Hu et al., arXiv 2106.09685), through PEFT."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    target: str | Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = "all-linear"


class Recipe(Strict):
    """All that is held equal between the designs of a study. A design cannot override any of it."""

    base_model: str = Field(default="nano", min_length=1)
    dataset: str | None = None
    sources: Annotated[tuple[Source, ...], BeforeValidator(to_tuple)] = ()
    one_source_batches: bool = False
    steps: int = Field(default=1000, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0)
    head_learning_rate: float = Field(default=1e-5, gt=0)
    seed_varies: Annotated[tuple[SeedPart, ...], BeforeValidator(to_tuple)] = ("init", "order", "dropout", "data")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=64, ge=2)
    mini_batch_size: int = Field(default=0, ge=0)
    accumulation: int = Field(default=1, ge=1)
    negatives: int = Field(default=1, ge=0)
    loss: Literal["infonce", "symmetric_infonce"] = "infonce"
    temperature: float = Field(default=0.05, gt=0)
    matryoshka: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(to_tuple)] = ()
    guide: str | None = None
    guide_margin: float = 0.0
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
    report_to: Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = ()
    lora: Lora | Literal[False] | Literal["full"] = Field(default_factory=Lora)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dataset is not None and self.sources:
            raise ValueError("give either dataset or sources, not both")
        if self.batch_size % self.accumulation or self.part_size < 2:
            raise ValueError(
                f"accumulation = {self.accumulation}: batch_size {self.batch_size} must split into equal parts of "
                "two queries or more each"
            )
        if self.mini_batch_size > self.part_size:
            of = "batch_size" if self.accumulation == 1 else "batch_size / accumulation ="
            raise ValueError(f"mini_batch_size {self.mini_batch_size} is larger than {of} {self.part_size}")
        if len(set(self.matryoshka)) != len(self.matryoshka):
            raise ValueError(f"matryoshka = {list(self.matryoshka)}: give each width once")
        if self.guide is not None and self.negatives > 1:
            raise ValueError(f"negatives = {self.negatives}: with a guide at most one hard negative is possible")
        if self.guide is not None and self.loss != "infonce":
            raise ValueError(f"loss = {self.loss!r}: a guide filters infonce only")
        if self.guide is None and self.guide_margin:
            raise ValueError("guide_margin says how far a guide's similarity may go: name a guide")
        return self

    @property
    def part_size(self) -> int:
        """Queries whose documents are told from each other: a step's, or one part's where gradients are accumulated."""
        return self.batch_size // self.accumulation

    @property
    def data_sources(self) -> tuple[Source, ...]:
        """The training sets: `sources`, or the one `dataset` (default: the built-in `demo` pairs)."""
        return self.sources or (Source(path=self.dataset or "demo"),)


Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(to_tuple)]


class Tuning(Strict):
    """A grid of settings and the development tasks on which each design's best one is chosen."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = Field(min_length=1)
    learning_rate: Rates = ()
    head_learning_rate: Rates = ()
    steps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(to_tuple)] = ()
    seed: int = Field(default=2000, ge=0)

    def problems(self, tasks: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """What is wrong with it in a study of these tasks and seeds."""
        found = []
        if both := [name for name in self.tasks if name in tasks]:
            found.append(
                f"tuning.tasks: {', '.join(both)} would be reported too; tune on tasks that are not among tasks"
            )
        if self.seed in seeds:
            found.append(f"tuning.seed = {self.seed} is one of seeds: a run that was chosen must not be reported")
        if max(len(self.learning_rate), len(self.head_learning_rate), len(self.steps)) < 2:
            found.append("tuning: one setting is no search; list values of learning_rate, head_learning_rate or steps")
        for name in ("tasks", "learning_rate", "head_learning_rate", "steps"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                found.append(f"tuning.{name} = {list(getattr(self, name))}: give each value once")
        return found


@dataclass(frozen=True, order=True)
class Setting:
    """One point of the grid."""

    learning_rate: float
    head_learning_rate: float
    steps: int

    @property
    def name(self) -> str:
        """For a folder."""
        return f"lr-{self.learning_rate:g}-head-{self.head_learning_rate:g}-steps-{self.steps}"

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with this setting."""
        return recipe.model_copy(update=vars(self))


def own_setting(recipe: Recipe) -> Setting:
    """The setting that a recipe has."""
    return Setting(recipe.learning_rate, recipe.head_learning_rate, recipe.steps)


def settings(tuning: Tuning, recipe: Recipe, has_head: bool = True) -> list[Setting]:
    """All points of the grid, what is not listed as in the recipe; without a head its rate makes no difference, so its
    first value stands for all."""
    heads = tuning.head_learning_rate or (recipe.head_learning_rate,)
    axes = (tuning.learning_rate or (recipe.learning_rate,), heads if has_head else heads[:1])
    return [Setting(*point) for point in product(*axes, tuning.steps or (recipe.steps,))]
