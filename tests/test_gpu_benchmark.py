"""All parts of benchmarks/gpu.py at tiny sizes on the CPU: a GPU is there for minutes, too few to correct mistakes."""

from __future__ import annotations

import itertools
import json
import time
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
    "vocab_size": 8192,
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
        patch.setattr(memory, "ROUNDS", 2)  # the fewest that have a range
        patch.setattr(gpu.FastEncoder, "compile", lambda self: setattr(self, "_is_compiled", True))
        yield gpu


@pytest.fixture(scope="module")
def sizes(gpu: Any) -> Any:
    return gpu.Sizes(
        base=BASE, large=BASE, documents=40, rounds=2, batches=(4, 16), budgets=(128, 512), squares=(32, 64),
        copied=1 << 12, tokens=256, pairs=4, steps=5, large_documents=8, large_pairs=4, large_mini_batch=2,
        large_steps=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def figures(gpu: Any, sizes: Any) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in gpu.run(sizes, "cpu", total=10_000)}


@pytest.mark.wide  # half a minute for a benchmark that users do not run
def test_every_part_gives_its_figures(figures: dict[str, dict[str, Any]]) -> None:
    assert not [figure for figure in figures.values() if "failed" in figure]
    expected = {
        *("gpu_matmul", "gpu_copy", "gpu_launch", "gpu_layer_bound", "gpu_varlen_causal", "gpu_varlen_bidirectional"),
        *(f"gpu_encode_{peer}{end}" for peer in PEERS for end in ("", "_plain")),
        *("gpu_mfu_matmul", "gpu_mfu_plain_matmul", "gpu_tokeniser"),
        *("gpu_step", "gpu_step_mfu_matmul", "gpu_step_st"),
        *("gpu_trace_encode", "gpu_trace_encode_compiled", "gpu_trace_step"),
        *(f"gpu_7b_{what}_{preset}" for what in ("step", "step_mfu", "encode") for preset in ("m1", "m5")),
        *(f"gpu_model_{budget}{end}_matmul" for budget in (128, 512) for end in ("", "_compiled")),
        *("gpu_head_fp32_b1", "gpu_head_bf16_b1", "gpu_head_bf16_b16", "gpu_head_memory"),
        *("gpu_queries_16", "gpu_queries_32", "gpu_collect_memory", "gpu_collect_memory_checkpointed"),
    }
    whole = {name.removesuffix("_matmul") if "7b" in name else name for name in figures}
    assert whole == expected
    assert all(json.loads(json.dumps(figure)) for figure in figures.values())
    assert figures["gpu_step"]["pairs"] == 4
    assert "plain loss" in figures["gpu_step_st"]["baseline"]


@pytest.mark.wide
def test_a_trace_says_where_the_time_goes(figures: dict[str, dict[str, Any]], gpu: Any) -> None:
    from benchmarks.roofline import summary

    for name in ("gpu_trace_encode", "gpu_trace_step"):
        figure = figures[name]
        assert 0 < figure["ratio"] <= 1
        assert figure["kernels"] > 0
        assert figure["top_ms"]
        assert figure["host_ms"]
    found = summary([("a", 0.0, 10.0), ("b", 5.0, 20.0), ("a", 100.0, 140.0), ("c", 150.0, 200.0)])
    assert found["busy"] == pytest.approx((20 + 40 + 50) / 200)
    assert (found["kernels"], found["gaps"], found["milliseconds"], found["gap_ms"]) == (4, 1, 0.2, 0.1)
    assert found["top_ms"]["a"] == [pytest.approx(0.1, abs=0.06), 2]
    assert summary([])["busy"] == 0


@pytest.mark.wide
def test_ours_and_the_baselines_encode_the_same_texts_to_the_same_vectors(figures: dict[str, dict[str, Any]]) -> None:
    """The unpadded baseline too: it would be fast and worthless if its texts saw each other."""
    for peer in PEERS:
        figure = figures[f"gpu_encode_{peer}"]
        assert figure["documents"] == 40
        assert figure["agreement"] < 1e-3
        assert figure["baseline_agreement"] < 1e-3
        assert figure["apart_from_padded"] < 1e-3
    for name in ("causal", "bidirectional"):
        assert figures[f"gpu_varlen_{name}"]["agreement"] < 0.02


def test_wrong_embeddings_are_not_timed(gpu: Any, sizes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = gpu.FastEncoder.encode
    monkeypatch.setattr(gpu.FastEncoder, "encode", lambda self, texts, *rest: encode(self, texts, *rest)[::-1].copy())
    (failed,) = gpu.run(sizes, "cpu", {"encode": 600.0}, 10_000)
    assert failed["failed"].startswith("AssertionError: 1 - cosine to sentence-transformers, padded")


def test_flops_of_the_corpus_are_those_of_its_texts(gpu: Any, sizes: Any, tmp_path: Path) -> None:
    from poolwise.pooling import cost

    job = gpu.Job(tmp_path, sizes, "cpu")
    config = gpu.Qwen2Config(**BASE)
    assert job.flops == pytest.approx(sum(cost.base_flops(config, int(tokens)) for tokens in job.lengths))
    assert len(set(job.texts)) == 40
    assert set(job.peers["varlen"][0].preprocess(job.texts[:2])) >= {"cu_seq_lens_q", "max_length_q"}
    job.sheet, job.matmul = (1e-3, 1.0), 5e-4  # TFLOP/s
    whole, matmul = job.mfu("x", [2.0, 1.0, 4.0], job.flops, 0.45)
    assert whole["ratio"] == pytest.approx(job.flops / 2 / 1e9)
    assert matmul["ratio"] == pytest.approx(2 * whole["ratio"])
    assert whole["low"] < whole["ratio"] < whole["high"]


def broken(job: Any) -> Any:
    yield {"name": "gpu_before", "ratio": 1.0}
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def endless(job: Any) -> Any:
    for number in itertools.count():
        yield {"name": f"gpu_{number}", "ratio": 1.0}
        time.sleep(0.05)


def test_a_part_that_fails_is_reported_and_the_others_go_on(
    gpu: Any, sizes: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"encode": (broken, 600.0), "kernel": (endless, 0.4), "limits": gpu.PARTS["limits"]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    found = gpu.run(sizes, "cpu", total=10_000)
    names = [figure["name"] for figure in found]
    assert names[:2] == ["gpu_before", "gpu_encode"]
    assert found[1]["failed"].startswith("RuntimeError: CUDA error")
    assert found[names.index("gpu_kernel")]["failed"] == "OutOfTime: not done after 0 s"
    assert names[-1] == "gpu_layer_bound"
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == names  # each at once
    found = gpu.run(sizes, "cpu", {"encode": 600.0, "limits": 600.0}, total=5)
    assert found == []  # there would be too little time


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
    asked: list[dict[str, Any]] = []
    found = [good, {"name": "gpu_encode", "failed": "RuntimeError: no kernel"}]
    monkeypatch.setattr(gpu, "run", lambda **given: asked.append(given) or found)
    assert command.main(["gpu", "encode=90", "mfu"]) == 1
    assert asked.pop() == {"parts": {"encode": 90.0, "mfu": gpu.PARTS["mfu"][1]}, "total": 90.0 + gpu.PARTS["mfu"][1]}
    assert "gpu_matmul" in capsys.readouterr().err
    found.pop()
    assert command.main(["gpu", "--seconds", "300", "--json"]) == 0
    assert asked.pop() == {"parts": None, "total": 300.0}
    assert "gpu_matmul" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        command.main(["gpu", "encoding"])
    assert stopped.value.code == 2
    assert "no part 'encoding'" in capsys.readouterr().err
