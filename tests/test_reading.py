"""The one reader of records: delimiters, encodings, quoting and damage are handled, and reported, in one way."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from poolwise.data.reading import file_format, read_records, read_texts
from poolwise.errors import DataError, Mistakes


def needed(names: Sequence[str]) -> Sequence[str]:
    if missing := [name for name in ("a", "b") if name not in names]:
        raise ValueError(f"no column {missing[0]!r}")
    return ("a", "b")


def read(file: Path) -> tuple[list[tuple[str, dict]], Mistakes]:
    mistakes = Mistakes(file.name)
    return list(read_records(file, mistakes, needed)), mistakes


def wrong(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    _, mistakes = read(folder / name)
    with pytest.raises(DataError) as caught:
        mistakes.check()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.ndjson.gz", "jsonl"),
        ("a.v2.CSV", "csv"),
        ("a.tsv.gz", "tsv"),
        ("a.pq", "parquet"),
        ("a.json", None),
        ("gz", None),
        ("README", None),
    ],
)
def test_formats_by_name(name, kind):
    assert file_format(Path(name)) == kind


@pytest.mark.parametrize(
    ("name", "delimiter", "note"),
    [
        ("t.csv", ",", []),
        ("t.csv", ";", ["t.csv: cells are separated by semicolons"]),
        ("t.csv", "\t", ["t.csv: cells are separated by tabs"]),
        ("t.tsv", "\t", []),
        ("t.tsv", ",", ["t.tsv: cells are separated by commas"]),
        ("t.tsv.gz", ";", ["t.tsv.gz: cells are separated by semicolons"]),
    ],
)
def test_the_delimiter_is_found_and_reported(tmp_path, name, delimiter, note):
    text = '\ufeff"a"|"b"\r\n"one, two; three\tfour"|"""5"" | 6\nand 7"\r\n\r\n8|9\r\n'.replace("|", delimiter)
    text = text.replace(f'5"" {delimiter} 6', '5"" 6')
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    records, mistakes = read(tmp_path / name)
    assert records == [
        ("line 2", {"a": "one, two; three\tfour", "b": '"5" 6\nand 7'}),
        ("line 5", {"a": "8", "b": "9"}),
    ]
    assert mistakes.notes == note
    mistakes.check()


def test_a_header_that_fits_under_no_delimiter_is_reported_as_the_file_has_it(tmp_path):
    assert wrong(tmp_path, "t.csv", b"x;c;d\n1;2;3\n") == "t.csv: no column 'a'"
    assert wrong(tmp_path, "t.csv", b'"x",c\n1,2\n') == "t.csv: no column 'a'"
    assert wrong(tmp_path, "t.csv", b"") == "t.csv: the file is empty; expected a header and a row below it"
    (tmp_path / "t.csv").write_text("id;body\n1;x\n")
    assert "no field 'text', it has 'id', 'body'; name it" in str(missing(tmp_path / "t.csv"))


def test_columns_that_are_not_read_are_named_once(tmp_path):
    rows = ['{"a": 1, "b": 2, "prompt": "x"}', '{"b": 3, "a": [4], "type": 0, "prompt": "x"}'] * 3
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    records, mistakes = read(tmp_path / "t.jsonl")
    assert records[1] == ("line 2", {"a": [4], "b": 3})
    assert mistakes.notes == ["t.jsonl: columns not read: 'prompt' and 'type'"]
    (tmp_path / "t.csv").write_text("a,,b,id\n1,2,3,4\n")
    assert read(tmp_path / "t.csv")[1].notes == ["t.csv: column not read: 'id'"]
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "c": [2], "b": [None]}), tmp_path / "t.parquet")
    records, mistakes = read(tmp_path / "t.parquet")
    assert records == [("row 1", {"a": 1, "b": None})]
    assert mistakes.notes == ["t.parquet: column not read: 'c'"]


