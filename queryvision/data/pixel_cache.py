"""Decoded images in one file that all processes share, so that each is decoded once in the life of the file.

The operating system keeps in memory what of it fits; a folder in `/dev/shm` is a cache in memory alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryvision.errors import ConfigError


class PixelCache:
    """Images of known sizes, end to end.

    Args:
        folder: of the files; made where it is missing. A data set has a file of its own, found again by the next run.
        names: (n,) of the images: part of what tells data sets apart.
        sizes: (n,2) height, width.
        root: of the data set: the other part.

    Raises:
        ConfigError: the folder cannot be written, or the disk has not room for all images; nothing is left behind.
    """

    def __init__(self, folder: str | Path, names: NDArray[Any], sizes: NDArray[Any], root: str | Path = "") -> None:
        lengths = sizes.astype(np.int64).prod(1) * 3
        self.sizes, self.ends = sizes, np.concatenate([[0], np.cumsum(lengths)])
        told = "\n".join([str(Path(root).resolve()), *names.tolist()])
        key = hashlib.sha256(told.encode() + self.ends.tobytes()).hexdigest()[:16]
        self.file = Path(folder).expanduser() / f"pixels-{key}.bin"
        self.header = len(sizes) * 8  # int64 each: when the image's file was changed, in ns; 0: not here yet
        total = self.header + int(self.ends[-1])
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.file.parent):
                if not self.file.exists() or self.file.stat().st_size != total:
                    _reserve(self.file, total)
            self._map = np.memmap(self.file, np.uint8, "r+", shape=(total,))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ConfigError(f"data.cache = {folder}: {total / 2**30:.1f} GB cannot be kept there ({reason})") from error

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the file itself."""
        return {**self.__dict__, "_map": len(self._map)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__dict__.update(state)
        self._map = np.memmap(self.file, np.uint8, "r+", shape=(state["_map"],))

    def get(self, index: int, path: Path) -> NDArray[Any] | None:
        """An image, (H,W,3) uint8 and writable; None: it is not here, or its file was changed since."""
        changed = path.stat().st_mtime_ns if path.exists() else 0
        if not changed or self._times()[index] != changed:
            return None
        return np.array(self._pixels(index))

    def put(self, index: int, path: Path, image: NDArray[Any]) -> None:
        """Keeps an image of the size it should have. Its time is written last, so that half an image is never taken."""
        self._times()[index] = 0
        self._pixels(index)[:] = image
        self._times()[index] = path.stat().st_mtime_ns

    def _times(self) -> NDArray[Any]:
        return self._map[: self.header].view(np.int64)

    def _pixels(self, index: int) -> NDArray[Any]:
        height, width = self.sizes[index].tolist()
        return self._map[self.header + self.ends[index] : self.header + self.ends[index + 1]].reshape(height, width, 3)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process after the other: all of a run begin at once, and only one of them needs to take the room."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network's file system may have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _reserve(file: Path, total: int) -> None:
    """A file of zeros whose room on the disk is taken at once: a disk that fills up later would end the process by a signal."""
    if shutil.disk_usage(file.parent).free < total:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as new:
            if hasattr(os, "posix_fallocate") and total:
                os.posix_fallocate(new.fileno(), 0, total)
            new.truncate(total)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
