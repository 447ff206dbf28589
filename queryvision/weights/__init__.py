"""Readers of published weights, one file a family, where weights come from, and starting from a checkpoint of ours."""

from __future__ import annotations

import importlib
from typing import Any

from queryvision.errors import ConfigError, nearest

FAMILIES = {
    "detr": "queryvision.weights.detr",
    "deformable-detr": "queryvision.weights.deformable_detr",
    "dino": "queryvision.weights.dino",
    "rtdetrv2": "queryvision.weights.rtdetrv2",
    "dfine": "queryvision.weights.dfine",
    "mask2former": "queryvision.weights.mask2former",
    "maskdino": "queryvision.weights.maskdino",
}
"""Families of published checkpoints and their readers: modules with `TASK`, `read` and `rename`, imported when they are needed.

`read(source)` gives {"state", "model", "classes", "config": name of the preset}, perhaps "heads": {head: settings} that take
the place of the preset's, and "task" where a family has checkpoints of several. `rename(state, heads)` gives our names and
shapes.
"""


def reader_of(family: str) -> Any:
    """The module that reads a family.

    Raises:
        ConfigError: there is none; the valid names are listed.
    """
    if family not in FAMILIES:
        raise ConfigError(f"--from {family}: no reader of that name; {nearest(family, FAMILIES)}")
    return importlib.import_module(FAMILIES[family])
