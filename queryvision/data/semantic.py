"""Panoptic maps composed of instances and label maps, for data that was annotated in these two ways.

    annotations/instances_{split}.json      things, as always, with segmentations
    annotations/semantic_{split}.json       or semantic.json: what the values of the label maps mean
    semantic_{split}/a.png                  or labels_{split}/: 8-bit label map of the image a.jpg

A value of a label map is a category id. The json holds `categories` (`id`, `name`) and optionally `ignore`, the value or values
that say nothing (default 255). Its categories are stuff, but for those that the instances have too. What is composed:

- the ground is the stuff of the label map; pixels of a thing's category and ignored ones are void,
- over it lie the crowds, and over these the objects: one with fewer pixels over one with more, of equal ones the later.

Maps are composed once when a data set is opened, for boxes, areas and checks, and again when an image is read; none is kept.

Letters: n images, H, W height and width of an image in px.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from queryvision.data import layout
from queryvision.data.annotations import Problem, check_annotations
from queryvision.data.classes import ClassMap
from queryvision.data.coco_file import UNREADABLE_MAP, image_table
from queryvision.data.packed import ImageTable, Objects
from queryvision.data.panoptic import measured, read_map
from queryvision.data.segmentation import rasterise
from queryvision.errors import DataError

VALUES = 256  # of an 8-bit label map
VOID, UNKNOWN = 0, -1  # in `ComposedMaps.meaning`


@dataclass(frozen=True)
class ComposedMaps:
    """Maps that are made of instances and label maps when they are read.

    Ids are 1, 2, ... for the instances of an image, in the order of the file, and n + 1 + class index for its stuff.

    Attributes:
        labels: folder of the label maps.
        names: (n,) str their file names.
        sizes: (n,2) int32 height, width of the images.
        meaning: (256,) int64, for each value of a label map 1 + class index of stuff, VOID or UNKNOWN.
        instances: the checked instances with their segmentations.
        file: their annotation file, for messages.
    """

    labels: Path
    names: NDArray[Any]
    sizes: NDArray[Any]
    meaning: NDArray[Any]
    instances: Objects
    file: Path

    @property
    def folder(self) -> None:
        """There are no PNG files of the composed maps."""

    def read(self, index: int) -> NDArray[Any]:
        """Composes the map of one image.

        Returns:
            (H,W) int32 segment ids, 0: void.

        Raises:
            DataError: the label map is missing, damaged, no 8-bit map or of another size; or a segmentation cannot be drawn.
        """
        return self.painted(index, self.label_map(index))

    def painted(self, index: int, labels: NDArray[Any]) -> NDArray[Any]:
        """The map of one image whose label map (H,W) is at hand; see `read`."""
        rows = self.rows(index)
        ground = self.meaning[labels].clip(VOID)
        segments = np.where(ground > 0, len(rows) + ground, 0).astype(np.int32)
        size = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        try:
            masks = rasterise([self.instances.segment(row) for row in rows], size)
        except ValueError as error:
            raise DataError(f"{self.file}: a segmentation of image {self.name(index)} cannot be drawn ({error})") from error
        pixels = masks.sum((1, 2), dtype=np.int64)
        for i in np.lexsort((np.arange(len(rows)), -pixels, ~self.instances.crowd[rows])):
            segments[masks[i] > 0] = i + 1
        return segments

    def rows(self, index: int) -> NDArray[Any]:
        """The instances of an image."""
        return np.arange(self.instances.offsets[index], self.instances.offsets[index + 1])

    def label_map(self, index: int) -> NDArray[Any]:
        """(H,W) uint8, as stored; raises DataError."""
        return read_map(layout.inside(self.labels, self.name(index)), self.sizes[index], _values, self.file)

    def name(self, index: int) -> str:
        """File name of the label map of an image."""
        return str(self.names[index])

    def take(self, images: NDArray[Any]) -> ComposedMaps:
        """Those of some images, (m,) int64, in that order."""
        return replace(self, names=self.names[images], sizes=self.sizes[images], instances=self.instances.take(images))


def compose(
    root: Path, split: str, file: Path, raw: dict[str, Any]
) -> tuple[list[Any], ImageTable, list[dict[str, Any]], ComposedMaps, list[Problem]]:
    """Composes the segments of a split.

    Args:
        root: of the data set.
        split: `train`, `val`, ...
        file: the annotation file of the instances.
        raw: its content.

    Returns:
        The categories of things and stuff, the images, every segment as an annotation of a COCO file, the maps, and what is
        wrong with the rest.

    Raises:
        DataError: the categories are wrong, or there are no label maps.
    """
    things = ClassMap.from_categories(raw["categories"], str(file))
    categories, ignored = _categories(root, split, file, raw["categories"])
    classes = ClassMap.from_categories(categories, f"{file} with its label maps")
    images, problems = image_table(raw["images"], classes, file)
    instances, wrong = check_annotations(
        raw["annotations"], images, things, [0] * len(things), ("labels", "boxes", "masks"), str(file)
    )
    meaning = np.full(VALUES, UNKNOWN, np.int64)
    meaning[list(ignored)] = VOID
    for index, (id_, thing) in enumerate(zip(classes.ids, classes.things, strict=True)):
        if 0 <= id_ < VALUES:
            meaning[id_] = VOID if thing else 1 + index
    names = np.array([str(PurePosixPath(name).with_suffix(".png")) for name in images.names])
    maps = ComposedMaps(layout.label_folder(root, split), names, images.sizes, meaning, instances, file)

    def segments(index: int) -> tuple[list[dict[str, Any]], list[Problem]]:
        return _segments(maps, index, images, things, classes)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of Python's lock
        parts = list(pool.map(segments, range(len(images.ids))))
    rows = [row for part, _ in parts for row in part]
    return categories, images, rows, maps, [*problems, *wrong, *(problem for _, part in parts for problem in part)]


def _segments(
    maps: ComposedMaps, index: int, images: ImageTable, things: ClassMap, classes: ClassMap
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The segments of one image, and what is wrong with it."""
    problems: list[Problem] = []

    def complain(annotation_id: int | None, kind: str, message: str) -> None:
        problems.append(Problem(str(maps.file), annotation_id, str(images.names[index]), message, False, kind))

    try:
        labels = maps.label_map(index)
        composed = maps.painted(index, labels)
    except DataError as error:
        complain(None, UNREADABLE_MAP, str(error))
        return [], problems
    unknown = [str(value) for value in np.unique(labels) if maps.meaning[value] == UNKNOWN]
    if unknown:
        values = f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}"
        message = f"label map {maps.labels / maps.name(index)} has the values {values}, neither a category nor ignored"
        complain(None, "unknown label value", message)
    instances, rows = maps.instances, maps.rows(index)
    found = [int(id_) for id_ in np.unique(composed) if id_]
    for i in sorted({*range(1, len(rows) + 1)} - {*found}):
        drawn = instances.has["masks"][rows[i - 1]]
        message = "every pixel of it belongs to others, or it covers none" if drawn else "it has no segmentation"
        complain(int(instances.ids[rows[i - 1]]), "object without a pixel", message)
    segments = []
    for id_ in found:
        mine = rows[id_ - 1] if id_ <= len(rows) else None
        category = classes.ids[id_ - len(rows) - 1] if mine is None else things.ids[instances.labels[mine]]
        crowd = 0 if mine is None else int(instances.crowd[mine])
        row = {"id": id_, "image_id": int(images.ids[index]), "category_id": category, "iscrowd": crowd}
        segments.append({**row, **measured(composed == id_)})
    return segments, problems


