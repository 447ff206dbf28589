"""Every task, and a joint one, learns eight drawn images by heart: engine, model, heads and evaluation together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import queryvision

SMALL = [
    "data.limit=8", "data.augmentation=none", "data.copy_blend=0", "train.ema=0.9", "evaluation.pictures=0",
    "model.num_queries=30", "model.denoising=20", "train.warmup=20",
]  # fmt: skip
MASKS = ["heads.masks.points=200"]


@pytest.mark.parametrize(
    ("task", "wanted", "settings"),
    [
        ("detection", {"AP50": 0.9}, []),
        pytest.param("instance", {"AP50": 0.9, "box_AP50": 0.9}, MASKS, marks=pytest.mark.slow),
        pytest.param("panoptic", {"PQ": 0.8}, MASKS, marks=pytest.mark.slow),
        pytest.param("keypoints", {"AP50": 0.9}, ["data.skip_empty=true"], marks=pytest.mark.slow),
        pytest.param(
            "instance+keypoints",
            {"instance/AP50": 0.9, "keypoints/AP50": 0.9},
            [*MASKS, "data.skip_empty=true"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_eight_images_are_learned_by_heart(task: str, wanted: dict[str, float], settings: list[str], tmp_path: Path) -> None:
    steps = 200
    folder = queryvision.train(
        task, steps=steps, batch_size=4, lr=1e-3, image_size=96, output=tmp_path,
        settings=[*SMALL, *settings, f"train.eval_every={steps}", f"train.save_every={steps}"],
    )  # fmt: skip
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert {name: metrics[name] >= least for name, least in wanted.items()} == dict.fromkeys(wanted, True), metrics
