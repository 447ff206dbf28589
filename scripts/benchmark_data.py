"""Images a second of DETR's training augmentation: our loader against the same in torchvision v2, in one run, interleaved.

    python scripts/benchmark_data.py [--rounds 7] [--workers 0 2] [--only pil tensors]

200 JPEGs of 640x480 with 7 boxes each: mirrored half the time; resized to one of eleven short sides (480 to 800, the long one
at most 1333), or first to 400, 500 or 600, cropped (384 to 600) and resized; batches of 2, padded. The peer reads with PIL, or
with torchvision's own decoder on tensors, normalises in the worker as the published code does and hands over float32; ours
hands over uint8, which the model normalises on its device. With 0 workers that normalisation is counted for ours, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import decode_image
from torchvision.transforms import v2

from queryvision.allocation import tune_allocation
from queryvision.data.coco import open_dataset
from queryvision.data.loader import BatchPlan, train_loader
from queryvision.data.transforms import training_transform
from queryvision.ops.pixels import normalised

IMAGES, BATCH, SIZES = 200, 2, tuple(range(480, 801, 32))
PREFETCHED = 2  # batches a worker has ready, PyTorch's default
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_data(root: Path) -> None:
    """Noise of several scales, which a JPEG decoder works on as on a photograph, and a COCO file."""
    draw = np.random.default_rng(0)
    (root / "train").mkdir()
    images, annotations = [], []
    for index in range(1, IMAGES + 1):
        layers = [np.kron(draw.normal(0, 30, (480 // s, 640 // s, 3)), np.ones((s, s, 1))) for s in (5, 20, 80)]
        pixels = np.clip(128 + sum(layers), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "train" / f"{index}.jpg", quality=90)
        images.append({"id": index, "file_name": f"{index}.jpg", "width": 640, "height": 480})
        for _ in range(7):
            x, y, w, h = draw.uniform(0, 400), draw.uniform(0, 300), draw.uniform(30, 200), draw.uniform(30, 150)
            row = {"id": len(annotations) + 1, "image_id": index, "category_id": 1, "iscrowd": 0}
            annotations.append({**row, "bbox": [x, y, w, h], "area": w * h})
    text = json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]})
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(text)


class Cropped(torch.nn.Module):
    """DETR's crop: both sides drawn between 384 and 600 px, or the image's own where that is less."""

    def forward(self, image: Any, target: dict[str, Any]) -> Any:
        """Crops image and boxes alike."""
        height, width = v2.functional.get_size(image)
        h, w = (int(torch.randint(min(384, side), min(600, side) + 1, ())) for side in (height, width))
        top, left = int(torch.randint(0, height - h + 1, ())), int(torch.randint(0, width - w + 1, ()))
        boxes = v2.functional.crop(target["boxes"], top, left, h, w)
        return v2.functional.crop(image, top, left, h, w), {**target, "boxes": boxes}


class Peer(Dataset[Any]):
    """torchvision v2's way."""

    def __init__(self, root: Path, tensors: bool) -> None:
        content = json.loads((root / "annotations" / "instances_train.json").read_text())
        self.files = [root / "train" / image["file_name"] for image in content["images"]]
        rows: dict[int, list[list[float]]] = {}
        for row in content["annotations"]:
            rows.setdefault(row["image_id"], []).append(row["bbox"])
        self.boxes = [torch.tensor(rows[image["id"]]) for image in content["images"]]
        self.tensors = tensors
        resize = v2.RandomShortestSize(SIZES, 1333, antialias=True)
        crop = v2.Compose([v2.RandomShortestSize((400, 500, 600), antialias=True), Cropped(), resize])
        self.transform = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomChoice([resize, crop]),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(),
                v2.ConvertBoundingBoxFormat("CXCYWH"),
            ]
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        """One augmented image."""
        file = self.files[index]
        image = tv_tensors.Image(decode_image(str(file))) if self.tensors else Image.open(file).convert("RGB")
        boxes = v2.functional.convert_bounding_box_format(
            tv_tensors.BoundingBoxes(self.boxes[index], format="XYWH", canvas_size=(480, 640)), new_format="XYXY"
        )
        return self.transform(image, {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)})


def padded(samples: list[Any]) -> Any:
    """Images of a batch in one tensor, and which pixels are padding."""
    images, targets = zip(*samples, strict=True)
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    pixels, padding = torch.zeros(len(images), 3, height, width), torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[1], : image.shape[2]] = image
        padding[i, : image.shape[1], : image.shape[2]] = False
    return pixels, padding, targets


def forever(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def rate(take: Callable[[], Any], batches: int, workers: int) -> float:
    """Images a second, once the other side's workers have filled their queue and rest, and this side's queue is used up."""
    time.sleep(workers)
    for _ in range(workers * PREFETCHED):
        take()
    began = time.perf_counter()
    for _ in range(batches):
        take()
    return batches * BATCH / (time.perf_counter() - began)


def main() -> None:
    """A line for each setting."""
    tune_allocation()  # both sides, as `qv` does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 2))
    parser.add_argument("--only", nargs="+", choices=("pil", "tensors"), default=("pil", "tensors"))
    parser.add_argument("--batches", type=int, default=20)
    given = parser.parse_args()
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    with tempfile.TemporaryDirectory() as work:
        make_data(Path(work))
        data = open_dataset(Path(work), "train", ("labels", "boxes"))
        transform, plan = training_transform("detr", 800), BatchPlan(np.full(IMAGES, 4 / 3), BATCH)
        for workers in given.workers:
            for kind in given.only:
                peer = forever(
                    DataLoader(
                        Peer(Path(work), kind == "tensors"), BATCH, shuffle=True, num_workers=workers, collate_fn=padded,
                        persistent_workers=workers > 0, drop_last=True,
                    )
                )  # fmt: skip
                ours = iter(train_loader(data, transform, 1, ("labels", "boxes"), plan, workers=workers))

                def mine(ours: Any = ours, workers: int = workers) -> Any:
                    batch = next(ours)
                    return batch if workers else normalised(batch.images.pixels, mean, std)

                rates: dict[str, list[float]] = {"ours": [], "peer": []}
                for turn in range(given.rounds + 1):
                    for name, take in (("ours", mine), ("peer", peer.__next__)):
                        found = rate(take, given.batches, workers)
                        if turn:
                            rates[name].append(found)
                a, b = (statistics.median(rates[name]) for name in ("ours", "peer"))
                spread = max((max(r) - min(r)) / statistics.median(r) for r in rates.values())
                figures = f"ours {a:6.1f} images/s   peer {b:6.1f}   ratio {a / b:.2f}   spread {spread:.0%}"
                print(f"{workers} workers, peer on {kind:8s} {figures}", flush=True)


if __name__ == "__main__":
    main()
