"""What a task provides: data about heads, annotations, picks, metrics and drawing, but no loop."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from queryvision.config import arguments
from queryvision.data.classes import ClassMap
from queryvision.data.layout import Source
from queryvision.errors import ConfigError, nearest
from queryvision.head import Fit, Head, Steering
from queryvision.masks import MaskSource
from queryvision.results import Result
from queryvision.structures import Picks, Round

Fields = dict[str, Tensor | Sequence[MaskSource]]
"""What heads say about picks: {field: (B,k,...)}, masks as B sources."""


@dataclass(frozen=True)
class HeadSpec:
    """How a task makes one head.

    Attributes:
        type: the class.
        takes: what its constructor takes first, in order: `fit` (see `Fit`), `num_classes`, `skeletons` (of each class).
        settings: the task's own choice of its keyword arguments; a configuration may change them.
        unless: fit -> whether this architecture does without it; None: it never does.
    """

    type: type[Head]
    takes: tuple[str, ...] = ("fit",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    unless: Callable[[Fit], bool] | None = None


class Evaluator(Protocol):
    """Collects results and turns them into metrics."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """Rows of a COCO results file, of all results so far."""

    def add(self, image_id: int, result: Result) -> None:
        """Takes the whole result of one image, without a threshold."""

    def compute(self) -> dict[str, float]:
        """Metrics by their usual names."""


@dataclass(frozen=True)
class Task:
    """A task is data. The engine runs it without knowing which one it is.

    Attributes:
        name: as in `--task`.
        summary: one line for people.
        needs: annotation fields it learns from.
        heads: {name: how to make it}, in the order in which they answer.
        steering: who steers, where an architecture asks.
        pick: (heads, final round, limit) -> the (query, class) pairs that become results.
        evaluator: (ground truth as a COCO dict, classes of the model, backend) -> Evaluator.
        draw: (RGB picture, result) -> picture with the result on it.
        records: (result, image id) -> rows of a COCO results file.
        main_metric: what chooses the best checkpoint; more is better.
        finish: (heads, final round, results of a batch) -> results: what concerns an image as a whole; None: nothing does.
        source: which kind of annotation it learns from: lists of objects, or a segment for every pixel.
        save: (folder, {file stem: result}, classes) writes further result files of `qv predict`; None: there are none.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    heads: Mapping[str, HeadSpec]
    steering: Steering
    pick: Callable[[Mapping[str, Head], Round, int], Picks]
    evaluator: Callable[[dict[str, Any], ClassMap, str], Evaluator]
    draw: Callable[[Image.Image, Result], Image.Image]
    records: Callable[[Result, int], list[dict[str, Any]]]
    main_metric: str = "AP"
    finish: Callable[[Mapping[str, Head], Round, list[Result]], list[Result]] | None = None
    source: Source = "instances"
    save: Callable[[Path, Mapping[str, Result], ClassMap], None] | None = None

    def make_heads(self, classes: int | ClassMap, settings: Mapping[str, Mapping[str, Any]]) -> Callable[[Fit], list[Head]]:
        """What a builder calls to get the heads.

        Args:
            classes: of the model; their number C is enough where no head needs to know more.
            settings: {head: keyword arguments}, over the task's own.

        Raises:
            ConfigError: a setting is unknown or of the wrong type.
        """
        unknown = set(settings) - set(self.heads)
        if unknown:
            name = sorted(unknown)[0]
            raise ConfigError(f"heads.{name}: task '{self.name}' has no such head; {nearest(name, self.heads)}")
        chosen = {
            name: arguments(spec.type, {**spec.settings, **settings.get(name, {})}, f"heads.{name}")
            for name, spec in self.heads.items()
        }

        def make(fit: Fit) -> list[Head]:
            count = classes if isinstance(classes, int) else len(classes)
            skeletons = (None,) * count if isinstance(classes, int) else classes.skeletons
            given = {"fit": fit, "num_classes": count, "skeletons": skeletons}
            return [
                spec.type(*(given[key] for key in spec.takes), **chosen[name])
                for name, spec in self.heads.items()
                if spec.unless is None or not spec.unless(fit)
            ]

        return make

    def decode(self, heads: Mapping[str, Head], round: Round, sizes: Tensor, limit: int) -> tuple[Picks, Fields]:
        """Picks results of a final round and asks every head for their fields.

        Args:
            heads: of the model.
            round: the final stage, S = 1.
            sizes: (B,2) height and width of the original images.
            limit: most results of an image.

        Returns:
            The picks and {field: (B,k,...)}.
        """
        picks = self.pick(heads, round, limit)
        values: Fields = {}
        for name in self.heads:
            if name in round.answers:
                values.update(heads[name].decode(round, picks, sizes))
        return picks, values


