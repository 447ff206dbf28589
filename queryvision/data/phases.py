"""What images go through in the first part of training and afterwards, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from queryvision.data.mixing import Mixer, Read
from queryvision.data.sample import Sample
from queryvision.data.transforms import longest_side, strong_transform, training_transform

Augment = Callable[[Sample, int, int], Sample]
"""Of a sample, its own seed and the seed that it shares with its batch."""


@dataclass(frozen=True)
class FirstPart:
    """The batches before `until` (counted from 0) mix images and have an augmentation of their own.

    Args:
        until: number of batches.
        mixer: what is read.
        transform: what it goes through.
        mosaic_transform: what mosaics go through instead.
    """

    until: int
    mixer: Mixer
    transform: Augment
    mosaic_transform: Augment

    def __call__(self, index: int, seed: int, shared: int, read: Read, num_images: int) -> Sample:
        """The sample of an item; `shared` is the batch's seed, the other arguments are those of `Mixer`."""
        sample, tiled = self.mixer(index, seed, read, num_images)
        return (self.mosaic_transform if tiled else self.transform)(sample, seed, shared)


def training_phases(
    augmentation: str,
    image_size: int,
    until: int,
    mosaic: float = 0.0,
    mixup: float = 0.0,
    copy_blend: float = 0.0,
    flip_orders: NDArray[Any] | None = None,
) -> tuple[Augment, FirstPart | None]:
    """What training images go through.

    Args:
        augmentation: a name that `training_transform` knows; "strong" is that of the first part, and "flip" follows.
        image_size: largest short side in px.
        until: number of batches in the first part.
        mosaic: probability in the first part.
        mixup: the same.
        copy_blend: the same.
        flip_orders: see `Transform`.

    Returns:
        The transform of all other batches, and the first part; None where nothing sets it apart.

    Raises:
        ConfigError: the name is unknown or the size is not positive.
    """
    transform = training_transform(augmentation, image_size, flip_orders)
    strong = augmentation == "strong"
    later = training_transform("flip", image_size, flip_orders) if strong else transform
    if not (strong or mosaic or mixup or copy_blend):
        return later, None
    mixer = Mixer(image_size, longest_side(image_size), mosaic, mixup, copy_blend)
    whole = strong_transform(image_size, flip_orders, zoom=False) if strong else transform  # a mosaic is small and cut already
    return later, FirstPart(until, mixer, transform, whole)
