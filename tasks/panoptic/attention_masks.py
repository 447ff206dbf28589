"""AttentionMaskHead: masks out of where a query looks in the memory (DETR for panoptic segmentation, arXiv 2005.12872).

The attention maps of a query are made finer by convolutions, together with the backbone's maps. Every query goes through them
for itself, so only the last stage answers.

Legend: B images, Q queries, T targets, S stages, D width, H attention heads, L finer levels, h, w cells of a map, n pairs,
k picks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.errors import ConfigError, check_range
from queryvision.head import Fit, Head, Scene, View
from queryvision.layers.linear import Linear
from queryvision.masks import Masks, MaskSource
from queryvision.ops.losses import sigmoid_focal
from queryvision.ops.points import dice
from queryvision.structures import Answer, Facts, Features, Match, Memory, Picks, Round, Targets

CHUNK = 20
"""Queries of an image that go through the convolutions at once."""


@dataclass
class Views:
    """What all queries share."""

    memory: Memory  # of one level
    coarse: Tensor  # (B,D,h,w) the projected features of that level
    trunk: Features  # of the backbone, finest level first
    extents: Tensor  # (B,2) width and height of each unpadded image in cells of the finest level


class AttentionMap(nn.Module):
    """Where each query looks, as it is: a softmax over the cells of all heads together, no values (detr:MHAttentionMap).

    Args:
        width: D.
        num_heads: H, a divisor of D.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = Linear(width, width)
        self.k_linear = Linear(width, width)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor, memory: Memory) -> Tensor:
        """(B,Q,D) -> (B,Q,H,h,w)."""
        queries = self.q_linear(states).unflatten(-1, (self.num_heads, -1))
        keys = self.k_linear(memory.tokens).unflatten(-1, (self.num_heads, -1))
        scores = torch.einsum("bqhc,bnhc->bqhn", queries * queries.shape[-1] ** -0.5, keys)
        if memory.padding is not None:
            scores = scores.masked_fill(memory.padding[:, None, None], -torch.inf)
        return scores.float().flatten(2).softmax(-1).view(*scores.shape[:3], *memory.shapes[0]).to(scores.dtype)


