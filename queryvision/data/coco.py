"""COCO files as a data set: found, checked once, kept in arrays, read image by image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.data import layout
from queryvision.data.annotations import Problem, check_annotations
from queryvision.data.classes import ClassMap
from queryvision.data.coco_file import DUPLICATE_IMAGE, image_table, load, real_categories
from queryvision.data.images import is_turned, read_image
from queryvision.data.packed import ImageTable, Objects
from queryvision.data.sample import Annotations, Sample
from queryvision.data.segmentation import rasterise
from queryvision.errors import DataError


class CocoDataset:
    """Images with checked annotations; `dataset[i]` reads image i.

    Attributes:
        root: folder of the data set.
        split: its part, such as `train`.
        file: the annotation file.
        classes: its classes, from the file's categories.
        categories: the categories as published.
        needs: the annotation fields that a sample holds.
        problems: what was wrong in the file.
        num_annotations: in the file, good and bad.
        image_ids: (n,) int64.
        sizes: (n,2) int32 height, width, as the file says.
        max_objects: most objects in one image, crowds apart.
        num_keypoints: K, 0 where none are needed.
        objects: the packed annotations.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        file: Path,
        classes: ClassMap,
        categories: Sequence[Mapping[str, Any]],
        needs: Sequence[str],
        images: ImageTable,
        objects: Objects,
        problems: Sequence[Problem] = (),
        num_annotations: int = 0,
    ) -> None:
        self.root, self.split, self.file = root, split, file
        self.classes, self.categories, self.needs = classes, list(categories), tuple(needs)
        self.problems, self.num_annotations = list(problems), num_annotations
        self.image_ids, self.sizes = images.ids, images.sizes
        self.num_keypoints = 0 if objects.keypoints is None else objects.keypoints.shape[1]
        self.objects = objects
        image = np.repeat(np.arange(len(images.ids)), np.diff(objects.offsets))
        per_image = np.bincount(image[~objects.crowd], minlength=1)
        self.max_objects = int(per_image.max())
        self._images = images
        self._folders = layout.image_folders(root, split, file)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        """Same as `read`."""
        return self.read(index)

    def name(self, index: int) -> str:
        """File name of an image, as the annotation file has it."""
        return str(self._images.names[index])

    def path(self, index: int) -> Path:
        """Where an image lies.

        Raises:
            DataError: it is missing.
        """
        try:
            return layout.find_image(self._folders, self.name(index))
        except DataError as error:
            raise DataError(f"{self.file}: {error}") from None

    def read(self, index: int) -> Sample:
        """Decodes an image, as stored (no EXIF rotation), with what `needs` names.

        Raises:
            DataError: the image is missing, cannot be decoded or has another size than the file says.
            IndexError: there is no such image.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        path = self.path(index)
        image = read_image(path)
        height, width = (int(side) for side in self.sizes[index])
        if image.shape[:2] != (height, width):
            turned = image.shape[:2] == (width, height) and is_turned(path)
            cause = "the file carries an EXIF rotation: store the picture turned, or" if turned else "please"
            sizes = f"is {image.shape[1]} x {image.shape[0]} (width x height), {self.file} says {width} x {height}"
            raise DataError(f"{path}: {sizes}; {cause} correct the json")
        return Sample(image, self.annotations(index), int(self.image_ids[index]), (height, width), str(path))

    def annotations(self, index: int) -> Annotations:
        """The annotations of one image, without reading it."""
        objects, span = self.objects, slice(self.objects.offsets[index], self.objects.offsets[index + 1])
        crowd = objects.crowd[span]
        rows = np.arange(span.start, span.stop)
        things, crowds = rows[~crowd], rows[crowd]
        found = Annotations(
            labels=objects.labels[things],
            boxes=objects.boxes[things],
            areas=objects.areas[things],
            ids=objects.ids[things],
            extra={key: value[things] for key, value in objects.extra.items()},
            has={key: value[things] for key, value in objects.has.items()},
            ignore_boxes=objects.boxes[crowds],
            ignore_labels=objects.labels[crowds],
        )
        if objects.keypoints is not None:
            found.keypoints = objects.keypoints[things]
            found.has["keypoints"] = found.keypoints[:, :, 2] > 0
        if objects.segments is not None:
            found.masks, found.ignore_masks = self._masks(index, things), self._masks(index, crowds)
            # A sliver can cover no pixel centre: such a mask has nothing to teach.
            found.has["masks"] = found.has["masks"] & found.masks.any((1, 2))
        if self._images.covers is not None and not self._images.covers[index].all():
            found.covers = self._images.covers[index].copy()
        return found

    def ground_truth(self) -> dict[str, Any]:
        """What was published about the kept annotations, for evaluators.

        Read again from the file, so that nothing of it stays in memory.

        Returns:
            A COCO dictionary: `images`, `categories`, and `annotations` with `area` and `iscrowd` filled in where absent.
        """
        raw = load(self.file)
        chosen = set(self.image_ids.tolist())
        by_id = {image["id"]: image for image in reversed(raw["images"]) if image["id"] in chosen}
        annotations = []
        for row, area, crowd in zip(
            self.objects.rows.tolist(), self.objects.areas.tolist(), self.objects.crowd.tolist(), strict=True
        ):
            entry = dict(raw["annotations"][row])
            given = entry.get("area")
            good = isinstance(given, int | float) and np.isfinite(given) and given >= 0
            entry.update(area=given if good else area, iscrowd=int(crowd))
            annotations.append(entry)
        images = [by_id[id_] for id_ in self.image_ids.tolist()]
        return {"images": images, "categories": self.categories, "annotations": annotations}

    def subset(self, which: int | Sequence[int]) -> CocoDataset:
        """Some of the images.

        Args:
            which: the first so many, or indices, each at most once.

        Raises:
            DataError: nothing would be left.
            ValueError: an index occurs twice.
        """
        indices = np.arange(min(which, len(self))) if isinstance(which, int) else np.asarray(which, np.int64)
        if not len(indices):
            raise DataError(f"{self.file}: a subset of {which} images; ask for at least one")
        if len(np.unique(indices)) < len(indices):
            raise ValueError("a subset holds an image at most once")
        old = self._images
        covers = None if old.covers is None else old.covers[indices]
        images = replace(old, ids=old.ids[indices], names=old.names[indices], sizes=old.sizes[indices], covers=covers)
        objects = self.objects.take(indices)
        return CocoDataset(
            self.root, self.split, self.file, self.classes, self.categories, self.needs, images, objects,
            self.problems, self.num_annotations,
        )  # fmt: skip

    def warning(self) -> str | None:
        """One line about what was dropped or is missing, None if all is well."""
        lines = []
        dropped = Counter(p.kind for p in self.problems if not p.kept)
        twice = dropped.pop(DUPLICATE_IMAGE, 0)
        if twice:
            lines.append(f"{twice} images dropped, their id occurs twice")
        if dropped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in dropped.most_common())
            share = f"{sum(dropped.values())} of {self.num_annotations} annotations dropped"
            lines.append(f"{share}: {kinds}; `qv data check {self.root}` lists them")
        for key in self.objects.has:
            if len(self.objects.ids) and not self.objects.has[key].any():
                lines.append(f"no annotation has {key}, so nothing is learned about them")
        return f"{self.file}: {'. '.join(lines)}" if lines else None

    def _masks(self, index: int, rows: NDArray[Any]) -> NDArray[Any]:
        size = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        try:
            return rasterise([self.objects.segment(row) for row in rows], size)
        except ValueError as error:
            ids = ", ".join(str(i) for i in self.objects.ids[rows])
            raise DataError(f"{self.file}: a segmentation among annotations {ids} cannot be drawn ({error})") from error


def open_dataset(path: Path | str, split: str, needs: Sequence[str] = ("labels", "boxes"), strict: bool = False) -> CocoDataset:
    """Finds, reads and checks a split of a data set.

    Args:
        path: its root folder; see `layout` for the layouts that are understood.
        split: `train`, `val`, ...
        needs: what a sample is to hold: "labels" and "boxes" always, "masks", "keypoints", or the key of annotations
            that hold a number or a list of numbers, which becomes `extra[key]`.
        strict: refuse the data set where an annotation would be dropped.

    Raises:
        DataError: there is no such data set, it is no COCO file, or (strict) an annotation is wrong.
    """
    return open_file(Path(path), split, layout.find_annotations(path, split, needs), needs, strict)


def open_file(root: Path, split: str, file: Path, needs: Sequence[str], strict: bool = False) -> CocoDataset:
    """Reads and checks one annotation file; see `open_dataset`."""
    raw = load(file)
    categories = real_categories(raw, file)
    classes = ClassMap.from_categories(categories, str(file))
    images, problems = image_table(raw["images"], classes, file)
    by_id = {category["id"]: category for category in categories}
    names = [by_id[id_].get("keypoints") for id_ in classes.ids]
    counts = [len(name) if isinstance(name, list) else 0 for name in names]
    needs = tuple(dict.fromkeys(("labels", "boxes", *needs)))
    objects, wrong = check_annotations(raw["annotations"], images, classes, counts, needs, str(file))
    problems += wrong
    bad = [problem for problem in problems if not problem.kept]
    if strict and bad:
        more = f" ({len(bad) - 1} more)" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}; `qv data check {root}` lists all")
    return CocoDataset(root, split, file, classes, categories, needs, images, objects, problems, len(raw["annotations"]))


def check_same_classes(a: CocoDataset, b: CocoDataset) -> None:
    """Makes sure that two splits mean the same classes.

    Raises:
        DataError: they do not; names the difference.
    """
    mine, theirs = ({id_: name for id_, name in zip(d.classes.ids, d.classes.names, strict=True)} for d in (a, b))
    if mine == theirs:
        return
    differences = [
        f"id {id_} is {_quoted(mine.get(id_))} in {a.file.name} and {_quoted(theirs.get(id_))} in {b.file.name}"
        for id_ in sorted(mine.keys() | theirs.keys())
        if mine.get(id_) != theirs.get(id_)
    ]
    more = f" ({len(differences) - 1} more)" if len(differences) > 1 else ""
    raise DataError(f"{a.root}: the categories of '{a.split}' and '{b.split}' differ: {differences[0]}{more}; make them equal")


def _quoted(name: str | None) -> str:
    return "missing" if name is None else f"'{name}'"