def _categories(root: Path, split: str, file: Path, things: Sequence[Any]) -> tuple[list[Any], set[int]]:
    """Categories of things and stuff, and the ignored values."""
    source = layout.label_file(root, split)
    if source is None:
        raise DataError(f"{root}: there is no annotations/semantic_{split}.json or semantic.json to say what label maps mean")
    try:
        raw = json.loads(source.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source}: cannot be read ({error})") from error
    listed = raw.get("categories") if isinstance(raw, dict) else None
    if not isinstance(listed, list):
        raise DataError(f"{source}: it has no list 'categories'")
    ignore = raw.get("ignore", 255)
    ignored = ignore if isinstance(ignore, list) else [ignore]
    for value in [*ignored, *(c.get("id") if isinstance(c, dict) else None for c in listed)]:
        if not isinstance(value, int) or not 0 <= value < VALUES:
            raise DataError(f"{source}: {value!r} is no value of a label map; categories and 'ignore' need 0 to {VALUES - 1}")
    known = {thing["id"]: thing["name"] for thing in things}
    stuff = []
    for category in listed:
        name = category.get("name")
        if category["id"] not in known:
            stuff.append({**category, "isthing": 0})
        elif known[category["id"]] != name:
            there = f"id {category['id']} is {name!r} here and '{known[category['id']]}' in {file.name}"
            raise DataError(f"{source}: {there}; give stuff ids of its own")
    return [{**thing, "isthing": 1} for thing in things] + stuff, set(ignored)


def _values(image: Image.Image) -> NDArray[Any]:
    if image.mode not in ("L", "P"):
        raise ValueError(f"its pixels are '{image.mode}', a label map has 8 bits and one channel")
    return np.asarray(image)
