"""What others hand over runs no code, fills no memory, ends in no traceback and shows nothing false."""

# ruff: noqa: E501
from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow
import pyarrow.parquet
import pytest

from poolwise import api, cli
from poolwise.data import reading
from poolwise.data.own_tasks import read_folder
from poolwise.errors import CheckpointError, DataError, PoolwiseError, StudyError, name_problem, printable, redact
from poolwise.files import parse_json, parse_toml, write_json
from poolwise.model import checkpoint
from poolwise.runs import layout
from poolwise.runs.worker import output_to
from poolwise.study.study import Study
from poolwise.verdicts import readers, trec
from poolwise.verdicts.table import csv_safe
from test_looks import scored

RAW: dict[str, Any] = {"name": "s", "seeds": 3, "tasks": ["demo"], "designs": [{"preset": "m1"}, {"preset": "m2"}]}
HEADER = "design,seed,task,task_type,metric,score"
TOKEN = "hf_" + "AbCd1234" * 4


def main(monkeypatch: pytest.MonkeyPatch, capsys: Any, *args: object) -> tuple[int, str]:
    """Exit code and stderr of the program."""
    monkeypatch.setattr(sys, "argv", ["poolwise", *map(str, args)])
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    return code, capsys.readouterr().err


# ---------------------------------------------------------------- code

EVIL = """
from pathlib import Path

Path("ran").touch()
import poolwise


class Evil(poolwise.Pooling):
    reads = "tokens"

    def __init__(self, hidden_size, n_layers, width=1):
        super().__init__()

    def forward(self, states, mask=None):
        return states.float().mean(1)
"""


def foreign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, Path]:
    """A run folder whose study allows code, and names some that lies in the working directory."""
    monkeypatch.chdir(folder)
    (folder / "evil_module.py").write_text(EVIL)
    designs = [{"preset": "m1"}, {"name": "m2", "attention": "causal", "pooling": "evil_module:Evil"}]
    study = Study.parse({**RAW, "output": str(folder / "out")})
    study.folder.mkdir()
    stranger = {**study.model_dump(mode="json"), "allow_code": True, "designs": designs}
    write_json(study.folder / layout.STUDY, stranger)
    return study, folder / "ran"


def test_a_run_folder_has_no_say_in_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, ran = foreign(tmp_path, monkeypatch)
    with pytest.raises(StudyError, match="design 'm2' has changed"):
        layout.guard(study)
    assert not layout.open_folder(study.folder).allow_code
    with pytest.raises(CheckpointError):
        api.layers(study.folder)
    assert not ran.exists()


