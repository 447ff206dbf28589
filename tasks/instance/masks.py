"""MaskHead: which pixels a query's object covers.

A mask is the product of the query's embedding and the image's pixel map, so an answer is the embedding alone: matching reads
the map at points, the loss builds the masks of pairs, a result those that are looked at.

Legend: B images, Q queries, T targets, S stages, D width, E channels of the pixel map, h, w its cells, P points, n pairs,
k picks.
Points are (x, y), 0..1 from edge to edge of the pixel map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.errors import ConfigError, check_range
from queryvision.head import Feedback, Fit, Head, Scene, View
from queryvision.layers.linear import Linear
from queryvision.layers.mlp import MLP
from queryvision.layers.per_stage import PerStage
from queryvision.masks import Masks, MaskSource
from queryvision.ops.boxes import mask_boxes, xyxy_to_cxcywh
from queryvision.ops.noise import uniform
from queryvision.ops.points import binary_entropy, dice, pairwise_mask_cost, sample_bits, sample_maps, uncertain_points
from queryvision.structures import Answer, Facts, Match, Picks, PixelMap, Round, Targets

LARGEST = 2**20
"""Numbers in the masks of one image that are matched at once, or one stage's if it has more."""


@dataclass
class Canvas:
    """What all stages share: the pixel map, and the same at the size of each level that layers look at."""

    pixels: PixelMap
    levels: list[Tensor]  # L x (B,E,H_l*W_l); empty where nothing is hidden

    @property
    def shares(self) -> Tensor:
        """Share of the map's (width, height) where points are drawn, (B,2): the image, or all where padding counts as image."""
        cells = self.cells
        return torch.ones_like(self.pixels.extents) if self.pixels.whole else self.pixels.extents / cells

    @property
    def cells(self) -> Tensor:
        """Width and height of the map, (2,)."""
        return _size(self.pixels.map, self.pixels.extents)

    @property
    def shown(self) -> Tensor:
        """Which cells show the image and not padding, (B,h,w) bool; the same as `Masks.logits` keeps."""
        right, down = (
            torch.arange(count, device=self.pixels.map.device) < self.pixels.extents[:, axis, None]
            for axis, count in enumerate(self.pixels.map.shape[:-3:-1])
        )
        return down[:, :, None] & right[:, None]

    def middles(self, axis: int) -> Tensor:
        """Middles of the map's columns (axis 0) or rows (1), 0..1 of each unpadded image, (B,w) or (B,h)."""
        count = self.pixels.map.shape[-1 - axis]
        return (torch.arange(count, device=self.pixels.map.device) + 0.5) / self.pixels.extents[:, axis, None]

    def on_targets(self, points: Tensor, masks: Tensor) -> Tensor:
        """Points (...,2) of the map as points of target masks (...,H,W), whose pixels it may outreach a little."""
        return points * (self.cells * self.pixels.stride / _size(masks, self.pixels.extents))


