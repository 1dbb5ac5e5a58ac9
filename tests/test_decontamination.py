"""Evaluation texts in the training data: which rows go, which are kept, and that all of them are counted by kind."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from poolwise.data.pairs import REMOVED, Pairs, decontaminate, load_pairs
from poolwise.data.tasks import resolve_tasks
from poolwise.errors import DataError
from poolwise.runs.check import check
from poolwise.runs.prepare import prepare
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from tiny import tiny_folder

STUDIES = Path(__file__).parents[1] / "studies"
CORPUS = [
    {"_id": "d1", "title": "Aspirin", "text": "It thins the blood."},
    {"_id": "d2", "title": "", "text": "A weir slows a river."},
]
QUERIES = [{"_id": "q1", "text": "What does aspirin do?"}]
SENTENCES = [{"sentence1": "a heron waits", "sentence2": "a bird stands still", "score": 4}, {"score": 1}]
SENTENCES[1] |= {"sentence1": "the ferry is late", "sentence2": "bread rises"}
LABELLED = {"train": ["cheap flights", "a red scarf"], "test": ["late trains", "a blue coat"]}
EVALUATED = {  # a row of the training data each, by the kind of evaluation text that it contains
    "queries": {"query": "what does aspirin do", "positive": "thinning"},
    "test texts": {"query": "which bird", "positive": "A heron waits!"},
    "test texts ": {"query": "which train", "positive": "Late trains."},
    "training texts": {"query": "where to", "positive": "cheap flights"},
    "documents": {"query": "what thins blood", "positive": "Aspirin It thins the blood."},
    "documents ": {"query": "what is good for the heart", "positive": "it thins the blood"},
    "documents  ": {"query": "how is a river slowed", "positive": "by a weir", "negative": "a weir slows a river"},
}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "search" / "corpus.jsonl", CORPUS)
    write(tmp_path / "search" / "queries.jsonl", QUERIES)
    write(tmp_path / "search" / "qrels" / "test.jsonl", [{"query-id": "q1", "corpus-id": "d1", "score": 1}])
    write(tmp_path / "pairs" / "test.jsonl", SENTENCES)
    for part, found in LABELLED.items():
        rows = [{"text": text, "label": number % 2} for number, text in enumerate(found)]
        write(tmp_path / "labels" / f"{part}.jsonl", rows)
    write(tmp_path / "mix.jsonl", [*EVALUATED.values(), *({"query": f"q {i}", "positive": f"p {i}"} for i in range(9))])
    return tmp_path


TASKS = ["./search", "./pairs", "./labels"]


def cleaned(folder: Path, which: str | bool) -> tuple[Pairs, set[str]]:
    """The pairs, and the kinds of the rows that are gone."""
    pairs = load_pairs(Recipe(dataset="mix.jsonl"), folder)
    texts = (text for task in resolve_tasks(TASKS, folder) for text in task.texts_by_kind())
    pairs = decontaminate(pairs, texts, REMOVED[which])
    left = set(pairs.dataset["query"])
    return pairs, {kind for kind, row in EVALUATED.items() if row["query"] not in left}


@pytest.mark.parametrize(
    ("which", "gone"),
    [
        ("queries", {"queries", "test texts", "test texts "}),
        ("all", set(EVALUATED)),
        (False, set()),
    ],
)
def test_the_rows_of_the_named_kinds_go_and_all_are_counted(folder, which, gone):
    pairs, removed = cleaned(folder, which)
    assert removed == gone
    assert pairs.report["rows"] == 9 + len(EVALUATED) - len(gone)
    assert pairs.report["decontaminated_rows"] == len(gone)
    counts = {kind: (found["texts"], found["rows"]) for kind, found in pairs.report["contaminated"].items()}
    assert counts == {"queries": (1, 1), "documents": (3, 3), "test texts": (6, 2), "training texts": (2, 1)}
    json.dumps(pairs.report)


def test_what_is_removed_and_what_is_kept_is_said(folder):
    assert [note for note in cleaned(folder, "queries")[0].notes() if "evaluation texts" in note] == [
        "3 training rows removed because they contain one of 7 evaluation texts "
        "(rows by kind: queries 1, test texts 2)",
        "training rows kept although they contain one of 5 evaluation texts "
        "(rows by kind: training texts 1, documents 3)",
    ]
    assert [note for note in cleaned(folder, False)[0].notes() if "evaluation texts" in note] == [
        "training rows kept although they contain one of 12 evaluation texts "
        "(rows by kind: queries 1, test texts 2, training texts 1, documents 3)"
    ]


def test_a_kept_filled_negative_is_not_drawn_again(folder):
    """Where documents are kept, a filled-in negative that is one stays, so that `false` changes nothing at all."""
    before = load_pairs(Recipe(dataset="mix.jsonl"), folder)
    assert cleaned(folder, False)[0].fingerprint == before.fingerprint


def test_a_study_trains_on_what_its_recipe_keeps(folder):
    tiny = str(tiny_folder(folder / "base"))
    rows = {}
    for which in ("queries", "all", False):
        recipe = {"base_model": tiny, "dataset": "mix.jsonl", "decontaminate": which, "batch_size": 2, "steps": 2}
        recipe["max_length"] = 32
        designs = [{"attention": "causal", "pooling": "mean", "name": "m"}]
        raw = {"name": "s", "baseline": "m", "tasks": TASKS, "seeds": [0], "designs": designs, "recipe": recipe}
        study = Study.parse({**raw, "controls": False, "references": []}, folder)
        prepared = prepare(study)
        rows[which] = prepared.pairs.report["rows"] if prepared.pairs else 0
        assert any("evaluation texts" in note for note in prepared.notes)
        assert "decontaminate" not in prepared.trials[0].spec["recipe"]  # the hash of the data is what counts
    assert rows == {"queries": 13, "all": 9, False: 16}


def test_the_papers_recipe_keeps_passages_that_are_in_the_corpora(folder):
    """The paper's file with another base, other data and tasks: as in its data, many positives are corpus passages."""
    passages = [f"Passage number {i} is about subject {i * 7 % 3_989}." for i in range(4_000)]
    write(folder / "search" / "corpus.jsonl", [*CORPUS, *({"_id": f"p{i}", "text": t} for i, t in enumerate(passages))])
    rows = [{"query": f"question {i}", "positive": text, "negative": f"not {i}"} for i, text in enumerate(passages)]
    write(folder / "mix.jsonl", rows)
    raw = tomllib.loads((STUDIES / "paper-mistral-7b.toml").read_text(encoding="utf-8"))
    base = tiny_folder(folder / "base", "mistral", max_position_embeddings=1024)
    raw["recipe"] |= {"base_model": str(base), "dataset": "mix.jsonl"}
    raw["tasks"] = TASKS
    found = check(Study.parse(raw, folder))["data"]
    assert "4,000 training rows (mix.jsonl 4,000)" in found
    assert (
        "training rows kept although they contain one of 4,012 evaluation texts "
        "(rows by kind: queries 0, test texts 0, training texts 0, documents 4,000)"
    ) in found
    recipe = raw["recipe"] | {"decontaminate": "all"}
    with pytest.raises(DataError, match="every row contains a text of an evaluation task"):
        check(Study.parse({**raw, "recipe": recipe}, folder))
