"""Checkpoints: written to a temporary name and renamed, read with `weights_only=True`.

A checkpoint is a plain dict: `format`, `task`, `config` (resolved), `classes`, `model` (weights), `step`, `metrics`; `last.pt`
also holds what resuming needs: `ema`, `optimizer`, `rng`, `log`, `steps`, `epochs`.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from queryvision.engine.files import replacing
from queryvision.errors import CheckpointError

FORMAT = "queryvision/1"
DAMAGED = (RuntimeError, EOFError, zipfile.BadZipFile, LookupError, ValueError, TypeError, AttributeError, OSError)
"""What PyTorch raises at files that are something else."""


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint so that at any moment either the old or the new one is whole.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **content}, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot write {path}: {str(error).splitlines()[0]}; the checkpoint before it is untouched"
        ) from error


def read_file(path: str | Path, allowed: list[Any] | None = None) -> Any:
    """Unpickles tensors and plain values only.

    Args:
        path: of the file.
        allowed: further classes that may be in it.

    Raises:
        CheckpointError: missing, damaged, or holds something that could run code.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path}: is a folder, no checkpoint")
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if not Path(path).stat().st_size:
        raise CheckpointError(f"{path}: is an empty file, no checkpoint")
    try:
        with torch.serialization.safe_globals(allowed or []), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # foreign files; what cannot be read fails below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(f"{path}: refused, it holds more than weights and plain values") from error
        raise CheckpointError(f"{path}: is no checkpoint or is damaged") from error
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except DAMAGED as error:
        raise CheckpointError(f"{path}: is no checkpoint or is damaged") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of ours.

    Raises:
        CheckpointError: it is damaged or something else; converting is pointed out.
    """
    content = read_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        keys = list(content)[:4] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path}: is no queryvision checkpoint (it holds {keys}); published ones: `qv convert FILE --from FAMILY`"
        )
    if not _is_whole(path):
        raise CheckpointError(f"{path}: is damaged, a checksum does not match")
    return content


def _is_whole(path: str | Path) -> bool:
    """Whether the checksums match, which `torch.load` does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def load_resumable(path: Path, classes: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint to go on from.

    Raises:
        CheckpointError: it is no `last.pt`, or belongs to other classes.
    """
    state = load_checkpoint(path)
    missing = {"model", "optimizer", "rng", "log", "step", "classes"} - set(state)
    if missing:
        raise CheckpointError(
            f"{path}: cannot be gone on with, it lacks {', '.join(sorted(missing))}; only a run's last.pt can"
        )
    if state["classes"] != classes:
        mine, theirs = (", ".join(map(str, c["names"][:5])) for c in (state["classes"], classes))
        raise CheckpointError(f"{path}: was trained on other classes ({mine} …) than the data has ({theirs} …)")
    return state


def load_weights(model: nn.Module, weights: Any, where: str) -> None:
    """Fills a whole model.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape; the first is named.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{where}: holds no weights where they should be")
    own = model.state_dict()
    wrong = [
        f"'{key}' is {tuple(weights[key].shape)}, the settings make it {tuple(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    wrong += [f"'{key}' is missing" for key in own if key not in weights]
    wrong += [f"'{key}' is left over" for key in weights if key not in own]
    if wrong:
        raise CheckpointError(f"{where}: weights and settings disagree in {len(wrong)} tensors, the first: {wrong[0]}")
    model.load_state_dict(weights)
