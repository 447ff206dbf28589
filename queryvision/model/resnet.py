"""torchvision's ResNets with frozen or live batch norm.

Legend: B images, L levels, C_l channels of a level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from queryvision.errors import ConfigError, nearest
from queryvision.model.backbone_base import Backbone, check_freeze
from queryvision.model.folding import fold

RESNET_STRIDES = (4, 8, 16, 32)  # of stages 1 to 4


def resnets() -> list[str]:
    """The names of torchvision's ResNets, ResNeXts and wide ResNets."""
    return [
        n
        for n in torchvision.models.list_models(module=torchvision.models)
        if n.startswith(("resnet", "resnext", "wide_resnet"))
    ]


class ResNet(Backbone):
    """A torchvision ResNet without its classifier (arXiv 1512.03385).

    Args:
        name: `resnet18`, `resnet34`, `resnet50`, `resnet101` ...
        levels: which of the stages 1..4 to give out, ascending.
        frozen_norm: batch norm with constant statistics (DETR), or live.
        dilated: the last stage at stride 16 with dilation instead of stride 32 (DETR's DC5).
        freeze: how many parts from the image upwards are not trained; DETR freezes the stem and stage 1 (2).

    Raises:
        ConfigError: torchvision has no such ResNet, or it has fewer parts than `freeze`.
    """

    def __init__(
        self, name: str, levels: Sequence[int] = (4,), frozen_norm: bool = True, dilated: bool = False, freeze: int = 2
    ) -> None:
        super().__init__()
        if name not in resnets():
            raise ConfigError(f"there is no backbone '{name}' in torchvision; {nearest(name, resnets())}")
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
        parts = list(self.parts())
        check_freeze(name, freeze, [part for part, _ in parts])
        for _, module in parts[:freeze]:
            module.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        if frozen_norm:
            fold(self.body, lambda: self.maps(torch.zeros(1, 3, 64, 64, requires_grad=True)))
        self.train(self.training)

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
        x = F.relu(self.body["bn1"](self.body["conv1"](pixels)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage in self.stages:
            x = self.body[f"layer{stage}"](x)
            if stage in self.levels:
                maps.append(x)
        return maps
