"""The detection task: labels and boxes, COCO AP."""

from __future__ import annotations

from typing import Any

from PIL import Image

from queryvision.data.classes import ClassMap
from queryvision.evaluation.coco import CocoEvaluator, coco_records
from queryvision.inference.drawing import color_of, draw_boxes
from queryvision.results import Result
from queryvision.task import Evaluator, HeadSpec, Task
from queryvision.tasks.detection.boxes import BoxHead
from queryvision.tasks.detection.labels import LabelHead, pick_by_labels
from queryvision.tasks.detection.models import STEERING


def _evaluator(ground_truth: dict[str, Any], classes: ClassMap, backend: str) -> Evaluator:
    return CocoEvaluator(ground_truth, classes, "bbox", backend=backend)  # type: ignore[arg-type]


def _draw(picture: Image.Image, result: Result) -> Image.Image:
    texts = [f"{name} {score:.2f}" for name, score in zip(result.names, result.scores.tolist(), strict=True)]
    return draw_boxes(picture, result.boxes.cpu().numpy(), texts, [color_of(label) for label in result.labels.tolist()])


def _records(result: Result, image_id: int) -> list[dict[str, Any]]:
    return coco_records(result, image_id, "bbox", dict(enumerate(result.classes.ids)))


TASK = Task(
    name="detection",
    summary="boxes around objects and their classes (COCO AP)",
    needs=("labels", "boxes"),
    heads={
        "labels": HeadSpec(LabelHead, ("fit", "num_classes")),
        "boxes": HeadSpec(BoxHead),
    },
    steering=STEERING,
    pick=pick_by_labels,
    evaluator=_evaluator,
    draw=_draw,
    records=_records,
)
