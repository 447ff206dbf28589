"""The hybrid encoder: attention within the coarsest level, fusion across levels by convolution (RT-DETR, arXiv 2304.08069).

Legend: B images, L levels, N memory tokens, D width. `real` is 1 on the image and 0 in padding, or None; see `layers.conv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from queryvision.layers.positions import grid_sines
from queryvision.model.encoder import EncoderLayer, Flatten, exact_ratios, map_shapes, memory_padding
from queryvision.structures import Features, Memory


class HybridEncoder(nn.Module):
    """Self-attention among the cells of the coarsest level; then from coarse to fine and back again.

    Each level must be half the next finer one, rounded up. Padding counts as zero in every convolution.
    Places of the image are found on the maps to the pixel (`exact_ratios`), which at multiples of the strides is as published.

    Args:
        layers: self-attention layers of the coarsest level; none: convolutions only.
        laterals: L-1, coarse to fine: a level before it is enlarged.
        top_down: L-1, coarse to fine: the coarser level at half the size and a level, (B,D,H,W) each -> (B,D,H,W); they enlarge
            the first themselves (`layers.conv.pointwise`).
        downsamples: L-1, fine to coarse: a level to half its size.
        bottom_up: L-1, fine to coarse: the finer level, made smaller, and a level (B,D,H,W) each -> (B,D,H,W).
        projections: L, finest first, to the decoder's width.
    """

    def __init__(
        self,
        layers: Sequence[EncoderLayer],
        laterals: Sequence[nn.Module],
        top_down: Sequence[nn.Module],
        downsamples: Sequence[nn.Module],
        bottom_up: Sequence[nn.Module],
        projections: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.flatten = Flatten()
        self.layers = nn.ModuleList(layers)
        self.lateral_convs = nn.ModuleList(laterals)
        self.fpn_blocks = nn.ModuleList(top_down)
        self.downsample_convs = nn.ModuleList(downsamples)
        self.pan_blocks = nn.ModuleList(bottom_up)
        self.projections = nn.ModuleList(projections)

    def forward(self, features: Features) -> Memory:
        """Maps of width D -> memory."""
        maps, paddings = list(features.maps), features.paddings
        real = [None if p is None else (~p)[:, None].to(m.dtype) for m, p in zip(maps, paddings, strict=True)]
        maps[-1] = self._attend(maps[-1], paddings[-1])
        for step, (lateral, fuse) in enumerate(zip(self.lateral_convs, self.fpn_blocks, strict=True)):
            fine = len(maps) - 2 - step
            maps[fine + 1] = lateral(maps[fine + 1], real[fine + 1])
            maps[fine] = fuse((maps[fine + 1], maps[fine]), real[fine])
        for level, (reduce, fuse) in enumerate(zip(self.downsample_convs, self.pan_blocks, strict=True), 1):
            smaller = reduce(maps[level - 1], real[level - 1])
            maps[level] = fuse((smaller, maps[level]), real[level])
        maps = [project(m) for project, m in zip(self.projections, maps, strict=True)]
        fused = replace(features, maps=maps)
        tokens = self.flatten(fused)
        return Memory(tokens, torch.zeros_like(tokens[:1]), map_shapes(fused), memory_padding(fused), exact_ratios(fused))

    def _attend(self, coarsest: Tensor, padding: Tensor | None) -> Tensor:
        """(B,D,H,W) -> the same, its cells having looked at each other."""
        if not len(self.layers):
            return coarsest
        tokens = coarsest.flatten(2).transpose(1, 2)
        positions = grid_sines((coarsest.shape[2], coarsest.shape[3]), tokens)
        hidden = None if padding is None else padding.flatten(1)[:, None]
        for layer in self.layers:
            tokens = layer(tokens, positions, hidden)
        return tokens.transpose(1, 2).reshape(coarsest.shape).contiguous(memory_format=torch.channels_last)
