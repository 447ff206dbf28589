"""Where a run stands, and its losses since the last line of the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from queryvision.errors import QueryVisionError

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
    owed: Metrics | None = None  # losses of a step whose evaluation did not end: it is made up for on resuming

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds losses of a micro-batch up, without reading them."""
        for key, value in losses.items():
            known = self.sums.get(key)
            self.sums[key] = value if known is None else known + value

    def means(self, accelerator: Accelerator) -> Metrics:
        """Mean losses a step since the last time; here the host waits for them."""
        sums, count = self.shared(accelerator), self.summed
        self.sums, self.summed = {}, 0
        means = (torch.stack(list(sums.values())) / count).tolist()
        return {n if n == "loss" else f"loss/{n}": value for n, value in zip(sums, means, strict=True)}

    def shared(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """The sums of all processes: each has its share of losses divided by the counts of all."""
        if accelerator.num_processes == 1 or not self.sums:
            return self.sums
        return dict(zip(self.sums, accelerator.reduce(torch.stack(list(self.sums.values())), "sum"), strict=True))


def check_finite(step: int, values: Metrics) -> None:
    """Before anything is saved; the most telling name is the last.

    Raises:
        QueryVisionError: a value is not finite.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise QueryVisionError(
            f"step {step}: {bad[-1]} is not finite; the last checkpoint is kept. Try a lower --lr or --precision fp32"
        )


LOGGED = ("seconds", "best", "skipped", "sums", "summed", "owed")
"""Fields of `Progress` that stand under `log` in a checkpoint."""
