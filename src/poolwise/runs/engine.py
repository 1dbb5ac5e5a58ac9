"""Where trials run: this process hands them to child processes and collects events; it prepares and trains nothing.

One child prepares the study and ends. Each slot has a long-lived worker that imports the libraries once and runs trial
after trial (`runs.worker`); one that dies takes one trial with it and is replaced. All children start from a server
that has imported the libraries and done nothing else: what the caller's process or the preparation did, such as
initialising CUDA, cannot matter to a trial. Which trial runs next, and where, is decided in `runs.schedule`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import TYPE_CHECKING, Any

from poolwise.errors import PoolwiseError
from poolwise.files import write_json
from poolwise.runs import layout
from poolwise.runs.schedule import Ending, Gpu, Place, Schedule, Setting, places_for, visible_gpus
from poolwise.study.study import Study

if TYPE_CHECKING:
    from poolwise.runs.prepare import Trial

Event = tuple[str, Any]
"""`("notes", list)`, `("trials", list)`, `("places", list)`, `("progress", (name, stage, share, details))`, `("done",
name)`, `("failed", (name, reason))`, `("end", None)`; the details are those of `runs.trial.Progress`."""

METHOD = "forkserver" if sys.platform == "linux" else "spawn"
"""How children start. Forked ones share the memory of the libraries and start at once; on macOS, forking a process that
has loaded them is not safe."""
SERVED = "poolwise.runs.worker"
"""What the server that children are forked from imports."""
PATIENCE = 10.0
"""Seconds that a child is given to end after it was asked to."""


def start_server() -> None:
    """Begin to import the libraries in the background, for a process that will run a study and has to load them too."""
    if METHOD == "forkserver":
        multiprocessing.get_context(METHOD).set_forkserver_preload([SERVED])
        with _interrupts_held(), _driver_asked():
            forkserver.ensure_running()


def run_local(
    study: Study,
    *,
    workers: int = 0,
    per_gpu: int = 0,
    shard: tuple[int, int] = (1, 1),
    on_event: Callable[[Event], None],
) -> None:
    """Run what is missing of a study in child processes and report each event.

    workers: trials at a time; 0: `per_gpu` on each GPU, else one per core. per_gpu: trials at a time on each GPU; 0:
    one, and more once trainings have shown how much memory they need. shard: (i, n) runs every n-th trial, starting
    with the i-th, 1 <= i <= n.

    Raises PoolwiseError if the study cannot be prepared or a GPU cannot be used. KeyboardInterrupt ends all children.
    """
    folder = study.folder.resolve()
    prepared = layout.prepared(folder, shard[0])
    setting = Setting(study, folder, prepared, dict(os.environ))
    try:
        trials, gpus, method = _prepare(setting, on_event)
        mine = trials[shard[0] - 1 :: shard[1]]
        schedule = Schedule(mine, places_for(gpus, workers, per_gpu), measured=not workers and not per_gpu)
        _run_all(schedule, setting, method, on_event)
    finally:
        # A whole run is alone in the folder, so it also removes what shards that were killed left behind.
        for path in [prepared, *(layout.all_prepared(folder) if shard[1] == 1 else ())]:
            shutil.rmtree(path, ignore_errors=True)
    on_event(("end", None))


def event_record(event: Event) -> dict[str, Any]:
    """An event as a JSON-able dictionary: `event`, its kind, and its content by name."""
    kind, content = event
    record: dict[str, Any] = {"event": kind}
    if kind in ("notes", "trials", "places"):
        return {**record, kind: content}
    if kind == "progress":
        name, stage, share, details = content
        return {**record, "trial": name, "stage": stage, "share": share, **details}
    if kind == "failed":
        return {**record, "trial": content[0], "reason": content[1]}
    if kind == "warning":
        return {**record, "trial": content[0], "text": content[1]}
    return record if content is None else {**record, "trial": content}


def _prepare(setting: Setting, on_event: Callable[[Event], None]) -> tuple[list[Trial], list[Gpu], str]:
    """Prepare in one child and look for GPUs in another: the trials, the GPUs, and the method to start workers."""
    with _Child(METHOD, "prepare_study", setting) as child:
        gpus, method = _find_gpus(setting)
        while True:
            try:
                event = child.connection.recv()
            except EOFError:
                raise PoolwiseError("the preparing process died; see the messages above and run again") from None
            if event[0] == "error":
                raise PoolwiseError(event[1])
            if event[0] == "prepared":
                return event[1], gpus, method
            on_event(event)


def _find_gpus(setting: Setting) -> tuple[list[Gpu], str]:
    """The GPUs that workers can use, and the method to start them with.

    Libraries may ask CUDA for its devices while the server imports them (where the driver's library cannot tell, as
    under MIG). What such a server forks cannot use CUDA, so workers are spawned then.
    """
    answer: Any = None
    for method in dict.fromkeys((METHOD, "spawn")):
        with _Child(method, "survey", setting) as child:
            try:
                answer = child.connection.recv()
            except EOFError:
                answer = "the process that looked for it died"
        if isinstance(answer, list):
            return visible_gpus(answer, setting.environment.get("CUDA_VISIBLE_DEVICES")), method
    raise PoolwiseError(f"a GPU was found but cannot be used ({answer}); set CUDA_VISIBLE_DEVICES= to run on the CPU")


def _run_all(schedule: Schedule, setting: Setting, method: str, on_event: Callable[[Event], None]) -> None:
    """Keep the places busy until no trial is left."""
    running: dict[Connection, tuple[_Worker, Trial]] = {}
    shown: list[dict[str, Any]] = []
    with contextlib.closing(_Workers(setting, method)) as workers:
        while True:
            if shown != (shown := schedule.described()):
                on_event(("places", shown))
            while (job := schedule.take()) is not None:
                trial, place = job
                worker = workers.take(place)
                with contextlib.suppress(BrokenPipeError):  # it died while idle, which its connection shows below
                    worker.connection.send(trial)
                running[worker.connection] = worker, trial
            if not running:
                return
            for connection in [ready for ready in wait(list(running)) if isinstance(ready, Connection)]:
                worker, trial = running[connection]
                try:
                    kind, content = connection.recv()
                except (EOFError, OSError):  # it is gone without a last word
                    kind, content = "ended", Ending("failed", worker.epitaph(), sound=False)
                if kind == "progress":
                    on_event(("progress", (trial.name, *content)))
                    continue
                if kind == "warning":
                    on_event(("warning", (trial.name, content)))
                    continue
                del running[connection]
                again = schedule.ended(trial, worker.place, content)
                workers.give_back(worker, content.sound)
                if content.kind == "done":
                    on_event(("done", trial.name))
                elif not again:
                    _record_failure(setting, trial, content.reason)
                    on_event(("failed", (trial.name, content.reason)))


def _record_failure(setting: Setting, trial: Trial, reason: str) -> None:
    """Leave the reason in the trial's folder: a process that died could not, nor one whose disk was full."""
    folder = layout.trial(setting.folder, trial.name)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / layout.FAILED, {"reason": reason})


