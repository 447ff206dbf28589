"""Trains: the flags become a configuration, the configuration a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from queryvision.config import Config, changed, load_config
from queryvision.engine.launch import launch
from queryvision.errors import ConfigError
from queryvision.run import Run
from queryvision.run_folder import SETTINGS, named_run, newest_run

FLAGS = {
    "data": "data.path",
    "steps": "train.steps",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "image_size": "data.image_size",
    "weights": "weights",
    "devices": "train.devices",
    "precision": "train.precision",
    "workers": "data.workers",
    "seed": "train.seed",
    "output": "output",
    "name": "name",
    "strict": "data.strict",
}
"""The most used settings and where they stand in a configuration; a test freezes them."""


def train(
    task: str | None = None,
    config: str | None = None,
    *,
    data: str | Path | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | str | None = None,
    lr: float | None = None,
    image_size: int | str | None = None,
    weights: str | Path | None = None,
    devices: int | None = None,
    precision: str | None = None,
    workers: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    output: str | Path | None = None,
    strict: bool | None = None,
    resume: bool | str | Path = False,
    settings: Sequence[str] = (),
) -> Path:
    """Trains, evaluates and leaves a run folder.

    Args:
        task: name of the task; None: of the configuration, else `detection`.
        config: name of a preset or a YAML file; None: the task's default.
        data: folder of the data set; None: of the configuration, else the embedded drawn scenes.
        steps: optimiser steps.
        epochs: passes over the data, instead of steps.
        batch_size: images a step and device; `auto`: as many as fit into memory.
        lr: learning rate.
        image_size: short side of the input in pixels; `auto`: chosen from the data.
        weights: of the backbone: none, imagenet, torchvision:NAME, timm:NAME, a path or a URL; or of the whole model: a
            checkpoint of ours, perhaps of other classes.
        devices: number of processes, each with a GPU of its own where there are any; started here unless torchrun or
            `accelerate launch` did.
        precision: fp32, bf16, fp16, or auto: bf16 where the device computes in it.
        workers: processes that read images.
        seed: of everything random.
        name: of the run, a folder under `output`/`task`.
        output: folder of all runs.
        strict: refuse data with a bad annotation.
        resume: go on with the newest run of this name, or with a given run folder, whose own settings count.
        settings: `section.key=value`, any other setting.

    Returns:
        The run folder.

    Raises:
        ConfigError, DataError, CheckpointError: one line says what is wrong.
    """
    given = dict(locals())
    flags = {
        "data": _text(data), "steps": steps, "epochs": epochs, "batch_size": batch_size, "lr": lr, "image_size": image_size,
        "weights": _text(weights), "devices": devices, "precision": precision, "workers": workers, "seed": seed, "name": name,
        "output": _text(output), "strict": strict,
    }  # fmt: skip
    overrides = {FLAGS[key]: value for key, value in flags.items()}
    if not isinstance(resume, bool):
        if config is not None:
            raise ConfigError(f"--resume {resume}: a run brings its own configuration; leave out --config {config}")
        named = named_run(str(resume))
        folder: Path | None = named
        chosen = load_config(task, str(named / SETTINGS), overrides, settings)
    else:
        chosen = load_config(task, config, overrides, settings)
        folder = newest_run(chosen) if resume else None
        if folder is not None and (folder / SETTINGS).is_file():
            chosen = _as_begun(chosen, load_config(task, str(folder / SETTINGS)))
    if folder is not None and devices is None and not any(text.startswith("train.devices") for text in settings):
        chosen = _as_launched(chosen)
    if (chosen.train.devices or 1) > 1 and "WORLD_SIZE" not in os.environ:
        return Path(launch(train, given, chosen.train.devices or 1))
    return Run(chosen, folder).fit()


def _as_begun(chosen: Config, begun: Config) -> Config:
    """What was chosen when the run began stays: bits and batches would be others on another machine."""
    kept = {key: getattr(begun.train, key) for key in ("precision", "batch_size") if getattr(chosen.train, key) == "auto"}
    return changed(chosen, {f"train.{key}": value for key, value in kept.items()})


def _as_launched(chosen: Config) -> Config:
    """As many processes as a launcher has started go on with a run, however many began it."""
    world = int(os.environ.get("WORLD_SIZE", 0))
    return changed(chosen, {"train.devices": world}) if world and chosen.train.devices else chosen


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
