"""Fixtures for all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run side by side, and tiny tensors want no company

from collections.abc import Callable
from pathlib import Path

import pytest
from samples import targets_of

from queryvision.structures import Targets

SHARED = Path(os.environ.get("QUERYVISION_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Path of a real data set; the test is skipped where it is missing."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.is_dir():
            pytest.skip(f"real data set '{name}' is not on this machine (QUERYVISION_TEST_DATA)")
        return path

    return find


@pytest.fixture
def make_targets() -> Callable[..., Targets]:
    """Targets of a batch from lists of labels and boxes (cx cy w h, 0..1)."""
    return targets_of
