"""Every reader of poolwise as a target of the fuzzer: a few valid inputs, and what the program does with one.

A target is called with an input in a folder of its own. It may return, or raise a PoolwiseError: anything else that
comes out of it is a finding.
"""

# ruff: noqa: E501
from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch

from paper_head import random_weights
from poolwise import api
from poolwise.data import own_tasks, pairs, reading, survey, tasks
from poolwise.errors import Mistakes, PoolwiseError
from poolwise.files import BLANK, write_json
from poolwise.model import checkpoint, release
from poolwise.model.base import base_path
from poolwise.pooling import paper
from poolwise.runs import ab, layout, looks
from poolwise.runs import run as runner
from poolwise.runs.train import COMPLETE, latest_checkpoint
from poolwise.screen import device_lines, grid_table
from poolwise.study import records
from poolwise.study.study import Study
from poolwise.verdicts import readers, trec
from poolwise.verdicts.costs import mean_costs
from poolwise.verdicts.mteb_files import known_task

known_task("STS12")  # mteb's register is read once, which takes seconds and is no reader's fault
Run = Callable[[Path, bytes], Any]


@dataclass(frozen=True)
class Target:
    """`seeds`: valid inputs. `form`: `json`, `sealed` (JSON with a checksum), `toml`, `text` or `binary`."""

    name: str
    form: str
    seeds: tuple[bytes, ...]
    run: Run


