"""The data of a configuration: its two splits, what to warn about, and a model's metrics on one of them."""

from __future__ import annotations

from queryvision.config import Config
from queryvision.data.classes import ClassMap
from queryvision.data.coco import CocoDataset, check_same_classes, open_dataset
from queryvision.data.loader import evaluation_loader
from queryvision.data.scenes import make_scenes
from queryvision.data.transforms import evaluation_transform
from queryvision.engine.evaluation import evaluate
from queryvision.errors import DataError
from queryvision.model.query_model import QueryModel
from queryvision.task import Evaluator, Task


def open_splits(config: Config, task: Task) -> tuple[CocoDataset, CocoDataset]:
    """Training and validation data of a configuration; the drawn scenes where no path is given.

    Raises:
        DataError: they cannot be read, are empty, or disagree about their classes.
    """
    data = config.data
    root = str(make_scenes()) if data.path is None else data.path
    train = open_dataset(root, data.train_split, task.needs, data.strict, task.source)
    if data.limit:
        train = train.subset(data.limit)
        val = train
    else:
        val = open_dataset(root, data.val_split, task.needs, data.strict, task.source)
        check_same_classes(train, val)
    if not train.max_objects:
        raise DataError(f"{train.file}: holds no object to learn from in {len(train)} images; `qv data check {root}` tells why")
    return train, val


def data_warnings(train: CocoDataset, val: CocoDataset) -> list[str]:
    """What people should know about the data before they train on it."""
    splits = (train,) if train is val else (train, val)  # with a limit they are the same
    warnings = [text for split in splits if (text := split.warning())]
    if not val.max_objects:
        warnings.append(f"{val.file}: holds no object, so nothing can be measured")
    return warnings


def evaluate_model(
    model: QueryModel, task: Task, classes: ClassMap, data: CocoDataset, config: Config
) -> tuple[dict[str, float], Evaluator]:
    """Metrics of a model on a data set with the settings of a configuration."""
    settings = config.evaluation
    batches = evaluation_loader(
        data,
        evaluation_transform(config.data.side),
        len(data.classes),
        task.needs,
        settings.batch_size,
        config.data.workers,
    )
    truth, limit = data.ground_truth(), settings.max_results
    return evaluate(model, task, classes, batches, truth, limit, settings.evaluator, settings.overlap)
