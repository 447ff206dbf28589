"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

Metrics = dict[str, float]


@dataclass
class Progress:
    """Where a run stands; all of it travels in `last.pt`."""

    step: int = 0
    seconds: float = 0.0  # of training, evaluation apart
    best: float | None = None
    best_metrics: Metrics = field(default_factory=dict)
    skipped: int = 0  # unreadable images met
    sums: dict[str, Tensor] = field(default_factory=dict)  # losses since the last line of the log
    summed: int = 0  # steps in them
    owed: Metrics | None = None  # losses of a step whose evaluation failed: it is made up for on resuming


LOGGED = ("seconds", "best", "skipped", "sums", "summed", "owed")
"""Fields of `Progress` that stand under `log` in a checkpoint."""
