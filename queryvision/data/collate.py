"""Samples -> Batch: one size for all images, one number of targets for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from queryvision.data.sample import Sample
from queryvision.errors import DataError
from queryvision.structures import Batch, ImageBatch, Targets

ALWAYS = ("labels", "boxes", "areas")


def collate(
    samples: Sequence[Sample], num_classes: int, needs: Iterable[str], skipped: Sequence[str] = (), multiple: int = 1
) -> Batch:
    """Pads samples at the right and the bottom to the largest of them, and targets to the largest number.

    Args:
        samples: B of them, B > 0.
        num_classes: C; labels must be below.
        needs: fields of the targets beside labels, boxes and areas: "masks", "keypoints" or a key of `extra`.
        skipped: what to report in `Batch.skipped`.
        multiple: of so many px are H and W.

    Returns:
        pixels (B,3,H,W) uint8, 0 in padding; once normalised, padding has to be set to 0 again. Targets: labels (B,T) int64,
        boxes (B,T,4) float32 cx cy w h, 0..1 of the unpadded image, areas (B,T) float32 px of the network's input,
        masks (B,T,H,W) bool, keypoints (B,T,K,3) float32 x, y 0..1 of the unpadded image and visibility 0, 1, 2,
        further keys (B,T,...) float32 as they are. T may be 0.

    Raises:
        DataError: a label is not below `num_classes`.
        ValueError: a sample lacks what is needed.
    """
    _check_labels(samples, num_classes)
    images = _images(samples, multiple)
    counts = tuple(len(sample.annotations.labels) for sample in samples)
    names = tuple(dict.fromkeys((*ALWAYS, *needs)))
    size = (images.pixels.shape[2], images.pixels.shape[3])
    values, has, num_with = {}, {}, {}
    for name in names:
        rows = [_field(sample, name) for sample in samples]
        values[name] = _masks(rows, size) if name == "masks" else _padded(rows)
        flags = [_flags(sample, name, row) for sample, row in zip(samples, rows, strict=True)]
        has[name] = _padded(flags)
        num_with[name] = tuple(int(flag.reshape(len(flag), -1).any(1).sum()) if len(flag) else 0 for flag in flags)
    covers = [sample.annotations.covers for sample in samples]
    all_classes = np.ones(num_classes, bool)
    ignored = [_relative(sample.annotations.ignore_boxes, sample) for sample in samples]
    targets = Targets(
        values=values,
        counts=counts,
        valid=_padded([np.ones(count, bool) for count in counts]),
        has=has,
        num_with=num_with,
        covers=torch.from_numpy(np.stack([all_classes if c is None else c for c in covers])),
        covers_all=all(c is None or bool(c.all()) for c in covers),
        sizes=images.sizes,
        ignore_boxes=_padded(ignored),
        num_ignored=max(len(boxes) for boxes in ignored),
        image_ids=tuple(sample.image_id for sample in samples),
    )
    return Batch(images, targets, tuple(skipped))


def _check_labels(samples: Sequence[Sample], num_classes: int) -> None:
    for sample in samples:
        labels = sample.annotations.labels
        bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(bad):
            id_ = int(sample.annotations.ids[bad[0]])
            wrong = f"class index {labels[bad[0]]}, the model has {num_classes} classes"
            raise DataError(f"{sample.path}: annotation {id_} has {wrong}")


def _images(samples: Sequence[Sample], multiple: int) -> ImageBatch:
    shapes = [sample.image.shape[:2] for sample in samples]
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*shapes, strict=True))
    pixels = np.zeros((len(samples), height, width, 3), np.uint8)  # as the images lie in memory, and backbones read
    padding = np.ones((len(samples), height, width), bool)
    for i, (sample, (h, w)) in enumerate(zip(samples, shapes, strict=True)):
        pixels[i, :h, :w] = sample.image
        padding[i, :h, :w] = False
    padded = any(shape != (height, width) for shape in shapes)
    return ImageBatch(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(padding), padded, torch.tensor(shapes))


def _relative(boxes: NDArray[Any], sample: Sample) -> NDArray[Any]:
    """x1 y1 x2 y2 px -> cx cy w h, 0..1 of the sample's image."""
    height, width = sample.image.shape[:2]
    low, high = boxes[:, :2], boxes[:, 2:]
    relative = np.concatenate([(low + high) / 2, high - low], axis=1) / (width, height, width, height)
    return np.asarray(relative, np.float32)


def _field(sample: Sample, name: str) -> NDArray[Any]:
    """One field of one sample, (n,...), as the targets hold it; masks (n,H,W) not yet padded."""
    annotations = sample.annotations
    height, width = sample.image.shape[:2]
    if name == "boxes":
        return _relative(annotations.boxes, sample)
    value = getattr(annotations, name) if name in (*ALWAYS, "masks", "keypoints") else annotations.extra.get(name)
    if value is None:
        raise ValueError(f"{sample.path}: the sample holds no '{name}'; open the data set with it among `needs`")
    if name == "keypoints":
        return np.asarray(value / (width, height, 1), np.float32)
    return np.asarray(value)


def _flags(sample: Sample, name: str, value: NDArray[Any]) -> NDArray[Any]:
    """(n,) or (n,K) bool: which targets have the field."""
    flags = sample.annotations.has.get(name)
    shape = value.shape[:2] if name == "keypoints" else value.shape[:1]
    return np.ones(shape, bool) if flags is None else flags


def _masks(rows: Sequence[NDArray[Any]], size: tuple[int, int]) -> Tensor:
    """B x (n_i,H_i,W_i) uint8 -> (B,T,*size) bool; each is written once, for masks are the largest part of a batch."""
    joined = np.zeros((len(rows), max(len(row) for row in rows), *size), bool)
    for whole, row in zip(joined, rows, strict=True):
        whole[: len(row), : row.shape[1], : row.shape[2]] = row
    return torch.from_numpy(joined)


def _padded(rows: Sequence[NDArray[Any]]) -> Tensor:
    """B x (n_i,...) -> (B,T,...), zeros behind."""
    longest = max(len(row) for row in rows)
    joined = np.zeros((len(rows), longest, *rows[0].shape[1:]), rows[0].dtype)
    for i, row in enumerate(rows):
        joined[i, : len(row)] = row
    return torch.from_numpy(joined)
