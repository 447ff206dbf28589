"""Where a run lives: a folder of its own under `output/<task>`, and which one to go on with.

A new run never writes into an old one's folder. A run that was stopped before it had saved anything starts over in its own.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from queryvision.config import Config
from queryvision.errors import ConfigError
from queryvision.outputs import writable_file, writable_folder

LAST = "last.pt"
SETTINGS = "config.yaml"


def new_folder(config: Config) -> Path:
    """The first free name: `run`, `run-2`, `run-3` ..."""
    return _numbered(config)[-1]


def newest_run(config: Config) -> Path:
    """The newest run of a configuration's name.

    Raises:
        ConfigError: there is none.
    """
    taken = _numbered(config)[:-1]
    if not taken:
        first = Path(config.output) / config.task / config.name
        raise ConfigError(f"--resume: there is no run {first}; start it without --resume, or name its folder")
    return taken[-1]


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


def write_settings(folder: Path, config: Config) -> None:
    """Makes the folder and leaves the resolved configuration in it.

    Raises:
        ConfigError: it cannot be written.
    """
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    writable_file(writable_folder(folder) / SETTINGS).write_text(text, encoding="utf-8")


def _numbered(config: Config) -> list[Path]:
    """The folders of this name, oldest first, and the next free one."""
    parent = Path(config.output) / config.task
    folders = [parent / config.name]
    while folders[-1].exists():
        folders.append(parent / f"{config.name}-{len(folders) + 1}")
    return folders
