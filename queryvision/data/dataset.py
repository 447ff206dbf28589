"""Checked annotations, kept in arrays, and their images, read one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.data import layout
from queryvision.data.annotations import INCOMPLETE, Problem
from queryvision.data.classes import ClassMap
from queryvision.data.coco_file import IMAGE_PROBLEMS, load
from queryvision.data.follow import select
from queryvision.data.images import is_turned, read_image
from queryvision.data.packed import ImageTable, Objects
from queryvision.data.panoptic import SegmentMaps
from queryvision.data.pixel_cache import PixelCache
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
        num_objects: (n,) int64 objects in each image, crowds apart.
        max_objects: the most of them.
        num_keypoints: K, 0 where none are needed.
        objects: the packed annotations.
        maps: to which segment each pixel belongs; None: these are instances.
        images: ids, names, sizes and covered classes.
        folders: where the images are looked for.
        parts: {task: the data set of its file}, where several files were united; empty: it is one file.
        cache: of decoded images; None at first.
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
        maps: SegmentMaps | None = None,
        folders: tuple[Path, ...] | None = None,
        parts: Mapping[str, CocoDataset] | None = None,
    ) -> None:
        self.root, self.split, self.file = root, split, file
        self.classes, self.categories, self.needs = classes, list(categories), tuple(needs)
        self.problems, self.num_annotations = list(problems), num_annotations
        self.image_ids, self.sizes = images.ids, images.sizes
        self.num_keypoints = 0 if objects.keypoints is None else objects.keypoints.shape[1]
        self.objects, self.maps = objects, maps
        image = np.repeat(np.arange(len(images.ids)), np.diff(objects.offsets))
        self.num_objects = np.bincount(image[~objects.crowd], minlength=len(images.ids))
        self.max_objects = int(self.num_objects.max(initial=0))
        self.images = images
        self.folders = layout.image_folders(root, split, file) if folders is None else folders
        self.parts = dict(parts or {})
        self.cache: PixelCache | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        """Same as `read`."""
        return self.read(index)

    def name(self, index: int) -> str:
        """File name of an image, as the annotation file has it."""
        return str(self.images.names[index])

    def path(self, index: int) -> Path:
        """Where an image lies.

        Raises:
            DataError: it is missing.
        """
        try:
            return layout.find_image(self.folders, self.name(index))
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
        height, width = (int(side) for side in self.sizes[index])
        kept = None if self.cache is None else self.cache.get(index, path)
        image = read_image(path) if kept is None else kept
        if image.shape[:2] != (height, width):
            turned = image.shape[:2] == (width, height) and is_turned(path)
            cause = "the file carries an EXIF rotation: store the picture turned, or" if turned else "please"
            sizes = f"is {image.shape[1]} x {image.shape[0]} (width x height), {self.file} says {width} x {height}"
            raise DataError(f"{path}: {sizes}; {cause} correct the json")
        if self.cache is not None and kept is None:
            self.cache.put(index, path, image)
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
        if "masks" in self.needs:
            found.masks, found.ignore_masks = self._masks(index, things, crowds)
            # A sliver can cover no pixel centre: such a mask has nothing to teach.
            found.has["masks"] = found.has["masks"] & found.masks.any((1, 2))
        if self.images.covers is not None and not self.images.covers[index].all():
            found.covers = self.images.covers[index].copy()
        if self.maps is None:
            return found
        found.stuff = ~np.asarray(self.classes.things, bool)[found.labels]
        if found.masks is None:
            return found
        return select(found, found.has["masks"] | ~objects.has["masks"][things])  # a segment without a pixel is none

    def segment_map(self, index: int) -> NDArray[Any]:
        """To which segment each pixel of an image belongs; only of panoptic data.

        Returns:
            (H,W) int32 segment ids as `objects.ids` has them, crowds among them; 0: void, or of a segment that was dropped.

        Raises:
            DataError: the map cannot be read.
        """
        assert self.maps is not None, "instances have no segment map"
        published = self.maps.read(index)
        kept = np.zeros_like(published)
        for id_ in self.objects.ids[self.objects.offsets[index] : self.objects.offsets[index + 1]]:
            kept[published == id_] = id_
        return kept

    def ground_truth(self) -> dict[str, Any]:
        """What was published about the kept annotations, for evaluators.

        Read again from the file, so that nothing of it stays in memory.

        Returns:
            A COCO dictionary: `images`, `categories`, and `annotations` with `area`, `iscrowd` and `bbox` filled in where
            absent, without keypoints and polygons that cannot be read.
            Of panoptic data, `annotations` are COCO-panoptic's, `segments` is a function: image id -> `segment_map`, and
            `folder` is that of the PNG files, where these were published. Of united files it is {"parts": {task: its own}}.
        """
        if self.parts:
            return {"parts": {name: part.ground_truth() for name, part in self.parts.items()}}
        raw = load(self.file)
        chosen = set(self.image_ids.tolist())
        by_id = {image["id"]: image for image in reversed(raw["images"]) if image["id"] in chosen}
        images = [by_id[id_] for id_ in self.image_ids.tolist()]
        if self.maps is None:
            return {"images": images, "categories": self.categories, "annotations": self._published(raw["annotations"])}
        annotations = [self._segments_info(index) for index in range(len(self))]
        folder = {} if self.maps.folder is None else {"folder": str(self.maps.folder)}
        segments = {"segments": self._map_of_image}
        return {"images": images, "categories": self.categories, "annotations": annotations, **segments, **folder}

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
        maps = None if self.maps is None else self.maps.take(indices)
        kept = self.image_ids[indices]
        rows = {name: np.flatnonzero(np.isin(part.image_ids, kept)) for name, part in self.parts.items()}
        parts = {name: self.parts[name].subset(found.tolist()) for name, found in rows.items() if len(found)}
        return CocoDataset(
            self.root, self.split, self.file, self.classes, self.categories, self.needs, self.images.take(indices),
            self.objects.take(indices), self.problems, self.num_annotations, maps, self.folders, parts,
        )  # fmt: skip

    def warning(self) -> str | None:
        """One line about what was dropped or is missing, None if all is well."""
        if self.parts:
            told = {id(part): part.warning() for part in self.parts.values()}
            return "; ".join(text for text in told.values() if text) or None
        lines = []
        dropped = Counter(p.kind for p in self.problems if not p.kept)
        lines += [f"{count} {words}" for kind, words in IMAGE_PROBLEMS.items() if (count := dropped.pop(kind, 0))]
        if dropped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in dropped.most_common())
            share = f"{sum(dropped.values())} of {self.num_annotations} annotations dropped"
            lines.append(f"{share}: {kinds}; `qv data check {self.root}` lists them")
        parts = Counter(p.kind for p in self.problems if p.kept and p.kind in INCOMPLETE)
        if parts:
            kinds = ", ".join(f"{count} {kind}" for kind, count in parts.most_common())
            lines.append(f"left out of annotations: {kinds}; `qv data check {self.root}` lists them")
        has = {key: value.any() for key, value in self.objects.has.items()}
        if self.objects.keypoints is not None:
            has["keypoints"] = self.objects.keypoints.any()
        for key, some in has.items():
            if len(self.objects.ids) and not some:
                lines.append(f"no annotation has {key}, so nothing is learned about them")
        return f"{self.file}: {'. '.join(lines)}" if lines else None

    def _masks(self, index: int, *groups: NDArray[Any]) -> list[NDArray[Any]]:
        """Masks (n,H,W) uint8 of the annotations in some rows, group by group."""
        if self.maps is not None:
            segments = self.maps.read(index)
            return [(segments == self.objects.ids[rows][:, None, None]).view(np.uint8) for rows in groups]
        size = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        try:
            return [rasterise([self.objects.segment(row) for row in rows], size) for rows in groups]
        except ValueError as error:
            ids = ", ".join(str(i) for i in self.objects.ids[np.concatenate(groups)])
            raise DataError(f"{self.file}: a segmentation among annotations {ids} cannot be drawn ({error})") from error

    def _published(self, raw: list[Any]) -> list[dict[str, Any]]:
        annotations, found = [], self.objects
        flawed = {p.annotation_id for p in self.problems if p.kind == "malformed polygon"}  # evaluators choke on them
        for i, row in enumerate(found.rows.tolist()):
            entry = dict(raw[row])
            given = entry.get("area")
            good = isinstance(given, int | float) and np.isfinite(given) and given > 0
            entry.update(area=given if good else float(found.areas[i]), iscrowd=int(found.crowd[i]))
            if entry.get("bbox") is None:  # it was measured
                left, top, right, bottom = found.boxes[i].tolist()
                entry["bbox"] = [left, top, right - left, bottom - top]
            if entry.get("keypoints") and found.keypoints is not None and not found.keypoints[i].any():
                skeleton = self.classes.skeletons[found.labels[i]]
                entry.update(keypoints=[0] * 3 * len(skeleton or ()), num_keypoints=0)  # perhaps they cannot be read
            if entry["id"] in flawed:
                entry["segmentation"] = found.segment(i)
            annotations.append(entry)
        return annotations

    def _segments_info(self, index: int) -> dict[str, Any]:
        """COCO-panoptic's annotation of one image."""
        assert self.maps is not None
        objects, span = self.objects, slice(self.objects.offsets[index], self.objects.offsets[index + 1])
        boxes = objects.boxes[span].copy()
        boxes[:, 2:] -= boxes[:, :2]
        columns = {
            "id": objects.ids[span].tolist(),
            "category_id": np.asarray(self.classes.ids)[objects.labels[span]].tolist(),
            "area": np.rint(objects.areas[span]).astype(int).tolist(),
            "bbox": boxes.tolist(),
            "iscrowd": objects.crowd[span].astype(int).tolist(),
        }
        segments = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {"image_id": int(self.image_ids[index]), "file_name": self.maps.name(index), "segments_info": segments}

    def _map_of_image(self, image_id: int) -> NDArray[Any]:
        (index,) = np.flatnonzero(self.image_ids == image_id)
        return self.segment_map(int(index))
