"""Steps of the strong augmentation that albumentations lacks: zoom-out and SSD's crop by overlap.

Both are from SSD (arXiv 1512.02325, section 2.2 and 3.6), with the numbers that RT-DETR (arXiv 2304.08069) uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.data.albumentations import A
from queryvision.data.resizing import MEAN_COLOUR, Crop, resize_masks, resize_quickly

Place = tuple[int, int, int, int]  # y1, x1, y2, x2 in px


class ZoomOut(A.DualTransform):  # type: ignore[misc]
    """Puts the image somewhere into a larger one of the mean colour.

    Args:
        bound: short side of the result in px; where it would be longer, everything is shrunk, which saves time.
        ratio: largest side of the result, in sides of the image.
    """

    _targets = A.HorizontalFlip._targets

    def __init__(self, bound: int, ratio: float = 4.0, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.bound, self.ratio = bound, ratio

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws the result's height and width, and the place of the image in it."""
        height, width = (int(side) for side in params["shape"][:2])
        ratio = self.py_random.uniform(1.0, self.ratio)
        shrink = min(1.0, self.bound / (ratio * min(height, width)))
        h, w = max(1, round(height * shrink)), max(1, round(width * shrink))
        size = (max(h, round(height * shrink * ratio)), max(w, round(width * shrink * ratio)))
        y, x = self.py_random.randint(0, size[0] - h), self.py_random.randint(0, size[1] - w)
        return {"size": size, "place": (y, x, y + h, x + w)}

    def apply(
        self, img: NDArray[Any], size: tuple[int, int] = (0, 0), place: Place = (0, 0, 0, 0), **params: Any
    ) -> NDArray[Any]:
        """(H,W,3) uint8 -> (*size,3)."""
        y1, x1, y2, x2 = place
        whole = np.empty((*size, 3), np.uint8)
        whole[:] = MEAN_COLOUR
        whole[y1:y2, x1:x2] = resize_quickly(img, (y2 - y1, x2 - x1))
        return whole

    def apply_to_masks(
        self, masks: NDArray[Any], size: tuple[int, int] = (0, 0), place: Place = (0, 0, 0, 0), **params: Any
    ) -> NDArray[Any]:
        """(n,H,W) -> (n,*size)."""
        y1, x1, y2, x2 = place
        whole = np.zeros((len(masks), *size), masks.dtype)
        whole[:, y1:y2, x1:x2] = resize_masks(masks, (y2 - y1, x2 - x1))
        return whole

    def apply_to_bboxes(
        self, bboxes: NDArray[Any], size: tuple[int, int] = (0, 0), place: Place = (0, 0, 0, 0), **params: Any
    ) -> NDArray[Any]:
        """(n,4+) relative to the image -> relative to the result."""
        y1, x1, y2, x2 = place
        moved = bboxes.astype(np.float64, copy=True)
        moved[:, [0, 2]] = (moved[:, [0, 2]] * (x2 - x1) + x1) / size[1]
        moved[:, [1, 3]] = (moved[:, [1, 3]] * (y2 - y1) + y1) / size[0]
        return moved

    def apply_to_keypoints(self, keypoints: NDArray[Any], place: Place = (0, 0, 0, 0), **params: Any) -> NDArray[Any]:
        """(n,5) x, y, z, angle, scale in px."""
        height, width = params["shape"][:2]
        y1, x1, y2, x2 = place
        moved = keypoints.astype(np.float32, copy=True)
        moved[:, 0] = moved[:, 0] * ((x2 - x1) / width) + x1
        moved[:, 1] = moved[:, 1] * ((y2 - y1) / height) + y1
        return moved


class IoUCrop(Crop):
    """Crops a part that has at least some IoU with a box whose centre is in it.

    The IoU is drawn from `options`, and again where no part is found; 1 leaves the image as it is. An image without boxes is
    cropped anyhow. Unlike the published crop, objects with their centre outside stay, clipped, for they can still be seen.

    Args:
        options: of the least IoU.
        low: smallest side of the part, as share of the image's.
        aspect: bounds of the part's width / height.
    """

    ROUNDS, TRIES = 10, 40

    def __init__(
        self,
        options: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
        low: float = 0.3,
        aspect: tuple[float, float] = (0.5, 2.0),
        p: float = 0.8,
    ) -> None:
        super().__init__(p=p)
        self.options, self.low, self.aspect = tuple(options), low, tuple(aspect)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws the part; all of the image where none is found."""
        height, width = (int(side) for side in params["shape"][:2])
        boxes = np.asarray(data["bboxes"], np.float64)[:, :4] * [width, height, width, height]
        for _ in range(self.ROUNDS):
            least = self.py_random.choice(self.options)
            if least >= 1:
                break
            parts = self._parts(height, width)
            good = parts if not len(boxes) else parts[(_ious(parts, boxes) >= least).any(1)]
            if len(good):
                x1, y1, x2, y2 = good[0].tolist()
                return {"part": (y1, x1, y2, x2)}
        return {"part": (0, 0, height, width)}

    def _parts(self, height: int, width: int) -> NDArray[Any]:
        """(up to TRIES,4) int64 x1 y1 x2 y2 px, of sides and aspects as wanted."""
        share = self.random_generator.uniform(self.low, 1.0, (self.TRIES, 2))
        sides = np.maximum(1, np.round(share * (width, height)))
        low = np.floor(self.random_generator.uniform(0, 1, (self.TRIES, 2)) * ((width, height) - sides + 1))
        aspect = sides[:, 0] / sides[:, 1]
        wanted = (aspect >= self.aspect[0]) & (aspect <= self.aspect[1])
        return np.asarray(np.concatenate([low, low + sides], axis=1)[wanted], np.int64)


def _ious(parts: NDArray[Any], boxes: NDArray[Any]) -> NDArray[Any]:
    """IoU of parts (i,4) and boxes (n,4), (i,n); -1 where the box's centre is outside."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centres > parts[:, None, :2]) & (centres < parts[:, None, 2:])).all(2)
    sides = np.minimum(parts[:, None, 2:], boxes[:, 2:]) - np.maximum(parts[:, None, :2], boxes[:, :2])
    common = sides.clip(0).prod(2)
    areas = (parts[:, 2:] - parts[:, :2]).prod(1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return np.asarray(np.where(inside, common / np.maximum(areas - common, 1e-9), -1.0))
