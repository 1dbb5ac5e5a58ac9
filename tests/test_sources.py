"""Where pairs come from: every format alike, spellings of columns, the Hub; each mistake named with its place."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import poolwise
from poolwise.data.pairs import Pairs, load_pairs
from poolwise.errors import DataError
from poolwise.study.recipe import Recipe, Source

SHARED = Path(__file__).parents[2] / "shared"
ROWS = [
    {"query": "what is a cat", "positive": "a small animal", "negative": "a large stone"},
    {"query": "what is a stone", "positive": 'hard, and "cold"', "negative": "a warm bath"},
    {"query": "wie heißt das", "positive": "es heißt Straße", "negative": "es heißt Gasse"},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(folder: Path, name: str = "pairs.jsonl", negatives: int = 1, **more: object) -> Pairs:
    return load_pairs(Recipe(dataset=name, negatives=negatives, **more), folder)


def load_rows(folder: Path, rows: list[dict], negatives: int = 1) -> Pairs:
    write(folder / "pairs.jsonl", rows)
    return load(folder, negatives=negatives)


def texts(pairs: Pairs) -> list[dict]:
    return pairs.dataset.remove_columns("source").to_list()


# Reading


def test_every_format_gives_the_same_pairs(tmp_path):
    plain = write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes() + b"\n\n", mtime=0))
    table = pyarrow.Table.from_pylist([{"id": i, **row} for i, row in enumerate(ROWS)])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    quoted = "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) + "\r\n" for row in ROWS)
    csv_text = "query,positive,negative\r\n" + quoted
    (tmp_path / "d.csv").write_bytes(csv_text.encode("utf-8-sig"))
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress(csv_text.encode(), mtime=0))
    (tmp_path / "f.tsv").write_text(csv_text.replace('","', '"\t"').replace("query,positive,", "query\tpositive\t"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[:1])
    (folder / "README.md").write_text("not data")
    names = ["a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv", "e.csv.gz", "f.tsv", "set", str(plain)]
    read = [load(tmp_path, name) for name in names]
    for pairs in read:
        assert [tuple(row.values()) for row in texts(pairs)] == [tuple(row.values()) for row in ROWS]
    assert len({pairs.fingerprint for pairs in read}) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"anchor": "q", "document": "p", "neg": ["n", "m"]},
        {"Question": "q", "Answer": "p", "negatives": ["n", "m"]},
        {"query": "q", "postive": "p", "negative_1": "n", "negative_2": "m"},
        {"query": "q", "positive": "p", "answer": "other", "negative": "n", "negatives": "m"},
        {"query": " q\n", "pos": ["p"], "negative_10": "m", "negative_2": "n"},
        {"query": "q", "passage": "p", "negative": [" n "], "negative_1": None, "negative_3": "m"},
    ],
)
def test_spellings_of_columns(tmp_path, row):
    pairs = load_rows(tmp_path, [row], negatives=2)
    assert texts(pairs) == [{"query": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}]


def test_a_list_of_positives_gives_a_row_for_each(tmp_path):
    pairs = load_rows(tmp_path, [{"query": "q", "pos": ["p", "r", "p"], "neg": ["n"]}])
    assert [(row["query"], row["positive"], row["negative_1"]) for row in texts(pairs)] == [
        ("q", "p", "n"),
        ("q", "r", "n"),
    ]


# Files that other tools train on


def test_flag_embedding_files_are_read_and_what_is_not_is_named(tmp_path):
    """Lists of positives and negatives, some empty; a row's own instruction and the teacher's scores are not read."""
    rows = [
        {"query": "when do limes flower", "pos": ["in June", "early summer"], "neg": ["in winter"], "prompt": "Find: "},
        {"query": "how deep is a mill pond", "pos": ["about two metres"], "neg": [], "pos_scores": [0.9]},
        {"query": "what is tempered steel", "pos": ["steel that was heated again"], "type": "normal"},
    ]
    pairs = load_rows(tmp_path, rows)
    assert pairs.report["rows"] == 4
    assert pairs.report["filled_negatives"] == 2
    assert pairs.report["notes"] == ["pairs.jsonl: columns not read: 'prompt', 'pos_scores' and 'type'"]
    assert pairs.report["notes"][0] in pairs.notes()


def test_sentence_transformers_files_are_read_by_the_names_of_their_columns(tmp_path):
    rows = [
        {"negative": ["no", "never"], "positive": "a bird of the marsh", "anchor": "what is a bittern"},
        {"negative": ["at noon"], "positive": "at dusk", "anchor": "when do bats hunt"},
        {"negative": [], "positive": "in a kiln", "anchor": "where are bricks fired"},
    ]
    pairs = load_rows(tmp_path, rows, negatives=2)
    assert texts(pairs)[0]["query"] == "what is a bittern"
    assert pairs.report["filled_negatives"] == 3


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {
                "query_id": "7",
                "query": "q",
                "positive_passages": [{"docid": "1", "text": "p"}],
                "negative_passages": [],
            },
            "line 1: the column 'positive_passages' holds records of a document each .* 'positive' and 'negatives'",
        ),
        (
            {"query": ["Find the answer", "q"], "pos": [["", "p"]], "neg": [["", "n"]]},
            r"line 1: 'query' is \['Find.*list",
        ),
        ({"query": "q", "pos": [], "neg": ["n"]}, "line 1: 'positive' is an empty list"),
    ],
)
def test_files_of_other_tools_that_are_refused_name_line_and_column(tmp_path, row, told):
    with pytest.raises(DataError, match=told):
        load_rows(tmp_path, [row])


def test_demo_pairs_are_built_in(tmp_path, monkeypatch):
    made = [{"query": "q", "positive": "p", "negatives": ["n"]}, {"query": "r", "positive": "s", "negatives": []}]
    fake = types.SimpleNamespace(training_pairs=lambda: made)
    monkeypatch.setitem(sys.modules, "poolwise.demo", fake)
    monkeypatch.setattr(poolwise, "demo", fake, raising=False)
    pairs = load_pairs(Recipe(), tmp_path)
    assert pairs.dataset["source"] == ["demo", "demo"]
    assert texts(pairs)[1] == {"query": "r", "positive": "s", "negative_1": "p"}


def test_the_papers_data_set_by_name(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        rows = [
            {"query": "q", "positive": "p", "negative": "n"},
            {"query": "", "positive": "p2", "negative": "n2"},
            {"query": "q3", "positive": "p3", "negative": "p3"},
            {"query": "q4", "positive": None, "negative": "n4"},
        ]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = load(tmp_path, "yixuantt/ir_data")
    assert asked == [("yixuantt/ir_data", "train")]
    assert texts(pairs) == [
        {"query": "q", "positive": "p", "negative_1": "n"},
        {"query": "q3", "positive": "p3", "negative_1": "p"},
    ]
    assert pairs.report["unusable_rows"] == 2
    assert pairs.report["unusable_negatives"] == 1


@pytest.mark.shared
def test_hub_names_through_the_real_client(tmp_path):
    mirror = SHARED / "tools" / "hub_mirror.py"
    if not mirror.exists():
        pytest.skip("no ../shared/tools/hub_mirror.py")
    home = tmp_path / "hub" / "datasets" / "yixuantt" / "ir_data"
    home.mkdir(parents=True)
    write(home / "train.jsonl", ROWS)
    server = subprocess.Popen(
        [sys.executable, str(mirror), str(tmp_path / "hub"), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        code = """
