"""Draws boxes, masks and keypoints on pictures; legible on a thumbnail as well as on a photograph.

Letters: n objects, K keypoints. Colours are (red, green, blue), 0..255. Functions return a new picture.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
GRAY: Color = (160, 160, 160)


def color_of(class_index: int) -> Color:
    """A colour of its own for each class; neighbouring indices differ strongly, the first 36 all differ."""
    hue = class_index * 0.61803398875 % 1  # the golden ratio spreads any number of hues evenly
    value, saturation = ((1.0, 0.85), (0.75, 1.0), (1.0, 0.55))[class_index // 12 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: Image.Image, boxes: Any, texts: Sequence[str] | None = None, colors: Sequence[Color] | None = None
) -> Image.Image:
    """Draws boxes with a text each.

    Args:
        image: the picture.
        boxes: (n,4) x1 y1 x2 y2 px, array or tensor.
        texts: n, "" for none.
        colors: n; by default that of the position in the list.
    """
    rows = np.asarray(boxes, np.float64).reshape(-1, 4)
    colors = colors or [color_of(i) for i in range(len(rows))]
    picture = image.convert("RGB")
    draw, width = ImageDraw.Draw(picture), _line_width(image)
    for row, color in zip(rows, colors, strict=True):
        draw.rectangle(_corners(row), outline=color, width=width)
    font = _font(image)
    for row, text, color in zip(rows, texts or [""] * len(rows), colors, strict=True):
        if text:
            _label(draw, picture.size, (row[0], row[1]), text, color, font)
    return picture


def draw_masks(image: Image.Image, masks: Any, colors: Sequence[Color] | None = None, opacity: float = 0.45) -> Image.Image:
    """Lays translucent masks with a firm outline over a picture.

    Args:
        image: the picture.
        masks: (n,H,W), not 0 inside; array or tensor.
        colors: n; by default that of the position in the list.
        opacity: 0..1.
    """
    pixels = np.array(image.convert("RGB"))
    layers = np.asarray(masks).astype(bool)
    colors = colors or [color_of(i) for i in range(len(layers))]
    for mask, color in zip(layers, colors, strict=True):
        pixels[mask] = np.rint(pixels[mask] * (1 - opacity) + np.array(color) * opacity).astype(np.uint8)
    for mask, color in zip(layers, colors, strict=True):
        pixels[_outline(mask, max(1, _line_width(image) // 2))] = color
    return Image.fromarray(pixels)


def draw_keypoints(
    image: Image.Image,
    points: Any,
    skeleton: Sequence[tuple[int, int]] = (),
    colors: Sequence[Color] | None = None,
) -> Image.Image:
    """Draws keypoints and the limbs between them.

    Args:
        image: the picture.
        points: (n,K,2|3) x, y px and visibility or score; 0 hides a point and its limbs. Visibility 1 (hidden) is hollow.
        skeleton: pairs of keypoint indices, from 0.
        colors: n; by default that of the position in the list.
    """
    rows = np.asarray(points, np.float64)
    colors = colors or [color_of(i) for i in range(len(rows))]
    picture = image.convert("RGB")
    draw, width = ImageDraw.Draw(picture), _line_width(image)
    radius = width * 1.5
    for person, color in zip(rows, colors, strict=True):
        seen = person[:, 2] > 0 if person.shape[1] > 2 else np.ones(len(person), bool)
        for a, b in skeleton:
            if seen[a] and seen[b]:
                draw.line([*person[a, :2], *person[b, :2]], fill=color, width=width)
        for index in np.flatnonzero(seen):
            x, y = person[index, :2]
            hollow = person.shape[1] > 2 and person[index, 2] == 1
            spot = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(spot, fill=None if hollow else color, outline=color if hollow else (255, 255, 255))
    return picture


def draw_ignored(image: Image.Image, boxes: Any) -> Image.Image:
    """Hatches regions that are neither object nor background, (n,4) x1 y1 x2 y2 px, in gray."""
    picture = image.convert("RGB")
    step, width = 6 * _line_width(image), _line_width(image)
    yy, xx = np.mgrid[: picture.height, : picture.width]
    stripes = Image.fromarray(((xx + yy) % step < width).astype(np.uint8) * 255)
    for row in np.asarray(boxes, np.float64).reshape(-1, 4):
        corners = _corners(row)
        inside = Image.new("L", picture.size)
        ImageDraw.Draw(inside).rectangle(corners, fill=255)
        blank = Image.new("L", picture.size)
        picture.paste(GRAY, mask=Image.composite(stripes, blank, inside))
        ImageDraw.Draw(picture).rectangle(corners, outline=GRAY, width=width)
    return picture


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lays pictures out in rows; each cell has the size of the largest, on dark gray.

    Raises:
        ValueError: there is no picture or no column.
    """
    if not images or columns < 1:
        raise ValueError(f"{len(images)} pictures in {columns} columns")
    columns, gap = min(columns, len(images)), 4
    width, height = max(i.width for i in images) + gap, max(i.height for i in images) + gap
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), (40, 40, 40))
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * width, gap + i // columns * height))
    return sheet


def _line_width(image: Image.Image) -> int:
    return max(1, round(min(image.size) / 160))


def _font(image: Image.Image) -> Any:
    return ImageFont.load_default(max(9, min(image.size) / 32))


def _corners(row: NDArray[Any]) -> tuple[float, float, float, float]:
    """Whose second is never left of or above the first, which Pillow refuses."""
    x1, y1, x2, y2 = (float(value) for value in row)
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)


def _label(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], at: tuple[float, float], text: str, color: Color, font: Any
) -> None:
    """Writes a text on a plate above a point, moved so that it stays inside the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(at[0], size[0] - width))
    y = at[1] - height if at[1] >= height else max(0, min(at[1], size[1] - height))
    bright = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 140
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def _outline(mask: NDArray[Any], width: int) -> NDArray[Any]:
    """(H,W) bool: the part of a mask within `width` px of its edge."""
    inner = mask.copy()
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
