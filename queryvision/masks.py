"""Masks of an image that are built only when somebody asks for them.

A hundred masks of a photograph of 1280 x 960 are 120 MB, and most are never looked at. So a result keeps what they are made of.

Letters: k objects, E channels of an embedding, h, w cells of the map, H, W pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from queryvision.ops.boxes import tight_boxes


class MaskSource(Protocol):
    """What every kind of masks offers; `masks[keep]` are those of some objects."""

    @property
    def size(self) -> tuple[int, int]:
        """H, W."""

    def __len__(self) -> int:
        """Number of masks, k."""

    def __getitem__(self, rows: Tensor) -> Self:
        """Some of them: (k,) bool, or indices."""

    def build(self) -> Tensor:
        """All masks, (k,H,W) bool."""

    def boxes(self) -> Tensor:
        """Boxes around them (x1, y1, x2, y2), (k,4) float32 px: the first pixel and one past the last, 0 if empty."""

    def cpu(self) -> Self:
        """The same on the host."""


@dataclass(frozen=True)
class Masks:
    """Masks that may overlap: the product of an embedding each and one map of the image (arXiv 2112.01527)."""

    embeddings: Tensor  # (k,E)
    pixels: Tensor  # (E,h,w)
    extent: tuple[float, float]  # height and width of the image in cells of the map; what lies beyond is padding
    size: tuple[int, int]  # H, W
    across: Tensor | None = None  # (k,w) what is added to every column ...
    down: Tensor | None = None  # (k,h) ... and row, before padding is left out

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.embeddings)

    def __getitem__(self, rows: Tensor) -> Masks:
        """Some of them: (k,) bool, or indices."""
        across, down = (None if part is None else part[rows] for part in (self.across, self.down))
        return replace(self, embeddings=self.embeddings[rows], across=across, down=down)

    def cpu(self) -> Masks:
        """The same on the host."""
        across, down = (None if part is None else part.cpu() for part in (self.across, self.down))
        return replace(self, embeddings=self.embeddings.cpu(), pixels=self.pixels.cpu(), across=across, down=down)

    def logits(self) -> Tensor:
        """(k,h,w) float32 on the cells of the map; above 0 is inside. Padding is left out."""
        height, width = (min(side, -int(-cells // 1)) for side, cells in zip(self.pixels.shape[1:], self.extent, strict=True))
        seen = self.pixels[:, :height, :width].float()
        masks = (self.embeddings.float() @ seen.flatten(1)).view(-1, height, width)
        if self.across is None or self.down is None:
            return masks
        return masks + self.across[:, None, :width] + self.down[:, :height, None]

    def full_logits(self, most: int = 8) -> Iterator[Tensor]:
        """Logits in pixels of the original image, (at most `most`,H,W) float32 at a time, bilinear between the cells."""
        for logits in torch.split(self.logits(), most):
            yield enlarged(logits, self.extent, self.size)

    def build(self) -> Tensor:
        """All masks, (k,H,W) bool; in floating point there are never more than a few."""
        parts = [logits > 0 for logits in self.full_logits()]
        return torch.cat(parts) if parts else torch.zeros(0, *self.size, dtype=torch.bool, device=self.pixels.device)

    def boxes(self) -> Tensor:
        """Boxes around what `build` would give, (k,4) float32; there are never more than a few masks."""
        return torch.cat([tight_boxes(logits > 0) for logits in self.full_logits()])


@dataclass(frozen=True)
class SegmentMasks:
    """Masks that cannot overlap: one map that says to which each pixel belongs."""

    numbers: Tensor  # (k,) int64, what the map says of each
    map: Tensor  # (H,W) int32, 0: nobody's

    @property
    def size(self) -> tuple[int, int]:
        """H, W."""
        return self.map.shape[0], self.map.shape[1]

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.numbers)

    def __getitem__(self, rows: Tensor) -> SegmentMasks:
        """Some of them: (k,) bool, or indices."""
        return replace(self, numbers=self.numbers[rows])

    def cpu(self) -> SegmentMasks:
        """The same on the host."""
        return SegmentMasks(self.numbers.cpu(), self.map.cpu())

    def rows(self, numbers: Tensor | None = None) -> Tensor:
        """What the map says, (n,), or all of it, (H,W) -> int64: 1 + the row of the object, 0: nobody's, or it is left out."""
        numbers = self.map if numbers is None else numbers
        most = max((int(part.max()) for part in (numbers, self.numbers) if part.numel()), default=0)
        table = torch.zeros(most + 1, dtype=torch.int64, device=self.map.device)
        table[self.numbers] = torch.arange(1, len(self.numbers) + 1, device=self.map.device)
        return table[numbers.long()]

    def build(self) -> Tensor:
        """All masks, (k,H,W) bool."""
        return self.map == self.numbers[:, None, None]

    def boxes(self) -> Tensor:
        """Boxes around the segments, (k,4) float32; there are never more than a few masks."""
        return torch.cat([tight_boxes(self.map == few[:, None, None]) for few in torch.split(self.numbers, 8)])


def enlarged(maps: Tensor, extent: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Maps (k,h,w) whose first `extent` cells show the image -> (k,H,W), bilinear; padding is cut off."""
    (height, width), (rows, columns) = maps.shape[1:], extent
    canvas = (max(size[0], round(size[0] * height / rows)), max(size[1], round(size[1] * width / columns)))
    whole = F.interpolate(maps[:, None], canvas, mode="bilinear", align_corners=False)[:, 0]
    return whole[:, : size[0], : size[1]]
