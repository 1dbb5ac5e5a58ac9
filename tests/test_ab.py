"""`poolwise ab`: the four answers, trec_eval's measures from a blocked search, embeddings that are encoded once."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval

import poolwise
from poolwise.cli import main
from poolwise.data.survey import SearchData, TextData
from poolwise.data.tasks import document_text
from poolwise.encoding import encode as encoding
from poolwise.encoding.encode import keep_vectors, lengths, search
from poolwise.encoding.fast import FastEncoder
from poolwise.errors import PoolwiseError, TaskError
from poolwise.model.encoder import build
from poolwise.reports.ab import headline, render, sentences, two_digits
from poolwise.runs.ab import ab
from poolwise.scoring.references import reference, search_words
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.verdicts.items import OPEN, SAME, STAY, SWITCH, Paired, answers, compare_items, decision
from poolwise.verdicts.table import table
from tiny import SENTENCES

ANIMALS = ("heron", "ferry", "lamp", "kettle", "tent", "camera", "router", "clock", "vacuum", "scooter", "mixer")
ANIMALS += ("drill",)
PLACES = ("river", "island", "attic", "cellar", "garden")
RETRIEVAL = ("CACM", "CISI", "ClimateFEVER-evidence", "Cranfield", "NPL", "SciFact", "XQuAD-en")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """60 documents, 40 queries; every document ends alike, so that its last token says nothing of it."""
    texts = [f"the {animal} of the {place}, see the catalogue" for animal in ANIMALS for place in PLACES]
    jsonl(tmp_path / "index/corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    asked = [f"{text.split()[1]} {text.split()[4].strip(',')}" for text in texts[:40]]
    jsonl(tmp_path / "index/queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(asked)])
    jsonl(
        tmp_path / "index/qrels/test.jsonl",
        [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(40)],
    )
    return tmp_path / "index"


def exported(folder: Path, pooling: str, attention: str = "bidirectional") -> Path:
    """An untrained design on the built-in base model, as a sentence-transformers folder."""
    design = Design(name="x", attention=attention, pooling=pooling)
    return poolwise.export(build(Recipe(base_model="nano", max_length=64), design, 0, device="cpu"), folder / pooling)


def test_a_model_with_itself_makes_no_difference(index: Path, tmp_path: Path) -> None:
    model = str(exported(tmp_path, "mean"))
    result = ab(index, [model, model])
    assert [each["label"] for each in result["models"]] == ["mean", "mean #2"]
    assert (result["decision"]["answer"], result["decision"]["difference"]) == (SAME, 0.0)
    assert headline(result) == "No difference: mean and mean #2 score alike on all 40 queries."
    assert result["extremes"]["mean #2"] == {"gains": [], "losses": []}


def test_a_copy_with_a_broken_pooling_is_not_taken(index: Path, tmp_path: Path) -> None:
    whole, broken = exported(tmp_path, "mean"), exported(tmp_path, "last_token", "causal")
    result = ab(index, [str(whole), str(broken)])
    decided = result["decision"]
    assert decided["answer"] == STAY
    assert decided["ci_high"] < 0
    assert headline(result).startswith("Stay with mean: last_token scores ")
    assert result["extremes"]["last_token"]["losses"][0]["first"].keys() == {"mean", "last_token"}
    assert ab(index, [str(broken), str(whole)])["decision"]["answer"] == SWITCH
    for model in result["models"]:
        assert model["index_bytes"] == 60 * 4 * 192
        assert 0 < model["query_ms"]["p50"] <= model["query_ms"]["p95"] <= model["query_ms"]["p99"]


def lines(values: np.ndarray, seed: int = 0, others: int = 1) -> tuple[Paired, ...]:
    """A model in use that scores .5 everywhere, and others that score `values` above it."""
    rows = [
        {"design": design, "seed": 0, "task": "t", "task_type": "Retrieval", "metric": "ndcg_at_10", "score": score,
         "item_id": f"{i:05}"}
        for design in ("a", *(f"b{n}" for n in range(others)))
        for i, score in enumerate((0.5 + (design != "a") * values).tolist())
    ]  # fmt: skip
    return compare_items(table(rows), "t", baseline="a", seed=seed)


@pytest.mark.parametrize(
    ("mean", "spread", "expected"),
    [(0.05, 0.1, SWITCH), (-0.05, 0.1, STAY), (0.0, 0.02, SAME), (-0.008, 0.08, STAY), (0.004, 0.2, OPEN)],
)
def test_the_four_answers(mean: float, spread: float, expected: str) -> None:
    noise = np.random.default_rng(1).normal(size=400)
    values = mean + spread * (noise - noise.mean()) / noise.std()
    (found,) = answers(lines(values.clip(-0.5, 0.5)), 0.01)
    assert found.answer == expected
    if expected == OPEN:  # that many would leave an interval of the margin, with 80 % power
        n, error = found.line.n + found.more, spread / (found.line.n + found.more) ** 0.5
        assert n > 3000
        assert (1.96 + 0.8416) * error == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("n", [1, 3, 9])
def test_a_handful_of_queries_is_no_ground_for_an_answer(n: int) -> None:
    (found,) = answers(lines(np.linspace(-0.2, -0.1, n)), 0.01)
    assert (found.answer, found.more) == (OPEN, 10 - n)
    assert answers(lines(np.linspace(-0.2, -0.1, 10)), 0.01)[0].answer == STAY


def test_holm_spans_the_challengers_and_the_best_that_is_better_is_taken() -> None:
    values = np.random.default_rng(0).normal(0.02, 0.1, 100).clip(-0.5, 0.5)
    one, three = answers(lines(values), 0.01)[0], answers(lines(values, others=3), 0.01)
    assert three[0].line.p_holm == pytest.approx(min(1, 3 * one.line.p_value))
    assert decision(three).line.design == "b0"


@pytest.mark.parametrize(("value", "shown"), [(7, 7), (96, 96), (131, 140), (1793, 1800)])
def test_the_number_of_queries_is_rounded_up(value: int, shown: int) -> None:
    assert two_digits(value) == shown


def test_under_no_difference_switching_is_rare() -> None:
    """1,000 nulls: a query's two scores change places at random. p at most .05 in .03 to .07, switch in at most .04."""
    rng = np.random.default_rng(0)
    # Differences of two rankers look like this: most are 0, the rest are skewed, whichever has the advantage.
    size = np.where(rng.random(60) < 0.4, 0.0, rng.beta(0.8, 2.5, 60)) / 2
    small, switched = 0, 0
    for draw in range(1000):
        values = size * np.random.default_rng(draw).choice((-1, 1), 60)
        (found,) = answers(lines(values, draw), 0.01)
        small += found.line.p_value <= 0.05
        switched += found.answer == SWITCH
    assert 30 <= small <= 70
    assert switched <= 40


