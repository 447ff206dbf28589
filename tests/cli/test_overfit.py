"""Every task, and a joint one, learns eight drawn images by heart: engine, model, heads and evaluation together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import queryvision

SMALL = [
    "data.limit=8",
    "data.augmentation=none",
    "data.copy_blend=0",
    "train.ema=0.9",
    "evaluation.pictures=0",
    "train.warmup=20",
]
MASKS = ["heads.masks.points=200"]
FEW = ["model.num_queries=20", "model.denoising=10"]
SOME = ["model.num_queries=30", "model.denoising=20"]
FIGURES = ["data.skip_empty=true"]


@pytest.mark.parametrize(
    ("task", "wanted", "steps", "side", "settings"),
    [
        ("detection", {"AP50": 0.9}, 160, 64, FEW),
        ("instance", {"AP50": 0.9, "box_AP50": 0.9}, 100, 64, [*FEW, *MASKS]),
        ("keypoints", {"AP50": 0.9}, 130, 64, [*FEW, *FIGURES]),
        ("panoptic", {"PQ": 0.8}, 200, 64, [*SOME, *MASKS]),
        ("instance+keypoints", {"instance/AP50": 0.9, "keypoints/AP50": 0.9}, 130, 64, [*FEW, *MASKS, *FIGURES]),
    ],
)
def test_eight_images_are_learned_by_heart(
    task: str, wanted: dict[str, float], steps: int, side: int, settings: list[str], tmp_path: Path
) -> None:
    folder = queryvision.train(
        task, steps=steps, batch_size=4, lr=1e-3, image_size=side, output=tmp_path,
        settings=[*SMALL, *settings, f"train.eval_every={steps}", f"train.save_every={steps}"],
    )  # fmt: skip
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert {name: metrics[name] >= least for name, least in wanted.items()} == dict.fromkeys(wanted, True), metrics
