"""What is put before the texts of an evaluation, and to how many tokens they are cut, seen from inside the model."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from poolwise.data.tasks import Task, resolve_tasks
from poolwise.errors import StudyError
from poolwise.model.backbone import Backbone
from poolwise.model.encoder import evaluation_prompts
from poolwise.runs.prepare import prepare
from poolwise.runs.trial import run_trial
from poolwise.scoring.evaluate import evaluate
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from small_study import furnish, write

STUDIES = Path(__file__).parents[1] / "studies"
PROMPTS = {
    "STSBenchmark": {"": "Retrieve semantically similar text."},
    "SprintDuplicateQuestions": {"": "Retrieve duplicate questions from Sprint forum"},
    "Banking77Classification": {"": "Given a online banking query, find the corresponding intents."},
    "TwentyNewsgroupsClustering.v2": {"": "Identify the topic or theme of the given news articles"},
    "FiQA2018": {
        "q": "Given a financial question, retrieve user replies that best answer the question.",
        "d": "",
    },
    "TRECCOVID": {"q": "Given a query, retrieve documents that answer the query", "d": ""},
    "AskUbuntuDupQuestions": {"": "Retrieve duplicate questions from AskUbuntu forum"},
    "SummEval": {"": "Given a news summary, retrieve other semantically similar summaries"},
}
"""One task of each type, and two of retrieval -> what the published evaluation puts before queries, documents, texts.

Keys: how texts start, all if empty."""


def texts(count: int, mark: str = "t") -> list[str]:
    return [f"{mark}{number} some words" for number in range(count)]


def search_data(reranking: bool) -> dict[str, Any]:
    corpus = [{"id": f"c{n}", "title": "", "text": text} for n, text in enumerate(texts(6, "d"))]
    queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(texts(2, "q"))]
    return {
        "corpus": Dataset.from_list(corpus),
        "queries": Dataset.from_list(queries),
        "relevant_docs": {f"q{n}": {f"c{n}": 1} for n in range(2)},
        "top_ranked": {f"q{n}": [f"c{i}" for i in range(6)] for n in range(2)} if reranking else None,
    }


def with_data(task: Task) -> Task:
    """An official task around a few made texts, in the form that mteb's evaluators take."""
    split, kind = task.splits[0], task.task_type
    if kind in ("Retrieval", "Reranking"):
        task.mteb.dataset = {"default": {split: search_data(kind == "Reranking")}}
    elif kind == "STS":
        rows = {"sentence1": texts(6), "sentence2": texts(6, "u"), "score": [0.0, 1, 2, 3, 4, 5]}
        task.mteb.dataset = DatasetDict({split: Dataset.from_dict(rows)})
    elif kind == "PairClassification":
        rows = {"sentence1": texts(6), "sentence2": texts(6, "u"), "labels": [0, 1] * 3}
        task.mteb.dataset = DatasetDict({name: Dataset.from_dict(rows) for name in task.splits})
    elif kind == "Classification":
        rows = {"text": texts(24), "label": [number % 2 for number in range(24)]}
        task.mteb.dataset = DatasetDict({name: Dataset.from_dict(rows) for name in ("train", split)})
    elif kind == "Clustering":
        rows = {"sentences": texts(300), "labels": [number % 3 for number in range(300)]}  # mteb embeds 4 %
        task.mteb.dataset = DatasetDict({split: Dataset.from_dict(rows)})
    else:
        row = {
            "text": "t0 text",
            "human_summaries": texts(2),
            "machine_summaries": texts(4, "u"),
            "relevance": [1, 2, 3, 4],
        }
        task.mteb.dataset = DatasetDict({split: Dataset.from_list([row, {**row, "relevance": [4, 2, 1, 3]}])})
    task.mteb.data_loaded = True
    return task


