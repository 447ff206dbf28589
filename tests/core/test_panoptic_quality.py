"""Panoptic quality against `panopticapi` and `hotcoco`, mean IoU against a count by pixel, and files that others can score."""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
import torch
from hotcoco import panoptic as hotcoco_panoptic
from panopticapi.evaluation import PQStat, pq_compute_single_core
from PIL import Image

from queryvision.data.classes import ClassMap
from queryvision.data.coco_classes import COCO_NAMES, COCO_STUFF
from queryvision.data.coco_colors import COCO_COLORS
from queryvision.errors import ConfigError, DataError
from queryvision.evaluation.panoptic import PanopticEvaluator
from queryvision.evaluation.panoptic_files import read_ids, write_ids, write_panoptic
from queryvision.inference.drawing import draw_segments, segment_colors
from queryvision.masks import Masks, SegmentMasks
from queryvision.results import Result
from queryvision.weights.reading import class_map, dense_class_map

CATEGORIES = [
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 20, "name": "bird", "isthing": 1},  # never in the ground truth, sometimes found
    {"id": 92, "name": "sky", "isthing": 0},
    {"id": 100, "name": "road", "isthing": 0},
    {"id": 200, "name": "sand", "isthing": 0},  # never
]
MODEL = ClassMap((1, 2, 3, 4, 5, 20), ("sky", "dog", "cat", "road", "ghost", "bird"), (False, True, True, False, True, True))
"""Knows the categories by name, in another order with other ids; `ghost` is no category."""
NAMES = ["PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st", "mIoU"]


def patches(rng, size, most):
    """(H,W) of 0..most: rectangles over each other, and noise."""
    rows = np.zeros(size, np.int64)
    for number in range(1, most + 1):
        y, x = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 4)
        rows[y : y + rng.integers(2, 40), x : x + rng.integers(2, 40)] = number
    return rows


def truth_of(rng, size):
    """Ids (H,W) and segments_info with crowds, void, a segment without a pixel and ids that nobody explains."""
    rows = patches(rng, size, 12)
    ids = rng.choice(2**24 - 1, 13, replace=False) + 1
    ids[0] = 0
    kinds = rng.choice([3, 3, 7, 92, 100], 12)
    segments = [
        {
            "id": int(ids[n]),
            "category_id": int(kinds[n - 1]),
            "area": int((rows == n).sum()),
            "iscrowd": int(rng.random() < 0.25),
        }
        for n in range(1, 13)
        if n != 5
    ]
    return ids[rows], segments


def found_of(rng, ids, segments, size):
    """A result that is partly right: shifted, renamed, cut, invented; some numbers occur twice or have no pixel."""
    kind = {3: 2, 7: 1, 92: 0, 100: 3}
    rows, labels = np.zeros(size, np.int64), []
    shift = tuple(rng.integers(-2, 3, 2))
    for segment in segments:
        if rng.random() < 0.75:
            mask = np.roll(ids == segment["id"], shift, (0, 1)) & (rng.random(size) < rng.choice([0.7, 0.97]))
            rows[mask] = len(labels) + 1
            labels.append(kind[segment["category_id"]] if rng.random() < 0.85 else int(rng.integers(0, 6)))
    extra = patches(rng, size, 4)
    rows = np.where((extra > 0) & (rng.random(size) < 0.5), extra + len(labels), rows)
    labels += rng.integers(0, 6, 4).tolist()
    labels.append(2)  # without a pixel
    numbers = rng.permutation(60)[: len(labels)] + 1
    masks = SegmentMasks(torch.from_numpy(numbers), torch.from_numpy(np.concatenate([[0], numbers])[rows]).int())
    scores = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    result = Result(scores, torch.tensor(labels), MODEL, size, {"masks": masks})
    return result.above(float(scores[-3])) if rng.random() < 0.3 else result  # pixels of what is left out are nobody's


def scene(seed, num_images=9, semantic=False):
    rng = np.random.default_rng(seed)
    images, annotations, maps, results = [], [], {}, {}
    for id_ in rng.permutation(500)[:num_images].tolist():
        size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
        images.append({"id": id_, "file_name": f"photo {id_}.jpg", "height": size[0], "width": size[1]})
        maps[id_], segments = truth_of(rng, size)
        annotations.append({"image_id": id_, "file_name": f"{id_}.png", "segments_info": segments})
        results[id_] = found_of(rng, maps[id_], segments, size)
    results[images[3]["id"]] = nothing(images[3])
    for result in results.values() if semantic else ():
        result.maps = {"semantic": torch.from_numpy(rng.integers(-1, 6, result.size))}
    truth = {"images": images, "annotations": annotations, "categories": CATEGORIES, "segments": maps.__getitem__}
    return truth, results


