"""Images and annotations of a data set in arrays: no Python object an annotation.

A list of Python objects is copied page by page into every loader process as soon as it is read; an array is not.

Letters: n images, a annotations, C classes, K keypoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ImageTable:
    """The images of a file."""

    ids: NDArray[Any]  # (n,) int64
    names: NDArray[Any]  # (n,) str
    sizes: NDArray[Any]  # (n,2) int32 height, width
    covers: NDArray[Any] | None = None  # (n,C) bool; None: every image is annotated for every class

    def take(self, images: NDArray[Any]) -> ImageTable:
        """Some of the images, (m,) int64, in that order."""
        covers = None if self.covers is None else self.covers[images]
        return ImageTable(self.ids[images], self.names[images], self.sizes[images], covers)


@dataclass(frozen=True)
class Objects:
    """The checked annotations of a file, sorted by image; those of image i are rows offsets[i]..offsets[i+1]."""

    offsets: NDArray[Any]  # (n+1,) int64
    rows: NDArray[Any]  # (a,) int64 position in the file's list
    ids: NDArray[Any]  # (a,) int64
    labels: NDArray[Any]  # (a,) int64 0..C-1
    boxes: NDArray[Any]  # (a,4) float32 x1 y1 x2 y2 px, inside the image
    areas: NDArray[Any]  # (a,) float32 px, as published
    crowd: NDArray[Any]  # (a,) bool
    keypoints: NDArray[Any] | None = None  # (a,K,3) float32 x, y, visibility
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)  # {key: (a,...) float32}
    has: dict[str, NDArray[Any]] = field(default_factory=dict)  # {key: (a,) bool}
    segments: bytes | None = None  # the segmentations as json, end to end
    segment_ends: NDArray[Any] | None = None  # (a+1,) int64: annotation i is segments[ends[i]:ends[i+1]]

    def take(self, images: NDArray[Any]) -> Objects:
        """The annotations of some images, (m,) int64, in that order."""
        parts = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in images]
        rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        counts = np.diff(self.offsets)[images]
        packed = self._segments(rows)
        return Objects(
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            rows=self.rows[rows],
            ids=self.ids[rows],
            labels=self.labels[rows],
            boxes=self.boxes[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
            keypoints=None if self.keypoints is None else self.keypoints[rows],
            extra={key: value[rows] for key, value in self.extra.items()},
            has={key: value[rows] for key, value in self.has.items()},
            segments=packed[0],
            segment_ends=packed[1],
        )

    def segment(self, row: int) -> Any:
        """The segmentation of one annotation, as published; None where it has none."""
        assert self.segments is not None and self.segment_ends is not None
        return json.loads(self.segments[self.segment_ends[row] : self.segment_ends[row + 1]])

    def _segments(self, rows: NDArray[Any]) -> tuple[bytes | None, NDArray[Any] | None]:
        if self.segments is None or self.segment_ends is None:
            return None, None
        return pack([self.segments[self.segment_ends[i] : self.segment_ends[i + 1]] for i in rows])


def pack(texts: Sequence[bytes]) -> tuple[bytes, NDArray[Any]]:
    """Joins texts; text i is joined[ends[i]:ends[i+1]]."""
    ends = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return b"".join(texts), ends
