"""Checks the annotations of a COCO file, once.

Letters: n images, a annotations, K keypoints.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from queryvision.data import segmentation
from queryvision.data.classes import ClassMap
from queryvision.data.fields import finite_rows, integers, is_number, keypoint_rows, numbers
from queryvision.data.packed import ImageTable, Objects, pack
from queryvision.errors import DataError

BUILT_IN = ("labels", "boxes", "areas", "masks", "keypoints")
INCOMPLETE = ("wrong keypoint count", "malformed keypoints", "malformed polygon")
"""What an object is kept without, so that something is lost of it."""
OVERSHOOT = 1.0  # px; published boxes are rounded, so that a little over the edge is no news


@dataclass(frozen=True)
class Problem:
    """Something wrong with one annotation or one image.

    Attributes:
        file: the annotation file.
        annotation_id: None: the image as a whole, or an annotation without a readable id.
        image: file name of the image; empty where it is unknown.
        message: what is wrong.
        kept: True: repaired and used, False: dropped.
        kind: the message without its numbers, for counting.
    """

    file: str
    annotation_id: int | None
    image: str
    message: str
    kept: bool = False
    kind: str = ""

    def __str__(self) -> str:
        who = "" if self.annotation_id is None else f" annotation {self.annotation_id}:"
        where = f" image {self.image}:" if self.image else ""
        return f"{self.file}:{where}{who} {self.message}{' (kept)' if self.kept else ''}"


class _Check:
    """The annotations of a file while they are checked; `alive` are those with nothing wrong so far."""

    def __init__(self, items: Sequence[Any], images: ImageTable, file: str) -> None:
        self.items = [item if isinstance(item, dict) else {} for item in items]
        self.file, self.images = file, images
        self.alive = np.ones(len(items), bool)
        self.problems: list[Problem] = []
        self.ids, self.has_id = integers(self.column("id"))
        image_ids, readable = integers(self.column("image_id"))
        self.image, self.has_image = look_up(image_ids, images.ids)
        self.has_image &= readable

    def column(self, key: str) -> list[Any]:
        return [item.get(key) for item in self.items]

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of the image of an annotation that has one."""
        height, width = self.images.sizes[self.image[i]]
        return int(height), int(width)

    def note(self, bad: NDArray[Any], kind: str, say: Callable[[int], str] | None = None, kept: bool = True) -> None:
        for i in np.flatnonzero(bad & self.alive):
            id_ = int(self.ids[i]) if self.has_id[i] else None
            name = str(self.images.names[self.image[i]]) if self.has_image[i] else ""
            self.problems.append(Problem(self.file, id_, name, say(int(i)) if say else kind, kept, kind))

    def drop(self, bad: NDArray[Any], kind: str, say: Callable[[int], str] | None = None) -> None:
        self.note(bad, kind, say, kept=False)
        self.alive &= ~bad


