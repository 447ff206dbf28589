"""From settings to parts and back: models from a configuration or a checkpoint. Settings stop here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from queryvision.config import Config, arguments, make_config
from queryvision.data.classes import ClassMap
from queryvision.engine.checkpoint import load_checkpoint, load_weights
from queryvision.errors import CheckpointError, ConfigError
from queryvision.model.builders import builder
from queryvision.model.query_model import QueryModel
from queryvision.registry import resolve_task
from queryvision.task import Task


@dataclass
class Loaded:
    """What a checkpoint holds, ready to use."""

    model: QueryModel
    task: Task
    classes: ClassMap
    config: Config
    step: int
    metrics: dict[str, float]


def resolve(config: Config, task: Task) -> Config:
    """The configuration with every default of its builder and its heads filled in.

    Raises:
        ConfigError: unknown builder, head or key.
    """
    name = config.model.get("name")
    if not isinstance(name, str):
        raise ConfigError("model.name: which builder makes the model? For example --set model.name=detr_r50")
    given = {key: value for key, value in config.model.items() if key != "name"}
    auto = {key: given.pop(key) for key in ("num_queries",) if given.get(key) == "auto"}  # until `fit_to_data` knows better
    model = {"name": name, **arguments(builder(name), given, "model"), **auto}
    unknown = set(config.heads) - set(task.heads)
    if unknown:
        task.make_heads(1, config.heads)  # says which
    heads = {
        head: arguments(spec.type, {**spec.settings, **config.heads.get(head, {})}, f"heads.{head}")
        for head, spec in task.heads.items()
    }
    return config.model_copy(update={"model": _plain(model), "heads": {head: _plain(given) for head, given in heads.items()}})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as YAML would give them back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def build_model(config: Config, task: Task, classes: ClassMap) -> QueryModel:
    """A model of a resolved configuration, with random weights."""
    keywords = {key: value for key, value in config.model.items() if key != "name" and value != "auto"}
    return builder(config.model["name"])(task.make_heads(classes, config.heads), task.steering, **keywords)


def header(config: Config, task: Task, classes: ClassMap) -> dict[str, Any]:
    """What every checkpoint says beside the weights."""
    return {"task": task.name, "config": config.model_dump(), "classes": classes.to_dict()}


def load_model(path: str | Path, queries: int | None = None, layers: int | None = None) -> Loaded:
    """Rebuilds a model from a checkpoint of ours; nothing but the file is needed.

    Args:
        path: of the file.
        queries: another number of queries than in training, for models that select theirs from proposals; None: the same.
        layers: how many decoder layers to keep, the first ones; None: all.

    Raises:
        ConfigError: the model cannot have so many queries or layers.
        CheckpointError: it is something else, or does not fit this version.
    """
    content = load_checkpoint(path)
    missing = {"task", "config", "classes", "model"} - set(content)
    if missing:
        raise CheckpointError(f"{path}: cannot be rebuilt: it lacks {', '.join(sorted(missing))}")
    try:
        classes = ClassMap.from_dict(content["classes"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be rebuilt: its classes are malformed") from error
    try:
        task = resolve_task(content["task"])
        config = resolve(make_config(content["config"]), task)
        model = build_model(config, task, classes)
    except ConfigError as error:
        raise CheckpointError(f"{path}: cannot be rebuilt: {error}") from error
    load_weights(model, content.get("ema", content["model"]), str(path))
    if queries is not None:
        model.set_num_queries(queries)
    if layers is not None:
        model.keep_layers(layers)
    model.eval()
    return Loaded(model, task, classes, config, content.get("step", 0), content.get("metrics", {}))
