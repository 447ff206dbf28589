"""A timm model made ready to be the body of a backbone: any image size, nothing behind the last level, parts to freeze.

What a model can do is found out by one small image rather than by a list of names. Legend: B images, L levels, C_l channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.resnet import downsample_avg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from queryvision.errors import ConfigError
from queryvision.layers.linear import quicken
from queryvision.model.backbone_base import IMAGENET_MEAN, IMAGENET_STD, check_freeze
from queryvision.model.folding import fold, graph_nodes

ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""What makes models accept any image size: ViTs and newer Swins, older Swins; convolutional models need nothing."""
VARIANTS = {"resnet18vd": "resnet18d", "resnet34vd": "resnet34d"}
"""timm's ResNets with one thing more: a projection beside the first block, too, as in RT-DETR's R18 and R34."""
UNIT = "unit"
"""Tag behind a name: pixels 0..1 are not normalised any further, as published RT-DETR and D-FINE take them."""
INSTEAD = "resnet50, convnext_tiny, swin_tiny_patch4_window7_224 or vit_small_patch16_224"


@dataclass(frozen=True)
class Level:
    """A level that a timm model offers."""

    stride: int
    channels: int
    index: int  # timm's
    module: str  # timm's name of what ends with it


@dataclass(frozen=True)
class Trunk:
    """A body that is ready, and what a backbone must know about it."""

    name: str
    body: Any  # timm's model, pruned
    levels: tuple[Level, ...]  # to be given out, finest first
    multiple: int  # of which both sides of an image must be
    mean: tuple[float, ...]
    std: tuple[float, ...]
    narrow: bool  # see `has_narrow_steps`


def timm_name(name: str) -> str:
    """What timm calls it: without our tag, and without what `VARIANTS` adds."""
    bare = name.removesuffix(f".{UNIT}")
    return VARIANTS.get(bare, bare)


def create_body(name: str) -> Any:
    """A timm model with random weights, for any image size where timm can make it so."""
    body = _create(timm_name(name))
    if name.removesuffix(f".{UNIT}") in VARIANTS:
        projection: Any = downsample_avg(64, 64, 1)
        body.layer1[0].downsample = projection
        nn.init.kaiming_normal_(projection[1].weight, mode="fan_out", nonlinearity="relu")
    return body


def _create(name: str) -> Any:
    for arguments in ANY_SIZE:
        try:
            return timm.create_model(name, pretrained=False, **arguments)
        except TypeError as error:  # timm has no other way to say that a model knows no such argument
            if not any(argument in str(error) for argument in arguments):
                raise
    raise AssertionError("the last arguments are none")


def levels_of(name: str, body: Any) -> list[Level]:
    """All levels of a model, from the image upwards.

    Raises:
        ConfigError: timm does not say what its maps are.
    """
    info = getattr(body, "feature_info", None)
    if not info or not hasattr(body, "forward_intermediates"):
        raise ConfigError(f"backbone '{name}': timm gives out no maps of this model; take another, such as {INSTEAD}")
    known = info if isinstance(info, list) else info.info
    return [Level(f["reduction"], f["num_chs"], index, f["module"]) for index, f in enumerate(known)]


def pick_levels(name: str, levels: Sequence[Level], strides: Sequence[int]) -> list[Level]:
    """The levels of the strides; of several with the same stride the one furthest from the image.

    Raises:
        ConfigError: there is no such level.
    """
    known = {level.stride: level for level in levels}
    missing = [stride for stride in strides if stride not in known]
    if missing:
        raise ConfigError(f"backbone '{name}' has no level of stride {missing[0]}, only {sorted(known)}")
    return sorted((known[stride] for stride in strides), key=lambda level: level.index)


def prepare(
    name: str, body: Any, levels: Sequence[Level], chosen: Sequence[Level], frozen_norm: bool = True, freeze: int = 0
) -> Trunk:
    """Prunes, tries, freezes.

    Args:
        name: timm's or one of `VARIANTS`, perhaps with our tag.
        body: timm's model; it is changed.
        levels: all that it has.
        chosen: those to be given out.
        frozen_norm: keep batch norm at its statistics and untrained.
        freeze: how many of `parts_of` from the image upwards are not trained.

    Raises:
        ConfigError: the model works at one image size only, or has fewer parts than `freeze`.
    """
    body.prune_intermediate_layers([level.index for level in chosen], prune_norm=True, prune_head=True)
    kept = levels[: chosen[-1].index + 1]
    config = timm.get_pretrained_cfg(timm_name(name))
    multiple, maps = _try_sizes(name, body, kept, chosen, config.input_size[-1] if config is not None else 224)
    needed = reached_from([maps[level.index] for level in chosen])
    for parameter in body.parameters():
        if id(parameter) not in needed:  # cannot be cut off (HRNet's last fusion), but is not trained either
            parameter.requires_grad_(False)
    parts = parts_of(body, kept, maps)
    check_freeze(name, freeze, [part for part, _ in parts])
    for _, parameters in parts[:freeze]:
        for parameter in parameters:
            parameter.requires_grad_(False)
    quicken(body)
    narrow = has_narrow_steps(body)
    if not narrow:
        body.to(memory_format=torch.channels_last)
    if frozen_norm:
        for norm in body.modules():
            if isinstance(norm, _BatchNorm):
                norm.requires_grad_(False)
        fold(body, lambda: _probe(body, [level.index for level in chosen], 2 * multiple, 3 * multiple))
    mean, std = (tuple(config.mean), tuple(config.std)) if config is not None else (IMAGENET_MEAN, IMAGENET_STD)
    if name.endswith(f".{UNIT}"):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Trunk(name, body, tuple(chosen), multiple, mean, std, narrow)


