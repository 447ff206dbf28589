"""Several annotation files of the same images as one data set: what a joint task learns from.

COCO keeps the keypoints of people in a file of their own. Here each object has everything that any file says about it, and an
image covers the classes of the files that list it: one that only the file of people lists says nothing about dogs.

Segments come first: their map says whose every pixel is, so that further objects of the same image are those segments or none.

Letters: n images, a annotations, C classes, K keypoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from queryvision.data.classes import ClassMap
from queryvision.data.dataset import CocoDataset
from queryvision.data.packed import ImageTable, Objects, pack
from queryvision.data.panoptic import SegmentMaps
from queryvision.errors import ConfigError, DataError

SAME, SAME_SEGMENT = 0.9, 0.5
"""IoU of two files' boxes of one class from which on they are the same object; of a segment only what is seen has a box."""

Array = NDArray[Any]


def unite(parts: Mapping[str, CocoDataset]) -> CocoDataset:
    """One data set out of several of the same root and split.

    Args:
        parts: {name: what it is opened as}, at most one of them with segments. Several may be the same data set.

    Returns:
        All images and objects. Where two files annotate an object (same class, boxes with an IoU of at least 0.9) it is one,
        with the first one's box and all that either says. Its `ground_truth` is {"parts": {name: that part's}}.

    Raises:
        DataError: the files disagree about a class or an image.
    """
    distinct = sorted({id(part): part for part in parts.values()}.values(), key=lambda part: part.maps is None)
    whole = reduce(_both, distinct)
    if len(distinct) > 1:
        whole.parts = dict(parts)
    return whole


def _both(a: CocoDataset, b: CocoDataset) -> CocoDataset:
    try:
        classes = _by_id(a.classes.union(b.classes))
    except ConfigError as error:
        raise DataError(f"{a.file.name} and {b.file.name} in {a.root}: {error}") from error
    places, into = _places(a, b)
    maps, mapped = None, np.zeros(places, bool)
    if a.maps is not None:
        inner = a.maps if isinstance(a.maps, _SomeMaps) else _SomeMaps(a.maps, np.arange(len(a)), a.sizes)
        rows = np.concatenate((inner.rows, np.full(places - len(a), -1)))
        mapped = rows >= 0
        maps = replace(inner, rows=rows, sizes=np.concatenate((a.sizes, b.sizes[into >= len(a)])))
    images = _images(a, b, classes, into, mapped)
    objects = _objects(
        _relabelled(a, classes), _relabelled(b, classes), np.arange(len(a)).repeat(_counts(a)), into.repeat(_counts(b)),
        mapped, maps is not None,
    )  # fmt: skip
    categories = {c["id"]: c for c in b.categories} | {c["id"]: c for c in a.categories}
    for category in b.categories:  # what only one of them says, such as keypoints
        categories[category["id"]] = {**category, **categories[category["id"]]}
    return CocoDataset(
        a.root, a.split, a.file, classes, [categories[id_] for id_ in classes.ids], list(dict.fromkeys((*a.needs, *b.needs))),
        images, objects, [*a.problems, *b.problems], a.num_annotations + b.num_annotations, maps,
        folders=tuple(dict.fromkeys((*a.folders, *b.folders))),
    )  # fmt: skip


@dataclass(frozen=True)
class _SomeMaps:
    """Maps of some of the images; in the others every pixel is -1, nobody's."""

    maps: SegmentMaps
    rows: Array  # (n,) int64 which map is that of an image, -1: none
    sizes: Array  # (n,2) height, width

    @property
    def folder(self) -> Path | None:
        return self.maps.folder

    def read(self, index: int) -> Array:
        return np.full(self.sizes[index], -1, np.int32) if self.rows[index] < 0 else self.maps.read(int(self.rows[index]))

    def name(self, index: int) -> str:
        return "" if self.rows[index] < 0 else self.maps.name(int(self.rows[index]))

    def take(self, images: Array) -> _SomeMaps:
        return _SomeMaps(self.maps, self.rows[images], self.sizes[images])


