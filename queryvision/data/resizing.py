"""Geometric steps that albumentations lacks: DETR's aspect-keeping resize, its random crop, a flip of many masks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from queryvision.data.albumentations import A

Part = tuple[int, int, int, int]  # y1, x1, y2, x2 in px
MEAN_COLOUR = (124, 116, 104)
"""RGB of what is filled in: ImageNet's mean, which is 0 once normalised."""


def resized_size(size: tuple[int, int], short: int, longest: int | None = None) -> tuple[int, int]:
    """Size that keeps the aspect ratio, with the published rounding (`facebookresearch/detr:datasets/transforms.py`).

    Args:
        size: height, width in px.
        short: wanted short side in px.
        longest: the long side should not exceed this; the published rounding may by one pixel or so.

    Returns:
        New height, width.
    """
    height, width = size
    low, high = min(size), max(size)
    if longest is not None and high / low * short > longest:
        short = max(1, round(longest * low / high))
    if low == short:
        return size
    if width < height:
        return int(short * height / width), short
    return short, int(short * width / height)


def fitted_size(size: tuple[int, int], most: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height, width that is `scale` times `size`, at least 1 and at most `most`, all height, width in px."""
    return max(1, min(most[0], round(size[0] * scale))), max(1, min(most[1], round(size[1] * scale)))


def resize_image(image: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """(H,W,3) uint8 -> (*size,3), by Pillow's antialiased bilinear filter."""
    if image.shape[:2] == size:
        return image
    return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_for_training(image: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """The same to one level of brightness; where it enlarges by OpenCV, several times faster."""
    if size[0] < image.shape[0] or size[1] < image.shape[1]:
        return resize_image(image, size)
    return np.asarray(cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR))


def resize_quickly(image: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """(H,W,3) uint8 -> (*size,3), by OpenCV, several times faster; antialiased where it shrinks much."""
    shrinks = min(size[0] / image.shape[0], size[1] / image.shape[1]) < 2 / 3
    return np.asarray(cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))


def resize_masks(masks: Sequence[NDArray[Any]] | NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Masks, n of (H,W) uint8 -> (n,*size) uint8, nearest pixel centre."""
    resized = np.empty((len(masks), *size), np.uint8)
    for new, mask in zip(resized, masks, strict=True):
        new[:] = cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return resized


class ShortSide(A.DualTransform):  # type: ignore[misc]
    """Resizes the short side to one of `sizes`, aspect ratio kept, with an antialiased bilinear filter.

    Args:
        sizes: short sides in px, one is drawn.
        longest: bound of the long side in px.
        framed: whether the result must not exceed what the image would become that the chain began with, however it was
            cropped since. Then images of similar shape share a batch with little padding, as without the crop.
        together: whether all images of a batch get the same size, where they come from a training loader.
        exact: whether every pixel is Pillow's, as published, at any price.
    """

    _targets = A.HorizontalFlip._targets

    def __init__(
        self,
        sizes: Sequence[int],
        longest: int | None = None,
        framed: bool = False,
        together: bool = False,
        exact: bool = False,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.resize = resize_image if exact else resize_for_training
        self.sizes, self.longest, self.framed, self.together = tuple(sizes), longest, framed, together

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws the size."""
        shared = data["shared"] if self.together else None
        chooser = self.py_random if shared is None else random.Random(shared)
        short, size = chooser.choice(self.sizes), (int(params["shape"][0]), int(params["shape"][1]))
        if not self.framed:
            return {"size": resized_size(size, short, self.longest)}
        frame = resized_size(data["frame"], short, self.longest)
        return {"size": fitted_size(size, frame, min(frame[0] / size[0], frame[1] / size[1]))}

    def apply(self, img: NDArray[Any], size: tuple[int, int] = (0, 0), **params: Any) -> NDArray[Any]:
        """(H,W,3) uint8 -> (*size,3)."""
        return self.resize(img, size)

    def apply_to_masks(self, masks: NDArray[Any], size: tuple[int, int] = (0, 0), **params: Any) -> NDArray[Any]:
        """(n,H,W) -> (n,*size), nearest pixel centre."""
        return resize_masks(masks, size)

    def apply_to_bboxes(self, bboxes: NDArray[Any], **params: Any) -> NDArray[Any]:
        """Boxes are relative to the image here."""
        return bboxes

    def apply_to_keypoints(self, keypoints: NDArray[Any], size: tuple[int, int] = (0, 0), **params: Any) -> NDArray[Any]:
        """(n,5) x, y, z, angle, scale in px."""
        height, width = params["shape"][:2]
        moved = keypoints.astype(np.float32, copy=True)
        moved[:, 0] *= size[1] / width
        moved[:, 1] *= size[0] / height
        return moved


class Crop(A.DualTransform):  # type: ignore[misc]
    """Base of the crops, which draw `part`: y1, x1, y2, x2 in px."""

    _targets = A.HorizontalFlip._targets

    def apply(self, img: NDArray[Any], part: Part = (0, 0, 0, 0), **params: Any) -> NDArray[Any]:
        """(H,W,...) -> the part."""
        return img[part[0] : part[2], part[1] : part[3]]

    def apply_to_masks(self, masks: NDArray[Any], part: Part = (0, 0, 0, 0), **params: Any) -> NDArray[Any]:
        """(n,H,W) -> the part of each."""
        return masks[:, part[0] : part[2], part[1] : part[3]]

    def apply_to_bboxes(self, bboxes: NDArray[Any], part: Part = (0, 0, 0, 0), **params: Any) -> NDArray[Any]:
        """(n,4+) relative to the image -> relative to the part, not yet clipped."""
        height, width = params["shape"][:2]
        y1, x1, y2, x2 = part
        moved = bboxes.astype(np.float64, copy=True)
        moved[:, [0, 2]] = (moved[:, [0, 2]] * width - x1) / (x2 - x1)
        moved[:, [1, 3]] = (moved[:, [1, 3]] * height - y1) / (y2 - y1)
        return moved

    def apply_to_keypoints(self, keypoints: NDArray[Any], part: Part = (0, 0, 0, 0), **params: Any) -> NDArray[Any]:
        """(n,5) x, y, z, angle, scale in px."""
        moved = keypoints.astype(np.float32, copy=True)
        moved[:, :2] -= (part[1], part[0])
        return moved


class RandomCrop(Crop):
    """Crops a part whose sides are drawn independently.

    Args:
        low: smallest side; px, or share of the side where `relative`.
        high: largest side; never larger than the image.
        relative: whether `low` and `high` are shares.
    """

    def __init__(self, low: float, high: float, relative: bool = False, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.low, self.high, self.relative = low, high, relative

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws the part: y1, x1, y2, x2 in px."""
        sides = [self._side(int(length)) for length in params["shape"][:2]]
        starts = [self.py_random.randint(0, int(n) - s) for n, s in zip(params["shape"][:2], sides, strict=True)]
        return {"part": (starts[0], starts[1], starts[0] + sides[0], starts[1] + sides[1])}

    def _side(self, length: int) -> int:
        unit = length if self.relative else 1
        high = max(1, min(length, round(self.high * unit)))
        side: int = self.py_random.randint(max(1, min(high, round(self.low * unit))), high)
        return side


class ScaleJitter(Crop):
    """Large-scale jitter (arXiv 2012.07177): a random size, aspect kept, of which a square is cropped; nothing is filled in.

    As in Mask2Former the long side becomes `low` to `high` times `side`, and what is longer than `side` is cropped at a random
    place. It is cropped before it is resized, which spares the memory of what is not kept.

    Args:
        side: largest side of the result in px.
        low: least long side, in `side`.
        high: largest long side, in `side`.
    """

    def __init__(self, side: int, low: float = 0.1, high: float = 2.0, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.side, self.low, self.high = side, low, high

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws the part, y1, x1, y2, x2 in px, and its size in the result."""
        lengths = [int(length) for length in params["shape"][:2]]
        factor = self.py_random.uniform(self.low, self.high) * self.side / max(lengths)
        taken = [max(1, min(length, round(self.side / factor))) for length in lengths]
        y, x = (self.py_random.randint(0, length - side) for length, side in zip(lengths, taken, strict=True))
        size = fitted_size((taken[0], taken[1]), (self.side, self.side), factor)
        return {"part": (y, x, y + taken[0], x + taken[1]), "size": size}

    def apply(
        self, img: NDArray[Any], part: Part = (0, 0, 0, 0), size: tuple[int, int] = (0, 0), **params: Any
    ) -> NDArray[Any]:
        """(H,W,3) uint8 -> (*size,3)."""
        return resize_for_training(super().apply(img, part), size)

    def apply_to_masks(
        self, masks: NDArray[Any], part: Part = (0, 0, 0, 0), size: tuple[int, int] = (0, 0), **params: Any
    ) -> NDArray[Any]:
        """(n,H,W) -> (n,*size), nearest pixel centre."""
        return resize_masks(super().apply_to_masks(masks, part), size)

    def apply_to_keypoints(
        self, keypoints: NDArray[Any], part: Part = (0, 0, 0, 0), size: tuple[int, int] = (0, 0), **params: Any
    ) -> NDArray[Any]:
        """(n,5) x, y, z, angle, scale in px."""
        moved = super().apply_to_keypoints(keypoints, part)
        moved[:, 0] *= size[1] / (part[3] - part[1])
        moved[:, 1] *= size[0] / (part[2] - part[0])
        return moved


class Flip(A.HorizontalFlip):  # type: ignore[misc]
    """Mirrors left and right; unlike its base any number of masks at once, and points as it does boxes: x comes to W - x."""

    def apply_to_keypoints(self, keypoints: NDArray[Any], **params: Any) -> NDArray[Any]:
        """(n,5) x, y, z, angle, scale in px -> mirrored."""
        moved = keypoints.copy()
        moved[:, 0] = params["shape"][1] - moved[:, 0]
        return moved

    def apply_to_masks(self, masks: NDArray[Any], **params: Any) -> NDArray[Any]:
        """(n,H,W) -> mirrored."""
        return masks[:, :, ::-1]
