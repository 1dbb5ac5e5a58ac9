"""What README, docs and `results/` state is what the committed scores give, and nothing in `results/` is a text."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from poolwise import api, stats
from poolwise.runs import layout, looks
from poolwise.runs.check import ASSUMED_SDS
from poolwise.runs.run import trials
from poolwise.study.study import Study

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import figures  # noqa: E402
import pictures  # noqa: E402

STUDIES = sorted(ROOT.glob("results/*/study.toml"))
NAMES = [path.parent.name for path in STUDIES]
LARGE = ("smollm2-ten", "smollm2-five")


@pytest.mark.slow
@pytest.mark.parametrize(
    "study_file",
    # the 416 contrasts of these two take a minute (`pytest -m wide`)
    [pytest.param(path, marks=[pytest.mark.wide] * (path.parent.name in LARGE)) for path in STUDIES],
    ids=NAMES,
)
def test_a_published_report_is_made_from_the_published_scores_byte_for_byte(study_file, tmp_path):
    for path in api.report(study_file, out=tmp_path):
        assert path.read_bytes() == (study_file.parent / path.name).read_bytes(), (
            f"results/{study_file.parent.name}/{path.name} is not what its scores give; "
            "run `python scripts/publish_results.py` and look at the difference"
        )


@pytest.mark.parametrize("study_file", STUDIES, ids=NAMES)
def test_a_published_study_holds_ids_and_numbers_but_no_texts(study_file):
    frame = pl.read_parquet(study_file.parent / "results.parquet")
    known = {"cosine", "resampled, no per-item score"}
    for name, kind in frame.schema.items():
        if kind == pl.String:
            values = set(frame[name].drop_nulls().unique()) - known
            assert not [value for value in values if len(value) > 64 or " " in value], name
    for path in study_file.parent.rglob("*"):
        assert path.suffix in ("", ".toml", ".json", ".parquet", ".md", ".html", ".tex", ".py"), path
        assert "log" not in path.name


@pytest.mark.parametrize("study_file", STUDIES, ids=NAMES)
def test_a_published_study_is_complete(study_file):
    study, read = api.scores(study_file)
    rows = trials(study) if (study.folder / "trials.json").exists() else ()
    assert not looks.state(study, looks.finished(study, read.frame, rows)).interim
    if rows:
        assert {row["state"] for row in rows} == {"done"}
        layout.guard(study)  # raises if the study file is not the one that ran


@pytest.mark.parametrize("page", figures.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_of_a_page_are_made_from_the_scores(page):
    text = page.read_text(encoding="utf-8")
    assert figures.filled(text) == text, "run `python scripts/publish_results.py`"
    opened = re.findall(r"<!-- ([\w-]+) -->", text)
    assert set(opened) <= set(figures.BLOCKS)
    assert [f"<!-- /{name} -->" in text for name in opened] == [True] * len(opened)


@pytest.mark.parametrize("page", figures.claims())
def test_the_figures_in_the_prose_of_a_page_are_those_of_the_scores(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert [claim for claim in figures.claims()[page] if claim not in text] == []


@pytest.mark.parametrize("path", pictures.paths(), ids=lambda path: path.name)
def test_a_picture_is_made_from_the_scores(path):
    assert pictures.svg(*pictures.paths()[path]) == path.read_text(encoding="utf-8")


def test_pseudo_values_of_pairs_give_the_stored_correlation():
    """So that the table of differences speaks about the scores in the table of means."""
    stored = figures.main_scores("smollm2-h200")
    for task in ("STSBenchmark", "STS16"):
        for design in figures.DESIGNS:
            mine = stored.filter(pl.col("task") == task, pl.col("design") == design).sort("seed")["score"]
            assert figures.items(task, design).mean(axis=1) == pytest.approx(mine.to_numpy(), abs=1e-9)


def test_the_trial_to_repeat_is_one_of_the_study():
    study, one = (Study.load(figures.H200 / name) for name in ("study.toml", "one-trial.toml"))
    assert one.recipe == study.recipe
    assert one.tasks == study.tasks
    assert one.designs == study.designs[:1]
    assert one.seeds == study.seeds[:1]


def test_the_first_screen_of_the_readme_holds_picture_and_verdict():
    screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:25]
    assert any("docs/forest-light.svg" in line for line in screen)
    assert any(line.startswith("$ poolwise compare") for line in screen)
    assert screen[-1] == "```"
    assert any("`make demo`" in line and "`make test`" in line for line in screen)


def test_every_file_that_the_pages_link_to_is_there():
    for page in (ROOT / "README.md", ROOT / "docs" / "results.md", *ROOT.glob("results/*/README.md")):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"""(?:\]\(|src="|srcset=")(?!https?:|#)([^)"]+)""", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for link in re.findall(r"`((?:docs|results|studies|scripts)/[\w./-]+)`", text):
            assert (ROOT / link).exists(), f"{page.name}: {link}"


def test_the_package_carries_the_study_that_the_demo_reports(tmp_path):
    from poolwise.cli import _one_page
    from poolwise.demo import smollm2_study

    carried, published = smollm2_study().parent, figures.H200  # whose page the first test of this file makes
    names = {path.relative_to(published) for path in published.rglob("*") if path.is_file()}
    assert {path.relative_to(carried) for path in carried.rglob("*") if path.is_file()} == names
    assert [name for name in names if (carried / name).read_bytes() != (published / name).read_bytes()] == []
    page = _one_page(ROOT / "results" / "stsb-nano" / "study.toml", tmp_path / "page.html")
    assert page.read_bytes() == (ROOT / "results" / "stsb-nano" / "report.html").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_variances_that_check_plans_with_are_those_of_the_published_study():
    found = api.compare(ROOT / "results" / "smollm2-h200" / "study.toml", by="task")
    medians = []
    for group in found.groups:
        arms = {arm.design: arm.by_source for arm in found.arms if arm.group == group and arm.design in figures.DESIGNS}
        base = arms.pop("m1")
        results = [
            stats.crossed(base, arm, pool=[other for name, other in arms.items() if name != design])
            for design, arm in arms.items()
        ]
        medians.append(np.median([(one.run_sd, one.noise_sd, one.task_sd) for one in results], axis=0))
    assert len(medians) == 8
    assert tuple(np.median(medians, axis=0).round(2)) == ASSUMED_SDS
