"""Several base models in one study: the same data on each, pooled and single verdicts, and whether they agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.stats

from poolwise import api
from poolwise.errors import StatisticsError, StudyError
from poolwise.files import write_json
from poolwise.runs import layout, looks
from poolwise.runs.check import check
from poolwise.runs.prepare import prepare
from poolwise.runs.run import results, run, trials
from poolwise.study.study import Study
from poolwise.verdicts import robustness
from poolwise.verdicts.table import table
from tiny import tiny_folder

DESIGNS = ("m1", "good", "split", "bad")
EFFECTS = {"first": {"good": 0.03, "split": 0.03, "bad": -0.03}, "second": {"good": 0.02, "split": -0.03, "bad": -0.02}}


def rows(noise: float = 0.002, tasks: int = 8, seeds: int = 4) -> list[dict[str, object]]:
    """Scores on two base models with the planted effects above."""
    draw = np.random.default_rng(1)
    level = draw.uniform(0.3, 0.6, tasks)
    return [
        {"design": design, "role": "design", "seed": seed, "step": 10, "task": f"t{task}", "task_type": "STS",
         "metric": "cosine_spearman", "base": base, "score": float(
             level[task] + 0.05 * (base == "second") + EFFECTS[base].get(design, 0) + draw.normal(0, noise))}
        for base in EFFECTS for design in DESIGNS for seed in range(seeds) for task in range(tasks)
    ]  # fmt: skip


def write(folder: Path, content: list[dict[str, object]]) -> Path:
    path = folder / "scores.csv"
    pl.from_dicts(content).write_csv(path)
    return path


def test_kendall_tau_is_scipys() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        x, y = draw.integers(0, 4, 7).astype(float), draw.normal(size=7)
        assert robustness.kendall_tau(x, y) == pytest.approx(scipy.stats.kendalltau(x, y).statistic)
    assert robustness.kendall_tau(np.ones(3), np.arange(3.0)) == 0


def test_pooled_and_single_verdicts(tmp_path: Path) -> None:
    """A design that is good on one base and bad on the other is nothing on average, and the report says why."""
    found = api.compare(write(tmp_path, rows()), baseline="m1")
    assert found.row("STS", "good").verdict.difference == pytest.approx(0.025, abs=0.002)  # type: ignore[union-attr]
    assert abs(found.row("STS", "split").verdict.difference) < 0.002  # type: ignore[union-attr]
    across = found.robustness
    assert across
    assert across.bases == ("first", "second")
    assert {row.design: (row.agreement, row.same_sign) for row in across.designs} == {
        "good": ("agrees", True), "split": ("contradicts", False), "bad": ("agrees", True),
    }  # fmt: skip
    on = {x.base: x.difference for x in across.designs[0].on}
    assert on == {base: pytest.approx(EFFECTS[base][across.designs[0].design], abs=0.003) for base in EFFECTS}
    # rankings: good ~ split > m1 > bad, and good > m1 > bad > split
    (ranking,) = across.rankings
    assert ranking.designs == 4
    assert -0.34 <= ranking.tau <= 0.34
    assert ranking.ci_low <= ranking.tau <= ranking.ci_high
    content = json.loads(json.dumps(found.to_json()))["base_models"]
    assert content["bases"] == ["first", "second"]
    assert set(content["comparisons"]) == {"first", "second"}


def test_equal_base_models_agree_wholly(tmp_path: Path) -> None:
    """The same scores twice: pooled is each alone, tau is 1 with no doubt left."""
    first = [row for row in rows() if row["base"] == "first"]
    found = api.compare(write(tmp_path, [*first, *({**row, "base": "twin"} for row in first)]), baseline="m1")
    alone = api.compare(tmp_path / "scores.csv", baseline="m1", base="twin")
    assert [r.verdict for r in found.rows] == [r.verdict for r in alone.rows]
    assert found.robustness
    assert found.robustness.rankings[0].tau == 1
    assert {row.agreement for row in found.robustness.designs} == {"agrees"}


def test_the_interval_of_a_rank_agreement_draws_as_many_runs_as_there_are(tmp_path: Path) -> None:
    """Three runs, seven designs, seven equal tasks. On the base `first`, two neighbours change places where all runs
    drawn are the first: in 1/27 of the draws of three runs, above the 2.5 % of the interval's lower end; of seven runs,
    or where the last run is drawn twice as often, in 1/64 at most."""
    levels = {f"d{place}": 0.3 + 0.05 * place for place in range(7)}
    content = [
        {"design": name, "role": "design", "seed": run, "step": 10, "task": f"t{task}", "task_type": "STS",
         "metric": "cosine_spearman", "base": base,
         "score": level + 0.001 * run - 0.051 * (base == "first" and name == "d6" and run == 0)}
        for base in EFFECTS for name, level in levels.items() for run in range(3) for task in range(7)
    ]  # fmt: skip
    found = api.compare(write(tmp_path, content), baseline="d0").robustness
    assert found
    (ranking,) = found.rankings
    assert ranking.designs == 7
    assert (ranking.tau, ranking.ci_high) == (1, 1)
    assert ranking.ci_low == pytest.approx(1 - 2 / 21)  # one pair of 21 is reversed


def test_choosing_a_base(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    assert api.compare(path, baseline="m1", base="second").robustness is None
    with pytest.raises(StatisticsError, match="did you mean 'second'"):
        api.compare(path, base="secnd")
    with pytest.raises(StatisticsError, match=r"choose one with --base \(first, second\)"):
        api.compare_items(path, "t0", baseline="m1")


def test_pooling_leaves_out_what_a_base_lacks() -> None:
    content = rows()
    gap = {"base": "first", "design": "good", "seed": 0, "task": "t0"}
    kept = [row for row in content if not all(row[key] == value for key, value in gap.items())]
    frame = table([*kept, {**content[0], "design": "bm25", "role": "reference", "base": None}])
    pooled = robustness.pooled(frame, ["first", "second"])
    assert pooled.height == 4 * 4 * 8 - 1 + 1
    mine = pooled.filter(pl.col("design") == "split", pl.col("seed") == 1, pl.col("task") == "t3")
    theirs = frame.filter(pl.col("design") == "split", pl.col("seed") == 1, pl.col("task") == "t3")
    assert mine["score"].item() == pytest.approx(theirs["score"].mean())


STUDY = {
    "name": "bases",
    "baseline": "m1",
    "seeds": [0, 1],
    "tasks": ["demo/overlap-sts", "demo/late-retrieval"],
    "references": ["untuned", "tfidf"],
    "controls": False,
    "evaluate_at": [1.0],
    "base_models": ["./llama", "./qwen2"],
    "recipe": {"dataset": "demo", "steps": 2, "batch_size": 8, "warmup_steps": 0, "max_length": 64},
    "designs": [{"preset": "m1"}, {"attention": "bidirectional", "pooling": "mean"}],
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "qwen2"):
        tiny_folder(folder, family)
    return Study.parse({**STUDY, "output": "runs"}, base_dir=folder)


def test_every_base_sees_the_same_data(study: Study) -> None:
    """Law 4 across base models: the order of a seed's texts is one; a base added later repeats nothing."""
    made = [trial for trial in prepare(study).trials if trial.role == "design"]
    assert len(made) == 2 * 2 * 2
    assert len({trial.id for trial in made}) == len(made)
    for seed in study.seeds:
        assert len({trial.spec["data"] for trial in made if trial.seed == seed}) == 1
    on_llama = Study.parse({**STUDY, "base_models": ["./llama"]}, base_dir=study.base_dir)
    alone = {trial.id for trial in prepare(on_llama).trials}
    assert {trial.id for trial in made if trial.base == "./llama"} < alone


