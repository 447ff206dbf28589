"""Reading COCO data sets: layouts, checks, annotation fields, broken images."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from queryvision.data.check import check
from queryvision.data.coco import CocoDataset, check_same_classes, open_dataset
from queryvision.data.images import read_image
from queryvision.data.view import view
from queryvision.errors import DataError
from queryvision.evaluation import evaluate

CATEGORIES = [{"id": 7, "name": "cat", "keypoints": ["head", "tail"]}, {"id": 3, "name": "dog"}]


def annotation(id_: Any = 1, **changes: Any) -> dict[str, Any]:
    base = {"id": id_, "image_id": 10, "category_id": 7, "bbox": [2, 3, 10, 8], "area": 50.0, "iscrowd": 0}
    return {key: value for key, value in {**base, **changes}.items() if value != "absent"}


def coco(annotations: list[Any] | None = None, categories: list[Any] | None = None) -> dict[str, Any]:
    images = [
        {"id": 10, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 5, "file_name": "b.png", "width": 20, "height": 50},
    ]
    return {
        "images": images,
        "annotations": [annotation()] if annotations is None else annotations,
        "categories": CATEGORIES if categories is None else categories,
    }


def write(root: Path, content: Any, file: str = "annotations/instances_train.json", images: str = "images") -> Path:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / images).mkdir(parents=True, exist_ok=True)
    (root / file).write_text(content if isinstance(content, str) else json.dumps(content))
    for name, size in (("a.png", (40, 30)), ("b.png", (20, 50))):
        Image.new("RGB", size, (200, 100, 50)).save(root / images / name)
    return root


def opened(root: Path, *annotations: Any, needs: tuple[str, ...] = (), strict: bool = False) -> CocoDataset:
    return open_dataset(write(root, coco(list(annotations))), "train", ("labels", "boxes", *needs), strict)


LAYOUTS = [
    ("annotations/instances_train.json", "images", "train"),
    ("annotations/instances_train.json", "images/train", "train"),
    ("annotations/instances_train.json", "train", "train"),
    ("annotations/instances_train.json", ".", "train"),
    ("annotations/instances_train2017.json", "train2017", "train"),
    ("annotations/instances_val2017.json", "images/val2017", "val"),
    ("annotations/instances_val2014.json", "val2014", "val"),
    ("train/_annotations.coco.json", "train", "train"),
    ("valid/_annotations.coco.json", "valid", "val"),
    ("val/_annotations.coco.json", "val", "val"),
]


@pytest.mark.parametrize(("file", "images", "split"), LAYOUTS)
def test_every_layout_is_found(tmp_path: Path, file: str, images: str, split: str) -> None:
    dataset = open_dataset(write(tmp_path, coco(), file, images), split)
    sample = dataset.read(0)
    assert sample.path.endswith("a.png") and sample.image.shape == (30, 40, 3)
    assert (sample.image[0, 0] == (200, 100, 50)).all()
    assert sample.annotations.labels.tolist() == [1]  # id 7 is the second of the ascending ids 3, 7
    np.testing.assert_array_equal(sample.annotations.boxes, [[2, 3, 12, 11]])
    assert len(dataset.read(1).annotations.labels) == 0  # an image without objects is an ordinary image
    assert check(tmp_path).splits[0].split == split


def test_keypoint_file_is_preferred_only_where_keypoints_are_needed(tmp_path: Path) -> None:
    write(tmp_path, coco())
    write(tmp_path, coco([annotation(keypoints=[1, 2, 2, 0, 0, 0])]), "annotations/person_keypoints_train.json")
    assert open_dataset(tmp_path, "train").file.name == "instances_train.json"
    assert open_dataset(tmp_path, "train", ("keypoints",)).file.name == "person_keypoints_train.json"
    assert [split.file.name for split in check(tmp_path, ("keypoints",)).splits] == ["person_keypoints_train.json"]
    assert len(check(tmp_path).splits) == 2


def test_ambiguous_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path, coco(), "annotations/instances_train_a.json")
    write(tmp_path, coco(), "annotations/instances_train_b.json")
    with pytest.raises(DataError, match="instances_train_a.json, instances_train_b.json"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("stems", "splits"),
    [
        (("instances_fold0", "instances_fold1"), ("fold0", "fold1")),
        (("instances_train_a", "instances_train_b"), ("train_a", "train_b")),
        (("instances_train", "instances_train_a2017"), ("train", "train_a")),
        (("instances_train_a", "instances_val-2014"), ("train", "val")),  # training needs no more of their names
        (("instances_val2014", "instances_val_small"), ("val2014", "val_small")),
        (("instances_a", "instances_b"), ("a", "b")),
        (("instances_train", "person_keypoints_minitrain2017"), ("train",)),  # made for another task
    ],
)
def test_splits_have_any_name(tmp_path: Path, stems: tuple[str, ...], splits: tuple[str, ...]) -> None:
    for stem in stems:
        write(tmp_path, coco(), f"annotations/{stem}.json")
    assert tuple(split.split for split in check(tmp_path, ()).splits) == splits
    for stem, split in zip(stems, splits, strict=False):
        assert open_dataset(tmp_path, split).file.stem == stem
    with pytest.raises(DataError, match=f"it has the splits .*{splits[0]}"):
        open_dataset(tmp_path, "nothing")


@pytest.mark.parametrize("names", [("fold0", "fold1"), ("a", "b")])
def test_splits_of_any_name_are_compared(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, cow in zip(names, ("cat", "cow"), strict=True):
        write(tmp_path, coco(categories=[{"id": 7, "name": cow}]), f"annotations/instances_{name}.json")
    assert [p.kind for p in check(tmp_path, ()).problems] == ["other classes"]


def test_splits_of_people_are_those_of_their_files(tmp_path: Path) -> None:
    posed = coco([annotation(keypoints=[1, 2, 2, 0, 0, 0])])
    write(tmp_path, coco(categories=[{"id": 7, "name": "cat"}]), "annotations/instances_minitrain2017.json")
    write(tmp_path, posed, "annotations/person_keypoints_train2017.json")
    assert [split.split for split in check(tmp_path, ("keypoints",)).splits] == ["train"]


def test_broken_links_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, coco()) / "annotations" / "instances_train.json"
    file.rename(tmp_path / "annotations" / "other.json")
    for name in ("instances_train.json", "instances_train_x.json"):
        link = file.with_name(name)
        link.symlink_to("gone.json")
        for read in (lambda: open_dataset(tmp_path, "train"), lambda: check(tmp_path)):
            with pytest.raises(DataError, match=f"{name}: is a broken link; mend or remove it"):
                read()
        link.unlink()
    file.mkdir()
    with pytest.raises(DataError, match="no annotations of split 'train'"):
        open_dataset(tmp_path, "train")
    file.rmdir()
    file.symlink_to("other.json")
    (tmp_path / "images" / "a.png").unlink()
    (tmp_path / "images" / "a.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"instances_train\.json: .*a\.png: is a broken link"):
        open_dataset(tmp_path, "train").read(0)


def test_names_too_long_for_a_path(tmp_path: Path) -> None:
    content = coco()
    content["images"][0]["file_name"] = f"{'x' * 300}.png"
    dataset = open_dataset(write(tmp_path, content), "train")
    with pytest.raises(DataError, match=r"instances_train\.json: .*xx\.png: cannot be looked at \(File name too long\)"):
        dataset.read(0)
    assert [p.kind for p in check(tmp_path).problems] == ["unreadable image"]
    for path, split in ((tmp_path, "y" * 300), (tmp_path / ("y" * 300), "train")):
        with pytest.raises(DataError, match="yyy.*cannot be looked at"):
            open_dataset(path, split)


def close(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nobody may enter the folder; the rights themselves do not bind a root user."""
    stat, access = Path.stat, os.access

    def refusing(path: Path, **options: Any) -> os.stat_result:
        if folder in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))


