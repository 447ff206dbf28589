"""Where a run lives: a folder of its own under `output/<task>`, and which one to go on with.

A new run never writes into an old one's folder. A run that was stopped before it had saved anything starts over in its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from queryvision.config import Config
from queryvision.engine.files import remove_unfinished, replacing
from queryvision.errors import ConfigError
from queryvision.outputs import writable_folder

LAST = "last.pt"
SETTINGS = "config.yaml"
HELD = ".held"
"""Locked by the process that trains."""
_OWN: set[Path] = set()
"""Held by this process."""


def claim_folder(config: Config) -> Path:
    """Makes the one after the newest of `run`, `run-2`, `run-3` ...; of runs that start together each gets its own.

    Raises:
        ConfigError: it cannot be made.
    """
    parent = writable_folder(Path(config.output) / config.task)
    for number in itertools.count(_newest(config) + 1):
        folder = _place(config, number)
        try:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
        except OSError as error:
            raise ConfigError(f"cannot write into {parent} ({error.strerror}); choose another folder") from error
    raise AssertionError("there is no end of names")


def newest_run(config: Config) -> Path:
    """The newest run of a configuration's name: the one with the highest number.

    Raises:
        ConfigError: there is none.
    """
    number = _newest(config)
    if not number:
        raise ConfigError(f"--resume: there is no run {_place(config, 1)}; start it without --resume, or name its folder")
    return _place(config, number)


def named_run(path: str) -> Path:
    """The folder of a run that was named, by itself or by its `last.pt`.

    Raises:
        ConfigError: there is no run.
    """
    given = Path(path)
    if given.suffix == ".pt" and given.name != LAST:
        raise ConfigError(f"--resume {path}: only {LAST} holds what going on needs; name it or its folder")
    folder = given.parent if given.suffix == ".pt" else given
    if not (folder / SETTINGS).is_file():
        raise ConfigError(f"--resume {path}: there is no run here (no {folder / SETTINGS})")
    return folder


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; however a process ends, what it held is free.

    Raises:
        ConfigError: another run is in it, or it cannot be written.
    """
    place, taken = folder.resolve(), f"{folder}: another run trains in this folder; wait for it, or end it first"
    if place in _OWN:  # the system's locks are for other processes
        raise ConfigError(taken)
    try:
        file = open(writable_folder(folder) / HELD, "w")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"cannot write into {folder} ({error.strerror}); choose another folder") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike that of flock not inherited by processes that read images
        except OSError as error:  # a network's file system may have no locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(taken) from None
        _OWN.add(place)
        try:
            yield
        finally:
            _OWN.discard(place)


def take_folder(folder: Path, config: Config) -> None:
    """Removes what was left unfinished in a run's folder and leaves the resolved configuration in it.

    Raises:
        ConfigError: it cannot be written; the old one is untouched.
    """
    remove_unfinished(writable_folder(folder))
    try:
        with replacing(folder / SETTINGS) as file:
            file.write(yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
    except OSError as error:
        raise ConfigError(f"cannot write {folder / SETTINGS} ({error.strerror}); choose another folder") from error


def _place(config: Config, number: int) -> Path:
    """`run` is the first, `run-2` the second."""
    return Path(config.output) / config.task / (config.name if number == 1 else f"{config.name}-{number}")


def _newest(config: Config) -> int:
    """The highest number of a run of this name; 0: there is none."""
    first, form = _place(config, 1), re.compile(re.escape(config.name) + "-([2-9]|[1-9][0-9]+)")
    found = (form.fullmatch(path.name) for path in first.parent.glob("*"))
    numbers = sorted((int(match[1]) for match in found if match), reverse=True)
    return next((n for n in numbers if _is_called(_place(config, n), config.name)), int(first.is_dir()))


def _is_called(folder: Path, name: str) -> bool:
    """Whether a folder is a run of this name, perhaps one that ended before it said so: `run-2024` may be anything else."""
    try:
        settings = yaml.safe_load((folder / SETTINGS).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return (folder / HELD).exists()
    return isinstance(settings, dict) and settings.get("name", name) == name
