"""Trials in fresh workers: nothing of the preparation, of the caller or of an earlier trial matters to a trial.

Poolings of the user's own are imported in every process of a run, so they can look at it, spoil it, and set traps.
"""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import poolwise
from poolwise.errors import PoolwiseError, TaskError
from poolwise.files import read_json, write_json
from poolwise.runs import engine, prepare, schedule, worker
from poolwise.runs import run as runner
from poolwise.runs.schedule import Gpu
from poolwise.study.pooling_spec import OWN
from poolwise.study.study import Study
from small_study import M1, run, scores, state, weights, write

GIB = 1 << 30
CODE = """\
import json, multiprocessing, os, sys
from pathlib import Path

import torch

import poolwise
from poolwise import Pooling

HERE = Path(__file__).parent
PROCESS = multiprocessing.current_process().name
IN_A_TRIAL = PROCESS == "poolwise-work"
IN_A_CHILD = multiprocessing.parent_process() is not None


class Plain(Pooling):
    def __init__(self, hidden_size: int, n_layers: int):
        super().__init__()

    def forward(self, states, mask=None):
        if IN_A_TRIAL:
            look(self)
        mask = torch.ones(states.shape[:2]) if mask is None else mask.float()
        return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def look(head):
    pass


"""


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test registers is gone after it."""
    yield
    OWN.clear()


def with_code(place: Path, name: str, code: str, *changes: tuple[str, str], designs: str = "") -> Path:
    """A study whose design `own` pools with the code, before m1; the file of the code is called like the study."""
    (place / f"{name}.py").write_text(CODE + code)
    mine = f'[[designs]]\nname = "own"\nattention = "bidirectional"\npooling = "{name}:Plain"\n'
    allowed = ("controls = false", "controls = false\nallow_code = true")
    return write(place, name, allowed, *changes, designs=designs or mine + M1)


TRIPWIRE = """
def refuse(name):
    def touched(*args, **kwargs):
        raise AssertionError(f"{PROCESS} touched an accelerator: {name}")
    return touched


if IN_A_CHILD and not IN_A_TRIAL:
    names = [(torch.cuda, name) for name in (
        "_lazy_init", "init", "is_available", "device_count", "current_device", "set_device", "synchronize",
        "get_device_properties", "get_device_capability", "get_device_name", "mem_get_info", "is_bf16_supported",
    )]
    names += [(torch._C, name) for name in dir(torch._C) if name.startswith(("_cuda_", "_accelerator_"))]
    names += [(torch.accelerator, name) for name in dir(torch.accelerator) if not name.startswith("__")]
    for owner, name in names:  # of all names, those that this torch has
        if callable(getattr(owner, name, None)) and not isinstance(getattr(owner, name), type):
            setattr(owner, name, refuse(name))
    (HERE / "tripwire-set").write_text(" ".join(name for _, name in names))
"""


def test_the_preparation_touches_no_accelerator(place: Path) -> None:
    """On a GPU a process that has asked CUDA for anything can fork no child that uses it."""
    path = with_code(place, "tripwire", TRIPWIRE)
    assert run(path, workers=1) == {}
    assert {"_lazy_init", "current_accelerator"} <= set((place / "tripwire-set").read_text().split())
    assert state(place / "tripwire", "own")["state"] == "done"


SEEN = """
if IN_A_CHILD and not IN_A_TRIAL:  # the process that prepares
    poolwise.poisoned = "preparation"
    torch.cuda._initialized = True
    torch.set_default_dtype(torch.float64)


