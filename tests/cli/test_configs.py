"""Every configuration that comes with the package: it builds, takes two steps and predicts, on tiny images."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import queryvision
from queryvision.assembly import build_model, resolve
from queryvision.config import Config, load_config, presets
from queryvision.criterion import Criterion
from queryvision.data.loader import BatchPlan, train_loader
from queryvision.data.transforms import training_transform
from queryvision.model.backbone import Backbone, make_backbone
from queryvision.model.builders import contrastive, deformable, dense, distributional, hybrid, mask_dino, masked
from queryvision.registry import resolve_task
from queryvision.splits import open_splits

NAMES = [f"{path.parent.name}/{path.stem}" for path in presets()]
SIBLINGS = ("detr_r101", "dino_r50_36", "dino_r50_5scale", "dfine_m", "dfine_l", "rtdetrv2_r50")
"""Larger ones of a family, whose smallest takes the same steps."""
MASKS = {"heads.masks.points": 64}
HEADS: dict[str, dict[str, Any]] = {
    "instance": MASKS,
    "panoptic": {**MASKS, "heads.masks.least": 0, "heads.masks.overlap": 0, "heads.attention_masks.least": 0},
}
"""Of each task: masks that are read at few points, and segments that are kept however unsure they are."""


def tiny(name: str, data: Path, **more: Any) -> Config:
    """The configuration on tiny images: few queries where the builder lets one say so, everything else as it is."""
    task, _, preset = name.partition("/")
    flags = {"data.path": str(data), "data.image_size": 64, "data.workers": 0, "train.batch_size": 2, "train.accumulate": 1,
             "train.steps": 2, "weights": "none", "model.num_queries": 15, "evaluation.pictures": 0}  # fmt: skip
    return load_config(task, preset, {**flags, **HEADS.get(task, {}), **more})


@pytest.fixture(autouse=True)
def small_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest member of each configuration's family of backbones, where it can be had."""

    def small(name: str, strides: Any, frozen_norm: bool = True, dilated: bool = False, *rest: Any) -> Backbone:
        name = name if dilated else {"resnet50": "resnet18", "resnet101": "resnet34", "resnet50d": "resnet18d"}.get(name, name)
        name = name.split(".")[0].replace("vit_base", "vit_tiny").replace("_b4", "_b0").replace("_b2", "_b0")
        return make_backbone(name, strides, frozen_norm, dilated, *rest)

    for module in (dense, deformable, contrastive, distributional, hybrid, mask_dino, masked):
        monkeypatch.setattr(module, "make_backbone", small)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str, scenes: Path) -> None:
    config = tiny(name, scenes)
    task = resolve_task(config.task)
    config = resolve(config, task)
    data, _ = open_splits(config, task)
    torch.manual_seed(0)
    model = build_model(config, task, data.classes).train()
    plan = BatchPlan(data.sizes[:, 1] / data.sizes[:, 0], 2, 0)
    transform = training_transform(config.data.augmentation, config.data.image_size)
    batch = next(iter(train_loader(data, transform, len(data.classes), task.needs, plan, 0, 0, False)))
    losses = Criterion(model.heads.heads(), model.steering)(model(batch.images, batch.targets), batch.targets)
    losses.total.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 50
    assert [key for key, p in trained.items() if p.grad is None] == []
    assert all(bool(p.grad.isfinite().all()) for p in trained.values() if p.grad is not None)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if any(s in name for s in SIBLINGS) else []) for name in NAMES]
)
def test_it_takes_two_steps_and_predicts(name: str, scenes: Path, tmp_path: Path) -> None:
    task, _, preset = name.partition("/")
    settings = ["data.workers=0", "train.accumulate=1", "model.num_queries=15", "evaluation.pictures=2"]
    settings += [f"{key}={value}" for key, value in HEADS.get(task, {}).items()]
    settings += ["model.denoising=10"] if "grouppose" in name else []  # each brings a state for every keypoint
    folder = queryvision.train(
        task, preset, data=scenes, image_size=64, batch_size=2, steps=2, weights="none", output=tmp_path, settings=settings
    )
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert int(rows[-1]["step"]) == 2 and math.isfinite(float(rows[-1]["loss"])) and float(rows[-1]["loss"]) > 0
    pictures = sorted((scenes / "images").rglob("*.jpg")) or sorted(scenes.rglob("*.png"))
    result = queryvision.load(folder / "best.pt").predict(pictures[0], threshold=0.0)
    assert bool(torch.isfinite(result.scores).all())
    if task == "panoptic":  # where no mask says yes, no segment is left
        assert tuple(result.maps["semantic"].shape) == tuple(result.size)
    else:
        assert len(result.scores) > 0
