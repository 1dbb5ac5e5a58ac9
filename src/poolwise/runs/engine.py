"""Where trials run: one process that prepares a study once and forks a child for each trial.

The child inherits the imported libraries, the data and the tasks; a crash or a kill takes one trial with it and
nothing else. On a CPU each trial has one thread and as many trials run at a time as there are cores (on two cores that
was faster than one trial with two threads); with GPUs there is one trial per GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from poolwise.errors import PoolwiseError
from poolwise.runs import layout
from poolwise.study.study import Study

Event = tuple[str, Any]
"""`("trials", list)`, `("notes", list)`, `("progress", (name, stage, share))`, `("done", name)`,
`("failed", (name, reason))`, `("error", message)`, `("end", None)`."""


def default_workers(gpus: int) -> int:
    """One trial per GPU, else per core that this process may use (affinity and container limits counted)."""
    import joblib

    return gpus or int(joblib.cpu_count())


def run_local(
    study: Study, *, workers: int = 0, shard: tuple[int, int] = (1, 1), on_event: Callable[[Event], None]
) -> None:
    """Run what is missing of a study in child processes and report each event.

    workers: trials at a time; 0 chooses. shard: (i, n) runs every n-th trial, starting with the i-th, 1 <= i <= n.
    Raises PoolwiseError where the study cannot be prepared; KeyboardInterrupt ends all children first.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    engine = context.Process(target=_engine, args=(study, study.base_dir, study.folder, workers, shard, theirs))
    with _own_main():
        engine.start()
    theirs.close()
    try:
        while True:
            try:
                event = ours.recv()
            except EOFError:
                raise PoolwiseError("the engine process died; see the messages above and run again") from None
            if event[0] == "error":
                engine.join(30)  # it ends by itself: stopping it now would make it complain
                raise PoolwiseError(event[1])
            on_event(event)
            if event[0] == "end":
                break
        engine.join()
    finally:
        if engine.is_alive():
            engine.terminate()
            engine.join(10)
            if engine.is_alive():
                engine.kill()
        ours.close()


@contextlib.contextmanager
def _own_main() -> Iterator[None]:
    """Spawned processes run the caller's script again, which would start the study a second time: give them none."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _engine(
    study: Study, base_dir: Path, folder: Path, workers: int, shard: tuple[int, int], events: Connection
) -> None:
    """Prepare once, then keep `workers` children busy. Runs in a process of its own."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Asking the CUDA runtime whether there is a GPU, as libraries do, would leave the children without one.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    study._base_dir = base_dir
    try:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()  # it would run through the grid
        gpus = _count_gpus()
        torch.set_num_threads(1)
        from poolwise.files import write_json
        from poolwise.runs.prepare import prepare

        prepared = prepare(study)
        gc.collect()
        gc.freeze()  # what the children inherit is never garbage: not theirs to search, nor to copy by searching
    except PoolwiseError as error:
        events.send(("error", str(error)))
        return
    waiting = prepared.trials[shard[0] - 1 :: shard[1]]
    events.send(("notes", prepared.notes))
    scores = sorted(layout.score_file(Path(), "", task).name for task in prepared.tasks)
    events.send(("trials", [{**_summary(trial), "scores": scores} for trial in prepared.trials]))
    workers = workers or default_workers(gpus)
    running: dict[Connection, tuple[Any, Any, int]] = {}
    free = list(range(workers))
    try:
        while waiting or running:
            while waiting and free:
                trial, slot = waiting.pop(0), free.pop(0)
                reader, writer = multiprocessing.Pipe(duplex=False)
                gpu = gpu_of(slot, gpus) if gpus else None
                child = multiprocessing.get_context("fork").Process(
                    target=_child, args=(trial, prepared, layout.trial(folder, trial.name), writer, gpu)
                )
                child.start()
                writer.close()
                running[reader] = (child, trial, slot)
            for reader in [connection for connection in wait(list(running)) if isinstance(connection, Connection)]:
                child, trial, slot = running[reader]
                try:
                    kind, content = reader.recv()
                except (EOFError, OSError):  # the child is gone without a last word
                    child.join()
                    kind, content = "failed", f"its process died (exit code {child.exitcode}); out of memory?"
                    with contextlib.suppress(OSError):
                        write_json(layout.trial(folder, trial.name) / layout.FAILED, {"reason": content})
                if kind == "progress":
                    events.send(("progress", (trial.name, *content)))
                    continue
                events.send((kind, trial.name if kind == "done" else (trial.name, content)))
                child.join()
                reader.close()
                del running[reader]
                free.append(slot)
        events.send(("end", None))
    except (BrokenPipeError, EOFError):
        pass  # the parent is gone: so are we
    finally:
        for child, _, _ in running.values():
            child.kill()


def _summary(trial: Any) -> dict[str, Any]:
    return {name: getattr(trial, name) for name in ("name", "label", "role", "seed", "base", "id")}


def _count_gpus() -> int:
    """How many there are, asked in a child: where the driver's library cannot tell (MIG), CUDA itself is asked, and a
    process that has asked CUDA can fork no child that uses it."""
    import torch

    reader, writer = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: writer.send(torch.cuda.device_count()))
    child.start()
    writer.close()
    try:
        return int(reader.recv())
    except EOFError:  # it died of what it asked
        return 0
    finally:
        child.join()


def gpu_of(slot: int, gpus: int) -> str:
    """The name of the GPU for a slot, of those that CUDA_VISIBLE_DEVICES lets this process see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(gpus)]
    return names[slot % gpus]


def _child(trial: Any, prepared: Any, folder: Path, events: Connection, gpu: str | None) -> None:
    """One trial in a process of its own."""
    _die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    from poolwise.runs.trial import run_trial

    # After a fork torch renews its thread pool at the first call that asks for it; two threads asking at once (as when
    # weights are loaded) may find none: "Invalid thread pool!". Asked for here, by the only thread, it is there.
    torch.set_num_threads(1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / layout.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)  # what libraries print goes to the trial's log, not between the user's tables
        os.dup2(log, 2)
        run_trial(trial, prepared, folder, lambda stage, share: events.send(("progress", (stage, share))))
        events.send(("done", None))
    except Exception as error:
        if not isinstance(error, PoolwiseError):
            import traceback

            traceback.print_exc()
        events.send(("failed", str(error) if isinstance(error, PoolwiseError) else f"{type(error).__name__}: {error}"))


def _die_with_parent() -> None:
    """On Linux: be killed when the parent process ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it ended before this was asked for
        os._exit(1)
