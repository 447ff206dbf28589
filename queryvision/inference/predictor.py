"""The predictor: pictures in, typed results out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from queryvision.assembly import Loaded, load_model
from queryvision.config import changed
from queryvision.data.classes import ClassMap
from queryvision.data.images import DAMAGED, ORIENTATION, decoded, rgb_array
from queryvision.data.loader import collate
from queryvision.data.sample import Annotations, Sample
from queryvision.data.transforms import evaluation_transform
from queryvision.engine.evaluation import results_of
from queryvision.errors import ConfigError, DataError
from queryvision.results import Result

Picture = str | Path | Image.Image | NDArray[Any]
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class Predictor:
    """A model ready to look at pictures.

    Args:
        loaded: a checkpoint's content.
        device: where to run; None: CUDA where there is one.
        image_size: short side of the input in pixels; None: as in training.
        batch_size: most pictures of equal size looked at together.
        overlap: see `Result.without_overlaps`; 1: all stay; None: as in the checkpoint's settings.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        loaded: Loaded,
        device: str | None = None,
        image_size: int | None = None,
        batch_size: int | None = None,
        overlap: float | None = None,
    ) -> None:
        changes = {"data.image_size": image_size, "evaluation.batch_size": batch_size, "evaluation.overlap": overlap}
        settings = changed(loaded.config, changes)
        self.loaded = loaded
        self.task = loaded.task
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = loaded.model.to(self.device).eval()
        self.transform = evaluation_transform(settings.data.side)
        self.batch_size = settings.evaluation.batch_size
        self.limit, self.overlap = settings.evaluation.max_results, settings.evaluation.overlap

    @property
    def classes(self) -> ClassMap:
        """Of the model."""
        return self.loaded.classes

    @overload
    def predict(self, source: Picture, threshold: float | None = ...) -> Result: ...  # type: ignore[overload-overlap]  # str is a Sequence

    @overload
    def predict(self, source: Sequence[Picture], threshold: float | None = ...) -> list[Result]: ...

    def predict(self, source: Picture | Sequence[Picture], threshold: float | None = None) -> Result | list[Result]:
        """Looks at one picture or several.

        Args:
            source: a path, a PIL image, an RGB array (H,W,3) uint8, or a list of these.
            threshold: least score of a result, 0 keeps all; None: that of the checkpoint's settings.

        Returns:
            One result, or a list of them for a list; boxes and masks in pixels of the original picture. Files and PIL images
            count as viewers show them, turned as their EXIF says; data sets, whose annotations refer to stored pixels, do not.

        Raises:
            DataError: a picture cannot be read.
        """
        if isinstance(source, (str, Path, Image.Image, np.ndarray)):
            return next(self.stream([source], threshold))
        return list(self.stream(source, threshold))

    def stream(self, sources: Sequence[Picture], threshold: float | None = None) -> Iterator[Result]:
        """Results in the order of the sources; pictures that follow each other with equal input size are batched."""
        threshold = self.loaded.config.evaluation.threshold if threshold is None else threshold
        samples = (self._sample(source, index) for index, source in enumerate(sources))
        for _, same in groupby(samples, key=lambda sample: sample.image.shape):
            waiting: list[Sample] = []
            for sample in same:
                waiting.append(sample)
                if len(waiting) == self.batch_size:
                    yield from self._look(waiting, threshold)
                    waiting = []
            if waiting:
                yield from self._look(waiting, threshold)

    def _sample(self, source: Picture, index: int) -> Sample:
        image = as_array(source)
        height, width = image.shape[:2]
        path = str(source) if isinstance(source, (str, Path)) else ""
        return self.transform(Sample(image, Annotations.empty(), index, (height, width), path), 0)

    def _look(self, samples: list[Sample], threshold: float) -> list[Result]:
        batch = collate(samples, len(self.classes), ())
        sizes = torch.tensor([sample.original_size for sample in samples])
        paths = [sample.path for sample in samples]
        images = batch.images.to(self.device)
        results = results_of(self.model, self.task, self.classes, images, sizes, self.limit, paths)
        found = [result.above(threshold) for result in results]
        return found if self.overlap is None else [result.without_overlaps(self.overlap) for result in found]


