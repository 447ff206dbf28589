"""Augmentation and resizing: geometry of everything annotated, published sizes, determinism."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from queryvision.data.albumentations import A
from queryvision.data.follow import select
from queryvision.data.planes import packed, unpacked
from queryvision.data.resizing import Flip, RandomCrop, ScaleJitter, ShortSide, resize_image, resized_size
from queryvision.data.sample import Annotations, Sample
from queryvision.data.skeletons import Skeleton, flip_orders
from queryvision.data.transforms import (
    PRESETS,
    EvaluationTransform,
    Transform,
    evaluation_transform,
    largest_area,
    training_transform,
)
from queryvision.errors import ConfigError

ORDERS = np.tile([1, 0, 2], (9, 1))  # the first two of three keypoints swap, in all nine classes


def sample(seed: int = 0, n: int = 4, height: int = 60, width: int = 80, everything: bool = True) -> Sample:
    """Filled rectangles with whole-pixel boxes; keypoints at their corners (left, right) and middle."""
    rng = np.random.default_rng(seed)
    low = np.stack([rng.integers(0, width - 12, n), rng.integers(0, height - 12, n)], 1)
    high = np.minimum(low + rng.integers(6, 40, (n, 2)), (width, height))
    boxes = np.concatenate([low, high], 1).astype(np.float32)
    image = rng.integers(0, 255, (height, width, 3), np.uint8)
    masks = np.zeros((n, height, width), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = 1
    keypoints = np.stack([boxes[:, :2], boxes[:, 2:] - 1, (boxes[:, :2] + boxes[:, 2:]) // 2], 1)
    keypoints = np.concatenate([keypoints, np.tile([2, 1, 0], (n, 1))[:, :, None]], 2).astype(np.float32)
    keypoints[:, 2] = 0
    found = Annotations(
        labels=rng.integers(0, 9, n),
        boxes=boxes,
        areas=masks.sum((1, 2)).astype(np.float32),
        ids=np.arange(100, 100 + n),
        masks=masks if everything else None,
        keypoints=keypoints if everything else None,
        extra={"speed": np.arange(n, dtype=np.float32)},
        has={"masks": np.ones(n, bool), "keypoints": keypoints[:, :, 2] > 0} if everything else {},
        ignore_boxes=boxes[:1] // 2,
        ignore_labels=np.array([5]),
        ignore_masks=masks[:1] if everything else None,
    )
    if n == 0:
        found.ignore_boxes, found.ignore_labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    return Sample(image, found, image_id=3, original_size=(height, width), path="x.png")


def bounds(mask: np.ndarray) -> list[int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def same(a: Sample, b: Sample) -> None:
    np.testing.assert_array_equal(a.image, b.image)
    for name in ("labels", "ids", "masks", "ignore_masks", "ignore_labels"):
        np.testing.assert_array_equal(getattr(a.annotations, name), getattr(b.annotations, name), err_msg=name)
    for name in ("boxes", "keypoints", "areas", "ignore_boxes"):
        np.testing.assert_allclose(getattr(a.annotations, name), getattr(b.annotations, name), atol=1e-3, err_msg=name)
    assert a.annotations.has.keys() == b.annotations.has.keys()
    for name, flags in a.annotations.has.items():
        np.testing.assert_array_equal(flags, b.annotations.has[name], err_msg=name)


@given(st.integers(0, 10_000), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_flipping_twice_changes_nothing(seed: int, n: int) -> None:
    flip, before = Transform([Flip(p=1)], ORDERS), sample(seed, n)
    once = flip(before, 1)
    same(before, flip(once, 2))
    np.testing.assert_array_equal(once.image, before.image[:, ::-1])
    if n:
        assert once.annotations.masks is not None and before.annotations.masks is not None
        np.testing.assert_array_equal(once.annotations.masks, before.annotations.masks[:, :, ::-1])
        np.testing.assert_allclose(once.annotations.boxes[:, 0], 80 - before.annotations.boxes[:, 2], atol=1e-4)


def test_flip_swaps_left_and_right_keypoints() -> None:
    before = sample()
    after = Transform([Flip(p=1)], ORDERS)(before, 0).annotations
    old = before.annotations.keypoints
    assert old is not None and after.keypoints is not None
    np.testing.assert_allclose(after.keypoints[:, 0, 0], 80 - old[:, 1, 0], atol=1e-4)  # the right one is now the left one
    np.testing.assert_array_equal(after.keypoints[:, :2, 2], old[:, [1, 0], 2])
    assert not after.keypoints[:, 2].any() and not after.has["keypoints"][:, 2].any()  # unlabelled stays 0, 0, 0


def test_each_object_swaps_by_its_own_class() -> None:
    person = Skeleton.from_category({"keypoints": ["left_eye", "right_eye", "nose"]})
    hand = Skeleton.from_category({"keypoints": ["wrist", "thumb"], "flip_pairs": []})
    bird = Skeleton.from_category({"keypoints": ["left_wing", "beak", "right_wing"]})
    orders, before = flip_orders([person, None, hand, bird]), sample()
    before.annotations.labels[:] = [3, 0, 2, 1]
    points = before.annotations.keypoints = np.random.default_rng(0).integers(1, 60, (4, 3, 3)).astype(np.float32)
    points[:, :, 2] = [[1, 2, 1], [2, 1, 1], [1, 2, 0], [0, 0, 0]]
    points[points[:, :, 2] == 0] = 0
    before.annotations.has["keypoints"] = points[:, :, 2] > 0
    flip = Transform([Flip(p=1)], orders)
    after = flip(before, 0)
    found = after.annotations.keypoints
    assert found is not None
    for row, order in enumerate(([2, 1, 0], [1, 0, 2], [0, 1, 2], [0, 1, 2])):
        wanted = points[row, order]
        wanted[:, 0] = np.where(wanted[:, 2] > 0, 80 - wanted[:, 0], 0)
        np.testing.assert_allclose(found[row], wanted, atol=1e-4)
    np.testing.assert_array_equal(after.annotations.has["keypoints"], found[:, :, 2] > 0)
    same(before, flip(after, 0))


def test_no_flip_while_pairs_are_unknown() -> None:
    before = sample()
    same(before, Transform([Flip(p=1)])(before, 0))
    boxes_only = sample(everything=False)
    assert (Transform([Flip(p=1)])(boxes_only, 0).image == boxes_only.image[:, ::-1]).all()
    with pytest.raises(ConfigError, match="flip_orders"):
        Transform([A.OneOf([A.HorizontalFlip(p=1)], p=1)])(before, 0)


def test_scale_jitter_has_its_canvas_where_eight_hundred_is_evaluated() -> None:
    before = sample(0, 0, height=60)
    sides = {max(training_transform("lsj", 80)(before, seed).image.shape) for seed in range(40)}
    assert max(sides) == 102  # 1024 / 800 of 80


@given(st.integers(0, 10_000), st.sampled_from(["detr", "light", "lsj", "flip", "none"]), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_everything_stays_in_step(seed: int, name: str, n: int) -> None:
    before = sample(seed, n, height=60 + seed % 50)
    transform = training_transform(name, 96, ORDERS)
    after = transform(before, seed)
    found, (height, width) = after.annotations, after.image.shape[:2]
    assert found.masks is not None and found.keypoints is not None and found.ignore_masks is not None
    count = len(found.labels)
    assert found.masks.shape == (count, height, width) and found.keypoints.shape == (count, 3, 3)
    kept = found.ids - 100
    np.testing.assert_array_equal(found.labels, before.annotations.labels[kept])
    np.testing.assert_array_equal(found.extra["speed"], kept)
    assert (found.boxes[:, :2] >= 0).all() and (found.boxes[:, 2:] <= (width, height)).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    for i in range(count):
        assert found.has["masks"][i]
        np.testing.assert_allclose(found.boxes[i], bounds(found.masks[i]), atol=2)
        sides = found.boxes[i, 2:] - found.boxes[i, :2]
        assert abs(found.areas[i] - found.masks[i].sum()) <= 2 * sides.sum() + 4  # an edge of a pixel or two
    seen = found.keypoints[:, :, 2] > 0
    np.testing.assert_array_equal(seen, found.has["keypoints"])
    corners = found.keypoints[seen][:, :2]
    assert (corners >= 0).all() and (corners <= (width, height)).all()
    # a keypoint that is still seen sits on a corner of its object's box, up to the pixel it names
    for i, k in zip(*np.nonzero(seen), strict=True):
        x, y = found.keypoints[i, k, :2]
        assert np.abs(found.boxes[i, [0, 2]] - x).min() <= 3.5 and np.abs(found.boxes[i, [1, 3]] - y).min() <= 3.5
    again = pickle.loads(pickle.dumps(transform))(before, seed)
    same(after, again)


def test_crop_drops_what_is_gone_and_follows_the_mask() -> None:
    ring = np.zeros((1, 50, 50), np.uint8)
    ring[0, 10:40, 20:24] = 1  # an L: a bar and a foot
    ring[0, 36:40, 20:40] = 1
    box = np.array([[20, 10, 40, 40]], np.float32)
    found = Annotations(
        labels=np.array([1]), boxes=box, areas=ring.sum((1, 2)).astype(np.float32), ids=np.array([1]), masks=ring,
        has={"masks": np.array([True])}, ignore_boxes=np.array([[45, 45, 50, 50]], np.float32),
        ignore_labels=np.array([0]), ignore_masks=np.zeros((1, 50, 50), np.uint8),
    )  # fmt: skip
    picture = Sample(np.zeros((50, 50, 3), np.uint8), found, 1, (50, 50))
    upper = Transform([A.Crop(0, 0, 50, 30)])(picture, 0).annotations
    np.testing.assert_array_equal(upper.boxes, [[20, 10, 24, 30]])  # not 40 wide: the foot is gone
    assert upper.areas.tolist() == [80] and len(upper.ignore_boxes) == 0
    right = Transform([A.Crop(26, 0, 50, 30)])(picture, 0).annotations
    assert len(right.labels) == 0 and right.masks is not None and right.masks.shape == (0, 30, 24)  # box left, mask gone
    without = replace(picture, annotations=replace(found, masks=None, ignore_masks=None, has={}))
    clipped = Transform([A.Crop(0, 0, 50, 25)])(without, 0).annotations
    np.testing.assert_allclose(clipped.boxes, [[20, 10, 40, 25]], atol=1e-4)
    np.testing.assert_allclose(clipped.areas, found.areas / 2, rtol=1e-4)


def published(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """The published procedure, in its own order (width, height) -> (height, width)."""
    h, w = size
    if max(w, h) / min(w, h) * short > longest:
        short = int(round(longest * min(w, h) / max(w, h)))
    if (w <= h and w == short) or (h <= w and h == short):
        return h, w
    return (int(short * h / w), short) if w < h else (short, int(short * w / h))


@given(st.integers(200, 2000), st.integers(200, 2000), st.sampled_from([480, 512, 640, 800]))
def test_sizes_are_the_published_ones(height: int, width: int, short: int) -> None:
    assert resized_size((height, width), short, 1333) == published((height, width), short, 1333)


def test_evaluation_is_the_published_resize() -> None:
    transform = evaluation_transform(800)
    assert (transform.short, transform.longest) == (800, 1333)
    assert transform.output_size((480, 640)) == (800, 1066) and transform.output_size((1000, 300)) == (1333, 400)
    before = sample(height=48, width=64)
    after = EvaluationTransform(80, 133)(before)
    assert after.image.shape[:2] == (80, 106) and after.original_size == (48, 64)
    expected = Image.fromarray(before.image).resize((106, 80), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(after.image, np.asarray(expected))
    scale = np.array([106 / 64, 80 / 48] * 2)
    np.testing.assert_allclose(after.annotations.boxes, before.annotations.boxes * scale, rtol=1e-5)
    np.testing.assert_allclose(after.annotations.areas, before.annotations.areas * scale[0] * scale[1], rtol=1e-4)
    assert after.annotations.keypoints is not None and before.annotations.keypoints is not None
    np.testing.assert_allclose(
        after.annotations.keypoints[:, :2, :2], before.annotations.keypoints[:, :2, :2] * scale[:2], rtol=1e-5
    )


def test_an_object_smaller_than_a_pixel_keeps_its_box() -> None:
    picture = sample(n=1, height=100, width=100)
    found = picture.annotations
    found.boxes[:] = [[50, 50, 51, 51]]
    assert found.masks is not None
    found.masks[:] = 0
    found.masks[0, 50, 50] = 1
    after = evaluation_transform(8)(picture).annotations
    assert len(after.boxes) == 1 and after.masks is not None
    assert after.has["masks"].tolist() == [bool(after.masks.any())]


def test_training_images_are_the_published_ones_to_a_level() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    for short in (30, 60, 61, 97, 150):
        exact = resize_image(image, resized_size((60, 80), short))
        quick = ShortSide([short]).apply(image, exact.shape[:2])
        assert quick.shape == exact.shape and np.abs(quick.astype(int) - exact).max() <= 1, short


def test_detr_draws_from_the_published_sizes() -> None:
    transform = training_transform("detr", 800)
    image = np.zeros((300, 300, 3), np.uint8)
    empty = replace(sample(n=0, everything=False), image=image)
    shorts = Counter(min(transform(empty, seed).image.shape[:2]) for seed in range(60))
    assert set(shorts) <= set(range(480, 801, 32)) and len(shorts) > 7
    shapes = [transform(empty, seed).image.shape for seed in range(60)]
    cropped = sum(shape[0] != shape[1] for shape in shapes)
    assert 15 < cropped < 45  # half of them


def test_steps_draw_independently() -> None:
    """With one seed for every step, as albumentations has it, flip and crop would always go together."""
    marker = np.zeros((64, 64, 3), np.uint8)
    marker[:, :32] = 255
    picture = replace(sample(n=0, everything=False), image=marker)
    transform = Transform([Flip(p=0.5), RandomCrop(40, 40, p=0.5)])
    seen = Counter()
    for seed in range(80):
        image = transform(picture, seed).image
        seen[(image[0, 0, 0] == 0, image.shape[0] == 40)] += 1
    assert len(seen) == 4 and min(seen.values()) > 5


def test_large_scale_jitter_crops_and_never_fills_in() -> None:
    before, sides, starts = sample(1, n=1, height=60, width=80), [], set()
    before.image[:] = np.stack(np.broadcast_arrays(np.arange(60)[:, None], np.arange(80), 200), 2)  # pixels say where they are
    for seed in range(300):
        image = Transform([ScaleJitter(100)])(before, seed).image.astype(int)
        height, width = image.shape[:2]
        assert max(height, width) <= 100 and (image[:, :, 2] == 200).all()
        scale = (width - 1) / max(1, image[0, -1, 1] - image[0, 0, 1])
        sides.append(max(height, width))
        if width == 100 and height > 60:  # what was cropped lies anywhere, and keeps its aspect
            starts.add((int(image[0, 0, 0] > 2), int(image[0, 0, 1] > 2)))
            assert abs(scale - (height - 1) / max(1, image[-1, 0, 0] - image[0, 0, 0])) < 0.2 * scale
    assert min(sides) < 20 and {10 * (side // 10) for side in sides} >= set(range(10, 101, 10))
    assert 0.4 < np.mean(np.array(sides) < 99) < 0.55  # 0.9 of the 1.9 that scales are drawn from
    assert starts == {(0, 0), (0, 1), (1, 0), (1, 1)}


@given(st.integers(0, 10_000), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_masks_in_planes_are_the_same_masks(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 2, (n, 7, 9)).astype(np.uint8)
    planes, rows = packed(masks, (7, 9)), rng.permutation(n)[: n // 2 + 1]
    assert planes.shape == (-(-n // 8), 7, 9)
    np.testing.assert_array_equal(unpacked(planes, rows), masks[rows])


def test_masks_take_little_memory() -> None:
    """What a crop leaves out is never resized, and there are no copies beside what comes out."""
    one, n = sample(0, n=1, height=200, width=300).annotations, 64
    many = replace(
        select(replace(one, keypoints=None, has={}), np.zeros(n, np.int64)),
        ids=np.arange(n), ignore_boxes=one.boxes[:0], ignore_labels=one.labels[:0], ignore_masks=one.masks[:0],
    )  # fmt: skip
    picture = Sample(np.zeros((200, 300, 3), np.uint8), many, 1, (200, 300))
    right = int(one.boxes[0, 2])
    for part, left in (((0, 0, 300, 200), n), ((right + 1, 0, 300, 200), 0)):
        transform = Transform([A.Crop(*part), ShortSide([400])])
        transform(picture, 0)
        tracemalloc.start()
        after = transform(picture, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(after.annotations.labels) == left
        assert peak < after.annotations.masks.nbytes + n / 8 * (200 * 300 + after.image[:, :, 0].size) + 4 * after.image.nbytes


def test_more_masks_than_opencv_has_channels() -> None:
    many = sample(n=600)
    after = Transform([Flip(p=1), RandomCrop(50, 50), ShortSide([40])], ORDERS)(many, 3).annotations
    assert after.masks is not None and len(after.masks) == len(after.labels) > 100


def test_global_generators_are_left_alone() -> None:
    import random

    before: tuple[Any, Any] = (random.getstate(), np.random.get_state()[1].tolist())
    training_transform("light", 64)(sample(everything=False), 1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_unknown_names_and_sizes() -> None:
    with pytest.raises(ConfigError, match="did you mean 'light'"):
        training_transform("lihgt", 800)
    with pytest.raises(ConfigError, match="image_size is 0"):
        evaluation_transform(0)


@pytest.mark.parametrize("name", PRESETS)
def test_the_largest_size_is_reached(name: str) -> None:
    """A batch size that fits was tried with images of that size."""
    before, transform = sample(0), training_transform(name, 100, ORDERS)
    sizes = {transform(before, seed).image.shape[:2] for seed in range(80)}
    largest = largest_area(name, 100, (60, 80))
    if name in ("strong", "lsj", "flip", "none"):
        assert max(h * w for h, w in sizes) == largest
    else:  # these crop, and a wide part may be longer
        assert sum(h * w <= largest for h, w in sizes) > 3 and max(min(size) for size in sizes) == 100