class Recorder:
    """A model that keeps what it is given."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, given: list[str]) -> np.ndarray:
        self.texts += given
        return np.stack([np.random.default_rng(sum(text.encode())).standard_normal(8) for text in given])


def paper_recipe() -> Recipe:
    raw = tomllib.loads((STUDIES / "paper-mistral-7b.toml").read_text(encoding="utf-8"))
    return Study.parse(raw).recipe


@pytest.mark.parametrize("name", PROMPTS)
def test_the_papers_prompts_reach_the_model(name: str, tmp_path: Path) -> None:
    (task,) = resolve_tasks([name], tmp_path)
    model = Recorder()
    evaluate(model, [with_data(task)], identity="x", prompts=evaluation_prompts(paper_recipe()), items=False)
    assert model.texts
    for mark, prompt in PROMPTS[name].items():
        given = [text for text in model.texts if text.removeprefix(prompt)[0] == mark or not mark]
        assert given
        for text in given:  # the text follows its instruction immediately
            assert text.startswith(prompt)
            assert text.removeprefix(prompt).endswith((" some words", " text"))
            assert text.removeprefix(prompt)[0] in "tuqd"


def test_a_template_around_the_instruction(tmp_path: Path) -> None:
    recipe = Recipe(evaluation_prompts="mteb", prompts={"Banking77Classification": "intent? "})
    prompts, seen = evaluation_prompts(recipe), {}
    for name in ("FiQA2018", "Banking77Classification", "STSBenchmark"):
        (task,) = resolve_tasks([name], tmp_path)
        model = Recorder()
        (row,) = evaluate(model, [with_data(task)], identity="x", prompts=prompts, items=False)
        seen[name] = row["prompts"]
    assert seen == {
        "FiQA2018": '{"query": "Instruct: Given a financial question, retrieve user replies that best answer the '
        'question\\nQuery: "}',
        "Banking77Classification": '{"text": "intent? "}',
        "STSBenchmark": '{"text": "Instruct: Retrieve semantically similar text.\\nQuery: "}',
    }


def test_evaluation_has_a_length_and_prompts_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(
        furnish(tmp_path), "runs", ("steps = 6", "steps = 1"), ("evaluate_at = [0.5, 1.0]", "evaluate_at = [1.0]"),
        ("max_length = 32\n", 'max_length = 64\nevaluation_max_length = 20\nevaluation_prompts = "mteb"\n'
         'evaluation_template = "{instruction} | "\n'),
    )  # fmt: skip
    prepared = prepare(Study.load(path))
    longest: dict[bool, int] = {True: 0, False: 0}
    starts = set()
    forward = Backbone.forward

    def watched(self: Backbone, features: dict[str, Any], **given: Any) -> dict[str, Any]:
        lengths = features["attention_mask"].sum(1)
        longest[self.training] = max(longest[self.training], int(lengths.max()))
        if not self.training:
            starts.update(self.words.decode(row[:16]) for row in features["input_ids"])
        return forward(self, features, **given)

    monkeypatch.setattr(Backbone, "forward", watched)
    trial = next(trial for trial in prepared.trials if trial.role == "design")
    run_trial(trial, prepared, prepared.study.folder / "trials" / trial.name)
    assert longest[False] == 20
    assert longest[True] > 20
    assert any(start.startswith("Retrieve se") for start in starts)  # STS
    assert any(start.startswith("Retrieve text") for start in starts)  # retrieval, queries
    assert any(start.startswith("a ") for start in starts)  # retrieval, documents


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('evaluation_prompts = "mteb"\nevaluation_template = "none"', r"must contain \{instruction\}"),
        ('evaluation_template = "{instruction}"', "no effect without instructions; add evaluation_prompts = 'mteb'"),
        ('prompts = { STS = "{instruction}" }', r"prompts.STS contains \{instruction\}"),
        ("evaluation_max_length = 1", "give at least 2 tokens, or 0 for max_length"),
    ],
)
def test_settings_that_contradict_each_other(line: str, message: str) -> None:
    text = f'name = "s"\n[recipe]\n{line}\n[[designs]]\npreset = "m1"\n'
    with pytest.raises(StudyError, match=message):
        Study.parse(tomllib.loads(text))
