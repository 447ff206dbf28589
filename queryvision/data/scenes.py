"""The embedded data set: drawn scenes with things, stuff and figures that have keypoints.

A scene is a textured ground of 2 to 4 stuff regions with up to 6 things on it, which may cover each other and be cut by the
border. A thing's class is its shape: colours, patterns, sizes and angles are drawn anew for each. Figures face the viewer, so
that their left side is on the right in the image; this stays true when an image is mirrored and left and right are swapped.
Left and right limbs differ in shade, but which is the lighter is left to chance, or mirrored images would teach the opposite.

Everything comes from NumPy's generator and OpenCV's drawing: image i depends on the seed, the split, i and the size alone,
bit for bit with the same versions of both.
Coordinates are in px from the image's top left corner: the pixel in column c and row r covers c..c+1, r..r+1.

Letters: H, W height and width of an image in px, K keypoints.
"""

from __future__ import annotations

import colorsys
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from queryvision.data import scene_sprites as sprites
from queryvision.data.scene_files import Scene, Thing, write_once, write_split
from queryvision.data.scene_sprites import KEYPOINTS, SHAPES, STUFF, Array, Rng, Sprite
from queryvision.errors import ConfigError, DataError

VERSION = 1  # to be raised with every change of what is drawn, so that no stale cache is taken
CACHE_VARIABLE = "QUERYVISION_CACHE"
SPLITS = ("train", "val")
MIN_SIZE = 48

FIGURE_ID, FIRST_SHAPE_ID, FIRST_STUFF_ID = 1, 2, 10  # ids with a gap, as in published data sets
_SKELETON = ((1, 2), (1, 3), (2, 3), (2, 4), (3, 5), (2, 6), (3, 7), (6, 7), (6, 8), (7, 9), (8, 10), (9, 11))
CATEGORIES: tuple[dict[str, Any], ...] = (
    {
        "id": FIGURE_ID,
        "name": "figure",
        "supercategory": "figure",
        "isthing": 1,
        "keypoints": list(KEYPOINTS),
        "skeleton": [list(pair) for pair in _SKELETON],  # counted from 1, as COCO does
        "flip_pairs": [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]],  # counted from 0: what swaps in a mirrored image
        "sigmas": [0.05, 0.07, 0.07, 0.07, 0.07, 0.09, 0.09, 0.08, 0.08, 0.08, 0.08],  # falloff of each in OKS
    },
    *({"id": FIRST_SHAPE_ID + i, "name": name, "supercategory": "shape", "isthing": 1} for i, name in enumerate(SHAPES)),
    *({"id": FIRST_STUFF_ID + i, "name": name, "supercategory": "ground", "isthing": 0} for i, name in enumerate(STUFF)),
)
"""COCO categories of the data set, things first."""

_NUMBER_OF_THINGS = (0.03, 0.14, 0.22, 0.23, 0.18, 0.12, 0.08)  # how often an image gets 0, 1, ... 6
_FIGURE_SHARE = 0.3
_SHAPE_SIZES, _FIGURE_SIZES = (0.12, 0.45), (0.30, 0.60)  # of the image side
_MIN_VISIBLE, _MIN_INSIDE, _MIN_PIXELS = 0.35, 0.6, 16
_TRIES = 20

_log = logging.getLogger(__name__)


def make_scenes(root: Path | str | None = None, *, train: int = 1000, val: int = 200, size: int = 128, seed: int = 0) -> Path:
    """Draws the data set, or finds the one that was drawn before.

    Args:
        root: cache folder; None: the variable QUERYVISION_CACHE, or else `~/.cache/queryvision`.
        train: number of training images.
        val: number of validation images.
        size: longer side of every image in px; the shorter one is 0.75 to 1 times as long.
        seed: another seed draws other images.

    Returns:
        A subfolder of `root` in COCO's layout, with the splits `train` and `val`.

    Raises:
        ConfigError: a number makes no sense.
        DataError: the folder cannot be written.
    """
    for name, value, least in (("train", train, 1), ("val", val, 1), ("size", size, MIN_SIZE), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value} is too small for the drawn data set; the least is {least}")
    parameters = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    folder = _cache(root) / f"scenes-v{VERSION}-train{train}-val{val}-size{size}-seed{seed}"
    return write_once(folder, parameters, partial(_write, parameters=parameters))


