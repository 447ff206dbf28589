"""The keypoints task: labels, boxes and keypoints; COCO AP by object keypoint similarity, and of boxes beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """COCO keypoint AP under its usual names, of boxes as `box_AP` ...; each is the mean over the classes that have it.

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
        told = [(category, Skeleton.from_category(category, "ground truth")) for category in ground_truth["categories"]]
        posed = [(category, skeleton) for category, skeleton in told if skeleton is not None]
        if not posed:
            raise DataError("ground truth: no category has keypoints; name them under 'keypoints' in 'categories'")
        known = {skeleton.names for skeleton in classes.skeletons if skeleton is not None}
        if not any(skeleton.names in known for _, skeleton in posed):
            names = ", ".join(posed[0][1].names)
            raise DataError(f"ground truth: its keypoints ({names}) are not the model's; use the names it was trained with")
        self.parts: list[tuple[str, Skeleton, CocoEvaluator]] = []
        for category, skeleton in posed:
            truth = _only(ground_truth, category["id"])
            part = CocoEvaluator(truth, classes, "keypoints", backend=backend, sigmas=skeleton.sigmas)
            self.parts.append((category["name"], skeleton, part))

    @property
    def records(self) -> list[dict[str, Any]]:
        """Rows of a COCO results file, with keypoints."""
        return [row for _, _, part in self.parts for row in part.records]

    def add(self, image_id: int, result: Result) -> None:
        """Takes the whole result of one image, without a threshold."""
        self.boxes.add(image_id, result)
        for name, skeleton, part in self.parts:
            part.add(image_id, _of_class(result, name, skeleton))

    def compute(self) -> dict[str, float]:
        """{name: value}."""
        found = [part.compute() for _, _, part in self.parts]
        names = dict.fromkeys(name for metrics in found for name in metrics)
        whole = {name: _mean([metrics[name] for metrics in found if name in metrics]) for name in names}
        boxes = {f"box_{name}": value for name, value in self.boxes.compute().items() if "/" not in name}
        return {**{n: v for n, v in whole.items() if "/" not in n}, **boxes, **whole}

    def state(self) -> list[Any]:
        """What was added, of boxes and of each class in order; see `Shareable`."""
        return [part.state() for part in self._all()]

    def merge(self, states: Iterable[list[Any]]) -> None:
        """Takes in what other processes gathered; no image counts twice."""
        for state in states:
            for part, own in zip(self._all(), state, strict=True):
                part.merge([own])

    def _all(self) -> list[CocoEvaluator]:
        return [self.boxes, *(part for _, _, part in self.parts)]


def _mean(values: list[float]) -> float:
    """What is not known (NaN, or -1 as COCO has it) does not count."""
    known = [value for value in values if value >= 0]
    return sum(known) / len(known) if known else values[0]


def _only(ground_truth: Mapping[str, Any], id_: int) -> dict[str, Any]:
    rows = {
        key: [r for r in ground_truth[key] if r[name] == id_]
        for key, name in (("categories", "id"), ("annotations", "category_id"))
    }
    return {**ground_truth, **rows}


def _of_class(result: Result, name: str, skeleton: Skeleton) -> Result:
    """The objects of the class of this name, if its keypoints have the same names, too; without padding."""
    classes = result.classes
    own = [
        s is not None and s.names == skeleton.names and n == name for s, n in zip(classes.skeletons, classes.names, strict=True)
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
