"""KeypointHead: where the joints of a query's object are.

Legend: B images, Q queries, T targets, S stages, D width, C classes, K most keypoints of a class, J those of all skeletons
together, n pairs, k picks. Points are (x, y), 0..1 of the unpadded image; similarity is computed in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.data.skeletons import Skeleton
from queryvision.errors import ConfigError, check_range
from queryvision.head import DenoisingPlan, Feedback, Fit, Head, Noise, View
from queryvision.layers.mlp import MLP
from queryvision.layers.per_stage import PerStage
from queryvision.ops.boxes import inverse_sigmoid
from queryvision.ops.noise import uniform
from queryvision.ops.oks import keypoint_similarity
from queryvision.structures import Answer, Facts, Match, Picks, Round, Targets


class KeypointHead(Head):
    """Keypoints of a query's object; L1 and OKS in matching and loss.

    The query's state says all of them, relative to the box that it looked around. Or, `grouped`, each keypoint is a state of
    its own beside the query's (GroupPose, arXiv 2308.07313): proposals give the first points, then each looks around its own
    point and refines it layer by layer. Such points are denoised by drawn similarity (arXiv 2506.13027).

    Keypoints that are not labelled move nothing but what says `findable`, which reads the states and does not shape them.
    Classes with the same skeleton share their outputs, others have their own.

    Args:
        fit: D, or all that it must fit.
        skeletons: of each class; None for a class without keypoints.
        l1_cost: weight of the L1 distance in matching, summed over labelled keypoints.
        oks_cost: weight of 1 - OKS in matching.
        l1: weight of the loss term `l1`.
        oks: weight of the loss term `oks`.
        findable: weight of the loss term `findable`: whether a keypoint of an object with labelled ones is labelled itself. 0
            where that does not mean that it is in the picture.
        grouped: each keypoint is a state of its own.

    Raises:
        ConfigError: a number is out of range, or no class has keypoints.
    """

    name = "keypoints"
    readouts = ("findable",)
    rows: Tensor
    real: Tensor
    sigmas: Tensor

    def __init__(
        self,
        fit: Fit | int,
        skeletons: Sequence[Skeleton | None],
        *,
        l1_cost: float = 10.0,
        oks_cost: float = 4.0,
        l1: float = 10.0,
        oks: float = 4.0,
        findable: float = 1.0,
        grouped: bool = False,
    ) -> None:
        super().__init__()
        check_range("heads.keypoints", 0, math.inf, l1_cost=l1_cost, oks_cost=oks_cost, l1=l1, oks=oks, findable=findable)
        kinds = list(dict.fromkeys(s for s in skeletons if s is not None))
        if not kinds:
            raise ConfigError("head 'keypoints': no class has keypoints; name them under 'keypoints' in the file's categories")
        self.fit = Fit.of(fit)
        starts = dict(zip(kinds, [sum(map(len, kinds[:i])) for i in range(len(kinds))], strict=True))
        most, self.num_points = max(map(len, kinds)), sum(map(len, kinds))
        rows, real = torch.zeros(len(skeletons), most, dtype=torch.long), torch.zeros(len(skeletons), most, dtype=torch.bool)
        sigmas = torch.ones(len(skeletons), most)
        for index, skeleton in enumerate(skeletons):
            if skeleton is not None:
                rows[index, : len(skeleton)] = starts[skeleton] + torch.arange(len(skeleton))
                real[index, : len(skeleton)] = True
                sigmas[index, : len(skeleton)] = torch.tensor(skeleton.sigmas)
        for name, value in (("rows", rows), ("real", real), ("sigmas", sigmas)):
            self.register_buffer(name, value, persistent=False)
        self.slots = self.num_points if grouped else 0
        stages = replace(self.fit, proposals="none" if not grouped else "all" if self.fit.starts else self.fit.proposals)
        self.mlp, self.findable = PerStage(self._points, stages), PerStage(self._findable, stages)
        self.l1_cost, self.oks_cost = l1_cost, oks_cost
        self.weights = {"l1": l1, "oks": oks, "findable": findable}

    def _said(self, proposals: bool) -> int:
        """How many keypoints a state says: all, or where each has a state of its own, one."""
        return 1 if self.slots and not proposals else self.num_points

    def _points(self, proposals: bool) -> MLP:
        mlp = MLP(self.fit.width, self.fit.width, 2 * self._said(proposals), 3)
        if self.fit.anchors:  # the first guess is the middle of the box, the next one what the layer looked around
            nn.init.zeros_(mlp.last.weight)
            nn.init.zeros_(mlp.last.bias)
        return mlp

    def _findable(self, proposals: bool) -> MLP:
        return MLP(self.fit.width, self.fit.width, self._said(proposals), 2)

    def forward(self, view: View) -> Answer | None:
        """{"points": (B,Q,J,2), "findable": (B,Q,J) logits}, in float32; before the first layer only where it must steer."""
        if view.stage.kind == "initial" or (view.stage.kind == "proposal" and not self.slots):
            return None
        own = view.stage.kind == "layer" and self.slots
        states = view.slots if own else view.state
        assert states is not None, "a grouped keypoint head needs states of its own"
        findable = self.findable.at(view.stage)(states.detach()).float()  # keypoints without a label shape no state
        if own:
            before = view.points_base if self.fit.look_twice else view.points
            return {"points": self._moved(before, states, view), "findable": findable[..., 0]}
        said = self.mlp.at(view.stage)(states).float()
        said, around = said.unflatten(-1, (self.num_points, 2)), view.anchors
        if around is None and "boxes" in view.answers:  # nothing was looked around, as in DETR: the box just answered
            around = view.answers["boxes"]["boxes"].detach()
        if around is None:
            return {"points": said.sigmoid(), "findable": findable}
        size = around[..., None, 2:].float() if around.shape[-1] == 4 else 1.0
        return {"points": around[..., None, :2].float() + said * size, "findable": findable}

    def feedback(self, answer: Answer, view: View) -> Feedback:
        """The next layer's slots look around the points, as the architecture computes them."""
        if not self.slots:
            return Feedback()
        points = answer["points"]
        if view.stage.kind == "layer" and self.fit.look_twice and points.requires_grad:  # the same ones, from the layer's own
            assert view.slots is not None
            points = self._moved(view.points, view.slots, view)
        return Feedback(points=points.clamp(0, 1))

    def _moved(self, points: Tensor | None, states: Tensor, view: View) -> Tensor:
        """Points (B,Q,J,2) that states of their own (B,Q,J,D) make of those before them, or of nothing."""
        change: Tensor = self.mlp.at(view.stage)(states).float()
        if points is not None:
            change = change + inverse_sigmoid(points.float(), self.fit.eps)
        return change.sigmoid()

    def noise(self, targets: Targets, plan: DenoisingPlan, generators: Sequence[torch.Generator] | None) -> Noise | None:
        """Grouped: points moved so far that each alone has a similarity of 0.5 to 1, of negative queries of 0.1 to 0.5.

        Those that are not labelled start in the middle of the moved ones, or of the image if there are none: the middle of the
        box would give away what the box's own noise hides.
        """
        if not self.slots:
            return None
        labels = plan.of(targets["labels"])
        seen = plan.of(self._labelled(targets)) & (plan.target >= 0)[..., None]
        draw = uniform(labels[:, None, :, None].expand(-1, 2, -1, seen.shape[-1]).float(), generators)  # (B,2,Q,K)
        low, high = torch.where(plan.positive, 0.5, 0.1)[..., None], torch.where(plan.positive, 1.0, 0.5)[..., None]
        alike = low + draw[:, 0] * (high - low)
        far = 2 * self.sigmas[labels] * (-2 * plan.of(targets["areas"])[..., None] * alike.log()).sqrt()
        angle = 2 * math.pi * draw[:, 1]
        shift = torch.stack((angle.cos(), angle.sin()), -1) * far[..., None] / _pixels(targets)[:, None, None]
        moved = (plan.of(targets[self.name])[..., :2] + shift).clamp(0, 1) * seen[..., None]
        count = seen.sum(-1)[..., None, None]
        middle = torch.where(count > 0, moved.sum(-2, keepdim=True) / count.clamp(min=1), 0.5)
        moved = torch.where(seen[..., None], moved, middle)
        rows = torch.where(self.real[labels], self.rows[labels], self.num_points)  # padding goes into a row that is cut off
        points = middle.expand(-1, -1, self.num_points + 1, -1).clone()
        return Noise(points=points.scatter(2, rows[..., None].expand(-1, -1, -1, 2), moved)[:, :, :-1])

    def count(self, targets: Targets, num_queries: int, repeats: int = 1) -> float:
        """Number of targets with a labelled keypoint."""
        return float(sum(targets.num_with[self.name]) * repeats)

    def _labelled(self, targets: Targets) -> Tensor:
        """(B,T,K) bool."""
        return targets.has[self.name] & self.real[targets["labels"]] & targets.valid[..., None]

    def cost(self, round: Round, targets: Targets, generators: Sequence[torch.Generator] | None) -> Tensor:
        """L1 and 1 - OKS of all pairs, (S,B,Q,T); 0 for targets without a labelled keypoint."""
        points, seen = round.answers[self.name]["points"], self._labelled(targets)
        stages, batch, queries = points.shape[:3]
        labels, wanted = targets["labels"], targets[self.name][..., :2]
        rows = self.rows[labels][None, :, None, :, :, None].expand(stages, batch, queries, -1, -1, 2)
        found = points[:, :, :, None].expand(-1, -1, -1, labels.shape[1], -1, -1).gather(4, rows)
        pixels = _pixels(targets)[:, None, None, None]
        oks = keypoint_similarity(
            found * pixels, wanted[:, None] * pixels, seen[:, None], self.sigmas[labels][:, None], targets["areas"][:, None]
        )
        distance = ((found - wanted[:, None]).abs().sum(-1) * seen[:, None]).sum(-1)
        return (self.l1_cost * distance + self.oks_cost * (1 - oks)) * seen.any(-1)[:, None]

    def quality(self, round: Round, match: Match, targets: Targets) -> tuple[Tensor, Tensor]:
        """OKS of the pair; known where a keypoint is labelled."""
        found = self._of_class(match.predicted(round.answers[self.name]["points"]), match.wanted(targets["labels"]))
        seen = match.wanted(self._labelled(targets))
        return self._similarity(found, match, targets, seen), seen.any(-1)

    def _of_class(self, values: Tensor, labels: Tensor) -> Tensor:
        """Of all skeletons' keypoints (n,J,...) those of each one's class, (n,K,...)."""
        rows = self.rows[labels]
        return values.gather(1, rows.view(*rows.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))

    def _similarity(self, found: Tensor, match: Match, targets: Targets, seen: Tensor) -> Tensor:
        pixels = _pixels(targets)[match.image][:, None]
        wanted, areas = match.wanted(targets[self.name])[..., :2], match.wanted(targets["areas"])
        return keypoint_similarity(found * pixels, wanted * pixels, seen, self.sigmas[match.wanted(targets["labels"])], areas)

    def loss(self, round: Round, match: Match, targets: Targets, facts: Facts) -> dict[str, Tensor]:
        """{"l1": (S,), "oks": (S,), "findable": (S,)}."""
        answer, labels = round.answers[self.name], match.wanted(targets["labels"])
        seen = match.wanted(self._labelled(targets))
        known = seen.any(-1) / facts.normaliser
        found = self._of_class(match.predicted(answer["points"]), labels)
        l1 = ((found - match.wanted(targets[self.name])[..., :2]).abs().sum(-1) * seen).sum(-1)
        oks = 1 - self._similarity(found, match, targets, seen)
        real = self.real[labels]
        logits = self._of_class(match.predicted(answer["findable"]), labels)
        findable = F.binary_cross_entropy_with_logits(logits, seen.float(), reduction="none")
        findable = (findable * real).sum(-1) / real.sum(-1).clamp(min=1)
        return {
            "l1": match.sum_per_stage(l1 / facts.normaliser),
            "oks": match.sum_per_stage(oks * known),
            "findable": match.sum_per_stage(findable * known),
        }

    def decode(self, round: Round, picks: Picks, sizes: Tensor) -> dict[str, Tensor]:
        """{"keypoints": (B,k,K,3)}: x, y in pixels of the original image, probability to be in it; 0 beyond a class's own.

        The probability is 1 where `findable` has no weight.
        """
        answer = round.answers[self.name]
        image = torch.arange(len(sizes), device=sizes.device)[:, None, None]
        queries, rows = picks.queries[..., None], self.rows[picks.classes]
        points = answer["points"][0][image, queries, rows].float() * sizes.flip(-1)[:, None, None].to(self.sigmas)
        sure = answer["findable"][0][image, queries, rows].float().sigmoid()
        if not self.weights["findable"]:
            sure = torch.ones_like(sure)
        return {"keypoints": torch.cat((points, sure[..., None]), -1) * self.real[picks.classes][..., None]}


def _pixels(targets: Targets) -> Tensor:
    """Width and height of each image, (B,2)."""
    return targets.sizes.flip(-1).float()