@pytest.mark.parametrize("closed", ["", "annotations", "images", "train"])
def test_folders_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    write(tmp_path, coco(), images=closed if closed == "train" else "images")
    close(monkeypatch, tmp_path / closed)
    with pytest.raises(DataError, match=r"cannot be looked at \(Permission denied\)") as error:
        open_dataset(tmp_path, "train").read(0)
    assert str(tmp_path / closed) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match="Permission denied"):
        check(tmp_path, ())


def test_folders_of_others_may_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (write(tmp_path, coco()) / "lost+found").mkdir()
    close(monkeypatch, tmp_path / "lost+found")
    assert check(tmp_path).ok


@pytest.mark.parametrize(
    ("name", "lies"),
    [
        ("2024-05-01_12:30:05.jpg", "2024-05-01_12:30:05.jpg"),
        ("c:x.jpg", "c:x.jpg"),
        ("cam\\a.jpg", "cam/a.jpg"),  # written on Windows
        ("cam\\a.jpg", "cam\\a.jpg"),  # a name that Linux allows
    ],
)
def test_names_that_stay_inside(tmp_path: Path, name: str, lies: str) -> None:
    content = coco()
    content["images"][0]["file_name"] = name
    (write(tmp_path, content) / "images" / "cam").mkdir()
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / lies)
    assert Path(open_dataset(tmp_path, "train").read(0).path) == tmp_path / "images" / lies


