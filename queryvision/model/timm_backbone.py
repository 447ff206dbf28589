"""timm's models with maps of several strides: ConvNeXt, EfficientNet, MobileNet, Swin, HGNet, FastViT and many others."""

from __future__ import annotations

from torch import Tensor

from queryvision.model.backbone_base import Backbone, cut_to_image, filled_up
from queryvision.model.timm_body import Trunk, body_maps


class TimmBackbone(Backbone):
    """A timm model whose levels are taken as they are.

    Images are filled up with zeros to what the model can take, at least a multiple of the coarsest stride, and the maps are cut
    to ceil(H / stride) x ceil(W / stride).

    Args:
        trunk: the model, ready.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.body = trunk.body
        self.indices = [level.index for level in trunk.levels]
        self.multiple = trunk.multiple
        self.narrow = trunk.narrow
        self.name, self.mean, self.std = trunk.name, trunk.mean, trunk.std
        self.channels = tuple(level.channels for level in trunk.levels)
        self.strides = tuple(level.stride for level in trunk.levels)
        self.train(self.training)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """See `Backbone.maps`."""
        filled = filled_up(pixels, self.multiple)
        if self.narrow and filled.device.type == "cpu":
            filled = filled.contiguous()
        maps = body_maps(self.body, self.indices, filled)
        return cut_to_image(maps, self.strides, pixels.shape[-2:])
