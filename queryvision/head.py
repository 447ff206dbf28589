"""The contract of a head: one kind of answer, from prediction to result, in one place.

Legend: B images, Q queries, T targets, S stages, N memory tokens, P slots a query, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from queryvision.masks import MaskSource
from queryvision.structures import Answer, Facts, Features, Match, Memory, Picks, Round, Stage, Targets


@dataclass
class Scene:
    """What all queries share about the images; made once a batch, after the encoder."""

    memory: Memory
    features: Features  # of the neck
    trunk: Features  # of the backbone, all its levels
    extras: Mapping[str, Any] = field(default_factory=dict)  # what the caller of the model gave along (a prompt ...)


@dataclass
class View:
    """What a head sees at one stage. Only `state` is needed, so that a foreign decoder can call a head, too."""

    state: Tensor  # (B,Q,D) after the decoder's norm
    raw: Tensor | None = None  # (B,Q,D) before it
    earlier: Tensor | None = None  # (B,Q,D) `state` of the layer before, detached; None at the first layer
    slots: Tensor | None = None  # (B,Q,P,D) the head's own slots, normed
    anchors: Tensor | None = None  # (B,Q,2|4) what the layer looked around, 0..1; detached, unless learned queries brought it
    points: Tensor | None = None  # (B,Q,P,2) the same of the head's own slots
    base: Tensor | None = None  # `anchors` with their gradient
    points_base: Tensor | None = None  # `points` with their gradient
    once: Tensor | None = None  # (B,Q,D) after the norm once, where `state` went through it twice (Mask DINO)
    stage: Stage = Stage("layer", last=True)
    previous: Answer | None = None  # its own answer of the layer before; at inference only of heads that steer
    answers: Mapping[str, Answer] = field(default_factory=dict)  # of the heads before it here; likewise
    context: Any = None  # what `prepare` returned


@dataclass
class Feedback:
    """What a head tells the next layer; the core detaches it where it must not carry a gradient."""

    anchors: Tensor | None = None  # (B,Q,2|4) 0..1
    points: Tensor | None = None  # (B,Q,P,2) 0..1
    hidden: Tensor | None = None  # (B,Q,N) bool, True = do not look; N tokens of the level that the next layer looks at


@dataclass
class DenoisingPlan:
    """Which target each denoising query starts from; on the host, unless `to` moved it."""

    target: Tensor  # (B,Q) int64, index of the target; VOID in padding
    positive: Tensor  # (B,Q) bool, False: noised so far that it must learn to say no
    group: Tensor  # (Q,) int64
    num_groups: int

    def to(self, device: torch.device) -> DenoisingPlan:
        """A copy on `device`."""
        target, positive, group = (v.to(device, non_blocking=True) for v in (self.target, self.positive, self.group))
        return DenoisingPlan(target, positive, group, self.num_groups)

    def of(self, values: Tensor) -> Tensor:
        """What each query's target has: rows of a target field (B,T,...) -> (B,Q,...); VOID gets the first target's, or 0."""
        if not values.shape[1]:
            return values.new_zeros(*self.target.shape, *values.shape[2:])
        index = self.target.clamp(min=0).view(*self.target.shape, *[1] * (values.ndim - 2))
        return values.gather(1, index.expand(*self.target.shape, *values.shape[2:]))


@dataclass
class Noise:
    """What a head adds to the denoising queries."""

    content: Tensor | None = None  # (B,Q,D) added to slot 0
    anchors: Tensor | None = None  # (B,Q,2|4)
    points: Tensor | None = None  # (B,Q,P,2)


@dataclass(frozen=True)
class Fit:
    """What a head must fit; the builder says it, an architecture's choices are nobody's settings.

    Attributes:
        width: D of the states.
        num_layers: decoder layers.
        per_layer: weights of its own for each decoder layer, instead of one set for all.
        proposals: "none"; "one": a further set for proposals that only tell object from no object; "all": for all classes.
        anchors: coordinates of what the first layer looks around; 0: nothing.
        refines: "state" or "raw": what the next layer's anchors are computed from.
        look_twice: answers start from the anchors with their gradient (look forward twice, arXiv 2203.03605).
        eps: least share at which anchors are turned into logits.
        denoising: targets come back as queries, so what describes them needs weights.
        distributions: numbers are refined as distributions over bins, each layer's the residual of the one before
            (arXiv 2410.13842).
        pixels: E, channels of the pixel map that masks are read from.
        hides: a layer does not look where the masks before it say there is nothing (arXiv 2112.01527).
        starts: heads are asked before the first layer, too, and what refines anchors answers there with the first ones
            (arXiv 2206.02777).
        maps: masks are made of attention maps: C_l of the backbone's finer levels, finest first, and last D. Empty: masks are
            read from a pixel map.
    """

    width: int
    num_layers: int = 1
    per_layer: bool = False
    proposals: Literal["none", "one", "all"] = "none"
    anchors: Literal[0, 2, 4] = 0
    refines: Literal["state", "raw"] = "state"
    look_twice: bool = False
    eps: float = 1e-5
    denoising: bool = False
    distributions: bool = False
    pixels: int = 256
    hides: bool = False
    starts: bool = False
    maps: tuple[int, ...] = ()

    @staticmethod
    def of(fit: Fit | int) -> Fit:
        """A plain number is a width, with DETR's choices."""
        return Fit(fit) if isinstance(fit, int) else fit


