"""Writes drawn scenes as COCO and COCO-panoptic files, and a folder all at once or not at all.

    images/{split}_00000.png                      annotations/instances_{split}.json
    panoptic_{split}/{split}_00000.png            annotations/person_keypoints_{split}.json
                                                  annotations/panoptic_{split}.json

Images are PNG: JPEG decoders differ in their last bit, and so would the pixels that a model is trained on; and JPEG smears the
edges that the masks follow to the pixel. Masks are run lengths: polygons cannot hold them exactly where objects cover one
another.

Letters: H, W height and width of an image in px, K keypoints.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from queryvision.errors import DataError

Array = NDArray[Any]
MARKER = "complete.json"
FIRST_IMAGE_ID = {"train": 1, "val": 1_000_001}
IDS_PER_IMAGE = 100  # annotation ids follow from the image id, so that they do not depend on how many images there are
KEYPOINT_KEYS = ("keypoints", "skeleton", "flip_pairs", "sigmas")


@dataclass(frozen=True)
class Thing:
    """One drawn object.

    Attributes:
        category_id: its class.
        keypoints: (K,3) float32 x, y in px from the image's top left corner, visibility (0 outside, 1 hidden, 2 visible).
    """

    category_id: int
    keypoints: Array | None = None


@dataclass(frozen=True)
class Scene:
    """One drawn image and all that is in it.

    Attributes:
        image: (H,W,3) uint8 RGB.
        stuff: (H,W) uint8, category id of the ground behind the things, 0 where it is unlabelled.
        owner: (H,W) int16, index of the thing that is seen at this pixel, -1 where none is; every thing is seen somewhere.
        things: the things, back to front.
    """

    image: Array
    stuff: Array
    owner: Array
    things: tuple[Thing, ...]


def write_split(folder: Path, split: str, scenes: Iterable[Scene], categories: Sequence[Mapping[str, Any]]) -> None:
    """Writes the images and the three annotation files of a split.

    Args:
        folder: root of the data set.
        split: `train` or `val`.
        scenes: taken one by one.
        categories: COCO categories with `isthing`; those with `keypoints` go to the keypoint file too.

    Raises:
        OSError: something cannot be written.
    """
    for name in ("images", "annotations", f"panoptic_{split}"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    images, objects, panoptic = [], [], []
    for index, scene in enumerate(scenes):
        name, image_id = f"{split}_{index:05d}.png", FIRST_IMAGE_ID[split] + index
        height, width = scene.owner.shape
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        objects += _objects(scene, image_id)
        ids, segments = _segments(scene)
        panoptic.append({"image_id": image_id, "file_name": name, "segments_info": segments})
        _write_png(folder / "images" / name, scene.image)
        _write_png(folder / f"panoptic_{split}" / name, np.stack([ids, ids >> 8, ids >> 16], axis=-1).astype(np.uint8))
    plain = [{key: value for key, value in c.items() if key not in KEYPOINT_KEYS} for c in categories]
    posed = [dict(c) for c in categories if "keypoints" in c]
    bare = [{key: o[key] for key in o if key not in ("keypoints", "num_keypoints")} for o in objects]
    files = {
        "instances": ([c for c in plain if c["isthing"]], bare),
        "person_keypoints": (posed, [o for o in objects if o["category_id"] in {c["id"] for c in posed}]),
        "panoptic": (plain, panoptic),
    }
    for kind, (classes, rows) in files.items():
        info = {"description": f"queryvision scenes, {split}: drawn images"}
        content = {"info": info, "licenses": [], "images": images, "annotations": rows, "categories": classes}
        (folder / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))


def write_once(folder: Path, parameters: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Makes a folder unless it is there already; it appears complete or not at all.

    Two processes may do so at once: the first to finish wins, the other throws its copy away.

    Args:
        folder: the folder to make.
        parameters: what it is made of; a folder that was made of something else, or never finished, is made anew.
        write: fills the folder that it is given.

    Returns:
        `folder`.

    Raises:
        DataError: it cannot be written.
    """
    if _is_complete(folder, parameters):
        return folder
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        write(draft)
        (draft / MARKER).write_text(json.dumps(parameters))
        _put(draft, folder, parameters)
    except OSError as error:
        reason = error.strerror or error
        mend = "set QUERYVISION_CACHE to a folder that you can write to"
        raise DataError(f"{folder}: the drawn data set cannot be written ({reason}); {mend}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _put(draft: Path, folder: Path, parameters: Mapping[str, Any]) -> None:
    """Renames the draft; whatever incomplete lies at its place is moved away first."""
    for _ in range(3):  # another process may put its own there in between
        try:
            draft.rename(folder)
            return
        except OSError:
            if _is_complete(folder, parameters):
                return
            if not folder.exists():
                raise
        junk = draft.with_name(f"{draft.name}.old")
        try:
            folder.rename(junk)
        except FileNotFoundError:
            continue
        if junk.is_dir():
            shutil.rmtree(junk, ignore_errors=True)
        else:
            junk.unlink()
    draft.rename(folder)


def _is_complete(folder: Path, parameters: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / MARKER).read_text()) == parameters)
    except (OSError, ValueError):
        return False


def _objects(scene: Scene, image_id: int) -> list[dict[str, Any]]:
    """The annotations of an image, with keypoints where a thing has them."""
    rows = []
    for index, thing in enumerate(scene.things):
        mask = scene.owner == index
        runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        row = {
            "id": image_id * IDS_PER_IMAGE + index + 1,
            "image_id": image_id,
            "category_id": thing.category_id,
            "bbox": _box(mask),
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")},
        }
        if thing.keypoints is not None:
            row["keypoints"] = [value for x, y, v in thing.keypoints.tolist() for value in (round(x, 2), round(y, 2), int(v))]
            row["num_keypoints"] = int((thing.keypoints[:, 2] > 0).sum())
        rows.append(row)
    return rows


def _segments(scene: Scene) -> tuple[Array, list[dict[str, Any]]]:
    """The map of segment ids, (H,W) int32, and what each is; things first."""
    ids = np.zeros(scene.owner.shape, np.int32)
    masks = [(thing.category_id, index + 1, scene.owner == index) for index, thing in enumerate(scene.things)]
    ground = np.where(scene.owner < 0, scene.stuff, 0)
    masks += [(int(category), 0, ground == category) for category in np.unique(ground) if category]
    segments = []
    for category, number, mask in masks:
        # Any unique number does; this one uses all three bytes, and neighbours differ enough to be told apart by eye.
        segment_id = (50 + 12 * category) % 256 + 256 * (20 + 30 * number) + 65536 * (240 - 12 * category)
        ids[mask] = segment_id
        row = {"id": segment_id, "category_id": category, "area": int(mask.sum()), "bbox": _box(mask), "iscrowd": 0}
        segments.append(row)
    return ids, segments


def _box(mask: Array) -> list[int]:
    """X, y, width, height in px: the columns and rows that the mask touches."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


def _write_png(path: Path, rgb: Array) -> None:
    done, encoded = cv2.imencode(".png", rgb[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not done:
        raise OSError(f"{path} could not be encoded")
    path.write_bytes(encoded.tobytes())
