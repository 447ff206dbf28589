"""The programs in docs/research.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "research.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def run(program: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("QUERYVISION_CACHE", str(cache))
    space: dict[str, Any] = {"__name__": "guide"}
    exec(compile(program, str(GUIDE), "exec"), space)
    return space


def test_our_model_in_a_foreign_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = run(PROGRAMS[0], tmp_path, monkeypatch)
    assert bool(torch.isfinite(space["losses"].total)) and len(space["fields"]["masks"]) == 2


def test_a_foreign_decoder_under_our_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = run(PROGRAMS[1], tmp_path, monkeypatch)
    history = space["history"]
    assert sum(history[-5:]) < 0.8 * sum(history[:5])
    targets = space["batch"].targets
    assert len(space["pairs"].query) == 2 * sum(targets.counts)
    body = PROGRAMS[1].split("\n\n\n")
    assert len(PROGRAMS) == 2 and len(body[1].strip().splitlines()) + len(body[2].strip().splitlines()) <= 60
