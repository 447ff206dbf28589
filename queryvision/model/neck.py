"""The neck brings every level to the width of the transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from queryvision.layers.conv import ConvNorm
from queryvision.model.backbone import resized_padding
from queryvision.structures import Features


class Projection(nn.Module):
    """A 1x1 convolution a level (DETR's input projection).

    Args:
        channels: C_l of each level of the backbone.
        width: D.
        norm: with a batch norm behind it, instead of a bias (RT-DETR).
    """

    def __init__(self, channels: Sequence[int], width: int, norm: bool = False) -> None:
        super().__init__()
        self.levels = nn.ModuleList(ConvNorm(c, width) if norm else nn.Conv2d(c, width, 1) for c in channels)

    def forward(self, features: Features) -> Features:
        """Maps (B,C_l,H_l,W_l) -> (B,D,H_l,W_l), of its own levels, the coarsest ones; padding as it was."""
        features = features.coarsest(len(self.levels))
        return replace(features, maps=[conv(m) for conv, m in zip(self.levels, features.maps, strict=True)])


class Pyramid(nn.Module):
    """A 1x1 convolution with group norm a level, and coarser levels by 3x3 convolutions of stride 2 (arXiv 2010.04159).

    The first further level is made from the backbone's last map, each later one from the level before.

    Args:
        channels: C_l of each level of the backbone.
        width: D.
        num_levels: L, at least as many as the backbone has.
        groups: of the group norm; fewer where a group would hold one channel.
    """

    def __init__(self, channels: Sequence[int], width: int, num_levels: int = 4, groups: int = 32) -> None:
        super().__init__()
        more = num_levels - len(channels)
        if more < 0:
            raise ValueError(f"{num_levels} levels are fewer than the backbone's {len(channels)}")
        self.given = len(channels)
        convolutions = [nn.Conv2d(c, width, 1) for c in channels]
        convolutions += [nn.Conv2d(channels[-1] if not i else width, width, 3, 2, 1) for i in range(more)]
        for conv in convolutions:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.levels = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(min(groups, width // 2), width)) for conv in convolutions)

    def forward(self, features: Features) -> Features:
        """Maps (B,C_l,H_l,W_l) -> (B,D,H_l,W_l) of all levels; padding of the further ones from the image's."""
        given = self.given
        features = features.coarsest(given)
        maps = [level(m) for level, m in zip(self.levels[:given], features.maps, strict=True)]
        paddings, source = list(features.paddings), features.maps[-1]
        for level in self.levels[given:]:
            source = level(source)
            maps.append(source)
            paddings.append(None if features.padding is None else resized_padding(features.padding, source))
        return Features(maps, paddings, features.padding)
