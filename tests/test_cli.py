"""The command line: what each command prints and writes, and how mistakes are told: one message, code 2, no loss."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest

import poolwise
from cli_study import Invoke, pair, program, refused, snapshot, write_data, write_rows, write_study

pytest_plugins = ("cli_study",)

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
    assert "runs/tiny/study.json is damaged (Is a directory); restore it, or delete it" in err


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
        "wins", "ties", "losses", "min_reachable_p", "tasks", "tipping_run_sd",
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


@pytest.mark.parametrize("shard", ["3/2", "0/2", "1", "a/b", "²/3"])
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--task", "t", "--all-pairs"), "neither --by, --all-pairs"),
        (("--task", "t", "--leaderboard"), "neither --by, --all-pairs"),
        (("--task", "t", "--by", "all"), "neither --by, --all-pairs"),
        (("--task", ""), "--task is empty"),
        (("--baseline", " "), "--baseline is empty"),
    ],
)
def test_compare_ignores_no_option(options: tuple[str, ...], words: str, here: Path, invoke: Invoke) -> None:
    assert words in refused(invoke, here, "compare", "scores.csv", *options)
