"""The dense encoder: every cell of the maps looks at every other (arXiv 2005.12872).

Legend: B images, L levels, N memory tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from queryvision.layers.attention import Attention, FeedForward
from queryvision.layers.conv import Activation
from queryvision.layers.positions import SinePositions
from queryvision.ops.dropout import dropout
from queryvision.structures import Features, Memory


class Flatten(nn.Module):
    """Maps of all levels -> one row of tokens; no patches are cut, every cell of a map is a token."""

    def forward(self, features: Features) -> Tensor:
        """L x (B,D,H_l,W_l) -> (B,N,D)."""
        return torch.cat([m.flatten(2).transpose(1, 2) for m in features.maps], 1)


class Positions(nn.Module):
    """Sine positions of all levels.

    Args:
        width: D.
        temperature: see `SinePositions`.
        offset: see `SinePositions`.
    """

    def __init__(self, width: int, temperature: float = 10000.0, offset: float = 0.0) -> None:
        super().__init__()
        self.sine = SinePositions(width, temperature, offset)

    def forward(self, features: Features) -> Tensor:
        """L x (B,D,H_l,W_l) -> (B,N,D), or (1,N,D) where nothing is padded."""
        levels = zip(features.maps, features.paddings, strict=True)
        return torch.cat([self.sine(p, (m.shape[0], *m.shape[-2:]), m) for m, p in levels], 1)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by add and norm (post-norm).

    Args:
        width: D.
        num_heads: attention heads.
        ffn_width: channels inside the feed-forward part.
        dropout: everywhere, in training.
        activation: inside the feed-forward part.
    """

    def __init__(self, width: int, num_heads: int, ffn_width: int, dropout: float, activation: Activation = "relu") -> None:
        super().__init__()
        self.self_attn = Attention(width, num_heads, dropout)
        self.ffn = FeedForward(width, ffn_width, dropout, activation)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = dropout

    def forward(self, tokens: Tensor, positions: Tensor, hidden: Tensor | None) -> Tensor:
        """Tokens (B,N,D) with positions (B,N,D); hidden (B,1,N) True = padding."""
        placed = tokens + positions
        tokens = self.norm1(tokens + dropout(self.self_attn(placed, placed, tokens, hidden), self.dropout, self.training))
        return self.norm2(tokens + dropout(self.ffn(tokens), self.dropout, self.training))  # type: ignore[no-any-return]


class DenseEncoder(nn.Module):
    """Flattens the maps and lets all tokens look at each other.

    Args:
        width: D.
        num_layers: encoder layers; 0 hands the features on as they are.
        num_heads: attention heads.
        ffn_width: channels inside the feed-forward part.
        dropout: everywhere, in training.
    """

    def __init__(self, width: int, num_layers: int, num_heads: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.flatten = Flatten()
        self.positions = Positions(width)
        self.layers = nn.ModuleList(EncoderLayer(width, num_heads, ffn_width, dropout) for _ in range(num_layers))

    def forward(self, features: Features) -> Memory:
        """Maps of width D -> memory."""
        tokens, positions = self.flatten(features), self.positions(features)
        padding = memory_padding(features)
        hidden = None if padding is None else padding[:, None]
        for layer in self.layers:
            tokens = layer(tokens, positions, hidden)
        return Memory(tokens, positions, map_shapes(features), padding, valid_ratios(features))


def map_shapes(features: Features) -> tuple[tuple[int, int], ...]:
    """L x (H_l,W_l)."""
    return tuple((m.shape[-2], m.shape[-1]) for m in features.maps)


def memory_padding(features: Features) -> Tensor | None:
    """(B,N) True = padding; None where nothing is padded."""
    padded = [p.flatten(1) for p in features.paddings if p is not None]
    return torch.cat(padded, 1) if padded else None


def exact_ratios(features: Features) -> Tensor:
    """Share of (width, height) of each level's map that the unpadded image covers, to the pixel, (B,L,2) float32.

    Places 0..1 of the image then lie on the cells that saw them, however far the last cell sticks out of the image: with 130
    pixels and a stride of 32, whole cells (`valid_ratios`) look up to 30 pixels beside.
    """
    assert features.extents is not None, "a backbone says how many cells its images are wide and high"
    levels = zip(features.extents.unbind(1), map_shapes(features), strict=True)
    return torch.stack([torch.stack((extent[:, 0] / w, extent[:, 1] / h), -1) for extent, (h, w) in levels], 1)


def valid_ratios(features: Features) -> Tensor:
    """Unpadded share of (width, height) on each level in whole cells, as published Deformable DETR has it, (B,L,2) float32."""
    ratios = []
    for tokens, padding in zip(features.maps, features.paddings, strict=True):
        if padding is None:
            ratios.append(torch.ones(tokens.shape[0], 2, device=tokens.device))
        else:
            real = (~padding).float()
            ratios.append(torch.stack((real[:, 0].mean(-1), real[:, :, 0].mean(-1)), -1))
    return torch.stack(ratios, 1)
