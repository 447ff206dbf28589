"""Annotations that follow their image: what is left of them once it was cropped, resized or mirrored.

Letters: n objects, r ignore regions, m survivors among both, C classes, K keypoints. Numbers count objects first, then ignore
regions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.data.sample import Annotations
from queryvision.errors import ConfigError

SMALLEST_SIDE = 0.01  # px; an object of which less is left is gone


def rebuilt(
    old: Annotations,
    number: NDArray[Any],
    boxes: NDArray[Any],
    points: NDArray[Any],
    masks: Callable[[NDArray[Any]], NDArray[Any]],
    scale: float,
    size: tuple[int, int],
    flip_orders: NDArray[Any] | None = None,
) -> Annotations:
    """What is known about the new image.

    Boxes are clipped to it. Where an object was cut and has a mask, its box and area are those of what is left of the mask.

    Args:
        old: the annotations before.
        number: (m,) int64, which of the n+r are left.
        boxes: (m,4) theirs, x1 y1 x2 y2 in px of the new image.
        points: (n*K,2) x y of all old keypoints in px of the new image.
        masks: numbers (i,) -> their masks (i,H,W) uint8 in the new image; called only where there are masks.
        scale: by how much areas grew; negative: mirrored.
        size: height, width of the new image.
        flip_orders: (C,K) int64, which keypoint stands in each one's place in a mirrored image; None: not known.

    Raises:
        ConfigError: keypoints were mirrored, but it is not known which swap.
    """
    n = len(old.labels)
    boxes = np.clip(boxes, 0, [*size[::-1]] * 2).astype(np.float32)
    keep, kept, ignored = number[number < n], boxes[number < n], number[number >= n] - n
    share = _area(kept) / np.maximum(_area(old.boxes[keep]) * abs(scale), 1e-9)
    new = Annotations(
        labels=old.labels[keep],
        boxes=kept,
        areas=(old.areas[keep] * abs(scale) * np.minimum(share, 1)).astype(np.float32),
        ids=old.ids[keep],
        extra={key: value[keep] for key, value in old.extra.items()},
        has={key: value[keep] for key, value in old.has.items()},
        ignore_boxes=boxes[number >= n],
        ignore_labels=old.ignore_labels[ignored],
        covers=old.covers,
        stuff=None if old.stuff is None else old.stuff[keep],
    )
    if old.keypoints is not None:
        keypoints, seen = _keypoints(old, points, scale < 0, size, flip_orders)
        new.keypoints, new.has["keypoints"] = keypoints[keep], seen[keep]
    if old.masks is not None:
        new.masks = masks(keep)
        new.ignore_masks = None if old.ignore_masks is None else masks(ignored + n)
        return follow_masks(new, cut=share < 0.999)
    return new


def select(annotations: Annotations, keep: NDArray[Any]) -> Annotations:
    """Some of the objects, (n,) bool or indices; ignore regions stay."""
    rows = {name: getattr(annotations, name) for name in ("labels", "boxes", "areas", "ids", "masks", "keypoints", "stuff")}
    chosen = {name: value[keep] for name, value in rows.items() if value is not None}
    extra = {key: value[keep] for key, value in annotations.extra.items()}
    return replace(annotations, **chosen, extra=extra, has={key: value[keep] for key, value in annotations.has.items()})


def follow_masks(annotations: Annotations, cut: NDArray[Any]) -> Annotations:
    """Lets boxes and areas of cut objects (n,) bool follow their masks; drops those of which nothing is left."""
    masks, boxes, areas = annotations.masks, annotations.boxes.copy(), annotations.areas.copy()
    assert masks is not None
    has = annotations.has.get("masks", np.ones(len(cut), bool))
    seen = masks.any((1, 2))
    for i in np.flatnonzero(cut & has & seen):
        columns, rows = np.flatnonzero(masks[i].any(0)), np.flatnonzero(masks[i].any(1))
        boxes[i] = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        areas[i] = masks[i].sum()
    # An object that merely became too small for a pixel keeps its box, and says that it has no mask. A segment is its pixels.
    annotations = replace(annotations, boxes=boxes, areas=areas, has={**annotations.has, "masks": has & seen})
    gone = has & ~seen & (cut | (annotations.stuff is not None))
    return select(annotations, ~gone) if gone.any() else annotations


def _keypoints(
    old: Annotations, points: NDArray[Any], mirrored: bool, size: tuple[int, int], flip_orders: NDArray[Any] | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(n,K,3) and (n,K) bool; what is unlabelled or outside becomes 0, 0, 0."""
    assert old.keypoints is not None
    keypoints = old.keypoints.copy()
    keypoints[:, :, :2] = points.reshape(*keypoints.shape[:2], 2)
    has = old.has.get("keypoints", np.ones(keypoints.shape[:2], bool)) & (keypoints[:, :, 2] > 0)
    if mirrored:
        if flip_orders is None:
            raise ConfigError("a step mirrors images with keypoints; give flip_orders, or leave the step out")
        order = np.tile(np.arange(keypoints.shape[1]), (len(keypoints), 1))
        width = min(order.shape[1], flip_orders.shape[1])
        order[:, :width] = flip_orders[old.labels, :width]
        rows = np.arange(len(order))[:, None]
        keypoints, has = keypoints[rows, order], has[rows, order]
    x, y = keypoints[:, :, 0], keypoints[:, :, 1]
    has = has & (x >= 0) & (y >= 0) & (x <= size[1]) & (y <= size[0])
    keypoints[~has] = 0
    return keypoints, has


def _area(boxes: NDArray[Any]) -> NDArray[Any]:
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