def test_search_in_blocks_is_the_whole_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal documents in different blocks have equal scores, and trec_eval's order decides between them."""
    monkeypatch.setattr(encoding, "QUERIES", 3)
    monkeypatch.setattr(encoding, "DOCUMENTS", 7)
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(50, 16)).astype(np.float32)
    documents[[3, 17, 31, 49]] = documents[3]
    queries = documents[:10] + rng.normal(size=(10, 16)).astype(np.float32)
    rank = np.arange(50)[::-1]
    norms = lengths(documents)
    places, scores = search(queries, documents, 12, rank, norms)
    q, d = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    for row, cosines in enumerate(np.round(q @ d.T, 6)):
        assert places[row].tolist() == np.lexsort((rank, -cosines))[:12].tolist()
        np.testing.assert_allclose(scores[row], cosines[places[row]], atol=2e-6)
    assert search(queries, documents, 99, rank, norms)[0].shape == (10, 50)
    _, dots = search(queries, documents, 1, rank, None)
    np.testing.assert_allclose(dots[:, 0], (queries @ documents.T).max(axis=1), rtol=1e-6)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_scores_are_those_of_pytrec_eval(shared: Path, name: str) -> None:
    """NDCG@10 of each query from the cut ranking equals that of the whole one, to 1e-9."""
    data = SearchData(shared / "data" / "retrieval" / name)
    with gzip.open(next((shared / "data" / "retrieval" / name).glob("corpus.jsonl*")), "rt") as file:
        texts = [document_text(json.loads(line)) for line in file]
    assert texts == list(data.documents())
    model, queries = reference("bm25"), list(data.queries.items())[:150]
    asked = [text for _, text in queries]
    model.index(texts)
    places, scores = search_words(model, asked, 1000, data.rank)
    whole = model.rank(asked, texts)
    for row, (query, _) in enumerate(queries):
        cut = {data.ids[p]: float(s) for p, s in zip(places[row], scores[row], strict=True)}
        full = dict(zip(data.ids, np.asarray(whole[[row]].toarray().ravel(), np.float32).tolist(), strict=True))
        evaluator = pytrec_eval.RelevanceEvaluator({query: data.relevant[query]}, {"ndcg_cut.10"})
        a, b = (evaluator.evaluate({query: run})[query]["ndcg_cut_10"] for run in (cut, full))
        assert a == pytest.approx(b, abs=1e-9)


