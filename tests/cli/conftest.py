"""A tiny data set and the command line in a process of its own or in this one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from queryvision.data.scenes import make_scenes

TINY = (
    "--set", "model.name=detr", "--set", "model.backbone=resnet18", "--set", "model.width=32", "--set", "model.num_heads=4",
    "--set", "model.ffn_width=64", "--set", "model.encoder_layers=1", "--set", "model.decoder_layers=2",
    "--set", "model.num_queries=12", "--image-size", "64", "--batch-size", "4", "--weights", "none",
)  # fmt: skip
"""Flags of a model that trains a step in a tenth of a second."""


@pytest.fixture(scope="session")
def drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes"), train=12, val=6, size=64)


@pytest.fixture
def scenes(drawn_once: Path, tmp_path: Path) -> Path:
    """A copy of a drawn data set that a test may spoil."""
    return Path(shutil.copytree(drawn_once, tmp_path / "scenes"))


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def qv() -> Run:
    """Runs the command line in a process of its own."""

    def run(*words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "queryvision.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)

    return run
