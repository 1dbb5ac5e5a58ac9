"""A seeded slice of benchmarks/type1.py: the design-level test keeps its false-alarm rate, the usual tests do not."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from poolwise.stats import crossed
from poolwise.stats.exact import signed_rank


@pytest.fixture(scope="module")
def type1():
    path = Path(__file__).parents[1] / "benchmarks" / "type1.py"
    if not path.exists():
        pytest.skip("needs benchmarks/type1.py of the repository")
    spec = importlib.util.spec_from_file_location("type1", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["type1"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["type1"]


def rates(type1, cell, studies, differences=(0.0,)):
    found = type1.run_cell(cell, studies, seed=7, differences=differences)
    return {(rate.method, rate.true_difference): rate.rate for rate in found}


@pytest.mark.parametrize("scenario", ["base", "shared seeds", "run effects by type", "heavy tails"])
@pytest.mark.parametrize(("tasks", "seeds"), [(10, 3), (41, 5)])
def test_false_alarms_stay_between_3_and_8_percent(type1, scenario, tasks, seeds):
    found = rates(type1, type1.Cell(scenario, tasks, seeds, run_sd=0.2, heterogeneity=0.3, noise=0.4), 1000)
    assert 0.03 <= found["study", 0.0] <= 0.08
    assert found["two arms", 0.0] <= 0.08


@pytest.mark.parametrize("heterogeneity", [0.0, 0.6])
def test_false_alarms_without_any_run_effect(type1, heterogeneity):
    found = rates(type1, type1.Cell("base", 8, 3, run_sd=0.0, heterogeneity=heterogeneity, noise=0.4), 1000)
    assert found["study", 0.0] <= 0.08
    assert found["two arms", 0.0] <= 0.08


def test_the_usual_tests_do_not_keep_theirs(type1):
    found = rates(type1, type1.Cell("base", 41, 3, run_sd=0.4, heterogeneity=0.0, noise=0.2), 500)
    assert found["wilcoxon", 0.0] > 0.5
    found = rates(type1, type1.Cell("base", 8, 5, run_sd=0.0, heterogeneity=0.6, noise=0.2), 500)
    assert found["t", 0.0] > 0.3


def test_two_looks_stay_near_their_level(type1):
    found = rates(type1, type1.Cell("base", 10, 5, run_sd=0.2, heterogeneity=0.3, noise=0.4), 1000)
    assert 0.03 <= found["two looks", 0.0] <= 0.085


def test_power_grows_with_the_difference_and_the_pool_helps(type1):
    """10 tasks, 3 seeds, run sd .2: the notes give .21 .54 .99 1 for the study form, .18 .49 .96 1 for two arms."""
    found = rates(type1, type1.Cell("base", 10, 3, 0.2, 0.3, 0.4), 600, differences=(0.0, *type1.POWER_AT))
    study = [found["study", d] for d in (0.0, *type1.POWER_AT)]
    assert study == sorted(study)
    assert study[1:] == pytest.approx([0.21, 0.54, 0.99, 1.0], abs=0.08)
    assert study[2] > found["two arms", 0.5]


@pytest.mark.parametrize("scenario", ["base", "unequal variances"])
def test_the_benchmark_decides_as_the_shipped_functions_do(type1, scenario):
    y = type1.simulate(type1.Cell(scenario, 9, 3, 0.2, 0.3, 0.4), 80, np.random.default_rng(1)) + 0.3
    y[:, 0] -= 0.5
    study, arms, noisier = type1.contrasts(y)
    verdicts = np.where(noisier, type1.rejected(arms, 0.05), type1.rejected(study, 0.05))
    assert 0 < verdicts.sum() < 80
    assert verdicts.tolist() == [crossed(z[0], z[1], z[2:]).p_value <= 0.05 for z in y]
    assert type1.rejected(arms, 0.05).tolist() == [crossed(z[0], z[1]).p_value <= 0.05 for z in y]
    means = y.mean(axis=2)
    assert type1.wilcoxon_rejects(y).tolist() == [signed_rank(m[1] - m[0]) <= 0.05 for m in means]


def test_the_command_prints_json(type1, capsys, monkeypatch):
    one = type1.Cell("base", 8, 3, 0.2, 0.3, 0.4)
    monkeypatch.setattr(type1, "grid", lambda scenarios, quick: iter([one]))
    monkeypatch.setattr(type1, "ProcessPoolExecutor", InThisProcess)
    assert type1.main(["--json", "--studies", "20"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in rows} == {"study", "two arms", "wilcoxon", "t"}
    assert type1.main(["--studies", "20"]) == 0
    assert "false alarms" in capsys.readouterr().out


class InThisProcess:
    """A process pool's interface without processes."""

    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        return False

    map = staticmethod(map)


def test_two_looks_on_eight_tasks_keep_their_promise(type1):
    """Three seeds, then five, at .03 each: at most .08 of studies of equal designs see a difference at either look."""
    for run_sd, heterogeneity in ((0.0, 0.0), (0.2, 0.3), (0.4, 0.6)):
        cell = type1.Cell("base", 8, 5, run_sd=run_sd, heterogeneity=heterogeneity, noise=0.4)
        assert rates(type1, cell, 1000)["two looks", 0.0] <= 0.08
