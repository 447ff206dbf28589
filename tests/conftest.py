"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: for tiny tensors, more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_targets() -> Callable[..., Targets]:
    """Targets of a batch from lists of labels and boxes (cx cy w h, 0..1)."""
    return targets_of


def targets_of(
    labels: list[list[int]], boxes: list[list[list[float]]] | None = None, num_classes: int = 5, seed: int = 0
) -> Targets:
    """Padded targets; boxes are drawn at random where none are given."""
    counts = tuple(len(x) for x in labels)
    batch, most = len(counts), max(counts, default=0)
    generator = torch.Generator().manual_seed(seed)
    centres, sizes = torch.rand(batch, most, 2, generator=generator), torch.rand(batch, most, 2, generator=generator)
    chosen = torch.cat((0.3 + 0.4 * centres, 0.05 + 0.4 * sizes), -1)
    padded = torch.zeros(batch, most, dtype=torch.long)
    for index, row in enumerate(labels):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        if boxes is not None and row:
            chosen[index, : len(row)] = torch.tensor(boxes[index])
    valid = torch.arange(most)[None] < torch.tensor(counts)[:, None]
    return Targets(
        values={"labels": padded, "boxes": chosen * valid[..., None]},
        counts=counts,
        valid=valid,
        has={"labels": valid.clone(), "boxes": valid.clone()},
        num_with={"labels": counts, "boxes": counts},
        covers=torch.ones(batch, num_classes, dtype=torch.bool),
        covers_all=True,
        sizes=torch.full((batch, 2), 100),
        ignore_boxes=torch.zeros(batch, 0, 4),
        image_ids=tuple(range(batch)),
    )