class FinerMaps(nn.Module):
    """Attention maps, and the features they look at, made finer level by level (detr:MaskHeadSmallConv).

    Channels halve at each level. Norms are of one query, so queries may come in parts.

    Args:
        width: D, divisible by 16.
        num_heads: H.
        channels: of the backbone's finer levels, finest first.
    """

    def __init__(self, width: int, num_heads: int, channels: Sequence[int]) -> None:
        super().__init__()
        whole = width + num_heads
        sizes = [whole, whole, *(width // 2 ** (i + 1) for i in range(len(channels) + 1))]
        self.levels = len(channels)
        for index, (into, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), 1):
            self.add_module(f"lay{index}", nn.Conv2d(into, out, 3, padding=1))
            self.add_module(f"gn{index}", nn.GroupNorm(math.gcd(8, out), out))
        for index, (into, out) in enumerate(zip(reversed(channels), sizes[2:-1], strict=True), 1):
            self.add_module(f"adapter{index}", nn.Conv2d(into, out, 1))
        self.out_lay = nn.Conv2d(sizes[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, attention: Tensor, coarse: Tensor, finer: Sequence[Tensor]) -> Tensor:
        """Attention maps (B,Q,H,h,w), features (B,D,h,w) and maps of the backbone, finest first -> logits (B,Q,h',w')."""
        first = self.get_submodule("lay1")
        assert isinstance(first, nn.Conv2d)
        weight, width = first.weight, coarse.shape[1]
        shared = F.conv2d(coarse, weight[:, :width], first.bias, padding=1)  # the same for all queries
        lateral = [self.get_submodule(f"adapter{i + 1}")(level) for i, level in enumerate(reversed(finer))]
        parts = [self._finer(part, weight[:, width:], shared, lateral) for part in torch.split(attention, CHUNK, 1)]
        return torch.cat(parts, 1)

    def _finer(self, attention: Tensor, weight: Tensor, shared: Tensor, lateral: Sequence[Tensor]) -> Tensor:
        """Some queries' attention maps -> their logits."""
        batch = len(attention)

        def add(x: Tensor, level: Tensor) -> Tensor:
            return (x.view(batch, -1, *x.shape[1:]) + level[:, None]).flatten(0, 1)

        x = add(F.conv2d(attention.flatten(0, 1), weight, padding=1), shared)
        x = F.relu(self.get_submodule("gn1")(x), inplace=True)
        x = self._block(x, 2)
        for index, level in enumerate(lateral, 3):
            x = self._block(add(F.interpolate(x, level.shape[-2:], mode="nearest"), level), index)
        logits: Tensor = self.out_lay(x)
        return logits.view(batch, -1, *logits.shape[-2:])

    def _block(self, x: Tensor, index: int) -> Tensor:
        x = self.get_submodule(f"gn{index}")(self.get_submodule(f"lay{index}")(x))
        return F.relu(x, inplace=True)


class AttentionMaskHead(Head):
    """Masks out of attention maps; focal loss and dice on all pixels of matched pairs, no part in matching.

    It takes the place of the mask head in architectures without a pixel map (`Fit.maps`).

    Args:
        fit: all that it must fit.
        num_heads: H, a divisor of D.
        focal: weight of the loss term `focal`.
        dice: weight of the loss term `dice`.
        merging: rule by which overlapping masks become one map.
        least: merging: least score of a mask.
        overlap: merging: least share of a mask that others must leave over; rule `detr` does not ask.

    Raises:
        ConfigError: a number is out of range, or the architecture has no maps for it.
    """

    name = "masks"
    temperature = 0.0  # its labels are a softmax already; see `MaskHead`
    published: ClassVar[dict[str, dict[str, str]]] = {"detr": {"bbox_attention.": "attention.", "mask_head.": "finer."}}

    def __init__(
        self,
        fit: Fit,
        *,
        num_heads: int = 8,
        focal: float = 1.0,
        dice: float = 1.0,
        merging: Literal["mask2former", "detr"] = "detr",
        least: float = 0.85,
        overlap: float = 0.8,
    ) -> None:
        super().__init__()
        check_range("heads.attention_masks", 0, math.inf, focal=focal, dice=dice)
        check_range("heads.attention_masks", 0, 1, least=least, overlap=overlap)
        check_range("heads.attention_masks", 1, math.inf, num_heads=num_heads)
        if not fit.maps:
            raise ConfigError("head 'masks' is made of attention maps, and this model offers none; take detr_masks_r50")
        if fit.width % num_heads or fit.width % 16:
            raise ConfigError(f"heads.attention_masks.num_heads = {num_heads}: must divide the width {fit.width}, and 16 too")
        self.attention = AttentionMap(fit.width, num_heads)
        self.finer = FinerMaps(fit.width, num_heads, fit.maps[:-1])
        self.weights = {"focal": focal, "dice": dice}
        self.merging, self.least, self.overlap = merging, least, overlap

    def prepare(self, scene: Scene) -> Views:
        """The memory and what is finer than it."""
        assert scene.trunk.extents is not None, "a backbone says how many cells its images are wide and high"
        return Views(scene.memory, scene.features.maps[-1], scene.trunk, scene.trunk.extents[:, 0])

    def forward(self, view: View) -> Answer | None:
        """{"maps": (B,Q,h,w)} logits on the cells of the backbone's finest level; None before the last layer."""
        if not view.stage.last:
            return None
        views: Views = view.context
        attention = self.attention(view.state, views.memory)
        return {"maps": self.finer(attention, views.coarse, views.trunk.maps[: self.finer.levels])}

    def count(self, targets: Targets, num_queries: int, repeats: int = 1) -> float:
        """Number of targets with a mask."""
        return float(sum(targets.num_with["masks"]) * repeats)

    def loss(self, round: Round, match: Match, targets: Targets, facts: Facts) -> dict[str, Tensor]:
        """{"focal": (S,), "dice": (S,)} on the pixels of the targets' masks, to which the maps are enlarged."""
        maps, masks = round.answers[self.name]["maps"], targets["masks"]
        if not len(match.query):  # the maps stay in the graph
            nothing = maps.flatten(1)[:, :0].sum(1)
            return {"focal": nothing, "dice": nothing}
        size = masks.shape[-2:]
        found = F.interpolate(match.predicted(maps)[:, None], size, mode="bilinear", align_corners=False).flatten(1)
        wanted = match.wanted(masks).flatten(1).to(found.dtype)
        known = match.wanted(targets.has["masks"]) / facts.normaliser
        return {
            "focal": match.sum_per_stage(sigmoid_focal(found, wanted).mean(-1) * known),
            "dice": match.sum_per_stage(dice(found, wanted) * known),
        }

    def masks_of(self, round: Round, queries: Tensor, sizes: Tensor) -> list[Masks]:
        """Masks of chosen queries (B,k) of a final round, for each image; `sizes` (B,2) of the original images."""
        maps, views = round.answers[self.name]["maps"][0], round.contexts[self.name]
        rows = F.one_hot(queries, maps.shape[1]).to(maps.dtype)  # an embedding that picks one map
        extents = views.extents.flip(-1).tolist()
        return [
            Masks(rows[i], maps[i], (extents[i][0], extents[i][1]), (int(height), int(width)))
            for i, (height, width) in enumerate(sizes.tolist())
        ]

    def certainty(self, round: Round, queries: Tensor) -> Tensor:
        """Mean probability inside the masks of chosen queries (B,k), 0 for empty ones."""
        maps = round.answers[self.name]["maps"][0].float().flatten(2)
        logits = maps.gather(1, queries[..., None].expand(-1, -1, maps.shape[-1]))
        inside = logits > 0
        return (logits.sigmoid() * inside).sum(-1) / (inside.sum(-1) + 1e-6)

    def decode(self, round: Round, picks: Picks, sizes: Tensor) -> Mapping[str, Tensor | Sequence[MaskSource]]:
        """{"masks": B x `Masks`}."""
        return {"masks": self.masks_of(round, picks.queries, sizes)}
