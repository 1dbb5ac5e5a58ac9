"""The settings themselves: a default that moves changes every study that leaves it out, so it is seen here."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import pytest
from pydantic import BaseModel, ValidationError

from poolwise import data, stats, study, verdicts
from poolwise.data.batches import effective_negatives
from poolwise.errors import DataError
from poolwise.study.recipe import MOST_STEPS, Lora, Recipe, Setting, Source, Tuning, settings

DEFAULTS = {
    "base_model": "nano", "dataset": None, "sources": (), "decontaminate": "queries", "one_source_batches": False,
    "steps": 1000, "learning_rate": 1e-5, "head_learning_rate": 1e-5,
    "seed_varies": ("init", "order", "dropout", "data"), "schedule": "linear", "warmup_steps": 100,
    "weight_decay": 0.01, "batch_size": 64, "mini_batch_size": 0, "accumulation": 1, "negatives": 1, "loss": "infonce",
    "temperature": 0.05, "matryoshka": (), "guide": None, "guide_margin": 0.0, "max_length": 512,
    "evaluation_max_length": 0, "evaluation_prompts": False, "evaluation_template": "Instruct: {instruction}\nQuery: ",
    "evaluation_padding": False, "dtype": "auto", "attn_implementation": "sdpa", "gradient_checkpointing": False,
    "append_eos": True, "query_prompt": "", "document_prompt": "", "prompts": {}, "include_prompt": True,
    "save_steps": 100, "report_to": (), "lora": {"rank": 16, "alpha": 32, "dropout": 0.1, "target": "all-linear"},
}  # fmt: skip


def test_the_defaults_of_a_recipe() -> None:
    assert Recipe().model_dump() == DEFAULTS
    assert Source(path="a").model_dump() == {"path": "a", "weight": 1.0, "split": "train"}
    assert Tuning(tasks=("a",)).model_dump() == {
        "tasks": ("a",), "learning_rate": (), "head_learning_rate": (), "steps": (), "seed": 2000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "allowed", "refused"),
    [
        (Recipe, "steps", [1, MOST_STEPS], [0, MOST_STEPS + 1]),
        (Recipe, "learning_rate", [1e-12], [0.0]),
        (Recipe, "head_learning_rate", [1e-12], [0.0]),
        (Recipe, "warmup_steps", [0, MOST_STEPS], [-1, MOST_STEPS + 1]),
        (Recipe, "weight_decay", [0.0], [-1e-9]),
        (Recipe, "batch_size", [2, 1_000_000], [1, 1_000_001]),
        (Recipe, "mini_batch_size", [0, 64], [-1, 65]),
        (Recipe, "accumulation", [1, 32], [0, 64]),  # parts of at least two queries
        (Recipe, "negatives", [0, 1000], [-1, 1001]),
        (Recipe, "temperature", [1e-9], [0.0]),
        (Recipe, "matryoshka", [(1, 1_000_000)], [(0,), (1_000_001,), (8, 8)]),
        (Recipe, "max_length", [2, 10_000_000], [1, 10_000_001]),
        (Recipe, "evaluation_max_length", [0, 2, 10_000_000], [-1, 1, 10_000_001]),
        (Recipe, "save_steps", [1, MOST_STEPS], [0, MOST_STEPS + 1]),
        (Lora, "rank", [1, 16_384], [0, 16_385]),
        (Lora, "alpha", [1, 1_000_000], [0, 1_000_001]),
        (Lora, "dropout", [0.0, 0.999], [-0.001, 1.0]),
        (Source, "weight", [1e-9], [0.0]),
        (Tuning, "learning_rate", [(1e-9, 1.0)], [(0.0,)]),
        (Tuning, "steps", [(1, MOST_STEPS)], [(0,), (MOST_STEPS + 1,)]),
        (Tuning, "seed", [0], [-1]),
        (Tuning, "tasks", [("a",)], [()]),
    ],
)
def test_bounds(kind: type, name: str, allowed: list, refused: list) -> None:
    needed = {Source: {"path": "a"}, Tuning: {"tasks": ("a",)}}.get(kind, {})
    if kind is Recipe:
        needed = {"steps": {"batch_size": 2}, "batch_size": {"steps": 1}}.get(name, {})
    for value in allowed:
        assert getattr(kind.model_validate({**needed, name: value}), name) == value
    for value in refused:
        with pytest.raises(ValidationError, match=name):
            kind.model_validate({**needed, name: value})


def test_a_plan_fits_into_memory() -> None:
    """2^28 rows."""
    assert Recipe(steps=1 << 20, batch_size=1 << 8).steps == 1 << 20
    with pytest.raises(ValidationError, match="at most 268,435,456"):
        Recipe(steps=(1 << 20) + 1, batch_size=1 << 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mini_batch_size": 65}, "mini_batch_size 65 is larger than batch_size 64"),
        (
            {"mini_batch_size": 33, "accumulation": 2},
            "mini_batch_size 33 is larger than batch_size / accumulation = 32",
        ),
        ({"accumulation": 3}, "batch_size 64 must divide into equal parts of at least two queries"),
        ({"guide": "a", "negatives": 2}, "a guide allows at most one hard negative"),
        ({"guide": "a", "loss": "symmetric_infonce"}, "a guide filters infonce only"),
        ({"guide_margin": 0.1}, "it has no effect without a guide"),
        ({"dataset": "a", "sources": (Source(path="b"),)}, "either dataset or sources"),
        ({"prompts": {"t": "{instruction}"}}, "prompts.t contains {instruction}"),
        ({"evaluation_template": "x {instruction}"}, "evaluation_template has no effect without instructions"),
        ({"evaluation_template": "x", "evaluation_prompts": "mteb"}, "it must contain {instruction}"),
    ],
)
def test_settings_that_contradict_one_another(changes: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words.replace("{", r"\{")):
        Recipe.model_validate(changes)


def test_settings_that_go_together() -> None:
    Recipe(guide="a", negatives=1, guide_margin=0.1)
    Recipe(evaluation_prompts="mteb", prompts={"t": "{instruction}"}, evaluation_template="x {instruction}")
    Recipe(prompts={"t": "query: "})
    assert Recipe(evaluation_max_length=7).scored_length == 7
    assert Recipe(max_length=9).scored_length == 9
    assert Recipe(batch_size=64, accumulation=4).part_size == 16


def test_the_points_of_a_grid() -> None:
    tuning = Tuning(tasks=("a",), learning_rate=(1.0, 2.0), head_learning_rate=(3.0, 4.0))
    heads = [(x.learning_rate, x.head_learning_rate, x.steps) for x in settings(tuning, Recipe())]
    assert heads == [(1.0, 3.0, 1000), (1.0, 4.0, 1000), (2.0, 3.0, 1000), (2.0, 4.0, 1000)]
    assert [x.head_learning_rate for x in settings(tuning, Recipe(), has_head=False)] == [3.0, 3.0]
    assert Setting(1.0, 3.0, 7).of(Recipe()).model_dump() == DEFAULTS | {
        "learning_rate": 1.0, "head_learning_rate": 3.0, "steps": 7,
    }  # fmt: skip


def test_a_grid_has_two_points_and_leaves_the_studys_tasks_and_seeds_alone() -> None:
    def problems(**changes: object) -> list[str]:
        return Tuning.model_validate({"tasks": ("dev",), "learning_rate": (1.0, 2.0), **changes}).problems(["a"], [0])

    assert problems() == problems(learning_rate=(1.0, 2.0, 3.0)) == problems(learning_rate=(), steps=(1, 2)) == []
    for changes, words in [
        ({"learning_rate": (1.0,), "steps": (7,)}, "tuning: a single setting"),
        ({"learning_rate": ()}, "tuning: a single setting"),
        ({"tasks": ("dev", "a")}, "tuning.tasks: a would be reported too"),
        ({"seed": 0}, "tuning.seed = 0 is one of seeds"),
        ({"steps": (1, 1)}, "tuning.steps = [1, 1]: give each value once"),
    ]:
        (found,) = problems(**changes)
        assert found.startswith(words)


def test_the_negatives_of_a_query() -> None:
    assert effective_negatives(Recipe(batch_size=65)) == 129  # one process by default
    with pytest.raises(DataError, match=r"64 in 2 parts \(recipe.accumulation\) cannot be split evenly over 3 proc"):
        effective_negatives(Recipe(accumulation=2), world_size=3)


def test_settings_and_results_cannot_be_changed() -> None:
    """A comparison, a plan or a verdict that is changed after it was made would no longer be what was tested."""
    loose = set()
    for package in (data, stats, study, verdicts):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for name, value in vars(importlib.import_module(module.name)).items():
                own = dataclasses.is_dataclass(value) and value.__module__ == module.name
                if own and not value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                    loose.add(name)
                if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module.name:
                    assert value.model_config.get("frozen"), name
    assert loose == {"Log"}  # collects notes while results are read
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().steps = 3  # type: ignore[misc]
