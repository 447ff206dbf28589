"""Pickles of plain containers and numpy arrays, read without running anything of theirs.

A pickle names functions to call, and whoever wrote it chooses them. Here only a handful of names is known, and each has a
stand-in of ours that keeps what it is given; arrays are then made of their bytes. Everything else is refused.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from queryvision.errors import CheckpointError

DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    ImportError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
    MemoryError,
    OverflowError,
    OSError,
)
"""What a pickle can raise that is damaged or something else."""
KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
"""Types of numbers that are read."""


class _Refused(Exception):
    """It names something that is not known here."""


class _Kind:
    """Stands for numpy.dtype."""

    def __init__(self, code: Any, *rest: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        if self.code not in KINDS:
            raise ValueError(f"numbers of type {self.code!r}")
        return np.dtype(self.code).newbyteorder("<" if self.order in ("<", "=", "|") else ">")


class _Array:
    """Stands for numpy.ndarray; what it is made of comes later."""

    def __init__(self, *rest: Any) -> None:
        self.parts: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, columns_first, data = state
        self.parts = (data, kind, shape, "F" if columns_first else "C")

    def tensor(self) -> torch.Tensor:
        data, kind, shape, order = self.parts
        if not isinstance(kind, _Kind) or not isinstance(data, bytes | bytearray):
            raise TypeError("an array that is not made of numbers")
        values = np.frombuffer(data, kind.numpy(), math.prod(shape)).reshape(shape, order=order)
        return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.parts = (bytes(data), kind, shape, order)
    return array


def _number(kind: _Kind, data: Any) -> Any:
    return np.frombuffer(data, kind.numpy(), 1)[0].item()


def _encode(text: str, *rest: Any) -> bytes:
    return text.encode("latin1")


def _nothing() -> bytes:
    return b""


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _nothing,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _Refused(f"{module}.{name}")
        return _KNOWN[module, name]


def read_pickle(path: str | Path) -> Any:
    """Plain values of a pickle; arrays become tensors.

    Args:
        path: of the file.

    Raises:
        CheckpointError: it is missing, damaged, or names anything but plain containers and numpy arrays.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with open(path, "rb") as file:
            return _plain(_Reader(file).load())
    except _Refused as error:
        raise CheckpointError(f"{path}: refused, it holds more than weights and plain values ({error})") from error
    except DAMAGED as error:
        raise CheckpointError(f"{path}: is no checkpoint or is damaged") from error


def _plain(value: Any) -> Any:
    """The same with tensors instead of stand-ins."""
    if isinstance(value, _Array):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(_plain(item) for item in value) if isinstance(value, list | tuple) else value