def test_reading_verbs_import_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`status`, `compare` and `report`, even if the study file allows code; a grid of it is taken from the folder."""
    foreign(tmp_path, monkeypatch)
    text = 'name = "s"\nseeds = 3\ntasks = ["demo"]\noutput = "out"\nallow_code = true\nrecipe = { steps = 10 }\n'
    listed = (
        '[[designs]]\npreset = "m1"\n[[designs]]\nname = "m2"\nattention = "causal"\npooling = "evil_module:Evil"\n'
    )
    (tmp_path / "s.toml").write_text(text + listed)
    started = tmp_path / "out" / layout.STUDY
    write_json(started, {**parse_json(started.read_text()), "recipe": {"steps": 10}})
    scored(layout.open_study(tmp_path / "s.toml"), 3)
    grid = '[[designs]]\npreset = "m1"\n[grid]\npooling = ["evil_module:Evil"]\nattention = ["causal"]\nwidth = [3]\n'
    (tmp_path / "grid.toml").write_text(text + grid)
    assert [design.name for design in layout.open_study(tmp_path / "grid.toml").designs] == ["m1", "m2"]
    for name in ("s.toml", "grid.toml"):
        for verb in ("status", "compare", "report"):
            code, err = main(monkeypatch, capsys, verb, name)
            assert code == 0, err
    assert not (tmp_path / "ran").exists()
    code, err = main(monkeypatch, capsys, "check", "s.toml")
    assert (tmp_path / "ran").exists(), "this verb needs the code, and the study file allows it"


@pytest.mark.parametrize("kind", ["os.path.Evil", "evil_module.Evil", "poolwisely.X"])
def test_a_model_folder_names_no_foreign_classes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_module.py").write_text(EVIL)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    for name in ("config_sentence_transformers.json", "config.json"):
        (folder / name).write_text("{}")
    for read in (checkpoint.load, checkpoint.load_any, lambda path: checkpoint.load_named(str(path))):
        with pytest.raises(CheckpointError, match=f"the class '{kind}' is code of another package"):
            read(folder)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- memory

LARGE = [
    ({"seeds": 200_000_000}, "seeds = 200000000: at most 1,000 seeds"),
    ({"extend_to": 10**12}, "extend_to = 1000000000000: input should be less than or equal to 1000"),
    (
        {"grid": {"pooling": ["mean"], "attention": ["causal"], **{n: list(range(199)) for n in ("latents", "heads", "width", "ffn")}}},
        "grid",
    ),
    ({"recipe": {"steps": 10**8, "batch_size": 64}}, "6,400,000,000 rows, which are planned in memory; at most"),
    ({"recipe": {"max_length": 10**12}}, "recipe.max_length = 1000000000000"),
    ({"seeds": 1000, "base_models": [f"b{i}" for i in range(30)]}, "60,000 trainings; at most 20,000"),
    ({"designs": [{"name": "m1", "attention": "causal", "pooling": "cross_attention", "pooling_args": {"latents": 10**9}}]}, "pooling_args.latents is larger than 65,536"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), LARGE, ids=lambda value: str(value)[:30])
def test_studies_too_large_are_refused_by_their_numbers(change: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError) as refused:
        Study.parse({**RAW, **change})
    assert words in str(refused.value)


def test_a_grid_is_counted_before_it_is_spelled_out() -> None:
    axes = {"pooling": ["cross_attention"], "attention": ["causal"], "latents": list(range(1, 200))}
    axes |= {"heads": list(range(1, 200)), "head_dim": list(range(1, 200))}
    with pytest.raises(StudyError, match=r"grid: 7,880,599 combinations; at most 1,000"):
        Study.parse({**RAW, "grid": axes})


def test_a_line_that_unpacks_to_hundreds_of_megabytes_is_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES", 1 << 20)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"a\n" + b"b" * (64 << 20), 1))
    with pytest.raises(DataError, match=r"line 2: longer than 1,048,576 bytes"):
        list(reading.read_texts(tmp_path / "t.txt.gz"))


@pytest.mark.parametrize("repeated", ["texts", "numbers"])
def test_a_small_parquet_file_that_holds_a_gigabyte_is_not_decoded(
    repeated: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(reading, "ALWAYS_ALLOWED", 1 << 20)
    path = tmp_path / "scores.parquet"
    values = pyarrow.DictionaryArray.from_arrays([0] * 5000, ["x" * 10_000])
    column = values if repeated == "texts" else pyarrow.array([7] * 2_000_000)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"bytes hold more than [\d,]+ bytes or [\d,]+ rows; split it"):
        readers.read(path)
    with pytest.raises(DataError, match="split it"):
        list(reading.read_texts(path))


# ---------------------------------------------------------------- tracebacks

NESTED = "[" * 5000
TOML = ["a = " + NESTED, "a = " + "1" * 5000, "a = 0x" + "f" * 5000, "a." * 3000 + "b = 1", "[" + "a." * 3000 + "b]"]


@pytest.mark.parametrize("text", [*TOML, 'designs = 5\n[grid]\npooling = ["mean"]\nattention = ["causal"]'])
def test_study_files_of_any_shape_end_in_a_message(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "s.toml").write_text(text)
    code, err = main(monkeypatch, capsys, "check", tmp_path / "s.toml")
    assert (code, "s.toml" in err, "Traceback" in err) == (2, True, False)


@pytest.mark.parametrize("text", TOML)
def test_task_settings_of_any_shape_end_in_a_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_text(text)
    with pytest.raises(PoolwiseError, match=r"task\.toml: not valid TOML"):
        read_folder(tmp_path)


LINES = ["9" * 5000, NESTED, '{"a":' * 5000, '{"sentence1": "a", "sentence2": "b", "score": ' + "9" * 5000 + "}"]
LINES += ['{"\\ud800": 1}', '{"sentence1": "\\ud800", "sentence2": "b", "score": 1}', "{}", "null"]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_lines_of_any_shape_are_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(line + "\n")
    with pytest.raises(PoolwiseError, match=r"test\.jsonl"):
        read_folder(tmp_path)


def test_texts_of_a_parquet_file_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "t.parquet")
    for read in (lambda path: list(reading.read_texts(path)), readers.read):
        with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet: .*UTF8"):
            read(tmp_path / "t.parquet")


def test_flipped_parquet_ends_in_a_message(tmp_path: Path) -> None:
    """polars used to end the process with a panic on some of these."""
    rows = {name: ["a", "b"] for name in HEADER.split(",")[:-1]} | {"score": [0.1, 0.2], "seed": [0, 1]}
    path = tmp_path / "s.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 23):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            readers.read(path)
        except DataError:
            continue


@pytest.mark.parametrize("metric", ["ndcg_at_99999999999999999999", "ndcg_at_10000", "ndcg_at_0", "\x1b[2J"])
def test_absurd_metrics_are_refused(metric: str, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("q1 0 d1 1\n")
    (tmp_path / "a.run").write_text("q1 Q0 d1 1 0.9 x\n")
    with pytest.raises(DataError, match="is unknown"):
        trec.read_trec([tmp_path / "a.run"], tmp_path / "q.txt", metric)


@pytest.mark.parametrize("name", ["back\\slash", "\\1\\g<0>", "per cent %s", "a & b < c"])
def test_a_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    """A backslash in a design's name ended `report` with "bad escape"."""
    rows = [
        f"{design},{seed},t{task},STS,ap,0.{task + seed + 1}"
        for design in ("m1", name)
        for seed in (0, 1)
        for task in range(3)
    ]
    (tmp_path / "s.csv").write_text("\n".join([HEADER, *rows]))
    paths = api.report(tmp_path / "s.csv", out=tmp_path / "out")
    assert all(path.exists() for path in paths)


