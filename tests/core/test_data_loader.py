"""Batches: padding, the plan of an epoch, and loaders that do not depend on their workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from queryvision.data.loader import BatchPlan, collate, evaluation_loader, train_loader
from queryvision.data.sample import Annotations, Sample
from queryvision.data.transforms import evaluation_transform, training_transform
from queryvision.errors import DataError
from queryvision.structures import Batch

NEEDS = ("masks", "keypoints", "speed")


def sample(index: int, n: int, height: int = 40, width: int = 60) -> Sample:
    rng = np.random.default_rng(index)
    low = rng.uniform(0, 20, (n, 2))
    masks = np.zeros((n, height, width), np.uint8)
    masks[:, 5:20, 5:20] = 1
    keypoints = np.tile([[10, 20, 2], [0, 0, 0]], (n, 1, 1)).astype(np.float32)
    found = Annotations(
        labels=rng.integers(0, 3, n),
        boxes=np.concatenate([low, low + rng.uniform(5, 15, (n, 2))], 1).astype(np.float32),
        areas=np.full(n, 225, np.float32),
        ids=np.arange(n) + 100 * index,
        masks=masks,
        keypoints=keypoints,
        extra={"speed": np.arange(n, dtype=np.float32)},
        has={"keypoints": keypoints[:, :, 2] > 0, "speed": np.arange(n) > 0},
        ignore_masks=np.zeros((0, height, width), np.uint8),
    )
    return Sample(rng.integers(0, 255, (height, width, 3), np.uint8), found, index, (height, width), f"{index}.png")


class Painted:
    """A data set in memory; some of its images cannot be read."""

    def __init__(self, count: int = 11, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken
        self.image_ids = np.arange(count)
        self.sizes = np.array([(40, 60) if i % 3 else (60, 40) for i in range(count)])

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, index: int) -> Sample:
        if index in self.broken:
            raise DataError(f"{index}.png: broken")
        return sample(index, index % 4, *self.sizes[index])

    def plan(self, batch_size: int = 2, **settings: int) -> BatchPlan:
        return BatchPlan(self.sizes[:, 1] / self.sizes[:, 0], batch_size, seed=5, **settings)


def equal(a: Batch, b: Batch) -> bool:
    keys = a.targets.values.keys()
    return (
        torch.equal(a.images.pixels, b.images.pixels)
        and a.targets.image_ids == b.targets.image_ids
        and a.skipped == b.skipped
        and all(torch.equal(a.targets[key], b.targets[key]) for key in keys)
    )


# ------------------------------------------------------------------------------------------------ collate
def test_collate_pads_at_the_right_and_the_bottom() -> None:
    a, b = sample(1, 3), sample(2, 1, height=50, width=30)
    batch = collate([a, b], 3, NEEDS, ["x.png: broken"])
    images, targets = batch.images, batch.targets
    assert images.pixels.shape == (2, 3, 50, 60) and images.pixels.dtype == torch.uint8 and images.padded
    assert images.sizes.tolist() == [[40, 60], [50, 30]] and batch.skipped == ("x.png: broken",)
    np.testing.assert_array_equal(images.pixels[1, :, :50, :30].permute(1, 2, 0), b.image)
    assert not images.pixels[1, :, :, 30:].any() and not images.pixels[0, :, 40:].any()
    assert images.padding[1, :, 30:].all() and not images.padding[1, :, :30].any() and images.padding.sum() == 10 * 60 + 50 * 30
    assert targets.counts == (3, 1) and targets.valid.tolist() == [[True] * 3, [True, False, False]]
    x1, y1, x2, y2 = b.annotations.boxes[0]
    wanted = torch.tensor([(x1 + x2) / 60, (y1 + y2) / 100, (x2 - x1) / 30, (y2 - y1) / 50], dtype=torch.float32)
    torch.testing.assert_close(targets["boxes"][1, 0], wanted)
    assert not targets["boxes"][1, 1:].any() and targets["labels"].dtype == torch.int64
    assert targets["masks"].shape == (2, 3, 50, 60) and targets["masks"].sum().item() == 4 * 225
    torch.testing.assert_close(targets["keypoints"][1, 0], torch.tensor([[10 / 30, 20 / 50, 2], [0, 0, 0]]))
    assert targets["speed"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert targets.has["keypoints"].shape == (2, 3, 2) and targets.has["keypoints"].sum() == 4
    assert targets.has["boxes"].tolist() == targets.valid.tolist()
    assert targets.num_with == {
        "labels": (3, 1),
        "boxes": (3, 1),
        "areas": (3, 1),
        "masks": (3, 1),
        "keypoints": (3, 1),
        "speed": (2, 0),
    }
    assert targets.covers.tolist() == [[True] * 3] * 2 and targets.covers_all and targets.num_ignored == 0


def test_sides_that_are_multiples_only_add_padding() -> None:
    samples = [sample(1, 3), sample(2, 1, height=50, width=30)]
    usual, even = (collate(samples, 3, NEEDS, multiple=multiple) for multiple in (1, 32))
    assert even.images.pixels.shape == (2, 3, 64, 64) and even.images.padded
    assert torch.equal(even.images.pixels[:, :, :50, :60], usual.images.pixels) and even.images.pixels[:, :, 50:].sum() == 0
    assert torch.equal(even.images.padding[:, :50, :60], usual.images.padding)
    assert even.images.padding[:, 50:].all() and even.images.padding[:, :, 60:].all()
    assert torch.equal(even.images.sizes, usual.images.sizes)
    assert all(torch.equal(even.targets[key], usual.targets[key]) for key in ("boxes", "keypoints", "areas"))
    assert torch.equal(even.targets["masks"][..., :50, :60], usual.targets["masks"])
    assert not collate([sample(1, 1, 32, 64)], 3, NEEDS, multiple=32).images.padded


def test_collate_without_any_object() -> None:
    targets = collate([sample(1, 0), sample(2, 0)], 3, NEEDS).targets
    shapes = {
        "labels": (2, 0),
        "boxes": (2, 0, 4),
        "areas": (2, 0),
        "masks": (2, 0, 40, 60),
        "keypoints": (2, 0, 2, 3),
        "speed": (2, 0),
    }
    assert {name: tuple(value.shape) for name, value in targets.values.items()} == shapes
    assert targets.num_with["keypoints"] == (0, 0) and targets.ignore_boxes.shape == (2, 0, 4) and targets.valid.shape == (2, 0)
    assert not collate([sample(1, 0), sample(2, 0)], 3, ()).images.padded


def test_collate_keeps_ignore_regions_and_cover() -> None:
    a, b = sample(1, 1), sample(2, 2)
    a.annotations.ignore_boxes = np.array([[0, 0, 30, 20]], np.float32)
    b.annotations.covers = np.array([True, False, True])
    targets = collate([a, b], 3, ()).targets
    assert targets.num_ignored == 1 and targets.ignore_boxes.tolist() == [[[0.25, 0.25, 0.5, 0.5]], [[0, 0, 0, 0]]]
    assert targets.covers.tolist() == [[True] * 3, [True, False, True]] and not targets.covers_all


def test_collate_names_a_label_out_of_range() -> None:
    bad = sample(4, 2)
    bad.annotations.labels[1] = 3
    with pytest.raises(DataError, match=r"4.png: annotation 401 has class index 3, the model has 3 classes"):
        collate([sample(1, 1), bad], 3, ())
    with pytest.raises(ValueError, match="no 'depth'"):
        collate([sample(1, 1)], 3, ("depth",))


def test_pinning_reaches_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory needs a GPU; here it is only counted what would be moved there."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = collate([sample(1, 3)], 3, NEEDS)
    assert equal(batch, batch.pin_memory())
    targets = batch.targets
    wanted = [batch.images.pixels, batch.images.padding, targets.valid, targets.covers, targets.ignore_boxes]
    wanted += [*targets.values.values(), *targets.has.values()]
    assert {id(tensor) for tensor in wanted} <= {id(tensor) for tensor in pinned}


# ------------------------------------------------------------------------------------------------ plan
@given(
    wide=st.integers(0, 9), tall=st.integers(0, 9), size=st.integers(1, 5), world=st.integers(1, 3), group=st.booleans(),
    step=st.integers(0, 40),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_image_once_an_epoch(wide: int, tall: int, size: int, world: int, group: bool, step: int) -> None:
    aspects = [1.5] * wide + [0.5] * tall
    if not aspects:
        with pytest.raises(ValueError):
            BatchPlan(aspects, size)
        return
    plans = [BatchPlan(aspects, size, 3, group, rank, world) for rank in range(world)]
    steps = plans[0].steps_per_epoch
    epoch = plans[0].epoch_of(step)
    items = [plan.batch(s) for s in range(epoch * steps, (epoch + 1) * steps) for plan in plans]
    assert all(len(batch) == size for batch in items)
    seen = [index for batch in items for index, _ in batch]
    assert set(seen) == set(range(wide + tall))
    assert len(seen) - len(set(seen)) < size * world * (2 if group else 1)  # no more repeats than gaps at the end
    seeds = [seed for batch in items for _, seed in batch]
    assert len(set(seeds)) == len(seeds)  # a repeated image is augmented anew
    late = BatchPlan(aspects, size, 3, group, 0, world)
    assert late.batch(step) == plans[0].batch(step)  # no history


def test_plan_groups_by_aspect_and_shuffles() -> None:
    aspects = [1.5 if i % 2 else 0.5 for i in range(64)]
    plan = BatchPlan(aspects, 4, seed=1)
    epochs = [[plan.batch(s) for s in range(e * 16, e * 16 + 16)] for e in range(2)]
    for batches in epochs:
        assert all(len({index % 2 for index, _ in batch}) == 1 for batch in batches)
        kinds = [batch[0][0] % 2 for batch in batches]
        assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)
    first, second = ([index for batch in batches for index, _ in batch] for batches in epochs)
    assert first != second and sorted(first) == sorted(second) == list(range(64))
    seeds = [dict(pair for batch in batches for pair in batch) for batches in epochs]
    assert all(seeds[0][i] != seeds[1][i] for i in range(64))
    assert BatchPlan(aspects, 4, seed=2).batch(0) != plan.batch(0)


def test_a_batch_holds_similar_shapes_of_one_scale() -> None:
    aspects = np.random.default_rng(0).uniform(1, 2, 400)
    plan = BatchPlan(aspects, 4, seed=1)
    spread = [float(np.ptp(aspects[[index for index, _ in plan.batch(step)]])) for step in range(plan.steps_per_epoch)]
    assert np.median(spread) < 0.15  # 0.6 where four are drawn at random
    data, shorts = Painted(), set()
    for batch, _ in zip(train_loader(data, training_transform("light", 64), 3, (), data.plan(4)), range(24), strict=False):
        sides = [min(size) for size in batch.images.sizes.tolist()]
        assert max(sides) - min(sides) <= 3  # where the long side is capped
        shorts.add(max(sides))
    assert shorts == {51, 54, 58, 61, 64}
    shared = [BatchPlan(aspects, 4, seed=1, rank=rank, world=2).shared(7) for rank in range(2)]
    assert shared == [plan.shared(7)] * 2 and plan.shared(8) != shared[0]


def test_ranks_share_what_one_device_would_take() -> None:
    aspects = [1.5] * 13 + [0.5] * 5
    alone = BatchPlan(aspects, 6, seed=1)
    ranks = [BatchPlan(aspects, 2, seed=1, rank=rank, world=3) for rank in range(3)]
    for step in range(12):
        assert [pair for plan in ranks for pair in plan.batch(step)] == alone.batch(step)


# ------------------------------------------------------------------------------------------------ loaders
def test_training_batches_depend_on_neither_workers_nor_start() -> None:
    data, transform = Painted(broken=(4,)), training_transform("light", 48)
    plan = data.plan()

    def run(workers: int, start: int, count: int) -> list[Batch]:
        return list(islice(train_loader(data, transform, 3, NEEDS, plan, start, workers), count))

    state = torch.get_rng_state()
    here, there, late = run(0, 0, 9), run(2, 0, 9), run(2, 5, 4)
    assert torch.equal(torch.get_rng_state(), state)  # whoever resumes finds the global generator untouched
    assert all(equal(a, b) for a, b in zip(here, there, strict=True))
    assert all(equal(a, b) for a, b in zip(here[5:], late, strict=True))
    assert not equal(here[0], here[1])
    epoch = here[: plan.steps_per_epoch]
    assert sum((batch.skipped for batch in epoch), ()).count("4.png: broken") >= 1
    assert not any(4 in batch.targets.image_ids for batch in here)


def test_unreadable_data_sets_end_training_with_one_line() -> None:
    for workers in (0, 1):
        data = Painted(3, broken=(0, 1, 2))
        with pytest.raises(DataError, match="3 images in a row cannot be read, the last: .*broken") as error:
            next(iter(train_loader(data, training_transform("none", 32), 3, (), data.plan(), workers=workers)))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_and_never_pads(workers: int) -> None:
    data, transform = Painted(), evaluation_transform(32)
    seen = []
    for rank in range(2):
        loader = evaluation_loader(data, transform, 3, ("masks",), 3, workers, rank, world=2)
        for _ in range(2):  # it can be iterated again
            batches = list(loader)
            assert len(batches) == len(loader)
        for batch, infos in batches:
            assert not batch.images.padded and not batch.images.padding.any() and len(infos) <= 3
            assert tuple(info.image_id for info in infos) == batch.targets.image_ids
            seen += [(info.image_id, info.size, info.path) for info in infos]
    assert sorted(seen) == [(i, tuple(data.sizes[i]), f"{i}.png") for i in range(11)]


def test_workers_stay_for_the_next_evaluation() -> None:
    loader = evaluation_loader(Painted(), evaluation_transform(32), 3, (), 3, 2)
    pids = []
    for _ in range(2):
        assert list(loader)
        pids.append([worker.pid for worker in loader.loader._iterator._workers])
    assert pids[0] == pids[1]
    os.kill(pids[0][1], signal.SIGKILL)  # as a machine does that needs memory
    loader.loader._iterator._workers[1].join()
    assert len(list(loader)) == len(loader), "one that is gone is not missed"


def test_a_worker_may_die_while_it_hands_over_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then its socket is gone, before anybody knows of it."""
    loader = evaluation_loader(Painted(), evaluation_transform(32), 3, (), 3, 1)
    items = iter(loader)
    next(items)
    waiting = loader.loader._iterator

    def lost(*_: object) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(type(waiting), "_try_get_data", lost)
    os.kill(waiting._workers[0].pid, signal.SIGKILL)
    waiting._workers[0].join()
    with pytest.raises(DataError, match="a process that reads images died"):
        next(items)


def test_evaluation_refuses_unreadable_images() -> None:
    with pytest.raises(DataError, match="^4.png: broken$"):
        list(evaluation_loader(Painted(broken=(4,)), evaluation_transform(32), 3, (), 3, workers=1))


def test_what_goes_wrong_in_a_worker_is_not_taken_for_its_death() -> None:
    def wrong(*_: object) -> Sample:
        raise RuntimeError("a bug")

    loader = train_loader(Painted(), wrong, 3, (), Painted().plan(), workers=1)
    with pytest.raises(RuntimeError, match="a bug"):
        next(iter(loader))


def test_a_process_ends_with_its_workers_alive() -> None:
    """They ignore SIGTERM, by which `multiprocessing` would end them before it waits for them."""
    code = "from test_data_loader import *; Loop = train_loader(Painted(), training_transform('none', 32), 3, (), " \
           "Painted().plan(), workers=2); loop = iter(Loop); next(loop)"  # fmt: skip
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": folders}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)
