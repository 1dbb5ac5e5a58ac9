"""The states of a frozen decoder, computed once: where nothing of the base is tuned (`lora = false`), a text has the
same states at every step, at every checkpoint and under every seed. Only the head is new.

Kept are what the pooling reads, token states (T, D) or one vector per layer (L, D), by the text's token ids and which
of them are pooled. Trials leave theirs in a folder of the study, named by all that the states depend on, for the trials
after them; a file appears whole or not at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

CAPACITY = 2 << 30
"""Bytes of states held at most, and read from the folder at most; texts beyond that are run through the base again."""


@dataclass
class FrozenStates:
    """What a frozen decoder made of each text. `asked` and `computed` count texts."""

    folder: Path | None = None
    capacity: int = CAPACITY
    asked: int = 0
    computed: int = 0
    size: int = 0
    known: dict[bytes, Tensor] = field(default_factory=dict)
    new: dict[bytes, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            if self.size + path.stat().st_size > self.capacity:
                break
            try:
                found = load_file(path)
            except (OSError, SafetensorError):  # damaged: its texts are computed again
                continue
            keys, lengths, states = (found[name] for name in ("keys", "lengths", "states"))
            ends = np.cumsum(lengths)
            for row, end in enumerate(ends):
                self.known[keys[row].tobytes()] = torch.from_numpy(states[end - lengths[row] : end])
            self.size += path.stat().st_size

    def states(self, keys: list[bytes], compute: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """The states (N, D) of each text; `compute` gets the numbers of those that are not known, each once."""
        self.asked += len(keys)
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        missing = [row for key, row in first.items() if key not in self.known]
        found: dict[bytes, Tensor] = {}
        if missing:
            self.computed += len(missing)
            for row, made in zip(missing, compute(missing), strict=True):
                found[keys[row]] = made.detach().float().cpu().clone()
                if self.size + found[keys[row]].nbytes <= self.capacity:
                    self.known[keys[row]] = self.new[keys[row]] = found[keys[row]]
                    self.size += found[keys[row]].nbytes
        return [found[key] if key in found else self.known[key] for key in keys]

    def leave(self) -> None:
        """Write what is new to the folder, for the trials after this one."""
        if self.folder is None or not self.new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "keys": np.stack([np.frombuffer(key, dtype=np.uint8) for key in self.new]),
            "lengths": np.array([len(states) for states in self.new.values()]),
            "states": torch.cat(list(self.new.values())).numpy(),
        }
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
        os.close(handle)
        save_file(content, name)
        os.replace(name, self.folder / f"{os.path.basename(name)[1:-4]}.safetensors")
        self.new = {}
