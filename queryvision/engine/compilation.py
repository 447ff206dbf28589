"""Parts of a model run by `torch.compile`: the same numbers to rounding, sooner.

A part is compiled in one piece or refused; what cannot be compiled is never quietly run as it was. A new shape of images costs
another compilation: `data.multiple` keeps their number small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from queryvision.engine.optimisation import part_of
from queryvision.errors import ConfigError

MOST = 64
"""Compilations of one function, for as many combinations of shapes, before it is an error."""


class Uncalled(set[str]):
    """Names of parts that wait for their first call."""

    def refuse(self) -> None:
        """After a step.

        Raises:
            ConfigError: nothing has called one of them, so that it runs as it was.
        """
        if self:
            raise ConfigError(f"train.compile: '{min(self)}' is never called as a whole; name parts of it, or leave it out")


def compile_parts(model: nn.Module, names: Sequence[str]) -> Uncalled:
    """Compiles `forward` of some parts, when they are first called.

    Args:
        model: changed in place; names of its parameters stay.
        names: of parts, from the top of the model: `backbone`, `encoder`, `decoder.layers`. Each member of a list is compiled
            alone, anything else in one piece.

    Returns:
        The parts that nothing has called so far.

    Raises:
        ConfigError: there is no such part; or, when it is called, it cannot be compiled in one piece.
    """
    if names:
        import torch._dynamo  # takes a second, which other runs need not spend

        torch._dynamo.config.recompile_limit = max(MOST, torch._dynamo.config.recompile_limit)
    uncalled = Uncalled(names)
    for name in names:
        part = part_of(model, name, "train.compile")
        for block in part if isinstance(part, nn.ModuleList) else [part]:
            block.forward = _told(torch.compile(block.forward, fullgraph=True), name, uncalled)
    return uncalled


def _told(run: Callable[..., Any], name: str, uncalled: Uncalled) -> Callable[..., Any]:
    """What goes wrong while compiling becomes one line."""

    @functools.wraps(run)
    def wrapped(*given: Any, **named: Any) -> Any:
        uncalled.discard(name)
        try:
            return run(*given, **named)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise ConfigError(
                f"train.compile: '{name}' met more than {MOST} shapes of batches; set data.multiple, or leave it out"
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(f"train.compile: '{name}' cannot be compiled in one piece ({reason}); leave it out") from error

    return wrapped
