"""studies/paper-*.toml: the paper's recipe, data, tasks and designs, tried on random models of the same architecture
and layer count at reduced width; by their names on the Hub where `../shared` has a loopback one."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer

from poolwise.data.batches import effective_negatives
from poolwise.data.tasks import PAPER_TASKS
from poolwise.model.encoder import build
from poolwise.pooling.cost import head_parameters, resolve_args
from poolwise.runs.train import train
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.starters import PAPER_BASES, paper_study, write
from poolwise.study.study import Study
from tiny import SENTENCES, tiny_config, tiny_folder

STUDIES = Path(__file__).parents[1] / "studies"
FILES = {  # file: base model on the Hub, its family in the tests, its layers
    "paper-mistral-7b": ("mistralai/Mistral-7B-v0.1", "mistral", 32),
    "paper-qwen2-0.5b": ("Qwen/Qwen2-0.5B", "qwen2", 24),
    "paper-llama3-8b": ("meta-llama/Meta-Llama-3-8B", "llama", 32),
}
PAPER = {  # arXiv 2409.02727 and its released code, commit 57791d5
    "steps": 1000, "learning_rate": 1e-5, "head_learning_rate": 1e-5, "schedule": "linear", "warmup_steps": 100,
    "weight_decay": 0.01, "negatives": 1, "temperature": 0.05, "max_length": 1024, "dtype": "bfloat16",
    "dataset": "yixuantt/ir_data", "loss": "infonce", "append_eos": True, "query_prompt": "", "document_prompt": "",
    "mini_batch_size": 0, "matryoshka": (), "guide": None, "decontaminate": False,
    "evaluation_max_length": 512, "evaluation_prompts": "mteb", "evaluation_template": "{instruction}",
    "evaluation_padding": "published", "seed_varies": ("init", "order", "dropout"),
}  # fmt: skip
SMALL_HEAD = {"latents": 12, "heads": 4, "head_dim": 16}


def raw(name: str) -> dict[str, Any]:
    return tomllib.loads((STUDIES / f"{name}.toml").read_text(encoding="utf-8"))


def narrow(design: Design) -> Design:
    """The same design with a head as much narrower as the model."""
    if "latents" not in design.pooling_args:
        return design
    arguments = {**design.pooling_args, **SMALL_HEAD}
    return Design(name=design.name, attention=design.attention, pooling=design.pooling, pooling_args=arguments)


def test_init_writes_the_papers_study(tmp_path: Path) -> None:
    """One source: the files and `poolwise init paper` come from `study.starters`."""
    assert set(PAPER_BASES) == set(FILES)
    for name in FILES:
        assert (STUDIES / f"{name}.toml").read_text(encoding="utf-8") == paper_study(name)
    written, kept = write("paper", tmp_path / "paper.toml"), STUDIES / "paper-mistral-7b.toml"
    assert Study.load(written).fingerprint == Study.load(kept).fingerprint  # of all but the name


def test_norms_do_not_decay(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path, "llama")
    recipe = Recipe(base_model=str(base), steps=1, warmup_steps=0, batch_size=2, max_length=32, weight_decay=1000.0,
        head_learning_rate=1e-4)  # fmt: skip
    encoder = build(recipe, Design.model_validate({"preset": "m2"}), 0)
    rows = Dataset.from_dict({"query": ["a", "b"], "positive": ["c", "d"], "negative_1": ["e", "f"]})
    before = encoder[1].head.to_v.weight.norm()
    train(encoder, recipe, rows, tmp_path / "run", seed=0)
    assert encoder[1].head.to_v.weight.norm() < 0.95 * before
    for norm in ("norm_states", "norm_latents", "norm_ffn"):
        weight = encoder[1].head.get_submodule(norm).weight
        assert (weight - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", FILES)
def test_the_file_says_what_the_paper_did(name: str) -> None:
    study = Study.load(STUDIES / f"{name}.toml")
    assert study.name == name
    assert study.recipe.base_model == FILES[name][0]
    assert {key: getattr(study.recipe, key) for key in PAPER} == PAPER
    assert effective_negatives(study.recipe, world_size=8) == 15  # 1 query a GPU, 8 GPUs, 1 hard negative each
    assert study.recipe.batch_size == 1 * 256 * 8
    lora = study.recipe.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.1)  # type: ignore[union-attr]
    assert set(lora.target) == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}  # type: ignore[union-attr]
    assert study.tasks == ("paper",)
    assert [len(PAPER_TASKS[kind]) for kind in ("STS", "Classification", "Clustering", "Retrieval")] == [8, 6, 11, 14]
    assert [design.name for design in study.designs] == ["m1", "m2-paper", "m3-paper", "m4-paper", "m5-paper"]
    heads = [design.pooling_args for design in study.designs[1:]]
    assert all((h["latents"], h["heads"], h["head_dim"]) == (768, 32, 2048) for h in heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "mistral" in name else [pytest.mark.wide]) for name in FILES]
)
def test_every_design_trains_on_the_same_architecture(name: str, tmp_path: Path) -> None:
    """As the file has it but for sizes: bf16 base, gradient checkpointing, LoRA on seven modules, accumulated parts."""
    _, family, layers = FILES[name]
    base = tiny_folder(tmp_path, family, num_hidden_layers=layers, max_position_embeddings=1024, scale=1.5)
    content = raw(name)
    content["recipe"] |= {"base_model": str(base), "batch_size": 4, "accumulation": 2, "steps": 2, "warmup_steps": 1}
    study = Study.parse(content)
    texts = [f"{text} {number}" for number, text in enumerate([*SENTENCES, *SENTENCES][:8])]
    rows = Dataset.from_dict({"query": texts, "positive": texts[::-1], "negative_1": texts[3:] + texts[:3]})
    for design in map(narrow, study.designs):
        encoder = build(study.recipe, design, 0)
        adapted = [m for m in encoder[0].model.modules() if isinstance(m, LoraLayer)]
        assert len(adapted) == 7 * layers
        assert next(p.dtype for p in encoder[0].model.parameters() if not p.requires_grad) == torch.bfloat16
        arguments = resolve_args(design.pooling, design.pooling_args, tiny_config(family, num_hidden_layers=layers))
        config = encoder[0].model.config
        assert sum(p.numel() for p in encoder[1].parameters()) == head_parameters(design.pooling, arguments, config)
        result = train(encoder, study.recipe, rows, tmp_path / design.name, seed=0)
        assert len(result["losses"]) == 2
        assert all(math.isfinite(loss) for loss in result["losses"].values())
        vectors = torch.tensor(encoder.encode(texts[:3]))
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3), atol=1e-3, rtol=0)


def test_parts_of_a_batch_have_their_own_negatives(tmp_path: Path) -> None:
    """The loss of a step is the mean of its parts', each a batch by itself."""
    base = tiny_folder(tmp_path, "llama")
    small = {"steps": 1, "warmup_steps": 0, "lora": {"dropout": 0.0}, "max_length": 32, "base_model": str(base)}
    texts = [f"{text} {number}" for number, text in enumerate(SENTENCES[:4])]
    rows = Dataset.from_dict({"query": texts, "positive": texts[::-1], "negative_1": texts[1:] + texts[:1]})

    def loss(part: Dataset, **sizes: int) -> float:
        recipe = Study.parse({"name": "s", "designs": [{"preset": "m1"}], "recipe": {**small, **sizes}}).recipe
        encoder = build(recipe, Design.model_validate({"preset": "m1"}), 0)
        folder = tmp_path / f"{sizes}-{part[0]['query'][-1]}"
        return float(train(encoder, recipe, part, folder, seed=0)["losses"][1])

    halves = [loss(rows.select(range(2)), batch_size=2), loss(rows.select(range(2, 4)), batch_size=2)]
    assert loss(rows, batch_size=4, accumulation=2) == pytest.approx(sum(halves) / 2, rel=1e-4)
    assert loss(rows, batch_size=4) > sum(halves) / 2 + 0.1


