"""`poolwise encode`: row n is the embedding of text n, memory does not grow with the file, nothing is half written."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import poolwise
from poolwise.cli import main
from poolwise.data.reading import read_texts
from poolwise.encoding import encode as bulk
from poolwise.encoding import fast as encoding
from poolwise.encoding.encode import encode_file, open_model
from poolwise.encoding.fast import FastEncoder
from poolwise.errors import DataError, ModelError, PoolwiseError
from poolwise.model import checkpoint
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from tiny import SENTENCES, tiny_folder

QUERY = "query: find the island. "
TEXTS = [f"{sentence[: 11 + 7 * (number % 8)]} {number}" for number, sentence in enumerate(SENTENCES * 4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trial with two steps, the last of which is exported: with poolwise's own modules, and (mean) without any."""
    root = tmp_path_factory.mktemp("models")
    base = tiny_folder(root)
    recipe = Recipe(base_model=str(base), max_length=48, dtype="float32", query_prompt=QUERY)
    for name, pooling in (("own", "cross_attention"), ("plain", "mean")):
        encoder = poolwise.build(recipe, Design(name="d", attention="causal", pooling=pooling), seed=0, device="cpu")
        for step in (2, 10):
            with torch.no_grad():
                for parameter_name, parameter in encoder.named_parameters():
                    if "lora_B" in parameter_name:
                        parameter.normal_(0, 0.1 * step, generator=torch.Generator().manual_seed(step))
            checkpoint.save(encoder, root / f"trial-{name}" / "training" / f"step-{step}", step=step)
        poolwise.export(encoder, root / name)
    return {"trial": root / "trial-own", "own": root / "own", "plain": root / "plain"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["poolwise", *map(str, words)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    return int(stopped.value.code or 0), out, err


def test_the_command_writes_what_the_encoder_says(models, texts, tmp_path, capfd, monkeypatch):
    to = tmp_path / "vectors.npy"
    code, out, err = command(capfd, monkeypatch, "encode", models["trial"], texts, "--to", to, "--query")
    assert (code, out) == (0, f"{to}\n")
    assert f"{len(TEXTS)} texts in" in err
    assert "texts/s" in err
    assert repr(QUERY) in err
    found = np.load(to, mmap_mode="r")
    step = models["trial"] / "training" / "step-10"  # 10 > 2, though "10" < "2"
    assert (found.dtype, found.shape[0]) == (np.float32, len(TEXTS))
    one_by_one = np.stack([poolwise.load(step).encode(text, prompt=QUERY) for text in TEXTS])
    assert np.abs(found - one_by_one).max() < 1e-5
    assert files(tmp_path) == {"texts.txt", "vectors.npy"}


@pytest.mark.parametrize("model", ["trial", "own", "plain"])
def test_equals_the_encoder_in_order(models, model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 7)  # several windows, the last one short
    encoder = (
        poolwise.load(models[model] / "training" / "step-10") if model == "trial" else poolwise.load(models[model])
    )
    for prompt, side in ((None, None), ("answer: ", None), (None, "query"), (None, "document")):
        said: list[str] = []
        to = encode_file(models[model], texts, tmp_path / "v.npy", prompt=prompt, side=side, say=said.append)
        expected = FastEncoder(encoder).encode(TEXTS, {None: prompt or "", "query": QUERY, "document": ""}[side])
        assert np.abs(np.load(to) - expected).max() < 1e-5
        assert "computed for each" in said[-1]
    assert (
        np.abs(
            poolwise.encode(models[model], TEXTS, side="query") - poolwise.encode(encoder, TEXTS, prompt=QUERY)
        ).max()
        < 1e-5
    )
    assert all(open_model(models[name]).ours for name in ("own", "plain"))


def test_a_file_is_never_held_whole(models, tmp_path, monkeypatch):
    """At any window, no more is read than is encoded, the window being tokenised, and one window more."""
    monkeypatch.setattr(encoding, "WINDOW", 8)
    taken, passes = [0], [0]

    def endless(path: Path, field: str, *_: Any) -> Any:
        passes[0] += 1
        taken[0] = 0
        for number in range(200):
            taken[0] += 1
            yield f"{TEXTS[number % 24]} {number}"

    monkeypatch.setattr(bulk, "read_texts", endless)
    ahead = []
    window = FastEncoder._window

    def seen(self: FastEncoder, *given: Any) -> Any:
        ahead.append(taken[0] - 8 * len(ahead))
        return window(self, *given)

    left = []
    monkeypatch.setattr(FastEncoder, "_window", seen)
    monkeypatch.setattr(FastEncoder, "_compile_if_worthwhile", lambda self, seconds: left.append(seconds))
    to = encode_file(models["own"], "any.txt", tmp_path / "v.npy")
    assert np.load(to).shape[0] == 200
    assert passes == [2]
    assert len(ahead) == 25
    assert max(ahead) <= 2 * 8
    assert len(left) == 23  # the job's length is known, so a long one can be compiled; two windows are a warm-up
    assert left[-1] == 0


@pytest.mark.parametrize(
    ("failure", "raised", "told"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (OSError(28, "No space left"), DataError, "cannot be written .No space left"),
        (None, ModelError, "text 12 is not finite"),
    ],
)
def test_what_stops_it_leaves_nothing_and_the_old_file(failure, raised, told, models, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 8)
    to = tmp_path / "vectors.npy"
    to.write_bytes(b"old")
    window, seen = FastEncoder._window, []

    def broken(self: FastEncoder, *given: Any) -> Any:
        vectors = window(self, *given)
        seen.append(files(tmp_path) - {"texts.txt", "vectors.npy"})
        if len(seen) == 2 and failure:
            raise failure
        with torch.inference_mode():
            vectors.host[vectors.order.tolist().index(3)] *= np.nan if len(seen) == 2 else 1
        return vectors

    monkeypatch.setattr(FastEncoder, "_window", broken)
    with pytest.raises(raised, match=told):
        encode_file(models["own"], texts, to)
    assert len(seen[1]) == 1  # it was being written beside the old one
    assert files(tmp_path) == {"texts.txt", "vectors.npy"}
    assert to.read_bytes() == b"old"


def test_how_the_file_was_read_is_said(models, tmp_path):
    (tmp_path / "texts.csv").write_text("id;text\n1;one\n2;two\n")
    said: list[str] = []
    encode_file(models["plain"], tmp_path / "texts.csv", tmp_path / "v.npy", say=said.append)
    assert [line.split(": ", 1)[1] for line in said[:2]] == [
        "cells are separated by semicolons",
        "column not read: 'id'",
    ]


def test_a_side_takes_the_prompt_that_sentence_transformers_takes(models):
    fast = open_model(models["plain"])
    for prompts in ({"passage": "passage: "}, {"passage": "passage: ", "document": ""}, {"query": "find: "}):
        fast.encoder.prompts = prompts
        assert (
            np.abs(poolwise.encode(fast, TEXTS[:3], side="query") - fast.encoder.encode_query(TEXTS[:3])).max() < 1e-5
        )
        own = fast.encoder.encode_document(TEXTS[:3])
        assert np.abs(poolwise.encode(fast, TEXTS[:3], side="document") - own).max() < 1e-5


def test_an_embedding_that_is_not_finite_is_told(models, monkeypatch):
    monkeypatch.setattr(FastEncoder, "encode", lambda *_, **__: np.array([[0.0], [np.inf]], np.float32))
    with pytest.raises(ModelError, match="text 2 is not finite"):
        poolwise.encode(models["own"], ["a", "b"])


def test_a_file_that_changes_meanwhile_is_told(models, texts, tmp_path, monkeypatch):
    opened = bulk.open_model

    def slow(*given: Any) -> FastEncoder:
        texts.write_text(texts.read_text() + "one more\n")
        return opened(*given)

    monkeypatch.setattr(bulk, "open_model", slow)
    with pytest.raises(DataError, match="24 texts, then 25"):
        encode_file(models["own"], texts, tmp_path / "v.npy")
    assert files(tmp_path) == {"texts.txt"}


def test_every_kind_of_file(tmp_path):
    odd = ['a "quoted", text', "two\u2028lines, says Unicode", "Ünïcode", " kept "]
    frame = pl.DataFrame({"id": range(4), "text": odd})
    frame.write_parquet(tmp_path / "t.parquet")
    frame.write_csv(tmp_path / "t.tsv", separator="\t")
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate([*odd, "a\nb"])])
    rows = [json.dumps({"text": text, "id": number}) for number, text in enumerate(odd)]
    (tmp_path / "t.jsonl").write_text("\n\n".join(rows))
    (tmp_path / "t.txt").write_bytes("\ufeff".encode() + "\r\n".join(odd).encode())
    for kind in ("parquet", "tsv", "jsonl", "txt"):
        assert [*read_texts(tmp_path / f"t.{kind}")] == odd, kind
    assert [*read_texts(tmp_path / "t.csv")] == [*odd, "a\nb"]
    assert [*read_texts(tmp_path / "t.csv", "id")] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("t.txt", b"one\n\ntwo\n", "line 2: the text is empty; each row of the vectors belongs to one text"),
        ("t.txt", b"one\n\xff\n", "line 2: not UTF-8"),
        ("t.txt", b"", "holds no text"),
        ("t.doc", b"one", r"unknown kind of file '\.doc'; allowed: \.txt"),
        ("t.jsonl", b'{"text": "a"}\n{"text": }\n', "line 2: not valid JSON"),
        ("t.jsonl", b'{"text": "a"}\n{"txet": "a"}\n', "line 2: no field 'text', it has 'txet'; did you mean 'txet'"),
        ("t.jsonl", b'{"text": 3}\n', "line 1: the text is 3 .int."),
        ("t.jsonl", b'{"text": "\\ud800"}\n', "line 1: the text contains an unpaired surrogate"),
        ("t.jsonl", b'["a"]\n', "line 1: a JSON list"),
        ("t.csv", b"id,body\n1,a\n", "t.csv: no field 'text', it has 'id', 'body'"),
        ("t.csv", b"id,text\n1,a,b\n", "line 2: 3 cells, but the header has 2"),
        ("t.csv", b'id,text\n1,"a"b\n', "line 2: badly quoted"),
        ("t.parquet", b"no", "cannot be read as Parquet"),
        ("absent.txt", None, "cannot be read"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_read(name, content, told, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bulk, "open_model", lambda *given: pytest.fail("the model is loaded before the texts are known")
    )
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        encode_file("model", tmp_path / name, tmp_path / "out.npy")
    assert "out.npy" not in files(tmp_path)


def test_other_mistakes(models, texts, tmp_path, capfd, monkeypatch):
    code, out, err = command(capfd, monkeypatch, "encode", "absent", texts, "--to", tmp_path / "v.npy")
    assert (code, out) == (2, "")
    assert "model 'absent' cannot be loaded" in err
    code, _, err = command(
        capfd, monkeypatch, "encode", models["own"], texts, "--to", tmp_path / "v.npy", "--prompt", "a", "--query"
    )
    assert code == 2
    assert "give one of them" in err
    for model, to, error in (
        (models["own"], tmp_path / "v.txt", "give a name like vectors.npy"),
        ("bm25", tmp_path / "v.npy", "it has no vectors"),
        (models["own"], texts / "below" / "v.npy", "cannot be written"),
    ):
        with pytest.raises(PoolwiseError, match=error):
            encode_file(model, texts, to)
    with pytest.raises(DataError, match="is one text"):
        poolwise.encode(models["own"], "one text")
    with pytest.raises(PoolwiseError, match="did you mean 'query'"):
        poolwise.encode(models["own"], ["one text"], side="querry")
    assert files(tmp_path) == {"texts.txt"}
