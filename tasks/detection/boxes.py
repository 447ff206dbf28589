"""BoxHead: where a query's object is.

Legend: B images, Q queries, T targets, S stages, D width, k picks. Boxes are (cx, cy, w, h), 0..1 of the unpadded image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from queryvision.head import Feedback, Head, View
from queryvision.layers.mlp import MLP
from queryvision.ops.boxes import (
    box_iou,
    covered_share,
    cxcywh_to_xyxy,
    generalized_box_iou,
    inverse_sigmoid,
    pairwise_l1,
)
from queryvision.structures import Answer, Facts, Match, Picks, Round, Targets


class BoxHead(Head):
    """Three linear layers to a box; L1 and generalised IoU in matching and loss (arXiv 2005.12872).

    Where the layer looked around an anchor, the layers predict the change of the anchor's logits.

    Args:
        width: D.
        l1_cost: weight of the L1 distance in matching.
        giou_cost: weight of the negative generalised IoU in matching.
        l1: weight of the loss term `l1`.
        giou: weight of the loss term `giou`.
        ignore_share: a box with at least this share of its area in one ignore region is not taught as background.
    """

    name = "boxes"
    published: ClassVar[dict[str, dict[str, str]]] = {"detr": {"bbox_embed.": "mlp."}}

    def __init__(
        self,
        width: int,
        *,
        l1_cost: float = 5.0,
        giou_cost: float = 2.0,
        l1: float = 5.0,
        giou: float = 2.0,
        ignore_share: float = 0.5,
    ) -> None:
        super().__init__()
        self.mlp = MLP(width, width, 4, 3)
        self.l1_cost, self.giou_cost = l1_cost, giou_cost
        self.weights = {"l1": l1, "giou": giou}
        self.ignore_share = ignore_share

    def forward(self, view: View) -> Answer:
        """{"boxes": (B,Q,4)}, in float32 under any precision."""
        change = self.mlp(view.state).float()
        if view.anchors is not None:
            anchors = inverse_sigmoid(view.anchors.float())
            change = torch.cat((change[..., : anchors.shape[-1]] + anchors, change[..., anchors.shape[-1] :]), -1)
        return {"boxes": change.sigmoid()}

    def feedback(self, answer: Answer, view: View) -> Feedback:
        """The next layer looks around the box."""
        return Feedback(anchors=answer["boxes"])

    def count(self, targets: Targets, num_queries: int, repeats: int = 1) -> float:
        """Number of targets with a box."""
        return float(sum(targets.num_with["boxes"]) * repeats)

    def cost(self, round: Round, targets: Targets, generators: Sequence[torch.Generator] | None) -> Tensor:
        """L1 and generalised IoU of all pairs, (S,B,Q,T)."""
        boxes, wanted = round.answers[self.name]["boxes"], targets["boxes"]
        stages, batch, queries, _ = boxes.shape
        distance = pairwise_l1(boxes.transpose(0, 1).flatten(1, 2), wanted)
        distance = distance.view(batch, stages, queries, -1).transpose(0, 1)
        giou = generalized_box_iou(cxcywh_to_xyxy(boxes)[..., None, :], cxcywh_to_xyxy(wanted)[:, None])
        return targets.only_known(torch.add(distance * self.l1_cost, giou, alpha=-self.giou_cost), self.name)

    def quality(self, round: Round, match: Match, targets: Targets) -> tuple[Tensor, Tensor]:
        """IoU of the pair."""
        found = cxcywh_to_xyxy(match.predicted(round.answers[self.name]["boxes"]))
        iou = box_iou(found, cxcywh_to_xyxy(match.wanted(targets["boxes"])))
        return iou, match.wanted(targets.has["boxes"])

    def ignored(self, round: Round, targets: Targets) -> Tensor | None:
        """Boxes that lie in a crowd or ignore region, (S,B,Q)."""
        boxes = cxcywh_to_xyxy(round.answers[self.name]["boxes"].detach())
        return covered_share(boxes, cxcywh_to_xyxy(targets.ignore_boxes)) > self.ignore_share

    def loss(self, round: Round, match: Match, targets: Targets, facts: Facts) -> dict[str, Tensor]:
        """{"l1": (S,), "giou": (S,)}."""
        found, wanted = match.predicted(round.answers[self.name]["boxes"]), match.wanted(targets["boxes"])
        known = match.wanted(targets.has["boxes"]) / facts.normaliser
        l1 = (found - wanted).abs().sum(-1)
        giou = 1 - generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
        return {"l1": match.sum_per_stage(l1 * known), "giou": match.sum_per_stage(giou * known)}

    def decode(self, round: Round, picks: Picks, sizes: Tensor) -> dict[str, Tensor]:
        """{"boxes": (B,k,4)} x1 y1 x2 y2 in pixels of the original image."""
        boxes = cxcywh_to_xyxy(round.answers[self.name]["boxes"][0].float())
        boxes = boxes.gather(1, picks.queries[..., None].expand(-1, -1, 4))
        scale = sizes.flip(-1).repeat(1, 2)[:, None].to(boxes)
        return {"boxes": boxes * scale}
