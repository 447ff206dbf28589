"""Skeletons: what a class's keypoints are called, how they hang together, and how exactly each can be told.

Letters: C classes, K keypoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.errors import DataError

COCO_SIGMAS = {
    "nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072,
    "wrist": 0.062, "hip": 0.107, "knee": 0.087, "ankle": 0.089,
}  # fmt: skip
"""Falloff by name without left and right (cocodataset.org, keypoint evaluation)."""
OTHER_SIGMA = 0.07
"""Falloff of a keypoint that COCO does not know; about the mean of COCO's."""


@dataclass(frozen=True)
class Skeleton:
    """The keypoints of a class.

    Attributes:
        names: K names.
        limbs: pairs of keypoints that are connected, counted from 0.
        flip_pairs: keypoints (left, right) that change places in a mirrored image; None: not known.
        sigmas: K falloffs of the object keypoint similarity (OKS).
    """

    names: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...]
    flip_pairs: tuple[tuple[int, int], ...] | None
    sigmas: tuple[float, ...]

    def __len__(self) -> int:
        """K."""
        return len(self.names)

    @classmethod
    def from_category(cls, category: Mapping[str, Any], where: str = "categories") -> Skeleton | None:
        """Reads a COCO category: `keypoints`, `skeleton` (from 1), and beyond COCO `flip_pairs` (from 0) and `sigmas`.

        Without `flip_pairs` the names tell: `left_eye` and `right_eye` are a pair. Without `sigmas` COCO's are taken by name,
        and 0.07 for others. Limbs of keypoints that do not exist are not drawn.

        Returns:
            None where the category has no keypoints.

        Raises:
            DataError: `flip_pairs` or `sigmas` make no sense, and would teach or judge wrongly.
        """
        names = category.get("keypoints")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            return None
        count = len(names)
        limbs = tuple((a - 1, b - 1) for a, b in _pairs(category.get("skeleton")) if 0 < a <= count and 0 < b <= count)
        given, sigmas = category.get("flip_pairs"), category.get("sigmas")
        pairs = by_name(names) if given is None else tuple(_pairs(given))
        told = [index for pair in pairs or () for index in pair]
        lost = given is not None and not (isinstance(given, list) and len(given) == len(pairs or ()))
        if lost or len(set(told)) < len(told) or any(not 0 <= index < count for index in told):
            raise DataError(
                f"{where}: category '{category.get('name')}': flip_pairs {given} must be pairs of different keypoints, "
                f"counted from 0 to {count - 1}, each in one pair"
            )
        if sigmas is None:
            return cls(tuple(names), limbs, pairs, tuple(map(_sigma, names)))
        if not (
            isinstance(sigmas, list) and len(sigmas) == count and all(isinstance(s, int | float) and s > 0 for s in sigmas)
        ):
            raise DataError(f"{where}: category '{category.get('name')}': sigmas {sigmas} must be {count} numbers above 0")
        return cls(tuple(names), limbs, pairs, tuple(map(float, sigmas)))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for checkpoints and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Skeleton:
        """Inverse of `to_dict`."""
        pairs = value["flip_pairs"]
        return cls(
            tuple(value["names"]),
            tuple((int(a), int(b)) for a, b in value["limbs"]),
            None if pairs is None else tuple((int(a), int(b)) for a, b in pairs),
            tuple(map(float, value["sigmas"])),
        )


def by_name(names: Sequence[str]) -> tuple[tuple[int, int], ...] | None:
    """Flip pairs by left and right in the names.

    None where a left one lacks its right one, no name says a side, or another one may (`l_ear`).
    """
    place = {name.lower(): index for index, name in enumerate(names)}
    sides = [name for name in place if re.search("left|right", name)]
    lefts = [name for name in sides if "left" in name]
    maybe = any(re.search(r"(^|[^a-z])[lr]([^a-z]|$)", name) for name in place if name not in sides)
    if maybe or not sides or len(sides) != 2 * len(lefts) or any(name.replace("left", "right") not in place for name in lefts):
        return None
    return tuple((place[name], place[name.replace("left", "right")]) for name in lefts)


def flip_orders(skeletons: Sequence[Skeleton | None]) -> NDArray[Any] | None:
    """(C,K) int64: which keypoint stands in each one's place in a mirrored image; itself where a class has none.

    None: the pairs of a class are not known, or no class has keypoints.
    """
    if not any(skeletons):
        return None
    orders = np.tile(np.arange(max((len(s) for s in skeletons if s is not None), default=0)), (len(skeletons), 1))
    for order, skeleton in zip(orders, skeletons, strict=True):
        if skeleton is None:
            continue
        if skeleton.flip_pairs is None:
            return None
        for left, right in skeleton.flip_pairs:
            order[[left, right]] = right, left
    return orders


def _sigma(name: str) -> float:
    return COCO_SIGMAS.get(re.sub("^(left|right)[_ ]?", "", name.lower()), OTHER_SIGMA)


def _pairs(value: Any) -> list[tuple[int, int]]:
    if not isinstance(value, list):
        return []
    return [(p[0], p[1]) for p in value if isinstance(p, list) and len(p) == 2 and all(isinstance(i, int) for i in p)]
