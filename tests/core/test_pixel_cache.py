"""Decoded images on a disk: the same pixels, also for other processes, and never stale ones."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from queryvision.config import load_config
from queryvision.data import dataset as dataset_module
from queryvision.data import pixel_cache
from queryvision.data.dataset import CocoDataset
from queryvision.data.pixel_cache import PixelCache
from queryvision.data.scenes import make_scenes
from queryvision.errors import ConfigError
from queryvision.registry import resolve_task
from queryvision.splits import open_splits


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("cached"), train=4, val=2, size=64)


def opened(scenes: Path, cache: Path | None) -> CocoDataset:
    settings = {"data.path": str(scenes), "data.cache": None if cache is None else str(cache)}
    return open_splits(load_config("instance", None, settings), resolve_task("instance"))[0]


def read_all(data: CocoDataset) -> None:
    for index in range(len(data)):
        data.read(index)


def test_an_image_is_decoded_once(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cached = opened(scenes, None), opened(scenes, tmp_path / "new" / "cache")
    read = multiprocessing.get_context("spawn").Process(target=read_all, args=(cached,))
    read.start()
    read.join(60)
    assert read.exitcode == 0
    wanted = [plain.read(index) for index in range(4)]
    monkeypatch.setattr(dataset_module, "read_image", lambda path: pytest.fail(f"{path} is decoded again"))
    for data in (cached, opened(scenes, tmp_path / "new" / "cache")):  # another process filled it; a later run finds it
        for index, sample in enumerate(wanted):
            found = data.read(index)
            assert np.array_equal(found.image, sample.image) and found.image.flags.writeable
            found.image[:] = 0  # the reader's own
            assert np.array_equal(data.read(index).image, sample.image)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    scenes = make_scenes(tmp_path / "scenes", train=2, val=1, size=64)
    data = opened(scenes, tmp_path / "cache")
    path, image = data.path(0), data.read(0).image
    Image.fromarray(255 - image).save(path)
    os.utime(path, ns=(1, 1))
    assert np.array_equal(data.read(0).image, 255 - image)
    path.unlink()
    with pytest.raises(Exception, match=path.name):
        data.read(0)


def test_processes_that_begin_at_once_share_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room is taken once, and what one of them decoded the others find."""
    reserve, reserved = pixel_cache._reserve, []

    def slow(file: Path, total: int) -> None:
        reserved.append(total)
        time.sleep(0.3)
        reserve(file, total)

    monkeypatch.setattr(pixel_cache, "_reserve", slow)
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: PixelCache(tmp_path, np.array(["a"]), np.array([[2, 3]])), range(4))
    assert len(reserved) == 1
    file = tmp_path / "a"
    file.write_bytes(b"x")
    first.put(0, file, np.full((2, 3, 3), 9, np.uint8))
    assert all((other.get(0, file) == 9).all() for other in others)


def test_data_sets_that_look_alike_have_a_file_each(tmp_path: Path) -> None:
    names, sizes = np.array(["a"]), np.array([[2, 3]])
    files = {PixelCache(tmp_path, names, sizes, tmp_path / root).file for root in ("one", "two", "two/../two")}
    assert len(files) == 2


def test_half_an_image_is_not_taken(tmp_path: Path) -> None:
    sizes = np.array([[2, 3], [4, 5]])
    cache = PixelCache(tmp_path, np.array(["a", "b"]), sizes)
    file = tmp_path / "a"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="broadcast"):
        cache.put(0, file, np.zeros((3, 3, 3), np.uint8))
    assert cache.get(0, file) is None and cache.get(1, file) is None


def test_a_disk_without_room_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache = .*GB cannot be kept there"):
        PixelCache(tmp_path, np.array(["a"]), np.array([[10**6, 10**6]]))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be kept there"):
        PixelCache(tmp_path / "file", np.array(["a"]), np.array([[1, 1]]))