STUDY = {
    "name": "s",
    "seeds": [0, 1, 2],
    "extend_to": 5,
    "tasks": ["demo"],
    "references": ["tfidf"],
    "evaluate_at": [1.0],
    "output": "out",
    "designs": [
        {"preset": "m1"},
        {"name": "x", "attention": "bidirectional", "pooling": "cross_attention", "pooling_args": {"latents": 8}},
    ],
    "recipe": {"base_model": "nano", "steps": 10, "warmup_steps": 0, "lora": {"rank": 4}, "matryoshka": [16]},
    "tuning": {"tasks": ["demo:agreement"], "steps": [5, 10]},
    "grid": {"pooling": ["mean", "weighted_mean"], "attention": ["causal", "bidirectional"]},
}
PLAIN = {key: value for key, value in STUDY.items() if key not in ("grid", "tuning")}
ROW = {"name": "m1-s0", "label": "m1", "role": "design", "seed": 0, "base": "nano", "id": "a", "scores": ["t.parquet"]}
COST = {
    "design": "m1", "base": "nano", "attention": "causal", "pooling": "last_token", "pooling_args": {}, "base_parameters": 9,
    "tuned_base_parameters": 1, "head_parameters": 0, "trainable_parameters": 1, "encode_flops": 7, "training_flops": 70,
}  # fmt: skip
LOOK = {
    "look": 1, "seeds": [0, 1, 2], "alpha": 0.03, "taken": "2026-01-01T00:00:00+00:00",
    "verdicts": [{"group": "STS", "design": "x", "verdict": "better", "difference": 0.1}],
}  # fmt: skip
RUN = {
    "format": 2, "recipe": {"base_model": "nano", "steps": 10}, "design": {"name": "m1", "attention": "causal", "pooling": "mean"},
    "seed": 0, "base": {"path": "/nowhere/at/all", "local": True, "identity": "x"}, "step": 10, "files": {},
}  # fmt: skip
ADAPTER = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "use_dora": False,
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
MTEB = {
    "task_name": "STS12", "mteb_version": "2.26.0", "dataset_revision": "x", "evaluation_time": 1.5,
    "scores": {"test": [{"main_score": 0.5, "cosine_spearman": 0.5, "hf_subset": "default", "languages": ["eng-Latn"]}]},
}  # fmt: skip
TOML = """name = "s"
seeds = [0, 1]
tasks = ["demo"]
baseline = "m1"
margin = 0.005
[recipe]
base_model = "nano"
steps = 10
lora = { rank = 4, alpha = 8 }
query_prompt = "query: "
[[designs]]
preset = "m1"
[[designs]]
name = "x"
attention = "bidirectional"
pooling = "cross_attention"
pooling_args = { latents = 8, heads = 2 }
[grid]
pooling = ["mean"]
attention = ["causal", "bidirectional"]
"""
SCORES = "design,seed,task,task_type,metric,score,step,split\n" + "".join(
    f"{design},{seed},t{task},STS,cosine_spearman,{0.5 + 0.01 * seed + 0.02 * task},10,test\n"
    for design in ("m1", "m2") for seed in (0, 1) for task in range(3)
)  # fmt: skip
STS = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i} for i in range(4)]
PAIRS = [{"query": f"q {i}", "positive": f"p {i}", "negative_1": f"n {i}"} for i in range(4)]
LABELLED = [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(6)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(rows: list[dict[str, Any]], mark: str) -> bytes:
    return "\n".join([mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]).encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def plain(content: Any) -> bytes:
    return json.dumps(content).encode()


def sealed(content: dict[str, Any]) -> bytes:
    """The text of a sealed file before it is sealed; the fuzzer seals what it made of it, as a forger would."""
    return json.dumps({**content, "checksum": BLANK}).encode()


def study_at(folder: Path) -> Study:
    return Study.parse({**PLAIN, "output": str(folder)}, folder)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def study_file(folder: Path, data: bytes) -> None:
    study = Study.load(write(folder / "study.toml", data))
    study.fingerprint, study.all_seeds, study.grid_notes, study.place  # noqa: B018


def names_of_files(folder: Path, data: bytes) -> None:
    """What a study file or a command line may name: a base model, training data, a task, a run folder."""
    name = data.decode("utf-8", "surrogateescape")
    for use in (
        base_path,
        checkpoint._no_model,
        lambda name: tasks.resolve_tasks([f"./{name}"], folder),
        lambda name: ab.ab(name, ["tfidf"] * 2),
    ):
        with contextlib.suppress(PoolwiseError):
            use(name)
    with contextlib.suppress(PoolwiseError):
        Study.parse({**PLAIN, "output": name}, folder).place  # noqa: B018
    if not pairs.is_hub_name(name):
        pairs.open_source(name, "train", folder)


def study_record(folder: Path, data: bytes) -> None:
    write(folder / layout.STUDY, data)
    with contextlib.suppress(PoolwiseError):
        layout.guard(study_at(folder))
    layout.study_in(folder)


def trials_record(folder: Path, data: bytes) -> None:
    write(folder / layout.TRIALS, data)
    rows = runner.trials(study_at(folder))
    if rows:
        grid_table(rows, {})
        device_lines(rows)
    runner.gather(folder)


def costs_record(folder: Path, data: bytes) -> None:
    write(folder / layout.COSTS, data)
    study = study_at(folder)
    mean_costs(layout.stored_costs(study.model_copy(update={"designs": study.designs[:1]})), "m1")


def looks_record(folder: Path, data: bytes) -> None:
    write(folder / layout.LOOKS, data)
    study = study_at(folder)
    at = looks.state(study, {("m1", 0)})
    looks.earlier(looks.plan(study).looks, looks.State(at.seeds, at.alpha, look=2))


def trial_records(folder: Path, data: bytes) -> None:
    trial = folder / "trials" / "m1-s0"
    if not (folder / layout.TRIALS).exists():
        write_json(folder / layout.TRIALS, {"trials": [ROW]})
        trial.mkdir(parents=True, exist_ok=True)
    for name in (layout.FAILED, layout.DTYPE, layout.WORK, layout.LAYERS, layout.LADDER, layout.TRAINED):
        (trial / name).write_bytes(data)
    study = study_at(folder)
    runner.trials(study)
    runner.shared_work(study)
    for record in (records.Ladder, records.Trained):
        records.find(trial / layout.LADDER, record)
    layout.layer_attention(study, runner.trials(study))


def run_file(folder: Path, data: bytes) -> None:
    write(folder / checkpoint.RUN_FILE, data)
    with contextlib.suppress(PoolwiseError):
        checkpoint.verify_files(folder, checkpoint.read_run(folder)["files"])
    checkpoint.load(folder)


def adapter_settings(folder: Path, data: bytes) -> None:
    write(folder / paper.ADAPTER, data)
    release._recipe(folder, "nano", "float32")


def weights(folder: Path, data: bytes) -> None:
    write(folder / "adapter_model.safetensors", data)
    release._adapter(folder)


def torch_weights(folder: Path, data: bytes) -> None:
    paper.load_paper_head(write(folder / paper.HEAD, data), heads=2)


def marker(folder: Path, data: bytes) -> None:
    write(folder / "checkpoint-2" / COMPLETE, data)
    latest_checkpoint(folder, (2,))


def modules_file(folder: Path, data: bytes) -> None:
    write(folder / "modules.json", data)
    records.check_modules(folder)


def checksums_file(folder: Path, data: bytes) -> None:
    write(folder / records.CHECKSUMS, data)
    records.verify_export(folder)


def score_file(folder: Path, data: bytes) -> None:
    path = write(folder / "scores.parquet", data)
    assert layout.read_scores(path) is None or data in SCORE_FILES, "an altered score file was believed"


def task_settings(folder: Path, data: bytes) -> None:
    if not (folder / "test.jsonl").exists():
        write(folder / "test.jsonl", lines(STS))
    write(folder / "task.toml", data)
    own_tasks.read_folder(folder)


def task_in(name: str, **others: bytes) -> Run:
    """A folder with one fuzzed file and others that are sound."""

    def run(folder: Path, data: bytes) -> None:
        for other, content in others.items():
            path = folder / other.replace("__", "/")
            if not path.exists():
                write(path, content)
        write(folder / name, data)
        own_tasks.read_folder(folder)

    return run


def training_file(name: str) -> Run:
    def run(folder: Path, data: bytes) -> None:
        file = write(folder / name, data)
        with contextlib.suppress(PoolwiseError):
            survey.survey(folder)
        found = pairs.PairSource(name, lambda mistakes: reading.read_records(file, mistakes, pairs.choose))
        list(pairs._checked_rows(found, 2, pairs.Counter(), []))

    return run


def text_file(name: str) -> Run:
    def run(folder: Path, data: bytes) -> None:
        list(reading.read_texts(write(folder / name, data)))

    return run


def score_table(name: str) -> Run:
    def run(folder: Path, data: bytes) -> None:
        readers.read(write(folder / name, data))

    return run


def comparison(folder: Path, data: bytes) -> None:
    api.compare(write(folder / "scores.csv", data)).to_json()


def mteb_file(folder: Path, data: bytes) -> None:
    readers.read(write(folder / "m" / "org__model" / "rev" / "STS12.json", data).parents[2])


def mteb_meta(folder: Path, data: bytes) -> None:
    for revision in ("a" * 8, "b" * 8):
        if not (path := folder / "m" / "org__model" / revision / "STS12.json").exists():
            write(
                path,
                plain(
                    {
                        **MTEB,
                        "scores": {"test": [{"main_score": len(revision) / ord(revision[0]), "hf_subset": "default"}]},
                    }
                ),
            )
    write(folder / "m" / "org__model" / ("b" * 8) / "model_meta.json", plain({"release_date": "2023-01-01"}))
    write(folder / "m" / "org__model" / ("a" * 8) / "model_meta.json", data)
    readers.read(folder / "m")


def trec_run(folder: Path, data: bytes) -> None:
    if not (folder / "qrels.txt").exists():
        write(folder / "qrels.txt", b"q1 0 d1 1\nq2 0 d2 2\n")
    trec.read_trec([write(folder / "a.run", data)], folder / "qrels.txt")


def trec_judgements(folder: Path, data: bytes) -> None:
    if not (folder / "a.run").exists():
        write(folder / "a.run", b"q1 Q0 d1 1 0.9 x\nq1 Q0 d2 2 0.8 x\nq2 Q0 d2 1 0.7 x\n")
    trec.read_trec([folder / "a.run"], write(folder / "qrels.txt", data))


def trec_metric(folder: Path, data: bytes) -> None:
    trec_judgements(folder, b"q1 0 d1 1\n")
    trec.read_trec([folder / "a.run"], folder / "qrels.txt", data.decode("utf-8", "surrogateescape"))


def record_file(name: str) -> Run:
    def run(folder: Path, data: bytes) -> None:
        mistakes = Mistakes(name)
        for _ in reading.read_records(write(folder / name, data), mistakes, lambda names: names):
            pass
        mistakes.check()

    return run


def _score_files() -> tuple[bytes, ...]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.parquet"
        layout.write_scores(path, [{"task": "t", "score": 0.5, "item_id": None}, {"task": "t", "score": 1.0}])
        return (path.read_bytes(),)


def torch_saved(zipped: bool) -> bytes:
    sink = io.BytesIO()
    torch.save(
        random_weights(width=2, latents=1, heads=2, head_dim=1, rows=2), sink, _use_new_zipfile_serialization=zipped
    )
    return sink.getvalue()


SCORE_FILES = _score_files()
QRELS = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(3)]
CORPUS = [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(3)]
QUERIES = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(3)]
RETRIEVAL = {"corpus.jsonl": lines(CORPUS), "queries.jsonl": lines(QUERIES), "qrels__test.tsv": delimited(QRELS, "\t")}
SETS = [{"sentences": ["a", "b", "c"], "labels": ["x", "y", "x"]}]
RERANKING = [{"query": "q", "positive": ["a"], "negative": ["b", "c"]}]

