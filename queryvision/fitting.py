"""Settings that are chosen from the data: what a configuration calls `auto`."""

from __future__ import annotations

import math

import numpy as np

from queryvision.config import Config, changed
from queryvision.data.coco import CocoDataset

AUTO = "auto"
SIDES = (192, 640)  # px; the least and the largest short side that is chosen
STUFF = 256  # px; the short side where there is nothing but stuff, whose thin parts have no size of their own
SMALL = 20  # px, what a small object should measure at the network's input: more than two cells of stride 8
QUERIES = (60, 300)  # least and most that are chosen


def fit_to_data(config: Config, data: CocoDataset) -> tuple[Config, list[str]]:
    """Fills in `data.image_size` and `model.num_queries` where they are `auto`.

    Args:
        config: not yet resolved.
        data: to train on, with at least one object.

    Returns:
        The configuration, and a line for people about each choice.
    """
    changes: dict[str, int] = {}
    lines = []
    if config.data.image_size == AUTO:
        side, small = _side(data)
        changes["data.image_size"] = side
        lines.append(f"image size {side} px" + (f" (at it, small objects measure {small:.0f} px)" if small else ""))
    if config.model.get("num_queries") == AUTO:
        changes["model.num_queries"] = _queries(data.max_objects)
        lines.append(f"{changes['model.num_queries']} queries (an image has up to {data.max_objects} objects)")
    return changed(config, changes) if changes else config, lines


def _side(data: CocoDataset) -> tuple[int, float]:
    """Short side in px, a multiple of 32, and what the smallest twentieth of the objects then measures at most.

    Stuff does not count, as it has no size of its own; where there is nothing else the second is 0.
    """
    objects = data.objects
    extent = objects.boxes[:, 2:] - objects.boxes[:, :2]
    short = np.repeat(data.sizes.min(1), np.diff(objects.offsets))
    things = ~objects.crowd & np.asarray(data.classes.things)[objects.labels]
    share = np.sqrt(extent[:, 0] * extent[:, 1])[things] / short[things]
    small = float(np.percentile(share, 5)) if things.any() else 0.0
    needed = min(max(SMALL / max(small, 1e-6), SIDES[0]), SIDES[1]) if things.any() else STUFF
    largest = max(32, 32 * math.ceil(float(np.median(data.sizes.min(1))) / 32))  # nothing is gained beyond the images' own
    side = min(32 * math.ceil(needed / 32), largest)
    return side, small * side


def _queries(most: int) -> int:
    """Half as many again as the fullest image has objects, in steps of 20."""
    return min(max(20 * math.ceil(1.5 * most / 20), QUERIES[0]), max(QUERIES[1], most))
