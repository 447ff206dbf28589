"""What flows between the parts, with a shape on every field.

Letters, everywhere in this project: B images, Q queries, T targets, S stages, N memory tokens, P slots a query, L levels,
D width, C classes, K keypoints, R ignore regions. Sizes are height x width. Boxes inside the model are
(cx, cy, w, h), each 0..1 of the unpadded image; boxes in results are (x1, y1, x2, y2) in pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from queryvision.ops.sampling import lay_out

FREE, NONE, VOID = -1, -2, -3
"""Pins that are no target's index: wants a match; taught as background; padding (no loss, seen by nobody)."""

Answer = dict[str, Tensor]
"""One head's answer at one stage: {field: (B,Q,...)}."""


# ---------------------------------------------------------------------------------------------------- the batch
class Movable:
    """A dataclass of tensors that travels to a device as one."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Returns a copy whose tensors are on `device`."""
        moved = {f.name: _move(getattr(self, f.name), device, non_blocking) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]

    def pin_memory(self) -> Self:
        """Returns a copy in page-locked memory; PyTorch's `DataLoader` calls this."""
        return replace(self, **{f.name: _pin(getattr(self, f.name)) for f in fields(self)})  # type: ignore


def _pin(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pin(item) for key, item in value.items()}
    return value.pin_memory() if isinstance(value, Tensor | Movable) else value


def _move(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, dict):
        return {key: _move(item, device, non_blocking) for key, item in value.items()}
    return value


@dataclass
class ImageBatch(Movable):
    """Images of a batch, padded at the right and the bottom to one size."""

    pixels: Tensor  # (B,3,H,W) uint8 0..255 RGB, or floating: already normalised
    padding: Tensor  # (B,H,W) bool, True = padding
    padded: bool  # host knowledge of padding.any(), so that nobody has to ask the device
    sizes: Tensor  # (B,2) int64, height and width of each unpadded input


@dataclass
class Targets(Movable):
    """Annotations of a batch, padded to the largest number of targets in it."""

    values: dict[str, Tensor]  # {field: (B,T,...)}: labels (B,T) int64, boxes (B,T,4), areas (B,T) px, masks, keypoints
    counts: tuple[int, ...]  # host: targets of each image
    valid: Tensor  # (B,T) bool, False = padding
    has: dict[str, Tensor]  # {field: (B,T) or (B,T,K) bool}; False in padding
    num_with: dict[str, tuple[int, ...]]  # host: targets of each image that have the field
    covers: Tensor  # (B,C) bool: the classes this image's annotations speak about
    covers_all: bool  # host knowledge of covers.all()
    sizes: Tensor  # (B,2) int64, height and width of each unpadded input
    ignore_boxes: Tensor  # (B,R,4) cx cy w h, 0..1: crowd and ignore regions; zero size = padding
    num_ignored: int = 0  # host: R before padding; 0 lets a head skip the question
    image_ids: tuple[int, ...] = ()  # host

    def __getitem__(self, name: str) -> Tensor:
        """The field `name`, (B,T,...)."""
        if name not in self.values:
            raise KeyError(f"targets hold no '{name}', only {sorted(self.values)}")
        return self.values[name]

    def only_known(self, cost: Tensor, name: str) -> Tensor:
        """A cost (S,B,Q,T) with zero columns for targets that lack the field `name`, which changes no assignment."""
        return cost if self.num_with[name] == self.counts else cost.masked_fill(~self.has[name][:, None], 0.0)


