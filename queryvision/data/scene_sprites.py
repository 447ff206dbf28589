"""What drawn scenes are made of: the ground with its textures, shapes, and figures in many poses.

Things are drawn four times as fine as the image, as a map of parts (a rim, a stripe, a sleeve ...) that becomes a coverage
(its mask) and, with a palette, colours with soft edges.

Letters: H, W height and width of the image in px, h, w of a sprite's window in px, K keypoints.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rng = np.random.Generator
FINE = 4  # parts are drawn with so many steps a pixel
SHIFT = 4  # fractional bits of OpenCV's coordinates
SHAPES = ("ball", "box", "triangle", "star", "ring", "cross")
STUFF = ("sky", "grass", "water", "sand", "road")
KEYPOINTS = (
    "head",
    "left_shoulder",
    "right_shoulder",
    "left_hand",
    "right_hand",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_foot",
    "right_foot",
)
RIM, FILL, PATTERN = 1, 2, 3  # parts of a shape; the figure's: rim and
SKIN, SHIRT, EYE, LEFT_ARM, RIGHT_ARM, LEFT_LEG, RIGHT_LEG = 2, 3, 4, 5, 6, 7, 8

# Lowest and highest hue, saturation and value (0..1), and contrast of the texture.
_STUFF_COLOURS = {
    "sky": ((0.53, 0.63), (0.15, 0.55), (0.70, 0.95), (0.08, 0.25)),
    "grass": ((0.22, 0.38), (0.40, 0.75), (0.35, 0.70), (0.15, 0.35)),
    "water": ((0.48, 0.62), (0.50, 0.85), (0.30, 0.65), (0.12, 0.30)),
    "sand": ((0.07, 0.14), (0.25, 0.50), (0.65, 0.90), (0.06, 0.16)),
    "road": ((0.00, 1.00), (0.00, 0.10), (0.25, 0.55), (0.06, 0.16)),
}


# ------------------------------------------------------------------------------------------------------ the ground
def draw_ground(rng: Rng, height: int, width: int, unit: float) -> tuple[Array, Array]:
    """Draws 2 to 4 regions of different stuff with wavy borders.

    Args:
        rng: source of everything that varies.
        height: H.
        width: W.
        unit: px that a texture grows by; 1 for an image side of 128.

    Returns:
        (H,W,3) float32 RGB 0..255 and (H,W) uint8, position in `STUFF`.
    """
    number = int(rng.integers(2, 5))
    kinds = [int(k) for k in rng.permutation(len(STUFF))[:number]]
    if 0 in kinds or rng.random() < 0.4:  # the sky is above everything else
        kinds = [0, *[k for k in kinds if k != 0]][:number]
    y, x = np.indices((height, width), dtype=np.float32) + 0.5
    image = _texture(rng, STUFF[kinds[0]], y, x, unit)
    stuff = np.full((height, width), kinds[0], np.uint8)
    for rank, kind in enumerate(kinds[1:], start=1):
        angle = rng.normal(0, 0.25) + (rng.choice((-1.2, 1.2)) if rng.random() < 0.2 and rank > 1 else 0)
        down, along = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
        base_y = height * (rank / number + rng.uniform(-0.1, 0.1))
        depth = (y - base_y) * down[0] + (x - width * rng.uniform(0.35, 0.65)) * down[1]
        run = y * along[0] + x * along[1]
        for wave in (1.0, 0.4):
            length = unit * wave * rng.uniform(30, 90)
            depth += unit * wave * rng.uniform(0.5, 5) * np.sin(run * (2 * math.pi / length) + rng.uniform(0, 6.3))
        cover = np.clip(depth + 0.5, 0, 1).astype(np.float32)[..., None]
        image = image * (1 - cover) + _texture(rng, STUFF[kind], y, x, unit) * cover
        stuff[cover[..., 0] >= 0.5] = kind
    return image, stuff


def _texture(rng: Rng, name: str, y: Array, x: Array, unit: float) -> Array:
    """A texture of a stuff class at the pixels y, x: (H,W,3) float32 RGB."""
    hue, saturation, value, contrast = (rng.uniform(*limits) for limits in _STUFF_COLOURS[name])
    colour = np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32) * 255
    shape, angle = y.shape, rng.uniform(0, math.pi)
    tilted = y * math.sin(angle) + x * math.cos(angle)
    if name == "sky":  # bright clouds, paler towards the horizon
        clouds = np.maximum(_noise(rng, shape, 16 * unit, 30 * unit) + 0.5 * _noise(rng, shape, 7 * unit, 12 * unit), 0)
        pale = np.clip((0.8 * clouds + 0.4 * y / shape[0])[..., None] * contrast * 4, 0, 0.9)
        return np.asarray(colour * (1 - pale) + 248 * pale, np.float32)
    if name == "grass":  # blades and patches
        grey = 0.8 * _noise(rng, shape, 4 * unit, 1.3 * unit) + 0.4 * _noise(rng, shape, 20 * unit, 20 * unit)
    elif name == "water":  # ripples along the horizon
        period = unit * rng.uniform(4, 8)
        grey = np.sin(2 * math.pi * (y / period + 0.7 * _noise(rng, shape, 12 * unit, 20 * unit)))
    elif name == "sand":  # dunes and grain
        period = unit * rng.uniform(14, 28)
        grey = np.sin(2 * math.pi * (tilted / period + _noise(rng, shape, 20 * unit, 20 * unit)))
        grey = 0.7 * grey + 0.8 * _noise(rng, shape, 1, 1)
    else:  # tarmac with a dashed line
        across = -y * math.cos(angle) + x * math.sin(angle)
        lane = (across / unit + rng.uniform(0, 40)) % rng.uniform(34, 50) < rng.uniform(1.5, 2.5)
        grey = 0.9 * _noise(rng, shape, 1, 1) + 7 * (lane & ((tilted / unit) % 14 < 8))
    return np.asarray(colour * (1 + contrast * grey[..., None]), np.float32)


def _noise(rng: Rng, shape: tuple[int, ...], cell_y: float, cell_x: float) -> Array:
    """Smooth noise with blobs of about the given size in px: (H,W) float32, about -1..1."""
    grid = rng.random((math.ceil(shape[0] / cell_y) + 1, math.ceil(shape[1] / cell_x) + 1), np.float32) * 2 - 1
    return np.asarray(cv2.resize(grid, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC), np.float32)


# ------------------------------------------------------------------------------------------------------ things
@dataclass(frozen=True)
class Sprite:
    """A thing in a window of its own, still without colours.

    Attributes:
        parts: (h * FINE, w * FINE) uint8, 0 outside, else the part.
        coverage: (h,w) float32, covered share of each pixel.
        keypoints: (K,2) float64 x, y in px of the window.
    """

    parts: Array
    coverage: Array
    keypoints: Array | None = None

    @classmethod
    def of(cls, parts: Array, keypoints: Array | None = None) -> Sprite:
        """Completes the map of parts."""
        return cls(parts, _shrink((parts > 0).astype(np.float32)), keypoints)

    def paint(self, palette: Array) -> Array:
        """Colours times coverage, (h,w,3) float32, of a palette (parts,3) float32 RGB whose row 0 is black."""
        return _shrink(palette[self.parts])


def draw_shape(rng: Rng, name: str, diameter: float) -> Sprite:
    """Draws a shape at a random angle, a little stretched, with or without rim and pattern.

    Args:
        rng: source of everything that varies.
        name: of `SHAPES`.
        diameter: about its largest extent, in px.
    """
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    stretch = np.array([1.0, rng.uniform(0.75, 1.0)]) * diameter / 2
    contours = [(points * stretch) @ turn.T for points in _outline(rng, name)]
    parts, offset = _canvas(np.concatenate(contours) + rng.random(2), pad=1.0)
    offset = offset + rng.random(2)
    inside = np.zeros_like(parts)
    cv2.fillPoly(inside, [_fixed(points + offset) for points in contours], (1,), cv2.LINE_8, SHIFT)
    parts[inside > 0] = FILL
    _draw_pattern(rng, parts, diameter)
    rim = round(FINE * max(0.8, 0.05 * diameter))
    if rng.random() < 0.7:
        core = cv2.erode(inside, np.ones((2 * rim + 1, 2 * rim + 1), np.uint8), borderValue=(0,))
        parts[(inside > 0) & (core == 0)] = RIM
    return Sprite.of(parts)


def _outline(rng: Rng, name: str) -> list[Array]:
    """Contours of a shape within the unit circle, a list of (points,2); a second contour is a hole."""
    if name in ("ball", "ring"):
        hole = [_circle(48) * rng.uniform(0.45, 0.62)] if name == "ring" else []
        return [_circle(48), *hole]
    if name == "box":
        return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.8]
    if name == "triangle":
        return [_circle(3) + [(rng.uniform(-0.3, 0.3), 0), (0, 0), (0, 0)]]
    if name == "star":
        return [_circle(10) * np.where(np.arange(10) % 2, rng.uniform(0.38, 0.48), 1.0)[:, None]]
    a = rng.uniform(0.24, 0.36)
    quarter = [(a, -1), (a, -a), (1, -a)]
    corners = [(x, y) for x, y in quarter] + [(-y, x) for x, y in quarter]
    return [np.array(corners + [(-x, -y) for x, y in corners])]


def _circle(number: int) -> Array:
    angles = np.arange(number) * (2 * math.pi / number) - math.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _draw_pattern(rng: Rng, parts: Array, diameter: float) -> None:
    """Sets a part of the inside to PATTERN: stripes, checks, dots or nothing."""
    kind, angle = int(rng.integers(5)), rng.uniform(0, math.pi)
    period = FINE * max(4.0, diameter * rng.uniform(0.2, 0.4))
    y, x = np.indices(parts.shape, dtype=np.float32)
    along = (y * math.sin(angle) + x * math.cos(angle)) / period % 1
    across = (x * math.sin(angle) - y * math.cos(angle)) / period % 1
    patterns = (along < 0.45, (along < 0.5) != (across < 0.5), np.hypot(along - 0.5, across - 0.5) < 0.32)
    if kind < len(patterns):
        parts[patterns[kind] & (parts > 0)] = PATTERN


def draw_figure(rng: Rng, height: float) -> Sprite:
    """Draws a figure that faces the viewer: its left is on the right.

    Args:
        rng: source of the pose and the build.
        height: of the figure standing upright, in px.
    """
    joints = _pose(rng) * height
    thick = max(2.2, height * rng.uniform(0.07, 0.1))
    head = height * rng.uniform(0.09, 0.115)
    around = np.concatenate([joints, joints[:1] + _circle(8) * head * 1.1])
    parts, offset = _canvas(around, pad=thick / 2 + 2)
    joints = joints + offset + rng.random(2)
    at = dict(zip(KEYPOINTS, joints, strict=True))
    rim = max(0.5, 0.012 * height)

    def limb(part: int, *names: str) -> None:
        points = [_fixed(at[name]) for name in names]
        for colour, width in ((RIM, thick + 2 * rim), (part, thick)):
            for start, end in zip(points, points[1:], strict=False):
                cv2.line(parts, start.tolist(), end.tolist(), (colour,), round(FINE * width), cv2.LINE_8, SHIFT)

    for side, part in (("left", LEFT_LEG), ("right", RIGHT_LEG)):
        limb(part, f"{side}_hip", f"{side}_knee", f"{side}_foot")
    torso = np.stack([at[name] for name in ("left_shoulder", "right_shoulder", "right_hip", "left_hip")])
    for colour, width in ((RIM, thick + 2 * rim), (SHIRT, thick)):
        cv2.polylines(parts, [_fixed(torso)], True, (colour,), round(FINE * width), cv2.LINE_8, SHIFT)
        cv2.fillPoly(parts, [_fixed(torso)], (colour,), cv2.LINE_8, SHIFT)
    for side, part in (("left", LEFT_ARM), ("right", RIGHT_ARM)):
        limb(part, f"{side}_shoulder", f"{side}_hand")
    for colour, radius in ((RIM, head + rim), (SKIN, head)):
        cv2.fillPoly(parts, [_fixed(at["head"] + _circle(32) * radius)], (colour,), cv2.LINE_8, SHIFT)
    for aside in (-0.4, 0.4):
        eye = at["head"] + np.array([aside, -0.1]) * head
        cv2.fillPoly(parts, [_fixed(eye + _circle(12) * max(0.6, 0.2 * head))], (EYE,), cv2.LINE_8, SHIFT)
    return Sprite.of(parts, joints)


def _pose(rng: Rng) -> Array:
    """Joints of a figure of height 1 about its middle, (K,2) x, y in the order of `KEYPOINTS`."""
    shoulder, hip = rng.uniform(0.10, 0.14), rng.uniform(0.06, 0.09)
    at = {"head": np.array([rng.uniform(-0.03, 0.03), -0.38])}
    for name, side in (("left", 1), ("right", -1)):
        raised = rng.uniform(-0.2, 2.7)  # 0: the arm hangs down, positive: away from the body
        spread = rng.uniform(-0.1, 0.7)
        bent = spread + rng.uniform(-0.8, 0.4)
        at[f"{name}_shoulder"] = np.array([side * shoulder, -0.22])
        at[f"{name}_hand"] = at[f"{name}_shoulder"] + 0.31 * np.array([side * math.sin(raised), math.cos(raised)])
        at[f"{name}_hip"] = np.array([side * hip, 0.06])
        at[f"{name}_knee"] = at[f"{name}_hip"] + 0.21 * np.array([side * math.sin(spread), math.cos(spread)])
        at[f"{name}_foot"] = at[f"{name}_knee"] + 0.21 * np.array([side * math.sin(bent), math.cos(bent)])
    lean = rng.normal(0, 0.2)
    turn = np.array([[math.cos(lean), -math.sin(lean)], [math.sin(lean), math.cos(lean)]])
    joints: Array = np.stack([at[name] for name in KEYPOINTS]) @ turn.T
    return joints


def _canvas(points: Array, pad: float) -> tuple[Array, Array]:
    """An empty map of parts around points (n,2) in px, and the (2,) x, y that moves them into it; up to 1 px more fits."""
    low = np.floor(points.min(axis=0) - pad)
    width, height = np.ceil(points.max(axis=0) + pad + 1 - low).astype(int)
    return np.zeros((height * FINE, width * FINE), np.uint8), -low


def _fixed(points: Array) -> Array:
    """Points (...,2) x, y in px -> OpenCV's fixed point numbers, in which a whole number is the middle of a (fine) pixel."""
    fixed: Array = np.round((points * FINE - 0.5) * 2**SHIFT).astype(np.int32)
    return fixed


def _shrink(fine: Array) -> Array:
    """Means over FINE x FINE blocks, float32."""
    size = (fine.shape[1] // FINE, fine.shape[0] // FINE)
    return np.asarray(cv2.resize(fine, size, interpolation=cv2.INTER_AREA), np.float32)
