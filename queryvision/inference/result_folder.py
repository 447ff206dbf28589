"""What `qv predict` leaves in a folder: overlays, COCO results, a task's own files; what was done stays, whatever ends it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from queryvision.errors import ConfigError, DataError
from queryvision.inference.predictor import Predictor, as_array
from queryvision.outputs import writable_file
from queryvision.results import Result
from queryvision.task import Task

RESULTS, IMAGES = "results.json", "images.json"
JPEG_SIDE = 65_500
"""Most pixels of a side of a JPEG (libjpeg's JPEG_MAX_DIMENSION); larger overlays are PNGs."""


class ResultFolder:
    """Draws what a predictor sees, picture by picture; of the results only the one at hand is kept.

    Args:
        predictor: looks.
        folder: exists.
        pictures: files to look at; none of them is drawn over.
        quiet: do not print what cannot be read.

    Attributes:
        records: rows of a COCO results file.
        images: which picture each `image_id` is, counted from 1, and the name of its overlay.
        unread: pictures that cannot be read; the others are not lost.

    Raises:
        ConfigError: a file cannot be written.
    """

    def __init__(self, predictor: Predictor, folder: Path, pictures: Sequence[Path], quiet: bool = False) -> None:
        self.predictor, self.folder, self.pictures, self.quiet = predictor, folder, pictures, quiet
        self.records: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.unread: list[str] = []
        self._stems, self._begun = set[str](), False
        self._sources = {path.resolve() for path in pictures}
        self._results, self._images = (writable_file(folder / name) for name in (RESULTS, IMAGES))

    def fill(self, threshold: float | None) -> None:
        """Looks at all pictures; however that ends, the JSON files tell about those that were done.

        Args:
            threshold: see `Predictor.predict`.

        Raises:
            ConfigError: a file cannot be written.
        """
        task, results = self.predictor.task, self._draw(threshold)
        try:
            if task.save is not None:
                task.save(self.folder, Arriving(results, _readers(task)), self.predictor.classes)
            for _ in results:  # all of them, where nobody asked
                pass
        finally:
            if self._begun:
                self._write()

    def _draw(self, threshold: float | None) -> Iterator[tuple[str, Result]]:
        """Of each picture the stem of its overlay, which is drawn, and the result."""
        task = self.predictor.task
        self._begun = True
        for file in (self._results, self._images):  # an earlier prediction's would lie beside new pictures
            file.unlink(missing_ok=True)
        for index, (path, picture) in enumerate(self._readable(), 1):
            result = replace(self.predictor.predict(picture, threshold), path=str(path))
            drawn = self._save(task.draw(Image.fromarray(picture), result), path.stem)
            yield drawn.stem, result
            height, width = result.size
            self.records += filter(None, task.records(result, index))
            self.images.append({"id": index, "file_name": str(path), "drawn": drawn.name, "width": width, "height": height})

    def _readable(self) -> Iterator[tuple[Path, NDArray[Any]]]:
        """Pictures as arrays; what cannot be read is noted and left out."""
        for path in self.pictures:
            try:
                yield path, as_array(path)
            except DataError as error:
                if not self.quiet:
                    print(f"skipped {error}")
                self.unread.append(str(path))

    def _save(self, overlay: Image.Image, stem: str) -> Path:
        path = self._free(stem, ".png" if max(overlay.size) > JPEG_SIDE else ".jpg")
        try:
            overlay.save(path, quality=92)  # of a JPEG
        except OSError as error:
            raise ConfigError(f"cannot write {path} ({error.strerror or error}); choose another folder") from error
        return path

    def _free(self, stem: str, suffix: str) -> Path:
        """The first of `stem.jpg`, `stem_2.jpg` ... that is no source and whose stem no other overlay has."""
        name, count = stem, 1
        while name in self._stems or (self.folder / f"{name}{suffix}").resolve() in self._sources:
            count += 1
            name = f"{stem}_{count}"
        self._stems.add(name)
        return self.folder / f"{name}{suffix}"

    def _write(self) -> None:
        """COCO results, and which picture each `image_id` is and what the categories are called."""
        classes = self.predictor.classes
        categories = [{"id": i, "name": n} for i, n in zip(classes.ids, classes.names, strict=True)]
        self._results.write_text(json.dumps(self.records))
        self._images.write_text(json.dumps({"images": self.images, "categories": categories}))


def _readers(task: Task) -> int:
    """How many of a task's parts read the results."""
    return max(1, sum(_readers(part) for part in task.parts if part.save is not None))


class Arriving(Mapping[str, Result]):
    """{file stem: result} of pictures that are looked at when their turn comes; only the one at hand is there.

    Args:
        pairs: what arrives.
        readers: how often it is read, each time in order. What only one has read is kept for the others.
    """

    def __init__(self, pairs: Iterator[tuple[str, Result]], readers: int = 1) -> None:
        self._passes = iter([pairs] if readers == 1 else itertools.tee(pairs, readers))  # `tee` keeps some even for one
        self._at_hand: dict[str, Result] = {}

    def __iter__(self) -> Iterator[str]:
        """The stems, in order."""
        arriving = next(self._passes, None)
        if arriving is None:
            raise TypeError("results are read once, each when its turn comes")
        for stem, result in arriving:
            self._at_hand = {stem: result}
            yield stem

    def __getitem__(self, stem: str) -> Result:
        """The result at hand.

        Raises:
            KeyError: it is another one.
        """
        if stem not in self._at_hand:
            raise KeyError(f"{stem}: results are kept until the next one; take each when its turn comes, as in `items()`")
        return self._at_hand[stem]

    def __len__(self) -> int:
        """Raises TypeError: nobody knows, as pictures that cannot be read are left out."""
        raise TypeError("how many results arrive is known behind the last one; read them in order, as in `items()`")
