"""From a name to a task; the only place where that happens."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

from queryvision.config import task_name
from queryvision.errors import ConfigError, nearest
from queryvision.joint import join
from queryvision.task import Task


def resolve_task(name: str) -> Task:
    """The task of a name: `detection`, somebody else's `package.module`, or several joined by `+`.

    A task's module holds it as `TASK`. This is the only place where a name becomes a task.

    Raises:
        ConfigError: there is no such task, or it is named twice.
    """
    names = task_name(name).split("+")
    twice = next((part for part in names if names.count(part) > 1), None)
    if twice is not None:
        raise ConfigError(f"task '{name}': '{twice}' is named twice; once is enough")
    return join(*(_resolve_one(part) for part in names))


def _resolve_one(name: str) -> Task:
    path = name if "." in name else f"queryvision.tasks.{name}"
    unknown = ConfigError(f"there is no task '{name}'; {nearest(name, task_names())}, or a dotted module")
    if not all(part.isidentifier() for part in path.split(".")):
        raise unknown
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and not path.startswith(error.name):
            raise
        raise unknown from error
    if not isinstance(getattr(module, "TASK", None), Task):
        raise ConfigError(f"module '{path}' holds no TASK (a queryvision.task.Task)")
    task: Task = replace(module.TASK, name=name)  # what a checkpoint says must lead back here
    return task


def task_names() -> list[str]:
    """The tasks that come with the package: the packages beside each other in `queryvision/tasks`."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "tasks")]) if m.ispkg)