def look(head):
    seen = [getattr(poolwise, "poisoned", None), torch.cuda._initialized, str(torch.get_default_dtype()), PROCESS]
    with (HERE / f"seen-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(seen) + "\\n")
"""


def test_nothing_of_the_caller_or_the_preparation_is_seen_in_a_trial(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poolwise, "poisoned", "caller", raising=False)
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    assert run(with_code(place, "seen", SEEN), workers=1) == {}
    lines = [json.loads(line) for path in place.glob("seen-*.jsonl") for line in path.read_text().splitlines()]
    assert {tuple(line) for line in lines} == {(None, False, "torch.float32", "poolwise-work")}


def test_workers_have_the_environment_of_the_caller(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the server that they start from is older than a variable."""
    code = "\ndef look(head):\n    (HERE / 'variable').write_text(os.environ.get('OF_THIS_TEST', 'unset'))\n"
    for value in ("one", "two"):
        monkeypatch.setenv("OF_THIS_TEST", value)
        assert run(with_code(place, f"variable_{value}", code), workers=1) == {}
        assert (place / "variable").read_text() == value


DIRTY = '''
import logging, random, types, warnings

import numpy


def look(head):
    """Leave a mess, then fail."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.manual_seed(7), random.seed(7), numpy.random.seed(7)
    torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None if
        not isinstance(output, torch.Tensor) else output * 1.5)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["LEFT_BY"] = "own"
    os.chdir("/")
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("error")
    sys.modules["wandb"] = types.SimpleNamespace(finish=lambda: (HERE / "finished-run").touch())
    raise poolwise.PoolwiseError("left a mess")
'''


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The workers that a run started."""
    found: list[Any] = []

    class Counted(engine._Worker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append(self)

    monkeypatch.setattr(engine, "_Worker", Counted)
    return found


def test_a_worker_in_which_something_unexpected_happened_is_replaced(place: Path, started: list[Any]) -> None:
    """After some errors of CUDA every further call fails, also where scoring has wrapped the error."""
    code = "\ndef look(head):\n    if not head.training:\n        raise RuntimeError('illegal memory access')\n"
    failed = run(with_code(place, "broken_worker", code), workers=1)
    assert {name[:4]: reason for name, reason in failed.items()} == {
        "own-": "task 'pairs' failed: RuntimeError: illegal memory access"
    }
    (log,) = (place / "broken_worker").glob("trials/own-*/log.txt")
    assert log.exists()
    assert len(started) == 2
    assert state(place / "broken_worker", "m1")["state"] == "done"


def test_a_trial_is_the_same_first_and_second_in_a_worker(place: Path, finished: Path, started: list[Any]) -> None:
    """m1 came first in its worker in the run to compare with; here it comes after a trial that left a mess."""
    failed = run(with_code(place, "dirty", DIRTY), workers=1)
    assert {name[:4]: reason for name, reason in failed.items()} == {"own-": "left a mess"}
    assert len(started) == 1
    assert (place / "finished-run").exists()  # and a tracker does not log the next trial into its run
    mine, theirs = weights(place / "dirty"), {n: w for n, w in weights(finished).items() if "m1-" in n}
    assert mine == theirs
    assert theirs
    expected = scores(finished)
    expected = expected.filter(expected["design"] != "layers")
    assert scores(place / "dirty").equals(expected)


def test_a_worker_prepares_and_imports_once(place: Path) -> None:
    """Two designs and a reference, one process."""
    code = "\ndef look(head):\n    (HERE / f'worker-{os.getpid()}').touch()\n"
    mine = '[[designs]]\nname = "NAME"\nattention = "ATTENTION"\npooling = "once:Plain"\n'
    designs = mine.replace("NAME", "a").replace("ATTENTION", "causal") + mine.replace("NAME", "b").replace(
        "ATTENTION", "bidirectional"
    )
    path = with_code(place, "once", code, ('baseline = "m1"', 'baseline = "a"'), designs=designs)
    assert run(path, workers=1) == {}
    assert len(list(place.glob("worker-*"))) == 1
    assert not list((place / "once").glob("prepared-*"))


def test_what_a_trial_changes_is_restored() -> None:
    place, filters = os.getcwd(), list(warnings.filters)
    with worker.restored_state():
        first = random.random(), np.random.rand(), float(torch.rand(()))
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_grad_enabled(False)
        torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        os.environ["POOLWISE_TEST"] = "1"
        os.chdir("/")
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("error")
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.is_grad_enabled()
    assert not torch.nn.modules.module._global_forward_hooks
    assert "POOLWISE_TEST" not in os.environ
    assert os.getcwd() == place
    assert logging.root.manager.disable == 0
    assert list(warnings.filters) == filters
    with worker.restored_state():
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == first


def test_each_trial_compiles_for_itself() -> None:
    """What an earlier trial compiled counts towards the variants of a function that torch keeps at most."""
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    for trial in (1, 2):
        with worker.restored_state():
            for _ in range(2):
                torch.compile(double, backend=backend)(torch.ones(3))
        assert len(compiled) == trial


def test_handing_out_trials_takes_no_torch() -> None:
    """So that the server can begin to import it while the caller's process does so, too."""
    program = "import sys, poolwise.runs.engine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_is_printed_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        with worker.output_to(tmp_path / "trial" / "log.txt"):
            os.write(1, f"out {number}\n".encode())
            os.write(2, b"error\n")
    os.write(1, b"after\n")
    assert (tmp_path / "trial" / "log.txt").read_text() == "out 1\nerror\nout 2\nerror\n"
    assert capfd.readouterr() == ("after\n", "")


# ---------------------------------------------------------------- what the workers are given


def test_prepared_data_are_the_same_from_files(place: Path, tmp_path: Path) -> None:
    study = Study.load(write(place, "handed", ("controls = false", "controls = true")))
    made = prepare.prepare(study)
    prepare.save(made, tmp_path)
    found = prepare.load(study, tmp_path)
    assert made.pairs
    assert found.pairs
    assert found.pairs.dataset.to_dict() == made.pairs.dataset.to_dict()
    assert (found.pairs.report, found.pairs.fingerprint) == (made.pairs.report, made.pairs.fingerprint)
    for name in prepare.ARRAYS:
        mine, theirs = getattr(found.pairs.rows, name), getattr(made.pairs.rows, name)
        assert isinstance(mine, np.memmap)
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype
    assert found.plans.keys() == made.plans.keys() == {0, 1000}
    for seed, plan in found.plans.items():
        np.testing.assert_array_equal(plan.indices, made.plans[seed].indices)
        assert (plan.fingerprint, plan.report) == (made.plans[seed].fingerprint, made.plans[seed].report)
    assert [task.identity for task in found.tasks] == [task.identity for task in made.tasks]


def test_a_task_that_changed_since_the_preparation_is_refused(place: Path, tmp_path: Path) -> None:
    """Its scores would lie under names that nobody looks for."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "test.csv").write_text("sentence1,sentence2,score\n" + "".join(f"a {i},b {i},{i}\n" for i in range(9)))
    study = Study.load(write(place, "edited", ('"./pairs", "./facts"', f'"{folder}"')))
    prepare.save(prepare.prepare(study), tmp_path / "prepared")
    (folder / "test.csv").write_text("sentence1,sentence2,score\n" + "".join(f"c {i},b {i},{i}\n" for i in range(9)))
    with pytest.raises(TaskError, match="mine changed while the study was running; run it again"):
        prepare.load(study, tmp_path / "prepared")


# ---------------------------------------------------------------- GPUs


class Asked:
    """Stands for a child that looks for GPUs: what it sees depends on how it was started."""

    answers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, method: str, function: str, setting: Any) -> None:
        assert function == "survey"
        self.connection, self.answer = self, self.answers[method]

    def recv(self) -> Any:
        if self.answer is None:
            raise EOFError
        return self.answer

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def setting(**environment: str) -> schedule.Setting:
    return schedule.Setting(None, Path(), Path(), environment)  # type: ignore[arg-type]


def test_workers_are_spawned_where_what_the_server_forks_cannot_use_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "METHOD", "forkserver")
    monkeypatch.setattr(engine, "_Child", Asked)
    card = ("H", 80 * GIB, 79 * GIB)
    Asked.answers = {"forkserver": [card], "spawn": None}
    assert engine._find_gpus(setting()) == ([Gpu("0", *card)], "forkserver")
    Asked.answers = {"forkserver": "AcceleratorError: CUDA error: initialization error", "spawn": [card]}
    assert engine._find_gpus(setting(CUDA_VISIBLE_DEVICES="MIG-7")) == ([Gpu("MIG-7", *card)], "spawn")
    Asked.answers = {"forkserver": [], "spawn": None}
    assert engine._find_gpus(setting()) == ([], "forkserver")
    Asked.answers = {"forkserver": None, "spawn": "RuntimeError: driver too old"}
    with pytest.raises(PoolwiseError, match=r"cannot be used \(RuntimeError: driver too old\); set CUDA_VISIBLE_DEV"):
        engine._find_gpus(setting())


def test_what_a_survey_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.gpus_here() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (70 * GIB - number, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    assert worker.gpus_here() == [("card 0", 80 * GIB, 70 * GIB), ("card 1", 80 * GIB, 70 * GIB - 1)]

    def broken(number: int) -> None:
        raise RuntimeError("CUDA error: initialization error")

    with monkeypatch.context() as forked:
        forked.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
        assert "forked from one that had asked CUDA" in worker.gpus_here()
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert worker.gpus_here() == "RuntimeError: CUDA error: initialization error"


GREEDY = """
if IN_A_TRIAL:
    from poolwise.runs import worker

    worker.peak_memory = lambda: 7 << 30


def look(head):
    if not head.training:
        return
    tries = HERE / f"greedy-{os.environ['CUDA_VISIBLE_DEVICES']}-TRIES"
    with tries.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    if len(tries.read_text().split()) <= LIMIT:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nMore advice")
"""


@pytest.mark.parametrize(("name", "limit"), [("greedy_once", 1), ("greedy_always", 99)])
def test_out_of_memory_on_a_stand_in_gpu(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int) -> None:
    """Slots by the memory that a first training needed, a retry in a new process, then the settings to change."""
    card = Gpu("5", "stand-in", 40 * GIB, 34 * GIB)
    monkeypatch.setattr(engine, "_find_gpus", lambda setting: ([card], engine.METHOD))
    monkeypatch.setattr(schedule, "cores", lambda: 16)
    own_design = f'[[designs]]\nname = "own"\nattention = "bidirectional"\npooling = "{name}:Plain"\n'
    code = GREEDY.replace("LIMIT", str(limit)).replace("TRIES", name)
    path = with_code(place, name, code, designs=M1 + own_design)
    places: list[Any] = []
    events: list[Any] = []

    def follow(event: Any) -> None:
        (places if event[0] == "places" else events).append(event[1] if event[0] == "places" else event)

    failed = run(path, on_event=follow)
    # 80 % of 34 GiB hold three trials of 7 GiB and a context each; after the failure beside at most one other, one
    assert [row for shown in places for row in shown] == [
        {"device": "stand-in", "trials": count} for count in (1, 3, 1)
    ]
    processes = (place / f"greedy-5-{name}").read_text().split()
    assert processes[0] not in processes[1:]
    ended = [event for event in events if event[0] in ("done", "failed")]
    assert len(ended) == 3
    if limit == 1:
        assert failed == {}
        assert state(place / name, "own")["state"] == "done"
    else:
        assert len(processes) == 2
        (reason,) = failed.values()
        assert reason.startswith("the GPU's memory is too small (OutOfMemoryError: CUDA out of memory. Tried to")
        for word in ("recipe.mini_batch_size", "recipe.batch_size", "recipe.gradient_checkpointing", "--per-gpu 1"):
            assert word in reason
        assert "More advice" not in reason
        assert state(place / name, "own")["reason"] == reason


def test_device_and_memory_of_a_trial(finished: Path, copy: Path) -> None:
    from types import SimpleNamespace

    rows = {row["label"]: row for row in runner.trials(SimpleNamespace(folder=copy))}  # type: ignore[arg-type]
    assert rows["m1"]["device"] == "cpu"
    assert rows["m1"]["peak_memory"] is None
    assert rows["tfidf"]["device"] is None
    (work,) = copy.glob("trials/m1-*/work.json")
    write_json(work, {**read_json(work), "peak_memory": 7 * GIB})
    rows = {row["label"]: row for row in runner.trials(SimpleNamespace(folder=copy))}  # type: ignore[arg-type]
    assert rows["m1"]["peak_memory"] == 7 * GIB
    assert "wandb" not in sys.modules
