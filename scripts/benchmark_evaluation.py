"""Time of evaluation against the reference tools in one run, interleaved, with the same numbers.

    python scripts/benchmark_evaluation.py [--only coco panoptic] [--images 5000] [--rounds 7]

COCO: 5,000 images of 7 objects, 100 detections each, 80 classes; from results in memory to twelve numbers, indexing of the
ground truth included, against `pycocotools` from the rows of a results file. Panoptic: 200 images 480x640 with 12 segments,
from segments in memory to PQ, against `panopticapi` from its PNG files (writing them is not counted). Needs the test extra.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from panopticapi.evaluation import PQStat, pq_compute_single_core
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from queryvision.data.classes import ClassMap
from queryvision.evaluation import CocoEvaluator, PanopticEvaluator, coco_records
from queryvision.evaluation.panoptic_files import write_ids
from queryvision.masks import SegmentMasks
from queryvision.results import Result

CLASSES = ClassMap(tuple(range(1, 81)), tuple(f"class {i}" for i in range(80)), (True,) * 40 + (False,) * 40)
HEIGHT, WIDTH = 480, 640


def compare(name: str, ours: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> tuple[Any, Any]:
    """Prints the ratio of medians and the spread; gives both results."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    found = {}
    for turn in range(rounds + 1):
        for key, work in (("ours", ours), ("peer", peer)):
            began = time.perf_counter()
            found[key] = work()
            if turn or not rounds:
                times[key].append(time.perf_counter() - began)
    a, b = (statistics.median(times[key]) for key in ("ours", "peer"))
    spread = max((max(t) - min(t)) / statistics.median(t) for t in times.values())
    print(f"{name}: ours {a:.2f} s, peer {b:.2f} s, {b / a:.1f} times faster, spread {spread:.0%}", flush=True)
    return found["ours"], found["peer"]


def coco(images: int, rounds: int) -> None:
    """Average precision of boxes."""
    draw = np.random.default_rng(0)
    rows, annotations, results = [], [], {}
    for image in range(1, images + 1):
        rows.append({"id": image, "width": WIDTH, "height": HEIGHT})
        count = int(draw.integers(1, 14))
        boxes = np.concatenate([draw.uniform(0, 400, (count, 2)), np.exp(draw.uniform(2, 5.3, (count, 2)))], 1)
        labels = draw.integers(0, 80, count)
        annotations += [
            {"id": len(annotations) + i + 1, "image_id": image, "category_id": int(label) + 1, "bbox": box.tolist(),
             "area": float(box[2] * box[3]), "iscrowd": int(draw.random() < 0.02)}
            for i, (box, label) in enumerate(zip(boxes, labels, strict=True))
        ]  # fmt: skip
        source = draw.integers(0, count, 100)
        found = boxes[source] + draw.normal(0, 0.1, (100, 4)) * boxes[source][:, [2, 3, 2, 3]]
        found[:, 2:] = np.abs(found[:, 2:])
        said = np.where(draw.random(100) < 0.7, labels[source], draw.integers(0, 80, 100))
        xyxy = torch.from_numpy(np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], 1)).float()
        scores = torch.from_numpy(np.sort(draw.random(100))[::-1].copy()).float()
        results[image] = Result(scores, torch.from_numpy(said), CLASSES, (HEIGHT, WIDTH), {"boxes": xyxy}, "")
    categories = [{"id": id_, "name": name} for id_, name in zip(CLASSES.ids, CLASSES.names, strict=True)]
    truth = {"images": rows, "annotations": annotations, "categories": categories}
    ids = dict(enumerate(CLASSES.ids))
    records = [record for image, result in results.items() for record in coco_records(result, image, "bbox", ids)]

    def ours() -> list[float]:
        evaluator = CocoEvaluator(truth, CLASSES, backend="hotcoco")
        for image, result in results.items():
            evaluator.add(image, result)
        metrics = evaluator.compute()
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
        return [metrics[name] for name in names]

    def peer() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            reference = COCO()
            reference.dataset = {key: [dict(row) for row in value] for key, value in truth.items()}
            reference.createIndex()
            scoring = COCOeval(reference, reference.loadRes([dict(record) for record in records]), "bbox")
            scoring.evaluate()
            scoring.accumulate()
            scoring.summarize()
        return list(scoring.stats)

    mine, theirs = compare(f"COCO evaluation, {images} images x 100 detections", ours, peer, rounds)
    print(f"  largest difference of the twelve numbers: {np.abs(np.subtract(mine, theirs)).max():.1e}")


