"""The plan: same seed, same order, whatever the design, process or machine; fair batches; honoured weights.

Timing, for orientation only (one core of a shared machine, CPU seconds): 1.4 million rows of JSONL (920 MB) load in 32,
the plan of 1,000 steps of 2,048 takes 4.3 and `training_dataset` .3; 1.7 GB of memory at the peak.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from poolwise.data.batches import effective_negatives, plan, training_dataset
from poolwise.data.pairs import Pairs, load_pairs
from poolwise.data.rows import normalise
from poolwise.errors import DataError
from poolwise.study.recipe import Recipe, Source


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def distinct(count: int, word: str = "") -> list[dict]:
    return [{"query": f"q{word}{i}", "positive": f"p{word}{i}", "negative": f"n{word}{i}"} for i in range(count)]


@pytest.fixture
def hundred(tmp_path) -> Pairs:
    write(tmp_path / "a.jsonl", distinct(100))
    return load_pairs(Recipe(dataset="a.jsonl"), tmp_path)


def small(**more: object) -> Recipe:
    return Recipe(**{"dataset": "a.jsonl", "steps": 30, "batch_size": 10, "seed_varies": ("order",), **more})


# Law 4: two designs of a study see, for each seed, the same examples in the same order


def test_same_seed_same_order_other_seed_other_order(hundred):
    for varies in [("order",), ("data",), ("init", "order", "dropout", "data")]:
        made = [plan(hundred, small(seed_varies=varies), seed) for seed in (0, 1, 0)]
        assert made[0].fingerprint == made[2].fingerprint
        assert np.array_equal(made[0].indices, made[2].indices)
        assert made[0].fingerprint != made[1].fingerprint


def test_what_does_not_bear_on_the_data_does_not_bear_on_the_order(hundred):
    first = plan(hundred, small(), 3).fingerprint
    other = small(learning_rate=1e-3, temperature=0.1, lora=False, seed_varies=("init", "dropout", "order"))
    assert plan(hundred, other, 3).fingerprint == first


def test_seeds_reach_only_what_varies(hundred):
    none = [plan(hundred, small(seed_varies=("init",)), seed) for seed in (0, 7)]
    assert none[0].fingerprint == none[1].fingerprint
    assert none[0].fingerprint == plan(hundred, small(seed_varies=("order",)), 0).fingerprint
    order = plan(hundred, small(seed_varies=("order",)), 7)
    assert order.fingerprint != none[0].fingerprint
    counts = np.bincount(order.indices.ravel(), minlength=100)
    assert set(counts) == {3}  # 300 rows drawn from 100: three whole passes


def test_data_varies_by_bootstrap(hundred):
    recipe = small(seed_varies=("data",), steps=100)  # ten passes over a sample of 100
    drawn = [np.bincount(plan(hundred, recipe, seed).indices.ravel(), minlength=100) for seed in range(20)]
    seen = np.mean([np.mean(counts > 0) for counts in drawn])
    assert seen == pytest.approx(1 - np.exp(-1), abs=0.03)  # 1 - (1 - 1/n)^n of the rows
    assert not np.array_equal(drawn[0], drawn[1])
    twice = np.concatenate(drawn)
    assert np.mean(twice / 10) == pytest.approx(1)
    assert np.mean((twice >= 15) & (twice < 25)) == pytest.approx(np.exp(-1) / 2, abs=0.04)  # Poisson(1) at 2


def test_a_bootstrap_can_draw_every_row(hundred):
    plans = [plan(hundred, small(seed_varies=("data",), steps=20), seed) for seed in range(20)]
    assert np.unique(np.concatenate([made.indices.ravel() for made in plans])).tolist() == list(range(100))


def test_each_source_has_its_own_order_and_bootstrap(tmp_path):
    """Equal orders would pair the same rows of two sources in every pass."""
    pairs, recipe = sources(tmp_path, [100, 100], [1.0, 1.0], steps=20)
    for varies in (("order",), ("data",)):
        batches = plan(pairs, recipe.model_copy(update={"seed_varies": varies}), 0).indices
        taken = [{frozenset(batch[batch // 100 == number] % 100) for batch in batches} for number in (0, 1)]
        assert len(taken[0] & taken[1]) <= 1, varies
    drawn = [np.bincount(batches[batches // 100 == number] % 100, minlength=100) for number in (0, 1)]
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.5  # one bootstrap for both would draw the same numbers


def test_each_pass_is_shuffled_anew_and_a_longer_study_goes_on_alike(hundred):
    made = plan(hundred, small(), 0)
    passes = made.indices.reshape(3, 100)
    assert all(sorted(rows) == list(range(100)) for rows in passes)
    groups = [{frozenset(batch) for batch in rows.reshape(10, 10)} for rows in passes]  # who meets whom in a batch
    assert not groups[0] & groups[1]
    assert not groups[0] & {frozenset(range(i, i + 10)) for i in range(0, 100, 10)}  # the order of the file
    assert np.array_equal(plan(hundred, small(steps=12), 0).indices, made.indices[:12])


def test_fingerprint_is_of_the_exact_texts_in_order(tmp_path):
    write(tmp_path / "a.jsonl", [{"query": row["query"], "positive": row["positive"]} for row in distinct(100)])
    pairs = load_pairs(small(), tmp_path)  # every negative is a filled one
    made = plan(pairs, small(), 5)
    rows = training_dataset(pairs, made)
    assert rows.column_names == ["query", "positive", "negative_1"]
    assert len(rows) == 300
    content = hashlib.sha256(b"poolwise rows of 3")
    for row in rows:
        for name in rows.column_names:
            content.update(hashlib.blake2b(row[name].encode(), digest_size=16).digest())
    assert content.hexdigest() == made.fingerprint
    assert [row["query"] for row in rows][:10] == [f"q{i}" for i in made.indices[0]]


SCRIPT = """
import sys
from pathlib import Path
from poolwise.data.batches import plan
from poolwise.data.pairs import load_pairs
from poolwise.study.recipe import Recipe, Source
sources = (Source(path="a.jsonl", weight=2.0), Source(path="b.jsonl"))
recipe = Recipe(sources=sources, steps=20, batch_size=8, negatives=2)
pairs = load_pairs(recipe, Path())
assert "torch" not in sys.modules
print(pairs.fingerprint, plan(pairs, recipe, 4).fingerprint)
"""


def test_same_in_every_process(tmp_path):
    write(tmp_path / "a.jsonl", [{"query": f"q{i % 40}", "positive": f"p{i}"} for i in range(60)])
    write(tmp_path / "b.jsonl", distinct(50, "b"))
    printed = set()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", SCRIPT]
        printed.add(subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout)
    # A change of these two values is a change of every order ever trained on: it belongs into the change log.
    assert printed == {
        "8db6f9a8be42479ba13effe65b89066fe4fe7745e637d2700e8856f4bd6c521c "
        "5be463ef2e6917686b5027ddfd6b65de9cc2f49303269ba20fa632b0b8335f8b\n"
    }


# Batches


WORDS = [f"text {i}" for i in range(40)] + ["Text 1", "text 2!", "TEXT  3", "text 4."]
ROW = st.lists(st.sampled_from(WORDS), min_size=3, max_size=3, unique=True)


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=15, max_size=50), st.integers(2, 5), st.integers(0, 3), st.booleans())
def test_no_text_stands_in_two_rows_of_a_batch_and_no_row_is_lost(tmp_path_factory, rows, size, seed, bootstrap):
    folder = tmp_path_factory.mktemp("rows")
    write(folder / "a.jsonl", [dict(zip(("query", "positive", "negative"), row, strict=True)) for row in rows])
    recipe = small(steps=25, batch_size=size, seed_varies=("order", "data") if bootstrap else ("order",))
    try:
        pairs = load_pairs(recipe, folder)
        made = plan(pairs, recipe, seed)
    except DataError as error:
        event("refused")
        if not re.search("no text left to fill|could be found without a text", str(error)):
            raise
        return
    event("planned")
    held = [{normalise(text) for name, text in row.items() if name != "source"} for row in pairs.dataset]
    for batch in made.indices:
        together = [text for row in batch for text in held[row]]
        assert len(together) == len(set(together))
    if not bootstrap:
        waiting = made.report["still_waiting"]
        passes = (made.indices.size + waiting) // len(held)
        counts = np.bincount(made.indices.ravel(), minlength=len(held))
        assert np.maximum(passes - counts, 0).sum() <= waiting


def test_a_row_put_off_comes_back(tmp_path):
    rows = distinct(40)
    rows += [{"query": f"r{i}", "positive": "the common answer", "negative": f"m{i}"} for i in range(6)]
    write(tmp_path / "a.jsonl", rows)
    recipe = small(batch_size=8, steps=23)  # 4 passes of 46
    made = plan(load_pairs(recipe, tmp_path), recipe, 1)
    assert made.report["put_off"] > 0
    assert max(np.isin(batch, range(40, 46)).sum() for batch in made.indices) == 1
    counts = np.bincount(made.indices.ravel(), minlength=46)
    assert counts[40:].min() >= 3
    assert made.report["still_waiting"] <= 6


@pytest.mark.parametrize("seed", range(20))
def test_the_rest_of_a_pass_and_a_whole_one_are_searched(tmp_path, seed):
    """Three rows share a positive, so every batch of two needs the fourth, which may come last in the next pass."""
    rows = [{"query": f"q{i}", "positive": "common", "negative": f"n{i}"} for i in range(3)]
    write(tmp_path / "a.jsonl", [*rows, {"query": "other", "positive": "rare", "negative": "n"}])
    recipe = small(batch_size=2, steps=10)
    made = plan(load_pairs(recipe, tmp_path), recipe, seed)
    assert all(3 in batch for batch in made.indices)


def test_a_very_common_text_stays_quick_and_fair(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i % 20}", "negative": f"n{i}"} for i in range(4000)]
    write(tmp_path / "a.jsonl", rows)
    recipe = small(batch_size=20, steps=150)
    made = plan(load_pairs(recipe, tmp_path), recipe, 0)
    for batch in made.indices:
        assert sorted(row % 20 for row in batch) == list(range(20))
    assert made.indices.size == np.unique(made.indices).size


@pytest.mark.parametrize(
    ("rows", "size", "fragments"),
    [
        (distinct(5), 6, ["only 5 of the 6 rows", "step 1 ", "5 different rows", "batch_size"]),
        ([{**row, "positive": "one"} for row in distinct(9)], 4, ["only 1 of the 4", "9 queries, 1 positives"]),
        ([{**row, "query": f"{row['query']}", "negative": "no"} for row in distinct(9)], 4, ["recipe.negatives"]),
    ],
)
def test_a_batch_that_cannot_be_filled(tmp_path, rows, size, fragments):
    write(tmp_path / "a.jsonl", rows)
    recipe = small(batch_size=size)
    pairs = load_pairs(recipe, tmp_path)
    with pytest.raises(DataError) as caught:
        plan(pairs, recipe, 0)
    for fragment in ["'a.jsonl'", *fragments]:
        assert fragment in str(caught.value)


def test_a_bootstrap_that_is_too_small_names_the_way_out(tmp_path):
    write(tmp_path / "a.jsonl", distinct(10))
    recipe = small(batch_size=10, seed_varies=("order", "data"))
    with pytest.raises(DataError, match=r'in this seed\'s bootstrap.*or leave "data" out of recipe\.seed_varies'):
        plan(load_pairs(recipe, tmp_path), recipe, 0)


# Several sources


def sources(folder: Path, sizes: list[int], weights: list[float], **more: object) -> tuple[Pairs, Recipe]:
    for i, size in enumerate(sizes):
        write(folder / f"{i}.jsonl", distinct(size, f"s{i}x"))
    listed = tuple(Source(path=f"{i}.jsonl", weight=weight) for i, weight in enumerate(weights))
    recipe = small(**{"dataset": None, "sources": listed, **more})
    return load_pairs(recipe, folder), recipe


@pytest.mark.parametrize("weights", [[3.0, 1.0], [1.0, 1.0, 1.0], [0.02, 0.28, 0.7], [1e-3, 1.0]])
def test_weights_are_shares_of_every_batch(tmp_path, weights):
    pairs, recipe = sources(tmp_path, [40, 300, 100][: len(weights)], weights, steps=200, batch_size=24)
    made = plan(pairs, recipe, 0)
    share = np.array(weights) / sum(weights)
    drawn = np.stack([np.bincount(pairs.rows.source[batch], minlength=len(weights)) for batch in made.indices])
    assert (drawn.sum(axis=1) == 24).all()
    assert np.abs(drawn - 24 * share).max() <= 1 + 1e-9
    assert np.abs(drawn.sum(axis=0) - 200 * 24 * share).max() <= 3
    assert list(made.report["rows_by_source"].values()) == drawn.sum(axis=0).tolist()
    assert made.report["passes_by_source"]["1.jsonl"] == pytest.approx(drawn[:, 1].sum() / 300, abs=1e-3)


def test_weights_whose_sum_rounds_up_fill_every_batch_exactly(tmp_path):
    weights = [0.03, 0.58, 0.8, 0.08, 0.33, 0.39, 0.91, 0.66]
    assert (np.cumsum(weights) / np.sum(weights))[-1] > 1
    pairs, recipe = sources(tmp_path, [40] * len(weights), weights)
    assert plan(pairs, recipe, 0).indices.shape == (30, 10)


def test_sources_are_mixed_within_a_batch(tmp_path):
    pairs, recipe = sources(tmp_path, [100, 100], [1.0, 1.0])
    made = plan(pairs, recipe, 0)
    first_half = np.mean(pairs.rows.source[made.indices[:, :5]])
    assert 0.35 < first_half < 0.65  # two processes of five rows each see both sources


def test_one_source_batches(tmp_path):
    pairs, recipe = sources(tmp_path, [40, 100], [3.0, 1.0], steps=80, one_source_batches=True)
    made = plan(pairs, recipe, 0)
    of_batch = [set(pairs.rows.source[batch]) for batch in made.indices]
    assert all(len(labels) == 1 for labels in of_batch)
    order = [labels.pop() for labels in of_batch]
    assert Counter(order) == {0: 60, 1: 20}
    assert sorted(order) != order
    assert made.fingerprint != plan(pairs, recipe, 1).fingerprint


def test_no_text_in_two_rows_across_sources(tmp_path):
    shared = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"m{i}"} for i in range(12)]
    turned = [{"query": f"x{i}", "positive": f"Q{i}?", "negative": f"y{i}"} for i in range(12)]
    write(tmp_path / "0.jsonl", shared)
    write(tmp_path / "1.jsonl", turned)
    recipe = small(dataset=None, sources=(Source(path="0.jsonl"), Source(path="1.jsonl")), batch_size=12)
    made = plan(load_pairs(recipe, tmp_path), recipe, 0)
    for batch in made.indices:
        assert not {row for row in batch if row < 12} & {row - 12 for row in batch if row >= 12}
    assert made.report["put_off"] > 0


def test_effective_negatives():
    assert effective_negatives(Recipe(batch_size=64, negatives=1)) == 127
    assert effective_negatives(Recipe(batch_size=16, negatives=0), world_size=4) == 15
    with pytest.raises(DataError, match=r"batch_size = 64 cannot be split evenly over 3 processes.*such as 66"):
        effective_negatives(Recipe(batch_size=64), world_size=3)


def test_the_parts_of_an_accumulated_batch_are_split_over_the_processes():
    recipe = Recipe(batch_size=64, accumulation=4)  # 16 queries at a time
    assert effective_negatives(recipe, world_size=16) == 31
    expected = (
        r"batch_size = 64 in 4 parts .* cannot be split evenly over 32 processes; give a multiple of 128, such as"
    )
    with pytest.raises(DataError, match=expected):
        effective_negatives(recipe, world_size=32)
