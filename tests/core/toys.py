"""Small parts and toy heads: everything the contract allows and detection alone does not need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.head import Feedback, Head, Steering
from queryvision.layers.positions import sine_embedding
from queryvision.model.backbone import Backbone
from queryvision.model.cross_attention import DenseCrossAttention
from queryvision.model.decoder import Decoder, DecoderLayer
from queryvision.model.encoder import DenseEncoder
from queryvision.model.neck import Projection
from queryvision.model.proposals import LearnedStart, SelectedQueries
from queryvision.model.queries import LearnedQueries
from queryvision.model.query_model import QueryModel
from queryvision.ops.boxes import inverse_sigmoid
from queryvision.ops.losses import sigmoid_focal
from queryvision.structures import Features, ImageBatch, Round, Stage, Targets
from queryvision.tasks.detection import BoxHead, LabelHead

WIDTH, CLASSES = 32, 4


# ---------------------------------------------------------------------------------------------------- parts
class TinyBackbone(Backbone):
    """Two convolutions whose windows do not overlap, stride 8."""

    channels = (16,)
    strides = (8,)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 4, stride=4)
        self.conv2 = nn.Conv2d(8, 16, 2, stride=2)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        return [self.conv2(F.relu(self.conv1(pixels)))]


class GivenFeatures(Backbone):
    """Hands out `features`, whatever the image."""

    channels = (16,)
    strides = (8,)
    features: Features

    def forward(self, images: ImageBatch) -> Features:
        return self.features


class AnchorPositions(nn.Module):
    """Positions of queries out of their anchors, the same for each slot."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4 * 16, WIDTH)

    def forward(self, anchors: Tensor, points: Tensor | None, ratios: Tensor) -> Tensor:
        slots = 1 if points is None else 1 + points.shape[2]
        return self.project(sine_embedding(anchors * 6.0, 16))[:, :, None].expand(-1, -1, slots, -1)


def tiny_model(
    heads: Sequence[Head],
    steering: Steering | None = None,
    *,
    layers: int = 2,
    num_queries: int = 5,
    two_stage: bool = False,
    denoising: nn.Module | None = None,
    initial: bool = False,
    backbone: Backbone | None = None,
) -> QueryModel:
    """A narrow dense DETR without dropout; `two_stage` selects its queries from the memory and places them by anchors."""
    backbone = backbone or TinyBackbone()
    slots = sum(head.slots for head in heads)
    make = [DecoderLayer(WIDTH, 4, DenseCrossAttention(WIDTH, 4, 0.0), 2 * WIDTH, 0.0, slots=slots > 0) for _ in range(layers)]
    learned = LearnedQueries(num_queries, WIDTH, slots)
    selected = SelectedQueries(num_queries, WIDTH, LearnedStart(num_queries, WIDTH, slots))
    model = QueryModel(
        backbone,
        Projection(backbone.channels, WIDTH),
        DenseEncoder(WIDTH, 1, 4, 2 * WIDTH, 0.0),
        selected if two_stage else learned,
        Decoder(make, nn.LayerNorm(WIDTH), AnchorPositions() if two_stage else None, initial),
        heads,
        steering,
        denoising,
    )
    return vary(model)


def vary(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws all parameters, each with its own gain: with plain weights queries nearly agree, and a wrong order would pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim >= 2:
                scale = 3.0 if "queries.positions" in name else 1.5 * value[0].numel() ** -0.5
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
            else:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator) + ("norm" in name and "weight" in name))
            value.mul_(0.7 + 0.6 * torch.rand((), generator=generator))
    return model


def detection_heads(loss: str = "softmax") -> list[Head]:
    return [LabelHead(WIDTH, CLASSES, loss=loss), BoxHead(WIDTH)]


def silent_parameters(model: nn.Module) -> set[str]:
    """Parameters without a gradient, or with one that is zero everywhere."""
    return {name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())}


# ---------------------------------------------------------------------------------------------------- data
def images(batch: int = 2, height: int = 32, width: int = 40, seed: int = 0) -> ImageBatch:
    pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    return ImageBatch(pixels, padding, False, torch.tensor([[height, width]] * batch))


def make_targets(
    counts: Sequence[int],
    *,
    room: int = 0,
    seed: int = 0,
    lacks: Sequence[tuple[str, int, int]] = (),
    covers: Tensor | None = None,
    ignore: Tensor | None = None,
    **more: Tensor,
) -> Targets:
    """Random targets.

    Args:
        counts: of each image.
        room: further columns of padding.
        seed: of boxes and labels, which do not depend on the padding.
        lacks: (field, image, target) that is not annotated.
        covers: (B,C).
        ignore: (B,R,4).
        more: further fields (B,T,...).
    """
    batch, most = len(counts), max(counts, default=0) + room
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(batch, 20, 5, generator=generator)[:, :most]
    valid = torch.arange(most) < torch.tensor(list(counts))[:, None]
    labels = (drawn[..., 4] * CLASSES).long() * valid
    boxes = torch.cat((0.3 + 0.4 * drawn[..., :2], 0.1 + 0.3 * drawn[..., 2:4]), -1) * valid[..., None]
    values = {"labels": labels, "boxes": boxes, **more}
    has = {name: valid.clone() for name in values}
    for name, image, target in lacks:
        has[name][image, target] = False
    covers = torch.ones(batch, CLASSES, dtype=torch.bool) if covers is None else covers
    return Targets(
        values=values,
        counts=tuple(counts),
        valid=valid,
        has=has,
        num_with={name: tuple(flag.sum(1).tolist()) for name, flag in has.items()},
        covers=covers,
        covers_all=bool(covers.all()),
        sizes=torch.full((batch, 2), 64),
        ignore_boxes=torch.zeros(batch, 0, 4) if ignore is None else ignore,
        num_ignored=0 if ignore is None else ignore.shape[1],
        image_ids=tuple(range(batch)),
    )


