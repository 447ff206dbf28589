"""The embedded data set: drawn once, the same every time, and every annotation sits on what it describes."""

import json
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from panopticapi.evaluation import pq_compute
from panopticapi.utils import rgb2id
from pycocotools.coco import COCO

from queryvision.data import scenes
from queryvision.data.classes import ClassMap
from queryvision.data.coco import open_dataset
from queryvision.data.scenes import CATEGORIES, FIGURE_ID, FIRST_STUFF_ID, draw_scene, make_scenes
from queryvision.errors import ConfigError, DataError

NUM_KEYPOINTS = len(CATEGORIES[0]["keypoints"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("cache"), train=12, val=6, size=96, seed=3)


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def annotations(folder: Path, kind: str, split: str = "train") -> dict:
    return json.loads((folder / "annotations" / f"{kind}_{split}.json").read_text())


# ------------------------------------------------------------------------------------------------------ what is drawn
def test_same_bytes_twice(folder, tmp_path):
    again = make_scenes(tmp_path, train=12, val=6, size=96, seed=3)
    assert again.name == folder.name
    assert content(again) == content(folder)


def test_an_image_depends_on_seed_split_and_index_only(folder, tmp_path):
    longer = make_scenes(tmp_path, train=14, val=7, size=96, seed=3)
    for split in ("train", "val"):
        for kind in ("instances", "person_keypoints", "panoptic"):
            short, long = annotations(folder, kind, split), annotations(longer, kind, split)
            ids = {image["id"] for image in short["images"]}
            assert [image for image in long["images"] if image["id"] in ids] == short["images"]
            assert [row for row in long["annotations"] if row["image_id"] in ids] == short["annotations"]
    more = content(longer)
    assert all(more[name] == value for name, value in content(folder).items() if name.endswith(".png"))
    base = draw_scene(3, "train", 0, 96).image
    for other in (draw_scene(4, "train", 0, 96), draw_scene(3, "val", 0, 96), draw_scene(3, "train", 1, 96)):
        assert other.image.shape != base.shape or (other.image != base).mean() > 0.5


def test_contents_vary_and_every_class_occurs():
    drawn = [draw_scene(0, "train", i, 64) for i in range(60)]
    things = Counter(thing.category_id for scene in drawn for thing in scene.things)
    stuff = Counter(int(c) for scene in drawn for c in np.unique(scene.stuff) if c)
    assert set(things) == {c["id"] for c in CATEGORIES if c["isthing"]}
    assert set(stuff) == {c["id"] for c in CATEGORIES if not c["isthing"]}
    assert {len(scene.things) for scene in drawn} >= {0, 1, 2, 3, 4, 5, 6}
    assert all(2 <= len(np.unique(scene.stuff[scene.stuff > 0])) <= 4 for scene in drawn)
    shapes = np.array([scene.owner.shape for scene in drawn])
    assert (shapes.max(axis=1) == 64).all() and (shapes.min(axis=1) >= 48).all()
    assert (shapes[:, 0] > shapes[:, 1]).any() and (shapes[:, 0] < shapes[:, 1]).any()
    visibility = np.concatenate([t.keypoints[:, 2] for scene in drawn for t in scene.things if t.keypoints is not None])
    assert set(visibility) == {0, 1, 2} and (visibility == 2).mean() > 0.6


def test_colour_does_not_give_the_class_away():
    hues = {}
    for index in range(80):
        scene = draw_scene(0, "train", index, 64)
        hsv = cv2.cvtColor(scene.image, cv2.COLOR_RGB2HSV)
        for i, thing in enumerate(scene.things):
            hues.setdefault(thing.category_id, []).append(np.median(hsv[..., 0][scene.owner == i]))
    assert all(np.ptp(values) > 60 for values in hues.values())  # OpenCV's hues are 0..179


def test_categories_fit_together():
    figure = CATEGORIES[0]
    names = figure["keypoints"]
    assert figure["id"] == FIGURE_ID and len(figure["sigmas"]) == NUM_KEYPOINTS
    assert {i for pair in figure["skeleton"] for i in pair} == set(range(1, NUM_KEYPOINTS + 1))
    for left, right in figure["flip_pairs"]:
        assert names[left].replace("left", "right") == names[right] != names[left]
        assert figure["sigmas"][left] == figure["sigmas"][right]
    assert sum(len(pair) for pair in figure["flip_pairs"]) == sum("_" in name for name in names)
    assert len(ClassMap.from_categories(CATEGORIES)) == len(CATEGORIES) == 12
    assert all(c["isthing"] == (c["id"] < FIRST_STUFF_ID) for c in CATEGORIES)


def test_left_is_right_in_the_image():
    figures = [t.keypoints for i in range(60) for t in draw_scene(0, "train", i, 64).things if t.keypoints is not None]
    for left, right in ((1, 2), (5, 6)):
        both = np.array([k[[left, right], 0] for k in figures if k[left, 2] and k[right, 2]])
        assert len(both) > 20 and (both[:, 0] > both[:, 1]).all()


# ------------------------------------------------------------------------------------------------------ the files
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_boxes_areas_and_panoptic_maps_agree(folder, split):
    coco = COCO(folder / "annotations" / f"instances_{split}.json")
    panoptic = annotations(folder, "panoptic", split)
    things = {c["id"] for c in panoptic["categories"] if c["isthing"]}
    assert {c["id"] for c in coco.dataset["categories"]} == things
    for row in panoptic["annotations"]:
        image = coco.loadImgs(row["image_id"])[0]
        pixels = cv2.imread(str(folder / "images" / image["file_name"]))
        ids = rgb2id(cv2.imread(str(folder / f"panoptic_{split}" / row["file_name"]))[..., ::-1])
        assert pixels.shape[:2] == ids.shape == (image["height"], image["width"])
        segments = row["segments_info"]
        assert {s["id"] for s in segments} == set(np.unique(ids)) - {0}
        assert len({s["id"] for s in segments}) == len(segments)
        for segment in segments:
            mask = ids == segment["id"]
            ys, xs = np.nonzero(mask)
            assert segment["area"] == mask.sum() >= 16
            assert segment["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        objects = coco.loadAnns(coco.getAnnIds(row["image_id"]))
        seen = [s for s in segments if s["category_id"] in things]
        assert len(objects) == len(seen)
        for thing, segment in zip(objects, seen, strict=True):
            assert np.array_equal(coco.annToMask(thing) > 0, ids == segment["id"])
            assert [thing[k] for k in ("category_id", "area", "bbox", "iscrowd")] == [
                segment[k] for k in ("category_id", "area", "bbox", "iscrowd")
            ]


def test_keypoint_file_agrees_with_the_instances(folder):
    posed, plain = annotations(folder, "person_keypoints"), annotations(folder, "instances")
    assert posed["images"] == plain["images"]
    assert posed["categories"] == [CATEGORIES[0]]
    figures = [a for a in plain["annotations"] if a["category_id"] == FIGURE_ID]
    assert [{k: v for k, v in a.items() if k not in ("keypoints", "num_keypoints")} for a in posed["annotations"]] == figures
    coco = COCO(folder / "annotations" / "person_keypoints_train.json")
    sizes = {image["id"]: (image["width"], image["height"]) for image in posed["images"]}
    for figure in posed["annotations"]:
        points = np.array(figure["keypoints"]).reshape(NUM_KEYPOINTS, 3)
        assert figure["num_keypoints"] == (points[:, 2] > 0).sum()
        assert (points[points[:, 2] == 0] == 0).all()
        labelled = points[points[:, 2] > 0]
        assert (labelled[:, :2] >= 0).all() and (labelled[:, :2] < sizes[figure["image_id"]]).all()
        x, y, w, h = figure["bbox"]
        visible = points[points[:, 2] == 2, :2]
        assert ((visible >= (x, y)) & (visible <= (x + w, y + h))).all()
        mask = coco.annToMask(figure)
        column, row = np.floor(visible).astype(int).T
        assert mask[row, column].all()
        column, row = np.floor(points[points[:, 2] == 1, :2]).astype(int).T
        assert not mask[row, column].any()


def test_edges_of_the_picture_lie_on_edges_of_the_masks():
    """Colour changes more across a mask's border than along it: the masks are not shifted against the picture."""
    best = Counter()
    for index in range(30):
        scene = draw_scene(0, "val", index, 128)
        grey = cv2.GaussianBlur(scene.image, (0, 0), 0.7).astype(np.float32)
        change = np.abs(np.diff(grey, axis=1)).sum(-1)[1:-1]
        for dx in (-2, -1, 0, 1, 2):
            border = np.diff(np.roll(scene.owner, dx, axis=1), axis=1)[1:-1] != 0
            best[dx] += float(change[border].sum())
    assert max(best, key=best.get) == 0


def test_own_reader_finds_nothing_to_complain_about(folder):
    for needs in (("labels", "boxes", "masks"), ("labels", "boxes", "keypoints")):
        data = open_dataset(folder, "train", needs, strict=True)
        assert len(data) == 12 and not data.problems
        for index in range(12):
            sample, scene = data[index], draw_scene(3, "train", index, 96)
            assert np.array_equal(sample.image, scene.image)
            if "masks" in needs:
                number = np.arange(len(scene.things))[:, None, None]
                assert np.array_equal(sample.annotations.masks, scene.owner == number)
            else:
                points = [t.keypoints for t in scene.things if t.keypoints is not None]
                assert np.allclose(sample.annotations.keypoints.reshape(-1, 3), np.reshape(points, (-1, 3)))


def test_panopticapi_scores_the_truth_as_perfect(folder):
    file, maps = folder / "annotations" / "panoptic_val.json", folder / "panoptic_val"
    result = pq_compute(str(file), str(file), str(maps), str(maps))
    assert result["All"]["pq"] == pytest.approx(1.0)
    assert result["All"]["n"] > result["Stuff"]["n"] > 0


# ------------------------------------------------------------------------------------------------------ the cache
def test_second_call_draws_nothing(folder, monkeypatch):
    monkeypatch.setattr(scenes, "draw_scene", lambda *_: pytest.fail("drawn again"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make_scenes(folder.parent, train=12, val=6, size=96, seed=3) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_every_parameter_has_a_folder_of_its_own(tmp_path):
    base = {"train": 1, "val": 1, "size": 48, "seed": 0}
    folders = {make_scenes(tmp_path, **base)} | {make_scenes(tmp_path, **base | {key: base[key] + 1}) for key in base}
    assert len(folders) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in folders)


def test_half_written_folder_is_not_taken(folder, tmp_path):
    target = tmp_path / folder.name
    (target / "images").mkdir(parents=True)
    (target / "images" / "train_00000.png").write_bytes(b"half")
    (target / "images" / "stray.png").write_bytes(b"half")
    assert make_scenes(tmp_path, train=12, val=6, size=96, seed=3) == target
    assert content(target) == content(folder)
    assert list(tmp_path.iterdir()) == [target]


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    real = scenes.draw_scene

    def draw(seed: int, split: str, index: int, size: int) -> scenes.Scene:
        if split == "val":
            raise KeyboardInterrupt
        return real(seed, split, index, size)

    monkeypatch.setattr(scenes, "draw_scene", draw)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path, train=2, val=2, size=48)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_do_not_clash(tmp_path, monkeypatch):
    real = scenes.write_split
    started = []

    def write(*args) -> None:  # a second process draws the whole set while the first is at it
        if not started:
            started.append(True)
            started.append(make_scenes(tmp_path, train=2, val=2, size=48))
            started.append(started[1].stat().st_ino)
        real(*args)

    monkeypatch.setattr(scenes, "write_split", write)
    folder = make_scenes(tmp_path, train=2, val=2, size=48)
    assert started[1:] == [folder, folder.stat().st_ino]  # the first to finish wins
    assert list(tmp_path.iterdir()) == [folder]
    assert len(list((folder / "images").iterdir())) == 4


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("QUERYVISION_CACHE", str(tmp_path / "here"))
    assert make_scenes(train=1, val=1, size=48).parent == tmp_path / "here"
    monkeypatch.delenv("QUERYVISION_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_scenes(train=1, val=1, size=48).parent == tmp_path / ".cache" / "queryvision"


def test_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written .* set QUERYVISION_CACHE to a folder") as caught:
        make_scenes(tmp_path / "file", train=1, val=1, size=48)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="Permission denied"):
        make_scenes(tmp_path, train=1, val=1, size=48)


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": -1}, {"size": 20}, {"seed": -1}])
def test_senseless_numbers_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
        make_scenes(tmp_path, **wrong)
