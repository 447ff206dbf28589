"""COCO's panoptic format: a PNG an image whose colours are numbers, R + 256 G + 65536 B, and one JSON that explains them.

Letters: k segments, H, W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from queryvision.data.classes import ClassMap, Color
from queryvision.data.coco_colors import colors_of
from queryvision.data.images import read_image
from queryvision.inference.drawing import segment_colors
from queryvision.masks import SegmentMasks
from queryvision.outputs import writable_file, writable_folder
from queryvision.results import Result

Record = dict[str, Any]


def read_ids(path: Path | str) -> NDArray[np.int32]:
    """A panoptic PNG as ids, (H,W).

    Raises:
        DataError: missing, damaged or not an image.
    """
    red, green, blue = (channel.astype(np.int32) for channel in read_image(path).transpose(2, 0, 1))
    ids: NDArray[np.int32] = red + (green << 8) + (blue << 16)
    return ids


def write_ids(path: Path | str, ids: NDArray[Any]) -> None:
    """Writes ids (H,W), 0 .. 2^24 - 1, as a panoptic PNG."""
    Image.fromarray(np.stack([ids, ids >> 8, ids >> 16], axis=-1).astype(np.uint8)).save(path, compress_level=3)


def id_of(color: Color) -> int:
    """The number that a colour stands for."""
    return color[0] + 256 * color[1] + 65536 * color[2]


def describe(
    areas: Sequence[int], category_ids: Sequence[int], colors: Sequence[Color], scores: Sequence[float]
) -> list[Record]:
    """Rows of `segments_info`.

    Args:
        areas: k, in pixels.
        category_ids: k.
        colors: k, all different; they become ids.
        scores: k.
    """
    parts = zip(category_ids, colors, scores, areas, strict=True)
    return [
        {"id": id_of(color), "category_id": category, "area": pixels, "iscrowd": 0, "score": score}
        for category, color, score, pixels in parts
    ]


def write_json(path: Path, images: Sequence[Record], annotations: Sequence[Record], categories: Sequence[Record]) -> None:
    """Writes the file that explains the PNGs; they lie in the folder that has its name without `.json`."""
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_panoptic(folder: Path, results: Mapping[str, Result], classes: ClassMap) -> None:
    """Writes `panoptic.json` and `panoptic/<file stem>.png`; any COCO panoptic tool reads them.

    Each PNG is written when its turn comes, and of the result only the rows that explain it are kept. However the iteration
    over the results ends, the JSON explains the PNGs that were written.

    Args:
        folder: exists.
        results: {file stem: result with `SegmentMasks`}; images are numbered from 1 in this order.
        classes: of the model.

    Raises:
        ConfigError: there is no place for the PNGs.
    """
    pictures, file = writable_folder(folder / "panoptic"), writable_file(folder / "panoptic.json")
    file.unlink(missing_ok=True)  # an earlier one would lie beside new PNGs
    images: list[Record] = []
    annotations: list[Record] = []
    try:
        for image_id, (stem, result) in enumerate(results.items(), 1):
            name, (height, width) = f"{stem}.png", segments_of(result).size
            segments = _write_map(pictures / name, result, classes)
            images.append({"id": image_id, "file_name": result.path or name, "height": height, "width": width})
            annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
    finally:
        kinds = zip(classes.ids, classes.names, classes.things, colors_of(classes), strict=True)
        categories = [
            {"id": id_, "name": name, "isthing": int(thing), **({"color": list(color)} if color else {})}
            for id_, name, thing, color in kinds
        ]
        write_json(file, images, annotations, categories)


def _write_map(path: Path, result: Result, classes: ClassMap) -> list[Record]:
    """Writes the PNG of a result; gives its `segments_info`."""
    masks = segments_of(result)
    rows, kept = occupied(masks.rows().cpu().numpy(), np.ones(len(masks), bool))
    labels = result.labels[kept].tolist()
    areas = np.bincount(rows.ravel())[1:].tolist()
    ids = [classes.ids[label] for label in labels]
    segments = describe(areas, ids, segment_colors(labels, classes), result.scores[kept].tolist())
    write_ids(path, np.array([0, *(segment["id"] for segment in segments)])[rows])
    return segments


def segments_of(result: Result) -> SegmentMasks:
    """The segments of a result.

    Raises:
        TypeError: its masks may overlap, or it has none.
    """
    masks = result.values.get("masks")
    if not isinstance(masks, SegmentMasks):
        raise TypeError(f"a panoptic result holds segments that do not overlap; this one holds {type(masks).__name__}")
    return masks


def occupied(rows: NDArray[Any], keep: NDArray[np.bool_]) -> tuple[NDArray[np.int64], list[int]]:
    """Leaves out segments without a pixel.

    Args:
        rows: 1 + the number of a segment, or 0, of each pixel or run.
        keep: (k,) which of them count.

    Returns:
        Of each pixel or run 1 + the place in the list of those that stay, or 0; and that list, their numbers.
    """
    seen = np.bincount(rows.ravel(), minlength=len(keep) + 1)[1:] > 0
    kept = np.flatnonzero(seen & keep)
    table = np.zeros(len(keep) + 1, np.int64)
    table[kept + 1] = np.arange(1, len(kept) + 1)
    return table[rows], kept.tolist()
