"""How long the named parts of a training step take; nobody pays for it where nobody asks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

Timer = Callable[[str], AbstractContextManager[Any]]
"""Name of a part -> what stands around it."""


def untimed(part: str) -> AbstractContextManager[Any]:
    """Takes no time of anything."""
    return contextlib.nullcontext()


class Clock:
    """Adds up the seconds of parts. A part inside another one is not counted in that.

    Args:
        device: whose work belongs to a part: the host waits for it at both ends, else a GPU's work would count where the host
            happens to wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []  # seconds of the parts inside each open one

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Stands around a part."""
        began = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = self._now() - began
            self.seconds[part] = self.seconds.get(part, 0.0) + took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
