"""One image and what is known about it, before it becomes tensors.

Letters: n objects, r ignore regions, K keypoints, C classes. Pixels are those of `Sample.image`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Annotations:
    """The checked annotations of one image, crowd regions apart (n objects, r regions), in pixels of `Sample.image`."""

    labels: NDArray[Any]  # (n,) int64, contiguous class index 0..C-1
    boxes: NDArray[Any]  # (n,4) float32, x1 y1 x2 y2
    areas: NDArray[Any]  # (n,) float32, the annotation's own area (of the segment, where there is one)
    ids: NDArray[Any]  # (n,) int64, annotation ids
    masks: NDArray[Any] | None = None  # (n,H,W) uint8 0/1; None: not asked for
    keypoints: NDArray[Any] | None = None  # (n,K,3) float32 x, y, visibility (0 unlabelled, 1 hidden, 2 visible)
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)  # {key: (n,...) float32} further keys of the annotations
    has: dict[str, NDArray[Any]] = field(default_factory=dict)  # {field: (n,) or (n,K) bool}; a missing field: all True
    ignore_boxes: NDArray[Any] = field(default_factory=lambda: np.zeros((0, 4), np.float32))  # (r,4) x1 y1 x2 y2
    ignore_labels: NDArray[Any] = field(default_factory=lambda: np.zeros((0,), np.int64))  # (r,)
    ignore_masks: NDArray[Any] | None = None  # (r,H,W) uint8 0/1
    covers: NDArray[Any] | None = None  # (C,) bool: the classes the annotations speak about; None: all
    stuff: NDArray[Any] | None = None  # (n,) bool: regions without instances; None: not panoptic, masks may overlap

    @classmethod
    def empty(cls) -> Annotations:
        """Of an image about which nothing is known."""
        none = np.zeros(0, np.int64)
        return cls(none, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), none)


@dataclass
class Sample:
    """One image and what is known about it."""

    image: NDArray[Any]  # (H,W,3) uint8 RGB
    annotations: Annotations
    image_id: int
    original_size: tuple[int, int]  # height, width of the file's image
    path: str = ""
