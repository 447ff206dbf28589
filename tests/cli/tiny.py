"""A model so small that a step takes a tenth of a second, and how commands are run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from queryvision.config import load_config
from queryvision.engine.trainer import Trainer
from queryvision.run import Run as TrainingRun

TINY = (
    "--set", "model={name: detr, backbone: resnet18, width: 32, num_heads: 4, ffn_width: 64, encoder_layers: 1, "
    "decoder_layers: 2, num_queries: 12}", "--set", "heads={}", "--image-size", "64", "--batch-size", "4", "--weights", "none",
)  # fmt: skip
"""Flags of a model that trains a step in a tenth of a second, whatever the preset's model is."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def wait_for_rows(process: subprocess.Popen[str], table: Path) -> None:
    """Until a run that was started has written two steps into its `metrics.csv`."""
    deadline = time.monotonic() + 120
    while not (table.exists() and len(table.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


Call = Callable[..., Done]

TASKS = ("detection", "instance", "panoptic", "keypoints", "instance+keypoints")


@contextmanager
def cut_after(step: int) -> Iterator[None]:
    """Breaks a training off once it has done everything behind a step."""
    after = Trainer._after

    def stop(self: Trainer, done: int) -> None:
        after(self, done)
        if done == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_after", stop)
        yield


def trainer_of(task: str, folder: Path, *settings: str, **given: object) -> Trainer:
    """The trainer of a task's preset from random weights, with few queries, on small images."""
    few = {"data.image_size": 96, "train.batch_size": 4, "weights": "none", "data.workers": 0, "model.num_queries": 40}
    return TrainingRun(load_config(task, None, {**few, **given}, settings), folder).trainer(resume=False)
