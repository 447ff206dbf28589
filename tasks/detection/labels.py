"""LabelHead: what class a query's object has, or that there is none.

Legend: B images, Q queries, T targets, S stages, D width, C classes, k picks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.head import Head, View
from queryvision.ops.losses import sigmoid_focal, sigmoid_focal_cost
from queryvision.structures import Answer, Facts, Match, Picks, Round, Targets


class LabelHead(Head):
    """One linear layer to class logits.

    `softmax` has C + 1 logits, the last for no-object (DETR, arXiv 2005.12872); `focal` has exactly C, each its own yes or no
    (arXiv 1708.02002, as in Deformable DETR).

    Args:
        width: D.
        num_classes: C.
        loss: which of the two.
        cost: weight in matching.
        weight: weight of the loss term `class`.
        no_object_weight: weight of the no-object class in the softmax loss.
        alpha: focal weight of positives.
        gamma: focal exponent.
    """

    name = "labels"
    published: ClassVar[dict[str, dict[str, str]]] = {"detr": {"class_embed.": "linear."}}

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        loss: Literal["softmax", "focal"] = "softmax",
        cost: float = 1.0,
        weight: float = 1.0,
        no_object_weight: float = 0.1,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.softmax = loss == "softmax"
        self.linear = nn.Linear(width, num_classes + self.softmax)
        self.cost_weight = cost
        self.weights = {"class": weight}
        self.no_object_weight = no_object_weight
        self.alpha, self.gamma = alpha, gamma
        if not self.softmax:
            nn.init.constant_(self.linear.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, view: View) -> Answer:
        """{"logits": (B,Q,C), or (B,Q,C+1) with softmax}."""
        return {"logits": self.linear(view.state)}

    def rank(self, answer: Answer) -> Tensor:
        """The best class logit of each proposal, (B,N)."""
        logits = answer["logits"]
        return (logits[..., :-1] if self.softmax else logits).amax(-1)

    def count(self, targets: Targets, num_queries: int, repeats: int = 1) -> float:
        """Softmax: the summed weights of all queries, as in a weighted cross entropy; focal: the number of labelled targets."""
        labelled = targets.num_with["labels"]
        if not self.softmax:
            return float(sum(labelled) * repeats)
        matched = sum(min(n * repeats, num_queries) for n in labelled)
        return matched + self.no_object_weight * (len(labelled) * num_queries - matched)

    def cost(self, round: Round, targets: Targets, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Less the probability of the target's class (softmax), or the focal cost; (S,B,Q,T)."""
        logits = round.answers[self.name]["logits"]
        labels = targets["labels"][None, :, None].expand(*logits.shape[:-1], -1)
        if self.softmax:
            cost = logits.softmax(-1).gather(-1, labels) * -self.cost_weight
        else:
            cost = sigmoid_focal_cost(logits.gather(-1, labels), self.alpha, self.gamma) * self.cost_weight
        return targets.only_known(cost, self.name)

    def loss(self, round: Round, match: Match, targets: Targets, facts: Facts) -> dict[str, Tensor]:
        """{"class": (S,)}."""
        logits = round.answers[self.name]["logits"]
        weights = self._taught(round, match, targets, facts, logits)
        if self.softmax:
            return {"class": self._cross_entropy(logits, weights, match, targets) / facts.normaliser}
        wanted = torch.zeros_like(logits)
        wanted[match.stage, match.image, match.query, match.wanted(targets["labels"])] = 1.0
        loss = sigmoid_focal(logits, wanted, self.alpha, self.gamma) * weights[..., None]
        if not targets.covers_all:
            loss = loss * targets.covers[:, None]
        return {"class": loss.sum((1, 2, 3)) / facts.normaliser}

    def _taught(self, round: Round, match: Match, targets: Targets, facts: Facts, like: Tensor) -> Tensor:
        """How much each query is taught, (S,B,Q): not in padding, no background in an ignore region, no unknown label."""
        weights = like.new_ones(like.shape[:-1])
        if facts.ignored is not None:
            weights = weights.masked_fill(facts.ignored, 0.0)
        if round.real is not None:
            weights = weights * round.real
        weights[match.stage, match.image, match.query] = match.wanted(targets.has["labels"]).to(weights.dtype)
        return weights

    def _cross_entropy(self, logits: Tensor, weights: Tensor, match: Match, targets: Targets) -> Tensor:
        """Weighted cross entropy summed over images and queries, (S,)."""
        if not targets.covers_all:
            known = F.pad(targets.covers, (0, 1), value=True)
            logits = logits.masked_fill(~known[:, None], torch.finfo(logits.dtype).min)
        wanted = torch.full(logits.shape[:-1], self.num_classes, device=logits.device)
        wanted[match.stage, match.image, match.query] = match.wanted(targets["labels"])
        weights = torch.where(wanted == self.num_classes, weights * self.no_object_weight, weights)
        return (F.cross_entropy(logits.movedim(-1, 1), wanted, reduction="none") * weights).sum((1, 2))

    def pick(self, round: Round, limit: int) -> Picks:
        """The (query, class) pairs that become results.

        Softmax: every query with its best class, no-object apart, as published; sigmoid: the best of all pairs.
        """
        logits = round.answers[self.name]["logits"][0].float()
        if self.softmax:
            best, classes = logits.softmax(-1)[..., :-1].max(-1)
            scores, queries = best.topk(min(limit, best.shape[1]), 1)
            return Picks(queries, classes.gather(1, queries), scores)
        scores, index = logits.sigmoid().flatten(1).topk(min(limit, logits[0].numel()), 1)
        return Picks(torch.div(index, self.num_classes, rounding_mode="floor"), index % self.num_classes, scores)
