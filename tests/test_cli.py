"""The command line: what each command prints and writes, and how mistakes are told: one message, code 2, no loss."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import poolwise
from poolwise.cli import main
from tiny import tiny_folder

Invoke = Callable[..., tuple[int, str, str]]
WORDS = ("cat", "dog", "river", "book", "water", "morning", "people", "home", "mat", "walk")
PROGRAM = [sys.executable, "-c", "from poolwise.cli import main; main()"]
STUDY = """
name = "tiny"
baseline = "m1"
seeds = [0, 1]
tasks = ["./sts", "./sts-2", "./topics"]
references = ["tfidf"]
controls = false
evaluate_at = [1.0]

[recipe]
base_model = "./llama"
dataset = "pairs.jsonl"
steps = 2
batch_size = 4
warmup_steps = 0
max_length = 32
negatives = 1

[[designs]]
preset = "m1"

[[designs]]
preset = "m4"
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pair(i: int) -> dict[str, str]:
    a, b, c = WORDS[i % 10], WORDS[i % 7], WORDS[(i + 3) % 10]
    return {"query": f"the {a} {b} {i}", "positive": f"a {a} and {b} {i}", "negative": f"no {c} {i}"}


def write_data(folder: Path) -> None:
    """24 training pairs, two STS folders of 10 pairs, 18 labelled texts."""
    write_rows(folder / "pairs.jsonl", [pair(i) for i in range(24)])
    for name, shift in (("sts", 0), ("sts-2", 4)):
        rows = [(WORDS[i], WORDS[(i * 3 + shift) % 10], i % 5) for i in range(10)]
        scored = [{"sentence1": f"one {a} {shift}", "sentence2": f"two {b} {shift}", "score": s} for a, b, s in rows]
        write_rows(folder / name / "test.jsonl", scored)
    texts = [{"text": f"{WORDS[i % 2]} {WORDS[i % 9]} number {i}", "label": WORDS[i % 2]} for i in range(36)]
    write_rows(folder / "topics" / "train.jsonl", texts[:18])
    write_rows(folder / "topics" / "test.jsonl", texts[18:])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that takes both modes (64 positions), and one that ignores `bidirectional`."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_folder(folder, "llama")
    tiny_folder(folder, "gpt_neo")
    return folder


