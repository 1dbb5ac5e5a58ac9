"""`[tuning]`: the same search for every design, development tasks that stay unreported, two arms side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from poolwise import api
from poolwise.errors import StudyError
from poolwise.files import write_json
from poolwise.runs import layout
from poolwise.runs import run as runner
from poolwise.runs import run as search
from poolwise.runs.check import check
from poolwise.runs.prepare import check_tuning
from poolwise.study.recipe import Setting, settings
from poolwise.study.study import Study
from poolwise.verdicts.comparison import compare
from poolwise.verdicts.robustness import outcomes
from poolwise.verdicts.table import table
from tiny import tiny_folder

RECIPE = {"base_model": "./llama", "dataset": "demo", "steps": 2, "batch_size": 4, "warmup_steps": 0, "max_length": 48,
          "learning_rate": 1e-3, "head_learning_rate": 1e-3}  # fmt: skip
TUNING = {"tasks": ["./dev"], "learning_rate": [1e-3, 5e-2], "head_learning_rate": [1e-3, 1e-2], "steps": [2]}
CONTENT: dict[str, Any] = {
    "name": "tuned", "baseline": "m1", "seeds": [0, 1], "tasks": ["./pairs", "./more"], "references": [],
    "controls": False, "evaluate_at": [1.0], "output": "runs", "recipe": RECIPE, "tuning": TUNING,
    "designs": [
        {"preset": "m1"},
        {"name": "cross", "attention": "causal", "pooling": "cross_attention", "pooling_args": {"latents": 2}},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    tiny_folder(folder, "llama")
    for number, name in enumerate(("dev", "pairs", "more")):
        (folder / name).mkdir()
        lines = [f"the heron {i},a fish {i * 7 % 5} {number},{i * (5 + number) % 11}" for i in range(16)]
        (folder / name / "test.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]))
    return folder


def study(place: Path, **changes: Any) -> Study:
    return Study.parse({**CONTENT, **changes}, base_dir=place)


def test_every_design_gets_the_same_grid(place: Path) -> None:
    made = study(place)
    assert made.tuning
    assert settings(made.tuning, made.recipe) == [Setting(lr, head, 2) for lr in (1e-3, 5e-2) for head in (1e-3, 1e-2)]
    tried: dict[str, list[Setting]] = {}
    for base, setting, part in search.searches(made):
        assert base == "./llama"
        assert part.tasks == ("./dev",)
        assert part.seeds == (2000,)
        assert (part.controls, part.references) == (False, ())
        assert part.recipe == made.recipe.model_copy(update=vars(setting))
        for design in part.designs:
            tried.setdefault(design.name, []).append(setting)
    # a design without a head has no head rate: two settings are all of its four
    assert tried == {
        "m1": [Setting(1e-3, 1e-3, 2), Setting(5e-2, 1e-3, 2)],
        "cross": settings(made.tuning, made.recipe),
    }
    counted = check(made)["tuning"]
    assert (counted["searched"], counted["again"], counted["tasks"], counted["seed"]) == (6, 4, ["dev"], 2000)


@pytest.mark.slow
def test_search_then_second_arm(place: Path) -> None:
    made = study(place, tuning={"tasks": ["./dev"], "head_learning_rate": [1e-3, 1e-1]})
    assert runner.run(made, workers=2) == {}
    assert runner.all_done(made)
    chosen = search.winners(made)
    assert chosen
    # the winner is the maximum of what lies in the folders of the search
    for winner in chosen:
        scores = {
            setting: runner.results(part)
            .filter(pl.col("design") == winner.design, pl.col("item_id").is_null())["score"].mean()
            for _, setting, part in search.searches(made)
            if winner.design in [design.name for design in part.designs]
        }  # fmt: skip
        assert len(scores) == winner.tried
        assert winner.score == max(scores.values())
        assert scores[winner.setting] == winner.score
    # development scores are reported nowhere
    assert set(runner.results(made)["task"]) == {"pairs", "more"}
    found = api.compare(made)
    assert found.tuned
    assert set(found.tuned.tasks) == {"pairs", "more"}
    assert {row.design for row in found.outcomes} == {"cross"}
    second = search.tuned_results(made)
    assert second
    assert set(second[0]["seed"]) == {0, 1}
    text = (api.report(made)[0]).read_text()
    assert "Same recipe and equally tuned" in text
    assert "dev" not in {row["task"] for row in found.to_json()["tuning"]["comparison"]["comparisons"] if "task" in row}
    # run again: nothing is trained anew
    files = {path: path.stat().st_mtime_ns for path in made.folder.rglob("train.json")}
    trained = 2 * 2 + 3 + 2 * sum(w.setting != Setting(1e-3, 1e-3, 2) for w in chosen)
    assert len(files) == trained
    assert runner.run(made, workers=2) == {}
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("train.json")} == files


def scores(effects: dict[str, float]) -> pl.DataFrame:
    draw = np.random.default_rng(5)
    level = draw.uniform(0.3, 0.6, 8)
    return table(
        {"design": design, "seed": seed, "task": f"t{i}", "task_type": "STS", "metric": "cosine_spearman",
         "score": level[i] + effect + draw.normal(0, 0.001)}
        for design, effect in effects.items() for seed in range(4) for i in range(8)
    )  # fmt: skip


def test_a_verdict_that_flips_depends_on_the_recipe() -> None:
    same = compare(scores({"m1": 0, "robust": 0.02, "fragile": 0.02, "even": 0, "lost": 0.02}), "m1")
    tuned = compare(scores({"m1": 0, "robust": 0.01, "fragile": -0.02, "even": 0, "lost": 0}), "m1")
    found = {row.design: (row.same, row.tuned, row.verdict) for row in outcomes(same, tuned)}
    assert found == {
        "robust": ("better", "better", "holds"),
        "fragile": ("better", "worse", "depends on the recipe"),
        "even": ("equivalent", "equivalent", "holds"),
        "lost": ("better", "equivalent", "depends on the recipe"),
    }
    one_run = compare(scores({"m1": 0, "robust": 0.02}).filter(pl.col("seed") == 0), "m1")
    assert [row.verdict for row in outcomes(one_run, tuned)] == ["open"]


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ({"tasks": ["./pairs"]}, "./pairs would be reported too"),
        ({"seed": 1}, "one of seeds"),
        ({"learning_rate": [1e-3], "head_learning_rate": []}, "tuning: a single setting"),
        ({"learning_rate": [1e-3, 1e-3]}, "give each value once"),
        ({"tasks": []}, "tuning.tasks"),
        ({"learning_rates": [1e-3]}, "tuning.learning_rates is not a field"),
    ],
)
def test_mistakes(tuning: dict[str, Any], words: str, place: Path) -> None:
    with pytest.raises(StudyError) as caught:
        study(place, tuning={**TUNING, **tuning})
    assert any(words in line for line in caught.value.problems), caught.value.problems


def test_a_task_of_the_study_under_another_name_is_refused(place: Path) -> None:
    with pytest.raises(StudyError, match="pairs would be reported too"):
        check_tuning(study(place, tuning={**TUNING, "tasks": [str(place / "pairs")]}))


def test_tuning_may_be_added_but_not_changed(place: Path, tmp_path: Path) -> None:
    plain = study(place, tuning=None, output=str(tmp_path))
    write_json(tmp_path / "study.json", plain.model_dump(mode="json"))
    layout.guard(study(place, output=str(tmp_path)))
    write_json(tmp_path / "study.json", study(place, output=str(tmp_path)).model_dump(mode="json"))
    with pytest.raises(StudyError, match="tuning was"):
        layout.guard(study(place, output=str(tmp_path), tuning={**TUNING, "learning_rate": [1e-3, 1e-4]}))
