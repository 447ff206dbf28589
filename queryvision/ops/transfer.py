"""From the host to where a model runs."""

from __future__ import annotations

import torch
from torch import Tensor


def uploaded(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without the host waiting; keep it small, for page-locked memory is made each time."""
    if device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
