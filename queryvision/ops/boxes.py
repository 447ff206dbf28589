"""Box arithmetic. cxcywh = (cx, cy, w, h); xyxy = (x1, y1, x2, y2). Nothing here asserts on predictions: a NaN stays a NaN."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(...,4) centre and size -> (...,4) corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    return torch.cat((centre - half, centre + half), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(...,4) corners -> (...,4) centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) * 0.5, high - low), -1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of xyxy boxes (...,4) -> (...)."""
    size = boxes[..., 2:] - boxes[..., :2]
    return size[..., 0] * size[..., 1]


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection, union and hull of broadcastable xyxy boxes (...,4).

    Coordinate by coordinate, each contiguous: otherwise no operation over the pairs would be vectorised.
    """
    ax1, ay1, ax2, ay2 = a.movedim(-1, 0).contiguous()
    bx1, by1, bx2, by2 = b.movedim(-1, 0).contiguous()
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    hull_width = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).clamp(min=0)
    hull_height = (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).clamp(min=0)
    return inter, union, hull_width * hull_height


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of broadcastable xyxy boxes (...,4) -> (...); 0 where both are empty."""
    inter, union, _ = _overlap(a, b)
    return inter / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of broadcastable xyxy boxes (...,4) -> (...), -1..1."""
    tiny = torch.finfo(a.dtype).tiny
    inter, union, hull = _overlap(a, b)
    return inter / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def covered_share(boxes: Tensor, regions: Tensor) -> Tensor:
    """Largest share of each box that lies inside one region (intersection over the box's own area).

    Args:
        boxes: (...,B,Q,4) xyxy.
        regions: (B,R,4) xyxy.

    Returns:
        (...,B,Q), 0..1; 0 without regions.
    """
    if regions.shape[1] == 0:
        return boxes.new_zeros(boxes.shape[:-1])
    inter, _, _ = _overlap(boxes[..., None, :], regions[:, None])
    return (inter / box_area(boxes).clamp(min=torch.finfo(boxes.dtype).tiny)[..., None]).amax(-1)


def pairwise_l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance of all pairs (B,N,F), (B,T,F) -> (B,N,T).

    `cdist` is several times faster on a CPU, the broadcast on CUDA (roboflow/rf-detr PR 1486).
    """
    if a.device.type == "cpu":
        return torch.cdist(a, b, p=1)
    return (a[:, :, None] - b[:, None]).abs().sum(-1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x clamped to 0..1, with `eps` as the least share (Deformable DETR, util/misc.py)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def mask_boxes(masks: Tensor, extents: Tensor) -> Tensor:
    """Boxes (x1, y1, x2, y2) around the cells that masks cover.

    Args:
        masks: (...,h,w) bool.
        extents: (...,2) width and height of the unpadded image in cells, one for each of the leading axes that it has.

    Returns:
        (...,4) float32, 0..1 of the unpadded image; all 0 where a mask is empty.
    """
    boxes = tight_boxes(masks)
    scale = torch.cat((extents, extents), -1)
    return (boxes / scale.view(*extents.shape[:-1], *[1] * (boxes.ndim - scale.ndim), 4)).clamp(0, 1)


def tight_boxes(masks: Tensor) -> Tensor:
    """Masks (...,h,w) bool -> boxes (x1, y1, x2, y2), (...,4) float32: the first pixel and one past the last, 0 if empty."""
    bits = masks.to(torch.uint8)  # `any` of booleans takes ten times as long on a CPU
    x1, x2 = _ends(bits.amax(-2).bool())
    y1, y2 = _ends(bits.amax(-1).bool())
    return torch.stack((x1, y1, x2, y2), -1)


def _ends(line: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of (...,n) bool, in float32; 0 and 0 where there is none."""
    length = line.shape[-1]
    index = torch.arange(length, device=line.device)
    first = torch.where(line, index, length).amin(-1)
    last = torch.where(line, index + 1, 0).amax(-1)
    return torch.where(last > 0, first, 0).float(), last.float()
