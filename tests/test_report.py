"""Reports: complete without a study, self-contained, escaped, repeatable; and the truth in the first line."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from poolwise.reports import pages, plots, tables
from poolwise.reports.words import magnitude, summary
from poolwise.screen import show_findings
from poolwise.verdicts.comparison import compare as compare_scores
from poolwise.verdicts.findings import Findings
from poolwise.verdicts.table import table
from test_comparison import found as compare
from test_comparison import rows, study

INFO = {
    "name": "my study",
    "base_model": "nano",
    "recipe": {"steps": 1000, "lora": {"rank": 16}},
    "versions": {"poolwise": "0.1.0"},
    "command": "poolwise run my-study.toml",
}
COSTS = (
    {"design": "m1", "pooling": "last_token", "base_parameters": 2_560_000, "trainable_parameters": 10_000,
     "encode_flops": 1e9, "relative_cost": 1.0},
    {"design": "m2", "pooling": "mean", "base_parameters": 2_560_000, "trainable_parameters": 20_000,
     "encode_flops": 1.12e9, "relative_cost": 1.12},
)  # fmt: skip
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, texts of cells and ids; fails on a tag that is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def full():
    frame = study({"m1": 0, "m2": 0.02})
    aa = study({"m1-aa": 0}, seed=3).with_columns(pl.lit("aa").alias("role"))
    return pl.concat([frame.with_columns(pl.lit("design").alias("role")), aa], how="diagonal_relaxed")


def written(folder, frame, info=None, costs=(), controls=(), **options) -> tuple[str, str, str]:
    findings = Findings.of(compare_scores(frame, controls=controls, **options), costs=costs)
    paths = pages.render(info or {}, frame, findings, folder)
    assert [path.name for path in paths] == ["report.md", "report.html", "report.tex"]
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md", "report.tex"]
    markdown, html, tex = (path.read_text(encoding="utf-8") for path in paths)
    return markdown, html, tex


def test_a_full_report_has_every_part_in_order(tmp_path, full):
    markdown, html, tex = written(tmp_path, full, INFO, COSTS, ["m1-aa"], baseline="m1")
    first = "Base model nano, 2.56 M parameters; 2 designs, 3 seeds, 17 tasks (1 reranking, 10 retrieval and 6 STS)"
    text = " ".join(Page(html).text)
    places = [
        text.index(words)
        for words in (
            first, "Above m1: m2 on", "On retrieval, m2 scores", "Every claim is limited to", "Mean scores",
            "Differences between designs",
            "Task by task", "Run by run", "Differences between checkpoints", "Cost", "A/A arm", "Recipe", "lora.rank",
            "poolwise run my-study.toml",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert markdown.splitlines()[2].startswith(first)
    assert "| m2 |" in markdown
    assert "It costs 12 % more to encode, in FLOPs." in markdown
    assert r"\begin{tabular}" in tex
    assert "95 \\% interval" in tex
    assert "crossed random effects" in tex


def test_the_html_is_self_contained_and_described(tmp_path, full):
    _, html, _ = written(tmp_path, full, INFO, COSTS, ["m1-aa"])
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "img", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        assert attributes.get("href", "#").startswith(("#", "data:"))
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    images = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(images) == 12  # four plots for each of three task types
    assert all(image["role"] == "img" and "m2" in image["aria-label"] for image in images)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "use"} <= set(ids)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert not re.search(r"#0\d0\d0\d", html)  # no stand-in colour is left


def test_each_design_has_a_cell_of_its_own_and_each_plot_its_table(tmp_path, full):
    _, html, _ = written(tmp_path, full, INFO, COSTS, ["m1-aa"])
    assert html.count("<td>m1</td>") >= 3
    assert "<td>m2</td>" in html
    page = Page(html)
    row = compare(full, "m1", controls=["m1-aa"]).row("STS", "m2")
    assert f"{100 * row.verdict.difference:+.2f}" in page.cells
    assert html.count("<details>") >= 5


def test_a_bare_csv_gives_a_report_too(tmp_path):
    frame = table(rows({"m1": [[0.5] * 6], "m2": [[0.51, 0.52, 0.53, 0.54, 0.55, 0.49]]}))
    markdown, html, _ = written(tmp_path, frame)
    text = " ".join(Page(html).text)
    assert "Base model not stated; 2 designs, 1 seed, 6 tasks" in text
    assert "One run only." in text
    assert "> **One run only." in markdown
    assert "no verdict on designs is possible" in text
    assert "<h2>Cost</h2>" not in html
    assert "± is the sd" not in markdown  # one run has no spread
    assert "Checkpoints only: m2 is not shown to differ from m1 on retrieval: the only contrast is inc" in text
    assert ".094" in Page(html).cells  # p = 6/64, as in test_comparison


def test_names_are_shown_as_text_everywhere(tmp_path):
    evil = "<script>alert(1)</script>"
    frame = study({"m1": 0, evil: 0.02, "a|b_c$x$&": 0.0}, types={"STS": 3, evil: 3})
    markdown, html, tex = written(
        tmp_path, frame, {"name": evil, "recipe": {evil: evil}, "command": evil}, baseline="m1"
    )
    assert "<script" not in html
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in html
    assert "a|b_c$x$&" in Page(html).cells
    assert "<script" not in markdown.replace(f"    {evil}", "")  # the command is a code block
    assert r"a\|b\_c$x$&amp;" in markdown
    assert r"a|b\_c\$x\$\&" in tex


def test_two_reports_of_one_comparison_are_equal_and_replace_each_other(tmp_path, full):
    assert written(tmp_path, full, INFO, COSTS) == written(tmp_path, full, INFO, COSTS)


def test_the_stars_of_the_paper_cannot_be_supported_from_means_of_one_run(tmp_path):
    paper = {
        "STS": (0.8302, {"m2": 0.0129, "m3": 0.0118, "m4": 0.0095, "m5": 0.0166}),
        "Classification": (0.7244, {"m2": -0.0035, "m3": -0.0033, "m4": -0.0483, "m5": -0.0143}),
        "Retrieval": (0.5394, {"m2": 0.0102, "m3": 0.0135, "m4": 0.0213, "m5": 0.0226}),
        "Clustering": (0.4503, {"m2": -0.0076, "m3": -0.0017, "m4": -0.0493, "m5": -0.0246}),
    }
    lines = ["design,seed,task,task_type,metric,score"]
    for kind, (base, deltas) in paper.items():
        for design, delta in {"m1": 0.0, **deltas}.items():
            lines.append(f"{design},0,mean of {kind},{kind},mean,{base + delta:.4f}")
    from poolwise.verdicts import readers

    (tmp_path / "paper.csv").write_text("\n".join(lines))
    markdown, _, _ = written(tmp_path / "out", readers.read(tmp_path / "paper.csv").frame, baseline="m1")
    assert "One run only." in markdown
    assert markdown.count("leaves nothing to test over tasks") >= 4
    assert "On STS, there is one task, mean of STS: m5 scores 1.66 points above m1 (1 seed)." in markdown
    assert "Nothing can be tested on classification, clustering, retrieval and STS." in markdown
    assert not re.search(r"significan|scores above m1\.", markdown)


def test_the_terminal_shows_the_same_numbers(full, capsys):
    comparison = compare(full, "m1", controls=["m1-aa"])
    show_findings(comparison)
    text = capsys.readouterr().out
    means = tables.means(comparison)
    for row in [*means.rows, *tables.checkpoints(comparison).rows, *tables.verdicts(comparison).rows]:
        assert all(cell in text for cell in row)
    assert "STS · 6 tasks, smallest reachable p .031" in text
    show_findings(compare(study({"[red]m1": 0, "m2": 0.01}, seeds=1), "[red]m1"))
    one = capsys.readouterr().out
    assert "One run only." in one
    assert "[red]m1" in one


def test_controls_that_speak_against_the_study_are_heard(tmp_path):
    parts = {"aa": study({"m1-aa": 0.02}, seed=5), "broken": study({"broken": 0.0}, seed=6)}
    arms = [frame.with_columns(pl.lit(role).alias("role")) for role, frame in parts.items()]
    frame = pl.concat([study({"m1": 0, "m2": 0.02}), *arms], how="diagonal_relaxed")
    _, html, _ = written(tmp_path, frame, controls=["m1-aa", "broken"], baseline="m1")
    text = " ".join(Page(html).text)
    assert "The A/A arm m1-aa differs from m1 on retrieval" in text
    assert "treat every claim here as exploratory" in text
    assert "The broken arm broken is not shown to score below m1 anywhere" in text


def test_controls_that_behave_raise_no_alarm(tmp_path, full):
    broken = study({"broken": -0.05}, seed=6).with_columns(pl.lit("broken").alias("role"))
    frame = pl.concat([full, broken], how="diagonal_relaxed")
    markdown, _, _ = written(tmp_path, frame, controls=["m1-aa", "broken"], baseline="m1")
    assert "A/A arm: the baseline again" in markdown
    assert "exploratory" not in markdown
    assert "would not detect" not in markdown


def test_costs_are_shown_with_a_prefix():
    assert tables.costs(COSTS).rows == [
        ("m1", "last_token", "10 k", "1 G", "1.000"),
        ("m2", "mean", "20 k", "1.12 G", "1.120"),
    ]
    assert tables.costs(()) is None
    assert magnitude(2_560_000) == "2.56 M"


def test_a_million_item_scores_do_not_slow_the_report(tmp_path):
    designs, seeds, items = 16, 5, 223
    types = {
        "STS": 10,
        "Classification": 12,
        "Retrieval": 15,
        "Clustering": 11,
        "Pairs": 3,
        "Reranking": 4,
        "Summary": 1,
    }
    frame = study({f"d{i}": 0.002 * i for i in range(designs)}, seeds, types=types)
    repeated = frame[np.repeat(np.arange(frame.height), items)]
    ids = pl.Series("item_id", np.tile(np.arange(items), frame.height)).cast(pl.String)
    big = pl.concat([frame, repeated.with_columns(ids)])
    assert big.height > 1_000_000
    start = time.process_time()
    written(tmp_path, big, baseline="d0")
    assert time.process_time() - start < 20


def test_scores_while_training(tmp_path):
    """The means after a part of the training, by hand: (.50 + .60) / 2 and (.70 + .80) / 2."""
    scores = {("m1", 50): (0.5, 0.6), ("m1", 100): (0.7, 0.8), ("m2", 50): (0.6, 0.6), ("m2", 100): (0.6, 0.7)}
    frame = table(
        {"design": d, "seed": 0, "step": s, "task": t, "task_type": "STS", "metric": "cosine_spearman", "score": x}
        for (d, s), pair in scores.items()
        for t, x in zip(("a", "b"), pair, strict=True)
    )
    comparison = compare(frame, "m1")
    found = tables.over_steps(frame, comparison)
    assert found.columns == ("Design", "50", "100")
    assert found.sections == (("STS", (("m1", "55.00", "75.00"), ("m2", "60.00", "65.00"))),)
    assert tables.over_steps(frame.filter(pl.col("step") == 100), comparison) is None
    paths = pages.render(INFO, frame, comparison, tmp_path)
    assert "Scores during training" in next(p for p in paths if p.suffix == ".html").read_text()


def test_the_report_opens_with_the_answer_over_all_groups(tmp_path, full):
    markdown, html, _ = written(tmp_path, full, INFO, COSTS, ["m1-aa"], baseline="m1")
    answer = "Above m1: m2 on retrieval and STS. Nothing can be tested on reranking."
    text = " ".join(Page(html).text)
    assert text.index("Base model nano") < text.index(answer) < text.index("Mean scores")
    assert markdown.index(answer) < markdown.index("- **Retrieval.**")
    nothing = compare(study({"m1": 0, "m2": 0, "m3": 0}, run_sd=0.01), "m1", margin=1e-6)
    assert summary(nothing).startswith(
        "No design is shown to differ from m1 on any of 2 task types that can be tested: all 4 contrasts are "
        "inconclusive."
    )
    one = compare(full.filter(pl.col("task_type") == "STS"), "m1", controls=["m1-aa"])
    assert summary(one) == "Above m1: m2 on STS."
    unfinished = compare(full, "m1", controls=["m1-aa"], interim="Runs are missing.")
    assert summary(unfinished) == ""


def test_of_many_designs_the_answer_counts(tmp_path):
    many = {"m1": 0.0, **{f"m{i}": 0.02 + 0.005 * i for i in range(2, 13)}, "m13": -0.05}
    found = compare(study(many), "m1")
    answer = "Above m1: 11 of 12 designs on retrieval; 11 of 12 designs on STS. Below m1: m13 on retrieval and STS."
    assert answer in summary(found)


def test_an_exploratory_study_says_why_once(tmp_path):
    aa = study({"m1-aa": 0.02}, seed=5).with_columns(pl.lit("aa").alias("role"))
    frame = pl.concat([study({"m1": 0, "m2": 0.02}), aa], how="diagonal_relaxed")
    markdown, html, _ = written(tmp_path, frame, controls=["m1-aa"], baseline="m1")
    for text in (markdown, " ".join(Page(html).text)):
        assert text.count("The A/A arm m1-aa differs from m1") == 1
        assert "the A/A arm, m1 under other seeds" not in text
        assert text.count("carry no recommendation") == 1
    declared = compare(frame, "m1", controls=["m1-aa"], exploratory="Exploratory: three designs were added.")
    assert pages.warnings(declared) == ["Exploratory: three designs were added."]


def test_many_groups_stand_in_rows_and_their_pictures_are_folded(tmp_path):
    few, wide = study({"m1": 0, "m2": 0.02}), []
    for i in range(4):
        wide.append(few.with_columns(pl.format("{}{}", "task_type", pl.lit(i)).alias("task_type"),
                                     pl.format("{}-{}", "task", pl.lit(i)).alias("task")))  # fmt: skip
    frame = pl.concat(wide)
    means = tables.means(compare(frame, "m1"))
    assert means.columns == ("Tasks", "m1", "m2")
    assert len(means.rows) == 12
    assert means.rows[0][0].startswith("Reranking0 (1)")
    assert tables.means(compare(few, "m1")).columns[0] == "Design"
    _, html, _ = written(tmp_path / "many", frame, baseline="m1")
    assert "<details><summary>Task by task in pictures</summary>" in html
    _, html, _ = written(tmp_path / "few", few, baseline="m1")
    assert "in pictures" not in html


def test_the_methods_paragraph_names_the_reason_for_checkpoints():
    """Three seeds on tasks of one source leave no verdict on designs, but nothing was "trained once"."""
    one_source = study({"m1": 0, "m2": 0.02}, types={"STS": 6}).with_columns(pl.lit("semeval").alias("source"))
    text = pages.paragraph({}, compare(one_source, "m1"))
    assert "trained once" not in text
    assert "3 seeds" in text
    assert "in no group do the tasks come from two sources or more" in text
    single = pages.paragraph({}, compare(study({"m1": 0, "m2": 0.02}, seeds=1), "m1"))
    assert "As each design was trained once" in single
    mixed = study({"m1": 0, "m2": 0.02}).filter((pl.col("design") == "m1") | (pl.col("seed") == 0))
    assert "As m2 was trained once" in pages.paragraph({}, compare(mixed, "m1"))


def test_the_report_has_one_table_first_with_a_row_for_each_group(tmp_path, full):
    findings = Findings.of(compare(full, "m1", controls=["m1-aa"]), costs=COSTS)
    table = pages.at_a_glance(findings)
    rows = {row[0]: row[1:] for row in table.rows}
    shown = findings.row("STS", "m2").verdict
    assert rows["STS"][0] == "m2"
    assert rows["STS"][1] == f"m2 {100 * shown.difference:+.2f}".replace("+0.", "+.")
    assert rows["STS"][3:] == ("× 1.12", "decided")
    assert rows["Reranking"][0] == "no winner"
    assert rows["Reranking"][-1] == "tasks from 5 sources"
    _, html, _ = written(tmp_path, full, INFO, COSTS, ["m1-aa"], baseline="m1")
    first = next(attributes for tag, attributes in Page(html).tags if attributes.get("role") == "region")
    assert first["aria-label"] == "At a glance"


def test_what_is_worse_and_what_runs_decide_are_in_the_first_table():
    shifts = {"m1": 0.0, "down": -0.05, "up": 0.001}
    findings = Findings.of(compare(study(shifts, types={"R": 12}, run_sd=0.0003), "m1"))
    table = pages.at_a_glance(findings)
    (row,) = table.rows
    assert (row[1], row[2].split()[0], row[-1]) == ("equal", "up", "down")
    assert table.columns[-1] == "Worse than m1"
    loud = Findings.of(compare(study({"m1": 0.0, "m2": 0.0}, types={"R": 12}, run_sd=0.05), "m1"))
    (row,) = pages.at_a_glance(loud).rows
    assert (row[-1], loud.rows[0].verdict.by_runs) == ("over 50 seeds", True)
    quiet = Findings.of(compare(study({"m1": 0.0, "m2": 0.0004}, types={"R": 12}, run_sd=0.0), "m1", margin=1e-5))
    (row,) = pages.at_a_glance(quiet).rows
    assert (row[-1], quiet.rows[0].verdict.by_runs) == ("more tasks", False)


def test_every_section_of_the_page_is_in_its_contents(tmp_path, full):
    _, html, _ = written(tmp_path, full, INFO, COSTS, ["m1-aa"], baseline="m1")
    sections = re.findall(r'<h2 id="([^"]+)">', html)
    assert len(sections) == html.count("<h2") > 6
    assert re.findall(r'<a href="#([^"]+)">', html) == sections


def test_what_needs_no_training_stands_among_the_means_where_it_was_scored_on_all_tasks(tmp_path, full):
    lexical = study({"tfidf": 0.05}, seed=4).filter(pl.col("task_type") != "STS", pl.col("seed") == 0)
    lexical = lexical.with_columns(pl.lit("reference").alias("role"))
    frame = pl.concat([full, lexical], how="diagonal_relaxed")
    findings = Findings.of(compare(frame, "m1", controls=["m1-aa", "tfidf"]))
    (row,) = [row for row in pages.with_references(tables.means(findings), findings).rows if row[0] == "tfidf"]
    mean = 100 * lexical.filter(pl.col("task_type") == "Retrieval")["score"].mean()
    columns = tables.means(findings).columns
    assert row[columns.index("Retrieval (10)")] == f"{mean:.2f}"
    assert row[columns.index("STS (6)")] == "–"
    panels = {panel.group: panel.alt for panel in plots.run_strip(findings)}
    assert f"tfidf {mean:.2f}" in panels["Retrieval"]
    assert "tfidf" not in panels["STS"]


def test_groups_whose_intervals_differ_tenfold_have_scales_of_their_own():
    def marked(size: float) -> bool:
        wide = plots.Interval("a", -size, 0.0, size, "inconclusive")
        narrow = plots.Interval("b", -0.01, 0.0, 0.01, "inconclusive")
        _, panel = plots.intervals([("wide", [wide]), ("narrow", [narrow])], "points", "Forest")
        return "own scale" in panel.svg and "own scale" in panel.alt

    assert not marked(0.05)
    assert marked(0.5)
