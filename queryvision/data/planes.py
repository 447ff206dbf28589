"""Masks eight to a byte, while they are cropped, mirrored and resized.

Sixty masks of a photograph are as large as twenty photographs. Steps that only move pixels, nearest ones where they resize,
do the same to each bit of a byte; so all masks go through in an eighth of the memory, and only survivors are built afterwards.

Letters: n masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def packed(masks: Sequence[NDArray[Any]], size: tuple[int, int]) -> NDArray[Any]:
    """Masks, n of (H,W) uint8 0/1 -> planes (n/8 rounded up,H,W) uint8; bit i % 8 of plane i // 8 is mask i."""
    planes = np.zeros((-(-len(masks) // 8), *size), np.uint8)
    for i, mask in enumerate(masks):
        planes[i // 8] |= mask << np.uint8(i % 8)
    return planes


def unpacked(planes: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Some of the masks, (i,) int64 -> (i,H,W) uint8 0/1."""
    masks = np.empty((len(rows), *planes.shape[1:]), np.uint8)
    for mask, row in zip(masks, rows.tolist(), strict=True):
        np.bitwise_and(planes[row // 8] >> np.uint8(row % 8), 1, out=mask)
    return masks
