"""Which trial runs next, and where: places for trials side by side, and what happens when a GPU's memory is too small.

Plain decisions; processes are the business of `runs.engine` and `runs.worker`, which exchange the types below.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from poolwise.errors import PoolwiseError

if TYPE_CHECKING:
    from poolwise.runs.prepare import Trial
    from poolwise.study.study import Study

CONTEXT = 1 << 30
"""Bytes of a GPU that a process takes beside torch's tensors: CUDA's context, loaded kernels, libraries' workspaces."""
SAFE = 0.8
"""Share of the free memory that trials may fill by the largest of them so far: the next may be larger."""
MOST = 4
"""Trials at a time on one GPU unless `--per-gpu` asks for more. A few fill the pauses in which one of them scores on
the processor; beyond that the GPU's time is the limit."""


class Setting(NamedTuple):
    """What every child of a run is given.

    folder: that of the study, absolute. prepared: where the preparation leaves its files. environment: the variables of
    the process that called `run`; the server that children are forked from may have older ones.
    """

    study: Study
    folder: Path
    prepared: Path
    environment: dict[str, str]


class Ending(NamedTuple):
    """How a trial ended.

    kind: `done`, `failed`, or `memory`: that of its GPU was too small. reason: in words. peak: bytes that training
    reserved on its GPU at most; None for a trial that did not train, or used no GPU. sound: whether its process can run
    the next trial; after some errors of CUDA every further call fails.
    """

    kind: str
    reason: str = ""
    peak: int | None = None
    sound: bool = True


class Gpu(NamedTuple):
    """A GPU. name: its entry in CUDA_VISIBLE_DEVICES; total, free: bytes, before any trial ran."""

    name: str
    product: str
    total: int
    free: int


@dataclass(eq=False)
class Place:
    """Where trials run side by side: a GPU, or the processor.

    limit: trials at a time. running: their names. alone: the one that runs must have no neighbour.
    """

    limit: int
    gpu: Gpu | None = None
    running: list[str] = field(default_factory=list)
    alone: bool = False


def cores() -> int:
    """Cores that this process may use (affinity and container limits counted)."""
    import joblib

    return int(joblib.cpu_count())


def visible_gpus(found: Sequence[tuple[str, int, int]], visible: str | None) -> list[Gpu]:
    """The GPUs of a machine by the names that select them.

    found: (product, total bytes, free bytes) as CUDA numbers them. visible: CUDA_VISIBLE_DEVICES, if set: numbers or
    identifiers, also of MIG slices, of the GPUs that this process may see.
    """
    names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(len(found))]
    return [Gpu(name, *facts) for name, facts in zip(names, found, strict=False)]


def places_for(gpus: Sequence[Gpu], workers: int = 0, per_gpu: int = 0) -> list[Place]:
    """The places of a machine. workers: trials at a time in all; per_gpu: on each GPU; 0: one per GPU, else per core.

    Raises PoolwiseError for both at once, or for `per_gpu` without a GPU.
    """
    if workers and per_gpu:
        raise PoolwiseError(f"--workers {workers} and --per-gpu {per_gpu} contradict each other; give one of them")
    if not gpus:
        if per_gpu:
            raise PoolwiseError(f"--per-gpu {per_gpu}: no GPU is visible here; use --workers for trials at a time")
        return [Place(workers or cores())]
    if not workers:
        return [Place(per_gpu or 1, gpu) for gpu in gpus]
    shares = [workers // len(gpus) + (number < workers % len(gpus)) for number in range(len(gpus))]
    return [Place(share, gpu) for share, gpu in zip(shares, gpus, strict=True) if share]


def side_by_side(free: int, peak: int, cores_per_gpu: int) -> int:
    """How many trials to run at a time on a GPU with `free` bytes if the largest so far reserved `peak` bytes."""
    fitting = int(SAFE * free) // (peak + CONTEXT)
    return max(1, min(fitting, cores_per_gpu, MOST))


class Schedule:
    """The trials that wait, and the places where they run.

    measured: places are GPUs with one trial each, and take more once trainings have shown how much memory they need.

    A trial for which the memory of its GPU was too small is the next to start, in a new process; the place that it ran
    on then holds one trial less. If that was not enough, it is tried a last time, alone on a GPU: no other trial starts
    there until those that run have ended, which can leave a large GPU idle for minutes.
    """

    def __init__(self, trials: Sequence[Trial], places: Sequence[Place], *, measured: bool = False) -> None:
        self.waiting, self.retries = deque(trials), deque[Any]()  # retries: of trials that must run alone
        self.places = list(places)
        self.measured = measured and all(place.gpu for place in places)
        self.retried: set[str] = set()
        self.peak = 0

    def take(self) -> tuple[Trial, Place] | None:
        """The next trial and its place, which then count as running; None if nothing can start before another ends."""
        free = [place for place in self.places if not place.alone and len(place.running) < place.limit]
        if self.retries:
            # Keep one place from taking new trials until it is empty: a retry would wait for ever otherwise.
            emptiest = min(self.places, key=lambda place: (place.alone, len(place.running)))
            if not emptiest.running:
                emptiest.alone = True
                return self._start(self.retries.popleft(), emptiest)
            free = [place for place in free if place is not emptiest]
        if not free or not self.waiting:
            return None
        return self._start(self.waiting.popleft(), min(free, key=lambda place: len(place.running)))

    def _start(self, trial: Trial, place: Place) -> tuple[Trial, Place]:
        place.running.append(trial.name)
        return trial, place

    def ended(self, trial: Trial, place: Place, ending: Ending) -> bool:
        """Note how a trial ended, and whether it will be tried again."""
        place.running.remove(trial.name)
        was_alone, place.alone = place.alone, False
        if ending.kind == "memory" and not was_alone:
            self.measured = False  # what was measured is not what is needed
            place.limit = max(1, min(place.limit - 1, len(place.running)))
            if place.limit > 1 and trial.name not in self.retried:
                self.waiting.appendleft(trial)
            else:
                self.retries.append(trial)
            self.retried.add(trial.name)
            return True
        if self.measured and ending.peak:
            self.peak = max(self.peak, ending.peak)
            for each in self.places:
                assert each.gpu is not None
                each.limit = side_by_side(each.gpu.free, self.peak, cores() // len(self.places))
        return False

    def described(self) -> list[dict[str, Any]]:
        """Each place in words: `device`, and `trials` at a time."""
        return [{"device": place.gpu.product if place.gpu else "cpu", "trials": place.limit} for place in self.places]
