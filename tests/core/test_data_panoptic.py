"""Panoptic data: COCO-panoptic files with their PNG maps, and maps composed of instances and label maps."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from panopticapi.utils import rgb2id
from PIL import Image

from queryvision.data.check import check
from queryvision.data.coco import CocoDataset, check_same_classes, open_dataset
from queryvision.data.loader import BatchPlan, evaluation_loader, train_loader
from queryvision.data.resizing import Flip, ShortSide
from queryvision.data.scenes import make_scenes
from queryvision.data.transforms import Transform, evaluation_transform, training_transform
from queryvision.errors import DataError

CATEGORIES = [{"id": 7, "name": "cat", "isthing": 1}, {"id": 30, "name": "sky", "isthing": 0}, {"id": 3, "name": "dog"}]
CAT, SKY, CROWD, DOG = 300, 70_000, 5, 9  # segment ids


def segment(id_: Any, category: int, **changes: Any) -> dict[str, Any]:
    base = {"id": id_, "category_id": category, "iscrowd": 0}
    return {**base, **changes}


def drawn(*, first: int = CAT) -> np.ndarray:
    """30 x 40: a cat of 6 x 8 px, sky above row 12, a crowd at the right, the rest void."""
    ids = np.zeros((30, 40), np.int32)
    ids[:12] = SKY
    ids[10:16, 4:12] = first
    ids[20:25, 30:40] = CROWD
    return ids


def content() -> dict[str, Any]:
    infos = [
        segment(CAT, 7, bbox=[4, 10, 8, 6], area=48),
        segment(SKY, 30, bbox=[0, 0, 40, 12], area=464),
        segment(CROWD, 7, bbox=[30, 20, 10, 5], area=50, iscrowd=1),
    ]
    return {
        "images": [
            {"id": 10, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 5, "file_name": "b.jpg", "width": 20, "height": 50},
        ],
        "annotations": [
            {"image_id": 5, "file_name": "b.png", "segments_info": [segment(DOG, 3, bbox=[1, 2, 3, 4], area=12)]},
            {"image_id": 10, "file_name": "a.png", "segments_info": infos},
        ],
        "categories": CATEGORIES,
    }


def save_map(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)).save(path)


def write(root: Path, value: Any = None, stem: str = "panoptic_train", folder: str = "panoptic_train") -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    (root / f"annotations/{stem}.json").write_text(json.dumps(content() if value is None else value))
    dog = np.zeros((50, 20), np.int32)
    dog[2:6, 1:4] = DOG
    for name, ids in (("a", drawn()), ("b", dog)):
        save_map(root / folder / f"{name}.png", ids)
        Image.new("RGB", ids.shape[::-1], (200, 100, 50)).save(root / "images" / f"{name}.jpg")
    return root


def opened(root: Path, value: Any = None, needs: tuple[str, ...] = ("masks",), strict: bool = False) -> CocoDataset:
    return open_dataset(write(root, value), "train", needs, strict, source="panoptic")


# ------------------------------------------------------------------------------------------------ COCO-panoptic
@pytest.mark.parametrize(
    ("stem", "folder"),
    [
        ("panoptic_train", "panoptic_train"),
        ("panoptic_train2017", "panoptic_train2017"),
        ("panoptic_train2017", "annotations/panoptic_train2017"),
        ("panoptic_train2017", "panoptic_train"),
        ("panoptic_train", "panoptic_train2017"),
    ],
)
def test_segments_become_targets(tmp_path: Path, stem: str, folder: str) -> None:
    dataset = open_dataset(write(tmp_path, stem=stem, folder=folder), "train", ("masks",), strict=True, source="panoptic")
    sample = dataset.read(0)
    found = sample.annotations
    assert sample.image_id == 10 and found.ids.tolist() == [CAT, SKY]
    assert [dataset.classes.names[i] for i in found.labels] == ["cat", "sky"] and dataset.classes.things == (True, True, False)
    assert found.boxes.tolist() == [[4, 10, 12, 16], [0, 0, 40, 12]] and found.areas.tolist() == [48, 464]
    assert found.masks is not None and found.masks.dtype == np.uint8 and found.stuff.tolist() == [False, True]
    np.testing.assert_array_equal(found.masks, [drawn() == CAT, drawn() == SKY])
    assert found.ignore_boxes.tolist() == [[30, 20, 40, 25]] and found.ignore_labels.tolist() == [1]
    np.testing.assert_array_equal(found.ignore_masks, [drawn() == CROWD])
    np.testing.assert_array_equal(dataset.segment_map(0), drawn())
    assert dataset.max_objects == 2 and dataset.warning() is None and check(tmp_path).ok
    assert [c["isthing"] for c in dataset.categories] == [1, 0, 1]  # as it is by default
    assert dataset.read(1).annotations.ids.tolist() == [DOG]


def test_boxes_alone_need_no_map(tmp_path: Path) -> None:
    dataset = opened(tmp_path, needs=())
    shutil.rmtree(tmp_path / "panoptic_train")
    found = dataset.read(0).annotations
    assert found.masks is None and found.boxes.tolist() == [[4, 10, 12, 16], [0, 0, 40, 12]]


def test_boxes_and_areas_come_from_the_map_where_the_file_is_silent(tmp_path: Path) -> None:
    value = content()
    for entry in value["annotations"]:
        for info in entry["segments_info"]:
            del info["bbox"], info["area"]
    dataset = opened(tmp_path, value, strict=True)
    assert dataset.objects.boxes[:2].tolist() == [[4, 10, 12, 16], [0, 0, 40, 12]]
    assert dataset.objects.areas.tolist() == [48, 464, 50, 12]
    assert dataset.ground_truth()["annotations"][1]["segments_info"][0]["area"] == 12


@pytest.mark.parametrize("area", [0, -48, float("nan"), float("inf"), "48"])
def test_an_area_that_is_none_comes_from_the_map(tmp_path: Path, area: Any) -> None:
    value = content()
    info = value["annotations"][1]["segments_info"][0]
    info.update(area=area, bbox=[4, 10, 9, 7])
    dataset = opened(tmp_path, value, strict=True)
    assert dataset.objects.areas.tolist() == [48, 464, 50, 12]
    assert dataset.objects.boxes[0].tolist() == [4, 10, 13, 17]  # as published
    assert dataset.ground_truth()["annotations"][0]["segments_info"][0]["area"] == 48
    shutil.rmtree(tmp_path / "panoptic_train")
    (tmp_path / "panoptic_train").mkdir()
    unmeasured = open_dataset(tmp_path, "train", ("masks",), source="panoptic")
    assert unmeasured.objects.areas[0] == 63 and [p.kind for p in unmeasured.problems] == ["area replaced"]


def test_ids_may_come_again_in_another_image(tmp_path: Path) -> None:
    value = content()
    value["annotations"][0]["segments_info"][0]["id"] = CAT
    value["annotations"][1]["segments_info"].append(segment(CAT, 3, bbox=[1, 1, 2, 2], area=4))
    dataset = opened(tmp_path, value)
    assert [(p.annotation_id, p.image, p.kind) for p in dataset.problems] == [(CAT, "a.jpg", "duplicate annotation id")]
    assert dataset.objects.ids.tolist() == [CAT, SKY, CROWD, CAT]


def test_ground_truth_is_that_of_the_chosen_images(tmp_path: Path) -> None:
    value = content()
    value["annotations"][1]["segments_info"][0]["category_id"] = 99
    dataset = pickle.loads(pickle.dumps(opened(tmp_path, value).subset([0])))
    truth = dataset.ground_truth()
    assert [image["id"] for image in truth["images"]] == [10] and truth["folder"] == str(tmp_path / "panoptic_train")
    (entry,) = truth["annotations"]
    assert entry["image_id"] == 10 and entry["file_name"] == "a.png"
    assert entry["segments_info"] == [
        {"id": SKY, "category_id": 30, "area": 464, "bbox": [0, 0, 40, 12], "iscrowd": 0},
        {"id": CROWD, "category_id": 7, "area": 50, "bbox": [30, 20, 10, 5], "iscrowd": 1},
    ]
    ids = drawn()
    ids[ids == CAT] = 0  # a segment that was dropped is void
    assert truth["segments"](10).dtype == np.int32
    np.testing.assert_array_equal(truth["segments"](10), ids)
    with pytest.raises(ValueError):
        truth["segments"](5)


BAD_FILES = [
    (lambda v: v["annotations"][0].pop("segments_info"), r"annotations\[0\] has no list 'segments_info'"),
    (lambda v: v["annotations"].append("x"), r"annotations\[2\] has no list 'segments_info'"),
    (lambda v: v["annotations"][1].pop("file_name"), r"annotations\[1\] has the file_name None"),
    (lambda v: v["annotations"][1].update(file_name="../a.png"), "a name inside its folder"),
    (lambda v: v["categories"].clear(), "there is no category"),
    (lambda v: v["images"].clear(), "there is no image"),
]


@pytest.mark.parametrize(("spoil", "match"), BAD_FILES)
def test_files_that_are_no_panoptic_files(tmp_path: Path, spoil: Callable[[Any], Any], match: str) -> None:
    value = json.loads(json.dumps(content()))
    spoil(value)
    with pytest.raises(DataError, match=match) as error:
        opened(tmp_path, value)
    assert "panoptic_train.json" in str(error.value) and "\n" not in str(error.value)


BAD = [
    (lambda v: v["annotations"][1]["segments_info"][0].update(id=0), "segment id out of range"),
    (lambda v: v["annotations"][1]["segments_info"][0].update(id=256**3), "segment id out of range"),
    (lambda v: v["annotations"][1]["segments_info"][0].update(id="x"), "no integer id"),
    (lambda v: v["annotations"][1]["segments_info"].append(3), "no integer id"),
    (lambda v: v["annotations"][1]["segments_info"][0].update(category_id=8), "unknown category"),
    (lambda v: v["annotations"][1]["segments_info"][0].update(bbox=[1, 2, 3]), "malformed bbox"),
    (lambda v: v["annotations"][1]["segments_info"][0].update(bbox=[1, 2, 0, 3]), "zero width"),
    (lambda v: v["annotations"][1]["segments_info"][0].update(iscrowd=3), "malformed iscrowd"),
    (lambda v: v["annotations"][0].update(image_id=11), "unknown image"),
    (lambda v: v["annotations"].append(v["annotations"][0]), "second entry of an image"),
    (lambda v: v["images"].append({**v["images"][0], "id": 11}), "image without segments"),
]


@pytest.mark.parametrize(("spoil", "kind"), BAD)
def test_bad_segments_are_dropped_and_named(tmp_path: Path, spoil: Callable[[Any], Any], kind: str) -> None:
    value = json.loads(json.dumps(content()))
    spoil(value)
    dataset = opened(tmp_path, value)
    kinds = {problem.kind for problem in dataset.problems if not problem.kept}
    assert kinds == ({kind, "image without segments"} if kind == "unknown image" else {kind})
    assert all(str(problem).startswith(str(dataset.file)) for problem in dataset.problems)
    assert ("nothing says what is in them" if kind == "image without segments" else kind) in (dataset.warning() or "")
    assert not check(tmp_path, ("masks",), "panoptic").ok
    with pytest.raises(DataError, match="qv data check"):
        opened(tmp_path, value, strict=True)
    for index in range(len(dataset)):
        dataset.read(index)


def test_a_file_without_any_entry(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"panoptic_train\.json: no image of it has an entry"):
        opened(tmp_path, {**content(), "annotations": []})


def test_maps_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    dataset, path = opened(tmp_path), tmp_path / "panoptic_train" / "a.png"
    whole = path.read_bytes()
    spoilt: list[tuple[Callable[[], Any], str]] = [
        (lambda: path.write_bytes(whole[:60]), "cannot be read"),
        (lambda: save_map(path, drawn()[:, 1:]), r"is 39 x 30 .* says 40 x 30; a map needs the size"),
        (lambda: Image.fromarray(drawn().astype(np.uint8)).save(path), "its pixels are 'L', a panoptic map has 8-bit RGB"),
        (path.unlink, "a.png: there is no such image"),
    ]
    for spoil, match in spoilt:
        spoil()
        with pytest.raises(DataError, match=match) as error:
            dataset.read(0)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        report = check(tmp_path)
        assert [(p.image, p.kind) for p in report.problems] == [("a.jpg", "unreadable image")] and not report.ok
    batch = next(iter(train_loader(dataset, training_transform("none", 20), 3, ("masks",), BatchPlan([1, 1], 2))))
    assert len(batch.skipped) == 1 and batch.targets.image_ids == (5, 5)
    shutil.rmtree(tmp_path / "panoptic_train")
    with pytest.raises(DataError, match="the folder with its PNG files is missing; looked for .*panoptic_train2017"):
        open_dataset(tmp_path, "train", ("masks",), source="panoptic")
    assert "PNG files is missing" in check(tmp_path).lines()[0]


def test_maps_may_be_named_as_on_windows(tmp_path: Path) -> None:
    value = content()
    value["images"][0]["file_name"] = "cam\\a.jpg"
    value["annotations"][1]["file_name"] = "cam\\a.png"
    write(tmp_path, value)
    for folder, name in (("images", "a.jpg"), ("panoptic_train", "a.png")):
        (tmp_path / folder / "cam").mkdir()
        (tmp_path / folder / name).rename(tmp_path / folder / "cam" / name)
    assert open_dataset(tmp_path, "train", ("masks",), source="panoptic").read(0).annotations.ids.tolist() == [CAT, SKY]


def test_map_and_file_that_do_not_agree(tmp_path: Path) -> None:
    write(tmp_path)
    save_map(tmp_path / "panoptic_train" / "a.png", drawn(first=77))
    dataset = open_dataset(tmp_path, "train", ("masks",), source="panoptic")
    assert dataset.read(0).annotations.ids.tolist() == [SKY]  # of the cat there is no pixel
    assert (dataset.segment_map(0) == 0).sum() == (drawn() == 0).sum() + 48
    problems = check(tmp_path).problems
    assert [(p.annotation_id, p.image) for p in problems] == [(CAT, "a.jpg"), (77, "a.jpg")]
    assert "segment without a pixel in a.png" in str(problems[0]) and "unlisted segment in a.png" in str(problems[1])


def test_things_and_stuff_must_agree_between_splits(tmp_path: Path) -> None:
    train = opened(tmp_path)
    value = {**content(), "categories": [{**c, "isthing": 1} for c in CATEGORIES]}
    write(tmp_path, value, "panoptic_val", "panoptic_val")
    with pytest.raises(DataError, match=r"id 30 is 'sky' \(stuff\) in panoptic_train.json and 'sky' in panoptic_val.json"):
        check_same_classes(train, open_dataset(tmp_path, "val", source="panoptic"))


def test_each_source_finds_its_own_files(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match="but panoptic_train.json, which is for other tasks"):
        open_dataset(tmp_path, "train")
    with pytest.raises(DataError, match=r"no panoptic .* 'val'; it has the splits train\. Understood: .*panoptic_val"):
        open_dataset(tmp_path, "val", source="panoptic")
    instances = {**content(), "annotations": []}
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(instances))
    assert open_dataset(tmp_path, "train").file.name == "instances_train.json"
    assert open_dataset(tmp_path, "train", source="panoptic").file.name == "panoptic_train.json"
    assert {s.file.name for s in check(tmp_path).splits} == {"instances_train.json", "panoptic_train.json"}
    assert [s.file.name for s in check(tmp_path, ("masks",), "panoptic").splits] == ["panoptic_train.json"]


# ------------------------------------------------------------------------------------------------ what follows reading
def test_transforms_and_loaders_take_panoptic_data(tmp_path: Path) -> None:
    dataset = opened(tmp_path)
    before = dataset.read(0)
    flip = Transform([Flip(p=1)])
    once, twice = flip(before, 0), flip(flip(before, 0), 0)
    np.testing.assert_array_equal(once.annotations.masks, before.annotations.masks[:, :, ::-1])
    np.testing.assert_array_equal(once.annotations.ignore_masks, before.annotations.ignore_masks[:, :, ::-1])
    np.testing.assert_array_equal(twice.annotations.masks, before.annotations.masks)
    np.testing.assert_allclose(twice.annotations.boxes, before.annotations.boxes, atol=1e-5)
    assert twice.annotations.stuff.tolist() == [False, True]
    batches = evaluation_loader(dataset, evaluation_transform(60), len(dataset.classes), ("masks",), 1)
    targets = {batch.targets.image_ids[0]: batch.targets for batch, _ in batches}
    assert targets[10]["masks"].shape == (1, 2, 60, 80) and targets[10].num_ignored == 1
    assert targets[10].has["masks"].tolist() == [[True, True]] and targets[5]["labels"].tolist() == [[0]]
    assert targets[10]["masks"].sum().item() == 4 * (48 + 464)


def test_a_segment_without_a_pixel_is_none(tmp_path: Path) -> None:
    found = Transform([ShortSide([2])])(opened(tmp_path).read(0)).annotations
    assert found.ids.tolist() == [SKY]  # the cat fell between the pixels
    assert found.has["masks"].all() and found.stuff.tolist() == [True]


# ------------------------------------------------------------------------------------------------ composed
def square(x1: int, y1: int, x2: int, y2: int) -> list[list[int]]:
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def write_composed(
    root: Path,
    objects: list[dict[str, Any]],
    labels: np.ndarray,
    meaning: Any = None,
    names: tuple[str, str] = ("semantic",) * 2,
) -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    (root / f"{names[1]}_train").mkdir(exist_ok=True)
    size = {"width": labels.shape[1], "height": labels.shape[0]}
    rows = [{"id": i + 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9], "area": 9, **o} for i, o in enumerate(objects)]
    things = {
        "images": [{"id": 1, "file_name": "a.jpg", **size}],
        "annotations": rows,
        "categories": [{"id": 7, "name": "cat"}],
    }
    known = {"categories": [{"id": 2, "name": "sky"}, {"id": 4, "name": "grass"}, {"id": 7, "name": "cat"}], "ignore": [255, 9]}
    (root / "annotations/instances_train.json").write_text(json.dumps(things))
    (root / f"annotations/{names[0]}.json").write_text(json.dumps(known if meaning is None else meaning))
    Image.fromarray(labels).save(root / f"{names[1]}_train" / "a.png")
    Image.new("RGB", labels.shape[::-1]).save(root / "images/a.jpg")
    return root


def ground() -> np.ndarray:
    """30 x 40: sky above row 15, grass below, ignored at the right, pixels of cats in a corner."""
    labels = np.full((30, 40), 4, np.uint8)
    labels[:15] = 2
    labels[:, 38:] = 255
    labels[29, 0] = 9
    labels[25:, 30:35] = 7
    return labels


@pytest.mark.parametrize("names", [("semantic", "semantic"), ("semantic_train", "labels")])
def test_instances_lie_over_stuff_and_small_over_large(tmp_path: Path, names: tuple[str, str]) -> None:
    objects = [
        {"segmentation": square(5, 5, 10, 10)},  # 25 px, above the next though earlier in the file
        {"segmentation": square(5, 5, 20, 20)},
        {"segmentation": square(4, 4, 9, 9), "iscrowd": 1},  # of the same size, but below
        {"segmentation": square(25, 10, 27, 12)},
        {"segmentation": square(26, 10, 28, 12)},  # equal: the later one is above
    ]
    dataset = open_dataset(write_composed(tmp_path, objects, ground(), names=names), "train", ("masks",), True, "panoptic")
    ids = np.where(ground() == 2, 6, 7)  # n + 1 + class index: the classes are sky, grass, cat
    ids[(ground() == 255) | (ground() == 9) | (ground() == 7)] = 0
    ids[4:9, 4:9], ids[5:20, 5:20], ids[5:10, 5:10], ids[10:12, 25:27], ids[10:12, 26:28] = 3, 2, 1, 4, 5
    np.testing.assert_array_equal(dataset.segment_map(0), ids)
    assert dataset.classes.things == (False, False, True) and dataset.max_objects == 6
    found = dataset.read(0).annotations
    assert found.ids.tolist() == [1, 2, 4, 5, 6, 7] and found.stuff.tolist() == [False] * 4 + [True] * 2
    np.testing.assert_array_equal(found.masks, [ids == i for i in found.ids])
    np.testing.assert_array_equal(found.areas, found.masks.sum((1, 2)))
    assert found.boxes[1].tolist() == [5, 5, 20, 20] and found.ignore_boxes.tolist() == [[4, 4, 9, 9]]
    truth = dataset.ground_truth()
    np.testing.assert_array_equal(truth["segments"](1), ids)
    assert "folder" not in truth and {c["id"]: c["isthing"] for c in truth["categories"]} == {2: 0, 4: 0, 7: 1}
    assert check(tmp_path).ok and len(check(tmp_path).splits) == 2


def test_label_maps_may_be_named_as_on_windows(tmp_path: Path) -> None:
    write_composed(tmp_path, [{"segmentation": square(5, 5, 10, 10)}], ground())
    file = tmp_path / "annotations/instances_train.json"
    file.write_text(file.read_text().replace("a.jpg", r"cam\\a.jpg"))
    (tmp_path / "semantic_train/cam").mkdir()
    (tmp_path / "semantic_train/a.png").rename(tmp_path / "semantic_train/cam/a.png")
    assert len(open_dataset(tmp_path, "train", ("masks",), True, "panoptic").objects.ids) == 3


def test_composed_data_that_is_wrong(tmp_path: Path) -> None:
    objects = [{"segmentation": square(5, 5, 20, 20)}, {"segmentation": square(5, 5, 20, 20)}, {}, {"category_id": 2}]
    labels = ground()
    labels[0, 0] = 17
    dataset = open_dataset(write_composed(tmp_path, objects, labels), "train", ("masks",), source="panoptic")
    assert [(p.annotation_id, p.kind) for p in dataset.problems] == [
        (4, "unknown category"), (None, "unknown label value"), (1, "object without a pixel"), (3, "object without a pixel"),
    ]  # fmt: skip
    assert "has the values 17, neither" in str(dataset.problems[1]) and "no segmentation" in str(dataset.problems[3])
    assert dataset.segment_map(0)[0, 0] == 0
    (tmp_path / "semantic_train/a.png").unlink()
    dataset = open_dataset(tmp_path, "train", ("masks",), source="panoptic")
    assert "1 images cannot be used, their label map cannot be read" in (dataset.warning() or "")
    with pytest.raises(DataError, match=r"semantic_train/a\.png: there is no such image"):
        dataset.read(0)
    Image.new("RGB", (40, 30)).save(tmp_path / "semantic_train/a.png")
    with pytest.raises(DataError, match="a label map has 8 bits and one channel"):
        dataset.read(0)


@pytest.mark.parametrize(
    ("meaning", "match"),
    [
        ([1], "no list 'categories'"),
        ({"categories": [{"id": 300, "name": "sky"}]}, "300 is no value of a label map"),
        ({"categories": [3]}, "None is no value"),
        ({"categories": [], "ignore": "x"}, "'x' is no value"),
        ({"categories": [{"id": 7, "name": "sky"}]}, "id 7 is 'sky' here and 'cat' in instances_train.json"),
        ({"categories": [{"id": 2}]}, "needs an integer 'id' and a 'name'"),
        ({"categories": [{"id": 2, "name": "cat"}]}, "name cat occurs twice"),
    ],
)
def test_categories_that_do_not_fit_together(tmp_path: Path, meaning: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        open_dataset(write_composed(tmp_path, [], ground(), meaning), "train", ("masks",), source="panoptic")


def segments(dataset: CocoDataset, index: int) -> set[tuple[str, bytes]]:
    found = dataset.read(index).annotations
    return {(dataset.classes.names[label], mask.tobytes()) for label, mask in zip(found.labels, found.masks, strict=True)}


def test_drawn_scenes_read_both_ways_are_the_same(tmp_path: Path) -> None:
    root = make_scenes(tmp_path, train=6, val=3, size=64)
    for split in ("train", "val"):
        published = open_dataset(root, split, ("masks",), strict=True, source="panoptic")
        expected = [segments(published, i) for i in range(len(published))]
        assert published.max_objects == max(map(len, expected)) and not all(published.classes.things)
        for index in range(len(published)):
            found = published.read(index).annotations
            np.testing.assert_array_equal(found.areas, found.masks.sum((1, 2)))
            labels = np.zeros(found.masks.shape[1:], np.uint8)
            for mask, label in zip(found.masks, found.labels, strict=True):
                labels[mask > 0] = published.classes.ids[label] if not published.classes.things[label] else 255
            (root / f"semantic_{split}").mkdir(exist_ok=True)
            Image.fromarray(labels).save(root / f"semantic_{split}" / published.name(index))
        stuff = [c for c in published.categories if not c["isthing"]]
        (root / "annotations/semantic.json").write_text(json.dumps({"categories": stuff, "ignore": [0, 255]}))
        (root / f"annotations/panoptic_{split}.json").unlink()
        composed = open_dataset(root, split, ("masks",), strict=True, source="panoptic")
        assert composed.file.name == f"instances_{split}.json" and composed.classes == published.classes
        assert [segments(composed, i) for i in range(len(composed))] == expected
        assert (composed.max_objects, len(composed.objects.ids)) == (published.max_objects, len(published.objects.ids))


# ------------------------------------------------------------------------------------------------ real data
@pytest.mark.parametrize(
    ("name", "split", "images", "kept", "crowds", "things"),
    [("coco", "train", 57, 685, 3, 80), ("coco", "val", 52, 569, 3, 80), ("camvid", "val", 25, 275, 0, 0)],
)
def test_real_panoptic_data(
    real_data: Callable[[str], Path], name: str, split: str, images: int, kept: int, crowds: int, things: int
) -> None:
    root = real_data(name)
    dataset = open_dataset(root, split, ("masks",), strict=True, source="panoptic")
    assert (len(dataset), len(dataset.objects.ids), int(dataset.objects.crowd.sum())) == (images, kept, crowds)
    assert sum(dataset.classes.things) == things and dataset.warning() is None
    truth = dataset.ground_truth()
    for index in range(0, len(dataset), 8):
        found, entry = dataset.read(index).annotations, truth["annotations"][index]
        ids = rgb2id(np.asarray(Image.open(Path(truth["folder"]) / entry["file_name"]), np.uint32))
        np.testing.assert_array_equal(truth["segments"](entry["image_id"]), ids)
        np.testing.assert_array_equal(found.masks, [ids == i for i in found.ids])
        np.testing.assert_array_equal(found.areas, found.masks.sum((1, 2)))
        assert found.has["masks"].all() and (found.stuff.all() or things)
        for box, mask in zip(found.boxes, found.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (found.masks.sum(0) <= 1).all() and len(found.ids) + len(found.ignore_boxes) == len(entry["segments_info"])
