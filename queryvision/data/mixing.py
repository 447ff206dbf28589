"""Several images in one: mosaic, mixup and copy-blend, so that an image holds more objects to learn from.

More objects an image give a one-to-one matching more positives: "dense one-to-one" of DEIM (arXiv 2412.04234). Mosaic is that
of YOLOv4 (arXiv 2004.10934), mixup that of arXiv 1710.09412 with both images' targets kept, copy-blend pastes single objects as
in arXiv 2012.07177, half transparent. Nothing is ever mirrored here.

What is blended over stays visible and keeps its box. Masks do not overlap, though: a pixel belongs to what has more than half
of it, the masks below lose it, their boxes and areas follow, and an object of which no pixel is left is dropped.

An image annotated only for some classes says nothing about the others: a mixed image covers what all of its parts cover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from queryvision.data.follow import select
from queryvision.data.pieces import covered, cut, joined, placed
from queryvision.data.resizing import MEAN_COLOUR, fitted_size, resized_size
from queryvision.data.sample import Annotations, Sample

TILES = 4
CENTRE = (0.3, 0.7)  # where a mosaic's tiles meet, share of each side
TILE_SCALE = (0.75, 1.5)  # of an image in its tile: times the one that shows it whole, times the one that fills the tile
MIXUP_SHARE = (0.45, 0.55)  # of the second image
COPY_SHARE = (0.5, 0.8)  # of the pasted object, which therefore owns its pixels
COPY_SCALE = (0.7, 1.3)  # of the pasted object, where its image has the size of the other
MOST_COPIES = 3
SMALLEST_COPY = 4  # px, side of a pasted box
OVERLAP = 0.25  # share of a box without mask, or of another one, that both may have in common, for it to be pasted
STREAM = 1  # keeps the draws here apart from those of the transform, which has the same seed

Read = Callable[[int], Sample]


@dataclass(frozen=True)
class Mixer:
    """Reads the image of an item, and mixes others into it.

    Args:
        image_size: short side of the network's input in px, the size of a mosaic.
        longest: bound of its long side in px.
        mosaic: probability.
        mixup: probability.
        copy_blend: probability.
    """

    image_size: int
    longest: int
    mosaic: float = 0.0
    mixup: float = 0.0
    copy_blend: float = 0.0

    def __call__(self, index: int, seed: int, read: Read, num_images: int) -> tuple[Sample, bool]:
        """A sample, a function of the arguments alone.

        Args:
            index: of the item's image.
            seed: of the item.
            read: index -> sample; only what is mixed is read.
            num_images: where the others are drawn from.

        Returns:
            The sample, and whether it is a mosaic.

        Raises:
            DataError: of `read`.
        """
        rng = np.random.default_rng([seed, STREAM])
        tiled, pasted, blended = rng.random(3) < (self.mosaic, self.copy_blend, self.mixup)
        steps = 1 + rng.integers(max(1, num_images - 1), size=TILES + 1)  # never to the image itself, where there are others
        others = [(index + int(step)) % num_images for step in steps]
        sample = read(index)
        if tiled:
            size = resized_size(_size(sample), self.image_size, self.longest)
            sample = mosaic((sample if i == 0 else read(others[i]) for i in range(TILES)), size, rng)
        if pasted:
            sample = copy_blend(sample, read(others[0]), rng)
        if blended:
            sample = mixup(sample, read(others[TILES]), rng)
        return sample, bool(tiled)


def mosaic(samples: Iterable[Sample], size: tuple[int, int], rng: np.random.Generator) -> Sample:
    """Puts four images into the quarters of one, each randomly resized and cropped.

    Args:
        samples: four; the first gives the result its name. Each is cut before the next is asked for.
        size: height, width of the result in px.
        rng: of the places.
    """
    canvas = np.empty((*size, 3), np.uint8)
    canvas[:] = MEAN_COLOUR
    y, x = (min(side - 1, max(1, round(side * rng.uniform(*CENTRE)))) for side in size)
    windows = [(0, 0, y, x), (0, x, y, size[1]), (y, 0, size[0], x), (y, x, *size)]
    first: Sample | None = None
    parts = []
    for sample, which in zip(samples, rng.permutation(TILES), strict=True):
        first = first or replace(sample, image=canvas, annotations=Annotations.empty())
        piece, corner = _tile(sample, windows[which], rng)
        _window(canvas, corner, piece)[:] = piece.image
        parts.append(placed(piece.annotations, corner, size))
    assert first is not None
    return replace(first, annotations=joined(parts))


def mixup(sample: Sample, other: Sample, rng: np.random.Generator) -> Sample:
    """Blends a whole second image, as large as fits, into the first; targets of both stay.

    Where objects of both meet, those of the image with the larger share own the pixels. An image is not mixed with itself.
    """
    if sample.image_id == other.image_id:
        return sample
    (height, width), (h, w) = _size(sample), _size(other)
    scale = min(height / h, width / w)
    size = fitted_size((h, w), (height, width), scale)
    piece = cut(other, (0, 0, h, w), size)
    corner = _corner(_size(sample), size, rng)
    image = sample.image.copy()
    window = _window(image, corner, piece)
    share = rng.uniform(*MIXUP_SHARE)
    window[:] = _blend(window, piece.image, share)
    below, above = sample.annotations, placed(piece.annotations, corner, _size(sample))
    if share > 0.5:
        below = covered(below, _owned(above, _size(sample)))
    else:
        above = covered(above, _owned(below, _size(sample)))
    return replace(sample, image=image, annotations=joined([below, above]))


def copy_blend(sample: Sample, other: Sample, rng: np.random.Generator) -> Sample:
    """Blends up to three objects of another image into the first, at random places and whole.

    Of an object with a mask only the mask is taken. Stuff and objects in ignore regions are not, and of those without a mask
    only such as no other one touches much, lest something be seen that no target names.
    """
    offered = rng.permutation(_offered(other.annotations))[: rng.integers(1, MOST_COPIES + 1)]
    size, image, parts = _size(sample), sample.image.copy(), [sample.annotations]
    for row in offered:
        piece = _object(other, int(row), size, rng)
        if min(_size(piece)) < SMALLEST_COPY or not len(piece.annotations.labels):
            continue
        corner = _corner(size, _size(piece), rng)
        window = _window(image, corner, piece)
        blended = _blend(window, piece.image, rng.uniform(*COPY_SHARE))
        inside = _inside(piece)
        window[inside] = blended[inside]
        region = np.zeros(size, bool)
        _window(region, corner, piece)[:] = inside
        parts = [*(covered(part, region) for part in parts), placed(piece.annotations, corner, size)]
    return replace(sample, image=image, annotations=joined(parts))


def _tile(sample: Sample, window: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[Sample, tuple[int, int]]:
    """A part of the sample, or all of it, in a random size, and its corner y, x within the mosaic."""
    y1, x1, y2, x2 = window
    shares = [side / length for side, length in zip((y2 - y1, x2 - x1), _size(sample), strict=True)]
    scale = rng.uniform(TILE_SCALE[0] * min(shares), TILE_SCALE[1] * max(shares))
    spans = []  # along y, then x: start and end in the image, side and offset in the tile
    for room, length in zip((y2 - y1, x2 - x1), _size(sample), strict=True):
        taken, side = max(1, min(length, round(room / scale))), max(1, min(room, round(length * scale)))
        start = int(rng.integers(length - taken + 1))
        spans.append((start, start + taken, side, int(rng.integers(room - side + 1))))
    (top, bottom, height, y), (left, right, width, x) = spans
    return cut(sample, (top, left, bottom, right), (height, width)), (y1 + y, x1 + x)


def _offered(annotations: Annotations) -> NDArray[Any]:
    """(i,) the objects that can be pasted."""
    boxes = annotations.boxes.astype(np.float64)
    sides = boxes[:, 2:] - boxes[:, :2]
    ignored = _overlaps(boxes, annotations.ignore_boxes).any(1)
    others = _overlaps(boxes, boxes)
    np.fill_diagonal(others, 0)
    masked = annotations.masks is not None and annotations.has.get("masks", np.ones(len(boxes), bool))
    areas = sides.prod(1)
    clear = (others <= OVERLAP * np.minimum(areas[:, None], areas)).all(1) | masked
    if annotations.stuff is not None:
        clear &= ~annotations.stuff
    return np.flatnonzero(clear & ~ignored & (sides >= SMALLEST_COPY).all(1))


def _object(other: Sample, row: int, size: tuple[int, int], rng: np.random.Generator) -> Sample:
    """One object, cut out along its box, in a random size that fits into `size`."""
    old = other.annotations
    alone = replace(
        select(old, np.array([row])),
        ignore_boxes=old.ignore_boxes[:0],
        ignore_labels=old.ignore_labels[:0],
        ignore_masks=None if old.ignore_masks is None else old.ignore_masks[:0],
    )
    x1, y1 = np.floor(old.boxes[row, :2]).astype(int).tolist()
    x2, y2 = np.ceil(old.boxes[row, 2:]).astype(int).tolist()
    x2, y2 = min(x2, other.image.shape[1]), min(y2, other.image.shape[0])
    equal = min(new / side for new, side in zip(size, _size(other), strict=True))
    scale = min(equal * rng.uniform(*COPY_SCALE), size[0] / (y2 - y1), size[1] / (x2 - x1))
    return cut(replace(other, annotations=alone), (y1, x1, y2, x2), fitted_size((y2 - y1, x2 - x1), size, scale))


def _inside(piece: Sample) -> NDArray[Any]:
    """(H,W) bool: which pixels of an object's piece are pasted: its mask, or all where it has none."""
    found = piece.annotations
    if found.masks is None or not found.has.get("masks", np.ones(1, bool))[0]:
        return np.ones(_size(piece), bool)
    return np.asarray(found.masks[0] > 0)


def _owned(annotations: Annotations, size: tuple[int, int]) -> NDArray[Any]:
    """(H,W) bool: the pixels of all objects with a mask."""
    if annotations.masks is None or not len(annotations.masks):
        return np.zeros(size, bool)
    return np.asarray(annotations.masks.any(0))


def _overlaps(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Areas that boxes (i,4) and (j,4) share, (i,j)."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return np.asarray(sides.clip(0).prod(2))


def _size(sample: Sample) -> tuple[int, int]:
    return sample.image.shape[0], sample.image.shape[1]


def _corner(whole: tuple[int, int], size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(whole[0] - size[0] + 1)), int(rng.integers(whole[1] - size[1] + 1))


def _window(image: NDArray[Any], corner: tuple[int, int], piece: Sample) -> NDArray[Any]:
    """The part of an image, not copied, that a piece is put over."""
    return image[corner[0] : corner[0] + piece.image.shape[0], corner[1] : corner[1] + piece.image.shape[1]]


def _blend(a: NDArray[Any], b: NDArray[Any], share: float) -> NDArray[Any]:
    """(1 - share) a + share b, uint8."""
    return np.asarray(cv2.addWeighted(np.ascontiguousarray(a), 1 - share, np.ascontiguousarray(b), share, 0))
