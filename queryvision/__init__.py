"""queryvision: one DETR core, one engine, pluggable task heads.

    model = queryvision.load("best.pt")
    result = model.predict("image.jpg")      # result.boxes, result.scores, result.names
    queryvision.train("detection", steps=500)

Names are imported when they are first used, so that `qv --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from queryvision.commands import convert as convert
    from queryvision.commands import evaluate as evaluate
    from queryvision.commands import predict as predict
    from queryvision.inference.predictor import load as load
    from queryvision.profiling import profile as profile
    from queryvision.results import Result as Result
    from queryvision.runs import train as train
    from queryvision.tracing import trace as trace

_HOMES = {
    "load": "queryvision.inference.predictor",
    "train": "queryvision.runs",
    "evaluate": "queryvision.commands",
    "predict": "queryvision.commands",
    "convert": "queryvision.commands",
    "trace": "queryvision.tracing",
    "profile": "queryvision.profiling",
    "Result": "queryvision.results",
}
__all__ = [*sorted(_HOMES), "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"queryvision has no '{name}', only {', '.join(sorted(_HOMES))}")
