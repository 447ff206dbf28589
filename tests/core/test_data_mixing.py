"""Mosaic, mixup, copy-blend, zoom-out and IoU crop: everything annotated stays in step, and the step alone decides."""

from __future__ import annotations

import pickle
import random
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from queryvision import run as run_module
from queryvision.config import Config
from queryvision.data import mixing
from queryvision.data.classes import ClassMap
from queryvision.data.loader import BatchPlan, train_loader
from queryvision.data.mixing import Mixer, mixup, mosaic
from queryvision.data.phases import FirstPart, training_phases
from queryvision.data.pieces import joined
from queryvision.data.resizing import MEAN_COLOUR
from queryvision.data.sample import Annotations, Sample
from queryvision.data.transforms import Transform, strong_transform, training_transform
from queryvision.data.zooming import IoUCrop, ZoomOut
from queryvision.errors import DataError
from queryvision.structures import Batch

GROUND, PAINT, MARK = (30, 30, 60), (30, 220, 30), (255, 30, 30)
NEEDS = ("masks", "keypoints", "speed")
OPERATIONS = ("mosaic", "mixup", "copy_blend", "zoom", "crop", "strong")


def sample(
    index: int, n: int = 3, size: tuple[int, int] = (120, 160), everything: bool = True, ignored: bool = False
) -> Sample:
    """Green rectangles, 32 px or more apart, with three red marks of 9 px inside of each, where its keypoints are."""
    rng = np.random.default_rng(index)
    image = np.full((*size, 3), GROUND, np.uint8)
    cells = rng.permutation([(y, x) for y in (0, 1) for x in (0, 1)])[:n]
    low = np.array([(x * size[1] // 2 + rng.integers(0, 20), y * size[0] // 2 + rng.integers(0, 14)) for y, x in cells])
    low = low.reshape(n, 2)
    boxes = np.concatenate([low, low + rng.integers(30, 45, (n, 2))], 1)
    masks = np.zeros((n, *size), np.uint8)
    keypoints = np.zeros((n, 3, 3), np.float32)
    for mask, points, (x1, y1, x2, y2) in zip(masks, keypoints, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
        image[y1:y2, x1:x2] = PAINT
        for point, (x, y) in zip(points[:2], ((x1 + 5, y1 + 5), (x2 - 6, y2 - 6)), strict=True):
            image[y - 4 : y + 5, x - 4 : x + 5] = MARK
            point[:] = x + 0.5, y + 0.5, 2
    found = Annotations(
        labels=rng.integers(0, 3, n),
        boxes=boxes.astype(np.float32),
        areas=masks.sum((1, 2)).astype(np.float32),
        ids=100 * index + np.arange(n),
        masks=masks if everything else None,
        keypoints=keypoints if everything else None,
        extra={"speed": 100 * index + np.arange(n, dtype=np.float32)},
        has={"keypoints": keypoints[:, :, 2] > 0, "speed": np.arange(n) > 0} if everything else {},
        ignore_masks=np.zeros((0, *size), np.uint8) if everything else None,
    )
    if ignored:
        found.ignore_boxes, found.ignore_labels = np.array([[0, 0, *size[::-1]]], np.float32), np.array([index])
        found.ignore_masks = np.ones((1, *size), np.uint8) if everything else None
    return Sample(image, found, index, size, f"{index}.png")


def run(operation: str, seed: int, samples: list[Sample]) -> Sample:
    rng = np.random.default_rng(seed)
    if operation == "mosaic":
        return mosaic(iter(samples), (96, 128), rng)
    if operation in ("mixup", "copy_blend"):
        return getattr(mixing, operation)(samples[0], samples[1], rng)
    step = {"zoom": [ZoomOut(200, p=1)], "crop": [IoUCrop(p=1)]}.get(operation)
    return (Transform(step) if step else strong_transform(100, flip_orders=np.tile(np.arange(3), (3, 1))))(samples[0], seed)


def bounds(mask: np.ndarray) -> list[int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def same(a: Any, b: Any) -> bool:
    """Samples and annotations, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "__dict__"):
        return same(vars(a), vars(b))
    return bool(np.array_equal(a, b))


def equal(a: Batch, b: Batch) -> bool:
    keys = a.targets.values.keys()
    return (
        torch.equal(a.images.pixels, b.images.pixels)
        and a.skipped == b.skipped
        and all(torch.equal(a.targets[key], b.targets[key]) for key in keys)
        and all(torch.equal(a.targets.has[key], b.targets.has[key]) for key in keys)
    )


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken away from what lies below: that rule has tests of its own."""
    monkeypatch.setattr(mixing, "covered", lambda annotations, region: annotations)


# ------------------------------------------------------------------------------------------------ geometry
@pytest.mark.usefixtures("overlapping")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_boxes_masks_and_keypoints_stay_on_their_objects(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "MOST_COPIES", 1)  # a second copy may cover the first
    objects = points = cuts = 0
    for seed in range(30):
        samples = [sample(4 * seed + i, size=(120, 160) if (i + seed) % 2 else (150, 130)) for i in range(4)]
        after = run(operation, seed, samples)
        found, (height, width) = after.annotations, after.image.shape[:2]
        assert found.masks is not None and found.keypoints is not None
        assert found.masks.dtype == np.uint8 and found.masks.shape == (len(found.labels), height, width)
        assert (found.boxes >= 0).all() and (found.boxes <= [width, height, width, height]).all()
        first = len(samples[0].annotations.labels) if operation == "copy_blend" else 0  # the others may lie below
        old = {int(i): s.annotations.keypoints[row] for s in samples for row, i in enumerate(s.annotations.ids)}
        shades = after.image.astype(int)
        distorted = operation == "strong"  # colours say nothing then
        for i in range(first, len(found.labels)):
            objects += 1
            assert found.has["masks"][i] and found.extra["speed"][i] == found.ids[i]
            np.testing.assert_allclose(found.boxes[i], bounds(found.masks[i]), atol=3 if distorted else 1.5)
            assert abs(found.areas[i] - found.masks[i].sum()) <= 2 * (found.boxes[i, 2:] - found.boxes[i, :2]).sum() + 4
            if not distorted:
                inside = shades[found.masks[i] > 0]
                assert (inside[:, :2].max(1) > 90).mean() > 0.85  # green or red, not ground or filling
            for k in range(3):
                x, y, seen = found.keypoints[i, k]
                assert bool(seen) == bool(found.has["keypoints"][i, k])
                if not seen:
                    cuts += k < 2
                    assert not found.keypoints[i, k].any()
                    continue
                points += 1
                assert seen == old[int(found.ids[i])][k, 2]
                assert (found.boxes[i, :2] - 1.5 <= (x, y)).all() and ((x, y) <= found.boxes[i, 2:] + 1.5).all()
                if not distorted:
                    red, _, blue = shades[min(int(y), height - 1), min(int(x), width - 1)]
                    assert red > 105 and red > blue + 60, (seed, i, k)
    assert objects >= 20 and points >= 40
    if operation in ("mosaic", "crop"):
        assert cuts > 5
    else:
        assert operation == "strong" or not cuts


@pytest.mark.usefixtures("overlapping")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_boxes_alone(operation: str) -> None:
    """Without masks and keypoints the boxes are the same, but for objects that were cut."""
    for seed in range(10):
        with_all = run(operation, seed, [sample(i + seed) for i in range(4)])
        without = run(operation, seed, [sample(i + seed, everything=False) for i in range(4)])
        assert without.annotations.masks is None and without.annotations.keypoints is None and not without.annotations.has
        sliver = (without.annotations.boxes[:, 2:] - without.annotations.boxes[:, :2]).min(1) < 1  # its mask may be empty
        kept = np.isin(without.annotations.ids, with_all.annotations.ids)
        assert (kept | sliver).all() and without.annotations.ids[kept].tolist() == with_all.annotations.ids.tolist()
        atol = 4 if operation == "strong" else 1.5  # masks that were zoomed out are coarse
        np.testing.assert_allclose(without.annotations.boxes[kept], with_all.annotations.boxes, atol=atol)
        np.testing.assert_array_equal(without.image, with_all.image)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_images_without_objects_in_any_role(operation: str, everything: bool) -> None:
    for empty in ({0}, {1}, {1, 2, 3}, {0, 1, 2, 3}):
        samples = [sample(i, n=0 if i in empty else 2, everything=everything) for i in range(4)]
        found = run(operation, 3, samples).annotations
        origins = set((found.ids // 100).tolist())
        assert not origins & empty
        if operation in ("mixup", "copy_blend"):
            assert origins == {0, 1} - empty
        assert (found.masks is not None) == everything and found.boxes.shape == (len(found.ids), 4)


def test_mosaic_is_made_of_four_tiles_around_a_centre_that_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample(i, n=0, ignored=True) for i in range(4)]
    for seed in range(20):
        after = run("mosaic", seed, samples)
        found = after.annotations
        assert after.image.shape == (96, 128, 3) and after.image_id == 0 and after.path == "0.png"
        assert found.ignore_labels.tolist() == [0, 1, 2, 3] and found.ignore_masks is not None
        assert (found.ignore_masks.sum(0) <= 1).all()  # tiles do not overlap, and fill the rest
        filled = found.ignore_masks.sum(0) == 0
        assert (after.image[filled] == MEAN_COLOUR).all() and (after.image[~filled] == GROUND).all()
        for box, mask in zip(found.ignore_boxes, found.ignore_masks, strict=True):
            assert box.tolist() == bounds(mask)
    monkeypatch.setattr(mixing, "TILE_SCALE", (4, 4))  # nothing to fill in, so that the boxes are the tiles
    tiles = [run("mosaic", seed, samples).annotations.ignore_boxes for seed in range(40)]
    assert all(((boxes[:, 2:] - boxes[:, :2]).prod(1)).sum() == 96 * 128 for boxes in tiles)
    x, y = np.array([boxes[:, 2:].min(0) for boxes in tiles]).T
    assert 38 <= x.min() < 50 and 78 < x.max() <= 90 and 28 <= y.min() < 38 and 58 < y.max() <= 68
    assert len({tuple(boxes[0, :2] > 0) for boxes in tiles}) == 4  # the first image is in any quarter


@pytest.mark.usefixtures("overlapping")
def test_mixup_keeps_all_targets_of_both() -> None:
    for seed in range(20):
        a, b = sample(seed, ignored=True), sample(seed + 50, size=(150, 130), ignored=True)
        found = run("mixup", seed, [a, b]).annotations
        assert found.ids.tolist() == [*a.annotations.ids, *b.annotations.ids]
        np.testing.assert_array_equal(found.boxes[:3], a.annotations.boxes)
        assert found.ignore_labels.tolist() == [seed, seed + 50]
        scale = 120 / 150
        np.testing.assert_allclose(found.areas[3:], b.annotations.areas * scale**2, rtol=0.02)
        assert found.has["speed"].tolist() == [False, True, True] * 2
    assert mixup(a, a, np.random.default_rng(0)) is a  # the same targets twice would teach duplicates


def test_copy_blend_takes_objects_that_stand_alone() -> None:
    a, b = sample(1), sample(2)
    counts = {len(run("copy_blend", seed, [a, b]).annotations.labels) - 3 for seed in range(30)}
    assert counts == {1, 2, 3}
    hidden = sample(2, ignored=True)
    assert same(run("copy_blend", 0, [a, hidden]), a)  # an ignore region may show what no target names
    beside = sample(2, n=1, ignored=True)
    edge = beside.annotations.boxes[0, 0] + 0.5
    beside.annotations.boxes[0, 0] = beside.annotations.ignore_boxes[0, 2] = edge
    found = run("copy_blend", 0, [a, beside]).annotations
    assert len(found.ids) == 4 and len(found.ignore_boxes) == 0  # only the object is taken, not its pixel's neighbour
    a = sample(1, ignored=True)
    assert run("copy_blend", 0, [a, b]).annotations.ignore_labels.tolist() == [1]
    touching = sample(2, everything=False)
    touching.annotations.boxes[:] = [[0, 0, 60, 60], [10, 10, 30, 30], [100, 60, 140, 100]]
    after = [run("copy_blend", seed, [sample(1, everything=False), touching]).annotations.ids[3:] for seed in range(10)]
    assert {int(i) for ids in after for i in ids} == {202}
    plain = sample(1, n=0)
    changed = (run("copy_blend", 4, [plain, b]).image != plain.image).any(2)
    masks = run("copy_blend", 4, [plain, b]).annotations.masks
    assert masks is not None and not changed[masks.sum(0) == 0].any() and changed[masks.sum(0) > 0].mean() > 0.9


@pytest.mark.parametrize("operation", ["mosaic", "mixup", "copy_blend"])
def test_a_mixed_image_covers_what_all_of_its_parts_cover(operation: str) -> None:
    samples = [sample(i) for i in range(4)]
    assert run(operation, 1, samples).annotations.covers is None
    samples[1].annotations.covers = np.array([True, False, True, True])
    assert run(operation, 1, samples).annotations.covers.tolist() == [True, False, True, True]
    samples[0].annotations.covers = np.array([True, True, False, True])
    assert run(operation, 1, samples).annotations.covers.tolist() == [True, False, False, True]


def test_flags_that_only_one_part_has() -> None:
    a, b = sample(1, n=2), sample(2, n=1)
    del b.annotations.has["speed"], b.annotations.has["keypoints"]
    has = joined([a.annotations, b.annotations]).has
    assert has["speed"].tolist() == [False, True, True] and has["keypoints"].shape == (3, 3) and has["keypoints"][2].all()


# ------------------------------------------------------------------------------------------------ overlaps
def one_object(index: int, box: tuple[int, int, int, int], size: tuple[int, int] = (60, 80)) -> Sample:
    found = sample(index, n=1, size=size)
    x1, y1, x2, y2 = box
    found.annotations.masks[:] = 0
    found.annotations.masks[0, y1:y2, x1:x2] = 1
    found.annotations.boxes[0], found.annotations.areas[0] = box, (x2 - x1) * (y2 - y1)
    return found


@pytest.mark.parametrize("share", [0.48, 0.52])
def test_in_mixup_the_larger_share_owns_the_pixels(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "MIXUP_SHARE", (share, share))
    a, b = one_object(1, (10, 10, 40, 30)), one_object(2, (30, 5, 70, 50))
    before = a.annotations.masks.copy()
    found = run("mixup", 0, [a, b]).annotations
    assert found.ids.tolist() == [100, 200] and (found.masks.sum(0) <= 1).all()
    assert found.boxes.tolist() == ([[10, 10, 40, 30], [30, 5, 70, 50]] if share < 0.5 else [[10, 10, 30, 30], [30, 5, 70, 50]])
    assert found.areas.tolist() == ([600, 1600] if share < 0.5 else [400, 1800]) == found.masks.sum((1, 2)).tolist()
    np.testing.assert_array_equal(a.annotations.masks, before)  # what was read stays as it was
    inside = run("mixup", 0, [a, one_object(2, (15, 15, 20, 20))]).annotations
    assert inside.ids.tolist() == ([100] if share < 0.5 else [100, 200])  # of which no pixel is left, is dropped
    a.annotations.masks[:], a.annotations.has["masks"] = 0, np.array([False])
    assert run("mixup", 0, [a, b]).annotations.boxes[0].tolist() == [10, 10, 40, 30]  # without a mask nothing is known


def test_pasted_objects_own_their_pixels() -> None:
    dropped = shrunk = 0
    for seed in range(30):
        a, b = sample(seed), sample(seed + 100)
        found = run("copy_blend", seed, [a, b]).annotations
        assert (found.masks.sum(0) <= 1).all() and (found.masks > 0).any((1, 2)).all()
        for box, mask, area in zip(found.boxes, found.masks, found.areas, strict=True):
            np.testing.assert_allclose(box, bounds(mask), atol=1)
            assert abs(area - mask.sum()) <= 0.1 * mask.sum() + 12
        old = [i for i in found.ids.tolist() if i in a.annotations.ids]
        dropped += 3 - len(old)
        shrunk += int(found.areas[: len(old)].sum() < 0.95 * a.annotations.areas[old - a.annotations.ids[0]].sum())
    assert dropped and shrunk


def panoptic(index: int) -> Sample:
    """Ground (class 2) and sky (class 1) behind two things (class 0)."""
    found = sample(index, n=2)
    things = found.annotations.masks.any(0)
    sky = np.arange(things.shape[0])[:, None] < 50 + 0 * things
    masks = np.stack([*found.annotations.masks, sky & ~things, ~sky & ~things]).astype(np.uint8)
    boxes = np.array([bounds(mask) for mask in masks], np.float32)
    annotations = Annotations(
        labels=np.array([0, 0, 1, 2]), boxes=boxes, areas=masks.sum((1, 2)).astype(np.float32), ids=100 * index + np.arange(4),
        masks=masks, ignore_masks=masks[:0], has={"masks": np.ones(4, bool)}, stuff=np.array([False, False, True, True]),
    )  # fmt: skip
    return Sample(found.image, annotations, index, found.original_size)


@pytest.mark.parametrize("operation", [*OPERATIONS, "lsj"])
def test_panoptic_images_stay_panoptic(operation: str) -> None:
    for seed in range(15):
        samples = [panoptic(seed + i) for i in range(4)]
        after = training_transform("lsj", 90)(samples[0], seed) if operation == "lsj" else run(operation, seed, samples)
        found = after.annotations
        assert (found.masks.sum(0) <= 1).all() and found.masks.any((1, 2)).all() and found.has["masks"].all()
        assert found.stuff.tolist() == (found.labels > 0).tolist()
        assert len(set(found.labels[found.stuff])) == found.stuff.sum()  # one segment of a kind of stuff
        for box, mask, area in zip(found.boxes, found.masks, found.areas, strict=True):
            sides = box[2:] - box[:2]
            np.testing.assert_allclose(box, bounds(mask), atol=3)
            assert abs(area - mask.sum()) <= 2 * sides.sum() + 0.1 * mask.sum() + 4
        if operation in ("mixup", "copy_blend", "crop"):
            assert (found.masks.sum(0) == 1).all()  # each pixel has an owner still
        if operation == "copy_blend":
            old = samples[0].annotations
            for id_, mask in zip(found.ids[found.stuff], found.masks[found.stuff], strict=True):
                assert id_ in old.ids and (mask <= old.masks[id_ - old.ids[0]]).all()  # stuff is never pasted


# ------------------------------------------------------------------------------------------------ steps of `strong`
def located(size: tuple[int, int]) -> np.ndarray:
    """An image whose pixels say where they are."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack([y, x, y * 0], 2).astype(np.uint8)


@pytest.mark.parametrize("least", [0.0, 0.3, 0.5, 0.7])
def test_iou_crop_keeps_its_promise(least: float) -> None:
    crop, partial = Transform([IoUCrop([least], p=1)]), 0
    for seed in range(40):
        before = sample(seed, n=1, everything=False)
        before.annotations.boxes[0] = [10, 10, 110, 90]
        before.image[:] = located((120, 160))
        image = crop(before, seed).image
        (y1, x1), (y2, x2) = image[0, 0, :2].astype(int), image[-1, -1, :2].astype(int) + 1
        if (y1, x1, y2, x2) == (0, 0, 120, 160):
            continue
        partial += 1
        assert 0.5 <= (x2 - x1) / (y2 - y1) <= 2 and x2 - x1 >= 47 and y2 - y1 >= 35
        assert x1 < 60 < x2 and y1 < 50 < y2
        common = (min(x2, 110) - max(x1, 10)) * (min(y2, 90) - max(y1, 10))
        assert common / ((x2 - x1) * (y2 - y1) + 8000 - common) >= least
    assert partial > 20
    empty = sample(0, n=0, everything=False)
    assert any(crop(empty, seed).image.shape != empty.image.shape for seed in range(5))


def test_iou_crop_may_leave_the_image() -> None:
    before = sample(1)
    assert same(Transform([IoUCrop([1.0], p=1)])(before, 0).image, before.image)
    small = sample(1, n=1, everything=False)
    small.annotations.boxes[0] = [10, 10, 12, 12]  # no part of the image has such an IoU with it
    assert same(Transform([IoUCrop([0.9], p=1)])(small, 0).image, small.image)


def test_zoom_out_is_bounded_and_filled() -> None:
    before = sample(1, n=0)
    sizes = [Transform([ZoomOut(200, p=1)])(before, seed).image for seed in range(40)]
    assert max(min(image.shape[:2]) for image in sizes) == 200 and min(min(image.shape[:2]) for image in sizes) < 190
    shares = [(image == GROUND).all(2).mean() for image in sizes]
    assert min(shares) < 0.1 and max(shares) > 0.5
    assert all(((image == GROUND).all(2) | (image == MEAN_COLOUR).all(2)).all() for image in sizes)


def test_strong_images_are_no_larger_than_others() -> None:
    strong, plain = strong_transform(100), training_transform("none", 125)  # the largest of its scales
    before = sample(1)
    most = plain(before, 0).image.shape
    sizes = {strong(before, seed).image.shape[:2] for seed in range(200)}
    assert all(h <= most[0] and w <= most[1] for h, w in sizes) and len(sizes) > 20
    assert max(h for h, _ in sizes) == most[0] and max(w for _, w in sizes) == most[1]
    colours = {tuple(strong(sample(1, n=0), seed).image[0, 0]) for seed in range(30)}
    assert len(colours) > 5 and GROUND in colours


# ------------------------------------------------------------------------------------------------ mixer and phases
class Painted:
    """A data set in memory; some of its images cannot be read."""

    def __init__(self, count: int = 9, broken: tuple[int, ...] = ()) -> None:
        self.broken, self.asked = broken, list[int]()
        self.image_ids = np.arange(count)
        self.sizes = np.array([(120, 160) if i % 3 else (160, 120) for i in range(count)])

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, index: int) -> Sample:
        self.asked.append(index)
        if index in self.broken:
            raise DataError(f"{index}.png: broken")
        return sample(index, index % 4, tuple(self.sizes[index]))

    def batches(self, phases: tuple[Any, FirstPart | None], start: int = 0, count: int = 8, workers: int = 0) -> list[Batch]:
        plan = BatchPlan(self.sizes[:, 1] / self.sizes[:, 0], 2, seed=5)
        loader = train_loader(self, phases[0], 3, NEEDS, plan, start, workers, first_part=phases[1])
        return list(islice(loader, count))


def test_the_seed_decides_alone() -> None:
    mixer, data = Mixer(64, 107, 0.5, 0.5, 0.5), Painted()
    before = (random.getstate(), np.random.get_state()[1].tolist())
    made = [mixer(index, seed, data.read, 9) for index in (1, 2) for seed in range(20)]
    again = [pickle.loads(pickle.dumps(mixer))(index, seed, data.read, 9) for index in (1, 2) for seed in range(20)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert all(same(a, b) and tiled is also for (a, tiled), (b, also) in zip(made, again, strict=True))
    assert not any(same(made[i][0], made[i + 1][0]) and made[i][1] for i in range(19))
    assert 10 < sum(tiled for _, tiled in made) < 30
    assert {made[i][0].image_id for i in range(20)} == {1}


def test_others_are_drawn_from_all_images_and_never_the_image_itself() -> None:
    data = Painted()
    for seed in range(40):
        Mixer(64, 107, mosaic=1.0)(4, seed, data.read, 9)
    asked = np.array(data.asked).reshape(40, 4)
    assert (asked[:, 0] == 4).all() and 4 not in asked[:, 1:] and set(asked[:, 1:].ravel()) == set(range(9)) - {4}
    lonely = Painted(1)
    for settings in ({"mosaic": 1.0}, {"mixup": 1.0}, {"copy_blend": 1.0}):
        Mixer(64, 107, **settings)(0, 0, lonely.read, 1)


def test_the_step_decides_which_phase_it_is() -> None:
    data, later = Painted(broken=(4,)), training_transform("flip", 64)
    phases = training_phases("strong", 64, 3, mosaic=0.5, mixup=0.5, copy_blend=0.5)
    here, plain = data.batches(phases), data.batches((later, None))
    assert [equal(a, b) for a, b in zip(here, plain, strict=True)] == [False] * 3 + [True] * 5
    alone = data.batches(training_phases("strong", 64, 3))  # without mixing there are the same two phases
    assert [equal(a, b) for a, b in zip(alone, plain, strict=True)] == [False] * 3 + [True] * 5
    assert sum(sum(b.targets.counts) for b in here[:3]) > sum(sum(b.targets.counts) for b in plain[:3])
    for start, workers in ((0, 2), (1, 0), (2, 2), (3, 0), (5, 0)):
        resumed = data.batches(phases, start, 8 - start, workers)
        assert all(equal(a, b) for a, b in zip(here[start:], resumed, strict=True)), (start, workers)


@pytest.mark.parametrize("name", ["light", "detr", "none"])
def test_probabilities_of_zero_change_nothing(name: str) -> None:
    data, transform = Painted(), training_transform(name, 64)
    wanted = data.batches((transform, None))
    off = training_phases(name, 64, 10**6)
    assert off[1] is None
    silent = FirstPart(10**6, Mixer(64, 107), transform, transform)
    ended = training_phases(name, 64, 0, mosaic=1.0)
    for phases in (off, (transform, silent), ended):
        assert all(equal(a, b) for a, b in zip(data.batches(phases), wanted, strict=True))
    assert not equal(data.batches(training_phases(name, 64, 1, mosaic=1.0), count=1)[0], wanted[0])


def test_mosaics_are_neither_zoomed_out_nor_cropped_again() -> None:
    data = Painted()
    _, first = training_phases("strong", 100, 1, mosaic=1.0)
    assert first is not None
    shapes = {first(1, seed, seed, data.read, 9).image.shape[:2] for seed in range(100)}
    assert {round(w / h, 1) for h, w in shapes} == {1.3}, "the image's own aspect"
    assert {5 * round(h / 5) for h, _ in shapes} == set(range(75, 126, 5)), "0.75 to 1.25 times the image size, as published"


def test_unreadable_others_are_replaced_and_named() -> None:
    data = Painted(broken=(4,))
    batches = data.batches(training_phases("light", 64, 100, mosaic=1.0), count=4)
    assert sum((batch.skipped for batch in batches), ()).count("4.png: broken") > 2
    with pytest.raises(DataError, match="3 images in a row cannot be read, the last: .*broken"):
        Painted(3, broken=(0, 1, 2)).batches(training_phases("light", 64, 100, mosaic=1.0))


def test_a_run_counts_batches_to_the_end_of_the_first_part(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(run_module, "train_loader", lambda *arguments: given.append(arguments) or [])
    config = Config.model_validate({"data": {"mixup": 0.25, "strong_until": 0.5}, "train": {"steps": 11, "accumulate": 3}})
    run = SimpleNamespace(
        config=config, steps=11, accelerator=SimpleNamespace(device=torch.device("cpu")), train_data=None,
        classes=ClassMap((), (), ()),
        task=SimpleNamespace(needs=()), plan=None,
    )  # fmt: skip
    run_module.Run._batches(run, 0)  # type: ignore[arg-type]
    first = given[0][-2]
    assert isinstance(first, FirstPart) and first.until == 18  # 5.5 steps, to the even number, of three batches each
    assert first.mixer == Mixer(128, 213, mixup=0.25)
