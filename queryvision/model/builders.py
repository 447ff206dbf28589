"""Builders: plain arguments in, a model out. The published numbers stand here, as defaults.

A builder takes `heads` and `steering` first; its keyword arguments are the settings `model.*` of a configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from queryvision.errors import ConfigError, nearest
from queryvision.head import Head, Sizes, Steering
from queryvision.model.backbone import make_backbone
from queryvision.model.decoder import Decoder, DecoderLayer, DenseCrossAttention
from queryvision.model.encoder import DenseEncoder
from queryvision.model.neck import Projection
from queryvision.model.queries import LearnedQueries
from queryvision.model.query_model import QueryModel

HeadParts = Sequence[Head] | Callable[[Sizes], Sequence[Head]]
"""Heads, or what makes them once the builder says what they must fit."""


def detr(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "resnet50",
    stride: int = 32,
    frozen_norm: bool = True,
    freeze: int | None = None,
    dc5: bool = False,
    width: int = 256,
    num_queries: int = 100,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    num_heads: int = 8,
    ffn_width: int = 2048,
    dropout: float = 0.1,
) -> QueryModel:
    """DETR (arXiv 2005.12872).

    Args:
        heads: in the order in which they answer, or a function that makes them from `Sizes`.
        steering: only its `quality` is used: DETR's queries have no anchors to steer.
        backbone: torchvision's or timm's name.
        stride: of the level that becomes the memory.
        frozen_norm: constant batch-norm statistics; False for a backbone that starts from random weights.
        freeze: parts of a ResNet, from the image upwards, that are not trained; None: the stem and the first stage.
        dc5: last stage of the ResNet at stride 16, by dilation.
        width: D.
        num_queries: the most objects an image can get.
        encoder_layers: 0 or more.
        decoder_layers: 1 or more.
        num_heads: attention heads.
        ffn_width: channels inside the feed-forward parts.
        dropout: in encoder and decoder.

    Raises:
        ConfigError: a number is out of range or does not fit the others, or nobody knows the backbone.
    """
    _check_sizes(width, num_heads, dropout)
    _check_at_least(1, num_queries=num_queries, decoder_layers=decoder_layers, ffn_width=ffn_width)
    _check_at_least(0, encoder_layers=encoder_layers, freeze=freeze or 0)
    trunk = make_backbone(backbone, (stride,), frozen_norm, dc5, freeze)
    heads = heads(Sizes(width, decoder_layers)) if callable(heads) else heads
    slots = sum(head.slots for head in heads)

    def layer() -> DecoderLayer:
        look = DenseCrossAttention(width, num_heads, dropout)
        return DecoderLayer(width, num_heads, look, ffn_width, dropout, slots=slots > 0)

    return QueryModel(
        backbone=trunk,
        neck=Projection(trunk.channels, width),
        encoder=DenseEncoder(width, encoder_layers, num_heads, ffn_width, dropout),
        queries=LearnedQueries(num_queries, width, slots),
        decoder=Decoder([layer() for _ in range(decoder_layers)], nn.LayerNorm(width)),
        heads=heads,
        steering=replace(steering or Steering(), rank=None, first=None, later=None, hidden=None),
    )


def detr_r50(heads: HeadParts, steering: Steering | None = None, *, dc5: bool = False, num_queries: int = 100) -> QueryModel:
    """DETR-R50 as published: 42.0 AP on COCO val2017 after 500 epochs; with `dc5` 43.3 (detr:README.md)."""
    return detr(heads, steering, backbone="resnet50", dc5=dc5, num_queries=num_queries)


def detr_r101(heads: HeadParts, steering: Steering | None = None, *, dc5: bool = False, num_queries: int = 100) -> QueryModel:
    """DETR-R101 as published: 43.5 AP on COCO val2017; with `dc5` 44.9 (detr:README.md)."""
    return detr(heads, steering, backbone="resnet101", dc5=dc5, num_queries=num_queries)


def detr_small(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "tf_efficientnet_lite0",
    stride: int = 16,
    frozen_norm: bool = True,
    width: int = 128,
    num_queries: int = 30,
    encoder_layers: int = 2,
    decoder_layers: int = 3,
    dropout: float = 0.0,
) -> QueryModel:
    """DETR for a laptop: the same parts, fewer and narrower; memory at stride 16 for small images. See `detr`."""
    return detr(
        heads,
        steering,
        backbone=backbone,
        stride=stride,
        frozen_norm=frozen_norm,
        width=width,
        num_queries=num_queries,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        num_heads=4,
        ffn_width=512,
        dropout=dropout,
    )


BUILDERS: tuple[Callable[..., QueryModel], ...] = (detr, detr_r50, detr_r101, detr_small)


def builder(name: str) -> Callable[..., QueryModel]:
    """The builder of a name.

    Raises:
        ConfigError: there is none; the valid names are listed.
    """
    known = {build.__name__: build for build in BUILDERS}
    if name not in known:
        raise ConfigError(f"model.name: there is no builder '{name}'; {nearest(name, known)}")
    return known[name]


def _check_at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise ConfigError(f"model.{name} = {value}: at least {least} is needed")


def _check_sizes(width: int, num_heads: int, dropout: float) -> None:
    _check_at_least(1, width=width, num_heads=num_heads)
    if width % 4:
        raise ConfigError(f"model.width = {width}: must be divisible by 4, for the sine positions")
    if width % num_heads:
        raise ConfigError(f"model.width = {width}: is not divisible by model.num_heads = {num_heads}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout = {dropout}: must be at least 0 and below 1")
