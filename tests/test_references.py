"""TF-IDF and BM25 by hand, and their scores on real sets."""

import math
from collections import Counter

import numpy as np
import pytest

import poolwise.scoring.references as references
from poolwise.data.tasks import resolve_tasks
from poolwise.errors import ModelError
from poolwise.scoring.evaluate import evaluate
from poolwise.scoring.references import Bm25, Tfidf, content_words, reference

DOCUMENTS = ["heron heron lake", "lake ferry", "ferry ferry ferry island", "stone"]


def test_tfidf_by_hand():
    model = Tfidf("words")
    model.prepare(["b a a", "b", "b"])  # equal texts count once: N = 2, df(a) = 1, df(b) = 2
    a = (1 + math.log(2)) * (math.log(3 / 2) + 1)
    b = 1 * (math.log(3 / 3) + 1)
    assert model.encode(["A b, a"]).toarray()[0] == pytest.approx(np.array([a, b]) / math.hypot(a, b), rel=1e-6)
    assert model.encode(["unknown"]).toarray().tolist() == [[0, 0]]
    both = (math.log(3 / 2) + 1) / math.hypot(math.log(3 / 2) + 1, 1)
    assert model.rank(["a"], ["b", "a", "a b"]).toarray()[0] == pytest.approx([0, 1, both], rel=1e-6)


def test_characters_see_what_words_do_not():
    words, chars = Tfidf("words"), Tfidf("chars")
    for model in (words, chars):
        model.prepare(["herons", "heron", "lake"])
    assert words.rank(["herons"], ["heron", "lake"]).toarray().tolist() == [[0, 0]]
    heron, lake = chars.rank(["herons"], ["heron", "lake"]).toarray()[0]
    assert heron > 0.4 > lake == 0


def plain_bm25(query: list[str], documents: list[list[str]], k1: float, b: float) -> list[float]:
    """The formula, document by document."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score, counts = 0.0, Counter(document)
        for word in query:
            df = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def test_bm25_is_its_formula():
    words = [text.split() for text in DOCUMENTS]
    for query in ("heron", "lake ferry", "ferry ferry island", "absent"):
        found = Bm25(k1=1.2, b=0.5).rank([query], DOCUMENTS).toarray()[0]
        assert found == pytest.approx(plain_bm25(query.split(), words, 1.2, 0.5))
    # by hand: df = 1 of 4 documents, tf = 2, length 3 of a mean of 2.5
    by_hand = math.log(1 + 3.5 / 1.5) * 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * 3 / 2.5))
    assert Bm25().rank(["herons"], DOCUMENTS).toarray()[0, 0] == pytest.approx(by_hand)


def test_content_words_fold_plurals_and_drop_stop_words():
    text = "The ferries' queries, glasses and shoes of a bus: I, 7, 42 its status"
    assert content_words(text) == ["ferry", "query", "glasse", "shoe", "bus", "42", "status"]
    assert content_words("Gas ties monkeys aes") == ["gas", "ty", "monkey", "aes"]


def test_dense_rows_are_exact_or_close(monkeypatch):
    texts = [" ".join(f"w{(i * j) % 97}" for j in range(1, 20)) for i in range(1, 40)]
    model = Tfidf("words")
    model.prepare(texts)
    exact = model.encode_dense(texts)
    assert (exact == model.encode(texts).toarray()).all()
    monkeypatch.setattr(references, "DENSE_LIMIT", 100)
    model.prepare(texts)
    folded = model.encode_dense(texts)
    assert folded.shape == (39, 2048)
    assert (folded == model.encode_dense(texts)).all()
    unit = folded / np.linalg.norm(folded, axis=1, keepdims=True)
    assert abs(unit @ unit.T - exact @ exact.T).max() < 0.12  # five standard deviations
    assert abs(unit @ unit.T - exact @ exact.T).max() > 0


def test_references_by_name(tmp_path):
    assert [reference(name).name for name in ("tfidf", "tfidf_chars", "bm25")] == ["tfidf", "tfidf_chars", "bm25"]
    with pytest.raises(ModelError, match=r"allowed: tfidf, tfidf_chars, bm25, .* model's folder"):
        reference(str(tmp_path / "no-model"))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "folder", "score", "items"),
    [
        ("tfidf", "retrieval/Cranfield", 0.3494, 225),
        ("bm25", "retrieval/Cranfield", 0.3777, 225),
        ("tfidf", "reranking/TrecQA", 0.6709, 133),
        ("tfidf", "pair_classification/MRPC", 0.8513, 1725),
        ("tfidf", "clustering/StackOverflowTitles", 0.4550, 0),  # its sets overlap
        ("tfidf", "clustering/SearchSnippets", 0.1106, 0),
    ],
)
def test_references_on_real_folders(name, folder, score, items, shared):
    rows = evaluate(reference(name), resolve_tasks([f"./{folder}"], shared / "data"), identity=name)
    tolerance = 0.02 if "clustering" in folder else 0.002  # k-means starts differ between versions of scikit-learn
    assert rows[0]["score"] == pytest.approx(score, abs=tolerance)
    assert len(rows) == 1 + items
