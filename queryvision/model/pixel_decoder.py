"""What masks are read from: one fine map of the image, and a pyramid of maps that is made by convolutions alone.

Legend: B images, L levels, C channels, D width, E channels of the pixel map, h, w cells. `real` is 1 on the image and 0 in
padding, or None; see `layers.conv`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from queryvision.layers.conv import ConvGroupNorm, ConvNorm
from queryvision.model.encoder import Flatten, Positions, map_shapes, memory_padding, valid_ratios
from queryvision.structures import Features, Memory, PixelMap


class PixelDecoder(nn.Module):
    """The backbone's finest level and the memory's finest one, enlarged to it: the map of all masks (arXiv 2112.01527).

    Args:
        lateral: the backbone's finest map (B,C,h,w) -> (B,D',h,w).
        reduce: the memory's finest map (B,D,...) -> (B,D',...).
        output: (their sum, real) -> (B,D',h,w).
        project: to E channels.
        stride: input pixels per cell.
        factor: cells of it per cell of the memory's finest level, in a row.
        whole: padding counts as image.
        marks: (L,D) that are added to the tokens of each level afterwards; None: they stay as they are.
    """

    def __init__(
        self,
        lateral: nn.Module,
        reduce: nn.Module,
        output: nn.Module,
        project: nn.Module,
        stride: int,
        factor: int,
        whole: bool = False,
        marks: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lateral = lateral
        self.reduce = reduce
        self.output = output
        self.project = project
        self.stride, self.factor, self.whole = stride, factor, whole
        self.marks = None if marks is None else nn.Parameter(marks)

    def forward(self, trunk: Features, memory: Memory) -> Memory:
        """Features of the backbone and the memory -> the memory with its pixel map (B,E,h,w)."""
        fine, padding = trunk.maps[0], trunk.paddings[0]
        real = None if padding is None else (~padding)[:, None].to(fine.dtype)
        tokens = memory.tokens[:, memory.span(0)]
        coarse = self.reduce(tokens.transpose(1, 2).reshape(len(tokens), -1, *memory.shapes[0]))
        if real is None or memory.padding is None:
            enlarged = self._enlarged(coarse)
        else:  # the last cells would be mixed with padding
            there = (~memory.padding[:, memory.span(0)]).to(coarse.dtype).view(-1, 1, *memory.shapes[0])
            enlarged = self._enlarged(coarse * there) / self._enlarged(there).clamp(min=torch.finfo(coarse.dtype).tiny)
        height, width = fine.shape[-2:]
        fused = self.lateral(fine) + enlarged[..., :height, :width]
        assert trunk.extents is not None, "a backbone says how many cells its images are wide and high"
        pixels = PixelMap(self.project(self.output(fused, real)), trunk.extents[:, 0], self.stride, self.whole)
        tokens = memory.tokens
        if self.marks is not None:
            levels = zip(self.marks, memory.shapes, strict=True)
            tokens = tokens + torch.cat([mark.expand(rows * columns, -1) for mark, (rows, columns) in levels])
        return replace(memory, tokens=tokens, pixels=pixels)

    def _enlarged(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps, scale_factor=float(self.factor), mode="bilinear", align_corners=False)


def grouped_pixels(
    channels: int, width: int, out: int, stride: int, factor: int, whole: bool = False, marks: Tensor | None = None
) -> PixelDecoder:
    """Mask2Former's, with group norms (mask2former:modeling/pixel_decoder/msdeformattn.py)."""
    lateral, output = ConvGroupNorm(channels, width), ConvGroupNorm(width, width, 3, "relu")
    return PixelDecoder(lateral, nn.Identity(), output, nn.Conv2d(width, out, 1), stride, factor, whole, marks)


def light_pixels(channels: int, width: int, out: int, stride: int, factor: int) -> PixelDecoder:
    """For the real-time family: batch norms, and E channels throughout, because the map is fine."""
    lateral, output = ConvNorm(channels, out), ConvNorm(out, out, 3, activation="silu")
    return PixelDecoder(lateral, nn.Conv2d(width, out, 1), output, nn.Conv2d(out, out, 1), stride, factor)


class FeaturePyramid(nn.Module):
    """An encoder without attention: each level, with the coarser one enlarged, through a convolution (arXiv 1612.03144).

    Args:
        width: D.
        num_levels: L.
    """

    def __init__(self, width: int, num_levels: int) -> None:
        super().__init__()
        self.flatten = Flatten()
        self.positions = Positions(width)
        self.outputs = nn.ModuleList(ConvGroupNorm(width, width, 3, activation="relu") for _ in range(num_levels))

    def forward(self, features: Features) -> Memory:
        """Maps of width D -> memory."""
        maps: list[Tensor] = []
        levels = list(zip(self.outputs, features.maps, features.paddings, strict=True))
        for output, level, padding in reversed(levels):
            real = None if padding is None else (~padding)[:, None].to(level.dtype)
            if maps:
                level = level + F.interpolate(maps[0], scale_factor=2.0)[..., : level.shape[-2], : level.shape[-1]]
            maps.insert(0, output(level, real))
        found = Features(maps, features.paddings, features.padding, features.extents)
        padding = memory_padding(found)
        return Memory(self.flatten(found), self.positions(found), map_shapes(found), padding, valid_ratios(found))
