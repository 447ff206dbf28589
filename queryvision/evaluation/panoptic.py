"""Collects the segments of images and scores them by panoptic quality and mean IoU (`panoptic_quality`).

Letters: C categories of the ground truth, k segments of an image, H, W pixels, r runs of them.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from queryvision.data.classes import ClassMap
from queryvision.errors import DataError
from queryvision.evaluation.coco import category_ids
from queryvision.evaluation.coco_metrics import Backend, resolve
from queryvision.evaluation.panoptic_files import describe, occupied, read_ids, segments_of, write_ids, write_json
from queryvision.evaluation.panoptic_quality import (
    EVENT,
    Array,
    Integers,
    contingency,
    judge_pixels,
    judge_segments,
    places,
    runs,
    summary,
)
from queryvision.inference.drawing import segment_colors
from queryvision.results import Result

Record = dict[str, Any]


class ImageSegments(TypedDict):
    """What is kept of one image until the end."""

    events: Array  # (e,5), see `judge_segments`
    pixels: Integers  # (m,3), see `judge_pixels`
    segments: list[Record]  # k rows of `segments_info`
    size: tuple[int, ...]  # H, W
    map: bytes  # compressed (2,r) uint32: of each run 1 + the number of a segment, or 0; and its pixels


@dataclass(frozen=True)
class _Cut:
    """An image in runs."""

    size: tuple[int, ...]  # H, W
    truth: NDArray[Any] | None  # (r,) ids of the ground truth, if it describes the image
    pixels: Integers  # (r,)


class PanopticEvaluator:
    """Panoptic quality and mean IoU.

    Every image that the ground truth describes counts: one without a result has found nothing.

    Args:
        ground_truth: a COCO panoptic dictionary (`images`, `annotations` with `segments_info`, `categories`) that also holds
            its maps: `segments`, image id -> (H,W) ids, or `folder` of the PNGs. It is not changed.
        classes: the classes of the model. They meet the ground truth's categories by name, never by id.
        backend: "auto" and "hotcoco" count here, image by image; "pycocotools" writes PNGs and asks `panopticapi`. The numbers
            are the same.

    Raises:
        ConfigError: `backend` is unknown or not installed.
        DataError: the categories of the ground truth are missing or ambiguous, or nothing says where its maps are.
    """

    def __init__(self, ground_truth: Mapping[str, Any], classes: ClassMap, backend: Backend = "auto") -> None:
        if "segments" not in ground_truth and "folder" not in ground_truth:
            raise DataError("panoptic ground truth: its maps are missing; name their 'folder'")
        self.ground_truth = ground_truth
        resolve(backend)
        self.by_panopticapi = backend == "pycocotools"
        self.classes = ClassMap.from_categories(ground_truth.get("categories", ()), "ground truth")
        self._truth: dict[int, Record] = {row["image_id"]: row for row in ground_truth["annotations"]}
        self._ids = {row["id"] for row in ground_truth["images"]}
        self._column = np.full(len(classes) + 1, len(self.classes))  # class of the model -> that of the ground truth, C: none
        for index, id_ in category_ids(classes, ground_truth).items():
            self._column[index] = self.classes.index_of_id.get(id_, len(self.classes))
        self._images: dict[int, ImageSegments] = {}

    @property
    def records(self) -> list[Record]:
        """Annotations in COCO's panoptic format, in the order of the image ids; `save` writes the PNGs that they describe."""
        return [
            {"image_id": id_, "file_name": f"{id_:012d}.png", "segments_info": self._images[id_]["segments"]}
            for id_ in sorted(self._images)
        ]

    def add(self, image_id: int, result: Result) -> None:
        """Takes in one image; an image that is already known is not counted twice.

        Args:
            image_id: id of the image in the ground truth.
            result: segments that do not overlap; `maps["semantic"]` (H,W) says the class of every pixel, else the segments do.

        Raises:
            DataError: the image is not in the ground truth, or has another size than there.
            TypeError: the masks of the result may overlap.
        """
        if image_id in self._images:
            return
        if image_id not in self._ids:
            raise DataError(f"image {image_id} is not in the ground truth; evaluate on the split that the annotations describe")
        masks, columns = segments_of(result).cpu(), self._column[result.labels.cpu().numpy()]
        maps = [masks.map.numpy(), *([result.maps["semantic"].cpu().numpy()] if "semantic" in result.maps else [])]
        (numbers, *classes), cut = self._cut(image_id, maps)
        rows, kept = occupied(masks.rows(torch.from_numpy(numbers)).numpy(), columns < len(self.classes))
        found = columns[kept]
        # -1 is the last, none
        semantic = self._column[classes[0]] if classes else np.append(found, len(self.classes))[rows - 1]
        row = self._judge(image_id, cut, rows, found, semantic)
        colors = segment_colors(found.tolist(), self.classes)
        areas = np.bincount(rows, weights=cut.pixels, minlength=1)[1:].astype(np.int64).tolist()
        row["segments"] = describe(areas, [self.classes.ids[i] for i in found], colors, result.scores[kept].tolist())
        self._images[image_id] = row

    def compute(self) -> dict[str, float]:
        """Scores everything that was added; see `summary` for the names."""
        images = [self._images[id_] if id_ in self._images else self._nothing(id_) for id_ in self._truth]
        size = len(self.classes)
        totals, confusion = np.zeros((size, 4)), np.zeros((size, size + 1))
        for row in images:
            np.add.at(totals, row["events"][:, 0].astype(np.int64), row["events"][:, 1:])
            np.add.at(confusion, (row["pixels"][:, 0], row["pixels"][:, 1]), row["pixels"][:, 2])
        if self.by_panopticapi:
            totals = self._ask_panopticapi(dict(zip(self._truth, images, strict=True)))
        return summary(totals, confusion, self.classes)

    def save(self, file: Path) -> None:
        """Writes `records` as COCO's panoptic JSON, and their PNGs into the folder that has its name without the suffix."""
        folder = file.with_suffix("") if file.suffix else file.with_name(f"{file.name}_png")
        folder.mkdir(parents=True, exist_ok=True)
        for record in self.records:
            _write_png(folder / record["file_name"], self._images[record["image_id"]])
        images = [row for row in self.ground_truth["images"] if row["id"] in self._images]
        write_json(file, images, self.records, self.ground_truth["categories"])

    def state(self) -> dict[int, ImageSegments]:
        """What was added, by image id: dictionaries, arrays, numbers and bytes, to be sent to another process."""
        return dict(self._images)

    def merge(self, states: Iterable[Mapping[int, ImageSegments]]) -> None:
        """Takes in what other processes gathered; an image that is already known is not counted twice."""
        for state in states:
            for image_id, row in state.items():
                self._images.setdefault(image_id, row)

    def _cut(self, image_id: int, maps: Sequence[NDArray[Any]]) -> tuple[list[NDArray[Any]], _Cut]:
        """Cuts found maps (H,W), of segments and of classes, together with the ground truth's into runs; (r,) of each."""
        if image_id not in self._truth:
            values, pixels = runs(*maps)
            return values, _Cut(maps[0].shape, None, pixels)
        truth = self._map(image_id)
        for kind, found in zip(("segments", "classes of pixels"), maps, strict=False):
            if found.shape != truth.shape:
                shape, wanted = ("x".join(map(str, sides)) for sides in (found.shape, truth.shape))
                raise DataError(f"image {image_id}: {kind} are {shape}, the annotations say {wanted} (height x width)")
        (*values, ids), pixels = runs(*maps, truth)
        return values, _Cut(truth.shape, ids, pixels)

    def _judge(self, image_id: int, cut: _Cut, rows: Integers, found: Integers, semantic: Integers) -> ImageSegments:
        """Counts what is right and wrong; in an image that the ground truth does not describe, nothing is.

        Args:
            image_id: of the image.
            cut: its runs.
            rows: (r,) 1 + the number of a segment, or 0.
            found: (k,) class of each.
            semantic: (r,) class 0..C.
        """
        events, confused = np.zeros((0, len(EVENT))), np.zeros((0, 3), np.int64)
        if cut.truth is not None:
            segments = self._segments(image_id)
            place, height = places(segments, cut.truth), len(segments) + 2
            shared = contingency(place, rows, cut.pixels, (height, len(found) + 1))
            events = judge_segments(segments, shared, found, self.classes)
            shared = contingency(place, semantic, cut.pixels, (height, len(self.classes) + 1))
            confused = judge_pixels(segments, shared, self.classes)
        starts = np.flatnonzero(np.diff(rows, prepend=-1))  # where the ground truth changed nothing has to begin
        packed = np.stack([rows[starts], np.add.reduceat(cut.pixels, starts)]).astype(np.uint32).tobytes()
        return {"events": events, "pixels": confused, "segments": [], "size": cut.size, "map": zlib.compress(packed, 1)}

    def _segments(self, image_id: int) -> list[Record]:
        """Rows of `segments_info` whose categories are known."""
        return [row for row in self._truth[image_id]["segments_info"] if row["category_id"] in self.classes.index_of_id]

    def _nothing(self, image_id: int) -> ImageSegments:
        """An image in which nothing was found."""
        _, cut = self._cut(image_id, [])
        rows = np.zeros(len(cut.pixels), np.int64)
        return self._judge(image_id, cut, rows, np.zeros(0, np.int64), rows + len(self.classes))

    def _map(self, image_id: int) -> NDArray[Any]:
        """Ids of the ground truth, (H,W)."""
        if "segments" in self.ground_truth:
            return np.asarray(self.ground_truth["segments"](image_id))
        return read_ids(Path(self.ground_truth["folder"]) / self._truth[image_id]["file_name"])

    def _ask_panopticapi(self, images: Mapping[int, ImageSegments]) -> Array:
        """(C,4) sums of events, counted by `panopticapi` in files."""
        from panopticapi.evaluation import pq_compute_single_core

        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            truth_folder, found_folder = f"{name}/truth", f"{name}/found"
            pairs = []
            for folder in (truth_folder, found_folder):
                Path(folder).mkdir()
            for image_id, row in images.items():
                png, ids = f"{image_id}.png", self._map(image_id)
                write_ids(f"{truth_folder}/{png}", ids)
                _write_png(Path(found_folder) / png, row)
                truth = [{"iscrowd": 0, "area": int((ids == s["id"]).sum()), **s} for s in self._segments(image_id)]
                found = [dict(segment) for segment in row["segments"]]  # it writes into them
                pairs.append([{"image_id": image_id, "file_name": png, "segments_info": s} for s in (truth, found)])
            categories = {row["id"]: row for row in self.ground_truth["categories"]}
            stat = pq_compute_single_core(0, pairs, truth_folder, found_folder, categories)
        return np.array([[getattr(stat[id_], key) for key in EVENT[1:]] for id_ in self.classes.ids], np.float64)


def _write_png(path: Path, row: ImageSegments) -> None:
    rows, pixels = np.frombuffer(zlib.decompress(row["map"]), np.uint32).reshape(2, -1)
    ids = np.array([0, *(segment["id"] for segment in row["segments"])])[rows]
    write_ids(path, np.repeat(ids, pixels).reshape(row["size"]))