@pytest.mark.parametrize(
    "name",
    ["../a.png", "..\\a.png", "b/../../a.png", "b\\..\\..\\a.png", "b\\../../a.png", "\\a.png", "\\\\host\\a.png", "/a.png",
     "C:\\a.png", "c:/a.png", "http://host/a.png", "file:///a.png", ""],
)  # fmt: skip
def test_names_that_lead_outside(tmp_path: Path, name: str) -> None:
    content = coco()
    content["images"][0]["file_name"] = name
    with pytest.raises(DataError, match="lies outside the data set"):
        open_dataset(write(tmp_path, content), "train")


def test_wrong_paths_and_files_give_one_line(tmp_path: Path) -> None:
    write(tmp_path, coco())
    broken = {
        "nowhere": (tmp_path / "nowhere", "no such folder"),
        "file": (tmp_path / "images" / "a.png", "is a file"),
        "empty": (tmp_path / "images", "Understood: annotations/instances_train.json"),
    }
    for path, match in broken.values():
        with pytest.raises(DataError, match=match) as error:
            open_dataset(path, "train")
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(DataError, match="it has the splits train"):
        open_dataset(tmp_path, "val")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is not JSON"),
        ("[]", "no list 'images'"),
        ({"images": [], "categories": []}, "no list 'annotations'"),
        ({**coco(), "annotations": {}}, "no list 'annotations'"),
        ({**coco(), "categories": []}, "there is no category"),
        ({**coco(), "images": []}, "there is no image"),
        ({**coco(), "images": [{"id": 1, "file_name": "a.png", "height": 30}]}, "width None"),
        ({**coco(), "images": [{"id": 1, "file_name": "../a.png", "height": 3, "width": 4}]}, "outside the data set"),
        ({**coco(), "images": [{"id": 1, "file_name": "/etc/a.png", "height": 3, "width": 4}]}, "outside the data set"),
        ({**coco(), "images": [{"id": 1, "height": 3, "width": 4}]}, "no 'file_name'"),
    ],
)
def test_files_that_are_no_coco_files(tmp_path: Path, content: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        open_dataset(write(tmp_path, content), "train")


BAD = [
    (annotation(77, bbox="absent"), "malformed bbox"),
    (annotation(77, bbox=[1, 2, 3]), "malformed bbox"),
    (annotation(77, bbox=[1, 2, 3, "4"]), "malformed bbox"),
    (annotation(77, bbox=[1, 2, None, 4]), "malformed bbox"),
    (annotation(77, bbox=[1, 2, math.nan, 4]), "bbox not finite"),
    (annotation(77, bbox=[1, math.inf, 3, 4]), "bbox not finite"),
    (annotation(77, bbox=[1, 2, -3, 4]), "negative width"),
    (annotation(77, bbox=[1, 2, 3, 0]), "zero height"),
    (annotation(77, bbox=[41, 2, 3, 4]), "box outside the image"),
    (annotation(77, bbox=[-9, 2, 9, 4]), "box outside the image"),
    (annotation(77, category_id=1), "unknown category"),
    (annotation(77, category_id=None), "unknown category"),
    (annotation(77, image_id=11), "unknown image"),
    (annotation(77, iscrowd=2), "malformed iscrowd"),
    (annotation(1), "duplicate annotation id"),
    (annotation(77, bbox="absent", segmentation=[[1, 2, 3, 4]]), "malformed bbox"),
    (annotation(77, bbox=[1, 2, 3], segmentation=[[1, 2, 9, 2, 9, 9]]), "malformed bbox"),
    (annotation(77, segmentation=[[1, 2, 3, 4]]), "malformed segmentation"),
    (annotation(77, segmentation=[[1, 2, 9, 2, 1e8, 9]]), "malformed segmentation"),
    (annotation(77, segmentation=[["1", "2", "9", "2", "9", "9"]]), "malformed segmentation"),
    (annotation(77, segmentation=[[[1, 2], [9, 2], [9, 9], [8, 9], [7, 9], [6, 9]]]), "malformed segmentation"),
    (annotation(77, segmentation={"size": [40, 30], "counts": "abc"}), "malformed segmentation"),
    (annotation(77, segmentation={"size": [30, 40], "counts": [3, 4]}), "malformed segmentation"),
    (annotation("x"), "no integer id"),
    ("nonsense", "no integer id"),
]


@pytest.mark.parametrize(("bad", "kind"), BAD)
def test_bad_annotations_are_dropped_and_named(tmp_path: Path, bad: Any, kind: str) -> None:
    needs = ("masks", "keypoints")
    dataset = opened(tmp_path, annotation(), bad, needs=needs)
    assert dataset.objects.ids.tolist() == [1]
    (problem,) = dataset.problems
    assert problem.kind == kind and not problem.kept
    if isinstance(bad, dict) and isinstance(bad["id"], int):
        assert problem.annotation_id == bad["id"] and f"annotation {bad['id']}:" in str(problem)
        assert problem.image == ("" if kind == "unknown image" else "a.png")
    assert str(dataset.file) in str(problem)
    assert f"1 of 2 annotations dropped: 1 {kind}; `qv data check" in (dataset.warning() or "")
    assert [a["id"] for a in dataset.ground_truth()["annotations"]] == [1]
    assert not check(tmp_path, needs).ok
    with pytest.raises(DataError, match="qv data check"):
        open_dataset(tmp_path, "train", needs, strict=True)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"keypoints": [1, 2, 2]}, "wrong keypoint count"),
        ({"keypoints": "1 2 2 1 2 2"}, "wrong keypoint count"),
        ({"keypoints": [1, 2, 2], "category_id": 3}, "wrong keypoint count"),  # of a class without any
        ({"keypoints": [1, 2, 2, 1, 2, 5]}, "malformed keypoints"),
        ({"keypoints": [1, math.nan, 2, 1, 2, 2]}, "malformed keypoints"),
    ],
)
def test_objects_with_bad_keypoints_are_unlabelled(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    rows = [annotation(1, keypoints=[5, 6, 2, 7, 8, 1]), annotation(77, **changes)]
    with pytest.raises(DataError, match="left out"):
        opened(tmp_path, *rows, needs=("keypoints",), strict=True)
    dataset = opened(tmp_path, *rows, needs=("keypoints",))
    found = dataset.read(0).annotations
    assert found.ids.tolist() == [1, 77] and found.keypoints is not None and not found.keypoints[1].any()
    assert found.has["keypoints"].tolist() == [[True, True], [False, False]]
    (problem,) = dataset.problems
    assert (problem.annotation_id, problem.kept, problem.kind) == (77, True, kind) and "left out" in str(problem)
    assert f"left out of annotations: 1 {kind}" in str(dataset.warning())
    alone = opened(tmp_path, annotation(77, **changes), needs=("keypoints",))
    assert "no annotation has keypoints, so nothing is learned about them" in str(alone.warning())


def test_missing_boxes_are_measured(tmp_path: Path) -> None:
    inside = np.zeros((30, 40), np.uint8)
    inside[4:9, 6:16] = 1
    runs = coco_mask.encode(np.asfortranarray(inside))
    counts = np.diff([0, *(np.flatnonzero(np.diff(inside.T.ravel())) + 1), inside.size]).tolist()
    forms = [
        [[6, 4, 10.5, 4, 10.5, 9], [12, 5, 16, 5, 16, 8], [1, 2, 3, 4]],
        {"size": [30, 40], "counts": runs["counts"].decode()},
        {"size": [30, 40], "counts": counts},
    ]
    rows = [annotation(i, bbox=("absent", None)[i % 2], area="absent", segmentation=form) for i, form in enumerate(forms)]
    for needs in ((), ("masks",)):
        dataset = opened(tmp_path, *rows, needs=needs)
        np.testing.assert_array_equal(dataset.objects.boxes, [[6, 4, 16, 9]] * 3)
        assert dataset.objects.areas.tolist() == [50] * 3
        assert [p.kind for p in dataset.problems] == ["malformed polygon"] * len(needs)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1, 2, 30, 20], "without 3 or more"),  # pycocotools takes it for a box
        ([1, 2, 3, 4, 5], "without 3 or more"),
        (None, "without 3 or more"),
        ([1, 2, 3, 4, 5, None], "no number"),
        ([1, 2, 3, 4, 5, math.nan], "not finite"),
        ([1, 2, 3, 4, 5, math.inf], "not finite"),
        ([1, 2, 3, 4, 5, -(2**63)], "far outside"),
        ([1, 2, 3, 4, -5e8, 4], "-5e\\+08, far outside of an image 40 wide and 30 high"),
    ],
)
def test_good_polygons_outlive_bad_ones(tmp_path: Path, bad: Any, message: str) -> None:
    good = [[6, 4, 16, 4, 16, 9, 6, 9], [20, 5, 30, 5, 30, 15, 20, 15]]
    dataset = opened(tmp_path, annotation(segmentation=[good[0], bad, good[1]]), needs=("masks",))
    assert dataset.objects.segment(0) == good
    found = dataset.read(0).annotations
    assert found.masks is not None and found.masks.sum() == 150
    (problem,) = dataset.problems
    assert problem.kept and problem.kind == "malformed polygon"
    assert re.search(f"1 of 3 polygons left out: polygon .*{message}", str(problem))


