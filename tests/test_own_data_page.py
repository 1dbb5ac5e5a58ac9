"""docs/own-data.md: its examples are files that are read, and `init own` makes of them what the page shows."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from poolwise.cli import main
from poolwise.data.own_tasks import KINDS, TOML_KEYS
from poolwise.data.pairs import ROLES, load_pairs
from poolwise.data.survey import survey
from poolwise.data.tasks import resolve_tasks
from poolwise.errors import TaskError
from poolwise.runs.check import check
from poolwise.scoring.evaluate import evaluate
from poolwise.scoring.references import reference
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study

PAGE = (Path(__file__).parents[1] / "docs" / "own-data.md").read_text(encoding="utf-8")
EXPECTED = {  # folder -> task type, task.toml aside
    "faq": "Retrieval",
    "ranking": "Reranking",
    "similar": "STS",
    "duplicates": "PairClassification",
    "intents": "Classification",
    "topics": "Clustering",
    "themes": "Clustering",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's examples as files."""
    examples = re.findall(r"^```\w+ (\S+/\S+)\n(.*?)^```", PAGE, re.M | re.S)
    assert len(examples) == 13
    for name, content in examples:
        assert content.count("\n") <= 10, name
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return tmp_path


def command(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_every_example_of_a_task_is_scored(folder: Path) -> None:
    tasks = resolve_tasks([f"./my-data/{name}" for name in EXPECTED], folder)
    assert {task.name: task.task_type for task in tasks} == EXPECTED
    scores = evaluate(reference("tfidf"), tasks, identity="tfidf", items=False)
    assert [row["task"] for row in scores] == list(EXPECTED)


@pytest.mark.parametrize(("name", "rows"), [("pairs.csv", 5), ("more.jsonl", 4)])
def test_every_example_of_training_pairs_is_read(folder: Path, name: str, rows: int) -> None:
    pairs = load_pairs(Recipe(dataset=f"my-data/{name}"), folder)
    assert pairs.report["rows"] == rows


def test_the_page_names_every_kind_key_and_column() -> None:
    for word in (*KINDS, *TOML_KEYS):
        assert f"`{word}`" in PAGE
    for spellings in ROLES.values():
        assert [word for word in spellings if f"`{word}`" not in PAGE] in ([], ["postive"])


def test_init_own_prints_what_the_page_shows_and_writes_a_study_that_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (found,) = re.findall(r"^```console\n\$ (poolwise init own .*)\n((?:.*\n)*?)```", PAGE, re.M)
    line, shown = found
    assert command(line, monkeypatch, capsys) == (0, shown, "")
    study = Study.load("own.toml")
    assert [Path(name).name for name in study.tasks] == sorted(EXPECTED)
    assert [source.path for source in study.recipe.sources] == ["./my-data/more.jsonl", "./my-data/pairs.csv"]
    # `topics` is a single set, which is scored and not tested over items
    assert [row["task"] for row in check(study)["folders"]] == sorted(EXPECTED.keys() - {"topics"})
    code, _, err = command(line, monkeypatch, capsys)
    assert (code, err) == (2, "error: own.toml exists; give another name with --to\n")


def test_init_own_looks_at_one_task_or_one_file_of_pairs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder / "my-data" / "faq")
    (folder / "my-data" / "faq" / "README.md").write_text("about")
    code, out, _ = command("poolwise init own --to ../study.toml", monkeypatch, capsys)
    assert code == 0
    assert ".: retrieval task 'faq': 3 documents" in out
    assert "not read: README.md" in out
    study = Study.load("../study.toml")
    assert study.tasks == ("./faq",)
    assert study.recipe.dataset == "demo"
    (folder / "just").mkdir()
    (folder / "my-data" / "pairs.csv").rename(folder / "just" / "train.csv")
    (folder / "just" / "dev.csv").write_text("query,positive\nq,p\n")
    found, unread = survey(folder / "just")
    assert [(each.path.name, each.pairs) for each in found] == [("train.csv", 5)]
    assert unread == ["dev.csv"]


def test_init_own_reports_every_mistake_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "my-data" / "topics" / "task.toml").unlink()
    with (folder / "my-data" / "similar" / "test.csv").open("a") as file:
        file.write("one,two,three\n")
    with (folder / "my-data" / "more.jsonl").open("a") as file:
        file.write("{\n")
    code, out, err = command("poolwise init own my-data", monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert "test.csv: has texts and labels, and there is no train file" in err
    assert "test.csv, line 6: column 'score': expected a number, got 'three'" in err
    assert "my-data/more.jsonl: 1 mistake\n  - line 4: not valid JSON" in err
    assert not (folder / "own.toml").exists()
    code, _, err = command("poolwise init demo my-data", monkeypatch, capsys)
    assert (code, err) == (2, "error: init demo takes no folder (my-data); `init own FOLDER` does\n")


def test_ab_prints_what_the_page_shows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    examples = re.findall(r"^```console\n\$ (poolwise ab .*)\n((?:.*\n)*?)\.\.\.\n```", PAGE, re.M)
    assert len(examples) == 2
    for line, shown in examples:
        code, out, _ = command(line, monkeypatch, capfd)
        assert code == 0
        assert out.startswith(shown)
    assert sorted(path.name for path in (folder / "my-data/faq-ab").iterdir()) == ["ab.html", "ab.json", "ab.md"]


def test_a_folder_with_nothing_to_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TaskError, match=r"neither an evaluation task nor training pairs .*found: notes\.txt.*own-data"):
        survey(tmp_path)
    with pytest.raises(TaskError, match="no such folder"):
        survey(tmp_path / "absent")
