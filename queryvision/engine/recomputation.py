"""Less memory for the same numbers: activations that are computed once more in the backward pass (arXiv 1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint

from queryvision.engine.optimisation import Running, part_of
from queryvision.errors import ConfigError


def recompute(model: nn.Module, names: Sequence[str], held: Sequence[nn.Module]) -> None:
    """Blocks of some parts keep nothing for the backward pass but what they took in.

    Args:
        model: changed in place; names of its parameters stay.
        names: of parts, from the top of the model: `backbone`, `encoder`, `encoder.layers.0`.
        held: norms in evaluation mode.

    Raises:
        ConfigError: there is no such part, or it has batch norms that would count twice.
    """
    for name in names:
        part = part_of(model, name, "train.recompute")
        counting = [norm for norm in part.modules() if isinstance(norm, Running) and not any(norm is one for one in held)]
        if counting:
            raise ConfigError(
                f"train.recompute: norms in '{name}' keep statistics, which would count twice; freeze them or leave it out"
            )
        for block in blocks(part):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def blocks(part: nn.Module) -> Iterator[nn.Module]:
    """What stands in its outermost lists; the part itself where there is none."""
    lists = [child for child in part.modules() if isinstance(child, nn.Sequential | nn.ModuleList)]
    inner = {id(module) for one in lists for module in list(one.modules())[1:]}
    outermost = [one for one in lists if id(one) not in inner]
    yield from [block for one in outermost for block in one] or [part]
