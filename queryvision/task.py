"""What a task provides: data about heads, annotations, picks, metrics and drawing, but no loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class Shareable(Protocol):
    """What an evaluator has besides, if several processes are to share its images; else each looks at all of them."""

    def state(self) -> Any:
        """What was added, to be pickled."""

    def merge(self, states: Iterable[Any]) -> None:
        """Takes in the states of all processes, its own among them; no image counts twice."""


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
        save: (folder, {file stem: result}, classes) writes further result files of `qv predict`; None: there are none. It reads
            the results once and in order, as in `items()`: pictures are looked at when their turn comes.
        parts: the tasks that this one joins; empty: it is no joint task.
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
    parts: tuple[Task, ...] = ()

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