def test_check_counts_every_base(study: Study) -> None:
    found = check(study)
    assert found["trials"] == {"trained": 8, "of which controls": 0, "untuned": 4, "references": 1}
    assert [base["name"] for base in found["base_models"]] == ["./llama", "./qwen2"]
    assert len({(row["design"], row["base"]) for row in found["designs"]}) == 4


@pytest.mark.slow
def test_a_study_on_two_bases(study: Study) -> None:
    assert run(study, workers=2) == {}
    assert {row["base"] for row in trials(study) if row["role"] != "reference"} == {"./llama", "./qwen2"}
    frame = pl.read_parquet(study.folder / "results.parquet")
    counts = frame.filter(pl.col("item_id").is_null(), pl.col("role") == "design").group_by("base").len()
    assert dict(counts.iter_rows()) == {"./llama": 8, "./qwen2": 8}
    assert frame.filter(pl.col("role") == "reference")["base"].null_count()
    found = api.compare(study)
    assert found.robustness
    assert found.robustness.bases == ("./llama", "./qwen2")
    assert run(study, workers=2) == {}  # what it wrote down of itself is what it still is
    for path in api.report(study):
        text = path.read_text()
        assert "Base models" in text
        assert "tau" in text or path.suffix == ".tex"
    exported = api.export_design(study, "m1", study.folder / "exported", base="./qwen2")
    assert "qwen2" in (exported / "config.json").read_text()


