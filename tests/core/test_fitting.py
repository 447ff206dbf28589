"""What is chosen from the data: image size and number of queries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from queryvision.assembly import build_model, resolve
from queryvision.config import Config, make_config
from queryvision.data.classes import ClassMap
from queryvision.errors import ConfigError
from queryvision.fitting import fit_to_data
from queryvision.registry import resolve_task


def data(side: float, size: tuple[int, int], most: int = 5, crowd: float | None = None, thing: bool = True) -> Any:
    """Images of one size, 20 objects of one side in each; `crowd`: the side of further crowd regions."""
    extents = [side] * 20 + ([] if crowd is None else [crowd] * 20)
    boxes = np.array([[0, 0, e, e] for e in extents] * 3, np.float32)
    crowds = np.array(([False] * 20 + ([] if crowd is None else [True] * 20)) * 3)
    offsets = np.arange(4) * len(extents)
    labels = np.full(len(boxes), 0 if thing else 1)
    objects = SimpleNamespace(boxes=boxes, crowd=crowds, offsets=offsets, labels=labels)
    classes = SimpleNamespace(things=(True, False))
    return SimpleNamespace(objects=objects, classes=classes, sizes=np.array([size] * 3), max_objects=most)


def config(**data: Any) -> Config:
    return make_config({"model": {"name": "dfine_small", "num_queries": "auto"}, "data": {"image_size": "auto", **data}})


@pytest.mark.parametrize(
    ("side", "size", "wanted"),
    [
        (200, (480, 640), 192),  # large objects: the least that is chosen
        (24, (480, 640), 416),  # 20 px of 24 px, rounded up to a multiple of 32
        (5, (1000, 1500), 640),  # never more than 640
        (5, (200, 300), 224),  # nor than the images have
        (30, (64, 64), 64),
    ],
)
def test_image_size(side: float, size: tuple[int, int], wanted: int) -> None:
    chosen, lines = fit_to_data(config(), data(side, size))
    assert chosen.data.image_size == chosen.data.side == wanted
    assert f"image size {wanted} px" in lines[0]


def test_stuff_has_no_size() -> None:
    chosen, lines = fit_to_data(config(), data(5, (480, 640), thing=False))
    assert chosen.data.side == 256 and lines[0] == "image size 256 px"


def test_crowds_are_not_asked() -> None:
    assert fit_to_data(config(), data(200, (480, 640), crowd=5))[0].data.side == 192


@pytest.mark.parametrize(("most", "wanted"), [(1, 60), (40, 60), (41, 80), (100, 160), (250, 300), (900, 900)])
def test_queries(most: int, wanted: int) -> None:
    chosen, lines = fit_to_data(config(), data(200, (480, 640), most))
    assert chosen.model["num_queries"] == wanted
    assert f"{wanted} queries (an image has up to {most} objects)" in lines[1]


def test_what_is_given_stays() -> None:
    given = make_config({"model": {"name": "dfine_small", "num_queries": 7}, "data": {"image_size": 96}})
    assert fit_to_data(given, data(5, (480, 640))) == (given, [])


def test_a_configuration_with_auto_builds_and_says_what_is_missing() -> None:
    task = resolve_task("detection")
    resolved = resolve(config(), task)
    assert resolved.model["num_queries"] == "auto" and resolved.model["width"] == 128
    with pytest.raises(ConfigError, match="image-size 256"):
        print(resolved.data.side)
    classes = ClassMap((1, 2), ("a", "b"), (True, True))
    assert build_model(resolved, task, classes).num_queries == 60


def test_only_queries_can_be_auto() -> None:
    with pytest.raises(ConfigError, match="model.width"):
        resolve(make_config({"model": {"name": "dfine_small", "width": "auto"}}), resolve_task("detection"))


@pytest.mark.parametrize("side", [0, 31, "large"])
def test_a_wrong_image_size_is_named_without_the_library_s_words(side: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.image_size = {side!r}: input should be"):
        config(image_size=side)