def test_parsers_stay_within_bounds() -> None:
    for text in ("NaN", "1e999", "9" * 41, "[" * 61 + "]" * 61, b"\xff"):
        with pytest.raises(ValueError, match=r"\w"):
            parse_json(text)
    assert parse_json("[" * 60 + "9" * 40 + "]" * 60)
    assert parse_toml(b'a = "' + b"." * 500 + b'"\n# ' + b"." * 500) == {"a": "." * 500}


# ---------------------------------------------------------------- what is shown


def test_hidden_characters_are_escaped() -> None:
    assert printable("a\x1b[31mb\u202ec\x00\ud800é中\n") == "a\\x1b[31mb\\u202ec\\x00\\ud800é中\\n"
    assert printable("a\nb", keep="\n") == "a\nb"
    assert name_problem("mañana 中") == ""
    assert name_problem("a\u2066b") == "contains the hidden character \\u2066; remove it"


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\u202eb", "a\rb", "a\u2028b"])
def test_names_with_hidden_characters_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="contains the hidden character"):
        Study.parse({**RAW, "designs": [{"preset": "m1", "name": name}], "baseline": name})
    rows = [{"design": name, "seed": 0, "task": "t", "task_type": "STS", "metric": "ap", "score": 0.5}]
    pl.DataFrame(rows).write_parquet(tmp_path / "s.parquet")
    with pytest.raises(DataError, match="design contains a hidden character"):
        readers.read(tmp_path / "s.parquet")
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "task.toml").write_text(f"name = {json.dumps(name)}\n")
    (folder / "test.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,2\n")
    with pytest.raises(PoolwiseError, match="name contains the hidden character"):
        read_folder(folder)


def test_messages_show_escapes_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cret-s3cret")
    code, err = main(monkeypatch, capsys, "check", tmp_path / f"a\x1b[31m{TOKEN}s3cret-s3cret.toml")
    assert code == 2
    assert "\x1b" not in err
    assert "a\\x1b[31m[secret][secret].toml" in err


def test_formulas_are_no_formulas_in_the_tables_we_write() -> None:
    frame = pl.DataFrame({"design": ["=1+1", "@x", "m1", "-2"], "score": [0.5, -0.5, 1.0, 0.0]})
    assert csv_safe(frame).write_csv().splitlines()[1:] == ["'=1+1,0.5", "'@x,-0.5", "m1,1.0", "'-2,0.0"]


def test_a_token_is_refused_in_a_study_and_redacted_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match="HF_TOKEN in the environment"):
        Study.parse({**RAW, "recipe": {"base_model": f"https://user:{TOKEN}@host/x"}})
    monkeypatch.setenv("WANDB_API_KEY", "w" * 40)
    with output_to(tmp_path / "log.txt"):
        subprocess.run([sys.executable, "-c", f"print('GET ?token={TOKEN}&key=' + 'w' * 40)"], check=True)
    assert (tmp_path / "log.txt").read_text() == "GET ?token=[secret]&key=[secret]\n"
    assert redact("hf_models are fine") == "hf_models are fine"
