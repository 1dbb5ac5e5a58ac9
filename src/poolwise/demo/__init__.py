"""The built-in base model and the mechanism tasks: a study that needs nothing but the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from poolwise.demo import forms

def nano_path() -> Path:
    return Path(__file__).parent / "nano"

def training_pairs(seed: int = 0) -> list[dict[str, Any]]:
    return forms.pairs(300, seed)

def task_names() -> list[str]:
    return [f"demo/{name}-{kind}" for name, kinds in forms.SIZES.items() for kind in kinds]
