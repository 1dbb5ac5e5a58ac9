"""The plan: which rows are in which step's batch, fixed before training and the same for every design.

No two rows of a batch share a text's normal form: no query or positive occurs twice, and no row's negative is another
row's query, positive or negative. So every other document of a batch is a fair negative. A row that does not fit is
put off to a later batch. Nothing here imports torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from poolwise.data.pairs import Pairs
from poolwise.data.rows import random_stream
from poolwise.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from poolwise.study.recipe import Recipe


BLOCK = 4096
"""Rows whose hashes are turned into Python integers at a time."""
GOLDEN = 0.6180339887498949
"""The golden ratio less 1: multiples of it, modulo 1, spread evenly however many there are."""


@dataclass(frozen=True, eq=False)
class Plan:
    """indices (steps, batch_size): rows of `Pairs.dataset`; each row is one step's batch over all processes.

    fingerprint: sha256 over the exact texts in the exact order
    report: by source `rows_by_source` drawn and `passes_by_source` over its rows; `put_off`: rows that had to wait for
        a later batch; `still_waiting`: rows for which no later batch came
    """

    indices: np.ndarray
    fingerprint: str
    report: dict[str, Any]


def plan(pairs: Pairs, recipe: Recipe, seed: int) -> Plan:
    """The order of training for one seed. It depends only on the texts, the seed and the recipe's `steps`,
    `batch_size`, `seed_varies`, `one_source_batches` and source weights.

    With "data" in `seed_varies` each source is first resampled to its own size with replacement (a bootstrap); without
    "order" the rows are shuffled as for seed 0. A source's share of each batch is its weight over the sum of weights
    (of the batches, with `one_source_batches`). Each pass over a source has another order.

    Raises DataError if a batch cannot be filled.
    """
    bootstrap = "data" in recipe.seed_varies
    order_seed = seed if "order" in recipe.seed_varies else 0
    rows, size = pairs.rows, recipe.batch_size
    queues = []
    for number, label in enumerate(rows.labels):
        numbers = np.flatnonzero(rows.source == number)
        if bootstrap:
            numbers = numbers[random_stream("data", seed, number).integers(0, len(numbers), len(numbers))]
        # each source has its own stream: adding a source does not change the order of the others
        queues.append(_Queue(label, numbers, rows.near, random_stream("order", order_seed, number), bootstrap))
    shuffle = random_stream("batches", order_seed)
    weights = [source.weight for source in recipe.data_sources]
    shares = _shares(weights, recipe.steps, size, recipe.one_source_batches, shuffle)
    indices = np.empty((recipe.steps, size), dtype=np.int64)
    for step, share in enumerate(shares.tolist()):
        used: set[int] = set()
        batch = [row for queue, count in zip(queues, share, strict=True) for row in queue.take(count, used, step)]
        indices[step] = shuffle.permutation(batch)
    report = {
        "rows_by_source": {queue.label: queue.taken for queue in queues},
        "passes_by_source": {queue.label: round(queue.taken / len(queue.rows), 3) for queue in queues},
        "put_off": sum(queue.put_off for queue in queues),
        "still_waiting": sum(queue.waiting for queue in queues),
    }
    return Plan(indices, rows.fingerprint(indices), report)


def training_dataset(pairs: Pairs, plan: Plan) -> Dataset:
    """The steps · batch_size rows in the order of the plan, without the column `source`."""
    return pairs.dataset.remove_columns("source").select(
        plan.indices.ravel(), keep_in_memory=True, new_fingerprint=plan.fingerprint[:16]
    )


def effective_negatives(recipe: Recipe, world_size: int = 1) -> int:
    """Negatives of each query: all other documents of its part of the batch (of the whole batch, unless the recipe
    accumulates gradients), part_size · (1 + negatives) − 1.

    `batch_size` counts the queries of a step over all processes, whose documents are gathered, so the number of
    processes does not matter. Raises DataError if the batch cannot be split evenly over `world_size` processes.
    """
    if recipe.part_size % world_size:
        parts = f" in {recipe.accumulation} parts (recipe.accumulation)" if recipe.accumulation > 1 else ""
        unit = recipe.accumulation * world_size
        raise DataError(
            f"recipe.batch_size = {recipe.batch_size}{parts} cannot be split evenly over {world_size} processes; "
            f"give a multiple of {unit}, such as {-(-recipe.batch_size // unit) * unit}"
        )
    return recipe.part_size * (1 + recipe.negatives) - 1


def _shares(
    weights: Sequence[float], steps: int, size: int, one_source: bool, random: np.random.Generator
) -> np.ndarray:
    """(steps, sources) rows of each source in each batch; every row sums to `size`.

    Systematic sampling: `size` equally spaced points, shifted by a golden-ratio sequence, are counted in intervals as
    long as the weights. Each batch is within one row of the exact share, and the sum over batches stays near it.
    """
    bounds = np.cumsum(weights) / np.sum(weights)
    bounds[-1] = 1.0  # rounding may leave it above 1, which would add a row to some batches
    if one_source:
        chosen = np.searchsorted(bounds, (np.arange(steps) + 0.5) / steps, side="right")
        return size * np.eye(len(weights), dtype=np.int64)[random.permutation(chosen)]
    shift = (np.arange(steps) * GOLDEN) % 1.0
    below = np.ceil(bounds[None, :] * size - shift[:, None]).astype(np.int64)
    return np.diff(below, axis=1, prepend=0)


class _Queue:
    """The rows of one source in shuffled passes, and the rows put off, grouped by the text that kept them out.

    Grouped, because rows with one common text (say, the answer "yes") fit one a batch: once the text is used, the rest
    of the group need not be tried.
    """

    def __init__(self, label: str, rows: np.ndarray, near: np.ndarray, random: np.random.Generator, bootstrap: bool):
        self.label, self.rows, self.near, self.random, self.bootstrap = label, rows, near, random, bootstrap
        self.taken = self.put_off = self.waiting = 0
        self._late: dict[int, deque[tuple[int, list[int]]]] = {}
        self._late_keys: deque[int] = deque()
        self._pass, self._at = rows[:0], 0
        self._block: deque[tuple[int, list[int]]] = deque()

    def take(self, count: int, used: set[int], step: int) -> list[int]:
        """The next `count` rows without a text in `used` (near hashes); their texts are added to it.

        Rows put off earlier come first. Raises DataError after two whole passes without enough rows.
        """
        chosen: list[int] = []
        for _ in range(len(self._late_keys)):
            if len(chosen) == count:
                break
            key = self._late_keys.popleft()
            group = self._late[key]
            row, texts = group.popleft()
            self.waiting -= 1
            if group:
                self._late_keys.append(key)
            else:
                del self._late[key]
            self._place(row, texts, used, chosen)
        for _ in range(2 * len(self.rows)):  # the end of one pass and a whole one: each row is tried at least once
            if len(chosen) == count:
                break
            row, texts = self._next()
            self.put_off += not self._place(row, texts, used, chosen)
        if len(chosen) < count:
            self._refuse(len(chosen), count, step)
        self.taken += count
        return chosen

    def _place(self, row: int, texts: list[int], used: set[int], chosen: list[int]) -> bool:
        if used.isdisjoint(texts):
            used.update(texts)
            chosen.append(row)
            return True
        key = next(text for text in texts if text in used)
        if key not in self._late:
            self._late[key] = deque()
            self._late_keys.append(key)
        self._late[key].append((row, texts))
        self.waiting += 1
        return False

    def _next(self) -> tuple[int, list[int]]:
        if not self._block:
            if self._at == len(self._pass):
                self._pass, self._at = self.random.permutation(self.rows), 0
            rows = self._pass[self._at : self._at + BLOCK]
            self._at += len(rows)
            self._block.extend(zip(rows.tolist(), self.near[rows].tolist(), strict=True))
        return self._block.popleft()

    def _refuse(self, found: int, count: int, step: int) -> None:
        different = len(np.unique(self.rows))
        queries, positives = (len(np.unique(self.near[self.rows, column])) for column in (0, 1))
        drawn = f"{different} different rows" + (" in this seed's bootstrap" if self.bootstrap else "")
        whole = '; or leave "data" out of recipe.seed_varies, for a bootstrap drops about a third of the rows'
        raise DataError(
            f"training data {self.label!r}: only {found} of the {count} rows for the batch of step {step + 1} could be "
            f"found without a text occurring in two of them ({drawn}, {queries} queries, {positives} positives). "
            f"Give more rows, a smaller recipe.batch_size or weight, or fewer recipe.negatives"
            f"{whole if self.bootstrap else ''}"
        )
