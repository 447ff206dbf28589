"""Annotation files of the same images, united for joint tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from queryvision.data.resizing import Flip
from queryvision.data.scenes import make_scenes
from queryvision.data.skeletons import flip_orders
from queryvision.data.transforms import Transform
from queryvision.errors import DataError
from queryvision.registry import resolve_task
from queryvision.splits import open_split

JOINT = resolve_task("instance+keypoints")
DOG, PERSON = {"id": 3, "name": "dog"}, {"id": 1, "name": "person"}
POSED = {**PERSON, "keypoints": ["head", "foot"]}
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return make_scenes(tmp_path, train=6, val=1, size=64)


def row(id_: int, image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"id": id_, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, **more}


def image(id_: int, side: int = 64, **more: Any) -> dict[str, Any]:
    return {"id": id_, "file_name": f"{id_}.png", "width": side, "height": 64, **more}


def written(root: Path, objects: dict[str, Any], posed: dict[str, Any]) -> Path:
    """Image 1 in both files, 2 among the objects only, 5 among people only."""
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    for id_ in (1, 2, 5):
        Image.new("RGB", (64, 64)).save(root / "images" / f"{id_}.png")
    (root / "annotations" / "instances_train.json").write_text(json.dumps(objects))
    (root / "annotations" / "person_keypoints_train.json").write_text(json.dumps(posed))
    return root


def objects() -> dict[str, Any]:
    rows = [
        row(7, 2, 3, [0, 0, 20, 20], segmentation=[[0, 0, 20, 0, 20, 20, 0, 20]]),
        row(8, 1, 1, [10, 10, 20, 20], segmentation=SQUARE),
        row(9, 1, 3, [10, 10, 20, 20], segmentation=SQUARE),  # a dog in the same place is another object
    ]
    return {"images": [image(2), image(1)], "annotations": rows, "categories": [DOG, PERSON]}


def people() -> dict[str, Any]:
    rows = [
        row(1, 5, 1, [5, 5, 40, 40], keypoints=[6, 6, 2, 0, 0, 0], num_keypoints=1),
        row(2, 1, 1, [10, 10.5, 20, 20], keypoints=[12, 12, 2, 14, 28, 1], num_keypoints=2),
        row(3, 1, 1, [40, 40, 10, 10], keypoints=[0] * 6, num_keypoints=0),
    ]
    return {"images": [image(5), image(1)], "annotations": rows, "categories": [POSED]}


def test_what_two_files_say_about_an_object_is_one_object(tmp_path: Path) -> None:
    data = open_split(JOINT, written(tmp_path, objects(), people()), "train")
    assert data.classes.names == ("person", "dog") and data.classes.skeletons[0] is not None
    assert data.image_ids.tolist() == [2, 1, 5] and len(data.objects.ids) == 5
    two, one, five = (data.read(index).annotations for index in range(3))
    assert two.labels.tolist() == [1] and two.covers is None and not two.has["keypoints"].any()
    assert sorted(one.labels.tolist()) == [0, 0, 1] and one.covers is None
    both = one.ids.tolist().index(8)
    assert one.masks is not None and one.keypoints is not None
    assert one.masks[both].sum() == 400 and one.keypoints[both].tolist() == [[12, 12, 2], [14, 28, 1]]
    new = one.ids.tolist().index(3)
    assert not one.has["masks"][new] and not one.has["keypoints"][new].any()
    assert not one.has["keypoints"][one.ids.tolist().index(9)].any()
    assert five.covers is not None and five.covers.tolist() == [True, False]  # nobody looked for dogs here
    assert five.has["keypoints"].tolist() == [[True, False]] and not five.has["masks"].any()


def test_mirrored_objects_of_several_files_swap_by_their_own_class(tmp_path: Path) -> None:
    dog = {**DOG, "id": 0, "keypoints": ["left_ear", "nose", "right_ear"]}  # the files' classes change places
    things, posed = objects(), people()
    things["categories"][0] = dog
    for thing in things["annotations"]:
        thing["category_id"] = thing["category_id"] % 3
    posed["categories"] = [PERSON | {"keypoints": ["left_foot", "right_foot"]}, dog]
    posed["annotations"].append(row(4, 1, 0, [10, 10, 20, 20], keypoints=[11, 12, 2, 13, 14, 2, 0, 0, 0], num_keypoints=2))
    data = open_split(JOINT, written(tmp_path, things, posed), "train")
    before = data.read(data.image_ids.tolist().index(1))
    after = Transform([Flip(p=1)], flip_orders(data.classes.skeletons))(before, 0).annotations
    found = dict(zip(after.ids.tolist(), np.asarray(after.keypoints).tolist(), strict=True))
    assert found[8] == [[50, 28, 1], [52, 12, 2], [0, 0, 0]] and found[9] == [[0, 0, 0], [51, 14, 2], [53, 12, 2]]


def test_each_task_is_measured_on_its_own_annotations(tmp_path: Path) -> None:
    data = open_split(JOINT, written(tmp_path, objects(), people()), "train")
    truths = data.ground_truth()["parts"]
    assert {name: [r["id"] for r in truth["images"]] for name, truth in truths.items()} == {
        "instance": [2, 1],
        "keypoints": [5, 1],
    }
    few = data.subset(1)
    assert set(few.ground_truth()["parts"]) == {"instance"}
    assert few.read(0).image_id == 2


def test_one_file_for_all_is_read_once(tmp_path: Path) -> None:
    root = written(tmp_path, {**objects(), "categories": [DOG, POSED]}, people())
    (root / "annotations" / "person_keypoints_train.json").unlink()
    data = open_split(JOINT, root, "train")
    assert not data.parts and data.needs == ("labels", "boxes", "masks", "keypoints")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p["images"].__setitem__(1, image(1, file_name="2.png")), "image 1 is '1.png'"),
        (lambda p: p["images"].__setitem__(1, image(1, 32)), "image 1 is '1.png' (64 x 64)"),
        (lambda p: p["categories"].__setitem__(0, {**POSED, "id": 1, "name": "man"}), "class id 1 is 'person'"),
        (lambda p: p["categories"].__setitem__(0, {**POSED, "isthing": 0}), "class 'person' is defined differently"),
    ],
)
def test_files_that_disagree_are_refused(change: Callable[[Any], None], told: str, tmp_path: Path) -> None:
    posed = people()
    change(posed)
    with pytest.raises(DataError) as error:
        open_split(JOINT, written(tmp_path, objects(), posed), "train")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_real_files_of_coco(real_data: Callable[[str], Path]) -> None:
    data = open_split(JOINT, real_data("coco"), "val")
    parts = data.parts
    assert len(data) > len(parts["instance"]) and data.images.covers is not None
    posed = [(d.objects.keypoints[..., 2] > 0).sum() for d in (data, parts["keypoints"]) if d.objects.keypoints is not None]
    assert len(posed) == 2 and posed[0] == posed[1]
    crowds = [int(part.objects.crowd.sum()) for part in (data, *parts.values())]
    assert max(crowds[1:]) <= crowds[0] <= sum(crowds[1:])
    only_people = np.flatnonzero(data.images.covers.sum(1) == 1)
    assert len(only_people) and set(data.image_ids[only_people]) <= set(parts["keypoints"].image_ids)


def test_segments_and_keypoints(drawn: Path) -> None:
    """Figures of a panoptic map get the keypoints of the other file; nothing is added to a map."""
    data = open_split(resolve_task("panoptic+keypoints"), drawn, "train")
    alone = open_split(resolve_task("panoptic"), drawn, "train")
    posed = open_split(resolve_task("keypoints"), drawn, "train")
    assert len(data.objects.ids) == len(alone.objects.ids) and data.maps is not None
    total = 0
    for index in range(len(data)):
        found, people = data.annotations(index), posed.annotations(index)
        assert found.masks is not None and found.stuff is not None and found.keypoints is not None
        assert (found.masks == alone.annotations(index).masks).all()
        figures = found.has["keypoints"].any(1)
        assert not found.stuff[figures].any() and figures.sum() <= len(people.labels)
        total += int(figures.sum())
    assert total >= 0.9 * len(posed.objects.ids)
    assert set(data.ground_truth()["parts"]) == {"panoptic", "keypoints"}


def test_an_image_without_a_map_keeps_its_people(drawn: Path) -> None:
    file = drawn / "annotations" / "panoptic_train.json"
    content = json.loads(file.read_text())
    posed = open_split(resolve_task("keypoints"), drawn, "train")
    gone = posed.image_ids[np.flatnonzero(posed.num_objects)[0]]
    content["images"] = [r for r in content["images"] if r["id"] != gone]
    content["annotations"] = [r for r in content["annotations"] if r["image_id"] != gone]
    file.write_text(json.dumps(content))
    data = open_split(resolve_task("panoptic+keypoints"), drawn, "train")
    found = data.annotations(data.image_ids.tolist().index(gone))
    assert len(found.labels) and found.masks is not None and not found.has["masks"].any()
    assert found.covers is not None and found.covers.sum() == 1


@pytest.mark.parametrize("task", ["panoptic+instance", "panoptic+instance+keypoints"])
def test_objects_of_images_without_a_map_stay(task: str, drawn: Path) -> None:
    file = drawn / "annotations" / "panoptic_train.json"
    content = json.loads(file.read_text())
    objects = open_split(resolve_task("instance"), drawn, "train")
    gone = objects.image_ids[np.flatnonzero(objects.num_objects > 1)[0]]
    for key, name in (("images", "id"), ("annotations", "image_id")):
        content[key] = [r for r in content[key] if r[name] != gone]
    file.write_text(json.dumps(content))
    data = open_split(resolve_task(task), drawn, "train")
    found = data.annotations(data.image_ids.tolist().index(gone))
    alone = objects.annotations(objects.image_ids.tolist().index(gone))
    assert sorted(found.labels.tolist()) == sorted(alone.labels.tolist()) and not found.has["masks"].any()
    assert found.masks is not None and not found.masks.any()


def test_classes_that_a_map_does_not_know_are_not_background_there(drawn: Path) -> None:
    """Figures are called people in the other file: nothing is added to a map, so nobody knows where people are."""
    for file in (drawn / "annotations").glob("person_keypoints_*.json"):
        content = json.loads(file.read_text())
        content["categories"][0] |= {"id": 77, "name": "person"}
        content["categories"] = content["categories"][:1]
        content["annotations"] = [{**r, "category_id": 77} for r in content["annotations"]]
        file.write_text(json.dumps(content))
    data = open_split(resolve_task("panoptic+keypoints"), drawn, "train")
    covers = data.annotations(0).covers
    assert covers is not None and not covers[data.classes.index_of_name["person"]] and covers.sum() == len(covers) - 1