@pytest.mark.parametrize(
    ("text", "encoding", "looks"),
    [
        ("a,b\nx,y\nsüß,Straße\n", "latin-1", "line 3: .* looks like Windows-1252 .* -f WINDOWS-1252 -t UTF"),
        ("a,b\nsoft “quotes”,x\n", "cp1252", "line 2: not UTF-8 text; it looks like Windows-1252"),
        ("a,b\nx,y\n", "utf-16", "line 1: not UTF-8 text; it looks like UTF-16"),
        ("a,b\nx,y\n", "utf-16-le", "line 1: not UTF-8 text; it looks like UTF-16"),
        ("a,b\nx,日本語のテキスト\n", "shift-jis", "line 2: .* an older encoding of another script"),
        ("a,b\nx,русский текст\n", "cp1251", "line 2: not UTF-8 text; it looks like an older encoding"),
    ],
)  # fmt: skip
def test_an_encoding_other_than_utf8_is_named_with_the_line(tmp_path, text, encoding, looks):
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    records, mistakes = read(tmp_path / "t.csv")
    with pytest.raises(DataError, match=looks):
        mistakes.check()
    assert len(records) < 2


def test_what_cannot_be_read_further_gives_the_last_line_that_could(tmp_path):
    content = gzip.compress(b"a,b\n" + b"".join(b"%d,x\n" % i for i in range(30000)), mtime=0)
    (tmp_path / "t.csv.gz").write_bytes(content[: len(content) // 2])
    records, mistakes = read(tmp_path / "t.csv.gz")
    assert len(records) > 1000
    last = len(records) + 1  # and the header
    with pytest.raises(DataError, match=rf"t\.csv\.gz: cannot be read after line {last}: Compressed file ended before"):
        mistakes.check()
    assert wrong(tmp_path, "t.jsonl.gz", b"{}").startswith("t.jsonl.gz: cannot be read: Not a gzipped file")
    assert "cannot be read: No such file or directory" in str(missing(tmp_path / "absent.csv"))


def missing(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_texts(path))
    return caught.value


def test_a_quotation_mark_that_swallows_rows_is_a_mistake(tmp_path):
    """Files without quoting: a cell that begins with a mark would run on to the next mark at the end of a cell."""
    told = wrong(tmp_path, "t.tsv", b'a\tb\n1\t"so it begins\n2\tand ends"\n3\tx\n')
    assert "t.tsv: 1 mistake\n  - line 2: a quoted cell runs over several lines and holds tabs" in told
    assert "write the mark twice" in told
    assert "line 2: badly quoted" in wrong(tmp_path, "t.tsv", b'a\tb\n1\t"so" she said\n')
    assert "line 3: badly quoted" in wrong(tmp_path, "t.csv", b'a,b\n1,2\n3,"open\n\n')


def test_places_and_notes_of_a_file_within_a_folder_start_with_its_name():
    mistakes = Mistakes("folder")
    part = mistakes.within("qrels/test.tsv")
    for line in (3, 8):
        part.add(f"line {line}", "expected a number", "x")
    part.add("", "holds no row")
    part.note("2 cells")
    assert mistakes.notes == ["qrels/test.tsv: 2 cells"]
    with pytest.raises(DataError) as caught:
        mistakes.check()
    assert str(caught.value).splitlines() == [
        "folder: 3 mistakes",
        "  - qrels/test.tsv, lines 3 and 8: expected a number, got 'x'",
        "  - qrels/test.tsv: holds no row",
    ]


def test_texts_come_with_notes_or_all_their_mistakes(tmp_path):
    (tmp_path / "t.csv").write_text("id;text\n1;one\n2;\n3;three\n4; \n")
    with pytest.raises(DataError, match=r"2 mistakes\n  - lines 3 and 5: the text is empty; each row of the vectors"):
        list(read_texts(tmp_path / "t.csv"))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"id;text\n1;one\n", mtime=0))
    said: list[str] = []
    assert list(read_texts(tmp_path / "t.csv.gz", note=said.append)) == ["one"]
    path = tmp_path / "t.csv.gz"
    assert said == [f"{path}: cells are separated by semicolons", f"{path}: column not read: 'id'"]
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress("ä\nb".encode(), mtime=0))
    assert list(read_texts(tmp_path / "t.txt.gz")) == ["ä", "b"]
