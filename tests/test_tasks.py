"""Names, benchmarks, folders and built-ins -> tasks; what is wrong with a folder is said with file and line."""

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import poolwise
from poolwise.data.own_tasks import TaskData, draw_sets
from poolwise.data.tasks import PAPER_TASKS, resolve_tasks, task_from_data
from poolwise.errors import TaskError

STS = [
    {"sentence1": 'She said "no"', "sentence2": "A, b", "score": 1.5},
    {"sentence1": "Ünïcode", "sentence2": "x y", "score": 4},
]
RERANKING = [{"query": "q", "positive": ["good"], "negative": ["bad", "worse, much"]}]
LABELLED = [{"text": f"text {i}", "label": i % 3} for i in range(9)]


def write(path: Path, rows: list[dict]) -> None:
    """Rows in the form that the file's ending asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if ".jsonl" in path.name:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        cells = [[json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
        if ".tsv" in path.name:
            file.writelines("\t".join(map(str, line)) + "\n" for line in [list(rows[0]), *cells])
        else:
            csv.writer(file).writerows([list(rows[0]), *cells])


def one(name: str, base: Path):
    (task,) = resolve_tasks([name], base)
    return task


def problems(folder: Path) -> str:
    with pytest.raises(TaskError) as caught:
        resolve_tasks([str(folder)], folder)
    return str(caught.value)


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


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "tsv.gz"])
@pytest.mark.parametrize(
    ("task_type", "files"),
    [
        ("STS", {"test": STS}),
        (
            "PairClassification",
            {"test": [{"sentence1": "a", "sentence2": "b", "labels": n, "extra": "ignored"} for n in (1, 0)]},
        ),
        ("Classification", {"train": LABELLED, "test": LABELLED[:4]}),
        ("Clustering", {"test": LABELLED}),
        ("Clustering", {"sets": [{"sentences": ["a", "b"], "labels": ["x", "y"]}], "test": LABELLED}),
        ("Reranking", {"test": RERANKING}),
        (
            "Retrieval",
            {
                "corpus": [{"_id": 1, "title": "T", "text": "one"}, {"_id": 2, "title": "", "text": ""}],
                "queries": [{"_id": "q1", "text": "what"}],
                "qrels/test": [{"query-id": "q1", "corpus-id": 1, "score": 2}],
            },
        ),
    ],
)
def test_every_kind_is_found_and_every_format_gives_the_same_content(task_type, files, ending, tmp_path):
    for form in ("jsonl", ending):
        for stem, rows in files.items():
            write(tmp_path / form / f"{stem}.{form}", rows)
    reference, task = one("./jsonl", tmp_path), one(f"./{ending}", tmp_path)
    assert task.task_type == task.mteb.metadata.type == task_type
    assert task.identity == reference.identity
    assert list(task.texts()) == list(reference.texts()) != []
    assert (task.name, task.source, task.splits, task.subsets) == (ending, ending, ("test",), ("default",))


def test_sets_are_preferred_to_drawing(tmp_path):
    write(tmp_path / "f" / "test.jsonl", LABELLED)
    drawn = one("./f", tmp_path)
    drawn.load()
    assert len(drawn.mteb.dataset["test"]) == 10
    write(tmp_path / "f" / "sets.jsonl", [{"sentences": ["a", "b"], "labels": ["x", "y"]}])
    given = one("./f", tmp_path)
    given.load()
    assert given.mteb.dataset["test"].to_list() == [{"sentences": ["a", "b"], "labels": [0, 1]}]


def test_drawn_sets_are_seeded_samples_without_replacement():
    rows = [{"text": str(i), "label": str(i % 2)} for i in range(5001)]
    sets = draw_sets(rows)
    assert sets == draw_sets(rows)
    assert [len(s["sentences"]) for s in sets] == [2000] * 10
    assert all(len(set(s["sentences"])) == 2000 for s in sets)
    assert all(str(int(t) % 2) == label for t, label in zip(sets[3]["sentences"], sets[3]["labels"], strict=True))
    assert sets[0] != sets[1]
    assert [len(s["sentences"]) for s in draw_sets(rows[:7])] == [4] * 10  # half of few texts, so that sets differ


def test_task_toml_says_kind_name_source_and_split(tmp_path):
    write(tmp_path / "a" / "dev.jsonl", LABELLED)
    write(tmp_path / "a" / "train.jsonl", LABELLED)
    (tmp_path / "a" / "task.toml").write_text(
        'kind = "clustering"\nname = "mine"\nsource = "wiki"\nsplit = "dev"', encoding="utf-8"
    )
    task = one("./a", tmp_path)
    assert (task.name, task.task_type, task.source, task.splits) == ("mine", "Clustering", "wiki", ("dev",))


def test_labels_are_numbered_in_the_order_of_their_values(tmp_path):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(["10", "9", "-1", "9"])]
    for part in ("train", "test"):
        write(tmp_path / "f" / f"{part}.csv", rows)
    task = one("./f", tmp_path)
    task.load()
    assert task.mteb.dataset["test"]["label"] == [2, 1, 0, 1]  # as numbers: -1 < 9 < 10


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (["pos ", "pos", "neg"], [1, 1, 0]),  # spaces around a label do not count
        (["10", "9", "²"], [0, 1, 2]),  # not all are numbers: as texts
        (["10", "9", "--1"], [1, 2, 0]),
        (["07", "10", "7"], [0, 2, 1]),  # equal numbers, written differently
    ],
)
def test_odd_labels_are_numbered_all_the_same(given, numbers, tmp_path):
    for part in ("train", "test"):
        write(tmp_path / "f" / f"{part}.csv", [{"text": f"t{i}", "label": label} for i, label in enumerate(given)])
    task = one("./f", tmp_path)
    task.load()
    assert task.mteb.dataset["test"]["label"] == numbers


def test_identity_follows_the_content_alone(tmp_path):
    write(tmp_path / "a" / "test.jsonl", STS)
    write(tmp_path / "b" / "test.tsv", STS)
    write(tmp_path / "c" / "test.jsonl", [STS[0], {**STS[1], "score": 4.5}])
    a, b, c = (one(f"./{name}", tmp_path) for name in "abc")
    assert a.identity == b.identity != c.identity


def test_retrieval_leaves_out_queries_without_a_relevant_document(tmp_path):
    write(tmp_path / "f" / "corpus.jsonl", [{"_id": "d", "text": "no title here"}])
    write(tmp_path / "f" / "queries.jsonl", [{"_id": name, "text": name} for name in ("yes", "zero", "none")])
    grades = [{"query-id": "yes", "corpus-id": "d", "score": 1}, {"query-id": "zero", "corpus-id": "d", "score": 0}]
    write(tmp_path / "f" / "qrels" / "test.tsv", grades)
    task = one("./f", tmp_path)
    assert list(task.texts()) == ["yes", "no title here"]
    assert task.split_data("test", "default")["relevant_docs"] == {"yes": {"d": 1}}


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (
            "test.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": 1}\n{oops\n',
            "test.jsonl, line 2: not valid JSON",
        ),
        ("test.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n[1]\n', "line 2: expected a JSON object"),
        (
            "test.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": 1}\n\n{"sentence1": " ", "sentence2": "b", "score": 1}\n',
            "line 3: column 'sentence1': expected a text that is not empty, got ' '",
        ),
        (
            "test.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "score": 1}\n',
            "line 2: missing column(s) sentence2; found sentence1, score",
        ),
        (
            "test.csv",
            "sentence1,sentence2,score\na,b,1\na,b,high\n",
            "test.csv, line 3: column 'score': expected a number",
        ),
        ("test.csv", "sentence1,sentence2,score\na,b,nan\n", "line 2: column 'score': expected a number, got 'nan'"),
        ("test.csv", "sentence1,sentence2,score\na,b\n", "line 2: 2 cells, but the header has 3"),
        ("test.csv", "sentence1,sentence2,score\na,b,1\na,b\n", "line 3: 2 cells, but the header has 3"),
        ("test.csv", "sentence1,sentence2,score\na,b,1\na,b,1\n", "all scores are equal"),
        (
            "test.tsv",
            "sentence1\tsentence2\tlabels\na\tb\t2\n",
            "'labels': expected 1 (positive) or 0 (negative), got '2'",
        ),
        ("test.tsv", "sentence1\tsentence2\tlabels\na\tb\t1\n", "all labels are equal"),
        (
            "test.csv",
            "query,positive,negative\nq,good,bad\n",
            "'positive': expected a list (in CSV or TSV a JSON array",
        ),
        (
            "test.jsonl",
            '{"query": "q", "positive": ["a"], "negative": []}\n',
            "'negative': expected a list that is not empty",
        ),
        ("sets.jsonl", '{"sentences": ["a", "b"], "labels": [1]}\n', "set 1: 2 sentences but 1 labels"),
        ("sets.jsonl", '{"sentences": ["a", "b"], "labels": [1, 1]}\n', "set 1: only one label"),
        ("test.csv", "sentense1,sentence2,score\na,b,1\n", "columns ['score', 'sentence2', 'sentense1'] fit no kind"),
        ("dev.jsonl", "{}", "holds dev.jsonl; expected test.jsonl"),
        ("task.toml", 'kind = "stss"', "kind = 'stss' (allowed: retrieval, reranking, sts,"),
        (
            "task.toml",
            'kind = "sts"\nsplitt = "dev"',
            "unknown key 'splitt' (allowed: kind, name, source, split); did you mean",
        ),
        ("task.toml", "kind = sts", "task.toml: not valid TOML"),
        ("test.jsonl.gz", "not gzip", "cannot be read further"),
        ("test.tsv", "1\t1\tsentence1\nx\ty\tz\n", "columns ['1', 'sentence1'] fit no kind of task"),
        (
            "test.csv",
            "sentence1,sentence2,score,score\na,b,1,9\nc,d,2,8\n",
            "test.csv: line 1: column(s) 'score' more than once in the header; keep one of each",
        ),
        ("test.csv", "", "test.csv: holds no row"),
    ],
)
def test_malformed_folders_are_refused_with_file_and_line(file, content, expected, tmp_path):
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert expected in problems(tmp_path)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    text = "sentence1,sentence2,score\n" + "".join(f"a{i},b,{i}\n" for i in range(50))
    packed = gzip.compress(text.encode(), mtime=0)
    (tmp_path / "test.csv.gz").write_bytes(packed[:20] + b"\xff\xff\xff" + packed[23:])
    assert "cannot be read further: Error -3 while decompressing" in problems(tmp_path)


def test_task_toml_may_begin_with_a_mark_but_not_be_a_folder(tmp_path):
    write(tmp_path / "a" / "test.csv", STS)
    (tmp_path / "a" / "task.toml").write_text('name = "mine"', encoding="utf-8-sig")
    assert one("./a", tmp_path).name == "mine"
    (tmp_path / "a" / "task.toml").unlink()
    (tmp_path / "a" / "task.toml").mkdir()
    assert "task.toml: cannot be read: Is a directory" in problems(tmp_path / "a")


def test_all_mistakes_of_a_retrieval_folder_are_told_at_once(tmp_path):
    write(tmp_path / "corpus.jsonl", [{"_id": "d", "text": "x"}, {"_id": "d", "text": "y"}])
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "x"}])
    write(tmp_path / "qrels" / "test.tsv", [{"query-id": "p", "corpus-id": "e", "score": 0}])
    message = problems(tmp_path)
    for expected in (
        "corpus: _id given to more than one row: d",
        "1 corpus-id(s) not in corpus, e.g. e",
        "1 query-id(s) not in queries, e.g. p",
        "no document is relevant",
    ):
        assert expected in message
    (tmp_path / "queries.jsonl").unlink()
    (tmp_path / "corpus.csv").write_text("_id,text\n1,x\n", encoding="utf-8")
    message = problems(tmp_path)
    assert "several files hold it (corpus.jsonl, corpus.csv)" in message
    assert "queries: no such file" in message


def test_a_document_graded_twice_differently_is_refused(tmp_path):
    write(tmp_path / "corpus.jsonl", [{"_id": "d", "text": "x"}, {"_id": "e", "text": "y"}])
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "x"}])
    grades = [{"query-id": "q", "corpus-id": name, "score": score} for name, score in [("d", 1), ("e", 0), ("d", 1.0)]]
    write(tmp_path / "qrels" / "test.tsv", grades)
    task = one(f"./{tmp_path.name}", tmp_path.parent)
    task.load()
    assert task.split_data("test", "default")["relevant_docs"]["q"]["d"] == 1
    write(tmp_path / "qrels" / "test.tsv", [*grades, {**grades[0], "score": 0}, {**grades[1], "score": 10**9}])
    message = problems(tmp_path)
    said = "score 0 for query 'q' and document 'd', but an earlier line says 1; keep one of the lines"
    assert f"qrels/test.tsv, line 5: {said}" in message
    assert "qrels/test.tsv, line 6: column 'score': expected a whole number from 0 to 1000" in message
    records = {"corpus": [{"_id": "d", "text": "x"}], "queries": [{"_id": "q", "text": "x"}]}
    qrels = [{"query-id": "q", "corpus-id": "d", "score": score} for score in (1, 0)]
    with pytest.raises(TaskError, match="grade document 'd' for query 'q' twice, differently"):
        task_from_data("t", TaskData("retrieval", {**records, "qrels": qrels}), "t").load()


def test_a_long_list_of_mistakes_is_cut(tmp_path):
    write(tmp_path / "test.jsonl", [STS[0]] + [{**STS[0], "score": "x"}] * 30)
    message = problems(tmp_path)
    assert "30 problem(s)" in message
    assert "… and 10 more" in message
    assert message.count("line ") == 20


def test_two_tasks_of_one_name_are_refused(tmp_path):
    for folder, rows in (("a/faq", STS), ("b/faq", STS[::-1])):
        write(tmp_path / folder / "test.jsonl", rows)
    with pytest.raises(TaskError, match="two tasks are called 'faq'; give the folder another `name`"):
        resolve_tasks(["./a/faq", "./b/faq"], tmp_path)
    assert len(resolve_tasks(["./a/faq", "./a/faq"], tmp_path)) == 1


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


@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "task_type", "texts"),
    [
        ("retrieval/Cranfield", "Retrieval", 1400 + 225),
        ("reranking/TrecQA", "Reranking", 133 + 2559),
        ("pair_classification/MRPC", "PairClassification", 2 * 1725),
        ("clustering/StackOverflowTitles", "Clustering", 10 * 2000),
        ("clustering/SearchSnippets", "Clustering", 10 * 2000),
        ("classification/Banking77", "Classification", 10003 + 3080),
        ("sts/STS14", "STS", 2 * 3750),
    ],
)
def test_real_folders_are_read_as_their_readmes_say(folder, task_type, texts, shared):
    task = one(f"./{folder}", shared / "data")
    assert (task.name, task.task_type) == (folder.split("/")[1], task_type)
    assert sum(1 for _ in task.texts()) == texts
    if folder == "retrieval/Cranfield":
        relevant = task.split_data("test", "default")["relevant_docs"]
        assert sum(len(documents) for documents in relevant.values()) == 1612


def test_one_task_in_two_cuts_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"has STS17 once more, cut otherwise: as test of en-en and as test of .* more"):
        resolve_tasks(["MTEB(eng, v1)", "MTEB(Multilingual, v2)"], tmp_path)


def test_a_type_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (task,) = resolve_tasks(["Tatoeba"], tmp_path)
    assert task.task_type == "BitextMining"
    subset, split = task.subsets[0], task.splits[0]
    task.mteb.data_loaded = True
    monkeypatch.setattr(
        task.mteb, "dataset", {subset: {split: {"sentence1": ["a"], "sentence2": ["b"]}}}, raising=False
    )
    with pytest.raises(TaskError, match="'Tatoeba': tasks of type BitextMining cannot be read yet; leave it out"):
        list(task.split_texts(split, subset))
