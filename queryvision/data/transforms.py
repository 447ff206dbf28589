"""Sample -> Sample: augmentation and resizing, carried out by albumentations, with everything annotated in step.

Every call takes its own seed and touches no global generator, so that a sample looks the same in any loader process.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.data.albumentations import A
from queryvision.data.follow import SMALLEST_SIDE, rebuilt
from queryvision.data.planes import packed, unpacked
from queryvision.data.resizing import Flip, RandomCrop, ScaleJitter, ShortSide, resized_size
from queryvision.data.sample import Annotations, Sample
from queryvision.data.zooming import IoUCrop, ZoomOut
from queryvision.errors import ConfigError, nearest

PRESETS = ("detr", "light", "strong", "lsj", "flip", "none")
PUBLISHED_SIZE, PUBLISHED_LONGEST = 800, 1333  # px, DETR
CANVAS = 1024  # px, of large-scale jitter, where images are looked at with a short side of 800
JITTER = (0.8, 0.85, 0.9, 0.95, 1.0)  # of the image size
MULTISCALE = tuple(side / 640 for side in range(480, 801, 32))  # the same of "strong"; 480 to 800 at 640, as RT-DETR has it
ZOOM_BOUND = 1.5  # of zoomed-out images, in image sizes; they are cropped afterwards


class Transform:
    """A chain of albumentations steps for samples.

    Boxes are clipped to the new image, and objects without area left are dropped. Where an object was cut and has a
    mask, its box and area are those of what is left of the mask.

    Args:
        steps: albumentations transforms; where there are masks, they may only move their pixels, as nearest interpolation does.
        flip_orders: (C,K) int64, for each class which keypoint stands in each one's place in a mirrored image, as
            `skeletons.flip_orders` has it. None: not known, so a sample with keypoints is not flipped (flips that are nested in
            `A.OneOf` and the like are an error then).
    """

    def __init__(self, steps: Sequence[A.BasicTransform | A.BaseCompose], flip_orders: NDArray[Any] | None = None) -> None:
        self.flip_orders = flip_orders
        self._chain = _compose(steps)
        self._unflipped = _compose([step for step in copy.deepcopy(list(steps)) if not isinstance(step, A.HorizontalFlip)])

    def __call__(self, sample: Sample, seed: int = 0, shared: int | None = None) -> Sample:
        """Transforms a sample; the same seeds give the same sample.

        Args:
            sample: to transform; it is not changed.
            seed: of what is drawn for it alone.
            shared: of what the images of a batch have in common, see `ShortSide`. None: nothing.

        Raises:
            ConfigError: keypoints were mirrored, but it is not known which swap.
        """
        old = sample.annotations
        height, width = sample.image.shape[:2]
        data: dict[str, Any] = {"image": sample.image, "bboxes": _numbered(old), "keypoints": _points(old, height, width)}
        data["frame"] = (height, width)  # for steps that ask how large the image was before the others
        data["shared"] = shared
        planes = _planes(old, (height, width))
        if len(planes):
            data["masks"] = planes
        chain = self._chain if old.keypoints is None or self.flip_orders is not None else self._unflipped
        # One stream for all steps: `set_random_seed` would give every step the same seed, and so flip and crop together.
        chain.set_random_state(np.random.default_rng(seed), random.Random(seed))
        new = chain(**data)
        image = np.ascontiguousarray(new["image"])
        size = (image.shape[0], image.shape[1])
        moved = np.asarray(new["bboxes"], np.float32).reshape(-1, 5)
        points = np.asarray(new["keypoints"], np.float32)
        scale = _scale(points[:3], height, width)

        def moved_masks(rows: NDArray[Any]) -> NDArray[Any]:
            return unpacked(np.asarray(new["masks"]), rows) if len(rows) else np.zeros((0, *size), np.uint8)

        found = rebuilt(old, moved[:, 4].astype(np.int64), moved[:, :4], points[3:], moved_masks, scale, size, self.flip_orders)
        return replace(sample, image=image, annotations=found)


class EvaluationTransform(Transform):
    """Resizes only, and knows the size beforehand, so that images of equal size can share a batch.

    Args:
        short: short side in px.
        longest: bound of the long side in px.
    """

    def __init__(self, short: int, longest: int | None) -> None:
        super().__init__([ShortSide([short], longest, exact=True)])
        self.short, self.longest = short, longest

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height, width of the network's input for an image of `size` (height, width)."""
        return resized_size(size, self.short, self.longest)


def training_transform(name: str, image_size: int, flip_orders: NDArray[Any] | None = None) -> Transform:
    """What training images go through.

    Args:
        name: "detr": flip, resize to one of eleven sizes, and half the time a crop in between, as published. "light": flip,
            mild colour, a crop that keeps most objects, and a mild scale that the images of a batch share. "strong": see
            `strong_transform`. "lsj": flip and large-scale jitter (arXiv 2012.07177) as Mask2Former has it. "flip": mirrored
            half the time, else as "none": resize only.
        image_size: largest short side in px; all of DETR's numbers scale with it (800 as published), and the side of "lsj"
            (1024 at 800).
        flip_orders: see `Transform`.

    Raises:
        ConfigError: the name is unknown or the size is not positive.
    """
    longest = longest_side(image_size)
    if name == "detr":
        sizes = [_scaled(side, image_size) for side in range(480, 801, 32)]
        crop = [
            ShortSide([_scaled(side, image_size) for side in (400, 500, 600)]),
            RandomCrop(_scaled(384, image_size), _scaled(600, image_size)),
            ShortSide(sizes, longest),
        ]
        return Transform([Flip(p=0.5), A.OneOf([ShortSide(sizes, longest), A.Sequential(crop, p=1.0)], p=1.0)], flip_orders)
    if name == "light":
        colour = A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.02, 0.02), p=0.5)
        crop_some = RandomCrop(0.8, 1.0, relative=True, p=0.5)
        return Transform([Flip(p=0.5), crop_some, _jitter(image_size), colour], flip_orders)
    if name == "strong":
        return strong_transform(image_size, flip_orders)
    if name == "lsj":
        return Transform([Flip(p=0.5), ScaleJitter(_scaled(CANVAS, image_size))], flip_orders)
    if name in ("flip", "none"):
        flip = [Flip(p=0.5)] if name == "flip" else []
        return Transform([*flip, ShortSide([image_size], longest)], flip_orders)
    raise ConfigError(f"no augmentation '{name}'; {nearest(name, PRESETS)}")


