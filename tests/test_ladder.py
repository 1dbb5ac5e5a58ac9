"""The dilution ladder: noise that depends on text and seed alone, calibrated off the tasks, scored without the base."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from poolwise import stats
from poolwise.data.pairs import load_pairs
from poolwise.encoding.fast import sentence_vectors
from poolwise.runs.prepare import prepare
from poolwise.runs.trial import run_trial
from poolwise.scoring import references as ladder
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from poolwise.verdicts.comparison import compare
from poolwise.verdicts.controls import RUNGS, rungs, smallest_seen
from poolwise.verdicts.findings import Findings
from tiny import tiny_folder

WORDS = ("cat", "dog", "river", "book", "water", "morning", "people", "home", "mat", "walk", "heron", "ferry")


class Toy:
    """What `sentence_vectors` asks of a model; counts the texts it encodes. Embeddings: one random direction a text,
    the positive of a pair near its query."""

    def __init__(self, width: int = 64) -> None:
        self.width, self.encoded = width, list[str]()

    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        self.encoded += texts
        return np.stack([self._vector(text) for text in texts]).astype(np.float32)

    encode_query = encode_document = encode

    def _vector(self, text: str) -> np.ndarray:
        kind, _, number = text.partition(" ")
        own = np.random.default_rng([len(kind), ord(kind[0]), int(number)]).standard_normal(self.width)
        return np.random.default_rng(int(number)).standard_normal(self.width) + (0.9 if kind == "p" else 0.6) * own


def test_noise_is_a_function_of_text_and_seed() -> None:
    assert np.array_equal(ladder.noise("a text", 3, 50), ladder.noise("a text", 3, 50))
    assert not np.allclose(ladder.noise("a text", 3, 50), ladder.noise("a text", 4, 50))
    assert not np.allclose(ladder.noise("a text", 3, 50), ladder.noise("a text.", 3, 50))
    lengths = [np.linalg.norm(ladder.noise(str(i), 0, 400)) for i in range(50)]
    assert abs(np.mean(lengths) - 1) < 0.02


def test_dilution_keeps_the_length_and_turns_by_the_share() -> None:
    """Noise of share s turns a vector by arctan s where the noise is at right angles, which it nearly is in 4,000 D."""
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((20, 4000)) * np.arange(1, 21)[:, None]).astype(np.float32)
    unit = np.stack([ladder.noise(str(i), 0, 4000) for i in range(20)])
    moved = ladder.dilute(vectors, unit, 0.5)
    assert np.allclose(np.linalg.norm(moved, axis=1), np.linalg.norm(vectors, axis=1), rtol=1e-5)
    cosine = (moved * vectors).sum(axis=1) / (vectors**2).sum(axis=1)
    assert np.allclose(cosine, 1 / np.sqrt(1 + 0.25), atol=0.03)


def test_rungs_share_their_noise_and_the_base_runs_once_a_text() -> None:
    toy = Toy()
    kept = ladder.Kept(toy)
    plain = kept.kept_vectors(["p 1", "q 2", "p 1"], None, "", 8)
    small, again, large = (
        ladder.Diluted(kept, share, 5).kept_vectors(["q 2", "p 1"], None, "", 8) for share in (0.1, 0.1, 0.4)
    )
    assert toy.encoded == ["p 1", "q 2"]  # each once, and never again for a rung
    assert np.array_equal(small, again)
    assert np.array_equal(plain[0], plain[2])
    distance = [np.linalg.norm(x[0] - plain[1]) for x in (small, large)]
    assert distance[0] < distance[1]
    kept.kept_vectors(["p 1"], "query", "", 8)
    kept.kept_vectors(["p 1"], None, "prompt: ", 8)
    assert len(toy.encoded) == 4  # another side or prompt is another input


def test_embeddings_that_do_not_fit_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "KEPT_BYTES", 2 * 64 * 4)
    kept = ladder.Kept(Toy())
    kept.kept_vectors(["p 1", "p 2"], None, "", 8)
    assert kept.whole
    kept.kept_vectors(["p 1", "p 3"], None, "", 8)
    assert not kept.whole
    assert kept.encoder.encoded == ["p 1", "p 2", "p 3"]


def test_development_score_by_hand() -> None:
    """Two queries, three documents: the first ranks its own first, the second second."""
    q = np.array([[1, 0], [0, 1]], dtype=np.float32)
    d = np.array([[1, 0.1], [1, 0.5], [-0.2, 1]], dtype=np.float32)
    right, wrong = np.array([0, 1]), np.array([2, 2])
    cosines = q @ (d / np.linalg.norm(d, axis=1, keepdims=True)).T
    rho = spearmanr([cosines[0, 0], cosines[1, 1], cosines[0, 2], cosines[1, 2]], [1, 1, 0, 0])[0]
    gain = (1 + 1 / np.log2(3)) / 2
    assert ladder.development_score(q, d, right, wrong) == pytest.approx((gain + rho) / 2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("pairs") / "train.jsonl"
    rows = [{"query": f"q {i}", "positive": f"p {i}", "negative": f"n {i}"} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(dataset=str(path), steps=5, batch_size=8)
    return recipe, load_pairs(recipe, path.parent)


def test_development_pairs_are_unseen_ones_while_there_are_any(pairs: Any) -> None:
    _, data = pairs
    seen = np.arange(60)
    rows, unseen = ladder.development_rows(data, SimpleNamespace(indices=seen))
    assert len(rows) == ladder.DEV_PAIRS
    assert unseen == 240  # of 300, 60 were trained on
    assert not set(rows[:240].tolist()) & set(seen.tolist())
    again, _ = ladder.development_rows(data, SimpleNamespace(indices=seen[::-1]))
    assert rows.tolist() == again.tolist()


def test_calibrated_losses_hit_their_targets_and_shares_rise(pairs: Any) -> None:
    recipe, data = pairs
    found = ladder.calibrate(Toy(), recipe, data, SimpleNamespace(indices=np.arange(40)), seed=1)
    assert found == ladder.calibrate(Toy(), recipe, data, SimpleNamespace(indices=np.arange(40)), seed=1)
    shares = [found["shares"][label] for label in RUNGS]
    assert shares == sorted(shares)
    assert shares[0] > ladder.SHARES[0]
    for label, target in RUNGS.items():
        assert found["losses"][label] == pytest.approx(target, rel=0.25)
    assert (found["pairs"], found["unseen"]) == (256, 256)
    assert json.dumps(found)


def test_no_rung_where_there_is_nothing_to_lose(pairs: Any) -> None:
    class Constant(Toy):
        def _vector(self, text: str) -> np.ndarray:
            return np.ones(self.width)

    recipe, data = pairs
    found = ladder.calibrate(Constant(), recipe, data, SimpleNamespace(indices=np.arange(40)), seed=1)
    assert set(found["shares"].values()) == {None} or found["score"] > 0.02


STUDY = """
name = "tiny"
seeds = [0]
tasks = ["./pairs"]
references = []
evaluate_at = [0.5, 1.0]

