"""The recipe, which is the same for all designs of a study, and the search grid of `[tuning]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_STEPS = 100_000_000
MOST_ROWS = 1 << 28
"""Rows of training data in the order of one seed, which are planned beforehand: 2 GiB."""
INSTRUCTION = "{instruction}"
"""In a prompt: where the instruction of the task goes, if `evaluation_prompts` is "mteb"."""
SeedPart = Literal["init", "order", "dropout", "data"]


def to_tuple(value: object) -> object:
    """A list, as TOML has it, becomes a tuple, which is immutable."""
    return tuple(value) if isinstance(value, list) else value


class Strict(BaseModel):
    """A table of the study file: unknown fields are errors, values are not converted, objects are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Source(Strict):
    """One set of training pairs: a file, a folder or a dataset on the Hub."""

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    split: str = "train"


class Lora(Strict):
    """Low-rank adapters on the backbone (Hu et al., arXiv 2106.09685), through PEFT."""

    rank: int = Field(default=16, ge=1, le=16_384)
    alpha: int = Field(default=32, ge=1, le=1_000_000)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    target: str | Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = "all-linear"


class Recipe(Strict):
    """Everything that is the same for all designs of a study. A design cannot override any of it."""

    base_model: str = Field(default="nano", min_length=1)
    dataset: str | None = None
    sources: Annotated[tuple[Source, ...], BeforeValidator(to_tuple)] = ()
    decontaminate: Literal["queries", "all", False] = "queries"
    one_source_batches: bool = False
    steps: int = Field(default=1000, ge=1, le=MOST_STEPS)
    learning_rate: float = Field(default=1e-5, gt=0)
    head_learning_rate: float = Field(default=1e-5, gt=0)
    seed_varies: Annotated[tuple[SeedPart, ...], BeforeValidator(to_tuple)] = ("init", "order", "dropout", "data")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(default=100, ge=0, le=MOST_STEPS)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=64, ge=2, le=1_000_000)
    mini_batch_size: int = Field(default=0, ge=0, le=1_000_000)
    accumulation: int = Field(default=1, ge=1)
    negatives: int = Field(default=1, ge=0, le=1000)
    loss: Literal["infonce", "symmetric_infonce"] = "infonce"
    temperature: float = Field(default=0.05, gt=0)
    matryoshka: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], BeforeValidator(to_tuple)] = ()
    guide: str | None = None
    guide_margin: float = 0.0
    max_length: int = Field(default=512, ge=2, le=10_000_000)
    evaluation_max_length: int = Field(default=0, ge=0, le=10_000_000)
    evaluation_prompts: Literal["mteb", False] = False
    evaluation_template: str = f"Instruct: {INSTRUCTION}\nQuery: "
    evaluation_padding: Literal["published", False] = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    append_eos: bool = True
    query_prompt: str = ""
    document_prompt: str = ""
    prompts: dict[str, str] = Field(default_factory=dict)
    include_prompt: bool = True
    save_steps: int = Field(default=100, ge=1, le=MOST_STEPS)
    report_to: Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = ()
    lora: Lora | Literal[False] | Literal["full"] = Field(default_factory=Lora)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dataset is not None and self.sources:
            raise ValueError("give either dataset or sources, not both")
        if self.steps * self.batch_size > MOST_ROWS:
            raise ValueError(
                f"steps = {self.steps:,} of batch_size = {self.batch_size:,}: {self.steps * self.batch_size:,} rows, "
                f"which are planned in memory; at most {MOST_ROWS:,}"
            )
        if self.batch_size % self.accumulation or self.part_size < 2:
            raise ValueError(
                f"accumulation = {self.accumulation}: batch_size {self.batch_size} must divide into equal parts of at "
                "least two queries"
            )
        if self.mini_batch_size > self.part_size:
            of = "batch_size" if self.accumulation == 1 else "batch_size / accumulation ="
            raise ValueError(f"mini_batch_size {self.mini_batch_size} is larger than {of} {self.part_size}")
        if len(set(self.matryoshka)) != len(self.matryoshka):
            raise ValueError(f"matryoshka = {list(self.matryoshka)}: give each width once")
        if self.guide is not None and self.negatives > 1:
            raise ValueError(f"negatives = {self.negatives}: a guide allows at most one hard negative; give 0 or 1")
        if self.guide is not None and self.loss != "infonce":
            raise ValueError(f"loss = {self.loss!r}: a guide filters infonce only; give 'infonce' or drop the guide")
        if self.guide is None and self.guide_margin:
            raise ValueError(
                f"guide_margin = {self.guide_margin}: it has no effect without a guide; name a guide or drop it"
            )
        if mistake := self._evaluation_mistake():
            raise ValueError(mistake)
        return self

    def _evaluation_mistake(self) -> str:
        """What is wrong with the settings of the evaluation; empty if nothing is."""
        default = type(self).model_fields["evaluation_template"].default
        named = next((name for name, prompt in self.prompts.items() if INSTRUCTION in prompt), None)
        if self.evaluation_max_length == 1:
            return "evaluation_max_length = 1: give at least 2 tokens, or 0 for max_length"
        if self.evaluation_prompts and INSTRUCTION not in self.evaluation_template:
            return (
                f"evaluation_template = {self.evaluation_template!r}: it must contain {INSTRUCTION}, which is replaced "
                "by the task's instruction"
            )
        if not self.evaluation_prompts and self.evaluation_template != default:
            return "evaluation_template has no effect without instructions; add evaluation_prompts = 'mteb' or drop it"
        if not self.evaluation_prompts and named:
            return f"prompts.{named} contains {INSTRUCTION}; add evaluation_prompts = 'mteb' or write the prompt out"
        return ""

    @property
    def scored_length(self) -> int:
        """Tokens to which texts are cut in evaluation."""
        return self.evaluation_max_length or self.max_length

    @property
    def part_size(self) -> int:
        """Queries whose documents are each other's negatives: a step's, or one part's if gradients are accumulated."""
        return self.batch_size // self.accumulation

    @property
    def data_sources(self) -> tuple[Source, ...]:
        """The training sets: `sources`, or the one `dataset` (default: the built-in `demo` pairs)."""
        return self.sources or (Source(path=self.dataset or "demo"),)


Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(to_tuple)]


