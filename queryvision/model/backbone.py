"""Convolutional backbones: torchvision's ResNets with frozen batch norm, and timm's models with feature maps.

Legend: B images, L levels, C_l channels of a level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from queryvision.errors import ConfigError, nearest
from queryvision.structures import Features, ImageBatch

RESNET_STRIDES = (4, 8, 16, 32)  # of stages 1 to 4
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Turns pixels into maps, finest level first.

    Attributes:
        name: of its architecture, torchvision's or timm's.
        channels: C_l of each level.
        strides: input pixels per cell of each level.
        mean, std: what its weights expect pixels (0..1, RGB) to be normalised by.
    """

    name: str
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """(B,3,H,W) normalised -> L x (B,C_l,H_l,W_l)."""
        raise NotImplementedError(f"{type(self).__name__} must define maps(pixels)")

    def forward(self, images: ImageBatch) -> Features:
        """Maps and their padding; `images.pixels` must be normalised."""
        maps = self.maps(images.pixels.contiguous(memory_format=torch.channels_last))
        if not images.padded:
            return Features(maps, [None] * len(maps))
        return Features(maps, [resized_padding(images.padding, m) for m in maps], images.padding)


def resized_padding(padding: Tensor, like: Tensor) -> Tensor:
    """The image's padding (B,H,W) at the size of a map (B,C,H_l,W_l), by the nearest pixel -> (B,H_l,W_l)."""
    return F.interpolate(padding[:, None].float(), like.shape[-2:])[:, 0].bool()


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolution and batch norm; a frozen norm is a constant scale and shift, so it is folded into the weights.

    Exact, also in training: the gradient reaches the weights through the product, and the norm's pass over the map is saved.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))  # type: ignore[no-any-return]
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, norm.bias - norm.running_mean * scale, conv.stride, conv.padding, conv.dilation, conv.groups)


class ResNet(Backbone):
    """A torchvision ResNet without its classifier (arXiv 1512.03385).

    Args:
        name: `resnet18`, `resnet34`, `resnet50`, `resnet101` ...
        levels: which of the stages 1..4 to give out.
        frozen_norm: batch norm with constant statistics (DETR), or live.
        dilated: the last stage at stride 16 with dilation instead of stride 32 (DETR's DC5).
        freeze: how many parts from the image upwards are not trained; DETR freezes the stem and stage 1 (2).
    """

    def __init__(
        self, name: str, levels: Sequence[int] = (4,), frozen_norm: bool = True, dilated: bool = False, freeze: int = 2
    ) -> None:
        super().__init__()
        if name not in _resnets():
            raise ConfigError(f"there is no backbone '{name}' in torchvision; {nearest(name, _resnets())}")
        body = torchvision.models.get_model(
            name,
            weights=None,
            norm_layer=FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d,
            replace_stride_with_dilation=[False, False, dilated],
        )
        self.levels = tuple(levels)
        self.name = name
        self.stages = range(1, max(self.levels) + 1)  # what lies behind the last level would never get a gradient
        kept = ["conv1", "bn1", *(f"layer{stage}" for stage in self.stages)]
        self.body = nn.ModuleDict({part: body.get_submodule(part) for part in kept})
        self.channels = tuple(self._width(level) for level in self.levels)
        self.strides = tuple(16 if dilated and level == 4 else 2 ** (level + 1) for level in self.levels)
        for _, part in list(self.parts())[:freeze]:
            part.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def _width(self, stage: int) -> int:
        block = cast(nn.Sequential, self.body[f"layer{stage}"])[-1]
        last = cast(nn.Conv2d, block.conv3 if hasattr(block, "conv3") else block.conv2)
        return last.out_channels

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) from the image upwards: the stem, then the stages."""
        yield "stem", nn.ModuleList([self.body["conv1"], self.body["bn1"]])
        for stage in self.stages:
            yield f"layer{stage}", self.body[f"layer{stage}"]

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """See `Backbone.maps`."""
        x = F.relu(conv_norm(cast(nn.Conv2d, self.body["conv1"]), self.body["bn1"], pixels), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage in self.stages:
            for block in cast(nn.Sequential, self.body[f"layer{stage}"]):
                x = _residual(block, x)
            if stage in self.levels:
                maps.append(x)
        return maps


def _residual(block: Any, x: Tensor) -> Tensor:
    """Torchvision's BasicBlock or Bottleneck with `conv_norm`."""
    steps = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if hasattr(block, "conv3"):
        steps.append((block.conv3, block.bn3))
    out = x
    for conv, norm in steps[:-1]:
        out = F.relu(conv_norm(conv, norm, out), inplace=True)
    out = conv_norm(*steps[-1], out)
    shortcut = x if block.downsample is None else conv_norm(block.downsample[0], block.downsample[1], x)
    return F.relu(out.add_(shortcut), inplace=True)