def _cache(root: Path | str | None) -> Path:
    try:
        return Path(root or os.environ.get(CACHE_VARIABLE) or "~/.cache/queryvision").expanduser()
    except RuntimeError as error:
        raise DataError(f"there is no home folder to keep the drawn data set in; set {CACHE_VARIABLE} to a folder") from error


def _write(folder: Path, parameters: dict[str, int]) -> None:
    _log.info("drawing %d + %d scenes, once", parameters["train"], parameters["val"])
    for split in SPLITS:
        scenes = (draw_scene(parameters["seed"], split, i, parameters["size"]) for i in range(parameters[split]))
        write_split(folder, split, scenes, CATEGORIES)


def draw_scene(seed: int, split: str, index: int, size: int = 128) -> Scene:
    """Draws one image of the data set.

    Args:
        seed: of the data set.
        split: `train` or `val`.
        index: which image.
        size: its longer side in px.

    Returns:
        The image with its labels; at every pixel they say what covers most of it.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    shorter = round(size * rng.uniform(0.75, 1.0))
    height, width = (size, shorter) if rng.random() < 0.5 else (shorter, size)
    image, stuff = sprites.draw_ground(rng, height, width, size / 128)
    owner = np.full((height, width), -1, np.int16)
    things: list[Thing] = []
    areas: list[int] = []  # of each thing within the image, before others covered it
    for _ in range(rng.choice(len(_NUMBER_OF_THINGS), p=_NUMBER_OF_THINGS)):
        category_id, sprite = _thing(rng, size)
        place = _place(rng, sprite, owner, areas)
        if place is None:
            continue
        areas.append(_paste(rng, image, owner, sprite, place, len(things)))
        things.append(Thing(category_id, None if sprite.keypoints is None else sprite.keypoints + place))
    ground = stuff + np.uint8(FIRST_STUFF_ID)
    seen = np.bincount(ground[owner < 0], minlength=256)
    ground[seen[ground] < _MIN_PIXELS] = 0  # slivers of a region between things
    posed = tuple(
        thing if thing.keypoints is None else Thing(thing.category_id, _visibility(thing.keypoints, owner, i))
        for i, thing in enumerate(things)
    )
    return Scene(_light(rng, image), ground, owner, posed)


def _thing(rng: Rng, size: int) -> tuple[int, Sprite]:
    if rng.random() < _FIGURE_SHARE:
        return FIGURE_ID, sprites.draw_figure(rng, max(30.0, size * rng.uniform(*_FIGURE_SIZES)))
    kind = int(rng.integers(len(SHAPES)))
    return FIRST_SHAPE_ID + kind, sprites.draw_shape(rng, SHAPES[kind], max(10.0, size * rng.uniform(*_SHAPE_SIZES)))


def _place(rng: Rng, sprite: Sprite, owner: Array, areas: list[int]) -> tuple[int, int] | None:
    """Finds an x, y of the sprite's window at which enough is seen of it and of the things below; None: it found none."""
    height, width = owner.shape
    mask = sprite.coverage >= 0.5
    seen = np.bincount(owner.ravel() + 1, minlength=len(areas) + 1)[1:]
    wanted = np.maximum(_MIN_VISIBLE * np.array(areas), _MIN_PIXELS)
    for _ in range(_TRIES):
        x = int(rng.integers(width)) - mask.shape[1] // 2
        y = int(rng.integers(height)) - mask.shape[0] // 2
        target, source = _overlap(mask, owner, x, y)
        inside = mask[source]
        if inside.sum() < max(_MIN_INSIDE * mask.sum(), _MIN_PIXELS):
            continue
        covered = np.bincount(owner[target][inside] + 1, minlength=len(areas) + 1)[1:]
        if (seen - covered >= wanted).all():
            return x, y
    return None


