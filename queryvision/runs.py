"""A training run from settings to its folder: data, model, trainer, summary, pictures."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from queryvision.assembly import build_model, header, load_model, resolve
from queryvision.config import Config, load_config
from queryvision.criterion import Criterion
from queryvision.data.loader import BatchPlan, train_loader
from queryvision.data.phases import training_phases
from queryvision.data.skeletons import shared_flip_pairs
from queryvision.engine.launch import launch
from queryvision.engine.processes import make_accelerator
from queryvision.engine.run_log import summary
from queryvision.engine.trainer import Trainer
from queryvision.errors import ConfigError
from queryvision.fitting import fit_to_data
from queryvision.inference.drawing import grid
from queryvision.inference.predictor import Predictor
from queryvision.model.query_model import QueryModel
from queryvision.registry import resolve_task
from queryvision.run_folder import LAST, SETTINGS, named_run, new_folder, newest_run, write_settings
from queryvision.splits import data_warnings, evaluate_model, open_splits
from queryvision.structures import Batch
from queryvision.task import Task
from queryvision.weights.finetune import start_from

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

FEW = 500
"""Steps below which a run gets a warning."""


def train(
    task: str | None = None,
    config: str | None = None,
    *,
    data: str | Path | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    image_size: int | None = None,
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
        batch_size: images a step and device.
        lr: learning rate.
        image_size: short side of the input in pixels.
        weights: of the backbone: none, imagenet, torchvision:NAME, timm:NAME, a path or a URL; or of the whole model: a
            checkpoint of ours, perhaps of other classes.
        devices: number of processes, each with a GPU of its own where there are any; started here unless torchrun or
            `accelerate launch` did.
        precision: fp32, bf16 or fp16.
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
        folder = named_run(str(resume))
        chosen = load_config(task, str(folder / SETTINGS), overrides, settings)
    else:
        chosen = load_config(task, config, overrides, settings)
        folder = newest_run(chosen) if resume else new_folder(chosen)
    if (chosen.train.devices or 1) > 1 and "WORLD_SIZE" not in os.environ:
        return Path(launch(train, given, chosen.train.devices or 1))
    go_on = resume is not False and (folder / LAST).is_file()
    if resume and not go_on:
        print(f"{folder} has saved nothing yet: starting at step 0")
    return _Run(chosen, folder).fit(go_on)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


class _Run:
    """One training run: data, model and trainer of a configuration."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.task: Task = resolve_task(config.task)
        self.accelerator = make_accelerator(config.train)
        self.say = self.accelerator.print  # on the main process
        # The first process may have made the folder already when the others look for a free one.
        self.folder = Path(broadcast_object_list([str(folder)])[0])
        resolve(config, self.task)  # a wrong setting is told before any data is read
        self.train_data, self.val_data = open_splits(config, self.task)
        fitted, choices = fit_to_data(config, self.train_data)
        self.config = resolve(fitted, self.task)
        if choices:
            self.say(f"chosen from the data: {', '.join(choices)}")
        for line in data_warnings(self.train_data, self.val_data):
            self.say(f"warning: {line}")
        self.classes = self.train_data.classes
        train, world = self.config.train, self.accelerator.num_processes
        self.plan = BatchPlan(
            self.train_data.sizes[:, 1] / self.train_data.sizes[:, 0],
            train.batch_size,
            train.seed,
            rank=self.accelerator.process_index,
            world=world,
        )
        self.steps_per_epoch = self.plan.steps_per_epoch / train.accumulate
        self.steps = train.steps or max(1, train.min_steps, round((train.epochs or 1) * self.steps_per_epoch))

    def fit(self, resume: bool) -> Path:
        config, folder = self.config, self.folder
        torch.manual_seed(config.train.seed)
        model = build_model(config, self.task, self.classes)
        if not resume:
            self.say(start_from(model, self.classes, config.weights))
        trainer = Trainer(
            model=model,
            criterion=Criterion(model.heads.heads(), model.steering),
            settings=config.train,
            steps=self.steps,
            steps_per_epoch=self.steps_per_epoch,
            batches=self._batches,
            evaluate=self._evaluate,
            main_metric=self.task.main_metric,
            folder=folder,
            header=header(config, self.task, self.classes),
            accelerator=self.accelerator,
        )
        if resume:
            trainer.load()
        if self.accelerator.is_main_process:  # only now: what is refused leaves no folder and spoils none
            write_settings(folder, config)
        self._announce(model)
        progress = trainer.fit()
        if progress.skipped:
            where = config.data.path or "the drawn scenes"
            self.say(f"warning: {progress.skipped} times an image could not be read; `qv data check {where}` lists them")
        if self.accelerator.is_main_process:
            text = summary(self.task.name, config.model_dump(), progress.step, progress.seconds, progress.best_metrics)
            (folder / "summary.json").write_text(json.dumps(text, indent=2))
            self._picture(folder)
            self.say(f"done: {folder}")
        return folder

    def _announce(self, model: QueryModel) -> None:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        epochs = self.steps / self.steps_per_epoch
        self.say(
            f"{self.task.name}: {len(self.train_data)} training and {len(self.val_data)} validation images, "
            f"{len(self.classes)} classes, {parameters:.1f} M parameters, "
            f"{self.steps} steps ({epochs:.1f} epochs) -> {self.folder}"
        )
        if self.steps < FEW:
            self.say(f"warning: {self.steps} steps are few, most models need thousands; set --steps or train.min_steps")
        if self.train_data.num_keypoints and shared_flip_pairs(self.classes.skeletons) is None:
            self.say("warning: no image is mirrored, as keypoints that swap then are not known; give categories 'flip_pairs'")
        if self.train_data.max_objects > model.num_queries:
            self.say(
                f"warning: an image has {self.train_data.max_objects} objects but the model only {model.num_queries} queries; "
                f"the rest cannot be found. Set model.num_queries to at least {self.train_data.max_objects}"
            )

    def _batches(self, start: int) -> Iterator[Batch]:
        data = self.config.data
        until = round(data.strong_until * self.steps) * self.config.train.accumulate
        transform, first_part = training_phases(
            data.augmentation,
            data.side,
            until,
            data.mosaic,
            data.mixup,
            data.copy_blend,
            shared_flip_pairs(self.classes.skeletons),
        )
        pin = self.accelerator.device.type == "cuda"
        loader = train_loader(
            self.train_data, transform, len(self.classes), self.task.needs, self.plan, start, data.workers, pin, first_part
        )
        return iter(loader)

    def _evaluate(self, model: QueryModel) -> dict[str, float]:
        return evaluate_model(model, self.task, self.classes, self.val_data, self.config, self.accelerator)[0]

    def _picture(self, folder: Path) -> None:
        """A grid of predictions on validation images."""
        count = min(self.config.evaluation.pictures, len(self.val_data))
        if not count or not (folder / "best.pt").exists():
            return
        predictor = Predictor(load_model(folder / "best.pt"))
        chosen = sorted(random.Random(0).sample(range(len(self.val_data)), count))
        samples = [self.val_data.read(index) for index in chosen]
        results = predictor.predict([sample.image for sample in samples], self.config.evaluation.threshold)
        drawn = [self.task.draw(Image.fromarray(s.image), r) for s, r in zip(samples, results, strict=True)]
        grid(drawn, 4).save(folder / "predictions.png")