class _Child:
    """A child process that calls a function of `runs.worker`, and the connection to it; killed at the end of `with`."""

    def __init__(self, method: str, function: str, setting: Setting, *arguments: Any) -> None:
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([SERVED])
        self.connection, theirs = context.Pipe()
        name = f"poolwise-{function}"
        target = (function, setting, theirs, *arguments)
        self.process = context.Process(target=_call, args=target, name=name)
        try:
            with _plain_main(), _interrupts_held(), _driver_asked():
                self.process.start()
        except BaseException:  # an interrupt that was held back: nobody else knows of this child yet
            self.end()
            raise
        theirs.close()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it: it writes every file whole or not at all, so there is nothing to wait for."""
        if self.process.pid is not None and self.process.is_alive():
            self.process.kill()
            self.process.join(PATIENCE)
        self.connection.close()


class _Worker(_Child):
    """A child that runs trials of one place."""

    def __init__(self, method: str, setting: Setting, place: Place) -> None:
        self.place = place
        super().__init__(method, "work", setting, None if place.gpu is None else place.gpu.name)

    def epitaph(self) -> str:
        """Why it is gone, as far as that is known."""
        self.process.join(PATIENCE)
        return f"its process died (exit code {self.process.exitcode}); out of memory?"


class _Workers:
    """The workers of a run: those that are idle wait for the next trial of their place."""

    def __init__(self, setting: Setting, method: str) -> None:
        self.setting, self.method = setting, method
        self.all: list[_Worker] = []
        self.idle: list[_Worker] = []

    def take(self, place: Place) -> _Worker:
        """An idle worker of a place, or a new one. A trial that runs alone gets a new one, and no idle neighbours."""
        for worker in [worker for worker in self.idle if worker.place is place]:
            if not place.alone and worker.process.is_alive():
                self.idle.remove(worker)
                return worker
            self._end(worker)
        worker = _Worker(self.method, self.setting, place)
        self.all.append(worker)
        return worker

    def give_back(self, worker: _Worker, sound: bool) -> None:
        """Keep a worker for the next trial, unless it is not `sound` or one too many for its place."""
        neighbours = [other for other in self.all if other.place is worker.place]
        if sound and len(neighbours) <= worker.place.limit:
            self.idle.append(worker)
        else:
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        self.all.remove(worker)
        if worker in self.idle:
            self.idle.remove(worker)
            worker.connection.close()  # it then ends by itself
            worker.process.join(PATIENCE)
        worker.end()

    def close(self) -> None:
        """End all of them, busy or not."""
        for worker in list(self.all):
            self._end(worker)


def _call(function: str, *arguments: Any) -> None:
    """What every child does: the libraries are imported here, if the server has not done so."""
    from poolwise.runs import worker

    getattr(worker, function)(*arguments)


@contextlib.contextmanager
def _plain_main() -> Iterator[None]:
    """Children import the caller's main script, which would start the study a second time: show them an empty one."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back inside. Children inherit that for good: the terminal sends it to them too, but this process
    decides what to end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _driver_asked() -> Iterator[None]:
    """Have torch ask the driver's library whether there are GPUs, not CUDA, which a server must not touch."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
