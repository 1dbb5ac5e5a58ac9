"""What the recipe and the seed say reaches the trainer: through `run_trial`, against values computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from poolwise.errors import TrainingError
from poolwise.files import write_json
from poolwise.model.encoder import build, derived_seed
from poolwise.runs import layout, train
from poolwise.runs.prepare import Prepared, prepare
from poolwise.runs.train import CHANCE_WINDOW, COMPLETE, latest_checkpoint
from poolwise.runs.trial import run_trial
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from test_trial import watch
from tiny import tiny_folder

WORDS = ("heron", "water", "ferry", "island", "river", "token", "layer", "mask", "model", "rate", "calm", "boat")
CROSS = {"name": "cross", "attention": "causal", "pooling": "cross_attention", "pooling_args": {"latents": 2}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of two layers and sixteen training rows, nothing in a row being equal to anything in another."""
    folder = tmp_path_factory.mktemp("training")
    tiny_folder(folder, "llama")
    rows = [
        {"query": f"the {WORDS[i % 12]} {i}", "positive": f"a {WORDS[i * 5 % 12]} at {i}", "negative": f"no {i} here"}
        for i in range(16)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepared(place: Path, output: str, design: dict[str, Any] = CROSS, **recipe: Any) -> Prepared:
    """A study of one design and the seeds 0 and 1, without tasks."""
    small = {
        "base_model": "./llama", "dataset": "./train.jsonl", "steps": 2, "batch_size": 8, "warmup_steps": 0,
        "max_length": 48, "learning_rate": 1e-3, "head_learning_rate": 1e-2, "lora": {"rank": 2, "dropout": 0.0},
    }  # fmt: skip
    study = {
        "name": "way", "baseline": design["name"], "designs": [design], "seeds": [0, 1], "references": [],
        "controls": False, "evaluate_at": [1.0], "output": output, "recipe": {**small, **recipe},
    }  # fmt: skip
    return prepare(Study.parse(study, base_dir=place))


def go(made: Prepared, seed: int = 0) -> Path:
    """Runs the trial of a seed; its folder."""
    trial = next(trial for trial in made.trials if trial.seed == seed)
    folder = layout.trial(made.study.folder, trial.name)
    run_trial(trial, made, folder)
    return folder


def first_loss(made: Prepared, seed: int) -> float:
    """InfoNCE of the first batch, as the formula has it, of an encoder that nothing has trained."""
    recipe = made.study.recipe
    encoder = build(recipe, made.study.designs[0], seed, base_dir=made.study.base_dir).eval()
    assert made.pairs
    rows = made.pairs.dataset.select(made.plans[seed].indices[0])
    prompts = {"query": recipe.query_prompt, "positive": recipe.document_prompt, "negative_1": recipe.document_prompt}
    query, positive, negative = (
        F.normalize(torch.from_numpy(encoder.encode(list(rows[name]), prompt=prompt)).float(), dim=-1)
        for name, prompt in prompts.items()
    )
    logits = query @ torch.cat([positive, negative]).T / recipe.temperature
    others = logits
    if recipe.loss == "symmetric_infonce":  # the queries that a positive could belong to stand in the same softmax
        others = torch.cat([logits, positive @ query.T / recipe.temperature], dim=1)
    return float((others.logsumexp(1) - logits.diagonal()).mean())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "recipe",
    [
        {"query_prompt": "find: ", "document_prompt": "this is ", "temperature": 0.1},
        {"loss": "symmetric_infonce"},
        {"query_prompt": "find: ", "mini_batch_size": 3},
    ],
    ids=["prompts", "symmetric", "cached"],
)
def test_the_first_loss_is_that_of_the_formula(place: Path, tmp_path: Path, recipe: dict[str, Any], seed: int) -> None:
    """Of the planned rows of this seed, with its first weights, and with each column's own prompt."""
    made = prepared(place, str(tmp_path), **recipe)
    losses = json.loads((go(made, seed) / layout.TRAINED).read_text())["losses"]
    assert losses["1"] == pytest.approx(first_loss(made, seed), abs=2e-4)
    assert first_loss(made, 0) != pytest.approx(first_loss(made, 1), abs=1e-2)
    plain = prepared(place, str(tmp_path / "plain"))
    assert first_loss(plain, seed) != pytest.approx(losses["1"], abs=1e-2)  # what the recipe changes shows


@pytest.mark.parametrize("part", ["init", "dropout"])
def test_each_part_of_the_seed_varies_the_weights_alone(place: Path, tmp_path: Path, part: str) -> None:
    def weights(varies: list[str], seed: int) -> dict[str, torch.Tensor]:
        made = prepared(place, str(tmp_path / f"{varies}"), seed_varies=varies, lora={"rank": 2, "dropout": 0.5})
        step = layout.milestone(go(made, seed), 2)
        return {**load_file(step / "pooling.safetensors"), **load_file(step / "adapter" / "adapter_model.safetensors")}

    one, other = weights([part], 0), weights([part], 1)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-4
    if part == "init":  # and nothing varies but what was named
        one, other = weights([], 0), weights([], 1)
        assert all(torch.equal(one[name], other[name]) for name in one)


