"""One training run: the data, the model and the trainer of a configuration, and what it leaves behind."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from queryvision.assembly import build_model, header, load_model, resolve
from queryvision.config import Config, changed
from queryvision.criterion import Criterion
from queryvision.data.loader import BatchPlan, collate, first_readable, train_loader
from queryvision.data.phases import training_phases
from queryvision.data.skeletons import flip_orders
from queryvision.data.transforms import evaluation_transform, largest_area
from queryvision.engine.files import replacing
from queryvision.engine.memory import images_that_fit
from queryvision.engine.processes import make_accelerator, precision_of
from queryvision.engine.run_log import summary
from queryvision.engine.trainer import Trainer
from queryvision.errors import QueryVisionError
from queryvision.fitting import fit_to_data
from queryvision.inference.drawing import grid
from queryvision.inference.predictor import Predictor
from queryvision.model.query_model import QueryModel
from queryvision.registry import resolve_task
from queryvision.run_folder import LAST, claim_folder, holding, take_folder
from queryvision.splits import Evaluation, data_warnings, open_splits
from queryvision.structures import Batch
from queryvision.task import Task
from queryvision.timing import Timer, untimed
from queryvision.weights.finetune import start_from

T = TypeVar("T")
FEW = 500
"""Steps below which a run gets a warning."""


class Run:
    """One training run: data, model and trainer of a configuration.

    Args:
        config: not yet resolved.
        folder: of the run; None: a new one, made when training starts.
        timer: stands around the parts of a step.

    Raises:
        ConfigError, DataError: one line says what is wrong.
    """

    def __init__(self, config: Config, folder: Path | None, timer: Timer = untimed) -> None:
        self.timer = timer
        self.task: Task = resolve_task(config.task)
        self.accelerator = make_accelerator(config.train)
        self.say = self.accelerator.print  # on the main process
        if config.train.precision == "auto":
            config = changed(config, {"train.precision": precision_of(self.accelerator)})
            self.say(f"precision {config.train.precision} (auto)")
        self.folder: Path | None = broadcast_object_list([folder])[0]  # another run may begin while the processes look
        resolve(config, self.task)  # a wrong setting is told before any data is read
        self.train_data, self.val_data = open_splits(config, self.task)
        fitted, choices = fit_to_data(config, self.train_data)
        self.config = resolve(fitted, self.task)
        if choices:
            self.say(f"chosen from the data: {', '.join(choices)}")
        for line in data_warnings(self.train_data, self.val_data):
            self.say(f"warning: {line}")
        self.classes = self.train_data.classes
        if self.config.train.batch_size == "auto":
            self.config = changed(self.config, {"train.batch_size": self._batch_size()})
        train, world = self.config.train, self.accelerator.num_processes
        self.plan = BatchPlan(
            self.train_data.sizes[:, 1] / self.train_data.sizes[:, 0],
            train.images,
            train.seed,
            rank=self.accelerator.process_index,
            world=world,
        )
        self.steps_per_epoch = self.plan.steps_per_epoch / train.accumulate
        self.steps = train.steps or max(1, train.min_steps, round((train.epochs or 1) * self.steps_per_epoch))

    def _batch_size(self) -> int:
        """Images that fit into the memory of every process's device, tried with the fullest image at the largest size."""
        model = build_model(self.config, self.task, self.classes).to(self.accelerator.device).train()
        name, side = self.config.data.augmentation, self.config.data.side
        resize = evaluation_transform(side)
        fullest_first = np.argsort(-self.train_data.num_objects, kind="stable").tolist()
        sample = resize(first_readable(self.train_data, fullest_first, []))
        largest = max(largest_area(name, side, (h, w)) for h, w in np.unique(self.train_data.sizes, axis=0).tolist())

        def batch(count: int) -> Batch:
            return collate([sample] * count, len(self.classes), self.task.needs)

        criterion = Criterion(model.heads.heads(), model.steering)
        scale = largest / math.prod(sample.image.shape[:2])
        fitting = images_that_fit(model, criterion, batch, self.accelerator.device, scale)
        images = min(gather_object([fitting]))
        self.say(f"batch size {images}, as many images as fit into memory; the learning rate stays {self.config.train.lr}")
        return int(images)

    def trainer(self, resume: bool) -> Trainer:
        """A trainer at step 0, or where the folder's checkpoint stands.

        Raises:
            CheckpointError, ConfigError: the checkpoint or the weights to start from do not fit.
        """
        config = self.config
        torch.manual_seed(config.train.seed)
        model = build_model(config, self.task, self.classes)
        if not resume:
            self.say(start_from(model, self.classes, config.weights))
        trainer = Trainer(
            model=model,
            criterion=Criterion(model.heads.heads(), model.steering, timer=self.timer),
            settings=config.train,
            steps=self.steps,
            steps_per_epoch=self.steps_per_epoch,
            batches=self._batches,
            evaluate=self._evaluate,
            main_metric=self.task.main_metric,
            folder=self.folder or Path(config.output),  # a new run's is made later
            header=header(config, self.task, self.classes),
            accelerator=self.accelerator,
            timer=self.timer,
        )
        if resume:
            trainer.load()
            self.steps = trainer.steps
        return trainer

    def fit(self) -> Path:
        """Trains to the last step, from where the folder stands; leaves summary and pictures; returns the folder.

        Raises:
            ConfigError: another run is in the folder, or it cannot be written; and as `trainer` and `Trainer.fit`.
        """
        with contextlib.ExitStack() as held:
            trainer = self.trainer(self._first(lambda: self._resumes(held)))
            # Only now: what is refused leaves no folder and spoils none.
            folder = self.folder = trainer.folder = self._first(lambda: self._folder(held))
            return self._train(trainer, folder)

    def _train(self, trainer: Trainer, folder: Path) -> Path:
        config = self.config
        self._announce(trainer.state.plain)
        progress = trainer.fit()
        if progress.skipped:
            where = config.data.path or "the drawn scenes"
            self.say(f"warning: {progress.skipped} times an image could not be read; `qv data check {where}` lists them")
        if self.accelerator.is_main_process:
            text = summary(self.task.name, config.model_dump(), progress.step, progress.seconds, progress.best_metrics)
            try:
                with replacing(folder / "summary.json") as file:
                    file.write(json.dumps(text, indent=2).encode())
                self._picture(folder)
            except OSError as error:  # the weights are there
                self.say(f"warning: cannot write summary and pictures into {folder} ({error.strerror})")
            self.say(f"done: {folder}")
        return folder

    def _resumes(self, held: contextlib.ExitStack) -> bool:
        """Whether there is something to go on from; its folder is held first, so that nobody else goes on meanwhile."""
        if self.folder is None:
            return False
        held.enter_context(holding(self.folder))
        saved = (self.folder / LAST).is_file()
        if not saved:
            self.say(f"{self.folder} has saved nothing yet: starting at step 0")
        return saved

    def _folder(self, held: contextlib.ExitStack) -> Path:
        """The run's folder, ready to be written into."""
        folder = self.folder
        if folder is None:
            folder = claim_folder(self.config)
            held.enter_context(holding(folder))
        take_folder(folder, self.config)
        return folder

    def _first(self, work: Callable[[], T]) -> T:
        """What the first process makes of it, in all of them; its error, too, so that none waits for it."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = work()
            except QueryVisionError as error:
                found[1] = error
        broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return cast(T, found[0])

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
        skeletons = self.classes.skeletons
        if self.train_data.num_keypoints and flip_orders(skeletons) is None:
            index = next((i for i, s in enumerate(skeletons) if s is not None and s.flip_pairs is None), 0)
            self.say(
                "warning: no image is mirrored, as it is not known which keypoints of "
                f"'{self.classes.names[index]}' swap then; give its category 'flip_pairs'"
            )
        if self.train_data.max_objects > model.num_queries:
            self.say(
                f"warning: an image has {self.train_data.max_objects} objects but the model only {model.num_queries} queries; "
                f"the rest cannot be found. Set model.num_queries to at least {self.train_data.max_objects}"
            )
        if self.train_data.max_objects > self.config.evaluation.max_results:
            self.say(
                f"warning: an image has {self.train_data.max_objects} objects but only the best "
                f"{self.config.evaluation.max_results} results are kept; set evaluation.max_results"
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
            flip_orders(self.classes.skeletons),
        )
        pin = self.accelerator.device.type == "cuda"
        loader = train_loader(
            self.train_data,
            transform,
            len(self.classes),
            self.task.needs,
            self.plan,
            start,
            data.workers,
            pin,
            first_part,
            data.multiple,
        )
        return iter(loader)

    def _evaluate(self, model: QueryModel) -> dict[str, float]:
        return self._evaluation(model)[0]

    @functools.cached_property
    def _evaluation(self) -> Evaluation:
        return Evaluation(self.task, self.classes, self.val_data, self.config, self.accelerator)

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