class Tuning(Strict):
    """A grid of settings, and the development tasks on which the best one is selected for each design."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = Field(min_length=1)
    learning_rate: Rates = ()
    head_learning_rate: Rates = ()
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=MOST_STEPS)], ...], BeforeValidator(to_tuple)] = ()
    seed: int = Field(default=2000, ge=0)

    def problems(self, tasks: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Its mistakes in a study of these tasks and seeds, one line each."""
        found = []
        if both := [name for name in self.tasks if name in tasks]:
            found.append(
                f"tuning.tasks: {', '.join(both)} would be reported too; tune on tasks that are not among tasks"
            )
        if self.seed in seeds:
            found.append(f"tuning.seed = {self.seed} is one of seeds; give another: selected runs are not reported")
        if max(len(self.learning_rate), len(self.head_learning_rate), len(self.steps)) < 2:
            found.append("tuning: a single setting; list two values of learning_rate, head_learning_rate or steps")
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
        """A name for a folder."""
        return f"lr-{self.learning_rate:g}-head-{self.head_learning_rate:g}-steps-{self.steps}"

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with this setting."""
        return recipe.model_copy(update=vars(self))


def own_setting(recipe: Recipe) -> Setting:
    """The setting in a recipe."""
    return Setting(recipe.learning_rate, recipe.head_learning_rate, recipe.steps)


def settings(tuning: Tuning, recipe: Recipe, has_head: bool = True) -> list[Setting]:
    """All points of the grid, with the recipe's value for what is not listed. A design without a trainable pooling gets
    only the first `head_learning_rate`, which has no effect on it."""
    heads = tuning.head_learning_rate or (recipe.head_learning_rate,)
    axes = (tuning.learning_rate or (recipe.learning_rate,), heads if has_head else heads[:1])
    return [Setting(*point) for point in product(*axes, tuning.steps or (recipe.steps,))]
