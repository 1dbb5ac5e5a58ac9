"""What runs in the child processes of a study: its preparation, its trials, and the question which GPUs there are.

Each child starts from a process that has only imported this file (`runs.engine`). A worker runs trial after trial;
whatever a trial changes in its process is restored before the next one, so that the order of trials does not matter.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
import torch
import transformers

from poolwise.errors import PoolwiseError, printable, redact
from poolwise.runs import layout
from poolwise.runs.prepare import Prepared, Trial, load, prepare, save, store_costs
from poolwise.runs.schedule import Ending, Setting
from poolwise.runs.train import LOGGER
from poolwise.runs.trial import causes, ended_by_memory, is_trained, reason_of, run_trial

FILTER = "from poolwise.errors import redact_stream; redact_stream(sys.stdin.buffer, sys.stdout.buffer)"
PATIENCE = 10.0
"""Seconds to wait for the end of a log whose trial is over."""


def _enter(setting: Setting, **variables: str) -> None:
    """Begin: end with the parent, leave Ctrl-C to it, take over its environment, use one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", **setting.environment, **variables})
    # After a fork torch rebuilds its thread pool at the first call that needs it; two threads that ask at once, as when
    # weights are loaded, may find none ("Invalid thread pool!"). So ask before there is a second thread.
    torch.set_num_threads(1)
    # Trials run side by side. numpy and scikit-learn would each start a thread for every core, which wait for each
    # other by spinning: scoring 30 tasks took 102 CPU-s beside encoding instead of 14 on two cores.
    threadpoolctl.threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    transformers.utils.logging.disable_progress_bar()  # it would be drawn over the grid of trials


def _end_with_parent() -> None:
    """Wait for the end of the parent, however it ends, and end this process at once: every file is written whole."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def prepare_study(setting: Setting, events: Connection) -> None:
    """Prepare the study and send `notes`, `trials` (rows of trials.json) and `prepared` (the trials), or `error`.

    Touches no accelerator: which GPU a trial uses, and whether it can, is its worker's business.
    """
    _enter(setting)
    try:
        prepared = prepare(setting.study)
        store_costs(setting.study, setting.folder)
        save(prepared, setting.prepared)
    except PoolwiseError as error:
        events.send(("error", str(error)))
        return
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        events.send(("error", reason_of(error, setting.folder)))
        return
    scores = sorted(layout.score_file(Path(), "", task).name for task in prepared.tasks)
    events.send(("notes", prepared.notes))
    events.send(("trials", [{**_summary(trial), "scores": scores} for trial in prepared.trials]))
    events.send(("prepared", prepared.trials))


def _summary(trial: Trial) -> dict[str, Any]:
    return {name: getattr(trial, name) for name in ("name", "label", "role", "seed", "base", "id")}


def survey(setting: Setting, answer: Connection) -> None:
    """Send what `gpus_here` finds. CUDA is initialised in this process and in workers, and in no other."""
    _enter(setting)
    answer.send(gpus_here())


def gpus_here() -> list[tuple[str, int, int]] | str:
    """(product, total bytes, free bytes) of each GPU that this process can use; if it cannot use one, why, in words."""
    if torch.cuda._is_in_bad_fork():  # CUDA would just say that there is no GPU, and the study would run without
        return "this process was forked from one that had asked CUDA for devices"
    try:
        found = []
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            free, total = torch.cuda.mem_get_info(number)  # initialises CUDA, as a trial would
            found.append((torch.cuda.get_device_name(number), total, free))
    except Exception as error:  # whatever a driver may raise
        return f"{type(error).__name__}: {error}"
    return found


def work(setting: Setting, orders: Connection, gpu: str | None) -> None:
    """Run the trials that come over `orders`, one after the other, until it is closed.

    Sends `("progress", (stage, share))`, and at the end of each trial `("ended", Ending)`. gpu: as CUDA_VISIBLE_DEVICES
    names it; None on a machine without.
    """
    _enter(setting, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}))
    gc.freeze()  # inherited objects are then neither scanned nor, by scanning, copied into this process
    prepared: Prepared | None = None

    def send(kind: str, content: Any) -> None:
        with contextlib.suppress(OSError):  # the parent is gone, and this process is about to be
            orders.send((kind, content))

    while True:
        try:
            trial: Trial = orders.recv()
        except EOFError:
            return
        folder = layout.trial(setting.folder, trial.name)
        with restored_state(), output_to(folder / layout.LOG), _warnings_to(lambda text: send("warning", text)):
            try:
                if prepared is None:
                    setting.study.load_code()
                    prepared = load(setting.study, setting.prepared)
                run_trial(trial, prepared, folder, lambda *content: send("progress", content))
                ending = Ending("done", peak=peak_memory() if is_trained(trial) else None)
            except Exception as error:
                if not isinstance(error, PoolwiseError):
                    traceback.print_exc()
                kind = "memory" if ended_by_memory(error) else "failed"
                expected = all(isinstance(cause, PoolwiseError) for cause in causes(error))
                ending = Ending(kind, reason_of(error, folder), sound=expected)
        send("ended", ending)


@contextlib.contextmanager
def _warnings_to(send: Callable[[str], None]) -> Iterator[None]:
    """Pass the warnings of poolwise's own logger on, as well as to the log."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = redact(printable(record.getMessage()))
            print(f"warning: {text}", flush=True)
            send(text)

    handler = Handler(logging.WARNING)
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)


def peak_memory() -> int | None:
    """Bytes that torch reserved on the GPU at most since the trial began; None where no GPU is used."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else None


@contextlib.contextmanager
def restored_state() -> Iterator[None]:
    """A trial's process: seeded at the start; at the end all that a trial may change is as it was.

    That is the environment, the working directory, random generators, torch's defaults and global hooks, logging,
    warnings, experiment trackers, compiled code and memory; the trainer resets accelerate's shared state itself. What a
    user's own pooling keeps in a variable of its module stays.
    """
    environment, place = dict(os.environ), os.getcwd()
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    modules = vars(torch.nn.modules.module)
    hooks = {name: dict(value) for name, value in modules.items() if name.startswith("_global_") and value}
    level, disabled = logging.root.level, logging.root.manager.disable
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(place)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(1)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        for name, registered in modules.items():
            if name.startswith("_global_") and isinstance(registered, dict):
                registered.clear()
                registered.update(hooks.get(name, {}))
        logging.root.setLevel(level)
        logging.disable(disabled)
        for tracker in ("wandb", "trackio", "swanlab"):  # the trainer would log the next trial into the open run
            if tracker in sys.modules:
                with contextlib.suppress(Exception):
                    sys.modules[tracker].finish()
        if "torch._dynamo" in sys.modules:
            # Compiled code is kept by the function it was made from, a few variants of each: after some trials nothing
            # more would be compiled.
            torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append what libraries print to a file, at the level of file descriptors, instead of between the user's tables.

    Secrets, such as a token in the address of a request, never reach the file: another process writes it, line by line,
    and ends only after the last of those who print, so that a killed process leaves its last lines, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(1), os.dup(2)]
    with path.open("ab") as log:
        command = [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}; {FILTER}"]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.DEVNULL)
    assert writer.stdin is not None
    try:
        for number in (1, 2):
            os.dup2(writer.stdin.fileno(), number)
        writer.stdin.close()
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that the trial started still prints
            writer.wait(PATIENCE)
