"""What scoring costs: whole columns are read, texts come straight from a loader's data set, one thread computes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from datasets import Dataset
from datasets.arrow_dataset import Column
from torch.utils.data import DataLoader

from poolwise.data.tasks import Task
from poolwise.errors import TaskError
from poolwise.runs import worker
from poolwise.runs.schedule import Setting
from poolwise.scoring.adapters import adapt
from poolwise.scoring.evaluate import evaluate
from test_evaluate import Angles, classification, clustering, pairs, sts


@pytest.mark.parametrize("make", [classification, clustering, pairs, sts])
def test_columns_are_read_at_once(make: Callable[[], Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a column is looked up by itself, in whichever data set mteb derives."""
    reads: list[object] = []
    lookup = Column.__getitem__
    monkeypatch.setattr(Column, "__getitem__", lambda self, key: reads.append(key) or lookup(self, key))
    monkeypatch.setattr(Column, "__iter__", lambda self: pytest.fail("a column is read value by value"))
    evaluate(Angles(), [make()], identity="m")
    assert {repr(key) for key in reads} == {"slice(None, None, None)"}


def test_data_sets_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Dataset.__getitem__
    evaluate(Angles(), [sts()], identity="m")
    assert Dataset.__getitem__ is before
    monkeypatch.setattr(Angles, "encode", lambda self, texts: texts.fail)
    with pytest.raises(TaskError):
        evaluate(Angles(), [sts()], identity="m")
    assert Dataset.__getitem__ is before
    assert isinstance(Dataset.from_dict({"a": [1]})["a"], Column)


def test_texts_keep_the_order_of_the_loader() -> None:
    """A loader that shuffles, or has no data set, is read batch by batch."""
    data = Dataset.from_dict({"text": [f"text {degrees}" for degrees in range(20)]})
    orders = []
    for loader in (DataLoader(data, batch_size=3), DataLoader(data, batch_size=3, sampler=[*range(19, -1, -1)])):
        model = Angles()
        adapt(model, sts(), "m", 32, None).encode(loader)
        orders.append(model.seen)
    assert orders[0] == list(data["text"])
    assert orders[1] == orders[0][::-1]
    model = Angles()
    adapt(model, sts(), "m", 32, None).encode([{"text": ["a 1", "b 2"]}, {"text": ["c 3"]}])
    assert model.seen == ["a 1", "b 2", "c 3"]


def threads(kind: str) -> set[int]:
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == kind}


def test_scoring_uses_one_thread_of_blas() -> None:
    found: set[int] = set()

    class Asking(Angles):
        def encode(self, texts: list[str]) -> list[np.ndarray]:
            found.update(threads("blas"))
            return super().encode(texts)

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        evaluate(Asking(), [classification()], identity="m")
        assert found == {1}
        assert threads("blas") == {2}


def test_a_worker_uses_one_thread_of_every_library() -> None:
    def enter(answer: Connection) -> None:
        worker._enter(Setting(None, Path(), Path(), dict(os.environ)))  # type: ignore[arg-type]
        answer.send([threads("blas"), threads("openmp")])

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with threadpoolctl.threadpool_limits(2):
        child = context.Process(target=enter, args=(theirs,))
        child.start()
        assert ours.recv() == [{1}, {1}]
        child.join()