def nothing(image):
    size = (image["height"], image["width"])
    empty = torch.zeros(0, dtype=torch.int64)
    return Result(torch.zeros(0), empty, MODEL, size, {"masks": SegmentMasks(empty, torch.zeros(size, dtype=torch.int32))})


def filled(truth, results, classes=MODEL, backend="auto"):
    evaluator = PanopticEvaluator(truth, classes, backend)
    for image_id, result in results.items():
        evaluator.add(image_id, result)
    return evaluator


def written(truth, folder):
    """The ground truth as files: JSON and folder."""
    (folder / "truth").mkdir()
    for row in truth["annotations"]:
        write_ids(folder / "truth" / row["file_name"], np.asarray(truth["segments"](row["image_id"])))
    content = {key: truth[key] for key in ("images", "annotations", "categories")}
    (folder / "truth.json").write_text(json.dumps(content))
    return folder / "truth.json"


def peer(truth_file, found_file):
    """What `panopticapi` says of two JSON files and their folders, under our names."""
    truth, found = json.loads(truth_file.read_text()), json.loads(found_file.read_text())
    rows = {row["image_id"]: row for row in found["annotations"]}
    categories = {row["id"]: row for row in truth["categories"]}
    with contextlib.redirect_stdout(io.StringIO()):
        pairs = [(row, rows[row["image_id"]]) for row in truth["annotations"]]
        folders = (str(file.with_suffix("")) for file in (truth_file, found_file))
        stat: PQStat = pq_compute_single_core(0, pairs, *folders, categories)
    numbers = {}
    for suffix, things in (("", None), ("_th", True), ("_st", False)):
        chosen = [c for c in categories.values() if things is None or (c["isthing"] == 1) == things]
        if any(stat[c["id"]].tp + stat[c["id"]].fp + stat[c["id"]].fn for c in chosen):  # else it divides by zero
            mean, each = stat.pq_average(categories, things)
            numbers |= {f"{key.upper()}{suffix}": mean[key] for key in ("pq", "sq", "rq")}
            if things is None:
                numbers |= {f"PQ/{categories[id_]['name']}": each[id_]["pq"] for id_ in each}
        else:
            numbers |= dict.fromkeys([f"{key}{suffix}" for key in ("PQ", "SQ", "RQ")], -1)
    return numbers


@pytest.mark.parametrize("seed", range(6))
def test_the_numbers_of_panopticapi_and_hotcoco(seed, tmp_path):
    """What we count, what `panopticapi` counts for us, and what both say of the files that we write."""
    truth, results = scene(seed)
    evaluator, theirs = filled(truth, results), filled(truth, results, backend="pycocotools").compute()
    ours = evaluator.compute()
    assert list(ours) == list(theirs) and ours == pytest.approx(theirs, abs=1e-15)
    evaluator.save(tmp_path / "found.json")
    expected = peer(written(truth, tmp_path), tmp_path / "found.json")
    assert {name: ours.get(name, 0.0) for name in expected} == pytest.approx(expected, abs=1e-15)
    hotcoco = hotcoco_panoptic.pq_compute(tmp_path / "truth.json", tmp_path / "found.json")
    for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for key in ("pq", "sq", "rq"):
            assert ours[f"{key.upper()}{suffix}"] == pytest.approx(hotcoco[group][key], abs=1e-12)
    assert list(ours)[:10] == NAMES and 0.05 < ours["PQ"] < 0.9 and len(set(ours.values())) > 14  # the scene says something


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_mean_iou_counts_every_pixel(seed, semantic):
    truth, results = scene(seed, semantic=semantic)
    own = {row["name"]: row["id"] for row in CATEGORIES}
    common, known, said = (dict.fromkeys(own.values(), 0) for _ in range(3))
    for row in truth["annotations"]:
        ids, result = truth["segments"](row["image_id"]), results[row["image_id"]]
        kinds = {segment["id"]: segment["category_id"] for segment in row["segments_info"]}
        labels = result.maps["semantic"] if semantic else torch.full(result.size, -1)
        if not semantic:
            for mask, label in zip(result.masks, result.labels, strict=True):
                labels[mask] = label
        for id_, label in zip(ids.ravel().tolist(), labels.flatten().tolist(), strict=True):
            right, taken = kinds.get(id_), own.get(MODEL.names[label]) if label >= 0 else None
            if right is None:
                continue
            known[right] += 1
            common[right] += right == taken
            if taken is not None:
                said[taken] += 1
    expected = {
        f"IoU/{row['name']}": common[i] / (known[i] + said[i] - common[i]) for row in CATEGORIES if known[i := row["id"]]
    }
    found = filled(truth, results).compute()
    assert {name: value for name, value in found.items() if name.startswith("IoU/")} == pytest.approx(expected, abs=1e-12)
    assert found["mIoU"] == pytest.approx(sum(expected.values()) / len(expected), abs=1e-12) and len(expected) == 4


