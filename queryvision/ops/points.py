"""Losses and costs of masks on sampled points, not all pixels (PointRend, arXiv 1912.08193; Mask2Former, arXiv 2112.01527).

Points are (x, y), 0..1 from edge to edge of the map they are read from.

Legend: n masks, B images, Q queries, T targets, E channels of an embedding, P points, h, w cells of a map, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps (n,C,h,w) at points (n,P,2) -> (n,C,P), 0 outside."""
    return F.grid_sample(maps, (2 * points[:, :, None]).sub_(1), mode="bilinear", align_corners=False)[..., 0]


def sample_bits(masks: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of masks, reading only the four pixels around each point: no mask becomes floating point.

    Args:
        masks: (...,H,W) bool, contiguous.
        rows: (n,) int64, which of the masks, counted over all leading axes.
        points: (n,P,2), or (1,P,2) for the same in all masks.

    Returns:
        (n,P) float32 0..1, 0 outside.
    """
    height, width = masks.shape[-2:]
    left, right, x1, x2 = _neighbours(points[..., 0], width)
    up, down, y1, y2 = _neighbours(points[..., 1], height)
    first = rows[:, None] * (height * width)
    y1, y2 = first + y1 * width, first + y2 * width
    upper = masks.take(y1 + x1) * left + masks.take(y1 + x2) * right
    lower = masks.take(y2 + x1) * left + masks.take(y2 + x2) * right
    return upper * up + lower * down


def _neighbours(places: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and indices of the two pixels around places 0..1 of a line; those outside weigh nothing."""
    place = places.float() * length - 0.5
    low = place.floor()
    share = place - low
    index = low.long()
    before = (1 - share) * ((index >= 0) & (index < length))
    after = share * ((index >= -1) & (index < length - 1))
    return before, after, index.clamp(0, length - 1), (index + 1).clamp(0, length - 1)


def uncertain_points(
    logits: Tensor, num_points: int, oversample: float, share: float, draw: Callable[[int], Tensor], extent: Tensor
) -> Tensor:
    """Points where masks are least sure of themselves, and some anywhere (PointRend, arXiv 1912.08193, section 3.1).

    Args:
        logits: (n,h,w).
        num_points: P.
        oversample: so many times P points are looked at.
        share: of the P points that are the least sure of these; the others are new.
        draw: number of points -> (n,points,2) uniform 0..1, a new tensor.
        extent: (n,1,2) share of the map's width and height that shows the image; points are drawn there.

    Returns:
        (n,P,2), without a gradient.
    """
    with torch.no_grad():
        candidates = draw(int(num_points * oversample)).mul_(extent)
        doubt = -sample_maps(logits[:, None], candidates)[:, 0].abs()
        best = doubt.topk(int(share * num_points), 1)[1]
        chosen = candidates.gather(1, best[..., None].expand(-1, -1, 2))
        others = num_points - chosen.shape[1]
        return torch.cat((chosen, draw(others).mul_(extent)), 1) if others else chosen


def binary_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean binary cross entropy over the points: (n,P) and (n,P) -> (n,)."""
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(-1)


def dice(logits: Tensor, wanted: Tensor) -> Tensor:
    """Dice loss with one added to both parts of the fraction (MaskFormer, arXiv 2107.06278): (n,P) and (n,P) -> (n,)."""
    inside = logits.sigmoid()
    return 1 - (2 * (inside * wanted).sum(-1) + 1) / (inside.sum(-1) + wanted.sum(-1) + 1)


def pairwise_mask_cost(logits: Tensor, wanted: Tensor, entropy: float, overlap: float) -> Tensor:
    """`binary_entropy` and `dice` of every prediction with every target, weighted by `entropy` and `overlap`.

    Args:
        logits: (...,Q,P).
        wanted: (T,P) 0..1.
        entropy: weight of the first.
        overlap: weight of the second.

    Returns:
        (...,Q,T).
    """
    # cross entropy is softplus(x) - x t, so that one product with the targets does for positives and negatives
    cost = (F.softplus(logits).sum(-1, keepdim=True) - logits @ wanted.T) * (entropy / logits.shape[-1])
    inside = logits.sigmoid()
    common = 2 * (inside @ wanted.T) + 1
    return cost + overlap * (1 - common / (inside.sum(-1, keepdim=True) + wanted.sum(-1) + 1))
