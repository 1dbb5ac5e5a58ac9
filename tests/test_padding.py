"""A design with `masked = false` in a whole study: trained masked, scored in the published batches if the recipe says
so, and masked, with a note, everywhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

import poolwise
from poolwise import cli
from poolwise.encoding.fast import MASKED, FastEncoder
from poolwise.model import checkpoint
from poolwise.runs.check import check
from poolwise.scoring.adapters import PublishedBatches
from poolwise.study.study import Study
from small_study import run, weights, write

DESIGNS = "".join(
    f'[[designs]]\nname = "{name}"\nattention = "bidirectional"\npooling = "cross_attention"\n'
    f'pooling_args = {{ latents = 4, init = "paper"{more} }}\n'
    for name, more in (("m1", ""), ("padded", ", masked = false"))
)
CHANGES = (
    ("steps = 6", "steps = 2"), ("save_steps = 2", "save_steps = 2"), ("[0.5, 1.0]", "[1.0]"),
    ('"./pairs", "./facts"', '"./pairs"'), ('references = ["tfidf"]', "references = []"),
)  # fmt: skip
PUBLISHED = ("max_length = 32\n", 'max_length = 32\nevaluation_padding = "published"\n')


@pytest.fixture(scope="module")
def study(place: Path) -> Path:
    path = write(place, "padding", *CHANGES, PUBLISHED, designs=DESIGNS)
    assert run(path, workers=1) == {}
    return path


def score(study: Path, design: str) -> float:
    rows = pl.read_parquet(study.with_suffix("") / "results.parquet")
    return float(rows.filter((pl.col("design") == design) & pl.col("item_id").is_null())["score"][0])


def folder_of(study: Path, design: str) -> Path:
    return next((study.with_suffix("") / "trials").glob(f"{design}-s0-*"))


def test_it_is_trained_as_the_masked_design(study: Path) -> None:
    tensors = {"m1": [], "padded": []}
    for name, content in weights(study.with_suffix("")).items():
        tensors[name.split("/")[1].split("-")[0]].append(content)
    assert tensors["m1"]
    assert tensors["m1"] == tensors["padded"]
    trained = [json.loads((folder_of(study, name) / "train.json").read_text()) for name in tensors]
    assert trained[0]["losses"] == trained[1]["losses"]
    assert {one["layout"] for one in trained} == {"packed"}


def test_it_is_scored_in_the_published_batches(study: Path) -> None:
    encoder = checkpoint.load_any(folder_of(study, "padded"))
    lines = [line.split(",") for line in (study.parent / "pairs" / "test.csv").read_text().splitlines()[1:]]
    published = PublishedBatches(FastEncoder(encoder), "STS")
    first, second = (published.kept_vectors([line[n] for line in lines], None, "", 32) for n in (0, 1))
    cosines = (first * second).sum(1)
    expected = spearmanr(cosines, [float(line[2]) for line in lines]).statistic
    assert score(study, "padded") == pytest.approx(expected, abs=1e-6)
    assert abs(score(study, "padded") - score(study, "m1")) > 1e-3


def test_other_commands_mask_it_and_say_so(study: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(study.parent)
    notes: list[str] = []
    (row,) = poolwise.evaluate(folder_of(study, "padded"), ["./pairs"], note=notes.append)
    assert row["score"] == pytest.approx(score(study, "m1"), abs=1e-6)
    assert MASKED in notes
    assert FastEncoder(checkpoint.load_any(folder_of(study, "padded"))).notes == [MASKED]
    done = CliRunner().invoke(cli.app, ["export", str(study), "padded", "--to", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert MASKED in done.stderr
    vectors = [poolwise.encode(model, ["a cat", "two dogs and a cat"]) for model in
               (tmp_path / "out", folder_of(study, "m1"))]  # fmt: skip
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5


def test_check_says_how_it_is_scored(place: Path) -> None:
    masked = check(Study.load(write(place, "masked", *CHANGES, designs=DESIGNS)))["warnings"]
    assert any("padded: padding is masked; recipe.evaluation_padding = 'published'" in line for line in masked)
    idle = write(place, "idle", *CHANGES, PUBLISHED, designs=DESIGNS.replace(", masked = false", ""))
    assert (
        "recipe.evaluation_padding has no effect: no design has masked = false." in check(Study.load(idle))["warnings"]
    )


def test_a_run_is_evaluated_with_the_prompts_and_length_of_its_study(place: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(place)
    more = 'max_length = 32\nevaluation_max_length = 60\nevaluation_prompts = "mteb"\n'
    path = write(place, "prompted", *CHANGES, ("max_length = 32\n", more), designs=DESIGNS)
    assert run(path, workers=1) == {}
    encoder = checkpoint.load_any(folder_of(path, "m1"))
    (row,) = poolwise.evaluate(encoder, ["./pairs"])
    assert row["score"] == pytest.approx(score(path, "m1"), abs=1e-6)
    assert encoder.max_seq_length == 32  # as it was before
    (other,) = poolwise.evaluate(encoder, ["./pairs"], template="{instruction} ", max_length=48)
    assert abs(other["score"] - row["score"]) > 1e-3
    with pytest.raises(poolwise.PoolwiseError, match=r"must contain \{instruction\}"):
        poolwise.evaluate(encoder, ["./pairs"], template="now: ")
