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
from queryvision.data.layout import Found, Source
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


def check(path: Path | str, needs: Sequence[str] | None = None, source: Source = "instances") -> Report:
    """Checks all splits of a data set.

    Args:
        path: its root folder.
        needs: annotation fields to check, in the files that training with them would read; None: every file, with masks
            and keypoints wherever it has them.
        source: which files these are, where `needs` says what to check; see `open_dataset`.

    Raises:
        DataError: there is no data set, or a file of it is no COCO file.
    """
    root = Path(path)
    found = layout.find_all(root)
    if not found:
        raise DataError(f"{root}: there are no annotations. Understood: {layout.LAYOUTS}; {layout.PANOPTIC_LAYOUTS}")
    if needs is not None:
        names = _splits(found, needs, source) or [found[0].split]  # the latter will say why
        found = [Found(name, layout.find_annotations(root, name, needs, source), source) for name in names]
    splits: list[SplitReport] = []
    problems: list[Problem] = []
    by_kind: dict[tuple[str, str, str], CocoDataset] = {}
    for split, file, kind in found:
        try:
            dataset = open_file(root, split, file, _offered(file, kind) if needs is None else needs, source=kind)
        except DataError as error:
            if kind == "instances" or needs is not None:
                raise
            # COCO's files come with a panoptic one whose PNG files are a download of their own.
            problems.append(Problem(str(file), None, "", str(error), False, "panoptic part cannot be read"))
            continue
        splits.append(_summary(dataset))
        if not splits[-1].num_objects:
            problems.append(Problem(str(file), None, "", "there is no object to learn from or to measure", False, "no object"))
        problems += dataset.problems + _decode_all(dataset)
        family = (kind, *file.stem.rpartition(split)[::2])  # instances and keypoints of the same images may have other classes
        try:
            check_same_classes(by_kind.setdefault(family, dataset), dataset)
        except DataError as error:
            problems.append(Problem(str(file), None, "", str(error), False, "other classes"))
    return Report(root, splits, problems)


def _splits(found: Sequence[Found], needs: Sequence[str], source: Source) -> list[str]:
    """The usual splits, and those with a file of the kind that `needs` asks for: others may have been made for other tasks."""
    people = {f.file for f in found if f.file.name.startswith(layout.PEOPLE)}
    wanted = "keypoints" in needs and bool(people)
    own = (f.split for f in found if f.source == source and (f.split in layout.SPLITS or (f.file in people) == wanted))
    return list(dict.fromkeys(own))


def _offered(file: Path, source: Source) -> tuple[str, ...]:
    """What a file has beside boxes."""
    if source == "panoptic":
        return ("masks",)
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

    def failures(index: int) -> list[Problem]:
        try:
            dataset.read(index)
            return [] if dataset.maps is None else _unmatched(dataset, index)
        except DataError as error:
            return [Problem(str(dataset.file), None, dataset.name(index), str(error), False, "unreadable image")]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [problem for part in pool.map(failures, range(len(dataset))) for problem in part]


def _unmatched(dataset: CocoDataset, index: int) -> list[Problem]:
    """Segments that the map lacks, and ids in the map that the file lacks; what was dropped is known already."""
    assert dataset.maps is not None
    objects, image = dataset.objects, dataset.name(index)
    listed = set(objects.ids[objects.offsets[index] : objects.offsets[index + 1]].tolist())
    dropped = {problem.annotation_id for problem in dataset.problems if problem.image == image}
    drawn = set(np.unique(dataset.maps.read(index)).tolist()) - {0}

    def problem(id_: int, kind: str) -> Problem:
        return Problem(str(dataset.file), id_, image, f"{kind} {dataset.maps.name(index)}", False, kind)  # type: ignore[union-attr]

    lacking = [problem(id_, "segment without a pixel in") for id_ in sorted(listed - drawn)]
    return lacking + [problem(id_, "unlisted segment in") for id_ in sorted(drawn - listed - dropped)]
