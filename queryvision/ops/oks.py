"""Object keypoint similarity: how well keypoints lie, for objects of any size (cocodataset.org, keypoint evaluation).

Letters: K keypoints. Coordinates are pixels: of a share of width and height the result would depend on the image's aspect.
"""

from __future__ import annotations

from torch import Tensor


def keypoint_similarity(found: Tensor, wanted: Tensor, seen: Tensor, sigmas: Tensor, areas: Tensor) -> Tensor:
    """Mean over labelled keypoints of exp(-d^2 / (2 A (2 sigma)^2)).

    Args:
        found: (...,K,2) x, y in pixels.
        wanted: (...,K,2) the same.
        seen: (...,K) bool, which are labelled.
        sigmas: (...,K) falloffs.
        areas: (...,) areas A of the objects in square pixels.

    Returns:
        (...,) 0..1; 0 where none is labelled.
    """
    distance = (found - wanted).square().sum(-1)
    likeness = (-distance / (8 * areas.clamp(min=1)[..., None] * sigmas.square())).exp()
    return (likeness * seen).sum(-1) / seen.sum(-1).clamp(min=1)