import sys
from pathlib import Path
from poolwise.data.pairs import load_pairs
from poolwise.errors import DataError
from poolwise.study.recipe import Recipe
print(load_pairs(Recipe(dataset="yixuantt/ir_data"), Path()).fingerprint)
try:
    load_pairs(Recipe(dataset="yixuantt/ir_dta"), Path())
except DataError as error:
    print(str(error))
"""
        endpoint = server.stdout.readline().strip()
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        env.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    finally:
        server.terminate()
        server.wait()
    fingerprint, message = done.stdout.split("\n", 1)
    assert fingerprint == load_rows(tmp_path, ROWS).fingerprint, done.stderr[-2000:]
    assert "'yixuantt/ir_dta'" in message
    assert "HF_ENDPOINT" in message


# Mistakes


BAD = [
    ("p.jsonl", '{"query": "q", "positive": "p"}\n{"query": "q"\n', ["p.jsonl: 1 mistake", "line 2: not valid JSON"]),
    ("p.jsonl", '[1]\n"x"\n', ["line 1: a JSON list", "line 2: a JSON str", '{"column": value, …}']),
    (
        "p.jsonl",
        '{"query": "q", "text": "p"}\n',
        ["line 1: no column 'positive' (found: 'query', 'text'", "'document'"],
    ),
    ("p.jsonl", '{"quary": "q", "positive": "p"}\n', ["no column 'query'", "did you mean 'quary'?", "name it 'query'"]),
    ("p.jsonl", '\n{"query": " ", "positive": ""}\n', ["line 2: 'query' is empty", "'positive' is empty"]),
    ("p.jsonl", '{"query": 7, "positive": null}\n', ["'query' is 7 (int)", "'positive' is null"]),
    ("p.jsonl", '{"query": "q", "positive": []}\n', ["'positive' is an empty list"]),
    ("p.jsonl", '{"query": "q", "positive": "p", "negative": ["n", 1.5]}\n', ["'negative' is 1.5 (float)"]),
    ("p.jsonl", '{"query": "q", "positive": "p", "negative": ""}\n', ["'negative' is empty; give a text or leave it"]),
    (
        "p.jsonl",
        '{"query": "q", "positive": "p", "negative": "p "}\n',
        ["line 1: the negative is equal to the positive"],
    ),
    ("p.jsonl", '{"query": "q", "positive": "p", "negative": "q"}\n', ["line 1: the negative is equal to the query"]),
    ("p.jsonl", '{"query": "\\ud800", "positive": "p"}\n', ["line 1: 'query' contains an unpaired surrogate"]),
    ("p.jsonl", b'{"query": "q\xff", "positive": "p"}\n', ["line 1: not UTF-8 text"]),
    ("p.jsonl", "\n", ["'p.jsonl': no rows"]),
    ("p.csv", "query,text\nq,p\n", ["p.csv: no column 'positive' (found: 'query', 'text')"]),
    ("p.csv", "", ["p.csv: the file is empty; expected a header and a row below it"]),
    (
        "p.csv",
        "query,positive\nq,p\na,b,c\nd\n",
        ["2 mistakes", "line 3: 3 cells, but the header has 2", "line 4: 1 cell"],
    ),
    ("p.csv", 'query,positive\n"a\nb",p\nq,\n', ["line 4: 'positive' is empty"]),
    ("p.csv", 'query,positive\nq,p\n"a\nb",\n', ["line 3: 'positive' is empty"]),
    ("p.csv", 'query,positive\n"q" x,p\n', ["line 2: badly quoted"]),
    ("p.csv", "query,positive,negative\nq,p,p\n", ["line 2: the negative is equal to the positive ('p')"]),
    ("p.csv", b"query,positive\nq,p\nq\xff,p\n", ["line 3: not UTF-8 text"]),
    (
        "p.jsonl.gz",
        gzip.compress(b'{"query": "q", "positive": "p"}\n' * 9, mtime=0)[:-9],
        ["p.jsonl.gz: cannot be read after"],
    ),
    ("p.jsonl.gz", b'{"query": "q", "positive": "p"}\n', ["p.jsonl.gz: cannot be read", "gzip"]),
    ("p.parquet", b"PAR1 no", ["p.parquet: cannot be read as Parquet"]),
    ("p.json", "{}", ["cannot read 'p.json'; allowed: jsonl, csv, tsv, parquet"]),
    ("p.jsonl", '{"query": "q", "answer": "p", "passage": "r"}\n', ["'passage' and 'answer' could each be", "rename"]),
    ("p.jsonl", '{"query": "q", "positive": "p"}\n', ["no text left to fill in", "'q'", "recipe.negatives"]),
]


@pytest.mark.parametrize(("name", "content", "fragments"), BAD)
def test_mistakes_name_file_line_and_fix(tmp_path, name, content, fragments):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load(tmp_path, name)
    for fragment in [name, *fragments]:
        assert fragment in str(caught.value)


def test_wrong_parquet_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"query": ["q", "r"], "positive": [1, 2]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"(?s)p\.parquet: 2 mistakes.*row 2: 'positive' is 2 \(int\)"):
        load(tmp_path, "p.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"query": ["q"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet: no column 'positive'"):
        load(tmp_path, "p.parquet")


def test_all_mistakes_of_a_file_together_repeated_ones_in_one_line(tmp_path):
    good = {"query": "q", "positive": "p", "negative": "n"}
    bad = {"query": "q", "positive": "", "negative": "n"}
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, [bad, good, {**good, "query": " "}, bad, good, bad])
    assert str(caught.value).splitlines() == [
        "pairs.jsonl: 4 mistakes",
        "  - lines 1, 4 and 6: 'positive' is empty; give a text",
        "  - line 3: 'query' is empty; give a text",
        "Every layout that is read, with an example: docs/own-data.md",
    ]
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, [bad] * 5000)
    assert str(caught.value).splitlines() == [
        "pairs.jsonl: 5,000 mistakes",
        "  - lines 1, 2, 3, 4, 5 and 4,995 more: 'positive' is empty; give a text",
        "Every layout that is read, with an example: docs/own-data.md",
    ]


def test_no_more_than_twenty_different_mistakes(tmp_path):
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, [{"query": "q", "positive": number} for number in range(50)])
    lines = str(caught.value).splitlines()
    assert lines[0] == "pairs.jsonl: 20 mistakes (stopped there; there may be more)"
    assert len([line for line in lines if line.startswith("  - ")]) == 20


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"'pair\.jsonl': no such file or folder.*did you mean 'pairs\.jsonl'\?"):
        load(tmp_path, "pair.jsonl")
    with pytest.raises(DataError, match=r"'\./nowhere': no such file"):
        load(tmp_path, "./nowhere")
    folder = tmp_path / "set"
    folder.mkdir()
    with pytest.raises(DataError, match=r"no file of the split 'train'.*no jsonl, csv, tsv, parquet file"):
        load(tmp_path, "set")
    write(folder / "test-00000-of-00001.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no file of the split 'train' \(found: test-00000-of-00001\.jsonl\)"):
        load(tmp_path, "set")
    recipe = Recipe(sources=(Source(path="set", split="test"),))
    assert load_pairs(recipe, tmp_path).report["rows"] == 3

    def refuse(name, split):
        raise ConnectionError(f"cannot reach the hub for {name}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"'dmeo'.*did you mean 'demo'.*'train': cannot reach the hub for dmeo"):
        load(tmp_path, "dmeo")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(DataError, match=r"some/set: no column 'query' \(found: 'text'\)"):
        load(tmp_path, "some/set")


def test_files_of_a_folder_are_chosen_by_the_name_of_the_split(tmp_path):
    (tmp_path / "set").mkdir()
    for i, name in enumerate(("extra", "other")):
        write(tmp_path / "set" / f"{name}.jsonl", ROWS[i : i + 2])

    def rows(split: str) -> int:
        return len(load_pairs(Recipe(sources=(Source(path="set", split=split),)), tmp_path).rows)

    assert rows("train") == 3  # no file is named after a split: all of them, with the row of both once
    assert rows("extra") == 2
    (tmp_path / "set" / "other.jsonl").rename(tmp_path / "set" / "test.jsonl")
    with pytest.raises(DataError, match="no file of the split 'train'"):
        rows("train")
