"""SIGINT and SIGTERM end a training after the step at hand, or in an evaluation, with everything saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from queryvision.errors import QueryVisionError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(QueryVisionError):
    """A training was asked to stop, and its state is saved.

    Attributes:
        code: exit code of the process, as shells have it: 128 + the signal's number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, str]]:
        """It may have happened in another process."""
        return Stopped, (self.code - 128, str(self))


class Interrupted(BaseException):
    """A signal came in the midst of what may be broken off."""


class Asked:
    """Which signal came, 0: none. After it Ctrl-C ends the process at once; SIGTERM, which launchers repeat, does nothing."""

    number = 0
    breaking = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.number = self.number or number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.breaking:
            self.breaking = False
            raise Interrupted

    @contextlib.contextmanager
    def breaking_off(self, allowed: bool) -> Iterator[None]:
        """Stands around what a signal ends at once, if that is `allowed`.

        Raises:
            Interrupted: a signal came.
        """
        if allowed and self.number:
            raise Interrupted
        self.breaking = allowed
        try:
            yield
        finally:
            self.breaking = False


@contextlib.contextmanager
def listening() -> Iterator[Asked]:
    """Takes note of the signals instead of dying by them; outside of the main thread nothing can be noted."""
    asked = Asked()
    try:
        before = {name: signal.signal(name, asked) for name in SIGNALS}
    except ValueError:
        yield asked
        return
    try:
        yield asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
