"""What the annotations of a COCO-size data set cost: seconds to load, memory once and memory in each loader process.

    python scripts/measure_annotations.py [--images 118287] [--annotations 860001]

Makes a JSON like `instances_train2017.json` (boxes, polygons of 24 points, 80 classes), opens it for masks and boxes, and lets
two forked processes look at the annotations of every image, as loader processes do. Linux only, as memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np

from queryvision.data.coco import open_dataset
from queryvision.data.dataset import CocoDataset


def make_json(root: Path, images: int, annotations: int) -> Path:
    """Writes it row by row, as it would not fit into memory well."""
    draw = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    path = root / "annotations" / "instances_train.json"
    owner = np.sort(draw.integers(1, images + 1, annotations))
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    with open(path, "w") as file:
        file.write('{"categories": ' + json.dumps([{"id": i, "name": f"class {i}"} for i in range(1, 81)]) + ', "images": [')
        file.write(
            ",".join(f'{{"id": {i}, "file_name": "{i:012d}.jpg", "width": 640, "height": 480}}' for i in range(1, images + 1))
        )
        file.write('], "annotations": [')
        for index, image in enumerate(owner.tolist()):
            cx, cy, r = draw.uniform(100, 540), draw.uniform(100, 380), draw.uniform(5, 90)
            points = np.stack([cx + r * np.cos(turn), cy + r * np.sin(turn)], 1).round(2).ravel().tolist()
            row = {"id": index + 1, "image_id": image, "category_id": index % 80 + 1, "iscrowd": 0, "area": round(3 * r * r),
                   "bbox": [round(x, 2) for x in (cx - r, cy - r, 2 * r, 2 * r)], "segmentation": [points]}  # fmt: skip
            file.write((", " if index else "") + json.dumps(row))
        file.write("]}")
    return path


def memory(*names: str) -> float:
    """MB of this process by the kernel's account."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return sum(int(row.split()[1]) for row in rows if row.split(":")[0] in names) / 1024


def look(data: CocoDataset, told: multiprocessing.SimpleQueue[float]) -> None:
    """What a loader process reads, images apart; one masks' worth in a hundred, as drawing polygons takes time."""
    before = memory("Private_Clean", "Private_Dirty")
    whole, data.needs = data.needs, tuple(need for need in data.needs if need != "masks")
    for index in range(len(data)):
        if index % 100 == 0:
            data.needs = whole
        data.annotations(index)
        data.needs = tuple(need for need in whole if need != "masks")
    told.put(memory("Private_Clean", "Private_Dirty") - before)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--annotations", type=int, default=860_001)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        path = make_json(Path(work), given.images, given.annotations)
        print(
            f"{given.images} images, {given.annotations} annotations, {path.stat().st_size / 2**20:.0f} MB of JSON", flush=True
        )
        before, began = memory("Rss"), time.perf_counter()
        data = open_dataset(Path(work), "train", ("labels", "boxes", "masks"))
        print(
            f"opened and checked in {time.perf_counter() - began:.0f} s; the process grew by {memory('Rss') - before:.0f} MB",
            flush=True,
        )
        context = multiprocessing.get_context("fork")
        told = context.SimpleQueue()
        workers = [context.Process(target=look, args=(data, told)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print("a process that reads all of them holds " + ", ".join(f"{told.get():.1f}" for _ in workers) + " MB of its own")


if __name__ == "__main__":
    main()
