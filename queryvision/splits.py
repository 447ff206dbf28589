"""The data of a configuration: its two splits, what to warn about, and a model's metrics on one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from accelerate import Accelerator

from queryvision.config import Config
from queryvision.data.classes import ClassMap
from queryvision.data.coco import CocoDataset, check_same_classes, open_dataset, open_file
from queryvision.data.layout import find_annotations
from queryvision.data.loader import ImageInfo, Loader, evaluation_loader
from queryvision.data.pixel_cache import PixelCache
from queryvision.data.scenes import make_scenes
from queryvision.data.transforms import evaluation_transform
from queryvision.data.union import unite
from queryvision.engine.evaluation import evaluate
from queryvision.errors import DataError
from queryvision.model.query_model import QueryModel
from queryvision.structures import Batch
from queryvision.task import Evaluator, Shareable, Task


def open_splits(config: Config, task: Task) -> tuple[CocoDataset, CocoDataset]:
    """Training and validation data of a configuration; the drawn scenes where no path is given.

    Raises:
        DataError: they cannot be read, are empty, or disagree about their classes.
        ConfigError: there is no room for the cache.
    """
    data = config.data
    root = str(make_scenes()) if data.path is None else data.path
    train = open_split(task, root, data.train_split, data.strict)
    if data.limit:
        train = train.subset(data.limit)
        val = train
    else:
        val = open_split(task, root, data.val_split, data.strict)
        check_same_classes(train, val)
    if data.skip_empty and train.max_objects:
        train = train.subset(np.flatnonzero(train.num_objects).tolist())
    if not train.max_objects:
        raise DataError(f"{train.file}: holds no object to learn from in {len(train)} images; `qv data check {root}` tells why")
    if data.cache:
        for split in (train, val):
            split.cache = PixelCache(data.cache, split.images.names, split.sizes, f"{root}/{split.split}")
    return train, val


def open_split(task: Task, root: str | Path, split: str, strict: bool = False) -> CocoDataset:
    """What a task learns from or is measured on; of a joint task the files of all its parts, united where they differ.

    Raises:
        DataError: it cannot be read, or files of joint tasks disagree.
    """
    parts = task.parts or (task,)
    files = {part.name: (find_annotations(root, split, part.needs, part.source), part.source) for part in parts}
    needs = {file: [need for part in parts if files[part.name] == file for need in part.needs] for file in files.values()}
    if len(needs) == 1:
        return open_dataset(root, split, task.needs, strict, task.source)
    opened = {
        (file, source): open_file(Path(root), split, file, wanted, strict, source) for (file, source), wanted in needs.items()
    }
    return unite({name: opened[file] for name, file in files.items()})


def data_warnings(train: CocoDataset, val: CocoDataset) -> list[str]:
    """What people should know about the data before they train on it."""
    splits = (train,) if train is val else (train, val)  # with a limit they are the same
    warnings = [text for split in splits if (text := split.warning())]
    if not val.max_objects:
        warnings.append(f"{val.file}: holds no object, so nothing can be measured")
    return warnings


class Evaluation:
    """Judges models on a data set with the settings of a configuration; several processes share the images.

    The processes that read images stay for the next time.

    Args:
        task: judges.
        classes: of the models.
        data: what they are judged on.
        config: resolved.
        accelerator: of the run, where there is one.
    """

    def __init__(
        self, task: Task, classes: ClassMap, data: CocoDataset, config: Config, accelerator: Accelerator | None = None
    ) -> None:
        self.task, self.classes, self.data, self.config, self.accelerator = task, classes, data, config, accelerator
        self.loader: Loader[tuple[Batch, list[ImageInfo]]] | None = None

    def __call__(self, model: QueryModel) -> tuple[dict[str, float], Evaluator]:
        """Metrics, the same in every process, and who found them."""
        settings = self.config.evaluation
        evaluator = self.task.evaluator(self.data.ground_truth(), self.classes, settings.evaluator)
        if self.loader is None:
            share = (0, 1)
            if self.accelerator is not None and isinstance(evaluator, Shareable):
                share = (self.accelerator.process_index, self.accelerator.num_processes)
            self.loader = evaluation_loader(
                self.data,
                evaluation_transform(self.config.data.side),
                len(self.data.classes),
                self.task.needs,
                settings.batch_size,
                self.config.data.workers,
                *share,
                pin_memory=next(model.parameters()).is_cuda,
            )
        limits = settings.max_results, settings.overlap
        found = evaluate(model, self.task, self.classes, self.loader, evaluator, *limits, self.accelerator)
        return found, evaluator