def perfect(truth, classes):
    """Results that say what the ground truth says, crowds included."""
    results = {}
    for row in truth["annotations"]:
        ids = np.asarray(truth["segments"](row["image_id"]))
        segments = [segment for segment in row["segments_info"] if (ids == segment["id"]).any()]
        known = [0, *(segment["id"] for segment in segments)]
        rows = sum(number * (ids == id_) for number, id_ in enumerate(known))
        masks = SegmentMasks(torch.arange(1, len(known)), torch.as_tensor(rows).reshape(ids.shape).int())
        labels = torch.tensor([classes.index_of_id[segment["category_id"]] for segment in segments], dtype=torch.int64)
        results[row["image_id"]] = Result(torch.ones(len(labels)), labels, classes, ids.shape, {"masks": masks})
    return results


def test_real_maps_with_perturbed_results(real_data, tmp_path):
    root = real_data("coco")
    truth = json.loads((root / "annotations" / "panoptic_val.json").read_text())
    truth["annotations"], truth["folder"] = truth["annotations"][:8], root / "panoptic_val"
    truth["segments"] = lambda id_: read_ids(root / "panoptic_val" / f"{id_:012d}.png")
    classes, rng = ClassMap.from_categories(truth["categories"]), np.random.default_rng(0)
    results = perfect(truth, classes)
    numbers = filled(truth, results, classes).compute()
    assert {numbers[name] for name in NAMES} == {1.0}
    for result in results.values():
        masks, labels = result.values["masks"], result.labels.clone()
        labels[torch.from_numpy(rng.random(len(labels)) < 0.1)] = 7
        moved = masks.map.roll((int(rng.integers(-6, 7)), int(rng.integers(-6, 7))), (0, 1))
        moved[torch.from_numpy(rng.random(moved.shape) < 0.02)] = 0
        result.labels, result.values = labels, {"masks": SegmentMasks(masks.numbers, moved)}
    folder_only = {key: value for key, value in truth.items() if key != "segments"}
    ours = filled(folder_only, results, classes).compute()
    evaluator = filled(truth, results, classes, "pycocotools")
    assert ours == pytest.approx(evaluator.compute(), abs=1e-15) and 0.2 < ours["PQ"] < 0.8
    evaluator.save(tmp_path / "found.json")
    expected = peer(written(truth, tmp_path), tmp_path / "found.json")
    assert {name: ours.get(name, 0.0) for name in expected} == pytest.approx(expected, abs=1e-15)
    evaluator.save(tmp_path / "plain")  # a file without suffix is not in the way of its folder
    assert (tmp_path / "plain").read_text() == (tmp_path / "found.json").read_text()
    assert {p.name for p in (tmp_path / "plain_png").iterdir()} == {p.name for p in (tmp_path / "found").iterdir()}


def test_written_results_score_the_same_elsewhere(tmp_path):
    """`qv predict` numbers the pictures from 1; `panopticapi` reads its folder alone. An empty picture is a picture."""
    truth, _ = scene(4, num_images=4)
    for row, image in zip(truth["annotations"], truth["images"], strict=True):
        row["segments_info"] = [{**segment, "iscrowd": 0} for segment in row["segments_info"] if segment["area"]]
        image["file_name"] = f"{image['id']}.jpg"
    classes = ClassMap.from_categories(CATEGORIES)
    results = perfect(truth, classes)
    renumbered = {row["image_id"]: number for number, row in enumerate(truth["annotations"], 1)}
    maps = {renumbered[id_]: truth["segments"](id_) for id_ in renumbered}
    for row in truth["annotations"]:
        row["image_id"] = renumbered[row["image_id"]]
    truth["segments"] = maps.__getitem__
    shown = {f"photo.{id_}": result for id_, result in results.items()}  # a name with a dot
    write_panoptic(tmp_path, shown, classes)
    numbers = peer(written(truth, tmp_path), tmp_path / "panoptic.json")
    assert {numbers[name] for name in numbers if "/" not in name} == {1.0}
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert content["categories"] == CATEGORIES and [row["id"] for row in content["images"]] == [1, 2, 3, 4]
    for row in content["annotations"]:
        ids = read_ids(tmp_path / "panoptic" / row["file_name"])
        assert Image.open(tmp_path / "panoptic" / row["file_name"]).mode == "RGB"
        assert {s["id"]: s["area"] for s in row["segments_info"]} == {i: int((ids == i).sum()) for i in set(ids.flat) - {0}}