@pytest.fixture
def hub(shared: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment in which the files' names lead to a loopback hub: small models and 24 training pairs."""
    tool = shared / "tools" / "hub_mirror.py"
    if not tool.exists():
        pytest.skip("needs the loopback hub in a folder `shared` beside the repository")
    root = tmp_path / "hub"
    for name, family, layers in FILES.values():
        folder = root / "models" / name
        made = tiny_folder(tmp_path / "made", family, num_hidden_layers=layers, max_position_embeddings=1024, scale=1.5)
        shutil.copytree(made, folder)
    pairs = root / "datasets" / "yixuantt" / "ir_data"
    pairs.mkdir(parents=True)
    with (pairs / "train.jsonl").open("w") as file:
        for number in range(24):
            row = {"query": f"question {number}", "positive": f"answer {number}", "negative": f"nothing {number}"}
            file.write(json.dumps(row) + "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(tool), str(root), "--port", str(port)])
    try:
        yield {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
    finally:
        server.terminate()
        server.wait()


PROGRAM = """
import json, sys, tomllib
from pathlib import Path
from poolwise.runs.check import check
from poolwise.runs.run import run
from poolwise.study.study import Study

folder = Path.cwd()
for path in sys.argv[1:]:
    found = check(Study.load(path))
    assert found["trials"]["trained"] == 5 * 3 + 6, found["trials"]
    assert sum(group["tasks"] for group in found["tasks"]) == 47, found["tasks"]
    assert found["effective_negatives"] == 15
raw = tomllib.loads(Path(sys.argv[2]).read_text())
Path("pairs").mkdir()
lines = [f"a text {i},another {i * 3 % 7},{i * 5 % 11}" for i in range(12)]
Path("pairs/test.csv").write_text("\\n".join(["sentence1,sentence2,score", *lines]))
raw.update(seeds=[0], tasks=[str(folder / "pairs")], references=[], controls=False, output=str(folder / "runs"))
raw["designs"] = [{"preset": "m1"}, {
    "name": "m5-paper", "attention": "bidirectional", "pooling": "layer_cross_attention", "pooling_args": {
        "latents": 12, "heads": 4, "head_dim": 16, "ffn": 4, "norm": "layer_norm", "init": "paper", "tokens": "mean",
        "layer_weights": 32, "pad_by_id": True}}]
raw["recipe"].update(steps=1, warmup_steps=0, batch_size=4, accumulation=2)
failed = run(Study.parse(raw), workers=2)
assert not failed, failed
assert (folder / "runs" / "results.parquet").exists()
print("whole")
"""


@pytest.mark.shared
@pytest.mark.slow
def test_by_their_names_on_a_hub(hub: dict[str, str], tmp_path: Path) -> None:
    """`check` of all three and a run of one, model and training pairs found by their names on the Hub."""
    files = [str(STUDIES / f"{name}.toml") for name in FILES]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *files], cwd=tmp_path, env=hub, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("whole")
