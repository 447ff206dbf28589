"""Arithmetic of pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels less their mean, divided by their deviation.

    Whole rows are computed at once, several times faster on a CPU than three channels that lie side by side.

    Args:
        pixels: (B,C,H,W) uint8, best `channels_last`.
        mean: (C,1,1) floating, of the values of `pixels`.
        std: (C,1,1).

    Returns:
        (B,C,H,W) of the type of `mean`, `channels_last`.
    """
    rows = pixels.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(2)
    mean, std = (each.flatten().repeat(pixels.shape[-1]) for each in (mean, std))
    done = rows.to(mean.dtype).sub_(mean).div_(std)
    return done.view(*done.shape[:2], -1, pixels.shape[1]).permute(0, 3, 1, 2)
