"""The neck brings every level to the width of the transformer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from queryvision.structures import Features


class Projection(nn.Module):
    """A 1x1 convolution a level (DETR's input projection).

    Args:
        channels: C_l of each level of the backbone.
        width: D.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)

    def forward(self, features: Features) -> Features:
        """Maps (B,C_l,H_l,W_l) -> (B,D,H_l,W_l); padding as it was."""
        return Features([conv(m) for conv, m in zip(self.levels, features.maps, strict=True)], features.paddings, features.padding)