def _by_id(classes: ClassMap) -> ClassMap:
    """The order does not depend on which file came first."""
    columns = (classes.ids, classes.names, classes.things, classes.skeletons, classes.colors)
    rows = sorted(zip(*columns, strict=True), key=lambda row: row[0])
    return ClassMap(*zip(*rows, strict=True))


def _counts(data: CocoDataset) -> Array:
    return np.diff(data.objects.offsets)


def _columns(data: CocoDataset, classes: ClassMap) -> Array:
    """(C of data,) where its classes are among all."""
    return np.array([classes.index_of_name[name] for name in data.classes.names], np.int64)


def _relabelled(data: CocoDataset, classes: ClassMap) -> Objects:
    return replace(data.objects, labels=_columns(data, classes)[data.objects.labels])


def _places(a: CocoDataset, b: CocoDataset) -> tuple[int, Array]:
    """How many images there are, a's first, and (n of b,) where b's are among them.

    Raises:
        DataError: an id is another image in the other file.
    """
    place = {id_: index for index, id_ in enumerate(a.image_ids.tolist())}
    for index, id_ in enumerate(b.image_ids.tolist()):
        known = place.setdefault(id_, len(place))
        if known < len(a) and (a.name(known), *a.sizes[known]) != (b.name(index), *b.sizes[index]):
            told = [f"'{d.name(i)}' ({d.sizes[i, 1]} x {d.sizes[i, 0]}) in {d.file}" for d, i in ((a, known), (b, index))]
            raise DataError(f"image {id_} is {told[0]} and {told[1]}; give each image one id in all files")
    return len(place), np.array([place[id_] for id_ in b.image_ids.tolist()], np.int64)


def _images(a: CocoDataset, b: CocoDataset, classes: ClassMap, into: Array, mapped: Array) -> ImageTable:
    """All images; of those with a map (n,) only a's classes are covered, as nothing of b's own is added there."""
    new = np.flatnonzero(into >= len(a))
    covers = np.zeros((len(mapped), len(classes)), bool)
    for data, rows in ((a, np.arange(len(a))), (b, into)):
        own = np.ones((len(data), len(data.classes)), bool) if data.images.covers is None else data.images.covers
        told = own if data is a else own & ~mapped[rows, None]
        covers[rows[:, None], _columns(data, classes)] |= told
    return ImageTable(
        np.concatenate((a.image_ids, b.image_ids[new])),
        np.concatenate((a.images.names, b.images.names[new])),
        np.concatenate((a.sizes, b.sizes[new])),
        None if covers.all() else covers,
    )


