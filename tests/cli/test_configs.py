"""Every configuration that comes with the package: it builds, takes two steps and predicts, on tiny images."""

from __future__ import annotations

import contextlib
import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import queryvision
from queryvision import matching
from queryvision.assembly import build_model, resolve
from queryvision.config import Config, load_config, presets
from queryvision.criterion import Criterion
from queryvision.data.loader import BatchPlan, train_loader
from queryvision.data.transforms import training_transform
from queryvision.matching import Pairs
from queryvision.model.backbone import Backbone, make_backbone
from queryvision.model.builders import contrastive, deformable, dense, distributional, hybrid, mask_dino, masked
from queryvision.model.query_model import QueryModel
from queryvision.registry import resolve_task
from queryvision.splits import open_splits
from queryvision.structures import Batch, Round

NAMES = [f"{path.parent.name}/{path.stem}" for path in presets()]
SIBLINGS = ("detr_r101", "dino_r50_36", "dino_r50_5scale", "dfine_m", "dfine_l", "rtdetrv2_r50")
"""Larger ones of a family, whose smallest takes the same steps."""
FEW = (
    "detection/default", "detection/detr_r50_coco", "detection/dino_r50_coco", "detection/rtdetrv2_r18_coco",
    "instance/default", "keypoints/default", "keypoints/grouppose_r50_coco", "panoptic/default",
    "panoptic/mask2former_r50_coco", "instance+keypoints/default",
)  # fmt: skip
"""Each task's default, and a published model of each kind."""
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


def model_and_batch(name: str, scenes: Path) -> tuple[QueryModel, Batch]:
    """In training mode, and its first two images."""
    config = tiny(name, scenes)
    task = resolve_task(config.task)
    config = resolve(config, task)
    data, _ = open_splits(config, task)
    torch.manual_seed(0)
    model = build_model(config, task, data.classes).train()
    plan = BatchPlan(data.sizes[:, 1] / data.sizes[:, 0], 2, 0)
    transform = training_transform(config.data.augmentation, config.data.image_size)
    return model, next(iter(train_loader(data, transform, len(data.classes), task.needs, plan, 0, 0, False)))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str, scenes: Path) -> None:
    model, batch = model_and_batch(name, scenes)
    losses = Criterion(model.heads.heads(), model.steering)(model(batch.images, batch.targets), batch.targets)
    losses.total.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 50
    assert [key for key, p in trained.items() if p.grad is None] == []
    assert all(bool(p.grad.isfinite().all()) for p in trained.values() if p.grad is not None)


@pytest.mark.parametrize("name", FEW)
def test_every_parameter_gets_a_gradient_without_objects(name: str, scenes: Path) -> None:
    """Else a process without objects keeps the others waiting for ever."""
    model, batch = model_and_batch(name, scenes)
    old = batch.targets
    none = {field: (0, 0) for field in old.num_with}
    empty = replace(
        old,
        values={field: value[:, :0] for field, value in old.values.items()},
        has={field: value[:, :0] for field, value in old.has.items()},
        counts=(0, 0),
        valid=old.valid[:, :0],
        num_with=none,
    )
    Criterion(model.heads.heads(), model.steering)(model(batch.images, empty), empty).total.backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", FEW)
def test_a_step_waits_for_the_device_once(name: str, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward pass, costs, losses and backward pass run on a device without values; any read of one would raise.

    Only the assignment needs numbers, so here pairs are made up: a target's query is the one of its number.
    """
    model, batch = model_and_batch(name, scenes)
    crossed = []

    def assign(costs: list[Tensor | None], rounds: list[Round], counts: tuple[int, ...]) -> list[Pairs]:
        crossed.append(all(cost is None or cost.device.type == "meta" for cost in costs))
        rows = [(i, t) for i, count in enumerate(counts) for t in range(count)]
        return [np.array([(s, i, t, t) for s in range(r.shape[0]) for i, t in rows], np.int64).reshape(-1, 4) for r in rounds]

    monkeypatch.setattr(matching, "assign", assign)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    model, batch = model.to("meta"), batch.to("meta")
    losses = Criterion(model.heads.heads(), model.steering)(model(batch.images, batch.targets), batch.targets)
    losses.total.backward()
    assert crossed == [True] and losses.total.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        losses.total.item()


@pytest.mark.parametrize("name", [*(name for name in FEW if name.endswith("/default")), "detection/detr_r50_coco"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(
    name: str, dtype: torch.dtype, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same noise and the same pairs losses agree to 2 %, gradients are finite.

    Where queries are chosen among proposals, those of random weights are so alike that others are chosen, so there it is the
    losses of denoising queries.
    """
    model, batch = model_and_batch(name, scenes)
    found, kept = [], []
    assign = matching.assign

    def once(*given: Any) -> Any:
        kept.append(kept[0] if kept else assign(*given))
        return kept[-1]

    monkeypatch.setattr(matching, "assign", once)
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=enabled):
            outputs = model(batch.images, batch.targets)
        found.append(Criterion(model.heads.heads(), model.steering)(outputs, batch.targets))
    found[1].total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    plain, half = ({key: float(value) for key, value in losses.terms.items()} for losses in found)
    compared = [key for key in plain if key.startswith("denoising/")] or list(plain)
    assert len(compared) > 2 and all(map(math.isfinite, half.values()))
    for key in compared:
        assert half[key] == pytest.approx(plain[key], rel=0.02, abs=1e-3), key


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
