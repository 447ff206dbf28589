"""BoxHead: where a query's object is.

Legend: B images, Q queries, T targets, S stages, D width, k picks. Boxes are (cx, cy, w, h), 0..1 of the unpadded image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.errors import check_range
from queryvision.head import DenoisingPlan, Feedback, Fit, Head, Noise, View
from queryvision.layers.mlp import MLP
from queryvision.layers.per_stage import PerStage
from queryvision.ops.boxes import (
    box_iou,
    covered_share,
    cxcywh_to_xyxy,
    generalized_box_iou,
    inverse_sigmoid,
    pairwise_l1,
    xyxy_to_cxcywh,
)
from queryvision.ops.noise import uniform
from queryvision.structures import Answer, Facts, Match, Picks, Round, Targets
from queryvision.tasks.detection.edges import Edges, of_this_batch


class BoxHead(Head):
    """Three linear layers to a box; L1 and generalised IoU in matching and loss (arXiv 2005.12872).

    Where the layer looked around an anchor, the layers predict the change of the anchor's logits (arXiv 2010.04159). Where the
    architecture refines distributions (`Fit.distributions`), each layer predicts the edges as such (D-FINE, arXiv 2410.13842):
    `fgl` draws them to the two bins around the target, `ddf` to the last layer's, and pairs are those that any layer found.

    Args:
        fit: D, or all that it must fit.
        l1_cost: weight of the L1 distance in matching.
        giou_cost: weight of the negative generalised IoU in matching.
        l1: weight of the loss term `l1`.
        giou: weight of the loss term `giou`.
        ignore_share: a box with at least this share of its area in one ignore region is not taught as background.
        box_noise: denoising queries: how far a corner may move, as a share of half the size; up to twice that for queries that
            must learn to say no (arXiv 2203.03605).
        fgl: with distributions: weight of the fine-grained localisation loss `fgl`.
        ddf: with distributions: weight of the distillation from the last layer `ddf`. A mean over queries, it is made per
            micro-batch.
        bins: with distributions: how many, even.
        bound: with distributions: how far an edge may move, as a share of the box; the outermost bins say twice that.
        scale: with distributions: larger means bins that lie more evenly.

    Raises:
        ConfigError: a number is out of range.
    """

    name = "boxes"
    published: ClassVar[dict[str, dict[str, str]]] = {
        "detr": {"bbox_embed.": "mlp.layers.0."},
        "deformable_detr": {"bbox_embed.": "mlp.layers.", "transformer.enc_out_bbox_embed.": "mlp.proposals."},
        "dino": {"bbox_embed.": "mlp.layers.", "transformer.enc_out_bbox_embed.": "mlp.proposals."},
        "rtdetrv2": {"model.decoder.bbox_embed.": "mlp.layers.", "model.enc_bbox_head.": "mlp.proposals."},
        "dfine": {
            "model.decoder.bbox_embed.": "edges.layers.",
            "model.decoder.lqe_layers.": "edges.judges.",
            "model.decoder.pre_bbox_head.": "mlp.layers.0.",
            "model.enc_bbox_head.": "mlp.proposals.",
        },
        "maskdino": {"sem_seg_head.predictor._bbox_embed.": "mlp.layers.0."},
    }

    def __init__(
        self,
        fit: Fit | int,
        *,
        l1_cost: float = 5.0,
        giou_cost: float = 2.0,
        l1: float = 5.0,
        giou: float = 2.0,
        ignore_share: float = 0.5,
        box_noise: float = 0.4,
        fgl: float = 0.15,
        ddf: float = 1.5,
        bins: int = 32,
        bound: float = 0.5,
        scale: float = 4.0,
    ) -> None:
        super().__init__()
        check_range("heads.boxes", 0, 1, ignore_share=ignore_share)
        check_range("heads.boxes", 0, math.inf, l1_cost=l1_cost, giou_cost=giou_cost, l1=l1, giou=giou, box_noise=box_noise)
        check_range("heads.boxes", 0, math.inf, fgl=fgl, ddf=ddf)
        self.fit = Fit.of(fit)
        self.edges: Edges | None = None
        if self.fit.distributions:  # the layers' own; what is left is for proposals and the first guess
            self.edges = Edges(self.fit, bins, bound, scale)
            self.matched_by = "union"
        self.mlp = PerStage(self._mlp, replace(self.fit, num_layers=1) if self.edges else self.fit)
        if self.fit.anchors == 2:  # the size is not an anchor's: the first layer starts from small boxes
            nn.init.constant_(cast(MLP, self.mlp.layers[0]).last.bias[2:], -2.0)
        self.l1_cost, self.giou_cost = l1_cost, giou_cost
        self.weights = {"l1": l1, "giou": giou, **({"fgl": fgl, "ddf": ddf} if self.edges else {})}
        self.ignore_share = ignore_share
        self.box_noise = box_noise

    def _mlp(self, proposals: bool) -> MLP:
        mlp = MLP(self.fit.width, self.fit.width, 4, 3)
        if self.fit.anchors:  # the first guess is the anchor
            nn.init.zeros_(mlp.last.weight)
            nn.init.zeros_(mlp.last.bias)
        return mlp

    def forward(self, view: View) -> Answer:
        """{"boxes": (B,Q,4)}, in float32 under any precision; of a distribution's layer also what `Edges` says."""
        if self.edges is not None and view.stage.kind == "layer":
            return self.edges(view)  # type: ignore[no-any-return]
        before = view.base if self.fit.look_twice else view.anchors
        if self.fit.starts and view.stage.kind == "initial":
            assert before is not None, "the first answer is the first anchors, and these queries have none"
            return {"boxes": before}
        raw = view.stage.kind == "proposal" and self.fit.refines == "raw" and view.raw is not None
        state = view.state if view.once is None else view.once
        return {"boxes": self._moved(before, cast(Tensor, view.raw) if raw else state, view)}

    def feedback(self, answer: Answer, view: View) -> Feedback:
        """The next layer looks around the box, as the architecture computes it."""
        if self.fit.starts and view.stage.kind == "initial":
            return Feedback()
        if view.stage.kind == "proposal" or (self.fit.refines == "state" and not self.fit.look_twice):
            return Feedback(anchors=answer["boxes"])
        state = view.raw if self.fit.refines == "raw" else view.state
        assert state is not None, "refining from the un-normed state needs View.raw"
        return Feedback(anchors=self._moved(view.anchors, state, view))

    def _moved(self, anchors: Tensor | None, state: Tensor, view: View) -> Tensor:
        """Boxes (B,Q,4) that a state (B,Q,D) makes of anchors (B,Q,2|4), or of nothing."""
        change: Tensor = self.mlp.at(view.stage)(state).float()
        if anchors is not None:
            known = anchors.shape[-1]
            logits = inverse_sigmoid(anchors.float(), self.fit.eps)
            change = change + (logits if known == 4 else F.pad(logits, (0, 4 - known)))
        return change.sigmoid()

    def noise(self, targets: Targets, plan: DenoisingPlan, generators: Sequence[torch.Generator] | None) -> Noise:
        """Anchors: the box, its corners moved by up to `box_noise` of half its size, negative ones by once to twice that.

        Corners that pass each other leave no width or height (DINO, RT-DETR), or change places (D-FINE).
        """
        boxes = plan.of(targets["boxes"])
        draw = uniform(boxes[:, None].expand(-1, 2, *boxes.shape[1:]), generators)  # (B,2,Q,4)
        far = draw[:, 0] + (~plan.positive[..., None])
        sign = torch.where(draw[:, 1] < 0.5, -1.0, 1.0)
        half = boxes[..., 2:].repeat(1, 1, 2) * 0.5
        corners = (cxcywh_to_xyxy(boxes) + far * sign * half * self.box_noise).clamp(0, 1)
        known = plan.of(targets.has["boxes"]) & (plan.target >= 0)
        moved = xyxy_to_cxcywh(corners)
        moved = moved.clamp(min=0) if self.edges is None else moved.abs()
        return Noise(anchors=torch.where(known[..., None], moved, 0.5))

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

    def quality(self, round: Round, match: Match, targets: Targets) -> tuple[Tensor, Tensor | None]:
        """IoU of the pair."""
        found = cxcywh_to_xyxy(match.predicted(round.answers[self.name]["boxes"]))
        iou = box_iou(found, cxcywh_to_xyxy(match.wanted(targets["boxes"])))
        return iou, None if targets.num_with["boxes"] == targets.counts else match.wanted(targets.has["boxes"])

    def ignored(self, round: Round, targets: Targets) -> Tensor | None:
        """Boxes that lie in a crowd or ignore region, (S,B,Q)."""
        boxes = cxcywh_to_xyxy(round.answers[self.name]["boxes"].detach())
        return covered_share(boxes, cxcywh_to_xyxy(targets.ignore_boxes)) > self.ignore_share

    def loss(self, round: Round, match: Match, targets: Targets, facts: Facts) -> dict[str, Tensor]:
        """{"l1": (S,), "giou": (S,)}, with distributions also "fgl" and "ddf"."""
        answer, wanted = round.answers[self.name], match.wanted(targets["boxes"])
        found = match.predicted(answer["boxes"])
        share = 1.0 if self.edges is None else of_this_batch(match, targets, round)
        known = match.wanted(targets.has["boxes"]) * (share / facts.normaliser)
        l1 = (found - wanted).abs().sum(-1)
        giou = 1 - generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
        terms = {"l1": match.sum_per_stage(l1 * known), "giou": match.sum_per_stage(giou * known)}
        if self.edges is None:
            return terms
        if "corners" not in answer:
            return {**terms, "fgl": torch.zeros_like(terms["l1"]), "ddf": torch.zeros_like(terms["l1"])}
        iou = self.quality(round, match, targets)[0].detach()
        fgl = self.edges.localisation(answer, match, wanted, iou * known)
        teacher, sure = round.final[self.name], _confidence(round)
        ddf = self.edges.self_distillation(round, answer, teacher, sure, match, iou, facts.main_share)
        return {**terms, "fgl": fgl, "ddf": ddf * (self.count(targets, 0, round.repeats) / facts.normaliser)}

    def decode(self, round: Round, picks: Picks, sizes: Tensor) -> dict[str, Tensor]:
        """{"boxes": (B,k,4)} x1 y1 x2 y2 in pixels of the original image."""
        boxes = round.answers[self.name]["boxes"][0].float()
        boxes = cxcywh_to_xyxy(torch.cat((boxes[..., :2], boxes[..., 2:].clamp(min=0)), -1))
        boxes = boxes.gather(1, picks.queries[..., None].expand(-1, -1, 4))
        scale = sizes.flip(-1).repeat(1, 2)[:, None].to(boxes)
        return {"boxes": boxes * scale}


def _confidence(round: Round) -> Tensor:
    """The last stage's highest class probability (B,Q), whichever head has logits; 1 where none has."""
    logits = next((answer["logits"] for answer in round.final.values() if "logits" in answer), None)
    return torch.ones(round.shape[1:], device=round.device) if logits is None else logits.detach().sigmoid().amax(-1)
