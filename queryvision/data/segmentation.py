"""COCO segmentations (polygons, run lengths) -> masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask


def flaw(segmentation: Any, size: tuple[int, int]) -> str | None:
    """Says what is wrong with a segmentation, None if nothing is.

    Args:
        segmentation: polygons [[x,y,x,y,x,y,...], ...], or run lengths {"size": [h,w], "counts": list or str}.
        size: height, width of its image in px.
    """
    if isinstance(segmentation, dict):
        return _run_flaw(segmentation, size)
    if not isinstance(segmentation, list):
        return f"segmentation is a {type(segmentation).__name__}"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "polygon without 3 or more x, y pairs"
        try:
            finite = bool(np.isfinite(np.asarray(polygon, np.float64)).all())
        except (TypeError, ValueError):
            return "polygon with something that is no number"
        if not finite:
            return "polygon with a number that is not finite"
    return None


def _run_flaw(runs: dict[str, Any], size: tuple[int, int]) -> str | None:
    counts = runs.get("counts")
    if runs.get("size") != list(size):
        return f"run lengths of size {runs.get('size')}, image {list(size)}"
    if isinstance(counts, str):
        return None
    if not isinstance(counts, list) or not all(isinstance(c, int) and c >= 0 for c in counts):
        return "run lengths without counts"
    return None if sum(counts) == size[0] * size[1] else "run lengths that do not add up to the image"


def rasterise(segmentations: Sequence[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Draws segmentations.

    Args:
        segmentations: n of them; None or empty where an object has none.
        size: height, width in px.

    Returns:
        (n,H,W) uint8, 1 inside.
    """
    masks = np.zeros((len(segmentations), *size), np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        if segmentation:
            mask[:] = coco_mask.decode(_runs(segmentation, size))  # one by one: all at once would take twice the memory
    return masks


def _runs(segmentation: Any, size: tuple[int, int]) -> Any:
    height, width = size
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return {"size": [height, width], "counts": segmentation["counts"].encode()}