def strong_transform(image_size: int, flip_orders: NDArray[Any] | None = None, zoom: bool = True) -> Transform:
    """Zoom-out, IoU crop, flip, 0.75 to 1.25 times the image size and photometric distortion, as RT-DETR (arXiv 2304.08069).

    Colours come last, when the image is small. As published, the images of a batch share their scale; the published recipe
    resizes to a square, here the aspect is kept.

    Args:
        image_size: middle one of the short sides in px.
        flip_orders: see `Transform`.
        zoom: whether there are zoom-out and IoU crop.

    Raises:
        ConfigError: the size is not positive.
    """
    zooming = [ZoomOut(round(ZOOM_BOUND * image_size), p=0.5), IoUCrop(p=0.8)] if zoom else []
    scale = _jitter(image_size, MULTISCALE, framed=True)
    return Transform([*zooming, Flip(p=0.5), scale, A.Sequential(_photometric(), p=0.5)], flip_orders)


def evaluation_transform(image_size: int) -> EvaluationTransform:
    """What images go through in evaluation and prediction: short side `image_size` px, long side at most 1333/800 of it.

    Raises:
        ConfigError: the size is not positive.
    """
    return EvaluationTransform(image_size, longest_side(image_size))


def largest_area(name: str, image_size: int, size: tuple[int, int]) -> int:
    """Pixels that an image of `size` (height, width) has at most after `training_transform`; cropped ones may have more."""
    if name == "lsj":
        return _scaled(CANVAS, image_size) ** 2
    height, width = evaluation_transform(round(image_size * max(MULTISCALE)) if name == "strong" else image_size).output_size(
        size
    )
    return height * width


def longest_side(image_size: int) -> int:
    """Bound of the long side in px, where the short one is `image_size`.

    Raises:
        ConfigError: the size is not positive.
    """
    return _scaled(PUBLISHED_LONGEST, image_size)


def _jitter(image_size: int, shares: Sequence[float] = JITTER, framed: bool = False) -> ShortSide:
    """Scales that a batch shares, so that small images are also quicker."""
    sizes = [max(1, round(image_size * share)) for share in shares]
    return ShortSide(sizes, longest_side(max(sizes)), framed=framed, together=True)


def _photometric() -> list[A.BasicTransform]:
    """SSD's distortions, each half the time; the strengths are RT-DETR's."""
    ranges: dict[str, tuple[float, float]] = {
        "brightness": (0.875, 1.125),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": (-0.05, 0.05),
    }
    neutral = {"brightness": (1.0, 1.0), "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": (0.0, 0.0)}
    return [*(A.ColorJitter(**{**neutral, name: span}, p=0.5) for name, span in ranges.items()), A.ChannelShuffle(p=0.5)]


def _scaled(published: int, image_size: int) -> int:
    if image_size < 1:
        raise ConfigError(f"image_size is {image_size}; give the short side of the images in pixels, such as 800")
    return max(1, round(published * image_size / PUBLISHED_SIZE))


def _compose(steps: Sequence[A.BasicTransform | A.BaseCompose]) -> A.Compose:
    boxes = A.BboxParams(format="pascal_voc", clip=True, min_width=SMALLEST_SIDE, min_height=SMALLEST_SIDE)
    chain = list(steps) or [A.NoOp()]  # albumentations warns about a chain without steps
    return A.Compose(chain, bbox_params=boxes, keypoint_params=A.KeypointParams(format="xy", remove_invisible=False))


def _numbered(annotations: Annotations) -> NDArray[Any]:
    """(n+r,5) float32: boxes, then ignore regions, each with its number, by which survivors are recognised."""
    boxes = np.concatenate([annotations.boxes, annotations.ignore_boxes]).astype(np.float32)
    return np.concatenate([boxes, np.arange(len(boxes), dtype=np.float32)[:, None]], axis=1)


def _points(annotations: Annotations, height: int, width: int) -> NDArray[Any]:
    """(3+nK,2) float32: three corners, from which scale and mirroring are read off afterwards, then the keypoints."""
    corners = np.array([[0, 0], [width, 0], [0, height]], np.float32)
    if annotations.keypoints is None:
        return corners
    return np.concatenate([corners, annotations.keypoints[:, :, :2].reshape(-1, 2).astype(np.float32)])


def _planes(annotations: Annotations, size: tuple[int, int]) -> NDArray[Any]:
    """All masks, those of objects first, as `packed` has them."""
    kinds = (annotations.masks, annotations.ignore_masks)
    return packed([mask for masks in kinds if masks is not None for mask in masks], size)


def _scale(corners: NDArray[Any], height: int, width: int) -> float:
    """By how much areas grew; negative: mirrored."""
    right, down = (corners[1] - corners[0]) / width, (corners[2] - corners[0]) / height
    return float(right[0] * down[1] - right[1] * down[0])
