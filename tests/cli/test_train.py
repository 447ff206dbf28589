"""Training from the command line: the run folder, resuming, stopping."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import TINY, Call, Run, cut_after

import queryvision
from queryvision import run, runs
from queryvision.config import load_config
from queryvision.engine import memory
from queryvision.engine.checkpoint import load_checkpoint
from queryvision.engine.trainer import Trainer
from queryvision.errors import ConfigError
from queryvision.run_folder import holding

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


def test_killed_stopped_and_resumed_equals_uninterrupted(scenes: Path, tmp_path: Path, qv: Run) -> None:
    """Metrics and weights, bit for bit; the transforms draw at random, dropout is on, the images come from two workers."""
    words = ("train", "--task", "detection", "--data", scenes, *TINY, *STEPS, "--steps", "18", "--set", "model.dropout=0.1",
             "--set", "data.augmentation=light", "--workers", "2", "--set", "train.accumulate=2")  # fmt: skip
    whole = qv(*words, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    last = tmp_path / "cut" / "detection" / "custom" / "last.pt"
    command = [sys.executable, "-m", "queryvision.cli", *map(str, words), "--output", str(tmp_path / "cut")]

    def saved() -> int:
        return int(load_checkpoint(last)["step"]) if last.exists() else 0

    def ended(command: list[str], how: signal.Signals) -> subprocess.Popen[str]:
        """Ends a run as soon as it has saved something new."""
        before, deadline = saved(), time.time() + 100
        run = subprocess.Popen(command, text=True, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while saved() == before and time.time() < deadline and run.poll() is None:
            time.sleep(0.02)
        os.killpg(run.pid, how)
        return run

    ended(command, signal.SIGKILL).communicate()
    assert 0 < saved() < 18, "killed too late to show anything"
    stopped = ended([*command, "--resume"], signal.SIGTERM)
    told = stopped.communicate()[1].strip().splitlines()
    assert 3 < saved() < 18, "stopped too late to show anything"
    assert stopped.returncode == 128 + signal.SIGTERM and len(told) == 1, told
    assert "SIGTERM: stopped after step" in told[0] and f"qv train --resume {last.parent}" in told[0]
    resumed = qv("train", "--resume", last.parent)
    assert resumed.returncode == 0, resumed.stderr
    a, b = (tmp_path / name / "detection" / "custom" for name in ("whole", "cut"))
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        first, second = load_checkpoint(a / name), load_checkpoint(b / name)
        for part in ("model", "ema"):
            for key, value in first.get(part, {}).items():
                assert torch.equal(value, second[part][key]), f"{name} {part} {key}"
    assert json.loads((a / "summary.json").read_text())["metrics"] == json.loads((b / "summary.json").read_text())["metrics"]


def test_a_floor_of_steps(call: Call, scenes: Path, tmp_path: Path) -> None:
    """It belongs to the epochs of the same file; one warning where the steps are few."""
    file = tmp_path / "mine.yaml"
    file.write_text("task: detection\ntrain:\n  epochs: 1\n  min_steps: 5\nevaluation:\n  pictures: 0\n")
    words = ("train", "--config", file, "--data", scenes, *TINY, "--output", tmp_path / "runs")
    for flags, steps in (((), 5), (("--epochs", "1"), 3), (("--set", "train.epochs=1", "--set", "train.min_steps=4"), 4)):
        done = call(*words, *flags)
        assert done.code == 0 and f" {steps} steps (" in done.out, done
        assert [line for line in done.out.splitlines() if f"{steps} steps are few" in line and "--steps" in line], done
    assert load_config(None, str(file), {"train.steps": 2}).train.min_steps == 5
    done = call(*words, "--steps", "2")
    assert done.code == 0 and " 2 steps (" in done.out, "steps that are given are the steps"
    assert sum(line.startswith("warning: ") for line in done.out.splitlines()) == 1
    assert load_config("detection", None, {"data.path": "x"}).train.min_steps == 800
    assert load_config("detection", None, {"data.path": "x", "train.epochs": 3}).train.min_steps == 0


def test_a_run_of_epochs_keeps_its_steps(call: Call, scenes: Path, tmp_path: Path) -> None:
    """Another number of devices or images a step makes other epochs, but no other run, unless one asks for it."""
    words = ("--data", scenes, *TINY, "--set", "evaluation.pictures=0", "--output", tmp_path, "--name", "run")
    assert call("train", *words, "--epochs", "1").code == 0
    folder = tmp_path / "detection" / "run"
    for flags, steps in (((), 3), (("--epochs", "0.5"), 3), (("--epochs", "0.75"), 4)):
        done = call("train", "--resume", folder, "--batch-size", "2", *flags)
        assert done.code == 0 and f" {steps} steps (" in done.out, done
        assert load_checkpoint(folder / "last.pt")["step"] == steps


def test_two_runs_never_share_a_folder(call: Call, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held before its state is read, so that nobody goes on from what another run replaces meanwhile."""
    words = ("--data", scenes, *TINY, "--set", "evaluation.pictures=0", "--output", tmp_path, "--name", "run", "--steps", "1")
    assert call("train", *words).code == 0
    folder = tmp_path / "detection" / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with holding(folder):
        done = call("train", "--resume", folder, "--steps", "2")
    assert done.code == 2 and done.err == f"qv: {folder}: another run trains in this folder; wait for it, or end it first\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    load = Trainer.load

    def held(self: Trainer) -> None:
        with pytest.raises(ConfigError, match="another run"), holding(folder):
            pass
        load(self)

    monkeypatch.setattr(Trainer, "load", held)
    assert call("train", "--resume", folder, "--steps", "2").code == 0


