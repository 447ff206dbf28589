"""Every task goes on bit for bit: with processes that read images, averaged weights, accumulation, all that is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_segmentation import SMALL
from tiny import TASKS, cut_after

import queryvision
from queryvision.engine.checkpoint import load_checkpoint


def trained(task: str, scenes: Path, output: Path, **more: object) -> Path:
    fits = "instance" in task or task == "panoptic"
    settings = [s for s in SMALL if not s.startswith("data.workers") and (fits or not s.startswith("heads.masks"))]
    return queryvision.train(
        task, "default", data=scenes, image_size=64, batch_size=2, steps=6, weights="none", output=output, workers=2,
        settings=[*settings, "train.accumulate=2", "train.save_every=2", "evaluation.pictures=0"], **more,
    )  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_it_resumes_bit_for_bit(task: str, scenes: Path, tmp_path: Path) -> None:
    whole = load_checkpoint(trained(task, scenes, tmp_path / "whole") / "last.pt")
    with cut_after(3):  # in the midst of an epoch, which has two or three steps here; a step more is done again
        trained(task, scenes, tmp_path / "cut")
    resumed = load_checkpoint(trained(task, scenes, tmp_path / "cut", resume=True) / "last.pt")
    assert resumed["step"] == 6
    for part in ("model", "ema"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
