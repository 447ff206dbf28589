"""A sheet of annotated samples as the model sees them: the quickest check of a data set and its augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from queryvision.data.coco import CocoDataset
from queryvision.data.sample import Sample
from queryvision.errors import DataError
from queryvision.inference import drawing
from queryvision.outputs import writable_file

CELL = 480  # px, longest side of a picture on the sheet


def view(
    dataset: CocoDataset, transform: Callable[[Sample, int], Sample] | None, path: Path | str, count: int = 16, seed: int = 0
) -> Path:
    """Writes a sheet of random samples, with boxes, class names, masks, keypoints and hatched ignore regions.

    Args:
        dataset: where they come from.
        transform: (sample, seed) -> sample; None: as stored.
        path: the PNG file to write.
        count: number of samples.
        seed: of the choice and of the augmentation.

    Returns:
        The file written.

    Raises:
        ConfigError: the file cannot be written.
        DataError: an image cannot be read, or `count` is not positive.
    """
    if count < 1:
        raise DataError(f"a sheet of {count} samples; ask for at least one")
    path = writable_file(path)
    order = np.random.default_rng(seed).permutation(len(dataset))[:count]
    pictures = []
    for position, index in enumerate(order):
        sample = dataset.read(int(index))
        pictures.append(draw_sample(sample if transform is None else transform(sample, seed + position), dataset))
    sheet = drawing.grid(pictures, columns=math.ceil(math.sqrt(len(pictures))))
    sheet.save(path, format="PNG")
    return path


def draw_sample(sample: Sample, dataset: CocoDataset) -> Image.Image:
    """Draws the annotations of a sample on its image, at most `CELL` px long.

    Scaled before drawing, so that lines and letters keep their size.
    """
    annotations = sample.annotations
    image = Image.fromarray(sample.image)
    scale = min(1.0, CELL / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size)
    colors = [drawing.color_of(int(label)) for label in annotations.labels]
    if annotations.masks is not None:
        # Objects of one class get colours of their own, else touching ones would melt together.
        shades = [drawing.color_of(i) for i in range(len(annotations.masks))]
        masks = [np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in annotations.masks]
        image = drawing.draw_masks(image, np.array(masks).reshape(-1, size[1], size[0]), shades)
    image = drawing.draw_ignored(image, annotations.ignore_boxes * scale)
    names = [dataset.classes.names[int(label)] for label in annotations.labels]
    image = drawing.draw_boxes(image, annotations.boxes * scale, names, colors)
    if annotations.keypoints is not None:
        for index, (label, points) in enumerate(
            zip(annotations.labels, annotations.keypoints * (scale, scale, 1), strict=True)
        ):
            skeleton = dataset.classes.skeletons[int(label)]
            limbs = () if skeleton is None else skeleton.limbs
            image = drawing.draw_keypoints(image, points[None], limbs, [drawing.color_of(index)])
    return image
