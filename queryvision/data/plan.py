"""Which images are in which training batch: a function of seed and step, without any state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 8  # batches of one permutation within which images are sorted by their aspect


class BatchPlan:
    """Endless batches, addressed by their step.

    Every epoch is a fresh permutation, drawn from (seed, epoch), in which every image occurs at least once. With
    `group_by_aspect`, wide (width >= height) and tall images do not share a batch, as in torchvision's references, and within
    eight batches in a row images of similar aspect are put together, so that little is padded. Batches that would stay
    incomplete are filled with other images of the epoch.

    All ranks together take batches of batch_size x world images; rank r has the r-th part. The same product of the two
    therefore means the same images at a step, on one device or on several.

    Args:
        aspects: (n,) width / height of each image.
        batch_size: images a step and rank.
        seed: of the order and of the items' own seeds.
        group_by_aspect: see above.
        rank: of this process.
        world: number of processes.

    Raises:
        ValueError: there is no image, or a number is out of range.
    """

    def __init__(
        self,
        aspects: Sequence[float] | NDArray[Any],
        batch_size: int,
        seed: int = 0,
        group_by_aspect: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._aspects = np.asarray(aspects, np.float64)
        wide = self._aspects >= 1
        if not len(wide) or batch_size < 1 or not 0 <= rank < world or seed < 0:
            raise ValueError(f"{len(wide)} images, batch size {batch_size}, seed {seed}, rank {rank} of {world}")
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.num_images = len(wide)
        bins = [np.flatnonzero(wide), np.flatnonzero(~wide)] if group_by_aspect else [np.arange(len(wide))]
        self._bins = [members for members in bins if len(members)]
        self._window = WINDOW * batch_size * world if group_by_aspect else 0
        self._total = batch_size * world
        self._cache: tuple[int, NDArray[Any]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every image is seen at least once."""
        return sum(-(-len(members) // self._total) for members in self._bins)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[tuple[int, int]]:
        """This rank's batch of a step, from 0.

        Returns:
            `batch_size` pairs (index of the image, seed of its augmentation). The seed depends on (seed, epoch, index),
            and on how often the image occurred before in the epoch; never on process or rank.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._cache is None or self._cache[0] != epoch:
            self._cache = (epoch, self._order(epoch))
        part = self._cache[1][position, self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return [(int(index), _seed(self.seed, epoch, int(index), int(turn))) for index, turn in part]

    def shared(self, step: int) -> int:
        """A seed that all images of a step have in common, on every rank, such as for their scale."""
        return _seed(self.seed, step)

    def _order(self, epoch: int) -> NDArray[Any]:
        """(steps, batch_size x world, 2) int64: image, and how often it occurred before in this epoch."""
        generator = np.random.default_rng([self.seed, epoch])
        shuffled = [self._sorted(generator.permutation(members)) for members in self._bins]
        batches = []
        for i, members in enumerate(shuffled):
            others = np.concatenate([members, *(m for j, m in enumerate(shuffled) if j != i)])
            for start in range(0, len(members), self._total):
                batches.append(self._filled(members[start : start + self._total], others))
        order = np.stack([batches[i] for i in generator.permutation(len(batches))])
        return np.stack([order, _turns(order.ravel()).reshape(order.shape)], axis=2)

    def _sorted(self, members: NDArray[Any]) -> NDArray[Any]:
        """Sorts the images of each window by their aspect."""
        if not self._window:
            return members
        starts = range(0, len(members), self._window)
        windows = [members[start : start + self._window] for start in starts]
        return np.concatenate([window[np.argsort(self._aspects[window], kind="stable")] for window in windows])

    def _filled(self, batch: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
        """Completes a batch: images of the same shape first, then of the other, then, in a tiny data set, once more."""
        missing = self._total - len(batch)
        if not missing:
            return batch
        rest = others[~np.isin(others, batch)]
        return np.concatenate([batch, np.resize(np.concatenate([rest, batch]), missing)])


def _turns(order: NDArray[Any]) -> NDArray[Any]:
    """How often each entry occurred before it."""
    by_value = np.argsort(order, kind="stable")
    ordered = order[by_value]
    turns = np.empty_like(order)
    turns[by_value] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return turns


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
