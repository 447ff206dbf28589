"""Nothing in a step waits for the device but the assignment: on meta tensors, which hold no values, every read is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TASKS, trainer_of
from torch import Tensor

from queryvision import matching
from queryvision.engine.trainer import Trainer

META = torch.device("meta")


@pytest.fixture(params=TASKS)
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> Trainer:
    return trainer_of(request.param, tmp_path)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The assignment, the one place that reads what is on the device, gets zeros as its costs."""
    assign = matching.assign

    def without_values(costs: list[Tensor | None], *given: Any) -> list[Any]:
        assert all(cost is None or cost.device == META for cost in costs)
        return assign([None if cost is None else torch.zeros(cost.shape) for cost in costs], *given)

    monkeypatch.setattr(matching, "assign", without_values)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which knows no such device


def test_forward_costs_and_losses_read_nothing(trainer: Trainer, unread: None) -> None:
    batch = next(trainer.batches(0)).to(META)
    outputs = trainer.state.plain.to(META).train()(batch.images, batch.targets)
    losses = trainer.criterion(outputs, batch.targets)
    assert losses.total.device == META and losses.total.requires_grad
    assert len(losses.terms) > 2


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, Tensor.cpu, bool, Tensor.nonzero])
def test_a_read_would_be_seen(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(1, device=META))
    read(torch.ones(1))
