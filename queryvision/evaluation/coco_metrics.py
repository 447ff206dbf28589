"""COCO average precision (Lin et al., arXiv 1405.0312) by `hotcoco` or by `pycocotools`: the same numbers from either.

The numbers are read here from the precision and recall arrays of the backend, because the summary of `pycocotools`
(`cocoeval.py`, `summarize`) reports -1 as soon as the detection limit is not 100.

Letters: T IoU thresholds, R recall thresholds, C categories, A area ranges, M detection limits, K keypoints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from queryvision.data.annotations import look_up
from queryvision.data.classes import ClassMap
from queryvision.errors import ConfigError, DataError, nearest

Kind = Literal["bbox", "segm", "keypoints"]
Backend = Literal["auto", "hotcoco", "pycocotools"]
Record = dict[str, Any]
Array = NDArray[np.float64]

LIMITS: dict[str, int] = {"bbox": 100, "segm": 100, "keypoints": 20}
"""Detections of an image and class that count, as published."""
AREAS: dict[str, str] = {"bbox": "sml", "segm": "sml", "keypoints": "ml"}
NUM_COCO_KEYPOINTS = 17


def evaluate(
    ground_truth: Mapping[str, Any],
    records: Sequence[Record] | Array,
    kind: Kind = "bbox",
    backend: Backend = "auto",
    max_detections: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> dict[str, float]:
    """Scores COCO results; nothing is changed in place.

    `records` are rows of a results file. Boxes may also be an array (k,7) of image id, x, y, w, h, score, category id, which
    saves most of the time and memory that dictionaries cost. The other arguments are those of `CocoEvaluator`.

    Records of unknown images or categories do not count, nor do objects of categories that their image does not list in
    `covered_category_ids`, where it has that. An object without its mask or keypoints is an ignore region. Where
    annotations lack `iscrowd` or `area`, they are no crowds and have the area of their box.

    Returns:
        Numbers 0..1, or -1 where the ground truth has nothing of the kind: `AP`, `AP50`, `AP75`, by area `APs`, `APm`, `APl`
        (keypoints: no `s`), `AR1`, `AR10`, `AR100` by detections of an image and class, up to `max_detections` (keypoints:
        `AR`, `AR50`, `AR75`), `ARs`, `ARm`, `ARl`, and `AP/<name>` of each category that has ground truth.

    Raises:
        ConfigError: `kind` or `backend` is unknown or not installed, `max_detections` is below 1, a sigma not above 0.
        DataError: the categories are ambiguous, an annotation lacks its box, an image lacks its size (masks), a score is not
            finite, or keypoints and `sigmas` differ in number.
        ValueError: an array of another shape, or for masks or keypoints.
    """
    most = detection_limit(kind, max_detections)
    limits = [most] if kind == "keypoints" else sorted({n for n in (1, 10, 100) if n < most} | {most})
    classes = ClassMap.from_categories(ground_truth.get("categories", ()), "ground truth")
    if sigmas is not None and not all(sigma > 0 for sigma in sigmas):
        raise ConfigError(f"sigmas are {list(sigmas)}; each must be above 0")
    num_keypoints = NUM_COCO_KEYPOINTS if sigmas is None else len(sigmas)
    # Backends take no negative ids. The order stays: it decides between equal scores.
    places = {id_: place for place, id_ in enumerate(sorted({row["id"] for row in ground_truth["images"]}))}
    truth = _prepare(ground_truth, places, classes, kind, num_keypoints)
    rows = _select(records, places, classes, kind, num_keypoints)
    run = _hotcoco if resolve(backend) == "hotcoco" else _pycocotools
    return _summary(*run(truth, rows, kind, limits, sigmas), classes, kind, limits)


def detection_limit(kind: str, max_detections: int | None) -> int:
    """The number of detections of an image and class that count; None stands for the published one."""
    if kind not in LIMITS:
        raise ConfigError(f"kind '{kind}' cannot be evaluated: {nearest(kind, LIMITS)}")
    if max_detections is not None and max_detections < 1:
        raise ConfigError(f"max_detections is {max_detections}; it must be at least 1")
    return LIMITS[kind] if max_detections is None else max_detections


def resolve(backend: str) -> Literal["hotcoco", "pycocotools"]:
    """The backend that is installed and asked for."""
    for name in ("hotcoco", "pycocotools"):
        if backend in ("auto", name):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
                return name
    if backend in get_args(Backend):
        raise ConfigError(f"backend '{backend}' needs a package: pip install {'hotcoco' if backend == 'auto' else backend}")
    raise ConfigError(f"there is no backend '{backend}': {nearest(backend, get_args(Backend))}")


def _prepare(
    ground_truth: Mapping[str, Any], places: Mapping[int, int], classes: ClassMap, kind: Kind, num_keypoints: int
) -> dict[str, Any]:
    """A copy that any backend reads alike: complete rows, known images and categories only, no key that is not needed.

    Images have their place for an id, categories the index of their class.
    """
    images = {row["id"]: {key: row[key] for key in ("height", "width") if key in row} for row in ground_truth["images"]}
    if kind == "segm" and not all(row.get("height") and row.get("width") for row in images.values()):
        raise DataError("ground truth: an image lacks its height or width, which masks need; add both to every row of 'images'")
    listed = ((row["id"], row.get("covered_category_ids")) for row in ground_truth["images"])
    covered = {id_: known for id_, known in listed if known is not None}
    annotations: list[Record] = []
    for row in ground_truth.get("annotations", ()):
        if row["image_id"] not in images or row["category_id"] not in classes.index_of_id:
            continue
        if row["category_id"] not in covered.get(row["image_id"], (row["category_id"],)):
            continue
        if row.get("bbox") is None:
            raise DataError(f"annotation {row.get('id')} of the ground truth has no 'bbox'; check the file")
        x, y, width, height = map(float, row["bbox"])
        area, crowd = row.get("area"), int(bool(row.get("iscrowd")))
        kept = {
            "id": len(annotations) + 1,  # pycocotools takes a match with annotation 0 for none
            "image_id": places[row["image_id"]],
            "category_id": classes.index_of_id[row["category_id"]],
            "bbox": [x, y, width, height],
            "area": width * height if area is None else float(area),
            "iscrowd": crowd,
        }
        if kind == "segm":
            right, bottom = x + width, y + height
            outline = _outline(row.get("segmentation"))
            kept["segmentation"] = outline or [[x, y, right, y, right, bottom, x, bottom]]
            kept["iscrowd"] = crowd if outline else 1
        elif kind == "keypoints":
            points = list(row.get("keypoints") or [0] * (3 * num_keypoints))
            _check_keypoints(points, num_keypoints, f"annotation {row.get('id')} of the ground truth")
            kept |= {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
        annotations.append(kept)
    return {
        "images": [{"id": places[id_], **row} for id_, row in images.items()],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(classes.names)],
    }


def _select(
    records: Sequence[Record] | Array, places: Mapping[int, int], classes: ClassMap, kind: Kind, num_keypoints: int
) -> list[Record] | Array:
    """A copy of the records that can count, checked, with the ids of `_prepare`."""
    if isinstance(records, np.ndarray):
        if kind != "bbox" or records.shape[1:] != (7,):
            raise ValueError(f"only boxes may be an array, of shape (k,7); this is {kind}, {records.shape}")
        if not np.isfinite(records).all():
            raise DataError("results: a score or a box is not a finite number")
        image, known = look_up(records[:, 0], np.array(list(places)))
        label, named = look_up(records[:, 6], np.array(classes.ids))
        keep = known & named
        table: Array = records[keep]
        table[:, 0], table[:, 6] = image[keep], label[keep]
        return table
    rows = []
    for row in records:
        if row["image_id"] not in places or row["category_id"] not in classes.index_of_id:
            continue
        if not math.isfinite(row["score"]):
            raise DataError(f"results of image {row['image_id']}: a score is {row['score']}; it must be a finite number")
        if kind == "keypoints":
            _check_keypoints(row["keypoints"], num_keypoints, f"results of image {row['image_id']}")
        ids = {"image_id": places[row["image_id"]], "category_id": classes.index_of_id[row["category_id"]]}
        rows.append({**row, **ids})
    return rows


def _outline(segmentation: Any) -> Any:
    """What can be filled: an RLE, or the polygons that have at least three points (`pycocotools` takes others for boxes)."""
    return segmentation if isinstance(segmentation, dict) else [part for part in segmentation or () if len(part) >= 6]


def _check_keypoints(points: Sequence[float], number: int, where: str) -> None:
    if len(points) != 3 * number:
        raise DataError(f"{where}: {len(points) / 3:g} keypoints, but {number} sigmas; give one sigma a keypoint")


def _hotcoco(
    truth: Record, rows: list[Record] | Array, kind: Kind, limits: list[int], sigmas: Sequence[float] | None
) -> tuple[Array, Array]:
    """Precision (T,R,C,A,M) and recall (T,C,A,M), -1 where there is no ground truth."""
    import hotcoco

    known = hotcoco.COCO(truth)
    scoring = hotcoco.COCOeval(known, known.load_res(rows), kind)
    scoring.params.max_dets = limits
    if sigmas is not None:
        scoring.params.kpt_oks_sigmas = list(sigmas)
    scoring.evaluate()
    scoring.accumulate()
    arrays = scoring.eval
    assert arrays is not None  # accumulate() has just written it
    return arrays["precision"], arrays["recall"]


def _pycocotools(
    truth: Record, rows: list[Record] | Array, kind: Kind, limits: list[int], sigmas: Sequence[float] | None
) -> tuple[Array, Array]:
    """As `_hotcoco`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        known, found = COCO(), COCO()
        known.dataset = truth
        known.createIndex()
        if len(rows):
            found = known.loadRes(rows)
        else:  # loadRes looks at the first row to learn the kind
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        scoring = COCOeval(known, found, kind)
        scoring.params.maxDets = limits
        if sigmas is not None:
            scoring.params.kpt_oks_sigmas = np.array(sigmas)
        scoring.evaluate()
        scoring.accumulate()
    return scoring.eval["precision"], scoring.eval["recall"]


def _summary(precision: Array, recall: Array, classes: ClassMap, kind: Kind, limits: list[int]) -> dict[str, float]:
    """The named numbers; area 0 is all, the last limit is the largest, IoU thresholds are 0.5, 0.55 ... 0.95."""
    best, found = precision[..., -1], recall[..., -1]
    numbers = {"AP": best[..., 0], "AP50": best[0, ..., 0], "AP75": best[5, ..., 0]}
    numbers |= {f"AP{area}": best[..., i] for i, area in enumerate(AREAS[kind], 1)}
    if kind == "keypoints":
        numbers |= {"AR": found[..., 0], "AR50": found[0, ..., 0], "AR75": found[5, ..., 0]}
    else:
        numbers |= {f"AR{limit}": recall[..., 0, i] for i, limit in enumerate(limits)}
    numbers |= {f"AR{area}": found[..., i] for i, area in enumerate(AREAS[kind], 1)}
    numbers |= {f"AP/{name}": best[:, :, i, 0] for i, name in enumerate(classes.names) if (best[:, :, i, 0] > -1).any()}
    return {name: _mean(values) for name, values in numbers.items()}


def _mean(values: Array) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0
