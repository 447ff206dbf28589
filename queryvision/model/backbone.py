"""A backbone by its name: torchvision's ResNets, timm's models with maps of several strides, and its plain ViTs."""

from __future__ import annotations

from collections.abc import Sequence

import timm

from queryvision.errors import ConfigError, nearest
from queryvision.model.backbone_base import Backbone, resized_padding
from queryvision.model.resnet import RESNET_STRIDES, ResNet, resnets
from queryvision.model.timm_backbone import TimmBackbone
from queryvision.model.timm_body import VARIANTS, create_body, levels_of, pick_levels, prepare, timm_name
from queryvision.model.vit import VitBackbone, near_strides

__all__ = ["Backbone", "make_backbone", "resized_padding"]


def make_backbone(
    name: str,
    strides: Sequence[int] = (32,),
    frozen_norm: bool = True,
    dilated: bool = False,
    freeze: int | None = None,
    pyramid_width: int = 256,
) -> Backbone:
    """A backbone by its name: torchvision's ResNets, everything else from timm.

    Args:
        name: of the architecture; `resnet18vd` and `resnet34vd` are timm's `resnet18d` and `resnet34d` with RT-DETR's further
            projection; `.unit` behind one of timm's names or these: pixels 0..1 are not normalised any further.
        strides: levels wanted, by stride; a plain ViT gives the nearest it has, see `VitBackbone`.
        frozen_norm: constant batch-norm statistics and untrained batch norm; other norms are always trained.
        dilated: see `ResNet`.
        freeze: how many parts from the image upwards are not trained: the stem, then the stages, or a ViT's blocks. None: 2 for
            a ResNet, as DETR; timm's models are trained whole.
        pyramid_width: channels of a plain ViT's levels; other backbones have their own.

    Returns:
        The backbone, its levels finest first.

    Raises:
        ConfigError: nobody knows the name, it has no such level or part, or cannot take images of every size.
    """
    if not strides or min(strides) < 1 or len(set(strides)) < len(strides):
        raise ConfigError(f"backbone '{name}': strides {list(strides)} must be at least one, positive, each once")
    strides = sorted(strides)
    if name in resnets():
        return _resnet(name, strides, frozen_norm, dilated, 2 if freeze is None else freeze)
    if not timm.is_model(timm_name(name)):
        raise ConfigError(f"there is no backbone '{name}'; {nearest(name, {*resnets(), *VARIANTS, *timm.list_models()})}")
    if dilated:
        raise ConfigError(f"backbone '{name}' cannot be dilated (dc5); take stride 16, or a resnet50")
    body = create_body(name)
    levels = levels_of(name, body)
    plain = len(levels) > 1 and len({level.stride for level in levels}) == 1
    if plain:
        near_strides(name, levels[-1].stride, strides)  # a wrong stride is told before anything is computed
    chosen = [levels[-1]] if plain else pick_levels(name, levels, strides)
    trunk = prepare(name, body, levels, chosen, frozen_norm, freeze or 0)
    return VitBackbone(trunk, strides, pyramid_width) if plain else TimmBackbone(trunk)


def _resnet(name: str, strides: Sequence[int], frozen_norm: bool, dilated: bool, freeze: int) -> ResNet:
    unknown = [stride for stride in strides if stride not in RESNET_STRIDES]
    if unknown:
        raise ConfigError(f"backbone '{name}' has no level of stride {unknown[0]}, only {list(RESNET_STRIDES)}")
    if dilated and name in ("resnet18", "resnet34"):
        raise ConfigError(f"backbone '{name}' cannot be dilated (dc5); resnet50 and larger can")
    return ResNet(name, [RESNET_STRIDES.index(stride) + 1 for stride in strides], frozen_norm, dilated, freeze)
