"""The deformable encoder: every token samples a few places around itself on all levels (arXiv 2010.04159).

Legend: B images, L levels, N memory tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from queryvision.layers.attention import FeedForward
from queryvision.layers.deformable import DeformableAttention
from queryvision.model.encoder import Flatten, Positions, map_shapes, memory_padding, valid_ratios
from queryvision.ops.dropout import dropout
from queryvision.structures import Features, Memory


class DeformableEncoderLayer(nn.Module):
    """Deformable attention and feed-forward, each followed by add and norm.

    Args:
        attention: among the tokens of all levels.
        width: D.
        ffn_width: channels inside the feed-forward part.
        dropout: everywhere, in training.
        recompute: nothing of the feed-forward part is kept for the backward pass, which computes it once more: less memory,
            more time, the same numbers.
    """

    def __init__(
        self, attention: DeformableAttention, width: int, ffn_width: int, dropout: float, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.self_attn = attention
        self.ffn = FeedForward(width, ffn_width, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = dropout

    def forward(self, tokens: Tensor, memory: Memory, reference: Tensor) -> Tensor:
        """Tokens (B,N,D) -> (B,N,D); reference (B,N,L,2)."""
        found = self.self_attn(tokens + memory.positions, reference, tokens, memory.shapes, memory.padding)
        tokens = self.norm1(tokens + dropout(found, self.dropout, self.training))
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._feed, tokens, use_reentrant=False)
        return self._feed(tokens)

    def _feed(self, tokens: Tensor) -> Tensor:
        return self.norm2(tokens + dropout(self.ffn(tokens), self.dropout, self.training))  # type: ignore[no-any-return]


class DeformableEncoder(nn.Module):
    """Flattens the maps of all levels and lets their tokens sample each other.

    Args:
        layers: in order; none hands the features on as they are.
        positions: sines, to which a learned vector a level is added.
        width: D.
        num_levels: L.
    """

    def __init__(self, layers: Sequence[DeformableEncoderLayer], positions: Positions, width: int, num_levels: int) -> None:
        super().__init__()
        self.flatten = Flatten()
        self.positions = positions
        self.levels = nn.Parameter(torch.randn(num_levels, width)) if layers else None
        self.layers = nn.ModuleList(layers)

    def forward(self, features: Features) -> Memory:
        """Maps of width D -> memory."""
        tokens, positions, shapes = self.flatten(features), self.positions(features), map_shapes(features)
        if self.levels is not None:
            rows = [self.levels[level].expand(height * width, -1) for level, (height, width) in enumerate(shapes)]
            positions = positions + torch.cat(rows)
        memory = Memory(tokens, positions, shapes, memory_padding(features), valid_ratios(features))
        if len(self.layers):
            reference = cell_centres(memory)[:, :, None] * memory.valid_ratios[:, None]
            for layer in self.layers:
                tokens = layer(tokens, memory, reference)
        memory.tokens = tokens
        return memory


def cell_centres(memory: Memory) -> Tensor:
    """The middle of every token's cell (B,N,2) x y, 0..1 of the unpadded image; beyond 1 in padding."""
    centres = []
    for level, (height, width) in enumerate(memory.shapes):
        device = memory.tokens.device
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        middle = torch.stack((x, y), -1).flatten(0, 1).float() + 0.5
        ratio = memory.valid_ratios[:, level]
        extent = torch.stack((ratio[:, 0] * width, ratio[:, 1] * height), -1)
        centres.append(middle / extent[:, None])
    return torch.cat(centres, 1)