def blobs(draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """(H,W) of 0..12: ellipses over each other."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rows = np.zeros((HEIGHT, WIDTH), np.int64)
    for number in range(1, 13):
        cy, cx, ry, rx = draw.uniform(0, HEIGHT), draw.uniform(0, WIDTH), draw.uniform(30, 150), draw.uniform(30, 200)
        rows[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] = number
    return rows


def panoptic(rounds: int, images: int = 200) -> None:
    """Panoptic quality."""
    draw = np.random.default_rng(0)
    truths, results, rows, annotations = {}, {}, [], []
    for image in range(1, images + 1):
        ids = blobs(draw)
        seen = [int(number) for number in np.unique(ids) if number]
        kinds = {number: int(draw.integers(0, 80)) for number in seen}
        segments = [{"id": n, "category_id": CLASSES.ids[kinds[n]], "area": int((ids == n).sum()), "iscrowd": 0} for n in seen]
        truths[image] = ids
        rows.append({"id": image, "width": WIDTH, "height": HEIGHT, "file_name": f"{image}.jpg"})
        annotations.append({"image_id": image, "file_name": f"{image}.png", "segments_info": segments})
        moved = np.roll(ids, tuple(draw.integers(-12, 13, 2)), (0, 1))
        compact = np.searchsorted([0, *seen], moved)
        labels = torch.tensor([kinds[n] if draw.random() < 0.8 else int(draw.integers(0, 80)) for n in seen])
        masks = SegmentMasks(torch.arange(1, len(seen) + 1), torch.from_numpy(compact).int())
        results[image] = Result(torch.ones(len(seen)), labels, CLASSES, (HEIGHT, WIDTH), {"masks": masks}, "")
    categories = [
        {"id": id_, "name": name, "isthing": int(thing)}
        for id_, name, thing in zip(CLASSES.ids, CLASSES.names, CLASSES.things, strict=True)
    ]
    truth = {"images": rows, "annotations": annotations, "categories": categories, "segments": truths.__getitem__}

    def ours() -> float:
        evaluator = PanopticEvaluator(truth, CLASSES)
        for image, result in results.items():
            evaluator.add(image, result)
        return evaluator.compute()["PQ"]

    with tempfile.TemporaryDirectory() as work:
        judge = PanopticEvaluator(truth, CLASSES)
        for image, result in results.items():
            judge.add(image, result)
        judge.save(Path(work) / "found.json")
        (Path(work) / "truth").mkdir()
        for image, ids in truths.items():
            write_ids(Path(work) / "truth" / f"{image}.png", ids)

        def peer() -> float:
            pairs = [
                [
                    {**a, "segments_info": [dict(s) for s in a["segments_info"]]},
                    {**b, "segments_info": [dict(s) for s in b["segments_info"]]},
                ]
                for a, b in zip(annotations, judge.records, strict=True)
            ]
            known = {row["id"]: row for row in categories}
            with contextlib.redirect_stdout(io.StringIO()):
                stat: PQStat = pq_compute_single_core(0, pairs, f"{work}/truth", f"{work}/found", known)
                return float(stat.pq_average(known, isthing=None)[0]["pq"])

        mine, theirs = compare(f"panoptic quality, {images} images {HEIGHT}x{WIDTH}", ours, peer, rounds)
    print(f"  difference of PQ: {abs(mine - theirs):.1e}")


def main() -> None:
    """Both, or what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("coco", "panoptic"), default=("coco", "panoptic"))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    if "coco" in given.only:
        coco(given.images, given.rounds)
    if "panoptic" in given.only:
        panoptic(given.rounds)


if __name__ == "__main__":
    main()