def make_round(answers: dict, queries: str = "main", **more) -> Round:
    """A round of decoder layers out of hand-made answers (S,B,Q,...)."""
    num_stages = len(next(iter(next(iter(answers.values())).values())))
    stages = tuple(Stage("layer", i, last=i == num_stages - 1) for i in range(num_stages))
    final = {head: {name: value[-1] for name, value in answer.items()} for head, answer in answers.items()}
    return Round(queries, stages, answers, {}, final, **more)


# ---------------------------------------------------------------------------------------------------- heads
class LaneHead(Head):
    """A lane is its x at P rows of the image: a slot a row, and the head moves its own points along."""

    def __init__(self, width: int, rows: int, name: str = "lanes") -> None:
        super().__init__()
        self.name, self.slots = name, rows
        self.move = nn.Linear(width, 1)
        self.weights = {"l1": 2.0}
        self.register_buffer("rows", torch.linspace(0.1, 0.9, rows), persistent=False)

    def forward(self, view):
        x = self.move(view.slots)[..., 0]
        if view.points is not None:
            x = x + inverse_sigmoid(view.points[..., 0])
        return {"x": x.sigmoid()}

    def feedback(self, answer, view):
        return Feedback(points=torch.stack((answer["x"], self.rows.expand_as(answer["x"])), -1))

    def count(self, targets, num_queries, repeats=1):
        return float(sum(targets.num_with[self.name]) * repeats)

    def cost(self, round, targets, generators):
        x = round.answers[self.name]["x"]
        return (x[:, :, :, None] - targets[self.name][:, None]).abs().mean(-1) * targets.has[self.name][:, None]

    def loss(self, round, match, targets, facts):
        away = (match.predicted(round.answers[self.name]["x"]) - match.wanted(targets[self.name])).abs().mean(-1)
        return {"l1": match.sum_per_stage(away * match.wanted(targets.has[self.name])) / facts.normaliser}

    def decode(self, round, picks, sizes):
        x = round.answers[self.name]["x"][0]
        x = x.gather(1, picks.queries[..., None].expand(-1, -1, self.slots))
        points = torch.stack((x, self.rows.expand_as(x)), -1)
        return {self.name: points * sizes.flip(-1)[:, None, None]}


class GroundingHead(Head):
    """Class logits are query times prompt token; a target is the set of tokens that speak of it."""

    name = "tokens"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.weights = {"focal": 1.0}

    def prepare(self, scene):
        prompt, padding = scene.extras["prompt"]
        return {"tokens": self.project(prompt), "padding": padding}

    def forward(self, view):
        logits = torch.einsum("bqd,bld->bql", view.state, view.context["tokens"]) * view.state.shape[-1] ** -0.5
        return {"logits": logits.masked_fill(view.context["padding"][:, None], -1e4)}

    def cost(self, round, targets, generators):
        share = targets["tokens"] / targets["tokens"].sum(-1, keepdim=True).clamp(min=1)
        said = round.answers[self.name]["logits"].sigmoid()
        return -torch.einsum("sbql,btl->sbqt", said, share) * targets.has["tokens"][:, None]

    def loss(self, round, match, targets, facts):
        logits = round.answers[self.name]["logits"]
        wanted = torch.zeros_like(logits)
        wanted[match.stage, match.image, match.query] = match.wanted(targets["tokens"])
        real = ~round.contexts[self.name]["padding"][:, None]
        return {"focal": (sigmoid_focal(logits, wanted) * real).sum((1, 2, 3)) / facts.normaliser}


class Witness(Head):
    """Remembers what it saw and was told; without a say in matching.

    Args:
        name: of the head.
        slots: it owns.
        mark: the number its points get by feedback; None: it does not steer them.
        speaks: stage -> whether it answers.
        matched_by: see `Head`.
    """

    def __init__(self, name="witness", slots=0, mark=None, speaks=lambda stage: True, matched_by="stage") -> None:
        super().__init__()
        self.name, self.slots, self.mark, self.speaks, self.matched_by = name, slots, mark, speaks, matched_by
        self.weights = {"nothing": 1.0}
        self.views, self.told = [], []

    def forward(self, view):
        self.views.append(view)
        return {"state": view.state} if self.speaks(view.stage) else None

    def feedback(self, answer, view):
        if self.mark is None:
            return Feedback()
        return Feedback(points=view.state.new_full((*view.state.shape[:2], self.slots, 2), self.mark))

    def loss(self, round, match, targets, facts):
        self.told.append((round, match, facts))
        return {"nothing": match.sum_per_stage(match.predicted(next(iter(round.answers[self.name].values()))).sum(-1) * 0.1)}


class HidingHead(Witness):
    """Tells the next layer where not to look: `hides` is (B,Q,N)."""

    def __init__(self, hides: Tensor) -> None:
        super().__init__("hiding")
        self.hides = hides

    def feedback(self, answer, view):
        return Feedback(hidden=self.hides)


class CostHead(Head):
    """Its answer is its cost, (S,B,Q,T)."""

    name = "costs"

    def cost(self, round, targets, generators):
        return round.answers[self.name]["cost"]


class JudgeHead(Head):
    """Says `value` about pairs of the targets in `knows`."""

    def __init__(self, name: str, value: float, knows: Sequence[int]) -> None:
        super().__init__()
        self.name, self.value = name, value
        self.knows = torch.tensor(list(knows))
        self.weights = {}

    def quality(self, round, match, targets):
        return torch.full(match.target.shape, self.value), torch.isin(match.target, self.knows)

    def loss(self, round, match, targets, facts):
        return {}