@pytest.fixture
def here(tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: data, both bases, no study yet."""
    write_data(tmp_path)
    for base in ("llama", "gpt_neo"):
        (tmp_path / base).symlink_to(bases / base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_study(folder: Path, *changes: tuple[str, str]) -> Path:
    text = STUDY
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Calls the program's entry point in this process; gives exit code, stdout and stderr, caught at descriptors."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["poolwise", *map(str, args)])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def program(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    done = subprocess.run([*PROGRAM, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def snapshot(folder: Path) -> dict[str, str]:
    """Every file (not the locks) with its hash."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(invoke: Invoke, folder: Path, *args: object) -> str:
    """The message of a refusal: code 2, nothing on stdout, nothing on disk changed."""
    before = snapshot(folder)
    code, out, err = invoke(*args)
    assert (code, out) == (2, ""), (code, out, err)
    assert snapshot(folder) == before
    return err


# --- a study file that is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("steps = 2", "stpes = 2"), ["recipe.stpes is not a field", "did you mean 'steps'?"]),
        (("steps = 2", 'steps = "2"'), ["recipe.steps = '2'", "it is a str"]),
        (("baseline =", "base_line ="), ["base_line is not a field", "did you mean 'baseline'?"]),
        (('"m4"', '"m8"'), ["designs[1]", "preset 'm8' is unknown; allowed: m1, m2"]),
        (("[recipe]", "[recipe"), ["is not valid TOML"]),
        (('"./sts-2"', '"STSBenchmrk"'), ["unknown task 'STSBenchmrk'", "did you mean 'STSBenchmark'?"]),
        (('"./sts-2"', '"./sts2"'), ["evaluation folder './sts2': no such folder", "did you mean 'sts-2'?"]),
        (('"./llama"', '"./lama"'), ["recipe.base_model = './lama'", "no such model folder"]),
        (("pairs.jsonl", "pair.jsonl"), ["training data 'pair.jsonl': no such file", "did you mean 'pairs.jsonl'?"]),
        (("max_length = 32", "max_length = 65"), ["recipe.max_length = 65", "./llama has 64 positions"]),
        (("negatives = 1", 'schedule = "linaer"'), ["recipe.schedule = 'linaer'", "did you mean 'linear'?"]),
        (("batch_size = 4", "batch_size = 64"), ["pairs.jsonl", "64"]),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_check_refuses(change: tuple[str, str], words: list[str], here: Path, invoke: Invoke) -> None:
    study = write_study(here, change)
    err = refused(invoke, here, "check", study)
    assert err.startswith("error: ")
    for word in words:
        assert word in err


def test_study_file_that_is_not_there(here: Path, invoke: Invoke) -> None:
    write_study(here)
    for command in ("check", "run", "status", "compare", "report"):
        assert "no such file; did you mean 'study.toml'?" in refused(invoke, here, command, "stduy.toml")
    assert "no such file" in refused(invoke, here, "export", "stduy.toml", "m1", "--to", "out")


@pytest.mark.parametrize("output", ["taken", "taken/below"])
def test_an_output_that_cannot_be_made(output: str, here: Path, invoke: Invoke) -> None:
    (here / "taken").write_text("a file")
    study = write_study(here, ('name = "tiny"', f'name = "tiny"\noutput = "{output}"'))
    err = refused(invoke, here, "run", study)
    assert f"output = '{here / output}': no folder can be made there (" in err
    assert "name one that is free and can be written" in err


def test_a_folder_where_a_file_belongs(here: Path, invoke: Invoke) -> None:
    (here / "runs" / "tiny" / "study.json").mkdir(parents=True)
    err = refused(invoke, here, "run", write_study(here))
    assert "'runs/tiny/study.json': Is a directory; name another path that can be read and written" in err


# --- training data that is wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json.dumps({**pair(0), "query": "  "}), "'query' is empty"),
        ('{"query": "a", "positive"', "not valid JSON"),
        (json.dumps({**pair(0), "positive": 7}), "'positive' is 7 (int)"),
        (json.dumps({"query": "a", "postiv": "b"}), "no column 'positive'"),
        (json.dumps({**pair(0), "negative": pair(0)["positive"]}), "the negative is equal to the positive"),
        ('["a", "b"]', "a JSON list"),
    ],
)
def test_bad_training_row(line: str, words: str, here: Path, invoke: Invoke) -> None:
    lines = (here / "pairs.jsonl").read_text().splitlines()
    (here / "pairs.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    err = refused(invoke, here, "check", write_study(here))
    assert "pairs.jsonl: 1 mistake" in err
    assert "line 3: " in err
    assert words in err


def test_training_csv_without_a_column(here: Path, invoke: Invoke) -> None:
    (here / "pairs.csv").write_text("query,answr\na,b\n")
    err = refused(invoke, here, "check", write_study(here, ("pairs.jsonl", "pairs.csv")))
    assert "pairs.csv: no column 'positive' (found: 'query', 'answr'" in err


def test_bad_evaluation_row(here: Path, invoke: Invoke) -> None:
    with (here / "sts" / "test.jsonl").open("a") as file:
        file.write('{"sentence1": "a", "sentence2": "b", "score": "high"}\n{"sentence1": "a", "score": 1}\n')
    err = refused(invoke, here, "check", write_study(here))
    assert "test.jsonl, line 11: column 'score': expected a number, got 'high'" in err
    assert "test.jsonl, line 12: missing column(s) sentence2" in err


def test_texts_beyond_the_limit_are_told(here: Path, invoke: Invoke) -> None:
    """One query of 24 rows x 3 texts has far more than 32 tokens: it is cut, and the user hears of it."""
    rows = [pair(i) for i in range(24)]
    rows[5]["query"] = "many words " * 40
    write_rows(here / "pairs.jsonl", rows)
    code, out, _ = invoke("check", write_study(here))
    assert code == 0
    assert "1 of 72 sampled training texts are longer than recipe.max_length = 32 tokens and are cut" in out
    write_data(here)
    assert "are cut" not in invoke("check", write_study(here))[1]


# --- models ----------------------------------------------------------------------------------------------------------


def test_probe(here: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("probe", "./llama")
    assert code == 0
    assert out.count(": yes") == 2
    code, out, _ = invoke("probe", "./gpt_neo")
    assert code == 0
    assert "causal: yes" in out
    assert "bidirectional: NO" in out
    assert "GPTNeoModel on attention backend 'eager' is not bidirectional" in out
    code, out, _ = invoke("probe", "./gpt_neo", "--json")
    found = json.loads(out)
    assert (found["model"], code) == ("GPTNeoModel", 0)
    assert [found["modes"][mode]["ok"] for mode in ("causal", "bidirectional")] == [True, False]
    matrix = np.array(found["modes"]["causal"]["influence"]["left"])
    assert matrix.shape == (8, 8)
    assert not np.triu(matrix > 1e-6, 1).any()


def test_a_model_that_ignores_the_mode_is_refused(here: Path, invoke: Invoke) -> None:
    eager = ("negatives = 1", 'attn_implementation = "eager"')
    study = write_study(here, ("./llama", "./gpt_neo"), eager)
    words = [
        "recipe.base_model = './gpt_neo' cannot carry the design m4: GPTNeoModel on attention backend 'eager'",
        "is not bidirectional",
    ]
    err = refused(invoke, here, "check", study)
    assert all(word in err for word in words)
    before = snapshot(here)
    done = program("run", study, cwd=here)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words)
    assert snapshot(here) == before
    # what it can do, it does
    only_causal = write_study(here, ("./llama", "./gpt_neo"), eager, ('preset = "m4"', 'preset = "m2"'))
    assert invoke("check", only_causal)[0] == 0
    no_sdpa = write_study(here, ("./llama", "./gpt_neo"))
    assert "try recipe.attn_implementation = 'eager'" in refused(invoke, here, "check", no_sdpa)


def test_a_hub_that_cannot_be_reached(here: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is in the message, and it comes within seconds: the Hub's client alone retries for half a minute."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    study = write_study(here, ("./llama", "some-org/no-model"))
    err = refused(invoke, here, "check", study)
    assert "recipe.base_model = 'some-org/no-model' cannot be loaded" in err
    assert "this machine can reach" in err
    assert "model = 'some-org/no-model' cannot be loaded" in refused(invoke, here, "probe", "some-org/no-model")
    err = refused(invoke, here, "evaluate", "some-org/no-model", "--tasks", "./sts")
    assert "model 'some-org/no-model' cannot be loaded" in err
    assert time.monotonic() - started < 20
    assert not constants.HF_HUB_OFFLINE  # as it was


# --- scores ----------------------------------------------------------------------------------------------------------

FIELDS = ("design", "seed", "task", "task_type", "metric", "score")


def scores(path: Path, seeds: int = 2, designs: tuple[str, ...] = ("m1", "m5"), tasks: int = 6, step: int = 0) -> Path:
    """m5 is .02 above m1 on every task, the runs differ by .001."""
    rows = [
        (design, seed, f"task {task}", "STS", "cosine_spearman", start + 0.03 * task + seed / 1e3)
        for design, start in zip(designs, (0.5, 0.52), strict=False)
        for seed in range(seeds)
        for task in range(tasks)
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([FIELDS, *rows])
    return path


def test_compare_json_has_the_promised_fields(here: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("compare", scores(here / "scores.csv"), "--baseline", "m1", "--json")
    assert code == 0
    row = json.loads(out)["comparisons"][0]
    assert tuple(row) == (
        "group", "design", "baseline", "n", "difference", "ci_low", "ci_high", "p_value", "p_holm", "effect_size",
        "wins", "ties", "losses", "min_reachable_p",
    )  # fmt: skip
    # six differences of one sign: the exact two-sided p is 2 / 2**6
    assert (row["n"], row["wins"], row["losses"], row["effect_size"]) == (6, 6, 0, 1.0)
    assert row["p_value"] == row["min_reachable_p"] == pytest.approx(2 / 64)
    assert row["difference"] == pytest.approx(0.02)
    scores(here / "few.csv", tasks=2)  # two tasks bound nothing
    few = json.loads(invoke("compare", here / "few.csv", "--json")[1])["comparisons"][0]
    assert few["ci_low"] is None
    assert few["ci_high"] is None


def test_compare_table_is_not_cut_where_stdout_is_no_terminal(here: Path, invoke: Invoke) -> None:
    names = ("m1", "a-design-with-a-name-that-is-longer-than-most-of-the-names-that-designs-have")
    code, out, _ = invoke("compare", scores(here / "scores.csv", designs=names))
    assert code == 0
    assert "…" not in out
    assert any(names[1] in line and "6/0/0" in line for line in out.splitlines())


def test_one_seed_prints_the_banner(here: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("compare", scores(here / "scores.csv", seeds=1))
    assert code == 0
    assert out.startswith("One run only. Every design was trained once")
    assert "One run only" not in invoke("compare", scores(here / "two.csv"))[1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("task_type", "taks_type", ["'task_type' is missing; did you mean 'taks_type'?"]),
        ("0.52", "83.2", ["score must lie between 0 and 1", "line 8 ('83.2')"]),
        ("0.52", "", ["score is empty: line 8"]),
        ("0.52", "high", ["score is not a number: line 8 ('high')"]),
        ("task 1", "task 0", ["are listed more than once", "line 2 ('task 0'), line 3 ('task 0')"]),
        ("m5", "m1", ["are listed more than once"]),
    ],
)
def test_bad_scores(old: str, new: str, words: list[str], here: Path, invoke: Invoke) -> None:
    path = scores(here / "scores.csv", seeds=1)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    for command in ("compare", "report"):
        err = refused(invoke, here, command, path)
        assert "scores.csv: " in err
        for word in words:
            assert word in err


def test_all_scores_as_percentages(here: Path, invoke: Invoke) -> None:
    path = scores(here / "scores.csv")
    lines = path.read_text().splitlines()
    hundred = [f"{line.rpartition(',')[0]},{100 * float(line.rpartition(',')[2]):.1f}" for line in lines[1:]]
    path.write_text("\n".join([lines[0], *hundred]) + "\n")
    assert "they look like percentages: divide every score by 100" in refused(invoke, here, "compare", path)


def test_what_compare_cannot_do(here: Path, invoke: Invoke) -> None:
    path = scores(here / "scores.csv")
    assert "baseline 'm4' has no scores; the designs are m1, m5" in refused(
        invoke, here, "compare", path, "--baseline", "m4"
    )
    assert "task_type" in refused(invoke, here, "compare", path, "--by", "task_typ")
    assert "dropp" in refused(invoke, here, "compare", path, "--missing", "dropp")
    assert "did you mean 'scores.csv'?" in refused(invoke, here, "compare", "score.csv")
    one = scores(here / "one.csv", designs=("m1",))
    assert "a comparison needs two designs; the scores contain m1" in refused(invoke, here, "compare", one)
    text = path.read_text().splitlines()
    path.write_text("\n".join(line for line in text if not line.startswith("m5,1,task 3")) + "\n")
    assert "task 3" in refused(invoke, here, "compare", path)
    assert invoke("compare", path, "--missing", "drop")[0] == 0


def test_report_of_a_csv(here: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("report", scores(here / "scores.csv"), "--to", here / "out")
    assert code == 0
    for name in ("report.md", "report.html"):
        assert str(here / "out" / name) in out
        assert "m5" in (here / "out" / name).read_text()


# --- a study from its first line to its export -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, bases: Path) -> SimpleNamespace:
    """A study begun with `init`, edited, and run: its folder, its file and what the run printed."""
    folder = tmp_path_factory.mktemp("finished")
    write_data(folder)
    for base in ("llama", "gpt_neo"):
        (folder / base).symlink_to(bases / base)
    began = program("init", "demo", "--to", "study.toml", cwd=folder)
    assert began.stdout == "wrote study.toml; next: poolwise check study.toml\n"
    (folder / "study.toml").write_text(STUDY)
    return SimpleNamespace(folder=folder, study=folder / "study.toml", run=program("run", "study.toml", cwd=folder))


@pytest.fixture
def study(finished: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished study's file, seen from its folder."""
    monkeypatch.chdir(finished.folder)
    return finished.study


def test_run_tells_and_compares(finished: SimpleNamespace) -> None:
    out, err = finished.run.stdout, finished.run.stderr
    assert finished.run.returncode == 0, err
    assert "5 of 5 trials" in err
    assert "24 training rows (pairs.jsonl 24)" in err
    assert "Mean scores" in out
    assert "Mean scores" not in err
    assert "trials" not in out
    assert "runs/tiny/report.html" in out
    assert "m4" in (finished.folder / "runs/tiny/report.md").read_text()


def test_check_as_table_and_json(study: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("check", study)
    assert code == 0
    assert "2 factors: attention, pooling" in out
    assert "4 trainings (0 of them controls)" in out
    assert "data: 24 training rows (pairs.jsonl 24)" in out
    assert "…" not in out
    code, out, _ = invoke("check", study, "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["differs_in"] for row in found["designs"]] == [[], ["attention", "pooling"]]
    assert found["effective_negatives"] == 7  # 3 other positives and 4 hard negatives
    assert {group["task_type"]: group["min_reachable_p"] for group in found["tasks"]} == {
        "Classification": 1,
        "STS": 0.5,
    }


def test_status_as_table_and_json(study: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("status", study)
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["m1", "done", "done"],
        ["m4", "done", "done"],
        ["tfidf", "done"],
    ]
    code, out, _ = invoke("status", study, "--json")
    trials = json.loads(out)
    assert {(t["label"], t["seed"], t["state"]) for t in trials if t["role"] == "design"} == {
        (name, seed, "done") for name in ("m1", "m4") for seed in (0, 1)
    }


def test_compare_and_report_a_study(study: Path, invoke: Invoke, tmp_path: Path) -> None:
    code, out, _ = invoke("compare", study, "--json")
    assert code == 0
    assert {(row["group"], row["design"], row["n"]) for row in json.loads(out)["comparisons"]} == {
        ("STS", "m4", 2), ("Classification", "m4", 1),
    }  # fmt: skip
    code, out, _ = invoke("report", study, "--to", tmp_path)
    assert code == 0
    assert (tmp_path / "report.html").read_text().count("<td") > 10
    assert "m9" in refused(invoke, study.parent, "compare", study, "--baseline", "m9")


def test_running_again_does_nothing(study: Path, finished: SimpleNamespace) -> None:
    trained = {k: v for k, v in snapshot(study.parent / "runs").items() if "/trials/" in k}
    again = program("run", "study.toml", cwd=study.parent)
    assert again.returncode == 0
    assert again.stdout == finished.run.stdout
    assert {k: v for k, v in snapshot(study.parent / "runs").items() if "/trials/" in k} == trained


def test_export_and_load(study: Path, invoke: Invoke, tmp_path: Path) -> None:
    code, out, _ = invoke("export", study, "m4", "--seed", 1, "--to", tmp_path / "m4")
    assert code == 0
    assert out.strip() == str(tmp_path / "m4")
    exported = poolwise.load(tmp_path / "m4")
    (run,) = (study.parent / "runs/tiny/trials").glob("m4-s1-*")
    texts = ["the cat walks", "a river"]
    expected = poolwise.load(run / "training" / "step-2").encode(texts)
    assert np.abs(exported.encode(texts) - expected).max() < 1e-5
    assert "exists and is not empty" in refused(invoke, tmp_path, "export", study, "m4", "--to", tmp_path / "m4")


def test_bad_exports(study: Path, invoke: Invoke, tmp_path: Path) -> None:
    for arguments, words in (
        (("m5",), "design 'm5' is not in this study; it has m1, m4"),
        (("m4", "--seed", 7), "--seed 7 is not in this study; allowed: 0, 1"),
        (("tfidf",), "design 'tfidf' is not in this study"),
    ):
        assert words in refused(invoke, study.parent, "export", study, *arguments, "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_study_that_has_not_run(here: Path, invoke: Invoke) -> None:
    study = write_study(here)
    assert "no scores in runs/tiny yet; run the study first" in refused(invoke, here, "compare", study)
    assert "no scores in runs/tiny yet" in refused(invoke, here, "report", study)
    assert "start with `poolwise run`" in refused(invoke, here, "status", study)
    assert "nothing has run" in refused(invoke, here, "export", study, "m1", "--to", "out")


def test_no_tasks_and_one_design(here: Path, invoke: Invoke) -> None:
    """Both are legal: the design is trained, and there is nothing to compare."""
    no_tasks = ('tasks = ["./sts", "./sts-2", "./topics"]', "tasks = []")
    study = write_study(here, no_tasks, ("seeds = [0, 1]", "seeds = [0]"), ('[[designs]]\npreset = "m4"', ""))
    code, out, _ = invoke("check", study)
    assert code == 0
    assert "No tasks: the designs are trained but not scored." in out
    assert "One seed: " in out
    done = program("run", study, cwd=here)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "nothing to compare: no tasks" in done.stderr
    assert "One seed: " in done.stderr
    assert invoke("export", study, "m1", "--to", "out")[0] == 0
    assert poolwise.load(here / "out").encode(["a"]).shape == (1, 32)
    assert "has no tasks" in refused(invoke, here, "compare", study)


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_any_model(here: Path, invoke: Invoke) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    backbone = Transformer(str(here / "llama"), max_seq_length=32)
    SentenceTransformer(modules=[backbone, Pooling(32, pooling_mode="mean")]).save(str(here / "model"))
    arguments = ("evaluate", here / "model", "--tasks", "./sts", "--tasks", "./topics")
    code, out, _ = invoke(*arguments, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [tuple(row) for row in rows] == [("task", "task_type", "split", "subset", "metric", "score")] * 2
    assert [(row["task"], row["task_type"], row["split"], row["metric"]) for row in rows] == [
        ("sts", "STS", "test", "cosine_spearman"), ("topics", "Classification", "test", "accuracy"),
    ]  # fmt: skip
    code, out, _ = invoke(*arguments)
    assert f"{100 * rows[0]['score']:.2f}" in out
    err = refused(invoke, here, "evaluate", here / "model", "--tasks", "./stss")
    assert "no such folder" in err
    assert "cannot be loaded" in refused(invoke, here, "evaluate", "./nothing", "--tasks", "./sts")


# --- the program itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check",), "Missing argument"),
        (("check", "s.toml", "--jsn"), "No such option"),
        (("evaluate", "m"), "Missing option"),
        (("export", "s.toml", "m1"), "Missing option"),
        (("run", "s.toml", "--workers", "many"), "Invalid value"),
        (("cmpare", "s.toml"), "No such command"),
        (("run", "s.toml", "--workers", "-1"), "Invalid value"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], words: str, here: Path, invoke: Invoke) -> None:
    err = refused(invoke, here, *arguments)
    assert words in err
    assert "Usage: poolwise" in err


@pytest.mark.parametrize("shard", ["3/2", "0/2", "1", "a/b"])
def test_bad_shard(shard: str, here: Path, invoke: Invoke) -> None:
    err = refused(invoke, here, "run", write_study(here), "--shard", shard)
    assert f"--shard {shard!r}: give i/n with 1 <= i <= n" in err


def test_init(here: Path, invoke: Invoke) -> None:
    assert invoke("init", "paper")[1] == "wrote paper.toml; next: poolwise check paper.toml\n"
    assert "paper.toml exists; give another name with --to" in refused(invoke, here, "init", "paper")
    assert "did you mean 'factorial'?" in refused(invoke, here, "init", "factorail")
    assert "cannot be written" in refused(invoke, here, "init", "demo", "--to", "no/such/folder.toml")


def test_in_a_process_of_its_own(here: Path) -> None:
    """Code and streams as a shell sees them."""
    done = program("check", write_study(here, ("steps = 2", "stpes = 2")), cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'steps'?" in done.stderr
    done = program("--version", cwd=here)
    assert (done.returncode, done.stdout) == (0, f"poolwise {poolwise.__version__}\n")
    assert program("compare", cwd=here).returncode == 2
