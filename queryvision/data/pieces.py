"""Parts of samples: cut out and resized, put somewhere else, joined to one image's annotations.

What `Transform` does by albumentations is done here directly: the parts of a mosaic differ from call to call.

Letters: n objects, r ignore regions, K keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.data.follow import SMALLEST_SIDE, follow_masks, rebuilt, select
from queryvision.data.resizing import resize_masks, resize_quickly
from queryvision.data.sample import Annotations, Sample


def cut(sample: Sample, part: tuple[int, int, int, int], size: tuple[int, int]) -> Sample:
    """Cuts out a part and resizes it.

    Objects are clipped, and those of which nothing is left are dropped, as in `Transform`.

    Args:
        sample: the whole.
        part: y1, x1, y2, x2 in px, inside the image.
        size: height, width of the result in px.
    """
    old = sample.annotations
    y1, x1, y2, x2 = part
    scale, corner = np.array([size[1] / (x2 - x1), size[0] / (y2 - y1)]), np.array([x1, y1])
    boxes = np.concatenate([old.boxes, old.ignore_boxes]).astype(np.float64)
    boxes = np.clip((boxes - np.tile(corner, 2)) * np.tile(scale, 2), 0, [*size[::-1]] * 2)
    number = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= SMALLEST_SIDE).all(1))
    points = np.zeros((0, 2)) if old.keypoints is None else (old.keypoints[:, :, :2].reshape(-1, 2) - corner) * scale

    def masks(rows: NDArray[Any]) -> NDArray[Any]:
        return resize_masks([mask_of(old, int(row))[y1:y2, x1:x2] for row in rows], size)

    new = rebuilt(old, number, boxes[number], points, masks, float(scale[0] * scale[1]), size)
    return replace(sample, image=resize_quickly(sample.image[y1:y2, x1:x2], size), annotations=new)


def mask_of(annotations: Annotations, number: int) -> NDArray[Any]:
    """(H,W) uint8 of an object, or, from n on, of an ignore region."""
    assert annotations.masks is not None
    n = len(annotations.labels)
    if number < n:
        return np.asarray(annotations.masks[number])
    assert annotations.ignore_masks is not None
    return np.asarray(annotations.ignore_masks[number - n])


def placed(annotations: Annotations, corner: tuple[int, int], size: tuple[int, int]) -> Annotations:
    """Moves annotations into a larger image.

    Args:
        annotations: of the piece.
        corner: y, x of the piece's top left corner there, px.
        size: height, width of the larger image, px.
    """
    y, x = corner
    shift = np.array([x, y, x, y], np.float32)
    moved = replace(annotations, boxes=annotations.boxes + shift, ignore_boxes=annotations.ignore_boxes + shift)
    if annotations.keypoints is not None:
        moved.keypoints = annotations.keypoints + np.array([x, y, 0], np.float32)
        seen = annotations.has.get("keypoints", np.ones(moved.keypoints.shape[:2], bool))
        moved.keypoints[~(seen & (moved.keypoints[:, :, 2] > 0))] = 0
    for name in ("masks", "ignore_masks"):
        masks = getattr(annotations, name)
        if masks is not None:
            whole = np.zeros((len(masks), *size), np.uint8)
            whole[:, y : y + masks.shape[1], x : x + masks.shape[2]] = masks
            setattr(moved, name, whole)
    return moved


def joined(parts: Sequence[Annotations]) -> Annotations:
    """The annotations of one image, from those of its parts in the same pixels; they cover the classes all parts cover.

    Stuff of one class is one segment, whichever parts it comes from.
    """
    covers = [part.covers for part in parts if part.covers is not None]
    names = ["labels", "boxes", "areas", "ids", "masks", "keypoints", "ignore_boxes", "ignore_labels", "ignore_masks", "stuff"]
    rows = {name: [getattr(part, name) for part in parts] for name in names}
    values: dict[str, Any] = {
        name: None if any(v is None for v in found) else np.concatenate(found) for name, found in rows.items()
    }
    flags = dict.fromkeys(key for part in parts for key in part.has)
    return _merged(
        Annotations(
            **values,
            extra={key: np.concatenate([part.extra[key] for part in parts]) for key in parts[0].extra},
            has={key: np.concatenate([_flags(part, key) for part in parts]) for key in flags},
            covers=np.logical_and.reduce(covers) if covers else None,
        )
    )


def covered(annotations: Annotations, region: NDArray[Any]) -> Annotations:
    """What is left where something else lies over a region (H,W) bool: masks lose its pixels, boxes and areas follow.

    An object of which no pixel is left is dropped. Where there are no masks, all stays as it is.
    """
    if annotations.masks is None or not region.any():
        return annotations
    cut = np.array([bool(mask[region].any()) for mask in annotations.masks], bool)
    masks = annotations.masks.copy()
    masks[:, region] = 0
    return follow_masks(replace(annotations, masks=masks), cut)


def _merged(annotations: Annotations) -> Annotations:
    """Makes one segment of several of the same stuff; writes into the arrays."""
    labels, stuff = annotations.labels, annotations.stuff
    if stuff is None:
        return annotations
    keep = np.ones(len(labels), bool)
    for label in np.unique(labels[stuff]):
        first, *others = np.flatnonzero(stuff & (labels == label))
        for row in others:
            low, high = annotations.boxes[[first, row], :2].min(0), annotations.boxes[[first, row], 2:].max(0)
            annotations.boxes[first] = np.concatenate([low, high])
            annotations.areas[first] += annotations.areas[row]
            if annotations.masks is not None:
                annotations.masks[first] |= annotations.masks[row]
        for flags in annotations.has.values():
            flags[first] |= flags[others].any(0)
        keep[others] = False
    return annotations if keep.all() else select(annotations, keep)


def _flags(annotations: Annotations, key: str) -> NDArray[Any]:
    """(n,) or (n,K) bool; where nothing is said, all have it."""
    given = annotations.has.get(key)
    if given is not None:
        return given
    shape = annotations.labels.shape
    if key == "keypoints" and annotations.keypoints is not None:
        shape = annotations.keypoints.shape[:2]
    return np.ones(shape, bool)
