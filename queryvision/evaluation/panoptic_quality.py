"""Panoptic quality (Kirillov et al., arXiv 1801.00868) and mean IoU: counts of an image, and the numbers made of their sums.

The rules are those of `panopticapi` (`evaluation.py`), the numbers the same to the last digit.

Letters: G segments of the ground truth, k found segments, C categories, H, W pixels, r runs, e events, m pairs of values.
A class is the index of a category in the `ClassMap` of the ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.data.classes import ClassMap

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
VOID = 0
"""Id of pixels that no segment of the ground truth describes: they never count."""
EVENT = ("class", "tp", "fp", "fn", "iou")
"""Columns of an event: something found, invented or missed; `iou` is 0 unless found."""
GROUPS: dict[str, bool | None] = {"": None, "_th": True, "_st": False}


def runs(*maps: NDArray[Any]) -> tuple[list[NDArray[Any]], Integers]:
    """Cuts maps (H,W) of one size, row behind row, into runs along which none of them changes.

    Maps of segments are made of long runs, and everything that is counted is counted in runs.

    Returns:
        (r,) of each map, and (r,) pixels.
    """
    flat = [each.ravel() for each in maps]
    changes = np.ones(len(flat[0]), bool)
    changes[1:] = flat[0][1:] != flat[0][:-1]
    for each in flat[1:]:
        changes[1:] |= each[1:] != each[:-1]
    starts = np.flatnonzero(changes)
    return [each[starts] for each in flat], np.diff(starts, append=len(changes))


def places(truth: Sequence[Mapping[str, Any]], ids: NDArray[Any]) -> Integers:
    """Which of G rows of `segments_info` an id means: 1 + its number, 0 void, 1 + G where nobody explains it; (r,) of each."""
    known = np.array([VOID, *(int(row["id"]) for row in truth)], np.int64)
    order = np.argsort(known, kind="stable")
    found = order[np.searchsorted(known, ids, sorter=order).clip(max=len(truth))]
    return np.where(known[found] == ids, found, len(known))


def contingency(first: Integers, second: Integers, pixels: Integers, shape: tuple[int, int]) -> Array:
    """Counts pixels by two numbers below `shape`, (r,) of each run, with its pixels -> `shape`."""
    size = shape[0] * shape[1]
    counts: Array = np.bincount(first * shape[1] + second, weights=pixels, minlength=size).astype(np.float64)
    return counts.reshape(shape)


def judge_segments(truth: Sequence[Mapping[str, Any]], common: Array, found: Integers, classes: ClassMap) -> Array:
    """Compares the segments of an image.

    A pair matches if the classes agree and the IoU is above 0.5, void left out. Crowds match nothing and are never missed. What
    is found does not count as invented if more than half of it is void or a crowd of its class.

    Args:
        truth: G rows of `segments_info` of known categories: id, category_id, and where they have them area and iscrowd.
        common: (G+2,k+1) pixels by `places` of the ground truth, and by 1 + the number of a found segment, 0: nobody's.
        found: (k,) class of each found segment; each has pixels.
        classes: of the ground truth.

    Returns:
        (e,5) `EVENT`; matches in the order of the ids.
    """
    void, both, size = common[0, 1:], common[1:-1, 1:], common[:, 1:].sum(axis=0)
    kind = np.array([classes.index_of_id[row["category_id"]] for row in truth], np.int64)
    crowd = np.array([bool(row.get("iscrowd")) for row in truth], bool)
    pixels = common[1:-1].sum(axis=1).tolist()
    area = np.array([row.get("area", number) for row, number in zip(truth, pixels, strict=True)], np.float64)
    union = area[:, None] + size - both - void
    iou = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    same = kind[:, None] == found
    matched = same & ~crowd[:, None] & (iou > 0.5)
    crowds = {int(k): i for i, k in enumerate(kind) if crowd[i]}  # of several the last, as published
    ignored = void + np.array([both[crowds[k], j] if k in crowds else 0.0 for j, k in enumerate(found.tolist())])
    invented = ~matched.any(axis=0) & (ignored <= 0.5 * size)
    missed = ~matched.any(axis=1) & ~crowd
    right, which = np.nonzero(matched)
    order = np.argsort([truth[i]["id"] for i in right])  # sums of floating point numbers depend on it
    hits = _events(kind[right], 1, iou[right, which])[order.astype(np.int64)]
    return np.concatenate([hits, _events(found[invented], 2), _events(kind[missed], 3)])


def _events(kinds: Integers, column: int, iou: Array | float = 0.0) -> Array:
    rows = np.zeros((len(kinds), len(EVENT)))
    rows[:, 0], rows[:, column], rows[:, 4] = kinds, 1, iou
    return rows


def judge_pixels(truth: Sequence[Mapping[str, Any]], common: Array, classes: ClassMap) -> Integers:
    """Counts pixels by what they are and what they are taken for; void is left out, crowds have their class.

    Args:
        truth: G rows of `segments_info` of known categories.
        common: (G+2,C+1) pixels by `places` of the ground truth, and by found class, C: none.
        classes: C, of the ground truth.

    Returns:
        (m,3) class, found class 0..C, pixels.
    """
    kinds = np.array([classes.index_of_id[row["category_id"]] for row in truth], np.int64)
    where, taken = np.nonzero(common[1:-1])
    return np.stack([kinds[where], taken, common[1 + where, taken].astype(np.int64)], 1)


def summary(totals: Array, confusion: Array, classes: ClassMap) -> dict[str, float]:
    """The named numbers, 0..1, or -1 where there is nothing of the kind.

    Args:
        totals: (C,4) sums of `EVENT` by class, without the class.
        confusion: (C,C+1) pixels by class and found class, C: none.
        classes: C, of the ground truth.

    Returns:
        `PQ`, `SQ`, `RQ` of all classes, things (`_th`) and stuff (`_st`): means over the classes that occur or were found;
        `mIoU`: mean over the classes that occur; `PQ/<name>` and `IoU/<name>` of these classes.
    """
    tp, fp, fn, iou = totals.T
    occurs = tp + fp + fn > 0
    weight = np.where(occurs, tp + 0.5 * fp + 0.5 * fn, 1)
    values = {"PQ": iou / weight, "SQ": iou / np.where(tp > 0, tp, 1), "RQ": tp / weight}
    things = np.array(classes.things, bool)
    numbers: dict[str, float] = {}
    for suffix, wanted in GROUPS.items():
        chosen = occurs if wanted is None else occurs & (things == wanted)
        numbers |= {f"{name}{suffix}": _mean(each[chosen]) for name, each in values.items()}
    pixels = confusion.sum(axis=1)
    right = confusion.diagonal()
    known = pixels > 0
    overlap = right / np.where(known, pixels + confusion[:, :-1].sum(axis=0) - right, 1)
    numbers["mIoU"] = _mean(overlap[known])
    numbers |= {f"PQ/{name}": float(values["PQ"][i]) for i, name in enumerate(classes.names) if occurs[i]}
    return numbers | {f"IoU/{name}": float(overlap[i]) for i, name in enumerate(classes.names) if known[i]}


def _mean(values: Array) -> float:
    return sum(values.tolist()) / len(values) if len(values) else -1.0  # added one by one, as the published code does