class Seen:
    """The optimizer's groups and the trainer's arguments at the first step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.groups: list[dict[str, Any]] = []
        self.arguments: Any = None
        step_end = train._Watch.on_step_end

        def look(watcher: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
            if not self.groups:
                names = {id(p): name for name, p in given["model"].named_parameters()}
                self.groups = [
                    {**group, "params": [names[id(p)] for p in group["params"]]}
                    for group in given["optimizer"].param_groups
                ]
                self.arguments = args
            step_end(watcher, args, state, control, **given)

        patch.setattr(train._Watch, "on_step_end", look)

    def of(self, piece: str) -> set[tuple[float, float]]:
        """(learning rate at the start, weight decay) of the parameters whose names contain `piece`."""
        return {
            (group["initial_lr"], group["weight_decay"])
            for group in self.groups
            for name in group["params"]
            if piece in name
        }


def test_head_and_backbone_have_their_own_rates(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    go(prepared(place, str(tmp_path), weight_decay=0.03, schedule="constant"), 1)
    assert seen.of("lora_") == {(1e-3, 0.03)}
    assert seen.of("to_k.weight") == {(1e-2, 0.03)}  # a matrix of the head
    assert {rate for rate, _ in seen.of("head.")} == {1e-2}
    assert {decay for _, decay in seen.of("bias")} == {0.0}
    assert seen.arguments.seed == derived_seed(Recipe(), "dropout", 1) != derived_seed(Recipe(), "dropout", 0)
    assert (seen.arguments.warmup_steps, seen.arguments.lr_scheduler_type) == (0, "constant")
    assert seen.arguments.use_cpu  # the encoder is on the CPU, whatever the machine has


@pytest.mark.parametrize(("lora", "dtype", "expected"), [("full", "bfloat16", True), ("full", "float32", False)])
def test_full_tuning_computes_in_the_dtype_of_the_recipe(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str, dtype: str, expected: bool
) -> None:
    seen = Seen(monkeypatch)
    go(prepared(place, str(tmp_path), lora=lora, dtype=dtype))
    assert seen.arguments.bf16 is expected
    assert {rate for rate, _ in seen.of("model.layers")} == {1e-3}


def test_adapters_are_trained_in_float32_without_autocast(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    go(prepared(place, str(tmp_path), dtype="bfloat16"))
    assert seen.arguments.bf16 is False


# ---------------------------------------------------------------- going on


def test_the_newest_checkpoint_is_that_of_the_largest_step(tmp_path: Path) -> None:
    for step in (8, 10, 12):
        layout.checkpoint(tmp_path, step).mkdir()
        if step != 12:  # half-written
            write_json(layout.checkpoint(tmp_path, step) / COMPLETE, {"seconds": 1.0, "files": {}})
    assert latest_checkpoint(tmp_path) == layout.checkpoint(tmp_path, 10)
    assert sorted(layout.checkpoints(tmp_path)) == [8, 10]


def test_the_seconds_of_a_training_that_went_on_are_those_of_all_its_steps(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only training moves, ten seconds a step; killed after five steps, with a checkpoint at four."""
    made = prepared(place, str(tmp_path), steps=6, save_steps=2)
    now = [1000.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    log = train._Watch.on_log

    def tick(self: Any, args: Any, state: Any, *rest: Any, **given: Any) -> None:
        now[0] += 10
        if state.global_step == 5 and now[0] < 1100:
            now[0] += 500  # and a while until somebody starts it again
            raise KeyboardInterrupt
        log(self, args, state, *rest, **given)

    monkeypatch.setattr(train._Watch, "on_log", tick)
    monkeypatch.setattr(train._Watch, "on_train_end", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        go(made)
    found = json.loads((go(made) / layout.TRAINED).read_text())
    assert found["resumed_from"] == 4
    assert len(found["losses"]) == 6
    assert found["seconds"] == pytest.approx(60, abs=11)  # the trainer logs once more at the end


def test_a_loss_at_chance_is_that_of_all_its_widths(tmp_path: Path) -> None:
    chance = math.log(8 * 2)
    with pytest.raises(TrainingError, match=r"guessing \(8.318\)"):
        watch(tmp_path, [3 * chance] * CHANCE_WINDOW, matryoshka=(8, 16))
    watch(tmp_path, [chance] * CHANCE_WINDOW, matryoshka=(8, 16))


@pytest.mark.parametrize("recipe", [{"loss": "symmetric_infonce"}, {"guide": "some-model"}])
def test_other_losses_have_no_known_chance_level(tmp_path: Path, recipe: dict[str, Any]) -> None:
    watch(tmp_path, [math.log(8 * 2)] * CHANCE_WINDOW, **recipe)