def test_a_launcher_says_how_many_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    begun, alone = (load_config("detection", None, {"train.devices": devices}) for devices in (2, None))
    assert runs._as_launched(begun).train.devices == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert runs._as_launched(begun).train.devices == 4 and runs._as_launched(alone) == alone


def test_a_run_that_began_meanwhile_keeps_its_folder(
    call: Call, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, build = tmp_path / "detection" / "run", run.Run.trainer

    def late(self: run.Run, resume: bool) -> Trainer:
        other.mkdir(parents=True)
        return build(self, resume)

    monkeypatch.setattr(run.Run, "trainer", late)
    words = ("--data", scenes, *TINY, "--set", "evaluation.pictures=0", "--output", tmp_path, "--name", "run")
    done = call("train", *words, "--steps", "1")
    assert done.code == 0 and f"done: {other}-2" in done.out
    assert not list(other.iterdir()) and (tmp_path / "detection" / "run-2" / "best.pt").exists()


def test_fine_tuning_on_other_classes(call: Call, trained: Path, spoil: Callable[..., Path], tmp_path: Path) -> None:
    """From our own checkpoint, by the flag and from Python; a class that kept its name knows what it knew."""

    def rename(content: dict[str, Any]) -> None:
        for row in content["categories"]:
            row["name"] = {"figure": "zebra", "ball": "Ball"}.get(row["name"], row["name"])

    data, source = spoil(rename, "train", "val"), trained / "best.pt"
    words = (
        *TINY,
        "--weights",
        source,
        "--steps",
        "1",
        "--lr",
        "1e-9",
        "--set",
        "train.ema=0",
        "--set",
        "evaluation.pictures=0",
    )
    done = call("train", "--data", data, *words, "--output", tmp_path / "a")
    assert done.code == 0, done
    for text in (f"tensors from {source} (task detection, step 12)", "Ball", "new classes: zebra", "not used: nothing"):
        assert text in done.out, done.out
    found, before = load_checkpoint(tmp_path / "a" / "detection" / "custom" / "last.pt"), load_checkpoint(source)
    assert found["step"] == 1, "a run of its own"
    names, old = found["classes"]["names"], before["classes"]["names"]
    kept = [name for name in names if name != "zebra"]
    rows = {
        key: value for key, value in found["model"].items() if key.startswith("heads.labels") and len(value) == len(names) + 1
    }
    assert rows
    for key, value in rows.items():
        mine = value[[names.index(name) for name in kept]]
        theirs = before["model"][key][[old.index(name.replace("Ball", "ball")) for name in kept]]
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
        zebra, figure = value[names.index("zebra")], before["model"][key][old.index("figure")]
        assert not torch.allclose(zebra, figure, atol=1e-3)
    settings = [text for text in TINY if "=" in text] + ["train.ema=0", "evaluation.pictures=0"]
    python = queryvision.train("detection", data=data, weights=source, steps=1, lr=1e-9, image_size=64, batch_size=4,
                               output=tmp_path / "b", settings=settings)  # fmt: skip
    again = load_checkpoint(python / "last.pt")["model"]
    assert all(torch.equal(value, again[key]) for key, value in found["model"].items())


def test_a_run_takes_the_batch_that_fits(call: Call, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last word that resumes it is a number."""
    monkeypatch.setattr(memory, "free_memory", lambda device: int(1e12))
    words = (*TINY, "--steps", "1", "--batch-size", "auto", "--output", tmp_path)
    done = call("train", "--data", scenes, *words)
    assert done.code == 0 and "as many images as fit into memory" in done.out
    settings = yaml.safe_load(next(tmp_path.glob("detection/*/config.yaml")).read_text())
    assert settings["train"]["batch_size"] == 64, "more are never taken"
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)  # the run goes on as it began
    words = (*TINY, "--steps", "2", "--batch-size", "auto", "--output", tmp_path, "--resume")
    assert call("train", "--data", scenes, *words).code == 0
    settings = yaml.safe_load(next(tmp_path.glob("detection/*/config.yaml")).read_text())
    assert (settings["train"]["batch_size"], settings["train"]["steps"]) == (64, 2)


def test_a_checkpoint_is_measured_on_what_training_evaluated_on(scenes: Path, tmp_path: Path, call: Call) -> None:
    """With a limit these are the training images."""
    more = ("--set", "data.limit=3", "--set", "evaluation.pictures=0", "--output", tmp_path, "--name", "x")
    words = (*TINY, "--steps", "2", *more)
    assert call("train", "--data", scenes, *words).code == 0
    folder, results = tmp_path / "detection" / "x", tmp_path / "results.json"
    assert call("eval", folder / "best.pt", "--save-json", results).code == 0
    train = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    first = sorted(image["id"] for image in train["images"])[:3]
    assert {row["image_id"] for row in json.loads(results.read_text())} == set(first)


def test_resume_without_a_run_is_an_error(scenes: Path, tmp_path: Path, qv: Run) -> None:
    done = qv("train", "--task", "detection", "--data", scenes, *TINY, "--output", tmp_path / "runs", "--resume")
    assert done.returncode == 2 and "there is no run" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bccd", "raccoon"])
def test_the_loss_falls_on_real_data(name: str, real_data, tmp_path: Path) -> None:
    folder = queryvision.train(
        "detection", data=str(real_data(name)), steps=40, batch_size=4, image_size=128, output=str(tmp_path),
        settings=["train.eval_every=40", "train.log_every=10", "evaluation.pictures=2", "train.warmup=0"],
    )  # fmt: skip
    losses = [float(row["loss"]) for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
    assert losses[-1] < 0.95 * losses[0], losses


@pytest.mark.parametrize(
    "own",
    [
        ["model.name=dino", "model.num_heads=4", "model.num_levels=3"],
        ["model.name=dfine_small", "model.frozen_norm=false", "data.mosaic=0.5", "data.mixup=0.5", "data.copy_blend=0.5"],
    ],
    ids=["dino", "dfine"],
)
def test_denoising_resumes_bit_for_bit(own: list[str], scenes: Path, tmp_path: Path) -> None:
    """Noise, deformable attention, proposals, live norms and mixed images hold the promise, too."""
    settings = [*own, "model.backbone=resnet18", "model.width=32", "model.ffn_width=32", "model.encoder_layers=1",
                "model.decoder_layers=2", "model.num_queries=12", "model.denoising=6", "train.save_every=3",
                "train.log_every=3", "evaluation.pictures=0"]  # fmt: skip

    def run(output: Path, **more: Any) -> dict[str, torch.Tensor]:
        folder = queryvision.train(
            data=scenes, image_size=64, batch_size=2, steps=6, weights="none", output=output, settings=settings, **more
        )
        return {**load_checkpoint(folder / "last.pt")["model"], **load_checkpoint(folder / "last.pt")["ema"]}

    config = tmp_path / "run.yaml"
    config.write_text("task: detection\nname: run\n")
    whole = run(tmp_path / "whole", config=str(config))
    with cut_after(4):
        run(tmp_path / "cut", config=str(config))
    assert load_checkpoint(tmp_path / "cut" / "detection" / "run" / "last.pt")["step"] == 3
    resumed = run(tmp_path / "cut", config=str(config), resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