def test_evaluators_get_what_can_be_read(tmp_path: Path) -> None:
    good = [6, 4, 16, 4, 16, 9, 6, 9]
    row = annotation(bbox=None, segmentation=[good, [1, 2, 3, 4, -5e8, 4]], keypoints=[1, 2, 2])
    (found,) = opened(tmp_path, row, needs=("masks", "keypoints")).ground_truth()["annotations"]
    assert found["bbox"] == [6, 4, 10, 5] and found["segmentation"] == [good]
    assert found["keypoints"] == [0] * 6 and found["num_keypoints"] == 0


def test_polygons_may_reach_beyond_the_image(tmp_path: Path) -> None:
    dataset = opened(tmp_path, annotation(segmentation=[[-300, 5, 300, 5, 300, 15, -300, 15]]), needs=("masks",))
    assert not dataset.problems and dataset.read(0).annotations.masks.sum() == 400  # type: ignore[union-attr]


def test_compressed_run_lengths_are_checked(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    masks = [(draw.random((30, 40)) < share).astype(np.uint8) for share in (0, 0.02, 0.5, 0.98, 1)]
    texts = [coco_mask.encode(np.asfortranarray(mask))["counts"].decode() for mask in masks]
    rows = [annotation(i, segmentation={"size": [30, 40], "counts": text}) for i, text in enumerate(texts)]
    dataset = opened(tmp_path, *rows, needs=("masks",))
    np.testing.assert_array_equal(dataset.read(0).annotations.masks, masks)
    damaged = [
        "",
        "abc",
        "O1",
        "h55i0\0",
        "h5é",
        "\ud800",
        "oooooooooooooo0",
        *(texts[1][:end] for end in range(1, len(texts[1]))),
    ]
    rows = [annotation(i, segmentation={"size": [30, 40], "counts": text}) for i, text in enumerate([texts[1], *damaged])]
    dataset = opened(tmp_path, *rows, needs=("masks",))
    assert dataset.objects.ids.tolist() == [0]
    assert {p.kind for p in dataset.problems} == {"malformed segmentation"} and len(dataset.problems) == len(damaged)


def test_boxes_over_the_edge_are_clipped(tmp_path: Path) -> None:
    dataset = opened(tmp_path, annotation(1, bbox=[-0.5, 0, 10, 10]), annotation(2, bbox=[30, 20, 20, 20]), strict=True)
    np.testing.assert_allclose(dataset.objects.boxes, [[0, 0, 9.5, 10], [30, 20, 40, 30]])
    assert [(p.annotation_id, p.kept) for p in dataset.problems] == [(2, True)]  # half a pixel is no news
    assert dataset.warning() is None and check(tmp_path).ok
    assert dataset.ground_truth()["annotations"][1]["bbox"] == [30, 20, 20, 20]  # as published


def test_annotations_may_come_in_any_order(tmp_path: Path) -> None:
    rows = [annotation(i, image_id=(10, 5)[i % 2], area=i + 1.0) for i in range(6)]
    dataset = opened(tmp_path, *rows)
    assert [dataset.read(i).annotations.ids.tolist() for i in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert dataset.read(1).annotations.areas.tolist() == [2, 4, 6]
    assert {a["id"]: (a["image_id"], a["area"]) for a in dataset.ground_truth()["annotations"]} == {
        row["id"]: (row["image_id"], row["area"]) for row in rows
    }


def test_duplicate_image_id_is_reported(tmp_path: Path) -> None:
    content = coco()
    content["images"].append(content["images"][0])
    dataset = open_dataset(write(tmp_path, content), "train")
    assert dataset.image_ids.tolist() == [10, 5] and dataset.name(0) == "a.png" and dataset.objects.ids.tolist() == [1]
    assert "image id 10 occurs twice" in str(dataset.problems[0])
    assert "1 images dropped, their id occurs twice" in (dataset.warning() or "")


@pytest.mark.parametrize("change", [{"file_name": "b.png"}, {"width": 41}])
def test_an_image_id_of_several_pictures_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    content = coco([annotation(1), annotation(2, image_id=5, bbox=[1, 2, 3, 4])])
    content["images"] += [content["images"][0] | change, content["images"][0]]
    dataset = open_dataset(write(tmp_path, content), "train")
    assert dataset.image_ids.tolist() == [5] and dataset.objects.ids.tolist() == [2]  # a.png may hold anything
    assert "image id 10 stands for several pictures" in str(dataset.problems[0])
    assert "3 images dropped with their annotations" in str(dataset.warning())
    assert "1 of 2 annotations dropped: 1 unknown image" in str(dataset.warning())
    with pytest.raises(DataError, match="stands for several pictures"):
        open_dataset(tmp_path, "train", strict=True)
    content["images"][1]["id"] = 10
    with pytest.raises(DataError, match="there is no image in it whose id is its own"):
        open_dataset(write(tmp_path, content), "train")


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_ids_may_be_negative(tmp_path: Path, kind: Any, backend: Any) -> None:
    def measured(shift: int) -> dict[str, float]:
        square = [[2, 3, 12, 3, 12, 11, 2, 11]]
        points = [5, 6, 2, 9, 8, 2]
        rows = [annotation(i, image_id=(10, 5)[i % 2], segmentation=square, keypoints=points) for i in range(6)]
        content = coco(rows)
        for row in content["images"]:
            row["id"] += shift
        for row in content["annotations"]:
            row["image_id"] += shift
            row["category_id"] += shift
        content["categories"] = [{**row, "id": row["id"] + shift} for row in CATEGORIES]
        truth = open_dataset(write(tmp_path, content), "train", ("masks", "keypoints")).ground_truth()
        ids = [{"image_id": image + shift, "category_id": 7 + shift} for image in (10, 5, 10, 5, 99)]
        found = [{"bbox": [2, 3, 10, 8 + i], "segmentation": square, "keypoints": [5 + i, 6, 2, 9, 8, 2]} for i in range(5)]
        records = [{**id_, **shape, "score": 0.5} for id_, shape in zip(ids, found, strict=True)]  # the order decides
        sigmas = [0.1, 0.1] if kind == "keypoints" else None
        numbers = evaluate(truth, records, kind, backend, sigmas=sigmas)
        if kind == "bbox":
            table = np.array([[r["image_id"], *r["bbox"], r["score"], r["category_id"]] for r in records])
            assert evaluate(truth, table, kind, backend) == numbers
        return numbers

    assert measured(-8) == measured(-20) == measured(0) and measured(0)["AP"] > 0.1


def test_missing_area_and_crowd_are_filled_in(tmp_path: Path) -> None:
    dataset = opened(tmp_path, annotation(area="absent", iscrowd="absent"))
    assert dataset.read(0).annotations.areas.tolist() == [80]
    (entry,) = dataset.ground_truth()["annotations"]
    assert entry["area"] == 80 and entry["iscrowd"] == 0


def test_an_area_of_zero_is_replaced(tmp_path: Path) -> None:
    dataset = opened(tmp_path, annotation(area=0))
    assert dataset.objects.areas.tolist() == [80] and [p.kept for p in dataset.problems] == [True]
    assert dataset.ground_truth()["annotations"][0]["area"] == 80  # similarity of keypoints would be that of a dot


def test_crowds_become_ignore_regions(tmp_path: Path) -> None:
    square = [[5, 5, 15, 5, 15, 15, 5, 15]]
    crowd = annotation(2, iscrowd=1, bbox=[5, 5, 10, 10], segmentation=square)
    dataset = opened(tmp_path, annotation(segmentation=square), crowd, needs=("masks",))
    found = dataset.read(0).annotations
    assert found.ids.tolist() == [1] and dataset.max_objects == 1
    assert found.ignore_boxes.tolist() == [[5, 5, 15, 15]] and found.ignore_labels.tolist() == [1]
    assert found.ignore_masks is not None and found.ignore_masks.sum() == 100
    assert [a["iscrowd"] for a in dataset.ground_truth()["annotations"]] == [0, 1]


def test_masks_from_polygons_and_both_run_lengths(tmp_path: Path) -> None:
    inside = np.zeros((30, 40), np.uint8)
    inside[4:9, 6:16] = 1
    runs = coco_mask.encode(np.asfortranarray(inside))
    flat = inside.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    forms = [
        [[6, 4, 16, 4, 16, 9, 6, 9]],
        {"size": [30, 40], "counts": runs["counts"].decode()},
        {"size": [30, 40], "counts": counts},
        [],
        "absent",
    ]
    found = (
        opened(tmp_path, *(annotation(i, segmentation=f) for i, f in enumerate(forms)), needs=("masks",)).read(0).annotations
    )
    assert found.masks is not None and found.masks.shape == (5, 30, 40) and found.masks.dtype == np.uint8
    assert found.has["masks"].tolist() == [True, True, True, False, False]
    for i in range(3):
        np.testing.assert_array_equal(found.masks[i], inside)
    assert not found.masks[3:].any()


def test_keypoints_extra_and_cover(tmp_path: Path) -> None:
    content = coco([
        annotation(1, keypoints=[5, 6, 2, 0, 0, 0], speed=3, pose=[1, 2]),
        annotation(2, category_id=3, speed="fast"),
        annotation(3, keypoints=[5, 6, 1, 7, 8, 2], pose=[1, 2, 3]),
        annotation(4, pose=[4, 5]),
    ])  # fmt: skip
    content["images"][0]["covered_category_ids"] = [7]
    dataset = open_dataset(write(tmp_path, content), "train", ("keypoints", "speed", "pose"))
    found = dataset.read(0).annotations
    assert found.masks is None and found.keypoints is not None and found.keypoints.shape == (4, 2, 3)
    assert found.has["keypoints"].tolist() == [[True, False], [False, False], [True, True], [False, False]]
    assert found.extra["speed"].tolist() == [3, 0, 0, 0] and found.has["speed"].tolist() == [True, False, False, False]
    assert found.extra["pose"].shape == (4, 2) and found.has["pose"].tolist() == [True, False, False, True]
    assert found.covers is not None and found.covers.tolist() == [False, True]
    assert dataset.read(1).annotations.covers is None and dataset.read(1).annotations.keypoints.shape == (0, 2, 3)  # type: ignore[union-attr]
    assert [p.kind for p in dataset.problems] == ["malformed speed", "malformed pose"]


@pytest.mark.parametrize("wrong", [1, "cat", ["cat"], [777], [7.5], [True], {"7": 1}])
def test_covered_classes_are_ids_of_categories(tmp_path: Path, wrong: Any) -> None:
    content = coco([annotation()])
    content["images"][0]["covered_category_ids"] = wrong
    with pytest.raises(DataError, match="image '.*covered_category_ids .* is no list of ids in 'categories'"):
        open_dataset(write(tmp_path, content), "train")


def test_needs_that_nobody_meets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'speed' is needed"):
        opened(tmp_path, annotation(), needs=("speed",))
    categories = [{"id": 7, "name": "cat"}]
    with pytest.raises(DataError, match="no category names its 'keypoints'"):
        open_dataset(write(tmp_path, coco(categories=categories)), "train", ("keypoints",))
    assert "no annotation has masks" in (opened(tmp_path, annotation(), needs=("masks",)).warning() or "")


def test_images_of_every_kind_become_rgb(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray = Image.fromarray(ramp)
    for name, image in {
        "gray.png": gray, "palette.png": gray.convert("P"), "alpha.png": gray.convert("LA"),
        "deep.png": Image.fromarray(ramp.astype(np.uint16) * 257), "cmyk.tif": gray.convert("RGB").convert("CMYK"),
    }.items():  # fmt: skip
        image.save(tmp_path / name)
        pixels = read_image(tmp_path / name)
        assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable, name
        np.testing.assert_allclose(pixels[:, :, 1], ramp, atol=1, err_msg=name)


def test_broken_images_are_named(tmp_path: Path) -> None:
    dataset = opened(tmp_path, annotation())
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "full.jpg")
    whole = (tmp_path / "full.jpg").read_bytes()
    for content, match in ((whole[: len(whole) // 2], "truncated"), (b"no picture", "not an image"), (b"", "not an image")):
        (tmp_path / "images" / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=match) as error:
            dataset.read(0)
        assert "a.png" in str(error.value) and "\n" not in str(error.value)
        report = check(tmp_path)
        assert [p.image for p in report.problems] == ["a.png"] and not report.ok
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DataError, match="'a.png' is missing; looked in"):
        dataset.read(0)
    assert "missing" in check(tmp_path).lines()[-2]


def test_size_mismatch_and_rotation(tmp_path: Path) -> None:
    dataset = opened(tmp_path, annotation())
    Image.new("RGB", (41, 30)).save(tmp_path / "images" / "a.png")
    with pytest.raises(DataError, match=r"is 41 x 30 .* says 40 x 30; please correct the json"):
        dataset.read(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 40)).save(tmp_path / "images" / "a.png", exif=exif)
    with pytest.raises(DataError, match="carries an EXIF rotation"):
        dataset.read(0)


def test_subset_and_pickle(tmp_path: Path) -> None:
    square = [[5, 5, 15, 5, 15, 15, 5, 15]]
    rows = [annotation(1, segmentation=square), annotation(2, image_id=5, bbox=[1, 2, 3, 4], segmentation=square)]
    dataset = opened(tmp_path, *rows, needs=("masks",))
    part = pickle.loads(pickle.dumps(dataset.subset([1])))
    assert len(part) == 1 and part.image_ids.tolist() == [5]
    assert part.read(0).annotations.ids.tolist() == [2] and part.read(0).annotations.masks.sum() == 100
    truth = part.ground_truth()
    assert [i["id"] for i in truth["images"]] == [5] and [a["id"] for a in truth["annotations"]] == [2]
    assert dataset.subset(99).image_ids.tolist() == [10, 5] and dataset.subset(1).image_ids.tolist() == [10]
    with pytest.raises(DataError):
        dataset.subset(0)


def test_a_split_without_an_object_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path, coco([]))
    report = check(tmp_path)
    assert not report.ok and "no object to learn from" in report.lines()[-2]


def test_splits_must_agree_about_classes(tmp_path: Path) -> None:
    write(tmp_path, coco())
    other = [{"id": 7, "name": "cow"}, {"id": 3, "name": "dog"}]
    write(tmp_path, coco(categories=other), "annotations/instances_val.json")
    train, val = open_dataset(tmp_path, "train"), open_dataset(tmp_path, "val")
    check_same_classes(train, train)
    with pytest.raises(DataError, match="id 7 is 'cat' in instances_train.json and 'cow' in instances_val.json"):
        check_same_classes(train, val)
    assert any("'cow'" in line for line in check(tmp_path).lines())


def test_roboflow_root_category_is_no_class(tmp_path: Path) -> None:
    names = [("animals", "none"), ("cat", "animals"), ("dog", "animals")]
    categories = [{"id": i, "name": name, "supercategory": above} for i, (name, above) in enumerate(names)]
    write(tmp_path, coco([annotation(category_id=1)], categories), "train/_annotations.coco.json", "train")
    assert open_dataset(tmp_path, "train").classes.names == ("cat", "dog")
    write(tmp_path, coco([annotation(category_id=0)], categories), "train/_annotations.coco.json", "train")
    assert open_dataset(tmp_path, "train").classes.names == ("animals", "cat", "dog")


def test_view_writes_a_sheet(tmp_path: Path) -> None:
    dataset = opened(tmp_path, annotation(keypoints=[5, 6, 2, 7, 8, 1]), annotation(2, iscrowd=1), needs=("keypoints",))
    sheet = np.asarray(Image.open(view(dataset, None, tmp_path / "out" / "sheet.png", count=4)))
    assert sheet.shape == (4 + 54, 4 + 2 * 44, 3)
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 5  # more than the plain picture and the background


@pytest.mark.parametrize(
    ("name", "split", "needs", "images", "kept", "crowds"),
    [
        ("bccd", "train", (), 205, 2804, 0),
        ("raccoon", "val", (), 30, 34, 0),
        ("penn_fudan", "train", ("masks",), 90, 228, 0),
        ("coco", "val", ("masks",), 106, 928, 11),
        ("coco", "train", ("masks", "keypoints"), 21, 122, 4),
    ],
)
def test_real_data(
    name: str, split: str, needs: tuple[str, ...], images: int, kept: int, crowds: int, real_data: Callable[[str], Path]
) -> None:
    dataset = open_dataset(real_data(name), split, needs)
    assert (len(dataset), len(dataset.objects.ids), int(dataset.objects.crowd.sum())) == (images, kept, crowds)
    assert len(dataset.ground_truth()["annotations"]) == kept and dataset.warning() is None
    for index in range(0, len(dataset), 10):
        found = dataset.read(index).annotations
        if found.masks is not None:
            assert found.has["masks"].all()
            # published areas are of the polygons: they and the drawn masks agree but for rounding at the edge
            assert np.abs(found.masks.sum((1, 2)) - found.areas).max(initial=0) < 0.1 * found.areas.max(initial=100)
