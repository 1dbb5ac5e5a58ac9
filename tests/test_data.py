"""Training pairs: what is cleaned, filled in and removed, that all of it is counted, and real sets with weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from poolwise.data.batches import plan
from poolwise.data.pairs import Pairs, decontaminate, load_pairs
from poolwise.data.rows import mix, normalise
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


def cleaned(pairs: Pairs, evaluation: Iterable[str]) -> Pairs:
    return decontaminate(pairs, (("queries", text) for text in evaluation), ["queries"])


def texts(pairs: Pairs) -> list[dict]:
    return pairs.dataset.remove_columns("source").to_list()


# What would be read wrongly without a word


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "query,positive,positive\nq,right,OTHER\n", "p.csv: two columns 'positive': one role"),
        ("p.csv", "query,Query,positive\nq,X,p\n", "p.csv: 'query' and 'Query': one role"),
        ("p.csv", "query,positive,negative, Negative\nq,p,n,m\n", "p.csv: 'negative' and ' Negative': one role"),
        ("p.jsonl", '{"query": "q", "Query": "X", "positive": "p"}\n', "line 1: 'query' and 'Query': one role"),
        ("p.jsonl", '{"query": "q", "positive": "p", "negs": ["n"]}\n', "line 1: the column 'negs' is not read"),
        ("p.csv", "query,positive,Hard_Negatives\nq,p,n\n", "p.csv: the column 'Hard_Negatives' is not read"),
        ("p.csv", "query,positive,hard_negatives\nq,p,n\n", "one a column, 'negative_1', 'negative_2'"),
        ("p.csv", 'query,positive,negatives\nq,p,n\nr,s,"[""n1"", ""n2""]"\n', "line 3: column 'negatives': a list in"),
        ("p.csv", "query,positive,negatives\nq,p,\"['n3', 'n4']\"\n", "line 2: column 'negatives': a list in a cell"),
        ("p.tsv", 'query\tpositive\nq\t"[""p1""]"\n', "line 2: column 'positive': a list in a cell"),
        ("p.csv", 'query,positive\nq,"[""p1""]"\n', "write JSONL, or one text a cell (columns negative_1, negative_2"),
    ],
)
def test_columns_and_lists_that_are_not_read_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load(tmp_path, name)
    assert words in str(caught.value)


def test_what_only_looks_like_a_mistake_is_read(tmp_path):
    text = "id,ID,query,positive,negative\n1,2,[a] and [b],[sic] p,[n]\n3,4,q,p,n\n"
    (tmp_path / "p.csv").write_text(text, encoding="utf-8")
    assert texts(load(tmp_path, "p.csv"))[0] == {"query": "[a] and [b]", "positive": "[sic] p", "negative_1": "[n]"}


# Cleaning and filling


def test_what_is_cleaned_is_counted(tmp_path):
    rows = [
        {"query": "q1", "positive": "p1", "negative": ["n1", "n2", "n1", "n3"]},
        {"query": " q1", "positive": "p1 ", "negatives": ["n1", "n2", "n9"]},  # equal to the first, stripped and cut
        {"query": "q1", "positive": "p2", "negative": ["p1", "n4"]},  # p1 is a positive of q1
        {"query": "same", "positive": "same", "negative": ["n5", "n6"]},
    ]
    pairs = load_rows(tmp_path, rows, negatives=2)
    counted = {name: value for name, value in pairs.report.items() if isinstance(value, int) and value}
    assert counted == {
        "rows": 3,
        "duplicate_rows": 1,
        "query_equals_positive": 1,
        "cut_negatives": 2,
        "repeated_negatives": 1,
        "contradicting_negatives": 1,
        "filled_negatives": 1,
    }
    assert texts(pairs)[1] == {"query": "q1", "positive": "p2", "negative_1": "same", "negative_2": "n4"}
    json.dumps(pairs.report)


def test_a_negative_that_is_the_right_answer_but_for_case_and_punctuation_is_left_out(tmp_path):
    rows = [
        {"query": "Capital of France?", "positive": "Paris.", "negative": ["paris", "Lyon"]},
        {"query": "capital of france", "positive": "The city of Paris", "negative": ["PARIS!", "Capital of France"]},
        {"query": "capital of Spain", "positive": "Madrid", "negative": ["Paris", "the city of paris"]},
        {"query": "capital of Italy", "positive": "Rome", "negative": ["Turin", "Milan"]},
    ]
    pairs = load_rows(tmp_path, rows, negatives=2)
    assert pairs.report["contradicting_negatives"] == 3
    assert texts(pairs)[0]["negative_2"] == "Lyon"
    for row in texts(pairs)[:2]:
        negatives = {normalise(row["negative_1"]), normalise(row["negative_2"])}
        assert not negatives & {"paris", "the city of paris", "capital of france"}
    assert [texts(pairs)[2][f"negative_{i}"] for i in (1, 2)] == ["Paris", "the city of paris"]


def test_the_order_of_columns_matters_to_a_mixed_hash():
    """Else a negative that another row asks as a query would count as known."""
    hashes = np.array([[1, 2], [2, 1], [1, 2]], dtype=np.uint64)
    first, turned, again = mix(hashes)
    assert first == again != turned


def test_filled_negatives_are_fair_and_of_the_same_source(tmp_path):
    def rows(word: str) -> list[dict]:
        # five queries, each with several positives; no other row of the source has the text
        return [{"query": f"{word} question {i % 5}", "positive": f"{word} answer {i}"} for i in range(40)]

    write(tmp_path / "a.jsonl", rows("a"))
    write(tmp_path / "b.jsonl", [*rows("b"), {"query": "b x", "positive": "b y", "negative": "b Answer 3!"}])
    recipe = Recipe(sources=(Source(path="a.jsonl"), Source(path="b.jsonl")), negatives=3)
    pairs = load_pairs(recipe, tmp_path)
    assert pairs.report["filled_negatives"] == 3 * 81 - 1
    positives: dict[str, set[str]] = {}
    for row in pairs.dataset:
        positives.setdefault(row["query"], set()).add(row["positive"])
    for row in pairs.dataset:
        drawn = [row[f"negative_{i}"] for i in (1, 2, 3)]
        assert len({*map(normalise, drawn)}) == 3
        assert not set(drawn) & positives[row["query"]]
        assert all(text.startswith(row["source"][0] + " ") for text in drawn)
    assert pairs.fingerprint == load_pairs(recipe, tmp_path).fingerprint
    assert len({row["negative_1"] for row in pairs.dataset}) > 30  # drawn, not the same one for all


def test_filling_finds_the_only_text_left(tmp_path):
    rows = [{"query": "q", "positive": f"p{i}"} for i in range(300)] + [{"query": "r", "positive": "the one"}]
    pairs = load_rows(tmp_path, rows)
    assert {row["negative_1"] for row in texts(pairs)[:300]} == {"the one"}


def test_no_negatives_asked_for(tmp_path):
    pairs = load_rows(tmp_path, ROWS, negatives=0)
    assert pairs.dataset.column_names == ["query", "positive", "source"]
    assert pairs.report["cut_negatives"] == 3


def test_a_source_within_another_is_refused(tmp_path):
    write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"'pairs\.jsonl \(2\)': every row is in an earlier source"):
        load_pairs(Recipe(sources=(Source(path="pairs.jsonl"), Source(path="pairs.jsonl"))), tmp_path)


def test_fingerprint_tells_texts_and_order(tmp_path):
    first = load_rows(tmp_path, ROWS).fingerprint
    assert load_rows(tmp_path, ROWS[::-1]).fingerprint != first
    assert load_rows(tmp_path, [{**ROWS[0], "positive": "a small animal."}, *ROWS[1:]]).fingerprint != first
    assert load_rows(tmp_path, [{**ROWS[0], "positive": "a small animal\n"}, *ROWS[1:]]).fingerprint == first


# Evaluation texts


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("“Is  it?”\n", "is it"),
        ("ﬁve ＡＢＣ", "five abc"),
        ("STRASSE", "straße"),
        ("?!", "?!"),
        ("C-3PO's (old) arm", "c-3po's (old) arm"),
        ("$5", "$5"),
    ],
)
def test_normal_form(text, same):
    assert normalise(text) == normalise(same)
    assert normalise("another " + text) != normalise(same)


def test_texts_of_punctuation_alone_stay_apart():
    assert normalise("?!") != normalise("...")


def test_decontamination_removes_and_counts(tmp_path):
    write(tmp_path / "a.jsonl", [{"query": f"qa{i}", "positive": f"pa{i}"} for i in range(30)])
    write(tmp_path / "b.jsonl", [{"query": f"qb{i}", "positive": f"pb{i}", "negative": f"nb{i}"} for i in range(30)])
    recipe = Recipe(sources=(Source(path="a.jsonl"), Source(path="b.jsonl")))
    pairs = load_pairs(recipe, tmp_path)
    clean = cleaned(pairs, iter(["QA3?", "qa3", " pa4. ", "nb5", "pb6", "qb6", "unseen"]))
    assert clean.report["decontaminated_by_source"] == {"a.jsonl": 2, "b.jsonl": 2}
    assert clean.report["decontaminated_rows"] == 4
    assert clean.report["contaminated"] == {"queries": {"texts": 6, "rows": 4, "removed": True}}
    assert clean.report["rows_by_source"] == {"a.jsonl": 28, "b.jsonl": 28}
    left = {text for row in texts(clean) for text in row.values()}
    assert not left & {"qa3", "pa4", "nb5", "pb6", "qb6"}
    assert {"qa5", "pa5", "pb7", "nb7"} <= left
    assert len(clean.dataset) == 56
    assert clean.fingerprint != pairs.fingerprint
    assert pairs.report["decontaminated_rows"] == 0
    again = cleaned(clean, ["qa7"])
    assert again.report["decontaminated_by_source"] == {"a.jsonl": 3, "b.jsonl": 2}
    assert again.report["decontaminated_rows"] == 5


def test_a_filled_negative_costs_no_row(tmp_path):
    pairs = load_rows(tmp_path, [{"query": f"q{i}", "positive": f"p{i}"} for i in range(50)])
    victim = texts(pairs)[0]["negative_1"]
    clean = cleaned(pairs, [victim])
    assert clean.report["decontaminated_rows"] == 1  # the row whose positive it is
    assert clean.report["filled_negatives"] == 49
    kept = {row["query"]: row["negative_1"] for row in texts(clean)}
    assert victim not in kept.values()
    before = {row["query"]: row["negative_1"] for row in texts(pairs)}
    assert {q for q, n in kept.items() if n != before[q]} == {q for q, n in before.items() if n == victim and q in kept}


def test_nothing_to_remove_changes_nothing(tmp_path):
    pairs = load_rows(tmp_path, ROWS)
    for evaluation in ([], ["something else"]):
        assert cleaned(pairs, evaluation).fingerprint == pairs.fingerprint
    with pytest.raises(DataError, match=r"'pairs\.jsonl': every row contains a text of an evaluation task"):
        cleaned(pairs, [row["query"].upper() for row in ROWS])


# Real sets


@pytest.mark.shared
def test_real_sets_with_weights():
    root = SHARED / "data" / "train"
    if not root.is_dir():
        pytest.skip("no ../shared/data/train")
    sources = (
        Source(path="parade-train", weight=1.0),
        Source(path="policyqa/train.jsonl.gz", weight=1.0),
        Source(path="scitldr", weight=2.0),
    )
    recipe = Recipe(sources=sources, steps=50, batch_size=64)
    pairs = load_pairs(recipe, root)
    assert pairs.report["rows_by_source"] == {"parade-train": 3492, "policyqa/train.jsonl.gz": 7867, "scitldr": 5407}
    some = [row["query"] for row in pairs.dataset.select(range(0, 3000, 100))]
    clean = cleaned(pairs, some)
    assert clean.report["decontaminated_rows"] >= len(set(some))
    made = plan(clean, recipe, seed=0)
    assert made.report["rows_by_source"] == {"parade-train": 800, "policyqa/train.jsonl.gz": 800, "scitldr": 1600}
    columns = ["query", "positive", "negative_1"]
    for batch in made.indices:
        rows = clean.dataset.select(batch)
        held = [{normalise(row[name]) for name in columns} for row in rows]
        assert len(set().union(*held)) == sum(map(len, held))
    assert np.unique(made.indices).size > 2500
