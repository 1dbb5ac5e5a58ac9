"""The states of a frozen decoder, computed once: where nothing of the base is tuned (`lora = false`), a text has the
same states at every step, at every checkpoint and under every seed. Only the head is new.

Kept are what the pooling reads, token states (T, D) or one vector per layer (L, D), by the text's token ids and which
of them are pooled. Trials leave theirs in a folder of the study, named by all that the states depend on. Files are
mapped, not read: however many trials look into one, its pages are in memory once. A cache and no more: a file appears
whole or not at all, one that does not hold what it should is passed over, one that cannot be written is done without.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CAPACITY = 2 << 30
"""Bytes of states used at most, and of files in the folder; texts beyond that are run through the base again."""
PIECE = 64 << 20
"""Bytes of new states held in a process's own memory before they are written and mapped."""
FAILURES = (OSError, SafetensorError)


@dataclass
class FrozenStates:
    """What a frozen decoder made of each text. `asked` and `computed` count texts, `size` bytes of states."""

    folder: Path | None = None
    capacity: int = CAPACITY
    asked: int = 0
    computed: int = 0
    size: int = 0
    known: dict[bytes, Tensor] = field(default_factory=dict)
    new: dict[bytes, Tensor] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._find()

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
            if self.folder is not None and _bytes(self.new) >= PIECE:
                self.leave()
        return [found[key] if key in found else self.known[key] for key in keys]

    def leave(self) -> None:
        """Write what is new to the folder, for other trials, and map it; where that fails, it is not shared."""
        if self.folder is None:
            return
        self._find()  # what another trial has left meanwhile need not be there twice
        if not self.new:
            return
        if _write(self.new, self.folder, self.capacity):
            self._find()
        else:  # no room: go on with what is here
            self.folder, self.capacity = None, self.size

    def _find(self) -> None:
        """Map the files that have come into the folder, as far as they fit."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.seen) if self.folder else ():
            self.seen.add(path)
            try:
                found = _read(path)
            except (*FAILURES, ValueError, TypeError, RuntimeError):  # its texts are computed again
                continue
            added = {key: states for key, states in found.items() if key not in self.known}
            if self.size + _bytes(added) > self.capacity:
                continue
            self.size += _bytes(added)
            self.known |= added
            for key in self.new.keys() & found.keys():
                self.known[key] = found[key]
                del self.new[key]


def _bytes(states: dict[bytes, Tensor]) -> int:
    return sum(part.nbytes for part in states.values())


def _digest(keys: Tensor, lengths: Tensor, states: Tensor) -> str:
    digest = hashlib.sha256()
    for part in (keys, lengths, states):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def _write(new: dict[bytes, Tensor], folder: Path, capacity: int) -> bool:
    """Write one file of states, if there is room for it; whether that went well. Copies them, which `PIECE` bounds."""
    name = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if sum(path.stat().st_size for path in folder.glob("*.safetensors")) + _bytes(new) > capacity:
            return False
        content = {
            "keys": torch.from_numpy(np.stack([np.frombuffer(key, dtype=np.uint8) for key in new])),
            "lengths": torch.tensor([len(states) for states in new.values()]),
            "states": torch.cat(list(new.values())),
        }
        handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
        os.close(handle)
        save_file(content, name, {"sha256": _digest(**content)})
        os.replace(name, folder / f"{os.path.basename(name)[1:-4]}.safetensors")
    except FAILURES:  # a full disk, say
        return False
    finally:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
    return True


def _read(path: Path) -> dict[bytes, Tensor]:
    """The states that a file holds, mapped. Raises one of several errors where it is not what was written."""
    with safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name) for name in ("keys", "lengths", "states")}
        expected = (file.metadata() or {}).get("sha256")
    if _digest(**content) != expected:
        raise ValueError(f"{path}: its checksum differs")
    parts = content["states"].split(content["lengths"].tolist())
    return {key.tobytes(): part for key, part in zip(content["keys"].numpy(), parts, strict=True)}
