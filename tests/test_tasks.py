"""Names, benchmarks and built-ins become tasks; data in memory becomes what mteb evaluates."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import poolwise
from poolwise.data.own_tasks import TaskData
from poolwise.data.tasks import PAPER_TASKS, resolve_tasks, task_from_data
from poolwise.errors import TaskError

STS = [
    {"sentence1": 'She said "no"', "sentence2": "A, b", "score": 1.5},
    {"sentence1": "Ünïcode", "sentence2": "x y", "score": 4},
]
RERANKING = [{"query": "q", "positive": ["good"], "negative": ["bad", "worse, much"]}]


def one(name: str, base: Path):
    (task,) = resolve_tasks([name], base)
    return task


# ---------------------------------------------------------------- official tasks


@pytest.mark.parametrize(
    ("name", "splits", "subsets"),
    [
        ("AmazonCounterfactualClassification", ("test",), ("en",)),
        ("MSMARCO", ("dev",), ("default",)),
        ("STS17", ("test",), ("en-en",)),
        ("STSBenchmark", ("test",), ("default",)),
    ],
)
def test_official_names_are_pinned_as_in_the_benchmark(name, splits, subsets, tmp_path):
    task = one(name, tmp_path)
    assert (task.name, task.splits, task.subsets) == (name, splits, subsets)
    assert f"@{task.mteb.metadata.dataset['revision']}, mteb " in task.identity


def test_benchmarks_have_mtebs_tasks_once_each(tmp_path):
    counts = Counter(task.task_type for task in resolve_tasks(["MTEB(eng, v1)"], tmp_path))
    assert counts["Classification"] == 12
    assert counts["Retrieval"] == 15
    assert counts.total() == 56
    assert len(resolve_tasks(["MTEB(eng, v2)"], tmp_path)) == 41
    both = resolve_tasks(["MTEB(eng, v1)", "STS12", "MTEB(eng, v2)"], tmp_path)
    assert len(both) == 56 + 41 - 25  # 25 tasks are in both


def test_the_papers_list_has_its_counts(tmp_path):
    assert {kind: len(names) for kind, names in PAPER_TASKS.items()} == {
        "STS": 8,
        "Classification": 6,
        "Clustering": 11,
        "Retrieval": 14,
        "Reranking": 4,
        "PairClassification": 3,
        "Summarization": 1,
    }
    tasks = resolve_tasks(["paper"], tmp_path)
    assert [(t.task_type, t.name) for t in tasks] == [(kind, n) for kind, names in PAPER_TASKS.items() for n in names]


def test_tasks_of_one_origin_share_their_source(tmp_path):
    source = {task.name: task.source for task in resolve_tasks(["MTEB(eng, v1)"], tmp_path)}
    assert {source[f"STS{year}"] for year in (12, 13, 14, 15, 16)} | {source["STSBenchmark"]} == {"semeval-sts"}
    assert source["CQADupstackRetrieval"] == source["AskUbuntuDupQuestions"] == "stackexchange"
    assert source["ArxivClusteringP2P"] == source["ArxivClusteringS2S"]
    assert len({source[name] for name in ("SICK-R", "BIOSSES", "STS22", "STS12")}) == 4


def test_all_unknown_names_are_reported_at_once_with_guesses(tmp_path):
    (tmp_path / "faq").mkdir()
    with pytest.raises(TaskError) as caught:
        resolve_tasks(["STSBenchmrk", "MTEB(eng, v3)", "./fag", "faq"], tmp_path)
    message = str(caught.value)
    assert "unknown task 'STSBenchmrk'" in message
    assert "did you mean 'STSBenchmark'?" in message
    assert "did you mean 'MTEB(eng, v" in message
    assert "'./fag': no such folder" in message
    assert "did you mean 'faq'?" in message
    assert "did you mean the folder './faq'?" in message


def test_an_image_task_is_no_task_here(tmp_path):
    with pytest.raises(TaskError, match="unknown task 'CIFAR10'"):
        resolve_tasks(["CIFAR10"], tmp_path)


def test_importing_tasks_is_light():
    code = "import sys, poolwise.data.tasks; assert not {'torch', 'mteb', 'datasets', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- data in memory and built-ins


def test_reranking_gives_each_query_its_own_candidates_negatives_first_on_ties():
    data = TaskData("reranking", {"test": [*RERANKING, {"query": "p", "positive": ["good"], "negative": ["x"]}]})
    task = task_from_data("r", data, "r")
    task.load()
    found = task.split_data("test", "default")
    assert {q: sorted(c, reverse=True) for q, c in found["top_ranked"].items()} == {
        "0": ["b0-1", "b0-0", "a0-0"],
        "1": ["b1-0", "a1-0"],
    }
    assert found["relevant_docs"]["0"] == {"a0-0": 1, "b0-0": 0, "b0-1": 0}
    assert list(task.texts()) == ["q", "p", "good", "bad", "worse, much", "good", "x"]


def test_built_in_tasks_come_from_the_demo(monkeypatch, tmp_path):
    stub = SimpleNamespace(
        task_names=lambda: ["demo/roles-sts", "demo/tail-pair_classification"],
        task_data=lambda name: {
            "kind": "sts",
            "records": {"test": [*STS, {"sentence1": name, "sentence2": "x", "score": 0}]},
        },
    )
    monkeypatch.setitem(sys.modules, "poolwise.demo", stub)
    monkeypatch.setattr(poolwise, "demo", stub, raising=False)
    tasks = resolve_tasks(["demo", "demo/roles-sts"], tmp_path)
    assert [(t.name, t.source) for t in tasks] == [
        ("demo/roles-sts", "roles"),
        ("demo/tail-pair_classification", "tail"),
    ]
    with pytest.raises(TaskError, match=r"unknown built-in task 'demo/role-sts'.*did you mean 'demo/roles-sts'\?"):
        resolve_tasks(["demo/role-sts"], tmp_path)


def test_classification_texts_hold_the_training_texts_too():
    rows = {"train": [{"text": "a", "label": 0}, {"text": "b", "label": 1}], "test": [{"text": "c", "label": 1}]}
    assert sorted(task_from_data("c", TaskData("classification", rows), "c").texts()) == ["a", "b", "c"]


def test_one_task_with_different_subsets_is_refused(tmp_path):
    with pytest.raises(
        TaskError, match=r"task STS17 again with different splits or subsets \(test of en-en; test of .* more\)"
    ):
        resolve_tasks(["MTEB(eng, v1)", "MTEB(Multilingual, v2)"], tmp_path)


def test_a_task_type_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (task,) = resolve_tasks(["Tatoeba"], tmp_path)
    assert task.task_type == "BitextMining"
    subset, split = task.subsets[0], task.splits[0]
    task.mteb.data_loaded = True
    monkeypatch.setattr(
        task.mteb, "dataset", {subset: {split: {"sentence1": ["a"], "sentence2": ["b"]}}}, raising=False
    )
    with pytest.raises(TaskError, match="'Tatoeba': tasks of type BitextMining cannot be read yet; leave it out"):
        list(task.split_texts(split, subset))
