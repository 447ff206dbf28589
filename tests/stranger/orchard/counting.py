"""How many fruits hang on a tree: boxes, classes and a number for each object, from annotations with a `count`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from queryvision.data.classes import ClassMap
from queryvision.evaluation.coco import CocoEvaluator, category_ids
from queryvision.head import Fit, Head, View
from queryvision.inference.drawing import color_of, draw_boxes
from queryvision.layers.mlp import MLP
from queryvision.results import Result
from queryvision.structures import Answer, Facts, Match, Picks, Round, Targets
from queryvision.task import HeadSpec
from queryvision.tasks.detection import TASK as DETECTION


class CountHead(Head):
    """The logarithm of 1 + a count, from the state of a query.

    Args:
        fit: what the architecture gives to its heads.
        cost: weight of the distance in matching.
        weight: weight of the loss term `distance`.
    """

    name = "count"

    def __init__(self, fit: Fit | int, *, cost: float = 0.5, weight: float = 1.0) -> None:
        super().__init__()
        width = Fit.of(fit).width
        self.mlp = MLP(width, width, 1, 2)
        self.weight_in_matching = cost
        self.weights = {"distance": weight}

    def forward(self, view: View) -> Answer | None:
        """{"log": (B,Q)}; silent about proposals, which are many and become queries anyway."""
        return {"log": self.mlp(view.state)[..., 0]} if view.stage.kind == "layer" else None

    def count(self, targets: Targets, num_queries: int, repeats: int = 1) -> float:
        """Objects whose count is annotated."""
        return float(sum(targets.num_with[self.name]) * repeats)

    def cost(self, round: Round, targets: Targets, generators: Sequence[torch.Generator] | None) -> Tensor:
        """|difference of logarithms| of all pairs, (S,B,Q,T); 0 where nothing is annotated."""
        found, wanted = round.answers[self.name]["log"], targets[self.name].clamp(min=0).log1p()
        distance = (found[..., None] - wanted[None, :, None]).abs()
        return targets.only_known(self.weight_in_matching * distance, self.name)

    def loss(self, round: Round, match: Match, targets: Targets, facts: Facts) -> dict[str, Tensor]:
        """{"distance": (S,)}."""
        found, wanted = match.predicted(round.answers[self.name]["log"]), match.wanted(targets[self.name]).clamp(min=0).log1p()
        known = match.wanted(targets.has[self.name])
        distance = F.smooth_l1_loss(found, wanted, beta=0.1, reduction="none") * known
        return {"distance": match.sum_per_stage(distance / facts.normaliser)}

    def decode(self, round: Round, picks: Picks, sizes: Tensor) -> dict[str, Tensor]:
        """{"counts": (B,k)}."""
        return {"counts": round.answers[self.name]["log"][0].gather(1, picks.queries).float().expm1().clamp(min=0)}


class CountEvaluator:
    """COCO AP of boxes, and `right`: the share of annotated objects that were found (IoU of at least 0.5) and well counted."""

    def __init__(self, ground_truth: dict[str, Any], classes: ClassMap, backend: Any) -> None:
        self.boxes = CocoEvaluator(ground_truth, classes, "bbox", backend=backend)
        self.own = category_ids(classes, ground_truth)  # class of the model -> category of the ground truth, by name
        self.wanted: dict[int, list[dict[str, Any]]] = {}
        for row in ground_truth["annotations"]:
            if isinstance(row.get("count"), int | float) and not row["iscrowd"]:
                self.wanted.setdefault(row["image_id"], []).append(row)
        self.right: list[bool] = []
        self.records: list[dict[str, Any]] = []

    def add(self, image_id: int, result: Result) -> None:
        """Takes the whole result of one image, without a threshold."""
        self.boxes.add(image_id, result)
        self.records += records(result, image_id)
        for row in self.wanted.get(image_id, []):
            x, y, width, height = row["bbox"]
            same = torch.tensor(
                [self.own.get(label) == row["category_id"] for label in result.labels.tolist()], dtype=torch.bool
            )
            there = box_iou(torch.tensor([[x, y, x + width, y + height]]).float(), result.boxes)[0] >= 0.5
            best = (same & there).nonzero()[:1, 0]  # results come best first
            self.right.append(bool(((result.counts[best] - row["count"]).abs() <= 0.5).any()))

    def compute(self) -> dict[str, float]:
        """{name: value}."""
        return {"right": sum(self.right) / max(len(self.right), 1), **self.boxes.compute()}


def draw(picture: Image.Image, result: Result) -> Image.Image:
    """Boxes with class and count."""
    texts = [f"{name}: {count:.0f}" for name, count in zip(result.names, result.counts.tolist(), strict=True)]
    return draw_boxes(picture, result.boxes.numpy(), texts, [color_of(label) for label in result.labels.tolist()])


def records(result: Result, image_id: int) -> list[dict[str, Any]]:
    """COCO results with a `count`."""
    rows = zip(DETECTION.records(result, image_id), result.counts.tolist(), strict=True)
    return [{**row, "count": count} for row, count in rows]


TASK = replace(
    DETECTION,
    name="orchard.counting",
    summary="boxes of objects and how many things are on each",
    needs=("labels", "boxes", "count"),
    heads={**DETECTION.heads, "count": HeadSpec(CountHead)},
    evaluator=CountEvaluator,
    draw=draw,
    records=records,
    main_metric="right",
)
