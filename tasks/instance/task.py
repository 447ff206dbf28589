"""The instance task: labels, boxes and masks; COCO AP of masks, and of boxes beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from PIL import Image

from queryvision.data.classes import ClassMap
from queryvision.evaluation.coco import CocoEvaluator, coco_records
from queryvision.head import Fit, Head, Steering
from queryvision.inference.drawing import color_of, draw_boxes, draw_masks
from queryvision.results import Result
from queryvision.structures import Picks, Round
from queryvision.task import Evaluator, HeadSpec, Task
from queryvision.tasks.detection.boxes import BoxHead
from queryvision.tasks.detection.labels import LabelHead
from queryvision.tasks.instance.masks import MaskHead

STEERING = Steering(rank="labels", first="boxes", later="boxes", hidden="masks", quality=("boxes", "masks"))


def by_masks_alone(fit: Fit) -> bool:
    """Whether an architecture has no box head: boxes are then those of the masks."""
    return fit.hides


HEADS = {
    "labels": HeadSpec(LabelHead, ("fit", "num_classes")),
    "boxes": HeadSpec(BoxHead, unless=by_masks_alone),
    "masks": HeadSpec(MaskHead),
}


def _pick(heads: Mapping[str, Head], round: Round, limit: int) -> Picks:
    """The best (query, class) pairs; a score is the class's probability times the mean probability inside the mask.

    Both as published (mask2former:maskformer_model.py, instance_inference): with softmax labels, too, a query may give several
    results, one of each class.
    """
    picks = cast(LabelHead, heads["labels"]).pick(round, limit, pairs=True)
    scores = picks.scores * cast(MaskHead, heads["masks"]).certainty(round, picks.queries)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Picks(picks.queries.gather(1, order), picks.classes.gather(1, order), scores)


class InstanceEvaluator:
    """COCO AP of masks under its usual names, of boxes as `box_AP`, `box_AP50` ...; see `CocoEvaluator`."""

    def __init__(self, ground_truth: dict[str, Any], classes: ClassMap, backend: Any) -> None:
        self.masks = CocoEvaluator(ground_truth, classes, "segm", backend=backend)
        self.boxes = CocoEvaluator(ground_truth, classes, "bbox", backend=backend)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Rows of a COCO results file, with masks."""
        return self.masks.records

    def add(self, image_id: int, result: Result) -> None:
        """Takes the whole result of one image, without a threshold."""
        result = replace(result, values={name: getattr(result, name) for name in result.values})  # masks are built once
        self.masks.add(image_id, result)
        self.boxes.add(image_id, result)

    def compute(self) -> dict[str, float]:
        """{name: value}."""
        boxes = {f"box_{name}": value for name, value in self.boxes.compute().items() if "/" not in name}
        masks = self.masks.compute()
        whole = {name: value for name, value in masks.items() if "/" not in name}
        return {**whole, **boxes, **masks}

    def state(self) -> tuple[Any, Any]:
        """What was added, of masks and of boxes; see `Shareable`."""
        return self.masks.state(), self.boxes.state()

    def merge(self, states: Iterable[tuple[Any, Any]]) -> None:
        """Takes in what other processes gathered; no image counts twice."""
        for masks, boxes in states:
            self.masks.merge([masks])
            self.boxes.merge([boxes])


def _evaluator(ground_truth: dict[str, Any], classes: ClassMap, backend: str) -> Evaluator:
    return InstanceEvaluator(ground_truth, classes, backend)


def _draw(picture: Image.Image, result: Result) -> Image.Image:
    texts = [f"{name} {score:.2f}" for name, score in zip(result.names, result.scores.tolist(), strict=True)]
    shades = [color_of(index) for index in range(len(result))]  # touching objects of one class would melt together
    masks = torch.flip(result.masks, (0,)).numpy()  # the best on top
    return draw_boxes(draw_masks(picture, masks, shades[::-1]), result.boxes.numpy(), texts, shades)


def _records(result: Result, image_id: int) -> list[dict[str, Any]]:
    return coco_records(result, image_id, "segm", dict(enumerate(result.classes.ids)))


TASK = Task(
    name="instance",
    summary="masks and boxes of objects, and their classes (COCO AP of masks)",
    needs=("labels", "boxes", "masks"),
    heads=HEADS,
    steering=STEERING,
    pick=_pick,
    evaluator=_evaluator,
    draw=_draw,
    records=_records,
)
