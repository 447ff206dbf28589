"""Box edges as distributions, refined layer by layer, and what they say about their own quality (D-FINE, arXiv 2410.13842).

Legend: B images, Q queries, S stages, D width, R + 1 bins. Boxes are (cx, cy, w, h), 0..1 of the unpadded image.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from queryvision.errors import ConfigError
from queryvision.head import Fit, View
from queryvision.layers.mlp import MLP
from queryvision.ops.boxes import cxcywh_to_xyxy
from queryvision.ops.distribution import (
    bin_values,
    boxes_to_edges,
    distillation,
    edges_to_boxes,
    expected_value,
    two_bin_cross_entropy,
)
from queryvision.structures import VOID, Answer, Match, Round, Targets

MOST_LIKELY = 4
"""Probabilities of each edge that its quality is judged by."""


class Edges(nn.Module):
    """Each edge of a box as a distribution over the bins; a layer predicts the change of the layer before's logits.

    All of it starts from one reference: the box that the first layer looked around, or a first guess made behind it.

    Args:
        fit: what it must fit.
        num_bins: R, even and at least 4.
        bound: how far an edge may be from the reference's, as a share of its size; the outermost bins say twice that.
        scale: larger means bins that lie more evenly.

    Raises:
        ConfigError: a number is out of range.
    """

    values: Tensor

    def __init__(self, fit: Fit, num_bins: int, bound: float, scale: float) -> None:
        super().__init__()
        if num_bins < 4 or num_bins % 2 or min(bound, scale) <= 0:
            raise ConfigError(
                f"heads.boxes: bins = {num_bins} (even, at least 4), bound = {bound} and scale = {scale} (positive) do not fit"
            )
        self.scale = scale
        self.register_buffer("values", bin_values(num_bins, bound, scale), persistent=False)
        self.layers = nn.ModuleList(MLP(fit.width, fit.width, 4 * (num_bins + 1), 3) for _ in range(fit.num_layers))
        self.judges = nn.ModuleList(MLP(4 * (MOST_LIKELY + 1), 64, 1, 2) for _ in range(fit.num_layers))
        for mlp in (*self.layers, *self.judges):
            nn.init.zeros_(mlp.last.weight)
            nn.init.zeros_(mlp.last.bias)

    def forward(self, view: View) -> Answer:
        """A decoder layer's answer.

        Returns:
            {"boxes": (B,Q,4), "corners": (B,Q,4,R+1) logits of left, top, right, bottom, "reference": (B,Q,4)}, and where
            anybody wants it {"confidence": (B,Q,1)}, which is added to class logits.
        """
        index, before = view.stage.index, view.previous or {}
        state = view.state if view.earlier is None else view.state + view.earlier
        corners = self.layers[index](state).float().unflatten(-1, (4, -1))
        reference = view.anchors
        if "corners" in before:
            corners, reference = corners + before["corners"], before["reference"]
        assert reference is not None, "edges are refined from a box, and these queries have none"
        boxes = edges_to_boxes(reference, expected_value(corners, self.values.to(corners.dtype)), self.scale)
        answer = {"boxes": boxes, "corners": corners, "reference": reference}
        if self.training or view.stage.last:
            answer["confidence"] = self._judge(corners, index)
        return answer

    def _judge(self, corners: Tensor, index: int) -> Tensor:
        """How sure the edges are, as a logit (B,Q,1): from the highest probabilities of each and their mean."""
        highest = corners.softmax(-1).topk(MOST_LIKELY, -1).values
        seen = torch.cat((highest, highest.mean(-1, keepdim=True)), -1).flatten(-2)
        judge = cast(MLP, self.judges[index])
        return judge(seen.to(judge.last.weight.dtype))  # type: ignore[no-any-return]

    def localisation(self, answer: Answer, match: Match, wanted: Tensor, weight: Tensor) -> Tensor:
        """Fine-grained localisation loss of all stages: cross entropy of each edge of the pairs, summed.

        Args:
            answer: with a stage axis in front.
            match: the pairs.
            wanted: (pairs,4) boxes.
            weight: (pairs,).

        Returns:
            (S,).
        """
        edges = boxes_to_edges(match.predicted(answer["reference"]), cxcywh_to_xyxy(wanted), self.scale)
        loss = two_bin_cross_entropy(match.predicted(answer["corners"]), edges, self.values).sum(-1)
        return match.sum_per_stage(loss * weight)

    def self_distillation(
        self, round: Round, answer: Answer, teacher: Answer, confidence: Tensor, match: Match, iou: Tensor, main_share: float
    ) -> Tensor:
        """Every layer is drawn to the last one's distributions, pairs and other queries apart (GO-LSD).

        The mean over the edges of all pairs and that over all others count by the roots of their numbers in the main group.

        Args:
            round: whose queries they are.
            answer: with a stage axis in front.
            teacher: of the last stage.
            confidence: (B,Q) the last stage's highest class probability, which weighs the others.
            match: the pairs.
            iou: (pairs,) which weighs them.
            main_share: share of pairs in the main group.

        Returns:
            (S,).
        """
        stages, batch, queries = round.shape
        weight = confidence.expand(stages, -1, -1).clone()
        weight[match.stage, match.image, match.query] = iou
        paired = torch.zeros_like(weight)
        paired[match.stage, match.image, match.query] = torch.ones_like(iou)  # a number would be copied, and waited for
        others = 1 - paired if round.real is None else (1 - paired) * round.real
        loss = distillation(answer["corners"], teacher["corners"]).sum(-1) * weight
        num_paired = len(match.query) / stages
        void = 0 if round.pins is None else int((round.pins == VOID).sum())
        of_pairs = (loss * paired).sum((1, 2)) / max(4 * num_paired, 1)
        of_others = (loss * others).sum((1, 2)) / max(4 * (batch * queries - void - num_paired), 1)
        many, rest = main_share**0.5, max(0.0, 1 - main_share) ** 0.5
        return (of_pairs * many + of_others * rest) / max(many + rest, 1e-6)  # type: ignore[no-any-return]


def of_this_batch(match: Match, targets: Targets, round: Round) -> float:
    """Targets of this batch over pairs of a stage: 1 but for the union of several stages' pairs, which has more of them."""
    pairs = len(match.query) / match.num_stages
    return sum(targets.counts) * round.repeats / max(pairs, 1.0)
