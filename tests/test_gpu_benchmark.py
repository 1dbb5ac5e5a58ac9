"""All parts of benchmarks/gpu.py at tiny sizes on the CPU: a GPU may be there for minutes, too few to mend it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PEERS = ("sdpa", "varlen")


@pytest.fixture(scope="module")
def gpu() -> Any:
    if not (ROOT / "benchmarks" / "gpu.py").is_file():
        pytest.skip("needs benchmarks/ of the repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from benchmarks import corpus, gpu, head, memory, queries, train

        base = train._base
        for module in (corpus, memory):
            patch.setattr(module, "_base", lambda folder, sizes=None: base(folder, sizes or BASE))
        for name, value in {"WIDTH": 32, "LAYERS": 2, "LATENTS": 4, "HEADS": 2, "HEAD_DIM": 16}.items():
            patch.setattr(head, name, value)
        patch.setattr(queries, "QUERIES", 8)
        patch.setattr(gpu.FastEncoder, "compile", lambda self: setattr(self, "_is_compiled", True))
        yield gpu


@pytest.fixture(scope="module")
def sizes(gpu: Any) -> Any:
    return gpu.Sizes(
        base=BASE, documents=40, rounds=2, batches=(4, 16), budgets=(128, 512), squares=(32, 64), copied=1 << 12,
        tokens=256, triples=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def figures(gpu: Any, sizes: Any) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in gpu.run(sizes, "cpu")}


def test_every_part_gives_its_figures(figures: dict[str, dict[str, Any]]) -> None:
    assert not [figure for figure in figures.values() if "failed" in figure]
    expected = {
        *("gpu_matmul", "gpu_copy", "gpu_launch", "gpu_layer_bound", "gpu_varlen_causal", "gpu_varlen_bidirectional"),
        *(f"gpu_encode_{peer}{end}" for peer in PEERS for end in ("", "_plain")),
        *("gpu_mfu_matmul", "gpu_mfu_plain_matmul", "gpu_tokeniser"),
        *(f"gpu_model_{budget}{end}_matmul" for budget in (128, 512) for end in ("", "_compiled")),
        *("gpu_train_st_bf16", "gpu_train_paper_bf16", "gpu_train_grouped_bf16", "gpu_train_memory_bf16"),
        *("gpu_head_fp32_b1", "gpu_head_bf16_b1", "gpu_head_bf16_b16", "gpu_head_memory"),
        *("gpu_queries_16", "gpu_queries_32", "gpu_collect_memory", "gpu_collect_memory_checkpointed"),
    }
    assert figures.keys() == expected
    assert all(json.loads(json.dumps(figure)) for figure in figures.values())
    assert figures["gpu_train_st_bf16"]["triples"] == 2


def test_ours_and_the_baselines_encode_the_same_texts_to_the_same_vectors(figures: dict[str, dict[str, Any]]) -> None:
    """The unpadded baseline too: it would be fast and worthless if its texts saw each other."""
    for peer in PEERS:
        figure = figures[f"gpu_encode_{peer}"]
        assert figure["documents"] == 40
        assert figure["agreement"] < 1e-3
        assert figure["baseline_agreement"] < 1e-3
    for name in ("causal", "bidirectional"):
        assert figures[f"gpu_varlen_{name}"]["agreement"] < 0.02


def test_flops_of_the_corpus_are_those_of_its_texts(gpu: Any, sizes: Any, tmp_path: Path) -> None:
    job = gpu.Job(tmp_path, sizes, "cpu")
    config = gpu.Qwen2Config(**BASE)
    assert job.flops == sum(gpu.cost.base_flops(config, int(tokens)) for tokens in job.lengths)
    assert len(set(job.texts)) == 40
    assert set(job.peers["varlen"][0].preprocess(job.texts[:2])) >= {"cu_seq_lens_q", "max_length_q"}
    job.sheet, job.matmul = (1e-3, 1.0), 5e-4  # TFLOP/s
    whole, matmul = job.mfu("x", [2.0, 1.0, 4.0], 0.45)
    assert whole["ratio"] == pytest.approx(job.flops / 2 / 1e9)
    assert matmul["ratio"] == pytest.approx(2 * whole["ratio"])
    assert whole["low"] < whole["ratio"] < whole["high"]


def test_a_part_that_fails_is_told_and_the_others_go_on(gpu: Any, sizes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Any) -> Any:
        yield {"name": "gpu_before", "ratio": 1.0}
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    parts = {"encode": broken, "limits": gpu.PARTS["limits"]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    found = gpu.run(sizes, "cpu")
    assert [figure["name"] for figure in found][:2] == ["gpu_before", "gpu_encode"]
    assert found[1]["failed"].startswith("RuntimeError: CUDA error")
    assert len(found) == 6


def test_the_command(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import __main__ as command
    from benchmarks import measure

    good = measure.record("gpu_matmul", 0.8, 0.8, 0.8, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main(["gpu"])
    assert stopped.value.code == 2
    assert "gpu: needs a CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run", lambda: [good, {"name": "gpu_encode", "failed": "RuntimeError: no kernel"}])
    assert command.main(["gpu"]) == 1
    printed = capsys.readouterr()
    assert "gpu_matmul" in printed.out
    assert "gpu_encode failed: RuntimeError: no kernel" in printed.err
    assert command.main(["gpu", "--json"]) == 1
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == ["gpu_matmul", "gpu_encode"]
    monkeypatch.setattr(gpu, "run", lambda: [good])
    assert command.main(["gpu"]) == 0
