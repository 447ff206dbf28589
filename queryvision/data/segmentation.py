"""COCO segmentations (polygons, run lengths) -> masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

REACH = 10  # longer image sides; pycocotools walks along an outline point by point, and a vertex at 1e8 ends the process


def sound(segmentation: Any, size: tuple[int, int]) -> tuple[Any, str | None]:
    """The part of a segmentation that can be drawn.

    Args:
        segmentation: polygons [[x,y,x,y,x,y,...], ...], or run lengths {"size": [h,w], "counts": list or str}.
        size: height, width of its image in px.

    Returns:
        The segmentation without its bad polygons, None where nothing is good; and what is wrong, None if nothing is.
    """
    if isinstance(segmentation, dict):
        flaw = _run_flaw(segmentation, size)
        return (segmentation if flaw is None else None), flaw
    if not isinstance(segmentation, list):
        return None, f"segmentation is a {type(segmentation).__name__}"
    flaws = [_polygon_flaw(polygon, size) for polygon in segmentation]
    wrong = [flaw for flaw in flaws if flaw is not None]
    if not wrong:
        return segmentation, None
    good = [polygon for polygon, flaw in zip(segmentation, flaws, strict=True) if flaw is None]
    return (good, f"{len(wrong)} of {len(flaws)} polygons left out: {wrong[0]}") if good else (None, wrong[0])


def measure(segmentation: Any, size: tuple[int, int]) -> list[float] | None:
    """The box x, y, width, height (px) of a segmentation, None where nothing of it is good; arguments as in `sound`."""
    good, _ = sound(segmentation, size)
    if not good:
        return None
    if isinstance(good, dict):
        return [float(value) for value in coco_mask.toBbox(_runs(good, size))]
    points = np.concatenate([np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in good])
    low, high = points.min(0), points.max(0)
    return [*low.tolist(), *(high - low).tolist()]


def _polygon_flaw(polygon: Any, size: tuple[int, int]) -> str | None:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return "polygon without 3 or more x, y pairs"
    try:
        values = np.array(polygon)
    except ValueError:
        values = np.zeros(0, object)
    if values.ndim != 1 or values.dtype.kind not in "if":
        return "polygon with something that is no number"
    limit = REACH * max(size)
    if -limit <= values.min() and values.max() <= limit:  # not so if there is a NaN
        return None
    if not np.isfinite(values).all():
        return "polygon with a number that is not finite"
    far = values[np.abs(values.astype(np.float64)).argmax()]
    return f"polygon with the coordinate {far:g}, far outside of an image {size[1]} wide and {size[0]} high"


def _run_flaw(runs: dict[str, Any], size: tuple[int, int]) -> str | None:
    if runs.get("size") != list(size):
        return f"run lengths of size {runs.get('size')}, image {list(size)}"
    counts = runs.get("counts")
    found = _counts(counts) if isinstance(counts, str) else counts
    if isinstance(found, list):
        found = np.array(found, np.int64) if all(isinstance(c, int) and abs(c) < 2**31 for c in found) else None
    if not isinstance(found, np.ndarray) or found.min(initial=0) < 0:
        return "run lengths without counts that can be read"
    return None if found.sum() == size[0] * size[1] else "run lengths that do not add up to the image"


def _counts(text: str) -> NDArray[Any] | None:
    """The numbers in compressed run lengths; None if the text is damaged.

    As pycocotools:common/maskApi.c, rleFrString, which reads past the end of a text that is cut off. A character holds 5 bits
    of a number, the lowest first, and whether more follow; the highest is the sign. Numbers from the fourth on are differences
    to the last but one.
    """
    if not text.isascii():
        return None
    digits = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(digits < 32)
    if not len(last) or last[-1] + 1 < len(digits) or digits.min() < 0 or digits.max() > 63:
        return None
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 7:  # more than 32 bits
        return None
    shifts = 5 * (np.arange(len(digits)) - np.repeat(first, lengths))
    counts = np.add.reduceat((digits & 31) << shifts, first)
    counts -= (digits[last] >> 4) << (5 * lengths)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


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
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": counts.encode()}