def test_tfidf_against_bm25_on_cranfield(shared: Path, tmp_path: Path) -> None:
    result = ab(shared / "data/retrieval/Cranfield", ["tfidf", "bm25"], cache=tmp_path)
    assert result["decision"]["answer"] == SWITCH
    assert [round(m["scores"]["ndcg_at_10"]["mean"], 4) for m in result["models"]] == [0.3494, 0.3777]
    (line,) = [each for each in result["comparisons"] if each["metric"] == "ndcg_at_10"]
    assert line["wins"] + line["ties"] + line["losses"] == 225 == result["items"]
    gains = result["extremes"]["bm25"]["gains"]
    assert len(gains) == 20
    assert result["differences"]["bm25"][0] == max(result["differences"]["bm25"])
    assert gains[0]["difference"] == pytest.approx(result["differences"]["bm25"][0], abs=1e-6)
    assert sum(result["differences"]["bm25"]) / 225 == pytest.approx(line["difference"], abs=1e-6)
    for rows in result["by_feature"].values():
        assert sum(row["items"] for row in rows) == 225


class StoppedError(Exception):
    pass


def test_encoding_that_was_stopped_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "KEPT_AT_ONCE", 4)
    design = Design(name="x", attention="causal", pooling="mean")
    fast = FastEncoder(build(Recipe(base_model="nano", max_length=32), design, 0, device="cpu"))
    texts = [f"{sentence} {i}" for i in range(3) for sentence in SENTENCES]

    def until(stop: int) -> Iterator[str]:
        for number, text in enumerate(texts):
            if number == stop:
                raise StoppedError
            yield text

    with pytest.raises(StoppedError):
        keep_vectors(fast, "m", lambda: until(10), 18, "c", tmp_path)
    (path,) = tmp_path.glob("*.f32")
    with path.open("ab") as file:
        file.write(b"half a row")
    assert fast.counts.encoded == 8
    said: list[str] = []
    monkeypatch.setattr(encoding, "PROGRESS_EVERY", 0.0)
    kept = keep_vectors(fast, "m", lambda: texts, 18, "c", tmp_path, name="documents", say=said.append)
    assert fast.counts.encoded == 18
    np.testing.assert_allclose(kept.vectors, fast.encode(texts), atol=1e-6)
    assert said[0].startswith("12 of 18 documents, ")
    assert said[0].endswith(" left")
    before = fast.counts.encoded
    keep_vectors(fast, "m", lambda: texts, 18, "c", tmp_path)
    assert fast.counts.encoded == before
    with pytest.raises(PoolwiseError, match="documents were counted, then 18: the file changed"):
        keep_vectors(fast, "m", lambda: texts, 20, "other", tmp_path, name="documents")


