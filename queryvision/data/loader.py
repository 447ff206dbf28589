"""Batches for training (endless, addressed by step) and for evaluation (every image once)."""

from __future__ import annotations

import atexit
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import cv2
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from queryvision.data.collate import collate
from queryvision.data.phases import Augment, FirstPart
from queryvision.data.plan import BatchPlan
from queryvision.data.sample import Sample
from queryvision.errors import DataError
from queryvision.structures import Batch

__all__ = ["BatchPlan", "ImageInfo", "Loader", "collate", "evaluation_loader", "train_loader"]

MAX_TRIES = 10
"""Images that may be unreadable in a row before training gives up."""

T = TypeVar("T")


class ReadableDataset(Protocol):
    """What the loaders ask of a data set."""

    image_ids: NDArray[Any]  # (n,) int64
    sizes: NDArray[Any]  # (n,2) height, width px

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> Sample:
        """Reads one image; raises DataError."""


class SizedTransform(Protocol):
    """A transform that knows beforehand how large an image becomes."""

    def __call__(self, sample: Sample, seed: int = 0) -> Sample:
        """Transforms a sample."""

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height, width of the network's input for an image of `size` (height, width)."""


@dataclass(frozen=True)
class ImageInfo:
    """Which image a row of an evaluation batch is."""

    image_id: int
    size: tuple[int, int]  # height, width of the original image, px
    path: str


class Loader(Generic[T]):
    """Iterates over a `DataLoader` whose items may be errors, and raises them.

    A worker that raised would hand over its traceback as text; an error for people has to stay one line.
    """

    def __init__(self, loader: DataLoader[Any], length: int | None) -> None:
        self.loader, self._length = loader, length

    def __iter__(self) -> Iterator[T]:
        """Yields the items.

        Raises:
            DataError: an image or an annotation is wrong.
        """
        handler = signal.getsignal(signal.SIGCHLD)
        waiting = getattr(self.loader, "_iterator", None)
        if not all(worker.is_alive() for worker in getattr(waiting, "_workers", ())):
            self.loader._iterator = None  # else one that died while nobody asked would end this iteration, too
        items = iter(self.loader)
        _WORKERS.update(getattr(items, "_workers", ()))
        if self.loader.num_workers and handler is not None and threading.current_thread() is threading.main_thread():
            # PyTorch's own would raise what happened to a worker in the middle of a step; asked for an item, it says so, too.
            signal.signal(signal.SIGCHLD, handler)
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the latter two: it died while it handed over a batch
                gone = any(not worker.is_alive() for worker in getattr(items, "_workers", ()))
                if not gone and "DataLoader worker (pid" not in str(error):  # what went wrong in a worker that lives
                    raise
                raise DataError("a process that reads images died, perhaps for want of memory; try fewer --workers") from error
            if isinstance(item, DataError):
                raise item
            yield item

    def __len__(self) -> int:
        """Number of batches.

        Raises:
            TypeError: it is endless.
        """
        if self._length is None:
            raise TypeError("this loader is endless")
        return self._length


def train_loader(
    dataset: ReadableDataset,
    transform: Augment,
    num_classes: int,
    needs: Sequence[str],
    plan: BatchPlan,
    start_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    first_part: FirstPart | None = None,
    multiple: int = 1,
) -> Loader[Batch]:
    """Endless training batches, the same ones for any number of workers and any place to start.

    An image that cannot be read is replaced by the next readable one and named in `Batch.skipped`.

    Args:
        dataset: where the images come from.
        transform: (sample, its seed, the batch's seed) -> sample.
        num_classes: C.
        needs: fields of the targets; see `collate`.
        plan: which images are in which step.
        start_step: the step of the first batch.
        workers: loader processes; 0: in this one.
        pin_memory: whether batches lie in page-locked memory.
        first_part: what the first batches of a run go through instead of `transform`.
        multiple: of so many px are the sides of a batch.

    Raises:
        DataError: (while iterating) ten images in a row cannot be read, or a label is out of range.
    """
    steps = _TrainSteps(dataset, transform, num_classes, tuple(needs), plan, first_part, multiple)
    return Loader(_data_loader(steps, _From(start_step), workers, pin_memory), None)


