"""COCO average precision: both backends, the results file, distributed gathering and awkward data sets."""

import contextlib
import copy
import io
import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from queryvision.data.classes import ClassMap
from queryvision.errors import ConfigError, DataError
from queryvision.evaluation import CocoEvaluator, coco_records, evaluate
from queryvision.evaluation import coco_metrics as metrics
from queryvision.results import Result
from queryvision.task import Shareable
from queryvision.tasks.instance.task import InstanceEvaluator
from queryvision.tasks.keypoints.task import KeypointEvaluator

HEIGHT, WIDTH = 240, 320
IDS = (3, 7, 50, 51, 90)  # sparse; the last has no ground truth
CLASSES = ClassMap(IDS, tuple(f"class {i}" for i in IDS), (True,) * len(IDS))
KINDS = ("bbox", "segm", "keypoints")
BACKENDS = ("hotcoco", "pycocotools")
SIGMAS = (0.05, 0.1, 0.07)
BOX_NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
KEYPOINT_NAMES = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]


def drawn(box):
    """A box x y w h as a mask (H,W)."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    x, y, w, h = np.clip(np.round(box), 0, WIDTH).astype(int)
    mask[y : y + h, x : x + w] = True
    return mask


def annotate(rng, image, id_, box, points):
    x, y, w, h = box.tolist()
    crowd, seen = int(rng.random() < 0.15), rng.integers(0, 3, len(points))
    row = {"id": id_, "image_id": image, "category_id": int(rng.choice(IDS[:-1])), "bbox": [x, y, w, h]}
    row["area"] = w * h * rng.uniform(0.4, 1)
    row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + 0.8 * h]]
    if crowd:
        runs = np.flatnonzero(np.diff(drawn(box).ravel(order="F"), prepend=False, append=False))
        row["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *runs, HEIGHT * WIDTH]).tolist()}
    row["keypoints"] = [v for p, s in zip(points.tolist(), seen.tolist(), strict=True) for v in ((*p, s) if s else (0, 0, 0))]
    return row | {"num_keypoints": int((seen > 0).sum()), "iscrowd": crowd}


def scene(seed, kind, num_images=10, num_keypoints=17):
    """A ground truth and results with crowds, empty images, silent images, ties, all areas and many detections."""
    rng = np.random.default_rng(seed)
    ids = [int(i) for i in rng.permutation(90)[:num_images]]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in ids]
    annotations, results = [], {}
    for n, image in enumerate(ids):
        count = (12, 0, 3, 25)[n % 4]
        boxes = np.concatenate([rng.uniform(0, 150, (count, 2)), np.exp(rng.uniform(1, 5.2, (count, 2)))], axis=1)
        points = boxes[:, None, :2] + rng.uniform(0, 1, (count, num_keypoints, 2)) * boxes[:, None, 2:]
        start = len(annotations) + 1
        annotations += [annotate(rng, image, start + j, boxes[j], points[j]) for j in range(count)]
        if n % 5 == 2:
            continue  # an image without detections
        k = 60 if kind == "segm" else 330 if n == 0 else 120
        source = rng.integers(0, max(count, 1), k)
        near = boxes[source] if count else np.full((k, 4), 20.0)
        noise = rng.normal(0, 1, (k, 4)) * rng.choice([0, 0.02, 0.1, 0.3], (k, 1)) * near[:, [2, 3, 2, 3]]
        found = np.concatenate([near[:, :2] + noise[:, :2], np.abs(near[:, 2:] + noise[:, 2:])], axis=1)
        right = [IDS.index(annotations[start - 1 + j]["category_id"]) if count else 0 for j in source]
        labels = np.where(rng.random(k) < 0.8, right, rng.integers(0, len(IDS), k))
        labels = np.zeros(k, int) if n == 0 else labels  # 330 detections of one class
        spots = points[source] if count else np.full((k, num_keypoints, 2), 9.0)
        spots = spots + rng.normal(0, 1, spots.shape) * rng.choice([0, 0.03, 0.1], (k, 1, 1)) * near[:, None, 2:]
        scores = np.sort(np.where(rng.random(k) < 0.5, rng.random(k), rng.integers(1, 10, k) / 10))[::-1].copy()
        values = {"boxes": torch.from_numpy(np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], 1)).float()}
        if kind == "segm":
            values["masks"] = torch.from_numpy(np.stack([drawn(box) for box in found]))
        values["keypoints"] = torch.from_numpy(np.concatenate([spots, np.ones((*spots.shape[:2], 1))], 2)).float()
        results[image] = Result(torch.from_numpy(scores).float(), torch.from_numpy(labels), CLASSES, (HEIGHT, WIDTH), values)
    truth = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in reversed(IDS)],
    }
    return truth, results


def filled(truth, results, kind, **settings):
    evaluator = CocoEvaluator(truth, CLASSES, kind, **settings)
    for image, result in results.items():
        evaluator.add(image, result)
    return evaluator


def boxes_result(boxes, scores, labels=None, classes=CLASSES):
    labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else torch.tensor(labels)
    values = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)}
    return Result(torch.tensor(scores), labels, classes, (HEIGHT, WIDTH), values)


def one_object(**changes):
    row = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [10, 10, 40, 40]} | changes
    categories = [{"id": i, "name": f"class {i}"} for i in IDS]
    return {"images": [{"id": 5, "height": HEIGHT, "width": WIDTH}], "annotations": [row], "categories": categories}


def plain(truth, records, kind):
    """The summary of `pycocotools` itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = copy.deepcopy(truth)
        known.createIndex()
        scoring = COCOeval(known, known.loadRes(records), kind)
        scoring.evaluate(), scoring.accumulate(), scoring.summarize()
    return scoring.stats.tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree(kind, seed):
    num_keypoints = 3 if seed == 2 else 17
    limit = (None, 300, 7)[seed]
    settings = {"max_detections": limit, "sigmas": SIGMAS if num_keypoints == 3 else None}
    truth, results = scene(seed, kind, num_keypoints=num_keypoints)
    first, second = (filled(truth, results, kind, backend=name, **settings).compute() for name in BACKENDS)
    assert list(first) == list(second)
    assert first == pytest.approx(second, abs=1e-9)
    assert 0.02 < first["AP"] < 0.98 and len(set(first.values())) > 10  # the scene says something
    assert {name for name in first if "/" in name} == {f"AP/class {i}" for i in IDS[:-1]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_file_scores_the_same_with_pycocotools_alone(kind, backend, tmp_path):
    truth, results = scene(5, kind)
    evaluator = filled(truth, results, kind, backend=backend)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(evaluator.records))
    numbers = evaluator.compute()
    names = KEYPOINT_NAMES if kind == "keypoints" else BOX_NAMES
    assert list(numbers)[: len(names)] == names
    assert [numbers[name] for name in names] == pytest.approx(plain(truth, str(path), kind), abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_as_an_array_score_as_records(backend):
    truth, results = scene(6, "bbox")
    evaluator = filled(truth, results, "bbox", backend=backend)
    assert evaluator.compute() == evaluate(truth, evaluator.records, "bbox", backend)
    with pytest.raises(ValueError, match="only boxes"):
        evaluate(truth, np.zeros((1, 7)), "segm", backend)
    with pytest.raises(DataError, match="not a finite number"):
        evaluate(truth, np.full((1, 7), np.nan), "bbox", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_ids_beyond_double_precision(backend):
    ids = (2**60, 2**60 + 1)
    truth = one_object(image_id=ids[0]) | {"images": [{"id": i} for i in ids]}
    evaluator = filled(truth, {ids[1]: boxes_result([[10, 10, 50, 50]], [0.9])}, "bbox", backend=backend)
    assert evaluator.compute()["AP"] == 0.0
    evaluator.add(ids[0], boxes_result([[10, 10, 50, 50]], [0.95]))
    assert evaluator.compute()["AP"] == pytest.approx(1.0)


def test_nothing_is_changed_or_printed(capfd):
    for kind in KINDS:
        truth, results = scene(1, kind, num_images=4)
        for row in truth["annotations"]:
            del row["area"], row["iscrowd"]
        records = filled(truth, results, kind).records
        before = copy.deepcopy((truth, records))
        for backend in BACKENDS:
            evaluate(truth, records, kind, backend)
        assert (truth, records) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_by_hand(backend):
    evaluator = CocoEvaluator(one_object(), CLASSES, backend=backend)  # neither area nor iscrowd: 40 x 40 is medium
    evaluator.add(5, boxes_result([[100, 100, 120, 120], [10, 10, 50, 36]], [0.9, 0.4]))  # a miss; an IoU of 0.65
    expected = {"AP": 0.2, "AP50": 0.5, "AP75": 0, "APs": -1, "APm": 0.4, "APl": -1, "AR1": 0, "AR10": 0.4, "AR100": 0.4}
    # 4 of 10 IoU thresholds are met, at a precision of 1/2; among medium ones the small miss does not count: a precision of 1
    assert evaluator.compute() == pytest.approx(expected | {"ARs": -1, "ARm": 0.4, "ARl": -1, "AP/class 3": 0.2}, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_detections_or_ground_truth(kind, backend):
    truth, results = scene(0, kind, num_images=4)
    nothing = {name: -1.0 for name in (KEYPOINT_NAMES if kind == "keypoints" else BOX_NAMES)}
    silent = evaluate(truth, [], kind, backend)
    assert silent["AP"] == silent["AP50"] == silent["AP/class 3"] == 0.0
    empty = truth | {"annotations": []}
    assert evaluate(empty, [], kind, backend) == nothing
    assert filled(empty, results, kind, backend=backend).compute() == nothing
    assert evaluate({"images": [], "categories": truth["categories"]}, [], kind, backend) == nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_results_are_images_without_detections(backend):
    truth = one_object()
    shapes = {"boxes": (0, 4), "masks": (0, HEIGHT, WIDTH), "keypoints": (0, 17, 3)}
    values = {name: torch.zeros(shape) for name, shape in shapes.items()}
    nobody = Result(torch.zeros(0), torch.zeros(0, dtype=torch.long), CLASSES, (HEIGHT, WIDTH), values)
    for kind in KINDS:
        evaluator = filled(truth, {5: nobody}, kind, backend=backend)
        assert evaluator.records == [] and evaluator.compute()["AP"] == (0.0 if kind == "bbox" else -1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_detection_limit(backend):
    boxes = [[200.0, 200.0, 220.0, 220.0]] * 150 + [[10.0, 10.0, 50.0, 50.0]]
    result = boxes_result(boxes, np.linspace(0.9, 0.1, 151).tolist())
    few, many = (filled(one_object(), {5: result}, "bbox", backend=backend, max_detections=n).compute() for n in (100, 300))
    assert few["AP"] == few["AR100"] == many["AR100"] == 0.0
    assert many["AP"] == pytest.approx(1 / 151) and many["AR300"] == 1.0 and "AR300" not in few
    assert "AR10" not in filled(one_object(), {5: result}, "bbox", backend=backend, max_detections=4).compute()


def test_classes_meet_by_name(capfd):
    # "class 7" is 3 here; "class 3" is 8; a class unknown to the ground truth may keep 99, but not 7, which means another one
    classes = ClassMap((3, 7, 8, 99), ("class 7", "unicorn", "class 3", "griffin"), (True,) * 4)
    evaluator = CocoEvaluator(one_object(), classes)
    boxes = [[10.0, 10.0, 50.0, 50.0]] * 5
    evaluator.add(5, boxes_result(boxes, [0.9, 0.8, 0.7, 0.6, 0.5], [2, 1, 0, 3, 1], classes))
    assert [row["category_id"] for row in evaluator.records] == [3, 7, 99]
    assert [row["score"] for row in evaluator.records] == pytest.approx([0.9, 0.7, 0.6])
    assert evaluator.num_unknown == 2
    assert evaluator.compute()["AP/class 3"] == pytest.approx(1.0)
    evaluate(one_object(), evaluator.records)
    assert capfd.readouterr() == ("", "")  # nobody complains of the griffin


@pytest.mark.parametrize(("covered", "kept", "wanted"), [(None, [3, 7], 1.0), ([3], [3], 1.0), ([7], [7], -1), ([], [], -1)])
def test_classes_that_nobody_looked_for_do_not_count(covered, kept, wanted):
    truth = one_object()
    truth["images"][0]["covered_category_ids"] = covered
    evaluator = CocoEvaluator(truth, CLASSES)
    evaluator.add(5, boxes_result([[10.0, 10.0, 50.0, 50.0]] * 2, [0.9, 0.8], [0, 1]))
    assert [row["category_id"] for row in evaluator.records] == kept and evaluator.num_unknown == 0
    assert evaluator.compute()["AP"] == pytest.approx(wanted)


def test_records_keep_full_precision():
    box, score = [0.1, 0.2, 100000.1, 3.3], 0.123456789
    result = boxes_result([box], [score])
    (row,) = coco_records(result, 5, "bbox", {0: 3})
    x1, y1, x2, y2 = np.float32(box).astype(np.float64).tolist()
    assert row == {"image_id": 5, "category_id": 3, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(np.float32(score))}
    half = Result(result.scores.bfloat16(), result.labels, CLASSES, result.size, {"boxes": result.boxes.bfloat16()})
    assert coco_records(half, 5, "bbox", {0: 3})[0]["score"] == float(result.scores.bfloat16())


def test_what_is_not_finite_is_left_out():
    good, nan, inf = [10.0, 10.0, 50.0, 50.0], [float("nan"), 0.0, 1.0, 1.0], [0.0, 0.0, float("inf"), 1.0]
    evaluator = CocoEvaluator(one_object(), CLASSES)
    evaluator.add(5, boxes_result([nan, good, inf, good], [0.9, float("nan"), 0.8, 0.7]))
    assert len(evaluator.records) == 1 and evaluator.num_not_finite == 3 and evaluator.compute()["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gathered_processes_give_the_numbers_of_one(kind):
    truth, results = scene(2, kind)
    whole = filled(truth, results, kind)
    items = list(results.items())
    shares = [dict(items[::2] + items[3:4]), dict(items[1::2] + items[2:3])]  # padded with images of each other
    states = [pickle.loads(pickle.dumps(filled(truth, share, kind).state())) for share in shares]
    gathered = filled(truth, {}, kind)
    gathered.merge(states)
    gathered.add(items[0][0], items[1][1])  # the image is known: the first answer stays
    assert gathered.records == whole.records and len(whole.records) > 100
    assert gathered.compute() == whole.compute()


@pytest.mark.parametrize("backend", BACKENDS)
def test_annotation_with_id_zero_counts(backend):
    evaluator = filled(one_object(id=0), {5: boxes_result([[10, 10, 50, 50]], [0.5])}, "bbox", backend=backend)
    assert evaluator.compute()["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segmentation", [None, [], [[10, 10, 50, 50]]])
def test_an_object_without_a_mask_is_ignored(backend, segmentation):
    truth = one_object(segmentation=segmentation)
    outline = [[100, 100, 140, 100, 140, 140, 100, 140]]
    truth["annotations"].append({"id": 2, "image_id": 5, "category_id": 3, "bbox": [100, 100, 40, 40], "segmentation": outline})
    masks = torch.from_numpy(np.stack([drawn(np.array(box)) for box in ([10, 10, 40, 40], [100, 100, 40, 40])]))
    result = Result(torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), CLASSES, (HEIGHT, WIDTH), {"masks": masks})
    assert filled(truth, {5: result}, "segm", backend=backend).compute()["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(("kind", "judge"), [("segm", InstanceEvaluator), ("keypoints", KeypointEvaluator)])
def test_tasks_with_boxes_beside_share_their_images(kind, judge):
    """Two processes with half of the images each, and one that both have seen, find what one finds alone."""
    truth, results = scene(3, kind)
    for category in truth["categories"]:
        category["keypoints"] = [f"point {i}" for i in range(17)]
    classes = ClassMap.from_categories(truth["categories"])
    rows = [(image, replace(result, classes=classes)) for image, result in results.items()]
    alone, first, second = (judge(truth, classes, "auto") for _ in range(3))
    for part, own in ((alone, rows), (first, rows[:5]), (second, rows[4:])):
        for image, result in own:
            part.add(image, result)
    assert isinstance(first, Shareable) and first.compute() != alone.compute()
    first.merge(pickle.loads(pickle.dumps([first.state(), second.state()])))
    assert first.compute() == alone.compute() and first.compute()["box_AP"] > 0.02 and first.compute()["AP"] > 0.02
    assert sorted(map(str, first.records)) == sorted(map(str, alone.records))


def test_wrong_input_is_named():
    truth, result = one_object(), boxes_result([[10, 10, 50, 50]], [0.5])
    with pytest.raises(ConfigError, match="did you mean 'bbox'"):
        CocoEvaluator(truth, CLASSES, "bbx")
    with pytest.raises(ConfigError, match="did you mean 'hotcoco'"):
        CocoEvaluator(truth, CLASSES, backend="hotcooc")
    with pytest.raises(ConfigError, match="max_detections is 0"):
        CocoEvaluator(truth, CLASSES, max_detections=0)
    with pytest.raises(ConfigError, match="above 0"):
        evaluate(truth, [], "keypoints", sigmas=[0.1, 0])
    with pytest.raises(DataError, match="image 6 is not"):
        CocoEvaluator(truth, CLASSES).add(6, result)
    with pytest.raises(DataError, match="masks are 4x4, the annotations say 240x320"):
        masks = Result(result.scores, result.labels, CLASSES, (4, 4), {"masks": torch.ones(1, 4, 4)})
        CocoEvaluator(truth, CLASSES, "segm").add(5, masks)
    with pytest.raises(DataError, match="masks are 7x9, the annotations"):  # which are not built to tell
        unbuilt = Result(result.scores, result.labels, CLASSES, (7, 9), {"masks": SimpleNamespace(size=(7, 9))})
        CocoEvaluator(truth, CLASSES, "segm").add(5, unbuilt)
    with pytest.raises(DataError, match="annotation 1 .* no 'bbox'"):
        evaluate(one_object(bbox=None), [])
    with pytest.raises(DataError, match="height or width"):
        evaluate(truth | {"images": [{"id": 5}]}, [], "segm")
    with pytest.raises(DataError, match="a score is nan"):
        evaluate(truth, [{"image_id": 5, "category_id": 3, "bbox": [1, 1, 2, 2], "score": float("nan")}])
    with pytest.raises(DataError, match="annotation 1 .* 2 keypoints, but 17 sigmas"):
        evaluate(one_object(keypoints=[1, 1, 2] * 2), [], "keypoints")
    with pytest.raises(DataError, match="results of image 5: 2 keypoints, but 3 sigmas"):
        rows = [{"image_id": 5, "category_id": 3, "keypoints": [1, 1, 2] * 2, "score": 0.5}]
        evaluate(truth, rows, "keypoints", sigmas=SIGMAS)


def test_backend_falls_back_to_what_is_installed(monkeypatch):
    assert metrics.resolve("auto") == "hotcoco"
    load = metrics.importlib.import_module

    def without_hotcoco(name):
        if name == "hotcoco":
            raise ImportError(name)
        return load(name)

    monkeypatch.setattr(metrics.importlib, "import_module", without_hotcoco)
    assert metrics.resolve("auto") == "pycocotools"
    with pytest.raises(ConfigError, match="pip install hotcoco"):
        metrics.resolve("hotcoco")
