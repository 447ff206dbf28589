"""Collects detections and scores them by COCO average precision (`coco_metrics`), in one process or in several.

Letters: k detections of an image, K keypoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from queryvision.data.classes import ClassMap
from queryvision.errors import DataError
from queryvision.evaluation.coco_metrics import Array, Backend, Kind, Record, detection_limit, evaluate, resolve
from queryvision.results import Result

__all__ = ["CocoEvaluator", "ImageDetections", "category_ids", "coco_records", "evaluate"]

FIELDS: dict[Kind, str] = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
"""Where a result has them."""
KEYS: dict[Kind, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
"""Where a record has them."""


class ImageDetections(TypedDict):
    """What is kept of one image until the end."""

    category_ids: NDArray[np.int64]  # (k,) of the ground truth
    scores: NDArray[np.float64]  # (k,)
    shapes: NDArray[np.float64] | list[Record]  # pixels: boxes (k,4) x y w h, keypoints (k,3K) x y v; masks: k RLEs
    num_unknown: int  # left out: of a class whose id means another class in the ground truth
    num_not_finite: int  # left out: NaN or infinite score, box or keypoint


class CocoEvaluator:
    """COCO average precision of boxes, masks or keypoints.

    Give it every detection, whatever its score: a threshold lowers the average precision.

    Args:
        ground_truth: a COCO dictionary (`images`, `annotations`, `categories`); it is not changed. Where an image lists
            `covered_category_ids`, detections of other classes there are left out: nobody says whether they are right.
        classes: the classes of the model. They meet the ground truth's categories by name, never by id.
        kind: what is compared.
        backend: "auto" takes `hotcoco` where it is installed, else `pycocotools`; the numbers are the same.
        max_detections: best detections of an image and class that count; None: 100, for keypoints 20, as published.
        sigmas: falloff of each keypoint, K numbers; None: the 17 of COCO.

    Raises:
        ConfigError: `kind` or `backend` is unknown or not installed, or `max_detections` is below 1.
        DataError: the categories of the ground truth are missing or ambiguous.
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any],
        classes: ClassMap,
        kind: Kind = "bbox",
        *,
        backend: Backend = "auto",
        max_detections: int | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        self.max_detections = detection_limit(kind, max_detections)
        self.ground_truth = ground_truth
        self.kind: Kind = kind
        self.backend: Backend = resolve(backend)
        self.sigmas = sigmas
        self.category_ids = category_ids(classes, ground_truth)
        self._sizes = {row["id"]: (row.get("height"), row.get("width")) for row in ground_truth["images"]}
        told = ((row["id"], row.get("covered_category_ids")) for row in ground_truth["images"])
        self._covered: dict[int, list[int]] = {id_: covered for id_, covered in told if covered is not None}
        self._images: dict[int, ImageDetections] = {}

    @property
    def num_unknown(self) -> int:
        """Detections left out because their class is not in the ground truth and its id means another class there."""
        return sum(row["num_unknown"] for row in self._images.values())

    @property
    def num_not_finite(self) -> int:
        """Detections left out because a score, box or keypoint is NaN or infinite."""
        return sum(row["num_not_finite"] for row in self._images.values())

    @property
    def records(self) -> list[Record]:
        """COCO results, ready for JSON, in the order of the image ids; any COCO tool scores them as `compute` does."""
        return [record for image_id in sorted(self._images) for record in _rows(image_id, self._images[image_id], self.kind)]

    def add(self, image_id: int, result: Result) -> None:
        """Takes in all detections of one image; an image that is already known is not counted twice.

        Raises:
            DataError: the image is not in the ground truth, or a mask has another size than it.
        """
        if image_id in self._images:
            return
        if image_id not in self._sizes:
            raise DataError(f"image {image_id} is not in the ground truth; evaluate on the split that the annotations describe")
        size = self._sizes[image_id]
        found = _mask_size(result) if self.kind == "segm" and None not in size else size
        if found != size:
            shape = "x".join(str(side) for side in found)
            raise DataError(f"image {image_id}: masks are {shape}, the annotations say {size[0]}x{size[1]} (height x width)")
        self._images[image_id] = _detections(result, self.kind, self.category_ids, self._covered.get(image_id))

    def compute(self) -> dict[str, float]:
        """Scores everything that was added; see `evaluate` for the names."""
        as_table = self.kind == "bbox" and max(self._images, default=0) < 2**53  # a larger id is not exact in double precision
        rows = self._table() if as_table else self.records
        return evaluate(self.ground_truth, rows, self.kind, self.backend, self.max_detections, self.sigmas)

    def _table(self) -> Array:
        """The boxes of `records` as one array (k,7): image id, x, y, w, h, score, category id."""
        parts = [np.zeros((0, 7))]
        for image_id, row in sorted(self._images.items()):
            ids = np.full(len(row["scores"]), image_id)
            parts.append(np.column_stack([ids, np.asarray(row["shapes"]), row["scores"], row["category_ids"]]))
        return np.concatenate(parts)

    def state(self) -> dict[int, ImageDetections]:
        """What was added, by image id: dictionaries, arrays and numbers, to be sent to another process."""
        return dict(self._images)

    def merge(self, states: Iterable[Mapping[int, ImageDetections]]) -> None:
        """Takes in what other processes gathered; an image that is already known is not counted twice."""
        for state in states:
            for image_id, row in state.items():
                self._images.setdefault(image_id, row)


