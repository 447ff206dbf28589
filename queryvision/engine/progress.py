"""Where a run stands, and its losses since the last line of the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

Metrics = dict[str, float]


@dataclass
class Progress:
    """Where a run stands; all of it travels in `last.pt`."""

    step: int = 0
    seconds: float = 0.0  # of training, evaluation apart
    best: float | None = None
    best_metrics: Metrics = field(default_factory=dict)
    stale: int = 0  # evaluations since the best
    skipped: int = 0  # unreadable images met
    sums: dict[str, Tensor] = field(default_factory=dict)  # losses since the last line of the log
    summed: Tensor | int = 0  # steps in them
    in_row: int = 0  # steps left out just before
    owed: Metrics | None = None  # losses of a step whose evaluation did not end: it is made up for on resuming

    def add(self, losses: Mapping[str, Tensor], bad: Tensor) -> None:
        """Adds losses of a step up, without reading them, unless it is left out (`bad` is 1)."""
        for key, value in losses.items():
            value = torch.where(bad > 0, 0.0, value)
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.summed = self.summed + 1 - bad

    def means(self, accelerator: Accelerator) -> Metrics:
        """Mean losses a step since the last time, nothing if all steps were left out; here the host waits for them."""
        sums, count = self.shared(accelerator), float(self.summed)
        self.sums, self.summed = {}, 0
        if not count:
            return {}
        means = (torch.stack(list(sums.values())) / count).tolist()
        return {n if n == "loss" else f"loss/{n}": value for n, value in zip(sums, means, strict=True)}

    def shared(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """The sums of all processes: each has its share of losses divided by the counts of all."""
        if accelerator.num_processes == 1 or not self.sums:
            return self.sums
        return dict(zip(self.sums, accelerator.reduce(torch.stack(list(self.sums.values())), "sum"), strict=True))


LOGGED = ("seconds", "best", "stale", "skipped", "sums", "summed", "in_row", "owed")
"""Fields of `Progress` that stand under `log` in a checkpoint."""
