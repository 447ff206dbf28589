"""The clock around the parts of a step."""

from __future__ import annotations

import time

import pytest
import torch

from queryvision.timing import Clock, untimed


def test_a_part_inside_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock("loss"):
            now[0] += 1
            with clock("assignment"):
                now[0] += 4
                with clock("host"):
                    now[0] += 16
            now[0] += 64
    assert clock.seconds == {"loss": 130, "assignment": 8, "host": 32}


def test_a_part_that_fails_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    with pytest.raises(ValueError, match="bad"), clock("outer"):
        now[0] += 1
        with clock("inner"):
            now[0] += 2
            raise ValueError("bad")
    with clock("next"):
        now[0] += 4
    assert clock.seconds == {"outer": 1, "inner": 2, "next": 4}


def test_nobody_asks() -> None:
    with untimed("forward") as nothing:
        assert nothing is None
