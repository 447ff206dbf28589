"""Random numbers that belong to an image, whatever batch it stands in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(like: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Uniform 0..1 of the shape and device of `like` (B,...), in float32; row b is drawn from generator b.

    Args:
        like: its first axis are the images.
        generators: one an image, on the same device; None: the global generator.
    """
    if generators is None:
        return torch.rand(like.shape, device=like.device)
    return torch.stack([torch.rand(like.shape[1:], generator=g, device=like.device) for g in generators])
