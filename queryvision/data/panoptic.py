"""COCO-panoptic files: which segments an image has, and a PNG that says to which of them each pixel belongs.

The format is that of `cocodataset/panopticapi`: id = R + 256 G + 65536 B, 0 is void. An id is unique within its image only.

Letters: n images, H, W height and width of an image in px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from queryvision.data import layout
from queryvision.data.annotations import Problem, look_up
from queryvision.data.coco_file import NO_SEGMENTS
from queryvision.data.fields import integers, is_number
from queryvision.data.images import decoded
from queryvision.data.packed import ImageTable
from queryvision.errors import DataError

MOST = 256**3
"""Segment ids are below."""


class SegmentMaps(Protocol):
    """Where it is said to which segment each pixel belongs."""

    @property
    def folder(self) -> Path | None:
        """Folder of the published PNG files; None: the maps are composed."""

    def read(self, index: int) -> NDArray[Any]:
        """(H,W) int32 segment ids of one image, 0: void; raises DataError."""

    def name(self, index: int) -> str:
        """File name of the map of an image."""

    def take(self, images: NDArray[Any]) -> SegmentMaps:
        """Those of some images, (m,) int64, in that order."""


@dataclass(frozen=True)
class PngMaps:
    """Maps as they were published.

    Attributes:
        folder: where they lie.
        names: (n,) str file names.
        sizes: (n,2) int32 height, width of the images.
        file: the annotation file, for messages.
    """

    folder: Path
    names: NDArray[Any]
    sizes: NDArray[Any]
    file: Path

    def read(self, index: int) -> NDArray[Any]:
        """Decodes the map of one image.

        Returns:
            (H,W) int32 segment ids, 0: void.

        Raises:
            DataError: it is missing, damaged, no RGB picture, or of another size than the image.
        """
        return read_map(layout.inside(self.folder, self.name(index)), self.sizes[index], _segment_ids, self.file)

    def name(self, index: int) -> str:
        """File name of the map of an image."""
        return str(self.names[index])

    def take(self, images: NDArray[Any]) -> PngMaps:
        """Those of some images, (m,) int64, in that order."""
        return replace(self, names=self.names[images], sizes=self.sizes[images])


def read_map(path: Path, size: NDArray[Any], convert: Any, file: Path) -> NDArray[Any]:
    """Decodes a map and makes sure that it fits its image.

    Args:
        path: the PNG file.
        size: (2,) height, width of the image in px.
        convert: open picture -> (H,W) array; raises ValueError where it is no map.
        file: the annotation file, for messages.

    Raises:
        DataError: it is missing, damaged, no map, or of another size.
    """
    found = decoded(path, convert)
    height, width = (int(side) for side in size)
    if found.shape != (height, width):
        sizes = f"is {found.shape[1]} x {found.shape[0]} (width x height), {file} says {width} x {height}"
        raise DataError(f"{path}: {sizes}; a map needs the size of its image")
    return found


def segment_rows(
    entries: Sequence[Any], images: ImageTable, file: Path
) -> tuple[list[dict[str, Any]], ImageTable, NDArray[Any], list[Problem]]:
    """Takes a panoptic file's annotations apart.

    An image without an entry is left out: nobody says what is in it, so to learn that it is empty would be wrong.

    Args:
        entries: the file's `annotations`.
        images: its images.
        file: the file, for messages.

    Returns:
        Every segment as an annotation of a COCO file, the images that have an entry, the (n,) file names of their maps,
        and what is wrong with the rest.

    Raises:
        DataError: an entry has no file name or no list of segments, or its file lies outside the data set.
    """
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("segments_info"), list):
            raise DataError(f"{file}: annotations[{i}] has no list 'segments_info'")
        name = entry.get("file_name")
        if not isinstance(name, str) or not layout.safe_name(name):
            raise DataError(f"{file}: annotations[{i}] has the file_name {name!r}; a name inside its folder is needed")
    ids, readable = integers([entry.get("image_id") for entry in entries])
    image, known = look_up(ids, images.ids)
    entry_of = np.full(len(images.ids), -1)
    rows, problems = [], []

    def complain(name: str, segment_id: int | None, kind: str, message: str) -> None:
        problems.append(Problem(str(file), segment_id, name, message, False, kind))

    for i, entry in enumerate(entries):
        if not (known[i] and readable[i]):
            complain("", None, "unknown image", f"annotations[{i}]: image_id {entry.get('image_id')!r} is unknown")
        elif entry_of[image[i]] >= 0:
            complain(
                images.names[image[i]], None, "second entry of an image", f"annotations[{i}]: the image has an entry already"
            )
        else:
            entry_of[image[i]] = i
            for segment in entry["segments_info"]:
                row = {**segment, "image_id": int(ids[i])} if isinstance(segment, dict) else {"image_id": int(ids[i])}
                if isinstance(row.get("id"), int) and not 0 < row["id"] < MOST:
                    complain(images.names[image[i]], row["id"], "segment id out of range", f"a segment's id is 1 to {MOST - 1}")
                else:
                    rows.append(row)
    for name in images.names[entry_of < 0]:
        complain(name, None, NO_SEGMENTS, "the image has no entry among the annotations")
    if (entry_of < 0).all():
        raise DataError(f"{file}: no image of it has an entry among its annotations")
    kept = images.take(np.flatnonzero(entry_of >= 0))
    names = np.array([entries[i]["file_name"] for i in entry_of[entry_of >= 0]], dtype=str)
    return rows, kept, names, problems


def measure_segments(rows: Sequence[dict[str, Any]], images: ImageTable, maps: SegmentMaps) -> None:
    """Fills in boxes and areas that a file does not say, or says to be 0; only maps of images that lack some are read.

    A map that cannot be read is no news here: the segment then has no box, and the image is named when its turn comes.
    """
    lacking: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if _unsaid(row):
            lacking.setdefault(row["image_id"], []).append(row)
    position, _ = look_up(np.array(list(lacking), np.int64), images.ids)
    for index, members in zip(position.tolist(), lacking.values(), strict=True):
        try:
            found = maps.read(index)
        except DataError:
            continue
        for row in members:
            mask = found == row.get("id", -1)
            if mask.any():
                row.update({key: value for key, value in measured(mask).items() if key in _unsaid(row)})


def _unsaid(row: dict[str, Any]) -> list[str]:
    """What of a segment's box and area has to be measured."""
    area: Any = row.get("area")
    said = {"bbox": row.get("bbox") is not None, "area": is_number(area) and 0 < area < math.inf}
    return [key for key, known in said.items() if not known]


def measured(mask: NDArray[Any]) -> dict[str, Any]:
    """`bbox` (x, y, width, height: the columns and rows touched) and `area` of a mask (H,W) that is not empty, in px."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return {"bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1], "area": int(np.count_nonzero(mask))}


def _segment_ids(image: Image.Image) -> NDArray[Any]:
    if image.mode not in ("RGB", "RGBA", "P"):
        raise ValueError(f"its pixels are '{image.mode}', a panoptic map has 8-bit RGB")
    rgb = np.asarray(image.convert("RGB")).astype(np.int32)
    return np.asarray(rgb[:, :, 0] + 256 * rgb[:, :, 1] + 65536 * rgb[:, :, 2])