[recipe]
base_model = "./llama"
dataset = "./train.jsonl"
steps = 2
batch_size = 8
warmup_steps = 0
max_length = 32

[[designs]]
preset = "m1"

[[designs]]
attention = "bidirectional"
pooling = "mean"
"""


def test_the_baseline_carries_the_ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path, "llama")
    rows = [
        {"query": f"the {WORDS[i % 12]} {i}", "positive": f"a {WORDS[i % 12]} at {i}", "negative": f"no {i}"}
        for i in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"one {WORDS[i % 12]},two {WORDS[i * 5 % 12]} {i},{i * 7 % 11}" for i in range(20)]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "test.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]) + "\n")
    (tmp_path / "study.toml").write_text(STUDY)
    prepared = prepare(Study.load(tmp_path / "study.toml"))
    kinds = {(t.label, t.role): t for t in prepared.trials}
    assert {t.role for t in prepared.trials} == {"design", "aa", "broken"}  # no training of its own
    shares = dict.fromkeys(RUNGS, 0.3) | {"ladder-2": None}
    monkeypatch.setattr(ladder, "calibrate", lambda *_: {"shares": shares})
    encoded: list[str] = []
    plain = sentence_vectors

    def counted(model: Any, texts: Any, *rest: Any) -> Any:
        encoded.extend(texts)
        return plain(model, texts, *rest)

    monkeypatch.setattr(ladder, "sentence_vectors", counted)
    folder = tmp_path / "m1"
    run_trial(kinds["m1", "design"], prepared, folder)
    assert len(encoded) == len(set(encoded)) == 32  # 12 first and 20 second sentences; one pass, at the last step only
    found = {path.parent.name: pl.read_parquet(path) for path in folder.glob("scores/*/*.parquet")}
    assert found.keys() == {"step-1", "step-2", *RUNGS}
    assert found["ladder-2"].is_empty()  # nothing loses that much
    rung = found["ladder-0.5"]
    assert set(rung["role"]) == {"ladder"}
    assert set(rung["design"]) == {"ladder-0.5"}
    assert set(rung["noise"]) == {0.3}
    assert set(rung["step"]) == {2}
    assert rung["score"].to_list() != found["step-2"]["score"].to_list()
    assert rung["score"].to_list() == found["ladder-1"]["score"].to_list()  # the same share, the same scores
    assert not (set(rung["model_identity"]) & set(found["step-2"]["model_identity"]))
    assert set(found["step-2"]["dtype"]) == {"float32"}
    stamp = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    run_trial(kinds["m1", "design"], prepared, folder)  # done is done
    (lost,) = folder.glob("scores/ladder-1/*.parquet")
    before = pl.read_parquet(lost).drop("seconds")
    lost.unlink()
    run_trial(kinds["m1", "design"], prepared, folder)
    assert pl.read_parquet(lost).drop("seconds").equals(before)
    assert {path for path in stamp if path.stat().st_mtime_ns != stamp[path]} == {lost}
    other = tmp_path / "mean"
    run_trial(kinds["mean-bidirectional", "design"], prepared, other)
    assert not list(other.glob("scores/ladder*"))


def table(losses: tuple[float, float, float], seeds: int = 3, tasks: int = 10) -> pl.DataFrame:
    """m1 to m3, equal but for noise, and a ladder whose rungs lose `losses` on every task."""
    rng = np.random.default_rng(7)
    level = rng.uniform(0.4, 0.8, tasks)
    rows = []

    def add(design: str, role: str, scores: np.ndarray) -> None:
        for seed in range(seeds):
            for i in range(tasks):
                rows.append(
                    {"design": design, "role": role, "seed": seed, "task": f"t{i}", "task_type": "STS",
                     "metric": "x", "score": float(scores[seed, i]), "step": 1, "source": None, "split": None,
                     "subset": None, "item_id": None}
                )  # fmt: skip

    runs = {
        d: level + rng.normal(0, 0.002, (seeds, 1)) + rng.normal(0, 0.004, (seeds, tasks)) for d in ("m1", "m2", "m3")
    }
    for name, scores in runs.items():
        add(name, "design", scores)
    for label, loss in zip(RUNGS, losses, strict=True):
        add(label, "ladder", runs["m1"] - loss + rng.normal(0, 0.001, (seeds, tasks)))
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_ladder_says_which_loss_the_studys_test_sees() -> None:
    frame = table((0.0005, 0.02, 0.04))
    found = compare(frame, "m1", controls=list(RUNGS))
    read = rungs(found)
    assert [rung.seen for rung in read] == [False, True, True]
    assert [rung.difference for rung in read] == pytest.approx([-0.0005, -0.02, -0.04], abs=0.001)
    arms = {arm.design: arm for arm in found.arms}
    shifted = arms["ladder-1"].by_source[[2, 0, 1]]
    by_hand = stats.crossed(arms["m1"].by_source, shifted, pool=[arms["m2"].by_source, arms["m3"].by_source])
    assert read[1].p_value == by_hand.p_value
    assert read[1].p_adjusted == pytest.approx(min(1, 2 * by_hand.p_value))  # a family of two contrasts
    assert smallest_seen(read, "STS") == read[1]
    ladder = Findings.of(found).to_json()["controls"]["ladder"]
    assert ladder["smallest_seen"] == {"STS": -read[1].difference}
    assert [rung["design"] for rung in ladder["rungs"]] == list(RUNGS)


def test_a_rung_seen_below_one_that_is_not_does_not_count() -> None:
    read = rungs(compare(table((0.04, 0.001, 0.04)), "m1", controls=list(RUNGS)))
    assert [rung.seen for rung in read] == [True, False, True]
    assert smallest_seen(read, "STS") == read[2]


def test_the_ladder_lends_nothing_and_is_no_claim() -> None:
    frame = table((0.002, 0.02, 0.04))
    with_ladder = compare(frame, "m1", controls=list(RUNGS))
    without = compare(frame.filter(pl.col("role") == "design"), "m1")
    assert with_ladder.rows == without.rows
    assert with_ladder.designs == without.designs == ("m1", "m2", "m3")


def test_two_runs_are_enough_for_a_test() -> None:
    read = rungs(compare(table((0.002, 0.02, 0.04), seeds=2), "m1", controls=list(RUNGS)))
    assert all(rung.p_value is not None for rung in read)


def test_one_run_has_rungs_without_a_test() -> None:
    read = rungs(compare(table((0.002, 0.02, 0.04), seeds=1), "m1", controls=list(RUNGS)))
    assert [(rung.p_value, rung.seen) for rung in read] == [(None, False)] * 3
