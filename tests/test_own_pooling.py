"""A pooling of the user's own: the page about it is run, the laws catch what they are for, code is asked for first."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from poolwise.errors import CheckpointError, ModelError, StudyError
from poolwise.model import checkpoint
from poolwise.model.checkpoint import export
from poolwise.model.encoder import build
from poolwise.pooling import cost
from poolwise.pooling.cost import resolve_args
from poolwise.pooling.heads import Pooling, weighted_mean
from poolwise.pooling.laws import LAWS, check_pooling
from poolwise.pooling.poolings import module_class
from poolwise.runs.train import train
from poolwise.study.catalogue import OWN, POOLINGS
from poolwise.study.design import Design
from poolwise.study.pooling_spec import register_own
from poolwise.study.study import Study
from test_laws import TEXTS, pairs, recipe
from tiny import tiny_config, tiny_folder

PAGE = (Path(__file__).parents[1] / "docs" / "own-pooling.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def forget():
    """What a test registers is gone after it."""
    yield
    OWN.clear()


class Scaled(Pooling):
    """The mean through a square matrix."""

    def __init__(self, hidden_size: int, n_layers: int, *, gain: float = 1.0, wide: bool = False):
        super().__init__()
        self.gain, self.dimension = gain, hidden_size * (2 if wide else 1)
        self.matrix = nn.Parameter(torch.empty(hidden_size, self.dimension))

    def initial(self, name, shape, generator):
        return self.gain * shape[0] ** -0.5 * torch.randn(shape, generator=generator)

    def forward(self, states, mask=None):
        return weighted_mean(states, torch.ones(states.shape[:2]) if mask is None else mask) @ self.matrix.float()


class Layered(Pooling):
    """The mean of layers."""

    reads = "layers"

    def __init__(self, hidden_size: int, n_layers: int, *, tokens: str = "mean"):
        super().__init__()

    def forward(self, states, mask=None):
        return states.float().mean(1)


class ReadsPadding(Scaled):
    def forward(self, states, mask=None):
        return states.float().mean(1) @ self.matrix.float()


class TakesTheLastPlace(Scaled):
    def forward(self, states, mask=None):
        return states[:, -1].float() @ self.matrix.float()


class MultipliesByTheMask(Scaled):
    def forward(self, states, mask=None):
        mask = torch.ones(states.shape[:2]) if mask is None else mask.float()
        return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) @ self.matrix.float()


class SumsInHalf(Scaled):
    def forward(self, states, mask=None):
        kept = (
            states if mask is None else torch.where(mask.bool()[..., None], states, torch.zeros((), dtype=states.dtype))
        )
        count = states.shape[1] if mask is None else mask.float().sum(1, keepdim=True).clamp(min=1)
        return kept.sum(1) / count @ self.matrix.to(states.dtype)


class BatchNormed(Scaled):
    def forward(self, states, mask=None):
        pooled = super().forward(states, mask)
        return pooled - pooled.mean(0) if len(pooled) > 1 else pooled


class DrawsByItself(Scaled):
    def reset_parameters(self, generator=None):
        torch.nn.init.normal_(self.matrix)


class LeavesAWeightOut(Scaled):
    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__(hidden_size, n_layers)
        self.unused = nn.Parameter(torch.empty(3, 3))


class KeepsItsWeightsToItself(Scaled):
    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__(hidden_size, n_layers)
        self.secret = torch.randn(hidden_size)

    def forward(self, states, mask=None):
        return super().forward(states, mask) * self.secret


class SaysNothingOfItsWidth(Scaled):
    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__(hidden_size, n_layers, wide=True)
        self.dimension = hidden_size


class LooksAtItsNumbers(Scaled):
    def forward(self, states, mask=None):
        return super().forward(states, mask) if float(self.matrix.abs().max()) < 1e9 else states[:, 0].float()


class ReadsTheMaskedToo(Scaled):
    def forward(self, states, mask=None):
        mask = torch.ones(states.shape[:2]) if mask is None else mask
        first = states.float().nan_to_num(0, 0, 0).clamp(-50, 50).sum(1) * 1e-7
        return super().forward(states, mask) + first @ self.matrix


@pytest.mark.parametrize(("pooling", "args"), [(Scaled, {}), (Scaled, {"wide": True, "gain": 2.0}), (Layered, {})])
def test_sound_poolings_pass(pooling, args):
    assert check_pooling(pooling, **args) == list(LAWS)


@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_our_own_poolings_pass_the_public_laws(name):
    assert check_pooling(module_class(name)) == list(LAWS)


@pytest.mark.parametrize(
    ("pooling", "breach"),
    [
        (ReadsPadding, "law 1, padding: the vector changes with padding: 3 positions on the left"),
        (TakesTheLastPlace, "law 1, padding: the vector changes with padding: 0 positions on the left, 5 right"),
        (
            MultipliesByTheMask,
            "law 1, padding: the vector changes with padding: 3 positions on the left, 0 right, of nan",
        ),
        (MultipliesByTheMask, "law 10, masks: a mask of zeros gives numbers that are not finite"),
        (SumsInHalf, "law 9, precision: states in bfloat16 give a vector in torch.bfloat16"),
        (BatchNormed, "law 1, padding: a text's vector changes with the other texts of its batch"),
        (DrawsByItself, "law 4, initial weights: the initial values of matrix do not come from the generator"),
        (LeavesAWeightOut, "law 5, gradients: unused had no gradient in two steps"),
        (KeepsItsWeightsToItself, "law 3, copies: its state dict, loaded into a new one, gives other vectors"),
        (SaysNothingOfItsWidth, r"shape: gives \(6, 32\) for \(6, 7, 16\), not \(6, 16\); .* sets self.dimension"),
        (LooksAtItsNumbers, "cost: `poolwise check` cannot count it on torch's meta device: RuntimeError"),
        (ReadsTheMaskedToo, "law 10, masks: a state whose mask is 0 has a gradient"),
    ],
)
def test_each_law_catches_what_it_is_for(pooling, breach):
    with pytest.raises(ModelError, match=breach):
        check_pooling(pooling)


class NotAPooling:
    def __init__(self, hidden_size, n_layers, depth): ...


class NeedsAWord(Pooling):
    def __init__(self, hidden_size, n_layers, *, word):
        super().__init__()


def test_what_no_study_could_take():
    class Local(Pooling):
        def __init__(self, width: int):
            super().__init__()

    with pytest.raises(StudyError, match=r"(?s)must be a subclass of poolwise.Pooling.*must be 'tokens' or 'layers'"):
        register_own(NotAPooling)
    with pytest.raises(StudyError, match="argument word needs a default"):
        register_own(NeedsAWord)
    with pytest.raises(
        StudyError, match=r"(?s)defined inside a function.*must be built as Local\(hidden_size, n_layers"
    ):
        register_own(Local)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("base"), "llama"))


@pytest.mark.parametrize(
    ("pooling", "args"),
    [(Scaled, {"gain": 2.0, "wide": True}), (Layered, {"tokens": "last"})],
    ids=["tokens", "layers"],
)
def test_it_is_trained_saved_loaded_and_exported(pooling, args, base, tmp_path):
    design = Design(attention="bidirectional", pooling=pooling, pooling_args=args)  # type: ignore[call-arg,arg-type]
    assert design.name == f"{pooling.__name__}-bidirectional"
    assert design.pooling == f"test_own_pooling:{pooling.__name__}"
    assert design.factors()["attention"] == "bidirectional"
    r = recipe(base)
    encoder = build(r, design, 0)
    width = 64 if args.get("wide") else 32
    assert encoder.get_embedding_dimension() == width
    train(encoder, r, pairs(8), tmp_path / "training", seed=0)
    encoder.eval()
    expected = encoder.encode(TEXTS)
    assert expected.shape == (len(TEXTS), width)
    run = checkpoint.save(encoder, tmp_path / "run")
    folder = export(encoder, tmp_path / "export")
    OWN.clear()  # as in another process
    for saved in (run, folder):
        with pytest.raises(
            CheckpointError, match=r"is code, which is imported only with your permission: .*allow_code=True"
        ):
            checkpoint.load(saved)
    for saved in (run, folder):
        OWN.clear()
        assert np.abs(checkpoint.load(saved, allow_code=True).encode(TEXTS) - expected).max() < 1e-5


def test_its_cost_is_what_torch_counts():
    register_own(Scaled)
    name, config = "test_own_pooling:Scaled", tiny_config("llama")
    args = resolve_args(name, {"wide": True}, config)
    assert args == {"gain": 1.0, "wide": True}
    assert cost.head_parameters(name, args, config) == 32 * 64
    assert cost.head_flops(name, args, config, 9) == 2 * 32 * 64


def toml(text: str = PAGE) -> str:
    return next(block for block in re.findall(r"```toml\n(.*?)```", text, re.S))


def study(folder: Path, text: str) -> Study:
    (folder / "study.toml").write_text(text)
    return Study.load(folder / "study.toml")


CLASS = "from test_own_pooling import Scaled, Layered\nclass Mine(Scaled):\n    pass\n"


def test_a_study_asks_before_it_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "mine_once.py").write_text(CLASS)
    text = toml().replace("my_pooling:PowerMean", "mine_once:Mine").replace("start", "gain")
    with pytest.raises(StudyError, match=r"'mine_once:Mine' is code, .*allow_code = true in the study"):
        study(tmp_path, text.replace("allow_code = true", ""))
    assert "mine_once" not in sys.modules
    loaded = study(tmp_path, text)
    assert "mine_once" in sys.modules
    power = loaded.design("power")
    with pytest.raises(StudyError, match="set allow_code = true"):
        Study.parse({"name": "s", "baseline": "power", "designs": [power.model_dump()]})
    assert {"code", "attention", "pooling", "pooling_args"} == set(power.treatment({}))
    with pytest.raises(
        StudyError, match=r"pooling_args.gian is not an argument of mine_once:Mine.*did you mean 'gain'"
    ):
        study(tmp_path, text.replace("gain =", "gian ="))
    with pytest.raises(StudyError, match="has no class 'Min'; did you mean 'Mine'"):
        study(tmp_path, text.replace(":Mine", ":Min"))
    with pytest.raises(StudyError, match=r"module 'nowhere' cannot be imported .*as nowhere\.py"):
        study(tmp_path, text.replace("mine_once:", "nowhere:"))


def test_a_grid_takes_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "mine_grid.py").write_text(CLASS)
    head = toml().split("[[designs]]")[0].replace('baseline = "mean"', 'baseline = "mean-causal"')
    grid = '[grid]\nattention = ["causal"]\npooling = ["mean", "mine_grid:Mine"]\nwide = [true, false]\n'
    assert len(study(tmp_path, head + grid).designs) == 3


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the Python of the page, then `poolwise check` and `poolwise run` of its study print, in one process."""
    folder = tmp_path_factory.mktemp("page")
    scripts = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (folder / "my_pooling.py").write_text(scripts[0])
    (folder / "study.toml").write_text(toml())
    program = "\n".join(scripts[1:]) + (
        "\nimport json, sys\nstudy = poolwise.Study.load('study.toml')\nfound = poolwise.check(study)\n"
        "print(json.dumps([row['head_parameters'] for row in found['designs']]))\nprint('RUN', flush=True)\n"
        "from poolwise.cli import main\nsys.argv = ['poolwise', 'run', 'study.toml']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("RUN\n")


def test_the_page_about_it_is_true(printed):
    """Its class, its check, its study and its Python."""
    lines = printed[0].splitlines()
    assert lines[: len(LAWS)] == list(LAWS)
    parameters = json.loads(lines[-1])
    assert parameters[0] == 0
    assert parameters[1] > 0


@pytest.mark.slow
def test_the_study_on_the_page_runs(printed):
    """Trained in the engine's own processes, which import the class themselves."""
    assert "power" in printed[1]
