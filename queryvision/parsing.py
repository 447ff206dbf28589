"""How the command line meets people: `--resume` alone, mistakes as one line and exit code 2, Ctrl-C."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from queryvision.errors import QueryVisionError

NEWEST = "<newest>"
"""What `--resume` without a value stands for."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""A disk without room, wherever that is met."""

UsageError: Any = typer.BadParameter.__bases__[0]
"""Base of what the parser complains about; typer brings its own click or uses the installed one."""


class Commands(TyperGroup):
    """Says one line when it is interrupted."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            hint = "; `--resume` goes on from the last checkpoint" if ctx.invoked_subcommand == "train" else ""
            print(f"qv: interrupted{hint}", file=sys.stderr)
            raise typer.Exit(130) from None


def run_app(app: typer.Typer) -> None:
    """Runs the command of this process and ends it; `--debug` shows where an error comes from.

    Raises:
        SystemExit: always; 0, 2 for a mistake that a user can mend, or 128 and a signal's number.
    """
    given = _arguments(sys.argv[1:]) or ["--help"]
    try:
        raise SystemExit(app(given, prog_name="qv", standalone_mode=False))
    except (QueryVisionError, UsageError) as error:
        if "--debug" in given:
            traceback.print_exc()
        print(f"qv: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(getattr(error, "code", 2)) from None
    except OSError as error:
        if error.errno not in FULL or "--debug" in given:
            raise
        print(f"qv: {error.strerror}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        raise SystemExit(2) from None


def _one_line(error: Any) -> str:
    if isinstance(error, QueryVisionError):
        return " ".join(str(error).splitlines())
    where = f"; see `{error.ctx.command_path} --help`" if error.ctx is not None else ""
    return " ".join(error.format_message().split()).rstrip(".") + where


def _arguments(given: list[str]) -> list[str]:
    """`--resume` alone means the newest run; the parser wants a value."""
    result = []
    for index, word in enumerate(given):
        result.append(word)
        following = given[index + 1] if index + 1 < len(given) else "--"
        if word == "--resume" and following.startswith("--"):
            result.append(NEWEST)
    return result
