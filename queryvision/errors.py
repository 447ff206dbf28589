"""Errors made for people: one line that says what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QueryVisionError(Exception):
    """Base of every error that a user can mend; the command line prints it as one line and exits with 2."""


MANY = 40
"""Valid names above which only the closest are listed."""


class ConfigError(QueryVisionError):
    """A setting, a flag or a name is wrong."""


class DataError(QueryVisionError):
    """A data set, an annotation or an image is wrong."""


class CheckpointError(QueryVisionError):
    """A checkpoint is missing, damaged or made for something else."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Names the valid key closest to `name`, then all of them, or the closest few of very many.

    Returns:
        A half sentence such as `did you mean 'steps'? Valid: batch_size, steps`.
    """
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    if len(options) > MANY:
        few = difflib.get_close_matches(name, options, n=8, cutoff=0)
        return f"{hint}The closest of {len(options)}: {', '.join(few)}"
    return f"{hint}Valid: {', '.join(options)}"


def check_range(where: str, low: float, high: float, **given: float | None) -> None:
    """Refuses a number outside of `low` .. `high`; None is left out.

    Raises:
        ConfigError: names the first one and `where` it stands.
    """
    for name, value in given.items():
        if value is not None and not low <= value <= high:
            limit = f"at least {low}" if high == float("inf") else f"{low} to {high}"
            raise ConfigError(f"{where}.{name} = {value}: must be {limit}")
