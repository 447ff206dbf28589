"""COCO files as data sets: found, checked once, opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from queryvision.data import layout
from queryvision.data.annotations import INCOMPLETE, Problem, check_annotations
from queryvision.data.classes import ClassMap
from queryvision.data.coco_file import image_table, load, real_categories
from queryvision.data.dataset import CocoDataset
from queryvision.data.layout import Source
from queryvision.data.packed import ImageTable
from queryvision.data.panoptic import PngMaps, SegmentMaps, measure_segments, segment_rows
from queryvision.data.semantic import compose
from queryvision.errors import DataError

__all__ = ["CocoDataset", "check_same_classes", "open_dataset", "open_file"]


def open_dataset(
    path: Path | str,
    split: str,
    needs: Sequence[str] = ("labels", "boxes"),
    strict: bool = False,
    source: Source = "instances",
) -> CocoDataset:
    """Finds, reads and checks a split of a data set.

    Args:
        path: its root folder; see `layout` for the layouts that are understood.
        split: `train`, `val`, ...
        needs: what a sample is to hold: "labels" and "boxes" always, "masks", "keypoints", or the key of annotations
            that hold a number or a list of numbers, which becomes `extra[key]`.
        strict: refuse the data set where an annotation, or a part of it, would be left out.
        source: "instances" reads objects; "panoptic" reads segments, things and stuff, each pixel in at most one.

    Raises:
        DataError: there is no such data set, it is no COCO file, or (strict) an annotation is wrong.
    """
    return open_file(Path(path), split, layout.find_annotations(path, split, needs, source), needs, strict, source)


def open_file(
    root: Path, split: str, file: Path, needs: Sequence[str], strict: bool = False, source: Source = "instances"
) -> CocoDataset:
    """Reads and checks one annotation file; see `open_dataset`."""
    raw = load(file)
    needs = tuple(dict.fromkeys(("labels", "boxes", *needs)))
    if source == "instances":
        dataset = _instances(root, split, file, raw, needs)
    elif file.stem.startswith("panoptic_"):
        dataset = _panoptic(root, split, file, raw, needs)
    else:
        dataset = _composed(root, split, file, raw, needs)
    bad = [problem for problem in dataset.problems if not problem.kept or problem.kind in INCOMPLETE]
    if strict and bad:
        more = f" ({len(bad) - 1} more)" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}; `qv data check {root}` lists all")
    return dataset


def _instances(root: Path, split: str, file: Path, raw: dict[str, Any], needs: tuple[str, ...]) -> CocoDataset:
    categories = real_categories(raw, file)
    classes = ClassMap.from_categories(categories, str(file))
    images, problems = image_table(raw["images"], classes, file)
    counts = _keypoint_counts(categories, classes)
    objects, wrong = check_annotations(raw["annotations"], images, classes, counts, needs, str(file))
    problems += wrong
    return CocoDataset(root, split, file, classes, categories, needs, images, objects, problems, len(raw["annotations"]))


def _panoptic(root: Path, split: str, file: Path, raw: dict[str, Any], needs: tuple[str, ...]) -> CocoDataset:
    classes = ClassMap.from_categories(raw["categories"], str(file))
    images, problems = image_table(raw["images"], classes, file)
    rows, images, names, wrong = segment_rows(raw["annotations"], images, file)
    maps = PngMaps(layout.segment_folder(root, split, file), names, images.sizes, file)
    measure_segments(rows, images, maps)
    return _of_segments(root, split, file, raw["categories"], needs, images, rows, maps, problems + wrong)


def _composed(root: Path, split: str, file: Path, raw: dict[str, Any], needs: tuple[str, ...]) -> CocoDataset:
    categories, images, rows, maps, problems = compose(root, split, file, raw)
    return _of_segments(root, split, file, categories, needs, images, rows, maps, problems)


def _of_segments(
    root: Path,
    split: str,
    file: Path,
    categories: Sequence[Mapping[str, Any]],
    needs: tuple[str, ...],
    images: ImageTable,
    rows: Sequence[dict[str, Any]],
    maps: SegmentMaps,
    problems: list[Problem],
) -> CocoDataset:
    """A data set of segments: annotations whose masks are in a map."""
    classes = ClassMap.from_categories(categories, str(file))
    told = [{**c, "isthing": int(classes.things[classes.index_of_id[c["id"]]])} for c in categories]
    wanted = [need for need in needs if need != "masks"]
    counts = _keypoint_counts(categories, classes)
    objects, wrong = check_annotations(rows, images, classes, counts, wanted, str(file), unique="image")
    if "masks" in needs:
        objects.has["masks"] = np.ones(len(objects.ids), bool)
    return CocoDataset(root, split, file, classes, told, needs, images, objects, problems + wrong, len(rows), maps)


def _keypoint_counts(categories: Sequence[Mapping[str, Any]], classes: ClassMap) -> list[int]:
    """Keypoints of each class, 0: none."""
    by_id = {category["id"]: category for category in categories}
    names = [by_id[id_].get("keypoints") for id_ in classes.ids]
    return [len(name) if isinstance(name, list) else 0 for name in names]


def check_same_classes(a: CocoDataset, b: CocoDataset) -> None:
    """Makes sure that two splits mean the same classes.

    Raises:
        DataError: they do not; names the difference.
    """
    mine, theirs = (
        {id_: f"'{name}'{'' if thing else ' (stuff)'}" for id_, name, thing in zip(c.ids, c.names, c.things, strict=True)}
        for c in (a.classes, b.classes)
    )
    posed = [
        name
        for name, skeleton in zip(a.classes.names, a.classes.skeletons, strict=True)
        if "keypoints" in a.needs
        and name in b.classes.index_of_name
        and skeleton != b.classes.skeletons[b.classes.index_of_name[name]]
    ]
    if mine == theirs and not posed:
        return
    if mine == theirs:
        raise DataError(
            f"{a.root}: '{posed[0]}' has other keypoints in '{a.split}' than in '{b.split}' (names, limbs, pairs or sigmas); "
            "make the categories equal"
        )
    differences = [
        f"id {id_} is {mine.get(id_, 'missing')} in {a.file.name} and {theirs.get(id_, 'missing')} in {b.file.name}"
        for id_ in sorted(mine.keys() | theirs.keys())
        if mine.get(id_) != theirs.get(id_)
    ]
    more = f" ({len(differences) - 1} more)" if len(differences) > 1 else ""
    raise DataError(f"{a.root}: the categories of '{a.split}' and '{b.split}' differ: {differences[0]}{more}; make them equal")