def category_ids(classes: ClassMap, ground_truth: Mapping[str, Any]) -> dict[int, int]:
    """Class index of the model -> category id of the ground truth, by name.

    A class that the ground truth lacks keeps its own id, unless that id means something else there: then it is left out.
    """
    truth = ClassMap.from_categories(ground_truth.get("categories", ()), "ground truth")
    own = dict(zip(truth.names, truth.ids, strict=True))
    pairs = enumerate(zip(classes.names, classes.ids, strict=True))
    return {i: own.get(name, id_) for i, (name, id_) in pairs if name in own or id_ not in truth.index_of_id}


def coco_records(result: Result, image_id: int, kind: Kind, ids: Mapping[int, int]) -> list[Record]:
    """One image's detections as rows of a COCO results file.

    Args:
        result: boxes, masks or keypoints in pixels of the original image.
        image_id: id of the image in the ground truth.
        kind: "bbox" gives x y w h, "segm" a compressed RLE, "keypoints" x y v of each keypoint.
        ids: class index -> category id (`category_ids`); a class without one is left out.

    Returns:
        Numbers in double precision; what is not finite is left out.
    """
    return _rows(image_id, _detections(result, kind, ids), kind)


def _detections(result: Result, kind: Kind, ids: Mapping[int, int], covered: Sequence[int] | None = None) -> ImageDetections:
    labels, scores = _numpy(result.labels), _numpy(result.scores).astype(np.float64)
    shapes = _numpy(getattr(result, FIELDS[kind]))
    known, finite = np.isin(labels, list(ids)), np.isfinite(scores)
    if kind != "segm":
        shapes = shapes.astype(np.float64).reshape(len(shapes), math.prod(shapes.shape[1:]))
        finite &= np.isfinite(shapes).all(axis=1)
    keep = known & finite
    if covered is not None:
        keep &= np.isin(labels, [index for index, id_ in ids.items() if id_ in covered])
    shapes = shapes[keep]
    if kind == "bbox":
        shapes = np.concatenate([shapes[:, :2], shapes[:, 2:] - shapes[:, :2]], axis=1)
    return {
        "category_ids": np.array([ids[label] for label in labels[keep].tolist()], np.int64),
        "scores": scores[keep],
        "shapes": _encode(shapes) if kind == "segm" else shapes,
        "num_unknown": int((~known).sum()),
        "num_not_finite": int((known & ~finite).sum()),
    }


def _mask_size(result: Result) -> tuple[int, ...]:
    """Height and width of its masks, which are not built for it."""
    masks = result.values.get("masks")
    if masks is None:
        raise DataError(f"results hold {list(result.values)}, no 'masks' to compare")
    return tuple(masks.shape[1:]) if isinstance(masks, Tensor) else masks.size


def _numpy(value: Tensor) -> NDArray[Any]:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()  # NumPy knows no bfloat16


def _encode(masks: NDArray[Any]) -> list[dict[str, Any]]:
    """Masks (k,H,W) -> compressed RLE with text counts; kept so, because k full masks of every image would fill the memory."""
    from pycocotools import mask

    rows = mask.encode(np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0)))
    return [{"size": [int(side) for side in row["size"]], "counts": row["counts"].decode("ascii")} for row in rows]


def _rows(image_id: int, row: ImageDetections, kind: Kind) -> list[Record]:
    shapes = row["shapes"].tolist() if isinstance(row["shapes"], np.ndarray) else row["shapes"]
    key = KEYS[kind]  # and no other: a box beside a mask or keypoints would change the area that COCO tools take
    rows = zip(row["category_ids"].tolist(), shapes, row["scores"].tolist(), strict=True)
    return [{"image_id": image_id, "category_id": id_, key: shape, "score": score} for id_, shape, score in rows]
