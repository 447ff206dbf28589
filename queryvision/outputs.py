"""Makes sure, before the work, that its results can be written afterwards."""

from __future__ import annotations

import tempfile
from pathlib import Path

from queryvision.errors import ConfigError


def writable_folder(path: Path | str) -> Path:
    """The folder, made where it is missing.

    Raises:
        ConfigError: nothing can be written there.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(f"cannot write into {folder} ({error.strerror}); choose another folder") from error


def writable_file(path: Path | str) -> Path:
    """The path of a file that may exist already; its folder is made where it is missing.

    Raises:
        ConfigError: the file cannot be written.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"cannot write {file} (it is a folder); give the name of a file")
    writable_folder(file.parent)
    try:
        if file.exists():
            with open(file, "ab"):
                pass
    except OSError as error:
        raise ConfigError(f"cannot write {file} ({error.strerror}); choose another file") from error
    return file
