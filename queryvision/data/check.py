"""Looks at a whole data set: every annotation, and every image decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from queryvision.data import layout
from queryvision.data.annotations import Problem
from queryvision.data.coco import CocoDataset, check_same_classes, open_file
from queryvision.data.coco_file import load
from queryvision.errors import DataError


@dataclass(frozen=True)
class SplitReport:
    """What one annotation file holds."""

    split: str
    file: Path
    num_images: int
    num_objects: int  # good ones, crowds apart
    num_crowds: int
    num_empty: int  # images without objects
    max_objects: int  # in one image
    class_counts: dict[str, int]  # objects of each class
    needs: tuple[str, ...]  # what was checked

    def lines(self) -> list[str]:
        """For people."""
        counts = ", ".join(f"{name} {count}" for name, count in self.class_counts.items())
        return [
            f"{self.split}: {self.file} (checked: {', '.join(self.needs)})",
            f"  {self.num_images} images, {self.num_empty} without objects; {self.num_objects} objects, at most "
            f"{self.max_objects} in an image; {self.num_crowds} crowd regions",
            f"  {counts}",
        ]


@dataclass(frozen=True)
class Report:
    """What was found in a data set."""

    root: Path
    splits: list[SplitReport]
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """Whether nothing had to be dropped and every image can be read."""
        return all(problem.kept for problem in self.problems)

    def lines(self) -> list[str]:
        """For people: the splits, every problem, and a summary."""
        bad = sum(not problem.kept for problem in self.problems)
        summary = f"{self.root}: {'ok' if self.ok else f'{bad} problems'}, {len(self.problems) - bad} notes"
        return [line for split in self.splits for line in split.lines()] + [str(p) for p in self.problems] + [summary]


def check(path: Path | str, needs: Sequence[str] | None = None) -> Report:
    """Checks all splits of a data set.

    Args:
        path: its root folder.
        needs: annotation fields to check, in the files that training with them would read; None: every file, with masks
            and keypoints wherever it has them.

    Raises:
        DataError: there is no data set, or a file of it is no COCO file.
    """
    root = Path(path)
    found = layout.find_all(root)
    if not found:
        raise DataError(f"{root}: there are no annotations. Understood: {layout.LAYOUTS}")
    if needs is not None:
        found = [(split, layout.find_annotations(root, split, needs)) for split in dict.fromkeys(name for name, _ in found)]
    splits: list[SplitReport] = []
    problems: list[Problem] = []
    by_kind: dict[str, CocoDataset] = {}
    for split, file in found:
        dataset = open_file(root, split, file, _offered(file) if needs is None else needs)
        splits.append(_summary(dataset))
        problems += dataset.problems + _decode_all(dataset)
        kind = file.stem.replace(split, "")  # instances and keypoints of the same images may well have other classes
        try:
            check_same_classes(by_kind.setdefault(kind, dataset), dataset)
        except DataError as error:
            problems.append(Problem(str(file), None, "", str(error), False, "other classes"))
    return Report(root, splits, problems)


def _offered(file: Path) -> tuple[str, ...]:
    """What a file has beside boxes."""
    raw = load(file)
    needs = []
    if any(isinstance(a, dict) and a.get("segmentation") for a in raw["annotations"]):
        needs.append("masks")
    named = any(isinstance(c, dict) and c.get("keypoints") for c in raw["categories"])
    if named and any(isinstance(a, dict) and a.get("keypoints") for a in raw["annotations"]):
        needs.append("keypoints")
    return tuple(needs)


def _summary(dataset: CocoDataset) -> SplitReport:
    objects = dataset.objects
    counts = np.bincount(objects.labels[~objects.crowd], minlength=len(dataset.classes))
    image = np.repeat(np.arange(len(dataset)), np.diff(objects.offsets))
    per_image = np.bincount(image[~objects.crowd], minlength=len(dataset))
    return SplitReport(
        split=dataset.split,
        file=dataset.file,
        num_images=len(dataset),
        num_objects=int(counts.sum()),
        num_crowds=int(objects.crowd.sum()),
        num_empty=int((per_image == 0).sum()),
        max_objects=dataset.max_objects,
        class_counts=dict(zip(dataset.classes.names, counts.tolist(), strict=True)),
        needs=dataset.needs,
    )


def _decode_all(dataset: CocoDataset) -> list[Problem]:
    """Reads every image; Pillow decodes outside of Python's lock, so threads help."""

    def failure(index: int) -> Problem | None:
        try:
            dataset.read(index)
        except DataError as error:
            return Problem(str(dataset.file), None, dataset.name(index), str(error), False, "unreadable image")
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [problem for problem in pool.map(failure, range(len(dataset))) if problem]
