"""One task out of several: one model and one matching for the union of their heads, every task's metrics beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from queryvision.data.classes import ClassMap
from queryvision.errors import ConfigError
from queryvision.head import Head, Steering
from queryvision.results import Result
from queryvision.structures import Round
from queryvision.task import Evaluator, HeadSpec, Shareable, Task


def join(*tasks: Task) -> Task:
    """One task out of several: the union of their heads, the first one's pick, all heads' fields, metrics as `<task>/<name>`.

    Raises:
        ConfigError: a head of the same name is of another class or has other settings.
    """
    if len(tasks) == 1:
        return tasks[0]
    heads: dict[str, HeadSpec] = {}
    for task in tasks:
        for name, spec in task.heads.items():
            known = heads.get(name, spec)
            if replace(known, unless=spec.unless) != spec:
                raise ConfigError(f"cannot join {'+'.join(t.name for t in tasks)}: head '{name}' is defined differently")
            # Who needs it always outweighs who can do without it.
            heads[name] = spec if spec.unless is None else known

    def draw(picture: Image.Image, result: Result) -> Image.Image:
        for task in tasks:
            picture = task.draw(picture, result)
        return picture

    def finish(heads: Mapping[str, Head], round: Round, results: list[Result]) -> list[Result]:
        raw = results
        for task in tasks:
            results = results if task.finish is None else task.finish(heads, round, results)
        return [replace(result, whole=whole) for result, whole in zip(results, raw, strict=True)]

    def save(folder: Path, results: Mapping[str, Result], classes: ClassMap) -> None:
        for task in tasks:
            if task.save is not None:
                task.save(folder, results, classes)

    def records(result: Result, image_id: int) -> list[dict[str, Any]]:
        rows = [task.records(result, image_id) for task in tasks]
        return [{key: value for row in same for key, value in row.items()} for same in zip(*rows, strict=True)]

    def evaluator(ground_truth: dict[str, Any], classes: ClassMap, backend: str) -> Evaluator:
        truths = ground_truth.get("parts", {task.name: ground_truth for task in tasks})  # several files, or one for all
        known = [task for task in tasks if task.name in truths]
        parts = [task.evaluator(truths[task.name], classes, backend) for task in known]
        images = [{row["id"] for row in truths[task.name]["images"]} for task in known]
        kind = _ShareableEvaluator if all(isinstance(part, Shareable) for part in parts) else _JointEvaluator
        return kind(known, parts, images)

    return replace(
        tasks[0],
        name="+".join(t.name for t in tasks),
        summary="; ".join(t.summary for t in tasks),
        needs=tuple(dict.fromkeys(need for t in tasks for need in t.needs)),
        heads=heads,
        steering=_joint_steering(tasks),
        draw=draw,
        records=records,
        evaluator=evaluator,
        main_metric="mean",
        finish=finish if any(t.finish for t in tasks) else None,
        save=save if any(t.save for t in tasks) else None,
        source="panoptic" if any(t.source == "panoptic" for t in tasks) else "instances",
        parts=tasks,
    )


def _joint_steering(tasks: tuple[Task, ...]) -> Steering:
    """For each part the first task's word that names a head; for quality all, in order."""

    def first(part: str) -> str | None:
        return next((name for task in tasks if (name := getattr(task.steering, part)) is not None), None)

    quality = tuple(dict.fromkeys(name for task in tasks for name in task.steering.quality))
    return Steering(first("rank"), first("first"), first("later"), first("hidden"), quality)


class _JointEvaluator:
    """Asks every task's evaluator, each about the images of its own annotations; `mean` is the mean of their main metrics."""

    def __init__(self, tasks: Sequence[Task], parts: Sequence[Evaluator], images: Sequence[set[int]]) -> None:
        self.tasks, self.parts, self.images = tasks, parts, images

    @property
    def records(self) -> list[dict[str, Any]]:
        return [row for part in self.parts for row in part.records]

    def add(self, image_id: int, result: Result) -> None:
        for task, part, known in zip(self.tasks, self.parts, self.images, strict=True):
            if image_id in known:
                part.add(image_id, result if task.finish or result.whole is None else result.whole)

    def save(self, file: Path) -> None:
        """Writes each task's records into a file of its own, `<stem>_<task>.json`; COCO's tools read one kind at a time."""
        for task, part in zip(self.tasks, self.parts, strict=True):
            own = file.with_name(f"{file.stem}_{task.name}{file.suffix}")
            save = getattr(part, "save", None)
            if save is None:
                own.write_text(json.dumps(part.records))
            else:
                save(own)

    def compute(self) -> dict[str, float]:
        found = [part.compute() for part in self.parts]
        main = {f"{t.name}/{t.main_metric}": m.get(t.main_metric, -1.0) for t, m in zip(self.tasks, found, strict=True)}
        known = [value for value in main.values() if value >= 0]  # -1: there was nothing to measure
        whole = {"mean": sum(known) / len(known) if known else -1.0, **main}  # what people look at first
        for task, metrics in zip(self.tasks, found, strict=True):
            whole |= {f"{task.name}/{key}": value for key, value in metrics.items()}
        return whole


class _ShareableEvaluator(_JointEvaluator):
    """Whose parts can all take in what other processes found."""

    def state(self) -> list[Any]:
        return [cast(Shareable, part).state() for part in self.parts]

    def merge(self, states: Iterable[list[Any]]) -> None:
        for part, of_part in zip(self.parts, zip(*states, strict=True), strict=True):
            cast(Shareable, part).merge(of_part)