def test_parts_of_processes_merge_in_any_order():
    truth, results = scene(2)
    whole, ids = filled(truth, results), list(results)
    parts = [filled(truth, {id_: results[id_] for id_ in some}) for some in (ids[5:], ids[:6])]  # one image in both
    first = PanopticEvaluator(truth, MODEL)
    first.merge([pickle.loads(pickle.dumps(part.state())) for part in parts])
    assert first.compute() == whole.compute() and first.records == whole.records
    whole.add(ids[0], results[ids[1]])  # known already
    assert first.compute() == whole.compute()


@pytest.mark.parametrize("backend", ["auto", "pycocotools"])
def test_images_without_a_result_have_found_nothing(backend):
    truth, results = scene(3)
    left_out = truth["images"][0]
    results[left_out["id"]] = nothing(left_out)
    whole = filled(truth, results, backend=backend).compute()
    del results[left_out["id"]]
    assert filled(truth, results, backend=backend).compute() == whole
    truth["annotations"] = truth["annotations"][1:]  # an image that nobody describes does not count
    without = filled(truth, results, backend=backend).compute()
    results[left_out["id"]] = results[truth["images"][1]["id"]]
    evaluator = filled(truth, results, backend=backend)
    assert evaluator.compute() == without != whole and len(evaluator.records) == len(truth["images"])


def test_sets_of_stuff_alone_and_of_nothing():
    categories = [{"id": 1, "name": "sky", "isthing": 0}, {"id": 2, "name": "road", "isthing": 0}]
    ids = np.repeat([5, 6], 50).reshape(10, 10)
    segments = [{"id": 5, "category_id": 1}, {"id": 6, "category_id": 2}]  # no area, no crowd
    truth = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": categories, "segments": lambda _: ids}
    truth["annotations"] = [{"image_id": 1, "file_name": "a.png", "segments_info": segments}]
    classes = ClassMap.from_categories(categories)
    for backend in ("auto", "hotcoco", "pycocotools"):
        numbers = filled(truth, perfect(truth, classes), classes, backend).compute()
        assert [numbers[name] for name in NAMES] == [1, 1, 1, -1, -1, -1, 1, 1, 1, 1]
        assert list(numbers)[10:] == ["PQ/sky", "PQ/road", "IoU/sky", "IoU/road"]
    empty = PanopticEvaluator({**truth, "images": [], "annotations": []}, classes)
    assert empty.compute() == dict.fromkeys(NAMES, -1.0) and empty.records == []


def test_what_cannot_be_judged_is_refused():
    truth, results = scene(1, num_images=4)
    evaluator, (id_, result) = PanopticEvaluator(truth, MODEL), next(iter(results.items()))
    height, width = result.size
    with pytest.raises(DataError, match=f"segments are 3x4, the annotations say {height}x{width}"):
        evaluator.add(id_, nothing({"height": 3, "width": 4}))
    result.maps = {"semantic": torch.zeros(2, 2, dtype=torch.int64)}
    with pytest.raises(DataError, match="classes of pixels are 2x2"):
        evaluator.add(id_, result)
    with pytest.raises(DataError, match="image 9999 is not in the ground truth"):
        evaluator.add(9999, result)
    result.values = {"masks": Masks(torch.zeros(1, 2), torch.zeros(2, 3, 3), (3, 3), result.size)}
    with pytest.raises(TypeError, match="do not overlap"):
        evaluator.add(id_, result)
    with pytest.raises(DataError, match="name their 'folder'"):
        PanopticEvaluator({key: truth[key] for key in ("images", "annotations", "categories")}, MODEL)
    with pytest.raises(ConfigError, match="no backend 'coco'"):
        PanopticEvaluator(truth, MODEL, "coco")


