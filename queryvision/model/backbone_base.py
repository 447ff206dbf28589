"""What every backbone promises: maps, their channels and strides, and what their padding is.

Legend: B images, L levels, C_l channels of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from queryvision.errors import ConfigError
from queryvision.structures import Features, ImageBatch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Turns pixels into maps, finest level first.

    A batch norm whose scale is not trained keeps its statistics in training mode, too.

    Attributes:
        name: of its architecture, torchvision's or timm's.
        channels: C_l of each level.
        strides: input pixels per cell of each level; a map has ceil(H / stride) x ceil(W / stride) cells.
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
        extents = torch.stack([images.sizes.flip(-1) / stride for stride in self.strides], 1)
        if not images.padded:
            return Features(maps, [None] * len(maps), None, extents)
        return Features(maps, [resized_padding(images.padding, m) for m in maps], images.padding, extents)

    def train(self, mode: bool = True) -> Self:
        """Batch norms that are not trained stay in evaluation mode."""
        super().train(mode)
        for norm in self.modules():
            if isinstance(norm, _BatchNorm) and norm.weight is not None and not norm.weight.requires_grad:
                norm.eval()
        return self


def resized_padding(padding: Tensor, like: Tensor) -> Tensor:
    """The image's padding (B,H,W) at the size of a map (B,C,H_l,W_l), by the nearest pixel -> (B,H_l,W_l)."""
    return F.interpolate(padding[:, None].float(), like.shape[-2:])[:, 0].bool()


def filled_up(pixels: Tensor, multiple: int) -> Tensor:
    """(B,3,H,W) with zeros at the bottom and the right, so that both sides are multiples of `multiple`."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple))


def cut_to_image(maps: Sequence[Tensor], strides: Sequence[int], size: Sequence[int]) -> list[Tensor]:
    """Takes away the cells that lie wholly in what `filled_up` added.

    Args:
        maps: L x (B,C_l,H_l,W_l) of the filled-up image.
        strides: of the levels.
        size: (H, W) before filling up.

    Returns:
        L x (B,C_l,ceil(H / stride),ceil(W / stride)), which `resized_padding` and positions relative to the image fit.
    """
    height, width = size
    return [m[..., : -(-height // s), : -(-width // s)] for m, s in zip(maps, strides, strict=True)]


def check_freeze(name: str, freeze: int, parts: Sequence[str]) -> None:
    """Freezing counts from the image upwards.

    Raises:
        ConfigError: there are not so many parts; they are listed.
    """
    if not 0 <= freeze <= len(parts):
        raise ConfigError(
            f"model.freeze = {freeze}: backbone '{name}' has {len(parts)} parts, from the image upwards: {', '.join(parts)}"
        )