def evaluation_loader(
    dataset: ReadableDataset,
    transform: SizedTransform,
    num_classes: int,
    needs: Sequence[str],
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Loader[tuple[Batch, list[ImageInfo]]]:
    """Every image once, over all ranks together; only images of equal input size share a batch, so nothing is padded.

    Ranks may have different numbers of batches. The loader can be iterated again and keeps its workers.

    Args:
        dataset: where the images come from.
        transform: of `evaluation_transform`.
        num_classes: C.
        needs: fields of the targets; see `collate`.
        batch_size: most images in a batch.
        workers: loader processes; 0: in this one.
        rank: of this process.
        world: number of processes.
        pin_memory: whether batches lie in page-locked memory.

    Raises:
        DataError: (while iterating) an image cannot be read: a metric over the others would not be comparable.
    """
    batches = _equal_size_batches(dataset, transform, batch_size)[rank::world]
    parts = _EvaluationBatches(dataset, transform, num_classes, tuple(needs), batches)
    return Loader(_data_loader(parts, range(len(batches)), workers, pin_memory), len(batches))


def first_readable(dataset: ReadableDataset, indices: Sequence[int], skipped: list[str]) -> Sample:
    """The first of some images that can be read; what is wrong with those before it is added to `skipped`.

    Raises:
        DataError: none of the first ten can be read.
    """
    tried = indices[:MAX_TRIES]
    for index in tried:
        try:
            return dataset.read(index)
        except DataError as error:
            skipped.append(str(error))
    raise DataError(f"{len(tried)} images in a row cannot be read, the last: {skipped[-1]}")


class _From:
    """Counts from `start`, for ever; as a sampler it can be iterated again."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


@dataclass
class _TrainSteps(Dataset[Any]):
    """Item i is the whole batch of step i, or the error that prevents it."""

    dataset: ReadableDataset
    transform: Augment
    num_classes: int
    needs: tuple[str, ...]
    plan: BatchPlan
    first_part: FirstPart | None
    multiple: int

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            samples: list[Sample] = []
            skipped: list[str] = []
            read = partial(self._read, skipped)
            first = self.first_part if self.first_part and step < self.first_part.until else None
            shared = self.plan.shared(step)
            for index, seed in self.plan.batch(step):
                if first:
                    samples.append(first(index, seed, shared, read, len(self.dataset)))
                else:
                    samples.append(self.transform(read(index), seed, shared))
            return collate(samples, self.num_classes, self.needs, skipped, self.multiple)
        except DataError as error:
            return error

    def _read(self, skipped: list[str], index: int) -> Sample:
        number = len(self.dataset)
        return first_readable(self.dataset, [(index + i) % number for i in range(min(MAX_TRIES, number))], skipped)


@dataclass
class _EvaluationBatches(Dataset[Any]):
    """Item i is a batch and what its rows are, or the error that prevents it."""

    dataset: ReadableDataset
    transform: SizedTransform
    num_classes: int
    needs: tuple[str, ...]
    batches: list[list[int]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Batch, list[ImageInfo]] | DataError:
        try:
            samples = [self.transform(self.dataset.read(i)) for i in self.batches[index]]
            infos = [ImageInfo(sample.image_id, sample.original_size, sample.path) for sample in samples]
            return collate(samples, self.num_classes, self.needs), infos
        except DataError as error:
            return error


def _equal_size_batches(dataset: ReadableDataset, transform: SizedTransform, batch_size: int) -> list[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(dataset.sizes.tolist()):
        groups.setdefault(transform.output_size((height, width)), []).append(index)
    return [members[i : i + batch_size] for members in groups.values() for i in range(0, len(members), batch_size)]


def _data_loader(items: Dataset[Any], order: Any, workers: int, pin_memory: bool) -> DataLoader[Any]:
    return DataLoader(
        items,
        sampler=order,
        batch_size=None,  # an item is a batch already, so that workers change nothing but speed
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),  # else every new iteration would draw from the global generator
    )


def _quiet_worker(worker: int) -> None:
    """One thread a worker: OpenCV's own pool would multiply with the workers, and hangs after a fork.

    Signals are the training process's: a terminal and SLURM send them to all, and it still needs its workers then.
    """
    cv2.setNumThreads(0)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


_WORKERS: weakref.WeakSet[Any] = weakref.WeakSet()  # processes that do not listen to SIGTERM


@atexit.register
def _end_workers() -> None:
    """Ends them with the interpreter; `multiprocessing`, which would ask by SIGTERM and then wait for ever, comes after."""
    for worker in _WORKERS:
        worker.kill()
