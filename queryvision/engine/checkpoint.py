"""Checkpoints: written to a temporary name and renamed, read with `weights_only=True`.

A checkpoint is a plain dict: `format`, `task`, `config` (resolved), `classes`, `model` (weights), `step`, `metrics`; `last.pt`
also holds what resuming needs: `ema`, `optimizer`, `rng`, `log`, `best`.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from queryvision.errors import CheckpointError

FORMAT = "queryvision/1"


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint so that at any moment either the old or the new one is whole.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
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
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals(allowed or []):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(f"{path}: refused, it holds more than weights and plain values") from error
        raise CheckpointError(f"{path}: is no checkpoint or is damaged") from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is no checkpoint or is damaged ({str(error).splitlines()[0][:100]})") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of ours.

    Raises:
        CheckpointError: it is something else; converting is pointed out.
    """
    content = read_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        keys = list(content)[:4] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path}: is no queryvision checkpoint (it holds {keys}); published ones: `qv convert FILE --from FAMILY`"
        )
    return content
