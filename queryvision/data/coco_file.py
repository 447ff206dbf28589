"""The frame of a COCO file: its three lists, its images and its categories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.data import layout
from queryvision.data.annotations import Problem, look_up
from queryvision.data.classes import ClassMap
from queryvision.data.fields import integers
from queryvision.data.packed import ImageTable
from queryvision.errors import DataError

DUPLICATE_IMAGE = "duplicate image id"
AMBIGUOUS_IMAGE = "image id of several pictures"
NO_SEGMENTS = "image without segments"
UNREADABLE_MAP = "unreadable label map"
IMAGE_PROBLEMS = {
    DUPLICATE_IMAGE: "images dropped, their id occurs twice",
    AMBIGUOUS_IMAGE: "images dropped with their annotations, their id stands for several pictures",
    NO_SEGMENTS: "images dropped, nothing says what is in them",
    UNREADABLE_MAP: "images cannot be used, their label map cannot be read",
}
"""What concerns whole images, with words for people."""


def load(file: Path) -> dict[str, Any]:
    """Reads a COCO file.

    Raises:
        DataError: it cannot be read, is not JSON or lacks one of the three lists.
    """
    try:
        raw = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw, dict) or not isinstance(raw.get(key), list):
            raise DataError(f"{file}: is not a COCO file: it has no list '{key}'")
    checked: dict[str, Any] = raw
    return checked


def real_categories(raw: dict[str, Any], file: Path) -> list[Any]:
    """The categories without the root that Roboflow writes above them: it would be a class that nothing belongs to."""
    categories: list[Any] = raw["categories"]
    if file.name != layout.ROBOFLOW or len(categories) < 2 or not all(isinstance(c, dict) for c in categories):
        return categories
    first, rest = categories[0], categories[1:]
    used = any(isinstance(a, dict) and a.get("category_id") == first.get("id") for a in raw["annotations"])
    is_root = first.get("supercategory") == "none" and all(c.get("supercategory") == first.get("name") for c in rest)
    return rest if is_root and not used else categories


def image_table(rows: list[Any], classes: ClassMap, file: Path) -> tuple[ImageTable, list[Problem]]:
    """Checks and packs the images of a file.

    Where an id stands for several pictures, nobody knows whose annotations are whose: none of them is used.

    Raises:
        DataError: an image has no id, size or name, lies outside the data set or covers what is no category; or none is of use.
    """
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f"{file}: images[{i}] has no 'file_name'")
        if not layout.safe_name(row["file_name"]):
            raise DataError(f"{file}: image '{row['file_name']}' lies outside the data set; make its file_name relative")
    columns = {key: integers([row.get(key) for row in rows]) for key in ("id", "height", "width")}
    for key, (values, good) in columns.items():
        bad = np.flatnonzero(~good | (((values <= 0) | (values >= 2**31)) & (key != "id")))
        if len(bad):
            row = rows[bad[0]]
            raise DataError(f"{file}: image '{row['file_name']}' has the {key} {row.get(key)!r}; a whole number is needed")
    ids = columns["id"][0]
    names = np.array([row["file_name"] for row in rows], dtype=str)
    sizes = np.stack([columns["height"][0], columns["width"][0]], axis=1).astype(np.int32)
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    first = first[inverse]  # (n,) the first row that has the id
    ambiguous = np.isin(ids, ids[(names != names[first]) | (sizes != sizes[first]).any(1)])
    used = np.flatnonzero((first == np.arange(len(rows))) & ~ambiguous)
    if not len(used):
        raise DataError(f"{file}: there is no image in it{' whose id is its own' if rows else ''}")
    problems = [
        Problem(str(file), None, names[i], f"image id {ids[i]} stands for several pictures", False, AMBIGUOUS_IMAGE)
        if ambiguous[i]
        else Problem(str(file), None, names[i], f"image id {ids[i]} occurs twice", False, DUPLICATE_IMAGE)
        for i in np.setdiff1d(np.arange(len(rows)), used)
    ]
    return ImageTable(ids[used], names[used], sizes[used], _covers([rows[i] for i in used], classes, file)), problems


def _covers(rows: list[Any], classes: ClassMap, file: Path) -> NDArray[Any] | None:
    """(n,C) bool from `covered_category_ids`: what a federated data set was annotated for; None: nobody says."""
    listed = [row.get("covered_category_ids") for row in rows]
    if all(value is None for value in listed):
        return None
    covers = np.ones((len(rows), len(classes)), bool)
    for i, value in enumerate(listed):
        if value is not None:
            ids, good = integers(value) if isinstance(value, list) else (np.zeros(0, np.int64), np.zeros(1, bool))
            index, known = look_up(ids, np.asarray(classes.ids, np.int64))
            if not (good.all() and known.all()):
                name = f"{file}: image '{rows[i]['file_name']}'"
                raise DataError(f"{name}: covered_category_ids {str(value)[:80]} is no list of ids in 'categories'")
            covers[i] = False
            covers[i, index[known]] = True
    return covers
