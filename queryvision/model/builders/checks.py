"""What builders share: how heads are made, and which numbers fit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from queryvision.errors import ConfigError
from queryvision.head import Fit, Head

PIXEL_STRIDE = 4
"""Input pixels per cell of the map that masks are read from."""

HeadParts = Sequence[Head] | Callable[[Fit], Sequence[Head]]
"""Heads, or what makes them once the builder says what they must fit."""


def make_heads(heads: HeadParts, fit: Fit) -> tuple[Sequence[Head], int]:
    """The heads and how many slots they own together."""
    made = heads(fit) if callable(heads) else heads
    return made, sum(head.slots for head in made)


def pixel_strides(heads: Sequence[Head], strides: Sequence[int]) -> tuple[int, ...]:
    """The backbone's strides: with one of 4 in front where a head reads a pixel map.

    Raises:
        ConfigError: no power of two leads from there to the finest level.
    """
    if not any(head.wants_pixels for head in heads):
        return tuple(strides)
    if strides[0] <= PIXEL_STRIDE or strides[0] % PIXEL_STRIDE:
        raise ConfigError(f"model.strides = {list(strides)}: masks need a finest level of stride 8, 16 or 32")
    return (PIXEL_STRIDE, *strides)


def check_pixels(name: str, heads: Sequence[Head]) -> None:
    """Raises a ConfigError where no head reads the pixel map that an architecture is built around."""
    if not any(head.wants_pixels for head in heads):
        raise ConfigError(
            f"model.name = {name}: no head of this task predicts masks, around which it is built; take another model or task"
        )


def check_at_least(least: int, **given: int) -> None:
    """Raises a ConfigError that names the first number below `least`."""
    for name, value in given.items():
        if value < least:
            raise ConfigError(f"model.{name} = {value}: at least {least} is needed")


def ordered(heads: Sequence[Head], first: str | None) -> list[Head]:
    """The heads, that of the name `first` in front."""
    return sorted(heads, key=lambda head: head.name != first)


def check_sizes(width: int, num_heads: int, dropout: float, name: str = "width") -> None:
    """Raises a ConfigError where attention heads or sine positions do not fit the width."""
    check_at_least(1, **{name: width, "num_heads": num_heads})
    if width % 4:
        raise ConfigError(f"model.{name} = {width}: must be divisible by 4, for the sine positions")
    if width % num_heads:
        raise ConfigError(f"model.{name} = {width}: is not divisible by model.num_heads = {num_heads}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout = {dropout}: must be at least 0 and below 1")


def check_levels(strides: Sequence[int], num_levels: int, width: int, proposals: bool = False) -> None:
    """Raises a ConfigError where levels do not fit."""
    if not strides or num_levels < len(strides):
        raise ConfigError(f"model.num_levels = {num_levels}: at least one, and as many as model.strides = {list(strides)}")
    if list(strides) != sorted(set(strides)) or min(strides) < 1:
        raise ConfigError(f"model.strides = {list(strides)}: positive, finest first, each once")
    if proposals and num_levels > 5:
        raise ConfigError(f"model.num_levels = {num_levels}: proposals have at most 5 levels, their boxes double at each")
    if width % 32:
        raise ConfigError(f"model.width = {width}: must be divisible by 32, the groups of the neck's norm")


def check_doubling(strides: Sequence[int], num_points: Sequence[int] | None = None) -> None:
    """Raises a ConfigError where levels cannot be fused, or points do not fit them."""
    if (
        not strides
        or len(strides) > 5
        or min(strides) < 1
        or any(b != 2 * a for a, b in zip(strides[:-1], strides[1:], strict=True))
    ):
        raise ConfigError(f"model.strides = {list(strides)}: one to five, finest first, each twice the one before")
    if num_points is not None and (len(num_points) != len(strides) or min(num_points) < 1):
        raise ConfigError(
            f"model.num_points = {list(num_points)}: one number for each of the {len(strides)} levels, at least 1"
        )
