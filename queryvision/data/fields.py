"""Columns of a json list -> arrays, with a flag for every entry that is not what it should be.

Letters: a entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_number(value: Any) -> bool:
    """An int or a float, possibly NaN; no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def integers(values: Sequence[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Whole numbers (a,) int64, 0 where an entry is none, and (a,) bool whether it is one."""
    array = np.zeros(len(values), np.int64)
    good = np.zeros(len(values), bool)
    for i, value in enumerate(values):
        if is_number(value) and math.isfinite(value) and value == int(value) and abs(value) < 2**62:
            array[i], good[i] = int(value), True
    return array, good


def numbers(values: Sequence[Any], size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lists of `size` numbers (a,size) float64, possibly not finite, and (a,) bool whether an entry is such a list."""
    try:
        array = np.array(values)  # the usual case at once: all entries are good
        if array.shape == (len(values), size) and array.dtype.kind in "if":
            return array.astype(np.float64), np.ones(len(values), bool)
    except ValueError:
        pass
    array = np.zeros((len(values), size), np.float64)
    good = np.zeros(len(values), bool)
    for i, value in enumerate(values):
        if isinstance(value, list) and len(value) == size and all(map(is_number, value)):
            array[i], good[i] = value, True
    return array, good


def finite_rows(values: Sequence[Any], shape: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Numbers or lists of numbers of one shape -> (a,*shape) float32, 0 where an entry is not, and (a,) bool."""
    array = np.zeros((len(values), *shape), np.float32)
    good = np.zeros(len(values), bool)
    for i, value in enumerate(values):
        row = value if isinstance(value, list) else [value]
        if (shape == () or isinstance(value, list)) and all(map(is_number, row)) and np.shape(value) == shape:
            array[i] = value
            good[i] = bool(np.isfinite(array[i]).all())
    array[~good] = 0
    return array, good


def keypoint_rows(values: Sequence[Any], counts: NDArray[Any], most: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Flat x, y, visibility lists -> (a,most,3) float32, and (a,) bool whether an entry is sound.

    Args:
        values: a lists; only the first 3 x counts[i] numbers of entry i are read.
        counts: (a,) int64 keypoints of each.
        most: K, the largest count.
    """
    array = np.zeros((len(values), most, 3), np.float32)
    good = np.ones(len(values), bool)
    for i in np.flatnonzero(counts > 0):
        row, readable = numbers([values[i]], 3 * int(counts[i]))
        row = row.reshape(-1, 3)
        good[i] = readable[0] and bool(np.isfinite(row).all()) and bool(np.isin(row[:, 2], (0, 1, 2)).all())
        if good[i]:
            array[i, : counts[i]] = row
    return array, good
