"""Official tasks of one origin are one source, also in a bare table; unknown names stay alone; a column overrides."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from poolwise.data.own_tasks import read_folder
from poolwise.study.catalogue import ORIGINS, origin
from poolwise.verdicts.comparison import compare
from poolwise.verdicts.table import table
from test_comparison import rows


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("STS12", "semeval-sts"),
        ("STS17", "semeval-sts"),
        ("STSBenchmark", "semeval-sts"),
        ("STSBenchmarkMultilingualSTS", "semeval-sts"),
        ("STS22.v2", "sts22-news"),
        ("SICK-R", "sick"),
        ("ArxivClusteringP2P", "arxiv"),
        ("ArXivHierarchicalClusteringS2S", "arxiv"),
        ("BiorxivClusteringS2S.v2", "biorxiv"),
        ("MedrxivClusteringP2P", "medrxiv"),
        ("RedditClustering", "reddit"),
        ("StackExchangeClusteringP2P", "stackexchange"),
        ("CQADupstackGamingRetrieval", "stackexchange"),
        ("AmazonPolarityClassification", "amazon-reviews"),
        ("TwentyNewsgroupsClustering", "twentynewsgroups"),
        ("Touche2020Retrieval.v3", "touche"),
        ("NQHardNegatives", "wikipedia"),
        ("STS120", None),
        ("NQueens", None),
        ("my-STS12", None),
        ("SciFact", None),
    ],
)
def test_names(task, expected):
    assert origin(task) == expected


def test_every_name_in_the_table_is_a_task_of_mteb():
    """Each pattern begins some official name, so that none is a slip of the pen."""
    import re

    mteb = pytest.importorskip("mteb")
    names = {task.metadata.name for task in mteb.get_tasks()}
    for pattern, _ in ORIGINS:
        for part in pattern.split("|"):
            assert any(re.match(part, name) for name in names), part


NAMES = ["STS12", "STS13", "STSBenchmark", "SICK-R", "BIOSSES", "faq", "wiki", "news"]


def scores(source: list[str] | None = None) -> pl.DataFrame:
    values = [0.5 + 0.01 * i for i in range(len(NAMES))]
    other = [v + 0.01 * (i + 1) for i, v in enumerate(values)]
    found = rows({name: [x, [v + 0.001 for v in x]] for name, x in (("m1", values), ("m2", other))}, "STS")
    renamed = [{**row, "task": NAMES[int(row["task"][3:])]} for row in found]
    if source:
        renamed = [{**row, "source": source[NAMES.index(row["task"])]} for row in renamed]
    return table(renamed)


def test_a_bare_table_is_grouped_and_says_so():
    found = compare(scores(), "m1")
    assert found.arm("STS", "m1").by_source.shape[1] == 6
    (said,) = [note for note in found.notes if "one source" in note]
    assert "STS12, STS13, STSBenchmark (semeval-sts)" in said
    assert "SICK-R" not in said
    assert found.rows[0].verdict.difference == pytest.approx((0.02 + 0.04 + 0.05 + 0.06 + 0.07 + 0.08) / 6)


def test_a_source_column_is_left_as_it_is():
    found = compare(scores(source=NAMES), "m1")
    assert found.arm("STS", "m1").by_source.shape[1] == 8
    assert not [note for note in found.notes if "one source" in note]


def sts_folder(path: Path, settings: str = "") -> Path:
    path.mkdir()
    lines = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i} for i in range(3)]
    (path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (path / "task.toml").write_text(settings)
    return path


def test_an_own_folder_with_the_name_of_a_known_task_takes_its_origin_with_a_note(tmp_path):
    folder = read_folder(sts_folder(tmp_path / "STS12"))
    assert folder.source == "semeval-sts"
    assert any("its source is 'semeval-sts'" in note and "task.toml" in note for note in folder.notes)


def test_the_source_of_an_own_folder_can_be_declared(tmp_path):
    folder = read_folder(sts_folder(tmp_path / "STS12", 'source = "ours"\n'))
    assert folder.source == "ours"
    assert not [note for note in folder.notes if "source" in note]


def test_an_own_folder_of_an_unknown_name_is_its_own_source(tmp_path):
    assert read_folder(sts_folder(tmp_path / "faq")).source == "faq"