@dataclass
class Batch(Movable):
    """What a training step takes."""

    images: ImageBatch
    targets: Targets
    skipped: tuple[str, ...] = ()  # images that could not be read, with the reason; another image stands in for each

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Returns a copy on `device`."""
        return replace(self, images=self.images.to(device, non_blocking), targets=self.targets.to(device, non_blocking))


# ---------------------------------------------------------------------------------------------------- inside the model
@dataclass
class Features:
    """Maps of the backbone or the neck, finest level first."""

    maps: list[Tensor]  # L x (B,C_l,H_l,W_l)
    paddings: list[Tensor | None]  # L x (B,H_l,W_l) bool, True = padding; None: nothing is padded
    padding: Tensor | None = None  # (B,H,W) of the image itself, from which further levels get theirs
    extents: Tensor | None = None  # (B,L,2) float32: width and height of each unpadded image in cells, to the pixel: W / stride

    def coarsest(self, count: int) -> Features:
        """Its last `count` levels."""
        extents = None if self.extents is None else self.extents[:, -count:]
        return replace(self, maps=self.maps[-count:], paddings=self.paddings[-count:], extents=extents)


@dataclass
class PixelMap:
    """One fine map for all masks of an image; a mask is its product with an embedding."""

    map: Tensor  # (B,E,h,w)
    extents: Tensor  # (B,2) float32: width and height of each unpadded image in cells
    stride: int  # input pixels per cell
    whole: bool = False  # padding counts as image, as published Mask2Former has it


@dataclass
class Memory:
    """What the encoder knows about the images."""

    tokens: Tensor  # (B,N,D)
    positions: Tensor  # (B,N,D)
    shapes: tuple[tuple[int, int], ...]  # L x (H_l,W_l), N is the sum of their products
    padding: Tensor | None  # (B,N) bool, True = padding; None: nothing is padded
    valid_ratios: Tensor  # (B,L,2) float32, unpadded share of (width, height) on each level, in whole cells or to the pixel
    pixels: PixelMap | None = None  # for masks; None: no head wants it
    made: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # what was asked for already

    @property
    def placed(self) -> Tensor:
        """Tokens with their positions (B,N,D), the keys of dense attention; made when first asked for."""
        if "placed" not in self.made:
            self.made["placed"] = self.tokens + self.positions
        return self.made["placed"]

    def span(self, level: int) -> slice:
        """Where the tokens of a level stand along N."""
        sizes = [height * width for height, width in self.shapes]
        return slice(sum(sizes[:level]), sum(sizes[: level + 1]))

    @property
    def canvas(self) -> Tensor:
        """Tokens laid out to be sampled as they are (`ops.sampling.lay_out`), padding zeroed, float32 or wider."""
        if "canvas" not in self.made:
            tokens = self.tokens.to(torch.promote_types(self.tokens.dtype, torch.float32))
            tokens = tokens if self.padding is None else tokens.masked_fill(self.padding[..., None], 0.0)
            self.made["canvas"] = lay_out(tokens, self.shapes)
        return self.made["canvas"]


@dataclass
class QueryGroup:
    """A run of queries along Q that belong together."""

    name: str
    size: int
    pins: Tensor | None = None  # (B,size) int64 on the host: a target's index, FREE, NONE or VOID; None: all FREE
    sees: tuple[str, ...] = ()  # further groups whose queries these attend to; a group always sees itself
    repeats: int = 1  # how often each target is given away in this group
    blocks: int = 1  # equal parts of the group that cannot see each other (denoising groups)


@dataclass
class Queries:
    """The questions, as they enter the decoder."""

    states: Tensor  # (B,Q,1+P,D), slot 0 is the query itself
    groups: tuple[QueryGroup, ...]  # in the order of Q; the sizes sum to Q
    positions: Tensor | None = None  # (B,Q,1+P,D) added to queries and keys in attention
    anchors: Tensor | None = None  # (B,Q,2|4), 0..1
    points: Tensor | None = None  # (B,Q,P,2), 0..1
    base: Tensor | None = None  # anchors with their gradient
    points_base: Tensor | None = None  # points with their gradient
    rounds: tuple[Round, ...] = ()  # what was already predicted on the way here (proposals)


@dataclass(frozen=True)
class Stage:
    """Where in the model an answer is given."""

    kind: Literal["proposal", "initial", "layer"]
    index: int = 0  # of the decoder layer
    last: bool = False
    looks_at: int | None = None  # level of the memory that the next layer looks at; None: all of them


@dataclass
class Round:
    """Stages of one query group whose answers have the same fields, stacked."""

    queries: str  # name of the query group
    stages: tuple[Stage, ...]  # S
    answers: dict[str, Answer]  # {head: {field: (S,B,Q,...)}}
    contexts: dict[str, Any]  # {head: what its `prepare` returned}
    final: dict[str, Answer]  # {head: {field: (B,Q,...)}}, the last stage's answers of the same queries
    pins: Tensor | None = None  # (B,Q) int64 on the host; None: all FREE
    real: Tensor | None = None  # (B,Q) bool on the device, False = VOID; None: all real
    repeats: int = 1
    proposals: bool = False
    proposal_index: Tensor | None = None  # (B,Q) int64 memory token of each, where only selected ones are kept

    @property
    def shape(self) -> tuple[int, int, int]:
        """S, B, Q."""
        first = next(iter(next(iter(self.answers.values())).values()))
        return first.shape[0], first.shape[1], first.shape[2]

    @property
    def device(self) -> torch.device:
        """Of its answers."""
        return next(iter(next(iter(self.answers.values())).values())).device


@dataclass
class Outputs:
    """Everything the model predicted in one forward pass."""

    rounds: list[Round]

    def final(self, queries: str = "main") -> Round:
        """The last stage of a query group as a round of its own (S = 1)."""
        last = [r for r in self.rounds if r.queries == queries and r.stages[-1].last]
        if not last:
            raise KeyError(f"no last stage of queries '{queries}', only of {sorted({r.queries for r in self.rounds})}")
        round = last[0]
        answers = {head: {name: value[-1:] for name, value in answer.items()} for head, answer in round.answers.items()}
        return replace(round, answers=answers, stages=round.stages[-1:])


# ---------------------------------------------------------------------------------------------------- training
@dataclass
class Match:
    """Pairs of a prediction and a target within one round."""

    stage: Tensor  # (pairs,) int64 on the device
    image: Tensor  # (pairs,)
    query: Tensor  # (pairs,)
    target: Tensor  # (pairs,)
    num_stages: int
    per_image: tuple[int, ...] = ()  # host: pairs of each image, all stages together

    def by_image(self) -> Match:
        """The same pairs, image by image."""
        order = self.image.argsort(stable=True)
        stage, image, query, target = (value[order] for value in (self.stage, self.image, self.query, self.target))
        return Match(stage, image, query, target, self.num_stages, self.per_image)

    def predicted(self, values: Tensor) -> Tensor:
        """Rows of a prediction (S,B,Q,...) -> (pairs,...)."""
        return values[self.stage, self.image, self.query]

    def wanted(self, values: Tensor) -> Tensor:
        """Rows of a target field (B,T,...) -> (pairs,...)."""
        return values[self.image, self.target]

    def sum_per_stage(self, values: Tensor) -> Tensor:
        """Sums (pairs,) over the pairs of each stage -> (S,); stays in the graph when there are no pairs."""
        return values.new_zeros(self.num_stages).index_add(0, self.stage, values)


@dataclass
class Facts:
    """What a head's loss may want to know beside its own answers."""

    normaliser: float  # what the sums are divided by, of the whole accumulated, all-rank batch
    quality: Tensor  # (pairs,) float32, 1 where nobody knows better
    known: Tensor  # (pairs,) bool: some head knew the quality
    ignored: Tensor | None  # (S,B,Q) bool: lies in a crowd or ignore region; None: nothing does
    main_share: float = 0.0  # of the main queries that have a pair, as this head is matched; in rounds of other groups, too
    generators: Sequence[torch.Generator] | None = None  # one an image


@dataclass
class Losses:
    """The outcome of the criterion; nothing here has been read on the host."""

    total: Tensor  # scalar, weighted
    terms: dict[str, Tensor]  # {"head.term": scalar}, weighted, of the last stage; other query groups as "group/head.term"
    stages: list[dict[str, Tensor]] = field(default_factory=list)  # of each round {"head.term": (S,)}, weighted


# ---------------------------------------------------------------------------------------------------- prediction
@dataclass
class Picks:
    """The (query, class) pairs chosen as results, k of each image, best first."""

    queries: Tensor  # (B,k) int64
    classes: Tensor  # (B,k) int64
    scores: Tensor  # (B,k) float32
