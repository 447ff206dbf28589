"""Plain ViTs, whose maps all have one stride, and the simple feature pyramid of ViTDet (arXiv 2203.16527).

Legend: B images, L levels, C channels of the ViT's map, D width of the pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from queryvision.errors import ConfigError
from queryvision.model.backbone_base import Backbone, cut_to_image, filled_up
from queryvision.model.timm_body import Trunk, body_maps

SCALES = (4.0, 2.0, 1.0, 0.5)  # cells of a level per cell of the map, along each side
TOLERANCE = math.sqrt(2)  # between the stride that is wanted and the one that is there: half an octave


class SimplePyramid(nn.Module):
    """Levels of several scales, each made from the same last map.

    As in detectron2:modeling/backbone/vit.py: transposed convolutions or a max pool, then a 1x1 and a 3x3 convolution without
    bias, each followed by LayerNorm over the channels.

    Args:
        channels: C; divisible by 4 for scale 4, by 2 for scale 2.
        scales: of the levels, out of `SCALES`.
        width: D.

    Raises:
        ValueError: a scale is unknown.
    """

    def __init__(self, channels: int, scales: Sequence[float], width: int = 256) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(channels, scale, width) for scale in scales)

    def forward(self, last: Tensor) -> list[Tensor]:
        """(B,C,H,W) -> L x (B,D,ceil(H * scale),ceil(W * scale))."""
        return [level(last) for level in self.levels]


def _level(channels: int, scale: float, width: int) -> nn.Sequential:
    if scale not in SCALES:
        raise ValueError(f"scale {scale}: not one of {SCALES}")
    half, quarter = channels // 2, channels // 4
    steps: dict[float, list[nn.Module]] = {
        4.0: [nn.ConvTranspose2d(channels, half, 2, 2), LayerNorm2d(half), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)],
        2.0: [nn.ConvTranspose2d(channels, half, 2, 2)],
        1.0: [],
        0.5: [nn.MaxPool2d(2, 2, ceil_mode=True)],  # ceil: a map of 2n-1 cells becomes one of n, as the padding does
    }
    inner = {4.0: quarter, 2.0: half}.get(scale, channels)
    return nn.Sequential(
        *steps[scale],
        nn.Conv2d(inner, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )


class VitBackbone(Backbone):
    """A plain ViT of timm (ViT, DeiT, DINOv2, DINOv3, EVA, SAM ...) with a simple pyramid on its last map.

    The levels have strides of a quarter, a half, one and two patches: 4, 8, 16, 32 for patches of 16 pixels, 7, 14, 28 for
    patches of 14 (a quarter is left out where it is no whole number). A wanted stride gets the nearest of these, and `strides`
    says which. Images are filled up with zeros to whole patches; position embeddings are interpolated to their number; the maps
    are cut to ceil(H / stride) x ceil(W / stride). As in ViTDet the last map is taken before the ViT's final norm, and patches
    in the padding of a batch are seen by the others.

    Args:
        trunk: the model, ready, with one level.
        strides: levels wanted.
        width: D, channels of each level.

    Attributes:
        body: the ViT, which pretrained weights fill.
        pyramid: learned from scratch.

    Raises:
        ConfigError: no level is near a wanted stride.
    """

    def __init__(self, trunk: Trunk, strides: Sequence[int], width: int = 256) -> None:
        super().__init__()
        patch, channels = trunk.levels[0].stride, trunk.levels[0].channels
        self.strides = near_strides(trunk.name, patch, strides)
        self.body = trunk.body
        self.index = trunk.levels[0].index
        self.multiple = trunk.multiple
        self.pyramid = SimplePyramid(channels, [patch / stride for stride in self.strides], width)
        self.name, self.mean, self.std = trunk.name, trunk.mean, trunk.std
        self.channels = (width,) * len(self.strides)
        self.train(self.training)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """See `Backbone.maps`."""
        (last,) = body_maps(self.body, [self.index], filled_up(pixels, self.multiple))
        return cut_to_image(self.pyramid(last), self.strides, pixels.shape[-2:])


def near_strides(name: str, patch: int, wanted: Sequence[int]) -> tuple[int, ...]:
    """For each wanted stride the nearest that a pyramid on patches of `patch` pixels has.

    Raises:
        ConfigError: the nearest is further away than half an octave, or is the nearest of two.
    """
    known = [int(patch / scale) for scale in SCALES if (patch / scale).is_integer()]
    given = [min(known, key=lambda stride, want=want: abs(math.log(stride / want))) for want in wanted]  # type: ignore[misc]
    for want, stride in zip(wanted, given, strict=True):
        if max(want / stride, stride / want) > TOLERANCE or given.count(stride) > 1:
            raise ConfigError(
                f"backbone '{name}' has no level of its own near stride {want}, only {known} (patches of {patch} pixels)"
            )
    return tuple(given)
