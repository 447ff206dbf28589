"""Samples that tests share."""

from __future__ import annotations

import torch

from queryvision.structures import Targets


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
