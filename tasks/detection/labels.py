"""LabelHead: what class a query's object has, or that there is none.

Legend: B images, Q queries, T targets, S stages, D width, C classes, k picks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.errors import ConfigError, check_range
from queryvision.head import DenoisingPlan, Fit, Head, Noise, View
from queryvision.layers.linear import Linear
from queryvision.layers.per_stage import PerStage
from queryvision.ops.losses import matchability_aware, quality_focal, sigmoid_focal, sigmoid_focal_cost
from queryvision.ops.noise import uniform
from queryvision.structures import Answer, Facts, Match, Picks, Round, Targets

EXPONENTS = {"focal": 2.0, "varifocal": 2.0, "mal": 1.5}
"""The published gamma of each loss."""
HYBRID = {
    "model.decoder.class_embed.": "linear.layers.",
    "model.enc_score_head.": "linear.proposals.",
    "model.denoising_class_embed.": "embedding.",
}
"""Prefixes of its parameters in RT-DETR's and D-FINE's checkpoints, and its own."""


class LabelHead(Head):
    """One linear layer to class logits.

    `softmax` has C + 1 logits, the last for no-object (DETR, arXiv 2005.12872); the others have exactly C, each its own yes or
    no: `focal` (arXiv 1708.02002, as in Deformable DETR), `varifocal` (arXiv 2008.13367) and `mal` (arXiv 2412.04234), whose
    targets are as high as the quality of the pair: IoU, mask IoU, OKS, whatever head of the model knows it.

    Args:
        fit: D, or all that it must fit.
        num_classes: C.
        loss: which of the four; None: softmax as DETR, or focal where queries have anchors.
        cost: weight in matching; None: 1 with softmax, else 2, as published.
        weight: weight of the loss term `class`.
        no_object_weight: weight of the no-object class in the softmax loss.
        alpha: focal weight of positives; negatives get 1 - alpha (also their weight in `varifocal`).
        gamma: exponent of the loss; None: the published one.
        label_noise: denoising queries: half of this share gets a class at random (arXiv 2203.03605).
        label_scale: denoising queries: deviation of the embedded classes at the start, 1 as published. Smaller ones are harder
            to copy, so that the decoder learns sooner to look.

    Raises:
        ConfigError: a number is out of range, or softmax is wanted where proposals are ranked by each class's own yes or no.
    """

    name = "labels"
    published: ClassVar[dict[str, dict[str, str]]] = {
        "detr": {"class_embed.": "linear.layers.0."},
        "deformable_detr": {"class_embed.": "linear.layers.", "transformer.enc_out_class_embed.": "linear.proposals."},
        "dino": {
            "class_embed.": "linear.layers.",
            "transformer.enc_out_class_embed.": "linear.proposals.",
            "label_enc.": "embedding.",
        },
        "rtdetrv2": HYBRID,
        "dfine": HYBRID,
        "mask2former": {"sem_seg_head.predictor.class_embed.": "linear.layers.0."},
        "maskdino": {
            "sem_seg_head.predictor.class_embed.": "linear.layers.0.",
            "sem_seg_head.predictor.label_enc.": "embedding.",
        },
    }
    class_rows = (r"linear\..*\.(weight|bias)", r"embedding\.weight")

    def __init__(
        self,
        fit: Fit | int,
        num_classes: int,
        *,
        loss: Literal["softmax", "focal", "varifocal", "mal"] | None = None,
        cost: float | None = None,
        weight: float = 1.0,
        no_object_weight: float = 0.1,
        alpha: float = 0.25,
        gamma: float | None = None,
        label_noise: float = 0.5,
        label_scale: float = 1.0,
    ) -> None:
        super().__init__()
        fit = Fit.of(fit)
        loss = loss or ("focal" if fit.anchors else "softmax")
        if loss == "softmax" and fit.proposals != "none":
            raise ConfigError(
                "heads.labels.loss = softmax: proposals are ranked by each class's own yes or no; set focal or mal"
            )
        check_range("heads.labels", 0, 1, alpha=alpha, label_noise=label_noise)
        check_range("heads.labels", 0, math.inf, cost=cost, weight=weight, no_object_weight=no_object_weight, gamma=gamma)
        check_range("heads.labels", 0, math.inf, label_scale=label_scale)
        self.num_classes = num_classes
        self.kind = loss
        self.softmax = loss == "softmax"
        self.one_class = fit.proposals == "one"
        if self.one_class:  # its proposals' only row is no class
            self.class_rows = (r"linear\.layers\..*\.(weight|bias)", r"embedding\.weight")
        self.linear = PerStage(lambda proposals: self._linear(fit.width, proposals), fit)
        self.embedding = nn.Embedding(num_classes, fit.width) if fit.denoising else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=label_scale)
        self.cost_weight = cost if cost is not None else 1.0 if self.softmax else 2.0
        self.weights = {"class": weight}
        self.no_object_weight = no_object_weight
        self.alpha, self.gamma = alpha, EXPONENTS.get(loss, 0.0) if gamma is None else gamma
        self.label_noise = label_noise

    def _linear(self, width: int, proposals: bool) -> nn.Linear:
        linear = Linear(width, (1 if proposals and self.one_class else self.num_classes) + self.softmax)
        if not self.softmax:
            nn.init.constant_(linear.bias, -math.log((1 - 0.01) / 0.01))
        return linear

    def forward(self, view: View) -> Answer:
        """{"logits": (B,Q,C), or (B,Q,C+1) with softmax}; C is 1 where proposals only tell object from no object."""
        logits = self.linear.at(view.stage)(view.state)
        for other in view.answers.values():  # of heads that judge their own answer (D-FINE's location quality estimate)
            if "confidence" in other:
                logits = logits + other["confidence"]
        return {"logits": logits}

    def rank(self, answer: Answer) -> Tensor:
        """The best class logit of each proposal, (B,N)."""
        logits = answer["logits"]
        return (logits[..., :-1] if self.softmax else logits).amax(-1)

    def noise(self, targets: Targets, plan: DenoisingPlan, generators: Sequence[torch.Generator] | None) -> Noise | None:
        """Content: the embedded class of each query's target, some of them at random."""
        if self.embedding is None:  # built without `Fit.denoising`
            return None
        labels = plan.of(targets["labels"])
        draw = uniform(labels[None].expand(2, *labels.shape).transpose(0, 1), generators)  # (B,2,Q)
        other = (draw[:, 1] * self.num_classes).long().clamp(max=self.num_classes - 1)
        labels = torch.where(draw[:, 0] < self.label_noise * 0.5, other, labels)
        known = plan.of(targets.has["labels"]) & (plan.target >= 0)
        return Noise(content=self.embedding(labels) * known[..., None])

    def count(self, targets: Targets, num_queries: int, repeats: int = 1) -> float:
        """Softmax: the summed weights of all queries, as in a weighted cross entropy; else the number of labelled targets."""
        labelled = targets.num_with["labels"]
        if not self.softmax:
            return float(sum(labelled) * repeats)
        matched = sum(min(n * repeats, num_queries) for n in labelled)
        return matched + self.no_object_weight * (len(labelled) * num_queries - matched)

    def cost(self, round: Round, targets: Targets, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Less the probability of the target's class (softmax), or the focal cost; (S,B,Q,T)."""
        logits = round.answers[self.name]["logits"]
        labels = self._labels(round, targets)[None, :, None].expand(*logits.shape[:-1], -1)
        if self.softmax:
            cost = logits.softmax(-1).gather(-1, labels) * -self.cost_weight
        else:
            cost = sigmoid_focal_cost(logits.gather(-1, labels)) * self.cost_weight
        return targets.only_known(cost, self.name)

    def loss(self, round: Round, match: Match, targets: Targets, facts: Facts) -> dict[str, Tensor]:
        """{"class": (S,)}."""
        logits = round.answers[self.name]["logits"]
        weights = self._taught(round, match, targets, facts, logits)
        if self.softmax:
            return {"class": self._cross_entropy(logits, weights, match, round, targets) / facts.normaliser}
        pairs = (match.stage, match.image, match.query, match.wanted(self._labels(round, targets)))
        loss = self._sigmoid_loss(logits, pairs, facts) * weights[..., None]
        if not targets.covers_all:
            loss = loss * self._covers(round, targets, logits, pairs)
        return {"class": loss.sum((1, 2, 3)) / facts.normaliser}

    def _sigmoid_loss(self, logits: Tensor, pairs: tuple[Tensor, ...], facts: Facts) -> Tensor:
        """Elementwise, (S,B,Q,C)."""
        wanted = torch.zeros_like(logits)
        wanted[pairs] = torch.ones_like(facts.quality)
        if self.kind == "focal":
            return sigmoid_focal(logits, wanted, self.alpha, self.gamma)
        quality = torch.zeros_like(logits)
        quality[pairs] = facts.quality.clamp(0.0, 1.0)
        if self.kind == "varifocal":
            return quality_focal(logits, wanted, quality, 1 - self.alpha, self.gamma)
        return matchability_aware(logits, wanted, quality, self.gamma)

    def _labels(self, round: Round, targets: Targets) -> Tensor:
        """(B,T): the classes, or 0 for all where proposals only tell object from no object."""
        labels = targets["labels"]
        return torch.zeros_like(labels) if round.proposals and self.one_class else labels

    def _covers(self, round: Round, targets: Targets, logits: Tensor, pairs: tuple[Tensor, ...]) -> Tensor:
        """What may be taught, (S,B,Q,C or C+1) bool: classes that the image's annotations speak about, and every pair."""
        covers = targets.covers.all(1, keepdim=True) if round.proposals and self.one_class else targets.covers
        covers = F.pad(covers, (0, logits.shape[-1] - covers.shape[1]), value=True)
        known = covers[None, :, None].expand_as(logits).clone()
        known[pairs] = torch.ones_like(pairs[0], dtype=torch.bool)
        return known

    def _taught(self, round: Round, match: Match, targets: Targets, facts: Facts, like: Tensor) -> Tensor:
        """How much each query is taught, (S,B,Q): not in padding, no background in an ignore region, no unknown label."""
        weights = like.new_ones(like.shape[:-1])
        if facts.ignored is not None:
            weights = weights.masked_fill(facts.ignored, 0.0)
        if round.real is not None:
            weights = weights * round.real
        weights[match.stage, match.image, match.query] = match.wanted(targets.has["labels"]).to(weights.dtype)
        return weights

    def _cross_entropy(self, logits: Tensor, weights: Tensor, match: Match, round: Round, targets: Targets) -> Tensor:
        """Weighted cross entropy summed over images and queries, (S,)."""
        nothing = logits.shape[-1] - 1
        pairs = (match.stage, match.image, match.query, match.wanted(self._labels(round, targets)))
        wanted = torch.full(logits.shape[:-1], nothing, device=logits.device)
        wanted[pairs[:3]] = pairs[3]
        if not targets.covers_all:
            logits = _background_with(logits, ~self._covers(round, targets, logits, pairs), wanted == nothing)
        weights = torch.where(wanted == nothing, weights * self.no_object_weight, weights)
        return (F.cross_entropy(logits.movedim(-1, 1), wanted, reduction="none") * weights).sum((1, 2))

    def probabilities(self, round: Round) -> Tensor:
        """Of every class for each query of a final round, (B,Q,C), that of no-object left out."""
        logits = round.answers[self.name]["logits"][0].float()
        return logits.softmax(-1)[..., :-1] if self.softmax else logits.sigmoid()

    def pick(self, round: Round, limit: int, pairs: bool = False) -> Picks:
        """The (query, class) pairs that become results.

        Softmax: every query with its best class, no-object apart, as DETR has it; sigmoid, or `pairs`: the best of all pairs.
        """
        likely = self.probabilities(round)
        if self.softmax and not pairs:
            best, classes = likely.max(-1)
            scores, queries = best.topk(min(limit, best.shape[1]), 1)
            return Picks(queries, classes.gather(1, queries), scores)
        scores, index = likely.flatten(1).topk(min(limit, likely[0].numel()), 1)
        return Picks(torch.div(index, self.num_classes, rounding_mode="floor"), index % self.num_classes, scores)


def _background_with(logits: Tensor, hidden: Tensor, unmatched: Tensor) -> Tensor:
    """Logits whose last one, no-object, also stands for the classes that nobody looked for, where a query has no object.

    "No labelled object" is then "none, or one of a class without labels" (Cermelli et al., arXiv 2002.00718, do so with classes
    of earlier data); a query that is sure of such a class is left in peace.

    Args:
        logits: (...,C+1).
        hidden: (...,C+1) bool, classes that the image's annotations do not speak about.
        unmatched: (...) bool.
    """
    least = torch.finfo(logits.dtype).min
    mentioned = ~hidden
    mentioned[..., -1] = False
    background = torch.where(unmatched, logits.masked_fill(mentioned, least).logsumexp(-1), logits[..., -1])
    return torch.cat((logits.masked_fill(hidden, least)[..., :-1], background[..., None]), -1)


def pick_by_labels(heads: Mapping[str, Head], round: Round, limit: int) -> Picks:
    """The `pick` of a task whose scores are those of its head `labels`."""
    return cast(LabelHead, heads["labels"]).pick(round, limit)
