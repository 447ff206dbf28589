"""What goes missing while a run trains: one line, and the steps so far are kept."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest
import torch
from tiny import TINY, Call, wait_for_rows

from queryvision.engine.checkpoint import load_checkpoint
from queryvision.engine.trainer import Trainer

FLAGS = (*TINY, "--set", "evaluation.pictures=0", "--set", "train.log_every=1", "--set", "data.limit=6")


def test_images_that_vanish_cost_no_step(scenes: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train", "--data", scenes, *FLAGS, "--steps", "6", "--output", tmp_path, "--name")
    assert call(*words, "whole").code == 0
    after, images = Trainer._after, scenes / "images"
    aside = tmp_path / "aside"

    def unplugged(self: Trainer, step: int) -> None:
        after(self, step)
        if step == 3:
            shutil.move(images, aside)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after", unplugged)
        done = call(*words, "run")
    assert done.code == 2 and "images in a row cannot be read" in done.err and len(done.err.splitlines()) == 1
    folder = tmp_path / "detection" / "run"
    assert load_checkpoint(folder / "last.pt")["step"] == 3
    shutil.move(aside, images)
    assert call("train", "--resume", folder).code == 0
    wanted, found = (load_checkpoint(tmp_path / "detection" / name / "last.pt")["model"] for name in ("whole", "run"))
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_a_reading_process_that_dies_costs_no_step(scenes: Path, tmp_path: Path) -> None:
    words = ["train", "--data", scenes, *FLAGS, "--steps", "400", "--workers", "1", "--output", tmp_path, "--name", "run"]
    process = subprocess.Popen([sys.executable, "-m", "queryvision.cli", *map(str, words)], stdout=PIPE, stderr=PIPE, text=True)
    table = tmp_path / "detection" / "run" / "metrics.csv"
    wait_for_rows(process, table)
    reader = next(
        child for child in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(child.cmdline())
    )
    reader.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said == "qv: a process that reads images died, perhaps for want of memory; try fewer --workers\n"
    rows = len(table.read_text().splitlines()) - 1
    assert load_checkpoint(table.with_name("last.pt"))["step"] >= rows - 1 > 0