TARGETS = [
    Target("study file", "toml", (TOML.encode(),), study_file),
    Target("names of files", "text", (b"./llama", b"~/data/train.jsonl", b"~no-such-user/x", b"runs/s"), names_of_files),
    Target("study.json", "sealed", (sealed(STUDY), sealed(PLAIN)), study_record),
    Target("trials.json", "sealed", (sealed({"trials": [ROW, {**ROW, "name": "x-s1", "seed": 1}]}),), trials_record),
    Target("costs.json", "sealed", (sealed({"designs": [COST]}),), costs_record),
    Target("looks.json", "sealed", (sealed({"planned": [0, 1, 2], "extend_to": 5, "extended": False, "looks": [LOOK]}),), looks_record),
    Target("records of a trial", "sealed", (
        sealed({"reason": "no space"}), sealed({"base": "x", "dtype": "float32", "device": "cpu"}),
        sealed({"asked": 3, "encoded": 2, "tokens": 9, "computed": 10}), sealed({"texts": 3, "attention": [0.5, 0.5]}),
        sealed({"shares": {"ladder-1": 0.5, "ladder-2": None}}), sealed({"losses": {"1": 0.5}, "seconds": 3.5}),
    ), trial_records),
    Target("run.json", "sealed", (sealed(RUN),), run_file),
    Target("adapter settings", "json", (plain(ADAPTER),), adapter_settings),
    Target("weights, safetensors", "binary", (safetensors.torch.save({"a": torch.ones(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}),), weights),
    Target("weights, torch", "binary", (torch_saved(True), torch_saved(False)), torch_weights),
    Target("checkpoint marker", "sealed", (sealed({"seconds": 1.5, "files": {"a": "0" * 64}}), sealed({"seconds": 1.5, "files": {}})), marker),
    Target("modules.json", "json", (plain(MODULES),), modules_file),
    Target("checksums.json", "sealed", (sealed({"files": {"config.json": "0" * 64}}),), checksums_file),
    Target("score file", "binary", SCORE_FILES, score_file),
    Target("task.toml", "toml", (b'kind = "sts"\nname = "n"\nsource = "s"\nsplit = "test"\n',), task_settings),
    Target("STS JSONL", "text", (lines(STS),), task_in("test.jsonl")),
    Target("STS CSV", "text", (delimited(STS, ","), delimited(STS, ";")), task_in("test.csv")),
    Target("STS Parquet", "binary", (parquet(STS), parquet(STS, compression="none", use_dictionary=False)), task_in("test.parquet")),
    Target("classification", "text", (lines(LABELLED),), task_in("test.jsonl", **{"train.jsonl": lines(LABELLED)})),
    Target("clustering", "text", (lines(SETS),), task_in("sets.jsonl")),
    Target("reranking", "text", (lines(RERANKING),), task_in("test.jsonl")),
    Target("corpus", "text", (lines(CORPUS),), task_in("corpus.jsonl", **{k: v for k, v in RETRIEVAL.items() if "corpus" not in k})),
    Target("qrels", "text", (delimited(QRELS, "\t"),), task_in("qrels/test.tsv", **{k: v for k, v in RETRIEVAL.items() if "qrels" not in k})),
    Target("pairs JSONL", "text", (lines(PAIRS),), training_file("a.jsonl")),
    Target("pairs CSV", "text", (delimited(PAIRS, ","),), training_file("a.csv")),
    Target("pairs Parquet", "binary", (parquet(PAIRS), parquet(PAIRS, compression="zstd")), training_file("a.parquet")),
    Target("gzip", "binary", (gzip.compress(lines(PAIRS), mtime=0),), training_file("a.jsonl.gz")),
    Target("texts", "text", (b"one\ntwo\nthree\n",), text_file("a.txt")),
    Target("records TSV", "text", (delimited(PAIRS, "\t"),), record_file("a.tsv")),
    Target("scores CSV", "text", (SCORES.encode(),), score_table("s.csv")),
    Target("scores TSV", "text", (SCORES.replace(",", "\t").encode(),), score_table("s.tsv")),
    Target("scores Parquet", "binary", (parquet([dict(zip(SCORES.split("\n")[0].split(","), row.split(","), strict=True)) for row in SCORES.strip().split("\n")[1:]]),), score_table("s.parquet")),
    Target("comparison", "text", (SCORES.encode(),), comparison),
    Target("mteb result", "json", (plain(MTEB),), mteb_file),
    Target("mteb model_meta", "json", (plain({"release_date": "2024-01-01", "revision": "x"}),), mteb_meta),
    Target("TREC run", "text", (b"q1 Q0 d1 1 0.9 x\nq1 Q0 d2 2 0.8 x\nq2 Q0 d2 1 0.7 x\n",), trec_run),
    Target("TREC judgements", "text", (b"q1 0 d1 1\nq2 0 d2 2\n", b"query-id corpus-id score\nq1 d1 1\n"), trec_judgements),
    Target("TREC metric", "text", (b"ndcg_at_10", b"map", b"recall_at_100"), trec_metric),
]  # fmt: skip