def join(*tasks: Task) -> Task:
    """One task out of several: the union of their heads, one pick, all heads' fields, metrics as `<task>/<name>`.

    Raises:
        ConfigError: a head of the same name is of another class or has other settings.
    """
    if len(tasks) == 1:
        return tasks[0]
    heads: dict[str, HeadSpec] = {}
    for task in tasks:
        for name, spec in task.heads.items():
            if heads.setdefault(name, spec) != spec:
                raise ConfigError(f"cannot join {'+'.join(t.name for t in tasks)}: head '{name}' is defined differently")
    first = tasks[0]
    different = next((task for task in tasks if task.source != first.source), None)
    if different is not None:
        raise ConfigError(f"cannot join {first.name} and {different.name}: one learns from objects, the other from segments")

    def draw(picture: Image.Image, result: Result) -> Image.Image:
        for task in tasks:
            picture = task.draw(picture, result)
        return picture

    def records(result: Result, image_id: int) -> list[dict[str, Any]]:
        rows = [task.records(result, image_id) for task in tasks]
        return [{key: value for row in same for key, value in row.items()} for same in zip(*rows, strict=True)]

    def evaluator(ground_truth: dict[str, Any], classes: ClassMap, backend: str) -> Evaluator:
        return _JointEvaluator({t.name: t.evaluator(ground_truth, classes, backend) for t in tasks}, tasks)

    return replace(
        first,
        name="+".join(t.name for t in tasks),
        summary="; ".join(t.summary for t in tasks),
        needs=tuple(dict.fromkeys(need for t in tasks for need in t.needs)),
        heads=heads,
        steering=_joint_steering(tasks),
        draw=draw,
        records=records,
        evaluator=evaluator,
        main_metric="mean",
    )


def _joint_steering(tasks: tuple[Task, ...]) -> Steering:
    """For each part the first task's word that names a head; for quality all, in order."""

    def first(part: str) -> str | None:
        return next((name for task in tasks if (name := getattr(task.steering, part)) is not None), None)

    quality = tuple(dict.fromkeys(name for task in tasks for name in task.steering.quality))
    return Steering(first("rank"), first("first"), first("later"), first("hidden"), quality)


class _JointEvaluator:
    """Asks every task's evaluator; `mean` is the mean of their main metrics."""

    def __init__(self, parts: dict[str, Evaluator], tasks: tuple[Task, ...]) -> None:
        self.parts = parts
        self.main = {task.name: task.main_metric for task in tasks}

    @property
    def records(self) -> list[dict[str, Any]]:
        return [row for part in self.parts.values() for row in part.records]

    def add(self, image_id: int, result: Result) -> None:
        for part in self.parts.values():
            part.add(image_id, result)

    def compute(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, part in self.parts.items():
            metrics |= {f"{name}/{key}": value for key, value in part.compute().items()}
        metrics["mean"] = sum(metrics[f"{name}/{main}"] for name, main in self.main.items()) / len(self.main)
        return metrics


def resolve_task(name: str) -> Task:
    """The task of a name: `detection`, somebody else's `package.module`, or several joined by `+`.

    A task's module holds it as `TASK`. This is the only place where a name becomes a task.

    Raises:
        ConfigError: there is no such task.
    """
    return join(*(_resolve_one(part) for part in name.split("+")))


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
    return module.TASK  # type: ignore[no-any-return]


def task_names() -> list[str]:
    """The tasks that come with the package: the packages beside each other in `queryvision/tasks`."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "tasks")]) if m.ispkg)
