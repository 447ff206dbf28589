"""Dropout that does not spend a tenth of a CPU's training step on random numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`; on a CPU one draw of 64 bits decides about four elements, with p rounded to 1/65536.

    Args:
        x: any shape.
        p: share of elements set to zero, 0..1.
        training: otherwise `x` is returned as it is.

    Returns:
        The shape of `x`, what is kept divided by 1 - p.
    """
    if not training or p == 0 or p == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    count = x.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[:count].view(x.shape) >= round(p * 65536) - 32768
    return x * kept.to(x.dtype).mul_(1 / (1 - p))
