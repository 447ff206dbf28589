"""Sine positions of maps and of points (arXiv 2005.12872; detr:models/position_encoding.py)."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from queryvision.layers.mlp import MLP


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
        offset: taken off the count of pixels; 0.5 puts positions at the middle of their cell (Deformable DETR).
    """

    def __init__(self, width: int, temperature: float = 10000.0, offset: float = 0.0) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"sine positions need a width divisible by 4, got {width}")
        self.width = width
        self.temperature = temperature
        self.offset = offset

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
        y = (y - self.offset) / (y[:, -1:] + 1e-6) * 2 * math.pi
        x = (x - self.offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        return sine_embedding(torch.stack((y, x), -1), self.width // 2, self.temperature).flatten(1, 2).to(like.dtype)


def grid_sines(shape: tuple[int, int], like: Tensor, temperature: float = 10000.0) -> Tensor:
    """Sines of the cells' row and column numbers (RT-DETR:hybrid_encoder.py), neither normalised nor interleaved.

    Args:
        shape: H, W of the map.
        like: (B,H*W,D), of the width, device and dtype wanted.
        temperature: see `sine_embedding`.

    Returns:
        (1,H*W,D): sin y, cos y, sin x, cos x, a quarter of the channels each.
    """
    quarter = like.shape[-1] // 4
    wave = temperature ** (-torch.arange(quarter, device=like.device) / quarter)
    y, x = (torch.arange(n, device=like.device)[:, None] * wave for n in shape)
    rows = torch.cat((y.sin(), y.cos()), -1)[:, None].expand(-1, shape[1], -1)
    columns = torch.cat((x.sin(), x.cos()), -1)[None].expand(shape[0], -1, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1)[None].to(like.dtype)


class AnchorPositions(nn.Module):
    """Positions of queries from what they look around (arXiv 2201.12329): sines of the coordinates, then two linear layers.

    Args:
        width: D.
        coordinates: 4, or 2 for anchors without a size.
        num_slots: P; slots have points (x, y) and layers of their own.
    """

    def __init__(self, width: int, coordinates: int = 4, num_slots: int = 0) -> None:
        super().__init__()
        self.width = width
        self.anchors = MLP(width // 2 * coordinates, width, width, 2)
        self.points = MLP(width, width, width, 2) if num_slots else None
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, anchors: Tensor, points: Tensor | None, ratios: Tensor) -> Tensor:
        """Positions (B,Q,1+P,D).

        Args:
            anchors: (B,Q,2|4) 0..1 of the unpadded image.
            points: (B,Q,P,2).
            ratios: (B,2) unpadded share of width and height.
        """
        scale = ratios[:, None] * 2 * math.pi
        own = self.anchors(self._sines(anchors, scale, self.anchors))[:, :, None]
        if self.points is None or points is None:
            return own  # type: ignore[no-any-return]
        return torch.cat((own, self.points(self._sines(points, scale[:, :, None], self.points))), 2)

    def _sines(self, places: Tensor, scale: Tensor, mlp: MLP) -> Tensor:
        """(...,2|4) -> (...,D|2D): y before x, then width and height (DINO:models/dino/utils.py)."""
        scaled = places * scale.repeat(*[1] * (scale.ndim - 1), places.shape[-1] // 2)
        order = [1, 0, 2, 3][: places.shape[-1]]
        return sine_embedding(scaled[..., order], self.width // 2).to(cast(nn.Linear, mlp.layers[0]).weight.dtype)


class BoxPositions(nn.Module):
    """Positions of queries from the numbers of their anchors, by two linear layers (RT-DETR, arXiv 2304.08069).

    Args:
        width: D.
        limit: positions are kept within plus and minus this; None: they are not (D-FINE keeps 10).
        num_slots: P; slots have points (x, y) and layers of their own.
    """

    def __init__(self, width: int, limit: float | None = None, num_slots: int = 0) -> None:
        super().__init__()
        self.limit = limit
        self.anchors = MLP(4, 2 * width, width, 2)
        self.points = MLP(2, 2 * width, width, 2) if num_slots else None
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, anchors: Tensor, points: Tensor | None, ratios: Tensor) -> Tensor:
        """Positions (B,Q,1+P,D) of anchors (B,Q,4) and points (B,Q,P,2), all 0..1 of the unpadded image."""
        dtype = cast(nn.Linear, self.anchors.layers[0]).weight.dtype
        positions = self.anchors(anchors.to(dtype))[:, :, None]
        if self.points is not None and points is not None:
            positions = torch.cat((positions, self.points(points.to(dtype))), 2)
        return positions if self.limit is None else positions.clamp(-self.limit, self.limit)  # type: ignore[no-any-return]
