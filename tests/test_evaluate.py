"""Scores equal to those worked out by hand, for every kind of task; identities, prompts, order, failures."""

import json
import math
import os
import random
import socket
import subprocess
import sys
import time

import mteb
import numpy as np
import pytest
import torch
from mteb import TaskMetadata
from mteb.abstasks import AbsTaskClustering
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from poolwise.data.own_tasks import TaskData
from poolwise.data.tasks import Task, task_from_data
from poolwise.errors import ModelError, TaskError
from poolwise.scoring.adapters import adapt
from poolwise.scoring.evaluate import evaluate, item_scores, model_identity
from poolwise.scoring.references import reference


def unit(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


class Angles:
    """A text is "NAME DEGREES"; its vector points there. Keeps what it was asked to encode."""

    def __init__(self):
        self.seen: list[str] = []

    def encode(self, texts):
        self.seen += texts
        return [unit(float(text.split()[-1])) for text in texts]


def sts() -> Task:
    rows = [("a 0", "b 10", 5.0), ("c 0", "d 30", 2.0), ("e 0", "f 50", 3.0), ("g 0", "h 80", 0.0)]
    return task("sts", {"test": [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in rows]})


def pairs() -> Task:
    rows = [("a 0", "b 10", 1), ("c 0", "d 30", 0), ("e 0", "f 50", 1), ("g 0", "h 80", 0)]
    return task("pair_classification", {"test": [{"sentence1": a, "sentence2": b, "labels": n} for a, b, n in rows]})


def retrieval() -> Task:
    corpus = [{"_id": f"d{n}", "title": "", "text": f"doc {n}"} for n in (0, 20, 40, 60, 80)]
    queries = [{"_id": "first", "text": "q 2"}, {"_id": "second", "text": "q 85"}]
    grades = [("first", "d20", 1), ("second", "d80", 2), ("second", "d20", 1)]
    qrels = [{"query-id": q, "corpus-id": d, "score": s} for q, d, s in grades]
    return task("retrieval", {"corpus": corpus, "queries": queries, "qrels": qrels})


def reranking() -> Task:
    rows = [
        {"query": "q 0", "positive": ["p 10", "p 30"], "negative": ["n 20", "n 40"]},
        {"query": "q 0", "positive": ["p 90"], "negative": ["n 20", "n 40"]},
    ]
    return task("reranking", {"test": rows})


def classification() -> Task:
    train = [
        {"text": f"t {side + i}", "label": label} for side, label in ((0, "east"), (90, "north")) for i in range(8)
    ]
    test = [("a 1", "east"), ("b 2", "east"), ("c 89", "north"), ("d 88", "east")]
    return task("classification", {"train": train, "test": [{"text": t, "label": n} for t, n in test]})


def clustering() -> Task:
    sets = [
        {"sentences": [f"{name} 0", f"{name} 1", f"{name} 90", f"{name} 91"], "labels": list(labels)}
        for name, labels in (("a", "xxyy"), ("b", "xyxy"))
    ]
    return task("clustering", {"test": sets})


def task(kind: str, records: dict, name: str = "") -> Task:
    return task_from_data(name or kind, TaskData(kind, records), source="tests")


ALL = [sts, pairs, retrieval, reranking, classification, clustering]


def split_rows(rows):
    (main,) = [row for row in rows if row["item_id"] is None]
    return main, {row["item_id"]: row for row in rows if row["item_id"] is not None}


# ---------------------------------------------------------------- by hand


def test_sts_is_the_rank_correlation_of_cosines():
    main, items = split_rows(evaluate(Angles(), [sts()], identity="m"))
    # ranks of the cosines 4 3 2 1, of the gold scores 4 2 3 1: 1 - 6 · 2 / (4 · 15)
    assert (main["metric"], main["task_type"], main["split"]) == ("cosine_spearman", "STS", "test")
    assert main["score"] == pytest.approx(0.8)
    assert [items[str(n)]["score"] for n in range(4)] == pytest.approx(
        [math.cos(math.radians(d)) for d in (10, 30, 50, 80)]
    )
    assert [items[str(n)]["gold"] for n in range(4)] == [5, 2, 3, 0]
    assert {(row["metric"], row["note"]) for row in items.values()} == {("cosine", "resampled, no per-item score")}


def test_pair_classification_is_average_precision():
    main, items = split_rows(evaluate(Angles(), [pairs()], identity="m"))
    # ranked by cosine: 1 0 1 0, so (1/1 + 2/3) / 2
    assert main["metric"] == "cosine_ap"
    assert main["score"] == pytest.approx(5 / 6)
    assert [items[str(n)]["gold"] for n in range(4)] == [1, 0, 1, 0]


def test_retrieval_is_ndcg_with_a_row_for_each_query():
    main, items = split_rows(evaluate(Angles(), [retrieval()], identity="m"))
    first = 1 / math.log2(3)  # its document is second
    second = (2 / math.log2(2) + 1 / math.log2(5)) / (2 / math.log2(2) + 1 / math.log2(3))  # grades 2 first, 1 fourth
    assert main["metric"] == "ndcg_at_10"
    assert {name: row["score"] for name, row in items.items()} == pytest.approx({"first": first, "second": second})
    assert main["score"] == pytest.approx((first + second) / 2, abs=1e-5)


def test_reranking_is_average_precision_of_each_query():
    main, items = split_rows(evaluate(Angles(), [reranking()], identity="m"))
    assert main["metric"] == "map_at_1000"
    assert {name: row["score"] for name, row in items.items()} == pytest.approx({"0": (1 + 2 / 3) / 2, "1": 1 / 3})
    assert main["score"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2, abs=1e-5)


def test_classification_is_accuracy_with_a_row_for_each_example():
    main, items = split_rows(evaluate(Angles(), [classification()], identity="m"))
    assert (main["metric"], main["score"]) == ("accuracy", 0.75)
    assert [items[str(n)]["score"] for n in range(4)] == [1, 1, 1, 0]


def test_clustering_is_v_measure_of_each_set():
    main, items = split_rows(evaluate(Angles(), [clustering()], identity="m"))
    # the first labels are the two directions, the second are independent of them
    assert main["score"] == pytest.approx(0.5)
    assert [items[str(n)]["score"] for n in range(2)] == pytest.approx([1, 0], abs=1e-12)


def test_clustering_sets_that_overlap_have_a_score_and_no_items_to_test():
    sets = [{"sentences": ["a 0", "b 1", "c 90", "d 91"], "labels": list(labels)} for labels in ("xxyy", "xyxy")]
    main, items = split_rows(evaluate(Angles(), [task("clustering", {"test": sets})], identity="m"))
    assert main["score"] == pytest.approx(0.5)
    assert items == {}


def test_mtebs_fast_clustering_does_not_depend_on_what_ran_before():
    texts = [f"t {n}" for n in range(60)]
    attributes = {
        "metadata": TaskMetadata(
            name="fast",
            description="-",
            dataset={"path": "-", "revision": "-"},
            type="Clustering",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="v_measure",
        ),
        "load_data": lambda self, **_: (
            setattr(self, "dataset", {"test": mteb_dataset(sentences=texts, labels=[n // 25 for n in range(60)])}),
            setattr(self, "data_loaded", True),
        ),
        "max_fraction_of_documents_to_embed": 0.5,
        "n_clusters": 3,
    }
    fast = Task(
        "fast", "Clustering", "s", "i", type("Fast", (AbsTaskClustering,), attributes)(), ("test",), ("default",)
    )
    first, again = (evaluate(Angles(), [fast], identity="m") for _ in range(2))
    assert [row["score"] for row in first] == [row["score"] for row in again]
    main, items = split_rows(first)
    assert list(items) == ["Level 0/0", "Level 0/1", "Level 0/2"]
    assert main["score"] == pytest.approx(np.mean([row["score"] for row in items.values()]))


def mteb_dataset(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def test_an_aggregate_is_the_mean_of_its_parts_and_names_their_items():
    parts = [retrieval(), task("retrieval", {**RECORDS, "queries": [{"_id": "only", "text": "q 85"}]}, name="other")]
    metadata = AggregateTaskMetadata(
        name="both",
        description="-",
        type="Retrieval",
        main_score="ndcg_at_10",
        eval_splits=["test"],
        tasks=[part.mteb for part in parts],
    )
    both = type("Both", (AbsTaskAggregate,), {"metadata": metadata})()
    joined = Task("both", "Retrieval", "s", "i", both, ("test",), ("default",))
    main, items = split_rows(evaluate(Angles(), [joined], identity="m"))
    alone = [split_rows(evaluate(Angles(), [part], identity="m"))[0]["score"] for part in parts]
    assert main["score"] == pytest.approx(np.mean(alone))
    assert list(items) == ["retrieval/first", "retrieval/second", "other/only"]
    assert len(list(joined.texts())) == 5 + 2 + 2 + 1


RECORDS = {
    "corpus": [{"_id": "d80", "title": "a", "text": "doc 80"}, {"_id": "d0", "title": "", "text": "doc 0"}],
    "qrels": [{"query-id": "only", "corpus-id": "d0", "score": 1}],
}


# ---------------------------------------------------------------- what must not happen


@pytest.mark.parametrize("make", ALL)
def test_a_constant_embedding_scores_0_and_is_flagged(make):
    class Constant:
        def encode(self, texts):
            return np.ones((len(texts), 3))

    main, items = split_rows(evaluate(Constant(), [make()], identity="m"))
    assert (main["score"], main["note"]) == (0.0, "constant embedding")
    assert {row["score"] for row in items.values() if row["gold"] is None} <= {0.0}


@pytest.mark.parametrize("make", ALL)
def test_embeddings_that_are_not_finite_are_refused_by_the_tasks_name(make):
    class Broken(Angles):
        def encode(self, texts):
            vectors = np.array(super().encode(texts))
            vectors[-1, 0] = np.nan
            return vectors

    name = make().name
    with pytest.raises(ModelError, match=f"task '{name}': 1 of .* embeddings are not finite"):
        evaluate(Broken(), [make()], identity="m")


def test_a_failure_names_its_task():
    class Failing(Angles):
        def encode(self, texts):
            raise RuntimeError("out of memory")

    with pytest.raises(TaskError, match="task 'reranking' failed: RuntimeError: out of memory"):
        evaluate(Failing(), [reranking()], identity="m")


def test_a_mean_that_is_not_mtebs_score_is_an_error():
    made = clustering()
    made.load()
    scores = {"test": [{"hf_subset": "default", "v_measures": [1.0, 0.0], "v_measure": 0.6, "main_score": 0.6}]}
    with pytest.raises(TaskError, match=r"mean of v_measure of 2 items is 0\.500000, mteb says 0\.600000"):
        item_scores(made, {"default": {"test": []}}, scores)


def test_subqueries_count_by_their_best_score():
    made = retrieval()
    made.load()
    made.mteb.metadata = made.mteb.metadata.model_copy(update={"main_score": "max_over_subqueries_map_at_1000"})
    made.mteb.dataset["default"]["test"]["relevant_docs"] = {"a_0": {"d0": 1}, "a_1": {"d0": 1}, "b_0": {"d20": 1}}
    run = {"a_0": {"d0": 0.1, "d20": 0.5}, "a_1": {"d0": 0.9, "d20": 0.2}, "b_0": {"d0": 0.9, "d20": 0.2}}
    scores = {"test": [{"hf_subset": "default", "main_score": 0.75}]}
    items = item_scores(made, {"default": {"test": run}}, scores)
    assert {(item.item_id, item.score) for item in items} == {("a", 1.0), ("b", 0.5)}


def test_scores_do_not_depend_on_the_order_of_the_tasks():
    class Noisy(Angles):
        def encode(self, texts):
            return np.array(super().encode(texts)) + 0.3 * np.random.randn(len(texts), 2) + random.random() / 9

    def scores(makers):
        rows = evaluate(Noisy(), [make() for make in makers], identity="m")
        return {(row["task"], row["metric"], row["item_id"]): row["score"] for row in rows}

    assert scores(ALL) == scores(ALL[::-1])


def test_random_generators_and_training_mode_are_left_as_they_were():
    class Module(torch.nn.Module):
        def encode(self, texts):
            self.eval()
            return Angles().encode(texts)

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    model, made = Module().train(), classification()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    evaluate(model, [made], identity="m")
    assert draw() == expected
    assert model.training


# ---------------------------------------------------------------- identity, prompts, provenance


def test_rows_say_what_was_evaluated_on_what():
    made = sts()
    calls = []
    rows = evaluate(Angles(), [made], identity="hash-1", items=False, progress=lambda *call: calls.append(call))
    assert len(rows) == 1
    assert rows[0]["model_identity"] == "hash-1"
    assert (rows[0]["task_identity"], rows[0]["source"], rows[0]["subset"]) == (made.identity, "tests", "default")
    assert rows[0]["mteb_version"] == mteb.__version__
    assert rows[0]["prompts"] == "{}"
    assert rows[0]["seconds"] > 0
    assert calls == [("sts", 0, 1), ("", 1, 1)]
    meta = adapt(Angles(), made, "hash-2", 8, None).mteb_model_meta
    assert (meta.name, meta.revision) == ("poolwise/model", "hash-2")


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        ({}, "", ""),
        ({"query": "Q ", "document": "D "}, "Q ", "D "),
        ({"query": "Q ", "Retrieval": "R "}, "R ", "R "),
        ({"query": "Q ", "Retrieval-query": "RQ ", "Retrieval": "R "}, "RQ ", "R "),
        ({"Retrieval-query": "RQ ", "retrieval": "T ", "retrieval-document": "TD "}, "T ", "TD "),
    ],
)
def test_prompts_by_task_and_side_most_particular_first(prompts, query, document):
    model = Angles()
    (row,) = evaluate(model, [retrieval()], identity="m", items=False, prompts=prompts)
    assert set(model.seen) == {f"{query}q 2", f"{query}q 85"} | {f"{document}doc {n}" for n in (0, 20, 40, 60, 80)}
    used = {"query": query, "document": document}
    assert json.loads(row["prompts"]) == {side: prompt for side, prompt in used.items() if prompt}


def test_texts_of_symmetric_tasks_have_no_side():
    model = Angles()
    evaluate(model, [sts()], identity="m", prompts={"query": "Q ", "document": "D "})
    assert all(text[1] == " " for text in model.seen)
    evaluate(model, [sts()], identity="m", prompts={"STS": "S "})
    assert model.seen[-1].startswith("S ")


@pytest.fixture(scope="module")
def static() -> SentenceTransformer:
    """A sentence-transformers model that poolwise did not build: word vectors, with prompts of its own."""
    words = ["[UNK]", "doc", "q", "ask", "tell", *(str(n) for n in (0, 2, 10, 20, 30, 40, 60, 80, 85, 90))]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    module = StaticEmbedding(tokenizer, embedding_weights=torch.randn(len(words), 4).numpy())
    return SentenceTransformer(modules=[module], prompts={"query": "ask ", "document": "tell "}, device="cpu")


def test_a_foreign_model_scores_as_in_plain_mteb_with_its_own_prompts(static):
    for make in (retrieval, sts, reranking, pairs):
        (row,) = evaluate(static, [make()], identity="m", items=False)
        plain = mteb.evaluate(static, make().mteb, cache=None, show_progress_bar=False, co2_tracker=False)
        assert row["score"] == plain.task_results[0].get_score()
    (row,) = evaluate(static, [retrieval()], identity="m", items=False)
    assert json.loads(row["prompts"]) == {"query": "ask ", "document": "tell "}
    assert row["dtype"] == "float32"
    (bare,) = evaluate(static, [retrieval()], identity="m", items=False, prompts={})
    assert json.loads(bare["prompts"]) == {}
    assert bare["score"] != row["score"]


def test_model_identity_follows_the_content(static, tmp_path):
    static.save(str(tmp_path / "a"))
    copy = SentenceTransformer(str(tmp_path / "a"), device="cpu")
    assert model_identity(copy) == model_identity(static)
    with torch.no_grad():
        next(copy.parameters())[0, 0] += 1e-6
    changed = model_identity(copy)
    assert changed != model_identity(static)
    copy.prompts = {"query": "other "}
    assert model_identity(copy) != changed
    assert model_identity(reference("tfidf")) != model_identity(reference("tfidf_chars"))


def test_bm25_is_evaluated_where_it_applies():
    rows = evaluate(reference("bm25"), [sts(), retrieval(), reranking()], identity="m", items=False)
    assert [row["task_type"] for row in rows] == ["Retrieval", "Reranking"]


# ---------------------------------------------------------------- through a hub

OFFICIAL = """
import json, sys
from pathlib import Path
from poolwise.scoring.evaluate import evaluate
from poolwise.scoring.references import reference
from poolwise.data.tasks import resolve_tasks
tasks = resolve_tasks(["STSBenchmark", "AmazonCounterfactualClassification"], Path())
rows = evaluate(reference("tfidf_chars"), tasks[:1], identity="t")
rows += evaluate(reference("tfidf"), tasks[1:], identity="t")
json.dump(rows, sys.stdout)
"""


@pytest.fixture
def hub(shared, tmp_path):
    """A loopback hub on a free port; the environment in which the real clients find it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(shared / "tools" / "hub_mirror.py"), str(shared / "hub"), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            own = {
                "HF_ENDPOINT": f"http://127.0.0.1:{port}",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(tmp_path / "hf"),
                "MTEB_CACHE": str(tmp_path / "mteb"),
            }
            yield {**os.environ, **own}
        finally:
            server.terminate()


@pytest.mark.shared
def test_official_tasks_load_by_name_and_tfidf_scores_as_measured(hub, tmp_path):
    done = subprocess.run([sys.executable, "-c", OFFICIAL], env=hub, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    main = {row["task"]: row for row in rows if row["item_id"] is None}
    stsb, amazon = main["STSBenchmark"], main["AmazonCounterfactualClassification"]
    assert stsb["score"] == pytest.approx(0.7125, abs=5e-4)
    assert amazon["score"] == pytest.approx(0.8106, abs=5e-3)
    assert (amazon["split"], amazon["subset"]) == ("test", "en")
    assert stsb["task_identity"].startswith("mteb/stsbenchmark-sts@b0fddb56ed78048fa8b90373c8a3cfc37b684831, mteb ")
    assert len(rows) == 2 + 1379 + 670
    assert not list((tmp_path / "mteb").rglob("*.json"))  # nothing may ever come out of a cache
