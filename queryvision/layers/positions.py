"""Sine positions of maps and of points (arXiv 2005.12872; detr:models/position_encoding.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sine_embedding(coordinates: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Interleaved sines and cosines of coordinates.

    Args:
        coordinates: (...,A) A coordinates, in radians at the lowest frequency.
        width: channels of each coordinate, even.
        temperature: ratio of the highest to the lowest wavelength, nearly.

    Returns:
        (...,A*width), coordinate by coordinate.
    """
    index = torch.arange(width, device=coordinates.device)
    wavelength = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / width)
    angle = coordinates[..., None].float() / wavelength
    waves = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1)
    return waves.flatten(-3)


class SinePositions(nn.Module):
    """2-D sine positions, counted over unpadded pixels and normalised to 2 pi.

    Args:
        width: channels D, half for y (first) and half for x.
        temperature: see `sine_embedding`.
    """

    def __init__(self, width: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"sine positions need a width divisible by 4, got {width}")
        self.width = width
        self.temperature = temperature

    def forward(self, padding: Tensor | None, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """Positions of one level.

        Args:
            padding: (B,H,W) True = padding, or None where nothing is padded.
            shape: B, H, W of the level.
            like: a tensor of the device and dtype wanted.

        Returns:
            (B,H*W,D), or (1,H*W,D) where nothing is padded.
        """
        batch, height, width = shape
        if padding is None:
            y = torch.arange(1, height + 1, device=like.device, dtype=torch.float32)[None, :, None].expand(1, -1, width)
            x = torch.arange(1, width + 1, device=like.device, dtype=torch.float32)[None, None].expand(1, height, -1)
        else:
            real = ~padding
            y, x = real.cumsum(1, dtype=torch.float32), real.cumsum(2, dtype=torch.float32)
        y = y / (y[:, -1:] + 1e-6) * 2 * math.pi
        x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        return sine_embedding(torch.stack((y, x), -1), self.width // 2, self.temperature).flatten(1, 2).to(like.dtype)