class MaskHead(Head):
    """Three linear layers to an embedding; cross entropy and dice on points (Mask2Former, arXiv 2112.01527).

    Args:
        fit: D, or all that it must fit.
        entropy_cost: weight of the cross entropy in matching.
        dice_cost: weight of the dice loss in matching.
        entropy: weight of the loss term `entropy`.
        dice: weight of the loss term `dice`.
        points: P, in matching and loss.
        oversample: the loss looks at so many times P points for those where a mask is least sure.
        uncertain: share of the loss's points that are chosen so; the others are drawn anywhere.
        merging: rule by which overlapping masks become one map (panoptic segmentation).
        least: merging: least score of a mask.
        overlap: merging: least share of a mask that others must leave over.
        temperature: merging: classes and scores are those of a softmax over class probabilities divided by it, and `least` is
            about the probabilities before (maskdino:maskdino.py, PANO_TEMPERATURE); 0: the probabilities as they are.
        box_prior: a mask also depends on where a place lies in the box that the query looked around. Objects of one class side
            by side are then told apart from the first steps on; for architectures with boxes (cf. relative coordinates in
            CondInst, arXiv 2003.05664).

    Raises:
        ConfigError: a number is out of range, or a box prior is wanted where queries have no boxes.
    """

    name = "masks"
    wants_pixels = True
    published: ClassVar[dict[str, dict[str, str]]] = {
        "mask2former": {"sem_seg_head.predictor.mask_embed.": "mlp.layers.0."},
        "maskdino": {"sem_seg_head.predictor.mask_embed.": "mlp.layers.0."},
    }

    def __init__(
        self,
        fit: Fit | int,
        *,
        entropy_cost: float = 5.0,
        dice_cost: float = 5.0,
        entropy: float = 5.0,
        dice: float = 5.0,
        points: int = 12544,
        oversample: float = 3.0,
        uncertain: float = 0.75,
        merging: Literal["mask2former", "detr"] = "mask2former",
        least: float = 0.8,
        overlap: float = 0.8,
        temperature: float = 0.0,
        box_prior: bool = False,
    ) -> None:
        super().__init__()
        check_range("heads.masks", 0, math.inf, entropy_cost=entropy_cost, dice_cost=dice_cost, entropy=entropy, dice=dice)
        check_range("heads.masks", 0, 1, uncertain=uncertain, least=least, overlap=overlap)
        check_range("heads.masks", 1, math.inf, points=points, oversample=oversample)
        check_range("heads.masks", 0, math.inf, temperature=temperature)
        self.fit = Fit.of(fit)
        stages = self.fit if self.fit.starts else replace(self.fit, proposals="none")
        self.mlp = PerStage(lambda proposals: MLP(self.fit.width, self.fit.width, self.fit.pixels, 3), stages)
        self.entropy_cost, self.dice_cost = entropy_cost, dice_cost
        self.weights = {"entropy": entropy, "dice": dice}
        self.points, self.oversample, self.uncertain = points, oversample, uncertain
        self.merging, self.least, self.overlap, self.temperature = merging, least, overlap, temperature
        if box_prior and (self.fit.anchors != 4 or self.fit.hides or self.fit.starts):
            raise ConfigError("heads.masks.box_prior = true: only for architectures that refine boxes before masks")
        self.prior = PerStage(lambda proposals: _prior(self.fit.width), stages) if box_prior else None

    def prepare(self, scene: Scene) -> Canvas:
        """The pixel map; where masks hide memory also its reduction to each level, once for all stages and queries."""
        pixels = scene.memory.pixels
        if pixels is None:
            raise ConfigError("head 'masks' reads a pixel map, and this model makes none; give its builder the head")
        levels: list[Tensor] = []
        if self.fit.hides:
            with torch.no_grad():
                sizes = scene.memory.shapes
                levels = [F.interpolate(pixels.map, size, mode="bilinear", align_corners=False).flatten(2) for size in sizes]
        return Canvas(pixels, levels)

    def forward(self, view: View) -> Answer | None:
        """{"embedding": (B,Q,E)}; None before the first layer, unless what follows depends on these masks.

        With a box prior also "prior" (B,Q,2,3), what x and y in the box weigh (`axis_prior`), and that box, "around" (B,Q,4).
        """
        if view.stage.kind != "layer" and not (self.fit.starts or self.fit.hides):
            return None
        answer = {"embedding": self.mlp.at(view.stage)(view.state)}
        if self.prior is not None:
            assert view.anchors is not None, "a box prior needs queries that look around boxes"
            answer["prior"] = self.prior.at(view.stage)(view.state).unflatten(-1, (2, 3))
            answer["around"] = view.anchors.detach()
        return answer

    def feedback(self, answer: Answer, view: View) -> Feedback:
        """Hides memory where the mask is empty (masked attention); at proposals the first anchors are the masks' boxes."""
        embedding = answer["embedding"].detach()
        canvas: Canvas = view.context
        if view.stage.kind == "proposal":
            logits = torch.einsum("bqe,behw->bqhw", embedding, canvas.pixels.map.detach())
            inside = (logits > 0) & canvas.shown[:, None]  # nothing teaches padding to be outside
            return Feedback(anchors=xyxy_to_cxcywh(mask_boxes(inside, canvas.pixels.extents)))
        level = view.stage.looks_at
        if level is None or not canvas.levels:
            return Feedback()
        return Feedback(hidden=embedding @ canvas.levels[level] < 0)

    def count(self, targets: Targets, num_queries: int, repeats: int = 1) -> float:
        """Number of targets with a mask."""
        return float(sum(targets.num_with["masks"]) * repeats)

    def cost(self, round: Round, targets: Targets, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Cross entropy and dice of all pairs on points that an image's queries and targets share, (S,B,Q,T)."""
        embedding, canvas = round.answers[self.name]["embedding"], self._canvas(round)
        masks = targets["masks"]
        stages, batch, queries, _ = embedding.shape
        draw = uniform(embedding.new_empty(batch, self.points, 2), generators)
        points = draw * canvas.shares[:, None]
        cost = embedding.new_zeros(stages, batch, queries, masks.shape[1])
        for image, count in enumerate(targets.counts):
            if not count:
                continue
            seen = sample_maps(canvas.pixels.map[image, None].float(), points[image, None])[0]
            places = points[image] * canvas.cells / canvas.pixels.extents[image]  # 0..1 of the image
            rows = torch.arange(count, device=masks.device)
            wanted = sample_bits(masks[image], rows, canvas.on_targets(points[image, None], masks))
            at_once = max(1, LARGEST // (queries * self.points))  # all stages would not fit: stages x queries x points
            for first in range(0, stages, at_once):
                stage = slice(first, first + at_once)
                logits = embedding[stage, image].float() @ seen
                if self.prior is not None:
                    weights, around = (round.answers[self.name][field][stage, image] for field in ("prior", "around"))
                    for axis in (0, 1):
                        logits = logits + axis_prior(places[:, axis], weights, around, axis)
                cost[stage, image, :, :count] = pairwise_mask_cost(logits, wanted, self.entropy_cost, self.dice_cost)
        return targets.only_known(cost, self.name)

    def quality(self, round: Round, match: Match, targets: Targets) -> tuple[Tensor, Tensor]:
        """Mask IoU of the pair, on the cells of the pixel map that show the image."""
        canvas = self._canvas(round)
        order = match.image.argsort(stable=True)
        pairs = match.by_image()
        found = (self._logits(round, pairs) > 0) & canvas.shown[pairs.image]
        wanted = self._on_cells(canvas, pairs, targets["masks"])
        common, either = (found & wanted).flatten(1).sum(1), (found | wanted).flatten(1).sum(1)
        iou = torch.zeros_like(common, dtype=torch.float32)
        iou[order] = common / either.clamp(min=1)
        return iou, match.wanted(targets.has["masks"])

    @staticmethod
    def _on_cells(canvas: Canvas, pairs: Match, masks: Tensor) -> Tensor:
        """The pairs' target masks at the middle of each cell, (n,h,w) bool."""
        height, width = canvas.pixels.map.shape[-2:]
        stride, middle = canvas.pixels.stride, canvas.pixels.stride // 2
        cells = pairs.wanted(masks[..., middle::stride, middle::stride])
        return F.pad(cells, (0, width - cells.shape[-1], 0, height - cells.shape[-2]))  # the last cell may begin at the edge

    def loss(self, round: Round, match: Match, targets: Targets, facts: Facts) -> dict[str, Tensor]:
        """{"entropy": (S,), "dice": (S,)} on points where masks are unsure."""
        canvas, pairs, masks = self._canvas(round), match.by_image(), targets["masks"]
        if not len(pairs.query):  # the map and all that was answered stay in the graph, for no rank may lack a gradient
            said = sum(value.flatten(1)[:, :0].sum(1) for value in round.answers[self.name].values())
            nothing = said + canvas.pixels.map.flatten()[:0].sum()
            return {"entropy": nothing, "dice": nothing}
        logits = self._logits(round, pairs)
        extent = canvas.shares[pairs.image][:, None]
        points = uncertain_points(
            logits, self.points, self.oversample, self.uncertain, _drawer(pairs, logits, facts.generators), extent
        )
        found = sample_maps(logits[:, None], points)[:, 0]
        places = canvas.on_targets(points, masks)
        wanted = sample_bits(masks, pairs.image * masks.shape[1] + pairs.target, places)
        known = pairs.wanted(targets.has["masks"]) / facts.normaliser
        return {
            "entropy": pairs.sum_per_stage(binary_entropy(found, wanted) * known),
            "dice": pairs.sum_per_stage(dice(found, wanted) * known),
        }

    def _canvas(self, round: Round) -> Canvas:
        canvas: Canvas = round.contexts[self.name]
        return canvas

    def _logits(self, round: Round, pairs: Match) -> Tensor:
        """Masks of pairs that stand image by image, (n,h,w) float32; no other mask is built."""
        canvas, answer = self._canvas(round), round.answers[self.name]
        pixels = canvas.pixels.map.float()
        rows = torch.split(pairs.predicted(answer["embedding"]).float(), list(pairs.per_image))
        maps = pixels.flatten(2).unbind()  # the gradients of all are put together once, not added up image by image
        masks = torch.cat([mine @ map for mine, map in zip(rows, maps, strict=True)]).view(-1, *pixels.shape[-2:])
        if self.prior is None:
            return masks
        weights, around = pairs.predicted(answer["prior"]), pairs.predicted(answer["around"])
        across, down = (axis_prior(canvas.middles(axis)[pairs.image], weights, around, axis) for axis in (0, 1))
        return masks + across[:, None] + down[:, :, None]

    def masks_of(self, round: Round, queries: Tensor, sizes: Tensor) -> list[Masks]:
        """Masks of chosen queries (B,k) of a final round, for each image; `sizes` (B,2) of the original images."""
        canvas = self._canvas(round)
        rows, across, down = self._chosen(round, queries)
        extents = canvas.pixels.extents.flip(-1).tolist()
        return [
            Masks(
                rows[i],
                canvas.pixels.map[i],
                (extents[i][0], extents[i][1]),
                (int(height), int(width)),
                None if across is None else across[i],
                None if down is None else down[i],
            )
            for i, (height, width) in enumerate(sizes.tolist())
        ]

    def certainty(self, round: Round, queries: Tensor) -> Tensor:
        """Mean probability inside the masks of chosen queries (B,k), 0 for empty ones (mask2former:instance_inference).

        Padding is left out, as there.
        """
        canvas = self._canvas(round)
        rows, across, down = self._chosen(round, queries)
        logits = torch.einsum("bke,behw->bkhw", rows.float(), canvas.pixels.map.float())
        if across is not None and down is not None:
            logits = logits + across[:, :, None] + down[..., None]
        inside = (logits > 0) & canvas.shown[:, None]
        return (logits.sigmoid() * inside).sum((-2, -1)) / (inside.sum((-2, -1)) + 1e-6)

    def _chosen(self, round: Round, queries: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings (B,k,E) of queries (B,k) of a final round, and what their box adds to columns (B,k,w) and rows (B,k,h)."""
        answer = round.answers[self.name]
        image = torch.arange(len(queries), device=queries.device)[:, None]
        embedding = answer["embedding"][0][image, queries]
        if self.prior is None:
            return embedding, None, None
        weights, around = answer["prior"][0][image, queries], answer["around"][0][image, queries]
        canvas = self._canvas(round)
        across, down = (axis_prior(canvas.middles(axis)[:, None], weights, around, axis) for axis in (0, 1))
        return embedding, across, down

    def decode(self, round: Round, picks: Picks, sizes: Tensor) -> Mapping[str, Tensor | Sequence[MaskSource]]:
        """{"masks": B x `Masks`}; where no other head has boxes a result makes them of these."""
        return {"masks": self.masks_of(round, picks.queries, sizes)}


def axis_prior(places: Tensor, weights: Tensor, around: Tensor, axis: int) -> Tensor:
    """What one coordinate of a place says about a mask, before the sigmoid.

    Along each axis a place has a coordinate u in the box, -1 and 1 at its edges. The three weights belong to u and u^2 (as at
    the nearest edge, where it is outside), and to minus the logarithm of |u| outside.

    Args:
        places: (...,n) x or y, 0..1 of the image.
        weights: (...,2,3) for x and y.
        around: (...,4) boxes.
        axis: 0: x, 1: y.

    Returns:
        (...,n) float32.
    """
    around, weights = around.float(), weights[..., axis, :].float()
    half = around[..., 2 + axis, None].clamp(min=1e-4) / 2
    u = (places - around[..., axis, None]) / half
    inside = u.clamp(-1, 1)
    beyond = u.abs().clamp(min=1).log()
    return weights[..., 0, None] * inside + weights[..., 1, None] * inside.square() - weights[..., 2, None] * beyond


def _size(maps: Tensor, like: Tensor) -> Tensor:
    """Width and height of maps (...,H,W), (2,) of the dtype and device of `like`; the host does not wait."""
    height, width = maps.shape[-2:]
    return torch.tensor([width, height], dtype=like.dtype).to(like.device, non_blocking=True)


def _prior(width: int) -> nn.Linear:
    """D -> 6, so that at first all queries' masks fade outside their box, and nothing is said about places inside."""
    layer = Linear(width, 6)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.0, 0.0, 8.0] * 2))
    return layer


def _drawer(pairs: Match, like: Tensor, generators: Sequence[torch.Generator] | None) -> Callable[[int], Tensor]:
    """Number of points -> (n,points,2) uniform 0..1; those of an image's pairs from its own generator."""

    def draw(count: int) -> Tensor:
        if generators is None:
            return uniform(like.new_empty(like.shape[0], count, 2), None)
        return torch.cat(
            [torch.rand(n, count, 2, generator=g, device=like.device) for n, g in zip(pairs.per_image, generators, strict=True)]
        )

    return draw
