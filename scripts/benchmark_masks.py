"""Time and memory of masks: Mask2Former-R50 against `transformers`, and what it saves to build only the masks that are kept.

    python scripts/benchmark_masks.py [--only training memory predict] [--rounds 7]

Training step: forward, loss, backward, AdamW at 2x480x640 with 8 objects an image, 12,544 points, both sides with the
whole backbone trained and frozen batch norms; interleaved. Peak memory is that of a process of its own which does three such
steps: of all of it, and above what the libraries took before there was a model. `predict`: a whole prediction of 100 queries
on a picture of 1280x960 which keeps the 10 best, against one that keeps all 100; masks are built for what is kept. Needs the
test extra.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from benchmark_step import interleaved, resident, tensor_peak
from step_models import images_of, random_targets, update

from queryvision.allocation import tune_allocation
from queryvision.assembly import Loaded, resolve
from queryvision.config import load_config
from queryvision.criterion import Criterion
from queryvision.data.classes import ClassMap
from queryvision.inference.predictor import Predictor
from queryvision.model import builders
from queryvision.structures import Targets
from queryvision.tasks.instance import TASK

CLASSES, HEIGHT, WIDTH = 80, 480, 640


class Ours:
    """Mask2Former-R50 of this project."""

    def __init__(self) -> None:
        self.model: Any = builders.mask2former_r50(TASK.make_heads(CLASSES, {"labels": {"weight": 2.0}}), TASK.steering)
        self.criterion = Criterion(self.model.heads.heads(), self.model.steering)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def train(self, pixels: torch.Tensor, targets: Targets) -> None:
        self.model.train()
        self.criterion(self.model(images_of(pixels), targets), targets).total.backward()
        update(self.model, self.optimizer)


class Transformers:
    """Its Mask2FormerForUniversalSegmentation with the same backbone, and batch norms in evaluation mode."""

    def __init__(self) -> None:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

        stages = [f"stage{i}" for i in range(1, 5)]
        config = Mask2FormerConfig(backbone_config=ResNetConfig(out_features=stages), num_labels=CLASSES)
        self.model: Any = Mask2FormerForUniversalSegmentation(config)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("normalization" not in name)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def train(self, pixels: torch.Tensor, targets: Targets) -> None:
        self.model.train()
        self.model.model.pixel_level_module.encoder.eval()
        masks = list(targets["masks"].float())
        self.model(pixels, mask_labels=masks, class_labels=list(targets["labels"] % CLASSES)).loss.sum().backward()
        update(self.model, self.optimizer)


def targets_with_masks() -> Targets:
    targets = random_targets(2, 8)
    targets.values["labels"] %= CLASSES
    masks = torch.zeros(2, 8, HEIGHT, WIDTH, dtype=torch.bool)
    for image, boxes in enumerate(targets["boxes"]):
        for index, (x, y, w, h) in enumerate(boxes.tolist()):
            rows = slice(int((y - h / 2) * HEIGHT), int((y + h / 2) * HEIGHT))
            masks[image, index, rows, int((x - w / 2) * WIDTH) : int((x + w / 2) * WIDTH)] = True
    targets.values["masks"], targets.has["masks"], targets.num_with["masks"] = masks, targets.valid, targets.counts
    targets.covers = torch.ones(2, CLASSES, dtype=torch.bool)
    return targets


def child(side: str) -> None:
    import transformers

    _ = transformers.Mask2FormerForUniversalSegmentation  # both sides hold the same libraries
    libraries = resident("VmRSS")
    model = Ours() if side == "ours" else Transformers()
    pixels, targets = torch.randn(2, 3, HEIGHT, WIDTH), targets_with_masks()
    for _ in range(3):
        model.train(pixels, targets)
    peak = resident("VmHWM")
    print(peak, peak - libraries)


def peak_memory(side: str) -> list[float]:
    run = [sys.executable, __file__, "--child", side]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return [float(number) for number in printed.split()[-2:]]


def look(kept: int) -> None:
    """Milliseconds of a prediction that keeps so many results, and those of its masks alone, with the MB that these take.

    The Mask2Former-R50 has random weights.
    """
    torch.manual_seed(0)
    config = resolve(load_config("instance", "mask2former_r50_coco", {"weights": "none"}), TASK)
    classes = ClassMap(tuple(range(CLASSES)), tuple(map(str, range(CLASSES))), (True,) * CLASSES)
    predictor = Predictor(Loaded(Ours().model, TASK, classes, config, 0, {}))
    picture = np.random.default_rng(0).integers(0, 256, (960, 1280, 3), np.uint8)
    threshold = float(predictor.predict(picture, 0.0).scores[kept - 1])
    whole, alone = [], []
    for _ in range(5):
        began = time.perf_counter()
        result = predictor.predict(picture, threshold)
        found = time.perf_counter()
        count = len(result.masks)
        whole.append(1000 * (time.perf_counter() - began))
        alone.append(1000 * (time.perf_counter() - found))
    print(count, statistics.median(whole), statistics.median(alone), tensor_peak(lambda: result.masks, "cpu"))


def predict() -> None:
    """A picture of 1280x960, looked at with 800x1066: the 10 best of 100 results, or all of them, with masks at full size."""
    for kept in (10, 100):
        run = [sys.executable, __file__, "--child", str(kept)]
        count, *found = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-4:]
        ms, masks, mb = map(float, found)
        print(
            f"predict at 1280x960, {count:>3s} of 100 masks kept: {ms:7.0f} ms, of it masks {masks:6.0f} ms with {mb:4.0f} MB"
        )


def main() -> None:
    tune_allocation()  # both sides, as `qv` does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=["training", "memory", "predict"])
    parser.add_argument("--child", choices=["ours", "peer", "10", "100"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        look(int(options.child)) if options.child.isdigit() else child(options.child)
        return
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, median of {options.rounds}, interleaved")
    if "training" in options.only:
        pixels, targets = torch.randn(2, 3, HEIGHT, WIDTH), targets_with_masks()
        ours, peer = Ours(), Transformers()
        steps = (lambda: ours.train(pixels, targets), lambda: peer.train(pixels, targets))
        interleaved("Mask2Former-R50: training step 2x480x640", *steps, options.rounds)
        del ours, peer
    if "memory" in options.only:
        whole, above = zip(peak_memory("ours"), peak_memory("peer"), strict=True)
        for what, (a, b) in (("peak memory of training steps", above), ("the same with the libraries", whole)):
            print(f"{'Mask2Former-R50: ' + what:52s} ours {a:8.0f} MB   peer {b:8.0f} MB   ratio {a / b:.2f}")
    if "predict" in options.only:
        predict()


if __name__ == "__main__":
    main()
