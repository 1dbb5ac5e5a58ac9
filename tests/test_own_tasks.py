"""Own evaluation folders: every kind and format gives the same task; every mistake is named with file and line."""

import csv
import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from poolwise.data.own_tasks import TaskData
from poolwise.data.rows import clustering_sets, shared_texts, untestable
from poolwise.data.tasks import resolve_tasks, task_from_data
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
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
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


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "tsv.gz", "parquet"])
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
        if task_type == "Clustering":  # texts with labels are also what classification has
            (tmp_path / form / "task.toml").write_text('kind = "clustering"')
    reference, task = one("./jsonl", tmp_path), one(f"./{ending}", tmp_path)
    assert task.task_type == task.mteb.metadata.type == task_type
    assert task.identity == reference.identity
    assert list(task.texts()) == list(reference.texts()) != []
    assert (task.name, task.source, task.splits, task.subsets) == (ending, ending, ("test",), ("default",))


def test_sets_are_preferred_to_drawing(tmp_path):
    write(tmp_path / "f" / "test.jsonl", LABELLED)
    (tmp_path / "f" / "task.toml").write_text('kind = "clustering"')
    drawn = one("./f", tmp_path)
    drawn.load()
    assert len(drawn.mteb.dataset["test"]) == 1  # of nine texts
    write(tmp_path / "f" / "sets.jsonl", [{"sentences": ["a", "b"], "labels": ["x", "y"]}])
    given = one("./f", tmp_path)
    given.load()
    assert given.mteb.dataset["test"].to_list() == [{"sentences": ["a", "b"], "labels": [0, 1]}]


def test_labelled_texts_become_clustering_sets_that_share_no_text_and_have_the_same_labels():
    rows = [{"text": str(i), "label": str(i % 2)} for i in range(21_000)]
    sets = clustering_sets(rows)
    assert sets == clustering_sets(rows)
    assert [len(s["sentences"]) for s in sets] == [2000] * 10
    assert len({text for s in sets for text in s["sentences"]}) == 20_000
    assert all(str(int(t) % 2) == label for t, label in zip(sets[3]["sentences"], sets[3]["labels"], strict=True))
    few = clustering_sets(rows[:67])  # ten texts a label and set
    assert [sorted(s["labels"]).count("0") for s in few] == [12, 11, 11]
    assert [len(s["sentences"]) for s in clustering_sets(rows[:7])] == [7]


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
        (
            "test.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": 1}\n[1]\n',
            "line 2: a JSON list; write one JSON object a line",
        ),
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
        ("sets.jsonl", '{"sentences": ["a", "b"], "labels": [1]}\n', "sets.jsonl, line 1: 2 sentences but 1 labels"),
        ("sets.jsonl", '{"sentences": ["a", "b"], "labels": [1, 1]}\n', "sets.jsonl, line 1: only one label"),
        ("test.csv", "sentense1,sentence2,score\na,b,1\n", "columns ['score', 'sentence2', 'sentense1'] fit no kind"),
        ("dev.jsonl", "{}", "holds dev.jsonl; expected test.jsonl"),
        ("task.toml", 'kind = "stss"', "kind = 'stss' (allowed: retrieval, reranking, sts,"),
        (
            "task.toml",
            'kind = "sts"\nsplitt = "dev"',
            "unknown key 'splitt' (allowed: kind, name, source, split, ignore_identical_ids); did you mean 'split'?",
        ),
        ("task.toml", "kind = sts", "task.toml: not valid TOML"),
        ("test.jsonl.gz", "not gzip", "test.jsonl.gz: cannot be read: Not a gzipped file"),
        ("test.tsv", "1\t1\tsentence1\nx\ty\tz\n", "columns ['1', 'sentence1'] fit no kind of task"),
        (
            "test.csv",
            "sentence1,sentence2,score,score\na,b,1,9\nc,d,2,8\n",
            "test.csv: column(s) 'score' more than once in the header; keep one of each",
        ),
        ("test.csv", "", "test.csv: the file is empty; expected a header and a row below it"),
    ],
)
def test_malformed_folders_are_refused_with_file_and_line(file, content, expected, tmp_path):
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert expected in problems(tmp_path)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    text = "sentence1,sentence2,score\n" + "".join(f"a{i},b,{i}\n" for i in range(50))
    packed = gzip.compress(text.encode(), mtime=0)
    (tmp_path / "test.csv.gz").write_bytes(packed[:20] + b"\xff\xff\xff" + packed[23:])
    assert re.search(
        r"test\.csv\.gz: cannot be read(?: after line \d+)?: Error -3 while decompressing", problems(tmp_path)
    )


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
    assert "several files hold it (corpus.csv and corpus.jsonl)" in message
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
    expected = "column 'score': expected a whole number from -1000 to 1000 (above 0: relevant), got '1000000000'"
    assert f"qrels/test.tsv, line 6: {expected}" in message
    records = {"corpus": [{"_id": "d", "text": "x"}], "queries": [{"_id": "q", "text": "x"}]}
    qrels = [{"query-id": "q", "corpus-id": "d", "score": score} for score in (1, 0)]
    with pytest.raises(TaskError, match="grade document 'd' for query 'q' twice, differently"):
        task_from_data("t", TaskData("retrieval", {**records, "qrels": qrels}), "t").load()