def test_colors_are_ids():
    labels, classes = [0, 1, 1, 1, 0, 2] * 60, ClassMap((1, 2, 3), ("sky", "cat", "dog"), (False, True, True))
    colors = segment_colors(labels, classes)
    assert len(set(colors)) == len(colors) and (0, 0, 0) not in colors
    assert colors[0] == segment_colors([0], classes)[0] and colors[1] == segment_colors([1], classes)[0]
    base = np.array(colors[1])
    assert all(np.abs(np.array(c) - base).max() <= 40 for c, label in zip(colors, labels, strict=True) if label == 1)
    assert colors == segment_colors(labels, classes)  # nothing random


def test_colors_of_the_categories_are_drawn_and_kept():
    rows = [{"id": 1, "name": "sky", "isthing": 0, "color": [70, 130, 180]}, {"id": 2, "name": "cat", "color": [220, 20, 60]}]
    plain = [{"id": 3, "name": "dog"}, {"id": 4, "name": "hen", "color": [0, 0, 0]}, {"id": 5, "name": "ox", "color": "red"}]
    classes = ClassMap.from_categories([*rows, *plain])
    assert classes.colors == ((70, 130, 180), (220, 20, 60), None, None, None)
    assert ClassMap.from_dict(json.loads(json.dumps(classes.to_dict()))).colors == classes.colors
    assert ClassMap.from_categories(plain).union(ClassMap.from_categories(rows)).colors == (
        None,
        None,
        None,
        *classes.colors[:2],
    )
    colors = segment_colors([1, 0, 1, 2], classes)
    assert colors[:2] == [(220, 20, 60), (70, 130, 180)] and colors[2] != colors[0]
    assert colors[3] == segment_colors([2], ClassMap((1, 2, 3), ("a", "b", "c"), (True,) * 3))[0]


def test_coco_is_drawn_in_its_own_colors(tmp_path):
    names = {1: "person", 149: "road", 187: "sky-other-merged", 200: "rug-merged"}
    colors = [(220, 20, 60), (128, 64, 128), (70, 130, 180), (250, 141, 255)]
    subset = ClassMap(tuple(names), tuple(names.values()), (True, False, False, False))
    assert list(COCO_COLORS) == [*COCO_NAMES.values(), *COCO_STUFF.values()] and len(set(COCO_COLORS.values())) == 133
    for classes in (subset, class_map(250), dense_class_map(133)):
        labels = [classes.index_of_name[name] for name in names.values()]
        found = segment_colors([labels[0], *labels], classes)
        assert [found[0], *found[2:]] == colors
        assert 0 < np.abs(np.array(found[1]) - found[0]).max() <= 40, "persons are told apart"

    own = ClassMap.from_categories([{"id": 1, "name": "person", "color": [1, 2, 3]}, {"id": 149, "name": "road"}])
    assert segment_colors([0, 1], own) == [(1, 2, 3), (128, 64, 128)]
    other = ClassMap((1, 2), ("person", "lane"), (True, False))
    assert segment_colors([0, 1], other) == segment_colors([0, 1], ClassMap((1, 2), ("a", "b"), (True, False)))

    masks = SegmentMasks(torch.tensor([1, 2]), torch.tensor([[1, 1, 2]], dtype=torch.int32))
    write_panoptic(tmp_path, {"a": Result(torch.ones(2), torch.tensor([0, 2]), subset, (1, 3), {"masks": masks})}, subset)
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert [tuple(row["color"]) for row in content["categories"]] == colors
    assert np.array(Image.open(tmp_path / "panoptic" / "a.png")).tolist() == [[[220, 20, 60]] * 2 + [[70, 130, 180]]]


def test_drawing_names_segments_inside_of_them():
    rows = np.zeros((240, 320), int)
    rows[20:120, 10:150], rows[150:154, 200:300] = 1, 2
    blank = Image.new("RGB", (320, 240), (90, 90, 90))
    plain = np.array(draw_segments(blank, torch.from_numpy(rows), None, [(255, 0, 0), (0, 0, 255)]))
    named = np.array(draw_segments(blank, rows, ["cat", "thin"], [(255, 0, 0), (0, 0, 255)]))
    assert (plain[200, 50] == 90).all() and (plain[60, 60] == (172, 45, 45)).all() and (plain[20, 60] == 255).all()
    changed = (plain != named).any(-1)
    y, x = changed.nonzero()
    assert (rows[changed] == 1).all() and abs(y.mean() - 70) < 4 and 60 - 8 < x.mean() < 108  # on the ridge of the rectangle
    assert (np.array(blank) == 90).all()  # the picture given is not changed