def test_base_models_may_be_added_but_not_dropped(tmp_path: Path) -> None:
    """From one base model to two is growth, whichever way the one was written; the other way round is refused."""
    recipe = {**STUDY["recipe"], "base_model": "./llama"}  # type: ignore[dict-item]
    one = Study.parse({**STUDY, "base_models": [], "recipe": recipe, "output": str(tmp_path)})
    two = Study.parse({**STUDY, "output": str(tmp_path)})
    write_json(tmp_path / "study.json", one.model_dump(mode="json"))
    layout.guard(two)
    write_json(tmp_path / "study.json", two.model_dump(mode="json"))
    with pytest.raises(StudyError, match=r"base model was \./qwen2 and is now \./llama"):
        layout.guard(one)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_models": ["a", "a"]}, "give each base model once"),
        ({"base_models": ["a"], "recipe": {"base_model": "b"}}, "either base_models or recipe.base_model, not both"),
        ({"base_models": "a"}, "base_models = 'a'"),
    ],
)
def test_mistakes(changes: dict[str, object], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        Study.parse({**STUDY, **changes})


def test_one_base_of_several_is_exploratory_and_no_look(tmp_path):
    """What a study of two bases declares is its verdict over both."""
    raw = {
        "name": "s", "seeds": 3, "extend_to": 5, "tasks": ["demo"], "references": [], "controls": False,
        "evaluate_at": [1.0], "base_models": ["first", "second"], "output": "out",
        "designs": [{"preset": "m1"}, {"preset": "m2"}], "recipe": {"steps": 10, "warmup_steps": 0},
    }  # fmt: skip
    study = Study.parse(raw, base_dir=tmp_path)
    study.folder.mkdir()
    plan = {"planned": [0, 1, 2], "extend_to": 5, "extended": False, "looks": []}
    write_json(study.folder / "looks.json", plan)
    random = np.random.default_rng(0)
    rows = [
        {
            "design": design, "seed": seed, "step": 10, "task": f"t{t}", "task_type": "Retrieval", "source": f"o{t}",
            "split": "test", "subset": "default", "metric": "ndcg_at_10", "item_id": None, "base": base,
            "role": "design", "score": 0.5 + gain * (design == "m2") + 0.01 * t + 0.004 * random.random(),
        }
        for base, gain in (("first", 0.05), ("second", -0.05))
        for design in ("m1", "m2") for seed in range(3) for t in range(8)
    ]  # fmt: skip
    layout.write_table(study.folder / "results.parquet", pl.DataFrame(rows, infer_schema_length=None).to_arrow())
    alone = api.compare(study, base="first")
    assert alone.exploratory.endswith("by task type over all its base models.")
    assert alone.looks == ()
    assert abs(alone.rows[0].difference - 0.05) < 0.003
    both = api.compare(study)
    assert not both.exploratory
    assert abs(both.rows[0].difference) < 0.003
    looks.take(study, results(study), ())
    (look,) = json.loads((study.folder / "looks.json").read_text())["looks"]
    assert look["verdicts"][0]["difference"] == both.rows[0].verdict.difference  # type: ignore[union-attr]
