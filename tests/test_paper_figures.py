"""What readers of the paper look for: its table from the same scores, layers of an untuned base, training curves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import spearmanr, wilcoxon

from poolwise import api
from poolwise.data.tasks import resolve_tasks
from poolwise.errors import ModelError
from poolwise.model.encoder import build
from poolwise.reports import layers as layer_report
from poolwise.reports import plots, secondary
from poolwise.runs.run import losses
from poolwise.scoring.layers import layer_correlation, untuned
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from tiny import SENTENCES, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama", num_hidden_layers=3, max_position_embeddings=512)


def test_the_table_in_the_papers_terms(tmp_path: Path) -> None:
    """Differences of means, and uncorrected stars: here p = .031 on STS, which Holm over four tests does not leave."""
    generator = np.random.default_rng(0)
    gains = {"STS": (0.02 + 0.004 * np.arange(6), 6), "Retrieval": (np.array([0.1, -0.1, 0.2, -0.2, 0.1]), 5)}
    lines, expected = ["design,seed,task,task_type,metric,score"], {}
    for kind, (gain, tasks) in gains.items():
        base = generator.uniform(0.3, 0.6, tasks).round(4)
        for design, more in {"m1": 0 * gain, "m2": gain, "m3": -gain / 2}.items():
            scores = base + more
            lines += [f"{design},0,{kind}-{n},{kind},main,{score:.6f}" for n, score in enumerate(scores)]
            p = wilcoxon(more).pvalue if design != "m1" else 1.0
            value = scores.mean() if design == "m1" else more.mean()
            expected[design, kind] = value, p < 0.05
    (tmp_path / "scores.csv").write_text("\n".join(lines))
    findings = api.compare(tmp_path / "scores.csv", baseline="m1")
    table = secondary.paper_terms(findings)
    assert table is not None
    assert table.columns == ("Design", *findings.groups)
    for design, *cells in table.rows:
        for kind, cell in zip(findings.groups, cells, strict=True):
            value, star = expected[design, kind]
            assert float(cell.rstrip("*").replace("−", "-")) == pytest.approx(value, abs=5e-5)
            assert cell.endswith("*") == star
    starred = [cell for row in table.rows for cell in row if cell.endswith("*")]
    assert len(starred) == 2
    assert all(row.p_holm > 0.05 for row in findings.rows)
    assert "in 4 tests, .2 stars are expected where nothing differs" in table.note
    markdown = next(path for path in api.report(tmp_path / "scores.csv", out=tmp_path) if path.suffix == ".md")
    assert "In the paper's terms" in markdown.read_text(encoding="utf-8")


def test_no_table_in_the_papers_terms_without_a_test(tmp_path: Path) -> None:
    rows = [
        {"design": d, "seed": 0, "task": "a", "task_type": "STS", "metric": "m", "score": 0.5} for d in ("m1", "m2")
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "one.csv")
    assert secondary.paper_terms(api.compare(tmp_path / "one.csv")) is None


def test_correlation_between_layers_is_that_of_their_cosines(folder: Path) -> None:
    recipe = Recipe(base_model=str(folder), lora=False, max_length=64)
    encoder = build(recipe, Design(attention="causal", pooling="mean"), 0).eval()
    found = layer_correlation(encoder, SENTENCES, "mean")
    cosines = []
    for layer in (1, 2, 3):
        vectors = []
        for text in SENTENCES:
            ids = encoder[0].tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                states = encoder[0].model(ids, output_hidden_states=True).hidden_states[layer]
            vectors.append(torch.nn.functional.normalize(states[0].mean(0), dim=0))
        grid = (torch.stack(vectors) @ torch.stack(vectors).T).numpy()
        cosines.append(grid[np.triu_indices(len(SENTENCES), 1)])
    assert found == pytest.approx(np.array([[spearmanr(a, b).statistic for b in cosines] for a in cosines]), abs=1e-6)
    assert np.diag(found) == pytest.approx(1)
    assert found[0, 2] < 0.999
    with pytest.raises(ModelError, match="2 different texts have too few pairs"):
        layer_correlation(encoder, ["a", "b", "a"], "mean")


def test_the_layers_of_an_untuned_base(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    rows = [f"the cat {n},one {n * 3 % 7} dog,{n * 5 % 11}" for n in range(12)]
    (tmp_path / "pairs" / "test.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    view = json.loads(json.dumps(untuned(str(folder), resolve_tasks(["./pairs"], tmp_path))))
    assert [(run["design"], run["reduce"]) for run in view["runs"]] == [("last token", "last"), ("mean", "mean")]
    assert all(np.array(run["correlation"]).shape == (3, 3) for run in view["runs"])
    assert [len(run["scores"]) for run in view["runs"]] == [3, 3]
    # the last layer's mean is what the design `mean` scores
    design = {"attention": "causal", "pooling": "mean"}
    encoder = build(Recipe(base_model=str(folder), lora=False), Design.model_validate(design), 0)
    (own,) = api.evaluate(encoder, ["./pairs"], base_dir=tmp_path)
    assert view["runs"][1]["scores"][-1]["score"] == pytest.approx(own["score"], abs=1e-9)
    panels = layer_report.panels(view)
    assert [panel.group for panel in panels][1] == "last token · correlation between layers"
    assert re.search(r"layer 1 and 3 correlate [−.\d]+; neighbouring layers from", panels[1].alt)
    assert "an untuned base, which has no chance effect" in layer_report.tables(view)[0].note


def test_training_curves_in_the_report(finished: Path, tmp_path: Path) -> None:
    study = Study.load(finished.with_suffix(".toml"))
    found = losses(study)
    assert {design: {seed: len(values) for seed, values in runs.items()} for design, runs in found.items()} == {
        "m1": {0: 6}, "layers": {0: 6},
    }  # fmt: skip
    trained = json.loads(next(finished.glob("trials/m1-*/train.json")).read_text())["losses"]
    assert found["m1"][0] == [trained[str(step)] for step in range(1, 7)]
    page = next(path for path in api.report(study, out=tmp_path) if path.suffix == ".html").read_text(encoding="utf-8")
    assert f"Training loss of m1 over steps, ending at {trained['6']:.2f}.".replace(" 0.", " .") in page


def test_a_long_curve_is_averaged(tmp_path: Path) -> None:
    (panel,) = plots.loss_curves({"m1": {0: [float(n % 10) for n in range(1000)], 1: [1.0] * 1000}})
    assert "ending at 4.50, 1.00." in panel.alt
    assert plots.loss_curves({}) == []
