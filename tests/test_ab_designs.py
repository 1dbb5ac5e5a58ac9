"""`ab` with designs of a study: all their runs, and an answer at both scopes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from poolwise.errors import CheckpointError, StudyError
from poolwise.reports.ab import differences, headline, sentences
from poolwise.runs.ab import ab, contenders
from poolwise.runs.run import run
from poolwise.study.study import Study
from small_study import furnish
from tiny import SENTENCES

TEXT = """\
name = "two"
baseline = "m1"
seeds = [0, 1]
tasks = []
references = []
controls = false
evaluate_at = [1.0]
output = "two"

[recipe]
base_model = "nano"
dataset = "./train.jsonl"
steps = 1
batch_size = 8
warmup_steps = 0
max_length = 32
negatives = 0

[[designs]]
preset = "m1"
[[designs]]
name = "mean-bi"
attention = "bidirectional"
pooling = "mean"
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = furnish(tmp_path_factory.mktemp("two"))
    (place / "two.toml").write_text(TEXT)
    assert run(Study.load(place / "two.toml"), workers=1) == {}
    rows = [{"_id": f"d{i}", "text": f"number {i} {SENTENCES[i % 6]} the end"} for i in range(30)]
    (place / "index/qrels").mkdir(parents=True)
    (place / "index/corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [{"_id": f"q{i}", "text": " ".join(row["text"].split()[:5])} for i, row in enumerate(rows)]
    (place / "index/queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    grades = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(30)]
    (place / "index/qrels/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in grades))
    return place


def test_designs_are_compared_at_both_scopes(study: Path) -> None:
    result = ab(study / "index", [f"{study}/two.toml:m1", f"{study}/two.toml:mean-bi"])
    assert [len(model["runs"]) for model in result["models"]] == [2, 2]
    models, designs = result["answers"]
    assert models["test"] == "paired permutation"
    assert (designs["test"], result["decision"]) == ("crossed", designs)
    assert designs["difference"] == pytest.approx(models["difference"])
    assert designs["inner_low"] >= designs["ci_low"]
    texts = sentences(result)
    assert [text.split(":")[0] for text in texts] == ["For these models", "For these designs on this data"]
    assert headline(result) in texts[1]
    assert {row[1] for row in differences(result).rows} == {"these models", "these designs on this data"}


def test_one_model_that_is_no_design_leaves_the_decision_to_the_models(study: Path) -> None:
    result = ab(study / "index", [f"{study}/two.toml:m1", "bm25"])
    assert [answer["test"] for answer in result["answers"]] == ["paired permutation"]
    assert result["decision"]["scope"].startswith("these checkpoints (runs averaged: 1 of bm25, 2 of m1)")


def test_designs_that_cannot_be_taken(study: Path) -> None:
    with pytest.raises(StudyError, match="design 'mean' is not in this study; it has m1, mean-bi; did you mean"):
        contenders([f"{study}/two.toml:mean", "bm25"])
    (study / "other.toml").write_text(TEXT.replace('"two"', '"other"'))
    with pytest.raises(CheckpointError, match=r"m1 of study other has no trained run in .*other"):
        contenders([f"{study}/other.toml:m1", "bm25"])