def _try_sizes(name: str, body: Any, kept: Sequence[Level], chosen: Sequence[Level], usual: int) -> tuple[int, list[Tensor]]:
    """The smallest multiple that works, and the maps of all `kept` levels, with their graph.

    The coarsest stride is the least: TensorFlow's `same` padding of some models would otherwise shift the maps by a pixel from
    one image size to the next. Some models need twice that (MobileViT-v2), some whole windows of their usual size (MaxViT).
    """
    least, reasons = max(level.stride for level in chosen), []
    for multiple in sorted({least, 2 * least, *([usual] if usual % least == 0 else [])}):
        height, width = 2 * multiple, 3 * multiple
        try:
            maps = _probe(body, [level.index for level in kept], height, width)
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            reasons.append(f"at {height} x {width} pixels: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        given = [tuple(maps[level.index].shape[1:]) for level in chosen]
        wanted = [(level.channels, height // level.stride, width // level.stride) for level in chosen]
        if given == wanted:
            return multiple, maps
        reasons.append(f"at {height} x {width} pixels: maps of {given}, not {wanted}")
    raise ConfigError(
        f"backbone '{name}' does not work at every image size ({reasons[0]}); it was made for {usual} x {usual}. "
        f"Take another, such as {INSTEAD}"
    )


def _probe(body: nn.Module, indices: list[int], height: int, width: int) -> list[Tensor]:
    """Maps of an empty image that wants a gradient, in evaluation mode: no statistics move and nothing is drawn."""
    training, at = body.training, next(body.parameters())
    body.eval()
    try:
        with torch.enable_grad():
            pixels = torch.zeros(1, 3, height, width, device=at.device, dtype=at.dtype, requires_grad=True)
            return body_maps(body, indices, pixels)
    finally:
        body.train(training)


def has_narrow_steps(body: nn.Module) -> bool:
    """Whether some 1x1 convolution with a stride has few input channels (FastViT's, MobileOne's and RepVGG's stems).

    On a CPU the gradient of its weights writes out of bounds if the pixels are `channels_last` (oneDNN issue 6035).
    """
    convolutions = [module for module in body.modules() if isinstance(module, nn.Conv2d)]
    return any(c.kernel_size == (1, 1) and max(c.stride) > 1 and c.in_channels // c.groups < 16 for c in convolutions)


def body_maps(body: Any, indices: list[int], pixels: Tensor) -> list[Tensor]:
    """Maps of some of timm's levels; pixels (B,3,H,W), sides multiples of the trunk's -> L x (B,C_l,H / stride,W / stride)."""
    return list(body.forward_intermediates(pixels, indices=indices, intermediates_only=True, output_fmt="NCHW"))


def reached_from(maps: Sequence[Tensor]) -> set[int]:
    """`id` of every parameter that the maps depend on, read from their graph."""
    return {id(node.variable) for node in graph_nodes(maps) if hasattr(node, "variable")}


def parts_of(body: nn.Module, levels: Sequence[Level], maps: Sequence[Tensor]) -> list[tuple[str, list[nn.Parameter]]]:
    """(name, parameters) from the image upwards: what each level needs and the level below does not.

    The first level's own module is told from the stem before it, unless it has no weights of its own (a norm, an activation).

    Args:
        body: the model.
        levels: all of them.
        maps: (1,C_l,H_l,W_l) of each, with their graph.
    """
    parameters = dict(body.named_parameters())
    parts: list[tuple[str, list[nn.Parameter]]] = []
    done: set[int] = set()
    for level, level_map in zip(levels, maps, strict=True):
        needed = reached_from([level_map])
        new = [name for name, parameter in parameters.items() if id(parameter) in needed - done]
        done |= needed
        own = [name for name in new if name.startswith(f"{level.module}.")]
        before = [name for name in new if name not in own]
        if not parts and before and any(parameters[name].ndim > 1 for name in own):
            parts.append(("stem", [parameters[name] for name in before]))
            new = own
        if new:
            title = level.module if parts or not before else f"all up to {level.module}"
            parts.append((title, [parameters[name] for name in new]))
    return parts
