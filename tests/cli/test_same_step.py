"""One large batch, two small ones summed up, or two processes: the same losses, gradients and weights."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import queryvision
from queryvision.data.scenes import make_scenes
from queryvision.engine.checkpoint import load_checkpoint

SMALL = ["model.backbone=resnet18", "model.width=32", "model.ffn_width=32", "model.encoder_layers=1", "model.decoder_layers=2",
         "model.num_queries=12", "model.frozen_norm=true", "data.limit=4", "data.augmentation=flip", "train.clip=0",
         "train.log_every=1", "train.warmup=0", "train.eval_every=100", "evaluation.pictures=0"]  # fmt: skip

DFINE = ["model.name=dfine_small", "model.denoising=6", "model.strides=[16,32]", "model.num_points=[4,4]",
         "model.num_queries=20", "heads.boxes.ddf=0"]  # fmt: skip
"""The distillation is a mean over each part of a batch, so it is off. All tokens become queries, as a choice among a random
model's nearly equal ones would hang on the last digit."""

RATE = 1e-3

CASES = {
    "empty": (1, ["model.name=detr", "model.dropout=0", "model.num_heads=4", "heads={}"]),
    "detection": (3, ["model.name=detr", "model.dropout=0", "model.num_heads=4", "heads={}"]),
    "instance": (1, [*DFINE, "train.freeze=[neck, encoder, pixels]", "heads.masks.points=64"]),
    "keypoints": (1, [*DFINE, "train.freeze=[neck, encoder]"]),
}
"""Steps and settings. What is frozen has batch norms, whose statistics are of the images that one process sees at once. After a
step, proposals of random weights are so alike that the assignment hangs on the last digit, so there it is one."""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("many"), train=60, val=1, size=64)


def alike(scenes: Path, most: int | None, filled: int = 60) -> None:
    """Leaves images of the commonest size, and objects in the first `filled`; with `most`, just so many in each, so that
    all parts of a batch have the same denoising plan."""
    for path in (scenes / "annotations").glob("*_train.json"):
        content = json.loads(path.read_text())
        own = {image["id"]: [a for a in content["annotations"] if a["image_id"] == image["id"]] for image in content["images"]}
        full = [image for image in content["images"] if len(own[image["id"]]) >= (most or 0)]
        size, found = Counter((image["height"], image["width"]) for image in full).most_common(1)[0]
        assert found >= 4
        content["images"] = [image for image in full if (image["height"], image["width"]) == size]
        content["images"].sort(key=lambda image: -len(own[image["id"]]))
        content["annotations"] = [a for image in content["images"][:filled] for a in own[image["id"]][:most]]
        path.write_text(json.dumps(content))


def trained(task: str, data: Path, output: Path, steps: int, settings: list[str], **how: Any) -> dict[str, Any]:
    """What `last.pt` holds, and the losses of each step."""
    folder = queryvision.train(
        task, data=data, image_size=64, weights="none", steps=steps, lr=RATE, output=output, settings=[*SMALL, *settings], **how
    )
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    losses = {key: [float(row[key]) for row in rows] for key in rows[0] if key.startswith("loss")}
    return {**load_checkpoint(folder / "last.pt"), "losses": losses}


def columns(state: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{parameter: (mean gradient, weights)}."""
    names = [name for group in state["optimizer"]["param_groups"] for name in group["names"]]
    moments = state["optimizer"]["state"]
    return {name: (moments[index]["exp_avg"].double(), state["model"][name].double()) for index, name in enumerate(names)}


def near(wanted: dict[str, Any], found: dict[str, Any], most: float) -> None:
    """Weights that have a gradient agree to `most`."""
    largest, compared = max(gradient.abs().max() for gradient, _ in wanted.values()), 0
    for name, (gradient, weights) in wanted.items():
        sure = gradient.abs() > max(1e-2 * gradient.abs().max(), 1e-5 * largest)
        assert ((weights - found[name][1]).abs()[sure] < most).all(), name
        compared += int(sure.sum())
    assert compared > 10_000


@pytest.mark.parametrize(
    "case", ["detection", "empty", *(pytest.param(name, marks=pytest.mark.slow) for name in ("instance", "keypoints"))]
)
def test_a_batch_may_be_spread(case: str, many: Path, tmp_path: Path) -> None:
    """In float32 losses agree to 1e-6 and gradients to 1e-5 of their length; also where a process sees no object at all.

    Adam's first steps are as long for a gradient that is nothing but rounding as for any other, so weights are compared where
    there is one: to a hundredth of a step.
    """
    (steps, settings), task = CASES[case], "detection" if case == "empty" else case
    data = Path(shutil.copytree(many, tmp_path / "scenes"))
    alike(data, None if task == "detection" else 1, filled=1 if case == "empty" else 60)  # one of four: a process has none
    whole = trained(task, data, tmp_path / "whole", steps, settings, batch_size=4)
    parts = trained(task, data, tmp_path / "parts", steps, [*settings, "train.accumulate=2"], batch_size=2)
    processes = trained(task, data, tmp_path / "processes", steps, settings, batch_size=2, devices=2)
    wanted = columns(whole)
    for spread in (parts, processes):
        assert whole["losses"].keys() == spread["losses"].keys() and len(whole["losses"]) > 3
        for name, values in whole["losses"].items():
            assert spread["losses"][name] == pytest.approx(values, rel=1e-6), name
        found = columns(spread)
        own, other = (torch.cat([gradient.ravel() for gradient, _ in c.values()]) for c in (wanted, found))
        assert (own - other).norm() < 1e-5 * own.norm()
        near(wanted, found, 0.01 * RATE)


def test_what_was_shared_out_goes_on_anywhere(many: Path, tmp_path: Path) -> None:
    """Two processes with a half each, then one that has all, then two again: as if it had always been one."""
    steps, settings = CASES["detection"]
    settings = [*settings, "train.schedule=flat"]  # else it would hang on how many steps are still to come
    data = Path(shutil.copytree(many, tmp_path / "scenes"))
    alike(data, None)
    whole = trained("detection", data, tmp_path / "whole", steps, settings, batch_size=4)
    trained("detection", data, tmp_path / "run", 1, [*settings, "train.shard=true"], batch_size=2, devices=2)
    folder = tmp_path / "run" / "detection" / "custom"
    for step, size, how in ((2, 4, {"devices": 1}), (3, 2, {"devices": 2})):
        shared = [f"train.shard={str(how['devices'] > 1).lower()}"]
        queryvision.train(resume=folder, steps=step, batch_size=size, settings=shared, **how)
    near(columns(whole), columns(load_checkpoint(folder / "last.pt")), 0.02 * RATE)