def look_up(values: NDArray[Any], keys: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Position of each value among unique keys (0 where it is missing) and whether it is there."""
    if not len(keys):
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    order = np.argsort(keys)
    position = order[np.minimum(np.searchsorted(keys, values, sorter=order), len(keys) - 1)]
    found = keys[position] == values
    return np.where(found, position, 0), found


def check_annotations(
    items: Sequence[Any],
    images: ImageTable,
    classes: ClassMap,
    num_keypoints: Sequence[int],
    needs: Sequence[str],
    file: str,
    unique: Literal["file", "image"] = "file",
) -> tuple[Objects, list[Problem]]:
    """Checks and packs the annotations of a file.

    Args:
        items: the file's `annotations`.
        images: its images.
        classes: its classes.
        num_keypoints: keypoints of each class, 0: none.
        needs: what is to be kept beside labels and boxes.
        file: the file, for messages.
        unique: within what an id may occur once.

    Returns:
        The good annotations, and what is wrong with the others.

    Raises:
        DataError: no annotation has what is needed.
    """
    check = _Check(items, images, file)
    labels = _labels(check, classes)
    boxes, published = _boxes(check)
    crowd = _crowd(check)
    keypoints = _keypoints(check, labels, num_keypoints, classes) if "keypoints" in needs else None
    segments = _segments(check) if "masks" in needs else None
    extra, has = _extras(check, [name for name in needs if name not in BUILT_IN])
    if segments is not None:
        has["masks"] = np.array([text not in (b"null", b"[]") for text in segments], bool)
    _unique(check, unique)
    areas = _areas(check, published)

    keep = np.flatnonzero(check.alive)
    keep = keep[np.argsort(check.image[keep], kind="stable")]
    packed = (None, None) if segments is None else pack([segments[i] for i in keep])
    counts = np.bincount(check.image[keep], minlength=len(images.ids))
    return Objects(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        rows=keep,
        ids=check.ids[keep],
        labels=labels[keep],
        boxes=boxes[keep],
        areas=areas[keep],
        crowd=crowd[keep],
        keypoints=None if keypoints is None else keypoints[keep],
        extra={key: value[keep] for key, value in extra.items()},
        has={key: value[keep] for key, value in has.items()},
        segments=packed[0],
        segment_ends=packed[1],
    ), check.problems


def _labels(check: _Check, classes: ClassMap) -> NDArray[Any]:
    """(a,) int64 class indices."""
    check.drop(~check.has_id, "no integer id", lambda i: f"annotations[{i}] has no integer id")
    raw = check.column("image_id")
    check.drop(~check.has_image, "unknown image", lambda i: f"image_id {raw[i]!r} is unknown")
    values, readable = integers(check.column("category_id"))
    labels, known = look_up(values, np.asarray(classes.ids, np.int64))
    categories = check.column("category_id")
    check.drop(~(known & readable), "unknown category", lambda i: f"category_id {categories[i]!r} is unknown")
    return labels


def _boxes(check: _Check) -> tuple[NDArray[Any], NDArray[Any]]:
    """(a,4) float32 x1 y1 x2 y2 inside the image, and (a,4) float64 x y w h as published, or else measured."""
    raw = check.column("bbox")
    for i, item in enumerate(check.items):
        if raw[i] is None and check.alive[i] and item.get("segmentation"):
            raw[i] = segmentation.measure(item["segmentation"], check.size(i))
    published, readable = numbers(raw, 4)
    check.drop(~readable, "malformed bbox", lambda i: f"bbox {str(raw[i])[:80]} is not 4 numbers")
    check.drop(~np.isfinite(published).all(1), "bbox not finite", lambda i: f"bbox {raw[i]} is not finite")
    for axis, side in ((2, "width"), (3, "height")):
        check.drop(published[:, axis] < 0, f"negative {side}", lambda i, side=side: f"bbox {raw[i]}: negative {side}")  # type: ignore[misc]
        check.drop(published[:, axis] == 0, f"zero {side}", lambda i, side=side: f"bbox {raw[i]}: zero {side}")  # type: ignore[misc]
    published = np.where(check.alive[:, None], published, 0)
    edges = np.concatenate([published[:, :2], published[:, :2] + published[:, 2:]], axis=1)
    sizes = check.images.sizes[check.image] if len(check.images.sizes) else np.zeros((len(raw), 2))
    limits = np.stack([sizes[:, 1], sizes[:, 0]] * 2, axis=1)
    clipped = np.clip(edges, 0, limits).astype(np.float32)

    def image(i: int) -> str:
        return f"bbox {raw[i]} in an image {int(limits[i, 0])} wide and {int(limits[i, 1])} high"

    empty = (clipped[:, 2:] <= clipped[:, :2]).any(1)
    check.drop(empty, "box outside the image", lambda i: f"{image(i)} lies outside")
    over = np.abs(edges - clipped).max(1, initial=0) > OVERSHOOT
    check.note(over, "clipped box", lambda i: f"{image(i)} was clipped")
    return clipped, published


def _crowd(check: _Check) -> NDArray[Any]:
    raw = [0 if value is None else value for value in check.column("iscrowd")]
    wrong = np.array([not isinstance(value, int | float) or value not in (0, 1) for value in raw], bool)
    check.drop(wrong, "malformed iscrowd", lambda i: f"iscrowd {raw[i]!r} is neither 0 nor 1")
    return np.array([bool(value) for value in raw], bool)


def _unique(check: _Check, within: Literal["file", "image"]) -> None:
    alive = np.flatnonzero(check.alive)
    image = check.image[alive] if within == "image" else np.zeros(len(alive), np.int64)
    ids = check.ids[alive]
    order = np.lexsort((ids, image))  # stable: the first of equal ones stays the first
    new = np.ones(len(alive), bool)
    new[1:] = (np.diff(ids[order]) != 0) | (np.diff(image[order]) != 0)
    first = np.zeros(len(check.items), bool)
    first[alive[order[new]]] = True
    check.drop(~first, "duplicate annotation id")


def _areas(check: _Check, published: NDArray[Any]) -> NDArray[Any]:
    raw = check.column("area")
    values = np.array([value if is_number(value) else np.nan for value in raw], np.float64)
    good = np.isfinite(values) & (values > 0)
    absent = np.array([value is None for value in raw], bool)
    check.note(~good & ~absent, "area replaced", lambda i: f"area {raw[i]!r} replaced by width x height")
    return np.where(good, values, published[:, 2] * published[:, 3]).astype(np.float32)


def _keypoints(check: _Check, labels: NDArray[Any], num_keypoints: Sequence[int], classes: ClassMap) -> NDArray[Any]:
    """(a,K,3) float32; zeros where an annotation has none."""
    raw = [value if value is not None else [] for value in check.column("keypoints")]
    wanted = np.asarray(num_keypoints, np.int64)
    if not wanted.any():
        lengths = {len(value) for value in raw if isinstance(value, list) and value}
        if len(lengths) != 1 or next(iter(lengths)) % 3:
            raise DataError(f"{check.file}: keypoints are needed, but no category names its 'keypoints'")
        wanted = np.full(len(classes), next(iter(lengths)) // 3)
    given = np.array([len(value) if isinstance(value, list) else -1 for value in raw], np.int64)
    right = given == 3 * wanted[labels]

    def say(i: int) -> str:
        found = f"{given[i]} keypoint numbers" if given[i] >= 0 else f"keypoints {str(raw[i])[:80]}"
        return f"{found} left out; '{classes.names[labels[i]]}' has {wanted[labels[i]]} keypoints x 3"

    check.note(~right & (given != 0), "wrong keypoint count", say)
    values, readable = keypoint_rows(raw, np.where(check.alive & right, given // 3, 0), int(wanted.max()))
    wrong = "keypoints left out, which are not finite x, y, visibility (0, 1 or 2)"
    check.note(~readable, "malformed keypoints", lambda i: wrong)
    return values


def _segments(check: _Check) -> list[bytes]:
    texts: list[bytes] = []
    flaws: list[str | None] = []
    for i, published in enumerate(check.column("segmentation")):
        good, flaw = segmentation.sound(published, check.size(i)) if published and check.alive[i] else (None, None)
        texts.append(json.dumps(good).encode())
        flaws.append(flaw)
    flawed = np.array([flaw is not None for flaw in flaws], bool)
    nothing = np.array([text == b"null" for text in texts], bool)
    check.drop(flawed & nothing, "malformed segmentation", lambda i: str(flaws[i]))
    check.note(flawed, "malformed polygon", lambda i: str(flaws[i]))
    return texts


def _extras(check: _Check, keys: Sequence[str]) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    extra, has = {}, {}
    for key in keys:
        raw = check.column(key)
        shapes = Counter(np.shape(v) for v in raw if is_number(v) or (isinstance(v, list) and all(map(is_number, v))))
        if raw and not shapes:
            raise DataError(f"{check.file}: '{key}' is needed, but no annotation has it as a number or a list of numbers")
        shape = shapes.most_common(1)[0][0] if shapes else ()
        extra[key], has[key] = finite_rows(raw, shape)
        absent = np.array([value is None for value in raw], bool)
        check.note(~has[key] & ~absent, f"malformed {key}", lambda i, key=key, shape=shape: f"'{key}' is not {shape}")  # type: ignore[misc]
    return extra, has