def test_repeated_mistakes_share_a_line_and_a_long_list_is_cut(tmp_path):
    scores = ["n/a", "1,5", "high", "1,5", *["low"] * 26]
    write(tmp_path / "test.jsonl", [STS[0], *({**STS[0], "score": score} for score in scores)])
    message = problems(tmp_path)
    assert "30 mistakes" in message
    places = "lines 2, 3, 4, 5, 6 and 25 more"
    assert f"test.jsonl, {places}: column 'score': expected a number, got 'n/a', '1,5', 'high', 'low', …" in message
    rows = [{f"column{number}": "x", **STS[0], "score": "x"} for number in range(30)]
    write(tmp_path / "test.jsonl", [{k: v for k, v in row.items() if k != "sentence2"} for row in rows])
    message = problems(tmp_path)
    assert "20 mistakes (stopped there; there may be more)" in message
    assert message.count("line ") == 20


def test_two_tasks_of_one_name_are_refused(tmp_path):
    for folder, rows in (("a/faq", STS), ("b/faq", STS[::-1])):
        write(tmp_path / folder / "test.jsonl", rows)
    with pytest.raises(TaskError, match="two tasks are called 'faq'; give the folder another `name`"):
        resolve_tasks(["./a/faq", "./b/faq"], tmp_path)
    assert len(resolve_tasks(["./a/faq", "./a/faq"], tmp_path)) == 1


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


# ---------------------------------------------------------------- refused, because a score would be wrong


def test_texts_with_labels_alone_are_asked_about(tmp_path):
    write(tmp_path / "test.csv", LABELLED)
    message = problems(tmp_path)
    assert "test.csv: has texts and labels, and there is no train file. For classification add train.jsonl" in message
    assert 'for clustering write kind = "clustering" in task.toml' in message
    assert "docs/own-data.md" in message
    (tmp_path / "task.toml").write_text('kind = "classification"')
    assert "train: no such file; expected train as one of jsonl, csv" in problems(tmp_path)
    (tmp_path / "task.toml").write_text('kind = "clustering"')
    assert one(f"./{tmp_path.name}", tmp_path.parent).task_type == "Clustering"


def test_a_label_that_training_never_saw_is_refused(tmp_path):
    write(tmp_path / "train.csv", [{"text": f"t{i}", "label": label} for i, label in enumerate(["new", "old"] * 2)])
    write(tmp_path / "test.csv", [{"text": f"u{i}", "label": label} for i, label in enumerate(["old", "odl", "New"])])
    expected = "test.csv, lines 3 and 4: column 'label': expected a label that the train file has, got 'odl', 'New'"
    assert expected in problems(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"test.jsonl": '{"sentence1": null, "sentence2": "b", "score": 1}\n'},
            "test.jsonl, line 1: column 'sentence1': expected a text, got null",
        ),
        (
            {"test.jsonl": '{"sentence1": "\\ud83d", "sentence2": "b", "score": 1}\n'},
            "column 'sentence1': expected valid Unicode, without unpaired surrogates",
        ),
        (
            {"test.csv": "sentence1,sentence2,score\n\"['a', 'b']\",c,1\n"},
            "line 2: column 'sentence1': expected one text, not a list; write one text a row, got \"['a', 'b']\"",
        ),
        (
            {"corpus.jsonl": '{"_id": "d", "text": null}\n', "queries.csv": '_id,text\nq,"[""a""]"\n'},
            "corpus.jsonl, line 1: column 'text': expected a text, got null",
        ),
        (
            {"corpus.jsonl": '{"_id": "d", "text": "t"}\n', "queries.csv": '_id,text\nq,"[""a""]"\n'},
            "queries.csv, line 2: column 'text': expected one text, not a list",
        ),
    ],
)
def test_null_and_lists_in_place_of_a_text_are_refused(files, expected, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert expected in problems(tmp_path)


def test_columns_left_unread_and_the_delimiter_are_noted(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "test.csv").write_text("sentence1;sentence2;score;who\na;b;1;x\nc;d;2,5;x\n", encoding="utf-8")
    assert "line 3: column 'score': expected a number, got '2,5'" in problems(tmp_path / "f")
    (tmp_path / "f" / "test.csv").write_text("sentence1;sentence2;score;who\na;b;1;x\nc;d;2;x\n", encoding="utf-8")
    assert one("./f", tmp_path).notes == (
        "f: test.csv: cells are separated by semicolons",
        "f: test.csv: column not read: 'who'",
    )


def test_when_clustering_sets_are_tested() -> None:
    """Two sets or more, of whose texts at most a tenth is in another set as well."""
    texts = [f"text {i}" for i in range(40)]
    apart = [{"sentences": texts[:20]}, {"sentences": texts[20:]}]
    assert (shared_texts(apart), untestable(apart), shared_texts([])) == (0, "", 0)
    few = [{"sentences": texts[:20]}, {"sentences": texts[19:39]}]
    assert (shared_texts(few), untestable(few)) == (0.05, "")
    assert untestable([{"sentences": texts[:20]}, {"sentences": texts[10:30]}])
    assert untestable(apart[:1])