class TimmBackbone(Backbone):
    """Any timm model with feature maps.

    Args:
        name: timm's name of it.
        strides: which levels to give out, by their stride.
        freeze_norm: keep batch norm at its statistics and untrained, also in training.
    """

    def __init__(self, name: str, strides: Sequence[int] = (32,), freeze_norm: bool = True) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ConfigError(f"there is no backbone '{name}'; {nearest(name, {*_resnets(), *timm.list_models()})}")
        body: Any = timm.create_model(name, pretrained=False)
        self.name, self.body = name, body
        info = body.feature_info
        levels = [(f["reduction"], f["num_chs"]) for f in (info if isinstance(info, list) else info.info)]
        reductions = [reduction for reduction, _ in levels]
        missing = sorted(set(strides) - set(reductions))
        if missing:
            raise ConfigError(f"backbone '{name}' has no level of stride {missing}, only {reductions}")
        self.indices = [reductions.index(stride) for stride in strides]
        body.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.channels = tuple(levels[index][1] for index in self.indices)
        self.strides = tuple(strides)
        config = timm.get_pretrained_cfg(name)
        if config is not None:
            self.mean, self.std = tuple(config.mean), tuple(config.std)
        self.freeze_norm = freeze_norm
        if freeze_norm:
            for norm in self._norms():
                norm.requires_grad_(False)
        self.train(self.training)
        self.to(memory_format=torch.channels_last)

    def _norms(self) -> Iterator[nn.Module]:
        return (m for m in self.body.modules() if isinstance(m, nn.BatchNorm2d))

    def train(self, mode: bool = True) -> TimmBackbone:
        """Frozen norms stay in evaluation mode."""
        super().train(mode)
        if self.freeze_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """See `Backbone.maps`.

        Sizes are filled up to the coarsest stride: TensorFlow's `same` padding of some models would otherwise shift the maps
        by a pixel from one image size to the next.
        """
        height, width = pixels.shape[-2:]
        stride = max(self.strides)
        pixels = F.pad(pixels, (0, -width % stride, 0, -height % stride))
        return list(self.body.forward_intermediates(pixels, indices=self.indices, intermediates_only=True, output_fmt="NCHW"))


def make_backbone(
    name: str, strides: Sequence[int] = (32,), frozen_norm: bool = True, dilated: bool = False, freeze: int | None = None
) -> Backbone:
    """A backbone by its name: torchvision's ResNets, everything else from timm.

    Args:
        name: of the architecture.
        strides: levels wanted, by stride.
        frozen_norm: constant batch-norm statistics.
        dilated: see `ResNet`.
        freeze: see `ResNet`; None: 2 for a ResNet, as DETR; timm's models are trained whole.

    Raises:
        ConfigError: nobody knows the name, or it has no such level.
    """
    if name in _resnets():
        unknown = [stride for stride in strides if stride not in RESNET_STRIDES]
        if unknown:
            raise ConfigError(f"backbone '{name}' has no level of stride {unknown[0]}, only {list(RESNET_STRIDES)}")
        if dilated and name in ("resnet18", "resnet34"):
            raise ConfigError(f"backbone '{name}' cannot be dilated (dc5); resnet50 and larger can")
        levels = [RESNET_STRIDES.index(stride) + 1 for stride in strides]
        return ResNet(name, levels, frozen_norm, dilated, 2 if freeze is None else freeze)
    if dilated:
        raise ConfigError(f"backbone '{name}' cannot be dilated (dc5); take stride 16, or a resnet50")
    if freeze:
        raise ConfigError(
            f"model.freeze = {freeze}: backbone '{name}' is trained whole, or with train.backbone_lr=0 not at all"
        )
    return TimmBackbone(name, strides, frozen_norm)


def _resnets() -> list[str]:
    return [
        n
        for n in torchvision.models.list_models(module=torchvision.models)
        if n.startswith(("resnet", "resnext", "wide_resnet"))
    ]
