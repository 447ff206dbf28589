"""How many images fit: what a step keeps decides, and nothing is moved by the trial."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_recomputation import model
from toys import images, make_targets

from queryvision.criterion import Criterion
from queryvision.engine import memory
from queryvision.engine.memory import images_that_fit, kept
from queryvision.structures import Batch


def batch(count: int) -> Batch:
    return Batch(images(count, 64, 64), make_targets((2,) * count))


def test_images_fit_as_long_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = model(frozen_norm=False)
    before = {name: value.clone() for name, value in tried.state_dict().items()}
    criterion = Criterion(tried.heads.heads(), tried.steering)
    one, two, eight = (kept(tried, criterion, batch(count)) for count in (1, 2, 8))
    assert eight == pytest.approx(one + 7 * (two - one), rel=0.05)  # what is measured of two small ones is true of a large one
    fixed = memory.PARAMETER * sum(p.numel() for p in tried.parameters())
    for room, wanted in ((1.01 * eight, 8), (0.8 * eight, 4), (0.1 * one, 1), (1e15, memory.MOST)):
        free = (fixed + memory.BESIDE * room) / memory.SHARE
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: int(free))
        assert images_that_fit(tried, criterion, batch, torch.device("cpu")) == wanted
    assert all(torch.equal(value, before[name]) for name, value in tried.state_dict().items())
    assert all(p.grad is None for p in tried.parameters())


def test_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e8 < memory.free_memory(torch.device("cpu")) < 1e14
    monkeypatch.setattr(memory, "_allowed", lambda: [8e6, 4e6])
    assert memory.free_memory(torch.device("cpu")) == 4e6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory(torch.device("cpu")) == 1e6


def test_a_container_may_have_less_than_its_host(tmp_path: Path) -> None:
    """Limits of all control groups around a process; pages of files that nobody needs are not taken."""
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    (tmp_path / "fs" / "job" / "step").mkdir(parents=True)
    for folder, limit, used, files in (("job/step", "max", 500, 0), ("job", "1000", 700, 200)):
        group = tmp_path / "fs" / folder
        for name, text in (("max", limit), ("current", str(used)), ("stat", f"anon 9\ninactive_file {files}\n")):
            (group / f"memory.{name}").write_text(text)
    assert memory._allowed(tmp_path / "fs", own) == [math.inf, 500]
    assert memory._allowed(tmp_path / "fs", tmp_path / "none") == [math.inf]