def as_array(source: Picture) -> NDArray[Any]:
    """A picture as an RGB array (H,W,3) uint8, upright: turned as its EXIF says, as viewers show it.

    Raises:
        DataError: it cannot be read or has another form.
    """
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise DataError(f"there is no picture {source}")
        return decoded(Path(source), _upright)
    if isinstance(source, Image.Image):
        try:
            return _upright(source)
        except DAMAGED as error:
            raise DataError(f"the picture cannot be read ({error})") from error
    if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
        raise DataError(f"an array must be (H,W,3) uint8 RGB, this is {source.shape} {source.dtype}")
    return np.ascontiguousarray(source)


def _upright(image: Image.Image) -> NDArray[Any]:
    """An open picture as (H,W,3) uint8 RGB, turned as its EXIF says."""
    pixels = rgb_array(image)  # and may turn a TIFF while it loads it
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except DAMAGED:  # says nothing
        return pixels
    if orientation not in range(2, 9):
        return pixels
    plain = Image.fromarray(pixels)  # of the picture itself Pillow would rewrite the whole EXIF, and stumble over damage in it
    plain.getexif()[ORIENTATION] = orientation
    return np.array(ImageOps.exif_transpose(plain))


def find_pictures(sources: str | Path | Sequence[str | Path], output: str | Path | None = None) -> list[Path]:
    """Files, folders and glob patterns -> picture files, each once, sorted within a folder.

    In folders hidden files and folders are left out; links to folders are followed, each folder once.

    Args:
        sources: one or several.
        output: folder of a prediction; left out where it lies within what is searched.

    Raises:
        DataError: a source matches nothing.
        ConfigError: what is searched holds pictures in the output folder itself; later it would find overlays among them.
    """
    found: dict[Path, None] = {}
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        path = Path(source)
        if path.is_file():
            here = [path]
        else:
            here = sorted(_below(path, output) if path.is_dir() else _matching(str(source), output))
            if output is not None and Path(output).resolve() in {each.resolve().parent for each in here}:
                raise ConfigError(f"--output {output}: holds pictures of {source}; choose another folder, or name the files")
        if not here:
            raise DataError(f"{source}: no such file, and no picture ({', '.join(sorted(SUFFIXES))}) found there")
        found.update(dict.fromkeys(here))
    return list(found)


def _below(root: Path, output: str | Path | None) -> Iterator[Path]:
    """Pictures in a folder and those below it; links to folders come last, as what lies here has its own name."""
    seen = set() if output is None else {os.path.realpath(output)} - {os.path.realpath(root)}
    waiting = [str(root)]
    while waiting:
        for place, folders, files in os.walk(waiting.pop(0)):
            if os.path.realpath(place) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            yield from (Path(place, name) for name in files if name[0] != "." and Path(name).suffix.lower() in SUFFIXES)
            folders[:] = sorted(name for name in folders if name[0] != ".")
            waiting += (link for name in folders if os.path.islink(link := os.path.join(place, name)))


def _matching(pattern: str, output: str | Path | None) -> Iterator[Path]:
    """Files of a glob pattern, without those in an output folder that lies below where its wildcards begin."""
    files = (Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    start = Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)).resolve()
    if output is None or start not in Path(output).resolve().parents:
        return files
    folder = Path(output).resolve()
    return (path for path in files if folder not in path.resolve().parents)


def load(path: str | Path, *, queries: int | None = None, layers: int | None = None, **options: Any) -> Predictor:
    """A predictor from a checkpoint file.

    Args:
        path: of the file.
        queries: another number of queries than in training, for models that select theirs from proposals; None: the same.
        layers: how many decoder layers to keep, the first ones; None: all.
        options: of `Predictor`.

    Raises:
        CheckpointError: it is no checkpoint of ours.
        ConfigError: a number is out of range.
    """
    return Predictor(load_model(path, queries, layers), **options)