class Head(nn.Module):
    """One kind of answer. Subclasses override what they need; everything but `forward`, `loss` and `decode` has a default.

    Attributes:
        name: key of its answers and losses, unique in a model.
        slots: further decoder states it owns beside each query's own.
        matched_by: "stage", or "union": its losses use the pairs that any stage of the same queries found.
        weights: weight of every term that `loss` returns.
        published: {family: {their prefix: own prefix}} of its parameters in published checkpoints.
        wants_pixels: reads the pixel map (`Memory.pixels`), which is made only where a head wants it.
        class_rows: patterns (`re.fullmatch`, within the head) of its parameters whose first axis is the classes, perhaps with
            further rows behind them; fine-tuning on other classes carries their rows over by class name.
        readouts: parts of it that read what others made and shape none of it (their input is detached): their gradients are
            clipped apart, so that they do not even shorten the others'.
    """

    name: str
    slots: int = 0
    matched_by: Literal["stage", "union"] = "stage"
    weights: dict[str, float]
    published: ClassVar[dict[str, dict[str, str]]] = {}
    class_rows: tuple[str, ...] = ()
    readouts: tuple[str, ...] = ()
    wants_pixels: bool = False

    def prepare(self, scene: Scene) -> Any:
        """Whatever its stages share of one batch; default None."""
        return None

    def forward(self, view: View) -> Answer | None:
        """One stage's answer {field: (B,Q,...)}; None where it is silent."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(view)")

    def feedback(self, answer: Answer, view: View) -> Feedback:
        """What the next layer looks around, or must not look at."""
        return Feedback()

    def rank(self, answer: Answer) -> Tensor:
        """How promising each proposal is, (B,N)."""
        raise NotImplementedError(f"head '{self.name}' cannot rank proposals: it has no rank(answer)")

    def noise(self, targets: Targets, plan: DenoisingPlan, generators: Sequence[torch.Generator] | None) -> Noise | None:
        """What the denoising queries of `plan` (on the targets' device) start from; None: nothing of its own."""
        return None

    def count(self, targets: Targets, num_queries: int, repeats: int = 1) -> float:
        """What its losses are divided by, known before the forward pass: by default the number of targets."""
        return float(sum(targets.counts) * repeats)

    def cost(self, round: Round, targets: Targets, generators: Sequence[torch.Generator] | None) -> Tensor | None:
        """Weighted matching cost (S,B,Q,T) in float32; None: takes no part in matching."""
        return None

    def quality(self, round: Round, match: Match, targets: Targets) -> tuple[Tensor, Tensor | None] | None:
        """How good matched answers are, (pairs,) 0..1, and for which pairs that is known, (pairs,) bool; None: for all."""
        return None

    def ignored(self, round: Round, targets: Targets) -> Tensor | None:
        """Which answers lie in a crowd or ignore region, (S,B,Q) bool; None: cannot tell, or there is none."""
        return None

    def loss(self, round: Round, match: Match, targets: Targets, facts: Facts) -> dict[str, Tensor]:
        """Unweighted terms {term: (S,)}, already divided by `facts.normaliser`."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(round, match, targets, facts)")

    def decode(self, round: Round, picks: Picks, sizes: Tensor) -> Mapping[str, Tensor | Sequence[MaskSource]]:
        """Fields of the picked (query, class) pairs {field: (B,k,...)}; masks as B sources that build them when asked for.

        Args:
            round: the final stage, S = 1.
            picks: k pairs of each image.
            sizes: (B,2) height and width of the original images in pixels.
        """
        return {}


@dataclass(frozen=True)
class Steering:
    """Which head steers what; each at most one, by name.

    Attributes:
        rank: chooses among proposals.
        first: gives the first anchors, from its answer to a proposal.
        later: gives every next layer's anchors.
        hidden: says where the next layer may not look.
        quality: asked in this order how good a matched pair is.
    """

    rank: str | None = None
    first: str | None = None
    later: str | None = None
    hidden: str | None = None
    quality: tuple[str, ...] = ()

    def names(self) -> set[str]:
        """Every head named here."""
        return {name for name in (self.rank, self.first, self.later, self.hidden, *self.quality) if name}