def _paste(rng: Rng, image: Array, owner: Array, sprite: Sprite, place: tuple[int, int], index: int) -> int:
    """Draws the sprite into the image (H,W,3) and its mask into `owner` (H,W); returns the number of its pixels."""
    target, source = _overlap(sprite.coverage, owner, *place)
    coverage = sprite.coverage[source]
    mask = coverage >= 0.5
    behind = image[target][mask].mean(axis=0)
    palette = _shape_palette(rng, behind) if sprite.keypoints is None else _figure_palette(rng, behind)
    image[target] = image[target] * (1 - coverage[..., None]) + sprite.paint(palette)[source]
    owner[target][mask] = index
    return int(mask.sum())


def _overlap(window: Array, image: Array, x: int, y: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a window at x, y lies in the image, and which part of it does."""
    rows = slice(max(y, 0), max(min(y + window.shape[0], image.shape[0]), 0))
    columns = slice(max(x, 0), max(min(x + window.shape[1], image.shape[1]), 0))
    return (rows, columns), (slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x))


def _visibility(points: Array, owner: Array, index: int) -> Array:
    """Keypoints (K,2) of thing `index` -> (K,3) float32 with 2 visible, 1 covered by a later thing, zeros outside.

    A joint in front of or behind the figure's own body counts as visible.
    """
    height, width = owner.shape
    points = points.round(2)  # as it will be written, so that nothing is rounded out of the image later
    cells = np.floor(points).astype(int)
    inside = ((cells >= 0) & (cells < (width, height))).all(axis=1)
    column, row = np.where(inside[:, None], cells, 0).T
    visible = np.where(owner[row, column] > index, 1, 2)
    return np.where(inside[:, None], np.column_stack([points, visible]), 0).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ colours
def _shape_palette(rng: Rng, behind: Array) -> Array:
    """Colours of a shape's parts, (parts,3) float32 RGB, that stand out from the (3,) RGB behind it."""
    fill = _contrast(rng, behind)
    pattern = fill * 0.5 if rng.random() < 0.5 else 255 - (255 - fill) * 0.4
    palette = np.zeros((4, 3), np.float32)
    palette[sprites.RIM] = fill * rng.uniform(0.3, 0.6) if rng.random() < 0.7 else 255 - (255 - fill) * 0.3
    palette[sprites.FILL], palette[sprites.PATTERN] = fill, pattern
    return palette


def _figure_palette(rng: Rng, behind: Array) -> Array:
    """Colours of a figure's parts; one side's limbs are lighter than the other's."""
    skin, shirt, trousers = _colour(rng, (0.04, 0.09), (0.25, 0.6), (0.5, 1.0)), _contrast(rng, behind), _contrast(rng, behind)
    left, right = rng.permutation((1.0, rng.uniform(0.55, 0.75)))
    palette = np.zeros((9, 3), np.float32)
    palette[sprites.RIM] = palette[sprites.EYE] = rng.uniform(10, 50)
    palette[sprites.SKIN], palette[sprites.SHIRT] = skin, shirt * 0.85
    palette[sprites.LEFT_ARM], palette[sprites.RIGHT_ARM] = shirt * left, shirt * right
    palette[sprites.LEFT_LEG], palette[sprites.RIGHT_LEG] = trousers * left, trousers * right
    return palette


def _contrast(rng: Rng, behind: Array) -> Array:
    """A random colour that is not that of the background: (3,) RGB."""
    colours = [_colour(rng, (0, 1), (0.2, 1.0), (0.35, 1.0)) for _ in range(6)]
    distances = [float(np.linalg.norm(colour - behind)) for colour in colours]
    return next((c for c, d in zip(colours, distances, strict=True) if d > 90), colours[int(np.argmax(distances))])


def _colour(rng: Rng, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]) -> Array:
    return np.array(colorsys.hsv_to_rgb(rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value))) * 255


def _light(rng: Rng, image: Array) -> Array:
    """Brightness, tint, a light from one side and sensor noise: (H,W,3) float32 -> uint8."""
    height, width = image.shape[:2]
    x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)[:, None]
    side = x * rng.uniform(-0.12, 0.12) + y * rng.uniform(-0.12, 0.12)
    tint = rng.uniform(0.75, 1.12) * rng.uniform(0.94, 1.06, 3)
    noise = rng.standard_normal(image.shape, np.float32) * rng.uniform(1, 6)
    return np.asarray(np.clip(np.round(image * (1 + side[..., None]) * tint + noise), 0, 255), np.uint8)
