"""DETR (arXiv 2005.12872): one dense level, learned queries, nobody steers."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from queryvision.errors import ConfigError
from queryvision.head import Fit, Steering
from queryvision.model.backbone import make_backbone
from queryvision.model.builders.checks import HeadParts, check_at_least, check_sizes, make_heads
from queryvision.model.cross_attention import DenseCrossAttention
from queryvision.model.decoder import Decoder, DecoderLayer
from queryvision.model.encoder import DenseEncoder
from queryvision.model.neck import Projection
from queryvision.model.queries import LearnedQueries
from queryvision.model.query_model import QueryModel


def detr(
    heads: HeadParts,
    steering: Steering | None = None,
    *,
    backbone: str = "resnet50",
    stride: int = 32,
    frozen_norm: bool = True,
    freeze: int | None = None,
    dc5: bool = False,
    attention_maps: bool = False,
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
        heads: in the order in which they answer, or a function that makes them from `Fit`.
        steering: only its `quality` is used: DETR's queries have no anchors to steer.
        backbone: torchvision's or timm's name.
        stride: of the level that becomes the memory.
        frozen_norm: constant batch-norm statistics; False for a backbone that starts from random weights.
        freeze: parts of the backbone, from the image upwards, that are not trained; None: a ResNet's stem and first stage;
            timm's models are trained whole.
        dc5: last stage of the ResNet at stride 16, by dilation.
        attention_maps: the backbone also gives the levels from stride 4 on, with which a head makes masks of attention maps.
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
    check_sizes(width, num_heads, dropout)
    check_at_least(1, num_queries=num_queries, decoder_layers=decoder_layers, ffn_width=ffn_width)
    check_at_least(0, encoder_layers=encoder_layers, freeze=freeze or 0)
    strides = _halves(stride) if attention_maps else (stride,)
    trunk = make_backbone(backbone, strides, frozen_norm, dc5, freeze, width)
    maps = (*trunk.channels[:-1], width) if attention_maps else ()
    heads, slots = make_heads(heads, Fit(width, decoder_layers, maps=maps))

    def layer() -> DecoderLayer:
        look = DenseCrossAttention(width, num_heads, dropout)
        return DecoderLayer(width, num_heads, look, ffn_width, dropout, slots=slots > 0)

    return QueryModel(
        backbone=trunk,
        neck=Projection(trunk.channels[-1:], width),
        encoder=DenseEncoder(width, encoder_layers, num_heads, ffn_width, dropout),
        queries=LearnedQueries(num_queries, width, slots),
        decoder=Decoder([layer() for _ in range(decoder_layers)], nn.LayerNorm(width)),
        heads=heads,
        steering=replace(steering or Steering(), rank=None, first=None, later=None, hidden=None),
    )


def _halves(stride: int) -> tuple[int, ...]:
    """The strides from 4 to this one."""
    if stride not in (8, 16, 32):
        raise ConfigError(f"model.stride = {stride}: masks of attention maps need memory of stride 8, 16 or 32")
    return tuple(s for s in (4, 8, 16, 32) if s <= stride)


def detr_r50(heads: HeadParts, steering: Steering | None = None, *, dc5: bool = False, num_queries: int = 100) -> QueryModel:
    """DETR-R50 as published: 42.0 AP on COCO val2017 after 500 epochs; with `dc5` 43.3 (detr:README.md)."""
    return detr(heads, steering, backbone="resnet50", dc5=dc5, num_queries=num_queries)


def detr_r101(heads: HeadParts, steering: Steering | None = None, *, dc5: bool = False, num_queries: int = 100) -> QueryModel:
    """DETR-R101 as published: 43.5 AP on COCO val2017; with `dc5` 44.9 (detr:README.md)."""
    return detr(heads, steering, backbone="resnet101", dc5=dc5, num_queries=num_queries)


def detr_masks_r50(
    heads: HeadParts, steering: Steering | None = None, *, dc5: bool = False, num_queries: int = 100
) -> QueryModel:
    """DETR-R50 with masks as published: PQ 43.4 on COCO val2017; with `dc5` 44.6 (detr:README.md)."""
    return detr(heads, steering, backbone="resnet50", dc5=dc5, attention_maps=True, num_queries=num_queries)


def detr_masks_r101(
    heads: HeadParts, steering: Steering | None = None, *, dc5: bool = False, num_queries: int = 100
) -> QueryModel:
    """DETR-R101 with masks as published: PQ 45.1 on COCO val2017 (detr:README.md)."""
    return detr(heads, steering, backbone="resnet101", dc5=dc5, attention_maps=True, num_queries=num_queries)


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
