"""The study file: what is legal, what is refused, and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from poolwise.errors import PoolwiseError, StudyError
from poolwise.study import catalogue
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.starters import TEMPLATES, demo_study, write
from poolwise.study.study import Study

COMPLETE = """
name = "my-study"
baseline = "m1"
seeds = [0, 1, 2]
tasks = ["STSBenchmark", "SciFact", "./my-faq"]
references = ["untuned", "tfidf", "bm25"]
controls = true

[recipe]
base_model = "nano"
dataset = "demo"
steps = 1000
learning_rate = 1e-5
head_learning_rate = 1e-5
seed_varies = ["init", "order", "dropout", "data"]
schedule = "linear"
warmup_steps = 100
weight_decay = 0.01
batch_size = 64
mini_batch_size = 0
negatives = 1
temperature = 0.05
max_length = 512
dtype = "auto"
append_eos = true
query_prompt = ""
document_prompt = ""
include_prompt = true
save_steps = 100
[recipe.lora]
rank = 16
alpha = 32
dropout = 0.1
target = "all-linear"

[[designs]]
preset = "m1"

[[designs]]
name = "layers-bi"
attention = "bidirectional"
pooling = "layer_cross_attention"
pooling_args = { tokens = "mean" }
"""


def study(**changes: object) -> Study:
    return Study.parse({"name": "s", "designs": [{"preset": "m1"}, {"preset": "m5"}], **changes})


def problems(**changes: object) -> list[str]:
    with pytest.raises(StudyError) as caught:
        study(**changes)
    return caught.value.problems


def test_complete_form_holds_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(COMPLETE)
    loaded = Study.load(path)
    assert loaded.recipe.model_dump() == {**Recipe().model_dump(), "dataset": "demo"}
    assert loaded.base_dir == tmp_path
    assert loaded.folder == tmp_path / "runs/my-study"
    assert [d.name for d in loaded.designs] == ["m1", "layers-bi"]
    # the spelled-out design is the preset
    assert loaded.design("layers-bi").factors() == Design.model_validate({"preset": "m5"}).factors()


def test_small_studies_are_legal() -> None:
    one = Study.parse({"name": "one", "seeds": [7], "tasks": [], "designs": [{"preset": "m1"}]})
    assert one.seeds == (7,)
    assert study(seeds=2).seeds == (0, 1)


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        study().recipe.steps = 3  # type: ignore[misc]


def test_presets_and_their_long_names() -> None:
    for alias, name in catalogue.ALIASES.items():
        assert Design.model_validate({"preset": alias}).factors() == Design.model_validate({"preset": name}).factors()
    for name in catalogue.PRESETS:
        assert Design.model_validate({"preset": name}).name == name


def test_factors_between_designs() -> None:
    five = {name: Design.model_validate({"preset": name}) for name in ("m1", "m2", "m3", "m4", "m5")}
    assert five["m5"].differs_from(five["m1"]) == ["attention", "pooling"]
    assert five["m2"].differs_from(five["m1"]) == ["pooling"]
    assert five["m4"].differs_from(five["m2"]) == ["attention"]
    assert five["m5"].differs_from(five["m3"]) == ["attention", "tokens"]


def test_fingerprint_covers_what_bears_on_results() -> None:
    assert study().fingerprint == study(name="other", output="elsewhere").fingerprint
    assert study().fingerprint == study(recipe={"report_to": ["wandb"]}).fingerprint
    for change in ({"recipe": {"steps": 7}}, {"margin": 0.01}, {"seeds": [0]}, {"tasks": ["STS12"]}):
        assert study(**change).fingerprint != study().fingerprint, change


def test_all_mistakes_at_once() -> None:
    found = problems(
        baseline="m9",
        recipe={"lr": 1e-4, "steps": "10", "schedule": "linaer", "lora": {"rnk": 3}},
        designs=[
            {"preset": "m1", "steps": 4},
            {"preset": "m8"},
            {"attention": "both", "pooling": "mean"},
            {"attention": "causal", "pooling": "cross_attention", "pooling_args": {"latents": "3", "head": 4}},
        ],
    )
    text = "\n".join(found)
    assert "recipe.lr is not a field" in text
    assert "did you mean 'learning_rate'?" in text
    assert "recipe.steps = '10'" in text
    assert "it is a str" in text
    assert "recipe.schedule = 'linaer'" in text
    assert "did you mean 'linear'?" in text
    assert "recipe.lora.rnk is not a field; allowed: rank, alpha, dropout, target; did you mean 'rank'?" in text
    assert "designs[0].steps: a design cannot override the recipe" in text
    assert "designs[1]: preset 'm8' is unknown; allowed: m1, m2" in text
    assert "designs[2].attention = 'both': allowed: 'causal', 'bidirectional', 'bidirectional_last_N'" in text
    assert "pooling_args.latents = '3': allowed: int or 'auto'" in text
    assert "pooling_args.head is not an argument of cross_attention" in text
    assert "baseline = 'm9' is not among the designs" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "m3"}, "baseline = 'm3' is not among the designs; allowed: m1, m5"),
        ({"seeds": [1, 1]}, "give at least one seed, each once"),
        ({"seeds": []}, "give at least one seed"),
        ({"designs": [{"preset": "m1"}, {"preset": "m1"}]}, "the name 'm1' is used 2 times"),
        ({"name": "a b"}, "name = 'a b'"),
        ({"recipe": {"lora": "ful"}}, 'allowed: a table with rank, alpha, dropout, target; false; "full"'),
        ({"recipe": {"dataset": "a", "sources": [{"path": "b"}]}}, "either dataset or sources, not both"),
        ({"recipe": {"learning_rate": 0}}, "recipe.learning_rate = 0"),
        ({"recipe": {"learning_rate": float("nan")}}, "recipe.learning_rate = nan"),
        ({"tasks": "STS12"}, "tasks = 'STS12': input should be a list"),
        ({"tasks": ["STS12", "STS12"]}, "a task is listed twice"),
        ({"evaluate_at": [0.5]}, "must contain 1.0"),
        (
            {"designs": [{"preset": "m1", "attention": "bidirectional"}]},
            "preset 'm1' sets attention = 'causal' already",
        ),
        ({"designs": [{"attention": "causal", "pooling": "men"}]}, "did you mean 'mean'?"),
        ({"designs": []}, "designs = "),
        ({"designs": [{"preset": ["m1"]}]}, "preset ['m1'] is unknown; allowed: m1, m2"),
    ],
)
def test_mistake(changes: dict[str, object], words: str) -> None:
    assert any(words in line for line in problems(**changes)), problems(**changes)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("name = ")
    with pytest.raises(StudyError, match="is not valid TOML"):
        Study.load(tmp_path / "study.toml")
    with pytest.raises(StudyError, match=r"no such file; did you mean 'study\.toml'\?"):
        Study.load(tmp_path / "stduy.toml")


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_valid_studies(template: str, tmp_path: Path) -> None:
    path = write(template, tmp_path / "s.toml")
    loaded = Study.load(path)
    assert loaded.name == template
    with pytest.raises(PoolwiseError, match="exists; give another name"):
        write(template, path)
    assert path.read_text() == TEMPLATES[template]


def test_factorial_crosses_both_factors() -> None:
    loaded = Study.parse(__import__("tomllib").loads(TEMPLATES["factorial"]))
    cells = {(d.attention, d.pooling) for d in loaded.designs}
    poolings = {pooling for _, pooling in cells}
    assert cells == {(mode, pooling) for mode in ("causal", "bidirectional") for pooling in poolings}
    assert {"last_token", "mean", "last_token_ffn", "mean_ffn", "cross_attention", "layer_cross_attention"} <= poolings


def test_unknown_template() -> None:
    with pytest.raises(PoolwiseError, match="did you mean 'factorial'"):
        write("factorail")


def test_demo_study_has_all_five_designs(tmp_path: Path) -> None:
    assert [d.name for d in demo_study(tmp_path).designs] == ["m1", "m2", "m3", "m4", "m5"]
    assert demo_study(tmp_path, quick=True).seeds == (0, 1)


# ---------------------------------------------------------------- grid

GRID = {
    "attention": ["causal", "bidirectional"],
    "pooling": ["last_token", "mean", "cross_attention", "layer_cross_attention"],
    "latents": [4, 16],
    "tokens": ["all", "mean"],
}


def test_grid_is_another_way_to_write_designs() -> None:
    """Fields are crossed; an argument multiplies only the poolings that take it; what cannot be is said."""
    found = study(designs=[{"preset": "m1"}], grid=GRID)
    cells = [
        (d.attention, d.pooling, d.pooling_args.get("latents"), d.pooling_args.get("tokens")) for d in found.designs
    ]
    expected = [("causal", "last_token", None, None), ("bidirectional", "last_token", None, None)]
    expected += [(mode, "mean", None, None) for mode in GRID["attention"]]
    for pooling, tokens in (("cross_attention", "all"), ("layer_cross_attention", "mean")):
        expected += [(mode, pooling, latents, tokens) for mode in GRID["attention"] for latents in (4, 16)]
    assert cells == expected
    assert [d.name for d in found.designs][:5] == [
        "m1", "last_token-bidirectional", "mean-causal", "mean-bidirectional", "cross_attention-causal-latents-4",
    ]  # fmt: skip
    assert found.designs[-1].name == "layer_cross_attention-bidirectional-latents-16-tokens-mean"
    assert len(found.grid_notes) == 3
    assert "last_token × causal: already listed as m1" in found.grid_notes
    assert any("tokens all and 3 more: pooling_args.tokens = 'all': allowed: last, mean" in n for n in found.grid_notes)
    # the same study spelt out
    spelt = study(designs=[{"preset": "m1"}, *(d.model_dump() for d in found.designs[1:])])
    assert spelt.fingerprint == found.fingerprint
    # what a run writes down, read again
    assert Study.parse(found.model_dump(mode="json")).designs == found.designs


def test_a_grown_grid_keeps_the_names_of_its_designs() -> None:
    """A run goes on by names: another value must not rename what was there."""
    small = study(
        designs=[], baseline="mean-causal", grid={"attention": "causal", "pooling": ["mean", "cross_attention"]}
    )
    large = study(
        designs=[],
        baseline="mean-causal",
        grid={"attention": ["causal", "bidirectional"], "pooling": ["mean", "cross_attention"], "latents": ["auto", 4]},
    )
    assert [d.name for d in small.designs] == ["mean-causal", "cross_attention-causal"]
    assert {d.name: d.factors() for d in small.designs}.items() <= {d.name: d.factors() for d in large.designs}.items()


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"attention": ["causal"], "pooling": ["men"]}, "did you mean 'mean'?"),
        ({"attention": ["causal", "both"], "pooling": ["mean"]}, "grid.attention: no design can have 'both'"),
        ({"pooling": ["mean"]}, "grid.attention is missing"),
        ({"attention": ["causal"], "pooling": ["mean"], "latent": [3]}, "did you mean 'latents'?"),
        ({"attention": ["causal"], "pooling": ["mean"], "latents": [3]}, "none of the poolings mean takes it"),
        ({"attention": ["causal"], "pooling": ["mean", "mean"]}, "give each value once"),
        ({"attention": [], "pooling": ["mean"]}, "give at least one value"),
    ],
)
def test_mistaken_grid(grid: dict[str, object], words: str) -> None:
    found = problems(designs=[], grid=grid, seeds=[])
    assert any(words in line for line in found), found
    assert not any(line.startswith("designs") for line in found)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["m1", "broken"], "the name 'broken' is reserved for a control arm or a reference"),
        (["m1", "tfidf"], "the name 'tfidf' is reserved for"),
        (["m1", "m1-aa"], "the name 'm1-aa' is reserved for"),
        (["m1", "m1-untuned"], "the name 'm1-untuned' is reserved for"),
        (["m1", "ladder-1"], "the name 'ladder-1' is reserved for"),
        (["m1", "a/b", "a b"], "'a/b' and 'a b' differ only in characters that are replaced in folder names"),
    ],
)
def test_names_that_would_be_taken_for_something_else(names, told):
    designs = [{"name": name, "pooling": "mean", "attention": "causal"} for name in names]
    with pytest.raises(StudyError, match=told):
        Study.parse({"name": "s", "tasks": ["demo"], "designs": designs, "references": ["tfidf"]})
