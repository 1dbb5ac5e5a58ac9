"""poolwise: which pooling and attention should my LLM embedder use, is the difference real, and what does it cost?

study = poolwise.Study.load("study.toml")
poolwise.check(study)                  # sizes, factors, what the statistics can reach
poolwise.run(study)                    # trains and scores what is missing
print(poolwise.compare(study))         # contrasts against the baseline, by task type
poolwise.report(study)                 # Markdown and HTML

encoder = poolwise.build(study.recipe, study.design("m5"), seed=0)    # a SentenceTransformer
encoder = poolwise.load("runs/my-study/trials/.../training/step-1000")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poolwise.api import compare, evaluate, report
    from poolwise.encoding.encode import encode
    from poolwise.errors import PoolwiseError
    from poolwise.model.attention import verdict as probe
    from poolwise.model.checkpoint import export, load
    from poolwise.model.encoder import build
    from poolwise.model.release import load_release
    from poolwise.pooling.heads import Pooling
    from poolwise.runs.ab import ab
    from poolwise.runs.check import check
    from poolwise.runs.run import run
    from poolwise.study.design import Design
    from poolwise.study.recipe import Recipe
    from poolwise.study.study import Study

__version__ = "0.1.0"
_WHERE = {  # imported on first use: torch and mteb cost seconds
    "Backbone": "model.backbone",  # exported folders name this class and PoolingHead
    "Design": "study.design",
    "FastEncoder": "encoding.fast",
    "Pooling": "pooling.heads",
    "PoolingHead": "model.encoder",
    "PoolwiseError": "errors",
    "Recipe": "study.recipe",
    "Study": "study.study",
    "ab": "runs.ab",
    "build": "model.encoder",
    "check": "runs.check",
    "compare": "api",
    "encode": "encoding.encode",
    "evaluate": "api",
    "export": "model.checkpoint",
    "load": "model.checkpoint",
    "load_release": "model.release",
    "report": "api",
    "run": "runs.run",
}
__all__ = [
    "Design",
    "FastEncoder",
    "Pooling",
    "PoolwiseError",
    "Recipe",
    "Study",
    "ab",
    "build",
    "check",
    "compare",
    "encode",
    "evaluate",
    "export",
    "load",
    "load_release",
    "probe",
    "report",
    "run",
]


def __getattr__(name: str) -> Any:
    if name == "probe":
        return import_module("poolwise.model.attention").verdict
    if name in _WHERE:
        return getattr(import_module(f"poolwise.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'poolwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