@pytest.mark.parametrize("ending", [".f32", ".json"])
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_kept_vectors_that_are_damaged_are_encoded_again(ending: str, how: str, tmp_path: Path) -> None:
    design = Design(name="x", attention="causal", pooling="mean")
    fast = FastEncoder(build(Recipe(base_model="nano", max_length=32), design, 0, device="cpu"))
    expected = keep_vectors(fast, "m", lambda: SENTENCES, 6, "c", tmp_path).vectors.copy()
    (path,) = tmp_path.glob(f"*{ending}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "flipped" else data[:-5])
    before, said = fast.counts.encoded, list[str]()
    kept = keep_vectors(fast, "m", lambda: SENTENCES, 6, "c", tmp_path, say=said.append)
    assert fast.counts.encoded == before + 6
    assert [line for line in said if line.endswith("is damaged; its texts are encoded again")] != []
    np.testing.assert_array_equal(kept.vectors, expected)


def test_a_third_model_costs_one_encode(index: Path, tmp_path: Path) -> None:
    mean, last = exported(tmp_path, "mean"), exported(tmp_path, "last_token", "causal")
    ab(index, [str(mean), "bm25"])
    kept = {path: path.stat().st_mtime_ns for path in (index / ".poolwise").glob("*.f32")}
    assert len(kept) == 2  # documents and queries
    ab(index, [str(mean), "bm25", str(last)])
    now = {path: path.stat().st_mtime_ns for path in (index / ".poolwise").glob("*.f32")}
    assert len(now) == 4
    assert {path: now[path] for path in kept} == kept
    assert SearchData(index).notes == []  # the kept files are no part of the data


def pairs(path: Path, last: str, values: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", last])
        for i, value in enumerate(values):
            writer.writerow([f"the {ANIMALS[i % 12]} by the river {i}", f"a {ANIMALS[(i * 5) % 12]} there", value])
    return path


def test_pairs_and_labelled_texts(tmp_path: Path) -> None:
    sts = pairs(tmp_path / "sts.csv", "score", [str(5.0 * (i % 3 == 0) + i / 50) for i in range(48)])
    result = ab(sts, ["tfidf", "tfidf_chars"])
    assert (result["kind"], result["metric"], result["noun"]) == ("sts", "cosine_spearman", "pairs")
    assert result["decision"]["test"].startswith("bootstrap of Spearman")
    duplicates = pairs(tmp_path / "dup.csv", "labels", [str(int(i % 3 == 0)) for i in range(48)])
    assert ab(duplicates, ["tfidf", "tfidf_chars"])["metric"] == "cosine_ap"
    labelled = tmp_path / "intents.csv"
    labelled.write_text("text,label\n" + "".join(f"a {ANIMALS[i % 12]} {i},{i % 2}\n" for i in range(60)))
    result = ab(labelled, ["tfidf", "tfidf_chars"])
    assert (result["metric"], result["noun"]) == ("accuracy", "examples")
    assert result["decision"]["test"] == "exact McNemar"
    assert "5-fold cross-validation" in result["notes"][0]
    assert TextData(labelled).train is None


def test_the_page_is_complete_and_its_texts_are_escaped(index: Path, tmp_path: Path) -> None:
    with (index / "queries.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "x", "text": "<script>heronry</script> rivers"}) + "\n")
    with (index / "qrels/test.jsonl").open("a") as file:
        file.write(json.dumps({"query-id": "x", "corpus-id": "d0", "score": 1}) + "\n")
    result = ab(index, ["bm25", "tfidf", "tfidf_chars"])
    assert len(sentences(result)) == 2
    paths = render(result, "poolwise ab index bm25 tfidf", tmp_path / "out")
    assert [path.name for path in paths] == ["ab.json", "ab.md", "ab.html"]
    assert json.loads(paths[0].read_text())["decision"] == result["decision"]
    html = paths[2].read_text()
    assert headline(result).split(" (")[0] in html.replace("\u00a0", " ").replace("\u2060", "")
    assert html.count("<svg") == 2
    assert "<script" not in html
    assert "&lt;script&gt;heronry" in html


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["bm25"], "ab compares two models or more"),
        (["tfidf", "bm26"], "model 'bm26' cannot be loaded"),
        (["tfidf", "absent.toml:m1"], "absent.toml"),
    ],
)
def test_mistakes_end_with_a_message(
    index: Path, models: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["poolwise", "ab", str(index), *models])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (index.parent / "index-ab").exists()


def test_data_that_ab_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no such file or folder; did you mean 'sts.csv'"):
        ab(pairs(tmp_path / "sts.csv", "score", ["1", "2"]).with_name("st.csv"), ["tfidf", "tfidf_chars"])
    with pytest.raises(TaskError, match="bm25 ranks documents for queries"):
        ab(tmp_path / "sts.csv", ["tfidf", "bm25"])
    (tmp_path / "rare.csv").write_text("text,label\n" + "".join(f"w{i},{i // 9}\n" for i in range(12)))
    with pytest.raises(TaskError, match="needs two labels with 5 texts each, and label '1' has 3"):
        ab(tmp_path / "rare.csv", ["tfidf", "tfidf_chars"])
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TaskError, match="columns a, b; expected sentence1, sentence2 and score"):
        ab(tmp_path / "odd.csv", ["tfidf", "tfidf_chars"])