def _objects(a: Objects, b: Objects, image_a: Array, image_b: Array, mapped: Array, drawn: bool) -> Objects:
    """Objects of both with (a,) their image; what is the same in both becomes one row.

    Some images (n,) have a map of segments, which no further object is added to. With maps (`drawn`), masks are only theirs.
    """
    partner = _partners(a, b, image_a, image_b, np.where(mapped, SAME_SEGMENT, SAME))
    alone, found = np.flatnonzero((partner < 0) & ~mapped[image_b]), np.flatnonzero(partner >= 0)
    image = np.concatenate((image_a, image_b[alone]))
    order = np.argsort(image, kind="stable")

    def joined(mine: Array, theirs: Array) -> Array:
        """A column of both; what is the same takes a's."""
        return np.asarray(np.concatenate((mine, theirs[alone]))[order])

    def merged(mine: Array | None, theirs: Array | None, known: Array) -> Array:
        """A column that only one may have; what is the same takes a's where that is known, (a,) bool."""
        sides = np.max([value.shape[1:] for value in (mine, theirs) if value is not None], 0).astype(int)
        value = np.zeros((len(image), *sides), np.float32)
        if theirs is not None:
            wide = _padded(theirs, sides)
            value[partner[found]] = wide[found]
            value[len(image_a) :] = wide[alone]
        if mine is not None:
            value[np.flatnonzero(known)] = _padded(mine, sides)[known]
        return np.asarray(value[order])

    has: dict[str, Array] = {}
    extra: dict[str, Array] = {}
    for key in dict.fromkeys((*a.has, *b.has)):
        mine, theirs = (o.has.get(key, np.zeros(len(o.ids), bool)) for o in (a, b))
        theirs = theirs & (not drawn or key != "masks")
        known = np.concatenate((mine, theirs[alone]))
        known[partner[found]] |= theirs[found]
        has[key] = known[order]
        if key in a.extra or key in b.extra:
            extra[key] = merged(a.extra.get(key), b.extra.get(key), mine)
    keypoints = None
    if a.keypoints is not None or b.keypoints is not None:
        posed = np.zeros(len(a.ids), bool) if a.keypoints is None else (a.keypoints[..., 2] > 0).any(1)
        keypoints = merged(a.keypoints, b.keypoints, posed)
    segments, ends = _segments(a, b, partner, order, alone)
    return Objects(
        offsets=np.concatenate([[0], np.cumsum(np.bincount(image, minlength=len(mapped)))]).astype(np.int64),
        rows=joined(a.rows, b.rows),
        ids=joined(a.ids, b.ids),
        labels=joined(a.labels, b.labels),
        boxes=joined(a.boxes, b.boxes),
        areas=joined(a.areas, b.areas),
        crowd=joined(a.crowd, b.crowd),
        keypoints=keypoints,
        extra=extra,
        has=has,
        segments=segments,
        segment_ends=ends,
    )


def _padded(values: Array, sides: Array) -> Array:
    """Zeros behind, so that a row has these sides."""
    return np.pad(values, [(0, 0), *((0, int(side) - have) for side, have in zip(sides, values.shape[1:], strict=True))])


def _segments(a: Objects, b: Objects, partner: Array, order: Array, alone: Array) -> tuple[bytes | None, Array | None]:
    """Segmentations of both, packed again; the parts that were opened without masks have none."""
    if a.segments is None and b.segments is None:
        return None, None
    texts = [_text(a, row) for row in range(len(a.ids))]
    for row in np.flatnonzero(partner >= 0):
        if texts[partner[row]] in _EMPTY:
            texts[partner[row]] = _text(b, row)
    texts += [_text(b, row) for row in alone]
    return pack([texts[i] for i in order])


_EMPTY = (b"null", b"[]")


def _text(objects: Objects, row: int) -> bytes:
    if objects.segments is None or objects.segment_ends is None:
        return _EMPTY[0]
    return objects.segments[objects.segment_ends[row] : objects.segment_ends[row + 1]]


def _partners(a: Objects, b: Objects, image_a: Array, image_b: Array, least: Array) -> Array:
    """(a of b,) the row of a that is the same object; -1: none is."""
    partner = np.full(len(b.ids), -1, np.int64)
    order = np.argsort(image_b, kind="stable")
    for image in np.intersect1d(image_a, image_b):
        mine = np.arange(*np.searchsorted(image_a, (image, image + 1)))
        theirs = order[slice(*np.searchsorted(image_b, (image, image + 1), sorter=order))]
        same = (a.labels[mine, None] == b.labels[theirs]) & (a.crowd[mine, None] == b.crowd[theirs])
        alike = np.where(same, _iou(a.boxes[mine], b.boxes[theirs]), 0)
        alike[alike < least[image]] = 0
        rows, columns = linear_sum_assignment(alike, maximize=True)
        good = alike[rows, columns] > 0
        partner[theirs[columns[good]]] = mine[rows[good]]
    return partner


def _iou(a: Array, b: Array) -> Array:
    """IoU of boxes (i,4) and (j,4), (i,j)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return np.asarray(shared / (areas[0][:, None] + areas[1] - shared).clip(1e-9))
