"""Reads image files of every common kind as RGB."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from queryvision.errors import DataError

DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow raises at broken files."""
ORIENTATION = 0x0112  # EXIF tag


def read_image(path: Path | str) -> NDArray[Any]:
    """Decodes an image as it is stored: an EXIF rotation is not applied, because COCO annotations refer to stored pixels.

    Grayscale, palette, CMYK and transparent images become RGB; 16-bit ones are scaled from 0..65535 to 0..255.

    Returns:
        (H,W,3) uint8 RGB, contiguous and writable.

    Raises:
        DataError: missing, truncated or not an image.
    """
    return decoded(path, rgb_array)


def decoded(path: Path | str, convert: Callable[[Image.Image], NDArray[Any]]) -> NDArray[Any]:
    """Decodes an image file.

    Args:
        path: the file.
        convert: open picture -> array; a ValueError of it says why the picture is of no use.

    Raises:
        DataError: missing, truncated, not an image, or of no use.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return convert(image)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such image") from error
    except DAMAGED as error:
        reason = "not an image" if "cannot identify" in str(error) else str(error)
        raise DataError(f"{path}: cannot be read ({reason}); replace or remove the file") from error


def is_turned(path: Path | str) -> bool:
    """Whether the file carries an EXIF rotation by 90 degrees, which viewers apply and `read_image` does not."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except DAMAGED:
        return False


def rgb_array(image: Image.Image) -> NDArray[Any]:
    """An open picture as (H,W,3) uint8 RGB; see `read_image`.

    Raises:
        ValueError: its pixels are floating point numbers, which have no known range.
    """
    if image.mode.startswith("I"):  # Pillow would clip instead of scale
        deep = np.asarray(image).astype(np.float64) / 257
        gray = np.clip(np.rint(deep), 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating point pixels have no known range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
