"""What lies at a path of a data set, with one line for people where that cannot be told."""

from __future__ import annotations

import stat
from pathlib import Path

from queryvision.errors import DataError


def mode(path: Path) -> int:
    """What lies at a path, as `os.stat` says; 0: nothing.

    Raises:
        DataError: a folder on the way may not be entered, or a name is too long.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name may hold what no path can
        return 0
    except OSError as error:
        raise _unseen(path, error) from error


def is_dir(path: Path) -> bool:
    """Whether there is a folder; raises DataError as `mode`."""
    return stat.S_ISDIR(mode(path))


def is_file(path: Path) -> bool:
    """Whether there is a file.

    Raises:
        DataError: as `mode`, or it is a broken link.
    """
    found = mode(path)
    if not found and path.is_symlink():
        raise DataError(f"{path}: is a broken link; mend or remove it")
    return stat.S_ISREG(found)


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, by name; nothing where there is no folder.

    Raises:
        DataError: it may not be read.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unseen(folder, error) from error


def _unseen(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be looked at ({error.strerror}); check its name and who may enter its folder")
