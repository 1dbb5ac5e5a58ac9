"""Law 8: one process with a batch of 2n makes the same steps as two processes with n each and gathered negatives.

This file is also the program of both sides: `main` in this process, and `python test_processes.py BASE OUT` under
torchrun.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from datasets import Dataset
from safetensors.torch import load_file, save_file

from poolwise.errors import TrainingError
from poolwise.model.base import torch_dtype
from poolwise.model.encoder import build
from poolwise.runs import train as training
from poolwise.runs.train import COMPLETE
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe
from tiny import tiny_folder

DESIGNS = {
    "m1": Design.model_validate({"preset": "m1"}),
    "layers": Design(
        name="layers",
        attention="bidirectional",
        pooling="layer_cross_attention",
        pooling_args={"tokens": "mean", "latents": 4},
    ),
}
# name: (design, changes of the recipe, are the negatives of the other process gathered)
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("m1", {}, True),
    "layers": ("layers", {}, True),
    "cached": ("layers", {"mini_batch_size": 2}, True),
    "symmetric": ("layers", {"loss": "symmetric_infonce"}, True),
    "alone": ("layers", {}, False),
}
NEGATIVES, STEPS = 2, 3


def recipe(base: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "base_model": base,
        "steps": STEPS,
        "batch_size": 8,
        "negatives": NEGATIVES,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-3,
        "max_length": 48,
        "lora": Lora(rank=4, dropout=0.0),
    }
    return Recipe(**{**values, **changes})


def pairs(rows: int) -> Dataset:
    words = ("cat", "dog", "river", "book", "water", "morning", "people")
    columns = ["query", "positive", *(f"negative_{i + 1}" for i in range(NEGATIVES))]
    return Dataset.from_dict(
        {
            column: [f"{words[(i + number) % 7]} {words[(i * 3 + number) % 7]} {i}" * (1 + i % 3) for i in range(rows)]
            for number, column in enumerate(columns)
        }
    )


def main(base: str, out: Path) -> None:
    """Train every case; process 0 leaves the losses and the weights in `out`."""
    torch.set_num_threads(1)
    first = os.environ.get("RANK", "0") == "0"
    losses = {}
    loss = training._loss
    for name, (design, changes, gathers) in CASES.items():
        training._loss = loss if gathers else lambda encoder, recipe, gather: loss(encoder, recipe, False)
        given = recipe(base, **changes)
        encoder = build(given, DESIGNS[design], 0, device="cpu")
        result = training.train(encoder, given, pairs(8 * STEPS), out / name, seed=0, milestones=[2])
        losses[name] = {"world_size": result["world_size"], "losses": list(result["losses"].values())}
        if first:
            tuned = {n: p.detach().clone().contiguous() for n, p in encoder.named_parameters() if p.requires_grad}
            save_file(tuned, out / f"{name}.safetensors")
    training._loss = loss
    if first:
        (out / "losses.json").write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama"))


@pytest.fixture(scope="module")
def sides(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of one process and of two."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo, which this build of torch lacks")
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, base, str(two)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    main(base, one)  # this process is the one: importing everything a third time proves nothing
    return one, two


def losses(folder: Path, name: str) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "losses.json").read_text())[name]["losses"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_law_8_two_processes_equal_one(name: str, sides: tuple[Path, Path]) -> None:
    one, two = sides
    assert json.loads((two / "losses.json").read_text())[name]["world_size"] == 2
    assert losses(one, name).shape == losses(two, name).shape == (STEPS,)
    assert torch.allclose(losses(one, name), losses(two, name), atol=1e-5, rtol=0)
    ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in sides)
    assert ours.keys() == theirs.keys()
    apart = {key: (ours[key] - theirs[key]).abs().max().item() for key in ours}
    assert max(apart.values()) < 1e-5, sorted(apart.items(), key=lambda item: -item[1])[:3]
    assert (two / name / "step-2" / "run.json").exists()
    assert (two / name / "checkpoint-3" / COMPLETE).exists()


def test_law_8_without_gathering_the_losses_differ(sides: tuple[Path, Path]) -> None:
    """What the equality above could not see otherwise: fewer negatives, a lower loss, other weights."""
    one, two = sides
    assert torch.allclose(losses(one, "alone"), losses(one, "layers"), atol=1e-6)
    assert (losses(one, "alone") - losses(two, "alone")).min() > 0.1
    ours, theirs = (load_file(folder / "alone.safetensors") for folder in sides)
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) > 1e-4


def test_auto_is_bf16_only_where_a_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older GPUs emulate it, slowly, and torch says that they support it unless asked more closely."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert torch_dtype("auto") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert torch_dtype("auto") == torch.bfloat16


def test_one_process_writes_a_checkpoint(base: str, tmp_path: Path) -> None:
    """Both wrote the same files at once: half-written weights, or an error for a file that the other has removed."""
    encoder = build(recipe(base), DESIGNS["m1"], 0, device="cpu")
    for rank, written in ((1, []), (0, ["adapter", "pooling.safetensors"])):
        trainer: Any = SimpleNamespace(args=SimpleNamespace(should_save=rank == 0), model=encoder)
        training._Trainer._save(trainer, str(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_a_batch_that_cannot_be_split(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe(base)
    encoder = build(given, DESIGNS["m1"], 0, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="batch_size = 8 cannot be split over 3 processes"):
        training.train(encoder, given, pairs(8 * STEPS), tmp_path, seed=0)
    monkeypatch.setenv("WORLD_SIZE", "2")  # and the trainer's library does not see it
    monkeypatch.setattr(training, "SentenceTransformerTrainingArguments", lambda **_: SimpleNamespace(world_size=1))
    with pytest.raises(TrainingError, match="WORLD_SIZE is 2, but the trainer found 1"):
        training.train(encoder, given, pairs(8 * STEPS), tmp_path, seed=0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
