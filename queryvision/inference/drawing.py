"""Draws boxes, masks and keypoints on pictures; legible on a thumbnail as well as on a photograph.

Letters: n objects, K keypoints. Colours are (red, green, blue), 0..255. Functions return a new picture.
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from queryvision.data.classes import ClassMap, Color
from queryvision.data.coco_colors import colors_of

GRAY: Color = (160, 160, 160)
SHADES = (0.8191725, 0.6710436, 0.5497005)  # powers of 1 / 1.2207441: spread any number of points evenly over a cube


def color_of(class_index: int) -> Color:
    """A colour of its own for each class; neighbouring indices differ strongly, the first 36 all differ."""
    hue = class_index * 0.61803398875 % 1  # the golden ratio spreads any number of hues evenly
    value, saturation = ((1.0, 0.85), (0.75, 1.0), (1.0, 0.55))[class_index // 12 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def segment_colors(labels: Sequence[int], classes: ClassMap, reach: int = 40) -> list[Color]:
    """A colour of its own for each segment of a picture, never black: that of its class, for further things a shade of it.

    Args:
        labels: class index of each segment.
        classes: who is a thing (stuff gets the colour of its class first), and the colours of categories (`colors_of`).
        reach: most that a shade differs from the colour of the class, in each channel.
    """
    colors, taken = [(0, 0, 0)] * len(labels), {(0, 0, 0)}
    own = colors_of(classes)
    shades = {label: _shades(own[label] or color_of(label), reach) for label in labels}
    for index in sorted(range(len(labels)), key=lambda i: classes.things[labels[i]]):
        colors[index] = next(color for color in shades[labels[index]] if color not in taken)
        taken.add(colors[index])
    return colors


def _shades(color: Color, reach: int) -> Iterator[Color]:
    """A colour and more and more that are like it."""
    for step in itertools.count():
        red, green, blue = (
            min(255, max(0, c + (round(reach * (2 * (step * s % 1) - 1)) if step else 0)))
            for c, s in zip(color, SHADES, strict=True)
        )
        yield red, green, blue


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


def draw_segments(
    image: Image.Image,
    rows: Any,
    texts: Sequence[str] | None = None,
    colors: Sequence[Color] | None = None,
    opacity: float = 0.5,
) -> Image.Image:
    """Colours the segments of a picture, with a thin line between them and each text where its segment is widest.

    Args:
        image: the picture.
        rows: (H,W) 1 + the number of the segment that a pixel belongs to, 0: nobody's; array or tensor.
        texts: n, "" for none; one that its segment has no room for is left out.
        colors: n; by default that of the position in the list.
        opacity: 0..1.
    """
    places = np.asarray(rows).astype(np.int64)
    colors = colors or [color_of(i) for i in range(places.max(initial=0))]
    pixels = np.array(image.convert("RGB"))
    mixed = pixels * (1 - opacity) + np.array([(0, 0, 0), *colors])[places] * opacity
    pixels = np.where((places > 0)[..., None], np.rint(mixed).astype(np.uint8), pixels)
    edge = np.zeros(places.shape, bool)
    edge[:, 1:] |= places[:, 1:] != places[:, :-1]
    edge[1:] |= places[1:] != places[:-1]
    pixels[edge] = 255
    picture = Image.fromarray(pixels)
    _name(picture, [(text, *_middle(places == number)) for number, text in enumerate(texts or (), 1) if text])
    return picture


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


def _name(picture: Image.Image, spots: Sequence[tuple[str, float, float, float]]) -> None:
    """Writes a text, x, y, room px each, those with most room first; what would lie on another or has no room is left out."""
    draw, font = ImageDraw.Draw(picture), _font(picture)
    stroke, taken = max(1, round(font.size / 10)), list[tuple[float, float, float, float]]()
    for text, x, y, room in sorted(spots, key=lambda spot: -spot[3]):
        left, top, right, bottom = draw.textbbox((0, 0), text, font, "mm", stroke_width=stroke)
        x, y = max(-left, min(x, picture.width - right)), max(-top, min(y, picture.height - bottom))
        box = (x + left, y + top, x + right, y + bottom)
        free = all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in taken)
        if free and room > font.size / 3:
            taken.append(box)
            draw.text((x, y), text, (255, 255, 255), font, "mm", stroke_width=stroke, stroke_fill=(0, 0, 0))


def _middle(mask: NDArray[Any]) -> tuple[float, float, float]:
    """The point of a mask (H,W) bool that is farthest from its edge and that of the picture: x, y, distance in px."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    inside = np.pad(mask[y : y + height, x : x + width], 1).astype(np.uint8)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
    row, column = divmod(int(distance.argmax()), inside.shape[1])
    return x + column - 1.0, y + row - 1.0, float(distance[row, column])


def _outline(mask: NDArray[Any], width: int) -> NDArray[Any]:
    """(H,W) bool: the part of a mask within `width` px of its edge."""
    inner = mask.copy()
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
