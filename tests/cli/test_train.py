"""Training from the command line: the run folder, overfitting, resuming."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import TINY, Run

import queryvision
from queryvision.engine.checkpoint import load_checkpoint

STEPS = ("--steps", "12", "--set", "train.log_every=2", "--set", "train.save_every=3", "--set", "train.eval_every=6")


def test_a_run_leaves_everything_in_its_folder(scenes: Path, tmp_path: Path, qv: Run) -> None:
    done = qv("train", "--task", "detection", "--data", scenes, *TINY, *STEPS, "--output", tmp_path / "runs", "--name", "a")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "detection" / "a"
    for name in ("config.yaml", "metrics.csv", "curves.png", "predictions.png", "last.pt", "best.pt", "summary.json"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").iterdir())
    text = json.loads((folder / "summary.json").read_text())
    assert text["task"] == "detection" and text["steps"] == 12 and text["seconds"] > 0
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP/ball"} <= set(text["metrics"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["width"] == 32 and config["heads"]["boxes"]["giou"] == 2.0
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [int(r["step"]) for r in rows] == [2, 4, 6, 8, 10, 12]
    assert {"loss", "loss/labels.class", "loss/boxes.l1", "loss/boxes.giou", "val/AP"} <= set(rows[-1])
    assert "12/12" in done.stdout and "images/s" in done.stdout
    again = qv("train", "--config", folder / "config.yaml", "--steps", "1", "--output", tmp_path / "runs", "--name", "a")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "runs" / "detection" / "a-2" / "best.pt").exists(), "a second run must not write into the first"


def test_killed_and_resumed_equals_uninterrupted(scenes: Path, tmp_path: Path, qv: Run) -> None:
    """Metrics and weights, bit for bit; the transforms draw at random, dropout is on, the images come from two workers."""
    words = ("train", "--task", "detection", "--data", scenes, *TINY, *STEPS, "--set", "model.dropout=0.1", "--set",
             "data.augmentation=light", "--workers", "2", "--set", "train.accumulate=2")  # fmt: skip
    whole = qv(*words, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "queryvision.cli", *map(str, words), "--output", str(tmp_path / "cut")]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    last = tmp_path / "cut" / "detection" / "custom" / "last.pt"
    deadline = time.time() + 100
    while not (last.exists() and load_checkpoint(last)["step"] >= 6) and time.time() < deadline and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 0 < load_checkpoint(last)["step"] < 12, "killed too late to show anything"
    resumed = qv(*words, "--output", tmp_path / "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (tmp_path / name / "detection" / "custom" for name in ("whole", "cut"))
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        first, second = load_checkpoint(a / name), load_checkpoint(b / name)
        for part in ("model", "ema"):
            for key, value in first.get(part, {}).items():
                assert torch.equal(value, second[part][key]), f"{name} {part} {key}"
    assert json.loads((a / "summary.json").read_text())["metrics"] == json.loads((b / "summary.json").read_text())["metrics"]


def test_resume_without_a_run_is_an_error(scenes: Path, tmp_path: Path, qv: Run) -> None:
    done = qv("train", "--task", "detection", "--data", scenes, *TINY, "--output", tmp_path / "runs", "--resume")
    assert done.returncode == 2 and "there is no run" in done.stderr and len(done.stderr.splitlines()) == 1


def test_eight_images_are_learnt_by_heart(tmp_path: Path) -> None:
    """The engine, the model and the evaluation together: AP50 of at least 0.9 on the images it was trained on."""
    folder = queryvision.train(
        "detection",
        steps=350,
        batch_size=4,
        lr=5e-4,
        image_size=96,
        output=str(tmp_path),
        settings=["data.limit=8", "data.augmentation=none", "train.eval_every=350", "train.ema=0.9", "train.save_every=350"],
    )
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["AP50"] >= 0.9


@pytest.mark.parametrize("name", ["bccd", "raccoon"])
def test_the_loss_falls_on_real_data(name: str, real_data, tmp_path: Path) -> None:
    folder = queryvision.train(
        "detection", data=str(real_data(name)), steps=40, batch_size=4, image_size=128, output=str(tmp_path),
        settings=["train.eval_every=40", "train.log_every=10", "evaluation.pictures=2", "train.warmup=0"],
    )  # fmt: skip
    losses = [float(row["loss"]) for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
    assert losses[-1] < 0.95 * losses[0], losses
