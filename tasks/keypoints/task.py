"""The keypoints task: labels, boxes and keypoints; COCO AP by object keypoint similarity, and of boxes beside it."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from queryvision.data.classes import ClassMap
from queryvision.data.skeletons import Skeleton
from queryvision.errors import DataError
from queryvision.evaluation.coco import CocoEvaluator
from queryvision.head import Steering
from queryvision.inference.drawing import color_of, draw_boxes, draw_keypoints
from queryvision.results import Result
from queryvision.task import Evaluator, HeadSpec, Task
from queryvision.tasks.detection.boxes import BoxHead
from queryvision.tasks.detection.labels import LabelHead, pick_by_labels
from queryvision.tasks.keypoints.keypoints import KeypointHead


class KeypointEvaluator:
    """COCO keypoint AP under its usual names, of boxes as `box_AP` ...; classes of different skeletons are averaged by class.

    Args:
        ground_truth: a COCO dictionary; its categories' skeletons and sigmas count.
        classes: of the model.
        backend: see `CocoEvaluator`.

    Raises:
        DataError: no category has keypoints, or none has the names that the model knows.
    """

    def __init__(self, ground_truth: dict[str, Any], classes: ClassMap, backend: Any) -> None:
        self.classes = classes
        self.boxes = CocoEvaluator(ground_truth, classes, "bbox", backend=backend)
        groups: dict[Skeleton, list[int]] = {}
        for category in ground_truth["categories"]:
            skeleton = Skeleton.from_category(category, "ground truth")
            if skeleton is not None:
                groups.setdefault(skeleton, []).append(category["id"])
        if not groups:
            raise DataError("ground truth: no category has keypoints; name them under 'keypoints' in 'categories'")
        known = {skeleton.names for skeleton in classes.skeletons if skeleton is not None}
        if not any(skeleton.names in known for skeleton in groups):
            first = next(iter(groups)).names
            raise DataError(
                f"ground truth: its keypoints ({', '.join(first)}) are not the model's; use the names it was trained with"
            )
        self.parts = {
            skeleton: CocoEvaluator(_only(ground_truth, ids), classes, "keypoints", backend=backend, sigmas=skeleton.sigmas)
            for skeleton, ids in groups.items()
        }

    @property
    def records(self) -> list[dict[str, Any]]:
        """Rows of a COCO results file, with keypoints."""
        return [row for part in self.parts.values() for row in part.records]

    def add(self, image_id: int, result: Result) -> None:
        """Takes the whole result of one image, without a threshold."""
        self.boxes.add(image_id, result)
        for skeleton, part in self.parts.items():
            names = {category["name"] for category in part.ground_truth["categories"]}
            part.add(image_id, _of_kind(result, skeleton, names))

    def compute(self) -> dict[str, float]:
        """{name: value}."""
        found = {skeleton: part.compute() for skeleton, part in self.parts.items()}
        names = dict.fromkeys(name for metrics in found.values() for name in metrics)
        weights = {s: sum(name.startswith("AP/") for name in metrics) for s, metrics in found.items()}  # classes with objects
        whole = {name: _mean([(m.get(name, math.nan), weights[s]) for s, m in found.items()]) for name in names}
        boxes = {f"box_{name}": value for name, value in self.boxes.compute().items() if "/" not in name}
        return {**{n: v for n, v in whole.items() if "/" not in n}, **boxes, **whole}

    def state(self) -> list[Any]:
        """What was added, of boxes and of each skeleton in order; see `Shareable`."""
        return [part.state() for part in (self.boxes, *self.parts.values())]

    def merge(self, states: Iterable[list[Any]]) -> None:
        """Takes in what other processes gathered; no image counts twice."""
        for state in states:
            for part, own in zip((self.boxes, *self.parts.values()), state, strict=True):
                part.merge([own])


def _mean(values: list[tuple[float, int]]) -> float:
    """Weighted; what is not known (NaN, or -1 as COCO has it) does not count."""
    known = [(value, weight) for value, weight in values if value >= 0]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else values[0][0]


def _only(ground_truth: Mapping[str, Any], ids: list[int]) -> dict[str, Any]:
    rows = {
        key: [r for r in ground_truth[key] if r[name] in ids]
        for key, name in (("categories", "id"), ("annotations", "category_id"))
    }
    return {**ground_truth, **rows}


def _of_kind(result: Result, skeleton: Skeleton, names: Container[str]) -> Result:
    """The objects of classes of these names with as many keypoints under the same names, without padding."""
    classes = result.classes
    own = [
        s is not None and s.names == skeleton.names and n in names
        for s, n in zip(classes.skeletons, classes.names, strict=True)
    ]
    keep = torch.tensor([own[label] for label in result.labels.tolist()], dtype=torch.bool)
    kept = {"keypoints": result.keypoints[keep][:, : len(skeleton)]}
    return replace(result, scores=result.scores[keep], labels=result.labels[keep], values=kept)


def _evaluator(ground_truth: dict[str, Any], classes: ClassMap, backend: str) -> Evaluator:
    return KeypointEvaluator(ground_truth, classes, backend)


def _draw(picture: Image.Image, result: Result) -> Image.Image:
    """Boxes, and keypoints that are more likely in the picture than not, with their limbs."""
    colors = [color_of(index) for index in range(len(result))]
    texts = [f"{name} {score:.2f}" for name, score in zip(result.names, result.scores.tolist(), strict=True)]
    picture = draw_boxes(picture, result.boxes.numpy(), texts, colors)
    for label, points, color in zip(result.labels.tolist(), result.keypoints, colors, strict=True):
        skeleton = result.classes.skeletons[label]
        if skeleton is not None:
            told = torch.cat((points[:, :2], 2.0 * (points[:, 2:] >= 0.5)), 1)[: len(skeleton)]
            picture = draw_keypoints(picture, told[None].numpy(), skeleton.limbs, [color])
    return picture


def _records(result: Result, image_id: int) -> list[dict[str, Any]]:
    """One row for each object, in order; empty where its class has no keypoints: COCO's tools read one kind of row only."""
    rows = []
    for label, score, points in zip(result.labels.tolist(), result.scores.tolist(), result.keypoints.tolist(), strict=True):
        row = {"image_id": image_id, "category_id": result.classes.ids[label], "score": score}
        skeleton = result.classes.skeletons[label]
        told = [] if skeleton is None else [value for point in points[: len(skeleton)] for value in point]
        rows.append({**row, "keypoints": told} if told else {})
    return rows


TASK = Task(
    name="keypoints",
    summary="keypoints and boxes of objects (COCO AP by keypoint similarity)",
    needs=("labels", "boxes", "keypoints"),
    heads={
        "labels": HeadSpec(LabelHead, ("fit", "num_classes")),
        "boxes": HeadSpec(BoxHead),
        "keypoints": HeadSpec(KeypointHead, ("fit", "skeletons")),
    },
    steering=Steering(rank="labels", first="boxes", later="boxes", quality=("boxes", "keypoints")),
    pick=pick_by_labels,
    evaluator=_evaluator,
    draw=_draw,
    records=_records,
)
