"""Numbers as distributions over non-uniform bins (D-FINE, arXiv 2410.13842).

Legend: R + 1 bins, with values W(0) < ... < W(R), dense around 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 5.0
"""Of the distillation, as published (D-FINE:src/zoo/dfine/dfine_criterion.py)."""


def bin_values(num_bins: int, bound: float, scale: float) -> Tensor:
    """W(n) of the bins, (R+1,) float32: geometric on both sides of 0, the outermost at twice the bound.

    Args:
        num_bins: R, even.
        bound: c, the largest offset as a share of the size, but for the outermost bins.
        scale: s, in units of which offsets are counted; larger means flatter near 0.
    """
    top = bound * scale
    ratio = (top + 1) ** (2 / (num_bins - 2))
    side = [ratio**i - 1 for i in range(1, num_bins // 2)]
    return torch.tensor([-2 * top, *(-v for v in reversed(side)), 0.0, *side, 2 * top])


def expected_value(logits: Tensor, values: Tensor) -> Tensor:
    """Means of distributions: logits (...,R+1) -> (...). No product of matrices, which autocast would round to bfloat16."""
    return (logits.softmax(-1) * values).sum(-1)


def edges_to_boxes(reference: Tensor, edges: Tensor, scale: float) -> Tensor:
    """Boxes from how far each edge lies from where the reference has it.

    Args:
        reference: (...,4) cx cy w h.
        edges: (...,4) left, top, right, bottom, outwards, in units of the reference's size / scale.
        scale: s.

    Returns:
        (...,4) cx cy w h; a size is negative where edges change sides.
    """
    centre, unit = reference[..., :2], reference[..., 2:] / scale
    low = centre - (0.5 * scale + edges[..., :2]) * unit
    high = centre + (0.5 * scale + edges[..., 2:]) * unit
    return torch.cat(((low + high) * 0.5, high - low), -1)


def boxes_to_edges(reference: Tensor, boxes: Tensor, scale: float) -> Tensor:
    """The inverse of `edges_to_boxes`: where the edges of boxes (...,4) xyxy lie, seen from the reference; (...,4)."""
    centre, unit = reference[..., :2], reference[..., 2:] / scale + 1e-16
    return torch.cat(((centre - boxes[..., :2]) / unit, (boxes[..., 2:] - centre) / unit), -1) - 0.5 * scale


def two_bin_cross_entropy(logits: Tensor, wanted: Tensor, values: Tensor) -> Tensor:
    """Cross entropy to the two bins around a number, each weighted by how near it is (fine-grained localisation loss).

    Args:
        logits: (...,R+1).
        wanted: (...) numbers; beyond the outermost bins they count as those.
        values: (R+1,) W(n).

    Returns:
        (...).
    """
    last = len(values) - 2
    left = (torch.searchsorted(values, wanted.detach().contiguous(), right=True) - 1).clamp(0, last)
    low, high = values[left], values[left + 1]
    right_share = ((wanted.detach() - low) / (high - low)).clamp(0, 1)
    log = logits.log_softmax(-1)
    at_left, at_right = (log.gather(-1, i[..., None])[..., 0] for i in (left, left + 1))
    return -(at_left * (1 - right_share) + at_right * right_share)


def distillation(logits: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """T^2 KL(teacher || student) of distributions softened by T: logits (...,R+1) -> (...); no gradient for the teacher."""
    student = (logits / temperature).log_softmax(-1)
    wanted = (teacher.detach() / temperature).log_softmax(-1)
    return F.kl_div(student, wanted, reduction="none", log_target=True).sum(-1) * temperature**2
